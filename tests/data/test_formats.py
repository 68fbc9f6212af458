"""Every format from files to canonical messages, through a source's scan and again at a position; and what is bad."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import re
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corpus import turns, write_image, write_rows
from nvlm_train.data import prompts
from nvlm_train.data.images import BadSample, open_image
from nvlm_train.data.sources import Record, Sample, Source, expand_sources, open_source, parse_row, position
from nvlm_train.data.sources.files import expand_braces, natural
from nvlm_train.data.sources.rows import Form
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

YES = {"role": "assistant", "content": [{"text": "yes"}]}


def user(*content: str | int) -> dict[str, Any]:
    parts = [{"text": part} if isinstance(part, str) else {"image": part} for part in content]
    return {"role": "user", "content": parts}


def picture(width: int = 5, height: int = 4, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 9)).save(data, kind)
    return data.getvalue()


def source_of(path: Path | str, kind: str, **given: Any) -> Source:
    return open_source("s", schema.Source.model_validate({"path": str(path), "kind": kind, **given}))


def records(source: Source) -> list[Record]:
    return [record for unit in source.units() for record in source.scan(unit)]


def samples(source: Source) -> list[Sample]:
    """All good samples, each read a second time at its position and found to be the same."""
    found = []
    for record in records(source):
        assert isinstance(record.sample, Sample), str(record.sample)
        row = {"position": position(record.part, record.offset), "num_bytes": record.num_bytes, "hash": record.hash}
        again = source.sample(row)
        assert again.messages == record.sample.messages
        assert [image.read() for image in again.images] == [image.read() for image in record.sample.images]
        found.append(again)
    return found


def bad(source: Source) -> list[tuple[str, str, str]]:
    """(place, reason, message) of what is bad."""
    return [
        (source.where(record.part, record.number), record.sample.reason, str(record.sample))
        for record in records(source)
        if isinstance(record.sample, BadSample)
    ]


def widths(sample: Sample) -> list[int]:
    return [open_image(image.read()).width for image in sample.images]


# ----------------------------------------------------------------------------------------------------------- row forms


def form(**given: Any) -> Form:
    return Form.of(schema.Source.model_validate({"path": "x", **given}))


def test_loss_flags_and_last_turn() -> None:
    row = {"messages": [*turns("a", "yes"), *turns("b", "yes")]}
    row["messages"][1] = {**row["messages"][1], "loss": False}
    assert parse_row(row).messages == [user("a"), {**YES, "loss": False}, user("b"), YES]
    plain = {"messages": [*turns("a", "yes"), *turns("b", "yes")]}
    assert parse_row(plain, form(train_on="last_turn")).messages == [user("a"), {**YES, "loss": False}, user("b"), YES]
    for flags, reason in (({"loss": False}, "no trained token"), ({"loss": "no"}, "bad loss flag")):
        with pytest.raises(BadSample) as error:
            parse_row({"messages": [turns("a", "yes")[0], {**turns("a", "yes")[1], **flags}]})
        assert error.value.reason == reason
    with pytest.raises(BadSample, match=r"turn 1 \(user\) has loss true"):
        parse_row({"messages": [{**turns("a", "yes")[0], "loss": True}, turns("a", "yes")[1]]})


def test_system_of_row_and_source() -> None:
    said = {"role": "system", "content": [{"text": "S"}]}
    assert parse_row({"messages": turns("a", "yes"), "system": "S"}).messages == [said, user("a"), YES]
    assert parse_row({"messages": turns("a", "yes")}, form(system="S")).messages == [said, user("a"), YES]
    row = {"messages": turns("a", "yes"), "system": "S"}
    assert parse_row(row, form(system="T")).messages[0] == said
    row = {"messages": [{"role": "system", "content": "S"}, *turns("a", "yes")], "system": "T"}
    assert parse_row(row, form(system="U")).messages == [said, user("a"), YES]


def test_mapped_columns_and_roles() -> None:
    row = {"chat": [{"who": "Alice", "said": "<image>?"}, {"who": "Bob", "said": "yes"}], "pics": ["a.png"], "x": 1}
    names = {"messages": "chat", "role": "who", "content": "said", "images": "pics"}
    mapped = form(columns=names, roles={"Alice": "user", "Bob": "assistant"})
    sample = parse_row(row, mapped)
    assert (sample.messages, [image.name for image in sample.images]) == ([user(0, "?"), YES], ["a.png"])
    with pytest.raises(BadSample, match=r"turn 1 has who 'Alice'; known are user, human"):
        parse_row(row, form(columns=names))


def test_data_url_and_struct_images() -> None:
    data = picture()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    row = {"messages": turns("", "yes")}
    row["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    sample = parse_row(row)
    assert (sample.messages[0], sample.images[0].read()) == (user(0, "?"), data)
    sample = parse_row({"messages": turns("?", "yes"), "images": [{"bytes": data, "path": "p.png"}, data]})
    assert sample.messages[0] == user(0, "\n", 1, "\n", "?")
    assert [(image.name, image.read()) for image in sample.images] == [("p.png", data), ("1", data)]


def test_cauldron_rows() -> None:
    """All images before the first user turn; markers in the text are leftovers."""
    pairs = [{"user": "<image>\nWhat?", "assistant": "yes", "source": "x"}, {"user": "So?", "assistant": "yes"}]
    row = {"images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}], "texts": pairs}
    assert parse_row(row).messages == [user(0, "\n", 1, "\n", "What?"), YES, user("So?"), YES]
    assert parse_row({"images": [], "texts": pairs}).messages == [user("What?"), YES, user("So?"), YES]


def test_ratings() -> None:
    pairs = [{"user": name, "assistant": "yes"} for name in "abc"]
    row = {"texts": pairs, "relevance_ratings": [4, None, 2], "formatting_ratings": [5, 5, 5]}
    assert parse_row(row, form(min_ratings={"relevance": 3})).messages == [user("a"), YES, user("b"), YES]
    assert len(parse_row(row, form(min_ratings={"relevance": 2})).messages) == 6
    with pytest.raises(BadSample) as error:
        parse_row({"texts": pairs, "relevance_ratings": [1, 1, 1]}, form(min_ratings={"relevance": 3}))
    assert (error.value.reason, str(error.value)) == ("below rating", "none of 3 pairs has ratings of relevance >= 3")
    for ratings in ([1, 1], ["a", 1, 1], 7):
        with pytest.raises(BadSample) as error:
            parse_row({"texts": pairs, "relevance_ratings": ratings}, form(min_ratings={"relevance": 3}))
        assert error.value.reason == "bad ratings"


def test_questions_and_answers() -> None:
    image = {"bytes": b"1", "path": "a"}
    row = {"image": image, "question": "Why?", "answer": "yes"}
    assert parse_row(row).messages == [user(0, "\n", "Why?"), YES]
    assert parse_row({**row, "question": "Look: <image> Why?"}).messages == [user("Look: ", 0, " Why?"), YES]
    hinted = parse_row(row, form(prompt="vqa"), seed=1).messages[0]["content"][2]["text"]
    assert hinted in [variant.replace("{question}", "Why?") for variant in prompts.VQA]
    several = {"question": "Why?", "answers": ["one", "two", "three"]}
    chosen = {parse_row(several, seed=k).messages[1]["content"][0]["text"] for k in range(50)}
    assert chosen == {"one", "two", "three"}
    weighted = {**several, "answer_weights": [0, 1, 0]}
    assert {parse_row(weighted, seed=k).messages[1]["content"][0]["text"] for k in range(20)} == {"two"}
    assert parse_row({"question": "How many?", "answer": 3}).messages[1]["content"] == [{"text": "3"}]
    with pytest.raises(BadSample, match="1 <image> markers but 0 images"):
        parse_row({"question": "<image>?", "answer": "yes"})


@pytest.mark.parametrize("answer", [1, "B", "b", "blue", [1]])
def test_multiple_choice(answer: Any) -> None:
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": answer}
    messages = parse_row(row, form(prompt="multiple_choice"), seed=3).messages
    assert messages[1]["content"] == [{"text": "B"}]
    asked = messages[0]["content"][0]["text"]
    assert asked.startswith("Which?\n")
    assert "A. red\nB. blue\n" in asked
    with pytest.raises(BadSample, match="is none of 2 choices"):
        parse_row({**row, "answer": "green"})


@pytest.mark.parametrize("preset", ["caption", "ocr", "document"])
def test_presets_are_chosen_by_hash(preset: str) -> None:
    row = {"image": {"bytes": b"1", "path": "a"}, "caption": "A <image> cat."}
    asked = [parse_row(row, form(prompt=preset), seed=k).messages for k in range(100)]
    assert asked == [parse_row(row, form(prompt=preset), seed=k).messages for k in range(100)]
    assert {messages[0]["content"][2]["text"] for messages in asked} == set(prompts.ALONE[preset])
    assert asked[0][1] == {"role": "assistant", "content": [{"text": "A <image> cat."}]}
    assert asked[0][0]["content"][:2] == [{"image": 0}, {"text": "\n"}]


def test_megatron_markers() -> None:
    """One image for many tags, <image-k> by number, too few tags before the first turn, too many an error."""
    reads = Form.of(schema.Source(path="x", kind="energon"), megatron=True)

    def placed(text: str, count: int) -> tuple[list[dict[str, Any]], list[str]]:
        row = {"texts": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]}
        sample = parse_row({**row, "images": [f"{k}" for k in range(1, count + 1)]}, reads)
        assert sample.messages[1] == YES
        return sample.messages[0]["content"], [image.name for image in sample.images]

    assert placed("<image>a<image>b", 2) == (user(0, "a", 1, "b")["content"], ["1", "2"])
    assert placed("<image-2>a<image-1>b", 2) == (user(0, "a", 1, "b")["content"], ["2", "1"])
    assert placed("<image>a<image>b", 1) == (user(0, "a", 1, "b")["content"], ["1", "1"])
    assert placed("a<image>b", 3) == (user(0, "\n", 1, "\n", "a", 2, "b")["content"], ["1", "2", "3"])
    assert placed("<image>a", 0) == (user("a")["content"], [])
    assert placed("a", 2) == (user(0, "\n", 1, "\n", "a")["content"], ["1", "2"])
    for text, count in (("<image><image><image>", 2), ("<image-3><image-1>", 2), ("<image-2>", 1)):
        with pytest.raises(BadSample) as error:
            placed(text, count)
        assert error.value.reason == "marker count"


# ---------------------------------------------------------------------------------------------------------- JSON, text


def test_json_array(tmp_path: Path) -> None:
    rows = [
        {"id": k, "image": write_image(tmp_path / f"{k}.png", 4 + k, 3), "conversations": llava(f'"[{k}],{{ \\" é')}
        for k in range(20)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    found = samples(source_of(tmp_path / "a.json", "json"))
    assert [sample.messages[0] for sample in found] == [user(0, f'\n"[{k}],{{ \\" é') for k in range(20)]
    assert [widths(sample) for sample in found] == [[4 + k] for k in range(20)]


def llava(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "yes"}]


def test_json_units_are_the_same_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of any size and blocks of any size find the same elements, with the same numbers."""
    from nvlm_train.data.sources import lines

    draw = random.Random(1)
    rows = [{"messages": turns("q" * draw.randint(1, 40) + '\\"]}', "yes")} for _ in range(60)]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(rows) + "\n ")
    whole = records(source_of(path, "json"))
    assert [record.number for record in whole] == list(range(1, 61))
    for unit_bytes, block in ((100, 7), (1, 1), (1000, 64)):
        monkeypatch.setattr(lines, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(lines, "_BLOCK", block)
        source = source_of(path, "json")
        assert len(list(source.units())) > 3
        assert records(source) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"b": 2', "is cut: the file ends after 1 whole elements, at byte 18 of 18"),
        ('[{"a": 1},', "is cut: the file ends after 1 whole elements"),
        ('["abc', "is cut"),
        ("[", "is cut"),
        ('{"a": 1}\n{"a": 2}', "begins with an object; kind: jsonl"),
        ("hello", "no JSON array, it begins with b'hello'"),
        ("[1] [2]", "has more after its array, at byte 3: b'[2]'"),
        ("[1}", "a } closes it at byte 2"),
    ],
)
def test_unusable_json_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError) as error:
        records(source_of(tmp_path / "a.json", "json"))
    assert message in str(error.value)
    assert str(tmp_path / "a.json") in str(error.value)


def test_bad_json_elements(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"messages": []}, 3, nul, , {"a": "\xff"}, {"x" 1}]')
    found = bad(source_of(path, "json"))
    assert [reason for _, reason, _ in found] == [
        "empty conversation", "not an object", "not JSON", "not JSON", "not UTF-8", "not JSON",
    ]  # fmt: skip
    assert found[2][0] == f"{path}, element 3"
    (tmp_path / "b.json").write_text(" [ ] ")
    assert records(source_of(tmp_path / "b.json", "json")) == []


def test_several_jsonl_files(tmp_path: Path) -> None:
    for k in (1, 2, 10):
        write_rows(tmp_path / "d" / f"part-{k}.jsonl", [{"messages": turns(f"{k}.{i}", "yes")} for i in range(3)])
    expected = [user(f"{k}.{i}") for k in (1, 2, 10) for i in range(3)]
    for path in ("d", "d/part-*.jsonl", "d/part-{1,2,10}.jsonl"):
        source = source_of(tmp_path / path, "jsonl")
        assert [sample.messages[0] for sample in samples(source)] == expected
    assert [source.where(record.part, record.number).rsplit("/", 1)[1] for record in records(source)][4] == (
        "part-2.jsonl:2"
    )
    with pytest.raises(DataError, match=r"cannot open .*part-3\.jsonl"):
        source_of(tmp_path / "d/part-{1..3}.jsonl", "jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        source_of(tmp_path / "empty", "jsonl")


def test_jsonl_units_are_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvlm_train.data.sources import lines

    draw = random.Random(2)
    rows: list[Any] = [{"messages": turns("q" * draw.randint(1, 90), "yes")} if k % 7 else b"" for k in range(80)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    whole = records(source_of(path, "jsonl"))
    assert [record.number for record in whole] == [k + 1 for k in range(80) if k % 7]
    for size in (1, 50, 1000):
        monkeypatch.setattr(lines, "UNIT_BYTES", size)
        source = source_of(path, "jsonl")
        assert len(list(source.units())) > 3
        assert records(source) == whole


def document(text: str) -> list[dict[str, Any]]:
    return [{"role": "text", "content": [{"text": text}]}]


def test_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "Once upon"}, {"text": "a <image> time"}])
    found = samples(source_of(tmp_path / "a.jsonl", "text"))
    assert [sample.messages for sample in found] == [document("Once upon"), document("a <image> time")]
    (tmp_path / "a.json").write_text(json.dumps([{"body": "x"}]))
    assert samples(source_of(tmp_path / "a.json", "text", columns={"text": "body"}))[0].messages == document("x")
    write_rows(tmp_path / "b.jsonl", [{"text": " "}, {"tex": "x"}, {"text": 3}])
    assert [reason for _, reason, _ in bad(source_of(tmp_path / "b.jsonl", "text"))] == [
        "empty text", "no text", "bad content",
    ]  # fmt: skip
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "1.txt").write_bytes(b"one\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\r\n\n<|endoftext|>\n")
    (tmp_path / "t" / "2.txt").write_bytes(b"not an <|endoftext|> at the start")
    (tmp_path / "t" / "3.txt").write_bytes(b"")
    (tmp_path / "t" / "4.txt").write_bytes(b"a\xff")
    source = source_of(tmp_path / "t", "text")
    good = [record.sample.messages for record in records(source) if isinstance(record.sample, Sample)]
    assert good == [document("one\ntwo"), document("three"), document("not an <|endoftext|> at the start")]
    assert [(place.rsplit("/", 1)[1], reason) for place, reason, _ in bad(source)] == [
        ("3.txt, document 1", "empty text"),
        ("4.txt, document 1", "not UTF-8"),
    ]
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("x")
    (tmp_path / "mixed" / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"several kinds \(\.jsonl, \.txt\)"):
        source_of(tmp_path / "mixed", "text")


def test_text_units_are_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvlm_train.data.sources import lines

    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(f"text {k} " * (k % 5 + 1) for k in range(40)))
    whole = records(source_of(path, "text"))
    assert len(whole) == 40
    for size, block in ((1, 1000), (60, 16), (100, 33)):
        monkeypatch.setattr(lines, "UNIT_BYTES", size)
        monkeypatch.setattr(lines, "_BLOCK", block)
        assert records(source_of(path, "text")) == whole


# -------------------------------------------------------------------------------------------------------- Hugging Face

parquet = pytest.importorskip("pyarrow.parquet")


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 3) -> Path:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def cauldron(count: int) -> list[dict[str, Any]]:
    return [
        {
            "images": [{"bytes": picture(3 + k + i), "path": None} for i in range(k % 3)],
            "texts": [{"user": f"{k}?", "assistant": "yes", "source": "x"}],
            "relevance_ratings": [k % 5],
            "other": "ignored",
        }
        for k in range(count)
    ]


def test_parquet_cauldron(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "train-00000.parquet", cauldron(10)[:4])
    write_parquet(tmp_path / "d" / "train-00001.parquet", cauldron(10)[4:])
    source = source_of(tmp_path / "d", "hf")
    found = samples(source)
    assert [len(sample.images) for sample in found] == [k % 3 for k in range(10)]
    assert [widths(sample) for sample in found] == [[3 + k + i for i in range(k % 3)] for k in range(10)]
    assert found[5].messages == [user(0, "\n", 1, "\n", "5?"), YES]
    assert [record.part for record in records(source)] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3]  # row groups
    assert source.where(2, 1) == f"{tmp_path / 'd' / 'train-00001.parquet'}, row 1"
    rated = records(source_of(tmp_path / "d", "hf", min_ratings={"relevance": 3}))
    assert [isinstance(record.sample, Sample) for record in rated] == [k % 5 >= 3 for k in range(10)]


def test_parquet_single_image_and_text(tmp_path: Path) -> None:
    image = {"bytes": picture(7), "path": "a.png"}
    path = write_parquet(tmp_path / "a.parquet", [{"image": image, "question": "Q", "answer": "yes"}])
    assert samples(source_of(path, "hf"))[0].messages == [user(0, "\n", "Q"), YES]
    path = write_parquet(tmp_path / "b.parquet", [{"image": image, "text": "A cat."}])
    sample = samples(source_of(path, "hf", prompt="ocr"))[0]
    assert sample.messages[0]["content"][2]["text"] in prompts.OCR
    assert sample.messages[1]["content"] == [{"text": "A cat."}]
    path = write_parquet(tmp_path / "c.parquet", [{"image": image, "conversations": llava("Q")}])
    assert samples(source_of(path, "hf"))[0].messages == [user(0, "\nQ"), YES]
    path = write_parquet(tmp_path / "d.parquet", [{"text": "Once"}, {"text": "upon"}])
    assert [sample.messages for sample in samples(source_of(path, "hf"))] == [document("Once"), document("upon")]
    assert [sample.messages for sample in samples(source_of(path, "text"))] == [document("Once"), document("upon")]
    path = write_parquet(tmp_path / "e.parquet", [{"pic": image, "q": "Q", "a": ["yes"]}])
    named = source_of(path, "hf", columns={"images": "pic", "question": "q", "answer": "a"})
    assert samples(named)[0].messages == [user(0, "\n", "Q"), YES]


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGB", (3 + k, 4)) for k in range(7)], "question": ["Q"] * 7, "answer": ["yes"] * 7}
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.select([5, 1, 3]).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "many"))
    found = samples(source_of(tmp_path / "one", "hf"))
    assert [widths(sample) for sample in found] == [[8], [4], [6]]
    assert found[0].messages == [user(0, "\n", "Q"), YES]
    assert len(samples(source_of(tmp_path / "many", "hf"))) == 7
    assert len(samples(source_of(tmp_path / "many", "hf", split="test"))) == 1
    with pytest.raises(DataError, match=r"no split 'dev'; it has test, train"):
        source_of(tmp_path / "many", "hf", split="dev")


def test_parquet_of_another_schema(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "1.parquet", [{"question": "Q", "answer": "yes"}])
    write_parquet(tmp_path / "d" / "2.parquet", [{"question": "Q", "label": 3}])
    with pytest.raises(DataError, match=r"2\.parquet has another schema than .*1\.parquet: no column answer; it has"):
        source_of(tmp_path / "d", "hf")
    path = write_parquet(tmp_path / "x.parquet", [{"a": 1, "b": 2}])
    with pytest.raises(DataError, match=r"has the columns a, b; none of them is known: map them"):
        source_of(path, "hf")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"y\.parquet is no readable parquet file"):
        source_of(tmp_path / "y.parquet", "hf")
    data = write_parquet(tmp_path / "z.parquet", cauldron(6)).read_bytes()
    (tmp_path / "z.parquet").write_bytes(data[:-200])
    with pytest.raises(DataError, match=r"z\.parquet is no readable parquet file"):
        source_of(tmp_path / "z.parquet", "hf")


def test_damaged_and_changed_parquet_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", cauldron(6))
    source = source_of(path, "hf")
    first = records(source)[1]
    row = {"position": position(first.part, first.offset), "num_bytes": 0, "hash": first.hash}
    write_parquet(path, cauldron(7)[1:])
    with pytest.raises(BadSample) as error:
        source_of(path, "hf").sample(row)
    assert error.value.reason == "changed file"
    data = bytearray(write_parquet(path, cauldron(6)).read_bytes())
    data[10:60] = bytes(50)
    path.write_bytes(data)
    reasons = {reason for _, reason, _ in bad(source_of(path, "hf"))}
    assert reasons <= {"unreadable rows", "bad content", "not UTF-8"}
    assert reasons


# ---------------------------------------------------------------------------------------------------------- WebDataset


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(key: str, text: str = "Q") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(6, 4, "JPEG")), (f"{key}.json", json.dumps(llava(text)).encode())]


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset(tmp_path: Path, layout: int) -> None:
    """Conversations, captions, several images in natural order, text only, long names and folders in names."""
    long = "folder/" + ("x" * 80 if layout == tarfile.USTAR_FORMAT else "é" * 150)
    files = [
        *members_of("a"),
        ("b.jpg", picture(7, 4, "JPEG")),
        ("b.txt", b"A cat.\n"),
        ("c.10.png", picture(10)),
        ("c.2.png", picture(2)),
        ("c.json", json.dumps({"conversations": llava("Q <image>"), "image": "ignored"}).encode()),
        ("d.json", json.dumps({"messages": turns("Q", "yes"), "id": 4}).encode()),
        *members_of(long, "long"),
        ("e.txt", b"Only text."),
        ("e.cls", b"7"),
    ]
    path = write_tar(tmp_path / "a.tar", files, layout)
    found = samples(source_of(path, "webdataset"))
    assert [widths(sample) for sample in found] == [[6], [7], [2, 10], [], [6], []]
    assert found[0].messages == [user(0, "\nQ"), YES]
    assert found[1].messages[0]["content"][2]["text"] in prompts.CAPTION
    assert found[1].messages[1]["content"] == [{"text": "A cat."}]
    assert found[2].messages == [user(0, "\nQ ", 1), YES]
    assert found[3].messages == [user("Q"), YES]
    assert found[4].messages == [user(0, "\nlong"), YES]
    assert found[5].messages == document("Only text.")


def test_webdataset_shards_and_columns(tmp_path: Path) -> None:
    for k in range(3):
        write_tar(tmp_path / "d" / f"a-{k:03d}.tar", members_of(f"{k}", f"{k}"))
    for path in ("d", "d/a-{000..002}.tar", "d/*.tar"):
        source = source_of(tmp_path / path, "webdataset")
        assert [sample.messages[0] for sample in samples(source)] == [user(0, f"\n{k}") for k in range(3)]
    meta = json.dumps({"alt": {"en": ["A cat."]}, "q": "Why?"}).encode()
    path = write_tar(tmp_path / "b.tar", [("1.webp", picture(8, 4, "WEBP")), ("1.meta.json", meta), ("1.say", b"yes")])
    columns = {"caption": "meta.json[alt][en][0]"}
    found = samples(source_of(path, "webdataset", columns=columns, prompt="document"))[0]
    assert found.messages[0]["content"][2]["text"] in prompts.DOCUMENT
    assert found.messages[1]["content"] == [{"text": "A cat."}]
    found = samples(source_of(path, "webdataset", columns={"question": "meta.json[q]", "answer": "txt,say"}))[0]
    assert found.messages == [user(0, "\n", "Why?"), YES]


def test_interleaved_tar_names_its_images(tmp_path: Path) -> None:
    row = {"pages": ["p2.png", "p1.png"], "messages": turns("<image> then <image>", "yes")}
    path = write_tar(
        tmp_path / "a.tar",
        [("k.p1.png", picture(1)), ("k.p2.png", picture(2)), ("k.json", json.dumps(row).encode())],
    )
    assert [widths(s) for s in samples(source_of(path, "webdataset", columns={"images": "json[pages]"}))] == [[2, 1]]
    row["pages"][0] = "p3.png"
    path = write_tar(tmp_path / "b.tar", [("k.p1.png", picture(1)), ("k.json", json.dumps(row).encode())])
    assert bad(source_of(path, "webdataset", columns={"images": "json[pages]"}))[0][1] == "missing image"


def test_bad_tar_samples(tmp_path: Path) -> None:
    files = [
        *members_of("a"),
        *members_of("b"),
        *members_of("a"),  # comes again
        ("c.jpg", b"1"),
        ("c.jpg", b"2"),
        ("c.txt", b"x"),
        ("d.txt", b"\xff"),
        ("d.jpg", picture()),
        ("e.json", b"{"),
        ("f.cls", b"3"),
        ("g.json", json.dumps(llava("Q")).encode()),
        ("../../h.jpg", picture()),
        ("../../h.txt", b"a name, not a path"),
    ]
    source = source_of(write_tar(tmp_path / "a.tar", files), "webdataset")
    found = bad(source)
    assert [(place.rsplit(", ", 1)[1], reason) for place, reason, _ in found] == [
        ("sample 3", "duplicate key"),
        ("sample 4", "duplicate key"),
        ("sample 5", "not UTF-8"),
        ("sample 6", "not JSON"),
        ("sample 7", "no conversation"),
        ("sample 8", "marker count"),
    ]
    assert "key a" in found[0][2] and "key c: jpg is there more than once" in found[1][2]
    assert len(records(source)) == 9


def test_cut_and_damaged_tars(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", [*members_of("a"), *members_of("b"), *members_of("c")]).read_bytes()
    marks = [index for index in range(0, len(data), 512) if data[index : index + 6] in (b"b.json", b"b.jpg\0")]
    for at in (marks[0] + 700, marks[0] + 100, marks[1] + 100, marks[1] + 520):
        path = tmp_path / f"cut{at}.tar"
        path.write_bytes(data[:at])
        source = source_of(path, "webdataset")
        good = [record for record in records(source) if isinstance(record.sample, Sample)]
        found = bad(source)
        assert len(good) == 1
        assert [reason for _, reason, _ in found][-1] == "cut tar"
        assert found[-1][0].startswith(f"{path}, sample ")
    path = tmp_path / "damaged.tar"
    path.write_bytes(data[: marks[0]] + b"x" * 512 + data[marks[0] + 512 :])
    assert [reason for _, reason, _ in bad(source_of(path, "webdataset"))] == ["damaged tar"]
    for content in (b"hello", b"", b"\0" * 1024, b"x" * 2000):
        path.write_bytes(content)
        assert all(reason in ("cut tar", "damaged tar") for _, reason, _ in bad(source_of(path, "webdataset")))


def test_a_link_in_a_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.json", json.dumps({"text": "q"}).encode()), ("a.jpg", None)):
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "../secret.jpg"
            else:
                info.size = len(data)
            tar.addfile(info, None if data is None else io.BytesIO(data))
    ((where, reason, message),) = bad(source_of(tmp_path / "a.tar", "webdataset"))
    assert reason == "link in tar" and "a.jpg is a link; store the file itself" in message and "sample 1" in where


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        ("parquet", "jsonl", "is a parquet file, which kind: jsonl cannot read; use kind: hf"),
        ("parquet", "json", "is a parquet file, which kind: json cannot read; use kind: hf"),
        ("tar", "jsonl", "is a tar, which kind: jsonl cannot read; use kind: webdataset"),
        ("tar", "hf", "is a tar, which kind: hf cannot read; use kind: webdataset"),
        ("gzip", "webdataset", "is a gzip file, which kind: webdataset cannot read; decompress it"),
        ("gzip", "jsonl", "is a gzip file, which kind: jsonl cannot read; decompress it"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(tmp_path: Path, make: str, kind: str, message: str) -> None:
    path = tmp_path / "data.bin"
    if make == "parquet":
        write_parquet(path, cauldron(2))
    else:
        write_tar(path, members_of("a"))
        if make == "gzip":
            path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(message)):
        source_of(path, kind)


def test_rows_of_plain_text_and_null_columns_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("Once upon a time\n[1]\n" + json.dumps({"texts": None, "id": 3}) + "\n")
    messages = [message for _, _, message in bad(source_of(tmp_path / "a.jsonl", "jsonl"))]
    assert "(plain text? use kind: text)" in messages[0] and "the line holds a list" in messages[1]
    assert messages[2].endswith("the row has ['id', 'texts'], texts is null")


def test_a_column_that_is_misspelt_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"prompt": "q", "reply": "a"}])
    with pytest.raises(
        DataError, match=r"columns.question: .*a.parquet has no column 'promt'; it has prompt, reply; di"
    ):
        source_of(tmp_path / "a.parquet", "hf", columns={"question": "promt", "answer": "reply"})


def test_changed_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members_of("a"))
    source = source_of(path, "webdataset")
    record = records(source)[0]
    row = {"position": position(0, record.offset), "num_bytes": record.num_bytes, "hash": record.hash}
    write_tar(path, members_of("a", "R"))
    with pytest.raises(BadSample) as error:
        source_of(path, "webdataset").sample(row)
    assert error.value.reason == "changed file"
    path.unlink()
    source.close()
    with pytest.raises(BadSample) as error:
        source.sample(row)
    assert error.value.reason == "missing file"


# ----------------------------------------------------------------------------------------------- blends of other tools


def write_energon(folder: Path, count: int = 6) -> Path:
    """Two shards as `energon prepare` leaves them; the second is the validation part."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    database = sqlite3.connect(meta / "index.sqlite")
    columns = "tar_file_id INT, sample_key TEXT, sample_index INT, byte_offset INT, byte_size INT"
    database.execute(f"CREATE TABLE samples ({columns})")
    for k in range(2):
        files = []
        for i in range(count):
            texts = {"texts": [{"from": "human", "value": f"{k}{i}"}, {"from": "gpt", "value": "yes"}]}
            files += [(f"{k}_{i}.png", picture(3 + i)), (f"{k}_{i}.json", json.dumps(texts).encode())]
        write_tar(folder / f"shard_{k}.tar", files)
        with tarfile.open(folder / f"shard_{k}.tar") as tar:
            for i in range(count):
                begin = tar.getmember(f"{k}_{i}.png").offset
                last = tar.getmember(f"{k}_{i}.json")
                end = last.offset_data + -(-last.size // 512) * 512
                database.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", (k, f"{k}_{i}", i, begin, end - begin))
    database.commit()
    database.close()
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {"shard_0.tar": count, "shard_1.tar": count}}))
    (meta / "split.yaml").write_text(
        "split_parts:\n  train: ['shard_{0..0}.tar']\n  val: [shard_1.tar]\n  test: []\nexclude: []\n"
    )
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    return folder


def test_energon_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvlm_train.data.sources import tar

    folder = write_energon(tmp_path / "e")
    found = samples(source_of(folder, "webdataset"))
    assert [sample.messages[0] for sample in found] == [user(0, "\n", f"0{i}") for i in range(6)]
    assert len(samples(source_of(folder, "webdataset", split="val"))) == 6
    with pytest.raises(DataError, match=r"no part 'dev'; it has train, val, test"):
        source_of(folder, "webdataset", split="dev")
    with pytest.raises(DataError, match="lists no tar for the split 'test'"):
        source_of(folder, "webdataset", split="test")
    # the index says where samples begin, so that one tar is several units; the records are the same
    whole = records(source_of(folder, "webdataset"))
    monkeypatch.setattr(tar, "_UNIT_SAMPLES", 2)
    source = source_of(folder, "webdataset")
    assert len(list(source.units())) == 3
    same = [(r.part, r.offset, r.num_bytes, r.number, r.hash) for r in whole]
    assert [(r.part, r.offset, r.num_bytes, r.number, r.hash) for r in records(source)] == same
    (folder / ".nv-meta" / "index.sqlite").write_bytes(b"no database")
    assert len(list(source_of(folder, "webdataset").units())) == 1


def test_energon_field_map(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    row = {"conv": [{"value": "Why?"}], "a": ["yes"]}
    write_tar(folder / "s.tar", [("1.jpg", picture(5, 5, "JPEG")), ("1.json", json.dumps(row).encode())])
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"s.tar": 1}}')
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: VQASample}\n"
        "field_map: {image: jpg, context: 'json[conv][0][value]', answers: 'json[a]'}\n"
    )
    assert samples(source_of(folder, "webdataset"))[0].messages == [user(0, "\n", "Why?"), YES]


def recipe_with(**sources: dict[str, Any]) -> schema.Recipe:
    given = {"mixture": sources, "max_tokens_per_sample": 9, "pack_tokens": 9}
    return schema.Recipe.model_construct(data=schema.Data.model_validate(given), validation=None)


def expanded(recipe: schema.Recipe) -> dict[str, schema.Source]:
    return expand_sources(recipe).data.mixture


def test_energon_blend(tmp_path: Path) -> None:
    write_energon(tmp_path / "a")
    write_energon(tmp_path / "b", count=3)
    inner = tmp_path / "inner.yaml"
    inner.write_text("splits: {train: {blend: [{weight: 1, path: a}, {weight: 3, path: b, split_part: val}]}}")
    (tmp_path / "outer.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        "      - {weight: 6, path: inner.yaml, subflavors: {x: 1}}\n      - {weight: 2, path: ./a}\n"
        "      - {weight: 0, path: b}\n"
    )
    found = expanded(recipe_with(e={"kind": "energon", "path": str(tmp_path / "outer.yaml"), "weight": 4.0}))
    assert {name: (source.weight, source.split) for name, source in found.items()} == {
        "e-a": (0.75, "train"),
        "e-b": (2.25, "val"),
        "e-a_1": (1.0, "train"),
    }
    assert len(samples(open_source("e-b", found["e-b"]))) == 3
    epochs = tmp_path / "epochs.yaml"
    epochs.write_text("splits: {train: {blend_epochized: [{repetitions: 1, path: a}, {repetitions: 4, path: b}]}}")
    found = expanded(recipe_with(e={"kind": "energon", "path": str(epochs)}))
    assert [source.weight for source in found.values()] == pytest.approx([6 / 18, 12 / 18])
    v1 = tmp_path / "v1.yaml"
    v1.write_text("splits: {train: {datasets: [{weight: 1, path: a, subflavors: {augmentation: false}}]}}")
    assert list(expanded(recipe_with(e={"kind": "energon", "path": str(v1)}))) == ["e-a"]
    inner.write_text("splits: {train: {blend: [{weight: 1, path: inner.yaml}, {weight: -1, path: a}, {path: zz}]}}")
    with pytest.raises(DataError) as error:
        expanded(recipe_with(e={"kind": "energon", "path": str(inner)}))
    for words in ("more than 8 deep", "weight -1 is not a number of 0 or more", "zz is not there"):
        assert words in str(error.value)
    inner.write_text("splits: {train: {blend: [{weight: 0, path: a}]}}")
    with pytest.raises(DataError, match=r"weights in .* sum to 0"):
        expanded(recipe_with(e={"kind": "energon", "path": str(inner)}))


def test_internvl_meta(tmp_path: Path) -> None:
    for name, count in (("one", 10), ("two", 4)):
        rows = [
            {"id": k, "image": write_image(tmp_path / name / f"{k}.png", 4, 4), "conversations": llava(f"{k}"),
             "width": 4, "height": 4}
            for k in range(count)
        ]  # fmt: skip
        write_rows(tmp_path / f"{name}.jsonl", rows)
    meta = {
        "one set": {"root": str(tmp_path / "one"), "annotation": str(tmp_path / "one.jsonl"), "repeat_time": 0.5,
                    "data_augment": False, "length": 10},
        "two": {"root": str(tmp_path / "two"), "annotation": str(tmp_path / "two.jsonl"), "repeat_time": 2,
                "max_dynamic_patch": 4},
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    recipe = recipe_with(
        i={"kind": "internvl", "path": str(tmp_path / "meta.json"), "weight": 13.0, "license": "CC0-1.0"}
    )
    found = expanded(recipe)
    assert {name: source.weight for name, source in found.items()} == {"i-one_set": 5.0, "i-two": 8.0}
    assert found["i-one_set"].max_samples == 5
    assert (found["i-two"].max_tiles, found["i-two"].max_tiles_shared, found["i-two"].license) == (4, True, "CC0-1.0")
    source = open_source("i-two", found["i-two"])
    sample = samples(source)[0]
    assert sample.messages == [user(0, "\n0"), YES]
    assert source.max_tiles(sample, 6) == 4
    assert source.max_tiles(Sample([], sample.images * 3), 6) == 1
    meta["two"]["repeat_time"], meta["one set"]["annotation"] = "x", str(tmp_path / "none.jsonl")  # type: ignore[index]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError) as error:
        expanded(recipe)
    assert "two: repeat_time 'x' is not a number above 0" in str(error.value)
    assert "none.jsonl (No such file" in str(error.value)


def test_braces_and_order() -> None:
    assert expand_braces("a-{08..11}.{x,y}") == [f"a-{k}.{s}" for k in ("08", "09", "10", "11") for s in "xy"]
    assert expand_braces("a{b}c") == ["a{b}c"]
    with pytest.raises(ValueError, match="more than"):
        expand_braces("{0..99999999999}")
    assert sorted(["img10", "img2", "b", "img1"], key=natural) == ["b", "img1", "img2", "img10"]


# ------------------------------------------------------------------------------------------------------------- fuzzing


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=150)
def test_any_bytes_as_json_array(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    for content in (data, b"[" + data, b"[" + data + b"]"):
        path.write_bytes(content)
        try:
            records(source_of(path, "json"))
        except DataError:
            pass


@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8)))
@settings(deadline=None, max_examples=100)
def test_elements_of_any_array_are_found(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz2.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    source = source_of(path, "json")
    data = path.read_bytes()
    found = [json.loads(data[r.offset : r.offset + r.num_bytes]) for r in records(source)]
    assert found == values


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_any_damage_to_a_tar(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes overwritten anywhere, and a cut anywhere: records or reasons, never a crash; positions stay readable."""
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    content = bytearray(write_tar(path, [*members_of("a"), *members_of("b" * 120)]).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=20))
        content[at : at + len(new)] = new
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    source = source_of(path, "webdataset")
    for record in records(source):
        if isinstance(record.sample, Sample):
            row = {"position": position(0, record.offset), "num_bytes": record.num_bytes, "hash": record.hash}
            assert source.sample(row).messages == record.sample.messages


@given(st.dictionaries(st.sampled_from(["texts", "images", "image", "question", "answer", "answers", "answer_weights",
       "choices", "caption", "text", "system", "messages", "relevance_ratings"]), st.recursive(
       st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
       | st.just("<image>"), lambda x: st.lists(x, max_size=3) | st.dictionaries(
           st.sampled_from(["user", "assistant", "from", "value", "role", "content", "bytes", "path", "type"]), x),
       max_leaves=6)))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_any_row_gives_a_sample_or_a_reason(row: dict[str, Any]) -> None:
    for kind, more in (
        ("hf", {}),
        ("text", {}),
        ("hf", {"prompt": "multiple_choice", "min_ratings": {"relevance": 3}}),
    ):
        for megatron in (False, True):
            reads = Form.of(schema.Source.model_validate({"path": "x", "kind": kind, **more}), megatron=megatron)
            try:
                sample = parse_row(row, reads, 7)
            except BadSample:
                continue
            placed = [part["image"] for message in sample.messages for part in message["content"] if "image" in part]
            assert sorted(placed) == list(range(len(sample.images)))


def test_positions() -> None:
    from nvlm_train.data.sources import part_of

    found = np.array([position(0, 5), position(7, 1 << 39), position((1 << 24) - 1, 0)], dtype=np.uint64)
    assert part_of(found).tolist() == [0, 7, (1 << 24) - 1]


def test_every_kind_together_in_a_run(tmp_path: Path) -> None:
    """A mixture of all kinds is indexed, planned and loaded; every step holds what the plan says, nothing is bad."""
    from corpus import make_recipe, write_image_rows
    from nvlm_train.data.loader import StepLoader
    from nvlm_train.data.plan import open_data

    rows = [{"image": write_image(tmp_path / f"{k}.png", 9, 5), "conversations": llava(f"{k}")} for k in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_rows(tmp_path / "i.jsonl", rows)
    meta = {"one": {"root": str(tmp_path), "annotation": str(tmp_path / "i.jsonl"), "repeat_time": 3}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    write_energon(tmp_path / "e")
    (tmp_path / "blend.yaml").write_text("splits: {train: {blend: [{weight: 1, path: e}, {weight: 1, path: e}]}}")
    write_tar(tmp_path / "t.tar", [m for k in range(5) for m in members_of(f"{k}", f"{k}")])
    write_rows(tmp_path / "text.jsonl", [{"text": f"what is {k}"} for k in range(4)])
    mixture = {
        "jsonl": {"path": str(write_image_rows(tmp_path / "j" / "a.jsonl", 6))},
        "json": {"kind": "json", "path": str(tmp_path / "a.json")},
        "intern": {"kind": "internvl", "path": str(tmp_path / "meta.json")},
        "hf": {"kind": "hf", "path": str(write_parquet(tmp_path / "p" / "a.parquet", cauldron(9)))},
        "tar": {"kind": "webdataset", "path": str(tmp_path / "t.tar")},
        "blend": {"kind": "energon", "path": str(tmp_path / "blend.yaml")},
        "text": {"kind": "text", "path": str(tmp_path / "text.jsonl")},
    }
    names = {"jsonl", "json", "intern-one", "hf", "tar", "blend-e", "blend-e_1", "text"}
    plan = open_data(make_recipe(tmp_path, mixture), rank=0, world_size=1)
    assert set(plan.mixture.names) == names
    with StepLoader(plan, start_step=0, end_step=4) as steps:
        found = list(steps)
    assert [data.samples for data in found] == [16] * 4
    assert not any(data.bad for data in found)
    assert {ref.source for data in found for batch in data.micro_batches for ref in batch.samples} == names
