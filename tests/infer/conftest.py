"""A model that answers every question with "left digit", by construction: each token is followed by one fixed other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export.tiny_nvlm import MemoryWeights, make_recipe, make_tokenizer, random_weights
from nvlm_train.data.tokenizer import load_tokenizer
from nvlm_train.export import hf
from nvlm_train.model.key_map import model_from_recipe

ANSWER = "left digit"


def parrot(recipe: dict[str, Any], tokenizer: Path) -> MemoryWeights:
    """Layers that add nothing, and a head whose row for each token of the chain points at the token before it."""
    weights = random_weights(recipe)
    for name, tensor in weights.tensors.items():
        if name.startswith("language_model.model.layers.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    words = load_tokenizer(tokenizer)
    chain = [words.encode("assistant\n")[-1], *words.encode(ANSWER), words.im_end]
    assert len(set(chain)) == len(chain)
    weights.tensors["language_model.model.norm.weight"].fill_(1)
    embedding = torch.nn.functional.normalize(weights.tensors["language_model.model.embed_tokens.weight"], dim=1)
    weights.tensors["language_model.model.embed_tokens.weight"] = embedding
    head = torch.zeros_like(weights.tensors["language_model.lm_head.weight"])
    for before, after in zip(chain, chain[1:], strict=False):
        head[after] = embedding[before]
    weights.tensors["language_model.lm_head.weight"] = head
    return weights


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nvlm: an export. qwen2: its decoder alone, as a plain Qwen2 folder without a chat template."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("infer")
    recipe = make_recipe(make_tokenizer(base / "tokenizer"))
    weights = parrot(recipe, base / "tokenizer")
    nvlm = hf.export(weights, recipe, base / "nvlm")
    qwen2 = base / "qwen2"
    make_tokenizer(qwen2)
    prefix = "language_model."
    state = {n.removeprefix(prefix): t.contiguous() for n, t in weights.tensors.items() if n.startswith(prefix)}
    save_file(state, qwen2 / "model.safetensors", metadata={"format": "pt"})
    ids = hf.special_token_ids(base / "tokenizer", 417)
    config = hf.model_config(model_from_recipe(recipe), recipe, ids, "fp32")["llm_config"]
    (qwen2 / "config.json").write_text(json.dumps(config))
    return {"nvlm": nvlm, "qwen2": qwen2}
