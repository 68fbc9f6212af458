"""LoRA in whole trainings: what is trained, what is kept, resumed exactly, on other ranks, and from stage to stage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TESTS, run_distributed
from nvlm_train import checkpoint
from nvlm_train.model.lora import is_adapter
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import recipe_to_dict
from runs import steps, trajectory, validations, write_inputs

sys.path.insert(0, str(TESTS / "export"))
from tiny_nvlm import random_weights

JOBS = "train/train_jobs.py:"
LORA = [
    "train.language_model=lora",
    "train.lora.language_model={rank: 4, alpha: 8, dropout: 0.25}",
    "train.vision=lora",
    "train.lora.vision={rank: 2, alpha: 3, dropout: 0.1, targets: [qkv, fc2]}",
    "optimizer.module_lr={vision: 2.0e-3, projector: 6.0e-3, language_model: 1.0e-2}",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(recipe: Path, out: Path, *overrides: str, ranks: int = 2, job: str = "train", **more: Any) -> tuple[int, str]:
    named = [f"output_dir={out}", f"run_name={out.name}", *overrides]
    results = run_distributed(ranks, JOBS + job, recipe=str(recipe), overrides=named, **more)
    assert len({code for code, _ in results}) == 1, results
    return results[0]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with adapters, dropout on, that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(inputs, out, *LORA) == (0, "")
    return out


def test_adapters_alone_are_trained_and_saved(inputs: Path, whole: Path) -> None:
    first = checkpoint.open_checkpoint(whole, checksums=True)
    saved = set(first.checkpoint.shapes)
    assert {name for name in saved if not name.startswith("projector.")} == {n for n in saved if is_adapter(n)}
    of = {module: {n for n in saved if n.startswith(module)} for module in ("language_model.", "vision_model.")}
    assert len(of["language_model."]) == 2 * 2 * 7 and len(of["vision_model."]) == 2 * 2 * 2  # A and B, layers, targets
    # frozen weights are those of the folders: nothing wrote into them, and base.json names them
    base = json.loads((whole / "base.json").read_text())["tensors"]
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in base and not any(map(is_adapter, base))
    # each module's own learning rate, proven in the log
    rates = steps(whole)[3]["lr"]
    assert rates["vision"] == pytest.approx(rates["language_model"] / 5)
    # every B has left zero: each adapter is trained
    assert all(first.checkpoint.read_master(n).abs().max() > 0 for n in saved if ".lora_B." in n)
    assert steps(whole)[-1]["loss"] < steps(whole)[0]["loss"]


def test_stopped_and_resumed_is_never_stopped(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """With dropout on: the same losses and weights, bit for bit."""
    out = tmp_path / "stopped"
    job = dict(job="train_with_signal", signal_name="SIGUSR2", on_rank=1, after_step=3)
    assert run(inputs, out, *LORA, **job) == (0, "")
    assert run(inputs, out, *LORA) == (0, "")
    assert trajectory(out) == trajectory(whole) and validations(out) == validations(whole)
    first, second = checkpoint.Checkpoint(whole), checkpoint.Checkpoint(out)
    for name in first.shapes:
        assert torch.equal(first.read_master(name), second.read_master(name)), name


def test_another_number_of_ranks_recompute_and_micro_batch(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Dropout follows the sample: the same losses on one rank, with two packs in a micro batch, and recomputed."""
    out = tmp_path / "one"
    variants = ["micro_batch_size=2", "activation_checkpointing=full", "zero.stage=1", "vision_tiles_per_chunk=3"]
    assert run(inputs, out, *LORA, *variants, ranks=1) == (0, "")
    # Worst cases measured over 8 steps: see below
    for one, two in zip(trajectory(out), trajectory(whole), strict=True):
        print(one, two, abs(one[1] - two[1]), abs(one[2] - two[2]))
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
    other = tmp_path / "without"
    assert run(inputs, other, *LORA, "train.lora.language_model.dropout=0.0", "max_steps=2", ranks=1) == (0, "")
    assert abs(trajectory(other)[1][1] - trajectory(whole)[1][1]) > 1e-4, "dropout does nothing"


def test_the_next_stage_merges_or_continues(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """merge: the adapters are in the weights that the next stage freezes. continue: it starts from them as they are."""
    first = checkpoint.open_checkpoint(whole)
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    assert name in first.trained and not torch.equal(first.read(name), first.without_adapters().read(name))
    # a slice that begins and ends inside a row, as a rank of ZeRO-3 reads it
    assert torch.allclose(first.read_slice(name, 37, 211), first.read(name).flatten()[37:211], rtol=0, atol=1e-7)
    short = ["max_steps=1", "validation=null", "optimizer.module_lr=null", f"init_from.run={whole}"]
    frozen = tmp_path / "merged"
    assert run(inputs, frozen, "train.language_model=frozen", *short) == (0, "")
    second = checkpoint.open_checkpoint(frozen, checksums=True)
    assert torch.equal(second.read(name), first.read(name)) and not second.adapters
    going_on = tmp_path / "continued"
    lora = [*LORA[:4], "optimizer.lr=1.0e-12", "schedule.min_lr=0.0", "init_from.adapters=continue"]
    assert run(inputs, going_on, *lora, *short) == (0, "")
    third = checkpoint.open_checkpoint(going_on, checksums=True)
    assert json.loads((going_on / "base.json").read_text())["tensors"][name]["file"].endswith("model.safetensors")
    for adapter in third.checkpoint.shapes:
        assert torch.allclose(third.checkpoint.read_master(adapter), first.checkpoint.read_master(adapter), atol=1e-10)
    code, message = run(inputs, tmp_path / "no", *lora, "train.lora.language_model.alpha=5", *short)
    assert code == 2 and "the adapters differ" in message and "language_model: alpha / rank is 2.0" in message
    code, message = run(inputs, tmp_path / "no", *lora, "train.lora.vision.targets=[qkv]", *short)
    assert code == 2 and "fc2.lora_A.default.weight" in message and "is not in the model" in message


def test_exports_merged_and_as_an_adapter(whole: Path, tmp_path: Path) -> None:
    """Both are what was trained: tensors bit for bit, logits through transformers, and through peft on the base."""
    from nvlm_train.export import adapter, hf, verify

    weights = checkpoint.open_checkpoint(whole)
    out = hf.export(weights, weights.recipe, tmp_path / "merged")
    report = verify.verify(out, weights, weights.recipe)
    assert report["ok"], report["problems"]
    # the base: what lies beneath the adapters, with another projector, which the adapter folder must put right
    base = hf.export(_Beneath(weights), weights.recipe, tmp_path / "base")
    assert not verify.verify(base, weights, weights.recipe)["ok"]
    folder = adapter.export_adapter(weights, tmp_path / "adapter", base)
    report = adapter.verify_adapter(folder, weights)
    assert report["ok"] and len(report["logits"]) == 5, report["problems"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["modules_to_save"]) == ("LORA", ["mlp1"])
    # a base of another size is refused by name, and so is a run without adapters
    (tmp_path / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"is not the base of these adapters: .* has no config\.json"):
        adapter.export_adapter(weights, tmp_path / "again", tmp_path / "empty")
    # the merged export of the same run fits in every shape, but has the adapters in it already
    twice = adapter.export_adapter(weights, tmp_path / "twice", out)
    problems = adapter.verify_adapter(twice, weights, logits=False)["problems"]
    assert len(problems) == len(weights.adapters) and "q_proj.weight has the adapter in it already" in str(problems)
    # one value changed shows
    file = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert any(
        "its values are not the checkpoint's" in problem
        for problem in adapter.verify_adapter(folder, weights)["problems"]
    )
    file.write_bytes(b"cut off")
    with pytest.raises(checkpoint.CheckpointError, match="adapter is no complete adapter folder"):
        adapter.verify_adapter(folder, weights)


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_adapters_of_x_and_h_are_exported_for_the_model_they_started_from(
    inputs: Path, tmp_path: Path, architecture: str
) -> None:
    """An export is the base that the run starts from and that peft puts the adapters onto; merged is the same.

    Recomputed selectively, with a tower that is called several times in a micro-step: under ZeRO-3 its weights are
    gathered inside the first call, and in backward inside the last.
    """
    from nvlm_train.export import adapter, hf, verify

    model = [f"model.architecture={architecture}", "data.pack_tiles=48", "init_from.vision=null",
             "init_from.language_model=null", "model.cross_attention={every_layers: 1, gate_init: 0.5}"]  # fmt: skip
    before = recipe_to_dict(load_recipe(inputs, model).recipe)
    base = hf.export(random_weights(before, 3), before, tmp_path / "base")
    options = [*LORA, "train.cross_attention=lora", "train.lora.cross_attention={rank: 3, targets: [q_proj, v_proj]}"]
    out = tmp_path / "run"
    assert run(inputs, out, *model, *options, f"init_from.model={base}", "max_steps=2", "validation=null",
               "activation_checkpointing=selective", "vision_tiles_per_chunk=5",
               "schedule.warmup_steps=0", ranks=1) == (0, "")  # fmt: skip
    weights = checkpoint.open_checkpoint(out, checksums=True)
    folder = adapter.export_adapter(weights, tmp_path / "adapter", base)
    report = adapter.verify_adapter(folder, weights)
    assert report["ok"] and len(report["logits"]) == 5, report["problems"]
    named = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert sum(name.startswith("cross_attention.layers.") for name in named) == 2 * 2
    merged = hf.export(weights, weights.recipe, tmp_path / "merged")
    assert verify.verify(merged, weights, weights.recipe)["ok"]
    assert not verify.verify(base, weights, weights.recipe)["ok"]  # and not what it was before


def test_copies_hold_what_lies_beneath_merged_adapters(inputs: Path, tmp_path: Path) -> None:
    """Adapters of two earlier runs are merged into what the last one freezes; with copies it needs neither run."""
    started = tmp_path / "started"
    shutil.copytree(inputs.parent / "vision", started / "vision")
    shutil.copytree(inputs.parent / "language_model", started / "language_model")
    folders = [f"init_from.{part}={started / part}" for part in ("vision", "language_model")]
    one = ["max_steps=1", "validation=null", "schedule.warmup_steps=0", "optimizer.module_lr=null"]
    lora, copy = [*LORA[:2], "optimizer.lr=1.0e-2"], "checkpoint.base=copy"
    start = ["init_from.vision=null", "init_from.language_model=null"]
    assert run(inputs, started / "a", *folders, *one, *lora, copy, ranks=1) == (0, "")
    assert run(inputs, started / "b", *start, f"init_from.run={started / 'a'}", *one, *lora, ranks=1) == (0, "")
    last = [*start, f"init_from.run={started / 'b'}", "train.language_model=frozen", *one, copy]
    assert run(inputs, tmp_path / "c", *last, ranks=1) == (0, "")
    first = checkpoint.open_checkpoint(started / "a")
    assert first.self_contained
    weights = checkpoint.open_checkpoint(tmp_path / "c", checksums=True)
    assert weights.self_contained and not weights.adapters
    expected = {name: weights.read(name).clone() for name in weights.names()}
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(expected[name], first.read(name))  # the second run's adapter is in it too
    shutil.move(started, tmp_path / "gone")
    again = checkpoint.open_checkpoint(tmp_path / "c", checksums=True)
    assert all(torch.equal(again.read(name), value) for name, value in expected.items())
    assert run(inputs, tmp_path / "c", *last, "max_steps=2", ranks=1, accept=["max_steps"]) == (0, "")
    shutil.move(tmp_path / "c", tmp_path / "moved")
    again = checkpoint.open_checkpoint(tmp_path / "moved", checksums=True)
    assert torch.equal(again.read(name), expected[name])
    # what lies beneath is compared with its checksum, too
    file = next((tmp_path / "moved" / "base").glob("*/base/*/base/*/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors has changed"):
        checkpoint.open_checkpoint(tmp_path / "moved", checksums=True).read(name)


class _Beneath:
    """A run's weights without its adapters, and with half its projector."""

    def __init__(self, weights: checkpoint.CheckpointWeights) -> None:
        self.weights = weights.without_adapters()

    def names(self) -> list[str]:
        return [name for name in self.weights.names() if not is_adapter(name)]

    def read(self, name: str) -> torch.Tensor:
        return self.weights.read(name) * (0.5 if name.startswith("projector.") else 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weights, name)


def test_four_bits_train_resume_and_merge_into_the_base(inputs: Path, tmp_path: Path) -> None:
    """QLoRA on a CPU: the decoder in NF4 under ZeRO 1; the export is the base as it was, plus the adapters."""
    pytest.importorskip("bitsandbytes")
    four = [*LORA[:2], "train.quantize=nf4", "zero.stage=1", "optimizer.module_lr=null", "optimizer.lr=1.0e-2"]
    whole, out = tmp_path / "whole", tmp_path / "four"
    assert run(inputs, whole, *four, "max_steps=3", ranks=1) == (0, "")
    assert run(inputs, out, *four, "max_steps=3", ranks=1, job="train_with_signal", signal_name="SIGUSR2", on_rank=0,
               after_step=2) == (0, "")  # fmt: skip
    assert run(inputs, out, *four, "max_steps=3", ranks=1) == (0, "")
    assert trajectory(out) == trajectory(whole)
    unquantised = tmp_path / "unquantised"
    assert run(inputs, unquantised, *four, "train.quantize=none", "max_steps=3", ranks=1) == (0, "")
    losses = [[step["loss"] for step in steps(path)] for path in (whole, unquantised)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and losses[0] != losses[1]
    two_ranks = tmp_path / "two_ranks"
    assert run(inputs, two_ranks, *four, "zero.stage=2", "max_steps=3", ranks=2) == (0, "")
    assert [step["loss"] for step in steps(two_ranks)] == pytest.approx(losses[0], rel=5e-7)  # worst 2.8e-8
    weights = checkpoint.open_checkpoint(whole)
    name = "language_model.model.layers.0.self_attn.v_proj.weight"
    a, b, scale = weights.adapters[name]
    base = weights.without_adapters()
    stored = checkpoint.safe_open(str(inputs.parent / "language_model" / "model.safetensors"), framework="pt")
    assert torch.equal(base.read(name), stored.get_tensor(name.removeprefix("language_model.")))
    expected = base.read(name).float() + scale * weights.checkpoint.read_master(b) @ weights.checkpoint.read_master(a)
    assert torch.allclose(weights.read(name), expected, rtol=0, atol=1e-7)
