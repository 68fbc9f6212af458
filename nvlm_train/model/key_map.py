"""Our tensor names and shapes <-> those of the published NVLM-D-72B repository, in both directions.

NVLM-X and NVLM-H were never published: their cross-attention keeps our names, everything else is named as in NVLM-D.

Two things differ. The projector is called `mlp1` and numbered, and the vision tower's attention is stored with 7
all-zero heads behind the real ones (25 + 7 = 32 in the 6B tower): its authors trained on 8-way tensor parallel and 25
heads do not divide by 8. vLLM hard-codes those 7, so every tower is exported with them, whatever its size.

With E the tower's width, d its head size and W = E + 7 d (3200, 128 and 4096 at full size):

    attn.qkv.weight     ours [3E, E]   published [3W, E]   each third: E real rows, then 7 d zero rows; so its bias
    attn.q/k_norm.weight     [E]                 [W]       E real values, then zeros
    attn.proj.weight         [E, E]              [E, W]    E real columns, then zeros

A dummy head's scores are all zero and its values are zero, so it adds nothing. Five-element picture of one third of
qkv with 2 real rows a, b and 1 dummy head of size 1:  ours a b,  published a b 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvlm_train.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from nvlm_train.recipe.schema import Model, Vision

NUM_DUMMY_HEADS = 7

Part = tuple[int, list[tuple[int, int]]]  # of a tensor: what the ranges [begin, end) of one dimension hold

_OURS_TO_PUBLISHED = {
    "projector.norm.weight": "mlp1.0.weight",
    "projector.norm.bias": "mlp1.0.bias",
    "projector.fc1.weight": "mlp1.1.weight",
    "projector.fc2.weight": "mlp1.3.weight",
}
_PUBLISHED_TO_OURS = {published: ours for ours, published in _OURS_TO_PUBLISHED.items()}
_OURS_TO_PUBLISHED["projector.fc.weight"] = "mlp1.1.weight"  # NVLM-X's only one
_SAME_NAME = ("vision_model.", "cross_attention.", "language_model.")
LM_HEAD = "language_model.lm_head.weight"


def to_published(name: str) -> str:
    """The published name of our tensor `name`; CheckpointError for a name that is not ours."""
    if name in _OURS_TO_PUBLISHED:
        return _OURS_TO_PUBLISHED[name]
    if name.startswith(_SAME_NAME):
        return name
    raise CheckpointError(
        f"tensor {name!r} has no place in the published NVLM-D layout: names begin with vision_model., projector., "
        "cross_attention. or language_model."
    )


def from_published(name: str, architecture: str = "nvlm_d") -> str:
    """Our name of the published tensor `name`; CheckpointError for a name that is not in the layout."""
    if architecture == "nvlm_x" and name == "mlp1.1.weight":
        return "projector.fc.weight"
    if name in _PUBLISHED_TO_OURS:
        return _PUBLISHED_TO_OURS[name]
    if name.startswith(_SAME_NAME):
        return name
    raise CheckpointError(
        f"tensor {name!r} is not part of the published NVLM-D layout: names begin with vision_model., mlp1. or "
        "language_model."
    )


def padded_width(vision: Vision, num_dummy_heads: int = NUM_DUMMY_HEADS) -> int:
    """W, the attention width of the tower with its dummy heads; 4096 for the 6B tower."""
    head_size = vision.hidden_size // vision.num_attention_heads
    return vision.hidden_size + num_dummy_heads * head_size


def published_shape(
    name: str, shape: tuple[int, ...], vision: Vision, num_dummy_heads: int = NUM_DUMMY_HEADS
) -> tuple[int, ...]:
    """The published shape of our tensor `name` of `shape`."""
    width = padded_width(vision, num_dummy_heads)
    kind = padded_kind(name)
    if kind == "qkv":
        return (3 * width, *shape[1:])
    if kind == "norm":
        return (width,)
    if kind == "proj":
        return (shape[0], width)
    return shape


def pad(name: str, tensor: Tensor, vision: Vision, num_dummy_heads: int = NUM_DUMMY_HEADS) -> Tensor:
    """Our tensor `name` as published: the dummy heads appended as zeros where it is part of the tower's attention."""
    import torch

    kind = padded_kind(name)
    extra = padded_width(vision, num_dummy_heads) - vision.hidden_size  # 7 d
    if kind == "qkv":
        thirds = tensor.reshape(3, vision.hidden_size, -1)  # [3, E, E], of the bias [3, E, 1]
        return torch.nn.functional.pad(thirds, (0, 0, 0, extra)).reshape(-1, *tensor.shape[1:])  # [3W, E] or [3W]
    if kind in ("norm", "proj"):
        return torch.nn.functional.pad(tensor, (0, extra))  # [W] or [E, W]
    return tensor


def real_part(name: str, vision: Vision, num_dummy_heads: int = NUM_DUMMY_HEADS) -> Part | None:
    """Which part of the published tensor `name` (our name) is not of dummy heads; None: all of it."""
    kind, real, width = padded_kind(name), vision.hidden_size, padded_width(vision, num_dummy_heads)
    if kind is None or not num_dummy_heads:
        return None
    return {
        "qkv": (0, [(0, real), (width, width + real), (2 * width, 2 * width + real)]),
        "norm": (0, [(0, real)]),
        "proj": (1, [(0, real)]),
    }[kind]


def unpad(name: str, tensor: Tensor, vision: Vision, num_dummy_heads: int = NUM_DUMMY_HEADS) -> Tensor:
    """The published tensor `name` (our name) without its dummy heads: the inverse of `pad`.

    Says nothing about what the dummy heads held; `check_dummy_heads` does.
    """
    import torch

    part = real_part(name, vision, num_dummy_heads)
    if part is None:
        return tensor
    dimension, ranges = part
    return torch.cat([tensor.narrow(dimension, begin, end - begin) for begin, end in ranges], dimension)


def unpadded_shape(
    name: str, shape: tuple[int, ...], vision: Vision, num_dummy_heads: int = NUM_DUMMY_HEADS
) -> tuple[int, ...]:
    """Our shape of the published tensor `name` (our name) of `shape`; one that is not the published one as it is."""
    part = real_part(name, vision, num_dummy_heads)
    if part is None or len(shape) <= part[0]:
        return shape
    dimension, ranges = part
    ours = (*shape[:dimension], sum(end - begin for begin, end in ranges), *shape[dimension + 1 :])
    return ours if published_shape(name, ours, vision, num_dummy_heads) == shape else shape


def check_dummy_heads(layer: str, qkv: Tensor, proj: Tensor, vision: Vision) -> None:
    """CheckpointError unless the dummy heads of a published layer add nothing to its output.

    layer: the name for the message. qkv: [3W, E] and proj: [E, W] as published. A channel of a dummy head is harmless
    when its value row or its projection column is zero; query and key rows do not matter. Where it is not, readers
    disagree (the released training code zeroes these heads' output, the published model does not), so cutting it off
    is refused.
    """
    width, real = len(qkv) // 3, vision.hidden_size
    used = (qkv[2 * width + real :] != 0).any(dim=1)  # [7d] of the value rows
    if not bool(used.any()):  # as in every published file: the projection, a page a column, is not read
        return
    harmful = used & (proj[:, real:] != 0).any(dim=0)  # [7d]
    if bool(harmful.any()):
        raise CheckpointError(
            f"{layer}: {int(harmful.sum())} of {width - real} channels of the dummy attention heads (behind the "
            f"{vision.num_attention_heads} real ones) hold non-zero values and non-zero projection columns, so cutting "
            "them off would change the tower; they must be zero in one of the two"
        )


def model_from_recipe(recipe: dict[str, Any]) -> Model:
    """The model section of a recipe in dictionary form; CheckpointError when this version cannot read it."""
    from pydantic import ValidationError

    from nvlm_train.recipe.schema import Model

    try:
        return Model.model_validate(recipe["model"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"the checkpoint's recipe has no `model` section that this version can read: {error}"
        ) from None


def padded_kind(name: str) -> str | None:
    """ "qkv", "norm" or "proj" for a tensor of the tower's attention that dummy heads make larger, else None."""
    if not name.startswith("vision_model.encoder.layers."):
        return None
    if name.endswith((".attn.qkv.weight", ".attn.qkv.bias")):
        return "qkv"
    if name.endswith((".attn.q_norm.weight", ".attn.k_norm.weight")):
        return "norm"
    if name.endswith(".attn.proj.weight"):
        return "proj"
    return None
