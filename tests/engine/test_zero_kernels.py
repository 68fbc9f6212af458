"""The kernels under ZeRO-3 on two ranks, run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from helpers import run_distributed

pytest.importorskip("triton", reason="triton is not installed (scripts/install does)")

STEPS = [
    {"slots": [[[(6, 1)], [(5, 0)]]], "seed": 1},  # an image on one rank alone
    {"slots": [[[(4, 0)], [(5, 0)]], [[(3, 0)], None]], "seed": 2},  # none; accumulated, with a null pack
]


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_training_with_kernels_is_training_without(tied: bool) -> None:
    """Losses, gradients and weights after the steps, the head's among them: it owns the weight that its loss reads."""
    found = [
        run_distributed(
            2, "engine/zero_jobs.py:train_steps", steps=STEPS, stage=3, kernels=name, tied=tied, gradients_of=(0, 1)
        )[0]
        for name in ("triton", "torch")
    ]
    ours, theirs = found
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-6, atol=0)
    for number in (0, 1):
        assert ours["gradients"][number].keys() == theirs["gradients"][number].keys()
        for name, gradient in theirs["gradients"][number].items():
            worst = (ours["gradients"][number][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
            assert worst <= 1e-4, (number, name, float(worst))  # worst seen 3.2e-5
    assert theirs["gradients"][0]["language_model.model.embed_tokens.weight"].any()


def test_what_the_kernels_save_is_released() -> None:
    for found in run_distributed(2, "engine/zero_kernel_jobs.py:kept_by_kernels"):
        assert {"_LinearCrossEntropyBackward", "_NormRopeBackward", "_SpliceBackward"} <= found.keys(), found
        for name in ("_RmsNormBackward", "_AddRmsNormBackward"):
            assert found[name] and all(kept == (True, 0) for kept in found[name]), found
