"""Predicted memory of one rank, by kind, from the recipe and the number of ranks alone.

States are exact arithmetic; activations are a hand tally of what autograd keeps and may be off by a third. The
allocator's slack, CUDA's context and NCCL's buffers (together 2 to 5 GiB on a GPU) are not in it.
"""

from __future__ import annotations

from nvlm_train.recipe.schema import Recipe

KINDS = (
    "weights",
    "hpz_copy",
    "gradients",
    "optimizer",
    "tower_replicated",
    "gathered",
    "buckets",
    "activations",
    "recomputed_layer",
    "loss",
    "vision_activations",
)


# Bits a weight of bitsandbytes' NF4 with doubly quantised scales: 4, 8 for each 64, 32 for each 256 of those
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def predict_memory(
    recipe: Recipe, world_size: int, parameters: dict[str, int], trainable_by_module: dict[str, int]
) -> dict[str, int]:
    """Bytes per rank of each of `KINDS`, and their sum as `total`; what is offloaded is no part of it, but `host`.

    parameters: counts of the whole modules, as `model.flops.count_parameters` gives them; trainable_by_module: what the
    optimizer steps of each, as `model.flops.trainable_parameters` gives them.
    weights: what the engine shares out (a frozen tower is replicated instead: `tower_replicated`), adapters included.
    gradients: fp32 accumulation; stage 1 in bf16 keeps those of the last micro-step in bf16 besides.
    optimizer: fp32 master, exp_avg, exp_avg_sq (stage 0: the weights are the masters).
    hpz_copy: the second copy of a share that hpZ keeps.
    gathered, buckets: what stage 3 holds whole at a time (of 4-bit weights: the largest, unpacked for its product), and
    what is in flight in a reduction. Whole are the module at work, and what is fetched ahead or kept for a use within
    max_reuse_distance (to and fro, so about half of that); `plan.trace` runs DeepSpeed's rules and finds 0 to 10 % less
    for the recipes here.
    activations: what stays until backward; recomputed_layer: the layer at work when they are recomputed.
    loss: logits and their gradient when every token is labelled (fewer in practice).
    """
    stage, ranks = recipe.zero.stage, world_size
    number = 2 if recipe.precision == "bf16" else 4
    modes = {module: recipe.train.modes[module] for module in parameters}  # the model's modules
    trained = {module: mode != "frozen" for module, mode in modes.items()}
    outside = parameters["vision"] if recipe.tower_is_replicated else 0
    adapters = sum(count for module, count in trainable_by_module.items() if modes[module] == "lora")
    inside = sum(parameters.values()) - outside + adapters
    trainable = sum(trainable_by_module.values())

    def share(amount: int, from_stage: int) -> int:
        return -(-amount // ranks) if stage >= from_stage else amount

    lm, vision = recipe.model.language_model, recipe.model.vision
    tokens = recipe.micro_batch_size * recipe.data.pack_tokens
    patches = (vision.image_size // vision.patch_size) ** 2
    tile_tokens = patches // 4  # the pixel shuffle joins 2 x 2
    decoder_layer = parameters["language_model"] // lm.num_hidden_layers  # a little too large: embedding shared out
    largest = max(lm.vocab_size * lm.hidden_size, decoder_layer, parameters["projector"])
    ahead = recipe.zero.max_live_parameters if recipe.zero.prefetch_bucket_size else 0
    gathered = min(inside, max(largest + ahead, recipe.zero.max_reuse_distance * 6 // 10))
    hpz = min(recipe.zero.experimental.hpz_partition_size, ranks)

    kv = lm.num_key_value_heads * (lm.hidden_size // lm.num_attention_heads)
    products = lm.num_hidden_layers * (
        2 * lm.hidden_size * (lm.hidden_size + kv) + 3 * lm.hidden_size * lm.intermediate_size
    )
    quantized = products if recipe.train.quantize == "nf4" else 0
    # kept per token in a layer: two residual inputs, two norm outputs, q, attention's output; k, v; gate, up, silu,
    # product
    layer = tokens * number * (6 * lm.hidden_size + 2 * kv + 4 * lm.intermediate_size)
    if modes["language_model"] == "lora" and recipe.train.lora.language_model.dropout:
        layer += tokens * number * (6 * lm.hidden_size + lm.intermediate_size)  # the dropped-out inputs, all targets
    # per layer: its input alone; with the outputs of its products and of attention
    inputs = tokens * number * lm.hidden_size
    outputs = tokens * number * (5 * lm.hidden_size + 2 * kv + 2 * lm.intermediate_size)
    recompute = recipe.activation_checkpointing
    backward = any(trained.values())
    per_layer = {"none": layer, "selective": outputs, "full": inputs}[recompute]
    kept = per_layer * lm.num_hidden_layers + 2 * inputs if backward else 0  # and the last norm's two
    # as many tiles as image tokens fit into the packs; an image-free micro batch needs none of it
    tiles = -(-tokens // tile_tokens)
    crossing = 0
    if recipe.model.architecture != "nvlm_d":  # as many as pack_tiles allows; they are not among the tokens
        tiles = recipe.micro_batch_size * (recipe.data.pack_tiles or 0)
        heads, groups = recipe.model.cross_attention_heads
        rows = tiles * tile_tokens
        # a layer keeps per token: input, norm, q, attention's output, sum; per row of the memory: norm, k and v, and k
        # and v once more for the tags or the text that read it
        crossing = number * (
            tokens * 6 * lm.hidden_size + rows * (lm.hidden_size + 6 * groups * (lm.hidden_size // heads))
        )
        if recipe.model.cross_attention.feed_forward:
            crossing += number * tokens * (2 * lm.hidden_size + 4 * lm.intermediate_size)
        # with `selective` about two thirds of it are outputs of products and of attention
        share_kept = {"none": 3, "selective": 2, "full": 0}[recompute]
        kept += crossing * len(recipe.model.cross_attention_layers) * share_kept // 3 if backward else 0
    chunk = min(tiles, recipe.vision_tiles_per_chunk)
    width, feed = vision.hidden_size, vision.intermediate_size
    # kept per patch in a layer: two residual inputs, two norm outputs, qkv, q and k normalised, attention's output,
    # what is scaled twice; the outputs of fc1 and GELU
    tower_row = {"none": 12 * width + 2 * feed, "selective": 7 * width + feed, "full": width}[recompute]
    tower_layer = (patches + 1) * number * (12 * width + 2 * feed)
    inner = 0 if recipe.model.architecture == "nvlm_x" else 2 * lm.intermediate_size
    projector = tiles * tile_tokens * number * (8 * width + inner + lm.hidden_size)
    tower = chunk * tower_layer
    if trained["vision"]:
        tower = tiles * (patches + 1) * number * tower_row * vision.num_hidden_layers + (
            tower if recompute != "none" else 0
        )

    predicted = {
        "weights": share(inside - quantized, 3) * number + round(quantized * NF4_BITS / 8),
        "hpz_copy": -(-inside // hpz) * number if hpz > 1 else 0,
        "gradients": share(trainable, 2) * (6 if stage == 1 and number == 2 else 4),
        "optimizer": share(trainable, 1) * (12 if stage else 8),
        "tower_replicated": outside * number,
        "gathered": gathered * number
        if stage == 3 and ranks > 1
        else lm.hidden_size * lm.intermediate_size * number
        if quantized
        else 0,
        "buckets": min(trainable, recipe.zero.reduce_bucket_size)
        * (4 if recipe.zero.communication_data_type == "fp32" else 2),
        "activations": kept + projector,
        "recomputed_layer": layer + crossing if recompute != "none" or not backward else 0,
        "loss": tokens * lm.vocab_size * (number + 4 + 4 + (number if number == 2 else 0)),
        "vision_activations": tower,
    }
    offloaded = {
        "weights": recipe.zero.offload_param,
        "gradients": recipe.zero.offload_optimizer,
        "optimizer": recipe.zero.offload_optimizer,
    }
    host = sum(predicted[kind] for kind, where in offloaded.items() if where == "cpu")
    predicted |= {kind: 0 for kind, where in offloaded.items() if where != "none"}
    return {**predicted, "total": sum(predicted.values()), "host": host}
