"""Token embedding with image features in the places that take one.

    out_t = features[slot_t]  where slot_t >= 0,  else  table[id_t]

ids, slots: i64[rows]; table: [V, D]; features: [M, D] -> [rows, D]. Without ids the table is the rows themselves,
[rows, D], which is how images are put between tokens that are embedded already. No feature is taken twice (the
collator's rule), so that d_features is a plain copy, zero where nothing takes a feature; d_table sums over other rows.

Example: ids [5 0 0 7], slots [-1 1 0 -1] -> [table[5], features[1], features[0], table[7]].

Triton: one program a row, a block of columns at a time; nothing is searched for, so the host never waits. Backward
needs no weight: it writes d_features and, where the table is trained, hands the text rows to torch's embedding. Limits:
none on sizes; features and table of one type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_train.kernels.launch import define

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK = 1024  # columns; 8 a thread, 128 bits in bf16


def torch_splice(ids: Tensor | None, slots: Tensor, table: Tensor, features: Tensor) -> Tensor:
    """i64[rows] or None, i64[rows], [V, D], [M, D] -> [rows, D]; see above."""
    # Text positions read row 0 and drop it again: no search for the image positions, so no wait for the device,
    # and image tokens that nothing takes get a gradient of exactly zero.
    embedded = table if ids is None else F.embedding(ids, table)  # [rows, D]
    taken = F.embedding(slots.clamp(min=0), features)  # [rows, D]
    return torch.where((slots >= 0).unsqueeze(-1), taken, embedded)  # [rows, D]


if triton is not None:

    @triton.jit
    def splice_forward_kernel(ids, slots, table, features, out, width, IDS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + row)
        token = row
        if IDS:
            token = tl.load(ids + row)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            image = tl.load(features + slot * width + at, mask=(at < width) & (slot >= 0), other=0.0)
            text = tl.load(table + token * width + at, mask=(at < width) & (slot < 0), other=0.0)
            tl.store(out + row * width + at, tl.where(slot >= 0, image, text), mask=at < width)

    @triton.jit
    def splice_backward_kernel(dout, slots, dfeatures, dtext, width, NEED_TEXT: tl.constexpr, BLOCK: tl.constexpr):
        """dfeatures starts as zeros; dtext is dout with zeros where there is an image."""
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + row)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            gradient = tl.load(dout + row * width + at, mask=at < width, other=0.0)
            tl.store(dfeatures + slot * width + at, gradient, mask=(at < width) & (slot >= 0))
            if NEED_TEXT:
                tl.store(dtext + row * width + at, tl.where(slot >= 0, 0.0, gradient), mask=at < width)


def _forward(ids: Tensor | None, slots: Tensor, table: Tensor, features: Tensor) -> Tensor:
    rows, width = slots.shape[0], table.shape[1]
    ids = None if ids is None else ids.contiguous()
    out = torch.empty(rows, width, dtype=table.dtype, device=table.device)
    if rows:
        splice_forward_kernel[(rows,)](
            ids, slots.contiguous(), table.contiguous(), features.contiguous(), out, width,
            IDS=ids is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _forward_fake(ids: Tensor | None, slots: Tensor, table: Tensor, features: Tensor) -> Tensor:
    return table.new_empty(slots.shape[0], table.shape[1])


def _backward(
    dout: Tensor, ids: Tensor | None, slots: Tensor, vocabulary: int, num_features: int, need_table: bool
) -> tuple[Tensor, Tensor]:
    rows, width = dout.shape
    dout = dout.contiguous()
    dfeatures = dout.new_zeros(num_features, width)  # [M, D]
    dtext = torch.empty_like(dout) if need_table else dout.new_empty(0)  # [rows, D]
    if rows:
        splice_backward_kernel[(rows,)](
            dout, slots.contiguous(), dfeatures, dtext, width, NEED_TEXT=need_table, BLOCK=_BLOCK, num_warps=4
        )
    if not need_table or ids is None:
        return dfeatures, dtext
    return dfeatures, torch.ops.aten.embedding_dense_backward(dtext, ids, vocabulary, -1, False)  # [V, D]


def _backward_fake(
    dout: Tensor, ids: Tensor | None, slots: Tensor, vocabulary: int, num_features: int, need_table: bool
) -> tuple[Tensor, Tensor]:
    width = dout.shape[1]
    rows = vocabulary if ids is not None else dout.shape[0]
    return dout.new_empty(num_features, width), dout.new_empty((rows, width) if need_table else 0)


_forward_op = define(
    "splice(Tensor? ids, Tensor slots, Tensor table, Tensor features) -> Tensor", _forward, _forward_fake
)
_backward_op = define(
    "splice_backward(Tensor dout, Tensor? ids, Tensor slots, int vocabulary, int num_features, bool need_table)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor | None, slots: Tensor, table: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(ids, slots)
        ctx.sizes = table.shape[0], features.shape[0]
        return _forward_op(ids, slots, table, features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, slots = ctx.saved_tensors
        need_table, need_features = ctx.needs_input_grad[2:]
        dfeatures, dtable = _backward_op(grads[0], ids, slots, *ctx.sizes, need_table)
        return None, None, dtable if need_table else None, dfeatures if need_features else None


def triton_splice(ids: Tensor | None, slots: Tensor, table: Tensor, features: Tensor) -> Tensor:
    """i64[rows] or None, i64[rows], [V, D], [M, D] -> [rows, D]; see above."""
    out: Tensor = _Splice.apply(ids, slots, table, features)
    return out
