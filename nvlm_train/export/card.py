"""The model card (README.md) of an export: what the weights are, what they came from, and under which licences.

Licences are taken from the recipe as recorded there and are never guessed: what is not stated is listed as not stated.
A part whose licence forbids commercial use is named in the first lines, and an export may not carry a licence that
says otherwise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from nvlm_train.errors import CheckpointError
from nvlm_train.recipe.schema import HUB_PATH, LORA_TARGETS

_RESEARCH_ONLY = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research", re.IGNORECASE)
_HUB_NAME = re.compile(
    r"^(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+(?<!\.py)(?<!\.sh))/?$"
)  # a script is no base model


_PARTS = {
    "nvlm_d": "An NVLM-D model (vision tower, projector and decoder)",
    "nvlm_x": "An NVLM-X model (vision tower, projector, gated cross-attention and decoder)",
    "nvlm_h": "An NVLM-H model (vision tower, projector, gated cross-attention and decoder)",
}


class Part(NamedTuple):
    """Something the weights derive from, as the recipe records it. kind: 'weights' or 'data'."""

    kind: str
    name: str
    license: str | None
    source: str | None


def parts_of(recipe: dict[str, Any], earlier_run: dict[str, Any] | None = None) -> list[Part]:
    """Weights and data named in a recipe (dictionary form), and those of the runs it started from, without repeats.

    earlier_run: what recipe.json recorded of the run behind `init_from.run`: {"path", "recipe", "earlier_run"}.
    CheckpointError when the recipe started from a run that is not recorded: its licences would be lost.
    """
    parts: list[Part] = []
    while True:
        init_from = recipe.get("init_from") or {}
        for name in ("model", "vision", "language_model"):
            if init_from.get(name):
                parts.append(Part("weights", name, init_from[name].get("license"), _source(init_from[name])))
        for name, source in ((recipe.get("data") or {}).get("mixture") or {}).items():
            parts.append(Part("data", name, source.get("license"), source.get("source")))
        run = init_from.get("run")
        if not run:
            return list(dict.fromkeys(parts))
        parts.append(Part("weights", "run", run.get("license"), run.get("source") or Path(run["path"]).name))
        if earlier_run is None:
            raise CheckpointError(
                f"init_from.run {run['path']!r} is not recorded in the run's recipe.json, so the licences behind it "
                "are not known; start the run once more with this version of nvlm_train, it records them"
            )
        recipe, earlier_run = earlier_run["recipe"], earlier_run.get("earlier_run")


def _source(weights: dict[str, Any]) -> str | None:
    """Where weights come from: as stated, else the repository of an hf:// path."""
    found = HUB_PATH.fullmatch(str(weights.get("path")))
    stated: str | None = weights.get("source")
    return stated or (found["repo"] if found else None)


def is_research_only(license: str | None) -> bool:
    """Whether a licence's name says that commercial use is not allowed: `CC-BY-NC-4.0`, `research-only`."""
    return license is not None and _RESEARCH_ONLY.search(license) is not None


def license_of(recipe: dict[str, Any], parts: list[Part]) -> str | None:
    """The licence the export may state: the recipe's own, else that of research-only weights, else None (not stated).

    CheckpointError when the recipe states one that allows more than the weights it started from.
    """
    stated: str | None = recipe.get("license")
    restricted = [part for part in parts if part.kind == "weights" and is_research_only(part.license)]
    if stated is not None and restricted and not is_research_only(stated):
        part = restricted[0]
        raise CheckpointError(
            f"recipe key license: {stated!r} allows more than init_from.{part.name}.license {part.license!r} does; "
            f"weights derived from research-only weights stay research-only: state {part.license!r}"
        )
    return stated if stated is not None else (restricted[0].license if restricted else None)


def model_card(
    recipe: dict[str, Any],
    *,
    step: int | None,
    recipe_hash: str | None,
    dtype: str,
    earlier_run: dict[str, Any] | None = None,
    continued_from: dict[str, Any] | None = None,
    num_dummy_heads: int = 7,
) -> str:
    """README.md of an export, with the metadata the Hub reads at its head. earlier_run: see `parts_of`.

    num_dummy_heads: how many heads are stored behind the tower's real ones.

    continued_from: what recipe.json recorded of the run that this one went on from, and the data it skips.
    """
    parts = parts_of(recipe, earlier_run)
    license = license_of(recipe, parts)
    research = [part for part in parts if is_research_only(part.license)]
    name = str(recipe.get("run_name", "model"))
    bases = [match.group(1) for part in parts if part.source and (match := _HUB_NAME.match(part.source))
             if part.kind == "weights"]  # fmt: skip
    spdx = license is not None and re.fullmatch(r"[A-Za-z0-9.+-]+", license) is not None
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    head += [f"license: {license.lower()}"] if license is not None and spdx else ["license: other"]
    if not spdx:
        head += [f"license_name: {json.dumps(license or 'not-stated')}"]
    if bases:
        head += ["base_model:"] + [f"- {base}" for base in dict.fromkeys(bases)]
    architecture = (recipe.get("model") or {}).get("architecture", "nvlm_d")
    head += ["tags:", "- nvlm", f"- {architecture}", "- nvlm_train", "---", ""]

    body = [f"# {name}", ""]
    if research:
        body += [
            "**Research only. Commercial use is not allowed**: "
            + "; ".join(f"{part.kind} `{part.name}` is under {part.license}" for part in research)
            + ".",
            "",
        ]
    body += [
        _PARTS[architecture]
        + " trained with nvlm_train. "
        + (
            "The layout is that of the published NVLM-D-72B: the tower's attention is stored with "
            f"{num_dummy_heads} all-zero heads behind the real ones."
            if num_dummy_heads
            else "The tower is stored without the dummy heads of the published NVLM-D-72B; transformers loads it, "
            "serving programs that know NVLM-D do not."
        ),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoProcessor",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
        'processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)',
        'inputs = processor("What is this?", images=[image])',
        "print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
        "",
        "## Training",
        "",
        f"- recipe hash: {recipe_hash or 'not recorded'}",
        f"- steps: {'not recorded' if step is None else step} of {_length(recipe)}, {_step(recipe)} each",
        "- trained: " + _trained(recipe),
        *_continued(continued_from),
        f"- weights exported as: {dtype}",
        "",
        "## What it derives from",
        "",
        "| kind | part | licence | source |",
        "|---|---|---|---|",
    ]
    body += [
        f"| {part.kind} | {part.name} | {part.license or 'not stated in the recipe'} | {part.source or 'not stated'} |"
        for part in parts
    ]
    body += ["", f"Licence of these weights: {license or 'not stated; the parts above set the terms'}.", ""]
    return "\n".join(head + body)


def _length(recipe: dict[str, Any]) -> str:
    """The run's length as the recipe gives it; a number alone is one of steps."""
    if recipe.get("max_steps") is not None:
        return str(recipe["max_steps"])
    given = [name for name in ("max_samples", "max_tokens", "num_epochs") if recipe.get(name) is not None]
    return f"a run of {given[0]} {recipe[given[0]]}" if given else "not recorded"


def _continued(found: dict[str, Any] | None) -> list[str]:
    """A line for each run that this one went on from, the latest first."""
    lines = []
    while found is not None:
        place = Path(found["path"])
        skipped = ", ".join(f"{first} to {last}" for first, last in found["skip_steps"])
        lines.append(
            f"- went on from step {found['step']} of `{place.parent.name}` (recipe hash {found['recipe_hash']})"
            + (f", never drawing the data of steps {skipped}" if skipped else "")
        )
        found = found.get("continued_from")
    return lines


def _step(recipe: dict[str, Any]) -> str:
    batch = recipe.get("global_batch") or {}
    if batch.get("packs") is not None:
        return f"{batch['packs']} packs"
    return f"{batch.get('samples', 'an unrecorded number of')} samples"


def _trained(recipe: dict[str, Any]) -> str:
    train = recipe.get("train") or {}
    modes = {module: mode for module, mode in train.items() if module in LORA_TARGETS}
    return ", ".join(f"{module} {mode}" for module, mode in modes.items()) or "not recorded"
