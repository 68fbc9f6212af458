"""Table 2: our kernels beside plain PyTorch, torch.compile and Liger, at the shapes of NVLM-D with a 7B decoder.

Every provider is held against fp64 on fresh inputs before it is timed: outputs and every gradient, by the norm of the
error over the norm of the tensor. Providers take turns in every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_tables.cases import CASES
from gpu_tables.report import PROVIDERS
from gpu_tables.worker import Timer, free_all, is_out_of_memory, spread
from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.kernels import KERNELS, load

ROUNDS, LEAST_ROUNDS, LIMIT_S = {"cuda": 50, "cpu": 2}, {"cuda": 10, "cpu": 2}, 20.0
# Of the norm of a tensor. bf16 rounds each stored value by up to 2^-9; eager rounds between its operations too.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
LOSS_TOLERANCE = {torch.bfloat16: 5e-4, torch.float32: 1e-5}


@dataclass
class Case:
    """An op at a shape.

    leaves: makes fresh inputs that need a gradient, in fp32. run: functions of the leaves by provider; a text where the
    provider has none, with the reason. reference: fp64 outputs and gradients, given the leaves and the cotangents.
    bytes, flop: the least that must be moved, or multiplied, in (forward, backward); one of the two is given.
    """

    leaves: Callable[[torch.Generator], list[Tensor]]
    run: dict[str, Callable[..., Any] | str]
    reference: Callable[..., tuple[list[Tensor], list[Tensor]]]
    bytes: tuple[float, float] = (0.0, 0.0)
    flop: tuple[float, float] = (0.0, 0.0)
    arrange: Callable[[list[Tensor]], list[Tensor]] = list  # puts leaves where the model has them, by strides


def _plain(function: Callable[..., Any]) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """The reference of an op whose PyTorch version computes in fp64 what it is given in fp64."""

    def reference(leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        own = [leaf.detach().double().requires_grad_() for leaf in leaves]
        outs = as_list(function(*own))
        grads = torch.autograd.grad(outs, own, [c.double() for c in cotangents])
        return [out.detach() for out in outs], list(grads)

    return reference


def as_list(outs: Any) -> list[Tensor]:
    return list(outs) if isinstance(outs, tuple | list) else [outs]


def fitting(cotangents: list[Tensor], outs: list[Tensor]) -> list[Tensor]:
    """Copies in the types of the outputs: Liger writes over what backward is given."""
    return [c.clone().to(out.dtype) for c, out in zip(cotangents, outs, strict=True)]


def _provider(op: str, name: str, device: str, function: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | str:
    """The function, or why there is none here. On a CPU ours runs in Triton's interpreter."""
    if name == "liger":
        obstacle = KERNELS["linear_cross_entropy"]["liger"].obstacle(device)  # that of all of its kernels
    else:
        obstacle = KERNELS[op]["triton"].obstacle("cuda")
    return obstacle if obstacle is not None else function()


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def make_case(op: str, sizes: tuple[int, ...], option: Any, device: str) -> Case:
    """The case at a shape; its functions take the leaves in any type."""
    return _MAKERS[op](sizes, option, device)


def _linear_cross_entropy(sizes: tuple[int, ...], labelled: int, device: str) -> Case:
    tokens, width, vocabulary = sizes
    generator = torch.Generator(device).manual_seed(5)
    count = max(1, tokens * labelled // 100)
    rows = torch.randperm(tokens, generator=generator, device=device)[:count].sort().values
    labels = torch.full((tokens,), IGNORE_INDEX, device=device)
    labels[rows] = torch.randint(vocabulary, (count,), generator=generator, device=device)
    targets = labels[rows]

    def eager(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def liger() -> Callable[..., Any]:
        function = load("linear_cross_entropy", "liger")  # all rows, as its users call it; it knows IGNORE_INDEX
        return lambda h, w: function(h, w, labels)

    def ours() -> Callable[..., Any]:
        function = load("linear_cross_entropy", "triton")
        return lambda h, w: function(h.index_select(0, rows), w, targets)

    def reference(leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        h, w = (leaf.detach().double() for leaf in leaves)
        loss, dh, dw = h.new_zeros(()), torch.zeros_like(h), torch.zeros_like(w)
        for piece in rows.split(1024):
            z = h[piece] @ w.t()  # [r, V]
            own = labels[piece].unsqueeze(1)
            top = torch.logsumexp(z, 1, keepdim=True)
            loss += (top - z.gather(1, own)).sum()
            z.sub_(top).exp_().scatter_add_(1, own, -torch.ones_like(top))
            dh[piece] = z @ w
            dw.addmm_(z.t(), h[piece])
        scale = cotangents[0].double()
        return [loss], [dh * scale, dw * scale]

    product = 2.0 * count * width * vocabulary
    return Case(
        lambda g: [_randn(g, tokens, width), _randn(g, vocabulary, width) / width**0.5],
        {
            "eager": eager,
            "torch.compile": eager,
            "liger": _provider("linear_cross_entropy", "liger", device, liger),
            "ours": _provider("linear_cross_entropy", "ours", device, ours),
        },
        reference,
        flop=(product, 2 * product),
    )


def _rms_norm(sizes: tuple[int, ...], _: Any, device: str) -> Case:
    rows, width = sizes
    plain = load("rms_norm", "torch")

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return plain(x, w, 1e-6)

    def ours() -> Callable[..., Any]:
        function = load("rms_norm", "triton")
        return lambda x, w: function(x, w, 1e-6)

    number = 2.0 * rows * width
    return Case(
        lambda g: [_randn(g, rows, width), 1 + _randn(g, width) / 4],
        {
            "eager": eager,
            "torch.compile": eager,
            "liger": _provider("rms_norm", "liger", device, lambda: _liger_norm),
            "ours": _provider("rms_norm", "ours", device, ours),
        },
        _plain(eager),
        bytes=(2 * number, 3 * number),
    )


def _liger_norm(x: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    y: Tensor = LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
    return y


def _add_rms_norm(sizes: tuple[int, ...], scale: str | None, device: str) -> Case:
    rows, width = sizes
    plain = load("add_rms_norm", "torch")

    def eager(x: Tensor, r: Tensor, w: Tensor, *s: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x, r, w, 1e-6, *s)

    def ours() -> Callable[..., Any]:
        function = load("add_rms_norm", "triton")
        return lambda x, r, w, *s: function(x, r, w, 1e-6, *s)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        def run(x: Tensor, r: Tensor, w: Tensor, *s: Tensor) -> tuple[Tensor, Tensor]:
            y, stream = LigerFusedAddRMSNormFunction.apply(s[0] * x if s else x, r, w, 1e-6)  # it has no scale itself
            return stream, y

        return run

    def leaves(g: torch.Generator) -> list[Tensor]:
        scales = {None: [], "vector": [_randn(g, width)], "number": [_randn(g, 1)]}[scale]
        return [_randn(g, rows, width), _randn(g, rows, width), 1 + _randn(g, width) / 4, *scales]

    number = 2.0 * rows * width
    return Case(
        leaves,
        {
            "eager": eager,
            "torch.compile": eager,
            "liger": _provider("add_rms_norm", "liger", device, liger),
            "ours": _provider("add_rms_norm", "ours", device, ours),
        },
        _plain(eager),
        bytes=(4 * number, (4 if scale is None else 6) * number),
    )


def _norm_rope(sizes: tuple[int, ...], what: str, device: str) -> Case:
    rows, heads, head_size = sizes
    width = heads * head_size
    angles = torch.rand(rows, head_size // 2, device=device, generator=torch.Generator(device).manual_seed(6)) * 6
    angles = torch.cat((angles, angles), dim=1)
    plain = load("norm_rope", "torch")

    tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def turn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ready in the type that is timed, as in the model; rounded alike for all types."""
        if dtype not in tables:
            tables[dtype] = (angles.cos().bfloat16().to(dtype), angles.sin().bfloat16().to(dtype))
        return tables[dtype]

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *w: Tensor) -> Tensor:
            part: Tensor = function(x, w[0] if w else None, *((None, None) if w else turn(x.dtype)), head_size, 1e-6)
            return part

        return run

    def liger() -> Callable[..., Any]:
        if what == "norm":
            return lambda x, w: _liger_norm(x.contiguous(), w)
        from liger_kernel.ops.rope import LigerRopeFunction

        def run(x: Tensor) -> Tensor:
            q = x.view(1, rows, heads, head_size).transpose(1, 2)  # [1, N, rows, H]
            k = q[:, :1].detach()  # it turns both; one head of keys is little more
            cos, sin = turn(x.dtype)
            # it writes over its input
            turned, _ = LigerRopeFunction.apply(q.clone(), k.clone(), cos.unsqueeze(0), sin.unsqueeze(0))
            return turned.transpose(1, 2).reshape(rows, width)

        return run

    def arrange(leaves: list[Tensor]) -> list[Tensor]:
        """The tower's q is a third of a packed row."""
        packed = leaves[0].new_empty(rows, 3 * width)[:, :width].copy_(leaves[0])
        return [packed, *leaves[1:]]

    number = 2.0 * rows * width
    return Case(
        lambda g: [_randn(g, rows, width)] + ([1 + _randn(g, width) / 4] if what == "norm" else []),
        {
            "eager": of(plain),
            "torch.compile": of(plain),
            "liger": _provider("norm_rope", "liger", device, liger),
            "ours": _provider("norm_rope", "ours", device, lambda: of(load("norm_rope", "triton"))),
        },
        _plain(of(plain)),
        bytes=(2 * number, (3 if what == "norm" else 2) * number),
        arrange=arrange if what == "norm" else list,
    )


def _splice(sizes: tuple[int, ...], _: Any, device: str) -> Case:
    tokens, width, images, vocabulary = sizes
    generator = torch.Generator(device).manual_seed(7)
    ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    slots = torch.full((tokens,), -1, device=device)
    slots[torch.randperm(tokens, generator=generator, device=device)[:images]] = torch.arange(images, device=device)
    plain = load("splice", "torch")

    def eager(table: Tensor, features: Tensor) -> Tensor:
        return plain(ids, slots, table, features)

    def ours() -> Callable[..., Any]:
        function = load("splice", "triton")
        return lambda table, features: function(ids, slots, table, features)

    row = 2.0 * width
    return Case(
        lambda g: [_randn(g, vocabulary, width), _randn(g, images, width)],
        {
            "eager": eager,
            "torch.compile": eager,
            "liger": "it has no such op",
            "ours": _provider("splice", "ours", device, ours),
        },
        _plain(eager),
        bytes=(2 * tokens * row, (tokens + images + vocabulary) * row),
    )


def _shuffle_layer_norm(sizes: tuple[int, ...], _: Any, device: str) -> Case:
    tiles, side, width = sizes
    generator = torch.Generator(device).manual_seed(8)
    features = 3 + 2 * torch.randn(tiles, side * side, width, generator=generator, device=device)
    features = features.bfloat16()  # frozen: the same rounded values for every provider and type
    kept: dict[torch.dtype, Tensor] = {}
    plain = load("shuffle_layer_norm", "torch")

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(w: Tensor, b: Tensor) -> Tensor:
            if w.dtype not in kept:
                kept[w.dtype] = features.to(w.dtype)
            y: Tensor = function(kept[w.dtype], w, b, 1e-6)
            return y

        return run

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        from nvlm_train.kernels.shuffle_layer_norm import pixel_shuffle

        return of(lambda x, w, b, eps: LigerLayerNormFunction.apply(pixel_shuffle(x).flatten(0, 1), w, b, eps))

    number = 2.0 * tiles * side * side * width
    return Case(
        lambda g: [1 + _randn(g, 4 * width) / 4, _randn(g, 4 * width)],
        {
            "eager": of(plain),
            "torch.compile": of(plain),
            "liger": _provider("shuffle_layer_norm", "liger", device, liger),
            "ours": _provider("shuffle_layer_norm", "ours", device, lambda: of(load("shuffle_layer_norm", "triton"))),
        },
        _plain(of(plain)),
        bytes=(2 * number, 2 * number),
    )


def _attention(sizes: tuple[int, ...], lengths: tuple[tuple[int, int], ...], device: str) -> Case:
    """lengths: (queries, rows) of each segment or run; where both are equal everywhere, it is causal self-attention."""
    heads, groups, head_size = sizes
    own = all(queries == rows for queries, rows in lengths)
    op = "attention" if own else "cross_attention"
    queries, rows = ([pair[side] for pair in lengths] for side in (0, 1))
    cu_queries, cu_rows = (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (queries, rows)
    )

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        if own:
            return lambda q, k, v: function(
                q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), cu_queries, max(queries), causal=True
            )[0]
        return lambda q, k, v: function(q, k, v, cu_queries, cu_rows, max(queries), max(rows))

    def reference(leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Segment by segment: scores of one fit in fp64."""
        outs, grads = [], []
        pieces = [x.detach().double().split(n) for x, n in zip(leaves, (queries, rows, rows), strict=True)]
        for q, k, v, given in zip(*pieces, cotangents[0].double().split(queries), strict=True):
            q, k, v = one = [x.unsqueeze(0).transpose(1, 2).requires_grad_() for x in (q, k, v)]  # [1, heads, L, H]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=own, enable_gqa=heads != groups).transpose(1, 2)[0]
            grads.append([g.transpose(1, 2)[0] for g in torch.autograd.grad(out, one, given)])
            outs.append(out.detach())
        return [torch.cat(outs)], [torch.cat(parts) for parts in zip(*grads, strict=True)]

    obstacle = KERNELS[op]["varlen"].obstacle(device)
    product = 4.0 * heads * head_size * sum(q * r for q, r in lengths) / (2 if own else 1)
    return Case(
        lambda g: [
            _randn(g, sum(n), count, head_size) for n, count in ((queries, heads), (rows, groups), (rows, groups))
        ],
        {
            "eager": of(load(op, "torch")),
            "torch.compile": "lengths are read on the host",
            "liger": "it has no such op",
            "ours": of(load(op, "varlen")) if obstacle is None else obstacle,
        },
        reference,
        flop=(product, 2.5 * product),
    )


_MAKERS: dict[str, Callable[..., Case]] = {
    "linear_cross_entropy": _linear_cross_entropy,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "norm_rope": _norm_rope,
    "splice": _splice,
    "shuffle_layer_norm": _shuffle_layer_norm,
    "attention": _attention,
}


def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """On a CPU without Inductor, whose C++ compiler takes longer than the bench: the harness alone is meant there."""
    torch.compiler.reset()  # or the shapes of the case before would make it compile for shapes that vary
    backend = "inductor" if device == "cuda" else "aot_eager"
    made: Callable[..., Any] = torch.compile(function, backend=backend, dynamic=False)
    return made


def relative(ours: Tensor, exact: Tensor) -> float:
    """Norm of the error by the norm of the tensor."""
    error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-12))
    return error if torch.isfinite(ours).all() else float("inf")


def check(case: Case, functions: dict[str, Callable[..., Any]], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """{provider: {"error", "wrong"}} against fp64, or {"failed"}; each from the same values, rounded to dtype."""
    generator = torch.Generator(device).manual_seed(11)
    leaves = [leaf.to(dtype) for leaf in case.leaves(generator)]
    exact: list[Tensor] = []
    cotangents: list[Tensor] = []

    def one(function: Callable[..., Any]) -> dict[str, Any]:
        own = [leaf.requires_grad_() for leaf in case.arrange([leaf.clone() for leaf in leaves])]
        outs = as_list(function(*own))
        if not exact:
            for out in outs:
                # Half the output is in it, so that the gradient of a gate, a sum over all entries, does not cancel out;
                # of a loss the training's own, 1.
                random = torch.randn(out.shape, generator=generator, device=device) + out.detach() / 2
                cotangents.append(random.to(dtype) if out.dim() else torch.ones((), device=device))
            for tensors in case.reference(leaves, cotangents):
                exact.extend(tensors)
        grads = torch.autograd.grad(outs, own, fitting(cotangents, outs))
        bounds = [TOLERANCE[dtype] if out.dim() else LOSS_TOLERANCE[dtype] for out in outs]
        bounds += [TOLERANCE[dtype]] * len(grads)
        errors = [relative(a.detach(), b) for a, b in zip([*outs, *grads], exact, strict=True)]
        wrong = any(not error <= bound for error, bound in zip(errors, bounds, strict=True))
        return {"error": max(errors), "wrong": wrong}

    found: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            found[name] = one(function)
        except Exception as error:
            found[name] = {"failed": _told(error)}
        free_all(device)
    return found


def _told(error: BaseException) -> str:
    return "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:300]


def measure(name: str, device: str) -> dict[str, Any]:
    """{provider: {"na"} | {"error", "wrong"} | {"failed"} | {"error", "forward", "backward", "both", "peak_mib"}}, and
    what the ceiling counts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = make_case(*CASES[device][name], device)
    functions: dict[str, Callable[..., Any]] = {}
    found: dict[str, Any] = {}
    for provider in PROVIDERS:
        function = case.run[provider]
        if isinstance(function, str):
            found[provider] = {"na": function}
        else:
            functions[provider] = _compiled(function, device) if provider == "torch.compile" else function
    found |= check(case, functions, device, dtype)
    timed = {n: f for n, f in functions.items() if "failed" not in found[n] and not found[n]["wrong"]}
    for provider, times in _timed(case, timed, device, dtype).items():
        found[provider] |= times
    return {"providers": found, "bytes": case.bytes, "flop": case.flop}


def _timed(case: Case, functions: dict[str, Callable[..., Any]], device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(12)
    leaves = [leaf.requires_grad_() for leaf in case.arrange([leaf.to(dtype) for leaf in case.leaves(generator)])]
    timer, cuda = Timer(device), device == "cuda"
    times: dict[str, dict[str, list[float]]] = {n: {"forward": [], "backward": [], "both": []} for n in functions}
    peaks: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    cotangents: list[Tensor] = []

    def both(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        outs = as_list(function(*leaves))
        return torch.autograd.grad(outs, leaves, fitting(cotangents, outs))

    begun, number = time.monotonic(), 0
    warm = 3 if cuda else 1
    while number < warm + ROUNDS[device]:
        if number >= warm + LEAST_ROUNDS[device] and time.monotonic() - begun > LIMIT_S:
            break
        names = [n for n in functions if n not in failed]
        for name in names[number % max(1, len(names)) :] + names[: number % max(1, len(names))]:
            function = functions[name]
            try:
                if not cotangents:
                    outs = as_list(function(*leaves))
                    cotangents = [torch.ones_like(out) for out in outs]
                    del outs
                if number == 1 and cuda:
                    torch.cuda.synchronize()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    both(function)
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                forward, outs = timer.time(lambda function=function: as_list(function(*leaves)))  # type: ignore[misc]
                given = fitting(cotangents, outs)
                backward, _ = timer.time(lambda outs=outs, given=given: torch.autograd.grad(outs, leaves, given))  # type: ignore[misc]
                del outs, given, _
                whole, _ = timer.time(lambda function=function: both(function))  # type: ignore[misc]
                del _
            except Exception as error:
                failed[name] = _told(error)
                free_all(device)
                continue
            if number >= warm:
                for part, value in (("forward", forward), ("backward", backward), ("both", whole)):
                    times[name][part].append(value)
        number += 1
    report: dict[str, Any] = {}
    for name in functions:
        if name in failed:
            report[name] = {"failed": failed[name]}
        else:
            report[name] = {part: spread(values) for part, values in times[name].items()} | {
                "peak_mib": peaks.get(name)
            }
    return report
