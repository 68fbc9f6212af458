"""RMSNorm over all heads of a query or key, rotary positions, or both.

    n = w * x / sqrt(mean(x^2) + eps)          one mean over all heads of a token (InternViT); left out without w
    y_c       = n_c cos - n_(c+H/2) sin        for c < H/2, in each head (the layout of transformers)
    y_(c+H/2) = n_(c+H/2) cos + n_c sin        left out without cos and sin

x: [rows, heads * H], rows at any distance (a part of a packed qkv); w: [heads * H]; cos, sin: [rows, H], both halves
alike; y: [rows, heads * H], contiguous. In bf16 the normed value is rounded before it is multiplied by w (rms_norm.py).
Backward turns the gradient by the opposite angle and goes through the norm (see rms_norm.py); w's gradient is summed in
a fixed order.

Triton: one program a row in forward. Limits: a row at most 16384 wide, H even.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvlm_train.errors import SetupError
from nvlm_train.kernels.launch import block_of, define, is_double, programs_of, warps_of
from nvlm_train.kernels.rms_norm import torch_rms_norm

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def torch_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, head_size: int, eps: float
) -> Tensor:
    """[rows, heads * H], [heads * H] or None, [rows, H] or None twice -> [rows, heads * H]; see above."""
    if weight is not None:
        x = torch_rms_norm(x, weight, eps)
    if cos is None or sin is None:
        return x
    heads = x.unflatten(-1, (-1, head_size))  # [rows, heads, H]
    first, second = heads.chunk(2, dim=-1)  # [rows, heads, H/2] each
    turned = heads * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return turned.flatten(1)  # [rows, heads * H]


if triton is not None:

    @triton.jit
    def norm_rope_forward_kernel(
        x, weight, cos, sin, y, rstd, stride, heads, half, eps, sign,
        NORM: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, DOUBLE: tl.constexpr,
    ):  # fmt: skip
        """One program a row. sign: 1, or -1 for the opposite angle."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        row = tl.program_id(0).to(tl.int64)
        head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        first = head * (2 * half) + channel
        second = first + half
        inside = (head < heads) & (channel < half)
        a = tl.load(x + row * stride + first, mask=inside, other=0.0).to(ACC)
        b = tl.load(x + row * stride + second, mask=inside, other=0.0).to(ACC)
        if NORM:
            squares = tl.sum(tl.sum(a * a + b * b, axis=1), axis=0)
            r = 1.0 / tl.sqrt(squares / (2 * heads * half) + eps)
            tl.store(rstd + row, r)
            kind = y.dtype.element_ty
            a = (a * r).to(kind).to(ACC) * tl.load(weight + first, mask=inside, other=0.0).to(ACC)
            b = (b * r).to(kind).to(ACC) * tl.load(weight + second, mask=inside, other=0.0).to(ACC)
            if ROPE:
                a, b = a.to(kind).to(ACC), b.to(kind).to(ACC)
        if ROPE:
            angle = row * (2 * half) + channel
            c = tl.load(cos + angle, mask=channel < half, other=0.0).to(ACC)
            s = tl.load(sin + angle, mask=channel < half, other=0.0).to(ACC) * sign
            a, b = a * c - b * s, b * c + a * s
        out = row * (2 * heads * half)
        tl.store(y + out + first, a.to(y.dtype.element_ty), mask=inside)
        tl.store(y + out + second, b.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def norm_rope_backward_kernel(
        dy, x, weight, cos, sin, rstd, dx, dweight, stride, rows, heads, half,
        ROPE: tl.constexpr, NEED_WEIGHT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, DOUBLE: tl.constexpr,
    ):  # fmt: skip
        """With a norm: program p does rows p, p + programs, ...; its sum goes to row p of dweight."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        program = tl.program_id(0)
        head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        first = head * (2 * half) + channel
        second = first + half
        inside = (head < heads) & (channel < half)
        width = 2 * heads * half
        w1 = tl.load(weight + first, mask=inside, other=0.0).to(ACC)
        w2 = tl.load(weight + second, mask=inside, other=0.0).to(ACC)
        sum1 = tl.zeros([HEADS, HALF], ACC)
        sum2 = tl.zeros([HEADS, HALF], ACC)
        start = program.to(tl.int64)
        for row in range(program, rows, tl.num_programs(0)):
            r = tl.load(rstd + row)
            d1 = tl.load(dy + start * width + first, mask=inside, other=0.0).to(ACC)
            d2 = tl.load(dy + start * width + second, mask=inside, other=0.0).to(ACC)
            if ROPE:
                angle = start * (2 * half) + channel
                c = tl.load(cos + angle, mask=channel < half, other=0.0).to(ACC)
                s = tl.load(sin + angle, mask=channel < half, other=0.0).to(ACC)
                d1, d2 = d1 * c + d2 * s, d2 * c - d1 * s
            n1 = tl.load(x + start * stride + first, mask=inside, other=0.0).to(ACC) * r
            n2 = tl.load(x + start * stride + second, mask=inside, other=0.0).to(ACC) * r
            if NEED_WEIGHT:
                sum1 += d1 * n1
                sum2 += d2 * n2
            d1 = d1 * w1
            d2 = d2 * w2
            mean = tl.sum(tl.sum(d1 * n1 + d2 * n2, axis=1), axis=0) / width
            tl.store(dx + start * width + first, ((d1 - n1 * mean) * r).to(dx.dtype.element_ty), mask=inside)
            tl.store(dx + start * width + second, ((d2 - n2 * mean) * r).to(dx.dtype.element_ty), mask=inside)
            start += tl.num_programs(0)
        if NEED_WEIGHT:
            tl.store(dweight + program.to(tl.int64) * width + first, sum1, mask=inside)
            tl.store(dweight + program.to(tl.int64) * width + second, sum2, mask=inside)


def _blocks(width: int, head_size: int) -> dict[str, int]:
    """Powers of two that hold the heads and half a head. Raises SetupError for sizes that a program cannot hold."""
    if head_size % 2:
        raise SetupError(f"kernels: norm_rope in triton takes even head sizes, this one is {head_size}; use torch")
    heads, half = block_of(width // head_size, "norm_rope"), block_of(head_size // 2, "norm_rope")
    block_of(2 * heads * half, "norm_rope")
    return {"HEADS": heads, "HALF": half}


def _forward(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, head_size: int, eps: float, sign: float
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    wide = torch.float64 if is_double(x) else torch.float32
    rstd = torch.empty(0 if weight is None else rows, dtype=wide, device=x.device)
    blocks = _blocks(width, head_size)
    if rows:
        norm_rope_forward_kernel[(rows,)](
            x, weight, cos, sin, y, rstd, x.stride(0), width // head_size, head_size // 2, eps, sign,
            NORM=weight is not None, ROPE=cos is not None, DOUBLE=is_double(x),
            num_warps=warps_of(2 * blocks["HEADS"] * blocks["HALF"]), **blocks,
        )  # fmt: skip
    return y, rstd


def _forward_fake(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, head_size: int, eps: float, sign: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if is_double(x) else torch.float32
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else x.shape[0], dtype=wide)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, head_size: int,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, width = dy.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    dy = dy.contiguous()
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    programs, blocks = programs_of(rows, dy.device), _blocks(width, head_size)
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    dweight = rstd.new_empty((programs, width) if need_weight else 0)
    norm_rope_backward_kernel[(programs,)](
        dy, x, weight, cos, sin, rstd, dx, dweight, x.stride(0), rows, width // head_size, head_size // 2,
        ROPE=cos is not None, NEED_WEIGHT=need_weight, DOUBLE=is_double(x),
        num_warps=warps_of(2 * blocks["HEADS"] * blocks["HALF"]), **blocks,
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, head_size: int,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), torch.empty_like(weight) if need_weight else weight.new_empty(0)


_forward_op = define(
    "norm_rope(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, int head_size, float eps, float sign)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "norm_rope_backward(Tensor dy, Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor rstd, int head_size,"
    " bool need_weight) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        head_size: int,
        eps: float,
    ) -> Tensor:
        y, rstd = _forward_op(x, weight, cos, sin, head_size, eps, 1.0)
        ctx.save_for_backward(None if weight is None else x, weight, cos, sin, rstd)
        ctx.head_size = head_size
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        if weight is None:
            dx, _ = _forward_op(grads[0], None, cos, sin, ctx.head_size, 0.0, -1.0)
            return dx, None, None, None, None, None
        need_weight = ctx.needs_input_grad[1]
        dx, dweight = _backward_op(grads[0], x, weight, cos, sin, rstd, ctx.head_size, need_weight)
        return dx, dweight if need_weight else None, None, None, None, None


def triton_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, head_size: int, eps: float
) -> Tensor:
    """[rows, heads * H], [heads * H] or None, [rows, H] or None twice -> [rows, heads * H]; see above."""
    y: Tensor = _NormRope.apply(x, weight, cos, sin, head_size, eps)
    return y
