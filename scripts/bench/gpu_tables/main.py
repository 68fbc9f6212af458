"""The command: which cells, in which order, until when; workers do them. See scripts/bench/gpu."""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from gpu_tables import report, shapes
from gpu_tables.results import (
    DONE,
    FAILED,
    OUT_OF_MEMORY,
    ROOT,
    Results,
    fingerprint,
    replace,
    revision,
    slug,
)
from nvlm_train.errors import NvlmError

TABLES = (1, 2, 3, 4, 5)
CELLS_LEFT = 3  # exit status: run the same command again
# Cells of these tables share a process; a whole step on a GPU has one of its own, which gives all memory back.
SHARED = {"cuda": (1, 2), "cpu": (1, 2, 3, 4)}
LEAST_S = {1: 15.0, 2: 30.0, 3: 60.0, 4: 60.0}  # no process begins with less time than that on a GPU


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Five tables about the speed of training on one GPU: 1 ceilings, 2 kernels, 3 whole steps beside the "
            "peer's way,\n4 NVLM-D, -X and -H, 5 memory; and the goals, each met, not met or not measured.\n\n"
            "A call ends within --limit-s. The same command goes on with what is left (of this day, GPU and code), "
            "also after\nan interruption. Exit status: 0 all measured, 3 cells are left, 1 some failed, "
            "2 cannot run here."
        ),
        epilog="example: until scripts/bench/gpu --out scripts/bench/results; do test $? -eq 3 || break; done",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, a proof of the bench"
    )
    parser.add_argument("--tables", default="1,2,3,4,5", help="numbers with commas between (default: all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "scripts" / "bench" / "results", help="folder of the results"
    )
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds of a call (default 540)")
    parser.add_argument("--rounds", type=int, help="times that the providers of tables 3 and 4 take turns (2; cpu: 1)")
    parser.add_argument("--date", default=str(date.today()), help="go on with the results of another day")
    parser.add_argument("--optimizer", help="optimizer.implementation of the steps (default: what makes 7B fit)")
    parser.add_argument("--kernels", default="auto", help="the recipe's `kernels` of ours (default auto)")
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed (not out of memory)")
    found = parser.parse_args(arguments)
    numbers = found.tables.split(",")
    if not all(number.isdigit() and int(number) in TABLES for number in numbers):
        parser.error(f"--tables: {found.tables!r} is not a list of numbers from 1 to 5, such as 1,2")
    found.tables = tuple(sorted({int(number) for number in numbers}))
    try:
        date.fromisoformat(found.date)
    except ValueError:
        parser.error(f"--date: {found.date!r} is no date; write it as 2026-11-26")
    if found.limit_s <= 0 or (found.rounds is not None and found.rounds < 1):
        parser.error("--limit-s and --rounds must be above 0")
    if found.optimizer is not None and found.optimizer not in shapes.implementations():
        known = ", ".join(shapes.implementations()) or "none: this version's recipe has no optimizer.implementation"
        parser.error(f"--optimizer: {found.optimizer!r} is not known; known are {known}")
    found.rounds = found.rounds or (2 if found.device == "cuda" else 1)
    return found


def plan(
    tables: tuple[int, ...], device: str, memory: int | None, rounds: int, implementation: str | None = None
) -> list[dict[str, Any]]:
    """Every cell, in the order of work: a step's providers by turns, in an order that turns with each round."""
    cells: list[dict[str, Any]] = []
    if 1 in tables:
        from gpu_tables.cases import GEMMS

        cells.append({"table": 1, "key": "1/copy", "what": "copy"})
        for sizes in GEMMS[device]:
            name = "x".join(map(str, sizes))
            cells.append({"table": 1, "key": f"1/gemm {name}", "what": "gemm", "sizes": sizes})
    if 2 in tables:
        from gpu_tables.cases import CASES

        cells += [{"table": 2, "key": f"2/{name}", "case": name} for name in CASES[device]]
    for table, names in ((3, list(report.STEP_PROVIDERS)), (4, list(report.ARCHITECTURES))):
        if table not in tables:
            continue
        fitted = {
            row: shapes.fit(row, device, memory, implementation)
            for row in (shapes.ROWS if table == 3 else shapes.ROWS[:1])
        }
        for turn in range(rounds):
            for row, what in fitted.items():
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    cells.append({
                        "table": table,
                        "key": f"{table}/{row if table == 3 else name}/{name if table == 3 else 'ours'}/{turn + 1}",
                        "row": what,
                        "architecture": "nvlm_d" if table == 3 else name,
                        "provider": name if table == 3 else "ours",
                        "recompute": lightest(name, what["recompute"]),
                    })  # fmt: skip
    return cells


class Worker:
    """A process of `gpu_tables.worker` with one task, whose answers come one by one."""

    def __init__(self, task: dict[str, Any], log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "bench")])}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRITON_INTERPRET"):
            environment.pop(name, None)
        if task["device"] == "cpu" and task["table"] == 2:
            environment["TRITON_INTERPRET"] = "1"
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_tables.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env=environment, start_new_session=True, text=True,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(task))
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once, which `answers` tells
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def answer(self, until: float) -> dict[str, Any] | None:
        """The next answer; None at the end. Raises TimeoutError at `until`."""
        try:
            line = self._lines.get(timeout=max(0.01, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def probe(device: str, log: Path) -> dict[str, Any]:
    """The machine. Raises NvlmError where there is no GPU to measure."""
    worker = Worker({"device": device, "table": 0}, log)
    try:
        found = worker.answer(time.monotonic() + 300)
    except TimeoutError:
        found = None
    finally:
        worker.end()
    if found is None:
        raise NvlmError(f"--device {device}: torch could not be started, see {log}; scripts/install installs it")
    if found["gpu"] is None:
        raise NvlmError("--device cuda: torch sees no GPU here; use --device cpu, which proves that the bench works")
    return found


def _brief(message: dict[str, Any]) -> str:
    values = message.get("values", {})
    if message["status"] != DONE:
        return f"{message['status']}: {message.get('error', '')}"
    if "providers" in values:
        return ", ".join(f"{name} {report.provider_brief(own)}" for name, own in values["providers"].items())
    return f"{values['ms']['median']:.3f} ms"


def measure(
    cells: list[dict[str, Any]], device: str, deadline: float, log: Path, record: Callable[[str, dict[str, Any]], None],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Runs cells until the deadline; each is recorded as it comes. What did not come is still to be measured."""
    todo, total, call_began = list(cells), len(cells), time.monotonic()
    while todo:
        table = todo[0]["table"]
        left = deadline - time.monotonic()
        if left <= (LEAST_S[table] if device == "cuda" else 0.0):
            return
        batch = [todo[0]]
        if table in SHARED[device]:
            kin = (3, 4) if table > 2 else (table,)
            batch = [cell for cell in todo if cell["table"] in kin]
        worker = Worker({"device": device, "table": table, "cells": batch, **options}, log)
        begun: str | None = None
        began = time.monotonic()
        try:
            while (message := worker.answer(deadline)) is not None:
                if "begin" in message:
                    begun, began = message["begin"], time.monotonic()
                    say(f"[{total - len(todo) + 1}/{total}] {begun} ...")
                    continue
                cell = next(cell for cell in todo if cell["key"] == message["key"])
                begun = None
                if message["status"] == OUT_OF_MEMORY and _lighter(cell):
                    for other in todo:  # rounds of one row and provider are alike
                        if other["key"].rpartition("/")[0] == cell["key"].rpartition("/")[0]:
                            other["recompute"] = cell["recompute"]
                    say(f"    out of memory; again with recompute {cell['recompute']}")
                    break  # in a new process
                say(f"    {_brief(message)}")
                seconds = time.monotonic() - began
                record(cell["key"], {"status": message["status"], "seconds": seconds} | {
                    name: message[name] for name in ("values", "error") if name in message
                })  # fmt: skip
                todo.remove(cell)
            else:
                worker.process.wait()
                lost = begun or next((cell["key"] for cell in batch if cell in todo), None)
                if lost is not None:  # killed, or crashed: the cell at work is why
                    error = f"its process ended with status {worker.process.returncode}, see {log}"
                    say(f"    {lost}: {error}")
                    record(lost, {"status": FAILED, "seconds": time.monotonic() - began, "error": error})
                    todo = [cell for cell in todo if cell["key"] != lost]
        except TimeoutError:
            whole = began - call_began < 0.1 * (deadline - call_began)
            if begun is not None and whole:  # it had a call of its own and would never end
                record(begun, {"status": FAILED, "seconds": time.monotonic() - began, "error": "longer than --limit-s"})
            return
        finally:
            worker.end()


def lightest(provider: str, recompute: str) -> str:
    """The least recompute that a provider has from `recompute` on: transformers knows whole layers or none."""
    return "full" if provider == "peer" and recompute == "selective" else recompute


def _lighter(cell: dict[str, Any]) -> bool:
    """Gives a step that ran out of memory the next stronger recompute; False where there is none."""
    if cell.get("recompute", "full") == "full":
        return False
    following = shapes.RECOMPUTE[shapes.RECOMPUTE.index(cell["recompute"]) + 1]
    cell["recompute"] = lightest(cell["provider"], following)
    return True


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    began = time.monotonic()
    log = Path(tempfile.gettempdir()) / f"nvlm_bench_{os.getpid()}.log"
    signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        machine = probe(args.device, log)
        commit, dirty = revision()
        if dirty:
            say(f"the code differs from commit {commit}: results are marked, and kept apart from those of the commit")
        words = [shlex.quote(word) for word in (arguments if arguments is not None else sys.argv[1:])]
        results = Results(
            args.out / f"{args.date}-{slug(machine['gpu'])}",
            fingerprint(),
            {
                "date": args.date, "device": args.device, "gpu": machine["gpu"], "memory": machine["memory"],
                "commit": commit, "dirty": dirty, "versions": machine["versions"],
                "commands": [" ".join(["scripts/bench/gpu", *words])],
            },
        )  # fmt: skip
        cells = plan(args.tables, args.device, machine["memory"], args.rounds, args.optimizer)
        todo = [cell for cell in cells if results.wanted(cell["key"], args.retry_failed)]
        say(f"{machine['gpu']}, code {results.run['code']}: {len(todo)} of {len(cells)} cells to measure; log {log}")
        results.write()
        options = {"kernels": args.kernels, "threads": max(1, (os.cpu_count() or 2) // 2)}
        interrupted = False
        try:
            measure(todo, args.device, began + args.limit_s, log, results.record, options)
        except KeyboardInterrupt:
            interrupted = True
        replace(results.page, report.render(results.run))
        print(report.render(results.run, args.tables))
        left = sum(results.wanted(cell["key"]) for cell in cells)
        failed = [cell["key"] for cell in cells if results.cells.get(cell["key"], {}).get("status") == FAILED]
        say(f"results: {results.page}")
        if left:
            say(f"{left} of {len(cells)} cells are left: run the same command again, it goes on from here")
        if failed:
            say(f"failed: {', '.join(failed)}; the log says why, --retry-failed runs them again")
        return 130 if interrupted else CELLS_LEFT if left else int(bool(failed))
    except NvlmError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted before anything was measured")
        return 130
