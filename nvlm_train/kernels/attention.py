"""Attention inside segments: every token sees its own segment only (and, causal, nothing after itself).

    out[i] = sum_j softmax_j(q_i . k_j / sqrt(H)) v_j      j over the segment of i (causal: j <= i)

and cross-attention of runs of tokens to ranges of a memory (`torch_cross_attention`).

Implementations with one signature: `torch_*` anywhere; on CUDA `varlen_*` (torch's own) and `flash_attn_*` (the
flash-attn packages, versions 2, 3 and 4). Query head n reads key/value head n // (N // K). Nothing of another segment
enters a result or a gradient, not even with weight 0.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_train.errors import SetupError
from nvlm_train.kernels import FLASH_ATTN


class _Pad(torch.autograd.Function):
    """Rows `sources` of `x`; only the rows `places` of the result count in backward, and each is another row of `x`.

    Padding repeats a row of its own segment and gets no gradient. torch's own index_select adds up row by row in
    backward, which on the CPU takes ten times as long as this.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _Pick(torch.autograd.Function):
    """Rows `places` of `x`, all different; the gradient of every other row is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:]).index_copy_(0, places, grads[0]), None


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """[G, M, N, H] x [G, M, K, H] -> [G, M, N, H]: every row of the first dimension on its own."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # [G, N, M, H]
    return out.transpose(1, 2)  # [G, M, N, H]


def length_classes(lengths: list[int]) -> list[list[int]]:
    """Which segments share one padded call: those whose lengths lie within a factor of two.

    One class where padding all to the longest costs less than half more tokens than there are.
    Example: [30, 3, 20, 500] -> [[1], [0, 2], [3]]; [30, 28, 31] -> [[0, 1, 2]]. Empty segments are in no class.
    """
    filled = [i for i, length in enumerate(lengths) if length]
    if filled and len(filled) * max(lengths) <= 1.5 * sum(lengths):
        return [filled]
    classes: dict[int, list[int]] = {}
    for i in filled:
        classes.setdefault((lengths[i] - 1).bit_length(), []).append(i)
    return [classes[size] for size in sorted(classes)]


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """Packed attention with torch's scaled_dot_product_attention.

    Segments are laid out as rows padded on the right, [segments, longest, heads, H], one call per length class: a
    causal token never looks to its right, where the padding is. Reads `cu_seqlens` on the host.

    q: [B, S, N, H]; k, v: [B, S, K, H]; cu_seqlens: i32[G+1], see `Batch`; max_seqlen: longest segment (not needed).
    Returns [B, S, N, H] in q's type.
    """
    rows, length = q.shape[:2]
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    classes = length_classes(lengths)
    if len(classes) == 1 and len({lengths[i] for i in classes[0]}) == 1:  # all equally long: nothing to pad
        shape = (len(classes[0]), lengths[classes[0][0]])
        q, k, v = (x.reshape(*shape, *x.shape[2:]) for x in (q, k, v))  # [G, M, heads, H]
        out = _dense(q, k, v, causal)  # [G, M, N, H]
        return out.reshape(rows, length, *q.shape[2:])  # [B, S, N, H]

    flat = [x.reshape(rows * length, *x.shape[2:]) for x in (q, k, v)]  # [B*S, heads, H]
    pieces, tokens = [], []
    for members in classes:
        own = torch.tensor([lengths[i] for i in members]).unsqueeze(1)  # [G, 1]
        longest = max(lengths[i] for i in members)
        steps = torch.arange(longest).unsqueeze(0)  # [1, M]
        real = steps < own  # [G, M]
        places = real.flatten().nonzero().squeeze(1).to(q.device)  # [tokens of the class] rows of the padded layout
        firsts = own.cumsum(0) - own  # [G, 1] counted in the class's own tokens
        sources = (firsts + torch.minimum(steps, own - 1)).flatten().to(q.device)  # [G*M]
        inputs = flat
        if len(classes) > 1:
            starts = torch.tensor([bounds[i] for i in members]).unsqueeze(1)  # [G, 1] counted in all tokens
            tokens.append((starts + steps)[real].to(q.device))  # [tokens of the class]
            inputs = [_Pick.apply(x, tokens[-1]) for x in flat]  # [tokens of the class, heads, H] each
        padded = [_Pad.apply(x, sources, places).unflatten(0, (-1, longest)) for x in inputs]  # [G, M, heads, H] each
        # On keys only: a padding query needs a key as well (softmax over nothing is NaN), and nobody reads it.
        mask = None if causal else real[:, None, None, :].to(q.device)  # [G, 1, 1, M]
        out = _dense(padded[0], padded[1], padded[2], causal, mask)  # [G, M, N, H]
        pieces.append(_Pick.apply(out.flatten(0, 1), places))  # [tokens of the class, N, H]
    if len(classes) == 1:
        return pieces[0].unflatten(0, (rows, length))  # [B, S, N, H]
    back = torch.cat(tokens).argsort()  # [B*S] where each token stands among the pieces
    return _Pick.apply(torch.cat(pieces), back).unflatten(0, (rows, length))  # [B, S, N, H]


@cache
def _has_flash(device: torch.device) -> bool:
    """Flash attention needs Ampere (compute capability 8.0) or newer; stand-ins on other devices are let through."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_options() -> tuple[Any, frozenset[str]]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor | None:
    """torch's variable-length attention, called after the signature found: releases differ (`is_causal` or
    `window_size`, with and without `enable_gqa`). None where it cannot do this.

    q: [tokens, N, H]; k, v: [tokens, K, H]; cu_q, cu_k: i32[G+1] -> [tokens, N, H].
    """
    head_size = q.shape[-1]
    fits = q.dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    if not fits or not _has_flash(q.device):
        return None
    varlen_attn, parameters = _varlen_options()
    options: dict[str, Any] = {}
    if "is_causal" in parameters:
        options["is_causal"] = causal
    elif "window_size" in parameters:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:  # cannot be told to be causal: better slow than wrong
        return None
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1 and "enable_gqa" in parameters:
        options["enable_gqa"] = True
    elif repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # [tokens, N, H]
    out: Tensor = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)  # [tokens, N, H]
    return out


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """Packed attention with `torch.nn.attention.varlen.varlen_attn` (flash attention: bf16 and fp16, head sizes that
    are multiples of 8 up to 256, compute capability 8.0 and newer).

    Same arguments and result as `torch_attention`, which it hands other types to.
    """
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))  # [B*S, heads, H]
    out = _flash(flat_q, flat_k, flat_v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal)  # [B*S, N, H]
    if out is None:
        return torch_attention(q, k, v, cu_seqlens, max_seqlen, causal)
    return out.unflatten(0, q.shape[:2])  # [B, S, N, H]


def torch_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_rows: Tensor, max_queries: int, max_rows: int
) -> Tensor:
    """Run g's queries over run g's rows, all of them, with torch's scaled_dot_product_attention, run by run.

    q: [U, N, H]; k, v: [W, K, H]; cu_queries, cu_rows: i32[C+1]; see `nvlm_train.batch.Memory`. A run has at least one
    query and one row. Without runs the result is empty, and the gradients of k and v are zero, not missing.
    Returns [U, N, H] in q's type.
    """
    if not max_queries:
        return q + (k.sum() + v.sum())  # [0, N, H]
    queries, rows = (cu.diff().tolist() for cu in (cu_queries, cu_rows))
    out = [
        _dense(one_q.unsqueeze(0), one_k.unsqueeze(0), one_v.unsqueeze(0), causal=False).squeeze(0)  # [run, N, H]
        for one_q, one_k, one_v in zip(q.split(queries), k.split(rows), v.split(rows), strict=True)
    ]
    return torch.cat(out)  # [U, N, H]


def varlen_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_rows: Tensor, max_queries: int, max_rows: int
) -> Tensor:
    """`torch_cross_attention` in one call of torch's variable-length attention; other types are handed to it."""
    out = _flash(q, k, v, cu_queries, cu_rows, max_queries, max_rows, causal=False) if max_queries else None
    if out is None:
        return torch_cross_attention(q, k, v, cu_queries, cu_rows, max_queries, max_rows)
    return out


@cache
def _flash_attn_function(name: str) -> tuple[Callable[..., Any], frozenset[str]]:
    function = importlib.import_module(FLASH_ATTN[name].module).flash_attn_varlen_func
    return function, frozenset(inspect.signature(function).parameters)


def _flash_attn(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """A flash-attn package's variable-length attention. Positions differ between versions after the lengths (2:
    dropout_p, 3 and 4: seqused_q), and 4 always returns the log-sums too, so all but q, k and v go by name.

    q: [tokens, N, H]; k, v: [tokens, K, H]; cu_q, cu_k: i32[G+1] -> [tokens, N, H].
    Raises SetupError for what it cannot do, because it was asked for by name.
    """
    head_size = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16) or head_size % 8 or head_size > FLASH_ATTN[name].max_head_size:
        raise SetupError(
            f"kernels: {name!r} takes bf16 and head sizes that are multiples of 8 up to "
            f"{FLASH_ATTN[name].max_head_size}, but this model's attention is {str(q.dtype).removeprefix('torch.')} "
            f"with head size {head_size}; use auto or torch"
        )
    function, parameters = _flash_attn_function(name)
    lengths = {"max_seqlen_q": max_q, "max_seqlen_k": max_k}  # early versions of 4 find them out themselves
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        **{key: value for key, value in lengths.items() if key in parameters},
        softmax_scale=head_size**-0.5,
        causal=causal,
    )
    first: Tensor = out[0] if isinstance(out, tuple) else out  # [tokens, N, H]
    return first


def _flash_attn_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """Arguments and result of `torch_attention`, after the package's name."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))  # [B*S, heads, H]
    out = _flash_attn(name, flat_q, flat_k, flat_v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal)
    return out.unflatten(0, q.shape[:2])  # [B, S, N, H]


def _flash_attn_cross_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_rows: Tensor, max_queries: int, max_rows: int
) -> Tensor:
    """Arguments and result of `torch_cross_attention`, after the package's name."""
    if not max_queries:
        return torch_cross_attention(q, k, v, cu_queries, cu_rows, max_queries, max_rows)
    return _flash_attn(name, q, k, v, cu_queries, cu_rows, max_queries, max_rows, causal=False)


flash_attn_2_attention = partial(_flash_attn_attention, "flash_attn_2")
flash_attn_3_attention = partial(_flash_attn_attention, "flash_attn_3")
flash_attn_4_attention = partial(_flash_attn_attention, "flash_attn_4")
flash_attn_2_cross_attention = partial(_flash_attn_cross_attention, "flash_attn_2")
flash_attn_3_cross_attention = partial(_flash_attn_cross_attention, "flash_attn_3")
flash_attn_4_cross_attention = partial(_flash_attn_cross_attention, "flash_attn_4")
