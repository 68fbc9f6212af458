# SPDX-License-Identifier: Apache-2.0
"""Configuration of NVLM-X and NVLM-H exports: that of NVLM-D, and what cross-attention is made of."""

from __future__ import annotations

from typing import Any

from .configuration_nvlm_d import NVLM_D_Config


class NVLM_X_Config(NVLM_D_Config):
    """No image token is in the decoder's sequence: cross-attention layers read them.

    cross_attention_config: layers (numbers of the decoder layers that have one, from 0), place (before, between, after
    its self-attention and feed-forward), num_attention_heads, num_key_value_heads, gate (tanh, none), feed_forward,
    memory_norm (rms_norm, none).
    """

    model_type = "NVLM_X"

    def __init__(self, cross_attention_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        given = cross_attention_config or {}
        layers = self.llm_config.num_hidden_layers
        every = max(1, round(layers / 10))
        self.cross_attention_config = {
            "layers": list(range(every - 1, layers, every)),
            "place": "between",
            "num_attention_heads": self.llm_config.num_attention_heads,
            "num_key_value_heads": self.llm_config.num_key_value_heads,
            "gate": "tanh",
            "feed_forward": False,
            "memory_norm": "rms_norm",
            **given,
        }


class NVLM_H_Config(NVLM_X_Config):
    """Thumbnails are in the decoder's sequence; cross-attention layers read the other tiles, a tag before each."""

    model_type = "NVLM_H"

    def __init__(self, **kwargs: Any) -> None:  # transformers 5 writes another one for a class without
        super().__init__(**kwargs)
