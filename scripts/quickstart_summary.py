#!/usr/bin/env python
"""Prints what the quickstart found out, from the reports that `nvlm-train evaluate --json` left in a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

QUESTIONS = ("left", "right", "sum", "max")
CHANCE = 0.12  # of the four questions together: 10 % left and right, 8 % sum, 19 % max


def share(report: dict[str, Any], task: str | None = None) -> float:
    """Share of right answers of one task, or of all."""
    found = report["tasks"][task] if task else report
    return float(found["score"])


def summary(images: dict[str, Any], before: dict[str, Any], after: dict[str, Any], answers: str) -> str:
    """The last screen of scripts/quickstart."""
    by_question = "   ".join(f"{task} {share(images, task):.0%}" for task in QUESTIONS)
    by_task = "   ".join(f"{task} {share(before, task):.1%} -> {share(after, task):.1%}" for task in before["tasks"])
    kept = share(after) / share(before) if share(before) else 0.0
    return f"""
==> held-out pictures   {share(images):.1%} right of {images["rows"]} questions (chance {CHANCE:.0%})
                        {by_question}
==> held-out text       {share(before):.1%} right before -> {share(after):.1%} after, of {after["rows"]} ({kept:.0%})
                        {by_task}
==> three answers
{answers.rstrip()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="DIR", help="demo/results")
    folder = parser.parse_args().results
    images, before, after = (
        json.loads((folder / f"{n}.json").read_text()) for n in ("images", "text_before", "text_after")
    )
    print(summary(images, before, after, (folder / "answers.txt").read_text()))


if __name__ == "__main__":
    main()
