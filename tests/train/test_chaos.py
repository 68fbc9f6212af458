"""A training that is interrupted at random, again and again, ends as one that never was.

kill -9 of a rank, a signal to all or to one, a stop file, a full disk, a stopped process, with another number of ranks
at each start. What must hold in the end: the losses of the undisturbed run, and in each step exactly its samples.
Everything is drawn from one seed, which is printed; the moment at which a signal meets the ranks is the machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nvlm_train import checkpoint
from runs import trajectory, write_inputs
from zygote import Job, Zygote

KINDS = ("kill", "kill", "term", "term one", "usr2", "file", "full disk", "freeze")
DISK_MIB = 48
# worst measured: 2.2e-7 (20 interruptions with 1, 2 and 3 ranks, NVLM_CHAOS_SEED of 383784826, 2026-11-26)
LOSS_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as warm:
        yield warm


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, where that is allowed; else a plain folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "nvlm-chaos", str(folder)], capture_output=True
        ).returncode
    )
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def samples_by_step(folder: Path) -> dict[int, list[tuple[str, int, int]]]:
    """The samples of each step, of the last attempt that came to it; (source, row, epoch), sorted."""
    found: dict[int, dict[int, list[tuple[str, int, int]]]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the half line of a kill
                record = json.loads(line)
                attempts = found.setdefault(record["step"], {})
                attempts.setdefault(record["attempt"], []).extend(tuple(ref) for ref in record["samples"])
    return {step: sorted(attempts[max(attempts)]) for step, attempts in found.items()}


def fill(disk: Path) -> Path | None:
    """Takes all the room of a small file system; None where there is none to be taken."""
    if not os.path.ismount(disk):
        return None
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"\0" * 65536)
    return ballast


def wait_for_step(step: int, job: Job) -> None:
    """Waits until this attempt has come so far; metrics.jsonl may still hold more of the one before."""
    until = time.monotonic() + 240
    while None in job.codes() and time.monotonic() < until and f" step {step}/" not in job.text():
        time.sleep(0.02)


def interrupt(kind: str, job: Job, run: Path, disk: Path, rank: int, fault_injected: bool) -> list[int | None]:
    """Does what `kind` says; returns the exit codes of the ranks."""
    if kind == "kill":
        job.signal(signal.SIGKILL, rank)
    elif kind == "term":
        job.signal(signal.SIGTERM)
    elif kind == "term one":
        job.signal(signal.SIGTERM, rank)
    elif kind == "usr2":
        job.signal(signal.SIGUSR2)
    elif kind == "file":
        run.mkdir(exist_ok=True)
        (run / "stop").touch()
    elif kind == "freeze":
        job.signal(signal.SIGSTOP, rank)
        until = time.monotonic() + 60  # the others end by themselves, the frozen one cannot
        while [code for one, code in enumerate(job.codes()) if one != rank].count(None) and time.monotonic() < until:
            time.sleep(0.05)
        found = job.codes()
        job.kill()
        return found
    elif not fault_injected:
        ballast = fill(disk)
        found = job.wait(120)
        if ballast is not None:
            ballast.unlink(missing_ok=True)
        return found
    return job.wait(120)


def expected(kind: str, codes: list[int | None], rank: int, starting: bool, complete: bool) -> bool:
    """Whether the ranks ended as they should. starting: struck before the first step, perhaps before they had met."""
    if complete:
        return True
    others = [code for one, code in enumerate(codes) if one != rank]
    struck = {"kill": -signal.SIGKILL, "freeze": None}
    if kind in struck:
        return codes[rank] == struck[kind] and all(code in ((1, 2) if starting else (1,)) for code in others)
    if kind == "full disk":
        return all(code in ((1, 2) if starting else (2,)) for code in codes)
    return all(code in ((0, 1, 2, -signal.SIGTERM, -signal.SIGUSR2) if starting else (0,)) for code in codes)


def chaos(
    zygote: Zygote,
    disk: Path,
    *,
    seed: int,
    steps: int,
    interruptions: int,
    kinds: Sequence[str],
    worlds: Sequence[int],
) -> tuple[Path, Path, Path, Path]:
    """Runs undisturbed and disturbed; returns both run folders and both folders of samples."""
    print(f"chaos: seed {seed}")
    dice = random.Random(seed)
    kinds = dice.sample(kinds, len(kinds))
    recipe = write_inputs(disk.parent / "inputs")
    words = [
        "train", str(recipe), f"max_steps={steps}", "checkpoint.every_steps=3", "checkpoint.keep_last=2",
        "validation.every_steps=7", "distributed.silent_s=6",
        "distributed.rendezvous_s=20", "schedule.warmup_steps=4",
    ]  # fmt: skip
    whole, whole_samples = disk.parent / "whole", disk.parent / "whole_samples"
    job = zygote.start([*words, f"output_dir={whole}"], ranks=2, log=disk.parent / "whole_log", samples=whole_samples)
    assert job.wait(400) == [0, 0], job.text()[-3000:]

    run, samples, done = disk / "run", disk.parent / "samples", 0
    for number in range(interruptions):
        at = checkpoint.committed_steps(run)
        done = at[-1] if at else 0
        left = steps - 2 - done
        if left <= 0:
            break
        ranks, kind = dice.choice(worlds), kinds[number % len(kinds)]
        if ranks == 1 and kind == "freeze":
            kind = "kill"
        rank, step = dice.randrange(ranks), done + dice.randint(0, max(1, min(left, 2 * steps // interruptions)))
        inject = kind == "full disk" and not os.path.ismount(disk)
        fault = {"rank": rank, "at": "fsync", "step": step, "how": "full"} if inject else None
        log = disk.parent / f"log_{number}"
        job = zygote.start([*words, f"output_dir={run}"], ranks=ranks, log=log, samples=samples, fault=fault)
        if step > done:
            wait_for_step(step, job)
        time.sleep(dice.random() * 0.3)
        codes = interrupt(kind, job, run, disk, rank, inject)
        saved = checkpoint.committed_steps(run)
        print(f"chaos: {number}: {ranks} ranks, {kind} at step {step} of rank {rank}: {codes}, saved {saved}")
        complete, starting = saved[-1:] == [steps], step == done
        what = f"seed {seed}, {kind} of rank {rank}: {codes}\n{job.text()[-4000:]}"
        assert expected(kind, codes, rank, starting, complete), what
        assert not saved or saved[-1] >= done, f"seed {seed}: a checkpoint was lost"
    job = zygote.start([*words, f"output_dir={run}"], ranks=2, log=disk.parent / "log_last", samples=samples)
    assert job.wait(400) == [0, 0], job.text()[-3000:]
    return whole, run, whole_samples, samples


def test_three_interruptions(zygote: Zygote, disk: Path) -> None:
    """On 2 ranks: bit for bit."""
    seed = random.SystemRandom().randrange(2**32)
    kinds = ["kill", "full disk", random.Random(seed).choice(["term", "term one", "usr2", "file"])]
    whole, run, whole_samples, samples = chaos(
        zygote, disk, seed=seed, steps=10, interruptions=3, kinds=kinds, worlds=[2]
    )
    assert trajectory(run) == trajectory(whole), f"seed {seed}"
    assert samples_by_step(samples) == samples_by_step(whole_samples), f"seed {seed}"


@pytest.mark.slow
def test_twenty_interruptions(zygote: Zygote, disk: Path) -> None:
    """With 1, 2 or 3 ranks at each start: the same samples in each step, and the losses but for the order of sums."""
    seed = random.SystemRandom().randrange(2**32)
    whole, run, whole_samples, samples = chaos(
        zygote, disk, seed=seed, steps=60, interruptions=20, kinds=KINDS, worlds=[1, 2, 3]
    )
    assert samples_by_step(samples) == samples_by_step(whole_samples), f"seed {seed}"
    found, wanted = trajectory(run), trajectory(whole)
    assert [step for step, _, _ in found] == list(range(1, 61))
    worst = max(abs(a[1] - b[1]) for a, b in zip(found, wanted, strict=True))
    print(f"chaos: largest difference of a loss {worst:.2e}")
    assert worst <= LOSS_TOLERANCE, f"seed {seed}: {worst}"
    shutil.rmtree(run)
