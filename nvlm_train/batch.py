"""The one thing that the data pipeline and the model share.

Legend of the shape letters used in every comment of this package:

    B  rows in a micro batch (a row is one pack)      D  decoder width
    S  tokens per row, padding included               N  attention heads        K  key/value heads
    G  segments: samples (and paddings) in a batch    H  head size              F  feed-forward width
    T  tiles in a micro batch                         V  vocabulary             E  vision width
    P  patches per tile                               Q  image tokens per tile
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the loader process lays batches out without torch: it starts in half a second and stays small
    import torch
    from torch import Tensor

IGNORE_INDEX = -100  # a label that carries no loss


class SampleRef(NamedTuple):
    """One draw of the mixture: row `row` of source `source`, seen for the (`epoch`+1)-th time."""

    source: str
    row: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """One micro batch of packed samples. Attention stays inside a segment; a segment never crosses a row.

    input_ids: i64[B, S] token ids; an image token holds the placeholder id, a padding token the pad id.
    labels: i64[B, S] already shifted: `labels[b, t]` is what position t must predict, or IGNORE_INDEX.
    position_ids: i64[B, S] start again at 0 with each segment.
    cu_seqlens: i32[G+1] where segments begin in the B*S flattened tokens; the first is 0, the last B*S.
        Example, one row of 7 with samples of 3 and 2 tokens and 2 tokens of padding: [0, 3, 5, 7].
    max_seqlen: length of the longest segment.
    tiles: u8[T, 3, px, px] RGB tiles of all images in order of appearance; T may be 0.
    image_slots: i64[B, S] row of the flattened image tokens [T*Q] that this position takes, or -1 for text.
    num_trained_tokens: how many labels differ from IGNORE_INDEX.
    num_tile_chunks: how often every rank runs a tower that lives inside the engine in this micro-step.
    samples: the draws in this batch, dropped ones left out.
    tile_hashes: a hash of the pixels of each tile, T of them, or none where nothing asks for them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    tiles: Tensor
    image_slots: Tensor
    num_trained_tokens: int
    num_tile_chunks: int = 0
    samples: tuple[SampleRef, ...] = field(default=())
    tile_hashes: tuple[bytes, ...] = field(default=())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device` (copied without waiting where the memory is pinned)."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies without the CPU waiting."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "labels", "position_ids", "cu_seqlens", "tiles", "image_slots")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)
