"""What holds for every test: one thread per process, no compiler at start, slow tests only on demand."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("loaded", deadline=None)  # a busy machine is no failure
settings.load_profile("loaded")

# Before torch is imported anywhere, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run several processes on few cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # deepspeed imports the compiler otherwise: 2 s in each process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a server
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
