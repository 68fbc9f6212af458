"""Two hosts for real: two network namespaces with a cable between them, one torchrun in each.

Needs root and `ip netns`; skipped with the reason where that is not allowed. The hosts share a file system, as the
nodes of a cluster do, and nothing else but the cable.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_train import checkpoint
from runs import metrics, trajectory, write_inputs

ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}
PORT = 29611


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Names of the two namespaces, by host."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (package iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    names = {host: f"nvlm-{os.getpid()}-{host}" for host in ADDRESS}
    cable = {host: f"nv{os.getpid() % 10**7}{host}" for host in ADDRESS}
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", cable["a"], "type", "veth", "peer", "name", cable["b"])
        for host, name in names.items():
            ip("link", "set", cable[host], "netns", name)
            ip("-n", name, "link", "set", cable[host], "name", "eth0")
            ip("-n", name, "addr", "add", f"{ADDRESS[host]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except OSError as error:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces are not allowed here: {error}")
    yield names
    for name in names.values():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(
    hosts: dict[str, str], job: str, words: list[str], log: Path, *, restarts: int = 0
) -> dict[str, subprocess.Popen[bytes]]:
    """One torchrun on each host, as a batch script would start them."""
    started = {}
    for number, (host, name) in enumerate(hosts.items()):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESS['a']}:{PORT}", "--rdzv-id", job]
        # both hosts have one name here, so torchrun cannot tell by it who keeps its store
        torchrun += ["--rdzv-conf", f"is_host={1 - number}", "--local-addr", ADDRESS[host]]
        torchrun += ["--max-restarts", str(restarts), "-m", "nvlm_train", "train", *words]
        started[host] = subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun],
            stdout=(log.parent / f"{log.name}_{host}").open("ab"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0"},
            start_new_session=True,
        )
    return started


def worker_of(torchrun: subprocess.Popen[bytes]) -> int:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True)
    return int(found.stdout.split()[0])


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; its torchrun may be too stuck to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_step(run: Path, step: int, started: dict[str, subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until and all(process.poll() is None for process in started.values()):
        if (run / "metrics.jsonl").exists() and any(record["step"] >= step for record in metrics(run)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def end(started: dict[str, subprocess.Popen[bytes]], limit_s: float = 240) -> list[int]:
    """Exit codes; whoever is not done in time is killed."""
    until = time.monotonic() + limit_s
    try:
        return [process.wait(max(1.0, until - time.monotonic())) for process in started.values()]
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_host_that_loses_its_worker_and_one_that_loses_its_cable(hosts: dict[str, str], tmp_path: Path) -> None:
    """A worker is killed on one host, later the cable is cut; started again, the run ends as if nothing had been."""
    recipe = write_inputs(tmp_path / "inputs")
    words = [str(recipe), "max_steps=16", "checkpoint.every_steps=4", "distributed.silent_s=5"]
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    assert end(start(hosts, "whole", [*words, f"output_dir={whole}"], tmp_path / "whole_log")) == [0, 0], (
        tmp_path / "whole_log_a"
    ).read_text()[-3000:]

    started = start(hosts, "first", [*words, f"output_dir={hurt}"], tmp_path / "log1")
    wait_for_step(hurt, 6, started)
    os.kill(worker_of(started["b"]), signal.SIGKILL)
    begun = time.monotonic()
    assert 0 not in end(started)
    assert time.monotonic() - begun < 60
    # as seen from host a, across the cable
    assert "error: rank 1 (host " in (tmp_path / "log1_a").read_text()
    assert "Start the same command again" in (tmp_path / "log1_a").read_text()

    started = start(hosts, "second", [*words, f"output_dir={hurt}"], tmp_path / "log2")
    wait_for_step(hurt, 9, started)
    workers = [worker_of(torchrun) for torchrun in started.values()]
    ip("-n", hosts["b"], "link", "set", "eth0", "down")
    try:
        until = time.monotonic() + 120
        while any(map(is_running, workers)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not any(map(is_running, workers)), "a rank still waits for the other host"
    finally:
        for torchrun in started.values():  # one cut off from its store may wait for minutes: not ours to mend
            os.killpg(torchrun.pid, signal.SIGKILL)
            torchrun.wait()
        ip("-n", hosts["b"], "link", "set", "eth0", "up")
    assert "rank 1 (host " in (tmp_path / "log2_a").read_text().split("error: ")[1]

    assert checkpoint.committed_steps(hurt)[-1] == 8
    assert end(start(hosts, "third", [*words, f"output_dir={hurt}"], tmp_path / "log3")) == [0, 0]
    assert f"resumed from {hurt}/step_8" in (tmp_path / "log3_a").read_text()
    assert trajectory(hurt) == trajectory(whole)


@pytest.mark.slow
def test_torchrun_restarts_both_hosts_by_itself(hosts: dict[str, str], tmp_path: Path) -> None:
    """`--max-restarts`: a killed worker is started again on its host, and with it the other's; the run resumes."""
    recipe = write_inputs(tmp_path / "inputs")
    words = [str(recipe), "max_steps=12", "checkpoint.every_steps=4", "validation=null", f"output_dir={tmp_path / 'r'}"]
    started = start(hosts, "restarted", words, tmp_path / "log", restarts=2)
    wait_for_step(tmp_path / "r", 6, started)
    os.kill(worker_of(started["b"]), signal.SIGKILL)
    assert end(started) == [0, 0], (tmp_path / "log_a").read_text()[-3000:]
    assert [step for step, _, _ in trajectory(tmp_path / "r")] == list(range(1, 13))
    assert f"resumed from {tmp_path / 'r'}/step_" in (tmp_path / "log_a").read_text()
