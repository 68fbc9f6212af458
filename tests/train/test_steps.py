"""What happens in and around a step: broken losses, replay, leaving data out, the worst case first, slow ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import run_distributed
from nvlm_train import checkpoint
from nvlm_train.data.plan import open_data
from nvlm_train.errors import CheckpointError, RecipeError
from nvlm_train.recipe.load import find_key, load_recipe
from nvlm_train.recipe.resolve import recipe_to_dict, resolve
from nvlm_train.train import oom, state
from nvlm_train.train.branch import open_branch
from nvlm_train.train.metrics import MetricsFile
from nvlm_train.train.replay import module_name
from nvlm_train.train.stragglers import LOGS, RankTimes, Stragglers
from runs import metrics, steps, trajectory, write_inputs

JOBS = "train/step_jobs.py:"
Sample = tuple[str, int]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(recipe: Path, out: Path, *overrides: str, ranks: int = 2, **more: Any) -> tuple[int, str]:
    given = [f"output_dir={out}", "validation=null", *overrides]
    results = run_distributed(ranks, JOBS + "train", recipe=str(recipe), overrides=given, **more)
    assert len({code for code, _ in results}) == 1, results
    return results[0]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that nothing disturbed, with the worst case first."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(inputs, out) == (0, "")
    return out


@pytest.fixture(scope="module")
def drawn(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Sample]:
    """A text sample of each of steps 5 and 6 that the other steps up to 9 do not hold."""
    folder = tmp_path_factory.mktemp("plan")
    plan = open_data(load_recipe(inputs, [f"output_dir={folder}"]).recipe, rank=0, world_size=2)
    held = {step: {(r.source, r.row) for r in plan.draws(step - 1)} for step in range(1, 10)}
    others = {step: set().union(*(held[other] for other in held if other != step)) for step in (5, 6)}
    return {step: min(s for s in held[step] - others[step] if s[0] == "text") for step in (5, 6)}


@pytest.fixture(scope="module")
def stopped(inputs: Path, drawn: dict[int, Sample], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that a broken sample in step 5 stopped, and what it said."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    code, text = run(inputs, out, broken=[drawn[5]])
    assert code == 2
    return out, text


def replay(recipe: Path, run: Path, file: Path, broken: list[Sample], ranks: int = 2, *more: str) -> dict[str, Any]:
    given = [f"output_dir={run}", "validation=null", *more]
    arguments: dict[str, Any] = dict(recipe=str(recipe), overrides=given, file=str(file), broken=broken)
    found: dict[str, Any] = run_distributed(ranks, JOBS + "replay", **arguments)[0]
    return found


# -------------------------------------------------------------------------------------------------------- broken steps


def test_a_broken_step_stops_with_the_state_before_it(
    stopped: tuple[Path, str], whole: Path, drawn: dict[int, Sample]
) -> None:
    out, text = stopped
    assert "step 5: loss is nan" in text and f"--replay {out}/nonfinite/step_5.json" in text
    assert f"--from {out}/step_4 --skip-steps 5:5" in text
    assert checkpoint.committed_steps(out) == [3, 4]
    assert trajectory(out) == trajectory(whole)[:4]
    written = json.loads((out / "nonfinite" / "step_5.json").read_text())
    micros = [micro for rank in written["micro_steps_by_rank"] for micro in rank]
    (broken,) = (micro for micro in micros if not math.isfinite(float(micro["loss"])))
    assert list(drawn[5]) in [ref[:2] for ref in broken["samples"]]
    assert sum(len(micro["samples"]) for micro in micros) == 9 and len(micros) > 2


def test_a_replay_is_the_step_bit_for_bit_and_names_the_sample(
    inputs: Path, stopped: tuple[Path, str], drawn: dict[int, Sample]
) -> None:
    out, _ = stopped
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    found = replay(inputs, out, out / "nonfinite" / "step_5.json", [drawn[5]])
    assert found["same"] is True and found["between"] == 0
    assert found["first"][2][:2] == drawn[5]
    assert [ref[:2] for ref, loss, _ in found["samples"] if not math.isfinite(loss)] == [drawn[5]]
    assert len(found["samples"]) == 9
    for losses in zip(found["losses"], found["written"], strict=True):  # bit for bit where there is a number
        for now, then in zip(*losses, strict=True):
            assert now == then or (math.isnan(now) and math.isnan(then))
    assert math.isnan(found["gradients"]["language_model.lm_head"])
    assert "<- the first that is not finite" in found["report"] and "bit for bit" in found["report"]
    # without its defect the same step has losses that its samples add up to, and finite gradients
    healthy = replay(inputs, out, out / "nonfinite" / "step_5.json", [])
    assert healthy["same"] is False and healthy["first"] is None
    total = sum(sum(losses) for losses in healthy["losses"])
    assert sum(loss for _, loss, _ in healthy["samples"]) == pytest.approx(total, rel=1e-6)  # measured 1.1e-7
    assert all(0 < value < 1 for value in healthy["gradients"].values())
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    # on one rank the samples are dealt otherwise
    alone = replay(inputs, out, out / "nonfinite" / "step_5.json", [drawn[5]], 1)
    assert alone["same"] is None and alone["first"][2][:2] == drawn[5]
    losses = {ref: loss for ref, loss, _ in found["samples"]}
    for ref, loss, _ in alone["samples"]:
        assert loss == pytest.approx(losses[ref], rel=1e-5, nan_ok=True)  # measured 2.1e-7
    assert "the run had others" in alone["report"]


def test_a_replay_of_another_recipe_is_refused(inputs: Path, stopped: tuple[Path, str]) -> None:
    out, _ = stopped
    found = replay(inputs, out, out / "nonfinite" / "step_5.json", [], 2, "optimizer.lr=0.1")
    assert "optimizer.lr: 0.003 -> 0.1 (fixed)" in found["error"]


def test_skipped_steps_count_for_all_but_adam_and_resume_exactly(
    inputs: Path, whole: Path, drawn: dict[int, Sample], tmp_path: Path
) -> None:
    skip = ["on_nonfinite=skip", "checkpoint.keep_last=9"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    broken = [drawn[5], drawn[6]]
    assert run(inputs, once, *skip, broken=broken) == (0, "")
    records = steps(once)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert trajectory(once)[:4] == trajectory(whole)[:4]
    assert [record.get("skipped", False) for record in records] == [False] * 4 + [True] * 2 + [False] * 2
    assert [record["loss"] for record in records[4:6]] == [None, None]
    for key in ("lr", "samples", "tokens", "data_step"):  # schedule and data as if nothing had happened
        assert [record[key] for record in records] == [record[key] for record in steps(whole)]
    assert records[6]["loss"] != steps(whole)[6]["loss"]
    assert [record["skipped_steps"] for record in records] == [0] * 4 + [1, 2, 2, 2]
    last = json.loads((once / "step_8" / "state.json").read_text())
    assert last["adam_step"] == 6 and last["progress"]["nonfinite_in_a_row"] == 0
    # stopped between the two broken steps, and resumed
    assert run(inputs, twice, *skip, broken=broken, stop_after=5) == (0, "")
    state = json.loads((twice / "step_5" / "state.json").read_text())
    assert state["adam_step"] == 4 and state["progress"]["nonfinite_in_a_row"] == 1
    assert run(inputs, twice, *skip, broken=broken) == (0, "")
    assert trajectory(twice) == trajectory(once)
    one, two = checkpoint.Checkpoint(once), checkpoint.Checkpoint(twice)
    for name in one.shapes:
        assert torch.equal(one.read_master(name), two.read_master(name)), name
    # a broken step in the past of a run that went on: from step 3, one step on the way
    found = replay(inputs, once, once / "nonfinite" / "step_5.json", broken, 2, *skip)
    assert found["same"] is True and found["between"] == 1 and found["first"][2][:2] == drawn[5]


def test_too_many_broken_steps_in_a_row_stop_the_run(inputs: Path, drawn: dict[int, Sample], tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = [drawn[5], drawn[6]]
    code, text = run(inputs, out, "on_nonfinite=skip", "max_nonfinite_steps=2", "log.every_steps=4", broken=both)
    assert code == 2 and "step 6: loss is nan, 2 steps in a row (max_nonfinite_steps)" in text
    assert [record["step"] for record in steps(out)] == [4, 5]  # a skipped step has its line always
    state = json.loads((out / "step_5" / "state.json").read_text())
    assert (state["step"], state["adam_step"], state["progress"]["nonfinite_in_a_row"]) == (5, 4, 1)


# ------------------------------------------------------------------------------------------------------- data left out


def test_going_on_past_data_that_is_left_out(inputs: Path, stopped: tuple[Path, str], tmp_path: Path) -> None:
    """Equal, bit for bit, to a run whose order was changed by hand; also when it is stopped and resumed."""
    origin, _ = stopped
    by_hand, out = tmp_path / "by_hand", tmp_path / "past"
    assert run(inputs, by_hand, shifted_from=4) == (0, "")
    flags: dict[str, Any] = dict(from_=str(origin / "step_4"), skip=[(5, 5)])
    before = {p: p.stat().st_mtime_ns for p in origin.rglob("*")}
    assert run(inputs, out, **flags, stop_after=2) == (0, "")
    assert run(inputs, out, "checkpoint.keep_last=9") == (0, "")  # the flags are remembered
    assert trajectory(out) == trajectory(by_hand)[4:]
    assert [record["data_step"] for record in steps(out)] == [6, 7, 8, 9]
    assert {p: p.stat().st_mtime_ns for p in origin.rglob("*")} == before
    one, two = checkpoint.Checkpoint(out), checkpoint.Checkpoint(by_hand)
    for name in one.shapes:
        assert torch.equal(one.read_master(name), two.read_master(name)), name
    state = json.loads((out / "step_6" / "state.json").read_text())["data"]
    assert (state["step"], state["data_step"], state["skip_steps"], state["position"]) == (6, 7, [[5, 5]], 63)
    recorded = json.loads((out / "recipe.json").read_text())["continued_from"]
    assert recorded["path"] == str(origin / "step_4") and recorded["skip_steps"] == [[5, 5]]
    assert run(inputs, out, **flags) == (0, "")  # the same words again: complete
    for other in ({**flags, "skip": [(5, 6)]}, {"from_": str(origin / "step_3"), "skip": [(5, 5)]}):
        code, text = run(inputs, out, **other)
        assert code == 2 and "already holds a run, which began from" in text
    code, text = run(inputs, origin, **flags)
    assert code == 2 and "which began from its init_from" in text
    code, text = run(inputs, tmp_path / "third", "optimizer.lr=0.1", **flags)
    assert code == 2 and "optimizer.lr: 0.003 -> 0.1 (fixed)" in text
    assert not (tmp_path / "third").exists()
    code, text = run(inputs, tmp_path / "fourth", from_=str(origin / "step_4"), skip=[(5, 5), (50, 51)])
    assert code == 2 and "--skip-steps 50:51: this run ends with data step 9 (step 8) and never reaches them" in text
    # a branch of a branch keeps what its origin left out
    branch = open_branch(str(out / "step_6"), [(9, 12), (8, 8)])
    assert branch.inherited == ((5, 5),) and branch.skipped == ((5, 5), (8, 12)) and branch.step == 6


def test_licences_behind_the_other_run_travel(inputs: Path, tmp_path: Path) -> None:
    """A second stage that goes on in a new run still records its first stage, whose folder may be gone."""
    other = tmp_path / "other"
    for folder in (other / "step_4", tmp_path / "new"):
        folder.mkdir(parents=True)
    (other / "step_4" / "COMMITTED").touch()
    (other / "step_4" / "state.json").write_text('{"format": 1, "step": 4}')
    recipe = load_recipe(inputs, [f"output_dir={tmp_path / 'new'}", "init_from.run=gone/step_9"]).recipe
    stage_1 = {"path": "gone/step_9", "recipe_hash": "x", "recipe": {}, "earlier_run": None}
    content = {
        "format": 1,
        "recipe_hash": "y",
        "recipe": recipe_to_dict(recipe),
        "earlier_run": stage_1,
        "attempts": [1],
    }
    (other / "recipe.json").write_text(json.dumps(content))
    start = state.find_start(recipe, "auto", (), open_branch(str(other / "step_4"), [(5, 5)]))
    state.write_run_files(start, recipe, resolve(recipe, 1), {"world_size": 1}, {})
    written = json.loads((tmp_path / "new" / "recipe.json").read_text())
    assert written["earlier_run"] == stage_1 and len(written["attempts"]) == 1
    assert written["continued_from"]["skip_steps"] == [[5, 5]]


def test_data_that_was_trained_on_cannot_be_left_out(stopped: tuple[Path, str]) -> None:
    origin, _ = stopped
    with pytest.raises(RecipeError, match=r"up to 4 already; go on from a checkpoint before step 4 \(step_3 is\)"):
        open_branch(str(origin / "step_4"), [(4, 6)])
    with pytest.raises(RecipeError, match="names a run, whose newest checkpoint will be another one tomorrow"):
        open_branch(str(origin), [])
    with pytest.raises(CheckpointError, match="does not exist"):
        open_branch(str(origin / "step_2"), [])


# ------------------------------------------------------------------------------------------------------ the worst case


def test_the_worst_case_first_changes_no_loss(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Without it, then with it at a resume."""
    out = tmp_path / "run"
    assert run(inputs, out, "worst_case_first=false", stop_after=3) == (0, "")
    assert run(inputs, out) == (0, "")
    assert trajectory(out) == trajectory(whole)


def test_out_of_memory_says_what_was_predicted_and_what_to_turn(inputs: Path, tmp_path: Path) -> None:
    code, text = run(inputs, tmp_path / "run", full_at=1)
    assert code == 2 and "is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB." in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # before the first step
    for kind in ("weights", "gradients", "optimizer", "tower_replicated", "all else", "sum"):
        (line,) = (line for line in text.splitlines() if line.split("  ")[1:2] == [kind])
        assert "MiB" in line or "GiB" in line
    assert "activation_checkpointing=full: activations" in text
    code, text = run(inputs, tmp_path / "run", "worst_case_first=false", "activation_checkpointing=full", full_at=8)
    assert code == 2 and "is out of memory" in text and "activation_checkpointing=full" not in text


def test_knobs_are_keys_and_the_largest_comes_first() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "nvlm_d_72b" / "2_sft.yaml").recipe
    predicted = resolve(recipe, 64, 100).memory
    found = oom.knobs(recipe, predicted, 64)
    assert len(found) == 3
    keys = [text.split("=")[0] for text in found if "=" in text.split(":")[0]]
    assert keys and all(find_key(tuple(key.split("."))) is not None for key in keys)


# ---------------------------------------------------------------------------------------------------------- stragglers


def test_a_slow_rank_is_named_after_some_logs(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "worst_case_first=false", "max_steps=5", slow_rank=1, sleep_s=0.7) == (0, "")
    records = steps(out)
    assert all("straggler" not in record for record in records[: LOGS - 1])
    for record in records[LOGS - 1 :]:
        (named,) = record["straggler"]
        assert named["rank"] == 1 and named["host"] and named["compute"] > 1.3 and named["times_median"] > 1.2
        # three forwards a step: what the other rank waited for in collectives
        assert record["ranks"]["collective_wait"]["max"] > 1.0
        assert set(record["ranks"]) == {"compute", "data_wait", "collective_wait"}


def test_who_counts_as_a_straggler() -> None:
    def times(*compute: float) -> list[RankTimes]:
        return [RankTimes(seconds, 0.0, 0.0) for seconds in compute]

    even = [1.0] * 4
    watch = Stragglers(["a", "b", "c", "d"])
    for log in range(1, 2 * LOGS):
        named = watch.look(times(1.0, 1.0, 1.3, 1.1), even)
        assert [one["rank"] for one in named] == ([2] if log >= LOGS else [])
        assert len(watch.news(named)) == (log == LOGS)
    assert named[0]["host"] == "c" and named[0]["times_median"] == 1.3
    assert watch.look(times(1.0, 1.0, 1.1, 1.1), even) == []  # it has recovered
    assert watch.look(times(1.0, 1.0, 1.3, 1.1), even) == []  # so counting begins anew
    for _ in range(LOGS):
        assert watch.look(times(1.0, 1.0, 1.3, 1.0), [1.0, 1.0, 1.4, 1.0]) == []  # it has more to do by the plan
        assert watch.look(times(0.02, 0.02, 0.03, 0.02), even) == []  # too short to tell
    waiting = [RankTimes(1.0, 0.0, 0.5), RankTimes(1.0, 0.5, 0.0)]
    pair = Stragglers(["a", "b"])
    found = [pair.look(waiting, [1.0, 1.0]) for _ in range(LOGS)][-1]
    assert [(one["rank"], one["data_wait"]) for one in found] == [(1, 0.5)]


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_a_killed_attempt_are_not_doubled(tmp_path: Path) -> None:
    """Lines after the checkpoint that is resumed from go, the half line of the crash too, all others stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "validation": {}}\n{"step": 3}\n{"step": 4, "lo')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": 1.0})
    file.close()
    assert metrics(tmp_path) == [
        {"step": 1},
        {"step": 2},
        {"step": 2, "validation": {}},
        {"step": 3, "loss": 1.0},
    ]


def test_names_of_modules() -> None:
    assert module_name("language_model.model.layers.3.mlp.up_proj.weight") == "language_model.model.layers.3"
    assert module_name("projector.fc1.weight") == "projector.fc1"
