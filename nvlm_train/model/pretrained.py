"""Weights from folders in published formats, checked against the recipe before anything is loaded.

A folder is a config.json beside model.safetensors or shards with an index. Nothing is unpickled, and tensors are read
one at a time from mapped files. Names inside the package are the model's own (`vision_model.*`, `language_model.*`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nvlm_train.errors import CheckpointError
from nvlm_train.log import get_logger
from nvlm_train.model import key_map, lora
from nvlm_train.model.key_map import Part
from nvlm_train.recipe import schema

log = get_logger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Protocol):
    """Tensors by our name, read one at a time."""

    def names(self) -> list[str]:
        """All names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored type, without reading the tensor."""

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored type; may be a view of a mapped file: do not write into it."""

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        """Elements begin to end (which may lie beyond the last) of the flattened tensor; reads no more than it must."""

    def where(self, name: str) -> str:
        """Where it is read from, as "file:key", for messages and for a run's record of its origin."""


# ------------------------------------------------------------------------------------------------- a folder of weights


@dataclass(frozen=True)
class _Entry:
    """One tensor of a folder: which file, under which key, what shape and type."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFolder:
    """The tensors of one folder, by our names. Open it with `open_vision_folder` or `open_language_model_folder`."""

    def __init__(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries
        self._files: dict[Path, Any] = {}

    def names(self) -> list[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.file not in self._files:
            self._files[entry.file] = _open(entry.file)
        tensor: Tensor = self._files[entry.file].get_tensor(entry.key)
        return tensor

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        return self.read(name).reshape(-1)[begin:end]  # the file is mapped: only these pages are read

    def where(self, name: str) -> str:
        entry = self._entries[name]
        return f"{entry.file}:{entry.key}"


class _Merged:
    """Several `Weights` as one; where two have a name, the later one's tensor is taken."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        self._of = {name: part for part in parts for name in part.names()}

    def names(self) -> list[str]:
        return sorted(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._of[name].read(name)

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        return self._of[name].read_slice(name, begin, end)

    def where(self, name: str) -> str:
        return self._of[name].where(name)

    def part(self, name: str) -> Part | None:
        return part_of(self._of[name], name)


def part_of(weights: Weights, name: str) -> Part | None:
    """Which part of what stands at `weights.where(name)` a weight is, for a run's record; None: all of it."""
    part = getattr(weights, "part", None)  # only of weights that cut something off
    found: Part | None = part(name) if part is not None else None
    return found


def merge(*weights: Weights) -> Weights:
    """One view of all; of a name that several have, the last one wins. Without arguments: no tensors at all."""
    return _Merged(weights)


def open_vision_folder(path: str | Path, vision: schema.Vision) -> WeightFolder:
    """An InternViT folder in the published format; names get the prefix `vision_model.`.

    Raises CheckpointError, with all that is wrong, where the folder is not complete or config.json differs from
    the recipe's sizes. Tensor names and shapes are for `account` to check.
    """
    folder = Path(path).expanduser()
    config = _read_config(folder)
    problems = _compare(folder, _vision_checks(config, vision), "model.vision")
    entries = _read_folder(folder, "vision_model.", problems)
    if any(name.startswith(("vision_model.vision_model.", "vision_model.language_model.")) for name in entries):
        problems.append(f"{folder}: holds a whole vision-language model, not a tower alone; name an InternViT folder")
    width = vision.hidden_size
    qkv = entries.get("vision_model.encoder.layers.0.attn.qkv.weight")
    if qkv is not None and len(qkv.shape) == 2 and qkv.shape[0] > 3 * width and qkv.shape[1] == width:
        problems.append(
            f"{qkv.file}:{qkv.key}: {qkv.shape[0]} rows are {qkv.shape[0] // 3} channels of heads, but the tower is "
            f"{width} wide: attention heads padded with zeros for tensor parallelism, which are not read here; "
            f"use the unpadded InternViT folder ({3 * width} rows)"
        )
    _raise(problems)
    return WeightFolder(entries)


def open_language_model_folder(path: str | Path, lm: schema.LanguageModel) -> WeightFolder:
    """A Qwen2 or Llama folder in the published format; names get the prefix `language_model.`.

    A tied model's folder may bring its head as well: it must then equal the embedding, and is left out.
    Raises CheckpointError as `open_vision_folder` does.
    """
    folder = Path(path).expanduser()
    config = _read_config(folder)
    problems = _compare(folder, _language_model_checks(config, lm), "model.language_model")
    entries = _read_folder(folder, "language_model.", problems)
    _drop_equal_head(entries, lm, problems)
    _raise(problems)
    return WeightFolder(entries)


class ModelFolder:
    """A folder in the published layout without the dummy heads of its tower. Open it with `open_model_folder`.

    num_dummy_heads: how many stand behind the real ones in the file.
    """

    def __init__(self, folder: WeightFolder, vision: schema.Vision, num_dummy_heads: int) -> None:
        self._folder, self._vision, self.num_dummy_heads = folder, vision, num_dummy_heads

    def names(self) -> list[str]:
        return self._folder.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return key_map.unpadded_shape(name, self._folder.shape(name), self._vision, self.num_dummy_heads)

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(name)

    def read(self, name: str) -> Tensor:
        return key_map.unpad(name, self._folder.read(name), self._vision, self.num_dummy_heads)

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        return self.read(name).reshape(-1)[begin:end]  # padded tensors are small, all others are not copied

    def where(self, name: str) -> str:
        return self._folder.where(name)

    def part(self, name: str) -> Part | None:
        return key_map.real_part(name, self._vision, self.num_dummy_heads)


def open_model_folder(path: str | Path, model: schema.Model) -> ModelFolder:
    """A folder with a whole model: the published NVLM-D-72B, or an export of ours of the recipe's architecture.

    The tower's dummy heads are cut off, after it was looked at that they add nothing. What the published config.json
    says wrongly is ignored by name: `model_type` of the decoder (its `architectures` tells what it is) and a
    `rope_scaling` of type dynamic, which the transformers version it was made with does not obey.
    Raises CheckpointError as `open_vision_folder` does.
    """
    folder = Path(path).expanduser()
    config = _read_config(folder)
    name = {"nvlm_d": "NVLM_D", "nvlm_x": "NVLM_X", "nvlm_h": "NVLM_H"}[model.architecture]
    checks = [
        _Check("architectures", config.get("architectures", _MISSING), [name]),
        _Check("force_image_size", config.get("force_image_size", _MISSING), model.vision.image_size),
        _Check("downsample_ratio", config.get("downsample_ratio", _MISSING), 0.5),
        _Check("ps_version", config.get("ps_version", _MISSING), "v2"),
        _Check("select_layer", config.get("select_layer", _MISSING), -1),
    ]
    problems = _compare(folder, checks, "model")
    if problems and problems[0].split(": ")[1].startswith("architectures"):
        problems[0] += (
            f" for model.architecture {model.architecture!r}; init_from.model takes the published NVLM-D or an export "
            "of ours, single parts are named by init_from.vision and init_from.language_model"
        )
        _raise(problems[:1])
    checks = [  # absent in the published config, which has torch's default
        _Check(
            "projector_layer_norm_eps", config.get("projector_layer_norm_eps", 1e-5), model.projector.layer_norm_eps,
            "layer_norm_eps",
        ),
        _Check("projector_norm", config.get("projector_norm", "layer_norm"), model.projector.norm, "norm"),
    ]  # fmt: skip
    problems += _compare(folder, checks, "model.projector")
    if model.architecture != "nvlm_d":
        there, wanted = _part(config, "cross_attention_config"), made_for(model, "cross_attention")
        names = {key: {"every_layers": "layers"}.get(key, key) for key in wanted}
        checks = [_Check(names[key], there.get(names[key], _MISSING), value, key) for key, value in wanted.items()]
        problems += _compare(folder, checks, "model.cross_attention", "cross_attention_config.")
    vision, decoder = _part(config, "vision_config"), _part(config, "llm_config")
    kind = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}.get(
        str((decoder.get("architectures") or [""])[0])
    )
    if kind is not None and decoder.get("model_type") != kind:
        log.info(
            "%s: llm_config.model_type %r is ignored, architectures tells what it is", folder, decoder["model_type"]
        )
        decoder["model_type"] = kind
    if (decoder.get("rope_scaling") or {}).get("type") == "dynamic":
        log.info("%s: llm_config.rope_scaling %s is ignored, as in training", folder, decoder.pop("rope_scaling"))
    problems += _compare(folder, _vision_checks(vision, model.vision), "model.vision", "vision_config.")
    problems += _compare(
        folder, _language_model_checks(decoder, model.language_model), "model.language_model", "llm_config."
    )
    stored = _read_folder(folder, "", problems)
    entries = {}
    for key, entry in stored.items():
        try:
            entries[key_map.from_published(key, model.architecture)] = entry
        except CheckpointError as error:
            problems.append(f"{entry.file}: {error}")
    _drop_equal_head(entries, model.language_model, problems)
    num_dummy_heads = _count_dummy_heads(entries, model.vision, problems)
    _raise(problems)
    weights = WeightFolder(entries)
    if num_dummy_heads:
        _check_dummy_heads(weights, model.vision, num_dummy_heads, folder)
    return ModelFolder(weights, model.vision, num_dummy_heads)


def made_for(model: schema.Model, module: str) -> dict[str, Any]:
    """What a module's weights are made for and their shapes do not all tell, by the key of its section in a recipe:
    under other heads, epsilons or places in the stack they are no longer the same module.

    Of cross_attention.every_layers it is what follows: the decoder layers, from 0. Left out is what only a start or the
    data concerns (what reads what, the longest sample).
    """
    if module != "cross_attention":
        left_out = ("preset", "initializer_std", "max_position_embeddings")
        return {key: value for key, value in getattr(model, module) if key not in left_out}
    own, (heads, groups) = model.cross_attention, model.cross_attention_heads
    return {
        "every_layers": list(model.cross_attention_layers),
        "place": own.place,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "gate": own.gate,
        "feed_forward": own.feed_forward,
        "memory_norm": own.memory_norm,
    }


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return dict(part) if isinstance(part, dict) else {}


def _count_dummy_heads(entries: Mapping[str, _Entry], vision: schema.Vision, problems: list[str]) -> int:
    """How many heads stand behind the real ones in the tower's first layer; `account` compares the others with it."""
    qkv = entries.get("vision_model.encoder.layers.0.attn.qkv.weight")
    width, head_size = vision.hidden_size, vision.hidden_size // vision.num_attention_heads
    if qkv is None or not qkv.shape:
        return 0
    extra = qkv.shape[0] // 3 - width
    if qkv.shape[0] % 3 or extra < 0 or extra % head_size:
        problems.append(
            f"{qkv.file}:{qkv.key}: {qkv.shape[0]} rows are not three times {width} channels of "
            f"{vision.num_attention_heads} real heads, with or without dummy heads of {head_size} channels behind them"
        )
        return 0
    return extra // head_size


def _check_dummy_heads(weights: WeightFolder, vision: schema.Vision, num_dummy_heads: int, folder: Path) -> None:
    problems = []
    for n in range(vision.num_hidden_layers):
        layer = f"vision_model.encoder.layers.{n}.attn"
        names = (f"{layer}.qkv.weight", f"{layer}.proj.weight")
        if not set(names) <= set(weights.names()):
            continue  # `account` names what is missing
        shapes = [weights.shape(name) for name in names]
        wide = key_map.padded_width(vision, num_dummy_heads)
        if shapes != [(3 * wide, vision.hidden_size), (vision.hidden_size, wide)]:
            continue  # `account` names it
        try:
            qkv, proj = map(weights.read, names)  # mapped: only the pages of dummy heads are read
            key_map.check_dummy_heads(weights.where(names[0]), qkv, proj, vision)
        except CheckpointError as error:
            problems.append(str(error))
    _raise(problems)
    log.info(
        "%s: the tower is stored with %d dummy heads behind its %d real ones; they add nothing and are cut off",
        folder, num_dummy_heads, vision.num_attention_heads,
    )  # fmt: skip


def _drop_equal_head(entries: dict[str, _Entry], lm: schema.LanguageModel, problems: list[str]) -> None:
    """A tied model may bring its head as well: it must equal the embedding, and is left out."""
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if problems or not lm.tie_word_embeddings or head not in entries or embedding not in entries:
        return
    weights = WeightFolder(entries)
    if not torch.equal(weights.read(head), weights.read(embedding)):
        problems.append(
            f"{weights.where(head)}: differs from {entries[embedding].key}, but tie_word_embeddings is true; "
            "a tied model has one matrix: remove it from the file, or untie in config.json and in the recipe"
        )
    del entries[head]


def _raise(problems: list[str]) -> None:
    if problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems with the weights:\n  "
        raise CheckpointError(count + "\n  ".join(problems))


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); {file.stat().st_size:,} bytes are there; "
            "copy or download it again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{file}: holds a {type(read).__name__} where a JSON object is needed")
    return read


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; name a folder with config.json and safetensors files")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; name a folder with config.json and safetensors files")
    return _read_json(folder / "config.json")


def _read_folder(folder: Path, prefix: str, problems: list[str]) -> dict[str, _Entry]:
    """All tensors of the folder by our name; what is wrong with the files is added to `problems`."""
    index_file, single = folder / INDEX_NAME, folder / SINGLE_NAME
    weight_map: dict[str, str] | None = None
    if index_file.is_file():
        weight_map = _read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            problems.append(f"{index_file}: has no weight_map from tensor names to files")
            return {}
        outside = sorted({shard for shard in weight_map.values() if Path(shard).name != shard})
        if outside:
            problems.append(f"{index_file}: names {outside[0]!r}; shards must lie in the folder itself")
            return {}
        shards = sorted(set(weight_map.values()))
    elif single.is_file():
        shards = [SINGLE_NAME]
    else:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        reason = (
            f"{', '.join(pickles)}: pickled weights can run code and are not read; convert them to safetensors"
            if pickles
            else f"has neither {SINGLE_NAME} nor {INDEX_NAME}"
        )
        problems.append(f"{folder}: {reason}")
        return {}

    entries: dict[str, _Entry] = {}
    for shard in shards:
        file = folder / shard
        if not file.is_file():
            named = sum(1 for value in (weight_map or {}).values() if value == shard)
            problems.append(f"{file}: is missing; {INDEX_NAME} places {named} tensors in it")
            continue
        try:
            opened = _open(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        keys = set(opened.keys())
        if weight_map is not None:
            indexed = {key for key, value in weight_map.items() if value == shard}
            absent = sorted(indexed - keys)
            problems += [f"{file}:{key}: is not in the file, but {INDEX_NAME} says so" for key in absent]
            keys &= indexed  # what the index does not name, or names elsewhere, is not part of the model
        for key in sorted(keys):
            about = opened.get_slice(key)
            if about.get_dtype() not in _DTYPES:
                problems.append(
                    f"{file}:{key}: has type {about.get_dtype()}; floating-point weights ({', '.join(_DTYPES)}) "
                    "are read, quantised ones are not"
                )
                continue
            entries[prefix + key] = _Entry(file, key, tuple(about.get_shape()), _DTYPES[about.get_dtype()])
    return entries


# ---------------------------------------------------------------------------------------------- config.json and recipe


@dataclass(frozen=True)
class _Missing:
    """Stands for a key that config.json does not have and that has no default."""


_MISSING = _Missing()


@dataclass(frozen=True)
class _Check:
    """What config.json says of a key (its default where the format has one), and what it must say.

    recipe_key: the recipe's key that wants it; None where the architecture does.
    """

    key: str
    value: Any
    wanted: Any
    recipe_key: str | None = None


def _compare(folder: Path, checks: Sequence[_Check], section: str, below: str = "") -> list[str]:
    """One line for each key of config.json that does not say what it must. below: where in it the keys stand."""
    problems = []
    for check in checks:
        if _equal(check.value, check.wanted):
            continue
        says = "is missing" if check.value is _MISSING else f"is {check.value!r}"
        by_recipe = f"the recipe's {section}.{check.recipe_key} is {check.wanted!r}"
        needs = by_recipe if check.recipe_key else f"the architecture needs {check.wanted!r}"
        problems.append(f"{folder / 'config.json'}: {below}{check.key} {says}, but {needs}")
    return problems


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    if isinstance(wanted, int | float) and isinstance(value, int | float):
        return math.isclose(value, wanted, rel_tol=1e-9)
    return bool(value == wanted)


def _vision_checks(config: dict[str, Any], vision: schema.Vision) -> list[_Check]:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    checks = [_Check(key, config.get(key, _MISSING), getattr(vision, key), key) for key in sizes]
    for key in ("image_size", "patch_size"):
        value = config.get(key, _MISSING)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        checks.append(_Check(key, value, getattr(vision, key), key))
    # The published code's defaults are the 6B tower's; what InternViT-300M differs in stands in its config.json.
    for key, default in (("norm_type", "rms_norm"), ("qk_normalization", True), ("qkv_bias", False)):
        checks.append(_Check(key, config.get(key, default), getattr(vision, key), key))
    return checks + [
        _Check("hidden_act", config.get("hidden_act", "gelu"), "gelu"),
        _Check("num_channels", config.get("num_channels", 3), 3),
    ]


def _language_model_checks(config: dict[str, Any], lm: schema.LanguageModel) -> list[_Check]:
    sizes = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "rms_norm_eps",
    )  # fmt: skip
    checks = [_Check(key, config.get(key, _MISSING), getattr(lm, key), key) for key in sizes]
    tied = config.get("tie_word_embeddings", False)
    checks.append(_Check("tie_word_embeddings", tied, lm.tie_word_embeddings, "tie_word_embeddings"))
    # transformers 4 writes rope_theta at the top (and rope_scaling beside it), transformers 5 into rope_parameters.
    theta, theta_key = config.get("rope_theta", _MISSING), "rope_theta"
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        if theta is _MISSING and "rope_theta" in rope:
            theta, theta_key = rope["rope_theta"], f"{key}.rope_theta"
        kind = "rope_type" if "rope_type" in rope else "type"
        checks.append(_Check(f"{key}.{kind}", rope.get(kind, "default"), "default"))
    checks.append(_Check(theta_key, theta, lm.rope_theta, "rope_theta"))
    positions = config.get("max_position_embeddings", _MISSING)
    if not (isinstance(positions, int) and positions >= lm.max_position_embeddings):
        checks.append(
            _Check("max_position_embeddings", positions, lm.max_position_embeddings, "max_position_embeddings")
        )
    head_size = lm.hidden_size // lm.num_attention_heads
    kinds = config.get("layer_types") or ["full_attention"]
    if lm.model_type == "llama":
        checks += [_Check(key, config.get(key, False), False) for key in ("attention_bias", "mlp_bias")]
    return checks + [
        _Check("model_type", config.get("model_type", _MISSING), lm.model_type, "model_type"),
        _Check("hidden_act", config.get("hidden_act", "silu"), "silu"),
        _Check("head_dim", config.get("head_dim") or head_size, head_size),
        _Check("use_sliding_window", config.get("use_sliding_window", False), False),
        _Check("layer_types", sorted(set(kinds)), ["full_attention"]),
    ]


# ----------------------------------------------------------------------------------------------- what the model expects


def expected_shapes(config: schema.Model, *, with_vision: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of the recipe's model, which is not built; a tied head has no own name."""
    from nvlm_train.model.nvlm import class_of

    with torch.device("meta"):
        model = class_of(config)(config, with_vision=with_vision)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Account:
    """What becomes of every tensor. Names are sorted.

    loaded: in the weights and in the model. initialised: in the model only, gets its `initial_value`.
    ignored: in the weights only, and known to carry nothing (rotary buffers).
    """

    loaded: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def account(
    expected: Mapping[str, Sequence[int]],
    weights: Weights,
    may_be_new: Sequence[str] = ("projector.", "cross_attention."),
) -> Account:
    """Compares what the model needs with what the weights bring.

    expected: shape by name, see `expected_shapes`. may_be_new: name prefixes of modules that may be absent, each as
    a whole. Raises CheckpointError with every missing, unexpected and mis-shaped tensor.
    """
    there = set(weights.names())
    found = Account(ignored=sorted(n for n in there - set(expected) if n.endswith("rotary_emb.inv_freq")))
    problems = []
    new = {prefix for prefix in may_be_new if not any(name.startswith(prefix) for name in there)}
    for name in sorted(expected):
        shape = tuple(expected[name])
        if name not in there:
            if any(name.startswith(prefix) for prefix in new):
                found.initialised.append(name)
            else:
                problems.append(f"{name} {list(shape)}: missing, none of the weights has it")
        elif tuple(weights.shape(name)) != shape:
            problems.append(
                f"{name}: {weights.where(name)} has shape {list(weights.shape(name))}, the model {list(shape)}"
            )
        else:
            found.loaded.append(name)
    for name in sorted(there - set(expected) - set(found.ignored)):
        problems.append(f"{name}: {weights.where(name)} is not in the model")
    _raise(problems)
    return found


# -------------------------------------------------------------------------------------------------------- filling it


def initial_value(name: str, shape: Sequence[int], seed: int, config: schema.Model) -> Tensor:
    """The value a new parameter starts from: a function of seed and name alone, whatever rank or order asks.

    Norm weights 1, biases 0, LayerScale 0.1, gates as the recipe says, LoRA's as peft does, the weights of projector
    and cross-attention normal with the recipe's initializer_std of each, all other weights normal with 0.02
    (transformers' and InternViT's default). Returns fp32[shape] on the CPU.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return torch.zeros(*shape)
    if leaf in ("ls1", "ls2"):
        return torch.full(tuple(shape), 0.1)
    if leaf in ("attn_gate", "mlp_gate"):
        return torch.full(tuple(shape), float(config.cross_attention.gate_init))
    if leaf == "weight" and "norm" in owner.rpartition(".")[2]:
        return torch.ones(*shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if lora.is_adapter(name):
        return lora.initial_adapter(name, tuple(shape), generator)
    stds = {"projector": config.projector.initializer_std, "cross_attention": config.cross_attention.initializer_std}
    std = stds.get(name.split(".", 1)[0], 0.02)
    return torch.empty(*shape).normal_(0.0, std, generator=generator)


def fill(
    model: nn.Module,
    weights: Weights,
    config: schema.Model,
    seed: int,
    slice_of: Callable[[nn.Parameter], tuple[int, int] | None],
    write: Callable[[nn.Parameter, Tensor], None],
    skip: Container[str] = (),
) -> None:
    """Gives every parameter of `model` its value, one tensor at a time, each process only the part that it holds.

    A name that `weights` does not have gets its `initial_value`; call `account` first, which says which those are.
    slice_of: the elements [start, end) of the flattened parameter held here (end may lie beyond it), or None for all.
    write: takes the parameter and the value, in the file's type: flat where slice_of gave a slice, else in shape.
    skip: names left as they are, because a checkpoint brings them.
    """
    there = set(weights.names())
    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        name = lora.base_name(name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty parameter behind
        if name in there and tuple(weights.shape(name)) != shape:
            raise CheckpointError(
                f"{name}: {weights.where(name)} has shape {list(weights.shape(name))}, the model {list(shape)}"
            )
        part = slice_of(parameter)
        if name not in there:
            value = initial_value(name, shape, seed, config)
            write(parameter, value if part is None else value.reshape(-1)[part[0] : part[1]])
        elif part is None:
            write(parameter, weights.read(name))
        else:
            write(parameter, weights.read_slice(name, *part))


def load_into(model: nn.Module, weights: Weights, config: schema.Model, seed: int) -> None:
    """`fill` for a plain module: every parameter in place, in the parameter's own type and on its device."""

    @torch.no_grad()
    def write(parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)

    fill(model, weights, config, seed, lambda parameter: None, write)
