"""Triton kernels in the interpreter, against the PyTorch references in fp64: outputs and every gradient.

Tolerances are relative to the largest value of a tensor. bf16 has 8 bits: half a unit in the last
place is up to 4e-3, and twice that in the interpreter, which cuts off where a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed (scripts/install does)")

from interpreter import run_interpreted

from nvlm_train.kernels import linear_cross_entropy


def within(report: dict[str, float], bound: float) -> None:
    assert report and all(error <= bound for error in report.values()), report


CROSS_ENTROPY = {
    "odd": (7, 24, 67, "fp32", 100),
    "pieces": (7, 24, 67, "fp32", 3),
    "one row": (1, 16, 5, "fp32", 1),
    "two blocks": (3, 16, 8192 + 37, "fp32", 2),
    "bf16": (33, 64, 515, "bf16", 16),
}


@pytest.mark.parametrize("case", CROSS_ENTROPY.values(), ids=CROSS_ENTROPY.keys())
def test_linear_cross_entropy(case: tuple[Any, ...]) -> None:
    report = run_interpreted("linear_cross_entropy_errors", *case)
    within(report, 6e-3 if "bf16" in case else 1e-5)  # worst seen 4.1e-3, 2.7e-6


def test_linear_cross_entropy_in_corner_cases() -> None:
    run_interpreted("linear_cross_entropy_details")


@pytest.mark.slow
def test_liger_where_it_is_asked_for() -> None:
    """Slow because importing Liger takes seconds."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (scripts/install does)")
    within(run_interpreted("liger_errors"), 1e-6)  # worst seen LG


NORMS = {
    # rows, width, residual, scale, type
    "plain": ((2, 3), 24, False, None, "fp32"),
    "plain, wide": ((5,), 1100, False, None, "fp32"),
    "plain, bf16": ((9,), 96, False, None, "bf16"),
    "added": ((2, 3), 21, True, None, "fp32"),
    "LayerScale": ((9,), 37, True, "vector", "fp32"),
    "LayerScale, bf16": ((9,), 96, True, "vector", "bf16"),
    "gate": ((9,), 37, True, "number", "fp32"),
    "one row": ((1,), 1, True, "number", "fp32"),
    "no row": ((0,), 8, True, "vector", "fp32"),
}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_rms_norm(case: tuple[Any, ...]) -> None:
    report = run_interpreted("rms_norm_errors", *case)
    within(report, 1.6e-2 if "bf16" in case else 2e-6)  # worst seen 9.4e-3, 8.4e-7


def test_rms_norm_in_corner_cases() -> None:
    run_interpreted("rms_norm_details")


NORM_ROPES = {
    # heads, head size, norm, rope, type
    "norm": (3, 6, True, False, "fp32"),
    "norm, bf16": (5, 8, True, False, "bf16"),
    "rope": (7, 10, False, True, "fp32"),
    "rope, bf16": (4, 16, False, True, "bf16"),
    "both": (3, 6, True, True, "fp32"),
}


@pytest.mark.parametrize("case", NORM_ROPES.values(), ids=NORM_ROPES.keys())
def test_norm_rope(case: tuple[Any, ...]) -> None:
    report = run_interpreted("norm_rope_errors", *case)
    within(report, 1.6e-2 if "bf16" in case else 2e-6)  # worst seen 7.5e-3, 1.7e-7


def test_norm_rope_in_corner_cases() -> None:
    run_interpreted("norm_rope_details")


def test_splice() -> None:
    run_interpreted("splice_cases")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shuffle_layer_norm(dtype: str) -> None:
    report = run_interpreted("shuffle_layer_norm_errors", 2, 6, 21, dtype)
    within(report, 1.6e-2 if dtype == "bf16" else 2e-6)  # worst seen 6.9e-3, 1.1e-7


def test_shuffle_layer_norm_in_corner_cases() -> None:
    run_interpreted("shuffle_layer_norm_details")


@pytest.mark.parametrize(
    ("architecture", "recompute", "tower"),
    [
        ("nvlm_d", "selective", "trained"),
        ("nvlm_x", "none", "frozen"),
        pytest.param("nvlm_h", "full", "trained", marks=pytest.mark.slow),
        pytest.param("nvlm_d", "none", "no image", marks=pytest.mark.slow),
    ],
)
def test_the_model_with_kernels_is_the_model_without(architecture: str, recompute: str, tower: str) -> None:
    """Every gradient of tower, projector, cross-attention and decoder; batches without an image too."""
    report = run_interpreted("whole_model", architecture, recompute, tower)
    assert report.pop("loss") <= 1e-6  # worst seen 1.3e-7
    within(report, 1e-4)  # worst seen 4.8e-6


def test_compile_makes_one_graph_of_each_op() -> None:
    run_interpreted("compiled")


def test_the_operators_are_what_they_say() -> None:
    run_interpreted("operators")


def test_the_references_are_the_formulas() -> None:
    """Against closed forms, in fp64."""
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 6, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 9))
    targets = torch.tensor([0, 8, 2, 2, 5])
    z = (h @ w.t()).detach()
    loss = linear_cross_entropy.torch_linear_cross_entropy(h, w, targets)
    torch.testing.assert_close(loss.double(), (z.exp().sum(1).log() - z[range(5), targets]).sum(), rtol=1e-6, atol=0)
    dz = z.softmax(1) - F.one_hot(targets, 9)
    for own, other in zip(torch.autograd.grad(loss, (h, w)), (dz @ w, dz.t() @ h), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)  # the reference's softmax is in fp32
