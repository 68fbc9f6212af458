"""nvlm-train data index, lint, stats, preview: what they find, what they print, what they leave alone."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from corpus import make_recipe, turns, write_image, write_image_rows, write_rows, write_text_rows
from nvlm_train import cli
from nvlm_train.batch import IGNORE_INDEX, SampleRef
from nvlm_train.data import charts, stats
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.data.preview import spans_of
from nvlm_train.recipe.resolve import recipe_to_dict

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"'"


def write_recipe(folder: Path, mixture: dict[str, Any], **changes: Any) -> str:
    """A recipe file over `mixture`."""
    recipe = make_recipe(folder, mixture, **changes)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    return str(path)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def hurt(path: Path) -> None:
    """Cuts an image in the middle: its header can still be read."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.fixture
def good(tmp_path: Path) -> str:
    """A recipe over 24 samples with images and 60 of text, all good."""
    mixture = {
        "pictures": {"path": str(write_image_rows(tmp_path / "data" / "pictures.jsonl", 24)), "weight": 0.5},
        "text": {"path": str(write_text_rows(tmp_path / "data" / "text.jsonl", 60)), "weight": 1.5},
    }
    return write_recipe(tmp_path, mixture)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["data", *argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# --------------------------------------------------------------------------------------------------------------- index


def test_index_builds_once_and_says_so(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(tmp_path)
    code, out, _ = run(capsys, "index", good, "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"]
    assert [(s["source"], s["state"], s["samples"], s["lines"]) for s in found["sources"]] == [
        ("pictures", "built", 24, 24),
        ("text", "built", 60, 60),
    ]
    new = files_below(tmp_path) - before
    assert new and all(path.startswith("run/data_index/") for path in new)
    code, out, _ = run(capsys, "index", good)
    assert code == 0 and len(re.findall(r"^\w+ +exists", out, re.MULTILINE)) == 2
    code, out, _ = run(capsys, "index", good, "--rebuild", "--json")
    assert [s["state"] for s in json.loads(out)["sources"]] == ["built", "built"]
    assert files_below(tmp_path) - before == new


@pytest.mark.parametrize("weight", ["0", "-1"])
def test_weights_are_above_zero(good: str, weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "index", good, f"data.mixture.text.weight={weight}")
    assert code == 2 and f"data.mixture.text.weight: {weight} is out of range; it must be more than 0" in err


def test_index_in_processes_gives_the_same_files(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        assert run(capsys, "index", good, f"data.index_dir={tmp_path / name}", "--workers", workers)[0] == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert files_below(one) == files_below(two) != set()
    for name in files_below(one):
        if name.endswith(".npy"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


def test_index_builds_the_rest_and_ends_with_2_when_training_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = {
        "absent": {"path": str(tmp_path / "nowhere.jsonl")},
        "bad": {"path": str(write_rows(tmp_path / "bad.jsonl", [b"x", {"messages": turns("what", "yes")}]))},
        "text": {"path": str(write_text_rows(tmp_path / "text.jsonl", 9))},
    }
    recipe = write_recipe(tmp_path, mixture)
    code, out, err = run(capsys, "index", recipe)
    assert code == 2
    assert re.search(r"^absent +failed", out, re.MULTILINE) and re.search(r"^text +built +9", out, re.MULTILINE)
    assert "nowhere.jsonl" in err and "1 of 2 lines cannot be used" in err
    code, out, _ = run(capsys, "index", recipe, "--json")
    assert code == 2
    assert [("error" in source, source["state"]) for source in json.loads(out)["sources"]] == [
        (True, "failed"),
        (True, "exists"),
        (False, "exists"),
    ]


# ---------------------------------------------------------------------------------------------------------------- lint


def test_lint_of_good_data(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(tmp_path)
    for flags in ([], ["--images", "--threads", "2"]):
        code, out, _ = run(capsys, "lint", good, *flags)
        assert code == 0 and "no problem in 2 sources" in out and out.count("\n       ok") == 2
    assert "images of 24 decoded" in out
    assert all(path.startswith("run/data_index/") for path in files_below(tmp_path) - before)


def many_problems(folder: Path) -> dict[str, Any]:
    """Two sources: 300 bad lines of four kinds between 20 good ones; images of which every second is cut short."""
    kinds: list[Any] = [
        b"{not json",
        {"messages": []},
        {"messages": turns("<image> what", "yes")},
        {"messages": turns("what", "yes"), "images": ["nowhere.png"]},
    ]
    rows: list[Any] = [{"messages": turns(str(k), "yes")} for k in range(20)]
    rows += [kinds[k % 4] for k in range(300)]
    texts = write_rows(folder / "texts.jsonl", rows)
    pictures = []
    for k in range(30):
        name = write_image(folder / f"{k}.png", 40, 40, seed=k)
        pictures.append({"messages": turns(f"{k} what", "yes"), "images": [name]})
        if k % 2:
            hurt(folder / name)
    path = write_rows(folder / "pictures.jsonl", pictures)
    return {"texts": {"path": str(texts)}, "pictures": {"path": str(path)}}


def test_lint_groups_hundreds_of_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, many_problems(tmp_path / "data"))
    code, out, _ = run(capsys, "lint", recipe, "--json", "--examples", "2")
    found = json.loads(out)
    assert (code, found["ok"], found["problems"]) == (2, False, 300)
    pictures, texts = found["sources"]
    groups = {g["reason"]: g for g in texts["problems"]}
    assert {reason: g["count"] for reason, g in groups.items()} == {
        "not JSON": 75,
        "empty conversation": 75,
        "marker count": 75,
        "missing image": 75,
    }
    assert [e["where"] for e in groups["not JSON"]["examples"]] == [
        f"{tmp_path}/data/texts.jsonl:21",
        f"{tmp_path}/data/texts.jsonl:25",
    ]
    assert "more than data.max_bad_share 0.01 allows" in texts["refused"]
    assert pictures["problems"] == [] and pictures["refused"] is None

    code, out, _ = run(capsys, "lint", recipe, "--images", "--threads", "2")
    assert code == 2
    assert "315 problems in 2 of 2 sources" in out
    assert re.search(r"^ +15  unreadable image$", out, re.MULTILINE)
    assert f"{tmp_path}/data/pictures.jsonl:2: image 1.png cannot be decoded" in out
    assert "... and 72 more" in out and "... and 12 more" in out
    assert len(out.splitlines()) < 40
    assert "training would refuse source 'texts'" in out


def test_lint_sees_repaired_images_although_the_index_keeps_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [{"messages": turns(str(k), "yes")} for k in range(9)]
    rows.append({"messages": turns("what", "yes"), "images": ["late.png"]})
    recipe = write_recipe(tmp_path, {"s": {"path": str(write_rows(tmp_path / "s.jsonl", rows))}}, data__max_bad_share=1)
    code, out, _ = run(capsys, "lint", recipe)
    assert code == 2 and "missing image" in out
    write_image(tmp_path / "late.png", 9, 9)
    before = files_below(tmp_path)
    code, out, _ = run(capsys, "lint", recipe, "--images")
    assert code == 0 and "`data index --rebuild` takes them in" in out and "images of 1 decoded" in out
    assert files_below(tmp_path) == before
    assert run(capsys, "index", recipe, "--rebuild")[0] == 0
    code, out, _ = run(capsys, "lint", recipe)
    assert code == 0 and "--rebuild" not in out and "10 of 10 records usable" in out


def test_lint_tells_of_a_source_that_cannot_be_read_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n")
    mixture = {
        "absent": {"path": str(tmp_path / "nowhere.jsonl")},
        "empty": {"path": str(empty)},
        "text": {"path": str(write_text_rows(tmp_path / "text.jsonl", 9))},
    }
    code, out, _ = run(capsys, "lint", write_recipe(tmp_path, mixture), "--json")
    found = json.loads(out)
    assert code == 2
    assert [[g["reason"] for g in s["problems"]] for s in found["sources"]] == [
        ["cannot be read"],
        ["empty source"],
        [],
    ]


def test_lint_notes_what_is_legal_but_good_to_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": turns(str(k), "yes")} for k in range(10)]
    long = {"messages": turns("what " * 300, "yes")}
    path = write_rows(tmp_path / "a.jsonl", [*rows, *rows[:3], long])
    held = write_rows(tmp_path / "held.jsonl", [*rows[:4], {"messages": turns("new", "yes")}])
    changes = {"validation": {"sources": {"held": {"path": str(held)}}}}
    recipe = write_recipe(tmp_path, {"a": {"path": str(path)}}, **changes)
    code, out, _ = run(capsys, "lint", recipe)
    assert code == 0
    assert "3 repeat an earlier sample of this source" in out
    assert (
        f"1 longer than data.max_tokens_per_sample 200, dropped (data.overlong: fewer_tiles); the first: {path}:14"
        in out
    )
    assert "4 are trained on as well, in source 'a': validation is not apart" in out
    code, out, _ = run(capsys, "lint", recipe, "data.overlong=error")
    assert code == 2 and re.search(r"1  over-long$", out, re.MULTILINE)


def test_lint_and_stats_refuse_what_has_nothing_to_validate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {name: {"path": str(write_text_rows(tmp_path / f"{name}.jsonl", n))} for name, n in (("a", 9), ("b", 60))}
    recipe = write_recipe(tmp_path, sources, validation={"held_out_share": 0.05, "best": "a"})
    code, out, _ = run(capsys, "lint", recipe)
    assert code == 2 and "1  nothing held out" in out and "training would refuse validation.best: source 'a'" in out
    code, _, err = run(capsys, "stats", recipe)
    assert code == 2 and "error: validation.best: source 'a' has no held-out sample" in err
    assert run(capsys, "lint", recipe, "validation.best=b")[0] == 0


def test_lint_tells_of_tars_that_may_be_cut_and_of_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tars").mkdir()
    for k in range(2):
        with tarfile.open(tmp_path / "tars" / f"{k}.tar", "w") as tar:
            for name, data in ((f"{k}.json", json.dumps(turns("q", "a")).encode()), (f"{k}.txt", b"x" * 700)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "file").touch()
    source = {"t": {"kind": "webdataset", "path": str(tmp_path / "tars")}}
    recipe = write_recipe(tmp_path, source)
    assert "cut?" not in run(capsys, "lint", recipe)[1]
    whole = (tmp_path / "tars" / "1.tar").read_bytes()
    members_end = 2 * 512 + 512 + 1024
    for end in (members_end, members_end - 100):  # after the last member, and in its padding
        (tmp_path / "tars" / "1.tar").write_bytes(whole[:end])
        code, out, _ = run(capsys, "lint", recipe)
        assert code == 0 and "note  cut? 1 of 2 tars have no end-of-archive block" in out and "1.tar" in out, end
    cache = f"data.remote_cache={{path: {tmp_path / 'file' / 'cache'}, max_gib: 1}}"
    code, out, _ = run(capsys, "lint", recipe, cache)
    assert code == 2 and "1  not writable" in out and "cache cannot be written (Not a directory)" in out


def test_what_data_says_is_not_obeyed_by_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"messages": turns("\x1b]0;owned\x07 what", "yes")},
        {"messages": turns("what", "yes"), "images": ["\x1b[31m"]},
    ]
    recipe = write_recipe(tmp_path, {"s": {"path": str(write_rows(tmp_path / "s.jsonl", rows))}}, data__max_bad_share=1)
    for verb in ("lint", "preview"):
        _, out, _ = run(capsys, verb, recipe)
        assert "\x1b" not in out and "\\x1b" in out


# --------------------------------------------------------------------------------------------------------------- stats


def test_stats_are_those_of_the_plan(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "stats", good, "--world-size", "3", "--json", "--steps", "4")
    assert code == 0
    found = json.loads(out)
    plan = opened(tmp_path, good, world_size=3)
    assert (found["world_size"], found["steps"]) == (3, 8)
    for name, one in found["sources"].items():
        rows = plan.indexes[name].rows
        assert one["samples"] == len(rows) and one["tokens"] == rows["tokens"].sum()
        assert one["trained"] == rows["trained"].sum() and one["tiles"] == rows["tiles"].sum()
        assert one["per_sample"]["tokens"]["max"] == rows["tokens"].max()
        assert one["per_sample"]["tokens"]["mean"] == pytest.approx(rows["tokens"].mean())
    refs = [ref for step in range(8) for ref in plan.draws(step)]
    drawn = {name: sum(ref.source == name for ref in refs) for name in found["sources"]}
    lengths = {name: plan.indexes[name].rows["trained"].mean() for name in drawn}
    trained = {name: drawn[name] * lengths[name] for name in drawn}
    assert drawn["pictures"] > 20
    for name, one in found["sources"].items():
        assert one["samples_drawn"] == drawn[name] and one["share_of_samples"] == pytest.approx(drawn[name] / 128)
        assert one["share_of_trained_tokens"] == pytest.approx(trained[name] / sum(trained.values()))
        assert one["epochs"] == pytest.approx(drawn[name] / one["samples"])

    # packing, counted a second way
    tokens = packs = nulls = turns_of_ranks = 0
    mean_cost = worst_cost = 0.0
    for step in (0, 2, 4, 6):
        for ranks in plan.deal_step(step):
            held = [pack for packs_of_rank in ranks for pack in packs_of_rank if pack.samples]
            tokens, packs = tokens + sum(p.tokens for p in held), packs + len(held)
            turns_of_ranks, nulls = turns_of_ranks + 3, nulls + 3 - len(held)
            costs = [sum(p.cost for p in packs_of_rank) for packs_of_rank in ranks]
            mean_cost, worst_cost = mean_cost + sum(costs) / 3, worst_cost + max(costs)
    packing = found["packing"]
    assert packing["fill"] == pytest.approx(tokens / (packs * 256))
    assert packing["null_share"] == pytest.approx(nulls / turns_of_ranks) and nulls > 0
    assert packing["utilisation"] == pytest.approx(mean_cost / worst_cost)
    assert packing["imbalance"] == pytest.approx(worst_cost / mean_cost) and packing["imbalance"] > 1
    assert packing["samples_per_step"] == {"min": 16, "mean": 16, "max": 16}


def opened(folder: Path, recipe: str, world_size: int = 1) -> DataPlan:
    from nvlm_train.recipe.load import load_recipe

    return open_data(load_recipe(recipe).recipe, rank=0, world_size=world_size)


def test_spread_of_values_and_of_draws() -> None:
    assert stats.spread(np.array([10, 1, 3, 2])) == {"min": 1, "median": 2, "mean": 4, "p99": 10, "max": 10}
    # a quarter of the draws are 5, the rest 1: the median is 1, the mean 2
    weighted = stats.spread(np.array([5, 1, 1, 1, 1, 1, 1]), [np.array([0.25]), np.full(6, 0.125)])
    assert (weighted["median"], weighted["mean"], weighted["p99"]) == (1, 2, 5)
    assert stats.spread(np.empty(0))["max"] == 0


def test_stats_tables_count_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [{"messages": turns(str(k), "yes")} for k in range(40)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, b"x", b"y", {"messages": turns("what " * 300, "yes")}])
    code, out, _ = run(capsys, "stats", write_recipe(tmp_path, {"a": {"path": str(path)}}))
    assert code == 0
    line = next(line.split() for line in out.splitlines() if line.startswith("  a "))
    assert line[1] == "40" and line[-4:] == ["1", "0", "0", "2"]  # over-long, fewer tiles, cut text, bad
    assert "null packs" in out and "predicted" in out and "µs a sample" in out


@pytest.mark.parametrize("kind", ["svg", "png", "html"])
def test_stats_plots(good: str, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / f"plot.{kind}"
    before = files_below(tmp_path)
    assert run(capsys, "stats", good, "--plot", str(path))[0] == 0
    new = files_below(tmp_path) - before
    assert {p for p in new if not p.startswith("run/data_index/")} == {f"out/plot.{kind}"}
    if kind == "png":
        with Image.open(path) as image:
            colours = {colour for _, colour in image.getcolors(maxcolors=1 << 20) or []}
        wanted = {tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in charts.COLOURS[:2]}
        assert wanted <= colours
        return
    text = path.read_text(encoding="utf-8")
    for word in ("Tokens of a sample", "Tiles of a sample", "pictures", *charts.COLOURS[:2]):
        assert word in text
    assert ("full packs" in text) == (kind == "html")
    assert not re.search(r"(src|href)\s*=|url\(|https?://(?!www\.w3\.org/2000/svg)|<script", text)


def test_shares_of_a_histogram_add_up_to_one(good: str, tmp_path: Path) -> None:
    for histogram in stats.histograms(opened(tmp_path, good)):
        assert sum(sum(heights) for heights in histogram.layers.values()) == pytest.approx(1.0)


def test_stats_refuses_a_plot_it_cannot_draw(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "stats", good, "--plot", "x.pdf")
    assert code == 2 and "end the name in .svg, .png or .html" in err


# ------------------------------------------------------------------------------------------------------------- preview


def test_spans_are_the_stream(good: str, tmp_path: Path) -> None:
    """Every token once, in order; trained exactly where a label asks for it; a broken character is put together."""
    rows = [{"messages": turns("what is ä 漢 🎉?", "größer 🎉\n")}]
    write_rows(tmp_path / "data" / "text.jsonl", rows)
    plan = opened(tmp_path, good)
    for ref in [SampleRef("text", 0, 0), *(SampleRef("pictures", k, 0) for k in range(24))]:
        loaded = plan.load(ref)
        spans = spans_of(plan, loaded)
        assert [i for span in spans for i in span.ids] == loaded.rendered.input_ids.tolist()
        assert [span.begin for span in spans] == np.cumsum([0, *(len(s.ids) for s in spans[:-1])]).tolist()
        trained = [span.begin + k for span in spans if span.trained for k in range(len(span.ids))]
        assert trained == (np.flatnonzero(loaded.rendered.labels != IGNORE_INDEX) + 1).tolist()
        assert [span.tile for span in spans if span.kind == "tile"] == list(range(sum(map(len, loaded.tiles))))
    text = "".join(span.text for span in spans_of(plan, plan.load(SampleRef("text", 0, 0))))
    assert "größer 🎉\n<|im_end|>" in text and "\ufffd" not in text


def test_preview_of_a_step_as_text(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "preview", good, "--step", "2", "--world-size", "2", "--samples", "2")
    assert code == 0
    assert re.search(r"^step 2: 16 samples in \d+ packs of at most 256 tokens, \d+ micro-steps on 2 ranks$", out, re.M)
    assert re.search(r"^  micro-step 0 rank 1 +\d+ tokens +\d+ tiles  cost +\d+%  .*(pictures|text)", out, re.MULTILINE)
    assert "pictures row" in out and "text row" in out
    assert re.search(r"^ +\d+  \[tile 1: 4 image tokens\]$", out, re.MULTILINE)
    assert re.search(r"<\|im_start\|>assistant\\n«\w+<\|im_end\|>\\n»$", out, re.MULTILINE)


def test_preview_says_who_reads_which_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nvlm_x: tags in the stream, no image tokens. nvlm_h: the thumbnail's alone. The counts are of such a stream."""
    names = [write_image(tmp_path / "data" / "wide.png", 40, 9)]  # 4 x 1 tiles and a thumbnail
    source = write_rows(tmp_path / "data" / "a.jsonl", [{"images": names, "messages": turns("what", "yes")}] * 3)
    found = {}
    for architecture in ("nvlm_d", "nvlm_x", "nvlm_h"):
        changes = {} if architecture == "nvlm_d" else {"model__architecture": architecture, "data__pack_tiles": 12}
        recipe = write_recipe(tmp_path, {"a": {"path": str(source)}}, **changes)
        code, out, _ = run(capsys, "preview", recipe, "--source", "a", "--samples", "1")
        assert code == 0
        found[architecture] = out
        code, out, _ = run(capsys, "preview", recipe, "--source", "a", "--samples", "1", "--json")
        (one,) = json.loads(out)["samples"]
        assert one["tokens"] == sum(len(token["ids"]) for token in one["stream"])
        placeholders = sum(token["kind"] == "tile" for token in one["stream"])
        assert placeholders == {"nvlm_d": 5, "nvlm_x": 0, "nvlm_h": 1}[architecture]
        assert len(one["reads"]) == {"nvlm_d": 0, "nvlm_x": 6, "nvlm_h": 1}[architecture]
        code, out, _ = run(capsys, "stats", recipe, "--json")
        (row,) = json.loads(out)["sources"].values()
        assert code == 0 and row["tokens"] == 3 * one["tokens"] and row["tiles"] == 3 * 5
    assert not re.search("^  reads", found["nvlm_d"], re.MULTILINE) and "[tile 5: 4 image tokens]" in found["nvlm_d"]
    assert "image tokens]" not in found["nvlm_x"] and "<tile_global_thumbnail>" in found["nvlm_x"]
    assert re.search(r"^  reads +tokens \d+ to \d+: tile 1$", found["nvlm_x"], re.MULTILINE)
    assert re.search(r"^ +tokens \d+ to \d+: tiles 1 to 5$", found["nvlm_x"], re.MULTILINE)
    assert "[tile 5: 4 image tokens]" in found["nvlm_h"] and "<tile_1>" not in found["nvlm_h"]


def test_preview_of_one_row(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "preview", good, "--source", "pictures", "--row", "3", "--json")
    (one,) = json.loads(out)["samples"]
    assert code == 0 and one["where"] == f"{tmp_path}/data/pictures.jsonl:4"
    assert [image["name"] for image in one["images"]] == ["pictures_3_0.png", "pictures_3_1.png"]
    assert sum(token["trained"] for token in one["stream"]) > 0
    assert sum(len(token["ids"]) for token in one["stream"]) == one["tokens"]
    for argv, message in (
        (["--source", "nobody"], "--source nobody: is not a source of this recipe; use one of pictures, text"),
        (["--source", "text", "--row", "60"], "--row 60: source 'text' has 60 usable samples; use 0 to 59"),
        (["--row", "1"], "--row 1: needs --source NAME"),
    ):
        code, _, err = run(capsys, "preview", good, *argv)
        assert code == 2 and message in err


def test_preview_of_a_line_as_messages_number_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines count what was dropped too; a dropped one says why; in several files one must be named."""
    rows = [{"messages": turns(f"{k} what", "yes")} for k in range(6)]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "a.jsonl", [rows[0], "{", *rows[1:]])
    write_rows(tmp_path / "data" / "b.jsonl", rows[:3])
    mixture = {"s": {"path": str(tmp_path / "data")}, "one": {"path": str(tmp_path / "data" / "a.jsonl")}}
    recipe = write_recipe(tmp_path, mixture, data__max_bad_share=1)
    for argv, where in ((["one", "--line", "4"], "a.jsonl:4"), (["s", "--line", "b.jsonl:3"], "b.jsonl:3")):
        code, out, _ = run(capsys, "preview", recipe, "--source", *argv, "--json")
        (sample,) = json.loads(out)["samples"]
        assert code == 0 and sample["where"].endswith(where)
    for argv, message in (
        (["--source", "one", "--line", "2"], "a.jsonl:2 was dropped as not JSON"),
        (["--source", "s", "--line", "3"], "--line 3: is in several files of source 's'"),
        (["--source", "one", "--line", "9"], "--line 9: source 'one' has no sample there; it has 7 records"),
        (["--source", "one", "--line", "x"], "--line x: is not N or FILE:N"),
        (["--line", "3"], "--line 3: needs --source NAME"),
    ):
        code, _, err = run(capsys, "preview", recipe, *argv)
        assert code == 2 and message in err, err


def test_an_output_dir_that_cannot_be_written_is_named_as_such(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for key, value in (("output_dir", tmp_path / "file"), ("data.index_dir", tmp_path / "file" / "x")):
        for verb in ("index", "lint", "stats"):
            code, _, err = run(capsys, verb, good, f"{key}={value}")
            assert code == 2 and f"error: {key} {value}: cannot be written" in err


def test_large_row_groups_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvlm_train.data.sources import open_source, parquet
    from nvlm_train.recipe.schema import Source
    from test_formats import write_parquet

    write_parquet(tmp_path / "a.parquet", [{"question": f"q {k}", "answer": "x" * 50} for k in range(40)], group=20)
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 100)

    def notes(**given: Any) -> list[str]:
        source = {"kind": "hf", "path": str(tmp_path / "a.parquet"), **given}
        return open_source("s", Source.model_validate(source)).notes()

    (note,) = notes()
    assert note.startswith("reading one sample decodes its whole row group: 20 rows, 0 MiB; write row groups of")
    assert notes(shuffle="shard_groups") == []
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 10**6)
    assert notes() == []


def test_page_of_a_step(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "page.html"
    before = files_below(tmp_path)
    argv = ["preview", good, "--step", "1", "--world-size", "2", "--samples", "4", "--html", str(path)]
    assert run(capsys, *argv)[0] == 0
    new = {p for p in files_below(tmp_path) - before if not p.startswith("run/data_index/")}
    assert new == {"out/page.html"}
    text = path.read_text(encoding="utf-8")
    plan = opened(tmp_path, good, world_size=2)
    dealt = plan.deal_step(1)
    packs = [pack for ranks in dealt for held in ranks for pack in held]
    # packs with their boundaries: a bar a pack, a box a sample, as wide as its tokens
    assert text.count('<div class="bar">') == len(packs)
    boxes = re.findall(r'class="seg(?: shown)?" (?:href="#sample-\d+" )?title="[^"]*" style="flex:(\d+);', text)
    lengths = [int(plan.indexes[ref.source].rows[ref.row]["tokens"]) for pack in packs for ref in pack.samples]
    assert list(map(int, boxes)) == lengths and len(lengths) == 16
    # the samples: every tile as a picture with its tag, trained tokens coloured
    shown = re.findall(r'<span>row (\d+)</span><span class="mono soft">[^<]*/(\w+)\.jsonl:', text)
    assert len(shown) == 4 and {name for _, name in shown} == {"pictures", "text"}
    views = [plan.load(SampleRef(name, int(row), 0)) for row, name in shown]
    assert text.count('alt="tile"') == sum(len(tiles) for view in views for tiles in view.tiles) > 0
    assert text.count("&lt;tile_global_thumbnail&gt;</span>") >= 1
    assert len(re.findall(r'<span class="t tile" title="positions \d+ to \d+', text)) == text.count('alt="tile"')
    coloured = re.findall(r'<span class="t \w+ trained" title="position \d+, id ([\d ]+), trained">', text)
    trained = sum(int((view.rendered.labels != IGNORE_INDEX).sum()) for view in views)
    assert sum(len(ids.split()) for ids in coloured) == trained > 0
    assert "--trained:#" in text and ".t.trained { background: var(--trained)" in text


def test_page_escapes_a_hostile_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "<script>alert(2)</script>"
    name = write_image(folder / "<b onclick=x>'\".png", 30, 10)
    row = {"messages": [{"role": "system", "content": HOSTILE}, *turns(f"<image>{HOSTILE}", HOSTILE)], "images": [name]}
    path = write_rows(folder / "h.jsonl", [row])
    recipe = write_recipe(tmp_path, {"h": {"path": str(path)}}, data__max_tokens_per_sample=256)
    for argv in (["--samples", "9"], ["--source", "h"]):
        page = tmp_path / "page.html"
        assert run(capsys, "preview", recipe, *argv, "--html", str(page))[0] == 0
        text = page.read_text(encoding="utf-8")
        assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text
        assert_harmless(text)


def assert_harmless(text: str) -> None:
    """Read by a parser: only tags and attributes that we write, no script, no address outside the page."""
    from html.parser import HTMLParser

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "iframe", "object", "embed", "form", "b onclick=x", "base", "link")
            for name, value in attrs:
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "href"):
                    assert value is not None and value.startswith(("data:image/", "#")), value

    Check().feed(text)
    assert "default-src 'none'" in text and "<script" not in text and "onerror=alert(1)>" not in text


def test_a_sample_that_broke_since_is_shown_as_such(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "index", good)[0] == 0
    hurt(tmp_path / "data" / "pictures_4_0.png")
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "preview", good, "--source", "pictures", "--row", "4")
    assert code == 2 and "cannot be used: unreadable image: " in out
    assert run(capsys, "preview", good, "--source", "pictures", "--row", "4", "--html", str(page))[0] == 2
    assert "cannot be used: unreadable image: " in page.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- sources of other kinds


def other_kinds(folder: Path) -> dict[str, Any]:
    """Eight samples each as LLaVA's JSON array, in a tar, as text; and as parquet where pyarrow is there."""
    folder.mkdir(parents=True)
    pictures = [(folder / write_image(folder / f"{k}.png", 9 + 5 * k, 20, seed=k)).read_bytes() for k in range(8)]
    rows = [
        {"image": f"{k}.png", "conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": f"{k}"}]}
        for k in range(8)
    ]
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            turns_of = json.dumps(row["conversations"]).encode()
            cut = picture[: len(picture) // 2] if k == 5 else picture
            for name, data in ((f"{k}.png", cut), (f"{k}.json", turns_of)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_rows(folder / "text.jsonl", [{"text": f"once {k}"} for k in range(8)])
    mixture = {
        "array": {"kind": "json", "path": str(folder / "a.json")},
        "tar": {"kind": "webdataset", "path": str(folder / "a.tar")},
        "text": {"kind": "text", "path": str(folder / "text.jsonl")},
    }
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return mixture
    table = [
        {"images": [{"bytes": picture, "path": None}], "texts": [{"user": "what", "assistant": str(k)}]}
        for k, picture in enumerate(pictures)
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "a.parquet")
    return {**mixture, "table": {"kind": "hf", "path": str(folder / "a.parquet")}}


def test_all_verbs_know_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = other_kinds(tmp_path / "data")
    recipe = write_recipe(tmp_path, mixture)
    code, out, _ = run(capsys, "index", recipe, "--json")
    assert code == 0 and [s["samples"] for s in json.loads(out)["sources"]] == [8] * len(mixture)
    assert run(capsys, "lint", recipe)[0] == 0
    code, out, _ = run(capsys, "lint", recipe, "--images")
    assert code == 2 and "1 problem in 1 of" in out and "a.tar" in out and "unreadable image" in out
    code, out, _ = run(capsys, "stats", recipe, "--json")
    assert code == 0 and {n: s["with_images"] for n, s in json.loads(out)["sources"].items()} == {
        name: 0 if name == "text" else 8 for name in mixture
    }
    for name in mixture:
        page = tmp_path / "page.html"
        code, out, _ = run(capsys, "preview", recipe, "--source", name, "--row", "2", "--json", "--html", str(page))
        (one,) = json.loads(out)["samples"]
        assert code == 0 and one["trained"] > 0 and len(one["images"]) == (name != "text")
        assert page.read_text(encoding="utf-8").count('alt="tile"') >= (name != "text")


def test_a_blend_that_cannot_be_read_is_a_problem_among_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = tmp_path / "meta.json"
    text = write_text_rows(tmp_path / "text.jsonl", 9)
    meta.write_text(json.dumps({"inner": {"root": str(tmp_path), "annotation": str(text), "repeat_time": 1}}))
    mixture = {
        "blend": {"kind": "internvl", "path": str(tmp_path / "nowhere.json")},
        "meta": {"kind": "internvl", "path": str(meta)},
    }
    recipe = write_recipe(tmp_path, mixture)
    code, out, _ = run(capsys, "lint", recipe, "--json")
    found = {source["name"]: source for source in json.loads(out)["sources"]}
    assert code == 2 and found["blend"]["problems"][0]["reason"] == "cannot be read"
    assert found["meta-inner"]["samples"] == 9 and found["meta-inner"]["problems"] == []
    code, out, err = run(capsys, "index", recipe)
    assert code == 2 and re.search(r"^blend +failed", out, re.MULTILINE) and "nowhere.json" in err


def test_stats_in_steps_of_packs_and_with_limited_epochs(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "stats", good, "global_batch.samples=null", "global_batch.packs=3", "--json")
    assert code == 0 and json.loads(out)["packing"]["packs_per_step"] == {"min": 3, "mean": 3, "max": 3}
    limited = ["data.mixture.pictures.max_epochs=1", "data.mixture.text.max_epochs=1", "max_steps=5"]
    code, out, _ = run(capsys, "stats", good, *limited, "--json")
    found = json.loads(out)["sources"]
    assert code == 0 and max(one["epochs"] for one in found.values()) <= 1
    code, out, _ = run(capsys, "stats", good, *limited)
    # both end in the only block of 84 samples, which the run of 5 steps of 16 does not reach the end of
    assert "pictures: max_epochs 1 end between steps 1 and 5 (samples 1 to 80); what is left of it is spread" in out
    plan = opened(tmp_path, good)
    assert found["pictures"]["samples_drawn"] + found["text"]["samples_drawn"] == 80 <= sum(plan.mixture.sizes)
