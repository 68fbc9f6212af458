"""Whole models in the published layout, by `init_from.model`: dummy heads, mixed types, an odd configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from make_tiny_checkpoints import random_state, write_nvlm_d_folder
from model_cases import make_config
from nvlm_train.errors import CheckpointError
from nvlm_train.model import key_map
from nvlm_train.model.nvlm import NvlmD
from nvlm_train.model.pretrained import account, expected_shapes, load_into, open_model_folder, part_of

torch.set_num_threads(1)

CONFIG = make_config()
TIED = make_config(tie_word_embeddings=True)
LAYER = "vision_model.encoder.layers.1.attn"


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; `llm_config__vocab_size` stands for a key below."""
    content = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        section = content
        for part in above:
            section = section[part]
        section[last] = value
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensor(folder: Path, name: str, change: Any) -> None:
    """Replaces a tensor by change(tensor); None takes it out."""
    file = next(f for f in sorted(folder.glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if changed is None:
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.write_text(json.dumps(content))


def fail(folder: Path, *needles: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        account(expected_shapes(CONFIG), open_model_folder(folder, CONFIG))
    for needle in needles:
        assert needle in str(caught.value), caught.value


@pytest.mark.parametrize("nonzero", [False, True], ids=["zero dummies", "non-zero dummies"])
@pytest.mark.parametrize("num_dummy_heads", [7, 0, 3])
def test_every_tensor_arrives_whatever_stands_behind_the_real_heads(
    nonzero: bool, num_dummy_heads: int, tmp_path: Path
) -> None:
    state = random_state(expected_shapes(CONFIG), 3)
    write_nvlm_d_folder(tmp_path, CONFIG, state, num_dummy_heads=num_dummy_heads, nonzero_dummies=nonzero)
    weights = open_model_folder(tmp_path, CONFIG)
    found = account(expected_shapes(CONFIG), weights)
    assert found.loaded == sorted(state) and not found.initialised and not found.ignored
    assert {weights.dtype(name) for name in weights.names()} == {torch.float32, torch.bfloat16}
    model = NvlmD(CONFIG)
    load_into(model, weights, CONFIG, seed=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name].to(weights.dtype(name)).float()), name
        third = parameter.numel() // 3
        assert torch.equal(
            weights.read_slice(name, third, 2 * third), parameter.to(weights.dtype(name)).flatten()[third : 2 * third]
        )


def test_a_tied_model_has_no_head_of_its_own(tmp_path: Path) -> None:
    write_nvlm_d_folder(tmp_path, TIED)
    assert "language_model.lm_head.weight" not in open_model_folder(tmp_path, TIED).names()
    fail(tmp_path, "llm_config.tie_word_embeddings is True, but the recipe's model.language_model.tie_word_embeddings")


def test_dummy_heads_that_would_change_the_tower_are_refused(tmp_path: Path) -> None:
    write_nvlm_d_folder(tmp_path, CONFIG, nonzero_dummies=True)
    real = CONFIG.vision.hidden_size

    def one_column(proj: torch.Tensor) -> torch.Tensor:
        proj[2, real + 1] = 0.5
        return proj

    edit_tensor(tmp_path, f"{LAYER}.proj.weight", one_column)
    fail(tmp_path, f"{LAYER}.qkv.weight", "1 of", "cutting them off would change the tower")


def test_what_is_not_the_recipes_model_is_told_by_key(tmp_path: Path) -> None:
    write_nvlm_d_folder(tmp_path, CONFIG)
    edit_config(
        tmp_path, select_layer=-2, llm_config__rope_theta=1e4, vision_config__qkv_bias=True,
        llm_config__rope_scaling={"type": "yarn", "factor": 4.0},
    )  # fmt: skip
    fail(
        tmp_path,
        "4 problems",
        "select_layer is -2, but the architecture needs -1",
        "llm_config.rope_theta is 10000.0, but the recipe's model.language_model.rope_theta is 1000000.0",
        "vision_config.qkv_bias is True",
        "llm_config.rope_scaling.type is 'yarn', but the architecture needs 'default'",
    )
    edit_config(tmp_path, architectures=["InternVLChatModel"])
    fail(tmp_path, "architectures is ['InternVLChatModel']", "init_from.model takes the published NVLM-D or an export")


def test_names_and_shapes_that_do_not_fit_are_told_by_file_and_key(tmp_path: Path) -> None:
    write_nvlm_d_folder(tmp_path, CONFIG)
    edit_tensor(tmp_path, "mlp1.3.weight", lambda t: t[:, :-1])
    edit_tensor(tmp_path, f"{LAYER}.q_norm.weight", lambda t: t[:-1])
    edit_tensor(tmp_path, "mlp1.0.bias", lambda t: None)
    width = key_map.padded_width(CONFIG.vision)
    fail(
        tmp_path,
        "3 problems",
        "projector.norm.bias",
        "missing, none of the weights has it",
        f".safetensors:mlp1.3.weight has shape [{CONFIG.language_model.hidden_size}, "
        f"{CONFIG.language_model.intermediate_size - 1}], the model",
        f".safetensors:{LAYER}.q_norm.weight has shape [{width - 1}], the model [{CONFIG.vision.hidden_size}]",
    )
    edit_tensor(tmp_path, "vision_model.encoder.layers.0.attn.qkv.weight", lambda t: t[:-3])
    fail(
        tmp_path, "vision_model.encoder.layers.0.attn.qkv.weight", "are not three times", "with or without dummy heads"
    )


def test_a_name_that_is_not_in_the_layout_is_refused(tmp_path: Path) -> None:
    write_nvlm_d_folder(tmp_path, CONFIG, num_shards=1)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"mlp2.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    fail(tmp_path, "model.safetensors: tensor 'mlp2.weight' is not part of the published NVLM-D layout")


def test_which_part_of_a_stored_tensor_a_weight_is(tmp_path: Path) -> None:
    """So that a run can record where a frozen weight is, and read it again without this code."""
    write_nvlm_d_folder(tmp_path, CONFIG, nonzero_dummies=True)
    weights = open_model_folder(tmp_path, CONFIG)
    for name in weights.names():
        part = part_of(weights, name)
        assert (part is not None) == (key_map.padded_kind(name) is not None)
        if part is not None:
            file, key = weights.where(name).rsplit(":", 1)
            stored = load_file(file)[key]
            found = torch.cat([stored.narrow(part[0], a, b - a) for a, b in part[1]], part[0])
            assert torch.equal(found, weights.read(name)), name


@pytest.mark.skipif("NVLM_FIXTURES" not in os.environ, reason="NVLM_FIXTURES is not set")
def test_the_published_configuration_says_what_the_generator_writes(tmp_path: Path) -> None:
    published = json.loads((Path(os.environ["NVLM_FIXTURES"]) / "nvlm-d-72b/config.json").read_text())
    write_nvlm_d_folder(tmp_path, CONFIG)
    ours = json.loads((tmp_path / "config.json").read_text())
    sizes = ("_size", "_heads", "_layers", "_eps", "max_position_embeddings")
    for section, of in ((published, ours), *((published[n], ours[n]) for n in ("vision_config", "llm_config"))):
        for key, value in of.items():
            if not isinstance(value, dict) and not key.endswith(sizes):
                assert section[key] == value, key
