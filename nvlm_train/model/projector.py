"""From the tower's patches to the decoder's width: pixel shuffle, then an MLP of two layers or of one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_train.recipe import schema


def pixel_shuffle(features: Tensor) -> Tensor:
    """Joins patches two by two into one token of four times the width (InternVL's ps_version "v2").

    features: [T, P, E], patches row by row over a square grid -> [T, Q, 4E], Q = P / 4, row by row.
    Token (i, j) is the concatenation of patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1).
    Example, a 2 x 2 grid of patches a b / c d: one token [a b c d].
    """
    tiles, patches, width = features.shape
    side = round(patches**0.5)
    blocks = features.reshape(tiles, side // 2, 2, side // 2, 2, width)  # [T, i, di, j, dj, E]
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(tiles, patches // 4, 4 * width)  # [T, Q, 4E]


def _norm(width: int, config: schema.Model) -> nn.Module:
    settings = config.projector
    return nn.LayerNorm(width, eps=settings.layer_norm_eps) if settings.norm == "layer_norm" else nn.Identity()


class LinearProjector(nn.Module):
    """LayerNorm(4E), Linear(4E, D): the one-layer projector of NVLM-X."""

    def __init__(self, config: schema.Model) -> None:
        super().__init__()
        width = 4 * config.vision.hidden_size
        self.norm = _norm(width, config)
        self.fc = nn.Linear(width, config.language_model.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 4E] -> [rows, D]."""
        return self.fc(self.norm(x))


class Projector(nn.Module):
    """LayerNorm(4E), Linear(4E, F), GELU (erf), Linear(F, D); no biases but the norm's. Published as mlp1.0, .1, .3."""

    def __init__(self, config: schema.Model) -> None:
        super().__init__()
        width, lm = 4 * config.vision.hidden_size, config.language_model
        self.norm = _norm(width, config)
        self.fc1 = nn.Linear(width, lm.intermediate_size, bias=False)
        self.fc2 = nn.Linear(lm.intermediate_size, lm.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 4E] -> [rows, D]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
