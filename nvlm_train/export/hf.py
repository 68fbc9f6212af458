"""From a checkpoint to a Hugging Face folder: NVLM-D in the published layout, NVLM-X and NVLM-H in ours beside it.

Tensors go slice by slice from the checkpoint into the shards (`shards.py`). Everything is written into a hidden folder
beside OUT, which gets its name only when it is complete; finished shards in it are kept when an export is interrupted.

A tied output head is not written: config.json says `tie_word_embeddings: true`, as Qwen2's own small models do.

Layouts: `published` has 7 dummy heads behind the tower's real ones, `unpadded` has none. Only NVLM-D has the first.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_train import provenance
from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.export import card, licence, shards
from nvlm_train.export.shards import DTYPES
from nvlm_train.hub import local_folder
from nvlm_train.log import get_logger
from nvlm_train.model import key_map

if TYPE_CHECKING:
    from nvlm_train.export.push import Target
    from nvlm_train.model.pretrained import Weights
    from nvlm_train.recipe.schema import Model

log = get_logger(__name__)

_SHARED_CODE = ("configuration_nvlm_d.py", "modeling_nvlm_d.py", "processing_nvlm.py")
_CROSS_ATTENTION_CODE = ("configuration_nvlm_xh.py", "modeling_nvlm_xh.py")
REMOTE_CODE = (*_SHARED_CODE, *_CROSS_ATTENTION_CODE)  # everything that this version may write
MEMBERS = {"nvlm_d": "NVLM_D", "nvlm_x": "NVLM_X", "nvlm_h": "NVLM_H"}  # architecture: name in config.json
LAYOUTS = ("published", "unpadded")
DECODERS = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
CONTROL_TOKENS = {"im_start": "<|im_start|>", "im_end": "<|im_end|>", "pad": "<|endoftext|>", "image": "<|vision_pad|>"}
BOS, YI_IMAGE_TOKEN = "<|startoftext|>", "<unk>"  # Yi's tokenizer has no <|vision_pad|>
TEMPLATE_SYSTEM = {  # where the recipe names none
    "nvlm_qwen2": None,
    "hf_nvlm": "Answer the questions.",
    "nvlm_yi": None,
}
IMAGE_MEAN = [0.485, 0.456, 0.406]  # ImageNet
IMAGE_STD = [0.229, 0.224, 0.225]
_SPARE_BYTES = 64 * 2**20  # left free beside the weights for tokenizer and configuration files
CHECKSUMS = "SHA256SUMS"  # of all files but the card, which people write on; `sha256sum -c` reads it


def export(
    weights: Weights,
    recipe: dict[str, Any],
    out: str | Path,
    *,
    tokenizer_path: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "4GB",
    layout: str | None = None,
    step: int | None = None,
    training: card.Training | None = None,
    licences: licence.Licences | None = None,
    identity: str | None = None,
) -> Path:
    """Writes the model to the folder `out` and returns it.

    weights: every tensor of the model by our names. recipe: as recipe_to_dict gives it. tokenizer_path: default the
    recipe's. dtype: 'bf16' or 'fp32', default the recipe's precision. max_shard_size: bytes, or '4GB', '500MB', '2GiB';
    a larger single tensor gets a shard of its own. layout: 'published' (default of NVLM-D) or 'unpadded' (of NVLM-X and
    NVLM-H, which have no other). training (or step alone): for the model card. licences: default what the recipe says.
    identity: what the weights are, as a hash; with it an interrupted export goes on where it was.

    Raises CheckpointError for licences that are missing or do not fit, for tensors that are missing, mis-shaped or not
    finite, an unusable tokenizer, or an `out` that holds something; nothing is left behind then. SetupError when the
    disk cannot hold the export, or another export is writing it. `out` exists complete or not at all.
    """
    out = Path(out)
    model = key_map.model_from_recipe(recipe)
    num_dummy_heads = dummy_heads(model, layout)
    dtype = dtype or recipe.get("precision") or "bf16"
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    check_out(out)
    tokenizer_folder = local_folder(tokenizer_path or recipe["tokenizer"]["path"])
    tokens = special_token_ids(tokenizer_folder, model.language_model.vocab_size)
    _check_same_tokenizer(tokenizer_folder, Path(recipe["tokenizer"]["path"]))
    if recipe["tokenizer"]["template"] == "nvlm_yi" and "bos" not in tokens:
        raise CheckpointError(
            f"the tokenizer in {tokenizer_folder} has no {BOS}, with which tokenizer.template nvlm_yi begins every "
            "sample"
        )
    training = training or card.Training(step=step)
    if licences is None:
        licences = licence.judge(provenance.parts_of(recipe, training.earlier_run), recipe.get("license"))
    readme = card.model_card(recipe, licences, training, dtype=dtype, num_dummy_heads=num_dummy_heads)
    planned = shards.plan_shards(model, dtype, shards.parse_size(max_shard_size), num_dummy_heads)
    _check_tensors(weights, model)

    partial = out.parent / f".{out.name}.incomplete"
    check_space(out, partial, sum(tensor.bytes for shard in planned for tensor in shard))
    with shards.held(partial):
        wanted = shards.fingerprint(identity, planned, dtype)
        check_out(out)  # another export may have ended since
        done = shards.finished(partial, wanted)
        if done:
            log.info("%d of %d shards of an interrupted export are kept, from %s", len(done), len(planned), partial)
        try:
            shards.write_shards(weights, model, planned, partial, dtype, num_dummy_heads, done, wanted)
            _write_json(partial / "model.safetensors.index.json", shards.index(planned))
            config = model_config(model, recipe, tokens, dtype, num_dummy_heads)
            if licences.research_only:
                config[provenance.RESEARCH_KEY] = licences.label
            _write_json(partial / "config.json", config)
            _write_json(partial / "generation_config.json", generation_config(tokens))
            _write_json(partial / "preprocessor_config.json", preprocessor_config(model))
            image_token = _control_tokens(_token_ids(tokenizer_folder))["image"]
            _write_json(partial / "processor_config.json", processor_config(model, recipe, image_token))
            _write_tokenizer(tokenizer_folder, partial, recipe)
            for name in remote_code(model.architecture):
                shutil.copyfile(Path(__file__).with_name("remote_code") / name, partial / name)
            (partial / "README.md").write_text(readme, encoding="utf-8")
            licence.write(partial, licences, card.identity(recipe, training))
            _complete(partial, out, done)
        except BaseException as error:
            tidy_up(error, partial, out, done if identity else {}, len(planned))
            raise
    return out


def check_out(out: Path) -> None:
    """CheckpointError where `out` holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; name a new one, nothing is overwritten")


def _complete(partial: Path, out: Path, digests: dict[str, str]) -> None:
    """Writes the checksums and gives the folder its name."""
    from nvlm_train.checkpoint import sha256

    ours = (shards.DONE, shards.LOCK)  # gone at last, so that the way back is open until then
    files = sorted(path.name for path in partial.iterdir() if path.name not in (*ours, "README.md"))
    lines = [f"{digests.get(name) or sha256(partial / name)}  {name}\n" for name in files]
    (partial / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    for path in partial.iterdir():
        if path.name not in (*digests, *ours):
            _sync(path)
    for name in ours:
        (partial / name).unlink(missing_ok=True)
    _sync(partial)
    give_name(partial, out)
    _sync(out.parent)


def give_name(partial: Path, out: Path) -> None:
    """Renames `partial` to `out`; CheckpointError where something has come to be there."""
    try:
        partial.replace(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise CheckpointError(
                f"{out} was filled by another program while it was exported; name a new one"
            ) from None
        raise


def tidy_up(error: BaseException, partial: Path, out: Path, done: dict[str, str] | None = None, count: int = 0) -> None:
    """After an export that failed: finished shards stay where the same command can go on with them, unless something is
    wrong with the weights, which will be wrong again. Raises SetupError where the disk is full."""
    kept = "nothing of it was kept"
    if done and not isinstance(error, CheckpointError):
        for path in partial.iterdir():
            if path.name not in (*done, shards.DONE):
                path.unlink(missing_ok=True)
        kept = f"{len(done)} of {count} shards are kept in {partial}, and the same command goes on with them"
        log.warning("the export was interrupted: %s", kept)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise SetupError(f"no space left while writing {out}; {kept}. Make room, or export elsewhere") from None


def dummy_heads(model: Model, layout: str | None) -> int:
    """How many heads are stored behind the tower's real ones. CheckpointError for a layout that this model has not."""
    if layout not in (None, *LAYOUTS):
        raise CheckpointError(f"--layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    published = model.architecture == "nvlm_d"
    if layout == "published" and not published:
        raise CheckpointError(
            f"--layout published: {model.architecture} was never published, only NVLM-D has that layout; leave it out, "
            "or use unpadded"
        )
    return key_map.NUM_DUMMY_HEADS if published and layout != "unpadded" else 0


def remote_code(architecture: str) -> tuple[str, ...]:
    """The files of code that travel with an export."""
    return _SHARED_CODE if architecture == "nvlm_d" else REMOTE_CODE


# ------------------------------------------------------------------------------------------------ configuration files


def model_config(
    model: Model,
    recipe: dict[str, Any],
    tokens: dict[str, int],
    dtype: str,
    num_dummy_heads: int = key_map.NUM_DUMMY_HEADS,
) -> dict[str, Any]:
    """config.json, key by key as the published one, by hand: what transformers 5 writes is misread by version 4.

    rope_theta stays at the top level of llm_config and rope_scaling is left out (the published value is ignored by some
    readers and obeyed by others).
    """
    vision, lm, tiling = model.vision, model.language_model, recipe["data"]["tiling"]
    torch_dtype, member = DTYPES[dtype][0], MEMBERS[model.architecture]
    module = "nvlm_d" if model.architecture == "nvlm_d" else "nvlm_xh"
    content = {
        "architectures": [member],
        "model_type": member,
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{member}_Config",
            "AutoModel": f"modeling_{module}.{member}_Model",
            "AutoModelForCausalLM": f"modeling_{module}.{member}_Model",
        },
        "torch_dtype": torch_dtype,
        "downsample_ratio": 0.5,
        "dynamic_image_size": tiling["max_tiles"] > 1,
        "force_image_size": vision.image_size,
        "image_token_id": tokens["image"],
        "max_dynamic_patch": tiling["max_tiles"],
        "min_dynamic_patch": 1,
        "projector_layer_norm_eps": model.projector.layer_norm_eps,
        "projector_norm": model.projector.norm,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "tie_word_embeddings": lm.tie_word_embeddings,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": tiling["thumbnail"],
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "initializer_factor": 0.1,
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_dummy_heads": num_dummy_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "qk_normalization": vision.qk_normalization,
            "qkv_bias": vision.qkv_bias,
            "torch_dtype": torch_dtype,
        },
        "llm_config": {
            "architectures": [DECODERS[lm.model_type]],
            "model_type": lm.model_type,
            "attention_dropout": 0.0,
            "bos_token_id": tokens.get("bos", tokens["pad"]),
            "eos_token_id": tokens["im_end"],
            "hidden_act": "silu",
            "hidden_size": lm.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": lm.intermediate_size,
            "max_position_embeddings": lm.max_position_embeddings,
            "max_window_layers": lm.num_hidden_layers,
            "num_attention_heads": lm.num_attention_heads,
            "num_hidden_layers": lm.num_hidden_layers,
            "num_key_value_heads": lm.num_key_value_heads,
            "pad_token_id": tokens["pad"],
            "rms_norm_eps": lm.rms_norm_eps,
            "rope_theta": lm.rope_theta,
            "tie_word_embeddings": lm.tie_word_embeddings,
            "torch_dtype": torch_dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": lm.vocab_size,
        },
    }
    if lm.model_type == "llama":
        content["llm_config"] |= {"attention_bias": False, "mlp_bias": False}
        for key in ("max_window_layers", "use_sliding_window"):
            del content["llm_config"][key]
    if model.architecture != "nvlm_d":
        heads, groups = model.cross_attention_heads
        own = model.cross_attention
        content["cross_attention_config"] = {
            "feed_forward": own.feed_forward,
            "gate": own.gate,
            "layers": list(model.cross_attention_layers),
            "memory_norm": own.memory_norm,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "place": own.place,
        }
    return content


def generation_config(tokens: dict[str, int]) -> dict[str, Any]:
    """generation_config.json: greedy, as the published model is evaluated; stops at <|im_end|> or <|endoftext|>."""
    return {
        "bos_token_id": tokens["pad"],
        "do_sample": False,
        "eos_token_id": [tokens["im_end"], tokens["pad"]],
        "pad_token_id": tokens["pad"],
    }


def preprocessor_config(model: Model) -> dict[str, Any]:
    """preprocessor_config.json as published: one tile. Cutting an image into tiles is processing_nvlm.py's work."""
    return {
        "crop_size": model.vision.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "resample": 3,
        "size": model.vision.image_size,
    }


def processor_config(
    model: Model, recipe: dict[str, Any], image_token: str = CONTROL_TOKENS["image"]
) -> dict[str, Any]:
    """processor_config.json: how images and prompts were prepared in training, read by processing_nvlm.py."""
    tiling, tokenizer = recipe["data"]["tiling"], recipe["tokenizer"]
    yi = tokenizer["template"] == "nvlm_yi"
    settings = {
        "architecture": model.architecture,
        "auto_map": {"AutoProcessor": "processing_nvlm.NVLM_Processor"},
        "bos_token": BOS if yi else None,
        "decode": recipe["data"].get("decode", "exact"),
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "image_token": image_token,
        "image_tokens_per_tile": (model.vision.image_size // model.vision.patch_size // 2) ** 2,
        "max_tiles": tiling["max_tiles"],
        "max_tiles_per_sample": tiling.get("max_tiles_per_sample"),
        "processor_class": "NVLM_Processor",  # without it version 4 wants a config.json beside
        "prompt_template": tokenizer["template"],
        "system": system_text(recipe),
        "thumbnail": tiling["thumbnail"],
        "thumbnail_tag": "<tile_global>" if yi else "<tile_global_thumbnail>",
        "tile_size": model.vision.image_size,
        "tile_tags": tiling["tags"],
    }
    rgb = {"alpha": "ignore", "exif": "ignore", "sixteen_bit": "clip"}
    settings |= {key: recipe["data"].get(key, default) for key, default in rgb.items()}
    if model.architecture != "nvlm_d":
        settings["text_reads"] = model.cross_attention.text_reads
        in_sequence = model.architecture == "nvlm_h"
        settings["thumbnail_reads_tiles"] = in_sequence and model.cross_attention.thumbnail_reads_tiles
    return settings


def system_text(recipe: dict[str, Any]) -> str | None:
    """What training put before a conversation without a system turn: the recipe's text, else the template's own."""
    tokenizer = recipe["tokenizer"]
    text: str | None = tokenizer.get("system")
    return TEMPLATE_SYSTEM[tokenizer["template"]] if text is None else text or None  # "": no system turn at all


def chat_template(template: str, system: str | None) -> str:
    """The Jinja chat template of a recipe preset: ChatML with the recipe's system text put first where there is none.

    nvlm_qwen2 and nvlm_yi end each turn in a newline, hf_nvlm does not; nvlm_yi begins with <|startoftext|>. Images are
    expanded by the processor, not here.
    """
    end = "<|im_end|>" if template == "hf_nvlm" else "<|im_end|>\\n"
    lines = [f"{{{{- '{BOS}' }}}}"] if template == "nvlm_yi" else []
    if system is not None:
        quoted = json.dumps(system, ensure_ascii=False)
        lines.append(
            "{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 %}"
            f"{{{{- '<|im_start|>system\\n' + {quoted} + '{end}' }}}}"
            "{%- endif %}"
        )
    lines.append(
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}"
        "{%- else %}{%- for part in message['content'] %}"
        "{{- part['text'] if part['type'] == 'text' else '<image>' }}"
        "{%- endfor %}{%- endif %}"
        f"{{{{- '{end}' }}}}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------- tokenizer


def special_token_ids(folder: Path, vocab_size: int) -> dict[str, int]:
    """Ids of im_start, im_end, pad and image tokens in a tokenizer folder, of bos where there is one (Yi's).

    The image token is the one that training puts: <|vision_pad|>, or <unk> in a tokenizer without it.
    CheckpointError when there is no tokenizer, a token is missing, or an id lies beyond the vocab_size rows of the
    embedding.
    """
    ids = _token_ids(folder)
    control = _control_tokens(ids)
    missing = [token for token in control.values() if token not in ids]
    if missing:
        raise CheckpointError(
            f"the tokenizer in {folder} has no token {', '.join(missing)}; the chat format needs them"
        )
    largest = max(ids.values())
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has ids up to {largest}, but model.language_model.vocab_size is {vocab_size}: "
            "it is not the tokenizer of this model"
        )
    return {role: ids[token] for role, token in control.items()}


def _check_same_tokenizer(folder: Path, trained: Path) -> None:
    """CheckpointError where `folder` is not the tokenizer that the run was trained with, as far as that is still there:
    a moved one is, another one gives ids that the weights know as other words."""
    if not trained.is_dir() or folder.resolve() == trained.resolve():
        return
    ids, known = _token_ids(folder), _token_ids(trained)
    different = sorted(known.items() ^ ids.items(), key=lambda item: item[1])
    if different:
        token = different[0][0]
        raise CheckpointError(
            f"the tokenizer in {folder} is not that of the run ({trained}): {len(different)} entries differ, the first "
            f"is {token!r}, id {known.get(token)} there and {ids.get(token)} here; leave --tokenizer out"
        )


def _control_tokens(ids: dict[str, int]) -> dict[str, str]:
    """The token of each role in a tokenizer's vocabulary."""
    control = dict(CONTROL_TOKENS)
    if control["image"] not in ids and YI_IMAGE_TOKEN in ids:
        control["image"] = YI_IMAGE_TOKEN
    if BOS in ids:
        control["bos"] = BOS
    return control


def _token_ids(folder: Path) -> dict[str, int]:
    """Every token of a tokenizer folder with its id."""
    ids: dict[str, int] = {}
    try:
        if (folder / "tokenizer.json").is_file():
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            ids.update(vocabulary if isinstance(vocabulary, dict) else {})
            ids.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            ids.update(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
            settings = _tokenizer_settings(folder)
            ids.update({token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()})
        else:
            raise CheckpointError(
                f"{folder} holds no tokenizer; needed is tokenizer.json, or vocab.json with merges.txt and "
                "tokenizer_config.json (recipe key tokenizer.path)"
            )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from None
    return ids


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings


def _write_tokenizer(folder: Path, out: Path, recipe: dict[str, Any]) -> None:
    """Copies the tokenizer's files; its configuration gets the chat template that this model was trained on."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    settings = _tokenizer_settings(folder)
    fallback = "PreTrainedTokenizerFast" if (folder / "tokenizer.json").is_file() else "Qwen2Tokenizer"
    settings.setdefault("tokenizer_class", fallback)
    if settings["tokenizer_class"].startswith("Llama") and (folder / "tokenizer.json").is_file():
        # Yi's: training reads tokenizer.json as it is, a LlamaTokenizer makes one of its own from its parts
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["chat_template"] = chat_template(recipe["tokenizer"]["template"], system_text(recipe))
    settings["eos_token"] = CONTROL_TOKENS["im_end"]
    settings["pad_token"] = CONTROL_TOKENS["pad"]
    settings.setdefault("bos_token", None)
    if recipe["tokenizer"]["template"] == "nvlm_yi":
        settings["bos_token"], settings["unk_token"] = BOS, YI_IMAGE_TOKEN
    settings.setdefault("clean_up_tokenization_spaces", False)
    _write_json(out / "tokenizer_config.json", settings)


# ------------------------------------------------------------------------------------------------------------ weights


def _check_tensors(weights: Weights, model: Model) -> None:
    """CheckpointError listing every tensor that is missing, unexpected or mis-shaped, before anything is written."""
    from nvlm_train.model.pretrained import expected_shapes

    expected = expected_shapes(model)
    present = set(weights.names())
    if model.language_model.tie_word_embeddings:
        present.discard(key_map.LM_HEAD)
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in present]
    problems += [f"unexpected: {name} ({weights.where(name)})" for name in sorted(present - set(expected))]
    for name, shape in expected.items():
        if name in present and tuple(weights.shape(name)) != shape:
            problems.append(
                f"shape: {name} is {list(weights.shape(name))} in {weights.where(name)}, the recipe needs {list(shape)}"
            )
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"the checkpoint does not hold the recipe's model:\n  {shown}")


def check_space(out: Path, partial: Path, total: int) -> None:
    """What an interrupted export has left counts as free: it is kept or removed."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    free, needed = shutil.disk_usage(parent).free, max(0, total - there) + _SPARE_BYTES
    if free < needed:
        raise SetupError(
            f"{parent} has {free / 1e9:.2f} GB free, the export to {out} needs {needed / 1e9:.2f} GB; "
            "free some space or export elsewhere"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ loading


def load_exported(folder: str | Path, dtype: str | None = None, *, streamed: bool = False) -> Any:
    """The model of a folder, through transformers as any user loads it; an NVLM-D export or a plain Qwen2.

    dtype: 'fp32' or 'bf16'; default as stored. streamed: weights stay in the files (`device_map` to disk) and are read
    whenever a module is called. CheckpointError when transformers cannot load the folder, or when it
    brings code that this version did not write: such code is never run.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; right would be a folder that `nvlm-train export` wrote")
    foreign = foreign_code(folder)
    if foreign:
        raise CheckpointError(
            f"{folder} brings code that this version of nvlm_train did not write ({', '.join(foreign)}), which is not "
            "run here; export again with this version, or load the folder through transformers yourself if you trust it"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the folder; never ask a server
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    places: dict[str, Any] = {}
    if streamed:  # the tower's embeddings are small, and tell its input where to go
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parts = ["vision_model.encoder", "mlp1", "language_model"]
        parts += ["cross_attention"] if "cross_attention_config" in config else []
        places["device_map"] = {"vision_model.embeddings": "cpu"} | dict.fromkeys(parts, "disk")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=getattr(torch, DTYPES[dtype][0]) if dtype else "auto", **places
        )
    except Exception as error:  # whatever is wrong in the folder, transformers raises its own for it
        raise CheckpointError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    return model.eval()


def foreign_code(folder: Path) -> list[str]:
    """What transformers would run from `folder` and is not word for word the code of this version: files and auto_map
    entries. Empty for our exports and for folders without code."""
    ours = Path(__file__).with_name("remote_code")
    found = [
        path.name
        for path in sorted(folder.glob("*.py"))
        if path.name not in REMOTE_CODE or path.read_bytes() != (ours / path.name).read_bytes()
    ]
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # transformers says what is wrong with it
        auto_map = content.get("auto_map", {}) if isinstance(content, dict) else {}
        entries = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        known = {Path(file).stem for file in REMOTE_CODE}
        found += [f"{name}: auto_map {entry}" for entry in entries if str(entry).split(".")[0] not in known]
    return found


# ------------------------------------------------------------------------------------------------------- command line


def export_command(args: Namespace) -> int:
    """`nvlm-train export RUN[/step_N] OUT`: exports, then verifies unless --no-verify, then pushes if asked to.

    Returns the exit code.
    """
    from nvlm_train.checkpoint import open_checkpoint
    from nvlm_train.export.adapter import export_adapter, verify_adapter

    target, api = _push_target(args)
    checkpoint = open_checkpoint(args.run, checksums=True)
    as_json = getattr(args, "json", False)
    stated, more = _stated(getattr(args, "license", None) or [])
    licences = licence.of_run(checkpoint, stated, more)
    if licences.research_only:
        print(licences.warning(), file=sys.stderr if as_json else sys.stdout, flush=True)
    base, out = getattr(args, "adapter", None), Path(args.out)
    if target is not None and (out / licence.RECORD).is_file():
        licence.require_same(out, licences)
        log.info("%s is there already: it is verified again and pushed, not written again", out)
    elif base:
        export_adapter(checkpoint, out, base, getattr(args, "dtype", None) or "fp32", licences)
    else:
        export(
            checkpoint,
            checkpoint.recipe,
            out,
            tokenizer_path=getattr(args, "tokenizer", None),
            dtype=getattr(args, "dtype", None),
            max_shard_size=getattr(args, "max_shard_size", None) or "4GB",
            layout=getattr(args, "layout", None),
            training=card.training_of(checkpoint),
            licences=licences,
            identity=checkpoint.identity,
        )
    size = sum(path.stat().st_size for path in out.iterdir())
    log.info("exported step %d of %s to %s (%.1f MB)", checkpoint.step, args.run, out, size / 1e6)
    for missing in licence.lacking_in(out, licences):
        log.warning("%s", missing)
    if licences.label is None:
        log.warning("no licence is stated for these weights: `license` in the recipe, or export --license, does")
    if getattr(args, "no_verify", False):
        facts = {"license": licences.label, "research_only": licences.research_only}
        if as_json:
            print(json.dumps({"out": str(out), "step": checkpoint.step, "bytes": size, "verified": False, **facts}))
        else:
            print(f"{out}: step {checkpoint.step}, {size / 1e6:.1f} MB, not verified (--no-verify)")
        return 0

    from nvlm_train.export.verify import print_report, verify

    report = verify_adapter(out, checkpoint) if base else verify(out, checkpoint, checkpoint.recipe)
    report |= {"license": licences.label, "research_only": licences.research_only}
    if report["ok"] and target is not None:
        from nvlm_train.export.push import push

        report["pushed"] = push(out, target, api)
    print_report(report, as_json=as_json)
    if not report["ok"]:
        log.error("%s was written but is not what the checkpoint holds: do not use it", out)
    return 0 if report["ok"] else 1


def _push_target(args: Namespace) -> tuple[Target | None, Any]:
    """Where to push, and the Hub's client. Raises SetupError where that cannot work, before anything is written."""
    repo = getattr(args, "push", None)
    if not repo:
        for name in ("public", "yes"):
            if getattr(args, name, False):
                raise SetupError(f"--{name} has no meaning without --push REPO")
        return None, None
    from nvlm_train.export.push import Target, open_hub

    if args.no_verify:
        raise SetupError("--push goes with verified exports alone; leave out --no-verify")
    target = Target(repo, public=args.public, yes=args.yes)
    return target, open_hub(target)


def _stated(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """--license LICENCE and --license PART=LICENCE, apart."""
    more: dict[str, str] = {}
    for part, licence_of_part in (text.split("=", 1) for text in given if "=" in text):
        if more.setdefault(part, licence_of_part) != licence_of_part:
            raise SetupError(f"--license names 2 licences of {part} ({more[part]}, {licence_of_part}); give one")
    whole = [text for text in given if "=" not in text]
    if len(whole) > 1:
        raise SetupError(f"--license names {len(whole)} licences of the export ({', '.join(whole)}); give one")
    return (whole[0] if whole else None), more
