"""Loading published folders: round trips, transformers' own folders, and every error by file and key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from make_tiny_checkpoints import random_state, write_internvit_folder, write_qwen2_folder
from model_cases import LANGUAGE_MODEL, VISION, make_config, make_model
from nvlm_train.errors import CheckpointError
from nvlm_train.model.nvlm import NvlmD
from nvlm_train.model.pretrained import (
    account,
    expected_shapes,
    fill,
    initial_value,
    load_into,
    merge,
    open_language_model_folder,
    open_vision_folder,
)
from nvlm_train.recipe import schema

torch.set_num_threads(1)

CONFIG = make_config()
TIED = make_config(tie_word_embeddings=True)


class Some:
    """Weights from a dictionary."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        return self.tensors[name].flatten()[begin:end]

    def where(self, name: str) -> str:
        return f"memory:{name}"


# ----------------------------------------------------------------------------------------------------------- it works


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_round_trip_through_folders(config: schema.Model, num_shards: int, tmp_path: Path) -> None:
    model = make_model(config)
    state = model.state_dict()
    write_internvit_folder(tmp_path / "v", config.vision, state)
    write_qwen2_folder(tmp_path / "l", config.language_model, state, num_shards=num_shards)
    weights = merge(
        open_vision_folder(tmp_path / "v", config.vision),
        open_language_model_folder(tmp_path / "l", config.language_model),
    )
    found = account(expected_shapes(config), weights)
    assert found.initialised == [f"projector.{n}" for n in ("fc1.weight", "fc2.weight", "norm.bias", "norm.weight")]
    assert found.loaded == sorted(n for n, _ in model.named_parameters() if not n.startswith("projector."))
    again = NvlmD(config)
    load_into(again, weights, config, seed=11)
    for name, parameter in again.named_parameters():
        wanted = initial_value(name, parameter.shape, 11, config) if name.startswith("projector.") else state[name]
        assert torch.equal(parameter, wanted), name
    shard = "model-00001-of-00003.safetensors" if num_shards == 3 else "model.safetensors"
    first = sorted(n for n in weights.names() if n.startswith("language_model."))[0]
    assert weights.where(first) == f"{tmp_path / 'l' / shard}:{first.removeprefix('language_model.')}"


@pytest.mark.parametrize(
    ("family", "tied", "shard_size"),
    [("Qwen2", False, "5GB"), ("Qwen2", False, "20KB"), ("Qwen2", True, "5GB"), ("Qwen2", True, "20KB"),
     ("Llama", False, "20KB"), ("Llama", True, "5GB")],
)  # fmt: skip
def test_a_folder_that_transformers_wrote(family: str, tied: bool, shard_size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    whole = make_config(tie_word_embeddings=tied, model_type=family.lower())
    config = whole.language_model
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            **LANGUAGE_MODEL,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert ("rope_theta" in json.loads((tmp_path / "config.json").read_text())) is False  # only in rope_parameters
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    weights = open_language_model_folder(tmp_path, config)
    model = NvlmD(whole, with_vision=False)
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    account(names, weights)
    load_into(model, weights, whole, seed=0)
    state = theirs.state_dict()
    for name, tensor in model.language_model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert (model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight) == tied


def test_mixed_types_are_read_as_stored_and_cast_on_loading(tmp_path: Path) -> None:
    state = random_state({n: s for n, s in expected_shapes(CONFIG).items() if n.startswith("language_model.")}, 0)
    mixed = {n: t.bfloat16() if "mlp" in n else t.half() if "norm" in n else t for n, t in state.items()}
    weights = open_language_model_folder(
        write_qwen2_folder(tmp_path, CONFIG.language_model, mixed, num_shards=2), CONFIG.language_model
    )
    assert {weights.dtype(n) for n in weights.names()} == {torch.bfloat16, torch.float16, torch.float32}
    model = NvlmD(CONFIG, with_vision=False).bfloat16()
    load_into(model, weights, CONFIG, seed=0)
    for name, parameter in model.named_parameters():
        if name in mixed:
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, mixed[name].bfloat16()), name


def test_every_rank_takes_its_slice(tmp_path: Path) -> None:
    """What ZeRO-3 does: pieces of q = ceil(numel / ranks) elements of the flattened tensor, the last ones short."""
    model = make_model()
    weights = Some({n: t for n, t in model.state_dict().items() if not n.startswith("projector.")})
    pieces: dict[str, list[Tensor]] = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for rank in range(3):

        def slice_of(parameter: nn.Parameter, rank: int = rank) -> tuple[int, int] | None:
            if parameter.ndim == 1:
                return None
            quota = -(-parameter.numel() // 3)
            return rank * quota, (rank + 1) * quota

        def write(parameter: nn.Parameter, value: Tensor) -> None:
            pieces.setdefault(names[id(parameter)], []).append(value)

        fill(model, weights, CONFIG, 9, slice_of, write)
    for name, parameter in model.named_parameters():
        wanted = weights.read(name) if name in weights.tensors else initial_value(name, parameter.shape, 9, CONFIG)
        if parameter.ndim == 1:
            assert len(pieces[name]) == 3 and all(torch.equal(piece, wanted) for piece in pieces[name])
        else:
            assert torch.equal(torch.cat(pieces[name]), wanted.flatten()), name


def test_later_weights_win() -> None:
    first, second = Some({"a": torch.zeros(1), "b": torch.zeros(1)}), Some({"b": torch.ones(2)})
    both = merge(first, second)
    assert both.names() == ["a", "b"] and both.shape("b") == (2,) and torch.equal(both.read("b"), torch.ones(2))
    assert both.where("a") == "memory:a" and both.dtype("a") == torch.float32
    assert merge().names() == []


# ---------------------------------------------------------------------------------------------------- initial values


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = make_config()
    shapes = expected_shapes(config)
    for name, shape in shapes.items():
        value = initial_value(name, shape, 5, config)
        assert value.dtype == torch.float32 and tuple(value.shape) == tuple(shape)
        assert torch.equal(value, initial_value(name, shape, 5, config))
        if name.endswith(".bias"):
            assert not value.any(), name
        elif name.endswith((".ls1", ".ls2")):
            assert (value == 0.1).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            std = 0.014 if name.startswith("projector.") else 0.02
            # the spread of a sample of n: within 5 / sqrt(2 n) of the true one
            assert abs(float(value.std()) / std - 1) <= 5 / (2 * value.numel()) ** 0.5, name
            assert not torch.equal(value, initial_value(name, shape, 6, config))
    names = [n for n in shapes if n.endswith("mlp.up_proj.weight")]
    assert not torch.equal(*(initial_value(n, shapes[n], 5, config) for n in names[:2]))


# ------------------------------------------------------------------------------------------------------------- errors


def edit(folder: Path, **changes: object) -> None:
    """config.json with some keys changed; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def vision_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_vision_folder(folder, CONFIG.vision)
    return str(caught.value)


def language_model_error(folder: Path, config: schema.Model = CONFIG) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_language_model_folder(folder, config.language_model)
    return str(caught.value)


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    return write_internvit_folder(tmp_path / "internvit", CONFIG.vision)


@pytest.fixture
def lm_folder(tmp_path: Path) -> Path:
    return write_qwen2_folder(tmp_path / "qwen2", CONFIG.language_model, num_shards=3)


def test_every_difference_between_config_and_recipe_is_listed(vision_folder: Path, lm_folder: Path) -> None:
    edit(vision_folder, hidden_size=99, num_hidden_layers=None, norm_type="layer_norm", qkv_bias=True,
         qk_normalization=False, hidden_act="silu", image_size=[448, 448], layer_norm_eps=1e-5)  # fmt: skip
    message = vision_error(vision_folder)
    assert message.startswith("8 problems")
    for part in (
        "hidden_size is 99, but the recipe's model.vision.hidden_size is 24",
        "num_hidden_layers is missing, but the recipe's model.vision.num_hidden_layers is 2",
        "norm_type is 'layer_norm', but the recipe's model.vision.norm_type is 'rms_norm'",
        "qkv_bias is True, but the recipe's model.vision.qkv_bias is False",
        "qk_normalization is False, but the recipe's model.vision.qk_normalization is True",
        "hidden_act is 'silu', but the architecture needs 'gelu'",
        "image_size is 448, but the recipe's model.vision.image_size is 28",
        "layer_norm_eps is 1e-05, but the recipe's model.vision.layer_norm_eps is 1e-06",
    ):
        assert f"{vision_folder}/config.json: {part}" in message
    edit(lm_folder, vocab_size=68, rope_theta=10000, tie_word_embeddings=True, model_type="llama", hidden_act="gelu",
         num_key_value_heads=4, use_sliding_window=True, max_position_embeddings=512,
         rope_scaling={"type": "dynamic", "factor": 3.0})  # fmt: skip
    message = language_model_error(lm_folder)
    assert message.startswith("9 problems")
    for part in (
        "vocab_size is 68, but the recipe's model.language_model.vocab_size is 67",
        "rope_theta is 10000, but the recipe's model.language_model.rope_theta is 1000000.0",
        "tie_word_embeddings is True, but the recipe's model.language_model.tie_word_embeddings is False",
        "model_type is 'llama', but the recipe's model.language_model.model_type is 'qwen2'",
        "hidden_act is 'gelu', but the architecture needs 'silu'",
        "num_key_value_heads is 4, but",
        "use_sliding_window is True, but",
        "max_position_embeddings is 512, but the recipe's",
        "rope_scaling.type is 'dynamic', but the architecture needs 'default'",
    ):
        assert f"{lm_folder}/config.json: {part}" in message


def test_folders_of_the_other_backbones(tmp_path: Path) -> None:
    """A Llama decoder and a tower of the 300M kind come back tensor by tensor; Llama's biases are refused."""
    config = make_config(
        {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
        model_type="llama", rope_theta=5e6, rms_norm_eps=1e-5,
    )  # fmt: skip
    vision = write_internvit_folder(tmp_path / "v", config.vision, seed=1)
    lm = write_qwen2_folder(tmp_path / "l", config.language_model, seed=2, num_shards=2)
    weights = merge(open_vision_folder(vision, config.vision), open_language_model_folder(lm, config.language_model))
    found = account(expected_shapes(config), weights)
    assert found.initialised == [
        "projector.fc1.weight",
        "projector.fc2.weight",
        "projector.norm.bias",
        "projector.norm.weight",
    ]
    assert "vision_model.encoder.layers.1.attn.qkv.bias" in found.loaded
    assert not any("q_norm" in name or "q_proj.bias" in name for name in found.loaded)
    again = NvlmD(config)
    load_into(again, weights, config, seed=0)
    for name, parameter in again.named_parameters():
        if not name.startswith("projector."):
            assert torch.equal(parameter, weights.read(name)), name
    edit(lm, attention_bias=True, mlp_bias=True)
    message = language_model_error(lm, config)
    assert "attention_bias is True, but the architecture needs False" in message and "mlp_bias is True" in message
    assert "model_type is 'llama', but the recipe's model.language_model.model_type is 'qwen2'" in language_model_error(
        lm
    )
    assert "norm_type is 'layer_norm', but the recipe's" in vision_error(vision)


def test_cross_attention_starts_as_the_recipe_says() -> None:
    config = make_config(
        architecture="nvlm_x", cross_attention={"gate_init": 0.25, "feed_forward": True, "initializer_std": 0.05}
    )
    shapes = expected_shapes(config)
    lm = {name: torch.zeros(shape) for name, shape in shapes.items() if not name.startswith(("projector.", "cross_"))}
    found = account(shapes, Some(lm))
    assert found.initialised == sorted(name for name in shapes if name.startswith(("projector.", "cross_attention.")))
    assert len([name for name in found.initialised if name.startswith("cross_attention.layers.2.")]) == 12
    for name in found.initialised:
        value = initial_value(name, shapes[name], 0, config)
        if name.endswith("_gate"):
            assert shapes[name] == (1,) and value.item() == 0.25
        elif name.startswith("cross_attention.") and value.ndim == 2:
            assert value.std() == pytest.approx(0.05, rel=0.1), name
        elif "norm" in name and name.endswith("weight"):
            assert (value == 1).all()
    with pytest.raises(CheckpointError, match=r"cross_attention.layers.0.attn_gate"):  # as a whole or not at all
        account(shapes, Some({**lm, "cross_attention.layers.1.attn_gate": torch.zeros(1)}))


def test_rope_theta_is_read_from_all_three_places(lm_folder: Path) -> None:
    for changes in (
        {"rope_theta": 1000000},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    ):
        edit(lm_folder, **changes)
        open_language_model_folder(lm_folder, CONFIG.language_model)
    edit(lm_folder, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    message = language_model_error(lm_folder)
    assert "rope_parameters.rope_theta is 10000.0, but" in message
    edit(lm_folder, rope_parameters=None)
    assert "rope_theta is missing, but" in language_model_error(lm_folder)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()


def pickles_only(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"\x80\x04N.")


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"<html>not found</html>")


def stale_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))


def index_outside(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    file.write_text(json.dumps(index))


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def quantised(folder: Path) -> None:
    file = folder / "model-00001-of-00003.safetensors"
    state = load_file(file)
    name = sorted(state)[0]
    save_file({**state, name: state[name].to(torch.int8)}, file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_config, "has no config.json"),
        (break_config, "config.json: cannot be read as JSON"),
        (list_config, "config.json: holds a list where a JSON object is needed"),
        (no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
        (pickles_only, "pytorch_model-00001-of-00001.bin: pickled weights can run code and are not read"),
        (missing_shard, "model-00002-of-00003.safetensors: is missing; model.safetensors.index.json places 13 tensors"),
        (truncated_shard, "model-00003-of-00003.safetensors: not a complete safetensors file"),
        (garbage_shard, "model-00003-of-00003.safetensors: not a complete safetensors file"),
        (stale_index, "model-00001-of-00003.safetensors:model.layers.9.extra: is not in the file"),
        (index_outside, "names '../elsewhere.safetensors'; shards must lie in the folder itself"),
        (index_without_map, "has no weight_map"),
        (quantised, "has type I8; floating-point weights"),
    ],
)
def test_a_damaged_folder_is_named(harm: Callable[[Path], None], message: str, lm_folder: Path) -> None:
    open_language_model_folder(lm_folder, CONFIG.language_model)
    harm(lm_folder)
    said = language_model_error(lm_folder)
    assert message in said and str(lm_folder) in said


def test_several_problems_are_reported_at_once(lm_folder: Path) -> None:
    missing_shard(lm_folder)
    truncated_shard(lm_folder)
    edit(lm_folder, vocab_size=3)
    message = language_model_error(lm_folder)
    assert message.startswith("3 problems") and message.count("\n") == 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in vision_error(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in vision_error(tmp_path / "file")


def test_padded_heads_and_whole_models_are_refused(vision_folder: Path) -> None:
    file = vision_folder / "model.safetensors"
    state = load_file(file)
    padded = {n: torch.cat([t, t[:24]]) if n.endswith("qkv.weight") else t for n, t in state.items()}
    save_file(padded, file)
    message = vision_error(vision_folder)
    assert "encoder.layers.0.attn.qkv.weight: 96 rows are 32 channels of heads, but the tower is 24 wide" in message
    save_file({f"vision_model.{n}": t for n, t in state.items()}, file)
    assert "holds a whole vision-language model" in vision_error(vision_folder)


def test_a_tied_folder_may_repeat_its_head_but_not_differ(tmp_path: Path) -> None:
    folder = write_qwen2_folder(tmp_path, TIED.language_model)
    file = folder / "model.safetensors"
    state = load_file(file)
    assert "lm_head.weight" not in state
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    weights = open_language_model_folder(folder, TIED.language_model)
    assert "language_model.lm_head.weight" not in weights.names()
    account({n: s for n, s in expected_shapes(TIED).items() if n.startswith("language_model.")}, weights)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, file)
    assert "lm_head.weight: differs from model.embed_tokens.weight" in language_model_error(folder, TIED)


def test_account_lists_every_missing_unexpected_and_misshaped_tensor() -> None:
    shapes = expected_shapes(CONFIG)
    tensors = {n: torch.zeros(s) for n, s in shapes.items() if not n.startswith("projector.")}
    del tensors["vision_model.encoder.layers.1.ls2"]
    del tensors["language_model.model.norm.weight"]
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["language_model.model.layers.0.self_attn.o_proj.bias"] = torch.zeros(3)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        account(shapes, Some(tensors))
    message = str(caught.value)
    assert message.startswith("4 problems")
    assert "vision_model.encoder.layers.1.ls2 [24]: missing" in message
    assert "language_model.model.norm.weight [32]: missing" in message
    assert "memory:language_model.model.layers.0.mlp.up_proj.weight has shape [3, 4], the model [56, 32]" in message
    assert "memory:language_model.model.layers.0.self_attn.o_proj.bias is not in the model" in message


def test_a_module_is_new_as_a_whole_or_not_at_all() -> None:
    shapes = expected_shapes(CONFIG)
    tensors = {n: torch.zeros(s) for n, s in shapes.items() if n != "projector.fc2.weight"}
    with pytest.raises(CheckpointError, match=r"projector.fc2.weight \[32, 56\]: missing"):
        account(shapes, Some(tensors))
    everything = account(shapes, merge(), may_be_new=("vision_model.", "projector.", "language_model."))
    assert everything.initialised == sorted(shapes) and not everything.loaded
    extra = account(
        shapes, Some({n: torch.zeros(s) for n, s in shapes.items()} | {"x.rotary_emb.inv_freq": torch.zeros(1)})
    )
    assert extra.loaded == sorted(shapes) and extra.ignored == ["x.rotary_emb.inv_freq"]


def test_filling_with_a_wrong_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"memory:projector.fc1.weight has shape \[2\], the model \[56, 96\]"):
        load_into(NvlmD(CONFIG), Some({"projector.fc1.weight": torch.zeros(2)}), CONFIG, seed=0)


def test_the_published_config_of_the_tower_is_accepted(vision_folder: Path) -> None:
    """The published InternViT config has no norm_type; hidden keys do not matter."""
    config = json.loads((vision_folder / "config.json").read_text())
    assert "norm_type" not in config and config["hidden_size"] == VISION["hidden_size"]
    open_vision_folder(vision_folder, CONFIG.vision)
