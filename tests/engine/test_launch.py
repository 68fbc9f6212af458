"""The resolver of rank, world and address, and what only the ranks together can find."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import free_port
from nvlm_train.engine import heartbeat
from nvlm_train.engine.heartbeat import Heartbeat, Member
from nvlm_train.engine.launch import Launch, expand_tasks_per_node, first_host, resolve_launch
from nvlm_train.errors import PeerError, SetupError

TORCHRUN = dict(
    RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="host-a", MASTER_PORT="34399",
    TORCHELASTIC_RUN_ID="17", TORCHELASTIC_USE_AGENT_STORE="True",
)  # fmt: skip
# as slurm 22.05 sets them in a step of one torchrun per host: these are the agent's
AGENT = dict(
    SLURM_JOB_ID="17", SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_LOCALID="0", SLURM_NTASKS="2", SLURM_NODEID="1",
    SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_STEP_NODELIST="gpu[07-08]",
)  # fmt: skip
TASK = AGENT | dict(SLURM_PROCID="6", SLURM_LOCALID="1", SLURM_NTASKS="7", SLURM_STEP_NUM_TASKS="7",
                    SLURM_STEP_TASKS_PER_NODE="5,2")  # fmt: skip


def test_alone() -> None:
    launch = resolve_launch({})
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_world_size) == ("alone", 0, 1, 1)
    assert launch.verdict == "alone: rank 0 of 1, local rank 0 of 1"
    batch = resolve_launch({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert batch.world_size == 1 and "the SLURM allocation has 8 tasks, but no srun or torchrun" in batch.verdict


def test_torchrun_on_two_hosts_and_under_srun() -> None:
    for environ in (TORCHRUN, TORCHRUN | AGENT):
        launch = resolve_launch(environ)
        assert launch.verdict == "torchrun: rank 5 of 8, local rank 1 of 4, meeting at host-a:34399"
        assert launch.agent_store


def test_srun_with_one_task_per_rank() -> None:
    launch = resolve_launch(TASK)
    assert launch.verdict == "srun: rank 6 of 7, local rank 1 of 2, meeting at gpu07:20017"
    assert not launch.agent_store
    launch = resolve_launch(TASK | dict(MASTER_ADDR="10.0.0.7", MASTER_PORT="23456"))
    assert (launch.address, launch.port) == ("10.0.0.7", 23456)


@pytest.mark.parametrize(
    "environ, words",
    [
        (dict(RANK="0"), ["WORLD_SIZE is not set", "torchrun"]),
        (dict(WORLD_SIZE="2"), ["RANK is not set"]),
        (TORCHRUN | dict(RANK="two"), ["RANK='two'", "whole number"]),
        (TORCHRUN | dict(RANK="8"), ["rank 8 in a world of 8", "0 to 7"]),
        (TORCHRUN | dict(LOCAL_RANK="4"), ["local rank 4", "4 ranks", "0 to 3"]),
        (TORCHRUN | dict(WORLD_SIZE="3", RANK="1"), ["4 ranks on this host", "a world of 3"]),
        (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"), ["MASTER_ADDR and MASTER_PORT", "WORLD_SIZE=2"]),
        (
            TASK | {k: v for k, v in TORCHRUN.items() if "TORCH" not in k},
            ["RANK=5", "SLURM_PROCID=6", "no torchrun", "unset RANK"],
        ),
        (TASK | dict(SLURM_NTASKS="9"), ["SLURM_NTASKS=9", "SLURM_STEP_NUM_TASKS=7"]),
        (TASK | dict(SLURM_STEP_TASKS_PER_NODE="2(x2)"), ["'2(x2)' counts 4 tasks on 2 hosts", "7"]),
        (TASK | dict(SLURM_STEP_TASKS_PER_NODE="many"), ["'many'", "2(x3),1"]),
        (TASK | dict(SLURM_STEP_NODELIST=""), ["MASTER_ADDR"]),
        (dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="1"), ["OMPI_COMM_WORLD_SIZE=4", "torchrun"]),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ: dict[str, str], words: Sequence[str]) -> None:
    with pytest.raises(SetupError) as refused:
        resolve_launch(environ)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_slurms_short_forms() -> None:
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    hosts = {"a": "a", "a,b": "a", "gpu[07-09,12],login": "gpu07", "n[3,5]-ib": "n3-ib", "a1-ib,b": "a1-ib", "": ""}
    assert {given: first_host(given) for given in hosts} == hosts


# ------------------------------------------------------------------------------------------------------- meeting


def meet(worlds: dict[int, int], *, wait_s: float = 2.0) -> dict[int, str]:
    """Ranks of one process that meet: {rank: world that it believes in}. Returns what each was told, "" for nothing."""
    port, told = free_port(), {}
    beats = {
        rank: Heartbeat(Launch("test", rank, world, rank, world, "127.0.0.1", port), wait_s)
        for rank, world in worlds.items()
    }

    def run(rank: int) -> None:
        with beats[rank]:
            try:
                beats[rank].join()
                told[rank] = ""
                time.sleep(0.3)
            except (SetupError, PeerError) as error:
                told[rank] = f"{type(error).__name__}: {error}"
                beats[rank].leave("failed", "refused")

    threads = [threading.Thread(target=run, args=(rank,)) for rank in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told


def test_ranks_that_fit_are_let_in() -> None:
    assert meet({0: 3, 1: 3, 2: 3}, wait_s=30.0) == {0: "", 1: "", 2: ""}


def test_a_missing_rank_is_named_with_the_address_in_time() -> None:
    begun = time.monotonic()
    told = meet({0: 4, 2: 4})
    assert time.monotonic() - begun < 30
    for rank in (0, 2):
        assert told[rank].startswith("PeerError: 2 of 4 ranks have not come to 127.0.0.1:"), "starting again may help"
        assert ": rank 1, 3." in told[rank]
        assert "distributed.rendezvous_s" in told[rank]


def test_without_rank_0_nobody_waits_for_ever() -> None:
    (text,) = meet({1: 2}).values()
    assert (
        text.startswith("PeerError: ")
        and "found nobody at 127.0.0.1:" in text
        and "rank 0 should answer" in text
        and "refused" in text
    )


def test_another_world_size_on_one_rank_is_found_at_once() -> None:
    begun = time.monotonic()
    told = meet({0: 3, 1: 2}, wait_s=60.0)
    assert time.monotonic() - begun < 30
    assert all(
        "SetupError: WORLD_SIZE is 3 for rank 0 (host " in text and "but 2 for rank 1 (host " in text
        for text in told.values()
    )


def test_the_same_gpu_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = heartbeat.this_process
    monkeypatch.setattr(heartbeat, "this_process", lambda launch: replace(original(launch), gpu="GPU-1"))
    told = meet({0: 2, 1: 2}, wait_s=60.0)
    assert all("have the same GPU (GPU-1)" in text for text in told.values())


def test_an_old_room_is_not_mistaken_for_the_new_one() -> None:
    """torchrun starts workers again and keeps the store: a rank that comes before rank 0 finds the room of before."""
    from datetime import timedelta

    import torch.distributed as dist

    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, None, True, timedelta(seconds=30), wait_for_workers=False)
    launches = [Launch("test", rank, 2, rank, 2, "127.0.0.1", port, agent_store=True) for rank in range(2)]

    def attempt() -> list[Heartbeat]:
        beats = [Heartbeat(launch, 30.0) for launch in reversed(launches)]
        beats[0].__enter__()
        time.sleep(0.5)  # rank 1 alone with what the store holds
        beats[1].__enter__()
        for beat in beats:
            beat.join()
        return beats

    first = attempt()
    assert len({beat._room for beat in first}) == 1
    for beat in first:
        beat._over.set()  # killed: nobody says good-bye
    second = attempt()
    assert len({beat._room for beat in [*first, *second]}) == 2
    for beat in second:
        beat.leave("done", "")
    del store


def test_a_rank_that_leaves_says_why_and_one_that_does_not_is_lost(tmp_path: Path) -> None:
    port = free_port()
    beats = [Heartbeat(Launch("test", rank, 3, rank, 3, "127.0.0.1", port), 30.0) for rank in range(3)]
    for beat in beats:
        beat.__enter__()
    for beat in beats:
        beat.join()
    beats[1].mark(7, "data")
    time.sleep(1.5)
    beats[1].leave("failed", "OSError: no")
    gone: Member = replace(beats[0].members[2], pid=2**22 + 1)  # no process has this number
    beats[0].members[2] = gone
    beats[0].look_at_all = True
    until = time.monotonic() + 20
    while len(beats[0].trouble(60.0)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    texts = [standing.text for standing in beats[0].trouble(60.0)]
    assert "rank 1 (host" in texts[0] and "failed in step 7, data: OSError: no" in texts[0]
    assert "rank 2 (host" in texts[1] and "was lost" in texts[1]
    beats[2].leave("done", "")
    beats[0].leave("done", "")


@pytest.mark.slow
def test_a_rank_that_leaves_while_it_joins_ends_well() -> None:
    """As on the complete run, where there is nothing to do: 2 of 36 were aborted before the thread was waited for."""
    code = """
import os, sys, time
from nvlm_train.engine.heartbeat import Heartbeat
from nvlm_train.engine.launch import Launch

for n, port in enumerate(sys.argv[1:]):
    pid = os.fork()
    if pid == 0:
        with Heartbeat(Launch("test", 0, 2, 0, 2, "127.0.0.1", int(port)), 30.0):
            time.sleep(0.01 * n)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    ports = [str(free_port()) for _ in range(20)]
    done = subprocess.run([sys.executable, "-c", code, *ports], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0"] * 20, done.stderr[-2000:]
