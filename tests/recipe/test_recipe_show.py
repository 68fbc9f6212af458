"""The verbs of `nvlm-train recipe`, what they print, and that none of them imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_train.cli import main
from nvlm_train.recipe.foreign_names import FOREIGN, answer, markdown_table
from nvlm_train.recipe.schema import all_keys
from recipe_files import BASE, write

RECIPES = sorted(Path("recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in RECIPES if "mixtures" not in p.parts], ids=str)
def test_every_recipe_of_the_repository_is_good_and_opens_with_its_facts(path, capsys):
    assert main(["recipe", "check", str(path), "--world-size", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"ok  {path}  hash ")
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(head) >= 4 and any("Hardware:" in line for line in head) and any("Command:" in line for line in head)


@pytest.mark.parametrize("path", [p for p in RECIPES if "mixtures" in p.parts], ids=str)
def test_every_mixture_is_part_of_a_good_recipe(path, tmp_path, capsys):
    whole = write(tmp_path).removesuffix("\n")
    text = Path(whole).read_text(encoding="utf-8")
    overlaid = tmp_path / "over.yaml"
    overlaid.write_text(f"extends: {Path(path).resolve()}\n{text}", encoding="utf-8")
    assert main(["recipe", "check", str(overlaid)]) == 0, capsys.readouterr().err
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_check_says_ok_in_one_line(tmp_path, capsys):
    path = write(tmp_path)
    assert main(["recipe", "check", path, "max_steps=7", "--world-size", "8"]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "32 samples a step, 7 steps" in line


def test_check_fails_with_2_and_names_every_problem(tmp_path, capsys):
    path = write(tmp_path, BASE + "sed: 1\nlr: 2\n")
    assert main(["recipe", "check", path]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    assert shown.err.splitlines() == [
        f"error: {path}: 2 problems",
        f"{path}:24 sed: 1 is not a key of a recipe; did you mean seed?",
        f"{path}:25 lr: 2 is not a key of a recipe; did you mean optimizer.lr?",
    ]
    assert main(["recipe", "check", path, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and len(found["problems"]) == 3


def test_show_prints_values_origins_and_what_follows(tmp_path, capsys):
    path = write(tmp_path)
    assert main(["recipe", "show", path, "optimizer.lr=2e-3", "--world-size", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines[: lines.index("")]}
    assert rows["max_steps"] == ["100", f"{path}:21"]
    assert rows["optimizer.lr"] == ["0.002", "override optimizer.lr=2e-3"]
    assert rows["seed"] == ["1234", "default"]
    text = "\n".join(lines)
    assert "a micro-step is 3 x 1 = 3 packs; a step is at most 3 micro-steps" in text
    assert "null packs: 11.1% of the slots" in text and '"gradient_clipping": 1.0' in text
    assert "warning: global_batch.samples 32: 11% of the slots" in text


def test_show_says_what_only_the_index_knows(tmp_path, capsys):
    overrides = [
        "max_steps=null",
        "num_epochs=3",
        "global_batch={samples: null, packs: 8}",
        "schedule.warmup_steps=0.1",
    ]
    assert main(["recipe", "check", write(tmp_path), *overrides]) == 0
    assert "8 packs a step, steps known after indexing (num_epochs 3.0)" in capsys.readouterr().out
    assert main(["recipe", "show", write(tmp_path), *overrides, "--world-size", "3"]) == 0
    text = capsys.readouterr().out
    assert "a step is 8 packs of at most 512 tokens, its samples known after indexing" in text
    assert "a step is 3 micro-steps (the accumulation)" in text and "null packs: 11.1% of the slots" in text
    assert "warm-up 10.0% of the steps, minimum at the last step, steps known after indexing (num_epochs 3.0)" in text


def test_show_of_the_full_size_prints_its_parameters(capsys):
    assert main(["recipe", "show", "recipes/nvlm_d_72b/2_sft.yaml", "--world-size", "64"]) == 0
    text = capsys.readouterr().out
    for number in ("5,536,496,000", "620,717,056", "72,706,203,648", "78,863,416,704"):
        assert number in text


def test_show_of_nvlm_x_counts_cross_attention_and_bounds_tiles(tmp_path, capsys):
    overrides = ["model.architecture=nvlm_x", "data.pack_tiles=20", "model.cross_attention.every_layers=2"]
    assert main(["recipe", "show", write(tmp_path), *overrides, "--world-size", "2"]) == 0
    text = capsys.readouterr().out
    # 2 D^2 + 2 D kv + two norms and a gate, D 48, kv 16
    assert "\n  cross_attention           6,241             6,241  0.001\n" in text
    assert "cross-attention at 1 of 3 decoder layers, counted from 1: 2\n" in text
    # 20 tiles hold two images of 7, so two of 32 samples share a pack although four fit by their tokens
    assert "a step is 32 samples, at most 16 packs of 512 tokens" in text
    assert "a step of full samples (4,096 tokens, 224 tiles)" in text


def test_show_as_json_holds_all_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["recipe", "show", write(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 4 and found["values"]["max_steps"]["value"] == 100
    assert found["values"]["max_steps"]["resume"] == "ask" and found["memory"]["total"] > 0
    assert {"recipe_hash", "batch", "parameters", "flops", "deepspeed", "module_lr", "warnings"} <= set(found)


def test_diff_of_files_and_of_a_run(tmp_path, capsys):
    from nvlm_train.recipe.load import load_recipe
    from nvlm_train.recipe.resolve import recipe_to_dict

    a, b = write(tmp_path), write(tmp_path, BASE.replace("max_steps: 100", "max_steps: 7"), "b.yaml")
    assert main(["recipe", "diff", a, b]) == 0
    assert capsys.readouterr().out == "max_steps: 100 -> 7  (ask)\n"
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"format": 1, "recipe": recipe_to_dict(load_recipe(a).recipe)}))
    assert main(["recipe", "diff", str(run), a]) == 0
    assert capsys.readouterr().out == "the same in every key\n"
    assert main(["recipe", "diff", str(run), b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"key": "max_steps", "old": 100, "new": 7, "resume": "ask"}]
    (run / "recipe.json").write_text("{")
    assert main(["recipe", "diff", str(run), b]) == 2


def test_keys_lists_every_key(capsys):
    assert main(["recipe", "keys", "--json"]) == 0
    found = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == set(all_keys())
    assert found["data.mixture.*.weight"]["type"] == "number > 0" and found["data.mixture.*.weight"]["resume"] == "ask"
    assert main(["recipe", "keys", "schedule.min_lr"]) == 0
    assert capsys.readouterr().out.startswith("schedule.min_lr  (number >= 0, default 0.0, ask)\n    Where cosine ends")
    assert main(["recipe", "keys", "nothing"]) == 2


def test_the_schema_is_json_schema_with_short_forms(capsys):
    assert main(["recipe", "schema"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["properties"]["extends"]["type"] == "string"
    assert {"type": "string", "description": "preset alone"} in found["$defs"]["LanguageModel"]["anyOf"]


def test_foreign_names_lead_to_keys_there_are():
    keys = all_keys()
    seen: set[str] = set()
    for row in FOREIGN:
        assert row.ours in keys or (not row.ours and row.note), row
        for name in row.names:
            assert name not in keys, f"{name} is a key of ours"
            assert name not in seen, f"{name} stands in two rows"
            seen.add(name)
    assert answer("--Per-Device-Train-Batch-Size") == answer("per_device_train_batch_size")
    assert answer("max_steps") is None
    table = markdown_table()
    assert table.count("\n") == len(FOREIGN) + 2 and "| `save_steps`, " in table


@pytest.mark.parametrize(
    "verb",
    [
        ["recipe", "check", "R"],
        ["recipe", "show", "R"],
        ["recipe", "diff", "R", "R"],
        ["recipe", "keys"],
        ["recipe", "schema"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_no_verb_about_recipes_imports_anything_heavy(tmp_path, verb):
    argv = [write(tmp_path) if word == "R" else word for word in verb]
    heavy = ["torch", "deepspeed", "transformers", "numpy", "PIL"] + (
        ["pydantic", "yaml"] if verb == ["--help"] else []
    )
    code = f"""
import sys
from nvlm_train.cli import main
assert main({argv!r}) == 0
assert not [name for name in {heavy!r} if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
