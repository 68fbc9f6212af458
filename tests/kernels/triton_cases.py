"""What is asked of each Triton kernel, run in the interpreter (see interpreter.py).

A case computes an op in fp64 with its PyTorch reference, and with the kernel in the type that is tested, from the same
values; it returns the largest error of each output and gradient relative to the largest value of that tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_train.errors import SetupError
from nvlm_train.kernels import linear_cross_entropy, norm_rope, rms_norm, shuffle_layer_norm, splice
from nvlm_train.model.nvlm import class_of
from tiny import make_batch, model_config, set_seeded

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert torch.isfinite(ours).all()
    if not theirs.numel():
        return 0.0
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-6))


def errors(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    leaves: list[Tensor],
    dtype: torch.dtype,
    scale: float = 1.0,
) -> dict[str, float]:
    """Errors of outputs ("out0", ...) and gradients ("grad0", ...) of `ours(*leaves)` in `dtype`.

    Both see the values rounded to dtype; a random cotangent tells outputs and their entries apart.
    """
    found = []
    rounded = [leaf.to(dtype) for leaf in leaves]
    for function, kind in ((ours, dtype), (reference, torch.float64)):
        own = [leaf.to(kind).clone().requires_grad_() for leaf in rounded]
        outs = function(*own)
        outs = outs if isinstance(outs, tuple) else (outs,)
        weights = randoms(99, *(tuple(out.shape) for out in outs))
        total = sum((out * w.to(kind).to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True)) * scale
        grads = torch.autograd.grad(total, own)
        found.append(([out.detach() for out in outs], grads))
    (out_a, grad_a), (out_b, grad_b) = found
    report = {f"out{i}": relative(a, b) for i, (a, b) in enumerate(zip(out_a, out_b, strict=True))}
    report |= {f"grad{i}": relative(a, b) for i, (a, b) in enumerate(zip(grad_a, grad_b, strict=True))}
    return report


# ---- linear cross-entropy


def _plain_cross_entropy(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda h, w: F.cross_entropy(h @ w.t(), targets, reduction="sum")


def linear_cross_entropy_errors(rows: int, width: int, vocabulary: int, dtype: str, at_once: int) -> dict[str, float]:
    """at_once: rows of a piece."""
    h, w = randoms(1, (rows, width), (vocabulary, width))
    targets = torch.arange(rows) * 7 % vocabulary
    targets[:1], targets[-1:] = 0, vocabulary - 1  # the first and the last column
    before = linear_cross_entropy.MAX_TRITON_LOGITS
    linear_cross_entropy.MAX_TRITON_LOGITS = at_once * vocabulary
    try:
        return errors(
            lambda h, w: linear_cross_entropy.triton_linear_cross_entropy(h, w, targets),
            _plain_cross_entropy(targets),
            [h, w / width**0.5],
            TYPES[dtype],
            0.3,
        )
    finally:
        linear_cross_entropy.MAX_TRITON_LOGITS = before


def linear_cross_entropy_details() -> None:
    """Zero rows, huge logits, one side frozen, no gradients, an alien memory layout, fp64 gradcheck."""
    entropy = linear_cross_entropy.triton_linear_cross_entropy
    h, w = randoms(2, (0, 6), (11, 6))
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = entropy(h, w, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0.0
    assert h.grad is not None and h.grad.shape == (0, 6) and w.grad is not None and not w.grad.any()

    h, w = (x.requires_grad_() for x in randoms(3, (5, 6), (11, 6)))
    targets = torch.tensor([0, 10, 3, 3, 7])
    with torch.no_grad():
        assert not entropy(h, w, targets).requires_grad
    huge = entropy(h * 1e4, w, targets)
    assert abs(huge.item() / _plain_cross_entropy(targets)(h * 1e4, w).item() - 1) < 1e-6
    whole = torch.autograd.grad(entropy(h, w, targets), (h, w))
    assert torch.equal(torch.autograd.grad(entropy(h, w.detach(), targets), h)[0], whole[0])
    assert torch.equal(torch.autograd.grad(entropy(h.detach(), w, targets), w)[0], whole[1])
    h, w = (x.double().requires_grad_() for x in randoms(4, (2, 3), (5, 3)))
    assert torch.autograd.gradcheck(lambda h, w: entropy(h, w, targets[:2] % 5), (h, w))


def liger_errors() -> dict[str, float]:
    """And no labelled row: loss 0, gradients of zero."""
    h, w = randoms(1, (7, 24), (67, 24))
    targets = torch.arange(7)
    liger = linear_cross_entropy.liger_linear_cross_entropy
    empty, own = h[:0].clone().requires_grad_(), w.clone().requires_grad_()
    liger(empty, own, targets[:0]).backward()
    assert own.grad is not None and not own.grad.any()
    return errors(lambda h, w: liger(h, w, targets), _plain_cross_entropy(targets), [h, w], torch.float32, 0.3)


# ---- RMSNorm


def rms_norm_errors(
    rows: tuple[int, ...], width: int, residual: bool, scale: str | None, dtype: str
) -> dict[str, float]:
    x, stream, weight, factor = randoms(6, (*rows, width), (*rows, width), (width,), (width,))
    weight, factor = 1 + weight / 4, (factor if scale == "vector" else factor[:1])
    if not residual:
        return errors(
            lambda x, w: rms_norm.triton_rms_norm(x, w, 1e-6),
            lambda x, w: rms_norm.torch_rms_norm(x, w, 1e-6),
            [x, weight],
            TYPES[dtype],
        )
    return errors(
        lambda x, r, w, *s: rms_norm.triton_add_rms_norm(x, r, w, 1e-6, *s),
        lambda x, r, w, *s: rms_norm.torch_add_rms_norm(x, r, w, 1e-6, *s),
        [x, stream, weight, *([] if scale is None else [factor])],
        TYPES[dtype],
    )


def rms_norm_details() -> None:
    """Frozen weights, alien memory layouts, one output unused, a gate of 0, too wide a row, fp64 gradcheck."""
    x, r, w, s = randoms(7, (6, 12), (6, 12), (12,), (12,))
    add = rms_norm.triton_add_rms_norm
    turned = x.t().contiguous().t().requires_grad_()
    y = rms_norm.triton_rms_norm(turned, w, 1e-6)
    assert torch.equal(y, rms_norm.triton_rms_norm(x, w, 1e-6))
    (grad,) = torch.autograd.grad(y.square().sum(), turned)
    own = x.clone().requires_grad_()
    (other,) = torch.autograd.grad(rms_norm.triton_rms_norm(own, w, 1e-6).square().sum(), own)
    assert torch.equal(grad, other)
    assert torch.equal(add(x, r, w, 1e-6, torch.zeros(1))[0], r)

    w = w.requires_grad_()
    leaves = [leaf.clone().requires_grad_() for leaf in (x, r)]
    for output in (0, 1):  # the other output has no gradient
        ours = torch.autograd.grad(add(*leaves, w, 1e-6, s)[output].sum(), [*leaves], allow_unused=True)
        theirs = torch.autograd.grad(rms_norm.torch_add_rms_norm(*leaves, w, 1e-6, s)[output].sum(), [*leaves])
        for a, b in zip(ours, theirs, strict=True):
            assert a is not None and relative(a, b) < 1e-5
    try:
        rms_norm.triton_rms_norm(torch.ones(1, 20000), torch.ones(20000), 1e-6)
        raise AssertionError("a row of 20000 was taken")
    except SetupError as error:
        assert "at most 16384, this one has 20000" in str(error)
    x, r, w, s = (t.double().requires_grad_() for t in randoms(8, (2, 3), (2, 3), (3,), (3,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.triton_rms_norm(x, w, 1e-6), (x, w))
    assert torch.autograd.gradcheck(lambda x, r, w, s: add(x, r, w, 1e-6, s), (x, r, w, s))


# ---- RMSNorm of queries and keys, rotary positions


def norm_rope_errors(heads: int, head_size: int, norm: bool, rope: bool, dtype: str) -> dict[str, float]:
    """The middle part of rows that hold three."""
    rows, width = 7, heads * head_size
    x, weight, angles = randoms(9, (rows, 3 * width), (width,), (rows, head_size // 2))
    angles = torch.cat((angles, angles), 1)

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            cos, sin = (t.to(TYPES[dtype]).to(x.dtype) for t in (angles.cos(), angles.sin()))
            turn = (cos, sin) if rope else (None, None)
            return function(x[:, width : 2 * width], weights[0] if norm else None, *turn, head_size, 1e-6)

        return run

    leaves = [x, 1 + weight / 4] if norm else [x]
    return errors(of(norm_rope.triton_norm_rope), of(norm_rope.torch_norm_rope), leaves, TYPES[dtype])


def norm_rope_details() -> None:
    """Angle 0 changes nothing, no row, a frozen weight, too wide a row, fp64 gradcheck."""
    turn = norm_rope.triton_norm_rope
    x, w, angles = (t.double().requires_grad_() for t in randoms(10, (2, 8), (8,), (2, 2)))
    one, none = torch.ones(2, 4).double(), torch.zeros(2, 4).double()
    assert torch.equal(turn(x, None, one, none, 4, 0.0), x)
    assert turn(x[:0], w, None, None, 4, 1e-6).shape == (0, 8)
    frozen = torch.autograd.grad(turn(x, w.detach(), None, None, 4, 1e-6).sum(), x)
    assert torch.equal(frozen[0], torch.autograd.grad(turn(x, w, None, None, 4, 1e-6).sum(), x)[0])
    for width, head_size, message in ((20000, 100, "at most 16384"), (15, 5, "even head sizes, this one is 5")):
        try:
            turn(torch.ones(1, width), torch.ones(width), None, None, head_size, 0.0)
            raise AssertionError(f"a row of {width} was taken")
        except SetupError as error:
            assert message in str(error)
    angles = torch.cat((angles, angles), 1).detach()
    assert torch.autograd.gradcheck(lambda x, w: turn(x, w, angles.cos(), angles.sin(), 4, 1e-6), (x, w))


# ---- image features between tokens


def splice_cases() -> None:
    """Bit for bit the reference, in forward and backward: images, none, no row, frozen sides, wide and odd rows."""
    put, reference = splice.triton_splice, splice.torch_splice
    for rows, width, vocabulary, images, dtype in (
        (9, 7, 5, 4, torch.float32),
        (9, 1024 + 16, 5, 4, torch.bfloat16),
        (6, 8, 5, 0, torch.float32),  # features that nothing takes
        (0, 8, 5, 0, torch.float32),
        (4, 8, 5, 4, torch.float64),  # images alone
    ):
        table, features, cotangent = (
            t.to(dtype) for t in randoms(11, (vocabulary, width), (images + 2, width), (rows, width))
        )
        ids = torch.arange(rows) * 3 % vocabulary
        slots = torch.full((rows,), -1)
        slots[torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:images]] = torch.arange(images) + 1
        table, features = table.requires_grad_(), features.requires_grad_()
        ours, theirs = (f(ids, slots, table, features) for f in (put, reference))
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad(out, (table, features), cotangent) for out in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        half = put(ids, slots, table.detach(), features)
        assert torch.equal(torch.autograd.grad(half, features, cotangent)[0], grads[0][1])
        half = put(ids, slots, table, features.detach())
        assert torch.equal(torch.autograd.grad(half, table, cotangent)[0], grads[0][0])
        (tokens,) = (t.to(dtype).requires_grad_() for t in randoms(16, (rows, width)))  # embedded already
        ours, theirs = (f(None, slots, tokens, features) for f in (put, reference))
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad(out, (tokens, features), cotangent) for out in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- pixel shuffle and LayerNorm


def shuffle_layer_norm_errors(tiles: int, side: int, width: int, dtype: str) -> dict[str, float]:
    """side: patches along the edge of a tile. The gradients are the norm's; the tower is frozen."""
    features, weight, bias = randoms(12, (tiles, side * side, width), (4 * width,), (4 * width,))
    features = 3 + 2 * features.to(TYPES[dtype])  # far from centred
    features = features.to(TYPES[dtype])

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda w, b: function(features.to(w.dtype), w, b, 1e-6)

    return errors(
        of(shuffle_layer_norm.triton_shuffle_layer_norm),
        of(shuffle_layer_norm.torch_shuffle_layer_norm),
        [1 + weight / 4, bias],
        TYPES[dtype],
    )


def shuffle_layer_norm_details() -> None:
    """No tile, a trained tower, a part of a larger tensor, too wide a row, fp64 gradcheck."""
    join, reference = shuffle_layer_norm.triton_shuffle_layer_norm, shuffle_layer_norm.torch_shuffle_layer_norm
    features, w, b = (t.requires_grad_() for t in randoms(13, (2, 17, 3), (12,), (12,)))
    part = features[:, 1:]
    y = join(part.detach(), w, b, 1e-6)
    assert relative(y, reference(part, w, b, 1e-6)) < 1e-6
    trained = [torch.autograd.grad(f(part, w, b, 1e-6).square().sum(), features)[0] for f in (join, reference)]
    assert torch.equal(*trained)
    grads = torch.autograd.grad(join(part[:0].detach(), w, b, 1e-6).sum(), (w, b))
    assert not grads[0].any() and not grads[1].any()
    try:
        join(torch.ones(1, 4, 5000), torch.ones(20000), torch.ones(20000), 1e-6)
        raise AssertionError("a row of 20000 was taken")
    except SetupError as error:
        assert "at most 16384" in str(error)
    w, b = (t.detach().double().requires_grad_() for t in (w, b))
    one = part[:1, :4].detach().double()
    assert torch.autograd.gradcheck(lambda w, b: join(one, w, b, 1e-6), (w, b))


# ---- all of them in the model


def whole_model(architecture: str, recompute: str, tower: str) -> dict[str, float]:
    """Loss and every gradient with the kernels, against the same model in plain PyTorch, in fp32.

    tower: "trained"; "frozen", so that pixel shuffle and norm are one; or "no image" in the batch.
    """
    config = model_config(architecture)
    samples = {"trained": [(5, 1), (4, 0)], "frozen": [(5, 2), (4, 0)], "no image": [(5, 0), (4, 0)]}[tower]
    batch = make_batch(samples, 3, architecture=architecture)
    (features,) = randoms(14, (len(batch.tiles), 16, config.vision.hidden_size))
    found = []
    for name in ("triton", "torch"):
        frozen = tower == "frozen"
        model = class_of(config)(config, with_vision=not frozen, activation_checkpointing=recompute, kernels=name)
        set_seeded(model, 3)
        loss = model(batch, features if frozen else None)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    return {n: relative(found[0][n], found[1][n]) for n in found[1]}


# ---- what torch.library knows of them


def check_operator(name: str, *arguments: Any) -> None:
    """torch's own checks of a registered operator: schema, and the fake implementation against the real one."""
    torch.library.opcheck(
        getattr(torch.ops.nvlm_train, name).default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def compiled() -> None:
    """torch.compile makes one graph of each op, forward and backward, with the same bits."""
    x, r, w, s = randoms(15, (4, 12), (4, 12), (12,), (12,))
    bias, table, angles = torch.zeros(12), r, torch.cat([s[:2].expand(4, 2)] * 2, 1)
    ids, slots = torch.tensor([0, 1, 2, 3]), torch.tensor([-1, 0, 2, -1])
    features = x.view(1, 16, 3)
    functions: list[tuple[Callable[..., Any], list[Tensor]]] = [
        (lambda x, w: rms_norm.triton_rms_norm(x, w, 1e-6), [x, w]),
        (lambda x, r, w, s: rms_norm.triton_add_rms_norm(x, r, w, 1e-6, s)[1], [x, r, w, s]),
        (lambda x, w: norm_rope.triton_norm_rope(x, w, angles.cos(), angles.sin(), 4, 1e-6), [x, w]),
        (lambda t, f: splice.triton_splice(ids, slots, t, f), [table, x]),
        (lambda w, b: shuffle_layer_norm.triton_shuffle_layer_norm(features, w, b, 1e-6), [w, bias]),
        (lambda h, w: linear_cross_entropy.triton_linear_cross_entropy(h, w, ids), [x, r]),
    ]
    for function, leaves in functions:
        results = []
        for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            out = run(*own)
            results.append((out, *torch.autograd.grad(out.sum(), own)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(functions)  # nothing was run as it is


def operators() -> None:
    h, w = randoms(5, (4, 6), (11, 6))
    for needs in ((True, True), (False, True), (True, False), (False, False)):
        check_operator("linear_cross_entropy", h.bfloat16(), w.bfloat16(), torch.tensor([0, 3, 3, 10]), *needs)
    x, r, s = randoms(5, (2, 3, 6), (2, 3, 6), (6,))
    w, rstd = torch.ones(6), torch.ones(6)
    check_operator("rms_norm", x, None, w, None, 1e-6)
    for scale in (None, s, s[:1]):
        check_operator("rms_norm", x, r, w, scale, 1e-6)
        for need in (True, False):
            check_operator("rms_norm_backward", x, r, r, rstd, w, None if scale is None else x, scale, need)
            check_operator("rms_norm_backward", x, None, r, rstd, w, None, scale, need)
    x, w, angles, rstd = randoms(5, (3, 12), (12,), (3, 4), (3,))
    for weight, cos in ((w, None), (None, angles), (w, angles)):
        check_operator("norm_rope", x, weight, cos, cos, 4, 1e-6, 1.0)
        if weight is not None:
            for need in (True, False):
                check_operator("norm_rope_backward", x, x, weight, cos, cos, rstd, 4, need)
    ids, slots = torch.tensor([0, 1, 1]), torch.tensor([-1, 1, -1])
    table, features, cotangent = randoms(5, (3, 4), (2, 4), (3, 4))
    check_operator("splice", ids, slots, table, features)
    for need in (True, False):
        for own in (ids, None):
            check_operator("splice_backward", cotangent, own, slots, 3, 2, need)
    features, w, b, rstd, dy = randoms(5, (2, 4, 3), (12,), (12,), (2,), (2, 12))
    check_operator("shuffle_layer_norm", features, w, b, 1e-6)
    check_operator("shuffle_layer_norm_backward", dy, features, rstd, rstd)
