"""InternViT: the vision tower, as published for InternViT-6B-448px-V1-5 and InternViT-300M-448px, in any size.

Pre-norm transformer over patches and a class token: learned positions, LayerScale, erf GELU. The 6B tower has RMSNorms
and a QK-RMSNorm over the full width (all heads jointly); the 300M one has LayerNorms and biases on q, k and v. The
output is the last layer's, without a final norm and without the class token. Parameter names are the published ones.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_train.model.attention import QkNorm, RMSNorm
from nvlm_train.model.recompute import Recompute
from nvlm_train.recipe import schema

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB
IMAGE_STD = (0.229, 0.224, 0.225)


class Embeddings(nn.Module):
    """Patches and class token with their learned positions."""

    def __init__(self, config: schema.Vision) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (config.image_size // patch) ** 2, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [T, 3, px, px] normalised -> [T, 1+P, E], class token first, patches row by row."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [T, P, E]
        tokens = torch.cat((self.class_embedding.expand(len(patches), -1, -1), patches), dim=1)  # [T, 1+P, E]
        return tokens + self.position_embedding


class Attention(nn.Module):
    """Full attention among the tokens of a tile."""

    def __init__(self, config: schema.Vision, kernels: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qk_normalization = config.qk_normalization
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        if config.qk_normalization:
            head_size = width // config.num_attention_heads
            self.q_norm = QkNorm(width, head_size, config.layer_norm_eps, kernels)
            self.k_norm = QkNorm(width, head_size, config.layer_norm_eps, kernels)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, 1+P, E] -> [T, 1+P, E]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [T, 1+P, E] each
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)  # one mean square over all heads
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # [T, N, 1+P, H]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [T, 1+P, E]
        return self.proj(out)


class FeedForward(nn.Module):
    """Linear, GELU (erf), Linear."""

    def __init__(self, config: schema.Vision) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, 1+P, E] -> [T, 1+P, E]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """`x + ls1 * attn(norm1(x))`, then `x + ls2 * mlp(norm2(x))`."""

    def __init__(self, config: schema.Vision, kernels: str) -> None:
        super().__init__()
        width = config.hidden_size
        rms = config.norm_type == "rms_norm"
        norm = partial(RMSNorm, kernels=kernels) if rms else nn.LayerNorm
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.attn = Attention(config, kernels)
        self.ls1 = nn.Parameter(torch.full((width,), 0.1))
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.ls2 = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, 1+P, E] -> [T, 1+P, E]."""
        attended = self.attn(self.norm1(x))  # [T, 1+P, E]
        if isinstance(self.norm2, RMSNorm):
            x, normed = self.norm2(attended, x, self.ls1)  # [T, 1+P, E] each; x + ls1 * attended, and normed
        else:
            x = x + self.ls1 * attended  # [T, 1+P, E]
            normed = self.norm2(x)  # [T, 1+P, E]
        return x + self.ls2 * self.mlp(normed)


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: schema.Vision, activation_checkpointing: str, kernels: str) -> None:
        super().__init__()
        self.recompute = Recompute(activation_checkpointing)
        self.layers = nn.ModuleList(Layer(config, kernels) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, 1+P, E] -> [T, 1+P, E]."""
        for layer in self.layers:
            x = self.recompute(layer, x)
        return x


class InternVit(nn.Module):
    """The tower. Give it to `encode_tiles`."""

    def __init__(self, config: schema.Vision, activation_checkpointing: str = "none", kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, activation_checkpointing, kernels)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [T, 3, px, px] normalised, in the weights' type -> [T, 1+P, E], class token first."""
        return self.encoder(self.embeddings(pixels))


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """f32[1, 3, 1, 1] each. Copied to a device once: such a copy waits for all work that the device has."""
    with torch.inference_mode(False):
        made = [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD)]
    return made[0], made[1]


def normalise(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """u8[T, 3, px, px] -> dtype[T, 3, px, px]: `(tiles / 255 - mean) / std` in fp32 where the tiles are, then cast."""
    mean, std = _mean_and_std(tiles.device)
    return ((tiles.float() / 255 - mean) / std).to(dtype)


def encode_tiles(
    tower: InternVit, tiles: Tensor, dtype: torch.dtype, *, tiles_per_chunk: int = 16, num_chunks: int = 0
) -> Tensor:
    """Features of tiles, `tiles_per_chunk` at a time; without gradients where every weight of the tower is frozen.

    tiles: u8[T, 3, px, px]; T may be 0. dtype: type of the tower's weights and of the result.
    num_chunks: how often the tower is called, whatever T is, so that every rank of a tower inside ZeRO-3 makes the
        same calls; 0: as often as T needs. Calls without tiles of their own run one zero tile.
    Returns [T + zero tiles, P, E]: no class token, no pixel shuffle. The zero tiles' features come last; they are left
    out where the tower is frozen, and kept where it is trained, so that its gradients are zero instead of missing.
    Raises ValueError where T tiles do not fit into num_chunks chunks.
    """
    needed = -(-len(tiles) // tiles_per_chunk)
    if num_chunks and needed > num_chunks:
        raise ValueError(
            f"{len(tiles)} tiles need {needed} chunks of {tiles_per_chunk}, but every rank was planned {num_chunks}"
        )
    config = tower.config
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    features: list[Tensor] = []
    with torch.set_grad_enabled(trained):
        for start in range(0, len(tiles), tiles_per_chunk):
            features.append(tower(normalise(tiles[start : start + tiles_per_chunk], dtype))[:, 1:])  # [chunk, P, E]
        for _ in range(num_chunks - needed):
            empty = tower(tiles.new_zeros(1, 3, config.image_size, config.image_size, dtype=dtype))[:, 1:]  # [1, P, E]
            if trained:
                features.append(empty)
    if not features:
        return torch.zeros(
            0, (config.image_size // config.patch_size) ** 2, config.hidden_size, dtype=dtype, device=tiles.device
        )  # [0, P, E]
    return torch.cat(features)  # [T (+ zero tiles), P, E]
