"""Rows of every form to canonical samples, and every kind of bad row with its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import turns, write_image, write_rows
from nvlm_train.data.images import BadSample
from nvlm_train.data.sources import JsonlSource, Sample, parse_line, parse_row
from nvlm_train.errors import DataError
from nvlm_train.recipe.schema import Source

ANSWER = {"role": "assistant", "content": [{"text": "yes"}]}


def user(*content: str | int) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"text": part} if isinstance(part, str) else {"image": part} for part in content],
    }


def names(sample: Sample) -> list[str]:
    return [image.name for image in sample.images]


def test_messages_with_markers() -> None:
    row = {"messages": turns("a <image> b <image>", "yes"), "images": ["x.png", "y.png"]}
    sample = parse_row(row)
    assert names(sample) == ["x.png", "y.png"]
    assert sample.messages == [user("a ", 0, " b ", 1), ANSWER]


def test_llava_row() -> None:
    row = {
        "id": 7,
        "image": "x.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    sample = parse_row(row)
    assert names(sample) == ["x.png"]
    assert sample.messages == [{"role": "system", "content": [{"text": "Be brief."}]}, user(0, "\nWhat?"), ANSWER]


def test_markers_run_over_all_turns() -> None:
    row = {
        "image": ["x.png", "y.png"],
        "conversations": [
            {"from": "user", "value": "<image>\nA"},
            {"from": "assistant", "value": "yes"},
            {"from": "human", "value": "B<image>"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    assert parse_row(row).messages == [user(0, "\nA"), ANSWER, user("B", 1), ANSWER]


def test_without_markers_images_come_first() -> None:
    """Before the first user turn, a newline after each; a system turn keeps its place."""
    row = {
        "images": ["x", "y"],
        "messages": [{"role": "system", "content": "S"}, *turns("Q", "yes"), *turns("R", "yes")],
    }
    assert parse_row(row).messages[1:] == [user(0, "\n", 1, "\n", "Q"), ANSWER, user("R"), ANSWER]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "image_url", "image_url": "file://x.png"},
        {"type": "image", "image": "x.png"},
        {"type": "image", "path": "x.png"},
        {"type": "image", "url": "x.png"},
    ],
)
def test_content_list(part: dict[str, Any]) -> None:
    row = {"messages": turns("", "yes")}
    row["messages"][0]["content"] = [{"type": "text", "text": "see "}, part, {"type": "text", "text": "?"}]
    sample = parse_row(row)
    assert (names(sample), sample.messages[0]) == (["x.png"], user("see ", 0, "?"))


def test_content_list_with_images_beside() -> None:
    row = {"images": ["x", "y"], "messages": turns("", "yes")}
    row["messages"][0]["content"] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]
    sample = parse_row(row)
    assert (names(sample), sample.messages[0]) == (["x", "y"], user(0, 1, "same?"))


def test_text_only() -> None:
    sample = parse_row({"messages": turns("Q", "yes"), "images": None})
    assert (names(sample), sample.messages) == ([], [user("Q"), ANSWER])


GOOD = turns("Q", "yes")
BAD: list[tuple[Any, str, str]] = [
    (
        {"messages": turns("<image> and <image>", "a"), "images": ["x"]},
        "marker count",
        "2 <image> markers but 1 images",
    ),
    ({"messages": turns("<image>", "a")}, "marker count", "1 <image> markers but 0 images"),
    ({"messages": turns("<image>", "a"), "images": ["x", "y", "z"]}, "marker count", "1 <image> markers but 3 images"),
    ({"messages": []}, "empty conversation", "'messages' is empty"),
    ({"conversations": []}, "empty conversation", "'conversations' is empty"),
    ({"messages": "hello"}, "no conversation", "a str, not a list"),
    ({"text": "x"}, "no conversation", "neither 'messages' nor 'conversations'; the row has ['text']"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role", "turn 1 has role 'tool'"),
    ({"messages": [*GOOD, {"content": "x"}]}, "unknown role", "turn 3 has role None"),
    ({"messages": ["hello"]}, "unknown role", "turn 1"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown role", "turn 1"),
    ({"messages": turns("Q", " \n")}, "empty answer", "turn 2 is an empty assistant turn"),
    ({"messages": GOOD[:1]}, "no assistant turn", "nothing to train on"),
    ({"messages": turns("Q", "see <image>"), "images": ["x"]}, "image place", "turn 2 (assistant) holds an image"),
    (
        {"messages": [{"role": "system", "content": "<image>"}, *GOOD], "images": ["x"]},
        "image place",
        "turn 1 (system) holds an image",
    ),
    ({"messages": GOOD[1:], "images": ["x"]}, "marker count", "no user turn"),
    ({"messages": GOOD, "image": 3}, "bad image path", "given as int"),
    ({"messages": GOOD, "image": ""}, "bad image path", "given as str"),
    ({"messages": GOOD, "image": "x", "images": ["x"]}, "bad image path", "both 'image' and 'images'"),
    ({"messages": GOOD, "image": "https://a.b/c.png"}, "bad image path", "is not a file"),
    ({"messages": GOOD, "image": "data:image/png,AAAA"}, "bad image path", "a data: URL must be base64"),
    ({"messages": GOOD, "image": "data:image/png;base64,A*"}, "bad image path", "nor readable base64"),
    ({"messages": [{"role": "user", "content": 3}]}, "bad content", "turn 1 has content of type int"),
    ({"messages": [{"role": "user"}]}, "bad content", "turn 1 has content of type NoneType"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "bad content", "a part of type 'video'"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "bad content", "a part of type None"),
    (
        {"images": ["y"], "messages": [{"role": "user", "content": [{"type": "image", "path": "x"}]}, GOOD[1]]},
        "marker count",
        "1 image parts with a path beside 0 <image> markers and 1 listed images",
    ),
    ({"messages": turns("\ud800", "a")}, "not UTF-8", "half a surrogate pair"),
    (["messages"], "not an object", "holds a list"),
    (None, "not an object", "holds a NoneType"),
]


@pytest.mark.parametrize(("row", "reason", "message"), BAD)
def test_bad_rows(row: Any, reason: str, message: str) -> None:
    with pytest.raises(BadSample) as error:
        parse_line(json.dumps(row).encode())
    assert error.value.reason == reason
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b'{"messages": [', "not JSON", "not JSON: Expecting"),
        (b'[{"messages": []},', "not JSON", "a JSON array? jsonl holds one object a line"),
        (b'{"a": "\xff"}', "not UTF-8", "byte 0xff at position 7"),
        (b"[" * 100_000, "not JSON", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON", "not JSON"),
    ],
)
def test_bad_lines(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(BadSample) as error:
        parse_line(data)
    assert error.value.reason == reason
    assert message in str(error.value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["<image>", "user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "conversations", "role", "from", "content", "value", "image", "images", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(anything)
def test_any_json_gives_a_sample_or_a_reason(row: Any) -> None:
    try:
        sample = parse_line(json.dumps(row).encode())
    except BadSample:
        return
    placed = [part["image"] for message in sample.messages for part in message["content"] if "image" in part]
    assert sorted(placed) == list(range(len(sample.images)))


@given(st.binary(max_size=60))
def test_any_bytes_give_a_sample_or_a_reason(data: bytes) -> None:
    try:
        parse_line(data)
    except BadSample:
        pass


def test_random_access(tmp_path: Path) -> None:
    """Offsets lead back to each line's bytes, past blank lines, a byte order mark and \\r\\n."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"b": "\xc3\xa9"}\n{"c": 3}')
    source = JsonlSource("s", Source(path=str(path)))
    lines = list(source.lines())
    assert [(line.number, line.data) for line in lines] == [
        (1, b'{"a": 1}'),
        (4, b'{"b": "\xc3\xa9"}'),
        (5, b'{"c": 3}'),
    ]
    assert [source.read(line.offset, len(line.data)) for line in reversed(lines)] == [
        line.data for line in reversed(lines)
    ]
    source.close()
    source.close()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 's': cannot open .*nowhere\.jsonl \(No such file"):
        JsonlSource("s", Source(path=str(tmp_path / "nowhere.jsonl")))


def test_image_paths_stay_in_the_root(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    write_image(data / "in" / "a.png", 4, 4)
    write_image(other / "b.png", 4, 4)
    (data / "link.png").symlink_to(other / "b.png")
    (data / "linked").symlink_to(other)
    source = JsonlSource("s", Source(path=str(write_rows(data / "a.jsonl", []))))
    real = str((data / "in" / "a.png").resolve())
    for good in ("in/a.png", "./in/../in/a.png", real):
        assert source.image_path(good) == real
    for bad in (
        "../other/b.png",
        str(other / "b.png"),
        "in/../../other/b.png",
        "link.png",
        "linked/b.png",
        "/etc/passwd",
    ):
        with pytest.raises(BadSample, match="lies outside") as error:
            source.image_path(bad)
        assert error.value.reason == "image outside root"
    with pytest.raises(BadSample, match="zero byte"):
        source.image_path("a\0.png")
    rooted = JsonlSource("s", Source(path=str(data / "a.jsonl"), image_root=str(other)))
    assert rooted.image_path("b.png") == str((other / "b.png").resolve())
    # a folder whose name merely begins like the root's is outside
    write_image(tmp_path / "data2" / "c.png", 4, 4)
    with pytest.raises(BadSample, match="lies outside"):
        source.image_path("../data2/c.png")
