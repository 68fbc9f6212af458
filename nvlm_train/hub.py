"""Folders of the Hugging Face Hub: `hf://organisation/name@revision` where a recipe names a folder.

`nvlm-train fetch` downloads them, on a machine with internet, into huggingface_hub's cache (HF_HOME or HF_HUB_CACHE
say where; put it on storage that the compute nodes see). Nothing else here ever asks a server.

A revision that is a branch or a tag is resolved when it is fetched: the cache keeps the commit, a run records it in
recipe.json, and a resumed run stays with the recorded one, whatever was fetched since.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.log import get_logger
from nvlm_train.recipe.load import LoadedRecipe
from nvlm_train.recipe.resolve import COMMIT, hub_paths, recipe_to_dict
from nvlm_train.recipe.schema import HUB_PATH, HUB_PREFIX, Recipe

log = get_logger(__name__)

WEIGHT_PATTERNS = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
TOKENIZER_PATTERNS = [
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model",
]  # fmt: skip
LICENSE_PATTERNS = ["LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "incl_licenses/*", "README.md", "provenance.json"]
RUN_PATTERNS = ["recipe.json", "base.json", "step_*"]


def parse(path: str) -> tuple[str, str]:
    """("organisation/name", "revision") of an hf:// path; CheckpointError for anything else."""
    found = HUB_PATH.fullmatch(path)
    if found is None:
        raise CheckpointError(f"{path} is not of the form hf://organisation/name@revision")
    return found["repo"], found["revision"]


def local_folder(path: str | Path) -> Path:
    """The folder that a recipe's path means: itself, or where the cache has an hf:// path; asks no server.

    Raises CheckpointError where the cache does not have it.
    """
    if not str(path).startswith(HUB_PREFIX):
        return Path(path).expanduser()
    folder = _cached(str(path), [])  # whoever reads it says which file is missing
    if isinstance(folder, str):
        raise CheckpointError(
            f"{path} is not on this machine and is not downloaded here: {folder}; run `nvlm-train fetch RECIPE.yaml` "
            "where there is internet"
        )
    return folder


def _cached(path: str, patterns: list[str]) -> Path | str:
    """The folder in the cache, or why it cannot be used: it is not there, or not all files of `patterns` are."""
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    repo, revision = parse(path)
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=_ignored(patterns), local_files_only=True
        )
    except IncompleteSnapshotError:
        return "its download was not finished"
    except LocalEntryNotFoundError:
        return f"not in {huggingface_hub.constants.HF_HUB_CACHE}"
    return Path(found)


def _needed(recipe: Recipe) -> dict[str, list[str]]:
    """{hf:// path: patterns of the files that the recipe needs of it}."""
    kinds = {"tokenizer.path": TOKENIZER_PATTERNS, "init_from.run.path": RUN_PATTERNS}
    patterns: dict[str, list[str]] = {}
    for name, path in hub_paths(recipe).items():
        patterns.setdefault(path, [*LICENSE_PATTERNS]).extend(kinds.get(name, WEIGHT_PATTERNS))
    return patterns


def _ignored(patterns: list[str]) -> list[str] | None:
    """A star matches slashes too, but of a repository's folders (other formats of the same weights) nothing is wanted;
    of a run everything is."""
    return None if RUN_PATTERNS[0] in patterns else ["*/*.safetensors", "*/*.json"]


# --------------------------------------------------------------------------------------------------------- at the start


def pin(loaded: LoadedRecipe, recorded: Mapping[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The recipe with a commit in every hf:// path, and {path as written: path with its commit}.

    recorded: what an earlier attempt of the run found, as this function returned it. Asks no server.
    Raises CheckpointError naming every path that is not on this machine, and the command that downloads them.
    """
    recipe = loaded.recipe
    pinned: dict[str, str] = {}
    missing = []
    for path, patterns in _needed(recipe).items():
        wanted = recorded.get(path, path)
        folder = _cached(wanted, patterns)
        if isinstance(folder, str):
            note = "" if wanted == path else f" (of which this run has {wanted.partition('@')[2]})"
            missing.append(f"{path}{note}: {folder}")
        else:
            pinned[path] = f"{HUB_PREFIX}{parse(path)[0]}@{folder.name}"
    if missing:
        command = " ".join(["nvlm-train fetch", str(loaded.path), *loaded.overrides])
        raise CheckpointError(
            "weights of the Hub are not on this machine, and train never downloads; run this where there is internet:\n"
            f"  {command}\n  " + "\n  ".join(missing)
        )
    return _with_paths(recipe, {name: pinned[path] for name, path in hub_paths(recipe).items()}), pinned


def _with_paths(recipe: Recipe, paths: Mapping[str, str]) -> Recipe:
    if not paths:
        return recipe
    values = recipe_to_dict(recipe)
    for name, path in paths.items():
        section: Any = values
        *above, last = name.split(".")
        for part in above:
            section = section[part]
        section[last] = path
    return Recipe.model_validate(values)


# --------------------------------------------------------------------------------------------------------------- fetch


def fetch(loaded: LoadedRecipe, recorded: Mapping[str, str]) -> dict[str, Path]:
    """Downloads what the recipe's hf:// paths name: {path as written: folder}. An interrupted download goes on.

    Only the files that are needed: weights and configuration, tokenizer, licences. recorded: see `pin`; an existing
    run keeps its commits. Raises SetupError where the Hub cannot be asked or does not have it.
    """
    import huggingface_hub

    folders = {}
    for path, patterns in _needed(loaded.recipe).items():
        repo, revision = parse(recorded.get(path, path))
        log.info("fetching %s from %s", revision, repo)
        try:
            if not COMMIT.fullmatch(revision):
                # asked here, because snapshot_download takes an older commit of its cache when the Hub is not reached
                huggingface_hub.HfApi().model_info(repo, revision=revision)
            folder = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=_ignored(patterns)
            )
        except Exception as error:  # network, permissions, disk: the library raises its own for each
            raise SetupError(f"{path} cannot be downloaded: {type(error).__name__}: {error}") from error
        folders[path] = Path(folder)
    return folders
