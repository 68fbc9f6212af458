"""The batch scripts on a real Slurm of two nodes: what ends a job early, and what follows.

`stand_in.py` runs in the trainer's place, because it starts in a second; what the trainer itself does (losses, saves of
all ranks) is in test_slurm_training.py. The jobs of most cases share the nodes and are submitted at once, since nearly
all of their time is Slurm's waiting: it runs a job again after 5 s at the earliest. Skipped where Slurm cannot run.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster
from place import REPOSITORY, Place, readable_by_all

RECIPE = REPOSITORY / "recipes" / "tiny_d.yaml"
STEPS = "max_steps=20"
NO_DATA = "data.mixture.pairs.path=nowhere.jsonl"

Cases = dict[str, Place]


@pytest.fixture(scope="module")
def cases(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    folder = tmp_path_factory.mktemp("jobs")

    def case(name: str, stand_in: str, *options: str, **environ: str) -> Place:
        place = Place(cluster, folder / name, RECIPE, stand_in=stand_in)
        place.submit(*options, overrides=(STEPS,), **environ)
        return place

    early = {"NVLM_WARN_S": "40"}  # of a minute, the shortest time limit that Slurm knows
    yield {
        "warning": case("warning", "idle"),
        "limit": case("limit", "idle", "--time=1", **early),
        "preemption": case("preemption", "idle", "--partition=low", "--gpus-per-node=20", NVLM_RANKS_PER_NODE="1"),
        "scancel": case("scancel", "idle"),
        "crash": case("crash", "crash", NVLM_MAX_WITHOUT_PROGRESS="2"),
        "recipe": case("recipe", "recipe"),
        "array": case("array", "idle", "--array=1-3%1", "--time=1", f"--output={folder}/array/out-%A_%a", **early),
        "bad_node": case("bad_node", "bad_node", "--nodes=1", NVLM_PREFLIGHT="1", NVLM_EXCLUDE="1"),
        "no_requeue": case("no_requeue", "idle", "--no-requeue"),
    }
    cluster.cancel_all()


def at_step_10(place: Place) -> None:
    place.wait_for(lambda: "saved 10" in place.notes(), "step 10", 90)


def test_a_warning_saves_once_and_the_job_goes_on(cases: Cases) -> None:
    place = cases["warning"]
    at_step_10(place)
    place.signal("USR2")
    assert place.cluster.wait(place.job)["JobState"] == "COMPLETED", place.output()
    notes = place.notes()
    assert notes[0].startswith(f"{place.job}.0 from 0 at ") and f"{place.job}.1 from 11 at" in "\n".join(notes)
    assert notes.count("saved 11") == 1 and "stopped by ['SIGUSR2']" in notes
    assert "requeue: stopped by SIGUSR2" in place.output()
    assert (place.run / "DONE").exists()
    # the same line again: nothing is started
    again = place.submit(overrides=(STEPS,))
    assert place.cluster.wait(again)["JobState"] == "COMPLETED" and place.notes() == notes
    assert "is complete (file DONE): nothing to do" in place.output()


def test_the_time_limit_is_seen_where_slurm_sends_no_signal(cases: Cases) -> None:
    place = cases["limit"]
    assert place.cluster.wait(place.job, 90)["JobState"] == "COMPLETED", place.output()
    assert re.search(r"\d+ s to the end of the job: the ranks finish", place.output())
    assert place.notes().count("saved 11") == 1


def test_a_preempted_job_goes_on_later(cases: Cases) -> None:
    place = cases["preemption"]
    at_step_10(place)
    cluster = place.cluster
    # of 32 GPUs a node: more than this job leaves, so that it must go; the other cases have one each
    urgent = cluster.sbatch(
        "--nodes=2", "--gpus-per-node=16", "--partition=high", "--output=/dev/null", "--wrap=sleep 1", cwd=place.folder
    )
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    found = cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), place.output()
    # TERM is what Slurm sends to the steps
    assert "stopped by ['SIGTERM'" in "\n".join(place.notes()) and place.notes().count("saved 11") == 1


def test_a_cancelled_job_saves_and_stays_cancelled(cases: Cases) -> None:
    place = cases["scancel"]
    at_step_10(place)
    place.cluster.run("scancel", str(place.job))
    found = place.cluster.wait(place.job)
    place.wait_for(lambda: "ending this job itself" in place.output(), "the script's last words", 15)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert "saved 11" in place.notes() and "requeued" not in place.output()


def test_a_rank_that_crashes_at_once_is_not_started_for_ever(cases: Cases) -> None:
    place = cases["crash"]
    found = place.cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "1"), place.output()
    assert "stop: 2 attempts in a row saved nothing beyond step 0" in place.output()


def test_a_mistake_of_the_user_is_not_tried_again(cases: Cases) -> None:
    place = cases["recipe"]
    found = place.cluster.wait(place.job)
    # whose exit code the job has depends on which rank ends first
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), place.output()
    assert "stop: a folder is missing" in place.output()
    place.submit(overrides=("max_stepz=3",))  # found before any rank is started
    found = place.cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "max_stepz" in place.output() and "nothing was requeued" in place.output()


def test_an_element_of_an_array_is_requeued_alone(cases: Cases) -> None:
    """Until it may start again, the next element goes on with the run; never two at once (%1); the last find DONE."""
    place = cases["array"]
    array = place.job
    for element in (1, 2, 3):
        assert place.cluster.wait(f"{array}_{element}", 90)["JobState"] == "COMPLETED", place.output()
    assert place.cluster.show(f"{array}_1")["Restarts"] == "1" and place.cluster.show(f"{array}_3")["Restarts"] == "0"
    first, second = [line.split(" at ")[0] for line in place.notes() if " from " in line]
    assert first == f"{array}_1.0 from 0" and second in (f"{array}_1.1 from 11", f"{array}_2.0 from 11")
    assert place.output().count("nothing to do") == 2  # the elements after the last step


def test_a_node_that_fails_the_preflight_is_left_out(cases: Cases) -> None:
    place = cases["bad_node"]
    found = place.cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), place.output()
    assert (found["ExcNodeList"], found["NodeList"]) == ("node1", "node2")
    assert "preflight failed on node1" in place.output() and len(place.notes()) > 4
    # without the switch it says what to do
    place = Place(place.cluster, place.folder / "again", RECIPE, stand_in="bad_node")
    place.submit("--nodes=1", "--nodelist=node1", NVLM_PREFLIGHT="1")
    assert place.cluster.wait(place.job)["JobState"] == "FAILED"
    assert "submit with --exclude=node1" in place.output()


def test_a_job_that_must_not_be_requeued_says_so(cases: Cases) -> None:
    place = cases["no_requeue"]
    at_step_10(place)
    place.signal("USR2")
    assert place.cluster.wait(place.job)["JobState"] == "FAILED"
    assert "--no-requeue" in place.output() and "saved 11" in place.notes()


def test_two_jobs_on_the_same_nodes_keep_apart(cases: Cases) -> None:
    """Their ports and caches; the other cases have run beside each other too."""
    meetings = [note.split()[-1] for place in cases.values() for note in place.notes() if " from " in note]
    ports = {name: {note.split()[-1] for note in place.notes() if " from " in note} for name, place in cases.items()}
    used = [port for each in ports.values() for port in each]
    assert len(used) == len(set(used)) >= 4, meetings
    assert not list(REPOSITORY.glob("slurm-nvlm-*.out"))


def test_a_chain_that_broke_ends_by_itself(cluster: Cluster, tmp_path: Path) -> None:
    """The first training has a mistake: the second and the export are not tried, and nothing waits for ever."""
    place = Place(cluster, tmp_path / "chain", RECIPE, stand_in="recipe")
    second = tmp_path / "second.yaml"
    second.write_text(f"extends: {RECIPE}\noutput_dir: {tmp_path}/second\n")
    first = tmp_path / "first.yaml"
    first.write_text(f"extends: {RECIPE}\noutput_dir: {tmp_path}/first\n")
    options = f"--output={tmp_path}/out-%x-%j --oversubscribe"
    small = f"{options} --cpus-per-task=1"
    words = ["--nodes", "2", "--gpus-per-node", "1", "--gpu-options", options, "--cpu-options", small]
    words += [str(first), str(second), "--export", str(tmp_path / "export"), "--", STEPS, NO_DATA]
    said = cluster.run("slurm/chain", *words, cwd=REPOSITORY, **place.environ).splitlines()
    assert [line.split()[1] for line in said] == ["prepare", "train", "prepare", "train", "export"]
    states = [cluster.wait(line.split()[0])["JobState"] for line in said]
    assert states == ["FAILED"] * 5  # no data for the index, which is told, and the trainings are tried all the same
    out = {path.name.rpartition("-")[0]: path.read_text() for path in sorted(tmp_path.glob("out-*"))}
    assert f"nothing done: {tmp_path}/first is not complete" in out["out-nvlm-train"]
    assert f"{tmp_path}/second is not complete (no file DONE): nothing was exported" in out["out-nvlm-export"]


def test_a_user_other_than_root(cluster: Cluster) -> None:
    own = Path(sys.executable).resolve()
    # a Python in a home of root's: the system's, where it is the same, with our packages
    pythons = [own, Path("/usr/bin") / f"python{sys.version_info.major}.{sys.version_info.minor}"]
    python = next((path for path in pythons if path.exists() and readable_by_all(path.parent)), None)
    packages = Path(sysconfig.get_path("purelib"))
    if python is None or not readable_by_all(REPOSITORY) or not readable_by_all(packages):
        pytest.skip("this checkout or its Python cannot be read by other users")
    nobody = pwd.getpwnam("nobody")
    folder = Path(tempfile.mkdtemp(prefix="nvlm_slurm_user_"))
    try:
        place = Place(cluster, folder / "case", RECIPE, stand_in="idle", python=str(python))
        place.environ["PYTHONPATH"] += f":{packages}"
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        place.submit(overrides=(STEPS,), user="nobody", HOME=str(folder))
        at_step_10(place)
        place.cluster.run("scancel", "--batch", "--signal=USR2", str(place.job), user="nobody")
        assert cluster.wait(place.job)["JobState"] == "COMPLETED", place.output()
        assert (place.run / "DONE").stat().st_uid == nobody.pw_uid and place.notes().count("saved 11") == 1
    finally:
        shutil.rmtree(folder)


def test_a_node_without_power_is_left_behind(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm notices after SlurmdTimeout and runs the job again when there are nodes; the script stays out of it."""
    if cluster.plain:
        pytest.skip("needs namespaces: here nodes have no power of their own to cut")
    place = Place(cluster, tmp_path / "power", RECIPE, stand_in="deaf")
    place.submit(overrides=(STEPS,))
    at_step_10(place)
    cluster.cable("node2", "down")  # for less than SlurmdTimeout: nobody notices
    time.sleep(2)
    cluster.cable("node2", "up")
    assert cluster.state(place.job) == "RUNNING"
    cluster.power_cut("node2")
    try:
        cluster.wait_state(place.job, ["PENDING"], 60)
    finally:
        cluster.power_on("node2")
    found = cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), place.output()
    assert f"{place.job}.1 from 10 at" in "\n".join(place.notes())


@pytest.mark.slow
def test_a_time_limit_without_any_warning(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm sends TERM, up to half a minute late; the ranks save within KillWait, and the job is requeued."""
    place = Place(cluster, tmp_path / "limit", RECIPE, stand_in="idle")
    place.submit("--time=1", "--signal=B:CONT@1", overrides=(STEPS,))
    assert cluster.wait(place.job, 150)["JobState"] == "COMPLETED", place.output()
    assert "TimeLimit" in place.output() and place.notes().count("saved 11") == 1
