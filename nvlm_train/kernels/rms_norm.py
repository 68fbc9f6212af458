"""RMSNorm, alone or behind a residual addition.

    rms_norm:      y = w * x / sqrt(mean(x^2) + eps)
    add_rms_norm:  s = residual + scale * x,   y = w * s / sqrt(mean(s^2) + eps)     scale: nothing, [D] or one number

x, residual, s, y: [..., D]; w: [D]; scale: [D] (LayerScale), [1] (a gate), or None. s is rounded to its type before it
is normed, and the normed value before it is multiplied by w: the order of transformers' Qwen2RMSNorm and of InternViT.

    backward, with n = s / rms, g = w * dy:   ds = (g - n * mean(g * n)) / rms + (gradient of s from elsewhere)
    dx = scale * ds,  dresidual = ds,  dscale = sum over rows of ds * x,  dw = sum over rows of dy * n

Triton: one program a row in forward; in backward a fixed number of programs, each with its rows' sums of dw and dscale,
which are then added up in order: the same bits on every run. Limits: D at most 16384, the last dimension contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvlm_train.kernels.launch import block_of, define, is_double, programs_of, warps_of

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D] in x's type; the mean square is in fp32, or in fp64 where x is."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def torch_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[..., D], [..., D], [D], [D] or [1] or None -> s, y: [..., D] each; see above."""
    stream = residual + (x if scale is None else scale * x)  # [..., D]
    return stream, torch_rms_norm(stream, weight, eps)


if triton is not None:

    @triton.jit
    def rms_norm_forward_kernel(
        x, residual, weight, scale, stream, y, rstd, width, eps,
        ADD: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
    ):  # fmt: skip
        """One program a row. SCALE: 0 none, 1 one number, 2 one for each column."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        s = tl.load(x + row * width + at, mask=inside, other=0.0).to(ACC)
        if SCALE == 1:
            s = s * tl.load(scale).to(ACC)
        if SCALE == 2:
            s = s * tl.load(scale + at, mask=inside, other=0.0).to(ACC)
        if ADD:
            s += tl.load(residual + row * width + at, mask=inside, other=0.0).to(ACC)
            rounded = s.to(stream.dtype.element_ty)
            tl.store(stream + row * width + at, rounded, mask=inside)
            s = rounded.to(ACC)
        r = 1.0 / tl.sqrt(tl.sum(s * s, axis=0) / width + eps)
        tl.store(rstd + row, r)
        w = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
        n = (s * r).to(y.dtype.element_ty).to(ACC)
        tl.store(y + row * width + at, (w * n).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def rms_norm_backward_kernel(
        dy, dstream, stream, rstd, weight, x, scale, ds, dx, dweight, dscale, rows, width,
        ADD: tl.constexpr, SCALE: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_SCALE: tl.constexpr,
        BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
    ):  # fmt: skip
        """Program p does rows p, p + programs, ...; its sums go to row p of dweight and dscale."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        program = tl.program_id(0)
        at = tl.arange(0, BLOCK)
        inside = at < width
        w = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
        sum_w = tl.zeros([BLOCK], ACC)
        sum_scale = tl.zeros([BLOCK], ACC)
        start = program.to(tl.int64) * width
        for row in range(program, rows, tl.num_programs(0)):
            r = tl.load(rstd + row)
            n = tl.load(stream + start + at, mask=inside, other=0.0).to(ACC) * r
            gradient = tl.load(dy + start + at, mask=inside, other=0.0).to(ACC)
            if NEED_WEIGHT:
                sum_w += gradient * n
            g = gradient * w
            d = (g - n * (tl.sum(g * n, axis=0) / width)) * r
            if ADD:
                d += tl.load(dstream + start + at, mask=inside, other=0.0).to(ACC)
            tl.store(ds + start + at, d.to(ds.dtype.element_ty), mask=inside)
            if NEED_SCALE:
                sum_scale += d * tl.load(x + start + at, mask=inside, other=0.0).to(ACC)
            if SCALE == 1:
                tl.store(dx + start + at, (d * tl.load(scale).to(ACC)).to(dx.dtype.element_ty), mask=inside)
            if SCALE == 2:
                factor = tl.load(scale + at, mask=inside, other=0.0).to(ACC)
                tl.store(dx + start + at, (d * factor).to(dx.dtype.element_ty), mask=inside)
            start += tl.num_programs(0) * width
        if NEED_WEIGHT:
            tl.store(dweight + program.to(tl.int64) * width + at, sum_w, mask=inside)
        if NEED_SCALE:
            tl.store(dscale + program.to(tl.int64) * width + at, sum_scale, mask=inside)


def _kind(scale: Tensor | None) -> int:
    return 0 if scale is None else 1 if scale.numel() == 1 else 2


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if is_double(x) else torch.float32


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = weight.shape[0]
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    rows = x.numel() // width
    block = block_of(width, "rms_norm")
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=_wide(x), device=x.device)
    stream = torch.empty_like(x if residual is None else residual) if residual is not None else x.new_empty(0)
    if rows:
        rms_norm_forward_kernel[(rows,)](
            x, residual, weight, scale, stream, y, rstd, width, eps,
            ADD=residual is not None, SCALE=_kind(scale), BLOCK=block, DOUBLE=is_double(x), num_warps=warps_of(block),
        )  # fmt: skip
    return stream, y, rstd


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stream = x.new_empty(0) if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    return stream, y, x.new_empty(x.numel() // weight.shape[0], dtype=_wide(x))


def _backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, rstd: Tensor, weight: Tensor, x: Tensor | None,
    scale: Tensor | None, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x: only where the scale's gradient is needed. Returns ds, dx (empty without scale: it is ds), dw, dscale."""
    width = weight.shape[0]
    dy = dy.contiguous()
    dstream = None if dstream is None else dstream.contiguous()
    rows, programs = rstd.shape[0], programs_of(rstd.shape[0], dy.device)
    block = block_of(width, "rms_norm")
    ds = torch.empty_like(stream)
    dx = torch.empty_like(stream) if scale is not None else stream.new_empty(0)
    sums = (programs, width)
    dweight = torch.empty(sums, dtype=rstd.dtype, device=dy.device) if need_weight else rstd.new_empty(0)
    dscale = torch.empty(sums, dtype=rstd.dtype, device=dy.device) if x is not None else rstd.new_empty(0)
    rms_norm_backward_kernel[(programs,)](
        dy, dstream, stream, rstd, weight, x, scale, ds, dx, dweight, dscale, rows, width,
        ADD=dstream is not None, SCALE=_kind(scale), NEED_WEIGHT=need_weight, NEED_SCALE=x is not None, BLOCK=block,
        DOUBLE=is_double(dy), num_warps=min(32, 2 * warps_of(block)),
    )  # fmt: skip
    of_weight = dweight.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)
    if x is None or scale is None:
        return ds, dx, of_weight, stream.new_empty(0)
    of_scale = dscale.sum(0) if scale.numel() > 1 else dscale.sum().view(1)
    return ds, dx, of_weight, of_scale.to(scale.dtype)


def _backward_fake(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, rstd: Tensor, weight: Tensor, x: Tensor | None,
    scale: Tensor | None, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(stream),
        stream.new_empty(0) if scale is None else torch.empty_like(stream),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        stream.new_empty(0) if x is None or scale is None else torch.empty_like(scale),
    )


_forward_op = define(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? scale, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "rms_norm_backward(Tensor dy, Tensor? dstream, Tensor stream, Tensor rstd, Tensor weight, Tensor? x, Tensor? scale,"
    " bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        _, y, rstd = _forward_op(x, None, weight, None, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        need_weight = ctx.needs_input_grad[1]
        dx, _, dweight, _ = _backward_op(grads[0], None, x, rstd, weight, None, None, need_weight)
        return dx, dweight if need_weight else None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        stream, y, rstd = _forward_op(x, residual, weight, scale, eps)
        need_scale = ctx.needs_input_grad[3]
        ctx.save_for_backward(stream, rstd, weight, scale, x.contiguous() if need_scale else None)
        return stream, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stream, rstd, weight, scale, x = ctx.saved_tensors
        need_weight = ctx.needs_input_grad[2]
        ds, dx, dweight, dscale = _backward_op(grads[1], grads[0], stream, rstd, weight, x, scale, need_weight)
        return ds if scale is None else dx, ds, dweight if need_weight else None, None if x is None else dscale, None


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D]; see above."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)
    return y


def triton_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[..., D], [..., D], [D], [D] or [1] or None -> s, y: [..., D] each; see above."""
    stream, y = _AddRmsNorm.apply(x, residual, weight, scale, eps)
    return stream, y
