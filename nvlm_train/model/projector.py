"""From the tower's patches to the decoder's width: pixel shuffle, then an MLP of two layers or of one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_train import kernels
from nvlm_train.kernels.shuffle_layer_norm import pixel_shuffle
from nvlm_train.recipe import schema


class Shuffle(nn.Module):
    """Pixel shuffle alone: the projector without a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, P, E] patches -> [T*Q, 4E]; or [rows, 4E] joined already, as it is."""
        return x if x.shape[-1] == self.width else pixel_shuffle(x).flatten(0, 1)


class ShuffleLayerNorm(nn.LayerNorm):
    """Pixel shuffle and LayerNorm."""

    def __init__(self, width: int, eps: float, kernels: str) -> None:
        super().__init__(width, eps=eps)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, P, E] patches -> [T*Q, 4E]; or [rows, 4E] joined already -> the same shape."""
        if x.shape[-1] == self.normalized_shape[0]:
            return super().forward(x)
        join = kernels.chosen("shuffle_layer_norm", self.kernels, x.device.type)
        y: Tensor = join(x, self.weight, self.bias, self.eps)  # [T*Q, 4E]
        return y


def _norm(width: int, config: schema.Model, kernels: str) -> nn.Module:
    settings = config.projector
    if settings.norm == "layer_norm":
        return ShuffleLayerNorm(width, settings.layer_norm_eps, kernels)
    return Shuffle(width)


class LinearProjector(nn.Module):
    """LayerNorm(4E), Linear(4E, D): the one-layer projector of NVLM-X."""

    def __init__(self, config: schema.Model, kernels: str = "auto") -> None:
        super().__init__()
        width = 4 * config.vision.hidden_size
        self.norm = _norm(width, config, kernels)
        self.fc = nn.Linear(width, config.language_model.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, P, E] patches, or [rows, 4E] joined already -> [T*Q or rows, D]."""
        return self.fc(self.norm(x))


class Projector(nn.Module):
    """LayerNorm(4E), Linear(4E, F), GELU (erf), Linear(F, D); no biases but the norm's. Published as mlp1.0, .1, .3."""

    def __init__(self, config: schema.Model, kernels: str = "auto") -> None:
        super().__init__()
        width, lm = 4 * config.vision.hidden_size, config.language_model
        self.norm = _norm(width, config, kernels)
        self.fc1 = nn.Linear(width, lm.intermediate_size, bias=False)
        self.fc2 = nn.Linear(lm.intermediate_size, lm.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, P, E] patches, or [rows, 4E] joined already -> [T*Q or rows, D]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
