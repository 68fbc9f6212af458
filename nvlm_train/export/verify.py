"""Whether a Hugging Face folder is exactly what a checkpoint holds.

Two things are compared on their own: every tensor, bit for bit, with the checkpoint's (through a list of names and
shapes written here a second time, from config.json, so that a slip in key_map.py cannot hide itself), and the logits of
the folder, loaded through transformers as any user loads it, with those of the model that was trained.

Neither side needs to fit into memory. Our model never holds more than one module's weights, read from the checkpoint
when the module is called; transformers does the same with the folder's where the model is too large for the machine.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nvlm_train.errors import CheckpointError
from nvlm_train.export import hf, licence

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nvlm_train.batch import Batch, Memory
    from nvlm_train.model.nvlm import Nvlm
    from nvlm_train.model.pretrained import Weights
    from nvlm_train.recipe.schema import Model

INDEX = "model.safetensors.index.json"
NEEDED_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "README.md", *licence.FILES, hf.CHECKSUMS, INDEX,
)  # fmt: skip
# Both sides compute in fp32 from the same rounded weights and differ only in the order of sums.
# Share of the largest logit; worst case in the tests 1.1e-6.
LOGIT_TOLERANCE = 2e-5
_MAX_SHOWN = 20
_PIECE = 2**22  # elements that are compared at a time


def verify(out: str | Path, weights: Weights, recipe: dict[str, Any], *, logits: bool = True) -> dict[str, Any]:
    """Compares the folder `out` with the checkpoint's `weights` and `recipe`, and reports every difference.

    Returns {"ok": bool, "out": str, "tensors": int, "bytes": int, "checks": [{"name", "ok", "detail"}], "problems":
    [str], "logits": {case: {"max_difference", "largest", "tolerance"}}}. A check that could not be made has ok None.
    CheckpointError when there is no folder to verify.
    """
    from nvlm_train.model.key_map import model_from_recipe

    out = Path(out)
    if not out.is_dir():
        raise CheckpointError(f"{out} is not a folder; right would be one that `nvlm-train export` wrote")
    model = model_from_recipe(recipe)
    checks: list[dict[str, Any]] = []
    problems: list[str] = []
    report: dict[str, Any] = {"ok": False, "out": str(out), "tensors": 0, "bytes": 0, "checks": checks,
                              "problems": problems, "logits": {}}  # fmt: skip

    def record(name: str, found: list[str], detail: str) -> bool:
        shown = found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "") if found else detail
        checks.append({"name": name, "ok": not found, "detail": shown})
        problems.extend(f"{name}: {problem}" for problem in found)
        return not found

    code = hf.remote_code(model.architecture)
    missing = [f"{name} is missing" for name in (*NEEDED_FILES, *code) if not (out / name).is_file()]
    changed = [
        f"{name} differs from the one this version exports"
        for name in code
        if (out / name).is_file()
        and (out / name).read_bytes() != (Path(__file__).with_name("remote_code") / name).read_bytes()
    ]
    fine = record("files", missing + changed, f"{len(NEEDED_FILES) + len(code)} files")
    if (out / hf.CHECKSUMS).is_file():
        found = _checksum_problems(out)
        fine &= record("checksums", found, f"every file is what {hf.CHECKSUMS} says")
    found = licence.problems_of(out)
    fine &= record("licences", found, f"texts, card and config.json say what {licence.RECORD} does")
    if (out / "config.json").is_file() and (out / INDEX).is_file():
        config = _read_json(out / "config.json")
        fine &= record("config.json", _config_problems(config, model, recipe), "every size as in the recipe")
        if (out / "processor_config.json").is_file():
            found = _processor_problems(_read_json(out / "processor_config.json"), model, recipe)
            fine &= record("processor", found, "prepares images and prompts as the recipe says")
        stored, found = _stored_tensors(out)
        report["tensors"], report["bytes"] = len(stored), sum(tensor["bytes"] for tensor in stored.values())
        fine &= record("index", found, f"equals the shards, total_size {report['bytes']}")
        found = _layout_problems(stored, config)
        fine &= record("layout", found, f"{len(stored)} tensors with the expected names, shapes and dtypes")
        dummies = (config.get("vision_config") or {}).get("num_dummy_heads")
        if isinstance(dummies, int):
            found = _value_problems(out, stored, weights, model, dummies)
            fine &= record("values", found, f"{len(stored)} tensors equal the checkpoint's bit for bit, all finite")
        else:  # told already: what is stored cannot be told from padding
            checks.append({"name": "values", "ok": None, "detail": "not compared: config.json is wrong already"})
        if logits and fine:
            streamed = _not_enough_memory(report["bytes"], config) is not None
            report["logits"] = compare_logits(out, weights, model, config, streamed=streamed)
            found = [
                f"{case}: differ by {result['max_difference']:.2e}, more than {result['tolerance']:.2e}"
                for case, result in report["logits"].items()
                if not result["max_difference"] <= result["tolerance"]  # NaN is a difference
            ]
            worst = max(result["max_difference"] / result["tolerance"] for result in report["logits"].values())
            how = "in one batch, layer by layer from the files" if streamed else "alone and as a batch"
            fine &= record(
                "logits",
                found,
                f"{len(report['logits'])} inputs through transformers ({how}), worst difference {worst:.1%} of the "
                f"tolerance ({LOGIT_TOLERANCE:.0e} of the largest logit)",
            )
        elif logits:
            checks.append({"name": "logits", "ok": None, "detail": "not compared: the folder is wrong already"})
    report["ok"] = fine
    return report


# ------------------------------------------------------------------------------------------------------------ the files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping")
    return content


def _checksum_problems(out: Path) -> list[str]:
    """Files that are not what the export wrote, and files that it did not write; the card may change."""
    from nvlm_train.checkpoint import sha256_of

    lines = (out / hf.CHECKSUMS).read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    files = {path.name for path in out.iterdir()} - {hf.CHECKSUMS, "README.md"}
    problems = [f"{name} is missing" for name in sorted(set(listed) - files)]
    problems += [f"{name} is not named there" for name in sorted(files - set(listed))]
    common = sorted(files & set(listed))
    found = sha256_of([out / name for name in common], "checksums")
    changed = [name for name, digest in zip(common, found, strict=True) if digest != listed[name]]
    return problems + [f"{name} has changed since the export" for name in changed]


def _stored_tensors(out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the shards really hold: {name: {file, dtype, shape, bytes}}, and where the index says otherwise."""
    from safetensors import SafetensorError, safe_open

    index = _read_json(out / INDEX)
    weight_map: dict[str, str] = index.get("weight_map", {})
    problems: list[str] = []
    stored: dict[str, dict[str, Any]] = {}
    for file in sorted(path.name for path in out.glob("*.safetensors")):
        if file not in weight_map.values():
            problems.append(f"{file} is not named in the index")
        try:
            with safe_open(out / file, framework="pt") as shard:
                if (shard.metadata() or {}).get("format") != "pt":
                    problems.append(f"{file}: metadata `format` is not 'pt'; transformers 4 refuses such a file")
                for name in shard.keys():
                    part = shard.get_slice(name)
                    if name in stored:
                        problems.append(f"{name} is in {stored[name]['file']} and again in {file}")
                    elif weight_map.get(name) != file:
                        problems.append(f"{name} is in {file}, the index says {weight_map.get(name, 'nothing of it')}")
                    width = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}.get(part.get_dtype(), 0)
                    shape = tuple(part.get_shape())
                    size = width
                    for length in shape:
                        size *= length
                    if size == 0:
                        problems.append(
                            f"{name} in {file} is empty or of an unexpected type: {shape} {part.get_dtype()}"
                        )
                    stored[name] = {"file": file, "dtype": part.get_dtype(), "shape": shape, "bytes": size}
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} cannot be read: {error}")
    problems += [f"{name} is in the index but in no shard" for name in sorted(set(weight_map) - set(stored))]
    total = index.get("metadata", {}).get("total_size")
    if total != sum(tensor["bytes"] for tensor in stored.values()):
        problems.append(f"total_size {total} is not the size of the tensors {sum(t['bytes'] for t in stored.values())}")
    return stored, problems


def _config_problems(config: dict[str, Any], model: Model, recipe: dict[str, Any]) -> list[str]:
    """Keys of config.json that readers rely on and that do not say what the recipe says."""
    vision, lm = model.vision, model.language_model
    member = {"nvlm_d": "NVLM_D", "nvlm_x": "NVLM_X", "nvlm_h": "NVLM_H"}[model.architecture]
    expected: dict[str, Any] = {
        "architectures": [member], "model_type": member, "select_layer": -1, "ps_version": "v2",
        "downsample_ratio": 0.5, "min_dynamic_patch": 1, "force_image_size": vision.image_size,
        "max_dynamic_patch": recipe["data"]["tiling"]["max_tiles"],
        "use_thumbnail": recipe["data"]["tiling"]["thumbnail"],
        "tie_word_embeddings": lm.tie_word_embeddings,
        "projector_layer_norm_eps": model.projector.layer_norm_eps, "projector_norm": model.projector.norm,
        "vision_config.hidden_act": "gelu",
        "llm_config.architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[lm.model_type]],
        "llm_config.model_type": lm.model_type,
    }  # fmt: skip
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
                "patch_size", "layer_norm_eps", "norm_type", "qk_normalization", "qkv_bias"):  # fmt: skip
        expected[f"vision_config.{key}"] = getattr(vision, key)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "rope_theta",
                "max_position_embeddings"):  # fmt: skip
        expected[f"llm_config.{key}"] = getattr(lm, key)
    if model.architecture != "nvlm_d":
        own, (heads, groups) = model.cross_attention, model.cross_attention_heads
        values = {"layers": list(model.cross_attention_layers), "num_attention_heads": heads,
                  "num_key_value_heads": groups, "place": own.place, "gate": own.gate,
                  "feed_forward": own.feed_forward, "memory_norm": own.memory_norm}  # fmt: skip
        expected |= {f"cross_attention_config.{key}": value for key, value in values.items()}
    problems = []
    dummies = (config.get("vision_config") or {}).get("num_dummy_heads")
    if dummies not in ((0, 7) if model.architecture == "nvlm_d" else (0,)):
        problems.append(f"vision_config.num_dummy_heads is {dummies!r}; NVLM-D is stored with 7 or 0, others with 0")
    problems += _other_than(expected, config)
    if (config.get("llm_config") or {}).get("rope_scaling") is not None:
        problems.append("llm_config.rope_scaling is set; the model was trained without, and some readers obey it")
    dtypes = {
        (part or {}).get("torch_dtype") for part in (config, config.get("llm_config"), config.get("vision_config"))
    }
    if len(dtypes) != 1 or not dtypes <= {"bfloat16", "float32"}:
        problems.append(
            f"torch_dtype is {sorted(map(str, dtypes))}, needed is one of bfloat16, float32 in all three places"
        )
    return problems


def _other_than(expected: dict[str, Any], found_in: dict[str, Any]) -> list[str]:
    """Keys (with dots into mappings) that do not have the value that the recipe means."""
    problems = []
    for dotted, value in expected.items():
        found: Any = found_in
        for key in dotted.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            problems.append(f"{dotted} is {found!r}, the checkpoint's recipe means {value!r}")
    return problems


def _processor_problems(processor: dict[str, Any], model: Model, recipe: dict[str, Any]) -> list[str]:
    """Keys of processor_config.json that do not prepare images and prompts as training did. That its code does what
    the keys say is tested against the training's own (tests/export/test_remote_code.py)."""
    data, tokenizer, yi = recipe["data"], recipe["tokenizer"], recipe["tokenizer"]["template"] == "nvlm_yi"
    system = tokenizer.get("system")
    if system is None and tokenizer["template"] == "hf_nvlm":
        system = "Answer the questions."
    side = model.vision.image_size // model.vision.patch_size
    expected = {
        "architecture": model.architecture, "tile_size": model.vision.image_size,
        "image_tokens_per_tile": side * side // 4,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "max_tiles": data["tiling"]["max_tiles"], "thumbnail": data["tiling"]["thumbnail"],
        "max_tiles_per_sample": data["tiling"].get("max_tiles_per_sample"), "tile_tags": data["tiling"]["tags"],
        "thumbnail_tag": "<tile_global>" if yi else "<tile_global_thumbnail>",
        "prompt_template": tokenizer["template"], "system": system or None,
        "bos_token": "<|startoftext|>" if yi else None,
        "decode": data.get("decode", "exact"), "alpha": data.get("alpha", "ignore"),
        "exif": data.get("exif", "ignore"), "sixteen_bit": data.get("sixteen_bit", "clip"),
        "auto_map.AutoProcessor": "processing_nvlm.NVLM_Processor",
    }  # fmt: skip
    if model.architecture != "nvlm_d":
        expected["text_reads"] = model.cross_attention.text_reads
    if model.architecture == "nvlm_h":
        expected["thumbnail_reads_tiles"] = model.cross_attention.thumbnail_reads_tiles
    return _other_than(expected, processor)


def expected_layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published layout, from config.json alone.

    Written without looking at key_map.py, row by row from the table of the published repository's index.
    """
    v, t, crossing = config["vision_config"], config["llm_config"], config.get("cross_attention_config")
    d, f, h, i = v["hidden_size"], v["intermediate_size"], t["hidden_size"], t["intermediate_size"]
    wide = d // v["num_attention_heads"] * (v["num_attention_heads"] + v["num_dummy_heads"])
    kv = h // t["num_attention_heads"] * t["num_key_value_heads"]
    tower = {
        "norm1.weight": (d,), "norm2.weight": (d,), "ls1": (d,), "ls2": (d,), "attn.qkv.weight": (3 * wide, d),
        "attn.proj.weight": (d, wide), "attn.proj.bias": (d,),
        "mlp.fc1.weight": (f, d), "mlp.fc1.bias": (f,), "mlp.fc2.weight": (d, f), "mlp.fc2.bias": (d,),
    }  # fmt: skip
    if v["norm_type"] == "layer_norm":
        tower |= {"norm1.bias": (d,), "norm2.bias": (d,)}
    if v["qkv_bias"]:
        tower |= {"attn.qkv.bias": (3 * wide,)}
    if v["qk_normalization"]:
        tower |= {"attn.q_norm.weight": (wide,), "attn.k_norm.weight": (wide,)}
    decoder = {
        "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,), "self_attn.q_proj.weight": (h, h),
        "self_attn.k_proj.weight": (kv, h), "self_attn.v_proj.weight": (kv, h), "self_attn.o_proj.weight": (h, h),
        "mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i),
    }  # fmt: skip
    if t["architectures"] == ["Qwen2ForCausalLM"]:
        decoder |= {"self_attn.q_proj.bias": (h,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    layout: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, d),
        "vision_model.embeddings.position_embedding": (1, 1 + (v["image_size"] // v["patch_size"]) ** 2, d),
        "vision_model.embeddings.patch_embedding.weight": (d, v["num_channels"], v["patch_size"], v["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (d,),
        "language_model.model.embed_tokens.weight": (t["vocab_size"], h),
        "language_model.model.norm.weight": (h,),
    }  # fmt: skip
    if config["architectures"] == ["NVLM_X"]:
        layout |= {"mlp1.1.weight": (h, 4 * d)}
    else:
        layout |= {"mlp1.1.weight": (i, 4 * d), "mlp1.3.weight": (h, i)}
    if config.get("projector_norm", "layer_norm") == "layer_norm":
        layout |= {"mlp1.0.weight": (4 * d,), "mlp1.0.bias": (4 * d,)}
    if not t["tie_word_embeddings"]:
        layout["language_model.lm_head.weight"] = (t["vocab_size"], h)
    for n in range(v["num_hidden_layers"]):
        layout |= {f"vision_model.encoder.layers.{n}.{name}": shape for name, shape in tower.items()}
    for n in range(t["num_hidden_layers"]):
        layout |= {f"language_model.model.layers.{n}.{name}": shape for name, shape in decoder.items()}
    if crossing:
        kv = h // crossing["num_attention_heads"] * crossing["num_key_value_heads"]
        reader = {
            "input_layernorm.weight": (h,), "attn.q_proj.weight": (h, h), "attn.o_proj.weight": (h, h),
            "attn.k_proj.weight": (kv, h), "attn.v_proj.weight": (kv, h),
        }  # fmt: skip
        if crossing["memory_norm"] == "rms_norm":
            reader |= {"memory_norm.weight": (h,)}
        if crossing["gate"] == "tanh":
            reader |= {"attn_gate": (1,)} | ({"mlp_gate": (1,)} if crossing["feed_forward"] else {})
        if crossing["feed_forward"]:
            reader |= {"post_attention_layernorm.weight": (h,), "mlp.gate_proj.weight": (i, h),
                       "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i)}  # fmt: skip
        for n in range(len(crossing["layers"])):
            layout |= {f"cross_attention.layers.{n}.{name}": shape for name, shape in reader.items()}
    return layout


def _layout_problems(stored: dict[str, dict[str, Any]], config: dict[str, Any]) -> list[str]:
    try:
        layout = expected_layout(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        return [f"config.json does not describe a model: {type(error).__name__} {error}"]
    dtype = {"bfloat16": "BF16", "float32": "F32"}.get(str(config.get("torch_dtype")))
    problems = [f"{name} is missing" for name in layout if name not in stored]
    problems += [f"{name} does not belong to the layout; loaders fail on it" for name in stored if name not in layout]
    for name, tensor in stored.items():
        if name in layout and tensor["shape"] != layout[name]:
            problems.append(f"{name} is {list(tensor['shape'])}, expected {list(layout[name])}")
        if tensor["dtype"] != dtype:
            problems.append(f"{name} is {tensor['dtype']}, torch_dtype says {config.get('torch_dtype')}")
    return problems


def _value_problems(
    out: Path, stored: dict[str, dict[str, Any]], weights: Weights, model: Model, num_dummy_heads: int = 7
) -> list[str]:
    """Every stored tensor against the checkpoint's, one pair in memory at a time."""
    import torch
    from safetensors import safe_open
    from tqdm import tqdm

    available = set(weights.names())
    renamed = {"mlp1.0.weight": "projector.norm.weight", "mlp1.0.bias": "projector.norm.bias",
               "mlp1.1.weight": "projector.fc1.weight", "mlp1.3.weight": "projector.fc2.weight"}  # fmt: skip
    if model.architecture == "nvlm_x":
        renamed["mlp1.1.weight"] = "projector.fc.weight"
    problems = []
    used = {"language_model.lm_head.weight"} if model.language_model.tie_word_embeddings else set()
    with tqdm(total=len(stored), desc="verify", unit="tensor", file=sys.stderr, leave=False) as progress:
        for file in sorted({tensor["file"] for tensor in stored.values()}):
            with safe_open(out / file, framework="pt") as shard:
                for name in [name for name, tensor in stored.items() if tensor["file"] == file]:
                    progress.update(1)
                    ours = renamed.get(name, name)
                    if ours not in available:
                        problems.append(f"{name} has no counterpart in the checkpoint")
                        continue
                    used.add(ours)
                    found = shard.get_tensor(name)
                    expected = _with_dummy_heads(name, weights.read(ours), model, num_dummy_heads)
                    if found.shape != expected.shape:
                        problems.append(f"{name} is {list(found.shape)}, the checkpoint gives {list(expected.shape)}")
                        continue
                    pairs = zip(found.flatten().split(_PIECE), expected.flatten().split(_PIECE), strict=True)
                    wrong, finite = 0, True
                    for mine, theirs in pairs:  # in pieces: no copy of a tensor that is gigabytes large
                        finite &= bool(torch.isfinite(mine).all())
                        wrong += int((mine != theirs.to(mine.dtype)).sum())
                    if not finite:
                        problems.append(f"{name} holds NaN or infinite values")
                    if wrong:
                        problems.append(f"{name}: {wrong} of {found.numel()} values are not the checkpoint's")
    problems += [f"{name} of the checkpoint is in no shard" for name in sorted(available - used)]
    return problems


def _with_dummy_heads(name: str, tensor: Tensor, model: Model, num_dummy_heads: int) -> Tensor:
    """The tower's attention weights with zero heads behind the real ones; a second writing of key_map.pad."""
    if not name.startswith("vision_model.encoder."):
        return tensor
    real = model.vision.hidden_size
    wide = real // model.vision.num_attention_heads * (model.vision.num_attention_heads + num_dummy_heads)
    part = name.split(".", 4)[-1]
    if part in ("attn.qkv.weight", "attn.qkv.bias"):
        padded = tensor.new_zeros(3 * wide, *tensor.shape[1:])
        for third in range(3):
            padded[third * wide : third * wide + real] = tensor[third * real : (third + 1) * real]
        return padded
    if part in ("attn.q_norm.weight", "attn.k_norm.weight"):
        padded = tensor.new_zeros(wide)
        padded[:real] = tensor
        return padded
    if part == "attn.proj.weight":
        padded = tensor.new_zeros(real, wide)
        padded[:, :real] = tensor
        return padded
    return tensor


# --------------------------------------------------------------------------------------------------------------- logits


class Prompt(NamedTuple):
    """A fixed input. ids: i64[S]; tiles: u8[T, 3, px, px].

    Of NVLM-X and NVLM-H: reads: tokens [begin, end) read tiles [first, last) of the memory, None for the end that all
    later tokens share; memory_tiles: which of the tiles are in the memory; tags: tokens before each of them there.
    """

    ids: Tensor
    tiles: Tensor
    reads: tuple[tuple[int, int | None, int, int], ...] = ()
    memory_tiles: tuple[int, ...] = ()
    tags: tuple[tuple[int, ...], ...] = ()


def compare_logits(
    out: Path,
    weights: Weights,
    model: Model,
    config: dict[str, Any],
    load: Callable[[Path, str], Any] | None = None,
    *,
    streamed: bool = False,
) -> dict[str, dict[str, float]]:
    """Logits of the folder through transformers against those of our model with the checkpoint's weights, both in fp32.

    Inputs: text alone, one tile, several tiles, two images, and all of them as one padded batch.
    load: what makes the folder's model, where that is not transformers alone. streamed: it is never whole in memory;
    the inputs are taken from the batch then, so that every weight is read once.
    Returns {input: {"max_difference", "largest" logit, "tolerance"}}; a padded position is not compared.
    """
    import torch
    from tqdm import tqdm

    prompts = fixed_prompts(model, config["image_token_id"])
    together = list(prompts.values())
    lengths = [len(prompt.ids) for prompt in together]
    ours = layer_by_layer(model, weights, getattr(torch, config["torch_dtype"]))
    results: dict[str, dict[str, float]] = {}

    def compare(name: str, found: Tensor, wanted: Tensor) -> None:
        largest = float(wanted.abs().max())
        difference = float((found - wanted).abs().max())
        results[name] = {"max_difference": difference, "largest": largest, "tolerance": LOGIT_TOLERANCE * largest}

    bar = tqdm(desc="logits", unit="module", file=sys.stderr, leave=False, delay=2)
    with torch.no_grad(), bar:
        _count_calls(ours, 1, bar)
        packed = ours.logits(as_batch(together, model, config["image_token_id"]))[0]  # [sum of lengths, V]
        expected = dict(zip(prompts, packed.split(lengths), strict=True))
        theirs = hf.load_exported(out, "fp32", streamed=True) if streamed else (load or hf.load_exported)(out, "fp32")
        _count_calls(theirs, 1 if streamed else 1 + len(prompts), bar)
        if not streamed:
            for name, prompt in prompts.items():
                compare(name, theirs(**as_inputs([prompt], model)).logits[0], expected[name])
        rows = theirs(**as_inputs(together, model)).logits
        found = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        if streamed:
            for name, row in zip(prompts, found, strict=True):
                compare(name, row, expected[name])
        compare("batch", torch.cat(found), packed)
    return results


def _count_calls(module: torch.nn.Module, passes: int, bar: Any) -> None:
    """Lets a progress bar show how much of so many passes through a model is done."""

    def called(*_: Any) -> None:
        bar.update(1)

    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            bar.total = (bar.total or 0) + passes
            part.register_forward_hook(called)


def layer_by_layer(model: Model, weights: Weights, dtype: torch.dtype) -> Nvlm:
    """Our model in fp32, whose modules have weights only while they are called: read from `weights` and rounded to
    `dtype` as the export rounds them, so that a comparison shows errors and not rounding."""
    import torch

    from nvlm_train.model.nvlm import class_of

    with torch.device("meta"):
        ours = class_of(model)(model).eval()
    names = {id(parameter): name for name, parameter in ours.named_parameters()}  # of a tied head: the embedding's

    def prepare(module: torch.nn.Module) -> None:
        own = {key: names[id(parameter)] for key, parameter in module.named_parameters(recurse=False)}
        empty = dict(module.named_parameters(recurse=False))

        def fill(*_: Any) -> None:
            for key, name in own.items():
                value = weights.read(name).to(dtype).float()
                module.register_parameter(key, torch.nn.Parameter(value, requires_grad=False))

        def drop(*_: Any) -> None:
            for key, parameter in empty.items():
                module.register_parameter(key, parameter)

        if own:
            module.register_forward_pre_hook(fill)
            module.register_forward_hook(drop)

    for module in ours.modules():
        prepare(module)
    return ours


def fixed_prompts(model: Model, image_token: int) -> dict[str, Prompt]:
    """{name: prompt}, the same on every machine."""
    import torch

    generator = torch.Generator().manual_seed(20240917)
    per_tile = (model.vision.image_size // model.vision.patch_size // 2) ** 2
    size, vocab = model.vision.image_size, model.language_model.vocab_size

    def text(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocab, (length,), generator=generator).tolist()
        return [(i + 1) % vocab if i == image_token else i for i in ids]

    def tiles(count: int) -> Tensor:
        return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)

    image = [image_token] * per_tile
    if model.architecture == "nvlm_x":  # tokens 3 and 4 are the tag of one tile, and so on
        return {
            "text only": Prompt(torch.tensor(text(11)), tiles(0)),
            "one tile": Prompt(torch.tensor(text(11)), tiles(1), ((3, 5, 0, 1), (5, None, 0, 1)), (0,)),
            "several tiles": Prompt(
                torch.tensor(text(17)),
                tiles(3),
                ((2, 5, 0, 1), (5, 7, 1, 2), (7, 10, 2, 3), (10, None, 0, 3)),
                (0, 1, 2),
            ),
            "two images": Prompt(
                torch.tensor(text(23)),
                tiles(3),
                ((3, 5, 0, 1), (5, 11, 0, 1), (11, 13, 1, 2), (13, 16, 2, 3), (16, None, 0, 3)),
                (0, 1, 2),
            ),
        }
    if model.architecture == "nvlm_h":  # tags of two and of three tokens in the memory
        tags = (tuple(text(3)), tuple(text(2)))
        behind = 4 + per_tile
        return {
            "text only": Prompt(torch.tensor(text(11)), tiles(0)),
            "one tile": Prompt(torch.tensor(text(3) + image + text(6)), tiles(1)),
            "several tiles": Prompt(
                torch.tensor(text(4) + image + text(9)), tiles(3), ((4, None, 0, 2),), (0, 1), tags
            ),
            "two images": Prompt(
                torch.tensor(text(4) + image + text(7) + image + text(5)),
                tiles(4),
                ((behind, behind + 5, 0, 1), (behind + 7, None, 0, 2)),
                (0, 2),
                tags,
            ),
        }
    return {
        "text only": Prompt(torch.tensor(text(11)), tiles(0)),
        "one tile": Prompt(torch.tensor(text(3) + image + text(6)), tiles(1)),
        "several tiles": Prompt(torch.tensor(text(2) + image + text(5) + image + text(5) + image + text(4)), tiles(3)),
        "two images": Prompt(torch.tensor(text(3) + image + text(4) + image + text(7) + image + text(5)), tiles(3)),
    }


def as_inputs(prompts: Sequence[Prompt], model: Model) -> dict[str, Any]:
    """A batch for the exported model, padded on the right; what the processor makes of text and images."""
    import torch

    longest = max(len(prompt.ids) for prompt in prompts)
    inputs: dict[str, Any] = {
        "input_ids": torch.stack([torch.nn.functional.pad(p.ids, (0, longest - len(p.ids))) for p in prompts]),
        "attention_mask": torch.stack([torch.arange(longest) < len(p.ids) for p in prompts]).long(),
    }
    tiles = torch.cat([prompt.tiles for prompt in prompts])
    if not len(tiles):
        return inputs
    inputs["pixel_values"] = _normalised(tiles)
    if model.architecture == "nvlm_d":
        return inputs
    reads: list[list[int]] = []
    memory_tiles: list[int] = []
    tags: list[tuple[int, ...]] = []
    before = 0
    for row, prompt in enumerate(prompts):
        first = len(memory_tiles)
        reads += [[row, a, 2**31 - 1 if b is None else b, first + c, first + d] for a, b, c, d in prompt.reads]
        memory_tiles += [before + tile for tile in prompt.memory_tiles]
        tags += list(prompt.tags)
        before += len(prompt.tiles)
    inputs["reads"] = torch.tensor(reads, dtype=torch.int64).reshape(-1, 5)
    if model.architecture == "nvlm_h":
        width = max(map(len, tags), default=0)
        filled = [[*tag, *[-1] * (width - len(tag))] for tag in tags]
        inputs["memory_tiles"] = torch.tensor(memory_tiles, dtype=torch.int64)
        inputs["memory_tags"] = torch.tensor(filled, dtype=torch.int64).reshape(len(tags), width)
    return inputs


def as_batch(prompts: Prompt | Sequence[Prompt], model: Model, image_token: int) -> Batch:
    """A prompt for our model, or several, packed one behind the other."""
    import torch

    from nvlm_train.batch import IGNORE_INDEX, Batch

    prompts = [prompts] if isinstance(prompts, Prompt) else prompts
    per_tile = (model.vision.image_size // model.vision.patch_size // 2) ** 2
    tiles, slots = 0, []
    for prompt in prompts:
        in_memory = prompt.memory_tiles if model.architecture != "nvlm_d" else ()
        rows = [
            (tiles + tile) * per_tile + n
            for tile in range(len(prompt.tiles))
            if tile not in in_memory
            for n in range(per_tile)
        ]
        slots.append(torch.full_like(prompt.ids, -1))
        slots[-1][prompt.ids == image_token] = torch.tensor(rows, dtype=prompt.ids.dtype)
        tiles += len(prompt.tiles)
    ids = torch.cat([prompt.ids for prompt in prompts])
    lengths = [len(prompt.ids) for prompt in prompts]
    return Batch(
        input_ids=ids[None],
        labels=torch.full_like(ids, IGNORE_INDEX)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=_bounds(lengths),
        max_seqlen=max(lengths),
        tiles=torch.cat([prompt.tiles for prompt in prompts]),
        image_slots=torch.cat(slots)[None],
        num_trained_tokens=0,
        num_tile_chunks=1 if tiles else 0,
        memory=None if model.architecture == "nvlm_d" else _as_memory(prompts, model, per_tile),
    )


def _as_memory(prompts: Sequence[Prompt], model: Model, per_tile: int) -> Memory:
    import torch

    from nvlm_train.batch import Memory

    ids: list[int] = []
    slots: list[int] = []
    begins = [0]
    queries: list[range] = []
    rows: list[range] = []
    tokens = tiles = 0
    for prompt in prompts:
        first = len(begins) - 1
        tags = prompt.tags or ((),) * len(prompt.memory_tiles)
        for tile, tag in zip(prompt.memory_tiles, tags, strict=True):
            ids += [*tag, *[0] * per_tile]
            slots += [*[-1] * len(tag), *range((tiles + tile) * per_tile, (tiles + tile + 1) * per_tile)]
            begins.append(len(ids))
        queries += [range(tokens + a, tokens + (len(prompt.ids) if b is None else b)) for a, b, _, _ in prompt.reads]
        rows += [range(begins[first + c], begins[first + d]) for _, _, c, d in prompt.reads]
        tokens, tiles = tokens + len(prompt.ids), tiles + len(prompt.tiles)

    def whole(parts: Sequence[range]) -> Tensor:
        return torch.tensor([n for part in parts for n in part], dtype=torch.int64)

    hybrid = model.architecture == "nvlm_h"
    return Memory(
        ids=torch.tensor(ids if hybrid else [], dtype=torch.int64),
        slots=torch.tensor(slots if hybrid else [], dtype=torch.int64),
        query_rows=whole(queries),
        cu_queries=_bounds(list(map(len, queries))),
        rows=whole(rows),
        cu_rows=_bounds(list(map(len, rows))),
        max_queries=max(map(len, queries), default=0),
        max_rows=max(map(len, rows), default=0),
    )


def _bounds(lengths: Sequence[int]) -> Tensor:
    """[3, 2] -> [0, 3, 5], i32."""
    import torch

    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _normalised(tiles: Tensor) -> Tensor:
    import torch

    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (hf.IMAGE_MEAN, hf.IMAGE_STD))
    return (tiles.float() / 255 - mean) / std


def _not_enough_memory(stored_bytes: int, config: dict[str, Any]) -> str | None:
    """Why the model cannot be loaded whole on this machine, in fp32, or None."""
    parameters = stored_bytes // (2 if config["torch_dtype"] == "bfloat16" else 4)
    needed = int(parameters * 4 * 1.3)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None
    if needed > available:
        return f"NOT COMPARED: needs {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are available"
    return None


# --------------------------------------------------------------------------------------------------------- command line


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """The report on stdout: a line per check and per input, then every problem."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['out']}: {report['tensors']} tensors, {report['bytes'] / 1e6:.1f} MB")
    for check in report["checks"]:
        mark = {True: "ok", False: "WRONG", None: "--"}[check["ok"]]
        print(f"  {mark:5}  {check['name']:12} {check['detail']}")
    for case, result in report["logits"].items():
        print(
            f"         {case:13} largest difference {result['max_difference']:.1e}, allowed {result['tolerance']:.1e}, "
            f"largest logit {result['largest']:.3g}"
        )
    for problem in report["problems"][:_MAX_SHOWN]:
        print(f"  {problem}")
    if len(report["problems"]) > _MAX_SHOWN:
        print(f"  and {len(report['problems']) - _MAX_SHOWN} more (--json lists all)")
    print("verified" if report["ok"] else "NOT VERIFIED")


def verify_command(args: Namespace) -> int:
    """`nvlm-train verify OUT --against RUN[/step_N]`: 0 equal, 1 different, 2 (an NvlmError) when it cannot tell."""
    from nvlm_train.checkpoint import open_checkpoint
    from nvlm_train.export import adapter

    checkpoint = open_checkpoint(args.against, checksums=True)
    if (Path(args.out) / adapter.CONFIG).is_file():
        report = adapter.verify_adapter(args.out, checkpoint)
    else:
        report = verify(args.out, checkpoint, checkpoint.recipe)
    print_report(report, as_json=getattr(args, "json", False))
    return 0 if report["ok"] else 1
