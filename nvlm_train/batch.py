"""The one thing that the data pipeline and the model share.

Legend of the shape letters used in every comment of this package:

    B  rows in a micro batch (a row is one pack)      D  decoder width
    S  tokens per row, padding included               N  attention heads        K  key/value heads
    G  segments: samples (and paddings) in a batch    H  head size              F  feed-forward width
    T  tiles in a micro batch                         V  vocabulary             E  vision width
    P  patches per tile                               Q  image tokens per tile

and, where cross-attention layers read tiles (nvlm_x, nvlm_h; see `Memory`):

    M  rows of the memory                             U  tokens that read something of it
    C  runs of such tokens                            W  memory rows, counted once for each run that reads them
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
class Memory:
    """What the cross-attention layers of a micro batch read, and who reads what: no T x S mask anywhere.

    The memory is the image tokens of tiles, sample after sample; in nvlm_h each tile's tag stands before it. A run is
    consecutive tokens that see the same range of it. Tokens that see nothing are in no run and pass unchanged.

    ids, slots: i64[M] what input_ids and image_slots are for the sequence: a row takes image token `slots`, or, where
        that is -1, is the tag token `ids`. Both are empty in nvlm_x: its memory is the image tokens [T*Q] as they are.
    query_rows: i64[U] the tokens that read, in the B*S flattened ones, ascending, none twice.
    cu_queries: i32[C+1] where runs begin in query_rows; the first is 0, the last U.
    rows: i64[W] memory rows, run by run. cu_rows: i32[C+1] where runs begin in it.
    max_queries, max_rows: of the longest run; 0 where there is none.

    Example, nvlm_x, 2 tiles of Q = 2 image tokens, 7 tokens: start, <Image>, <tile_1>, <tile_2>, </Image>, why, end.
    A tag sees its own tile, what follows the image sees both (row = token, x = sees):

        start    . . . .
        <Image>  . . . .     query_rows [2 3 4 5 6]     cu_queries [0 1 2 5]
        <tile_1> x x . .     rows       [0 1 2 3 0 1 2 3]  cu_rows [0 2 4 8]
        <tile_2> . . x x
        </Image> x x x x
        why      x x x x
        end      x x x x
    """

    ids: Tensor
    slots: Tensor
    query_rows: Tensor
    cu_queries: Tensor
    rows: Tensor
    cu_rows: Tensor
    max_queries: int
    max_rows: int

    def with_each(self, change: Callable[[Tensor], Tensor]) -> Memory:
        """The same with every tensor changed."""
        names = ("ids", "slots", "query_rows", "cu_queries", "rows", "cu_rows")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


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
    image_slots: i64[B, S] row of the flattened image tokens [T*Q] that this position takes, or -1 for text; in nvlm_x
        -1 everywhere, in nvlm_h only thumbnails (and an image's only tile) are in the sequence.
    num_trained_tokens: how many labels differ from IGNORE_INDEX.
    num_tile_chunks: how often every rank runs a tower that lives inside the engine in this micro-step.
    samples: the draws in this batch, dropped ones left out.
    tile_hashes: a hash of the pixels of each tile, T of them, or none where nothing asks for them.
    memory: what cross-attention reads; None in nvlm_d.
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
    memory: Memory | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device` (copied without waiting where the memory is pinned)."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies without the CPU waiting."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "labels", "position_ids", "cu_seqlens", "tiles", "image_slots")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        memory = None if self.memory is None else self.memory.with_each(change)
        return replace(self, **changed, memory=memory)
