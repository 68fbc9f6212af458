"""The decoder: grouped-query attention, rotary positions, SwiGLU, RMSNorm, packed samples.

Qwen2 has biases on q, k and v; Llama, and Yi with it, has none: that is all they differ in. Parameter names are those
of transformers' Qwen2ForCausalLM and LlamaForCausalLM. Every module uses only its own weights, inside its own forward:
that is what lets ZeRO-3 gather and release them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_train import kernels
from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.model.attention import RMSNorm, packed_attention, rotary_tables
from nvlm_train.model.recompute import Recompute
from nvlm_train.recipe import schema

Reader = Callable[[Tensor], Tensor]  # hidden states [B, S, D] with what cross-attention read: [B, S, D]


class Attention(nn.Module):
    """Causal attention inside segments."""

    def __init__(self, config: schema.LanguageModel, kernels: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_size = width // config.num_attention_heads
        self.kernels = kernels
        bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x: [B, S, D]; cos, sin: [B*S, H] -> [B, S, D]."""
        turn = kernels.chosen("norm_rope", self.kernels, x.device.type)
        q, k = (
            turn(part.flatten(0, 1), None, cos, sin, self.head_size, 0.0).view(*x.shape[:2], -1, self.head_size)
            for part in (self.q_proj(x), self.k_proj(x))
        )  # [B, S, N, H], [B, S, K, H]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))  # [B, S, K, H]
        out = packed_attention(q, k, v, cu_seqlens, max_seqlen, causal=True, choice=self.kernels)  # [B, S, N, H]
        return self.o_proj(out.flatten(2))  # [B, S, D]


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: schema.LanguageModel) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """`x + self_attn(input_layernorm(x))`, then `x + mlp(post_attention_layernorm(x))`.

    reader: cross-attention at this layer, before both, between them or after both, as `place` says.
    """

    def __init__(self, config: schema.LanguageModel, kernels: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, kernels)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        reader: Reader | None = None,
        place: str = "between",
    ) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        if reader is not None and place == "before":
            x = reader(x)  # [B, S, D]
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, max_seqlen)  # [B, S, D]
        if reader is not None and place == "between":
            x = reader(x + attended)  # [B, S, D]
            normed = self.post_attention_layernorm(x)  # [B, S, D]
        else:
            x, normed = self.post_attention_layernorm(attended, x)  # [B, S, D] each; x + attended, and normed
        x = x + self.mlp(normed)
        if reader is not None and place == "after":
            x = reader(x)  # [B, S, D]
        return x


class TokenEmbedding(nn.Embedding):
    """The table of tokens. It owns its weight, so image tokens are put between the others here."""

    def __init__(self, config: schema.LanguageModel, kernels: str) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.kernels = kernels

    def forward(self, ids: Tensor, slots: Tensor | None = None, image_tokens: Tensor | None = None) -> Tensor:
        """ids: i64[...]; slots: i64[...] the image token of each place, or -1; image_tokens: [T*Q, D] -> [..., D]."""
        if slots is None or image_tokens is None:
            return super().forward(ids)  # [..., D]
        put = kernels.chosen("splice", self.kernels, ids.device.type)
        x: Tensor = put(ids.flatten(), slots.flatten(), self.weight, image_tokens)  # [rows, D]
        return x.view(*ids.shape, -1)  # [..., D]

    def with_images(self, ids: Tensor, slots: Tensor, image_tokens: Tensor) -> Tensor:
        """As forward, for the caller outside; a frozen table is left before the images come.

        Their gradient would pass through this module otherwise, and ZeRO-3 would gather the table again for nothing.
        """
        if any(p.requires_grad for p in self.parameters()):  # naming the weight would make ZeRO-3 gather it
            embedded: Tensor = self(ids, slots, image_tokens)  # [..., D]
            return embedded
        put = kernels.chosen("splice", self.kernels, ids.device.type)
        x: Tensor = put(None, slots.flatten(), self(ids).flatten(0, -2), image_tokens)  # [rows, D]
        return x.view(*ids.shape, -1)  # [..., D]


class Decoder(nn.Module):
    """Embedding, layers and final norm; the embedding is called by whoever puts images between the tokens."""

    def __init__(self, config: schema.LanguageModel, activation_checkpointing: str, kernels: str) -> None:
        super().__init__()
        self.config = config
        self.recompute = Recompute(activation_checkpointing)
        self.embed_tokens = TokenEmbedding(config, kernels)
        self.layers = nn.ModuleList(Layer(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        readers: Mapping[int, Reader] | None = None,
        place: str = "between",
    ) -> Tensor:
        """x: [B, S, D] embedded tokens; position_ids: i64[B, S]; cu_seqlens: i32[G+1] -> [B, S, D], normalised.

        readers: cross-attention by number of layer, at `place` of it (see `Layer`).
        """
        readers = readers or {}
        head_size = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary_tables(position_ids, head_size, self.config.rope_theta, x.dtype)  # [B*S, H]
        for number, layer in enumerate(self.layers):
            x = self.recompute(layer, x, cos, sin, cu_seqlens, max_seqlen, readers.get(number), place)
        return self.norm(x)


class LmHead(nn.Linear):
    """The output matrix. It owns its weight, so the loss is computed here, on labelled rows only."""

    def __init__(self, config: schema.LanguageModel, kernels: str = "auto") -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.kernels = kernels

    def forward(self, hidden: Tensor, labels: Tensor | None = None, num_labels: int | None = None) -> Tensor:
        """The summed cross-entropy, or the logits where there are no labels.

        hidden: [B, S, D]; labels: i64[B, S], already shifted, IGNORE_INDEX where there is no loss.
        num_labels: how many labels count, where the caller knows: saves the device a wait.
        Returns fp32 scalar `sum over labelled rows of -log softmax(logits)[label]`, 0.0 with zero gradients where
        there is none; or logits [B, S, V] in the weights' type. Softmax and sum are in fp32.
        """
        if labels is None:
            return super().forward(hidden)  # [B, S, V]
        counts = (labels != IGNORE_INDEX).flatten()  # [B*S]
        if num_labels is None:
            rows = counts.nonzero().squeeze(1)  # [R]
        else:
            if not counts.is_cuda and int(counts.sum()) != num_labels:  # on a device, checking would wait for it
                raise ValueError(f"num_trained_tokens is {num_labels}, but {int(counts.sum())} labels carry a loss")
            rows = counts.nonzero_static(size=num_labels).squeeze(1)  # [R]
        picked = hidden.flatten(0, 1).index_select(0, rows)  # [R, D]
        targets = labels.flatten().index_select(0, rows)  # [R]
        loss: Tensor = kernels.chosen("linear_cross_entropy", self.kernels, hidden.device.type)(
            picked, self.weight, targets
        )
        return loss


class LanguageModel(nn.Module):
    """Decoder and head. With tied embeddings one Parameter is registered in both modules."""

    def __init__(
        self, config: schema.LanguageModel, *, activation_checkpointing: str = "none", kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.model = Decoder(config, activation_checkpointing, kernels)
        self.lm_head = LmHead(config, kernels)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
