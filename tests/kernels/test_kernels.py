"""Choosing a kernel, and packed attention itself against the plain formula."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from nvlm_train import kernels
from nvlm_train.engine import memory
from nvlm_train.errors import SetupError
from nvlm_train.kernels import attention, linear_cross_entropy
from nvlm_train.model.attention import packed_attention

torch.set_num_threads(1)

LENGTHS = {
    "one": [[23]],
    "equal": [[6, 6], [6, 6]],
    "near": [[7, 5, 6], [8, 10]],
    "far apart": [[1, 40, 2, 3], [30, 1, 15]],
    "empty segment": [[4, 0, 9]],
    "single tokens": [[1, 1, 1]],
}


def inputs(
    rows: list[list[int]], query_heads: int, kv_heads: int, head_size: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(7)
    flat = [length for row in rows for length in row]
    bounds = torch.tensor([0, *torch.tensor(flat).cumsum(0).tolist()], dtype=torch.int32)
    shape = (len(rows), sum(rows[0]))
    q = torch.randn(*shape, query_heads, head_size, generator=generator, requires_grad=True)
    k = torch.randn(*shape, kv_heads, head_size, generator=generator, requires_grad=True)
    v = torch.randn(*shape, kv_heads, head_size, generator=generator, requires_grad=True)
    return q, k, v, bounds, max(flat)


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """Softmax over all tokens in fp64, masked to the segment."""
    rows, length, heads, size = q.shape
    segment = torch.bucketize(torch.arange(rows * length), cu_seqlens.long()[1:], right=True)
    flat_q = q.double().reshape(rows * length, heads, size)
    flat_k, flat_v = (x.double().reshape(rows * length, -1, size) for x in (k, v))
    flat_k, flat_v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (flat_k, flat_v))
    allowed = segment[:, None] == segment[None, :]
    if causal:
        allowed = allowed.tril()
    scores = torch.einsum("ihd,jhd->hij", flat_q, flat_k) / size**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, flat_v).reshape(q.shape)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("rows", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_attention_is_the_formula(rows: list[list[int]], query_heads: int, kv_heads: int, causal: bool) -> None:
    q, k, v, cu_seqlens, longest = inputs(rows, query_heads, kv_heads)
    out = packed_attention(q, k, v, cu_seqlens, longest, causal)
    assert out.shape == q.shape
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    own = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = by_the_formula(q, k, v, cu_seqlens, causal)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), (out, *own), (expected, *wanted), strict=True):
        # the share of the weights' norm is for gradients that are pure rounding: a single token's query has none
        error = float((ours.detach() - theirs.detach()).norm() / (theirs.detach().norm() + 0.1 * weight.norm()))
        print(f"{name}: {error:.2e} of at most 2e-06")
        assert error <= 2e-6, (name, error)  # fp32 against fp64; worst seen 8.5e-7


@pytest.mark.parametrize("rows", [LENGTHS["near"], LENGTHS["far apart"]], ids=["one class", "several classes"])
def test_gradients_of_other_segments_are_exactly_zero(rows: list[list[int]]) -> None:
    q, k, v, cu_seqlens, longest = inputs(rows, 4, 2)
    out = packed_attention(q, k, v, cu_seqlens, longest).flatten(0, 1)
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        grads = torch.autograd.grad(out[begin:end].square().sum(), (q, k, v), retain_graph=True)
        for grad in grads:
            flat = grad.flatten(0, 1)
            assert not flat[:begin].any() and not flat[end:].any()
        assert grads[2].flatten(0, 1)[begin:end].any()


def test_a_segment_that_is_not_finite_stays_alone() -> None:
    q, k, v, cu_seqlens, longest = inputs([[5, 9, 7]], 4, 2)
    v.data[0, 6] = float("nan")
    out = packed_attention(q, k, v, cu_seqlens, longest)
    assert torch.isfinite(out[0, :5]).all() and torch.isfinite(out[0, 14:]).all()
    assert out[0, 6].isnan().all()


def test_length_classes() -> None:
    assert attention.length_classes([30, 3, 20, 500]) == [[1], [0, 2], [3]]
    assert attention.length_classes([30, 28, 31]) == [[0, 1, 2]]
    assert attention.length_classes([4, 0, 4]) == [[0, 2]]
    for lengths in ([1, 2, 3, 4, 5, 1000], list(range(1, 90)), [64] * 3 + [1800]):
        classes = attention.length_classes(lengths)
        assert sorted(i for members in classes for i in members) == list(range(len(lengths)))
        padded = sum(len(members) * max(lengths[i] for i in members) for members in classes)
        assert padded <= 2 * sum(lengths)


def test_auto_on_the_cpu_is_torch_with_the_reason() -> None:
    auto, asked = kernels.select("auto", "cpu"), kernels.select("torch", "cpu")
    for op in kernels.KERNELS:
        first = "varlen" if "attention" in op else "triton"
        name, reason = auto[op]
        assert name == "torch" and reason.startswith(f"plain PyTorch; not {first}: runs on cuda only, this is cpu")
        assert asked[op] == ("torch", "plain PyTorch; asked for")
        assert kernels.select("torch", "cuda")[op][0] == "torch"
    assert kernels.load("attention", "torch") is attention.torch_attention
    assert kernels.chosen("attention", "auto", "cpu") is attention.torch_attention


def test_a_kernel_that_no_gpu_has_run_is_not_taken_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ours nor Liger's behind our head; once measured, it is taken."""
    pytest.importorskip("triton", reason="triton is not installed")
    for op, implementations in kernels.KERNELS.items():
        name, reason = kernels.select("auto", "cuda")[op]
        assert implementations[name].measured
        if "triton" in implementations:
            assert name == "torch" and "not triton: not yet run on a GPU; ask for it: kernels: triton" in reason
            assert kernels.select("triton", "cuda")[op][0] == "triton"
    loss = kernels.KERNELS["linear_cross_entropy"]
    monkeypatch.setitem(loss, "triton", dataclasses.replace(loss["triton"], measured=True))
    kernels._select.cache_clear()
    try:
        taken = kernels.select("auto", "cuda")
        assert taken["linear_cross_entropy"][0] == "triton" and taken["rms_norm"][0] == "torch"
    finally:
        kernels._select.cache_clear()


def test_memory_is_predicted_for_the_loss_that_is_taken() -> None:
    for name, most in memory.MAX_LOGITS.items():
        own = {"torch": linear_cross_entropy.MAX_LOGITS, "triton": linear_cross_entropy.MAX_TRITON_LOGITS}[name]
        assert most == own
    assert kernels.select("auto", "cuda")["linear_cross_entropy"][0] == memory.LOSS_OF_AUTO


def test_triton_asked_for_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops that have no Triton kernel are chosen as by auto; not installed, it is refused by name."""
    pytest.importorskip("triton", reason="triton is not installed")
    asked = kernels.select("triton", "cuda")
    assert asked["linear_cross_entropy"][1].endswith("asked for")
    assert asked["attention"][0] == "varlen" and "attention has no triton" in asked["attention"][1]
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels._select.cache_clear()
    try:
        reason = kernels.select("auto", "cuda")["linear_cross_entropy"][1]
        assert reason.startswith("plain PyTorch; not triton: triton is not installed; not liger: liger_kernel is not")
        with pytest.raises(SetupError, match="'liger' was asked for linear_cross_entropy, but liger_kernel is not i"):
            kernels.select("liger", "cuda")
        with pytest.raises(SetupError, match=r"'triton' was asked for .*, but triton is not installed; use auto or to"):
            kernels.select("triton", "cuda")
    finally:
        kernels._select.cache_clear()


def test_auto_on_cuda_is_varlen_where_this_torch_has_it() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    name, reason = kernels.select("auto", "cuda")["attention"]
    assert name == "varlen" and "flash" in reason
    assert kernels.load("attention", "varlen") is attention.varlen_attention


def test_auto_without_varlen_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    kernels._select.cache_clear()
    try:
        name, reason = kernels.select("auto", "cuda")["attention"]
        assert name == "torch" and "has no torch.nn.attention.varlen" in reason
    finally:
        kernels._select.cache_clear()


def test_a_choice_that_is_unknown_or_cannot_run_is_refused() -> None:
    known = "auto, flash_attn_2, flash_attn_3, flash_attn_4, liger, torch, triton, varlen"
    with pytest.raises(SetupError, match=f"'tritn' is not known; known are {known}"):
        kernels.select("tritn", "cpu")
    with pytest.raises(SetupError, match="'varlen' was asked for attention, but runs on cuda only, this is cpu"):
        kernels.select("varlen", "cpu")
    with pytest.raises(SetupError, match=r"'triton' was asked for .*, but runs on cuda only, this is cpu"):
        kernels.select("triton", "cpu")


SIGNATURES = {
    "is_causal": "def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False): pass",
    "window": "def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)): pass",
    "gqa": "def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), "
    "enable_gqa=False): pass",
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("signature", SIGNATURES)
def test_varlen_is_called_after_its_signature(signature: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's CUDA-only function, of each signature there was; it computes what the real one does."""
    seen: dict[str, Any] = {}

    def stand_in(q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **options: Any) -> Tensor:
        cu_q, cu_k, max_q, max_k = sizes
        seen.update(options)
        told = options.get("is_causal", options.get("window_size") == (-1, 0))
        assert q.ndim == 3 and torch.equal(cu_q, cu_k) and max_q == max_k == 10
        assert q.shape[1] == k.shape[1] or options.get("enable_gqa")
        return attention.torch_attention(q[None], k[None], v[None], cu_q, max_q, told)[0]

    scope: dict[str, Any] = {}
    exec(SIGNATURES[signature], scope)
    stand_in.__wrapped__ = scope["varlen_attn"]  # type: ignore[attr-defined]  # inspect.signature follows it
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attention._varlen_options.cache_clear()
    try:
        q, k, v, cu_seqlens, longest = inputs([[7, 5, 6], [8, 10]], 4, 2, head_size=8)
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        out = attention.varlen_attention(q, k, v, cu_seqlens, longest, causal)
        expected = attention.torch_attention(q, k, v, cu_seqlens, longest, causal)
        assert torch.equal(out, expected)
        assert seen and ("enable_gqa" in seen) == (signature == "gqa")
        seen.clear()  # a head size that flash attention does not take goes to torch
        odd = [x.bfloat16() for x in inputs([[7, 5, 6], [8, 10]], 4, 2)[:3]]
        assert attention.varlen_attention(*odd, cu_seqlens, longest, causal).shape == odd[0].shape and not seen
    finally:
        attention._varlen_options.cache_clear()


RUNS = {
    "tags and text": ([2, 2, 3, 7], [4, 4, 4, 12]),
    "one run": ([5], [8]),
    "one token, one row": ([1, 1], [1, 6]),
    "none": ([], []),
}


def cross_inputs(runs: tuple[list[int], list[int]], heads: int, groups: int, head_size: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(6)
    queries, rows = runs
    q, k, v = (
        torch.randn(sum(lengths), n, head_size, generator=generator)
        for lengths, n in ((queries, heads), (rows, groups), (rows, groups))
    )
    bounds = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in runs]
    return (q, k, v, *bounds, max(queries, default=0), max(rows, default=0))


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_cross_attention_equals_a_dense_mask(runs: tuple[list[int], list[int]], groups: int) -> None:
    """And its gradients; without runs they are zero, not missing."""
    q, k, v, cu_q, cu_k, *longest = cross_inputs(runs, 4, groups, 6)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention.torch_cross_attention(q, k, v, cu_q, cu_k, *longest)
    assert out.shape == q.shape
    run_of_token, run_of_row = (
        torch.arange(len(n)).repeat_interleave(torch.tensor(n, dtype=torch.int64)) for n in runs
    )
    wide = [x.repeat_interleave(4 // groups, dim=1).transpose(0, 1) for x in (k, v)]
    scores = q.transpose(0, 1) @ wide[0].transpose(1, 2) / 6**0.5
    scores = scores.masked_fill(run_of_token[:, None] != run_of_row, float("-inf"))
    expected = (scores.softmax(-1) @ wide[1]).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)  # worst seen 4.8e-7
    ours, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)  # worst seen 9.5e-7


@pytest.mark.parametrize("signature", SIGNATURES)
def test_varlen_cross_attention_is_called_after_its_signature(signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **options: Any) -> Tensor:
        calls.append(options)
        assert options.get("window_size", (-1, -1)) == (-1, -1) and not options.get("is_causal", False)
        assert q.shape[1] == k.shape[1] or options.get("enable_gqa")
        return attention.torch_cross_attention(q, k, v, *sizes)

    scope: dict[str, Any] = {}
    exec(SIGNATURES[signature], scope)
    stand_in.__wrapped__ = scope["varlen_attn"]  # type: ignore[attr-defined]  # inspect.signature follows it
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attention._varlen_options.cache_clear()
    try:
        for runs in RUNS.values():
            q, k, v, *where = cross_inputs(runs, 4, 2, 8)
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
            out = attention.varlen_cross_attention(q, k, v, *where)
            assert torch.equal(out, attention.torch_cross_attention(q, k, v, *where))
        assert len(calls) == 3  # without runs nothing is launched
        assert all(("enable_gqa" in options) == (signature == "gqa") for options in calls)
        attention.varlen_cross_attention(*cross_inputs(RUNS["one run"], 4, 2, 8))  # fp32 goes to torch
        assert len(calls) == 3
    finally:
        attention._varlen_options.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_varlen_cross_attention_equals_torch_on_a_gpu(runs: tuple[list[int], list[int]]) -> None:
    q, k, v, cu_q, cu_k, *longest = cross_inputs(runs, 4, 2, 64)
    leaves = [x.bfloat16().cuda().requires_grad_() for x in (q, k, v)]
    results = []
    for function in (attention.varlen_cross_attention, attention.torch_cross_attention):
        out = function(*leaves, cu_q.cuda(), cu_k.cuda(), *longest)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()  # bf16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", LENGTHS.values(), ids=LENGTHS.keys())
def test_varlen_equals_torch_on_a_gpu(rows: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(3)
    flat = [length for row in rows for length in row]
    cu_seqlens = torch.tensor([0, *torch.tensor(flat).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    q, k, v = (
        torch.randn(len(rows), sum(rows[0]), heads, 64, generator=generator).bfloat16().cuda().requires_grad_()
        for heads in (4, 2, 2)
    )
    results = []
    for function in (attention.varlen_attention, attention.torch_attention):
        out = function(q, k, v, cu_seqlens, max(flat), True)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()  # bf16; not yet run on a GPU
