"""Verification must see every single change: each tensor in turn is swapped, transposed, zeroed, scaled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvlm_train.errors import CheckpointError
from nvlm_train.export import hf, verify
from nvlm_train.model import key_map
from tiny_nvlm import MemoryWeights


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def checked(folder: Path, weights: Any, recipe: dict[str, Any], logits: bool = False) -> dict[str, Any]:
    return verify.verify(folder, weights, recipe, logits=logits)


def test_an_untouched_export_is_verified(exported: Path, weights: MemoryWeights, recipe: dict[str, Any]) -> None:
    report = checked(exported, weights, recipe, logits=True)
    assert report["ok"] and report["problems"] == [] and report["tensors"] == 73
    assert all(check["ok"] for check in report["checks"]) and len(report["checks"]) == 6
    # worst case here 2 % of the tolerance of 2e-5 of the largest logit (only where rows are padded into one batch)
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in report["logits"].values())


def mutations(
    name: str, tensors: dict[str, torch.Tensor], exported: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every way to spoil one tensor; the result may not equal it."""
    tensor = tensors[name]
    spoilt = {"zeroed": torch.zeros_like(tensor), "scaled": tensor * 1.01, "reversed": tensor.flip(0)}
    if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
        spoilt["transposed"] = tensor.T.contiguous()
    twin = next((n for n, t in exported.items() if n != name and t.shape == tensor.shape), None)
    if twin is not None:
        spoilt["swapped"] = exported[twin].clone()
    if tensor.shape[0] == 1:  # class and position embeddings
        spoilt["reversed"] = tensor.flip(-1)
    one = tensor.clone()
    one.view(-1)[one.numel() // 2] += 1e-3
    spoilt["one value"] = one
    return spoilt


def test_every_change_of_a_single_tensor_is_detected(
    exported: Path, weights: MemoryWeights, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the value check alone, in memory: the stored tensor is replaced while it is read."""
    everything: dict[str, torch.Tensor] = {}
    for file in exported.glob("*.safetensors"):
        everything |= load_file(file)
    spoil: dict[str, torch.Tensor] = {}

    class Spoiling:
        def __init__(self, file: Path, framework: str) -> None:
            self.shard = safe_open(file, framework=framework)

        def __enter__(self) -> Spoiling:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def get_tensor(self, name: str) -> torch.Tensor:
            return spoil[name] if name in spoil else everything[name]

    stored, found = verify._stored_tensors(exported)
    assert found == []
    monkeypatch.setattr("safetensors.safe_open", Spoiling)
    model = key_map.model_from_recipe(recipe)
    assert verify._value_problems(exported, stored, weights, model) == []
    count = 0
    for name in everything:
        for how, replacement in mutations(name, everything, everything).items():
            assert not torch.equal(replacement, everything[name]), (name, how)
            spoil.clear()
            spoil[name] = replacement
            only = {name: stored[name]}
            problems = verify._value_problems(exported, only, weights, model)
            assert any(name in problem and "not the checkpoint's" in problem for problem in problems), (name, how)
            count += 1
    assert count > 300


def test_logits_alone_see_a_change_of_any_tensor(
    exported: Path, weights: MemoryWeights, recipe: dict[str, Any], loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comparison does not lean on the first: with the values unchecked, logits tell of each change."""
    model = key_map.model_from_recipe(recipe)
    config = json.loads((exported / "config.json").read_text())
    monkeypatch.setattr(hf, "load_exported", lambda *args: loaded)
    unseen = []
    for name, parameter in loaded.named_parameters():
        kept = parameter.detach().clone()
        try:
            with torch.no_grad():
                parameter.copy_(kept.flip(0) if kept.shape[0] > 1 else kept.flip(-1))
            results = verify.compare_logits(exported, weights, model, config)
        finally:
            with torch.no_grad():
                parameter.copy_(kept)
        if all(result["max_difference"] <= result["tolerance"] for result in results.values()):
            unseen.append(name)
    assert unseen == []


@pytest.mark.parametrize("part", ["attn.qkv.weight", "attn.proj.weight", "attn.q_norm.weight"])
def test_something_in_a_dummy_head_is_detected(
    copy: Path, weights: MemoryWeights, recipe: dict[str, Any], part: str
) -> None:
    name = f"vision_model.encoder.layers.0.{part}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = 1e-3

    rewrite(shard_of(copy, name), change)
    report = checked(copy, weights, recipe)
    assert not report["ok"] and report["problems"] == [
        f"values: {name}: 1 of {report_size(copy, name)} values are not the checkpoint's"
    ]


def report_size(folder: Path, name: str) -> int:
    return load_file(shard_of(folder, name))[name].numel()


NAME = "language_model.model.norm.weight"


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME][3] = float("nan")


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["language_model.model.rotary_emb.inv_freq"] = torch.ones(4)


def misshapen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME][None]


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = torch.zeros(0)


def other_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME].bfloat16()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, "NaN"), (missing, f"{NAME} is missing"), (extra, "inv_freq does not belong to the layout"),
        (misshapen, f"{NAME} is [1, 48], expected [48]"), (empty, "is empty"),
        (other_type, "is BF16, torch_dtype says float32"),
    ],
)  # fmt: skip
def test_damaged_shards(
    copy: Path, weights: MemoryWeights, recipe: dict[str, Any], change: Callable[..., None], words: str
) -> None:
    rewrite(shard_of(copy, NAME), change)
    report = checked(copy, weights, recipe, logits=True)
    assert not report["ok"] and any(words in problem for problem in report["problems"])
    assert report["checks"][-1] == {
        "name": "logits", "ok": None, "detail": "not compared: the folder is wrong already"
    }  # fmt: skip


def test_truncated_lost_doubled_and_foreign_shards(copy: Path, weights: MemoryWeights, recipe: dict[str, Any]) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    shards[1].unlink()
    shutil.copy(shards[2], copy / "model-00099-of-00099.safetensors")
    save_file({"optimizer.step": torch.ones(1)}, copy / "extra.safetensors")
    problems = "\n".join(checked(copy, weights, recipe)["problems"])
    for words in (f"{shards[0].name} cannot be read", "is in the index but in no shard", "and again in model-00099",
                  "extra.safetensors is not named in the index", "format", "total_size"):  # fmt: skip
        assert words in problems


def test_missing_and_changed_files(copy: Path, weights: MemoryWeights, recipe: dict[str, Any]) -> None:
    (copy / "tokenizer_config.json").unlink()
    code = copy / "modeling_nvlm_d.py"
    code.write_text(code.read_text() + "\nimport os\n")
    problems = checked(copy, weights, recipe)["problems"]
    assert problems == [
        "files: tokenizer_config.json is missing",
        "files: modeling_nvlm_d.py differs from the one this version exports",
    ]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "architectures", ["NVLM_D_Model"]), (None, "ps_version", "v1"), (None, "max_dynamic_patch", 12),
        (None, "tie_word_embeddings", True), ("llm_config", "rope_theta", 10000.0),
        ("llm_config", "rms_norm_eps", 1e-5),
        ("llm_config", "rope_scaling", {"type": "dynamic", "factor": 3.0}), ("llm_config", "torch_dtype", "bfloat16"),
        ("vision_config", "num_attention_heads", 12), ("vision_config", "norm_type", "layer_norm"),
    ],
)  # fmt: skip
def test_a_wrong_number_in_config_json_is_detected(
    copy: Path, weights: MemoryWeights, recipe: dict[str, Any], section: str | None, key: str, value: Any
) -> None:
    def change(config: dict[str, Any]) -> None:
        (config if section is None else config[section])[key] = value

    change_json(copy / "config.json", change)
    report = checked(copy, weights, recipe)
    assert not report["ok"] and any("config.json" in problem and key in problem for problem in report["problems"])


def test_folders_that_are_none(tmp_path: Path, weights: MemoryWeights, recipe: dict[str, Any], copy: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        checked(tmp_path / "nowhere", weights, recipe)
    (tmp_path / "empty").mkdir()
    assert not checked(tmp_path / "empty", weights, recipe)["ok"]
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checked(copy, weights, recipe)


def test_logits_are_skipped_aloud_where_memory_is_short(
    exported: Path, weights: MemoryWeights, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_not_enough_memory", lambda *args: "NOT COMPARED: needs 400 GiB")
    report = checked(exported, weights, recipe, logits=True)
    assert report["ok"] and report["checks"][-1]["ok"] is None and "NOT COMPARED" in report["checks"][-1]["detail"]
    monkeypatch.undo()
    assert verify._not_enough_memory(10**15, {"torch_dtype": "bfloat16"}) is not None
    assert verify._not_enough_memory(1000, {"torch_dtype": "bfloat16"}) is None
