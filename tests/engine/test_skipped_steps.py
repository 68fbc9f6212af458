"""A step whose loss or gradient is not finite leaves no trace, at every stage of ZeRO."""

from __future__ import annotations

from typing import Any

from helpers import run_distributed

CASES: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 2},
    {"stage": 3, "param_persistence_threshold": 1000},
    {"stage": 1, "precision": "bf16"},
    {"stage": 3, "precision": "bf16"},
    {"stage": 3, "train": {"vision": "full", "projector": "full", "language_model": "frozen"}},
]


def test_a_broken_step_is_left_out_on_every_rank_and_leaves_no_trace() -> None:
    """Broken on one rank, in the first of two micro-steps: weights, moments and AdamW's count equal, bit for bit."""
    ranks = run_distributed(2, "engine/skip_jobs.py:broken_steps_leave_no_trace", cases=CASES)
    for found in ranks:
        assert len(found) == len(CASES)
        for case, result in found.items():
            assert result["skipped"] == [True, False, True, True, False, False], case
            assert result["same"] and result["norms"], case
            assert result["adam_steps"] == {3.0}, case
