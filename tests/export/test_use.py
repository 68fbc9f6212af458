"""An export in the hands of others: loaded strictly, dispatched to several places, quantised, saved again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import use_export
from nvlm_train.export import hf
from test_members import MEMBERS
from tiny_nvlm import CONTROL, YI_CONTROL, make_recipe, make_tokenizer, random_weights

KINDS: dict[str, dict[str, Any]] = {"d": {}, **MEMBERS}


class Export(NamedTuple):
    folder: Path
    model: Any
    loading: dict[str, list[str]]
    processor: Any


def make_export(changes: dict[str, Any], folder: Path) -> Path:
    yi = changes.get("tokenizer.template") == "nvlm_yi"
    words = make_tokenizer(folder / "words", YI_CONTROL if yi else CONTROL)
    recipe = make_recipe(words, **changes)
    return hf.export(random_weights(recipe, seed=7), recipe, folder / "out", max_shard_size="80KB", step=3)


@pytest.fixture(scope="module", params=KINDS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = make_export(KINDS[request.param], tmp_path_factory.mktemp("use"))
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return Export(folder, *use_export.load(folder), processor)


@pytest.fixture
def guarded() -> Iterator[None]:
    use_export.GUARDED[0] = True
    yield
    use_export.GUARDED[0] = False


def test_used_from_loading_to_saving(export: Export, tmp_path: Path, guarded: None) -> None:
    use_export.use(export.folder, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    tensors = load_file(tmp_path / "tensors.safetensors")
    check_use(found, tensors)
    code = [path.name for path in export.folder.glob("*.py")]
    assert code and set(code) <= set(found["saved"])
    assert all((tmp_path / "saved" / name).read_bytes() == (export.folder / name).read_bytes() for name in code)
    assert hf.foreign_code(tmp_path / "saved") == []
    assert not torch.distributed.is_initialized()


def check_use(found: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """What must hold of `use_export.use` in every transformers."""
    assert not any(found["loading"].values()) and not any(found["loading_again"].values()), found
    for side in ("left", "right"):  # the cache, and the side of the padding, do not show
        assert torch.equal(tensors[f"{side}.answers"], tensors["left.answers"])
        assert torch.equal(tensors[f"{side}.answers_without_cache"], tensors["left.answers"])
    real = {side: tensors[f"{side}.attention_mask"].bool() for side in ("left", "right")}
    for key, worst in (("input_ids", 0), ("logits", 2e-5)):  # worst case here 2e-6 of logits up to 4
        left, right = (tensors[f"{side}.{key}"][real[side]] for side in ("left", "right"))
        torch.testing.assert_close(left, right, rtol=0, atol=worst)
    for row in range(len(use_export.conversations())):
        alone, together = tensors[f"{row}.answers"][0].tolist(), tensors["left.answers"][row].tolist()
        assert together[: len(alone)] == alone
    assert torch.equal(tensors["saved.logits"] * real["left"].unsqueeze(-1), tensors["left.logits"])
    assert len(set(found["answers"])) > 1


def test_a_tensor_that_is_missing_or_not_known_shows(export: Export, tmp_path: Path) -> None:
    for path in export.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = next(tmp_path.glob("*-00001-*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors["language_model.stray.weight"] = tensors.pop(name).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["language_model.stray.weight"] = index["weight_map"].pop(name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _, loading = use_export.load(tmp_path)
    assert loading["missing_keys"] == [name] and loading["unexpected_keys"] == ["language_model.stray.weight"]


def placed(export: Export, **places: Any) -> Any:
    model, loading = use_export.load(export.folder, **places)
    assert not any(loading.values())
    inputs = export.processor(use_export.conversations())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, export.model(**inputs).logits)
    answers = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(answers, export.model.generate(**inputs, max_new_tokens=4))
    return model


def test_wherever_its_parts_are_it_answers_alike(export: Export, tmp_path: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in export.model.parameters())
    assert next(placed(export, device_map="auto").parameters()).device.type == "cpu"
    half = placed(export, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "half")
    assert set(half.hf_device_map.values()) == {"cpu", "disk"}
    layers = range(export.model.config.llm_config.num_hidden_layers)
    parts = {"vision_model.embeddings": "disk", "vision_model.encoder": "cpu", "mlp1": "disk", "cross_attention": "cpu"}
    parts |= {f"language_model.model.layers.{n}": ("cpu", "disk")[n % 2] for n in layers}
    parts |= dict.fromkeys(("language_model.model.embed_tokens", "language_model.model.norm"), "disk")
    parts |= {"language_model.model.rotary_emb": "cpu", "language_model.lm_head": "disk"}
    if not hasattr(export.model, "cross_attention"):
        del parts["cross_attention"]
    mixed = placed(export, device_map=parts, offload_folder=tmp_path / "mixed")
    on_disk = [name for name, tensor in mixed.named_parameters() if tensor.device.type == "meta"]
    assert 10 < len(on_disk) < len(list(mixed.parameters())) and hasattr(mixed.mlp1[1], "_hf_hook")


def test_no_layer_is_cut_in_two(export: Export) -> None:
    """Whatever the sizes of the devices, what belongs together stays on one."""
    from accelerate import infer_auto_device_map

    size = sum(tensor.numel() * tensor.element_size() for tensor in export.model.parameters())
    whole = ("vision_model.embeddings", "vision_model.encoder.layers.", "language_model.model.layers.")
    for share in (1.2, 1.5, 2):
        places = infer_auto_device_map(
            export.model,
            max_memory={"cpu": int(size / share), "disk": 10 * size},
            no_split_module_classes=export.model._no_split_modules,
        )
        for name in places:
            parent = name.rpartition(".")[0]
            assert not parent.startswith(whole) or parent.endswith("layers"), name
        assert len(places) > 1


class Packed(nn.Module):
    """Stands for a quantised layer: the same product, and no `weight` to look at."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.hidden = [linear]
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.hidden[0](x)


def test_layers_without_weights_do(export: Export) -> None:
    """As quantisers put them in the places of nn.Linear; each one must be called."""
    model, _ = use_export.load(export.folder)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linear:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Packed(model.get_submodule(name)))
    inputs = export.processor(use_export.conversations())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, export.model(**inputs).logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), export.model.generate(**inputs, max_new_tokens=4))
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    assert len(packed) == len(linear) > 20 and all(module.calls for module in packed)


def test_in_four_bits_it_is_the_model_of_the_rounded_weights(export: Export) -> None:
    """Through transformers' own hook for bitsandbytes. Training mode: its kernel for answers wants other sizes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    quantised, loading = use_export.load(export.folder, quantization_config=config, device_map="cpu")
    assert not any(loading.values())
    rounded, _ = use_export.load(export.folder)
    layers = {n: m for n, m in quantised.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    rest = {n for n, m in quantised.named_modules() if isinstance(m, nn.Linear)} - set(layers)
    assert rest == {"language_model.lm_head"} and len(layers) > 20
    with torch.no_grad():
        for name, layer in layers.items():
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            rounded.get_submodule(name).weight.copy_(weight)
        inputs = export.processor(use_export.conversations())
        found, expected = quantised.train()(**inputs).logits, rounded(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert float((export.model(**inputs).logits - expected).abs().max()) > 0.05  # the rounding does show


def test_configuration_without_arguments_and_printing(export: Export) -> None:
    kind = type(export.model.config)
    config = kind()
    assert config.vision_config.num_attention_heads == 25 and config.get_text_config() is config.llm_config
    assert kind.model_type in repr(config) and kind.model_type in repr(export.model.config)
    assert json.loads(config.to_json_string())["model_type"] == kind.model_type
    assert kind.from_dict(config.to_dict()).to_dict() == config.to_dict()
