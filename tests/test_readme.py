"""What README, DESIGN and CONTRIBUTING claim: every file, command, recipe, key, figure and test they name is there."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from nvlm_train import cli
from nvlm_train.data.sources import parse_line
from nvlm_train.model.flops import count_parameters, trainable_parameters, vision_parameters
from nvlm_train.recipe.foreign_names import markdown_table
from nvlm_train.recipe.load import find_key, load_recipe
from nvlm_train.recipe.schema import all_keys

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md")
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README = TEXT["README.md"]
# Made by running, so they are in no clone.
MADE = ("runs/", "demo/", "exports/", "weights/", "my_data/", ".venv")
METRICS_NOT_IN_STEPS = {"validation", "validation_tokens", "best"}


def blocks(language: str, document: str = README) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def quoted(document: str) -> list[str]:
    """What stands in backticks outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL))


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the README, without its head."""
    section = README.split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def commands(document: str) -> list[list[str]]:
    """The arguments of every call of nvlm-train in the shell blocks, launcher and redirection cut off."""
    found = []
    for block in blocks("bash", document) + blocks("console", document):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "nvlm-train" in words:
                words = words[words.index("nvlm-train") + 1 :]
            elif "-m nvlm_train " in line:
                words = words[words.index("nvlm_train") + 1 :]
            else:
                continue
            found.append(words[: words.index(">")] if ">" in words else words)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    folders = "|".join(sorted(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")))
    pattern = rf"(?:^|(?<=[\s(]))(?:\./)?((?:{folders}|\.ci)/[\w./-]*|[A-Z]+\.md|pyproject\.toml)"
    words = re.findall(r"\S+", "\n".join(blocks("bash", TEXT[document])))
    named = {path for text in quoted(TEXT[document]) + words for path in re.findall(pattern, text)}
    assert len(named) > 5
    missing = sorted(path for path in named if not path.startswith(MADE) and not (ROOT / path).exists())
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document: str) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT[document]):
        assert re.search(rf"def {name}\(", (ROOT / file).read_text(encoding="utf-8")), f"{file}::{name}"


def test_every_row_of_what_works_names_its_proof() -> None:
    rows = rows_of("## What works")
    assert len(rows) > 15
    for what, proof in rows:
        assert re.findall(r"`(tests/\S+\.py)`", proof) or re.search(r"\d{4}-\d\d-\d\d", proof), what


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_parses(document: str) -> None:
    found = commands(TEXT[document])
    assert len(found) > 8 or document != "README.md"
    for words in found:
        verb = " ".join(words[:2]) if words[0] in ("recipe", "data") else words[0]
        args = cli.parse(verb, words[len(verb.split()) :])
        for recipe in [getattr(args, "recipe", None), getattr(args, "a", None), getattr(args, "b", None)]:
            assert recipe is None or (ROOT / recipe).is_file(), recipe


def _console() -> list[tuple[list[str], list[str]]]:
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            if command.startswith("nvlm-train recipe"):
                found.append((shlex.split(command)[1:], lines))
    return found


@pytest.mark.parametrize(("words", "lines"), _console(), ids=lambda value: " ".join(value)[:40])
def test_what_recipe_verbs_print_is_what_stands_there(
    words: list[str], lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`...` stands for any lines; all others must come in this order, letter by letter."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cli.main(words)
    printed = iter("".join(capsys.readouterr()).splitlines())
    skipping = False
    for line in lines:
        if line == "...":
            skipping = True
            continue
        for candidate in printed:
            if candidate == line:
                break
            assert skipping, f"expected {line!r}, printed was {candidate!r}"
        else:
            pytest.fail(f"not printed: {line!r}")
        skipping = False


def test_every_recipe_in_a_code_block_is_good(tmp_path: Path) -> None:
    """A block without run_name is a part of a recipe: it is laid over the quickstart's."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    found = [block for text in TEXT.values() for block in blocks("yaml", text)]
    assert found
    for block in found:
        path = tmp_path / "recipes" / "from_readme.yaml"
        whole = re.search(r"^(run_name|extends):", block, re.MULTILINE)
        path.write_text(block if whole else f"extends: quickstart.yaml\n{block}", encoding="utf-8")
        load_recipe(path)


def test_every_sample_in_a_code_block_is_good() -> None:
    lines = [line for block in blocks("jsonl") for line in block.splitlines()]
    assert len(lines) >= 4
    images = [len(parse_line(line.encode()).images) for line in lines]
    assert 0 in images and 2 in images


def test_the_table_of_foreign_names_is_the_one_of_the_code() -> None:
    assert markdown_table() in README


def test_parameter_counts_are_counted() -> None:
    """Every number from a hundred million on is one that the counting gives."""
    known: set[int] = set()
    for path in sorted((ROOT / "recipes").rglob("[0-9]_*.yaml")):
        recipe = load_recipe(path).recipe
        counts = count_parameters(recipe.model)
        total = sum(counts.values())
        trained = sum(trainable_parameters(recipe.model, recipe.train).values())
        padded = vision_parameters(recipe.model.vision, 7) - counts["vision"]
        known |= {total, trained, total + padded, *counts.values()}
    numbers = {int(n.replace(",", "")) for n in re.findall(r"(?<![\d,])\d{1,3}(?:,\d{3}){2,}(?![\d,])", README)}
    large = {n for n in numbers if n >= 10**8}
    assert large and large <= known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_key_that_is_named_exists(document: str) -> None:
    sections = {name for name, key in all_keys().items() if "." not in name and key.section is not None}
    named = [text.split(":")[0] for text in quoted(TEXT[document])]
    dotted = {n for n in named if re.fullmatch(r"[a-z_]+(\.[a-z_*]+)+", n) and n.split(".")[0] in sections}
    files = {n for n in dotted if n.endswith((".py", ".json", ".yaml"))}
    assert [n for n in sorted(dotted - files) if find_key(tuple(n.split("."))) is None] == []


def test_marks_for_a_resume_are_those_of_the_schema() -> None:
    for mark, _, examples in rows_of("### What a later start may change"):
        keys = re.findall(r"`([^`]+)`", examples)
        assert len(keys) > 4
        for name in keys:
            key = find_key(tuple(name.split(".")))
            assert key is not None and key.resume == mark, name


def test_keys_of_metrics_are_those_that_are_written() -> None:
    """The rows of the table against the code that makes the records (a run's own test checks the values)."""
    from nvlm_train.train import loop, state

    named = {key for row in rows_of("## What a run shows") for key in re.findall(r"`(\w+)`", row[0])}
    counts: dict[str, Any] = {"trained_tokens": 1, "tokens": 1, "tiles": 0, "bad": 0, "samples_by_source": {}}
    record = loop._record(state.Progress(), counts, 0.0, 0.0, {})
    source = inspect.getsource(loop._run) + inspect.getsource(loop._publish_validation)
    added = set(re.findall(r'record\["(\w+)"\]|"(seconds|tokens_per_s|tiles_per_s|validation\w*|best)":', source))
    written = set(record) | {first or second for first, second in added}
    assert named == written
    assert METRICS_NOT_IN_STEPS <= named
    json.dumps(record)


def test_nothing_is_left_to_be_filled_in() -> None:
    for name, text in TEXT.items():
        assert "_HERE" not in text, f"{name} has a place that waits for real output"
