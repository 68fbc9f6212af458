"""Gated cross-attention (NVLM-X and NVLM-H): tokens of the decoder read the image tokens of tiles.

The paper says how many layers there are and what reads what, and names Flamingo's gates. What is inside is our choice,
each with a switch in `model.cross_attention`:

    h = x + tanh(attn_gate) * attn(input_layernorm(x), memory_norm(memory))
    h + tanh(mlp_gate) * mlp(post_attention_layernorm(h))                        where feed_forward is on

No biases and no positions of the memory's rows. With gates at 0 the result is x, bit for bit. Only tokens that read
something are computed, so that all others pass unchanged whatever the gates are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_train import kernels
from nvlm_train.batch import Memory
from nvlm_train.model.attention import RMSNorm
from nvlm_train.model.decoder import FeedForward
from nvlm_train.recipe import schema


class Attention(nn.Module):
    """Runs of tokens to their ranges of the memory; heads as the decoder's unless the recipe says otherwise."""

    def __init__(self, config: schema.Model, kernels: str) -> None:
        super().__init__()
        width = config.language_model.hidden_size
        heads, groups = config.cross_attention_heads
        self.head_size = width // heads
        self.kernels = kernels
        self.q_proj = nn.Linear(width, heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(width, groups * self.head_size, bias=False)
        self.v_proj = nn.Linear(width, groups * self.head_size, bias=False)
        self.o_proj = nn.Linear(heads * self.head_size, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, reads: Memory) -> Tensor:
        """x: [U, D] the tokens that read; memory: [M, D] -> [U, D]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size))  # [U, N, H]
        # Rows are repeated for each run that reads them only after the projections; an embedding's backward adds up in
        # a fixed order on every device.
        k = F.embedding(reads.rows, self.k_proj(memory)).unflatten(-1, (-1, self.head_size))  # [W, K, H]
        v = F.embedding(reads.rows, self.v_proj(memory)).unflatten(-1, (-1, self.head_size))  # [W, K, H]
        name, _ = kernels.select(self.kernels, x.device.type)["cross_attention"]
        attend = kernels.load("cross_attention", name)
        out = attend(q, k, v, reads.cu_queries, reads.cu_rows, reads.max_queries, reads.max_rows)  # [U, N, H]
        return self.o_proj(out.flatten(1))  # [U, D]


class Layer(nn.Module):
    """One gated cross-attention layer; see the formula above."""

    def __init__(self, config: schema.Model, kernels: str) -> None:
        super().__init__()
        lm, own = config.language_model, config.cross_attention
        self.input_layernorm = RMSNorm(lm.hidden_size, lm.rms_norm_eps, kernels)
        own_norm = own.memory_norm == "rms_norm"
        self.memory_norm = RMSNorm(lm.hidden_size, lm.rms_norm_eps, kernels) if own_norm else None
        self.attn = Attention(config, kernels)
        gated = own.gate == "tanh"
        self.attn_gate = nn.Parameter(torch.full((1,), float(own.gate_init))) if gated else None
        self.mlp: FeedForward | None = None
        self.mlp_gate: nn.Parameter | None = None
        if own.feed_forward:
            self.post_attention_layernorm = RMSNorm(lm.hidden_size, lm.rms_norm_eps, kernels)
            self.mlp = FeedForward(lm)
            self.mlp_gate = nn.Parameter(torch.full((1,), float(own.gate_init))) if gated else None

    def forward(self, x: Tensor, memory: Tensor, reads: Memory) -> Tensor:
        """x: [B, S, D]; memory: [M, D], M at least 1 -> [B, S, D], equal to x where a token reads nothing."""
        flat = x.flatten(0, 1)  # [B*S, D]
        h = flat.index_select(0, reads.query_rows)  # [U, D]
        if self.memory_norm is not None:
            memory = self.memory_norm(memory)  # [M, D]
        read = self.attn(self.input_layernorm(h), memory, reads)  # [U, D]
        if self.mlp is None:
            h = h + _gated(self.attn_gate, read)  # [U, D]
        else:
            gate = None if self.attn_gate is None else torch.tanh(self.attn_gate)  # [1]
            h, normed = self.post_attention_layernorm(read, h, gate)  # [U, D] each; h + gate * read, and normed
            h = h + _gated(self.mlp_gate, self.mlp(normed))  # [U, D]
        return flat.index_copy(0, reads.query_rows, h).view_as(x)  # [B, S, D]


def _gated(gate: Tensor | None, x: Tensor) -> Tensor:
    return x if gate is None else torch.tanh(gate) * x


class CrossAttention(nn.Module):
    """All cross-attention layers. They are called by the decoder, each at its layer; this module never is."""

    def __init__(self, config: schema.Model, kernels: str) -> None:
        super().__init__()
        self.places = config.cross_attention_layers
        self.layers = nn.ModuleList(Layer(config, kernels) for _ in self.places)

    def readers(self, memory: Tensor, reads: Memory) -> dict[int, Callable[[Tensor], Tensor]]:
        """By number of the decoder layer: what adds to the hidden states [B, S, D] what they read of memory [M, D]."""
        return {
            place: partial(layer, memory=memory, reads=reads)
            for place, layer in zip(self.places, self.layers, strict=True)
        }
