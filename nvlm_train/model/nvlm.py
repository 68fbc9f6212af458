"""The NVLM models: tower, pixel shuffle, projector and decoder, and the three ways from the one to the other.

NVLM-D   all image tokens enter the decoder's sequence
NVLM-X   none does: gated cross-attention layers read them
NVLM-H   those of the thumbnail do, and cross-attention reads the other tiles
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from nvlm_train.batch import Batch, Memory
from nvlm_train.model.cross_attention import CrossAttention
from nvlm_train.model.decoder import LanguageModel
from nvlm_train.model.projector import LinearProjector, Projector
from nvlm_train.model.vision import InternVit, encode_tiles
from nvlm_train.recipe import schema


class Nvlm(nn.Module):
    """What the three have in common; use one of them.

    projector_type: its projector. reads_tiles: whether it has cross-attention layers.

    Every forward makes the same module calls in the same order, whatever the batch holds, so that ranks with and
    without images stay together under ZeRO-3: the projector runs exactly once, so does each cross-attention layer, a
    tower inside runs `batch.num_tile_chunks` times, and no trained weight is ever left without a gradient.

    config: architecture and sizes. with_vision: False leaves the tower out; the caller then brings `features`.
    activation_checkpointing: what is computed again in backward, see `model.recompute`.
    tiles_per_chunk: tiles that go through the tower at once. kernels: "auto", or "torch" for plain PyTorch.
    """

    projector_type: ClassVar[type[nn.Module]] = Projector
    reads_tiles: ClassVar[bool] = False

    def __init__(
        self,
        config: schema.Model,
        *,
        with_vision: bool = True,
        activation_checkpointing: str = "none",
        tiles_per_chunk: int = 16,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.tiles_per_chunk = tiles_per_chunk
        if with_vision:
            self.vision_model = InternVit(config.vision, activation_checkpointing, kernels)
        self.projector = self.projector_type(config, kernels)
        if self.reads_tiles:
            self.cross_attention = CrossAttention(config, kernels)
        self.language_model = LanguageModel(
            config.language_model, activation_checkpointing=activation_checkpointing, kernels=kernels
        )

    def forward(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """The loss of a micro batch.

        features: [T, P, E] of `encode_tiles` for `batch.tiles`; needed where the tower is left out and T > 0.
        Returns fp32 scalar: the sum of the cross-entropy over all labels but IGNORE_INDEX; 0.0, with zero gradients,
        where there is none.
        """
        return self.language_model.lm_head(self._hidden(batch, features), batch.labels, batch.num_trained_tokens)

    def logits(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """The logits of every position, [B, S, V] in the weights' type."""
        return self.language_model.lm_head(self._hidden(batch, features))

    def _hidden(self, batch: Batch, features: Tensor | None) -> Tensor:
        image_tokens = self.projector(self._projector_input(batch, features))  # [T*Q or 1, D]
        return self._decode(batch, image_tokens)  # [B, S, D]

    def _decode(self, batch: Batch, image_tokens: Tensor) -> Tensor:
        """image_tokens: [T*Q, D], or one row that nothing takes -> [B, S, D], normalised."""
        raise NotImplementedError

    def _run_decoder(self, x: Tensor, batch: Batch, memory: Tensor | None = None) -> Tensor:
        """x: [B, S, D]; memory: [M, D] for cross-attention -> [B, S, D], normalised."""
        decoder, where = self.language_model.model, (batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        if memory is None:
            return decoder(x, *where)
        readers = self.cross_attention.readers(memory, _memory_of(batch))
        return decoder(x, *where, readers, self.config.cross_attention.place)

    def _projector_input(self, batch: Batch, features: Tensor | None) -> Tensor:
        """Patches [T, P, E], or one joined row of zeros, [1, 4E], which no slot takes, where there is no image."""
        dtype = next(self.projector.parameters()).dtype
        if features is None and hasattr(self, "vision_model"):
            # A trained tower makes at least one call, also where no rank has a tile: a trained weight that nothing uses
            # in a step would get the gradient of the step before under ZeRO-3.
            least = int(any(p.requires_grad for p in self.vision_model.parameters()))
            features = encode_tiles(
                self.vision_model,
                batch.tiles,
                dtype,
                tiles_per_chunk=self.tiles_per_chunk,
                num_chunks=max(least, batch.num_tile_chunks or -(-len(batch.tiles) // self.tiles_per_chunk)),
            )  # [T (+ zero tiles), P, E]
        if features is None and len(batch.tiles):
            raise ValueError(
                f"the batch has {len(batch.tiles)} tiles, but this model was built without its tower: pass features"
            )
        if features is None or not len(features):
            width = 4 * self.config.vision.hidden_size
            return torch.zeros(1, width, dtype=dtype, device=batch.input_ids.device)  # [1, 4E]
        return features  # [T, P, E]


class NvlmD(Nvlm):
    """All image tokens enter the decoder's sequence, in the places that `Batch.image_slots` names."""

    def _decode(self, batch: Batch, image_tokens: Tensor) -> Tensor:
        embed = self.language_model.model.embed_tokens.with_images
        x = embed(batch.input_ids, batch.image_slots, image_tokens)  # [B, S, D]
        return self._run_decoder(x, batch)  # [B, S, D]


class NvlmX(Nvlm):
    """No image token enters the sequence: cross-attention layers read them as `Batch.memory` says."""

    projector_type = LinearProjector
    reads_tiles = True

    def _decode(self, batch: Batch, image_tokens: Tensor) -> Tensor:
        embedded = self.language_model.model.embed_tokens(batch.input_ids)  # [B, S, D]
        return self._run_decoder(embedded, batch, image_tokens)  # [B, S, D]


class NvlmH(Nvlm):
    """Image tokens of thumbnails enter the sequence; cross-attention layers read the other tiles, a tag before each."""

    reads_tiles = True

    def _decode(self, batch: Batch, image_tokens: Tensor) -> Tensor:
        memory = _memory_of(batch)
        ids = torch.cat((batch.input_ids.flatten(), memory.ids))  # [B*S + M]
        slots = torch.cat((batch.image_slots.flatten(), memory.slots))  # [B*S + M]
        embed = self.language_model.model.embed_tokens.with_images
        embedded = embed(ids, slots, image_tokens)  # [B*S + M, D]; one call: one gather under ZeRO-3
        x, rows = embedded.split((batch.input_ids.numel(), len(memory.ids)))  # [B*S, D], [M, D]
        if not len(rows):  # one row of zeros, which nothing reads: the layers run all the same
            rows = x.new_zeros(1, x.shape[1])  # [1, D]
        return self._run_decoder(x.view(*batch.input_ids.shape, -1), batch, rows)  # [B, S, D]


CLASSES: dict[str, type[Nvlm]] = {"nvlm_d": NvlmD, "nvlm_x": NvlmX, "nvlm_h": NvlmH}


def class_of(config: schema.Model) -> type[Nvlm]:
    """The class of the recipe's architecture."""
    return CLASSES[config.architecture]


def _memory_of(batch: Batch) -> Memory:
    if batch.memory is None:
        raise ValueError("the batch was laid out for nvlm_d: it says nothing of what cross-attention reads")
    return batch.memory
