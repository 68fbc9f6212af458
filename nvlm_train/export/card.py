"""The model card (README.md) of an export: what the weights are, how they were trained, what they derive from.

Licences are those that `licence.py` has judged. Where they forbid commercial use, the first lines say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nvlm_train.export import licence
from nvlm_train.export.licence import Licences
from nvlm_train.recipe.licences import canonical
from nvlm_train.recipe.schema import HUB_PATH, LORA_TARGETS

if TYPE_CHECKING:
    from nvlm_train.checkpoint import CheckpointWeights

_PARTS = {
    "nvlm_d": "An NVLM-D model (vision tower, projector and decoder)",
    "nvlm_x": "An NVLM-X model (vision tower, projector, gated cross-attention and decoder)",
    "nvlm_h": "An NVLM-H model (vision tower, projector, gated cross-attention and decoder)",
}
_PLACES = ("path", "image_root", "index_dir", "output_dir")  # keys of a recipe that tell of a machine
_ASIDE = ("log", "distributed", "debug")  # sections that say nothing of the weights
_CROSSING = "cross_attention"
_TAIL = 2**22  # bytes of metrics.jsonl that are looked at
_USE = """```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
inputs = processor("What is this?", images=[image])
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""
_USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("BASE", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "FOLDER")
```"""


@dataclass(frozen=True)
class Training:
    """What a run recorded of itself.

    progress: of state.json. losses: the last lines of metrics.jsonl with a loss and with a validation, by kind.
    attempts: of recipe.json.
    """

    step: int | None = None
    recipe_hash: str | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attempts: tuple[Mapping[str, Any], ...] = ()
    earlier_run: Mapping[str, Any] | None = None
    continued_from: Mapping[str, Any] | None = None


def identity(recipe: Mapping[str, Any], training: Training) -> dict[str, Any]:
    """Which run and step an export is of, for provenance.json and NOTICE."""
    return {"run_name": recipe.get("run_name"), "recipe_hash": training.recipe_hash, "step": training.step}


def training_of(checkpoint: CheckpointWeights) -> Training:
    """What the run behind a checkpoint recorded up to it."""
    from nvlm_train.checkpoint import read_json

    run = checkpoint.checkpoint.run
    content = read_json(run / "recipe.json")
    return Training(
        step=checkpoint.step,
        recipe_hash=checkpoint.state.get("recipe_hash"),
        progress=checkpoint.state.get("progress", {}),
        losses=_last_losses(run / "metrics.jsonl", checkpoint.step),
        attempts=tuple(content.get("attempts", ())),
        earlier_run=checkpoint.earlier_run,
        continued_from=checkpoint.continued_from,
    )


def _last_losses(file: Path, step: int) -> dict[str, dict[str, Any]]:
    """The last record of training and of validation up to a step; a file that is not there or damaged gives none."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL))
            lines = stream.read().splitlines()
    except OSError:
        return found
    for line in reversed(lines):
        try:
            record = json.loads(line)
            kind = "validation" if "validation" in record else "loss"
            if kind in record and record["step"] <= step:
                found.setdefault(kind, record)
        except (ValueError, KeyError, TypeError):
            continue
        if len(found) == 2:
            break
    return found


def model_card(
    recipe: dict[str, Any],
    licences: Licences,
    training: Training | None = None,
    *,
    dtype: str,
    num_dummy_heads: int | None = 7,
    adapter: bool = False,
) -> str:
    """README.md of an export, with the metadata the Hub reads at its head.

    num_dummy_heads: how many heads are stored behind the tower's real ones. adapter: a peft folder.
    """
    training = training or Training()
    name = str(recipe.get("run_name", "model"))
    architecture = (recipe.get("model") or {}).get("architecture", "nvlm_d")
    head = _metadata(licences, architecture, adapter)
    body = [f"# {name}", ""]
    warning = licences.warning()
    if warning:
        body += [f"**{warning}**", ""]
    body += [_what(architecture, num_dummy_heads, adapter), "", _USE_ADAPTER if adapter else _USE, ""]
    body += ["## Training", "", *_training(recipe, training, dtype), ""]
    body += _tokens(training)
    body += _recipe(recipe)
    body += ["## What it derives from", "", *_derivation(licences), ""]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(body)


def _metadata(licences: Licences, architecture: str, adapter: bool) -> dict[str, Any]:
    """The card's head: keys and values as the Hub takes them."""
    bases = [licence.hub_name(part.source) for part in licences.parts if part.kind == "weights"]
    data = [licence.hub_name(part.source) for part in licences.parts if part.kind == "data"]
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    head |= {"pipeline_tag": "image-text-to-text", **licence.metadata(licences)}
    for key, names in (("base_model", bases), ("datasets", data)):
        if named := [name for name in dict.fromkeys(names) if name]:
            head[key] = named
    head["tags"] = ["nvlm", architecture, "nvlm_train", *(["lora"] if adapter else [])]
    if licences.research_only:
        head["tags"].append(licence.RESEARCH.replace(" ", "-"))
    return head


def _what(architecture: str, num_dummy_heads: int | None, adapter: bool) -> str:
    if adapter:
        return f"LoRA adapters of {_PARTS[architecture][0].lower()}{_PARTS[architecture][1:]}, trained with nvlm_train."
    return _PARTS[architecture] + " trained with nvlm_train. " + (
        "The layout is that of the published NVLM-D-72B: the tower's attention is stored with "
        f"{num_dummy_heads} all-zero heads behind the real ones."
        if num_dummy_heads
        else "The tower is stored without the dummy heads of the published NVLM-D-72B; transformers loads it, "
        "serving programs that know NVLM-D do not."
    )  # fmt: skip


def _training(recipe: Mapping[str, Any], training: Training, dtype: str) -> list[str]:
    """A line for each fact."""
    lines = [
        f"- recipe hash: {training.recipe_hash or 'not recorded'}",
        f"- steps: {'not recorded' if training.step is None else training.step} of {_length(recipe)}, "
        f"{_step(recipe)} each",
        "- trained: " + _trained(recipe),
        *_continued(training.continued_from),
    ]
    loss, validation = training.losses.get("loss"), training.losses.get("validation")
    if loss is not None and loss["loss"] is not None:
        lines.append(f"- training loss at step {loss['step']}: {loss['loss']:.4f}")
    if validation is not None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in validation["validation"].items())
        lines.append(f"- validation loss at step {validation['step']}: {losses}")
    lines += _hardware(training.attempts)
    return [*lines, f"- weights exported as: {dtype}"]


def _hardware(attempts: tuple[Mapping[str, Any], ...]) -> list[str]:
    """Ranks, devices and versions of all attempts; names of machines stay at home."""
    ran = dict.fromkeys(f"{a['world_size']} x {a['device']}" for a in attempts if {"world_size", "device"} <= a.keys())
    lines = [f"- hardware: {', then '.join(ran)}"] if ran else []
    versions = (attempts[-1].get("versions") or {}) if attempts else {}
    named = ", ".join(f"{name} {versions[name]}" for name in ("nvlm_train", "torch", "deepspeed") if name in versions)
    return lines + ([f"- software: {named}"] if named else [])


def _tokens(training: Training) -> list[str]:
    """A table of samples and trained tokens of each source, of this run and those before it."""
    rows = []
    stage: Mapping[str, Any] | None = {"progress": training.progress, "earlier_run": training.earlier_run}
    number = 0
    while stage is not None:
        progress = stage.get("progress") or {}
        samples, tokens = progress.get("samples_by_source") or {}, progress.get("tokens_by_source") or {}
        run = "this run" if number == 0 else f"before it ({number})"
        rows += [f"| {run} | {name} | {samples.get(name, 0):,} | {tokens.get(name, 0):,} |" for name in samples]
        uncounted = progress.get("trained_tokens", 0) - sum(tokens.values())
        rows += [f"| {run} | not counted by source | | {uncounted:,} |"] if uncounted > 0 else []
        stage, number = stage.get("earlier_run"), number + 1
    if not rows:
        return []
    return ["| run | source | samples | trained tokens |", "|---|---|---|---|", *rows, ""]


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    """The recipe, folded away; of folders and files only the last name, because the rest tells of a machine."""
    told = {name: value for name, value in recipe.items() if name not in _ASIDE}
    text = yaml.safe_dump(_without_places(told), sort_keys=False, allow_unicode=True, width=120)
    return ["<details><summary>Recipe</summary>", "", "```yaml", text.rstrip(), "```", "", "</details>", ""]


def _without_places(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_places(below, name) for name, below in value.items() if below is not None}
    if isinstance(value, list):
        return [_without_places(below, key) for below in value]
    if isinstance(value, str) and (key in _PLACES or value.startswith(("/", "~"))) and not HUB_PATH.fullmatch(value):
        return value.rstrip("/").rsplit("/", 1)[-1]
    return value


def _derivation(licences: Licences) -> list[str]:
    lines = ["| kind | part | licence | source |", "|---|---|---|---|"]
    for part in licences.parts:
        names = [canonical(name) or name for name in part.licences]
        stated = ", ".join(dict.fromkeys(names)) or ("see the parts it is made of" if part.recorded else "not stated")
        lines.append(f"| {part.kind} | {_cell(part.name)} | {_cell(stated)} | {_cell(part.source or 'not stated')} |")
    label = licences.label or "not stated; the parts above set the terms"
    lines += ["", f"Licence of these weights: {label}. LICENSE, NOTICE and the LICENSE.NAME files hold texts and names"]
    lines[-1] += " of authors; provenance.json holds this table with content hashes."
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _length(recipe: Mapping[str, Any]) -> str:
    """The run's length as the recipe gives it; a number alone is one of steps."""
    if recipe.get("max_steps") is not None:
        return str(recipe["max_steps"])
    given = [name for name in ("max_samples", "max_tokens", "num_epochs") if recipe.get(name) is not None]
    return f"a run of {given[0]} {recipe[given[0]]}" if given else "not recorded"


def _continued(found: Mapping[str, Any] | None) -> list[str]:
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


def _step(recipe: Mapping[str, Any]) -> str:
    batch = recipe.get("global_batch") or {}
    if batch.get("packs") is not None:
        return f"{batch['packs']} packs"
    return f"{batch.get('samples', 'an unrecorded number of')} samples"


def _trained(recipe: Mapping[str, Any]) -> str:
    train, crosses = recipe.get("train") or {}, (recipe.get("model") or {}).get("architecture", "nvlm_d") != "nvlm_d"
    modes = {name: mode for name, mode in train.items() if name in LORA_TARGETS and (crosses or name != _CROSSING)}
    return ", ".join(f"{module} {mode}" for module, mode in modes.items()) or "not recorded"
