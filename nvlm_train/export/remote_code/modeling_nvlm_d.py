# SPDX-License-Identifier: Apache-2.0
"""NVLM-D for transformers: InternViT tower, projector, a decoder of Qwen2's or Llama's kind.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor("What is this?", images=[image])
    print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))

Shape letters: T tiles, P patches per tile, E tower width, Q image tokens per tile, B rows, S tokens, D decoder width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nvlm_d import NVLM_D_Config, NVLM_D_VisionConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 over the first `real` channels; the others are cut off.

    weight is stored for the dummy heads too.
    """

    def __init__(self, stored: int, real: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stored))
        self.real = real
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x[..., : self.real].float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight[: self.real] * x32.to(x.dtype)


def norm(config: NVLM_D_VisionConfig) -> nn.Module:
    """A layer's norm: RMSNorm in the 6B tower, LayerNorm in the 300M one."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return RMSNorm(config.hidden_size, config.hidden_size, config.layer_norm_eps)


class RealChannels(nn.Module):
    """What stands in for a norm where there is none: cuts off the channels of dummy heads."""

    def __init__(self, real: int) -> None:
        super().__init__()
        self.real = real

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.real]


class Attention(nn.Module):
    """Full attention inside a tile; in the 6B tower queries and keys are normalised over all real heads together.

    Stored weights have `num_dummy_heads` heads behind the real ones; what they hold is never used.
    """

    def __init__(self, config: NVLM_D_VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.width = config.hidden_size
        self.head_size = config.hidden_size // config.num_attention_heads
        self.stored = self.width + config.num_dummy_heads * self.head_size
        self.qkv = nn.Linear(self.width, 3 * self.stored, bias=config.qkv_bias)
        for name in ("q_norm", "k_norm"):
            rms = RMSNorm(self.stored, self.width, config.layer_norm_eps) if config.qk_normalization else None
            self.add_module(name, rms or RealChannels(self.width))
        self.proj = nn.Linear(self.stored, self.width)

    def forward(self, x: Tensor) -> Tensor:
        tiles, tokens, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each [T, 1+P, stored]
        heads = [part.reshape(tiles, tokens, self.num_heads, self.head_size).transpose(1, 2)
                 for part in (self.q_norm(q), self.k_norm(k), v[..., : self.width])]  # fmt: skip
        out = F.scaled_dot_product_attention(*heads)  # [T, heads, 1+P, head size]
        out = out.transpose(1, 2).reshape(tiles, tokens, self.width)
        return self.proj(F.pad(out, (0, self.stored - self.width)))  # [T, 1+P, E]


class Mlp(nn.Module):
    def __init__(self, config: NVLM_D_VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with LayerScale."""

    def __init__(self, config: NVLM_D_VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = norm(config)
        self.norm2 = norm(config)
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.ls1 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((width,), config.initializer_factor))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class Embeddings(nn.Module):
    """Patches, a class token before them, learned positions."""

    def __init__(self, config: NVLM_D_VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (config.image_size // patch) ** 2, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [T, P, E]
        x = torch.cat([self.class_embedding.expand(patches.shape[0], -1, -1), patches], dim=1)
        return x + self.position_embedding  # [T, 1+P, E]


class Encoder(nn.Module):
    def __init__(self, config: NVLM_D_VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """Tiles [T, 3, px, px] to the last layer's patch features [T, P, E]: no class token, no final norm."""

    def __init__(self, config: NVLM_D_VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.embeddings(pixel_values))[:, 1:]


def pixel_shuffle(x: Tensor) -> Tensor:
    """[T, P, E] to [T, P/4, 4E]: each 2x2 block of patches becomes one token.

    Channels in the order (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1); tokens row by row.
    """
    tiles, patches, width = x.shape
    side = int(patches**0.5)
    x = x.reshape(tiles, side // 2, 2, side // 2, 2, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(tiles, patches // 4, 4 * width)


def projector(config: NVLM_D_Config) -> nn.Sequential:
    """Norm, Linear, GELU, Linear from four joined patches to the decoder's width."""
    joined, decoder = 4 * config.vision_config.hidden_size, config.get_text_config()
    return nn.Sequential(
        projector_norm(config),
        nn.Linear(joined, decoder.intermediate_size, bias=False),
        nn.GELU(),
        nn.Linear(decoder.intermediate_size, decoder.hidden_size, bias=False),
    )


def projector_norm(config: NVLM_D_Config) -> nn.Module:
    """The projector's first step."""
    if config.projector_norm == "none":
        return nn.Identity()
    return nn.LayerNorm(4 * config.vision_config.hidden_size, eps=config.projector_layer_norm_eps)


def to_the_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding on the left: decoding appends on the right. The order of real tokens stays."""
    order = attention_mask.bool().to(torch.int8).argsort(dim=1, stable=True)  # [B, S]
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def beside(module: nn.Module, x: Tensor) -> Tensor:
    """x on the device of a module's weights; as it is where they are offloaded: what brings them moves x too."""
    device = next(module.parameters()).device
    return x if device.type == "meta" else x.to(device)


def no_tokens(embeddings: Tensor) -> Tensor:
    """i64[B, 0], to which `generate` appends. Left to itself, version 4 puts them on the device of the first weight,
    which is none where weights are offloaded."""
    return torch.zeros(embeddings.shape[0], 0, dtype=torch.int64, device=embeddings.device)


class NVLM_D_Model(PreTrainedModel, GenerationMixin):
    """The decoder-only NVLM: projected image tokens take the places of the image token in the prompt.

    The decoder generates; of GenerationMixin only what reads and saves generation_config.json is used.
    """

    config_class = NVLM_D_Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Embeddings", "VisionLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_cache_class = True

    def __init__(self, config: NVLM_D_Config) -> None:
        super().__init__(config)
        if config.select_layer != -1 or config.ps_version != "v2" or config.downsample_ratio != 0.5:
            raise ValueError(
                f"select_layer {config.select_layer}, ps_version {config.ps_version!r}, downsample_ratio "
                f"{config.downsample_ratio}: this code knows the last layer (-1), 'v2' and 0.5 only"
            )
        self.build(config)
        self.post_init()

    def build(self, config: NVLM_D_Config) -> None:
        decoder = config.get_text_config()
        self.vision_model = VisionTower(config.vision_config)
        self.mlp1 = projector(config)
        self.language_model = (LlamaForCausalLM if decoder.model_type == "llama" else Qwen2ForCausalLM)(decoder)

    def _init_weights(self, module: nn.Module) -> None:
        """New weights for what a checkpoint does not bring (used when training from this code)."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Normalised tiles [T, 3, px, px] to image tokens [T, Q, D]."""
        embeddings = self.vision_model.embeddings
        pixel_values = beside(embeddings, pixel_values).to(embeddings.class_embedding.dtype)
        features = self.vision_model(pixel_values)  # [T, P, E]
        return self.mlp1(pixel_shuffle(features))  # [T, Q, D]

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """[B, S] token ids to [B, S, D] embeddings, image tokens in the order of the tiles."""
        features = None if pixel_values is None or pixel_values.shape[0] == 0 else self.extract_feature(pixel_values)
        return self.put_images(self.embed_tokens(input_ids), input_ids, features)

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """[B, S] token ids, wherever they are, to [B, S, D]."""
        table = self.get_input_embeddings()
        return table(beside(table, input_ids))

    def put_images(self, embeddings: Tensor, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """features [T, Q, D] into the places of the image token, in order; ValueError where their numbers differ."""
        places = input_ids == self.config.image_token_id  # [B, S]
        if features is None or features.shape[0] == 0:
            if bool(places.any()):
                raise ValueError(f"{int(places.sum())} image tokens in input_ids, but no pixel_values")
            return embeddings
        image = features.flatten(0, 1).to(embeddings.device, embeddings.dtype)  # [T*Q, D]
        if int(places.sum()) != image.shape[0]:
            raise ValueError(
                f"{int(places.sum())} image tokens in input_ids, but pixel_values holds {features.shape[0]} tiles "
                f"of {features.shape[1]} tokens each"
            )
        return embeddings.masked_scatter(places.unsqueeze(-1).to(embeddings.device), image)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, S, V], and the mean loss where `labels` [B, S] are given (not shifted; -100 carries none).

        image_flags [T]: 0 marks a tile that is only there to fill up; its features are left out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if pixel_values is not None and image_flags is not None:
            pixel_values = pixel_values[image_flags.reshape(-1).to(pixel_values.device) == 1]
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The new tokens [B, at most max_new_tokens], without the prompt; rows end in padding after <|im_end|>.

        Rows may be padded left or right (attention_mask 0). visual_features [T, Q, D]: image tokens that were made
        before by `extract_feature`, instead of pixel_values. Other arguments are those of `generate` everywhere.
        """
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask = to_the_left(input_ids, attention_mask)
        if visual_features is None:
            embeddings = self.embed(input_ids, pixel_values)
        else:
            embeddings = self.put_images(self.embed_tokens(input_ids), input_ids, visual_features)
        self.language_model.generation_config = self.generation_config  # the folder's, and what was set here
        return self.language_model.generate(
            input_ids=no_tokens(embeddings),
            inputs_embeds=embeddings,
            attention_mask=attention_mask.to(embeddings.device),
            generation_config=generation_config,
            **kwargs,
        )
