"""NVLM-X and NVLM-H: what reads what, against a dense mask written down token by token, and what must not change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import (
    IMAGE_TOKENS,
    Crossing,
    at_most,
    cross_pack,
    gradients,
    largest_difference,
    make_config,
    make_model,
    pack,
    set_gates,
    worst,
)
from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.model.attention import rotary_tables
from nvlm_train.model.nvlm import Nvlm, class_of
from nvlm_train.model.projector import pixel_shuffle
from nvlm_train.model.vision import encode_tiles
from nvlm_train.recipe import schema

torch.set_num_threads(1)

# text, an image of 3 tiles, text; text alone; two images with text between; images alone, of one tile and of four
ROWS = [[[4, -3, 6], [5]], [[2, -2, 3, -4, 3], [-1, 4]]]
CASES: dict[str, dict[str, Any]] = {
    "as in the table": {},
    "before, last image, fewer heads": {
        "place": "before", "text_reads": "last_image", "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "after, feed-forward, no norm of the memory": {
        "place": "after", "feed_forward": True, "memory_norm": "none", "every_layers": 2,
    },
    "no gates, all heads": {"gate": "none", "num_key_value_heads": 4, "feed_forward": True},
}  # fmt: skip
ONLY_X = {"tags alone": {"text_reads": "tags_only"}}
ONLY_H = {"thumbnails read nothing": {"thumbnail_reads_tiles": False}}
ALL = [
    *((architecture, name, case) for architecture in ("nvlm_x", "nvlm_h") for name, case in CASES.items()),
    *(("nvlm_x", name, case) for name, case in ONLY_X.items()),
    *(("nvlm_h", name, case) for name, case in ONLY_H.items()),
]


def config_of(architecture: str, case: dict[str, Any] | None = None, **sizes: Any) -> schema.Model:
    return make_config(architecture=architecture, cross_attention=case or {}, **sizes)


def dense_logits(model: Nvlm, made: Crossing) -> Tensor:
    """The logits with a dense mask: every token against every row of the memory, -inf where it does not see it."""
    batch, config = made.batch, model.config
    own, decoder = config.cross_attention, model.language_model.model
    features = encode_tiles(model.vision_model, batch.tiles, torch.float32)
    image = model.projector(pixel_shuffle(features).flatten(0, 1)).unflatten(0, (-1, IMAGE_TOKENS))  # [T, Q, D]
    rows, tile_of_row = [], []
    for t, tag in enumerate(made.tag_ids):
        if made.in_memory[t]:
            rows += [decoder.embed_tokens(torch.tensor(tag, dtype=torch.int64)), image[t]]
            tile_of_row += [t] * (len(tag) + IMAGE_TOKENS)
    memory = torch.cat(rows)  # [M, D]
    mask = made.visible[:, tile_of_row]  # [B*S, M]
    x = decoder.embed_tokens(batch.input_ids)  # [B, S, D]
    flat = image.flatten(0, 1)
    x = torch.where((batch.image_slots >= 0).unsqueeze(-1), flat[batch.image_slots.clamp(min=0)], x)

    def read(layer: torch.nn.Module, x: Tensor) -> Tensor:
        heads, groups = config.cross_attention_heads
        h = x.flatten(0, 1)
        kv = layer.memory_norm(memory) if own.memory_norm == "rms_norm" else memory
        size = h.shape[1] // heads
        q = layer.attn.q_proj(layer.input_layernorm(h)).unflatten(1, (heads, size)).transpose(0, 1)  # [N, L, H]
        k, v = (
            proj(kv).unflatten(1, (groups, size)).repeat_interleave(heads // groups, 1).transpose(0, 1)
            for proj in (layer.attn.k_proj, layer.attn.v_proj)
        )
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~mask, -1e30)
        out = layer.attn.o_proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        h = h + out * (layer.attn_gate.tanh() if own.gate == "tanh" else 1)
        if own.feed_forward:
            h = h + layer.mlp(layer.post_attention_layernorm(h)) * (layer.mlp_gate.tanh() if own.gate == "tanh" else 1)
        return torch.where(mask.any(1, keepdim=True), h, x.flatten(0, 1)).view_as(x)

    cos, sin = rotary_tables(batch.position_ids, 8, config.language_model.rope_theta, x.dtype)
    numbers = list(config.cross_attention_layers)
    for number, layer in enumerate(decoder.layers):
        reader = model.cross_attention.layers[numbers.index(number)] if number in numbers else None
        x = read(reader, x) if reader and own.place == "before" else x
        x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, batch.cu_seqlens, batch.max_seqlen)
        x = read(reader, x) if reader and own.place == "between" else x
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        x = read(reader, x) if reader and own.place == "after" else x
    return model.language_model.lm_head(decoder.norm(x))


@pytest.mark.parametrize(("architecture", "name", "case"), ALL, ids=[f"{a} {n}" for a, n, _ in ALL])
def test_logits_and_every_gradient_equal_a_dense_mask(architecture: str, name: str, case: dict[str, Any]) -> None:
    config = config_of(architecture, case)
    made = cross_pack(ROWS, config, pad=2)
    model = make_model(config, gate=0.5)
    logits, expected = model.logits(made.batch), dense_logits(model, made)
    at_most(largest_difference(logits, expected), 3e-6, "logits")  # worst seen 9.3e-7
    labels = made.batch.labels.flatten()
    model(made.batch).backward()
    own = gradients(model)
    F.cross_entropy(expected.flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    at_most(worst(own, gradients(model)), 5e-6, "gradients")  # worst seen 1.7e-6
    # the mask has power: one tile more or less shows
    tile = next(t for t in range(made.visible.shape[1]) if made.visible[:, t].any() and not made.visible[:, t].all())
    wrong = replace(made, visible=made.visible.clone())
    wrong.visible[:, tile] = ~wrong.visible[:, tile]
    assert largest_difference(dense_logits(model, wrong), expected) > 1e-3


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_a_token_reads_its_rows_and_no_other(architecture: str) -> None:
    """One layer by perturbation: the gradient of a token with respect to a tile is exactly zero or it is not."""
    config = config_of(architecture)
    made = cross_pack(ROWS, config, pad=1)
    model, batch = make_model(config, gate=0.5), made.batch
    assert batch.memory is not None
    num_rows = int(batch.memory.rows.max()) + 1
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*batch.input_ids.shape, 32, generator=generator)
    memory = torch.randn(num_rows, 32, generator=generator, requires_grad=True)
    out = model.cross_attention.layers[0](x, memory, batch.memory)
    sizes = [IMAGE_TOKENS + len(tag) if inside else 0 for tag, inside in zip(made.tag_ids, made.in_memory, strict=True)]
    tile_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for token in range(batch.input_ids.numel()):
        (grad,) = torch.autograd.grad(out.flatten(0, 1)[token].sum(), memory, retain_graph=True)
        seen = made.visible[token][tile_of_row]  # [M]
        assert (grad[seen] != 0).any(1).all() and not grad[~seen].any(), token
        if not seen.any():
            assert torch.equal(out.flatten(0, 1)[token], x.flatten(0, 1)[token])


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_no_tile_of_a_neighbour_or_of_a_later_image_is_seen(architecture: str) -> None:
    """The whole model: each token's logits depend on the tiles before it in its own sample, and on no others."""
    config = config_of(architecture)
    made = cross_pack(ROWS, config)
    model = make_model(config, gate=0.5, with_vision=False)
    features = torch.randn(
        len(made.batch.tiles), 16, 24, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    logits = model.logits(made.batch, features).flatten(0, 1)
    bounds = made.batch.cu_seqlens.tolist()
    seen_by_segment = 0
    for begin, end in pairwise(bounds):
        reached = torch.zeros(len(made.batch.tiles), dtype=torch.bool)
        for token in range(begin, end):
            reached |= made.visible[token]
            slots = made.batch.image_slots.flatten()[begin : token + 1]
            reached[slots[slots >= 0] // IMAGE_TOKENS] = True  # thumbnails, through self-attention
            (grad,) = torch.autograd.grad(logits[token].square().sum(), features, retain_graph=True)
            assert torch.equal(grad.flatten(1).any(1), reached), token
        seen_by_segment += int(reached.sum())
    assert seen_by_segment == len(made.batch.tiles)  # every tile is seen, each in one sample


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_at_their_start_the_gates_leave_the_plain_decoder_bit_for_bit(case: dict[str, Any]) -> None:
    if case.get("gate") == "none":
        pytest.skip("without gates nothing is closed")
    config = config_of("nvlm_x", case)
    made = cross_pack(ROWS, config, pad=2)
    model, language_model = make_model(config), make_model(config).language_model
    batch = made.batch
    x = language_model.model.embed_tokens(batch.input_ids)
    plain = language_model.lm_head(language_model.model(x, batch.position_ids, batch.cu_seqlens, batch.max_seqlen))
    assert torch.equal(model.logits(batch), plain)
    set_gates(model, 0.5)
    assert largest_difference(model.logits(batch), plain) > 1e-2


def test_at_their_start_nvlm_h_is_nvlm_d_over_the_thumbnails() -> None:
    config = config_of("nvlm_h")
    batch = cross_pack(ROWS, config, pad=2).batch
    model = make_model(config)
    of_d = class_of(make_config())(make_config())
    of_d.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("cross_attention.")})
    assert torch.equal(model.logits(batch), of_d.logits(replace(batch, memory=None)))


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_text_without_an_image_passes_unchanged_at_any_gate(architecture: str, case: dict[str, Any]) -> None:
    """Alone and beside an image: the same bits whatever the gates are, and whatever the neighbour's image is."""
    config = config_of(architecture, case)
    for rows in ([[[6], [5]]], ROWS, [[[1]]]):
        made = cross_pack(rows, config)
        blind = ~made.visible.any(1)
        # what self-attention hands on from tokens that read is not unchanged: only samples without an image are
        bounds = made.batch.cu_seqlens.tolist()
        for begin, end in pairwise(bounds):
            blind[begin:end] &= bool(blind[begin:end].all()) and bool(
                (made.batch.image_slots.flatten()[begin:end] < 0).all()
            )
        assert blind.any()
        outs = []
        for gate, seed in ((0.0, 0), (0.5, 0), (-3.0, 1)):
            model = make_model(config, gate=gate)
            tiles = torch.randint(
                0, 256, made.batch.tiles.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
            )
            outs.append(model.logits(replace(made.batch, tiles=tiles)).flatten(0, 1)[blind])
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_packed_equals_one_sample_at_a_time(architecture: str) -> None:
    config = config_of(architecture, {"feed_forward": True})
    model = make_model(config, gate=0.5)
    made = cross_pack(ROWS, config, pad=3)
    loss = model(made.batch)
    loss.backward()
    own = gradients(model)
    losses, tile = [], 0
    flat = {name: getattr(made.batch, name).flatten() for name in ("input_ids", "labels")}
    bounds = made.batch.cu_seqlens.tolist()
    spans = [span for span in pairwise(bounds) if (flat["labels"][slice(*span)] != IGNORE_INDEX).any()]  # no padding
    for sample, (begin, end) in zip([sample for row in ROWS for sample in row], spans, strict=True):
        alone = cross_pack([[sample]], config).batch
        assert alone.input_ids.numel() == end - begin
        text = {name: value[begin:end].unsqueeze(0) for name, value in flat.items()}
        tiles = made.batch.tiles[tile : tile + len(alone.tiles)]
        trained = int((text["labels"] != IGNORE_INDEX).sum())
        losses.append(model(replace(alone, **text, tiles=tiles, num_trained_tokens=trained)))
        tile += len(tiles)
    at_most(largest_difference(loss, torch.stack(losses).sum()), 5e-7, "loss")  # worst seen 0
    torch.stack(losses).sum().backward()
    at_most(worst(own, gradients(model)), 3e-6, "gradients")  # worst seen 1.1e-6


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_without_an_image_gradients_of_its_way_are_zero_and_not_missing(architecture: str, gate: float) -> None:
    config = config_of(architecture, {"feed_forward": True})
    model = make_model(config, gate=gate, with_vision=False)
    batch = cross_pack([[[9], [6]]], config).batch
    model(batch).backward()
    for name, grad in gradients(model).items():
        assert grad is not None, name
        assert bool(grad.any()) == name.startswith("language_model."), name
    # as in the paper's pretraining: the decoder frozen, so that nothing before cross-attention needs a gradient
    model.language_model.requires_grad_(False)
    frozen = model(batch)
    assert frozen.requires_grad
    frozen.backward()
    for name, grad in gradients(model).items():
        if not name.startswith("language_model."):
            assert grad is not None and not grad.any(), name


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_the_null_pack_makes_the_same_module_calls_as_a_full_one(architecture: str) -> None:
    config = config_of(architecture, {"feed_forward": True})
    model = make_model(config, gate=0.5, tiles_per_chunk=2)
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: calls.append(name))
    recorded = []
    for rows in (ROWS[:1], [[[1]]], [[[3, -1, 2]]]):
        calls.clear()
        batch = replace(cross_pack(rows, config).batch, num_tile_chunks=2)
        model(batch).backward()
        recorded.append(list(calls))
    assert recorded[0].count("projector") == 1 and recorded[0].count("cross_attention.layers.0.attn.k_proj") == 1
    assert recorded[0] == recorded[1] == recorded[2]


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_recompute_changes_no_bit(architecture: str) -> None:
    config = config_of(architecture, {"feed_forward": True})
    batch = cross_pack(ROWS, config).batch
    found = []
    for mode in ("none", "full"):
        model = make_model(config, gate=0.5, activation_checkpointing=mode)
        loss = model(batch)
        loss.backward()
        found.append((loss, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert grad is not None and torch.equal(grad, found[1][1][name]), name


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_nothing_saved_for_backward_is_a_view_of_a_weight(architecture: str) -> None:
    """As for NVLM-D: under ZeRO-3 a saved view would keep the gathered weight alive until backward."""
    config = config_of(architecture, {"feed_forward": True}, tie_word_embeddings=True)
    model = make_model(config, gate=0.5)
    owners = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    parameters = {id(p) for p in model.parameters()}
    views: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        name = owners.get(tensor.untyped_storage().data_ptr())
        if name is not None and id(tensor) not in parameters and tensor.ndim != 2:  # matrices: see test_nvlm.py
            views.append(f"{name} {tuple(tensor.shape)}")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(cross_pack(ROWS, config).batch)
    assert not views


@pytest.mark.parametrize("architecture", ["nvlm_x", "nvlm_h"])
def test_bf16_trains(architecture: str) -> None:
    config = config_of(architecture, {"feed_forward": True})
    model = make_model(config, gate=0.5).bfloat16()
    loss = model(cross_pack(ROWS, config).batch)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad is not None and grad.dtype == torch.bfloat16 and torch.isfinite(grad).all(), name


def test_a_batch_for_nvlm_d_is_refused() -> None:
    with pytest.raises(ValueError, match="laid out for nvlm_d"):
        make_model(config_of("nvlm_x"))(pack([[(5, 0)]]))


def test_which_layers() -> None:
    for layers, every, expected in (
        (80, None, (7, 15, 23, 31, 39, 47, 55, 63, 71, 79)),
        (60, None, (5, 11, 17, 23, 29, 35, 41, 47, 53, 59)),
        (28, None, (2, 5, 8, 11, 14, 17, 20, 23, 26)),
        (3, None, (0, 1, 2)),
        (9, 4, (3, 7)),
    ):
        config = config_of("nvlm_x", {"every_layers": every}, num_hidden_layers=layers)
        assert config.cross_attention_layers == expected
    assert make_config(num_hidden_layers=80).cross_attention_layers == ()


def test_batch_moves_with_its_memory() -> None:
    batch: Batch = cross_pack(ROWS, config_of("nvlm_h")).batch
    moved = batch.to("meta")
    assert moved.memory is not None and all(
        getattr(moved.memory, name).is_meta for name in ("ids", "slots", "query_rows", "cu_queries", "rows", "cu_rows")
    )
