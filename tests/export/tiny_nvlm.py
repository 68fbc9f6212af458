"""A tiny random NVLM-D for tests: sizes pairwise different, no norm or LayerScale constant, a real byte-level BPE."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from nvlm_train.model.pretrained import expected_shapes
from nvlm_train.recipe.schema import Model

VOCAB = 417
YI_CONTROL = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

RECIPE: dict[str, Any] = {
    "run_name": "tiny",
    "output_dir": "runs/tiny",
    "seed": 3,
    "license": None,
    "model": {
        "architecture": "nvlm_d",
        "vision": {
            "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 5,
            "image_size": 12, "patch_size": 3, "layer_norm_eps": 1e-6,
        },
        "language_model": {
            "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": False, "rope_theta": 5000.0,
            "max_position_embeddings": 512,
        },
    },
    "init_from": {"vision": None, "language_model": None, "run": None},
    "tokenizer": {"path": "", "template": "nvlm_qwen2", "system": "Answer the questions."},
    "data": {
        "mixture": {"digits": {"path": "digits.jsonl", "license": "BSD-3-Clause", "source": "scikit-learn"}},
        "tiling": {"max_tiles": 6, "thumbnail": True, "tags": "one_d"},
    },
    "train": {"vision": "frozen", "projector": "full", "language_model": "full"},
    "global_batch": {"samples": 8},
    "max_steps": 20,
    "precision": "fp32",
}  # fmt: skip


def make_recipe(tokenizer: Path, **changes: Any) -> dict[str, Any]:
    """RECIPE with a tokenizer folder and dotted changes, `make_recipe(path, **{"tokenizer.template": "hf_nvlm"})`."""
    recipe = copy.deepcopy(RECIPE)
    recipe["tokenizer"]["path"] = str(tokenizer)
    for dotted, value in changes.items():
        section = recipe
        *path, last = dotted.split(".")
        for key in path:
            section = section[key]
        section[last] = value
    return recipe


class MemoryWeights:
    """Weights in memory, by our names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def where(self, name: str) -> str:
        return f"memory:{name}"


def random_weights(recipe: dict[str, Any], seed: int = 0) -> MemoryWeights:
    """Random fp32 tensors for every name; norms around 1, LayerScales around 0.5, all varying."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(Model.model_validate(recipe["model"])).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        elif name.endswith((".ls1", ".ls2")):
            values = 0.5 + 0.2 * values
        elif len(shape) >= 2 and "embed" not in name:
            values = values * (2 / sum(shape[:2])) ** 0.5
        else:
            values = 0.3 * values
        tensors[name] = values
    return MemoryWeights(tensors)


def make_tokenizer(folder: Path, control: list[str] = CONTROL) -> Path:
    """A small byte-level BPE with Qwen2's pre-tokenizer and control tokens (or others), as tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # `><` occurs, so that it merges as in Qwen's vocabulary: tags tokenised apart or not then differ
    text = ["<Image><tile_1>", "</Image>\nWhat is the left digit?", "user\nassistant\n"]
    text += ["system\nAnswer the questions.", "<tile_global_thumbnail>", "sum max right rev"]
    tokenizer.train_from_iterator(text * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    assert tokenizer.get_vocab_size() <= VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    return folder
