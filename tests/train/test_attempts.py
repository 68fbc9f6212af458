"""Folders of attempts and what a batch script does after one has ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvlm_train import checkpoint
from nvlm_train.attempts import Attempt, Past, attempt_name, decide, newest_step, past_attempts, shown_environment


def past(from_step: int, outcome: str | None = None, reason: str = "", **more: Any) -> Past:
    end = None if outcome is None else {"outcome": outcome, "reason": reason, **more}
    return Past("1.0", {"started": 0.0, "from_step": from_step}, end, None)


@pytest.mark.parametrize(
    ("name", "attempts", "newest", "how", "word", "why"),
    [
        ("the end", [past(0, "done")], 8, dict(rc=0, done=True), "done", "reached its end"),
        ("done wins over an exit code", [past(0)], 8, dict(rc=143, done=True), "done", "reached its end"),
        ("warned and saved", [past(0, "stopped", "SIGUSR2")], 5, dict(rc=0, warned=True), "requeue", "saved at step 5"),
        ("torchrun's own code 1", [past(0, "stopped", "SIGTERM")], 5, dict(rc=1), "requeue", "saved at step 5"),
        ("killed", [past(0)], 4, dict(rc=137), "requeue", "without a word (exit code 137)"),
        ("a rank was lost", [past(4, "lost", "rank 1 is gone")], 6, dict(rc=1), "requeue", "lost: rank 1 is gone"),
        ("a bug, the first time", [past(0, "failed", "KeyError: 3")], 0, dict(rc=1), "requeue", "KeyError"),
        ("the user's to mend", [past(4, "failed", "DataError: x", user=True)], 6, dict(rc=1), "stop", "DataError: x"),
        ("exit code 2 alone", [past(4)], 6, dict(rc=2), "stop", "exit code 2"),
        ("scancel", [past(0, "stopped", "SIGTERM")], 5, dict(rc=0, cancelled=True), "stop", "cancelled"),
        ("RUN/stop", [past(0, "stopped", "file r/stop")], 5, dict(rc=0), "stop", "asked it to stop"),
        ("Ctrl-C", [past(0, "stopped", "SIGINT")], 5, dict(rc=130), "stop", "asked it to stop"),
        ("three without progress", [past(0), past(6), past(6), past(6)], 6, dict(rc=1), "stop", "3 attempts in a row"),
        ("two without progress", [past(0), past(6), past(6)], 6, dict(rc=1), "requeue", "without a word"),
        ("progress in the last", [past(6), past(6), past(6)], 7, dict(rc=1), "requeue", "without a word"),
        ("a warning in each start-up", [past(0, "stopped", "SIGUSR2")] * 3, 0, dict(rc=0, warned=True), "stop", "3 a"),
        ("none came as far as a folder", [], 0, dict(rc=1), "requeue", "without a word"),
    ],
)  # fmt: skip
def test_what_follows(name: str, attempts: list[Past], newest: int, how: dict[str, Any], word: str, why: str) -> None:
    found = decide(how.pop("done", False), attempts, newest, **how)
    assert found.word == word and why in found.why, name


def test_names() -> None:
    job = {"SLURM_JOB_ID": "17"}
    assert attempt_name(job) == "17.0"
    assert attempt_name({**job, "SLURM_RESTART_COUNT": "2"}) == "17.2"
    assert attempt_name({**job, "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}) == "15_3.0"
    assert attempt_name({**job, "NVLM_ATTEMPT": "../mine"}) == ".._mine"
    assert attempt_name({"TORCHELASTIC_RESTART_COUNT": "1"}).startswith("local-20")


def test_no_secret_is_written_down() -> None:
    secret = {"HF_TOKEN": "a", "WANDB_API_KEY": "b", "SLURM_JWT": "c"}
    shown = shown_environment(
        {**secret, "NCCL_DEBUG": "INFO", "HOME": "/x", "RANK": "3", "HF_ENDPOINT": "https://me:word@hub.example/x"}
    )
    assert shown == {
        **dict.fromkeys(secret, "(not shown)"), "NCCL_DEBUG": "INFO", "RANK": "3",
        "HF_ENDPOINT": "https://(not shown)@hub.example/x",
    }  # fmt: skip


def test_a_folder_from_begin_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts in one job; the second reaches the end. Its first words are in the log although there was no file."""
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4" / checkpoint.COMMITTED).touch()
    (tmp_path / "step_6").mkdir()  # not complete
    assert newest_step(tmp_path) == 4 == checkpoint.committed_steps(tmp_path)[-1]
    first, second = Attempt(tmp_path, 0), Attempt(tmp_path, 0)
    first.begin({"world_size": 2}, 4)
    first.mark(7, "forward")
    first.end("failed", "DataError: bad", user=True)
    first.end("done", "the first word counts")
    begun = past_attempts(tmp_path)
    assert [one.name for one in begun] == ["9.0"] and begun[0].last_step == 6
    assert begun[0].end is not None and begun[0].end["outcome"] == "failed" and not (tmp_path / "DONE").exists()
    second.begin({"world_size": 2}, 4)
    second.mark(8, "save")
    second.end("done", "step 8")
    assert [(one.name, one.last_step) for one in past_attempts(tmp_path)] == [("9.0", 6), ("9.0-2", 8)]
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 8
    assert "done: step 8" in (tmp_path / "attempts" / "9.0-2" / "rank_0.log").read_text()
    third = Attempt(tmp_path, 0)
    third.begin({"world_size": 2}, 8)
    third.end("done", "nothing was left to do")
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 8 == past_attempts(tmp_path)[-1].last_step


def test_the_command_of_a_batch_script(tmp_path: Path) -> None:
    """It counts an attempt that left nothing, and stops after three of them. No torch: it runs when Python does."""

    def following(attempt: str) -> tuple[int, str]:
        code = (
            "import sys; from nvlm_train.attempts import main; code = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        command = [sys.executable, "-c", code, "next", str(tmp_path), "--attempt", attempt, "--rc", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert following("5.0")[0] == 10 and following("5.1")[0] == 10
    code, text = following("5.2")
    assert code == 11 and text.startswith("stop: 3 attempts in a row saved nothing beyond step 0")
    (tmp_path / "DONE").write_text("{}")
    assert following("5.3")[0] == 0
