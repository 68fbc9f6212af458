"""The flash-attn packages' attention through the one adapter: stand-ins with the signatures of versions 2, 3 and 4.

Each stand-in is plain PyTorch and checks what the real function needs: types, shapes, lengths, scale, no position taken
for another. Nothing here has run the packages themselves.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nvlm_train import kernels
from nvlm_train.errors import SetupError
from nvlm_train.kernels import attention

torch.set_num_threads(1)
CALLS: list[str] = []


def _checked(q: Tensor, k: Tensor, v: Tensor, cu: list[Any], longest: list[Any], scale: Any, causal: Any) -> Tensor:
    """What all versions compute; loops over the segments and divides by hand, unlike our own implementations."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.ndim == k.ndim == v.ndim == 3
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and all(x.stride(-1) == 1 for x in (q, k, v))
    assert all(x.dtype == torch.int32 and x.ndim == 1 and x.is_contiguous() for x in cu)
    assert type(causal) is bool and scale == q.shape[-1] ** -0.5
    for bounds, length, tokens in zip(cu, longest, (q, k), strict=True):
        assert bounds[0] == 0 and bounds[-1] == len(tokens)
        assert length is None or (type(length) is int and length == int(bounds.diff().max()))
    out = []
    for (a, b), (c, d) in zip(*(pairwise(x.tolist()) for x in cu), strict=True):
        keys, values = (x[c:d].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b].float(), keys) * scale  # [N, run, rows]
        if causal:  # aligned at the last key, as in the packages
            seen = torch.arange(d - c) <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
            scores = scores.masked_fill(~seen, float("-inf"))
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
    return torch.cat(out).to(q.dtype)


def version_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert (dropout_p, window_size, softcap, return_attn_probs) == (0.0, (-1, -1), 0.0, False)
    CALLS.append("2")
    return _checked(q, k, v, [cu_seqlens_q, cu_seqlens_k], [max_seqlen_q, max_seqlen_k], softmax_scale, causal)


def version_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    assert seqused_q is seqused_k is qv is q_descale is None
    CALLS.append("3")
    return _checked(q, k, v, [cu_seqlens_q, cu_seqlens_k], [max_seqlen_q, max_seqlen_k], softmax_scale, causal)


def version_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> tuple[Tensor, None]:
    assert seqused_q is seqused_k is page_table is None
    CALLS.append("4")
    cu, longest = [cu_seqlens_q, cu_seqlens_k], [max_seqlen_q, max_seqlen_k]
    return _checked(q, k, v, cu, longest, softmax_scale, causal), None


def version_4_early(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, None]:
    CALLS.append("4")
    return _checked(q, k, v, [cu_seqlens_q, cu_seqlens_k], [None, None], softmax_scale, causal), None


VERSIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "2": ("flash_attn_2", version_2),
    "3": ("flash_attn_3", version_3),
    "4": ("flash_attn_4", version_4),
    "4, early": ("flash_attn_4", version_4_early),
}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, function = VERSIONS[request.param]
    path = kernels.FLASH_ATTN[name].module
    module = types.ModuleType(path)
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, path.split(".")[0], types.ModuleType(path.split(".")[0]))
    monkeypatch.setitem(sys.modules, path, module)
    attention._flash_attn_function.cache_clear()
    kernels._select.cache_clear()
    CALLS.clear()
    yield name
    attention._flash_attn_function.cache_clear()
    kernels._select.cache_clear()


def leaves(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]


def compare(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, theirs)]
    for own, other in zip((ours, *grads[0]), (theirs, *grads[1]), strict=True):
        error = float((own - other).detach().float().norm() / other.detach().float().norm())
        print(f"{error:.2e}")
        assert error <= 1.5e-2, error  # bf16 against bf16 in another order; worst seen 4.0e-3


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_packed_attention_through_each_version(version: str, heads: int, groups: int, causal: bool) -> None:
    bounds = torch.tensor([0, 7, 12, 18, 26, 36], dtype=torch.int32)  # two rows of 18
    q, k, v = inputs = leaves([(2, 18, heads, 16), (2, 18, groups, 16), (2, 18, groups, 16)])
    name, reason = kernels.select(version, "cuda")["attention"]
    assert name == version and reason == f"{kernels.FLASH_ATTN[version].module}.flash_attn_varlen_func; asked for"
    ours = kernels.load("attention", name)(q, k, v, bounds, 10, causal)
    assert ours.shape == q.shape and CALLS == [version[-1]]
    compare(ours, attention.torch_attention(q, k, v, bounds, 10, causal), inputs)


@pytest.mark.parametrize("runs", [([2, 2, 3, 7], [4, 4, 4, 12]), ([5], [8]), ([1, 1], [1, 6])])
def test_cross_attention_through_each_version(version: str, runs: tuple[list[int], list[int]]) -> None:
    """Runs have fewer queries than rows and all see all of them."""
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in runs)
    q, k, v = inputs = leaves([(sum(runs[0]), 4, 8), (sum(runs[1]), 2, 8), (sum(runs[1]), 2, 8)])
    attend = kernels.load("cross_attention", kernels.select(version, "cuda")["cross_attention"][0])
    ours = attend(q, k, v, cu_q, cu_k, max(runs[0]), max(runs[1]))
    assert CALLS == [version[-1]]
    compare(ours, attention.torch_cross_attention(q, k, v, cu_q, cu_k, max(runs[0]), max(runs[1])), inputs)
    nothing = torch.zeros(1, dtype=torch.int32)
    assert attend(q[:0], k[:0], v[:0], nothing, nothing, 0, 0).shape == (0, 4, 8) and len(CALLS) == 1


def test_what_a_version_cannot_do_is_refused_by_name(version: str) -> None:
    """Asked for, it does not hand fp32 or an odd head size to another implementation."""
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    attend = kernels.load("attention", version)
    q, k, v = leaves([(1, 6, 2, 16)] * 3)
    with pytest.raises(SetupError, match=f"kernels: '{version}' takes bf16 .*is float32 with head size 16; use auto"):
        attend(q.float(), k.float(), v.float(), bounds, 6)
    odd = leaves([(1, 6, 2, 12)] * 3)
    with pytest.raises(SetupError, match="is bfloat16 with head size 12"):
        attend(*odd, bounds, 6)
    assert not CALLS
    name, reason = kernels.select("auto", "cuda")["attention"]  # installed, and yet not taken silently
    assert name == "varlen" or (name == "torch" and f"not {version}: not yet run on a GPU" in reason)
    assert kernels.select(f"{version}+torch", "cuda")["rms_norm"][0] == "torch"
    with pytest.raises(SetupError, match=f"'{version}' was asked for attention, but runs on cuda only, this is cpu"):
        kernels.select(version, "cpu")


def test_a_version_that_is_not_installed_or_broken_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._select.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    try:
        with pytest.raises(SetupError, match="'flash_attn_3' was asked for attention, but flash_attn_interface has no"):
            kernels.select("flash_attn_3", "cuda")
        for name, module in (("flash_attn_2", "flash_attn"), ("flash_attn_4", "flash_attn.cute")):
            if module.split(".")[0] not in sys.modules and not kernels.importlib.util.find_spec("flash_attn"):
                with pytest.raises(
                    SetupError, match=f"'{name}' was asked for attention, but {module} is not installed"
                ):
                    kernels.select(name, "cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
        sys.modules["flash_attn_interface"].flash_attn_varlen_func = version_3  # type: ignore[attr-defined]
        with pytest.raises(SetupError, match=r"needs compute capability 9\.x, this GPU has 10\.x"):
            kernels.select("flash_attn_3", "cuda")
    finally:
        kernels._select.cache_clear()
