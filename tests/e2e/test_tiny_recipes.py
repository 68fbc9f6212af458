"""The tiny recipes, whole: trained, killed in the middle of a step, resumed, exported, verified, asked."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

import make_demo_data
from helpers import TESTS, run_distributed
from nvlm_train import checkpoint
from nvlm_train.export.hf import export_command
from nvlm_train.infer.generate import generate_command
from nvlm_train.recipe.load import load_recipe
from train.runs import trajectory, validations

RECIPES = ["tiny_d", "tiny_x", "tiny_h"]
STEPS = 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data with a hundredth of its pictures."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data.make(folder, scale=0.01)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_train_kill_resume_export_verify_generate(
    demo: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two real ranks. One is killed in step 5; started again, the run ends with the losses of one that was not."""
    path = TESTS.parent / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path).recipe
    assert recipe.validation is not None
    files = {f"data.mixture.{name}.path": source.path for name, source in recipe.data.mixture.items()}
    files |= {f"validation.sources.{name}.path": source.path for name, source in recipe.validation.sources.items()}
    files["tokenizer.path"] = recipe.tokenizer.path
    small = [f"{key}={demo / Path(file).relative_to('demo/data')}" for key, file in files.items()]
    small += [f"max_steps={STEPS}", "global_batch.samples=8", "validation.max_samples=8", "checkpoint.every_steps=3"]
    small += ["validation.every_steps=3", "schedule.warmup_steps=2", "log.every_steps=1"]

    def train(out: str, job: str = "train", **more: object) -> list[tuple[int, str]]:
        given = dict(recipe=str(path), overrides=[*small, f"output_dir={tmp_path / out}"], **more)
        return run_distributed(2, f"train/train_jobs.py:{job}", **given)

    assert train("whole") == [(0, "")] * 2
    with pytest.raises(RuntimeError, match=r"died|failed on rank"):
        train("killed", "train_until_killed", on_rank=0, in_step=5)
    assert checkpoint.committed_steps(tmp_path / "killed") == [3]
    assert train("killed") == [(0, "")] * 2
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
    assert validations(tmp_path / "killed") == validations(tmp_path / "whole")
    assert [step for step, _, _ in trajectory(tmp_path / "whole")] == list(range(1, STEPS + 1))

    out = tmp_path / "export"
    capsys.readouterr()
    assert export_command(Namespace(run=str(tmp_path / "killed"), out=str(out), dtype="fp32", json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    image = next((demo / "images" / "heldout").glob("pair_*.png"))
    asked = Namespace(out=str(out), image=[str(image)], prompt="left?", max_new_tokens=4, json=True)
    assert generate_command(asked) == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    asked.out = str(tmp_path / "killed")  # the run itself answers as its export does
    assert generate_command(asked) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == answer
