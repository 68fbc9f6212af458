"""Attention and what tower and decoder share around it: RMSNorm and rotary positions."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from nvlm_train import kernels


class RMSNorm(nn.Module):
    """`weight * (x / sqrt(mean(x^2) + eps))` over the last dimension, in fp32, cast back *before* the multiplication.

    The order is that of transformers' Qwen2RMSNorm and of InternViT's norm; in bf16 the other order differs.
    """

    def __init__(self, width: int, eps: float, kernels: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.kernels = kernels

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...

    @overload
    def __call__(self, x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: [..., width] -> same shape and type; with a residual `s = residual + scale * x` and the normed s.

        residual: [..., width]. scale: [width], [1] or None.
        """
        device = x.device.type
        if residual is None:
            y: Tensor = kernels.chosen("rms_norm", self.kernels, device)(x, self.weight, self.eps)
            return y
        add = kernels.chosen("add_rms_norm", self.kernels, device)
        both: tuple[Tensor, Tensor] = add(x, residual, self.weight, self.eps, scale)
        return both


class QkNorm(RMSNorm):
    """RMSNorm of queries or keys over all heads jointly; rows may be parts of a packed qkv, which are not copied."""

    def __init__(self, width: int, head_size: int, eps: float, kernels: str = "auto") -> None:
        super().__init__(width, eps, kernels)
        self.head_size = head_size

    def forward(self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x: [T, rows, width] -> same shape and type. Nothing is added."""
        norm = kernels.chosen("norm_rope", self.kernels, x.device.type)
        y: Tensor = norm(x.flatten(0, 1), self.weight, None, None, self.head_size, self.eps)  # [T*rows, width]
        return y.view(x.shape)


@torch.no_grad()
def rotary_tables(position_ids: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions: angle of channel pair c at position p is `p * theta^(-2c/H)`.

    Computed in fp32 from the configuration on every call: there is no buffer that a cast of the model, or building
    it under ZeRO-3 in bf16, could round (bf16 has 8 bits: position 30000 would be off by 60).

    position_ids: i64[B, S]. Returns cos and sin, dtype[B*S, H], both halves of H alike (transformers' layout).
    """
    channels = torch.arange(0, head_size, 2, dtype=torch.float32, device=position_ids.device)  # [H/2]
    frequencies = 1.0 / (theta ** (channels / head_size))  # [H/2]
    angles = position_ids.flatten()[:, None].float() * frequencies  # [B*S, H/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B*S, H]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = True,
    *,
    choice: str = "auto",
) -> Tensor:
    """Attention inside segments only, by the kernel that `choice` names on this device (see `nvlm_train.kernels`).

    q: [B, S, N, H]; k, v: [B, S, K, H]; cu_seqlens: i32[G+1] segment bounds in the B*S flattened tokens; max_seqlen:
    longest segment. Returns [B, S, N, H].

    Five tokens, cu_seqlens [0, 3, 5], causal; row = query, x = sees:
        x . . . .
        x x . . .
        x x x . .
        . . . x .
        . . . x x
    """
    name, _ = kernels.select(choice, q.device.type)["attention"]
    out: Tensor = kernels.load("attention", name)(q, k, v, cu_seqlens, max_seqlen, causal)
    return out
