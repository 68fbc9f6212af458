"""Cross-entropy of a linear layer's outputs, without ever holding them all.

    z_r = W h_r,   loss = sum_r logsumexp(z_r) - z_r[t_r]                       r over the labelled rows
    dz_r = softmax(z_r) - onehot(t_r),   dh_r = W^T dz_r,   dW = sum_r dz_r h_r^T

hidden: [R, D] the labelled rows alone; weight: [V, D]; targets: i64[R] -> fp32 scalar. R may be 0: loss 0, zero
gradients. Softmax, loss and dW are in fp32, the logits in hidden's type.

Triton: forward goes over pieces of rows. The three products are torch's; between them one kernel turns a piece's
logits in place into their gradient and gives its losses. Both gradients are ready after the forward pass, so that
backward only scales them: nothing needs the weight again, and dW is summed over the pieces in fp32 and rounded once.

Liger: its fused linear cross-entropy, asked for by name. It waits for the device once in backward, and a batch without
labelled rows is plain PyTorch's.

Limits: the gradients live from forward to backward: V x D in fp32 (2 GiB at 152064 x 3584), and a piece's logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.kernels.launch import define, is_double

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Logits held at once, in elements: 512 MiB in fp32. More labelled rows are done in pieces, recomputed in backward.
MAX_LOGITS = 2**27
MAX_TRITON_LOGITS = 2**29  # 1 GiB in bf16: 3530 rows at 152064, enough for products at full speed


def _torch_piece(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()  # [R, V]
    return F.cross_entropy(logits, targets, reduction="sum")


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[R, D], [V, D], i64[R] -> fp32 scalar; see above. Pieces beyond MAX_LOGITS are computed again in backward."""
    rows_at_once = max(1, MAX_LOGITS // weight.shape[0])
    if len(hidden) <= rows_at_once:
        return _torch_piece(hidden, weight, targets)
    losses = []
    for rows, own in zip(hidden.split(rows_at_once), targets.split(rows_at_once), strict=True):
        if torch.is_grad_enabled():
            piece = checkpoint(_torch_piece, rows, weight, own, use_reentrant=False, preserve_rng_state=False)
            losses.append(piece)
        else:
            losses.append(_torch_piece(rows, weight, own))
    return torch.stack(losses).sum()


if triton is not None:

    @triton.jit
    def cross_entropy_kernel(
        logits, targets, losses, width, stride, BLOCK: tl.constexpr, GRAD: tl.constexpr, DOUBLE: tl.constexpr
    ):
        """One program a row: its loss, and with GRAD its logits turned into their gradient, in place."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        target = tl.load(targets + row)
        columns = tl.arange(0, BLOCK)
        # Per lane first: one reduction at the end, instead of one (and a barrier) for each block.
        high = tl.full([BLOCK], float("-inf"), ACC)
        total = tl.zeros([BLOCK], ACC)
        own = tl.zeros([BLOCK], ACC)
        for start in range(0, width, BLOCK):
            at = start + columns
            z = tl.load(logits + at, mask=at < width, other=float("-inf")).to(ACC)
            higher = tl.maximum(high, z)
            # A lane that has seen no column yet is at -inf, and -inf - -inf is not a number.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(high - shift) + tl.exp(z - shift)
            high = higher
            own += tl.where(at == target, z, 0.0)
        top = tl.max(high, axis=0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(high - top), axis=0))
        tl.store(losses + row, log_sum - tl.sum(own, axis=0))
        if GRAD:
            for start in range(0, width, BLOCK):
                at = start + columns
                z = tl.load(logits + at, mask=at < width, other=float("-inf")).to(ACC)
                gradient = tl.exp(z - log_sum) - tl.where(at == target, 1.0, 0.0)
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < width)


def _add_product(total: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """total += dz^T hidden, with the sum in total's type: f[V, D] += [r, V]^T [r, D]."""
    if dz.dtype == total.dtype:
        total.addmm_(dz.t(), hidden)
    elif dz.is_cuda:
        total.add_(torch.mm(dz.t(), hidden, out_dtype=total.dtype))
    else:
        total.addmm_(dz.t().to(total.dtype), hidden.to(total.dtype))


def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if is_double(hidden) else torch.float32
    losses = torch.empty(rows, dtype=wide, device=hidden.device)  # [R]
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)  # [R, D]
    d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else weight.new_empty(0, dtype=wide)  # [V, D]
    at_once = max(1, MAX_TRITON_LOGITS // width)
    block = min(4096, 1 << (width - 1).bit_length())
    warps = 16 if block == 4096 else 4
    for start in range(0, rows, at_once):
        piece = hidden[start : start + at_once]  # [r, D]
        logits = torch.mm(piece, weight.t())  # [r, V]
        cross_entropy_kernel[(len(piece),)](
            logits, targets[start:], losses[start:], width, logits.stride(0),
            BLOCK=block, GRAD=need_hidden or need_weight, DOUBLE=is_double(hidden), num_warps=warps,
        )  # fmt: skip
        if need_hidden:
            torch.mm(logits, weight, out=d_hidden[start : start + at_once])
        if need_weight:
            _add_product(d_weight, logits, piece)
    return losses.sum(), d_hidden, d_weight


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if is_double(hidden) else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if need_weight else weight.new_empty(0, dtype=wide),
    )


_op = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, bool need_hidden, bool need_weight)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss, d_hidden, d_weight = _op(hidden, weight, targets, need_hidden, need_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_type = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        scale = grads[0]
        return (
            (d_hidden * scale).to(d_hidden.dtype) if need_hidden else None,  # [R, D]
            (d_weight * scale).to(ctx.weight_type) if need_weight else None,  # [V, D]
            None,
        )


def triton_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[R, D], [V, D], i64[R] -> fp32 scalar; see above."""
    if not torch.is_grad_enabled():
        loss: Tensor = _op(hidden, weight, targets, False, False)[0]
        return loss
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def liger_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[R, D], [V, D], i64[R] -> fp32 scalar; see above."""
    if not len(hidden):
        return torch_linear_cross_entropy(hidden, weight, targets)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = (None, None, IGNORE_INDEX, 0.0, 0.0, "sum", None, False, torch.float32)
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0]
    return loss.float()
