"""Pixel shuffle and the LayerNorm behind it.

    x_(i,j) = [p(2i, 2j), p(2i, 2j+1), p(2i+1, 2j), p(2i+1, 2j+1)]         InternVL's ps_version "v2", see pixel_shuffle
    y = w * (x - mean(x)) / sqrt(var(x) + eps) + b

features: [T, P, E], patches row by row over a square grid; w, b: [4E] -> [T * P/4, 4E], row by row.
Example, a 2 x 2 grid of patches a b / c d: one row, the norm of [a b c d].

Triton: one program a row reads its four patches where they are; the shuffled copy is never written. Backward reads them
again for the gradients of w and b, which are summed in a fixed order. Limits: 4E at most 16384; where the features need
a gradient (a trained tower) the PyTorch version runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_train.kernels.launch import block_of, define, is_double, programs_of

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def pixel_shuffle(features: Tensor) -> Tensor:
    """Joins patches two by two into one token of four times the width (InternVL's ps_version "v2").

    features: [T, P, E], patches row by row over a square grid -> [T, Q, 4E], Q = P / 4, row by row.
    Token (i, j) is the concatenation of patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1).
    Example, a 2 x 2 grid of patches a b / c d: one token [a b c d].
    """
    tiles, patches, width = features.shape
    side = round(patches**0.5)
    blocks = features.reshape(tiles, side // 2, 2, side // 2, 2, width)  # [T, i, di, j, dj, E]
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(tiles, patches // 4, 4 * width)  # [T, Q, 4E]


def torch_shuffle_layer_norm(features: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """[T, P, E], [4E], [4E] -> [T*Q, 4E]; see above."""
    return F.layer_norm(pixel_shuffle(features).flatten(0, 1), weight.shape, weight, bias, eps)  # [T*Q, 4E]


if triton is not None:

    @triton.jit
    def shuffle_layer_norm_forward_kernel(
        features, weight, bias, y, mean, rstd, side, width, eps, BLOCK: tl.constexpr, DOUBLE: tl.constexpr
    ):
        """One program a row; side: of the shuffled grid. BLOCK holds one patch."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        row = tl.program_id(0).to(tl.int64)
        part, channel = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
        inside = (channel < width) & (part < 4)
        patch = (2 * (row // side) + part // 2) * (2 * side) + 2 * (row % side) + part % 2
        x = tl.load(features + patch * width + channel, mask=inside, other=0.0).to(ACC)
        m = tl.sum(tl.sum(x, axis=1), axis=0) / (4 * width)
        centred = tl.where(inside, x - m, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / (4 * width) + eps)
        tl.store(mean + row, m)
        tl.store(rstd + row, r)
        at = part * width + channel
        w = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
        b = tl.load(bias + at, mask=inside, other=0.0).to(ACC)
        tl.store(y + row * (4 * width) + at, (centred * r * w + b).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def shuffle_layer_norm_backward_kernel(
        dy, features, mean, rstd, dweight, dbias, rows, side, width, BLOCK: tl.constexpr, DOUBLE: tl.constexpr
    ):
        """Program p does rows p, p + programs, ...; its sums go to row p of dweight and dbias."""
        ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        program = tl.program_id(0)
        part, channel = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
        inside = (channel < width) & (part < 4)
        at = part * width + channel
        sum_w = tl.zeros([4, BLOCK], ACC)
        sum_b = tl.zeros([4, BLOCK], ACC)
        start = program.to(tl.int64)
        for row in range(program, rows, tl.num_programs(0)):
            patch = (2 * (start // side) + part // 2) * (2 * side) + 2 * (start % side) + part % 2
            x = tl.load(features + patch * width + channel, mask=inside, other=0.0).to(ACC)
            gradient = tl.load(dy + start * (4 * width) + at, mask=inside, other=0.0).to(ACC)
            sum_w += gradient * (x - tl.load(mean + row)) * tl.load(rstd + row)
            sum_b += gradient
            start += tl.num_programs(0)
        out = program.to(tl.int64) * (4 * width)
        tl.store(dweight + out + at, sum_w, mask=inside)
        tl.store(dbias + out + at, sum_b, mask=inside)


def _side(patches: int) -> int:
    """Of the shuffled grid. Rows of all tiles follow one another, so that tiles need no index of their own."""
    return round(patches**0.5) // 2


def _block(width: int) -> int:
    block = block_of(width, "shuffle_layer_norm")
    block_of(4 * block, "shuffle_layer_norm")
    return block


def _forward(features: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tiles, patches, width = features.shape
    rows, block = tiles * patches // 4, _block(width)
    wide = torch.float64 if is_double(features) else torch.float32
    y = torch.empty(rows, 4 * width, dtype=features.dtype, device=features.device)
    mean, rstd = (torch.empty(rows, dtype=wide, device=features.device) for _ in range(2))
    if rows:
        shuffle_layer_norm_forward_kernel[(rows,)](
            features.contiguous(), weight, bias, y, mean, rstd, _side(patches), width, eps,
            BLOCK=block, DOUBLE=is_double(features), num_warps=max(4, min(16, block // 256)),
        )  # fmt: skip
    return y, mean, rstd


def _forward_fake(features: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tiles, patches, width = features.shape
    rows = tiles * patches // 4
    wide = torch.float64 if is_double(features) else torch.float32
    mean, rstd = (features.new_empty(rows, dtype=wide) for _ in range(2))
    return features.new_empty(rows, 4 * width), mean, rstd


def _backward(dy: Tensor, features: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients in mean's type, [4E] each."""
    tiles, patches, width = features.shape
    rows = tiles * patches // 4
    programs, block = programs_of(rows, dy.device), _block(width)
    dweight, dbias = (mean.new_empty(programs, 4 * width) for _ in range(2))
    shuffle_layer_norm_backward_kernel[(programs,)](
        dy.contiguous(), features.contiguous(), mean, rstd, dweight, dbias, rows, _side(patches), width,
        BLOCK=block, DOUBLE=is_double(features), num_warps=max(4, min(32, block // 128)),
    )  # fmt: skip
    return dweight.sum(0), dbias.sum(0)


def _backward_fake(dy: Tensor, features: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return mean.new_empty(dy.shape[1]), mean.new_empty(dy.shape[1])


_forward_op = define(
    "shuffle_layer_norm(Tensor features, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "shuffle_layer_norm_backward(Tensor dy, Tensor features, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _ShuffleLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward_op(features, weight, bias, eps)
        ctx.save_for_backward(features, mean, rstd)
        ctx.kinds = weight.dtype, bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        features, mean, rstd = ctx.saved_tensors
        dweight, dbias = _backward_op(grads[0], features, mean, rstd)
        return None, dweight.to(ctx.kinds[0]), dbias.to(ctx.kinds[1]), None


def triton_shuffle_layer_norm(features: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """[T, P, E], [4E], [4E] -> [T*Q, 4E]; see above."""
    if features.requires_grad:
        return torch_shuffle_layer_norm(features, weight, bias, eps)
    y: Tensor = _ShuffleLayerNorm.apply(features, weight, bias, eps)
    return y
