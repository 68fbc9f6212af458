"""Held-out loss per source, with the training's own loss function on packs that never change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from nvlm_train.data.loader import validation_batches
from nvlm_train.data.plan import DataPlan
from nvlm_train.engine import engine as zero
from nvlm_train.engine.dist import World, agreed, sum_over_ranks
from nvlm_train.train.feature_cache import FeatureCache
from nvlm_train.train.loss import tower_features


@dataclass(frozen=True)
class ValidationResult:
    """Token-mean losses: of every source, and of all of them together ("all")."""

    losses: dict[str, float]
    tokens: dict[str, int]

    def marked(self, best: str | None) -> float:
        """The loss that marks the best checkpoint."""
        return self.losses[best or "all"]


def validate(
    engine: zero.Engine,
    tower: Any,
    plan: DataPlan,
    world: World,
    *,
    dtype: torch.dtype,
    tiles_per_chunk: int,
    cache: FeatureCache | None = None,
) -> ValidationResult:
    """Runs every validation source once. Touches neither gradients nor any state that training depends on."""
    sums: list[float] = []
    counts: list[int] = []
    sources = plan.validation_sources()
    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            for source in sources:
                loss_sum, tokens = 0.0, 0
                with agreed(world, f"validation source {source!r}"):
                    batches = validation_batches(plan, source)
                for batch in batches:
                    moved = batch.to(world.device)
                    features = tower_features(tower, moved, dtype, tiles_per_chunk, cache)
                    loss_sum += float(engine.deepspeed(moved, features))
                    tokens += batch.num_trained_tokens
                sums.append(loss_sum)
                counts.append(tokens)
    finally:
        engine.deepspeed.train()
    sums = sum_over_ranks(world, sums, torch.float64)
    counts = sum_over_ranks(world, counts, torch.int64)
    pairs = dict(zip(sources, zip(sums, counts, strict=True), strict=True))
    pairs["all"] = (sum(sums), sum(counts))
    return ValidationResult(
        losses={name: total / count if count else math.nan for name, (total, count) in pairs.items()},
        tokens={name: count for name, (_, count) in pairs.items()},
    )
