"""The name map and the padded heads, in both directions, against the published index where it is at hand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_train.errors import CheckpointError
from nvlm_train.export import hf, shards, verify
from nvlm_train.model import key_map
from nvlm_train.model.pretrained import expected_shapes
from nvlm_train.recipe.schema import LANGUAGE_MODEL_PRESETS, VISION_PRESETS, Model
from tiny_nvlm import make_recipe, random_weights

FULL_SIZE = Model.model_validate(
    {
        "vision": VISION_PRESETS["internvit_6b_448px_v1_5"],
        "language_model": LANGUAGE_MODEL_PRESETS["qwen2_72b_instruct"],
    }
)


def published(model: Model) -> dict[str, tuple[int, ...]]:
    return {
        key_map.to_published(name): key_map.published_shape(name, shape, model.vision)
        for name, shape in expected_shapes(model).items()
    }


@pytest.fixture(scope="module")
def tiny() -> Model:
    return key_map.model_from_recipe(make_recipe(Path("tokenizer")))


def test_72b_has_the_published_names_shapes_and_count() -> None:
    shapes = published(FULL_SIZE)
    assert len(shapes) == 1556
    assert sum(math.prod(shape) for shape in shapes.values()) == 79_379_593_344
    assert shapes["vision_model.encoder.layers.44.attn.qkv.weight"] == (12288, 3200)
    assert shapes["vision_model.encoder.layers.0.attn.q_norm.weight"] == (4096,)
    assert shapes["vision_model.encoder.layers.0.attn.proj.weight"] == (3200, 4096)
    assert shapes["mlp1.1.weight"] == (29568, 12800)
    planned = shards.plan_shards(FULL_SIZE, "bf16", 4 * 10**9)
    assert sum(tensor.bytes for shard in planned for tensor in shard) == 158_759_186_688
    # the list that verify was given independently
    config = {
        "architectures": ["NVLM_D"],
        "vision_config": FULL_SIZE.vision.model_dump() | {"num_channels": 3, "num_dummy_heads": 7},
        "llm_config": FULL_SIZE.language_model.model_dump() | {"architectures": ["Qwen2ForCausalLM"]},
    }
    assert shapes == verify.expected_layout(config)


def test_72b_names_equal_the_published_index() -> None:
    fixtures = os.environ.get("NVLM_FIXTURES")
    if not fixtures:
        pytest.skip("NVLM_FIXTURES is not set: the published index is not at hand")
    index = json.loads((Path(fixtures) / "nvlm-d-72b/model.safetensors.index.json").read_text())
    assert set(published(FULL_SIZE)) == set(index["weight_map"])


def vllm_problems(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What vLLM's loader of NVLM_D (0.33) would stumble over: it reads these keys without a fallback, builds the tower
    with 7 more heads than config.json names, goes by module prefixes, and fails on any name that it does not know."""
    problems = []
    if config["architectures"] != ["NVLM_D"] or "AutoConfig" not in config["auto_map"]:
        problems.append("architectures")  # the registry's key; the configuration comes from the export's own code
    vision, text = config["vision_config"], config["llm_config"]
    needed = {
        "": ("force_image_size", "downsample_ratio", "ps_version", "select_layer", "min_dynamic_patch",
             "max_dynamic_patch", "dynamic_image_size", "use_thumbnail"),
        "vision_config": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "image_size",
                          "patch_size", "qkv_bias", "qk_normalization", "norm_type", "layer_norm_eps", "hidden_act",
                          "initializer_factor"),
        "llm_config": ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                       "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings",
                       "tie_word_embeddings", "torch_dtype"),
    }  # fmt: skip
    for section, keys in needed.items():
        part = config[section] if section else config
        problems += [f"{section}.{key}" for key in keys if key not in part]
    if text.get("rope_scaling") is not None or text["architectures"] != ["Qwen2ForCausalLM"]:
        problems.append("llm_config")
    width, heads = vision["hidden_size"], vision["num_attention_heads"]
    padded = (heads + 7) * (width // heads)
    parts = {"qkv.weight": (3 * padded, width), "q_norm.weight": (padded,), "k_norm.weight": (padded,),
             "proj.weight": (width, padded), "proj.bias": (width,)}  # fmt: skip
    for name, shape in shapes.items():
        if not name.startswith(("vision_model.", "mlp1.", "language_model.")) or "inv_freq" in name:
            problems.append(name)
        if name.startswith("vision_model.encoder.") and ".attn." in name and shape != parts[name.split(".attn.")[1]]:
            problems.append(f"{name} {shape}")
    layers = {int(name.split(".")[3]) for name in shapes if name.startswith("vision_model.encoder.layers.")}
    if layers != set(range(vision["num_hidden_layers"])) or config["select_layer"] != -1:
        problems.append("vision layers")  # fewer are built with another select_layer; what is left over is fatal
    return problems


@pytest.mark.parametrize("model", ["72B", "tiny"])
def test_vllms_loader_finds_what_it_needs(tiny: Model, model: str) -> None:
    chosen = FULL_SIZE if model == "72B" else tiny
    ids = {"im_start": 1, "im_end": 2, "pad": 0, "image": 5}
    config = hf.model_config(chosen, make_recipe(Path("none")), ids, "bf16")
    assert vllm_problems(config, published(chosen)) == []
    assert (FULL_SIZE.vision.num_attention_heads + 7) % 8 == 0  # so the tower can be split over 8 GPUs
    unpadded = {
        key_map.to_published(name): key_map.published_shape(name, shape, chosen.vision, 0)
        for name, shape in expected_shapes(chosen).items()
    }
    assert len(vllm_problems(config, unpadded)) == 4 * chosen.vision.num_hidden_layers
    assert vllm_problems({**config, "architectures": ["NVLM_D_Model"]}, {}) == ["architectures", "vision layers"]


def test_names_go_there_and_back(tiny: Model) -> None:
    names = list(expected_shapes(tiny))
    there = [key_map.to_published(name) for name in names]
    assert len(set(there)) == len(names)
    assert [key_map.from_published(name) for name in there] == names
    assert key_map.to_published("projector.fc2.weight") == "mlp1.3.weight"


@pytest.mark.parametrize(
    "name", ["optimizer.step", "mlp1.2.weight", "projector.fc3.weight", "model.embed_tokens.weight"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        key_map.to_published(name)
    if not name.startswith("projector"):
        with pytest.raises(CheckpointError, match=name):
            key_map.from_published(name)


def test_padding_keeps_every_value_and_adds_zeros_behind_each_third(tiny: Model) -> None:
    weights = random_weights(make_recipe(Path("tokenizer")))
    for name in weights.names():
        ours = weights.read(name)
        padded = key_map.pad(name, ours, tiny.vision)
        assert padded.shape == key_map.published_shape(name, tuple(ours.shape), tiny.vision)
        assert torch.equal(key_map.unpad(name, padded, tiny.vision), ours), name
        assert int((padded != 0).sum()) == int((ours != 0).sum()), name
    qkv = weights.read("vision_model.encoder.layers.1.attn.qkv.weight")  # [60, 20]: 5 heads of 4
    padded = key_map.pad("vision_model.encoder.layers.1.attn.qkv.weight", qkv, tiny.vision)  # [144, 20]
    assert torch.equal(padded[48:68], qkv[20:40])  # the keys begin at the second third
    assert not padded[20:48].any() and not padded[68:96].any() and not padded[116:].any()


def test_published_weights_go_in_and_out_bit_for_bit(tiny: Model) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, shape in expected_shapes(tiny).items():
        theirs = torch.randn(key_map.published_shape(name, shape, tiny.vision), generator=generator)
        theirs = key_map.pad(
            name, key_map.unpad(name, theirs, tiny.vision), tiny.vision
        )  # dummy heads zero, as published
        assert torch.equal(key_map.pad(name, key_map.unpad(name, theirs, tiny.vision), tiny.vision), theirs)


def test_dummy_heads_may_hold_what_cannot_contribute(tiny: Model) -> None:
    real, wide = 20, 48
    qkv, proj = torch.randn(3 * wide, real), torch.zeros(real, wide)
    proj[:, :real] = 1
    key_map.check_dummy_heads("layer 0", qkv, proj, tiny.vision)  # values there, but no column reads them
    proj[3, real + 2] = 0.5
    with pytest.raises(CheckpointError, match=r"layer 0: 1 of 28 channels"):
        key_map.check_dummy_heads("layer 0", qkv, proj, tiny.vision)
    qkv[2 * wide + real + 2] = 0
    key_map.check_dummy_heads("layer 0", qkv, proj, tiny.vision)


def test_a_recipe_without_a_readable_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model"):
        key_map.model_from_recipe({"run_name": "x"})
