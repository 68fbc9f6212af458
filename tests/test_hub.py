"""hf:// paths: fetch against a fake of huggingface_hub's download, and that nothing else ever asks a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from make_tiny_checkpoints import TINY_LANGUAGE_MODEL, TINY_VISION, write_internvit_folder, write_qwen2_folder
from nvlm_train import hub
from nvlm_train.cli import main
from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.recipe import schema
from nvlm_train.recipe.load import LoadedRecipe, load_recipe
from nvlm_train.recipe.resolve import recipe_hash, resolve

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
VIT, LM = "hf://OpenGVLab/tiny-vit@main", f"hf://Qwen/tiny@{COMMITS['main']}"
RECIPE = f"""
run_name: tiny
output_dir: run
model:
  vision: {json.dumps(TINY_VISION)}
  language_model: {json.dumps({**TINY_LANGUAGE_MODEL, "max_position_embeddings": 512})}
init_from:
  vision: {VIT}
  language_model: {LM}
tokenizer:
  path: {LM}
data:
  mixture: {{a: {{path: a.jsonl}}}}
  max_tokens_per_sample: 256
  pack_tokens: 512
global_batch: {{samples: 4}}
max_steps: 3
optimizer: {{lr: 1.0e-3}}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


class FakeHub:
    """Repositories as folders; downloads copy into a cache of huggingface_hub's own form, file by file."""

    def __init__(self, cache: Path, repositories: dict[str, Path]) -> None:
        self.cache, self.repositories = cache, repositories
        self.branches = dict(COMMITS)
        self.reachable = True
        self.downloads: list[tuple[str, str]] = []
        self.files_before_the_line_breaks = 1000
        self._real: Callable[..., str] = huggingface_hub.snapshot_download

    def model_info(self, api: Any, repo: str, revision: str) -> None:
        if not self.reachable:
            raise ConnectionError("no route to the Hub")
        if revision not in self.branches:
            raise ValueError(f"no revision {revision}")

    def snapshot_download(self, repo: str, *, revision: str, local_files_only: bool = False, **patterns: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        if local_files_only:  # the library itself, on the cache
            return self._real(repo, revision=revision, local_files_only=True, cache_dir=self.cache, **patterns)
        if not self.reachable:
            raise ConnectionError("no route to the Hub")
        self.downloads.append((repo, revision))
        commit = self.branches.get(revision, revision)
        home = self.cache / f"models--{repo.replace('/', '--')}"
        folder = home / "snapshots" / commit
        source = self.repositories[repo]
        names = [str(file.relative_to(source)) for file in sorted(source.rglob("*")) if file.is_file()]
        (home / "trees").mkdir(parents=True, exist_ok=True)
        tree = [{"path": name, "size": 1, "blob_id": name} for name in names]
        write_tree(home, commit, tree)
        for number, name in enumerate(filter_repo_objects(names, **patterns)):
            if number == self.files_before_the_line_breaks:
                raise ConnectionError("the line broke")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((source / name).read_bytes())
        if revision != commit:
            (home / "refs").mkdir(exist_ok=True)
            (home / "refs" / revision).write_text(commit)
        return str(folder)


def write_tree(home: Path, commit: str, tree: list[dict[str, Any]]) -> None:
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    entries = {
        e["path"]: TreeCacheEntry(size=1, blob_id=e["blob_id"], lfs_sha256=None, lfs_size=None, xet_hash=None)
        for e in tree
    }
    write_tree_cache(str(home), commit, entries)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    vit = write_internvit_folder(tmp_path / "vit", schema.Vision.model_validate(TINY_VISION))
    lm = write_qwen2_folder(tmp_path / "lm", schema.LanguageModel.model_validate(TINY_LANGUAGE_MODEL), num_shards=2)
    for name in ("LICENSE", "pytorch_model.bin", "tokenizer.json", "original/consolidated.safetensors"):
        (lm / name).parent.mkdir(exist_ok=True)
        (lm / name).write_text("{}")
    fake = FakeHub(tmp_path / "cache", {"OpenGVLab/tiny-vit": vit, "Qwen/tiny": lm})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, *a, **k: fake.model_info(api, *a, **k))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def loaded(fake: FakeHub, tmp_path: Path) -> LoadedRecipe:
    return load_recipe(write(tmp_path, RECIPE))


def test_fetch_downloads_what_is_needed_and_compares_it(fake: FakeHub, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, RECIPE)
    assert main(["fetch", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert fake.downloads == [("OpenGVLab/tiny-vit", "main"), ("Qwen/tiny", COMMITS["main"])]
    assert {p: f["commit"] for p, f in found["fetched"].items()} == {VIT: COMMITS["main"], LM: COMMITS["main"]}
    files = {
        str(f.relative_to(found["fetched"][LM]["folder"])) for f in Path(found["fetched"][LM]["folder"]).rglob("*")
    }
    assert {"config.json", "model-00002-of-00002.safetensors", "tokenizer.json", "LICENSE"} <= files
    assert not {"pytorch_model.bin", "original", "original/consolidated.safetensors"} & files
    table = {line.split()[0]: line.split()[1:] for line in found["weights"]}
    assert table["vision"][:3] == ["30", "0", "0"] and table["projector"][:3] == ["0", "4", "0"]
    assert table["language_model"][:3] == ["27", "0", "0"] and COMMITS["main"] in table["language_model"][-1]
    assert main(["fetch", path]) == 0
    assert f"{VIT}\n  commit {COMMITS['main']}, 0.00 GB" in capsys.readouterr().out


def test_an_interrupted_download_goes_on_and_is_not_taken_for_whole(fake: FakeHub, loaded: LoadedRecipe) -> None:
    fake.files_before_the_line_breaks = 1
    with pytest.raises(SetupError, match=r"hf://OpenGVLab/tiny-vit@main cannot be downloaded: ConnectionError"):
        hub.fetch(loaded, {})
    with pytest.raises(CheckpointError, match=r"nvlm-train fetch .*r\.yaml\n"):
        hub.pin(loaded, {})
    home = fake.cache / "models--OpenGVLab--tiny-vit"
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMITS["main"])  # the library writes it before the files
    with pytest.raises(CheckpointError, match="tiny-vit@main: its download was not finished"):
        hub.pin(loaded, {})
    fake.files_before_the_line_breaks = 1000
    hub.fetch(loaded, {})
    hub.pin(loaded, {})


def test_a_branch_is_pinned_to_the_commit_that_was_fetched(fake: FakeHub, loaded: LoadedRecipe) -> None:
    hub.fetch(loaded, {})
    recipe, revisions = hub.pin(loaded, {})
    pinned = f"hf://OpenGVLab/tiny-vit@{COMMITS['main']}"
    assert revisions == {VIT: pinned, LM: LM}
    assert recipe.init_from.vision is not None and recipe.init_from.vision.path == pinned
    assert recipe.tokenizer.path == LM and hub.local_folder(pinned).name == COMMITS["main"]
    assert "names no commit" in resolve(loaded.recipe, 1).warnings[0] and not resolve(recipe, 1).warnings
    # the branch moves on: a run that was started keeps its commit, a new one gets the new commit
    fake.branches["main"] = COMMITS["v2"]
    hub.fetch(loaded, {})
    again, _ = hub.pin(loaded, revisions)
    assert recipe_hash(again) == recipe_hash(recipe)
    new, _ = hub.pin(loaded, {})
    assert new.init_from.vision is not None and new.init_from.vision.path.endswith(COMMITS["v2"])
    assert len({recipe_hash(r) for r in (recipe, new, loaded.recipe)}) == 3
    fake.downloads.clear()
    hub.fetch(loaded, revisions)
    assert ("OpenGVLab/tiny-vit", COMMITS["main"]) in fake.downloads


def test_nothing_but_fetch_downloads(fake: FakeHub, loaded: LoadedRecipe, capsys: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        hub.pin(loaded, {})
    assert "train never downloads" in str(caught.value) and str(caught.value).count("not in ") == 2
    with pytest.raises(CheckpointError, match=r"run `nvlm-train fetch RECIPE\.yaml`"):
        hub.local_folder(LM)
    assert main(["data", "lint", str(loaded.path)]) == 2 and "nvlm-train fetch" in capsys.readouterr().err
    assert not fake.downloads


def test_without_the_hub_an_older_commit_of_the_branch_is_not_taken(fake: FakeHub, loaded: LoadedRecipe) -> None:
    hub.fetch(loaded, {})
    fake.reachable = False
    with pytest.raises(SetupError, match="cannot be downloaded: ConnectionError: no route"):
        hub.fetch(loaded, {})


def test_paths_without_a_revision_are_refused(tmp_path: Path, capsys: Any) -> None:
    text = RECIPE.replace(VIT, "hf://OpenGVLab/tiny-vit").replace(f"  path: {LM}", "  path: hf://tokenizer@main")
    assert main(["recipe", "check", write(tmp_path, text)]) == 2
    shown = capsys.readouterr().err
    assert "init_from.vision.path: 'hf://OpenGVLab/tiny-vit' has no revision; write hf://organisation/name@" in shown
    assert "tokenizer.path: 'hf://tokenizer@main' is not a repository of the Hub" in shown


def test_a_part_beside_the_whole_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["recipe", "check", write(tmp_path, RECIPE), "init_from.model=somewhere"]) == 2
    shown = capsys.readouterr().err
    assert "init_from.vision: " in shown and "stands beside init_from.model, which brings this part already" in shown
