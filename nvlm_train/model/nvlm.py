"""NVLM-D: tower, pixel shuffle, projector, and a decoder whose sequence takes the image tokens in."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nvlm_train.batch import Batch
from nvlm_train.model.decoder import LanguageModel
from nvlm_train.model.projector import Projector, pixel_shuffle
from nvlm_train.model.vision import InternVit, encode_tiles
from nvlm_train.recipe import schema


class NvlmD(nn.Module):
    """All image tokens enter the decoder's sequence, in the places that `Batch.image_slots` names.

    Every forward makes the same module calls in the same order, whatever the batch holds, so that ranks with and
    without images stay together under ZeRO-3: the projector runs exactly once, a tower inside runs
    `batch.num_tile_chunks` times, and no trained weight is ever left without a gradient.

    config: architecture and sizes. with_vision: False leaves the tower out; the caller then brings `features`.
    activation_checkpointing: "full" recomputes each decoder layer in backward.
    tiles_per_chunk: tiles that go through the tower at once. kernels: "auto", or "torch" for plain PyTorch.
    """

    def __init__(
        self,
        config: schema.Model,
        *,
        with_vision: bool = True,
        activation_checkpointing: Literal["none", "full"] = "none",
        tiles_per_chunk: int = 16,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.tiles_per_chunk = tiles_per_chunk
        if with_vision:
            self.vision_model = InternVit(config.vision)
        self.projector = Projector(config)
        self.language_model = LanguageModel(
            config.language_model, activation_checkpointing=activation_checkpointing == "full", kernels=kernels
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
        embedded = self.language_model.model.embed_tokens(batch.input_ids)  # [B, S, D]
        # Text positions read row 0 and drop it again: no search for the image positions, so no wait for the device,
        # and image tokens that nothing takes get a gradient of exactly zero.
        taken = nn.functional.embedding(batch.image_slots.clamp(min=0), image_tokens)  # [B, S, D]
        x = torch.where((batch.image_slots >= 0).unsqueeze(-1), taken, embedded)  # [B, S, D]
        return self.language_model.model(x, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)  # [B, S, D]

    def _projector_input(self, batch: Batch, features: Tensor | None) -> Tensor:
        """[T*Q, 4E], or one row of zeros, which no slot takes, where there is no image."""
        dtype = next(self.projector.parameters()).dtype
        if features is None and hasattr(self, "vision_model"):
            # A trained tower makes at least one call, also where no rank has a tile: a trained weight that nothing uses
            # in a step would get the gradient of the step before under ZeRO-3.
            least = int(next(self.vision_model.parameters()).requires_grad)
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
        return pixel_shuffle(features).flatten(0, 1)  # [T*Q, 4E]
