"""YAML 1.2 scalars, line marks, and what a file may not do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_train.errors import RecipeError
from nvlm_train.recipe.yaml import Origin, parse_yaml, read_yaml, scalar

SCALARS = [
    ("2e-5", 2e-5),
    ("1e3", 1000.0),
    ("1.5", 1.5),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1.5E+2", -150.0),
    ("+3", 3),
    ("-12", -12),
    ("012", 12),
    ("0o17", 15),
    ("0xfF", 255),
    ("~", None),
    ("null", None),
    ("", None),
    ("true", True),
    ("False", False),
    (".inf", math.inf),
    ("-.Inf", -math.inf),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("off", "off"),
    ("y", "y"),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("2024-01-01", "2024-01-01"),
    ("1e", "1e"),
    ("nan", "nan"),
    ("tRue", "tRue"),
    ("=", "="),
    ("-0o7", "-0o7"),
    ("1.2.3", "1.2.3"),
]


def parse(text: str):
    return parse_yaml(text, lambda line: Origin("file", f"x.yaml:{line}"))


@pytest.mark.parametrize(("text", "meaning"), SCALARS)
def test_scalars_of_the_core_schema(text, meaning):
    found = scalar(text)
    assert found == meaning and type(found) is type(meaning)


def test_nan_is_a_float():
    assert math.isnan(scalar(".nan"))


@pytest.mark.parametrize(("text", "meaning"), SCALARS)
def test_quoted_scalars_are_strings(text, meaning):
    assert parse(f"a: '{text}'").plain() == {"a": text}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_writes_is_read_back(number):
    assert scalar(repr(number)) == number and type(scalar(repr(number))) is float


@given(st.integers())
def test_every_integer_is_read_back(number):
    assert scalar(str(number)) == number and type(scalar(str(number))) is int


def test_every_key_and_item_knows_its_line():
    tree = parse("a: 1\nb:\n  c: [1,\n      2]\n  d: >\n    long\n    text\n")
    assert tree.value["a"].origin.where == "x.yaml:1"
    assert tree.value["b"].value["c"].origin.where == "x.yaml:3"
    assert [item.origin.where for item in tree.value["b"].value["c"].value] == ["x.yaml:3", "x.yaml:4"]
    assert tree.value["b"].value["d"].origin.where == "x.yaml:5"


def test_anchors_work_and_the_alias_keeps_its_own_line():
    tree = parse("a: &x {k: 1}\nb: *x\n")
    assert tree.plain() == {"a": {"k": 1}, "b": {"k": 1}}
    assert tree.value["b"].origin.where == "x.yaml:2"


REFUSED = [
    ("a: 1\nb: 2\na: 3\n", "x.yaml:3 a: is given a second time (first on line 1); keep one of them"),
    ("a: {b: 1, 'b': 2}\n", "x.yaml:1 b: is given a second time (first on line 1); keep one of them"),
    (
        "a: 1\nb: !!python/object/apply:os.system ['true']\n",
        "x.yaml:2: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is refused: a recipe holds plain "
        "values only; "
        "remove the tag",
    ),
    (
        "a: !!str 1\n",
        "x.yaml:1: the tag 'tag:yaml.org,2002:str' is refused: a recipe holds plain values only; remove the tag",
    ),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", "x.yaml:3 <<: merge keys are not YAML 1.2; use `extends: other.yaml`"),
    ("a: &x [*x]\n", "x.yaml:1: an alias stands inside its own anchor; remove it"),
    ("a: 1\n---\nb: 2\n", "x.yaml:2: begins a second document; a recipe is one document, remove the `---`"),
    ("[1, 2]: 3\n", "x.yaml:1: a key must be a word, not a list or a mapping"),
    (
        "a: [1, 2\nb: 3\n",
        "x.yaml:2: is not YAML: expected ',' or ']', but got ':' (while parsing a flow sequence, from line 1)",
    ),
    (
        "a: 1\n\tb: 2\n",
        "x.yaml:2: is not YAML: found character '\\t' that cannot start any token (a tab; YAML indents with spaces)",
    ),
    ("a: 1\nb: \x07\n", "x.yaml:2: holds the character 7, which YAML does not allow"),
    ("a: *nowhere\n", "x.yaml:1: is not YAML: found undefined alias 'nowhere'"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused_with_the_line(text, message):
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_all_duplicates_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        parse("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert len(str(caught.value).splitlines()) == 2


def test_anchors_that_explode_are_refused():
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="expand to more than 100000 values"):
        parse("\n".join(lines))


def test_nesting_without_end_is_refused():
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse("a: " + "[" * 5000 + "]" * 5000)


FILES = [
    (b"", "is empty; a recipe is a mapping of keys"),
    (b"# only a comment\n", "is empty"),
    (b"- a\n- b\n", ":1: holds ['a', 'b'] instead of a mapping; write `key: value` lines"),
    (b"hello\n", ":1: holds 'hello' instead of a mapping"),
    (b"a: \xff\n", "is not UTF-8 text (byte 3); save it as UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(RecipeError, match="there is no such file"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "r.yaml").plain() == {"a": 1}
