"""The results of one day on one GPU: a JSON file of cells, which a later call goes on with.

A *cell* is the smallest thing that is measured at once: {"status", "seconds", "values"}, by a key such as
"2/rms_norm 16384x3584" or "3/7b/ours/1" (table, row, provider, round). Cells of different code never mix: a file holds
one run for each fingerprint of the code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
DONE, OUT_OF_MEMORY, FAILED = "done", "out of memory", "failed"
MEASURED_FROM = ("nvlm_train", "scripts/bench/gpu", "scripts/bench/gpu_tables")  # the code that the figures depend on
PEAK_TFLOPS = {"H100": 990.0, "H200": 990.0}  # dense bf16 of the SXM cards, the denominator of MFU


def git(*words: str, root: Path = ROOT) -> str | None:
    """What git says, or None where there is none (a copied tree)."""
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def fingerprint(root: Path = ROOT) -> str:
    """Of the sources that are measured, committed or not: committing results or a README changes nothing."""
    digest = hashlib.sha256()
    for name in MEASURED_FROM:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def revision(root: Path = ROOT) -> tuple[str, bool]:
    """(commit, whether the measured code differs from it). ("unknown", True) without git."""
    commit = git("rev-parse", "--short=10", "HEAD", root=root)
    if commit is None:
        return "unknown", True
    changes = git("status", "--porcelain", "--untracked-files=all", "--", *MEASURED_FROM, root=root)
    return commit.strip(), changes is None or bool(changes.strip())


def slug(gpu: str) -> str:
    """ "NVIDIA H200" -> "h200"; the name in file names."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 TFLOP/s of the data sheet, None where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu and "PCIe" not in gpu), None)


def mfu(flop: float, seconds: float, peak: float | None) -> float | None:
    """Share of the peak that useful operations take. peak: TFLOP/s. 990e12 operations in 2 s of 990 TFLOP/s: 0.5."""
    return None if peak is None else flop / seconds / (peak * 1e12)


class Results:
    """One file, written whole and at once after every cell, so that an interruption costs the cell at work alone."""

    def __init__(self, stem: Path, code: str, about: dict[str, Any]) -> None:
        self.path = stem.with_name(stem.name + ".json")
        self.page = stem.with_name(stem.name + ".md")
        self.runs: list[dict[str, Any]] = []
        if self.path.exists():
            self.runs = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
        found = next((run for run in self.runs if run["code"] == code), None)
        if found is None:
            found = {"code": code, "cells": {}}
            self.runs.append(found)
        self.run = found
        self.run.update({key: value for key, value in about.items() if key != "commands"})
        commands = self.run.setdefault("commands", [])
        commands += [command for command in about.get("commands", []) if command not in commands]

    @property
    def cells(self) -> dict[str, Any]:
        return self.run["cells"]

    def wanted(self, key: str, retry_failed: bool = False) -> bool:
        """Whether a cell is still to be measured. What ran out of memory would do so again."""
        cell = self.cells.get(key)
        return cell is None or (retry_failed and cell["status"] == FAILED)

    def record(self, key: str, cell: dict[str, Any]) -> None:
        self.cells[key] = cell
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace(self.path, json.dumps({"runs": self.runs}, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, finds the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
