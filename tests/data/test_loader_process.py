"""The loader process: the same batches as in the trainer, whatever kills it; nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corpus import make_recipe, turns, write_image, write_image_rows, write_rows, write_text_rows
from nvlm_train.batch import Batch, SampleRef
from nvlm_train.data import loader_process
from nvlm_train.data.assembly import Closed
from nvlm_train.data.loader import StepLoader
from nvlm_train.data.loader_process import LoaderProcess
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.errors import DataError
from nvlm_train.recipe.schema import Recipe

torch.set_num_threads(1)
STEPS = 6
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_image_rows(folder / "images.jsonl", 30)
    write_text_rows(folder / "text.jsonl", 50)
    return folder


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    mixture = {
        "images": {"path": str(folder / "images.jsonl"), "weight": 0.6},
        "text": {"path": str(folder / "text.jsonl"), "weight": 0.4},
    }
    return make_recipe(folder, mixture, **changes)


def plan_of(folder: Path, **changes: Any) -> DataPlan:
    return open_data(recipe_of(folder, **{"data__loader": "process", **changes}), rank=0, world_size=1)


def digest(batch: Batch) -> str:
    tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.tiles, batch.image_slots)
    parts = [repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes() for tensor in tensors]
    rest = (batch.max_seqlen, batch.num_trained_tokens, batch.num_tile_chunks, batch.samples, batch.tile_hashes)
    if batch.memory is not None:
        rest += tuple(v.tolist() if isinstance(v, torch.Tensor) else v for v in vars(batch.memory).values())
    return hashlib.sha256(b"".join(parts) + repr(rest).encode()).hexdigest()


def stream(steps: StepLoader, kill_at: set[int] | None = None) -> list[tuple[Any, ...]]:
    found = []
    for data in steps:
        if kill_at and data.step in kill_at:
            os.kill(steps._builder.pid, signal.SIGKILL)
        held = [digest(batch) for batch in data.micro_batches]
        counts = (data.trained_tokens, data.tokens, data.tiles, data.samples, data.samples_by_source, data.bad)
        found.append((data.step, held, counts))
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[tuple[Any, ...]]:
    plan = plan_of(folder, data__loader="inprocess", data__num_threads=1)
    with StepLoader(plan, start_step=0, end_step=STEPS) as steps:
        return stream(steps)


def test_what_cross_attention_reads_arrives_as_it_was_laid_out(folder: Path) -> None:
    found = []
    for loader in ("inprocess", "process"):
        plan = plan_of(folder, data__loader=loader, data__pack_tiles=16, model__architecture="nvlm_h")
        with StepLoader(plan, start_step=0, end_step=1) as loaded:
            (step,) = loaded
        assert any(batch.memory is not None and batch.memory.max_queries for batch in step.micro_batches)
        assert all(batch.memory is not None and len(batch.tiles) <= 16 for batch in step.micro_batches)
        found.append([digest(batch) for batch in step.micro_batches])
    assert found[0] == found[1]


def children() -> set[int]:
    """Loader processes below this one."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(line.split()[0]) for line in listed.stdout.splitlines() if "loader_process" in line}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, limit_s: float = 10.0) -> bool:
    until = time.monotonic() + limit_s
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def open_descriptors() -> Counter[str]:
    """Sockets and anonymous memory of this process."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{name}").split(":")[0]] += 1
        except OSError:
            pass
    return Counter({kind: count for kind, count in found.items() if kind in ("socket", "/memfd")})


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test: no process, no shared memory by name, no socket and no anonymous memory more than before."""
    shared = set(os.listdir("/dev/shm"))
    before = open_descriptors()
    yield
    assert not children()
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "nvlm" in name}
    assert not open_descriptors() - before


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_same_batches_as_in_the_trainer(folder: Path, reference: list[Any], num_threads: int) -> None:
    with StepLoader(plan_of(folder, data__num_threads=num_threads), start_step=0, end_step=STEPS) as steps:
        assert stream(steps) == reference


def test_killed_at_random_steps_it_hands_over_the_same_batches(folder: Path, reference: list[Any]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    kill_at = set(random.Random(seed).sample(range(STEPS - 1), 2))
    plan = plan_of(folder, data__num_threads=2, data__prefetch_steps=3)
    with StepLoader(plan, start_step=0, end_step=STEPS) as steps:
        assert stream(steps, kill_at) == reference, f"seed {seed}"


def test_killed_while_it_starts(folder: Path, reference: list[Any]) -> None:
    """The first process dies before it has read a job, and the second does all."""
    with StepLoader(plan_of(folder), start_step=0, end_step=STEPS) as steps:
        os.kill(steps._builder.pid, signal.SIGKILL)
        assert stream(steps) == reference


def test_one_that_always_dies_ends_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends with code 7, three times: the message says so, and where it was."""
    (tmp_path / "python").write_text("#!/bin/sh\nsleep 0.3\nexit 7\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(loader_process.sys, "executable", str(tmp_path / "python"))
    with StepLoader(plan_of(folder), start_step=0, end_step=STEPS) as steps:
        with pytest.raises(DataError, match=r"ended with exit code 7, 3 times in a row .* at samples \w+:\d+"):
            next(steps)


def test_a_sample_that_turns_corrupt_between_attempts_shifts_no_other(tmp_path: Path) -> None:
    """First attempt whole; then an image is cut short; also where the loader process dies in between."""
    write_image_rows(tmp_path / "images.jsonl", 30)
    write_text_rows(tmp_path / "text.jsonl", 50)
    changes: dict[str, Any] = {"data__max_bad_share": 0.9}

    def samples(loader: str, kill_at: set[int]) -> list[list[tuple[Any, ...]]]:
        plan = plan_of(tmp_path, data__loader=loader, **changes)
        found = []
        with StepLoader(plan, start_step=0, end_step=STEPS) as steps:
            for data in steps:
                if data.step in kill_at:
                    os.kill(steps._builder.pid, signal.SIGKILL)
                found.append([(batch.samples, digest(batch)) for batch in data.micro_batches])
        return found

    whole = samples("process", set())
    name = json.loads((tmp_path / "images.jsonl").read_text().splitlines()[3])["images"][0]
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    spoilt = samples("process", {1})
    assert spoilt == samples("inprocess", set())
    holes = 0
    for before, after in zip(whole, spoilt, strict=True):
        assert len(before) == len(after)
        for (old, old_digest), (new, new_digest) in zip(before, after, strict=True):
            assert new == tuple(ref for ref in old if (ref.source, ref.row) != ("images", 3))
            holes += len(old) - len(new)
            assert (old_digest == new_digest) == (old == new)
    assert holes >= 1


def test_tiles_lie_in_shared_memory_and_live_as_long_as_their_tensor(folder: Path) -> None:
    with StepLoader(plan_of(folder), start_step=0, end_step=1) as steps:
        (data,) = list(steps)
    batch = next(batch for batch in data.micro_batches if len(batch.tiles))

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:nvlm-tiles")

    assert mapped() >= 1  # the process has gone, the pixels stay
    assert int(batch.tiles.sum()) > 0
    batch.tiles[0] = 0  # and may be written to
    del data, batch
    assert mapped() == 0


def test_a_bug_in_the_process_reaches_the_trainer_with_its_traceback(folder: Path) -> None:
    plan = plan_of(folder)
    loading = LoaderProcess(plan)
    try:
        future = loading.submit(plan.deal_step(0)[0][0], "not a number")  # type: ignore[arg-type]
        assert future.result(60).arrays["num_tile_chunks"] == "not a number"  # passed on as it is: no bug yet
        with pytest.raises(RuntimeError, match=r"(?s)in the loader process:.*Traceback.*KeyError"):
            loading.submit([Pack((SampleRef("nowhere", 0, 0),), 1, 0, 0.0)], 0).result(60)
    finally:
        loading.close()


def test_close_is_quick_and_what_was_open_is_told(folder: Path) -> None:
    plan = plan_of(folder)
    loading = LoaderProcess(plan)
    futures = [loading.submit(packs[0], 0) for packs in plan.deal_step(0)]
    begin = time.monotonic()
    loading.close()
    loading.close()
    assert time.monotonic() - begin < 3
    for future in futures:
        assert future.done()
        assert future.exception() is None or isinstance(future.exception(), Closed)


TRAINER = """
    import os, sys, time
    import corpus, torch
    from pathlib import Path
    from nvlm_train.data.loader import StepLoader
    from nvlm_train.data.plan import open_data
    folder = Path(sys.argv[1])
    mixture = {"images": {"path": str(folder / "images.jsonl")}}
    recipe = corpus.make_recipe(folder, mixture, data__loader="process")
    steps = StepLoader(open_data(recipe, rank=0, world_size=1), start_step=0, end_step=10**6)
    next(steps)
    print(steps._builder.pid, flush=True)
    if sys.argv[2] == "raise":
        raise ValueError("a crash")
    if sys.argv[2] == "exit":
        os._exit(3)
    while True:
        next(steps)
        time.sleep(0.01)
"""


def trainer(folder: Path, what: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), str(folder), what]
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return process, int(line)


@pytest.mark.parametrize("what", ["raise", "exit"])
def test_a_trainer_that_crashes_leaves_no_process(folder: Path, what: str) -> None:
    process, pid = trainer(folder, what)
    assert process.wait(30) != 0
    assert ends(pid)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_trainer_that_is_killed_leaves_no_process(folder: Path, name: str) -> None:
    process, pid = trainer(folder, "run")
    assert alive(pid)
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == -getattr(signal, name)
    assert ends(pid)


def test_signals_to_the_whole_job_do_not_end_it(folder: Path, reference: list[Any]) -> None:
    """Ctrl-C and SLURM reach every process of the job; only the trainer decides what follows."""
    with StepLoader(plan_of(folder), start_step=0, end_step=STEPS) as steps:
        pid = steps._builder.pid
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
            os.kill(pid, getattr(signal, name))
        assert [digest(batch) for batch in next(steps).micro_batches] == reference[0][1]
        assert steps._builder.pid == pid and alive(pid)


def test_the_plan_travels_without_its_index(tmp_path: Path) -> None:
    """100,000 rows of index are 3.2 MB; the message holds the file's name instead. Control tokens stay text."""
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns(f"{k} <|im_end|>", "yes")} for k in range(3000)])
    write_image(tmp_path / "b.png", 8, 8)
    recipe = make_recipe(tmp_path, {"a": {"path": str(path)}}, data__loader="process")
    plan = open_data(recipe, rank=0, world_size=1)
    descriptor = loader_process._packed_plan(plan)
    size = os.fstat(descriptor).st_size
    there = loader_process._unpacked_plan(descriptor)
    assert isinstance(plan.indexes["a"].rows, np.memmap) and plan.indexes["a"].rows.nbytes > 90_000
    assert size < 60_000  # measured 24,000, most of it the tokenizer
    assert np.array_equal(there.indexes["a"].rows, plan.indexes["a"].rows)
    assert isinstance(there.indexes["a"].rows, np.memmap)
    text = "<|im_end|>"
    assert there.tokenizer.encode(text) == plan.tokenizer.encode(text) != [plan.tokenizer.im_end]
    ref = plan.draws(0)[0]
    assert there.load(ref).rendered.input_ids.tolist() == plan.load(ref).rendered.input_ids.tolist()
    assert pickle.loads(pickle.dumps(plan.tokenizer)).lengths([text]) == plan.tokenizer.lengths([text])


def test_memory_that_comes_and_goes_in_many_threads_keeps_its_descriptor() -> None:
    """Addresses are given out again at once: what is sent must be the memory that the tiles lie in."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(400):
            place = loader_process._shared(8 * 4096).reshape(8, 4096)
            place[0, :2] = number, turn % 256
            descriptor = loader_process._descriptor_of(place[:5])
            if tuple(os.pread(descriptor, 2, 0)) != (number, turn % 256):
                wrong.append(turn)
            os.close(descriptor)

    before = open_descriptors()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_descriptors() == before
