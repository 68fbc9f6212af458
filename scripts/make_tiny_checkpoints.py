#!/usr/bin/env python3
"""Writes tiny random InternViT, Qwen2 and Llama folders in the published formats, to try the loaders offline.

    scripts/make_tiny_checkpoints.py OUT [--seed N]

makes OUT/internvit and OUT/internvit_layer_norm (one file each; the second of the 300M tower's kind), OUT/qwen2 (three
shards with an index), OUT/qwen2_tied (one file, no head), OUT/llama (two shards), and OUT/nvlm_d: a whole model as
NVLM-D-72B is published, with mixed types, dummy attention heads, and what is odd in its configuration. The writers are
importable: `scripts/make_demo_backbones` and the tests write trained or chosen weights with them.
Norms and LayerScale are random too, so that a loader that forgets one does not go unnoticed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works before the package is installed

from nvlm_train.model import key_map
from nvlm_train.model.decoder import LanguageModel
from nvlm_train.model.pretrained import INDEX_NAME, SINGLE_NAME, expected_shapes
from nvlm_train.model.vision import InternVit
from nvlm_train.recipe import schema

TINY_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
TINY_LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """fp32 tensors by name: norms around 1, LayerScale around 0.1, all else normal with 0.05; nothing constant."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in sorted(shapes):
        noise = torch.randn(shapes[name], generator=generator)
        owner, _, leaf = name.rpartition(".")
        if leaf in ("ls1", "ls2"):
            state[name] = 0.1 + 0.03 * noise
        elif leaf == "weight" and "norm" in owner.rpartition(".")[2]:
            state[name] = 1.0 + 0.2 * noise
        else:
            state[name] = 0.05 * noise
    return state


def write_internvit_folder(
    path: str | Path, vision: schema.Vision, state: Mapping[str, Tensor] | None = None, *, seed: int = 0
) -> Path:
    """An InternViT folder: config.json and model.safetensors.

    state: tensors by published name, or by ours (`vision_model.*`; other names are left out); None: random from seed.
    """
    with torch.device("meta"):
        tower = InternVit(vision)
    chosen = _published(state, "vision_model.", {n: tuple(p.shape) for n, p in tower.named_parameters()}, seed)
    config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": vision.patch_size,
        "qk_normalization": vision.qk_normalization,
        "qkv_bias": vision.qkv_bias,
        "torch_dtype": _dtype_name(chosen),
        "use_flash_attn": True,
    }
    if vision.norm_type != "rms_norm":  # the published 6B tower does not name its own
        config["norm_type"] = vision.norm_type
    return _write(Path(path), config, chosen, 1)


def write_qwen2_folder(
    path: str | Path,
    lm: schema.LanguageModel,
    state: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    num_shards: int = 1,
) -> Path:
    """A Qwen2 folder, or Llama's as model_type says: config.json and model.safetensors, or num_shards files with an
    index. A tied head is left out.

    state: tensors by published name, or by ours (`language_model.*`; other names are left out); None: random from seed.
    """
    with torch.device("meta"):
        model = LanguageModel(lm)
    chosen = _published(state, "language_model.", {n: tuple(p.shape) for n, p in model.named_parameters()}, seed)
    qwen2 = lm.model_type == "qwen2"
    config = {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
        "model_type": lm.model_type,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": lm.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": lm.intermediate_size,
        "max_position_embeddings": lm.max_position_embeddings,
        "num_attention_heads": lm.num_attention_heads,
        "num_hidden_layers": lm.num_hidden_layers,
        "num_key_value_heads": lm.num_key_value_heads,
        "rms_norm_eps": lm.rms_norm_eps,
        "rope_theta": lm.rope_theta,
        "tie_word_embeddings": lm.tie_word_embeddings,
        "torch_dtype": _dtype_name(chosen),
        "use_cache": True,
        "vocab_size": lm.vocab_size,
    }
    config |= {"use_sliding_window": False} if qwen2 else {"attention_bias": False, "pretraining_tp": 1}
    return _write(Path(path), config, chosen, num_shards)


def write_nvlm_d_folder(
    path: str | Path,
    model: schema.Model,
    state: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    num_shards: int = 3,
    num_dummy_heads: int = 7,
    nonzero_dummies: bool = False,
) -> Path:
    """A folder in the layout of the published NVLM-D-72B: mixed types, dummy heads, `model_type: llama`, rope_scaling.

    state: tensors by our name; None: random from seed. nonzero_dummies: random values in the dummy heads wherever they
    add nothing (everything but the columns of the projection), zeros else, as published.
    """
    shapes = expected_shapes(model)
    chosen = random_state(shapes, seed) if state is None else {name: state[name] for name in shapes}
    generator = torch.Generator().manual_seed(seed + 1)
    published = {}
    for name, tensor in chosen.items():
        padded = key_map.pad(name, tensor.detach().float(), model.vision, num_dummy_heads)
        if nonzero_dummies and key_map.padded_kind(name) in ("qkv", "norm"):
            real = key_map.pad(name, torch.ones_like(tensor, dtype=torch.float32), model.vision, num_dummy_heads)
            padded = torch.where(real == 1, padded, torch.randn(padded.shape, generator=generator))
        fp32 = ("q_proj.", "k_proj.", "v_proj.", "attn.qkv.weight", "attn.proj.weight", "q_norm.", "k_norm.")
        dtype = torch.float32 if any(part in name for part in fp32) else torch.bfloat16
        published[key_map.to_published(name)] = padded.to(dtype).contiguous()
    vision, lm = model.vision, model.language_model
    config = {
        "_commit_hash": None,
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": "rms_norm",
            "num_attention_heads": vision.num_attention_heads,  # the real ones
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "qk_normalization": True,
            "qkv_bias": False,
            "torch_dtype": "bfloat16",
        },
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "llama",  # sic
            "attention_bias": True,
            "hidden_act": "silu",
            "hidden_size": lm.hidden_size,
            "intermediate_size": lm.intermediate_size,
            "max_position_embeddings": lm.max_position_embeddings,
            "num_attention_heads": lm.num_attention_heads,
            "num_hidden_layers": lm.num_hidden_layers,
            "num_key_value_heads": lm.num_key_value_heads,
            "rms_norm_eps": lm.rms_norm_eps,
            "rope_scaling": {"factor": 3.0, "type": "dynamic"},  # ignored by the version it was made with
            "rope_theta": lm.rope_theta,
            "tie_word_embeddings": lm.tie_word_embeddings,
            "torch_dtype": "bfloat16",
            "vocab_size": lm.vocab_size,
        },
    }
    return _write(Path(path), config, published, num_shards)


def _published(
    state: Mapping[str, Tensor] | None, prefix: str, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, Tensor]:
    """Exactly the tensors of `shapes`, contiguous, from a state under either name."""
    if state is None:
        return random_state(shapes, seed)
    chosen = {name: state[prefix + name] if prefix + name in state else state[name] for name in shapes}
    for name, tensor in chosen.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the sizes say {list(shapes[name])}")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in chosen.items()}


def _dtype_name(state: Mapping[str, Tensor]) -> str:
    return str(next(iter(state.values())).dtype).removeprefix("torch.")


def _write(folder: Path, config: dict[str, Any], state: dict[str, Tensor], num_shards: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if num_shards == 1:
        save_file(state, folder / SINGLE_NAME, metadata={"format": "pt"})
        return folder
    names = sorted(state)
    weight_map = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: state[name] for name in names[number::num_shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    vision = schema.Vision.model_validate(TINY_VISION)
    untied = schema.LanguageModel.model_validate(TINY_LANGUAGE_MODEL)
    tied = schema.LanguageModel.model_validate({**TINY_LANGUAGE_MODEL, "tie_word_embeddings": True})
    whole = schema.Model(vision=vision, language_model=untied)
    llama = schema.LanguageModel.model_validate({**TINY_LANGUAGE_MODEL, "model_type": "llama", "rms_norm_eps": 1e-5})
    small = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}
    for folder in (
        write_internvit_folder(args.out / "internvit", vision, seed=args.seed),
        write_internvit_folder(
            args.out / "internvit_layer_norm", schema.Vision.model_validate({**TINY_VISION, **small}), seed=args.seed
        ),
        write_qwen2_folder(args.out / "qwen2", untied, seed=args.seed, num_shards=3),
        write_qwen2_folder(args.out / "qwen2_tied", tied, seed=args.seed),
        write_nvlm_d_folder(args.out / "nvlm_d", whole, seed=args.seed, nonzero_dummies=True),
        write_qwen2_folder(args.out / "llama", llama, seed=args.seed, num_shards=2),
    ):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
