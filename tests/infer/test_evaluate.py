"""Scores by task on rows as in training."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvlm_train.errors import DataError
from nvlm_train.infer.evaluate import evaluate, evaluate_command, read_questions


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def row(answer: str, task: str | None = None, **more: Any) -> dict[str, Any]:
    made = {"messages": [turn("user", "What?"), turn("assistant", answer)], **more}
    return made if task is None else made | {"task": task}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, size in (("a.png", (40, 24)), ("b.png", (12, 12))):
        values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / name)
    with_history = {
        "task": "turns",
        "conversations": [
            {"from": "human", "value": "<image>\nfirst?"}, {"from": "gpt", "value": "7"},
            {"from": "human", "value": "now <image>?"}, {"from": "gpt", "value": " left digit\n"},
        ],
        "image": ["a.png", "b.png"],
    }  # fmt: skip
    return write(
        tmp_path / "held_out.jsonl",
        [
            row("left digit", "left", image="a.png"), row("left", "left", image="b.png"),
            row("left digit", "left", images=["a.png", "b.png"]), row("left digits", "text"), row("left digit"),
            with_history,
        ],
    )  # fmt: skip


def test_scores_by_task_and_in_all(folders: dict[str, Path], data: Path) -> None:
    report = evaluate(folders["nvlm"], data)
    assert report["tasks"] == {
        "all": {"rows": 1, "correct": 1, "score": 1.0},
        "left": {"rows": 3, "correct": 2, "score": 2 / 3},
        "text": {"rows": 1, "correct": 0, "score": 0.0},
        "turns": {"rows": 1, "correct": 1, "score": 1.0},
    }
    assert (report["rows"], report["correct"], report["score"]) == (6, 4, 4 / 6)
    assert [(wrong["where"], wrong["expected"], wrong["answer"]) for wrong in report["wrong"]] == [
        (f"{data}:2", "left", "left digit"), (f"{data}:4", "left digits", "left digit"),
    ]  # fmt: skip


def test_table_json_and_limit(folders: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"out": str(folders["nvlm"]), "data": str(data), "limit": 3, "json": False}
    assert evaluate_command(Namespace(**arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "task       rows  correct  score",
        "left          3        2  0.667",
        "all tasks     3        2  0.667",
    ]
    evaluate_command(Namespace(**arguments | {"json": True}))
    assert json.loads(capsys.readouterr().out)["rows"] == 3


def test_plain_qwen2_on_text(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", [row("left digit", "x"), row("other", "x")])
    assert evaluate(folders["qwen2"], text)["score"] == 0.5
    with pytest.raises(DataError, match=r"held_out\.jsonl:1: has an image, but .* is a text-only model"):
        evaluate(folders["qwen2"], data)


def test_the_prompt_is_everything_before_the_last_answer(data: Path) -> None:
    question = read_questions(data)[-1]
    assert [message["role"] for message in question.messages] == ["user", "assistant", "user"]
    assert [Path(image).name for image in question.images] == ["a.png", "b.png"]
    assert question.expected == "left digit" and question.task == "turns"


def test_all_bad_rows_are_listed(tmp_path: Path) -> None:
    bad = write(
        tmp_path / "bad.jsonl",
        ["{not json\n", row("x", image="none.png"), row(""), {"messages": []}, row("fine"), "[1]\n"],
    )
    with pytest.raises(DataError) as error:
        read_questions(bad)
    for number in (1, 2, 3, 4, 6):
        assert f"{bad}:{number}: " in str(error.value)
    assert "5 rows" in str(error.value) and f"{bad}:5" not in str(error.value)
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="cannot open"):
        read_questions(tmp_path / "none.jsonl")
