"""Whole trainings on warm ranks: stages, resume, validation, stopping, and everything that can go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import run_distributed
from nvlm_train import checkpoint
from nvlm_train.provenance import parts_of_run
from runs import metrics, steps, trajectory, validations, write_inputs

JOBS = "train/train_jobs.py:"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(recipe: Path, out: Path, *overrides: str, ranks: int = 2, job: str = "train", **more: Any) -> tuple[int, str]:
    results = run_distributed(
        ranks,
        JOBS + job,
        recipe=str(recipe),
        overrides=[f"output_dir={out}", f"run_name={out.name}", *overrides],
        **more,
    )
    assert len({code for code, _ in results}) == 1, results
    return results[0]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(inputs, out) == (0, "")
    return out


def test_a_run_records_what_happened(whole: Path) -> None:
    records = steps(whole)
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert set(record["time"]) == {"data", "vision", "forward", "backward", "step"}
        assert record["tokens_per_s"] > 0 and record["tiles_per_s"] >= 0 and record["peak_memory_gib"] > 0
        # one learning rate per module, each its peak times the same factor
        assert record["lr"]["projector"] == pytest.approx(2 * record["lr"]["language_model"])
        assert "vision" not in record["lr"]
        assert sum(record["share"].values()) == pytest.approx(1)
    rates = [record["lr"]["language_model"] for record in records]
    assert rates[0] == pytest.approx(1.5e-3) and rates[1] == pytest.approx(3e-3)  # warm-up of 2 steps
    assert rates[-1] == pytest.approx(3e-4) and all(a > b for a, b in zip(rates[1:], rates[2:], strict=False))
    assert records[-1]["samples"] == 8 * 9
    assert list(validations(whole)) == [4, 8]
    assert checkpoint.committed_steps(whole)[-2:] == [6, 8]
    saved = json.loads((whole / "recipe.json").read_text())
    assert saved["recipe"]["global_batch"]["samples"] == 9 and saved["attempts"][0]["from_step"] == 0
    assert not list(whole.glob(".saving*"))


def test_stopped_at_any_step_and_resumed_is_never_stopped(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Stopped by a signal in steps 2 and 5 (no checkpoint steps) and resumed: the same losses, bit for bit."""
    out = tmp_path / "stopped"
    for after in (2, 3):
        code = run(inputs, out, job="train_with_signal", signal_name="SIGUSR2", on_rank=1, after_step=after)
        assert code == (0, "")
    assert checkpoint.committed_steps(out)[-1] == 5
    assert run(inputs, out) == (0, "")
    assert trajectory(out) == trajectory(whole)
    assert validations(out) == validations(whole)
    for name in (first := checkpoint.Checkpoint(whole)).shapes:
        assert torch.equal(first.read_master(name), checkpoint.Checkpoint(out).read_master(name)), name
    attempts = json.loads((out / "recipe.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 2, 5]
    before = (out / "metrics.jsonl").stat().st_mtime_ns
    assert run(inputs, out) == (0, "")  # complete: says so, touches nothing
    assert (out / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_signals_save_and_exit_0(inputs: Path, tmp_path: Path, signal_name: str) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, job="train_with_signal", signal_name=signal_name, on_rank=0, after_step=1) == (0, "")
    assert checkpoint.committed_steps(out) == [1]


def test_files_ask_for_a_stop_and_for_a_save(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "stop").touch()
    (out / "save").touch()
    assert run(inputs, out) == (0, "")
    assert checkpoint.committed_steps(out) == [1]
    assert not (out / "stop").exists() and not (out / "save").exists()


def test_validation_changes_nothing_in_training(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "validation=null") == (0, "")
    assert trajectory(out) == trajectory(whole)


def test_one_rank_equals_two(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, ranks=1) == (0, "")
    # Worst cases measured over 8 steps of lr 3e-3: losses 1.1e-7, norms 4.4e-8 relative, validation equal
    for one, two in zip(trajectory(out), trajectory(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-6)
    for step, losses in validations(whole).items():
        assert validations(out)[step] == pytest.approx(losses, abs=1e-6)


def test_resumed_on_another_number_of_ranks(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """2 ranks to step 3, 1 rank to step 6, 2 ranks to the end: the same samples, the same losses but for rounding."""
    out = tmp_path / "elastic"
    assert run(inputs, out, job="train_with_signal", signal_name="SIGUSR2", on_rank=0, after_step=3) == (0, "")
    results = run_distributed(
        1,
        JOBS + "train_with_signal",
        recipe=str(inputs),
        overrides=[f"output_dir={out}", "run_name=elastic"],
        signal_name="SIGUSR2",
        on_rank=0,
        after_step=3,
    )
    assert results == [(0, "")] and checkpoint.committed_steps(out)[-1] == 6
    assert run(inputs, out) == (0, "")
    for one, two in zip(steps(out), steps(whole), strict=True):
        assert (one["samples"], one["trained_tokens"], one["tiles"]) == (
            two["samples"],
            two["trained_tokens"],
            two["tiles"],
        )
        # Worst case measured: 1.7e-7
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-6)


def test_zero_options_may_change_on_resume(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """To step 3 with the tower partitioned, all offloaded and calls compared; to the end with none of it. What is saved
    is the same: trained weights in the checkpoint, the tower by name in base.json."""
    out = tmp_path / "options"
    offload = ["zero.offload_optimizer=cpu", "zero.offload_param=cpu"]
    given = {"job": "train_with_signal", "signal_name": "SIGUSR2", "on_rank": 0, "after_step": 3}
    assert run(inputs, out, "zero.tower=partitioned", "debug.collectives=true", *offload, **given) == (0, "")
    assert checkpoint.committed_steps(out) == [3]
    assert run(inputs, out) == (0, "")
    for one, two in zip(trajectory(out), trajectory(whole), strict=True):
        # Offloaded masters are stepped by the fused AdamW; its rounding gave 3.3e-7 in test_zero_options.py
        assert one == pytest.approx(two, rel=2e-6, abs=2e-6)
    for step, losses in validations(whole).items():
        assert validations(out)[step] == pytest.approx(losses, abs=2e-6)
    assert json.loads((out / "base.json").read_text()) == json.loads((whole / "base.json").read_text())
    kept, expected = (checkpoint.Checkpoint(folder / "step_8") for folder in (out, whole))
    assert kept.shapes == expected.shapes


def check_recorded_parts(
    inputs: Path, first: checkpoint.CheckpointWeights, second: checkpoint.CheckpointWeights
) -> None:
    """Both runs recorded base weights (frozen and trained ones alike), data and the run before, by content; tokens by
    source add up."""
    base = {
        f"weights.{part}": {"model.safetensors": checkpoint.sha256(inputs.parent / part / "model.safetensors")}
        for part in ("vision", "language_model")
    }
    found = [{part.key: part for part in parts_of_run(vars(run))} for run in (first, second)]
    run_part = found[1].pop("weights.run")
    assert run_part.content == {"state.json": checkpoint.sha256(first.path / "state.json")} and run_part.recorded
    for parts, run in zip(found, (first, second), strict=True):
        assert {key: part.content for key, part in parts.items() if key in base} == base
        assert {
            key for key, part in parts.items() if len(part.content.get("index", "")) == 64
        } == parts.keys() - base.keys()
        progress = run.state["progress"]
        assert sum(progress["tokens_by_source"].values()) == progress["trained_tokens"] > 0
        assert progress["tokens_by_source"].keys() == progress["samples_by_source"].keys() == {"images", "text"}
    assert second.earlier_run is not None and second.earlier_run["progress"] == first.state["progress"]


def test_two_stages_and_what_is_frozen_stays(inputs: Path, tmp_path: Path) -> None:
    pretrain, sft = tmp_path / "pretrain", tmp_path / "sft"
    assert run(inputs, pretrain, "train.language_model=frozen", "max_steps=3") == (0, "")
    first = checkpoint.open_checkpoint(pretrain, checksums=True)
    assert first.trained == {
        "projector.norm.weight",
        "projector.norm.bias",
        "projector.fc1.weight",
        "projector.fc2.weight",
    }
    assert set(steps(pretrain)[0]["lr"]) == {"projector"}
    assert run(
        inputs, sft, f"init_from.run={pretrain}", "train.projector=frozen", "optimizer.module_lr=null", "max_steps=2"
    ) == (0, "")
    second = checkpoint.open_checkpoint(sft, checksums=True)
    check_recorded_parts(inputs, first, second)
    # the projector, frozen here, is the one that the first stage trained, and the tower the folder's
    for name in first.trained:
        assert torch.equal(second.read(name), first.read(name)), name
    folder = checkpoint.safe_open(str(inputs.parent / "vision" / "model.safetensors"), framework="pt")
    for key in folder.keys():
        assert torch.equal(second.read(f"vision_model.{key}"), folder.get_tensor(key)), key
    start = checkpoint.safe_open(str(inputs.parent / "language_model" / "model.safetensors"), framework="pt")
    assert any(not torch.equal(second.read(f"language_model.{k}"), start.get_tensor(k)) for k in start.keys())


def test_nvlm_x_in_two_stages(inputs: Path, tmp_path: Path) -> None:
    """Pretraining trains projector and cross-attention beside a frozen decoder; the second stage starts from them."""
    pretrain, sft = tmp_path / "pretrain", tmp_path / "sft"
    x = ("model.architecture=nvlm_x", "data.pack_tiles=16", "optimizer.module_lr.cross_attention=1e-2")
    assert run(inputs, pretrain, *x, "train.language_model=frozen", "max_steps=3") == (0, "")
    first = checkpoint.open_checkpoint(pretrain, checksums=True)
    assert {name.split(".")[0] for name in first.trained} == {"projector", "cross_attention"}
    assert len(first.trained) == 3 + 2 * 7
    rates = steps(pretrain)[0]["lr"]
    assert set(rates) == {"projector", "cross_attention"}
    assert rates["cross_attention"] == pytest.approx(1e-2 / 6e-3 * rates["projector"])
    gates = [first.read(f"cross_attention.layers.{k}.attn_gate") for k in range(2)]
    assert all(gate.any() and gate.abs() < 0.1 for gate in gates)  # they start at 0
    assert run(
        inputs, sft, *x, f"init_from.run={pretrain}", "train.cross_attention=frozen",
        "optimizer.module_lr.cross_attention=null", "max_steps=2",
    ) == (0, "")  # fmt: skip
    second = checkpoint.open_checkpoint(sft, checksums=True)
    for name in first.trained:
        same = torch.equal(second.read(name), first.read(name))
        assert same == name.startswith("cross_attention."), name  # frozen in this second stage


def test_nvlm_h_stopped_and_resumed_is_never_stopped(inputs: Path, tmp_path: Path) -> None:
    h = ("model.architecture=nvlm_h", "data.pack_tiles=16", "max_steps=4", "model.cross_attention.gate_init=0.5")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(inputs, whole, *h) == (0, "")
    assert run(inputs, stopped, *h, job="train_with_signal", signal_name="SIGTERM", on_rank=1, after_step=2) == (0, "")
    assert checkpoint.committed_steps(stopped) == [2]
    assert run(inputs, stopped, *h) == (0, "")
    assert trajectory(stopped) == trajectory(whole) and validations(stopped) == validations(whole)


def test_bf16_trains_near_fp32(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "precision=bf16") == (0, "")
    # Worst case measured: 7.2e-4
    assert [r["loss"] for r in steps(out)] == pytest.approx([r["loss"] for r in steps(whole)], abs=1e-2)


def test_early_stop_keeps_the_best(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    early = [
        "validation.every_steps=1",
        "validation.early_stop={patience: 2}",
        "optimizer.lr=0.3",
        "optimizer.module_lr=null",
    ]
    assert run(inputs, out, *early, "schedule.warmup_steps=0", "schedule.name=constant", "checkpoint.keep_last=1") == (
        0,
        "",
    )
    losses = {step: found["all"] for step, found in validations(out).items()}
    best = min(losses, key=losses.__getitem__)
    assert list(losses)[-1] == best + 2 < 8
    assert best in checkpoint.committed_steps(out)
    assert checkpoint.Checkpoint(out).state["progress"]["best_step"] == best
    assert run(inputs, out, *early, "schedule.warmup_steps=0", "schedule.name=constant", "checkpoint.keep_last=1") == (
        0,
        "",
    )
    assert list(validations(out)) == list(losses)  # it does not go on training


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_broken_logger_neither_stops_nor_delays_a_run(inputs: Path, whole: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, job="train_with_broken_sink", how=how) == (0, "")
    assert trajectory(out) == trajectory(whole)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_run_directory_of_another_recipe_is_refused_with_the_diff(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "max_steps=2") == (0, "")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, text = run(inputs, out, "max_steps=2", "optimizer.lr=0.001")
    assert code == 2 and "optimizer.lr: 0.003 -> 0.001 (fixed)" in text
    code, text = run(inputs, out, "max_steps=3")
    assert code == 2 and "max_steps: 2 -> 3 (ask)" in text and "--accept max_steps" in text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    code, text = run(inputs, out, "max_steps=2", resume="never")
    assert code == 2 and "--resume is never" in text
    assert run(inputs, out, "max_steps=3", "log.every_steps=3", accept=["max_steps"]) == (0, "")
    assert [record["step"] for record in steps(out)] == [1, 2, 3]


def test_a_run_of_epochs_in_steps_of_packs(inputs: Path, tmp_path: Path) -> None:
    """Steps, warm-up and the end of the schedule are known once the data is; killed and resumed on another number of
    ranks it takes the same steps."""
    batch = "global_batch={samples: null, packs: 3}"
    recipe = ["max_steps=null", "num_epochs=0.5", batch, "schedule.warmup_steps=0.25"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(inputs, whole, *recipe) == (0, "")
    records = steps(whole)
    last = len(records)
    assert checkpoint.committed_steps(whole)[-1] == last > 3
    rates = [record["lr"]["language_model"] for record in records]
    assert max(rates) == pytest.approx(3e-3) == rates[round(0.25 * last) - 1]
    assert rates[-1] == pytest.approx(3e-4)
    assert list(validations(whole))[-1] == last
    assert all(set(record["balance"]) == {"decoder", "tokens", "tiles"} for record in records)
    assert records[-1]["samples"] >= 45 > records[-2]["samples"]  # the fewest steps that hold half of 90 samples
    assert all(record["balance"]["tokens"] > 1.2 for record in records)  # 3 packs on 2 ranks: a slot of 4 is empty
    code = run(inputs, resumed, *recipe, job="train_with_signal", signal_name="SIGUSR2", on_rank=0, after_step=2)
    assert code == (0, "")
    state = json.loads((resumed / "step_2" / "state.json").read_text())["data"]
    assert (state["step"], state["window"]) == (2, 0) and state["pack_in_window"] == 6
    assert run(inputs, resumed, *recipe, ranks=3) == (0, "")
    one, other = (torch.tensor(trajectory(out), dtype=torch.float64) for out in (whole, resumed))  # [steps, 3]
    worst = ((one - other).abs() / one.abs()).amax(dim=0)
    assert worst[1] < 2e-7 and worst[2] < 1e-6  # sums in another order on 3 ranks than on 2; measured 1.8e-8, 7.6e-8
    assert [r["trained_tokens"] for r in steps(resumed)] == [r["trained_tokens"] for r in records]
    assert run(inputs, resumed, *recipe) == (0, "")  # complete
    code, text = run(inputs, resumed, *recipe[2:], "max_steps=null", "num_epochs=1")
    assert code == 2 and "num_epochs: 0.5 -> 1.0 (ask)" in text


def test_going_back_to_a_step_sets_later_ones_aside(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "checkpoint.keep_last=5") == (0, "")
    kept = checkpoint.committed_steps(out)
    assert kept[0] < 6
    code, text = run(inputs, out, "checkpoint.keep_last=5", resume="step_5")
    assert code == 2 and "has no complete checkpoint of that step; there are: step_3" in text
    assert run(inputs, out, "checkpoint.keep_last=5", resume=f"step_{kept[0]}") == (0, "")
    assert trajectory(out) == trajectory(whole)
    aside = out / "set_aside" / "1"
    assert checkpoint.committed_steps(aside) == kept[1:]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == len(metrics(whole))


@pytest.mark.parametrize(
    "change", ["data.pack_tokens=230", "data.mixture.text.weight=0.3", "tokenizer.system=Answer.", "max_steps=3"]
)
def test_what_is_printed_to_accept_is_all_it_takes(inputs: Path, tmp_path: Path, change: str) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "max_steps=2") == (0, "")
    overrides = ["max_steps=2", change]
    code, text = run(inputs, out, *overrides)
    assert code == 2
    accept = text.split("--accept ")[1].split()[0]
    assert change.startswith(accept)
    assert run(inputs, out, *overrides, accept=[accept]) == (0, "")


def test_a_run_of_an_older_version_goes_on(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """State that this version does not know, and state that it misses, is neither an error nor a guess."""
    out = tmp_path / "run"
    assert run(inputs, out, job="train_with_signal", signal_name="SIGUSR2", on_rank=0, after_step=3) == (0, "")
    state = out / "step_3" / "state.json"
    content = json.loads(state.read_text())
    content["progress"]["something_old"] = 5
    del content["progress"]["validation_due"]
    state.write_text(json.dumps(content))
    (out / "step_3" / "COMMITTED").write_text("")  # the first version kept no checksum of it there
    assert run(inputs, out) == (0, "")
    assert trajectory(out) == trajectory(whole)


def test_stopped_where_it_would_validate_it_saves_first_and_validates_next_time(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, job="train_with_signal", signal_name="SIGTERM", on_rank=1, after_step=4) == (0, "")
    assert checkpoint.committed_steps(out)[-1] == 4 and validations(out) == {}
    assert run(inputs, out) == (0, "")
    assert validations(out) == validations(whole) and trajectory(out) == trajectory(whole)


def test_another_validation_set_starts_a_new_best(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "max_steps=4") == (0, "")
    first = checkpoint.Checkpoint(out).state["progress"]
    assert run(inputs, out, "max_steps=8", "validation.max_samples=2", accept=["max_steps"]) == (0, "")
    second = checkpoint.Checkpoint(out).state["progress"]
    assert first["best_measure"] != second["best_measure"] and second["best_step"] == 8
    assert second["best_loss"] == validations(out)[8]["all"]


@pytest.mark.parametrize("where", ["loading", "validation"])
def test_an_error_on_one_rank_ends_all_with_its_cause(inputs: Path, tmp_path: Path, where: str) -> None:
    job = JOBS + "train_with_error"
    results = run_distributed(
        2, job, recipe=str(inputs), overrides=[f"output_dir={tmp_path}/run"], on_rank=1, where=where
    )
    what = "loading data" if where == "loading" else "validation source 'held'"
    assert results[0] == f"RuntimeError: {what} failed on rank 1: OSError: [Errno 5] Input/output error"
    assert results[1] == "OSError: [Errno 5] Input/output error"


def test_a_metrics_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    from nvlm_train.train.metrics import MetricsFile

    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    file._stream.close()
    file._stream = open("/dev/full", "a")  # every write says: no space left on device
    file.write({"step": 2})
    file.write({"step": 3})
    file.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_changed_data_is_refused_on_resume(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(inputs.parent, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(inputs.parent), str(folder)))
    out = tmp_path / "run"
    assert run(recipe, out, "max_steps=2") == (0, "")
    lines = (folder / "data" / "text.jsonl").read_text().splitlines()
    (folder / "data" / "text.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    code, text = run(recipe, out, "max_steps=3", accept=["max_steps"])
    assert code == 2 and "the data differs from what" in text and "--accept data" in text
    assert run(recipe, out, "max_steps=3", accept=["max_steps", "data"]) == (0, "")


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_full_disk_on_one_rank_stops_all_and_keeps_the_last_checkpoint(
    inputs: Path, whole: Path, tmp_path: Path, asynchronous: str
) -> None:
    out = tmp_path / "run"
    overrides = [f"output_dir={out}", f"checkpoint.asynchronous={asynchronous}"]
    job = JOBS + "train_with_full_disk"
    results = run_distributed(2, job, recipe=str(inputs), overrides=overrides, on_rank=1, save_number=2)
    for code, text in results:
        assert code == 2
        assert "step_4 failed, the previous checkpoint is untouched: rank 1: OSError: [Errno 28] No space left" in text
    assert checkpoint.committed_steps(out) == [3]
    assert run(inputs, out) == (0, "")
    assert trajectory(out) == trajectory(whole)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text = run(
        inputs, out, "optimizer.lr=1.0e+30", "optimizer.module_lr=null", "checkpoint.every_steps=1", "validation=null"
    )
    assert code == 2 and "loss is" in text and "it was left out and the run stops, with the state before it in" in text
    step = int(text.split("step ")[1].split(":")[0])
    written = json.loads((out / "nonfinite" / f"step_{step}.json").read_text())
    samples = [tuple(ref) for rank in written["micro_steps_by_rank"] for micro in rank for ref in micro["samples"]]
    assert len(samples) == len(set(samples)) == 9 and {source for source, _, _ in samples} == {"images", "text"}
    assert all(saved < step for saved in checkpoint.committed_steps(out))


def test_a_frozen_module_without_weights_is_refused(inputs: Path, tmp_path: Path) -> None:
    code, text = run(inputs, tmp_path / "run", "init_from.vision=null")
    assert code == 2 and "train.vision is 'frozen', but nothing gives it weights" in text
    code, text = run(inputs, tmp_path / "run", "train.projector=frozen", "optimizer.module_lr=null")
    assert code == 2 and "init_from.run" in text


def test_bad_pictures_beyond_the_limit_stop_every_rank_with_the_cause(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(inputs.parent, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(inputs.parent), str(folder)))
    for picture in folder.glob("data/images_*.png"):
        content = picture.read_bytes()
        picture.write_bytes(content[: len(content) * 2 // 3])  # the header, read for the index, is whole
    code, text = run(recipe, tmp_path / "run", "data.num_threads=1")
    assert code == 2 and "images.jsonl:" in text
    assert metrics(tmp_path / "run") == [] or steps(tmp_path / "run")[-1]["step"] < 8


def test_missing_input_is_named(inputs: Path, tmp_path: Path) -> None:
    for key, words in [
        ("tokenizer.path", "tokenizer"),
        ("data.mixture.text.path", "text"),
        ("init_from.language_model", "does not exist"),
        ("init_from.run", "holds no complete checkpoint"),
    ]:
        code, text = run(inputs, tmp_path / "run", f"{key}={tmp_path}/nowhere")
        assert code == 2 and words in text and "nowhere" in text, (key, text)
