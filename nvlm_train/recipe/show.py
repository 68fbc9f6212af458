"""The verbs of `nvlm-train recipe`: check, show, diff, keys, schema. Neither torch nor a GPU is needed."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm_train.errors import RecipeError
from nvlm_train.recipe.load import flatten, load_recipe
from nvlm_train.recipe.resolve import (
    Resolved,
    compare,
    most_tiles,
    recipe_to_dict,
    refuse_unsupported,
    resolve,
    resume_of,
    run_length,
)
from nvlm_train.recipe.schema import Recipe, Section, all_keys, lora_targets
from nvlm_train.recipe.yaml import describe


def check_command(args: Namespace) -> int:
    """`recipe check`: one line where the recipe is good; all of its problems (RecipeError) where it is not."""
    try:
        loaded = load_recipe(args.recipe, args.overrides)
        refuse_unsupported(loaded)
        resolved = resolve(loaded.recipe, world_size_of(args))
    except RecipeError as error:
        if not args.json:
            raise
        _print_json({"ok": False, "problems": str(error).splitlines()})
        return 2
    if args.json:
        _print_json(
            {
                "ok": True,
                "recipe_hash": resolved.recipe_hash,
                "parameters": resolved.parameters,
                "warnings": resolved.warnings,
            }
        )
        return 0
    total, trained = (sum(resolved.parameters[kind].values()) for kind in ("total", "trainable"))
    print(
        f"ok  {args.recipe}  hash {resolved.recipe_hash}  {_count(total)} parameters, {_count(trained)} trained  "
        f"{_step_unit(resolved)} a step, {_num_steps(resolved)}"
    )
    for warning in resolved.warnings:
        print(f"warning: {warning}")
    return 0


def show_command(args: Namespace) -> int:
    """`recipe show`: every effective value with its origin, and everything that follows from them."""
    loaded = load_recipe(args.recipe, args.overrides)
    resolved = resolve(loaded.recipe, world_size_of(args))
    values = flatten(recipe_to_dict(loaded.recipe))
    origins = {name: str(loaded.origins.get(name, "default")) for name in values}
    if args.json:
        _print_json(
            {
                "values": {
                    name: {"value": value, "origin": origins[name], "resume": resume_of(name)}
                    for name, value in values.items()
                },
                **figures(resolved),
            }
        )
        return 0
    width = max(map(len, values))
    shown = {name: describe_yaml(value) for name, value in values.items()}
    value_width = min(max(map(len, shown.values())), 48)
    for name in values:
        print(f"{name:<{width}}  {shown[name]:<{value_width}}  {origins[name]}")
    for line in explain(resolved):
        print(line)
    return 0


def figures(resolved: Resolved) -> dict[str, Any]:
    """Everything that follows from a recipe and a number of ranks, as plain values."""
    tiles = most_tiles(resolved.recipe, resolved.batch)
    useful, executed = resolved.flops.step(resolved.batch.max_tokens, tiles)
    return {
        "recipe_hash": resolved.recipe_hash,
        "world_size": resolved.world_size,
        "num_steps": resolved.num_steps,
        "warmup_steps": resolved.warmup_steps,
        "decay_steps": resolved.decay_steps,
        "module_lr": resolved.module_lr,
        "batch": asdict(resolved.batch),
        "parameters": resolved.parameters,
        "flops": {**asdict(resolved.flops), "useful_per_full_step": useful, "executed_per_full_step": executed},
        "deepspeed": resolved.deepspeed,
        "memory": resolved.memory,
        "warnings": list(resolved.warnings),
    }


def explain(resolved: Resolved) -> list[str]:
    """What follows from a recipe, as lines for a reader: also the middle of a run's first screen."""
    batch, flops, memory = resolved.batch, resolved.flops, resolved.memory
    recipe = resolved.recipe
    total, trained = resolved.parameters["total"], resolved.parameters["trainable"]
    lines = ["", f"hash {resolved.recipe_hash}  (of every key that is not free to change)"]
    lines += ["", f"parameters    {'total':>16}  {'trained':>16}  peak lr"]
    for module in total:
        lr = f"{resolved.module_lr[module]:g}" if module in resolved.module_lr else "frozen"
        about = "".join(f"  {words}" for words in (adapters(recipe, module), storage(recipe, module)) if words)
        lines.append(f"  {module:<15}{total[module]:>16,}  {trained[module]:>16,}  {lr}{about}")
    lines.append(f"  {'all':<15}{sum(total.values()):>16,}  {sum(trained.values()):>16,}")
    places = recipe.model.cross_attention_layers
    if places:
        lines.append(
            f"  cross-attention at {len(places)} of {recipe.model.language_model.num_hidden_layers} decoder layers, "
            "counted from 1: " + ", ".join(str(place + 1) for place in places)
        )
    lines += [
        "",
        f"batch on {batch.world_size} rank{'s' * (batch.world_size > 1)}",
        f"  a step is {batch.samples} samples, at most {batch.max_packs} packs of {batch.pack_tokens} tokens"
        if batch.packs is None
        else f"  a step is {batch.packs} packs of at most {batch.pack_tokens} tokens, its samples known after indexing",
        f"  a micro-step is {batch.world_size} x {batch.micro_batch_size} = {batch.slots_per_micro_step} packs; "
        f"a step is {'at most ' if batch.packs is None else ''}{batch.max_micro_steps} "
        f"micro-step{'s' * (batch.max_micro_steps > 1)} (the accumulation)",
        f"  null packs: {batch.max_null_share:.1%} of the slots of such a step",
        f"  schedule: {recipe.schedule.name}, warm-up {_warmup(resolved)}"
        + (f", minimum at {_decay(resolved)}" if recipe.schedule.name == "cosine" else "")
        + f", {_num_steps(resolved)} in all"
        + (f" ({resolved.num_steps * batch.samples:,} samples)" if resolved.num_steps and batch.samples else ""),
    ]
    useful, executed = flops.step(batch.max_tokens, most_tiles(recipe, batch))
    lines += [
        "",
        f"FLOPs (forward and backward, samples of {flops.sample_tokens} tokens)",
        f"  per token {_flops(flops.useful_per_token)}, per tile {_flops(flops.useful_per_tile)} "
        f"(tower forward {_flops(flops.tile_forward)})",
        f"  a step of full samples ({batch.max_tokens:,} tokens, {most_tiles(recipe, batch):,} tiles): {_flops(useful)}"
        + (f", {_flops(executed)} with recompute" if executed > useful else ""),
        "",
        "memory per rank, predicted (without allocator slack, CUDA context and NCCL buffers)",
    ]
    lines += [
        f"  {kind.replace('_', ' '):<20}{_bytes(size):>12}"
        for kind, size in memory.items()
        if size and kind not in ("total", "host")
    ]
    lines.append(f"  {'sum':<20}{_bytes(memory['total']):>12}")
    if memory["host"]:
        lines.append(f"  {'offloaded to host':<20}{_bytes(memory['host']):>12}")
    lines += [
        "",
        "DeepSpeed configuration",
        *("  " + line for line in json.dumps(resolved.deepspeed, indent=2).splitlines()),
    ]
    lines += [f"warning: {warning}" for warning in resolved.warnings]
    return lines


def adapters(recipe: Recipe, module: str) -> str:
    """A module's LoRA in words, empty where it has none: `lora rank 16, alpha 32 on qkv, proj`."""
    if recipe.train.modes[module] != "lora":
        return ""
    options = getattr(recipe.train.lora, module)
    drop = f", dropout {options.dropout:g}" if options.dropout else ""
    names = ", ".join(options.targets or lora_targets(recipe.model, module))
    return f"lora rank {options.rank}, alpha {options.alpha:g}{drop} on {names}"


def storage(recipe: Recipe, module: str) -> str:
    """How a module's frozen weights are kept, where that is not the run's precision."""
    return (
        f"linear layers in {recipe.train.quantize}"
        if module == "language_model" and recipe.train.quantize != "none"
        else ""
    )


def _step_unit(resolved: Resolved) -> str:
    batch = resolved.batch
    return f"{batch.samples} samples" if batch.packs is None else f"{batch.packs} packs"


def _num_steps(resolved: Resolved) -> str:
    if resolved.num_steps is None:
        return f"steps known after indexing ({run_length(resolved.recipe)})"
    return f"{resolved.num_steps} steps"


def _warmup(resolved: Resolved) -> str:
    if resolved.warmup_steps is None:
        return f"{float(resolved.recipe.schedule.warmup_steps):.1%} of the steps"
    return f"{resolved.warmup_steps} steps"


def _decay(resolved: Resolved) -> str:
    return "the last step" if resolved.decay_steps is None else f"step {resolved.decay_steps}"


def diff_command(args: Namespace) -> int:
    """`recipe diff A B`: every key in which two recipes (files, or run directories) differ."""
    old, new = _read_either(args.a), _read_either(args.b)
    differences = compare(recipe_to_dict(old), new)
    if args.json:
        _print_json([item._asdict() for item in differences])
        return 0
    for item in differences:
        print(f"{item.key}: {describe_yaml(item.old)} -> {describe_yaml(item.new)}  ({item.resume})")
    if not differences:
        print("the same in every key")
    return 0


def _read_either(path: str) -> Recipe:
    saved = Path(path) / "recipe.json"
    if not saved.is_file():
        return load_recipe(path).recipe
    try:
        return Recipe.model_validate(json.loads(saved.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{saved}: is not a saved recipe of this version ({error})") from None


def keys_command(args: Namespace) -> int:
    """`recipe keys [PREFIX]`: every key with its type, default, what a resume may do with it, and its meaning."""
    chosen = [key for key in all_keys().values() if not args.prefix or key.path.startswith(args.prefix)]
    if not chosen:
        raise RecipeError(f"recipe keys: no key begins with {args.prefix!r}; `nvlm-train recipe keys` lists all")
    if args.json:
        _print_json(
            [
                {
                    "key": key.path,
                    "type": key.kind,
                    "default": _default(key.default),
                    "resume": key.resume,
                    "path": key.is_path,
                    "doc": key.doc,
                }
                for key in chosen
            ]
        )
        return 0
    for key in chosen:
        default = "" if key.section is not None else f", default {describe_yaml(_default(key.default))}"
        default = ", required" if key.default == "required" else default
        print(f"{key.path}  ({key.kind}{default}, {key.resume})\n    {key.doc}")
    return 0


def schema_command(args: Namespace) -> int:
    """`recipe schema`: the JSON schema, for editors that complete and check YAML."""
    _print_json(json_schema())
    return 0


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file: with `extends`, with the short forms, and nothing required.

    Required keys may come from a parent or a preset, which a schema cannot see; `recipe check` does.
    """
    schema: dict[str, Any] = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A recipe that this one is laid over, relative to this file.",
    }
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    for name, section in _sections(Recipe).items():
        if section.shorthand:
            short = {"type": "string", "description": f"{section.shorthand} alone"}
            schema["$defs"][name] = {"anyOf": [schema["$defs"][name], short]}
    return schema


def _sections(section: type[Section]) -> dict[str, type[Section]]:
    found = {key.section.__name__: key.section for key in all_keys(section).values() if key.section is not None}
    return found


def _default(default: Any) -> Any:
    return default.model_dump() if isinstance(default, Section) else default


def describe_yaml(value: Any) -> str:
    """A value as a recipe would write it: strings bare where that is safe, numbers as they are read."""
    if isinstance(value, str) and value and all(c.isalnum() or c in "._-/" for c in value) and not value[0].isdigit():
        return value
    if isinstance(value, list):
        return "[" + ", ".join(describe_yaml(item) for item in value) + "]"
    return describe(value)


def world_size_of(args: Namespace) -> int:
    """--world-size, or the launcher's WORLD_SIZE, or 1."""
    if args.world_size is not None:
        return int(args.world_size)
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        raise RecipeError(f"WORLD_SIZE: {text!r} is not a number of ranks; unset it, or give --world-size N")
    return int(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _count(number: int) -> str:
    return _scaled(number, (("B", 1e9), ("M", 1e6), ("k", 1e3)), "", "")


def _flops(number: float) -> str:
    return _scaled(number, (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)), " ", "FLOP")


def _bytes(number: int) -> str:
    return _scaled(number, (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)), " ", "B")


def _scaled(number: float, units: tuple[tuple[str, float], ...], gap: str, unit: str) -> str:
    for name, size in units:
        if number >= size:
            return f"{number / size:.2f}{gap or ' '}{name}{unit}"
    return f"{number:.0f}{gap}{unit}"


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "check": check_command,
    "show": show_command,
    "diff": diff_command,
    "keys": keys_command,
    "schema": schema_command,
}
