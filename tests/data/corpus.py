"""What the data tests share: a small tokenizer trained on the spot, images, rows, and a recipe around them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nvlm_train.recipe import schema

TILE = 8  # pixels; 4 patches of 2, so 4 image tokens a tile
IMAGE_TOKENS = 4
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
# Qwen2's split, written out a second time on purpose
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "what which colour digit left right sum is the in picture red green blue seven nine answer yes no tile".split()


def write_tokenizer(folder: Path, control: list[str] | None = None) -> Path:
    """A byte-level BPE of 330 entries with Qwen2's split and control tokens; tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # "><" and ">\n" become tokens of their own, as in Qwen2's vocabulary: the merges that the templates differ in
    text = ["user\nassistant\nsystem\n", "<Image><tile_1></Image>\n" * 8, *(" ".join(WORDS) for _ in range(4))]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=CONTROL if control is None else control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_image(path: Path, width: int, height: int, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


def turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """One line a row; strings are written as they are, bytes too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_text_rows(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = [
        {"messages": turns(f"{k} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 12))), draw.choice(WORDS))}
        for k in range(count)
    ]
    return write_rows(path, rows)


def write_image_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Every third row has two images; sizes from one tile to seven."""
    draw = random.Random(seed)
    rows = []
    for k in range(count):
        images = []
        for i in range(2 if k % 3 == 0 else 1):
            name = f"{path.stem}_{k}_{i}.png"
            write_image(path.parent / name, draw.randint(4, 40), draw.randint(4, 40), seed=1000 * k + i)
            images.append(name)
        rows.append({"images": images, "messages": turns(f"{k} what is in the picture", draw.choice(WORDS))})
    return write_rows(path, rows)


def make_recipe(folder: Path, mixture: dict[str, Any], **changes: Any) -> schema.Recipe:
    """A recipe of a tiny model over `mixture`; `changes` by dotted key, with __ for the dot."""
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
    values: dict[str, Any] = {
        "run_name": "test",
        "output_dir": str(folder / "run"),
        "model": {
            "vision": dict(
                hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=TILE,
                patch_size=2,
            ),
            "language_model": dict(
                hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                vocab_size=336, max_position_embeddings=512,
            ),
        },
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"mixture": mixture, "max_tokens_per_sample": 200, "pack_tokens": 256},
        "global_batch": {"samples": 16},
        "max_steps": 8,
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    for dotted, value in changes.items():
        at = values
        *path, last = dotted.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return schema.Recipe.model_validate(values)
