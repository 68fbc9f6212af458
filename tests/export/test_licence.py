"""Licences of an export: what is refused, what travels, through runs, exports and new runs; and pushing it."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvlm_train import provenance
from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.export import hf, licence, push
from nvlm_train.export.licence import judge
from nvlm_train.export.verify import verify
from nvlm_train.provenance import Part, from_record, later_parts, parts_of
from nvlm_train.recipe.licences import canonical
from tiny_nvlm import MemoryWeights, make_recipe

NVLM = "nvidia/NVLM-D-72B"
TONGYI = (
    "Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
)


def weights_of(license: str | None, source: str | None = None, **more: Any) -> Part:
    return Part("weights", "vision", license, source, **more)


def data_of(license: str | None) -> Part:
    return Part("data", "captions", license, path="captions.jsonl")


# ----------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("name", "proper"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("cc-by-nc-sa-4.0", "CC-BY-NC-SA-4.0"),
        ("Tongyi Qianwen", "tongyi-qianwen"),
        ("LicenseRef-Tongyi-Qianwen", "tongyi-qianwen"),
        ("LicenseRef-Acme", "LicenseRef-Acme"),
        ("mit AND tongyi-qianwen", "MIT AND tongyi-qianwen"),
        ("Unknown", "unknown"),
        ("own", "own"),
        ("Llama research licence", None),
        ("other", None),
        ("", None),
    ],
)
def test_names_of_licences(name: str, proper: str | None) -> None:
    assert canonical(name) == proper


@pytest.mark.parametrize("name", ["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "research-only", "qwen-research", "LicenseRef-NC"])
def test_names_of_research_licences(name: str) -> None:
    assert licence.is_research_only(name) and "non-commercial" in licence.conditions(name)


@pytest.mark.parametrize("name", ["MIT", "Apache-2.0", "tongyi-qianwen", "CC-BY-4.0", "NCSA", None])
def test_names_of_other_licences(name: str | None) -> None:
    assert not licence.is_research_only(name)


WEAK = [  # part, labels that allow more, labels that do not
    (weights_of("CC-BY-NC-4.0"), ["Apache-2.0", "CC-BY-4.0", "tongyi-qianwen"], ["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"]),
    (data_of("CC-BY-NC-4.0"), ["Apache-2.0", "MIT OR CC-BY-NC-4.0"], ["cc-by-nc-4.0", "CC-BY-NC-4.0 AND MIT"]),
    (weights_of("tongyi-qianwen"), ["Apache-2.0", "llama3"], ["tongyi-qianwen", "CC-BY-NC-4.0"]),
    (weights_of("LicenseRef-Acme"), ["MIT"], ["LicenseRef-Acme", "MIT AND LicenseRef-Acme"]),
    (weights_of("CC-BY-SA-3.0"), ["Apache-2.0", "CC-BY-4.0"], ["CC-BY-SA-3.0", "CC-BY-SA-4.0"]),
    (weights_of("CC-BY-ND-4.0"), ["CC-BY-4.0"], ["CC-BY-ND-4.0"]),
    (weights_of("MIT"), [], ["Apache-2.0", "MIT", "CC-BY-NC-4.0"]),
    (data_of("CC-BY-SA-4.0"), [], ["Apache-2.0"]),
    (data_of("unknown"), [], ["Apache-2.0"]),
    (weights_of("unknown"), ["Apache-2.0", "CC-BY-NC-4.0"], []),
    # what its own folder says, and what is known of a published checkpoint, count whatever the recipe says
    (weights_of("MIT", found=("cc-by-nc-4.0",)), ["MIT"], ["CC-BY-NC-4.0"]),
    (weights_of("MIT", NVLM), ["MIT", "tongyi-qianwen"], ["CC-BY-NC-4.0"]),
    (weights_of(None, "https://huggingface.co/qwen/qwen2-72b-instruct"), ["Apache-2.0"], ["tongyi-qianwen"]),
]


@pytest.mark.parametrize(("part", "weaker", "good"), WEAK, ids=[f"{p.kind} {p.licences} {p.source}" for p, *_ in WEAK])
def test_a_label_that_allows_more_than_a_part_is_refused(part: Part, weaker: list[str], good: list[str]) -> None:
    for label in weaker:
        with pytest.raises(CheckpointError, match=r"license: '.*(allows more than|cannot be stated while)") as error:
            judge([part], label)
        assert part.key in str(error.value)
    for label in good:
        assert judge([part], label).label == canonical(label)


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["MIT", "Apache-2.0"], None),
        (["MIT", "tongyi-qianwen"], "tongyi-qianwen"),
        (["tongyi-qianwen", "CC-BY-NC-4.0"], "CC-BY-NC-4.0"),
        (["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"], "CC-BY-NC-SA-4.0"),
        (["llama3", "tongyi-qianwen"], "llama3 AND tongyi-qianwen"),
        (["CC-BY-SA-4.0", "CC-BY-NC-4.0"], "CC-BY-SA-4.0 AND CC-BY-NC-4.0"),
    ],
)
def test_without_a_label_the_parts_set_it(names: list[str], asked: str | None) -> None:
    assert judge([Part("weights", str(n), name) for n, name in enumerate(names)], None).label == asked


def test_missing_and_unknown_licences_are_all_listed() -> None:
    parts = [weights_of(None, path="weights/vit"), data_of("somehow free"), replace(data_of(None), name="chats")]
    parts.append(replace(weights_of(None, found=("house rules",)), name="language_model"))
    with pytest.raises(CheckpointError) as error:
        judge(parts, "freeware")
    for words in (
        "weights.vision (weights/vit) has no licence: state init_from.vision.license in the recipe (unknown:",
        "data.captions: 'somehow free' is no licence that is known here: write an SPDX identifier such as CC-BY-4.0, "
        "LicenseRef-NAME for another licence, one of tongyi-qianwen,",
        "data.chats (no source) has no licence" if parts[2].path is None else "data.chats (captions.jsonl) has no",
        "weights.language_model: its folder says 'house rules', which is not known here",
        "license: 'freeware' cannot be the licence of weights",
        "export --license PART=LICENCE",
    ):
        assert words in str(error.value)
    more = {"weights.vision": "mit", "data.captions": "CC-BY-4.0", "data.chats": "own", "weights.language_model": "MIT"}
    found = judge(parts, None, more)
    assert [part.license for part in found.parts] == ["mit", "CC-BY-4.0", "own", "MIT"] and found.label is None


def test_what_the_recipe_states_stands() -> None:
    with pytest.raises(CheckpointError, match=r"--license weights\.vision=MIT: the run's recipe states CC-BY-NC-4\.0"):
        judge([weights_of("CC-BY-NC-4.0")], None, {"weights.vision": "MIT"})
    with pytest.raises(
        CheckpointError, match=r"--license vision=MIT: there is no such part; there are weights\.vision"
    ):
        judge([weights_of("MIT")], None, {"vision": "MIT"})
    assert judge([weights_of("unknown")], None, {"weights.vision": "MIT"}).parts[0].license == "MIT"
    found = judge([data_of("MIT"), replace(data_of(None), name="chats")], None, {"data.*": "unknown"})
    assert [part.license for part in found.parts] == ["MIT", "unknown"]


# ------------------------------------------------------------------------------------------------ what a run records


def base_folder(folder: Path, head: str, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{head}\n---\n# A base\n")
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: cc-by-nc-4.0", ("cc-by-nc-4.0",)),
        ("license: other\nlicense_name: tongyi-qianwen\nlicense_link: LICENSE", ("tongyi-qianwen",)),
        ("license: [mit, apache-2.0]", ("mit", "apache-2.0")),
        ("license: other", ()),
        ("tags: [a]", ()),
        ("license: [", ()),
        ("- a list", ()),
    ],
)
def test_a_folder_says_its_licence_itself(tmp_path: Path, head: str, found: tuple[str, ...]) -> None:
    assert provenance.describe(base_folder(tmp_path / "base", head)).found == found


def test_what_lies_in_folders_is_recorded(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "qwen", "license: other\nlicense_name: tongyi-qianwen", LICENSE="terms", NOTICE="n")
    data = base_folder(tmp_path / "data", "license: cc-by-nc-4.0")
    recipe = make_recipe(Path("t"), **{"init_from.language_model": {"path": str(base)}})
    recipe["data"]["mixture"] = {"shots": {"path": str(data), "license": None}}
    texts: dict[str, bytes] = {}
    hashes = {str(base / "model.safetensors"): "12ab", "/elsewhere/model.safetensors": "34cd"}
    lm, shots = parts_of(recipe, hashes=hashes, digests={"shots": "56ef"}, texts=texts)
    assert lm.found == ("tongyi-qianwen",) and lm.content == {"model.safetensors": "12ab"}
    assert shots.found == ("cc-by-nc-4.0",) and shots.content == {"index": "56ef"}
    assert {texts[digest] for digest in lm.texts.values()} == {b"terms", b"n"}
    assert [from_record(json.loads(json.dumps(provenance.as_record(part)))) for part in (lm, shots)] == [lm, shots]
    # kept below the run, whatever becomes of the folder; a text that was changed there is not taken
    provenance.write_texts(tmp_path / "run", texts)
    shutil.rmtree(base)
    assert provenance.read_texts(tmp_path / "run", [lm]) == texts
    digest = hashlib.sha256(b"terms").hexdigest()
    (tmp_path / "run" / "licenses" / f"{digest}.txt").write_text("other terms")
    assert digest not in provenance.read_texts(tmp_path / "run", [lm])


@pytest.mark.parametrize(
    "wrong", ["", "[]", '{"format": 1}', '{"format": 2, "parts": []}', '{"format": 1, "parts": [1]}']
)
def test_a_record_that_cannot_be_read_is_no_empty_one(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "provenance.json").write_text(wrong)
    with pytest.raises(CheckpointError, match="the licences behind these weights would be lost"):
        provenance.describe(tmp_path)


def test_what_was_trained_on_once_stays_behind_the_weights() -> None:
    """A source that a later attempt leaves out stays; a licence that is corrected is not doubled."""
    gone, now = Part("data", "old", "CC-BY-NC-4.0", path="old.jsonl"), Part("data", "new", "MIT", path="new.jsonl")
    before = replace(now, license=None, content={"index": "1"}, texts={"LICENSE": "2"})
    assert later_parts([before, gone], [now]) == [replace(now, content={"index": "1"}, texts={"LICENSE": "2"}), gone]
    moved = replace(now, path="elsewhere.jsonl")
    assert later_parts([before, gone], [moved]) == [moved, before, gone]


def test_an_earlier_run_brings_its_parts_along() -> None:
    """Two stages back, from what recipe.json recorded: the folders of the earlier runs may be gone. Runs of an older
    version recorded recipes alone."""
    first = make_recipe(Path("t"), **{"init_from.vision": {"path": "somewhere", "license": "CC-BY-NC-4.0"}})
    first["data"]["mixture"] = {"captions": {"path": "c.jsonl", "license": "own", "source": "web"}}
    run = {"path": "runs/gone/step_5", "license": None, "source": None}
    second = make_recipe(Path("t"), **{"init_from.run": run})
    behind: dict[str, Any] = {"path": "runs/gone/step_5", "recipe": first, "earlier_run": None}
    old = {"path": "runs/second/step_9", "recipe": second, "earlier_run": behind}
    recorded = [provenance.as_record(part) for part in parts_of(second, behind)]
    for earlier in (old, {**old, "earlier_run": None, "parts": recorded}):
        parts = parts_of(second, earlier)
        assert {part.key for part in parts} == {"weights.run", "weights.vision", "data.captions", "data.digits"}
        assert judge(parts, None).label == "CC-BY-NC-4.0"
        with pytest.raises(CheckpointError, match="allows more"):
            judge(parts, "MIT")
    with pytest.raises(CheckpointError, match="is not recorded in the run's recipe"):
        parts_of(second)
    # the label of the run itself counts too
    own = {**behind, "recipe": make_recipe(Path("t"), license="CC-BY-NC-4.0")}
    assert judge(parts_of(second, own), None).label == "CC-BY-NC-4.0"


# --------------------------------------------------------------------------------------------- what an export holds


@pytest.fixture(scope="module")
def research(
    tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any], weights: MemoryWeights
) -> tuple[Path, licence.Licences]:
    """An export of weights made from NVLM-D-72B, whose folder had the text of Qwen's agreement."""
    texts = {hashlib.sha256(text).hexdigest(): text for text in (b"the agreement\n", b"a notice\n")}
    qwen, notice = texts
    parts = [
        Part(
            "weights", "model", "CC-BY-NC-4.0", NVLM, content={"model.safetensors": "12ab"}, path="/home/someone/nvlm"
        ),
        Part("weights", "lm", "tongyi-qianwen", "Qwen/Qwen2-72B-Instruct", texts={"LICENSE": qwen, "NOTICE": notice}),
        data_of("CC-BY-4.0"),
    ]
    licences = judge(parts, None, texts=texts)
    return hf.export(weights, recipe, tmp_path_factory.mktemp("exports") / "research", licences=licences), licences


def test_texts_and_notices_travel(research: tuple[Path, licence.Licences]) -> None:
    folder, _ = research
    read = lambda name: (folder / name).read_text()  # noqa: E731
    assert read("LICENSE").splitlines()[:3] == [
        "These weights are licensed under CC-BY-NC-4.0.",
        "CC-BY-NC-4.0: https://creativecommons.org/licenses/by-nc/4.0/",
        "For non-commercial research only (CC-BY-NC-4.0). Commercial use is not allowed: weights `model` is under "
        "CC-BY-NC-4.0.",
    ]
    assert read("LICENSE.Qwen2-72B-Instruct") == "the agreement\n"
    assert "Copyright (c) 2023 OpenGVLab" in read("LICENSE.InternViT-6B-448px-V1-5")
    repository = Path(__file__).parents[2] / "LICENSE"
    assert read("LICENSE.Apache-2.0") == repository.read_text()
    notice = read("NOTICE")
    for words in (
        TONGYI + "Reserved.",
        "* model: https://huggingface.co/nvidia/NVLM-D-72B\n  licence: CC-BY-NC-4.0, https://creativecommons.org",
        "  by NVIDIA",
        "They are modified files",
        "  text: LICENSE.Qwen2-72B-Instruct",
        "* captions: source not stated\n  licence: CC-BY-4.0",
        "---- NOTICE of Qwen/Qwen2-72B-Instruct ----\n\na notice",
        "For non-commercial research only",
    ):
        assert words in notice, words
    record = json.loads(read("provenance.json"))
    assert record["license"] == "CC-BY-NC-4.0" and record["research_only"] is True and "someone" not in read("NOTICE")
    assert record["parts"][0]["content"] == {"model.safetensors": "12ab"} and "path" not in record["parts"][0]
    assert json.loads(read("config.json"))["non_commercial_research"] == "CC-BY-NC-4.0"
    sums = read("SHA256SUMS")
    for name in ("LICENSE", "NOTICE", "provenance.json", "LICENSE.Qwen2-72B-Instruct"):
        assert f"  {name}\n" in sums


def test_the_mark_in_config_json_survives_transformers(research: tuple[Path, licence.Licences]) -> None:
    """Whoever loads the weights and saves them again keeps it, without knowing."""
    from nvlm_train.export.remote_code.configuration_nvlm_d import NVLM_D_Config

    config = NVLM_D_Config(**json.loads((research[0] / "config.json").read_text()))
    assert config.to_dict()["non_commercial_research"] == "CC-BY-NC-4.0"


def test_an_agreement_that_is_not_at_hand_is_asked_for(tmp_path: Path) -> None:
    licences = judge([weights_of(None, "Qwen/Qwen2-72B-Instruct")], None)
    licence.write(tmp_path, licences, {})
    assert "Missing: tongyi-qianwen asks for a copy of its text" in (tmp_path / "NOTICE").read_text()
    assert len(licence.lacking_in(tmp_path, licences)) == 1
    (tmp_path / "LICENSE.Qwen2-72B-Instruct").write_text("the agreement")
    assert licence.lacking_in(tmp_path, licences) == []


@pytest.mark.parametrize(
    ("label", "text"), [("Apache-2.0", "Apache License"), ("MIT", "MIT License\n\nCopyright (c) the authors of tiny")]
)
def test_the_text_of_the_label(tmp_path: Path, label: str, text: str) -> None:
    licence.write(tmp_path, judge([weights_of("MIT")], label), {"run_name": "tiny"})
    assert text in (tmp_path / "LICENSE").read_text()
    assert "Copyright (c) the authors of vision" in (tmp_path / "LICENSE.vision").read_text()


def test_verify_sees_that_a_mark_was_taken_off(
    tmp_path: Path, research: tuple[Path, licence.Licences], recipe: dict[str, Any], weights: MemoryWeights
) -> None:
    folder, _ = research
    assert licence.problems_of(folder) == []
    report = verify(folder, weights, recipe, logits=False)
    assert {check["name"]: check["ok"] for check in report["checks"]}["licences"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    card = (copy / "README.md").read_text()
    (copy / "README.md").write_text(card.replace("license: cc-by-nc-4.0", "license: apache-2.0"))
    assert licence.problems_of(copy) == ["README.md says license: apache-2.0, provenance.json demands cc-by-nc-4.0"]
    (copy / "README.md").write_text(card.replace("**For non-commercial research only", "**For all"))
    report = verify(copy, weights, recipe, logits=False)
    assert not report["ok"] and any("does not say at its top" in problem for problem in report["problems"])
    (copy / "README.md").write_text(card)
    config = json.loads((copy / "config.json").read_text())
    del config["non_commercial_research"]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "NOTICE").unlink()
    assert len(licence.problems_of(copy)) == 2
    (copy / "config.json").write_text("{,}")
    assert "config.json cannot be read (JSONDecodeError" in licence.problems_of(copy)[-1]
    record = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps(record | {"license": "MIT"}))
    assert "cannot be read" in licence.problems_of(copy)[0]


@pytest.mark.parametrize("removed", [(), ("provenance.json",), ("provenance.json", "README.md")])
def test_the_mark_stays_when_an_export_is_trained_on(
    tmp_path: Path, research: tuple[Path, licence.Licences], removed: tuple[str, ...]
) -> None:
    """init_from names the folder of an export, with no word of its licence: its record, its card or its config say."""
    copy = shutil.copytree(research[0], tmp_path / "export", ignore=shutil.ignore_patterns("*.safetensors", *removed))
    texts: dict[str, bytes] = {}
    for key in ("model", "vision"):
        parts = parts_of(make_recipe(Path("t"), **{f"init_from.{key}": {"path": str(copy)}}), texts=texts)
        found = judge(parts, None, texts=texts)
        assert found.research_only and found.label == "CC-BY-NC-4.0"
        with pytest.raises(CheckpointError, match=r"'Apache-2\.0' allows more"):
            judge(parts, "Apache-2.0")
        if not removed:  # all that is behind it, with the texts
            assert {part.source for part in parts} >= {NVLM, "Qwen/Qwen2-72B-Instruct"}
            assert parts[0].source == "tiny, an export of nvlm_train"
            doubled = judge([*parts, *(replace(part, path="elsewhere") for part in parts)], None)
            assert len(doubled.parts) == len(found.parts)  # of two stages, or of a run and an export
            licence.write(tmp_path, found, {})
            assert (tmp_path / "LICENSE.Qwen2-72B-Instruct").read_text() == "the agreement\n"


# -------------------------------------------------------------------------------------------------------------- push


class FakeHub:
    """The calls of huggingface_hub.HfApi that a push makes, with the arguments that the real ones take."""

    def __init__(self, there: list[str] | None = None, private: bool = True) -> None:
        self.there, self.private = there, private
        self.calls: list[tuple[str, str, dict[str, Any]]] = []

    def repo_info(self, repo: str, **given: Any) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        self.check("repo_info", repo, **given)
        if self.there is None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        return Namespace(private=self.private, siblings=[Namespace(rfilename=name) for name in self.there])

    def create_repo(self, repo: str, **given: Any) -> None:
        self.check("create_repo", repo, **given)
        self.calls.append(("create_repo", repo, given))

    def upload_folder(self, **given: Any) -> Any:
        self.check("upload_folder", **given)
        self.calls.append(("upload_folder", given["repo_id"], given))
        return Namespace(commit_url="https://huggingface.co/me/tiny/commit/1")

    def check(self, name: str, *positional: Any, **given: Any) -> None:
        from huggingface_hub import HfApi

        inspect.signature(getattr(HfApi, name)).bind(self, *positional, **given)


def test_a_push_says_what_goes_where_and_is_private(research: tuple[Path, licence.Licences]) -> None:
    folder, _ = research
    hub, said = FakeHub(), list[str]()
    done = push.push(folder, push.Target("me/tiny"), hub, lambda question: said.append(question) or "y", said.append)
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert done == {
        "repo": "me/tiny", "url": "https://huggingface.co/me/tiny/commit/1", "private": True,
        "files": len(list(folder.iterdir())), "bytes": total,
    }  # fmt: skip
    assert said[0] == f"push {folder} -> https://huggingface.co/me/tiny (private, a new repository)"
    assert "For non-commercial research only" in said[1]
    assert f"  {total:>16,}  bytes in {len(list(folder.iterdir()))} files" in said
    assert said[-2] == "Upload to me/tiny (private)? [y/N] "
    create, upload = hub.calls
    assert create == ("create_repo", "me/tiny", {"private": True, "repo_type": "model"})
    assert upload[2]["folder_path"] == folder and upload[2]["delete_patterns"] is None
    assert sorted(upload[2]["allow_patterns"]) == sorted(path.name for path in folder.iterdir())


def test_no_means_no_and_what_is_replaced_is_named(research: tuple[Path, licence.Licences]) -> None:
    hub, said = FakeHub([".gitattributes", "README.md", "model-00009-of-00009.safetensors"]), list[str]()
    for answer in ("", "n", "no", "maybe"):
        assert push.push(research[0], push.Target("me/tiny"), hub, lambda _, a=answer: a, said.append) is None  # type: ignore[misc]
    assert hub.calls == [] and said[-1] == "nothing was uploaded"
    assert f"  {'removed':>16}  model-00009-of-00009.safetensors" in said
    assert any(line.endswith("README.md  (replaced)") for line in said)
    push.push(research[0], push.Target("me/tiny", yes=True), hub, None, said.append)
    ((name, _, given),) = hub.calls
    assert name == "upload_folder" and given["delete_patterns"] == ["model-00009-of-00009.safetensors"]


def test_a_push_is_refused_where_it_would_show_more_than_asked(
    tmp_path: Path, research: tuple[Path, licence.Licences]
) -> None:
    folder, yes = research[0], {"yes": True}
    with pytest.raises(SetupError, match="exists and is public, and a push is private"):
        push.push(folder, push.Target("me/tiny", **yes), FakeHub([], private=False))
    with pytest.raises(SetupError, match="exists and is private; leave out --public"):
        push.push(folder, push.Target("me/tiny", public=True, **yes), FakeHub([]))
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("# mine\n")
    hub = FakeHub()
    with pytest.raises(CheckpointError, match="is not pushed"):
        push.push(copy, push.Target("me/tiny", **yes), hub)
    # a licence that nobody knows: private, not public
    shutil.copy(folder / "README.md", copy / "README.md")
    record = json.loads((copy / "provenance.json").read_text())
    record["parts"][-1]["license"] = "unknown"
    (copy / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"licence of data\.captions is unknown"):
        push.push(copy, push.Target("me/tiny", public=True, **yes), hub)
    assert hub.calls == []
    assert push.push(copy, push.Target("me/tiny", **yes), hub, None, lambda line: None) is not None
    record["parts"][-1]["license"] = "MIT"
    record["parts"][0]["found"] = ["CC-BY-NC-ND-4.0"]
    (copy / "provenance.json").write_text(json.dumps(record | {"license": "CC-BY-NC-ND-4.0"}))
    for name in ("README.md", "config.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(
            text.replace("cc-by-nc-4.0", "cc-by-nc-nd-4.0").replace("CC-BY-NC-4.0", "CC-BY-NC-ND-4.0")
        )
    with pytest.raises(CheckpointError, match=r"CC-BY-NC-ND-4\.0, which does not allow to pass on"):
        push.push(copy, push.Target("me/tiny", public=True, **yes), hub)


def test_a_failed_upload_says_how_to_go_on(research: tuple[Path, licence.Licences]) -> None:
    class Broken(FakeHub):
        def upload_folder(self, **given: Any) -> Any:
            raise OSError("connection reset")

    with pytest.raises(SetupError, match=r"OSError: connection reset; the export is complete, and the same command"):
        push.push(research[0], push.Target("me/tiny", yes=True), Broken(), None, lambda line: None)


def test_what_a_push_needs_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import huggingface_hub
    from huggingface_hub import constants

    with pytest.raises(SetupError, match="is no repository; write ORGANISATION/NAME"):
        push.open_hub(push.Target("tiny"))
    with pytest.raises(SetupError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
        push.open_hub(push.Target("me/tiny"))  # as all tests run
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SetupError, match="there is no token of the Hugging Face Hub"):
        push.open_hub(push.Target("me/tiny"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    with pytest.raises(SetupError, match="no terminal to confirm it on; add --yes"):
        push.open_hub(push.Target("me/tiny"), asks=False)
    assert push.open_hub(push.Target("me/tiny"), asks=True) is not None
    assert push.open_hub(push.Target("me/tiny", yes=True), asks=False) is not None
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SetupError, match="huggingface_hub, which is not installed"):
        push.open_hub(push.Target("me/tiny"))


def test_export_command_pushes_what_was_verified(
    tmp_path: Path,
    recipe: dict[str, Any],
    weights: MemoryWeights,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first line, --license, --push: before anything is written, after verification, and again after a failure."""
    checkpoint: Any = MemoryWeights(weights.tensors)
    checkpoint.recipe = {**recipe, "init_from": {"model": {"path": "nowhere", "source": NVLM}}}
    checkpoint.earlier_run = checkpoint.continued_from = checkpoint.parts = None
    checkpoint.step, checkpoint.state, checkpoint.identity = 12, {"recipe_hash": "abc"}, "a hash"
    checkpoint.checkpoint = Namespace(run=tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 1, "recipe": checkpoint.recipe}))
    monkeypatch.setattr("nvlm_train.checkpoint.open_checkpoint", lambda path, checksums: checkpoint)
    reports = [{"ok": False, "problems": ["values: wrong"]}, {"ok": True, "problems": []}, {"ok": True, "problems": []}]
    monkeypatch.setattr("nvlm_train.export.verify.verify", lambda *given: reports.pop(0))
    monkeypatch.setattr("nvlm_train.export.verify.print_report", lambda report, as_json: print(json.dumps(report)))

    def command(hub: Any, **given: Any) -> int:
        monkeypatch.setattr(push, "open_hub", lambda target: hub)
        flags = {"no_verify": False, "push": "me/tiny", "public": False, "yes": True, "json": False, **given}
        return hf.export_command(Namespace(run="runs/tiny", out=str(tmp_path / "out"), **flags))

    for wrong, words in (
        ({"no_verify": True}, "--push goes with verified exports alone"),
        ({"push": None, "public": True}, "--public has no meaning without --push"),
        ({"license": ["MIT", "Apache-2.0"]}, "--license names 2 licences of the export"),
        ({"license": ["data.a=MIT", "data.a=own"]}, "--license names 2 licences of data.a"),
        ({"license": [""]}, "license: '' cannot be the licence of weights"),
    ):
        with pytest.raises((SetupError, CheckpointError), match=words):
            command(FakeHub(), **wrong)
    with pytest.raises(CheckpointError, match=r"license: 'MIT' allows more than weights\.model does"):
        command(FakeHub(), license=["MIT"])
    assert not (tmp_path / "out").exists()

    hub = FakeHub()
    assert command(hub) == 1 and hub.calls == []  # not verified
    first, report = capsys.readouterr().out.splitlines()
    assert first.startswith("For non-commercial research only (CC-BY-NC-4.0). Commercial use is not allowed")
    assert json.loads(report)["research_only"] is True and "pushed" not in report
    with pytest.raises(CheckpointError, match="was exported with other licences"):
        command(hub, license=["CC-BY-NC-SA-4.0"])
    written = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    capsys.readouterr()
    assert command(hub, json=True) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pushed"]["private"] is True and err.startswith("For non-commercial research only")
    assert "bytes in" in err and [call[0] for call in hub.calls] == ["create_repo", "upload_folder"]
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == written
