"""Verification must see every single change: each tensor in turn is swapped, transposed, zeroed, scaled."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvlm_train.errors import CheckpointError
from nvlm_train.export import hf, verify
from nvlm_train.model import key_map
from nvlm_train.model.pretrained import open_model_folder
from tiny_nvlm import MemoryWeights, make_recipe, random_weights


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
    assert all(check["ok"] for check in report["checks"]) and len(report["checks"]) == 9
    # worst case here 2 % of the tolerance of 2e-5 of the largest logit (only where rows are padded into one batch)
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in report["logits"].values())


CROSSING: dict[str, dict[str, Any]] = {
    name: {"model.cross_attention": {"every_layers": 1, "feed_forward": True}} for name in ("nvlm_x", "nvlm_h")
}


def mutations(
    name: str, tensors: dict[str, torch.Tensor], exported: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every way to spoil one tensor; the result may not equal it."""
    tensor = tensors[name]
    spoilt = {"zeroed": torch.zeros_like(tensor), "scaled": tensor * 1.01, "reversed": tensor.flip(0)}
    if tensor.dim() == 2 and 1 not in tensor.shape:
        spoilt["transposed"] = tensor.T.reshape(tensor.shape)
    twin = next((n for n, t in exported.items() if n != name and t.shape == tensor.shape), None)
    if twin is not None:
        spoilt["swapped"] = exported[twin].clone()
    if tensor.shape[0] == 1:  # class and position embeddings; a gate has one value
        spoilt["reversed"] = tensor.flip(-1) if tensor.numel() > 1 else -tensor
    one = tensor.clone()
    one.view(-1)[one.numel() // 2] += 1e-3
    spoilt["one value"] = one
    return spoilt


@pytest.mark.parametrize("architecture", ["nvlm_d", "nvlm_x", "nvlm_h"])
def test_every_change_of_a_single_tensor_is_detected(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Through the value check alone, in memory: the stored tensor is replaced while it is read."""
    recipe = make_recipe(tokenizer_folder, **{"model.architecture": architecture, **CROSSING.get(architecture, {})})
    weights = random_weights(recipe)
    exported = hf.export(weights, recipe, tmp_path / "out")
    dummies = key_map.NUM_DUMMY_HEADS if architecture == "nvlm_d" else 0
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
    assert verify._value_problems(exported, stored, weights, model, dummies) == []
    count = 0
    for name in everything:
        for how, replacement in mutations(name, everything, everything).items():
            assert not torch.equal(replacement, everything[name]), (name, how)
            spoil.clear()
            spoil[name] = replacement
            only = {name: stored[name]}
            problems = verify._value_problems(exported, only, weights, model, dummies)
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
        f"checksums: {shard_of(copy, name).name} has changed since the export",
        f"values: {name}: 1 of {report_size(copy, name)} values are not the checkpoint's",
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
        "checksums: tokenizer_config.json is missing",
        "checksums: modeling_nvlm_d.py has changed since the export",
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


def test_every_file_but_the_card_is_checked(copy: Path, weights: MemoryWeights, recipe: dict[str, Any]) -> None:
    (copy / "README.md").write_text("# mine")
    assert checked(copy, weights, recipe)["ok"]
    words = copy / "tokenizer.json"
    words.write_text(words.read_text().replace("sum", "som", 1))
    (copy / "more.txt").write_text("")
    assert checked(copy, weights, recipe)["problems"] == [
        "checksums: more.txt is not named there",
        "checksums: tokenizer.json has changed since the export",
    ]


# --------------------------------------------------------------------------------------------- the second list of names


TOWER, DECODER = "vision_model.encoder.layers", "language_model.model.layers"
SLIPS = {
    "nvlm_d": [
        (f"{TOWER}.0.attn.q_norm.weight", f"{TOWER}.0.attn.k_norm.weight"),
        (f"{TOWER}.0.norm1.weight", f"{TOWER}.0.norm2.weight"), (f"{TOWER}.1.ls1", f"{TOWER}.1.ls2"),
        (f"{TOWER}.0.attn.qkv.weight", f"{TOWER}.1.attn.qkv.weight"),
        (f"{DECODER}.0.mlp.gate_proj.weight", f"{DECODER}.0.mlp.up_proj.weight"),
        (f"{DECODER}.2.self_attn.k_proj.weight", f"{DECODER}.2.self_attn.v_proj.weight"),
        (f"{DECODER}.2.self_attn.q_proj.weight", f"{DECODER}.2.self_attn.o_proj.weight"),
        (f"{DECODER}.1.input_layernorm.weight", f"{DECODER}.1.post_attention_layernorm.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("projector.norm.weight", "projector.norm.bias"),
    ],
    "nvlm_h": [
        ("cross_attention.layers.0.attn_gate", "cross_attention.layers.0.mlp_gate"),
        ("cross_attention.layers.0.attn.k_proj.weight", "cross_attention.layers.0.attn.v_proj.weight"),
        ("cross_attention.layers.0.memory_norm.weight", f"{DECODER}.0.input_layernorm.weight"),
        ("cross_attention.layers.0.mlp.gate_proj.weight", "cross_attention.layers.1.mlp.gate_proj.weight"),
    ],
}  # fmt: skip


def sloppy(change: Callable[[torch.Tensor], torch.Tensor], kind: str) -> Callable[..., torch.Tensor]:
    """`key_map.pad` with one kind of tensor laid out otherwise."""
    real = key_map.pad

    def pad(name: str, tensor: torch.Tensor, *more: Any) -> torch.Tensor:
        padded = real(name, tensor, *more)
        return change(padded) if key_map.padded_kind(name) == kind else padded

    return pad


@pytest.mark.parametrize("architecture", SLIPS)
def test_a_slip_in_the_name_map_or_the_padding_is_detected(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """The code that exports is wrong, and stays so while the export is verified and imported: only the second list of
    names can tell. An import with the same slip gives back what was exported."""
    recipe = make_recipe(tokenizer_folder, **{"model.architecture": architecture, **CROSSING.get(architecture, {})})
    weights = random_weights(recipe)
    to_published, from_published = key_map.to_published, key_map.from_published
    for number, (one, other) in enumerate(SLIPS[architecture]):
        there = {one: key_map.to_published(other), other: key_map.to_published(one)}
        back = {published: ours for ours, published in there.items()}
        with monkeypatch.context() as slip:
            slip.setattr(key_map, "to_published", lambda n, t=there: t.get(n) or to_published(n))
            slip.setattr(key_map, "from_published", lambda n, a="nvlm_d", t=back: t.get(n) or from_published(n, a))
            out = hf.export(weights, recipe, tmp_path / str(number))
            again = open_model_folder(out, key_map.model_from_recipe(recipe))
            assert torch.equal(again.read(one), weights.read(one)) and torch.equal(
                again.read(other), weights.read(other)
            )
            report = checked(out, weights, recipe)
        found = [problem for problem in report["problems"] if "values are not the checkpoint's" in problem]
        assert len(found) == 2 and all(any(f" {name}:" in problem for problem in found) for name in back), (one, other)
    if architecture != "nvlm_d":
        return
    thirds: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
        "q and k": (lambda t: torch.cat([t[48:96], t[:48], t[96:]]), "qkv"),
        "dummy heads first": (lambda t: torch.cat([part.roll(28, 0) for part in t.chunk(3)]), "qkv"),
        "dummy heads at the end of all": (lambda t: torch.cat([t[:20], t[48:68], t[96:116], 0 * t[:84]]), "qkv"),
        "columns": (lambda t: t.roll(28, 1), "proj"), "norm": (lambda t: t.roll(28, 0), "norm"),
    }  # fmt: skip
    for name, (change, kind) in thirds.items():
        with monkeypatch.context() as slip:
            slip.setattr(key_map, "pad", sloppy(change, kind))
            report = checked(hf.export(weights, recipe, tmp_path / name), weights, recipe)
        assert len(report["problems"]) == (4 if kind == "norm" else 2), name


# ------------------------------------------------------------------------------------------------------- layer by layer


def in_memory(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.device.type != "meta")


def test_logits_are_compared_layer_by_layer_where_memory_is_short(
    exported: Path, weights: MemoryWeights, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side ever holds more than a module with weights, and what is around it; every tensor is read once."""
    most, reads = {"ours": 0, "theirs": 0}, []

    def look(side: str, model: Any, forward: Any, *args: Any, **more: Any) -> Any:
        most[side] = max(most[side], in_memory(model))
        return forward(*args, **more)

    def watched(side: str, model: Any) -> Any:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                inner = "_old_forward" if side == "theirs" and hasattr(module, "_old_forward") else "forward"

                setattr(module, inner, partial(look, side, model, getattr(module, inner)))
        return model

    class Read(MemoryWeights):
        def read(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().read(name)

    ours, theirs = verify.layer_by_layer, hf.load_exported
    monkeypatch.setattr(verify, "layer_by_layer", lambda *a: watched("ours", ours(*a)))
    monkeypatch.setattr(hf, "load_exported", lambda *a, **k: watched("theirs", theirs(*a, **k)))
    monkeypatch.setattr(verify, "_not_enough_memory", lambda *args: "needs 400 GiB")
    report = checked(exported, Read(weights.tensors), recipe, logits=True)
    assert report["ok"] and "in one batch, layer by layer from the files" in report["checks"][-1]["detail"]
    assert set(report["logits"]) == {"text only", "one tile", "several tiles", "two images", "batch"}
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in report["logits"].values())
    assert sorted(reads) == sorted(2 * weights.names())  # once for the values, once for the logits
    largest = max(tensor.numel() for tensor in weights.tensors.values())
    beside = 3 * 20 + 20 * (1 + 16)  # LayerScales of a layer, biases; class token and positions
    kept = sum(t.numel() for n, t in weights.tensors.items() if n.startswith("vision_model.embeddings."))
    assert largest <= most["ours"] <= largest + beside
    assert largest <= most["theirs"] <= largest + kept + beside
    everything = sum(tensor.numel() for tensor in weights.tensors.values())
    assert everything > 4 * most["theirs"]


def test_layer_by_layer_a_wrong_value_is_seen(tmp_path: Path, weights: MemoryWeights, recipe: dict[str, Any]) -> None:
    """In bf16, which is widened when a layer is read."""
    out = hf.export(weights, recipe, tmp_path / "out", dtype="bf16")
    model, config = key_map.model_from_recipe(recipe), json.loads((out / "config.json").read_text())

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][3] *= 1.01

    right = verify.compare_logits(out, weights, model, config, streamed=True)
    rewrite(shard_of(out, NAME), change)
    wrong = verify.compare_logits(out, weights, model, config, streamed=True)
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in right.values())
    assert all(result["max_difference"] > 10 * result["tolerance"] for result in wrong.values())


def test_how_much_memory_is_enough() -> None:
    assert verify._not_enough_memory(10**15, {"torch_dtype": "bfloat16"}) is not None
    assert verify._not_enough_memory(1000, {"torch_dtype": "bfloat16"}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tiles": 1}, {"image_mean": [0, 0, 0]}, {"image_std": [1, 1, 1]}, {"system": "other"}, {"system": None},
        {"image_tokens_per_tile": 5}, {"thumbnail": False}, {"tile_tags": "none"}, {"prompt_template": "hf_nvlm"},
        {"decode": "fast"}, {"exif": "apply"}, {"tile_size": 13}, {"thumbnail_tag": "<tile_global>"}, {"auto_map": {}},
    ],
)  # fmt: skip
def test_a_processor_that_prepares_otherwise_is_detected(
    copy: Path, weights: MemoryWeights, recipe: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """With a checksum that agrees, as if the exporter had written it so."""
    change_json(copy / "processor_config.json", lambda content: content.update(wrong))
    renew_checksum(copy, "processor_config.json")
    (problem,) = checked(copy, weights, recipe)["problems"]
    assert problem.startswith(f"processor: {next(iter(wrong))}")


def test_a_config_without_its_tower_is_told(copy: Path, weights: MemoryWeights, recipe: dict[str, Any]) -> None:
    change_json(copy / "config.json", lambda content: content.pop("vision_config"))
    report = checked(copy, weights, recipe)
    assert not report["ok"] and any("vision_config.num_dummy_heads is None" in text for text in report["problems"])


def renew_checksum(folder: Path, name: str) -> None:
    file = folder / "SHA256SUMS"
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    lines = file.read_text().splitlines()
    file.write_text("".join(f"{digest}  {name}\n" if line.endswith(f"  {name}") else f"{line}\n" for line in lines))
