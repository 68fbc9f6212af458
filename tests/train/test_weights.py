"""What `init_from` names, opened as one: whole models, backbones, earlier runs, and what becomes of every tensor."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from make_tiny_checkpoints import random_state, write_internvit_folder, write_nvlm_d_folder, write_qwen2_folder
from nvlm_train import checkpoint
from nvlm_train.errors import CheckpointError
from nvlm_train.model import key_map
from nvlm_train.model.pretrained import expected_shapes, part_of
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import recipe_to_dict
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train.weights import account_for_weights, account_table, fetch_command, open_weights

torch.set_num_threads(1)

RECIPE = """
run_name: tiny
output_dir: run
model:
  vision:
    {hidden_size: 24, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 3, image_size: 28,
     patch_size: 7}
  language_model:
    {hidden_size: 32, intermediate_size: 56, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
     vocab_size: 67, max_position_embeddings: 512}
tokenizer: {path: tokenizer}
data: {mixture: {a: {path: a.jsonl}}, max_tokens_per_sample: 256, pack_tokens: 512, pack_tiles: 16}
global_batch: {samples: 4}
max_steps: 3
optimizer: {lr: 1.0e-3}
"""


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "r.yaml", overrides).recipe


def save_run(run: Path, of: Recipe, trained: tuple[str, ...], frozen: Any) -> dict[str, torch.Tensor]:
    """A run directory as training leaves it: `trained` modules in its checkpoint, others where `frozen` has them."""
    shapes = {n: s for n, s in expected_shapes(of.model).items() if n.startswith(trained)}
    masters = random_state(shapes, seed=11)
    names = [name for name in frozen.names() if not name.startswith(trained)]
    parts = {name: part for name in names if (part := part_of(frozen, name)) is not None}
    run.mkdir()
    checkpoint.write_base(run, {name: frozen.where(name) for name in names}, parts)
    checkpoint.save(
        run, 3, {n: {k: t.flatten() for k in checkpoint.STATE_KEYS} for n, t in masters.items()},
        {n: tuple(t.shape) for n, t in masters.items()}, {"progress": {}}, rank=0, world_size=1,
        gather=lambda value: [value],
    )  # fmt: skip
    content = {"format": checkpoint.FORMAT, "recipe": recipe_to_dict(of), "recipe_hash": "0", "attempts": []}
    checkpoint.write_json(run / "recipe.json", content)
    return masters


def test_a_whole_model_and_the_run_that_trained_on_it(tmp_path: Path) -> None:
    """The tower stays in the published file, dummy heads and all; base.json says which part of it is the tower."""
    of = recipe(tmp_path, f"init_from.model={tmp_path / 'nvlm_d'}")
    state = random_state(expected_shapes(of.model), 5)
    write_nvlm_d_folder(tmp_path / "nvlm_d", of.model, state, nonzero_dummies=True)
    weights = open_weights(of)
    found = account_for_weights(of, weights)
    assert found.loaded == sorted(state) and not found.initialised and not found.ignored
    table = {line.split()[0]: line.split()[1:] for line in account_table(found, weights)[1:]}
    assert table["vision"] == ["30", "0", "0", str(tmp_path / "nvlm_d")] and table["projector"][:3] == ["4", "0", "0"]

    masters = save_run(tmp_path / "run", of, ("projector.", "language_model."), weights)
    opened = checkpoint.open_checkpoint(tmp_path / "run", checksums=True)
    for name in expected_shapes(of.model):
        wanted = masters[name] if name in masters else weights.read(name)
        assert tuple(opened.shape(name)) == tuple(wanted.shape) and opened.dtype(name) == wanted.dtype
        assert torch.equal(opened.read(name), wanted), name
        assert torch.equal(opened.read_slice(name, 3, 9), wanted.flatten()[3:9]), name
        assert (part_of(opened, name) is None) == (name in masters or key_map.padded_kind(name) is None)
    # a second stage takes all of it from the run, and a third from the second
    second = recipe(tmp_path, f"init_from.run={tmp_path / 'run'}", "train.projector=frozen")
    again = open_weights(second)
    assert account_for_weights(second, again).loaded == sorted(state)
    masters = save_run(tmp_path / "second", second, ("language_model.",), again)
    third = open_weights(recipe(tmp_path, f"init_from.run={tmp_path / 'second'}"))
    for name in state:
        assert torch.equal(third.read(name), masters[name] if name in masters else opened.read(name)), name


@pytest.mark.parametrize("architecture", ["nvlm_d", "nvlm_x", "nvlm_h"])
def test_pretraining_keeps_projector_and_cross_attention_and_fine_tuning_adds_the_backbones(
    architecture: str, tmp_path: Path
) -> None:
    of = recipe(
        tmp_path, f"model.architecture={architecture}", f"init_from.vision={tmp_path / 'v'}",
        f"init_from.language_model={tmp_path / 'l'}",
    )  # fmt: skip
    write_internvit_folder(tmp_path / "v", of.model.vision, seed=1)
    write_qwen2_folder(tmp_path / "l", of.model.language_model, seed=2, num_shards=2)
    first = open_weights(of)
    new = account_for_weights(of, first).initialised
    before = {name: first.read(name).clone() for name in first.names()}
    assert {name.split(".")[0] for name in new} == {"projector"} | (
        {"cross_attention"} if architecture != "nvlm_d" else set()
    )
    masters = save_run(tmp_path / "run", of, ("projector.", "cross_attention."), first)
    assert sorted(masters) == new
    # the run goes to another machine: the backbones it used are gone, this recipe names its own copies
    shutil.move(tmp_path / "v", tmp_path / "v2")
    shutil.move(tmp_path / "l", tmp_path / "l2")
    overrides = [
        f"model.architecture={architecture}", f"init_from.run={tmp_path / 'run'}",
        f"init_from.vision={tmp_path / 'v2'}", f"init_from.language_model={tmp_path / 'l2'}",
    ]  # fmt: skip
    sft = recipe(tmp_path, *overrides)
    weights = open_weights(sft)
    found = account_for_weights(sft, weights)
    assert found.loaded == sorted(expected_shapes(of.model)) and not found.initialised
    for name in found.loaded:
        assert torch.equal(weights.read(name), masters[name] if name in masters else before[name]), name
    rows = account_table(found, weights)
    assert len(rows) == (4 if architecture == "nvlm_d" else 5)
    assert sum(row.endswith(str(tmp_path / "run" / "step_3")) for row in rows) == len(rows) - 3
    with pytest.raises(CheckpointError, match=r"v/model\.safetensors is missing"):
        open_weights(recipe(tmp_path, *overrides[:2]))


def test_what_is_named_in_the_wrong_place_is_told(tmp_path: Path) -> None:
    of = recipe(tmp_path)
    write_internvit_folder(tmp_path / "v", of.model.vision)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match=r"init_from.model: .*run is a run of ours; name it in init_from.run"):
        open_weights(recipe(tmp_path, f"init_from.model={tmp_path / 'run'}"))
    with pytest.raises(CheckpointError, match=r"init_from\.model takes the published NVLM-D or an export of ours"):
        open_weights(recipe(tmp_path, f"init_from.model={tmp_path / 'v'}"))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_weights(recipe(tmp_path, "init_from.model=nowhere"))
    with pytest.raises(
        CheckpointError, match=r"init_from\.run: .*v is a folder of weights.* name it in init_from\.model"
    ):
        open_weights(recipe(tmp_path, f"init_from.run={tmp_path / 'v'}"))
    # so does fetch, which waits only for a run that is not there yet
    for place, code in (("v", "CheckpointError"), ("run", 0), ("later", 0)):
        told = Namespace(recipe=str(tmp_path / "r.yaml"), overrides=[f"init_from.run={tmp_path / place}"], json=True)
        if code == 0:
            assert fetch_command(told) == 0
        else:
            with pytest.raises(CheckpointError, match="is a folder of weights"):
                fetch_command(told)


def test_what_shapes_do_not_tell_is_compared_with_the_earlier_run(tmp_path: Path) -> None:
    """The same shapes under other heads, another place in the stack or another rope are another model."""
    base = [
        "model.architecture=nvlm_x",
        "model.language_model.num_hidden_layers=4",
        "model.cross_attention.every_layers=3",
    ]
    of = recipe(tmp_path, *base, f"init_from.vision={tmp_path / 'v'}", f"init_from.language_model={tmp_path / 'l'}")
    write_internvit_folder(tmp_path / "v", of.model.vision)
    write_qwen2_folder(tmp_path / "l", of.model.language_model)
    save_run(tmp_path / "run", of, ("projector.", "cross_attention."), open_weights(of))
    base.append(f"init_from.run={tmp_path / 'run'}")
    later = recipe(
        tmp_path, *base, "model.cross_attention.gate_init=0.3", "model.cross_attention.text_reads=last_image",
        "model.language_model.max_position_embeddings=1024",
    )  # fmt: skip
    account_for_weights(later, open_weights(later))  # what only a start or the data concerns may differ
    other = {
        "model.cross_attention.every_layers=4": "cross_attention.every_layers is [2] in that run, but [3]",
        "model.cross_attention.place=after": "cross_attention.place is 'between' in that run, but 'after'",
        "model.cross_attention={num_attention_heads: 8, num_key_value_heads: 4, every_layers: 3}":
            "cross_attention.num_attention_heads is 4 in that run, but 8",
        "model.projector.layer_norm_eps=1.0e-3": "projector.layer_norm_eps is 1e-05 in that run, but 0.001",
        "model.language_model.rope_theta=5.0e+5": "language_model.rope_theta is 1000000.0 in that run, but 500000.0",
        "model.vision.num_attention_heads=6": "vision.num_attention_heads is 3 in that run, but 6",
        "model.architecture=nvlm_h": "is an nvlm_x, model.architecture is 'nvlm_h'",
    }  # fmt: skip
    for override, message in other.items():
        changed = recipe(tmp_path, *base, override)
        assert (
            set(expected_shapes(changed.model).values()) == set(expected_shapes(of.model).values()) or "_h" in override
        )
        with pytest.raises(CheckpointError, match=re.escape(message)):
            open_weights(changed)
    # a folder that brings the decoder is compared by its own config.json, so the run's does not matter
    write_qwen2_folder(
        tmp_path / "other", recipe(tmp_path, *base, "model.language_model.rope_theta=5.0e+5").model.language_model
    )
    brought = [*base, "model.language_model.rope_theta=5.0e+5", f"init_from.language_model={tmp_path / 'other'}"]
    open_weights(recipe(tmp_path, *brought))
