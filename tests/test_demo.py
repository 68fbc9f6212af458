"""The demo: its data is what it says, its recipes fit it, its backbones load; and the scripts around it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

import make_demo_backbones
import make_demo_data
from nvlm_train.data import tiling
from nvlm_train.data.tokenizer import load_tokenizer
from nvlm_train.model.pretrained import open_language_model_folder, open_vision_folder
from nvlm_train.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("recipes/quickstart.yaml", "recipes/quickstart/1_pretrain.yaml", "recipes/quickstart/2_sft.yaml")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data with a hundredth of its pictures."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data.make(folder, scale=0.01)
    return folder


def rows(file: Path) -> Iterator[dict]:
    return (json.loads(line) for line in file.read_text().splitlines())


def question_and_answer(row: dict) -> tuple[str, str]:
    user, assistant = row["messages"]
    return user["content"], assistant["content"]


# -------------------------------------------------------------------------------------------------------------- data


def test_no_digit_is_in_two_parts() -> None:
    split = make_demo_data.split_digits(0)
    assert {part: len(digits) for part, digits in split.items()} == {"train": 1400, "validation": 100, "heldout": 297}
    assert len(np.unique(np.concatenate(list(split.values())))) == 1797


def test_pictures_show_only_digits_of_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inks, _ = make_demo_data.load_digits()
    names = {ink.tobytes(): n for n, ink in enumerate(inks)}
    assert len(names) == 1797  # all scans differ, so a scan tells its number
    drawn: list[set[int]] = []
    real = make_demo_data.write_pairs

    def spy_parts(*args: object) -> list[dict]:
        drawn.append(set())
        return real(*args)  # type: ignore[arg-type]

    def spy(shown: list[np.ndarray], rng: np.random.Generator) -> Image.Image:
        drawn[-1].update(names[ink.tobytes()] for ink in shown)
        return Image.new("RGB", (48 * len(shown), 48))

    monkeypatch.setattr(make_demo_data, "write_pairs", spy_parts)
    monkeypatch.setattr(make_demo_data, "picture", spy)
    make_demo_data.make(tmp_path, scale=0.05)
    split = make_demo_data.split_digits(0)
    assert drawn[0] <= set(split["train"]) and drawn[1] <= set(split["validation"])
    assert drawn[2] <= set(split["heldout"]) | set(split["train"])  # the train part's single digits come last
    assert len(drawn[0]) > 100


def test_answers_are_right(demo: Path) -> None:
    """Each picture's four answers agree with one another and with the arithmetic."""
    for file in ("pairs.jsonl", "validation_pairs.jsonl", "heldout_pairs.jsonl"):
        by_picture: dict[str, dict[str, int]] = {}
        for row in rows(demo / file):
            user, assistant = row["messages"]
            image, text = user["content"]
            assert text["text"] == f"\n{row['task']}?"
            assert (demo / image["image"]).is_file()
            by_picture.setdefault(image["image"], {})[row["task"]] = int(assistant["content"])
        assert by_picture
        for said in by_picture.values():
            assert said["sum"] == said["left"] + said["right"] and said["max"] == max(said["left"], said["right"])


def test_text_tasks_are_right_and_held_out(demo: Path) -> None:
    parts = {part: list(rows(demo / f"{part}text.jsonl")) for part in ("", "validation_", "heldout_")}
    questions = [question_and_answer(row)[0] for part in parts.values() for row in part]
    assert len(questions) == len(set(questions)) == 1000 + 8**4
    held_out = (len(parts["validation_"]) + len(parts["heldout_"])) / len(questions)
    assert 0.099 < held_out < 0.101  # 10 % of the strings, rounded per task
    for row in (row for part in parts.values() for row in part):
        question, answer = question_and_answer(row)
        if row["task"] == "add":
            a, b = question.removesuffix("=").split("+")
            assert int(answer) == int(a) + int(b)
        else:
            assert question == f"rev {answer[::-1]}"


def test_the_same_seed_gives_the_same_data(demo: Path, tmp_path: Path) -> None:
    make_demo_data.make(tmp_path, scale=0.01)
    files = sorted(p.relative_to(demo) for p in demo.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((demo / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_pictures_become_the_tiles_they_are_meant_for(demo: Path) -> None:
    """Two digits: a tile each and a thumbnail; one digit: one tile. The left tile shows the left digit."""
    recipe = load_recipe(ROOT / RECIPES[2]).recipe
    px, max_tiles = recipe.model.vision.image_size, recipe.data.tiling.max_tiles
    assert px == make_demo_data.TILE
    with (
        Image.open(demo / "images/train/pair_00000.png") as pair,
        Image.open(demo / "images/train/digit_00000.png") as one,
    ):
        assert tiling.num_tiles(*one.size, max_tiles, px, True) == 1
        tiles = tiling.cut(pair.convert("RGB"), max_tiles, px, True)
        assert tiles.shape == (3, 3, px, px)
        halves = [
            np.asarray(pair.crop((48 * i, 0, 48 * i + 48, 48)).resize((px, px))).transpose(2, 0, 1) for i in (0, 1)
        ]
    for tile, half, other in zip(tiles, halves, halves[::-1], strict=False):
        near, far = (np.abs(tile.astype(int) - h).mean() for h in (half, other))
        assert near < far / 2  # measured: 1.6 and 57 grey levels


# --------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_the_same_to_transformers(demo: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(demo / "tokenizer"), AutoTokenizer.from_pretrained(demo / "tokenizer")
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    for text in (
        "Answer the questions.",
        "rev kdpj",
        "17+5=",
        "<Image><tile_1>",
        "</Image>\nleft?",
        "naïve 漢字\n\n  x",
    ):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ours.encode(text)) == text
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "17+5="}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nAnswer the questions.<|im_end|>\n"
        "<|im_start|>user\n17+5=<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tags_are_short_and_letters_and_digits_single(demo: Path) -> None:
    tokenizer = load_tokenizer(demo / "tokenizer")
    for tag in ("<tile_1>", "<tile_2>", "<tile_global_thumbnail>"):
        assert len(tokenizer.encode(tag)) == 5  # all alike, as with Qwen2
    for word in (make_demo_data.LETTERS, "0123456789"):
        assert len(tokenizer.encode(word)) == len(word)


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_fit_the_data(demo: Path, path: str) -> None:
    recipe = load_recipe(ROOT / path).recipe
    assert load_tokenizer(demo / "tokenizer").vocab_size <= recipe.model.language_model.vocab_size
    assert recipe.train.vision == "frozen"
    sources = {**recipe.data.mixture, **(recipe.validation.sources if recipe.validation else {})}
    for source in sources.values():
        assert (demo / Path(source.path).relative_to("demo/data")).is_file()


def test_stages_differ_only_where_they_should() -> None:
    first, second = (load_recipe(ROOT / path).recipe for path in RECIPES[1:])
    assert first.model == second.model and first.tokenizer == second.tokenizer
    assert (first.train.projector, first.train.language_model) == ("full", "frozen")
    assert (second.train.projector, second.train.language_model) == ("full", "full")
    assert second.init_from.run is not None and second.init_from.run.path == first.output_dir


# --------------------------------------------------------------------------------------------------------- backbones


def test_backbones_are_folders_in_the_published_formats(demo: Path, tmp_path: Path) -> None:
    """Three steps each; what they learn is the quickstart's to show."""
    torch.set_num_threads(1)
    recipe = load_recipe(ROOT / RECIPES[0], [f"tokenizer.path={demo / 'tokenizer'}"]).recipe
    make_demo_backbones.train_vision(tmp_path, recipe.model.vision, steps=3)
    make_demo_backbones.train_language_model(tmp_path, demo, recipe, steps=3)
    tower = open_vision_folder(tmp_path / "vision", recipe.model.vision)
    decoder = open_language_model_folder(tmp_path / "language_model", recipe.model.language_model)
    assert tower.shape("vision_model.encoder.layers.2.attn.qkv.weight") == (192, 64)
    assert "language_model.lm_head.weight" in decoder.names()
    assert load_tokenizer(tmp_path / "language_model").vocab_size == load_tokenizer(demo / "tokenizer").vocab_size


# ----------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", ["quickstart", "test", "install"])
def test_scripts_explain_themselves(script: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), "--help"], capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: scripts/" + script)


def test_quickstart_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart"), "--cleen"], capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 2 and "usage" in done.stderr


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; .*)?", line).groups()  # type: ignore[union-attr]
            pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    wanted = [Requirement(text) for text in metadata.requires("nvlm_train") or []]
    assert len(wanted) > 10
    for requirement in wanted:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "nvlm-train":
            assert requirement.specifier.contains(pinned[name]), requirement


def load_script(path: str) -> ModuleType:
    loader = SourceFileLoader(Path(path).stem, str(ROOT / path))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    return load_script("scripts/compare_architectures")


def test_every_run_of_the_comparison_is_a_valid_recipe(comparison: ModuleType, tmp_path: Path) -> None:
    for architecture in comparison.ARCHITECTURES:
        for tags in comparison.TAGS:
            run = comparison.Run(tmp_path, architecture, tags, seed=7, steps=8)
            for stage, steps in (("1_pretrain", 2), ("2_sft", 8)):
                recipe = load_recipe(ROOT / f"recipes/quickstart/{stage}.yaml", run.overrides(stage)).recipe
                assert (recipe.model.architecture, recipe.data.tiling.tags) == (architecture, tags)
                assert (recipe.seed, recipe.max_steps, recipe.checkpoint.every_steps) == (7, steps, steps)
                start = recipe.init_from.run.path if recipe.init_from.run else None
                assert start == (str(run.folder / "1_pretrain") if stage == "2_sft" else None)


def test_a_finished_run_of_the_comparison_is_not_repeated(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "call", lambda command, log: pytest.fail(f"runs {command}"))
    run = comparison.Run(tmp_path, "nvlm_x", "none", seed=1, steps=8)
    with pytest.raises(pytest.fail.Exception):
        run.complete()
    run.folder.mkdir()
    scores = dict.fromkeys([*comparison.QUESTIONS, "all"], 0.5)
    found = {"architecture": "nvlm_x", "tags": "none", "seed": 1, "parameters": {"vision": 7}, "tokens_per_sample": 9.0}
    (run.folder / "scores.json").write_text(json.dumps(found | {"images": scores, "text": scores}))
    first = run.complete()
    other = first | {"seed": 2, "images": scores | {"all": 0.75}}
    row = comparison.table([first, other], {"all": 0.9}).splitlines()[-1]
    assert row.split(" | ")[:2] == ["| NVLM-X", "no"]
    assert row.split(" | ")[6:] == ["62.5 (50.0-75.0)", "90.0", "50.0 (50.0-50.0)", "7", "9.0 |"]


def test_throughput_is_predicted_at_the_papers_sequences() -> None:
    bench_architectures = load_script("scripts/bench/bench_architectures.py")
    assert [bench_architectures.sequence(a, 1024, 256) for a in ("nvlm_d", "nvlm_h", "nvlm_x")] == [2816, 1280, 1024]
    for shape in ("cpu", "cuda", "paper"):
        decoder = bench_architectures.operations("nvlm_d", shape)
        ratios = [round(decoder / bench_architectures.operations(a, shape), 1) for a in ("nvlm_h", "nvlm_x")]
        assert ratios == ([1.9, 2.3] if shape == "cpu" else [1.9, 2.2])  # README quotes them with two digits
