"""Inputs of a real, tiny training: data with pictures, tokenizer, backbones in published formats, and its recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from helpers import TESTS, load_script
from nvlm_train.recipe.schema import LanguageModel, Vision

sys.path.insert(0, str(TESTS / "data"))
import corpus

VISION = dict(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=corpus.TILE,
    patch_size=2,
)
LANGUAGE_MODEL = dict(
    hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=344, max_position_embeddings=512,
)  # fmt: skip


def write_inputs(folder: Path) -> Path:
    """Data, tokenizer, backbones and recipe.yaml in `folder`; returns the recipe's path."""
    make = load_script("make_tiny_checkpoints.py")
    corpus.write_tokenizer(folder / "tokenizer")
    corpus.write_image_rows(folder / "data" / "images.jsonl", 30)
    corpus.write_text_rows(folder / "data" / "text.jsonl", 60)
    corpus.write_image_rows(folder / "data" / "held.jsonl", 7, seed=5)
    make.write_internvit_folder(folder / "vision", Vision(**VISION))
    make.write_qwen2_folder(folder / "language_model", LanguageModel(**LANGUAGE_MODEL))
    recipe = {
        "run_name": "tiny",
        "output_dir": str(folder / "run"),
        "model": {"vision": VISION, "language_model": LANGUAGE_MODEL},
        "init_from": {
            part: {"path": str(folder / part), "license": "Apache-2.0"} for part in ("vision", "language_model")
        },
        "tokenizer": {"path": str(folder / "tokenizer"), "system": "Answer the questions."},
        "data": {
            "mixture": {
                "images": {"path": str(folder / "data" / "images.jsonl"), "weight": 0.6, "license": "own"},
                "text": {"path": str(folder / "data" / "text.jsonl"), "weight": 0.4, "license": "own"},
            },
            "max_tokens_per_sample": 220,
            "pack_tokens": 256,
        },
        "global_batch": {"samples": 9},
        "max_steps": 8,
        "optimizer": {"lr": 3.0e-3, "module_lr": {"projector": 6.0e-3}},
        "schedule": {"warmup_steps": 2, "min_lr": 3.0e-4},
        "precision": "fp32",
        "zero": {"param_persistence_threshold": 0},
        "validation": {"every_steps": 4, "sources": {"held": {"path": str(folder / "data" / "held.jsonl")}}},
        "checkpoint": {"every_steps": 3},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run) if "loss" in record]


def trajectory(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step, to compare bit for bit."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in steps(run)]


def validations(run: Path) -> dict[int, dict[str, float]]:
    return {record["step"]: record["validation"] for record in metrics(run) if "validation" in record}
