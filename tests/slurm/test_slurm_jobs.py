"""The batch scripts on a real Slurm of two nodes: what ends a job early, and what follows.

`stand_in.py` runs in the trainer's place, because it starts in a second; what the trainer itself does (losses, saves of
all ranks) is in test_slurm_training.py. The jobs of most cases share the nodes and are submitted at once, since nearly
all of their time is Slurm's waiting: it runs a job again after 5 s at the earliest. Skipped where Slurm cannot run.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster
from place import REPOSITORY, Place, readable_by_all

RECIPE = REPOSITORY / "recipes" / "tiny_d.yaml"
STEPS = "max_steps=20"

Cases = dict[str, Place]


@pytest.fixture(scope="module")
def cases(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    folder = tmp_path_factory.mktemp("jobs")

    def case(name: str, stand_in: str, *options: str, **environ: str) -> Place:
        place = Place(cluster, folder / name, RECIPE, stand_in=stand_in)
        place.submit(*options, overrides=(STEPS,), **environ)
        return place

    yield {
        "warning": case("warning", "idle"),
        "limit": case("limit", "idle", "--time=1", NVLM_WARN_S="40"),
        "preemption": case("preemption", "idle", "--partition=low", "--gpus-per-node=4"),
        "scancel": case("scancel", "idle"),
        "crash": case("crash", "crash", NVLM_MAX_WITHOUT_PROGRESS="2"),
        "recipe": case("recipe", "recipe"),
        "array": case("array", "idle", "--array=1-3%1", f"--output={folder}/array/out-%A_%a"),
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
    urgent = cluster.sbatch(
        "--nodes=2", "--gpus-per-node=5", "--partition=high", "--output=/dev/null", "--wrap=sleep 1", cwd=place.folder
    )
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    found = cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), place.output()
    # TERM is what Slurm sends to the steps
    assert "stopped by ['SIGTERM']" in "\n".join(place.notes()) and place.notes().count("saved 11") == 1


def test_a_cancelled_job_saves_and_stays_cancelled(cases: Cases) -> None:
    place = cases["scancel"]
    at_step_10(place)
    place.cluster.run("scancel", str(place.job))
    found = place.cluster.wait(place.job)
    place.wait_for(lambda: "ending this job itself (CANCELLED)" in place.output(), "the script's last words", 15)
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
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0"), place.output()
    place.submit(overrides=("max_stepz=3",))  # found before any rank is started
    found = place.cluster.wait(place.job)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "max_stepz" in place.output() and "nothing was requeued" in place.output()


def test_an_element_of_an_array_is_requeued_alone(cases: Cases) -> None:
    place = cases["array"]
    at_step_10(place)
    array = place.job
    place.cluster.run("scancel", "--batch", "--signal=USR2", f"{array}_1")
    for element in (1, 2, 3):
        assert place.cluster.wait(f"{array}_{element}")["JobState"] == "COMPLETED", place.output()
    assert place.cluster.show(f"{array}_1")["Restarts"] == "1" and place.cluster.show(f"{array}_3")["Restarts"] == "0"
    assert [line.split()[0] for line in place.notes() if " from " in line] == [f"{array}_1.0", f"{array}_1.1"]
    assert place.output().count("nothing to do") == 2  # the elements after the last step


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
