"""`nvlm-train report RUN`: the attempts of a run, where its time went, and what of it moved the training forward.

Goodput is the share of the allocated time that was spent in steps which the run kept:

    goodput = sum over attempts of ranks x seconds in kept steps / sum over attempts of ranks x (end - begin)

A step is kept unless a later attempt began before it; what rank 0 waited for data in it counts as kept, and is told
beside it. Start-up, validation, saves, shut-down and the steps that were trained again are the rest. Time in the queue
is not allocated and does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from nvlm_train.attempts import Past, newest_step, past_attempts
from nvlm_train.errors import SetupError

STALE_S = 60.0  # an attempt without an end whose heartbeat is older is not running any more


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], int]:
    """(records of metrics.jsonl with a step, number of lines that are no record)."""
    records, damaged = [], 0
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        try:
            record = json.loads(line)
            int(record["step"])
            records.append(record)
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return records, damaged


def describe(run: Path, now: float) -> dict[str, Any]:
    """What the report says, as plain numbers. now: seconds since the epoch."""
    if not run.is_dir():
        raise SetupError(f"'{run}' is no folder; name a run directory (a recipe's output_dir)")
    if not (run / "recipe.json").exists() and not (run / "attempts").exists():
        raise SetupError(f"'{run}' has neither recipe.json nor attempts/, so it is no run directory")
    records, damaged = read_metrics(run)
    steps = [record for record in records if "seconds" in record]
    past = past_attempts(run)
    attempts = []
    for number, one in enumerate(past):
        attempts.append(_attempt(one, past[number + 1 :], steps, now))
    allocated = sum(one["ranks"] * one["seconds"] for one in attempts)
    kept = sum(one["ranks"] * one["kept_s"] for one in attempts)
    last = steps[-1] if steps else {}
    return {
        "run": str(run),
        "done": (run / "DONE").exists(),
        "step": max([newest_step(run), *(int(record["step"]) for record in steps)]),
        "newest_checkpoint": newest_step(run),
        "loss": last.get("loss"),
        "tokens_per_s": last.get("tokens_per_s"),
        "skipped_steps": last.get("skipped_steps", 0),
        "validation": next((r["validation"] for r in reversed(records) if "validation" in r), None),
        "attempts": attempts,
        "allocated_rank_s": allocated,
        "lost_steps": sum(one["lost_steps"] for one in attempts),
        "goodput": kept / allocated if allocated else None,
        "damaged_lines": damaged,
    }


def _attempt(one: Past, later: list[Past], steps: list[dict[str, Any]], now: float) -> dict[str, Any]:
    beat = float((one.heartbeat or {}).get("time") or 0)
    running = one.end is None and not later and now - beat < STALE_S
    begun, ended = float(one.begin["started"]), now if running else one.ended
    first = int(one.begin["from_step"])
    reached = one.last_step
    startup = (one.end or one.heartbeat or {}).get("first_step_began")
    if startup and later and one.end is None:  # its heartbeat is some seconds older than its end
        reached = max(reached, int(later[0].begin["from_step"]), int(later[0].begin.get("logged_step") or 0))
    last = min([reached, *(max(first, int(other.begin["from_step"])) for other in later)])
    of_it = [record for record in steps if first < int(record["step"]) <= last]
    kept_s = sum(float(record["seconds"]) for record in of_it)
    data_s = sum(float((record.get("time") or {}).get("data", 0.0)) for record in of_it)
    lost = reached - last
    done = last - first
    each = kept_s / done if done > 0 else 0.0
    return {
        "attempt": one.name,
        "started": begun,
        "ended": None if running else ended,
        "outcome": "running" if running else (one.end or {}).get("outcome", "killed"),
        "reason": (one.end or {}).get("reason", ""),
        "nodes": one.begin.get("nodes", []),
        "ranks": int(one.begin.get("world_size") or 1),
        "from_step": first,
        "last_step": reached,
        "lost_steps": lost,
        "seconds": max(ended - begun, 0.0),
        "startup_s": startup - begun if startup else None,
        "kept_s": kept_s,
        "data_s": data_s,
        "redone_s": lost * each,
    }


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}"


def text_of(found: dict[str, Any]) -> str:
    """The report as lines."""
    state = "done" if found["done"] else "not done"
    lines = [f"{found['run']}: {state}, step {found['step']}, newest checkpoint step {found['newest_checkpoint']}"]
    if found["loss"] is not None:
        lines.append(f"loss {found['loss']:.4f}, {found['tokens_per_s'] or 0:,.0f} tokens/s, as logged last")
    if found["skipped_steps"]:
        lines.append(f"{found['skipped_steps']} steps left out because they were not finite")
    if found["validation"]:
        lines.append("validation " + "  ".join(f"{name} {loss:.4f}" for name, loss in found["validation"].items()))
    if found["damaged_lines"]:
        lines.append(f"{found['damaged_lines']} lines of metrics.jsonl are no records and were left out")
    if not found["attempts"]:
        lines.append("no attempts are on record: the run was made before they were written down")
        return "\n".join(lines)
    head = ("attempt", "began", "lasted", "start-up", "ranks", "nodes", "steps", "lost", "outcome")
    rows = [head]
    for one in found["attempts"]:
        rows.append((
            one["attempt"], time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["started"])), _span(one["seconds"]),
            _span(one["startup_s"]), str(one["ranks"]), str(max(len(one["nodes"]), 1)),
            f"{one['from_step']} -> {one['last_step']}", str(one["lost_steps"]),
            one["outcome"] + (f": {one['reason'].splitlines()[0][:100]}" if one["reason"] else ""),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines.append("")
    lines += ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    whole = sum(one["seconds"] for one in found["attempts"])
    kept, data, redone = (sum(one[key] for one in found["attempts"]) for key in ("kept_s", "data_s", "redone_s"))
    startup = sum(one["startup_s"] or 0.0 for one in found["attempts"])
    other = max(whole - kept - redone - startup, 0.0)
    lines += [
        "",
        f"time        {_span(whole)} in {len(found['attempts'])} attempts: {_span(kept)} in steps that were kept "
        f"({_span(data)} of it waiting for data), "
        f"{_span(startup)} start-up, about {_span(redone)} in {found['lost_steps']} steps that were lost, "
        f"{_span(other)} validation, saves and shut-down",
    ]
    if found["goodput"] is not None:
        hours = found["allocated_rank_s"] / 3600
        lines.append(f"goodput     {found['goodput']:.1%} of {hours:,.2f} rank-hours moved the training forward")
    return "\n".join(lines)


def report_command(args: argparse.Namespace) -> int:
    found = describe(Path(args.run), time.time())
    print(json.dumps(found, indent=1) if args.json else text_of(found))
    return 0
