"""Known traps of DeepSpeed, each kept impossible here by a test that would catch it."""

from __future__ import annotations

import pytest

from helpers import run_distributed

JOBS = "engine/trap_jobs.py:"


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    found: dict[str, object] = run_distributed(2, JOBS + "facts")[0]
    return found


def test_nothing_is_compiled_on_a_cpu(facts: dict[str, object]) -> None:
    """init_distributed would build deepspeed_shm_comm: minutes, and an exception where there is no ninja."""
    assert facts["shm_comm"] is False
    assert facts["compiled"] == []


def test_clipping_is_what_the_recipe_says(facts: dict[str, object]) -> None:
    """DeepSpeed's default is 1.0: 0 must mean none."""
    assert facts["clipping"] == {"0.0": 0.0, "0.5": 0.5}


def test_rotary_positions_stay_fp32_in_bf16(facts: dict[str, object]) -> None:
    """zero.Init makes a model's buffers bf16; at position 500 such frequencies turn the head by degrees too far."""
    assert facts["floating_buffers"] == []
    # Worst case measured 0.0093 of the largest logit: bf16's rounding
    assert facts["rope_error"] < 0.04  # type: ignore[operator]


def test_a_step_with_a_non_finite_gradient_is_told(facts: dict[str, object]) -> None:
    """ZeRO-3 skips such a step silently and counts it all the same."""
    assert facts["norm_of_nan_step"] == "nan"


def test_no_gathered_weight_outlives_the_forward(facts: dict[str, object]) -> None:
    """One saved view, cast or transpose of a weight keeps it gathered until backward, in every layer."""
    assert facts["whole_weights_of_a_bad_layer"], "the search itself finds nothing"
    assert facts["whole_weights_alive"] == []


def test_module_learning_rates_reach_the_optimizer_that_steps(facts: dict[str, object]) -> None:
    """An optimizer in the DeepSpeed JSON would silently take one rate for all."""
    assert facts["lr_zero_moved"] == []
    assert facts["lr_other_moved"]


@pytest.mark.parametrize("language_model", ["full", "frozen"])
def test_recompute_gathers_a_weight_once_more(language_model: str) -> None:
    """Whether a layer's products are kept or not, running it again is what gathers; its last product is not run again,
    because nothing needs it. README and DESIGN say 2, 3, 3."""
    train = {"language_model": language_model, "projector": "full"}
    found = run_distributed(2, JOBS + "gathers", train=train)[0]
    again = 3 - found.pop("down_proj")
    assert found == pytest.approx({"none": 2, "selective": again, "full": again}, abs=0.01)
