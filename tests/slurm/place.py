"""A recipe, a run directory and an environment for one case, and the words to submit it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


class Place:
    """One case. folder: everything of it; run: its run directory; job: what was submitted last."""

    def __init__(
        self, cluster: Cluster, folder: Path, recipe: Path, *, stand_in: str | None = None, python: str = sys.executable
    ) -> None:
        """stand_in: STAND_IN of `stand_in.py`, which then trains in the trainer's place, run by `python`."""
        folder.mkdir(exist_ok=True)
        self.cluster, self.folder, self.recipe, self.run = cluster, folder, recipe, folder / "run"
        self.job = 0
        (folder / "site.sh").write_text(
            "export TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1\n"
            + ("" if cluster.plain else "export GLOO_SOCKET_IFNAME=eth0\n")
        )
        self.environ = {
            "NVLM_VENV": sys.prefix, "NVLM_SITE": str(folder / "site.sh"), "NVLM_PREFLIGHT": "0",
            "NVLM_LAUNCH": "srun", "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1",
            "NVLM_CACHE": str(folder), "NVLM_WARN_S": "0",
        }  # fmt: skip
        if cluster.plain:  # node names are known to Slurm alone
            self.environ["NVLM_MASTER_ADDR"] = "127.0.0.1"
        if stand_in is not None:
            write_shim(folder / "venv", python)
            self.environ |= {"NVLM_VENV": str(folder / "venv"), "STAND_IN": stand_in}

    def words(self, *overrides: str) -> list[str]:
        return [str(self.recipe), f"output_dir={self.run}", *overrides]

    def options(self, *options: str) -> list[str]:
        """For sbatch: two nodes with a GPU each, that others may use too, and where the output goes."""
        shared = ["--nodes=2", "--gpus-per-node=1", "--oversubscribe", "--signal=B:USR2@1"]
        return [*shared, f"--output={self.folder}/out-%j", *options]

    def submit(self, *options: str, overrides: tuple[str, ...] = (), user: str | None = None, **environ: str) -> int:
        """Submits slurm/train.sbatch."""
        words = [*self.options(*options), "slurm/train.sbatch", *self.words(*overrides)]
        self.job = self.cluster.sbatch(*words, cwd=REPOSITORY, environ={**self.environ, **environ}, user=user)
        return self.job

    def notes(self) -> list[str]:
        """What the stand-in has done."""
        path = self.run / "notes.txt"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > until:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self.notes()}\n{self.output()[-3000:]}")
            time.sleep(0.005)

    def output(self) -> str:
        """All that its jobs have written."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("out-*")))

    def signal(self, name: str) -> None:
        """To the batch script alone, as --signal=B: does."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", str(self.job))


def write_shim(venv: Path, python: str) -> None:
    """An environment whose Python runs `stand_in.py` where the trainer or the preflight is asked for."""
    shim = venv / "bin" / "python"
    shim.parent.mkdir(parents=True)
    shim.write_text(
        "#!/bin/bash\n"
        'case " $* " in *" nvlm_train train "* | *" nvlm_train preflight "*)\n'
        f'exec {python} {HERE}/stand_in.py "$@" ;; esac\n'
        f'exec {python} "$@"\n'
    )
    shim.chmod(0o755)


def readable_by_all(path: Path) -> bool:
    """Whether any user may come to a path."""
    return all(os.stat(part).st_mode & 0o005 == 0o005 for part in [path, *path.parents])
