# SPDX-License-Identifier: Apache-2.0
"""Configuration of an NVLM-D export: a vision tower, a projector and a decoder of Qwen2's or Llama's kind.

`config.json` keeps the keys of the published NVLM-D-72B, which serving programs read by name. Saving again writes the
same portable form whatever the installed transformers would write: version 5 moves `rope_theta` away from where
version 4 looks for it, which then falls back to another base without an error.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

DECODERS = {"Qwen2ForCausalLM": Qwen2Config, "LlamaForCausalLM": LlamaConfig}


class NVLM_D_VisionConfig(PretrainedConfig):
    """The InternViT tower. `num_attention_heads` counts real heads; `num_dummy_heads` zero heads are stored behind."""

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 3200,
        intermediate_size: int = 12800,
        num_hidden_layers: int = 45,
        num_attention_heads: int = 25,
        num_dummy_heads: int = 7,
        image_size: int = 448,
        patch_size: int = 14,
        num_channels: int = 3,
        layer_norm_eps: float = 1e-6,
        hidden_act: str = "gelu",
        norm_type: str = "rms_norm",
        qk_normalization: bool = True,
        qkv_bias: bool = False,
        initializer_factor: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_dummy_heads = num_dummy_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.layer_norm_eps = layer_norm_eps
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.qk_normalization = qk_normalization
        self.qkv_bias = qkv_bias
        self.initializer_factor = initializer_factor
        self.initializer_range = initializer_range


class NVLM_D_Config(PretrainedConfig):
    """The whole model. Every argument has a default, because transformers builds an empty one to print a difference."""

    model_type = "NVLM_D"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": NVLM_D_VisionConfig, "llm_config": Qwen2Config}

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        template: str = "chatml",
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        image_token_id: int = 151654,
        projector_layer_norm_eps: float = 1e-5,
        projector_norm: str = "layer_norm",
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = NVLM_D_VisionConfig(**(vision_config or {}))
        if not isinstance(llm_config, PretrainedConfig):
            # the published llm_config says model_type llama of a Qwen2: what counts is `architectures`
            decoder = {k: v for k, v in (llm_config or {}).items() if k != "model_type"}
            llm_config = DECODERS[(decoder.get("architectures") or ["Qwen2ForCausalLM"])[0]](**decoder)
        self.vision_config = vision_config
        self.llm_config = llm_config
        self.select_layer = select_layer
        self.force_image_size = force_image_size or vision_config.image_size
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.template = template
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.image_token_id = image_token_id
        self.projector_layer_norm_eps = projector_layer_norm_eps
        self.projector_norm = projector_norm
        # the decoder ties its head itself; saying otherwise here would tie heads that are not
        kwargs["tie_word_embeddings"] = bool(llm_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The decoder's configuration (some servers rename it to text_config)."""
        return getattr(self, "text_config", None) or self.llm_config

    def to_dict(self) -> dict[str, Any]:
        """The portable form: see the head of this file."""
        values = super().to_dict()
        values["architectures"] = [self.model_type]
        decoder = values.get("llm_config")
        if isinstance(decoder, dict):
            rope = decoder.pop("rope_parameters", None) or {}
            theta = rope.get("rope_theta", getattr(self.llm_config, "rope_theta", None))
            decoder["rope_theta"] = 10000.0 if theta is None else theta
            if rope.get("rope_type", "default") == "default":
                decoder.pop("rope_scaling", None)
            else:
                decoder["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
            decoder["architectures"] = [name for name, c in DECODERS.items() if c.model_type == decoder["model_type"]]
        for part in (values, decoder, values.get("vision_config")):
            if isinstance(part, dict):
                for private in (
                    "transformers_version",
                    "_name_or_path",
                ):  # the second would tell where it was saved from
                    part.pop(private, None)
                dtype = part.pop("dtype", None) or part.get("torch_dtype")
                if dtype is not None:
                    part["torch_dtype"] = str(dtype).removeprefix("torch.")
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: everything, so that no reader's defaults matter."""
        return self.to_dict()
