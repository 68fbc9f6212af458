"""One cluster for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, NoCluster, install


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; skipped, with the reason, where Slurm cannot run. NVLM_SLURM_PLAIN=1: without namespaces."""
    folder = Path(tempfile.mkdtemp(prefix="nvlm_slurm_"))  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    try:
        install()
        running = Cluster(folder, plain=os.environ.get("NVLM_SLURM_PLAIN") == "1")
        running.start()
    except (NoCluster, OSError) as reason:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no Slurm here: {reason}")
    with running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)
