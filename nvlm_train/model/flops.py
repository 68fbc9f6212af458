"""Parameters and floating-point operations of a model, from its sizes alone.

One multiply-add is two operations; norms, activations and softmax are left out, as is usual when a share of a device's
peak is stated. Checked against `reference` figures in tests: NVLM-D-72B has 78,863,416,704 parameters, its tower needs
11.9 TFLOP per tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_train.recipe.schema import LanguageModel, Lora, Model, Train, Vision, lora_targets

NUM_DUMMY_HEADS = 7  # zero heads in published NVLM-D checkpoints: 25 real ones padded to 32 for tensor parallelism


def patches_per_tile(vision: Vision) -> int:
    """P: 32 x 32 = 1024 for 448 pixels and patches of 14."""
    return (vision.image_size // vision.patch_size) ** 2


def image_tokens_per_tile(vision: Vision) -> int:
    """Q: the pixel shuffle joins 2 x 2 patches, so a quarter of the patches; 256 for 448 pixels."""
    return patches_per_tile(vision) // 4


def modules_of(model: Model) -> tuple[str, ...]:
    """The modules that a recipe can train, in the order of the data's way through the model."""
    cross_attention = () if model.architecture == "nvlm_d" else ("cross_attention",)
    return ("vision", "projector", *cross_attention, "language_model")


def count_parameters(model: Model) -> dict[str, int]:
    """Number of parameters by module, tied weights counted once, padding heads of the published format not counted."""
    counts = {
        "vision": vision_parameters(model.vision),
        "projector": projector_parameters(model),
        "cross_attention": cross_attention_parameters(model),
        "language_model": language_model_parameters(model.language_model),
    }
    return {module: counts[module] for module in modules_of(model)}


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
    """LayerNorm with bias over 4 E (unless it is left out) and the Linears' weights, which have no biases."""
    return 8 * model.vision.hidden_size * (model.projector.norm == "layer_norm") + projector_weights(model)


def projector_weights(model: Model) -> int:
    """Two Linears over the decoder's feed-forward width; in nvlm_x a single one."""
    shuffled, lm = 4 * model.vision.hidden_size, model.language_model
    if model.architecture == "nvlm_x":
        return shuffled * lm.hidden_size
    return shuffled * lm.intermediate_size + lm.intermediate_size * lm.hidden_size


def cross_attention_parameters(model: Model) -> int:
    """All cross-attention layers: q, k, v, o, norms of tokens and memory, a gate, and the feed-forward part if any."""
    own, width = model.cross_attention, model.language_model.hidden_size
    gate = int(own.gate == "tanh")
    layer = sum(cross_attention_weights(model)) + width + width * (own.memory_norm == "rms_norm") + gate
    layer += (width + gate) * own.feed_forward
    return len(model.cross_attention_layers) * layer


def cross_attention_weights(model: Model) -> tuple[int, int]:
    """Matrix weights of one cross-attention layer: those that a token meets (q, o, feed-forward), and those that a row
    of the memory does (k, v)."""
    width, (heads, groups) = model.language_model.hidden_size, model.cross_attention_heads
    feed_forward = 3 * width * model.language_model.intermediate_size * model.cross_attention.feed_forward
    return 2 * width * width + feed_forward, 2 * width * groups * (width // heads)


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


def linear_shapes(model: Model) -> dict[str, dict[str, tuple[int, int]]]:
    """{module: {target: (inputs, outputs)}} of every linear layer that LoRA can be put on, one layer of the module."""
    vision, lm = model.vision, model.language_model
    e, ef, d, f = vision.hidden_size, vision.intermediate_size, lm.hidden_size, lm.intermediate_size
    kv = lm.num_key_value_heads * (d // lm.num_attention_heads)
    feed_forward = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    shapes = {
        "vision": {"qkv": (e, 3 * e), "proj": (e, e), "fc1": (e, ef), "fc2": (ef, e)},
        "projector": {"fc1": (4 * e, f), "fc2": (f, d), "fc": (4 * e, d)},
        "cross_attention": feed_forward,
        "language_model": {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)} | feed_forward,
    }
    if model.architecture != "nvlm_d":
        heads, groups = model.cross_attention_heads
        kv = groups * (d // heads)
        shapes["cross_attention"] = {
            "q_proj": (d, d),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (d, d),
        } | feed_forward
    return {m: {t: shapes[m][t] for t in lora_targets(model, m)} for m in modules_of(model)}


def num_layers(model: Model) -> dict[str, int]:
    """How often `linear_shapes` of a module are there."""
    return {
        "vision": model.vision.num_hidden_layers,
        "projector": 1,
        "cross_attention": len(model.cross_attention_layers),
        "language_model": model.language_model.num_hidden_layers,
    }


def adapter_parameters(model: Model, module: str, options: Lora) -> int:
    """Parameters of a module's LoRA adapters: rank x (inputs + outputs) of each target."""
    shapes = linear_shapes(model)[module]
    widths = sum(sum(shapes[target]) for target in options.targets or shapes)
    return num_layers(model)[module] * options.rank * widths


def trainable_parameters(model: Model, train: Train) -> dict[str, int]:
    """Parameters that the optimizer steps, by module: all of a `full` one, the adapters of a `lora` one, else 0."""
    counts = count_parameters(model)
    adapters = {m: adapter_parameters(model, m, getattr(train.lora, m)) for m in counts if train.modes[m] == "lora"}
    return {m: adapters.get(m, counts[m] if train.modes[m] == "full" else 0) for m in counts}


@dataclass(frozen=True)
class Flops:
    """Operations of one training step's parts. `useful` counts each once; `executed` adds what is recomputed.

    A part costs its forward once, once more where its inputs need a gradient, once more where its weights do. LoRA's
    adapters cost the same three of their own; the weights beside them need no gradient.

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


def count_flops(model: Model, train: Train, sample_tokens: int, recompute: str) -> Flops:
    """Operations per token and tile for a recipe's model, frozen modules and activation recompute.

    sample_tokens: length of a sample, because attention grows with it; causal attention looks at half of it on average.
    Every token of a sample is taken to read all of its tiles by cross-attention (nvlm_h: as if none were a thumbnail).
    recompute: the recipe's activation_checkpointing. What `selective` computes again is no product, so it counts as
    nothing here.
    """
    modes = {module: train.modes[module] for module in modules_of(model)}
    trained = {module: mode != "frozen" for module, mode in modes.items()}
    tower_passes = _passes(modes["vision"], upstream=False)
    projector_passes = _passes(modes["projector"], upstream=trained["vision"])
    images = trained["vision"] or trained["projector"]
    crossing = modes.get("cross_attention", "frozen")
    decoder_passes = _passes(modes["language_model"], upstream=images or crossing != "frozen")

    tower = vision_forward_flops(model.vision)
    lm, image_tokens = model.language_model, image_tokens_per_tile(model.vision)
    projector = 2.0 * projector_weights(model) * image_tokens

    kv = lm.num_key_value_heads * (lm.hidden_size // lm.num_attention_heads)
    layer = 2 * lm.hidden_size**2 + 2 * lm.hidden_size * kv + 3 * lm.hidden_size * lm.intermediate_size
    body = 2.0 * lm.num_hidden_layers * layer
    attention = 2.0 * lm.num_hidden_layers * sample_tokens * lm.hidden_size  # QK' and PV, half the square
    head = 2.0 * lm.hidden_size * lm.vocab_size
    # attention itself has no weights: its backward is two products for each one of the forward, whatever is frozen
    per_token = body * decoder_passes + attention * (3 if decoder_passes > 1 else 1) + head * decoder_passes
    per_tile = tower * tower_passes + projector * projector_passes
    beside = {  # forward of the adapters: two operations a parameter and row
        module: 2.0 * adapter_parameters(model, module, getattr(train.lora, module)) if mode == "lora" else 0.0
        for module, mode in modes.items()
    }
    tower_again = beside["vision"] * (patches_per_tile(model.vision) + 1)
    per_token += 3 * beside["language_model"]
    per_tile += 3 * (tower_again + beside["projector"] * image_tokens)
    again, again_per_tile = body + attention + beside["language_model"], 0.0
    if model.architecture != "nvlm_d":
        layers = len(model.cross_attention_layers)
        of_token, of_row = (2.0 * layers * weights for weights in cross_attention_weights(model))
        reading = 4.0 * layers * image_tokens * sample_tokens * lm.hidden_size  # QK' and PV of a tile
        per_token += of_token * _passes(crossing, upstream=images or trained["language_model"])
        per_token += 3 * beside["cross_attention"]  # as if k and v met tokens too, not the rows of the memory
        per_tile += of_row * image_tokens * _passes(crossing, upstream=images)
        per_tile += reading * (3 if decoder_passes > 1 else 1)
        again, again_per_tile = again + of_token, of_row * image_tokens + reading
    recomputed = recompute == "full" and decoder_passes > 1
    tower_again = (tower + tower_again) * (recompute == "full" and trained["vision"])
    return Flops(
        sample_tokens,
        tower,
        per_token,
        per_tile,
        per_token + again * recomputed,
        per_tile + again_per_tile * recomputed + tower_again,
    )


def _passes(mode: str, upstream: bool) -> int:
    """Matrix products per weight: forward, plus one each for the gradients of inputs and of weights.

    A trained module counts three even where nothing upstream takes its input's gradient (the usual 6 N per token), and
    one with adapters two.
    """
    return 3 if mode == "full" else 2 if upstream or mode == "lora" else 1


def vision_forward_flops(vision: Vision) -> float:
    """The tower on one tile: 11.9e12 for InternViT-6B at 448 pixels."""
    tokens, width = patches_per_tile(vision) + 1, vision.hidden_size
    layer = 4 * width**2 + 2 * width * vision.intermediate_size
    patches = 2.0 * 3 * vision.patch_size**2 * width * patches_per_tile(vision)
    attention = 4.0 * tokens**2 * width * vision.num_hidden_layers
    return patches + 2.0 * tokens * layer * vision.num_hidden_layers + attention
