"""Parameters and floating-point operations of a model, from its sizes alone.

One multiply-add is two operations; norms, activations and softmax are left out, as is usual when a share of a device's
peak is stated. Checked against `reference` figures in tests: NVLM-D-72B has 78,863,416,704 parameters, its tower needs
11.9 TFLOP per tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_train.recipe.schema import LanguageModel, Model, Train, Vision

MODULES = ("vision", "projector", "language_model")
NUM_DUMMY_HEADS = 7  # zero heads in published NVLM-D checkpoints: 25 real ones padded to 32 for tensor parallelism


def patches_per_tile(vision: Vision) -> int:
    """P: 32 x 32 = 1024 for 448 pixels and patches of 14."""
    return (vision.image_size // vision.patch_size) ** 2


def image_tokens_per_tile(vision: Vision) -> int:
    """Q: the pixel shuffle joins 2 x 2 patches, so a quarter of the patches; 256 for 448 pixels."""
    return patches_per_tile(vision) // 4


def count_parameters(model: Model) -> dict[str, int]:
    """Number of parameters by module, tied weights counted once, padding heads of the published format not counted."""
    return {
        "vision": vision_parameters(model.vision),
        "projector": projector_parameters(model),
        "language_model": language_model_parameters(model.language_model),
    }


def vision_parameters(vision: Vision, num_dummy_heads: int = 0) -> int:
    """The tower's parameters; `num_dummy_heads` adds the published padding (qkv rows, q/k norms, proj columns)."""
    width, feed = vision.hidden_size, vision.intermediate_size
    heads = vision.num_attention_heads + num_dummy_heads
    inner = heads * (width // vision.num_attention_heads)
    embeddings = width + width * 3 * vision.patch_size**2 + width + width * (patches_per_tile(vision) + 1)
    attention = 3 * inner * (width + vision.qkv_bias) + width * inner + width  # qkv, proj with bias
    attention += 2 * inner * vision.qk_normalization
    mlp = 2 * width * feed + feed + width
    norms_and_scales = 4 * width + 2 * width * (vision.norm_type == "layer_norm")  # LayerNorm has biases
    return embeddings + vision.num_hidden_layers * (attention + mlp + norms_and_scales)


def projector_parameters(model: Model) -> int:
    """LayerNorm with bias over 4 E, then two Linears without biases over the decoder's feed-forward width."""
    shuffled, lm = 4 * model.vision.hidden_size, model.language_model
    return 2 * shuffled + shuffled * lm.intermediate_size + lm.intermediate_size * lm.hidden_size


def language_model_parameters(lm: LanguageModel) -> int:
    """The decoder's parameters; a tied head counts once."""
    ends = lm.vocab_size * lm.hidden_size * (1 if lm.tie_word_embeddings else 2)
    return ends + lm.hidden_size + lm.num_hidden_layers * decoder_layer_parameters(lm)


def decoder_layer_parameters(lm: LanguageModel) -> int:
    """One decoder layer: q, k, v (with biases in Qwen2), o, gate, up, down, two norms."""
    width = lm.hidden_size
    kv = lm.num_key_value_heads * (width // lm.num_attention_heads)
    attention = 2 * width * width + 2 * width * kv + (width + 2 * kv) * (lm.model_type == "qwen2")
    return attention + 3 * width * lm.intermediate_size + 2 * width


@dataclass(frozen=True)
class Flops:
    """Operations of one training step's parts. `useful` counts each once; `executed` adds what is recomputed.

    A part costs its forward once, once more where its inputs need a gradient, once more where its weights do.

    tile_forward: the tower on one tile.
    useful_per_token: decoder and head on one token of a sample of `sample_tokens` tokens, forward and backward.
    useful_per_tile: tower and projector on one tile, forward and backward.
    executed_per_token, executed_per_tile: with recompute.
    """

    sample_tokens: int
    tile_forward: float
    useful_per_token: float
    useful_per_tile: float
    executed_per_token: float
    executed_per_tile: float

    def step(self, tokens: int, tiles: int) -> tuple[float, float]:
        """(useful, executed) operations of a step with so many tokens and tiles, all ranks together."""
        return (
            tokens * self.useful_per_token + tiles * self.useful_per_tile,
            tokens * self.executed_per_token + tiles * self.executed_per_tile,
        )


def count_flops(model: Model, train: Train, sample_tokens: int, recompute: bool) -> Flops:
    """Operations per token and tile for a recipe's model, frozen modules and activation recompute.

    sample_tokens: length of a sample, because attention grows with it; causal attention looks at half of it on average.
    """
    trained = [getattr(train, module) == "full" for module in MODULES]
    tower_passes = _passes(trained[0], upstream=False)
    projector_passes = _passes(trained[1], upstream=trained[0])
    decoder_passes = _passes(trained[2], upstream=trained[0] or trained[1])

    tower = vision_forward_flops(model.vision)
    shuffled, lm = 4 * model.vision.hidden_size, model.language_model
    weights = shuffled * lm.intermediate_size + lm.intermediate_size * lm.hidden_size
    projector = 2.0 * weights * image_tokens_per_tile(model.vision)

    kv = lm.num_key_value_heads * (lm.hidden_size // lm.num_attention_heads)
    layer = 2 * lm.hidden_size**2 + 2 * lm.hidden_size * kv + 3 * lm.hidden_size * lm.intermediate_size
    body = 2.0 * lm.num_hidden_layers * layer
    attention = 2.0 * lm.num_hidden_layers * sample_tokens * lm.hidden_size  # QK' and PV, half the square
    head = 2.0 * lm.hidden_size * lm.vocab_size
    # attention itself has no weights: its backward is two products for each one of the forward, whatever is frozen
    per_token = body * decoder_passes + attention * (3 if decoder_passes > 1 else 1) + head * decoder_passes
    per_tile = tower * tower_passes + projector * projector_passes
    again = body + attention if recompute and decoder_passes > 1 else 0.0
    return Flops(sample_tokens, tower, per_token, per_tile, per_token + again, per_tile)


def _passes(trained: bool, upstream: bool) -> int:
    """Matrix products per weight: forward, plus one each for the gradients of inputs and of weights.

    A trained module counts three even where nothing upstream takes its input's gradient (the usual 6 N per token).
    """
    return 3 if trained else 2 if upstream else 1


def vision_forward_flops(vision: Vision) -> float:
    """The tower on one tile: 11.9e12 for InternViT-6B at 448 pixels."""
    tokens, width = patches_per_tile(vision) + 1, vision.hidden_size
    layer = 4 * width**2 + 2 * width * vision.intermediate_size
    patches = 2.0 * 3 * vision.patch_size**2 * width * patches_per_tile(vision)
    attention = 4.0 * tokens**2 * width * vision.num_hidden_layers
    return patches + 2.0 * tokens * layer * vision.num_hidden_layers + attention
