"""Which licence an export may carry, and the texts and notices that it must bring along.

Our reading, not legal advice: a licence asks for conditions (non-commercial use, no derivatives, share-alike, terms of
its own), and the label of an export must keep those of every base weight; of data it must keep non-commercial use.
Attribution is kept whatever the label, by NOTICE, LICENSE and the model card.

Licences are SPDX identifiers or expressions, a `LicenseRef-NAME`, or one of `NAMED`. `unknown` says that nobody knows;
nothing is assumed where nothing is said.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nvlm_train import provenance
from nvlm_train.errors import CheckpointError
from nvlm_train.log import get_logger
from nvlm_train.provenance import RECORD, RESEARCH_KEY, Part
from nvlm_train.recipe.licences import NAMED, OWN, UNKNOWN, canonical

if TYPE_CHECKING:
    from nvlm_train.checkpoint import CheckpointWeights

log = get_logger(__name__)

RESEARCH = "non-commercial research"
CONFIGS = ("config.json", "adapter_config.json")  # where a program reads that weights are for research only
FILES = ("LICENSE", "NOTICE", RECORD)  # of every export; texts of single works are LICENSE.NAME
_NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research", re.IGNORECASE)
_SHARE_ALIKE = re.compile(r"-sa(-|$)|^(a|l)?gpl(-|$)|^odbl(-|$)|^cdla-sharing", re.IGNORECASE)
_NO_DERIVATIVES = re.compile(r"-nd(-|$)", re.IGNORECASE)
_VERSION = re.compile(r"-\d+(\.\d+)*(-only|-or-later)?\+?$", re.IGNORECASE)


# what the Hub takes as `license:`; anything else is `other` with a name and a link
HUB_LICENCES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 artistic-2.0 "
    "bsl-1.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 "
    "cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 "
    "epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 isc lppl-1.3c ms-pl mpl-2.0 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown".split()
)
MIT = """MIT License

{copyright}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


class Base(NamedTuple):
    """A published checkpoint: its licence, who is to be named, and what it is made of itself."""

    license: str
    copyright: str
    made_of: tuple[str, ...] = ()


BASES = {
    "nvidia/NVLM-D-72B": Base(
        "CC-BY-NC-4.0", "NVIDIA", ("Qwen/Qwen2-72B-Instruct", "OpenGVLab/InternViT-6B-448px-V1-5")
    ),
    "Qwen/Qwen2-72B": Base("tongyi-qianwen", "Copyright (c) Alibaba Cloud"),
    "Qwen/Qwen2-72B-Instruct": Base("tongyi-qianwen", "Copyright (c) Alibaba Cloud"),
    "OpenGVLab/InternViT-6B-448px-V1-5": Base("MIT", "Copyright (c) 2023 OpenGVLab"),
    "OpenGVLab/InternViT-300M-448px": Base("MIT", "Copyright (c) 2023 OpenGVLab"),
    "NousResearch/Nous-Hermes-2-Yi-34B": Base("Apache-2.0", "NousResearch"),
}
_HUB_NAME = re.compile(
    r"^(?:https?://huggingface\.co/)?(?:datasets/)?(\w[\w.-]*/\w[\w.-]*(?<!\.py)(?<!\.sh))/?$"
)  # a script is no base model


def hub_name(source: str | None) -> str | None:
    """`organisation/name` of a source that is a repository of the Hub, or its page."""
    found = _HUB_NAME.match(source) if source else None
    return found[1] if found else None


def _base_of(part: Part) -> tuple[str, Base] | None:
    name = (hub_name(part.source) or "").lower()
    return next(((known, base) for known, base in BASES.items() if known.lower() == name), None)


# ---------------------------------------------------------------------------------------------- what a licence asks for


def _identifiers(licence: str) -> list[str]:
    """The single licences of an expression; an exception behind WITH takes nothing away here."""
    words = re.sub(r"\bWITH\s+\S+", " ", licence).replace("(", " ").replace(")", " ").split()
    return [word for word in words if word not in ("AND", "OR")]


def is_research_only(licence: str | None) -> bool:
    """Whether a licence says that commercial use is not allowed: `CC-BY-NC-4.0`, `qwen-research`."""
    if licence is None:
        return False
    named = NAMED.get(licence.lower())
    return (named is not None and named.research) or _NON_COMMERCIAL.search(licence) is not None


def conditions(licence: str) -> frozenset[str]:
    """What a licence asks of whoever passes on what was made from it, beside naming the authors."""
    found: set[str] = set()
    for one in _identifiers(licence):
        if is_research_only(one):
            found.add("non-commercial")
        if _NO_DERIVATIVES.search(one):
            found.add("no-derivatives")
        if _SHARE_ALIKE.search(one):
            found.add(f"share-alike {_family(one)}")
        if (one in NAMED or one.startswith("LicenseRef-")) and not is_research_only(one):
            found.add(f"terms of {one}")
    return frozenset(found)


def _family(one: str) -> str:
    """A later version of a share-alike licence keeps the condition: CC-BY-SA."""
    return _VERSION.sub("", one).upper()


def kept(condition: str, label: str) -> bool:
    """Whether a licence keeps a condition. Terms of their own are also kept by one that forbids commercial use, which
    allows less; the terms themselves travel in any case. A choice (OR) keeps nothing."""
    if " OR " in label:
        return False
    have = conditions(label)
    if condition.startswith("terms of "):
        return condition in have or "non-commercial" in have
    return condition in have


def demands(part: Part) -> Iterator[tuple[str, str]]:
    """(licence, condition) of all that a part asks of the label; data asks for no more than non-commercial use."""
    for name in part.licences:
        licence = canonical(name) or name
        for condition in sorted(conditions(licence)):
            if part.kind == "weights" or condition == "non-commercial":
                yield licence, condition


# ---------------------------------------------------------------------------------------------------- judging an export


@dataclass(frozen=True)
class Licences:
    """label: the licence of an export; None: not stated and nothing demands one. parts: all that it derives from.

    texts: licence texts by SHA-256, as far as they are at hand.
    """

    label: str | None
    parts: tuple[Part, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def research_only(self) -> bool:
        return self.label is not None and "non-commercial" in conditions(self.label)

    @property
    def research_parts(self) -> list[tuple[Part, str]]:
        """Parts that forbid commercial use, each with the licence that does."""
        found = []
        for part in self.parts:
            named = [licence for licence, condition in demands(part) if condition == "non-commercial"]
            found += [(part, licence) for licence in named[:1]]
        return found

    @property
    def unknown(self) -> list[Part]:
        """Parts whose licence nobody knows, as the recipe says."""
        return [part for part in self.parts if UNKNOWN in map(canonical, part.licences)]

    def lacking(self) -> dict[tuple[str, ...], str]:
        """Texts that must travel with the weights and are not at hand: the files that could hold it, and why."""
        under: dict[str, list[Part]] = {}
        for part in self.parts:
            named = [one for name in part.licences for one in _identifiers(canonical(name) or name)]
            if part.kind == "weights" and not part.recorded:
                for one in dict.fromkeys(one for one in named if one in NAMED and NAMED[one].copy):
                    under.setdefault(one, []).append(part)
        found = {}
        for one, parts in under.items():
            if not any(digest in self.texts for part in parts for digest in part.texts.values()):
                names = tuple(f"LICENSE.{_short(part)}" for part in parts)
                found[names] = (
                    f"{one} asks for a copy of its text with the weights, and none lay beside {parts[0].key}: put it "
                    f"into the export as {names[0]} ({link_of(one)})"
                )
        return found

    def warning(self) -> str | None:
        """The first line of everything that is said of research-only weights."""
        if not self.research_only:
            return None
        named = "; ".join(f"{part.kind} `{part.name}` is under {licence}" for part, licence in self.research_parts)
        return f"For {RESEARCH} only ({self.label}). Commercial use is not allowed" + (f": {named}." if named else ".")


def judge(
    parts: Sequence[Part],
    stated: str | None,
    more: Mapping[str, str] | None = None,
    texts: Mapping[str, bytes] | None = None,
) -> Licences:
    """The licence of an export: `stated`, if it keeps what all parts ask for; else the one they ask for.

    more: {part: licence} where the recipe states none, as `--license` gives it; a part is `weights.vision`,
    `data.captions`, or a pattern: `data.*`. Raises CheckpointError with every part whose licence is missing or not
    known, and where `stated` allows more than a part does.
    """
    problems: list[str] = []
    parts = _with_known_bases(_filled_in(parts, more or {}, problems))
    for part in parts:
        names = [canonical(name) for name in part.licences]
        if not names and not part.recorded:
            problems.append(
                f"{part.key} ({part.source or part.path or 'no source'}) has no licence: state {_where(part)}"
            )
        elif part.license and names[0] is None:
            problems.append(f"{part.key}: {part.license!r} is no licence that is known here: {_how(part)}")
        elif names and not any(names):
            problems.append(f"{part.key}: its folder says {part.found[0]!r}, which is not known here: {_how(part)}")
        if part.license and (more_asked := _asked(part.found) - _asked([part.license])):
            log.warning(
                "%s: the recipe says %s, but it is also under %s (%s), which is kept", part.key, part.license,
                " and ".join(part.found), ", ".join(sorted(more_asked)),
            )  # fmt: skip
    label = canonical(stated) if stated is not None else None
    if stated is not None and (label is None or label in (UNKNOWN, OWN)):
        problems.append(
            f"license: {stated!r} cannot be the licence of weights; write an SPDX identifier such as Apache-2.0, "
            f"LicenseRef-NAME for terms of your own, or one of {', '.join(NAMED)}"
        )
    elif label is not None:
        problems += _too_weak(label, parts)
        problems += [
            f"license: {stated!r} cannot be stated while the licence of {part.key} is unknown; leave it out"
            for part in parts
            if part.kind == "weights" and UNKNOWN in map(canonical, part.licences)
        ]
    if problems:
        raise CheckpointError(
            "the export's licences are not in order:\n  "
            + "\n  ".join(problems)
            + "\nFor a run that is trained already: "
            "export --license PART=LICENCE (--license data.captions=CC-BY-4.0) fills in what its recipe does not say, "
            "--license LICENCE states that of the export"
        )
    return Licences(label or _asked_for(parts), _once(parts), dict(texts or {}))


def _once(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same data of two stages, or of a run and an export, is one part wherever it lay."""
    found: dict[tuple[Any, ...], Part] = {}
    for part in parts:
        key = (part.key, tuple(map(canonical, part.licences)), part.source, *sorted(part.content.items()))
        if key not in found or (part.texts and not found[key].texts):
            found[key] = part
    return tuple(found.values())


def of_run(checkpoint: CheckpointWeights, stated: str | None = None, more: Mapping[str, str] | None = None) -> Licences:
    """The licences of a run's export, by what the run recorded. stated, more: see `judge`; default the recipe's."""
    content = {"recipe": checkpoint.recipe, "earlier_run": checkpoint.earlier_run, "parts": checkpoint.parts}
    parts = provenance.parts_of_run(content)
    texts = provenance.read_texts(checkpoint.checkpoint.run, parts)
    if stated is None:  # an empty --license was stated as well, and must not fall back to the recipe's
        stated = checkpoint.recipe.get("license")
    return judge(parts, stated, more, texts)


def _asked(names: Iterable[str]) -> frozenset[str]:
    return frozenset(condition for name in names for condition in conditions(canonical(name) or name))


def unjudged(recipe: Mapping[str, Any]) -> Licences:
    """For an export that nobody keeps: made to load a run, and deleted again."""
    return Licences(recipe.get("license"), ())


def _filled_in(parts: Sequence[Part], more: Mapping[str, str], problems: list[str]) -> list[Part]:
    found = list(parts)
    for key, licence in more.items():
        those = [n for n, part in enumerate(found) if fnmatch.fnmatchcase(part.key, key)]
        if not those:
            there = ", ".join(dict.fromkeys(part.key for part in parts))
            problems.append(f"--license {key}={licence}: there is no such part; there are {there}")
        for n in those:
            known, same = found[n].license, canonical(licence) or licence
            if known is None or canonical(known) in (None, UNKNOWN):
                found[n] = replace(found[n], license=licence)
            elif canonical(known) != same and found[n].key == key:  # a pattern fills in what is missing
                problems.append(f"--license {key}={licence}: the run's recipe states {known}, which stands")
    return found


def _with_known_bases(parts: Iterable[Part]) -> list[Part]:
    """What is known of published checkpoints is added to what the recipe states of them."""
    found: list[Part] = []
    for part in parts:
        known = _base_of(part) if part.kind == "weights" else None
        if known is not None:
            said = {canonical(name) for name in part.licences}
            part = replace(part, found=(*part.found, *({known[1].license} - said)))
        found.append(part)
        for source in known[1].made_of if known is not None else ():
            behind = Part("weights", f"{part.name}/{source.split('/')[1]}", BASES[source].license, source)
            found += [] if any(one.source == source for one in parts) else [behind]
    return provenance.union(found)


def _where(part: Part) -> str:
    key = f"data.mixture.{part.name}.license" if part.kind == "data" else f"init_from.{part.name}.license"
    own = f"; {OWN}: made by yourselves" if part.kind == "data" else ""
    return f"{key} in the recipe ({UNKNOWN}: nobody knows{own})"


def _how(part: Part) -> str:
    return (
        f"write an SPDX identifier such as CC-BY-4.0, LicenseRef-NAME for another licence, one of {', '.join(NAMED)}, "
        f"or {UNKNOWN}, in {_where(part).split(' ')[0]}"
    )


def _too_weak(label: str, parts: Sequence[Part]) -> list[str]:
    problems = []
    for part in parts:
        for licence, condition in demands(part):
            if not kept(condition, label):
                problems.append(
                    f"license: {label!r} allows more than {part.key} does, which is under {licence} ({condition}); "
                    f"state {licence}, or leave it out"
                )
    return list(dict.fromkeys(problems))


def _asked_for(parts: Sequence[Part]) -> str | None:
    """The licence that the parts ask for: one of theirs that keeps what all demand, else all of those together."""
    asked = [(licence, condition) for part in parts for licence, condition in demands(part)]
    licences = sorted(dict.fromkeys(licence for licence, _ in asked), key=lambda one: -len(conditions(one)))
    for licence in licences:
        if all(kept(condition, licence) for _, condition in asked):
            return licence
    return " AND ".join(f"({one})" if " OR " in one else one for one in licences) or None


# ------------------------------------------------------------------------------------------------------ what is written


def link_of(licence: str) -> str | None:
    """Where the text of a single licence stands."""
    if licence in NAMED:
        return NAMED[licence].link
    creative = re.fullmatch(r"CC-(BY[A-Z-]*)-(\d\.\d)", licence)
    if creative:
        return f"https://creativecommons.org/licenses/{creative[1].lower()}/{creative[2]}/"
    if licence in (UNKNOWN, OWN) or licence.startswith("LicenseRef-") or " " in licence:
        return None
    return f"https://spdx.org/licenses/{licence}.html"


def metadata(licences: Licences) -> dict[str, str]:
    """license, license_name and license_link, as the Hub takes them."""
    label = licences.label
    if label is None:
        if any(part.kind == "weights" for part in licences.unknown):
            return {"license": "unknown"}
        return {"license": "other", "license_name": "not-stated", "license_link": "LICENSE"}
    if label.lower() in HUB_LICENCES:
        return {"license": label.lower()}
    name = re.sub(r"[^a-z0-9.-]+", "-", label.lower()).strip("-")
    return {"license": "other", "license_name": name, "license_link": link_of(label) or "LICENSE"}


def apache() -> str:
    """The text of Apache-2.0."""
    return Path(__file__).with_name("texts").joinpath("Apache-2.0.txt").read_text(encoding="utf-8")


def write(folder: Path, licences: Licences, about: Mapping[str, Any]) -> None:
    """LICENSE, NOTICE, provenance.json and LICENSE.NAME for texts of single works, into an export's folder.

    about: run_name, step and recipe_hash.
    """
    texts = _texts(licences)
    for name, text in {"LICENSE": _license(licences, texts, about), **texts}.items():
        (folder / name).write_bytes(text)
    (folder / "NOTICE").write_text(_notice(licences, texts, about), encoding="utf-8")
    record = {
        "format": provenance.FORMAT,
        "license": licences.label,
        "research_only": licences.research_only,
        **about,
        "parts": [provenance.as_record(part, with_path=False) for part in licences.parts],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _texts(licences: Licences) -> dict[str, bytes]:
    """LICENSE.NAME of every text at hand, each once. Apache-2.0 always: the code that travels with the weights is."""
    found = {_apache_file(licences): apache().encode()}
    seen = {hashlib.sha256(text).hexdigest() for text in found.values()}
    for part in licences.parts:
        if part.recorded or part.kind != "weights":
            continue
        own = False
        for file, digest in part.texts.items():
            if digest in licences.texts and not file.upper().startswith("NOTICE"):
                own = True
                if digest not in seen:
                    ending = "" if Path(file).stem.upper() in ("LICENSE", "LICENCE") else f".{_plain(Path(file).name)}"
                    found[_free(f"LICENSE.{_short(part)}{ending}", found)] = licences.texts[digest]
                    seen.add(digest)
        if not own and "MIT" in map(canonical, part.licences):
            known = _base_of(part)
            line = known[1].copyright if known else f"Copyright (c) the authors of {part.source or part.name}"
            found[_free(f"LICENSE.{_short(part)}", found)] = MIT.format(copyright=line).encode()
    return found


def _apache_file(licences: Licences) -> str:
    return "LICENSE" if licences.label == "Apache-2.0" else "LICENSE.Apache-2.0"


def _short(part: Part) -> str:
    name = hub_name(part.source)
    return _plain(name.split("/")[1] if name else part.name)


def _plain(text: str) -> str:
    """For the name of a file: it may come from anybody's record."""
    return re.sub(r"[^\w.-]+", "-", text)


def _free(name: str, taken: Mapping[str, bytes]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}.{number}"
    return found


def _license(licences: Licences, texts: Mapping[str, bytes], about: Mapping[str, Any]) -> bytes:
    """The text of the label where it is at hand, else its name and where it stands."""
    label = licences.label
    if label == "Apache-2.0":
        return texts["LICENSE"]
    if label == "MIT":
        return MIT.format(copyright=f"Copyright (c) the authors of {about.get('run_name') or 'these weights'}").encode()
    for part in licences.parts:  # a base's own copy of the same licence
        if part.kind == "weights" and not part.recorded and list(map(canonical, part.licences)) == [label]:
            for file, digest in part.texts.items():
                if Path(file).stem.upper() in ("LICENSE", "LICENCE") and digest in licences.texts:
                    return licences.texts[digest]
    if label is None:
        lines = ["No licence is stated for these weights. The terms of what they derive from apply, see NOTICE."]
    else:
        lines = [f"These weights are licensed under {label}."]
        lines += [f"{one}: {link_of(one) or 'see NOTICE'}" for one in _identifiers(label)]
        lines += [licences.warning() or "", "What they derive from keeps its own terms, see NOTICE."]
    return ("\n".join(line for line in lines if line) + "\n").encode()


def _notice(licences: Licences, texts: Mapping[str, bytes], about: Mapping[str, Any]) -> str:
    weights = [part for part in licences.parts if part.kind == "weights"]
    data = [part for part in licences.parts if part.kind == "data"]
    lines = [f"{about.get('run_name') or 'These weights'}: weights trained with nvlm_train.", ""]
    lines += [licences.warning() or "", ""] if licences.research_only else []
    code = f"The Python files in this folder are part of nvlm_train, under Apache-2.0 ({_apache_file(licences)})."
    lines += [code, ""]
    if weights:
        lines += [
            "The safetensors files were made by changing (training further, joining, renaming, converting) the works "
            "below. They are modified files; none of their authors endorses the result.",
            "",
        ]
    for part in weights:
        if not part.recorded or (part.licences and part.name != "run"):  # a run of ours is no work of others
            lines += [*_entry(part, texts, licences), ""]
    if data:
        lines += ["They were trained on:", ""]
        for part in data:
            lines += [*_entry(part, {}, licences)]
        lines.append("")
    lines += [line for missing in licences.lacking().values() for line in (f"Missing: {missing}", "")]
    for part in weights:
        for file, digest in part.texts.items():
            if file.upper().startswith("NOTICE") and digest in licences.texts and not part.recorded:
                text = licences.texts[digest].decode("utf-8", "replace").strip()
                lines += [f"---- {file} of {part.source or part.name} ----", "", text, ""]
    return "\n".join(lines).rstrip() + "\n"


def _entry(part: Part, texts: Mapping[str, bytes], licences: Licences) -> list[str]:
    name = hub_name(part.source)
    where = f"https://huggingface.co/{'datasets/' if part.kind == 'data' else ''}{name}" if name else part.source
    lines = [f"* {part.name}: {where or 'source not stated'}"]
    for licence in dict.fromkeys(canonical(one) or one for one in part.licences):
        link = link_of(licence)
        lines.append(f"  licence: {licence}" + (f", {link}" if link else ""))
        notices = [NAMED[one].notice for one in _identifiers(licence) if one in NAMED]
        lines += [f"  {notice}" for notice in notices if notice]
    known = _base_of(part) if part.kind == "weights" else None
    lines += [f"  by {known[1].copyright}"] if known else []
    short = f"LICENSE.{_short(part)}"
    files = [file for file in texts if file == short or file.startswith(short + ".")]
    if not files and part.kind == "weights" and "Apache-2.0" in map(canonical, part.licences):
        files = [_apache_file(licences)]
    return [*lines, *(f"  text: {file}" for file in files)]


@dataclass(frozen=True)
class Record(Licences):
    """The licences that an export's provenance.json tells."""

    run_name: str = ""
    step: int | None = None


def read_record(folder: Path) -> Record:
    """provenance.json of an export. Raises CheckpointError where it cannot be read."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        parts = tuple(provenance.from_record(part) for part in content["parts"])
        label = content["license"]
        if content["research_only"] != Licences(label, parts).research_only:
            raise ValueError(f"research_only is {content['research_only']}, the licence {label}")
        return Record(label, parts, run_name=str(content.get("run_name")), step=content.get("step"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / RECORD} cannot be read ({type(error).__name__}: {error}); export again"
        ) from None


def require_same(folder: Path, licences: Licences) -> None:
    """Raises CheckpointError where an export was written with other licences than those that hold now."""
    record = read_record(folder)
    then, now = ([(part.key, part.licences) for part in one.parts] for one in (record, licences))
    if record.label != licences.label or then != now:
        raise CheckpointError(
            f"{folder} was exported with other licences than the run has now; export into a new folder"
        )


def lacking_in(folder: Path, record: Licences) -> list[str]:
    """Texts that must travel with an export and are not in its folder; whoever adds one puts it there."""
    return [why for names, why in record.lacking().items() if not any((folder / name).is_file() for name in names)]


def problems_of(folder: Path, *, passed_on: bool = False) -> list[str]:
    """What is wrong with an export's licence files and with what its card and config.json say of them.

    passed_on: the card must state the licence; at home people may write another card, as long as it does not say
    another licence or leaves out that weights are for research only.
    """
    try:
        record = read_record(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [f"{name} is missing" for name in FILES if not (folder / name).is_file()]
    if record.label is not None:
        problems += _too_weak(record.label, record.parts)
    stated = provenance.metadata_of_card(folder / "README.md")
    for key, value in metadata(record).items():
        if stated.get(key) != value and (key in stated or passed_on or record.research_only):
            problems.append(f"README.md says {key}: {stated.get(key)}, {RECORD} demands {value}")
    if record.research_only:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace") if stated else ""
        if RESEARCH not in card.split("---\n", 2)[-1][:1000].lower():
            problems.append(f"README.md does not say at its top that the weights are for {RESEARCH} only")
        file = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
        try:
            config = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        except (OSError, ValueError) as error:
            return [*problems, f"{file} cannot be read ({type(error).__name__}: {error}); export again"]
        if config.get(RESEARCH_KEY) != record.label:
            problems.append(f"config: {RESEARCH_KEY} is {config.get(RESEARCH_KEY)!r}, not {record.label!r}")
    return problems
