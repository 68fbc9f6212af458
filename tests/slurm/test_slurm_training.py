"""The trainer itself on a Slurm of two nodes, one rank each: both ways to start it, and what it loses by what happens.

Every run here must end with the losses of the first, which nothing disturbed, bit for bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from cluster import Cluster
from place import REPOSITORY, Place
from runs import metrics, trajectory, write_inputs

WORDS = ("max_steps=20", "checkpoint.every_steps=5", "validation.every_steps=10", "distributed.silent_s=6")

Trajectory = list[tuple[int, float, float]]


@pytest.fixture(scope="module")
def recipe(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Index, preflight, training by srun with one task per rank, and export, as one chain."""
    place = Place(cluster, tmp_path_factory.mktemp("undisturbed"), recipe)
    place.environ["NVLM_PREFLIGHT"] = "1"
    options = f"--output={place.folder}/out-%x-%j --oversubscribe"
    words = ["--nodes", "2", "--gpus-per-node", "1", "--gpu-options", options]
    words += ["--cpu-options", f"{options} --cpus-per-task=1", str(recipe), "--export", str(place.folder / "export")]
    said = cluster.run("slurm/chain", *words, "--", *place.words(*WORDS)[1:], cwd=REPOSITORY, **place.environ)
    place.job = int(said.splitlines()[1].split()[0])
    for line in said.splitlines():
        assert cluster.wait(line.split()[0], 120)["JobState"] == "COMPLETED", place.output()
    yield place
    cluster.cancel_all()


def step_reached(place: Place, step: int) -> bool:
    return (place.run / "metrics.jsonl").exists() and any(record["step"] >= step for record in metrics(place.run))


def attempts(place: Place) -> list[str]:
    return sorted(path.name for path in (place.run / "attempts").iterdir())


def test_index_training_and_export_in_one_chain(undisturbed: Place) -> None:
    place = undisturbed
    assert "world  srun: rank 0 of 2, local rank 0 of 1" in place.output()
    assert len(trajectory(place.run)) == 20 and (place.run / "DONE").exists()
    assert (place.folder / "export" / "SHA256SUMS").exists()
    log = place.run / "attempts" / f"{place.job}.0"
    assert json.loads((log / "preflight.json").read_text())["failed"] == []
    assert {"begin.json", "end.json", "job.txt", "rank_0.log", "rank_1.log"} <= {path.name for path in log.iterdir()}
    assert json.loads((log / "begin.json").read_text())["nodes"] == ["node1", "node2"]
    assert "NumNodes=2" in (log / "job.txt").read_text()
    assert not list(place.folder.glob("nvlm-*"))  # the caches of the job are gone


def test_torchrun_saves_once_when_warned_and_goes_on(undisturbed: Place, recipe: Path, tmp_path: Path) -> None:
    place = Place(undisturbed.cluster, tmp_path / "warned", recipe)
    place.submit(overrides=(*WORDS, "checkpoint.every_steps=100"), NVLM_LAUNCH="torchrun")
    place.wait_for(lambda: step_reached(place, 3), "step 3", 90)
    place.signal("USR2")
    found = place.cluster.wait(place.job, 120)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), place.output()
    out = place.output()
    assert "world  torchrun: rank 0 of 2, local rank 0 of 1" in out
    assert "requeue: stopped by SIGUSR2" in out and attempts(place) == [f"{place.job}.0", f"{place.job}.1"]
    before = out.partition("requeue: stopped")[0]
    assert before.count("I saved ") == 1, before
    assert trajectory(place.run) == trajectory(undisturbed.run)


@pytest.mark.slow
def test_power_cuts_in_a_step_and_in_a_save(undisturbed: Place, recipe: Path, tmp_path: Path) -> None:
    cluster = undisturbed.cluster
    if cluster.plain:
        pytest.skip("needs namespaces: here nodes have no power of their own to cut")
    place = Place(cluster, tmp_path / "cut", recipe)

    def cut() -> None:
        cluster.power_cut("node2")
        try:
            cluster.wait_state(place.job, ["PENDING", "COMPLETING"], 60)
        finally:
            cluster.power_on("node2")

    place.submit(overrides=WORDS)
    place.wait_for(lambda: step_reached(place, 7), "step 7", 90)
    cut()
    place.wait_for(lambda: any(place.run.glob(".saving_step_*")), "a save", 90)
    cut()
    found = cluster.wait(place.job, 120)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2"), place.output()
    assert trajectory(place.run) == trajectory(undisturbed.run)
    assert len(attempts(place)) == 3
    assert (
        place.run / "set_aside" / "incomplete"
    ).exists()  # what was cut off in the save, put aside by the next start


@pytest.mark.slow
def test_a_full_disk_is_told_and_not_tried_again(undisturbed: Place, recipe: Path, tmp_path: Path) -> None:
    cluster = undisturbed.cluster
    if cluster.plain:
        pytest.skip("needs namespaces, for a small disk that all nodes see")
    place = Place(cluster, tmp_path / "full", recipe)
    place.run = cluster.small / "run"
    place.submit(overrides=(*WORDS, "checkpoint.every_steps=2"))
    found = cluster.wait(place.job, 120)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), place.output()
    assert "error: " in place.output() and "make room" in place.output() and "not requeued" in place.output()
    assert (place.run / "step_2" / "COMMITTED").exists()
