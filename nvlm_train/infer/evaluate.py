"""The share of held-out questions that a model answers exactly, by task.

The data are rows as in training; the last assistant turn is the right answer, everything before it is the prompt. An
answer counts when it ends by itself and equals the right one, blanks at both ends aside.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.errors import DataError

BATCH_ROWS = 50
_SPARE_TOKENS = 4  # generated beyond the longest right answer of a batch: a longer one is wrong already
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Question:
    """One row: the conversation up to the answer, its images in order of appearance, and the right answer."""

    where: str
    task: str
    messages: list[dict[str, Any]]
    images: list[str]
    expected: str


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file, at most `limit`. DataError listing the rows that cannot be used."""
    from nvlm_train.data.sources import JsonlSource, parse_row
    from nvlm_train.recipe.schema import Source

    source = JsonlSource("--data", Source(path=str(path)))
    questions: list[Question] = []
    problems: list[str] = []
    for line in source.lines():
        if limit is not None and len(questions) + len(problems) >= limit:
            break
        where = f"{path}:{line.number}"
        try:
            row = json.loads(line.data.decode("utf-8"))
            sample = parse_row(row)
            last = max(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
            messages, order = [], []
            for message in sample.messages[:last]:
                content: list[dict[str, str]] = []
                for part in message["content"]:
                    if "text" in part:
                        content.append({"type": "text", "text": part["text"]})
                    else:
                        content.append({"type": "image"})
                        image = sample.images[part["image"]]
                        if image.data is not None:
                            raise DataError(f"image {image.name} is in the row itself; evaluate reads image files")
                        order.append(source.image_path(image.name))
                messages.append({"role": message["role"], "content": content})
            missing = [image for image in order if not os.path.isfile(image)]
            if missing:
                raise DataError(f"image {missing[0]} does not exist")
            expected = "".join(part["text"] for part in sample.messages[last]["content"])
            questions.append(Question(where, str(row.get("task") or "all"), messages, order, expected.strip()))
        except (DataError, ValueError) as error:
            problems.append(f"{where}: {error}")
    source.close()
    if problems:
        shown = "\n  ".join(problems[:_MAX_SHOWN])
        more = f"\n  and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        raise DataError(f"{len(problems)} rows cannot be used:\n  {shown}{more}")
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions


def evaluate(folder: str | Path, data: str | Path, limit: int | None = None) -> dict[str, Any]:
    """Greedy answers to all questions of `data`, and their score.

    Returns {"out", "data", "rows", "correct", "score", "seconds", "tasks": {task: {"rows", "correct", "score"}},
    "wrong": the first 20 wrong answers}. Score is the share of exact answers, 0 to 1.
    """
    questions = read_questions(data, limit)
    from tqdm import tqdm

    from nvlm_train.data.images import open_image
    from nvlm_train.infer.generate import answer, load_answerer

    answerer = load_answerer(folder)
    if not answerer.has_vision and any(question.images for question in questions):
        first = next(question for question in questions if question.images)
        raise DataError(f"{first.where}: has an image, but {folder} is a text-only model; use rows without images")
    # alike in length together: little padding, and short answers do not wait for long ones
    order = sorted(range(len(questions)), key=lambda i: _size(questions[i]))
    answers: dict[int, tuple[str, bool]] = {}
    started = time.monotonic()
    with tqdm(total=len(questions), desc="evaluate", unit="question", file=sys.stderr, leave=False) as progress:
        for begin in range(0, len(order), BATCH_ROWS):
            rows = order[begin : begin + BATCH_ROWS]
            batch = [questions[i] for i in rows]
            images = [
                [open_image(path, f"{path} ({question.where})", answerer.images) for path in question.images]
                for question in batch
            ]
            longest = max(len(answerer.tokenizer(question.expected)["input_ids"]) for question in batch)
            found = answer(answerer, [question.messages for question in batch], images, longest + _SPARE_TOKENS)
            answers.update(zip(rows, found, strict=True))
            progress.update(len(rows))
    seconds = time.monotonic() - started

    rows_of: dict[str, int] = defaultdict(int)
    correct_of: dict[str, int] = defaultdict(int)
    wrong: list[dict[str, Any]] = []
    for i, question in enumerate(questions):
        text, ended = answers[i]
        rows_of[question.task] += 1
        if ended and text.strip() == question.expected:
            correct_of[question.task] += 1
        elif len(wrong) < _MAX_SHOWN:
            wrong.append(
                {"where": question.where, "task": question.task, "expected": question.expected, "answer": text.strip()}
            )
    tasks = {
        task: {"rows": rows_of[task], "correct": correct_of[task], "score": correct_of[task] / rows_of[task]}
        for task in sorted(rows_of)
    }
    correct = sum(correct_of.values())
    return {
        "out": str(folder),
        "data": str(data),
        "rows": len(questions),
        "correct": correct,
        "score": correct / len(questions),
        "seconds": round(seconds, 2),
        "tasks": tasks,
        "wrong": wrong,
    }


def _size(question: Question) -> tuple[int, int]:
    text = sum(len(part.get("text", "")) for message in question.messages for part in message["content"])
    return len(question.images), text


def evaluate_command(args: Namespace) -> int:
    """`nvlm-train evaluate OUT --data held_out.jsonl`: a table by task, or --json."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report = evaluate(args.out, args.data, getattr(args, "limit", None))
    if getattr(args, "json", False):
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return 0
    width = max(len("task"), len("all tasks"), *map(len, report["tasks"]))
    print(f"{'task':{width}}  rows  correct  score")
    for task, row in [*report["tasks"].items(), ("all tasks", report)]:
        print(f"{task:{width}}  {row['rows']:4}  {row['correct']:7}  {row['score']:.3f}")
    return 0
