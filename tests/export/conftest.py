"""One export of one tiny model for all tests of this folder: transformers takes seconds to import, loading little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_train.export import hf
from tiny_nvlm import MemoryWeights, make_recipe, make_tokenizer, random_weights


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def recipe(tokenizer_folder: Path) -> dict[str, Any]:
    return make_recipe(tokenizer_folder)


@pytest.fixture(scope="session")
def weights(recipe: dict[str, Any]) -> MemoryWeights:
    return random_weights(recipe)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any], weights: MemoryWeights) -> Path:
    """fp32, in several shards. Do not change it: copy it."""
    return hf.export(weights, recipe, tmp_path_factory.mktemp("exports") / "tiny", max_shard_size="40KB", step=20)


@pytest.fixture(scope="session")
def loaded(exported: Path) -> Any:
    return hf.load_exported(exported)
