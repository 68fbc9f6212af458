"""The whole model: images in the sequence, micro batches without images, gradients that are never missing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import (
    IMAGE_TOKENS,
    at_most,
    gradients,
    largest_difference,
    make_config,
    make_model,
    pack,
    segments,
    worst,
)
from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.model.pretrained import expected_shapes
from nvlm_train.model.projector import pixel_shuffle
from nvlm_train.model.vision import encode_tiles
from nvlm_train.recipe import schema

torch.set_num_threads(1)


def test_the_loss_is_the_summed_cross_entropy_of_the_logits() -> None:
    model = make_model()
    batch = pack([[(13, 2), (7, 0)], [(11, 1)]], pad=2)
    logits = model.logits(batch)
    assert logits.shape == (2, 22, 67)
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = model(batch)
    assert loss.dtype == torch.float32 and loss.shape == ()
    at_most(largest_difference(loss, wanted), 5e-7, "loss")  # worst seen 6.2e-8


def test_image_tokens_replace_embeddings_exactly_where_the_slots_say() -> None:
    model = make_model()
    batch = pack([[(9, 1), (6, 0)], [(11, 2)]])
    seen: list[Tensor] = []
    model.language_model.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(batch)
    features = encode_tiles(model.vision_model, batch.tiles, torch.float32)
    image = model.projector(pixel_shuffle(features)).flatten(0, 1)
    text = model.language_model.model.embed_tokens(batch.input_ids)
    for row in range(2):
        for position in range(15):
            slot = int(batch.image_slots[row, position])
            expected = image[slot] if slot >= 0 else text[row, position]
            assert torch.allclose(seen[0][row, position], expected, rtol=0, atol=1e-6), (row, position)
    assert int((batch.image_slots >= 0).sum()) == 3 * IMAGE_TOKENS


def test_packed_equals_one_sample_at_a_time_with_images() -> None:
    model = make_model()
    batch = pack([[(13, 2), (7, 0), (9, 1)], [(11, 1), (5, 0)]], pad=3)
    together = model.logits(batch).flatten(0, 1)
    apart = torch.cat([model.logits(part)[0] for part in segments(batch)])
    at_most(largest_difference(together, apart), 2e-6, "logits")  # worst seen 3.6e-7
    loss = model(batch)
    loss.backward()
    own = gradients(model)
    losses = [model(part) for part in segments(batch)]
    torch.stack(losses).sum().backward()
    at_most(largest_difference(loss, torch.stack(losses).sum()), 5e-7, "loss")  # worst seen 0
    at_most(worst(own, gradients(model)), 3e-6, "gradients")  # worst seen 1.0e-6


@pytest.mark.parametrize("kind", ["no image", "image that nothing takes", "no image, planned chunks"])
@pytest.mark.parametrize("with_vision", [True, False], ids=["tower inside", "tower outside"])
def test_without_image_tokens_image_gradients_are_zero_and_not_missing(kind: str, with_vision: bool) -> None:
    model = make_model(with_vision=with_vision)
    batch = pack([[(9, 0), (6, 0)]], num_tile_chunks=2 if "planned" in kind else 0)
    plain = model(batch).detach()
    features = None
    if kind == "image that nothing takes":
        tiles = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
        batch = replace(batch, tiles=tiles)
        features = None if with_vision else torch.randn(2, 16, 24)
    calls: list[int] = []
    model.projector.register_forward_hook(lambda *args: calls.append(1))
    loss = model(batch, features)
    loss.backward()
    assert torch.equal(loss, plain), "an image that nothing takes changed the loss"
    assert calls == [1]
    for name, grad in gradients(model).items():
        if name.startswith("language_model."):
            assert grad is not None and grad.any(), name
        else:
            assert grad is not None and not grad.any(), name


def test_a_batch_without_labels_has_zero_loss_and_no_missing_gradient() -> None:
    model = make_model()
    batch = pack([[(9, 1)]], labelled=0.0)
    assert batch.num_trained_tokens == 0
    loss = model(batch)
    assert torch.equal(loss, torch.tensor(0.0))
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad is not None and not grad.any(), name


def test_the_null_pack_makes_the_same_module_calls_as_a_full_one() -> None:
    """What ZeRO-3 needs of every rank: the same modules in the same order, whatever the batch holds."""
    model = make_model(tiles_per_chunk=2)
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: calls.append(name))
    recorded = []
    for batch in (
        pack([[(20, 3), (9, 0)]], num_tile_chunks=2),
        pack([[(1, 0)]], labelled=0.0, num_tile_chunks=2),
        pack([[(9, 1)], [(9, 1)]], num_tile_chunks=2),
    ):
        calls.clear()
        model(batch).backward()
        recorded.append(list(calls))
    assert recorded[0].count("projector") == 1 and recorded[0].count("vision_model") == 2
    assert recorded[0] == recorded[1] == recorded[2]


def test_features_from_outside_equal_the_tower_inside() -> None:
    inside, outside = make_model(), make_model(with_vision=False)
    outside.load_state_dict({n: t for n, t in inside.state_dict().items() if not n.startswith("vision_model.")})
    batch = pack([[(13, 2), (7, 0)]])
    inside.vision_model.requires_grad_(False)
    features = encode_tiles(inside.vision_model, batch.tiles, torch.float32)
    assert not features.requires_grad
    assert torch.equal(inside(batch), outside(batch, features))
    text = pack([[(8, 0)]])
    assert torch.equal(inside(text), outside(text, torch.zeros(0, 16, 24)))
    with pytest.raises(ValueError, match="2 tiles, but this model was built without its tower"):
        outside(batch)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_tiles_per_chunk_changes_nothing(chunk: int) -> None:
    batch = pack([[(13, 3), (9, 2)]])
    results = []
    for size in (chunk, 5):
        model = make_model(tiles_per_chunk=size)
        loss = model(batch)
        loss.backward()
        results.append((loss, gradients(model)))
    at_most(largest_difference(results[0][0], results[1][0]), 5e-7, "loss")  # worst seen 0
    at_most(worst(results[0][1], results[1][1]), 1e-6, "gradients")  # worst seen 1.8e-7


def test_filling_up_with_zero_tiles_changes_no_gradient() -> None:
    results = []
    for planned in (2, 5):
        model = make_model(tiles_per_chunk=2)
        loss = model(pack([[(13, 3), (9, 0)]], num_tile_chunks=planned))
        loss.backward()
        results.append((loss, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    at_most(worst(results[0][1], results[1][1]), 5e-7, "gradients")  # worst seen 0


@pytest.mark.parametrize("frozen", ["vision_model", "projector", "language_model"])
def test_a_frozen_part_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    batch = pack([[(13, 2), (7, 0)]])
    model = make_model()
    model(batch).backward()
    full = gradients(model)
    model.get_submodule(frozen).requires_grad_(False)
    model(batch).backward()
    for name, grad in gradients(model).items():
        if name.startswith(frozen):
            assert grad is None, name
        else:
            assert grad is not None and torch.equal(grad, full[name]), name


def test_nothing_saved_for_backward_is_a_view_of_a_weight() -> None:
    """Under ZeRO-3 a saved view keeps the gathered weight alive until backward; the Parameter itself does not.

    Matrix products are left out: engine/ has DeepSpeed replace F.linear by one that saves the Parameter.
    """
    model = make_model(make_config(tie_word_embeddings=True))
    owners = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    parameters = {id(p) for p in model.parameters()}
    views: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        name = owners.get(tensor.untyped_storage().data_ptr())
        if name is not None and id(tensor) not in parameters and tensor.ndim != 2:
            views.append(f"{name} {tuple(tensor.shape)}")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(pack([[(13, 2), (7, 0)]]))
    assert not views


def test_bf16_trains() -> None:
    model = make_model().bfloat16()
    loss = model(pack([[(13, 2), (7, 0)]]))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad is not None and grad.dtype == torch.bfloat16 and torch.isfinite(grad).all(), name


def test_the_whole_model_builds_without_memory_and_counts_as_published() -> None:
    """NVLM-D-72B: 78,863,416,704 parameters in 1556 tensors (reference: the published index)."""
    config = schema.Model.model_validate({"vision": "internvit_6b_448px_v1_5", "language_model": "qwen2_72b_instruct"})
    shapes = expected_shapes(config)
    assert len(shapes) == 1556
    counts = {"vision_model.": 0, "projector.": 0, "language_model.": 0}
    for name, shape in shapes.items():
        counts[name.split(".")[0] + "."] += torch.Size(shape).numel()
    assert counts == {"vision_model.": 5_536_496_000, "projector.": 620_717_056, "language_model.": 72_706_203_648}
    assert sum(counts.values()) == 78_863_416_704


def test_names_are_the_published_ones() -> None:
    """All 1556 names of the published index, with the projector's as `mlp1`."""
    folder = os.environ.get("NVLM_FIXTURES")
    if not folder:
        pytest.skip("NVLM_FIXTURES is not set: the published index is not here (the test above counts the names)")
    index = json.loads((Path(folder) / "nvlm-d-72b" / "model.safetensors.index.json").read_text())
    config = schema.Model.model_validate({"vision": "internvit_6b_448px_v1_5", "language_model": "qwen2_72b_instruct"})
    renamed = {"projector.norm": "mlp1.0", "projector.fc1": "mlp1.1", "projector.fc2": "mlp1.3"}
    ours = set()
    for name in expected_shapes(config):
        module, _, leaf = name.rpartition(".")
        ours.add(f"{renamed.get(module, module)}.{leaf}")
    assert ours == set(index["weight_map"])
