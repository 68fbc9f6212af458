"""The weights a run starts from: what `init_from` names, opened as one and compared with the model.

Imports no deepspeed, so that `nvlm-train fetch` can do the same on a login node.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvlm_train import checkpoint
from nvlm_train.engine.optim import module_of
from nvlm_train.errors import CheckpointError
from nvlm_train.hub import fetch, local_folder
from nvlm_train.log import get_logger
from nvlm_train.model import key_map, lora
from nvlm_train.model.pretrained import (
    Account,
    Weights,
    account,
    expected_shapes,
    made_for,
    merge,
    open_language_model_folder,
    open_model_folder,
    open_vision_folder,
)
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.schema import Recipe

log = get_logger(__name__)


class _Only:
    """Some names of other weights."""

    def __init__(self, weights: Weights, names: Sequence[str]) -> None:
        self._weights, self._names = weights, sorted(names)

    def names(self) -> list[str]:
        return self._names

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._weights, attribute)


def open_weights(recipe: Recipe, goes_on_from: Path | None = None) -> Weights:
    """What `init_from` names, as one: folders first, an earlier run's trained modules in place of theirs.

    Of an earlier run that trained little, the frozen rest is taken from where it had it, unless a folder brings it.
    goes_on_from: the run's own checkpoint, where init_from names what it did then. A run that has copies of its frozen
    weights (`checkpoint.base`) goes on from them: the folders may be gone.
    """
    if goes_on_from is not None:
        own = checkpoint.open_checkpoint(goes_on_from)
        if own.self_contained:
            return own.without_adapters() if own.adapters else own  # the checkpoint brings the adapters
    parts: list[Weights] = []
    earlier: Weights | None = None
    trained: set[str] = set()
    begin = recipe.init_from
    if begin.run is not None:
        brought = {
            "vision_model.": begin.vision or begin.model,
            "language_model.": begin.language_model or begin.model,
            "projector.": begin.model,
            "cross_attention.": begin.model,
        }
        without = tuple(prefix for prefix, by in brought.items() if by is not None)
        opened = checkpoint.open_checkpoint(_run_folder(begin.run.path), without=without)
        earlier, trained = opened, opened.trained
        if begin.adapters == "continue":
            _check_continued(recipe, opened)
            earlier, trained = opened.without_adapters(), set(opened.checkpoint.shapes)
        _check_earlier_model(recipe, opened, sorted({module_of(name) for name in earlier.names()}))
        parts.append(_Only(earlier, sorted(set(earlier.names()) - trained)))
    if begin.model is not None:
        parts.append(open_model_folder(_weights_folder(begin.model.path, "model"), recipe.model))
    if begin.vision is not None:
        parts.append(open_vision_folder(_weights_folder(begin.vision.path, "vision"), recipe.model.vision))
    if begin.language_model is not None:
        folder = _weights_folder(begin.language_model.path, "language_model")
        parts.append(open_language_model_folder(folder, recipe.model.language_model))
    if earlier is not None:
        parts.append(_Only(earlier, sorted(trained)))
    return merge(*parts)


def _check_earlier_model(recipe: Recipe, earlier: checkpoint.CheckpointWeights, modules: Sequence[str]) -> None:
    """Raises CheckpointError where modules that an earlier run brings are not the recipe's: shapes do not tell it all.

    NVLM-H may start from an NVLM-D: it has the same projector, and at closed gates it is one over the thumbnails.
    """
    there, here = key_map.model_from_recipe(earlier.recipe), recipe.model
    if there.architecture != here.architecture and (there.architecture, here.architecture) != ("nvlm_d", "nvlm_h"):
        raise CheckpointError(
            f"init_from.run {earlier.path} is an {there.architecture}, model.architecture is {here.architecture!r}; "
            "name a run of this architecture, or the backbones alone in init_from.vision and init_from.language_model"
        )
    problems = [
        f"model.{module}.{name} is {value!r} in that run, but {wanted!r} in the recipe"
        for module in modules
        for (name, value), wanted in zip(made_for(there, module).items(), made_for(here, module).values(), strict=True)
        if value != wanted
    ]
    if problems:
        raise CheckpointError(
            f"init_from.run {earlier.path} holds another model:\n  " + "\n  ".join(problems)
            + "\nwrite the same into the recipe, or name other weights"
        )  # fmt: skip


def _check_continued(recipe: Recipe, earlier: checkpoint.CheckpointWeights) -> None:
    """Raises CheckpointError where the adapters of an earlier run are not those that this recipe would train on."""
    path = recipe.init_from.run.path if recipe.init_from.run is not None else ""
    if not earlier.adapters:
        raise CheckpointError(
            f"init_from.adapters is 'continue', but {path} has no LoRA adapters; remove it, or name a run that has"
        )
    wanted = lora.scales(recipe.train)
    there = {a.split(".", 1)[0]: scale for a, _, scale in earlier.adapters.values()}
    problems = [
        f"{module}: alpha / rank is {there.get(module, 'none')} in {path}, {wanted.get(module, 'none')} in the recipe"
        for module in sorted({*there, *wanted})
        if there.get(module) != wanted.get(module)
    ]
    if problems:
        raise CheckpointError(
            "init_from.adapters is 'continue', but the adapters differ:\n  " + "\n  ".join(problems)
            + "\ngive the same train.lora, or init_from.adapters: merge"
        )  # fmt: skip


def _weights_folder(path: str, name: str) -> Path:
    folder = local_folder(path)
    if (folder / "recipe.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"init_from.{name}: {folder} is a run of ours; name it in init_from.run")
    return folder


def _run_folder(path: str) -> Path:
    folder = local_folder(path)
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"init_from.run: {folder} is a folder of weights, no run of ours; name it in init_from.model, .vision or "
            ".language_model"
        )
    return folder


def account_for_weights(recipe: Recipe, weights: Weights) -> Account:
    """Compares what the model needs with what there is; raises CheckpointError listing every difference.

    A module may be new as a whole, but not where it is frozen: it would stay as random as it began.
    """
    modules = ("projector.", "cross_attention.", "vision_model.", "language_model.")
    found = account(expected_shapes(recipe.model), _without_adapters(weights), modules)
    new = {module_of(name) for name in found.initialised}
    for module in sorted(new):
        if recipe.train.modes[module] != "full":
            key = "run" if module in ("projector", "cross_attention") else module
            raise CheckpointError(
                f"train.{module} is {recipe.train.modes[module]!r}, but nothing gives it weights, so it would stay "
                f"random; name them in init_from.{key}, or train it"
            )
    adapters = account(lora.adapter_shapes(recipe.model, recipe.train), _adapters_alone(weights), ("",))
    return Account(
        sorted(found.loaded + adapters.loaded), sorted(found.initialised + adapters.initialised), found.ignored
    )


def _without_adapters(weights: Weights) -> Weights:
    return _Only(weights, [name for name in weights.names() if not lora.is_adapter(name)])


def _adapters_alone(weights: Weights) -> Weights:
    return _Only(weights, [name for name in weights.names() if lora.is_adapter(name)])


def account_table(found: Account, weights: Weights) -> list[str]:
    """What becomes of every tensor, a line for each module and folder: loaded, initialised, ignored, from where."""
    rows: dict[tuple[str, str], list[int]] = {}
    for column, names in enumerate((found.loaded, found.initialised, found.ignored)):
        for name in names:
            place = "the recipe's seed" if column == 1 else _place(weights.where(name))
            rows.setdefault((module_of(name), place), [0, 0, 0])[column] += 1
    lines = [f"{'':<16}{'loaded':>8}{'initialised':>13}{'ignored':>9}  from"]
    return lines + [f"{module:<16}{n[0]:>8}{n[1]:>13}{n[2]:>9}  {place}" for (module, place), n in rows.items()]


def _place(where: str) -> str:
    """The folder or run of "FILE:KEY" or "RUN/step_N:NAME"."""
    path = Path(where.rsplit(":", 1)[0])
    return str(path.parent) if path.is_file() else str(path)


def fetch_command(args: Namespace) -> int:
    """`nvlm-train fetch R.yaml`: downloads what hf:// names, then opens the weights as training would."""
    loaded = load_recipe(args.recipe, args.overrides)
    run = Path(loaded.recipe.output_dir)
    recorded = checkpoint.recorded_revisions(run)
    folders = fetch(loaded, recorded)
    fetched = {path: _facts(folder) for path, folder in folders.items()}
    table: list[str] = []
    earlier, missing = loaded.recipe.init_from.run, None
    if earlier is not None and not _has_begun(local_folder(earlier.path)):
        missing = f"init_from.run {earlier.path} is not there yet; the weights are compared with the model when it is"
    else:
        weights = open_weights(loaded.recipe)
        table = account_table(account_for_weights(loaded.recipe, weights), weights)
    if args.json:
        print(json.dumps({"fetched": fetched, "weights": table, "missing": missing}, indent=2))
        return 0
    for path, facts in fetched.items():
        print(f"{path}\n  commit {facts['commit']}, {facts['bytes'] / 1e9:.2f} GB, {facts['folder']}")
    if not fetched:
        print("nothing to fetch: no path of this recipe begins with hf://")
    for line in table or [str(missing)]:
        print(line)
    return 0


def _has_begun(run: Path) -> bool:
    """Whether something can be opened behind init_from.run, right or wrong; stage 2 may be fetched before stage 1."""
    return checkpoint.is_run(run) or (run.is_dir() and not (run / "recipe.json").is_file())


def _facts(folder: Path) -> Mapping[str, Any]:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"commit": folder.name, "folder": str(folder), "bytes": size}
