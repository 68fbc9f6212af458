"""Jobs for warm ranks: a preflight in which one rank plays another node with something wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from nvlm_train.recipe.load import load_recipe
from nvlm_train.train import preflight as looks


def preflight(
    *, rank: int, world_size: int, recipe: str, overrides: Sequence[str], fault: str = "", out: str | None = None
) -> list[tuple[Any, ...]]:
    """Rank N is on node "nodeN", and rank 1 has the fault."""
    overrides, patches = list(overrides), []
    if rank == 1 and fault == "clock":
        real = time.time
        patches.append(mock.patch.object(looks.time, "time", lambda: real() + 5.0))
    if rank == 1 and fault == "software":
        found = {**looks.software(), "torch": "1.0"}
        patches.append(mock.patch.object(looks, "software", lambda: found))
    if rank == 1 and fault == "names":
        patches.append(mock.patch.object(looks.socket, "gethostbyname", mock.Mock(side_effect=OSError("unknown"))))
    if rank == 1 and fault == "space":
        patches.append(mock.patch.object(looks.shutil, "disk_usage", lambda path: mock.Mock(free=10)))
    if rank == 1 and fault == "folder":
        overrides.append(f"output_dir={Path(load_recipe(recipe, overrides).recipe.output_dir).parent / 'other'}")
    if rank == 1 and fault == "tokenizer":
        overrides.append("tokenizer.path=nowhere")
    with mock.patch.dict(os.environ, {"SLURMD_NODENAME": f"node{rank}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}):
        for patch in patches:
            patch.start()
        try:
            loaded = load_recipe(recipe, overrides)
            return [tuple(one) for one in looks.preflight(loaded.recipe, out=None if out is None else Path(out))]
        finally:
            for patch in patches:
                patch.stop()
