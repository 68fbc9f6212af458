"""The loss of a step, of validation and of the tests: one function, so that they can be compared.

Loss = sum of cross-entropy over the trained tokens of the whole step / their number, over all ranks and micro-steps.
A mean of the micro-steps' means would weigh a token by how full its micro-step is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nvlm_train.batch import Batch
from nvlm_train.engine.dist import World, sum_over_ranks
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


def mean_over_tokens(world: World, loss_sum: float, trained_tokens: int) -> float:
    """Global mean from this rank's sum and the global token count; NaN where nothing was trained on."""
    (total,) = sum_over_ranks(world, [loss_sum], torch.float64)
    return total / trained_tokens if trained_tokens else math.nan
