# SPDX-License-Identifier: Apache-2.0
"""NVLM-X and NVLM-H for transformers: the parts of NVLM-D, and gated cross-attention in the decoder.

They are used as NVLM-D is (see modeling_nvlm_d.py); the processor says in `reads` which tokens read which tiles.

A gated cross-attention layer, in a decoder layer between self-attention and feed-forward unless configured otherwise:

    h = x + tanh(attn_gate) * attn(input_layernorm(x), memory_norm(memory))
    h + tanh(mlp_gate) * mlp(post_attention_layernorm(h))                        where feed_forward is on

The memory is the image tokens of a row's tiles, in NVLM-H with each tile's tag before it. Its keys and values are made
once and kept while an answer is generated. A token that reads nothing passes unchanged.

Shape letters: as in modeling_nvlm_d.py; besides: N tiles in the memory, R memory rows of a tile, M memory rows of a row
of the batch, C cross-attention layers, K key/value heads, H head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .configuration_nvlm_xh import NVLM_H_Config, NVLM_X_Config
from .modeling_nvlm_d import NVLM_D_Model, RMSNorm, VisionTower, no_tokens, projector, projector_norm, to_the_left

Memory = tuple[Tensor, Tensor, Tensor]  # keys, values [B, C, K, M, H]; seen bool[B, S, M]


class CrossAttention(nn.Module):
    """Tokens [B, S, D] to the keys and values of their row's memory. No positions, no biases."""

    def __init__(self, config: NVLM_X_Config) -> None:
        super().__init__()
        own, width = config.cross_attention_config, config.get_text_config().hidden_size
        self.heads, self.groups = own["num_attention_heads"], own["num_key_value_heads"]
        self.head_size = width // self.heads
        self.q_proj = nn.Linear(width, self.heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(width, self.groups * self.head_size, bias=False)
        self.v_proj = nn.Linear(width, self.groups * self.head_size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_size, width, bias=False)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, D] to two of [B, K, M, H]."""
        k, v = (p(memory).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return k, v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # [B, heads, S, H]
        keys, values = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (keys, values))
        # a token that sees nothing looks at everything, so that no row is empty; what it finds is thrown away
        mask = seen | ~seen.any(-1, keepdim=True)  # [B, S, M]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.unsqueeze(1))  # [B, heads, S, H]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, S, D]


class Mlp(nn.Module):
    """SwiGLU, as in the decoder."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CrossAttentionLayer(nn.Module):
    """One gated layer; see the head of this file. Called with the memory alone, it returns its keys and values."""

    def __init__(self, config: NVLM_X_Config, number: int) -> None:
        super().__init__()
        own, decoder = config.cross_attention_config, config.get_text_config()
        width, eps = decoder.hidden_size, decoder.rms_norm_eps
        self.number = number
        self.input_layernorm = RMSNorm(width, width, eps)
        self.memory_norm = RMSNorm(width, width, eps) if own["memory_norm"] == "rms_norm" else None
        self.attn = CrossAttention(config)
        gated = own["gate"] == "tanh"
        self.attn_gate = nn.Parameter(torch.zeros(1)) if gated else None
        self.mlp, self.mlp_gate = None, None
        if own["feed_forward"]:
            self.post_attention_layernorm = RMSNorm(width, width, eps)
            self.mlp = Mlp(width, decoder.intermediate_size)
            self.mlp_gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor | None = None, memory: Any = None) -> Any:
        """x [B, S, D] and a `Memory` to [B, S, D]; without x, memory [B, M, D] to keys and values [B, K, M, H]."""
        if x is None:
            return self.attn.keys_values(memory if self.memory_norm is None else self.memory_norm(memory))
        keys, values, seen = (part.to(x.device) for part in memory)
        read = self.attn(self.input_layernorm(x), keys[:, self.number], values[:, self.number], seen)  # [B, S, D]
        h = x + gated(self.attn_gate, read)
        if self.mlp is not None:
            h = h + gated(self.mlp_gate, self.mlp(self.post_attention_layernorm(h)))
        return torch.where(seen.any(-1, keepdim=True), h, x)


def gated(gate: Tensor | None, x: Tensor) -> Tensor:
    return x if gate is None else torch.tanh(gate) * x


class CrossAttentionLayers(nn.Module):
    """All of them; each is called by its decoder layer."""

    def __init__(self, config: NVLM_X_Config) -> None:
        super().__init__()
        count = len(config.cross_attention_config["layers"])
        self.layers = nn.ModuleList(CrossAttentionLayer(config, number) for number in range(count))


class ReadingLayer:
    """What a decoder layer does with cross-attention, for whichever kind of layer it is mixed into."""

    reader: tuple[()] | tuple[CrossAttentionLayer] = ()  # in a tuple, so that it is not a part of this layer too
    place = "between"

    def forward(self, hidden_states: Tensor, memory: Memory | None = None, **kwargs: Any) -> Tensor:
        x = self._read(hidden_states, memory, "before")
        attended, *_ = self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)
        x = self._read(x + attended, memory, "between")
        x = x + self.mlp(self.post_attention_layernorm(x))
        return self._read(x, memory, "after")

    def _read(self, x: Tensor, memory: Memory | None, place: str) -> Tensor:
        if memory is None or not self.reader or place != self.place:
            return x
        return self.reader[0](x, memory).to(x.device)  # the two may be on different devices


class Qwen2ReadingLayer(ReadingLayer, Qwen2DecoderLayer):
    pass


class LlamaReadingLayer(ReadingLayer, LlamaDecoderLayer):
    pass


class ReadingDecoder:
    """A decoder whose layers read a memory, for whichever kind of decoder it is mixed into."""

    layer_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(self.layer_class(config, n) for n in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        memory_keys: Tensor | None = None,
        memory_values: Tensor | None = None,
        memory_seen: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """memory_seen bool[B, S, M] is of the prompt; a token behind it sees what the last one of the prompt does."""
        if memory_keys is not None:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            rows = torch.arange(length, device=memory_seen.device) + past
            seen = memory_seen[:, rows.clamp(max=memory_seen.shape[1] - 1)]  # [B, S, M]
            kwargs["memory"] = (memory_keys, memory_values, seen)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class Qwen2ReadingDecoder(ReadingDecoder, Qwen2ForCausalLM):
    layer_class = Qwen2ReadingLayer


class LlamaReadingDecoder(ReadingDecoder, LlamaForCausalLM):
    layer_class = LlamaReadingLayer


class NVLM_X_Model(NVLM_D_Model):
    """Image tokens are read by cross-attention; the prompt holds the tags of the tiles."""

    config_class = NVLM_X_Config
    _no_split_modules: ClassVar[list[str]] = [
        "Embeddings", "VisionLayer", "Qwen2ReadingLayer", "LlamaReadingLayer", "CrossAttentionLayer",
    ]  # fmt: skip

    def build(self, config: NVLM_X_Config) -> None:
        decoder, own = config.get_text_config(), config.cross_attention_config
        self.vision_model = VisionTower(config.vision_config)
        self.mlp1 = self.make_projector(config)
        self.cross_attention = CrossAttentionLayers(config)
        self.language_model = (LlamaReadingDecoder if decoder.model_type == "llama" else Qwen2ReadingDecoder)(decoder)
        for place, layer in zip(own["layers"], self.cross_attention.layers):  # noqa: B905
            self.language_model.model.layers[place].reader = (layer,)
            self.language_model.model.layers[place].place = own["place"]

    @staticmethod
    def make_projector(config: NVLM_X_Config) -> nn.Sequential:
        joined, width = 4 * config.vision_config.hidden_size, config.get_text_config().hidden_size
        return nn.Sequential(projector_norm(config), nn.Linear(joined, width, bias=False))

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        reads: Tensor | None,
        memory_tiles: Tensor | None = None,
        memory_tags: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """inputs_embeds [B, S, D] and, where something is read, memory_keys, memory_values and memory_seen.

        reads i64[n, 5], memory_tiles i64[N], memory_tags i64[N, L]: see the processor's `_memory`.
        """
        embeddings = self.embed_tokens(input_ids)  # [B, S, D]
        if pixel_values is None or pixel_values.shape[0] == 0:
            return {"inputs_embeds": self.put_images(embeddings, input_ids, None)}
        if reads is None:
            raise ValueError("pixel_values without reads: nothing says which tokens read which tile; use the processor")
        features = self.extract_feature(pixel_values).to(embeddings.device, embeddings.dtype)  # [T, Q, D]
        embeddings, rows, real = self.share_out(embeddings, input_ids, features, memory_tiles, memory_tags)
        prepared = {"inputs_embeds": embeddings}
        if reads.shape[0] == 0 or rows.shape[0] == 0:
            return prepared
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        memory, prepared["memory_seen"] = lay_out_memory(rows, real, reads.tolist(), mask)
        keys_values = [layer(memory=memory) for layer in self.cross_attention.layers]
        for name, parts in zip(("memory_keys", "memory_values"), zip(*keys_values)):  # noqa: B905
            prepared[name] = torch.stack([part.to(embeddings.device) for part in parts], dim=1)  # [B, C, K, M, H]
        return prepared

    def share_out(
        self, embeddings: Tensor, input_ids: Tensor, features: Tensor, memory_tiles: Any, memory_tags: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings with the image tokens that belong into the sequence (none here); the memory rows [N, R, D] of each
        tile that is read, and which of them are real, bool[N, R]."""
        return embeddings, features, features.new_ones(features.shape[:2], dtype=torch.bool)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reads: Tensor | None = None,
        memory_tiles: Tensor | None = None,
        memory_tags: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, S, V], and the mean loss where `labels` [B, S] are given (not shifted; -100 carries none).

        inputs_embeds is None always; it is there because peft names it in every call.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("forward needs input_ids, and no inputs_embeds: who reads what follows from the tokens")
        prepared = self.prepare(input_ids, attention_mask, pixel_values, reads, memory_tiles, memory_tags)
        return self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, labels=labels, **prepared, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reads: Tensor | None = None,
        memory_tiles: Tensor | None = None,
        memory_tags: Tensor | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The new tokens [B, at most max_new_tokens], without the prompt; rows end in padding after <|im_end|>.

        Rows may be padded left or right (attention_mask 0). Other arguments are those of `generate` everywhere.
        """
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask = to_the_left(input_ids, attention_mask)
        prepared = self.prepare(input_ids, attention_mask, pixel_values, reads, memory_tiles, memory_tags)
        self.language_model.generation_config = self.generation_config  # the folder's, and what was set here
        return self.language_model.generate(
            input_ids=no_tokens(prepared["inputs_embeds"]),
            attention_mask=attention_mask.to(prepared["inputs_embeds"].device),
            generation_config=generation_config,
            **prepared,
            **kwargs,
        )


class NVLM_H_Model(NVLM_X_Model):
    """Thumbnails are in the prompt as in NVLM-D; cross-attention reads the other tiles, a tag before each."""

    config_class = NVLM_H_Config

    @staticmethod
    def make_projector(config: NVLM_H_Config) -> nn.Sequential:
        return projector(config)

    def share_out(
        self, embeddings: Tensor, input_ids: Tensor, features: Tensor, memory_tiles: Any, memory_tags: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if memory_tiles is None or memory_tags is None:
            raise ValueError("pixel_values without memory_tiles and memory_tags; use the processor")
        memory_tiles, memory_tags = memory_tiles.to(features.device), memory_tags.to(features.device)
        in_sequence = torch.ones(len(features), dtype=torch.bool, device=features.device)  # [T]
        in_sequence[memory_tiles] = False
        tags = self.embed_tokens(memory_tags.clamp(min=0)).to(features)  # [N, L, D]
        rows = torch.cat([tags, features[memory_tiles]], dim=1)  # [N, L + Q, D]
        real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        real[:, : memory_tags.shape[1]] = memory_tags >= 0
        return self.put_images(embeddings, input_ids, features[in_sequence]), rows, real


def lay_out_memory(rows: Tensor, real: Tensor, reads: list[list[int]], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The memory [B, M, D] of each row of the batch, and what each token sees of it, bool[B, S, M].

    rows [N, R, D], real bool[N, R]: memory rows of each tile. reads: (row of the batch, tokens begin to end, tiles
    first to last), a row's tiles being consecutive. mask [B, S]: 0 for padding, which is not counted as a token.
    """
    tiles = {}  # row of the batch: its tiles, first to last
    for row, _, _, first, last in reads:
        known = tiles.get(row, (first, last))
        tiles[row] = (min(first, known[0]), max(last, known[1]))
    most = max(last - first for first, last in tiles.values())
    memory, present = [], []
    for row in range(mask.shape[0]):
        first, last = tiles.get(row, (0, 0))
        missing = most - (last - first)
        memory.append(F.pad(rows[first:last], (0, 0, 0, 0, 0, missing)))  # [most, R, D]
        present.append(F.pad(real[first:last], (0, 0, 0, missing)))  # [most, R]
    token = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1).to(rows.device)  # [B, S]
    seen = torch.zeros(*mask.shape, most, dtype=torch.bool, device=rows.device)  # [B, S, most]
    for row, begin, end, first, last in reads:
        here = ((token[row] >= begin) & (token[row] < end)).unsqueeze(-1)  # [S, 1]
        seen[row, :, first - tiles[row][0] : last - tiles[row][0]] |= here
    seen = seen.unsqueeze(-1) & torch.stack(present).unsqueeze(1)  # [B, S, most, R]
    return torch.stack(memory).flatten(1, 2), seen.flatten(2)
