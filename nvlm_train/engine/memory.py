"""Predicted memory of one rank, by kind, from the recipe and the number of ranks alone.

States are exact arithmetic; activations are a hand tally of what autograd keeps and may be off by a third. The
allocator's slack, CUDA's context and NCCL's buffers (together 2 to 5 GiB on a GPU) are not in it.
"""

from __future__ import annotations

from nvlm_train.recipe.schema import Recipe

KINDS = (
    "weights",
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


def predict_memory(recipe: Recipe, world_size: int, parameters: dict[str, int]) -> dict[str, int]:
    """Bytes per rank of each of `KINDS`, and their sum as `total`; what is offloaded is no part of it, but `host`.

    parameters: counts of the whole modules, as `model.flops.count_parameters` gives them.
    weights: what the engine shares out (a frozen tower is replicated instead: `tower_replicated`).
    gradients: fp32 accumulation. optimizer: fp32 master, exp_avg, exp_avg_sq (stage 0: the weights are the
    masters).
    gathered, buckets: what stage 3 holds whole at a time, and what is in flight in a reduction.
    activations: what stays until backward; recomputed_layer: the layer at work when all are recomputed.
    loss: logits and their gradient when every token is labelled (fewer in practice).
    """
    stage, ranks = recipe.zero.stage, world_size
    number = 2 if recipe.precision == "bf16" else 4
    trained = {module: getattr(recipe.train, module) == "full" for module in parameters}
    outside = parameters["vision"] if recipe.tower_is_replicated else 0
    inside = sum(parameters.values()) - outside
    trainable = sum(count for module, count in parameters.items() if trained[module])

    def share(amount: int, from_stage: int) -> int:
        return -(-amount // ranks) if stage >= from_stage else amount

    lm, vision = recipe.model.language_model, recipe.model.vision
    tokens = recipe.micro_batch_size * recipe.data.pack_tokens
    patches = (vision.image_size // vision.patch_size) ** 2
    tile_tokens = patches // 4  # the pixel shuffle joins 2 x 2
    decoder_layer = parameters["language_model"] // lm.num_hidden_layers  # a little too large: embedding shared out
    largest = max(lm.vocab_size * lm.hidden_size, decoder_layer, parameters["projector"])
    gathered = min(inside, max(recipe.zero.max_live_parameters, largest) + recipe.zero.prefetch_bucket_size)

    kv = lm.num_key_value_heads * (lm.hidden_size // lm.num_attention_heads)
    # kept per token in a layer: two residual inputs, two norm outputs, q, attention's output; k, v; gate, up, silu,
    # product
    layer = tokens * number * (6 * lm.hidden_size + 2 * kv + 4 * lm.intermediate_size)
    inputs = tokens * number * lm.hidden_size * lm.num_hidden_layers
    recompute = recipe.activation_checkpointing == "full"
    backward = trained["language_model"] or trained["projector"] or trained["vision"]
    kept = 0 if not backward else inputs if recompute else layer * lm.num_hidden_layers
    # as many tiles as image tokens fit into the packs; an image-free micro batch needs none of it
    tiles = -(-tokens // tile_tokens)
    chunk = min(tiles, recipe.vision_tiles_per_chunk)
    tower_layer = (patches + 1) * number * (8 * vision.hidden_size + 2 * vision.intermediate_size)
    projector = tiles * tile_tokens * number * (8 * vision.hidden_size + 2 * lm.intermediate_size + lm.hidden_size)
    tower = tiles * tower_layer * vision.num_hidden_layers if trained["vision"] else chunk * tower_layer

    predicted = {
        "weights": share(inside, 3) * number,
        "gradients": share(trainable, 2) * 4,
        "optimizer": share(trainable, 1) * (12 if stage else 8),
        "tower_replicated": outside * number,
        "gathered": gathered * number if stage == 3 and ranks > 1 else 0,
        "buckets": min(trainable, recipe.zero.reduce_bucket_size)
        * (4 if recipe.zero.communication_data_type == "fp32" else 2),
        "activations": kept + projector,
        "recomputed_layer": layer if recompute or not backward else 0,
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
