"""In the place of the trainer where a test is about Slurm and the scripts: a second instead of fifteen to start.

It takes the trainer's arguments and keeps to what the scripts see of it: RUN/attempts, step_N/COMMITTED, DONE, a save
and exit 0 when asked, exit codes. Rank 0 does the steps (0.1 s each, a checkpoint every 5); the others wait for it.
STAND_IN says what goes wrong: `crash` rank 1 ends with 3 at once; `recipe` a mistake of the user's, exit code 2; `idle`
the first start does 10 steps and then nothing until it is asked to stop; `deaf` the same, and nobody heeds a signal;
`bad_node` the preflight fails on node1, `bad_nodes` on all; `crash_alone` the only rank ends with 3 at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from nvlm_train.attempts import Attempt, attempt_name, newest_step
from nvlm_train.recipe.load import load_recipe


def main() -> int:
    if "preflight" in sys.argv:
        fault = os.environ["STAND_IN"]
        failed = ["node1", "node2"] if fault == "bad_nodes" else ["node1"]
        if fault not in ("bad_node", "bad_nodes") or os.environ["SLURMD_NODENAME"] != "node1":
            failed = []
        Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps({"failed": failed}))
        return len(failed)
    words = sys.argv[sys.argv.index("train") + 1 :]
    recipe = load_recipe(words[0], words[1:]).recipe
    run, rank, fault = Path(recipe.output_dir), int(os.environ["SLURM_PROCID"]), os.environ.get("STAND_IN", "")
    assert recipe.max_steps is not None
    asked: list[str] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
    if fault == "crash_alone" or (fault == "crash" and rank == 1):
        return 3
    end = run / "attempts" / attempt_name() / "end.json"
    if rank:
        while not end.exists():
            time.sleep(0.05)
        return 0
    attempt = Attempt(run, rank)
    step = newest_step(run)
    attempt.begin({}, step)
    note(run, f"{attempt_name()} from {step} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    if fault == "recipe":
        attempt.end("failed", "a folder is missing", user=True)
        return 2
    while fault == "crash" and not asked:  # a lost rank is never a reason to save
        time.sleep(0.1)
    if fault == "crash":
        attempt.end("lost", "rank 1 was lost")
        return 1
    while step < recipe.max_steps:
        time.sleep(0.1)
        idle = fault in ("idle", "deaf") and step == 10 and not os.environ.get("SLURM_RESTART_COUNT")
        if idle and (fault == "deaf" or not asked):
            continue
        step += 1
        stop = bool(asked) and fault != "deaf"
        if step % 5 == 0 or step == recipe.max_steps or stop:
            (run / f"step_{step}").mkdir(exist_ok=True)
            (run / f"step_{step}" / "COMMITTED").touch()
            note(run, f"saved {step}")
        attempt.mark(step + 1, "forward")
        if stop:
            note(run, f"stopped by {asked}")
            attempt.end("stopped", asked[0])
            return 0
    attempt.mark(step + 1, "forward")
    attempt.end("done")
    return 0


def note(run: Path, text: str) -> None:
    with (run / "notes.txt").open("a") as stream:
        stream.write(text + "\n")


sys.exit(main())
