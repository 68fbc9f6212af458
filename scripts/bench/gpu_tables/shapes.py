"""What tables 3 and 4 train: shapes, the samples of a step, and how much of a shape fits. No torch.

The samples are those of one pack of 16,384 tokens with 28 tiles, of mixed lengths: a peer that pads them in fours gets
1.66 times as many positions (bench_padding.py measured 1.59 on the model of a mixture).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, get_args

from nvlm_train.engine.memory import predict_memory
from nvlm_train.model.flops import count_flops, count_parameters, image_tokens_per_tile, trainable_parameters
from nvlm_train.recipe import schema

TAG = 5  # tokens before each tile
# (tokens with all image tokens in the sequence, tiles of one picture), in the order in which they are drawn
SAMPLES = ((4096, 12), (2560, 6), (1024, 1), (3072, 7), (512, 0), (1792, 1), (640, 1), (2688, 0))
TRAINED_SHARE = 0.4  # the end of a sample's text: 22 % of all tokens
PEER_SAMPLES = 4  # samples that a peer pads to the longest of them
SHRUNK = 32  # lengths on a CPU are a 32nd
FILLED = 0.92  # of the device's memory that a prediction may take
RECOMPUTE = ("none", "selective", "full")
LIGHT_OPTIMIZERS = ("bf16", "8bit")  # parts of names of AdamWs whose moments take less than fp32

VISION: dict[str, dict[str, Any]] = {
    "cuda": schema.VISION_PRESETS["internvit_6b_448px_v1_5"],
    "cpu": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                patch_size=7),
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "1.5b": schema.LANGUAGE_MODEL_PRESETS["qwen2_1_5b_instruct"],
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": schema.LANGUAGE_MODEL_PRESETS["qwen2_7b_instruct"],
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "1.5b": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=160, tie_word_embeddings=True),
    "3b": dict(hidden_size=56, intermediate_size=104, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, vocab_size=160, tie_word_embeddings=True),
    "7b": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, vocab_size=160),
}  # fmt: skip
ROWS = ("1.5b", "7b")  # of table 3; the smaller one is also table 4's


def samples(device: str) -> list[tuple[int, int]]:
    """(tokens in nvlm_d, tiles) of each sample of a step."""
    return [(tokens // (1 if device == "cuda" else SHRUNK), tiles) for tokens, tiles in SAMPLES]


def make_recipe(
    device: str,
    decoder: str,
    *,
    architecture: str = "nvlm_d",
    tower_layers: int | None = None,
    recompute: str = "none",
    kernels: str = "auto",
    implementation: str | None = None,
) -> schema.Recipe:
    """The recipe of a row: tower frozen, projector and decoder trained, ZeRO-3 on one rank."""
    vision = dict(VISION[device])
    if tower_layers is not None:
        vision["num_hidden_layers"] = tower_layers
    decoders = DECODERS if device == "cuda" else TINY
    pack = sum(tokens for tokens, _ in samples(device))
    values: dict[str, Any] = {
        "run_name": "bench",
        "output_dir": "runs/bench",
        "model": {
            "architecture": architecture,
            "vision": vision,
            "language_model": {"max_position_embeddings": max(pack, 512), **decoders[decoder]},
        },
        "tokenizer": {"path": "none"},
        "data": {
            "mixture": {"bench": {"path": "none.jsonl", "license": "CC0-1.0"}},
            "max_tokens_per_sample": pack,
            "pack_tokens": pack,
        },
        "global_batch": {"samples": len(SAMPLES)},
        "max_steps": 1000,
        "optimizer": {"lr": 1e-5},
        "precision": "bf16" if device == "cuda" else "fp32",
        "activation_checkpointing": recompute,
        "vision_tiles_per_chunk": 28,
        "kernels": kernels,
    }  # fmt: skip
    if architecture != "nvlm_d":
        values["data"]["pack_tiles"] = sum(tiles for _, tiles in SAMPLES)
        values["train"] = {"cross_attention": "full"}
    if implementation is not None:
        values["optimizer"]["implementation"] = implementation
    return schema.Recipe.model_validate(values)


def implementations() -> tuple[str, ...]:
    """Names that `optimizer.implementation` takes here; none where the recipe has no such key."""
    field = schema.Optimizer.model_fields.get("implementation")
    if field is None:
        return ()
    return tuple(name for name in get_args(field.annotation) if isinstance(name, str))


def predicted(recipe: schema.Recipe) -> dict[str, int]:
    """Bytes on the device, by kind."""
    counts = count_parameters(recipe.model)
    return predict_memory(recipe, 1, counts, trainable_parameters(recipe.model, recipe.train))


def needed(recipe: schema.Recipe) -> int:
    """Bytes that the row will take, to choose what to try: the prediction, but the loss on the 22 % of labelled rows in
    pieces. A prediction that counts logits of all tokens (28 GiB) would leave out rows that fit."""
    lm, own = recipe.model.language_model, predicted(recipe)
    loss = 6 * lm.vocab_size * lm.hidden_size + 3 * 2**30  # gradient of the head in fp32 and bf16, a piece's logits
    return own["total"] - own["loss"] + min(own["loss"], loss)


def fit(row: str, device: str, memory: int | None, implementation: str | None) -> dict[str, Any]:
    """What of a row fits: {"decoder", "implementation", "tower_layers", "recompute", "note"}.

    A full 7B with fp32 masters and moments fits no single card, so that row takes an AdamW with lighter moments where
    the recipe has one, and else a 3B shape. Of what is left to choose: the whole tower with as little recompute as
    fits, then as many of its layers as fit with all of it. memory: bytes of the device; None: no limit.
    """
    known = implementations()
    light = [name for name in known if any(part in name for part in LIGHT_OPTIMIZERS)]
    asked = [implementation] if implementation is not None else [*light, None] if row == "7b" else [None]
    tries: list[tuple[str, str | None]] = [(row, name) for name in asked]
    if row == "7b":
        tries.append(("3b", implementation))
    layers = int(VISION[device]["num_hidden_layers"])

    def fits(decoder: str, name: str | None, tower_layers: int, recompute: str) -> bool:
        recipe = make_recipe(device, decoder, tower_layers=tower_layers, recompute=recompute, implementation=name)
        return memory is None or needed(recipe) <= FILLED * memory

    for decoder, name in tries:
        for recompute in RECOMPUTE:
            if fits(decoder, name, layers, recompute):
                return _fitted(device, row, decoder, name, layers, recompute, known)
    decoder, name = tries[-1]
    fewer = next((n for n in range(layers - 1, 0, -1) if fits(decoder, name, n, "full")), 1)
    return _fitted(device, row, decoder, name, fewer, "full", known)


def _fitted(
    device: str, row: str, decoder: str, name: str | None, layers: int, recompute: str, known: tuple[str, ...]
) -> dict[str, Any]:
    notes = []
    if decoder != row:
        lack = "with any optimizer of this version" if known else "with fp32 masters and moments, the only ones here"
        notes.append(f"a {decoder.upper()} shape, because {row.upper()} does not fit this device {lack}")
    notes.append(f"optimizer {name or 'AdamW, fp32 masters and moments'}")
    if layers != VISION[device]["num_hidden_layers"]:
        notes.append(f"{layers} of {VISION[device]['num_hidden_layers']} layers of the tower")
    if device == "cpu":
        notes.append("tiny sizes")
    return {
        "decoder": decoder,
        "implementation": name,
        "tower_layers": layers,
        "recompute": recompute,
        "note": "; ".join(notes),
    }


def in_sequence(architecture: str, tiles: int) -> int:
    """Tiles whose image tokens enter the sequence: all in D, the thumbnail (the last) in H, none in X."""
    return {"nvlm_d": tiles, "nvlm_h": min(tiles, 1), "nvlm_x": 0}[architecture]


def lengths(architecture: str, device: str, per_tile: int) -> list[int]:
    """Tokens of each sample in the decoder's sequence; text and tags are the same in all three."""
    return [tokens - per_tile * (tiles - in_sequence(architecture, tiles)) for tokens, tiles in samples(device)]


def operations(recipe: schema.Recipe, device: str) -> tuple[float, float]:
    """Useful operations of a step: (with the frozen tower's forward, without). Attention by each sample's own length;
    in nvlm_h as if thumbnails were read by cross-attention too."""
    own = lengths(recipe.model.architecture, device, image_tokens_per_tile(recipe.model.vision))
    whole = tower = 0.0
    for tokens, (_, tiles) in zip(own, samples(device), strict=True):
        flops = count_flops(recipe.model, recipe.train, tokens, recipe.activation_checkpointing)
        whole += flops.step(tokens, tiles)[0]
        tower += tiles * flops.tile_forward
    return whole, whole - tower


def padded_positions(device: str) -> int:
    """Positions that a peer computes: samples in fours, each as long as the longest of its four."""
    own = [tokens for tokens, _ in samples(device)]
    groups = [own[start : start + PEER_SAMPLES] for start in range(0, len(own), PEER_SAMPLES)]
    return sum(len(group) * max(group) for group in groups)


def starts(sizes: list[int]) -> list[int]:
    """Where each begins. Example, [3, 2, 4]: [0, 3, 5]."""
    return [0, *accumulate(sizes)][:-1]
