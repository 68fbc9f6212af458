"""The preflight names the node that is wrong, and only that."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import run_distributed
from nvlm_train.train.preflight import Finding, check_clocks, check_same, table
from runs import write_inputs
from zygote import Zygote


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as warm:
        yield warm


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        ("clock", "clock", "s from the median of the nodes (at most 2 s)"),
        ("software", "software", "torch 1.0"),
        ("names", "names", "cannot be resolved"),
        ("space", "disk", "not enough room"),
        ("folder", "shared folder", "must be on storage that all nodes share"),
        ("tokenizer", "inputs", "tokenizer: "),
        ("", "", ""),
    ],
)
def test_the_node_that_is_wrong_is_named(inputs: Path, tmp_path: Path, fault: str, check: str, says: str) -> None:
    overrides = [f"output_dir={tmp_path / 'run'}"]
    ranks = run_distributed(
        2, "train/preflight_jobs.py:preflight", recipe=str(inputs), overrides=overrides, fault=fault
    )
    assert ranks[0] == ranks[1], "every rank knows all"
    findings = [Finding(*one) for one in ranks[0]]
    bad = {(one.node, one.check) for one in findings if not one.good}
    if fault in ("clock", "software"):  # of two nodes nobody can say which is the usual one
        assert {name for _, name in bad} == {check}
    else:
        assert bad == ({("node1", check)} if fault else set())
    assert not fault or any(says in one.detail for one in findings if not one.good), table(findings)
    assert {"gpu", "disk", "inputs", "software", "clock", "names", "network"} <= {one.check for one in findings}
    assert not list((tmp_path / "run").glob(".preflight*"))
    assert ("FAILED" in table(findings)) == bool(fault)


def test_the_usual_one_is_that_of_most_nodes() -> None:
    found = check_same({"a": {"torch": "2"}, "b": {"torch": "2"}, "c": {"torch": "1", "driver": "9"}})
    assert [(one.node, one.good) for one in found] == [("a", True), ("b", True), ("c", False)]
    assert "torch 1 (others: 2)" in found[2].detail and "driver 9 (others: none)" in found[2].detail
    clocks = check_clocks([[0.0, 9.0, 3.0], [10.0, 10.1, 12.5]], ["a", "b", "c"])
    assert [one.good for one in clocks] == [True, True, False] and "+2.400 s" in clocks[2].detail


def test_the_command_ends_and_names_who_never_came(inputs: Path, tmp_path: Path) -> None:
    """One rank of two, alone: it waits half of the limit, then says which node is missing."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho good\necho bad\n")
    (tmp_path / "scontrol").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = os.environ | {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "SLURM_JOB_NODELIST": "good,bad", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "nvlm_train", "preflight", str(inputs), f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, "--limit-s", "8", "--out", str(out)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "failed nodes: bad\n" in done.stdout, done.stdout + done.stderr
    assert json.loads(out.read_text())["failed"] == ["bad"]


@pytest.mark.parametrize(
    ("at", "rank", "how", "failed", "says"),
    [
        ("check_inputs", 1, "hang", ["node1"], "has not ended within 6 s: inputs on node1"),
        ("check_gpu", 1, "raise", ["node1"], "ValueError: a bug of this rank"),
        ("check_inputs", 0, "kill", ["node0"], "was lost"),
        pytest.param("check_disk", 0, "hang", ["node0"], "6 s: disk on node0", marks=pytest.mark.slow),
        pytest.param("check_names", 2, "stop", ["node2"], "6 s: names on node2", marks=pytest.mark.slow),
        pytest.param("check_disk", 1, "raise", ["node1"], "ValueError: a bug", marks=pytest.mark.slow),
        pytest.param("check_inputs", 1, "kill", ["node1"], "was lost", marks=pytest.mark.slow),
        pytest.param("check_network", 1, "hang", [], "network on all nodes alike", marks=pytest.mark.slow),
        pytest.param("check_network", 2, "stop", ["node2"], "network on node2", marks=pytest.mark.slow),
    ],
)
def test_a_node_that_ends_or_hangs_in_a_check_is_named(
    zygote: Zygote, inputs: Path, tmp_path: Path, at: str, rank: int, how: str, failed: list[str], says: str
) -> None:
    """Three nodes of one rank. Nobody waits for ever, and none of the others is blamed."""
    out = tmp_path / "found.json"
    words = ["preflight", str(inputs), f"output_dir={tmp_path / 'run'}", "--limit-s", "6", "--out", str(out)]
    fault = {"rank": rank, "at": at, "how": how}
    began = time.monotonic()
    job = zygote.start(words, ranks=3, log=tmp_path / "log", fault=fault, one_a_node=True)
    others = [one for one in range(3) if one != rank or how not in ("stop", "kill")]
    while any(job.codes()[one] is None for one in others) and time.monotonic() < began + 60:
        time.sleep(0.05)
    codes = job.codes()
    job.kill()
    assert all(codes[one] == 1 for one in others), (codes, job.text()[-3000:])
    assert json.loads(out.read_text())["failed"] == failed, job.text()[-3000:]
    assert f"failed nodes: {','.join(failed)}\n" in job.text() and says in job.text(), job.text()[-3000:]
    assert "Traceback" not in job.text(), job.text()[-3000:]
