"""What goes into the loss of a step and of a validation alike.

Loss = sum of cross-entropy over the trained tokens of the whole step / their number, over all ranks and micro-steps.
A mean of the micro-steps' means would weigh a token by how full its micro-step is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvlm_train.batch import Batch
from nvlm_train.model.nvlm import encode_tiles
from nvlm_train.train.feature_cache import FeatureCache


def tower_features(
    tower: Any, batch: Batch, dtype: torch.dtype, tiles_per_chunk: int, cache: FeatureCache | None = None
) -> Tensor | None:
    """Features of the batch's tiles from a frozen tower outside the engine: [T, P, E]; None when it is inside.

    cache: where known tiles are read from instead of computed.
    """
    if tower is None:
        return None
    with torch.no_grad():
        if cache is not None:
            return cache.encode(tower, batch, tiles_per_chunk)
        return encode_tiles(tower, batch.tiles, dtype, tiles_per_chunk=tiles_per_chunk)
