"""Published folders go into ZeRO-3's partitions without any rank holding more than its share and one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import load_script, run_distributed
from nvlm_train.model import decoder
from nvlm_train.recipe.schema import LanguageModel, Vision

VISION = dict(
    hidden_size=18, intermediate_size=30, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=2
)
SLACK = 6_000_000  # gloo's buffers, small objects; measured 1.2 MB


def _recipe(folder: Path, hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    lm = dict(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=vocab,
    )  # fmt: skip
    make = load_script("make_tiny_checkpoints.py")
    make.write_internvit_folder(folder / "vision", Vision(**VISION))
    sizes = LanguageModel(**lm)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in decoder.LanguageModel(sizes).named_parameters()}
    values = {name: value.bfloat16() for name, value in make.random_state(shapes, 1).items()}
    make.write_qwen2_folder(folder / "lm", sizes, values, num_shards=3)
    return {
        "run_name": "t", "output_dir": str(folder / "run"), "model": {"vision": VISION, "language_model": lm},
        "init_from": {"vision": str(folder / "vision"), "language_model": str(folder / "lm")},
        "tokenizer": {"path": "t"}, "max_steps": 1, "optimizer": {"lr": 1e-3}, "global_batch": {"samples": 8},
        "data": {"mixture": {"a": {"path": "a"}}, "max_tokens_per_sample": 64, "pack_tokens": 64},
    }  # fmt: skip


def _check(found: dict[str, Any]) -> None:
    assert found["right"] and found["dtypes"] == ["torch.bfloat16"]
    assert found["share"] == pytest.approx(found["whole"] / 2, rel=0.01)
    allowed = found["share"] + found["tower"] + found["largest"] + SLACK
    assert allowed < 0.9 * found["whole"], "the model is too small to tell"
    assert found["growth"] < allowed, f"{found['growth']:,} B for a share of {found['share']:,} B"


def test_a_rank_holds_its_share_and_one_tensor(tmp_path: Path) -> None:
    """44 M parameters in bf16 on 2 ranks. Measured: 57.4 MB for a share of 43.9 MB and a largest tensor of 12.3 MB."""
    results = run_distributed(2, "engine/loading_jobs.py:load", recipe=_recipe(tmp_path, 512, 8, 12000))
    for found in results:
        _check(found)
    # each its own slices; the frozen tower, whole on both, by local rank 0 alone
    assert results[0]["bytes_read"] == results[0]["stored"]["share"] + results[0]["stored"]["tower"]
    assert results[1]["bytes_read"] == results[1]["stored"]["share"]


@pytest.mark.slow
def test_a_rank_holds_its_share_and_one_tensor_of_a_larger_model(tmp_path: Path) -> None:
    """206 M parameters in bf16 on 2 ranks. Measured: 256 MB for a share of 206 MB and a largest tensor of 49 MB."""
    for found in run_distributed(2, "engine/loading_jobs.py:load", recipe=_recipe(tmp_path, 1024, 10, 24000)):
        _check(found)
