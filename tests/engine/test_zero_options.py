"""ZeRO's options change where and how fast, never what: each against a plain run; and what must be told is told."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import run_distributed
from nvlm_train.engine.node import nodes

JOBS = "engine/option_jobs.py:"
CASES: dict[str, dict[str, Any]] = {
    "stage 3, optimizer and weights offloaded": {"offload_optimizer": "cpu", "offload_param": "cpu"},
    "stage 2, optimizer offloaded": {"stage": 2, "offload_optimizer": "cpu"},
    "stage 1, optimizer offloaded": {"stage": 1, "offload_optimizer": "cpu"},
    "tower partitioned, small buckets, no prefetch": {
        "tower": "partitioned", "reduce_bucket_size": 700, "prefetch_bucket_size": 0,
    },
    "small parameters stay gathered": {
        "param_persistence_threshold": 500, "max_live_parameters": 10**9, "max_reuse_distance": 10**9,
    },
    "hpZ": {"experimental": {"hpz_partition_size": 2}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_option_goes_on_as_if_it_were_not_there(name: str) -> None:
    """From a checkpoint's slices without the option, and back: losses, masters and moments, and a resume with it."""
    found = run_distributed(2, JOBS + "option", keys=CASES[name])[0]
    # Worst cases measured over all options: losses 3.3e-7, state 2.2e-5 (the fused AdamW of offloading)
    assert found["losses"] == pytest.approx(found["expected_losses"], abs=3e-6)
    assert max(found["state"].values()) < 5e-5, found["state"]
    assert found["resumed"] == found["further"]  # bit for bit


def test_hpz_is_compared_with_hpz_off() -> None:
    """DeepSpeed cuts the second copies while the model is made, before weights are loaded, and would use them."""
    for message in run_distributed(2, JOBS + "hpz_with_stale_copies"):
        assert "zero.experimental.hpz_partition_size" in message and "stale weights" in message, message


@pytest.mark.slow
def test_hpz_in_two_groups_of_two() -> None:
    found = run_distributed(4, JOBS + "hpz_in_groups")[0]
    assert found["2"] == pytest.approx(found["1"], abs=1e-6)  # measured: equal


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("skips_the_projector", "rank 0: projector.norm forward; rank 1: language_model.model.embed_tokens forward"),
        ("cuts_the_gradient", "rank 0: projector.fc2 backward; rank 1: end of backward"),
    ],
)
def test_ranks_that_call_different_modules_are_told_instead_of_hanging(how: str, told: str) -> None:
    for result in run_distributed(2, JOBS + "ranks_that_differ", how=how):
        assert f"debug.collectives: the ranks' module calls differ at call {result['number']}: {told}" in result["told"]
        assert result["seconds"] < 30  # measured 0.05 and 2.7 on a loaded machine


def test_a_rank_that_comes_too_late_is_named() -> None:
    result = run_distributed(2, JOBS + "ranks_that_differ", how="is_late")[0]
    assert "rank 0 is at projector.norm forward" in result["told"], result
    assert "not all ranks made a call within 1 s" in result["told"] and "Ranks 1 " in result["told"], result


def test_nodes() -> None:
    assert nodes([("a", 0), ("b", 0), ("a", 1), ("b", 1)]) == [[0, 2], [1, 3]]
    assert nodes([("a", 0), ("a", 1), ("a", 0), ("a", 1)]) == [[0, 1], [2, 3]]  # two launches on one host
    assert nodes([("a", 0)]) == [[0]]


@pytest.mark.parametrize("local_ranks", [[0, 1], [0, 0], [0, 1, 0]])
def test_whole_weights_are_read_once_per_node(local_ranks: list[int]) -> None:
    results = run_distributed(len(local_ranks), JOBS + "read_once_per_node", local_ranks=local_ranks)
    whole, own = 35 * 4 + 15 * 2, 6 * 4
    for rank, result in enumerate(results):
        leads = local_ranks[rank] == 0
        assert result["right"] and result["own"] == 6
        assert result["bytes"] == own + (2 * whole + 35 * 4 if leads else 0)
        assert ("OSError" if leads else "could not read it") in result["error"], result
