"""The first screen of a run: everything one would ask about it later."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nvlm_train
from nvlm_train.data.plan import DataPlan
from nvlm_train.engine.launch import Launch
from nvlm_train.kernels import select
from nvlm_train.recipe.resolve import Resolved
from nvlm_train.recipe.schema import Recipe
from nvlm_train.recipe.show import adapters, storage
from nvlm_train.train.state import Start

_STEPS_LOOKED_AT = 4
PACKAGES = ("torch", "deepspeed", "safetensors", "tokenizers", "pydantic")


def versions() -> dict[str, str]:
    """Versions of this package, Python and what a run depends on."""
    found = {"nvlm_train": nvlm_train.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """Revision of the checkout this package runs from, with "+changes" where it is not clean; "none" without git."""

    def git(*words: str) -> str:
        folder = Path(nvlm_train.__file__).parent
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def provenance(launch: Launch) -> dict[str, Any]:
    """What recipe.json records of each attempt."""
    return {"git": git_revision(), "versions": versions(), "world_size": launch.world_size, "host": platform.node()}


def device_name(device: torch.device) -> str:
    """What the ranks run on: the GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def data_lines(plan: DataPlan) -> list[str]:
    """One line a source: samples, share of the mixture, and how often the run goes through it."""
    lines = []
    drawn = plan.mixture.drawn(plan.num_samples)
    for name, share, draws in zip(plan.mixture.names, plan.mixture.shares, drawn, strict=True):
        samples = len(plan.train_rows[name])
        epochs = draws / samples
        lines.append(f"{name}: {samples:,} samples, {float(share):.1%} of the mixture, {epochs:.2f} epochs")
    lines += plan.ended_sources()
    lines += [
        f"{name}: {count} samples cut into fewer tiles to fit" for name, count in sorted(plan.fewer_tiles.items())
    ]
    lines += [f"{name}: validation, {len(plan.held_out[name]):,} samples" for name in plan.validation_sources()]
    lines += [
        f"{name}: {count} lines dropped, {reason}" for (name, reason), count in sorted(plan.dropped_at_index.items())
    ]
    return lines


def expected_step(plan: DataPlan) -> list[str]:
    """Tokens, trained tokens and tiles of an average step, from the lengths in the index; how the first ones are packed
    and use the ranks."""
    samples = plan.num_samples / plan.num_steps
    means = {}
    for column in ("tokens", "trained", "tiles"):
        by_source = [
            float(share) * plan.indexes[name].rows[column][plan.train_rows[name]].mean()
            for name, share in zip(plan.mixture.names, plan.mixture.shares, strict=True)
        ]
        means[column] = samples * sum(by_source)
    first = plan.predict(_STEPS_LOOKED_AT)
    return [
        f"about {samples:,.0f} samples a step, {means['tokens']:,.0f} tokens, {means['trained']:,.0f} trained, "
        f"{means['tiles']:,.0f} tiles",
        f"the first steps: {first.packs_per_step:.1f} packs in {len(plan.deal_step(0))} micro-steps, "
        f"{first.efficiency:.1%} full; null packs {first.null_share:.1%}; predicted use of the ranks "
        f"{first.utilisation:.1%}",
    ]


def first_screen(
    recipe: Recipe,
    resolved: Resolved,
    launch: Launch,
    start: Start,
    weights: list[str],
    device: str,
    attempt: Mapping[str, Any],
    plan: DataPlan,
    command_line: str,
    idle_gpus: int,
    rehearsal: str,
) -> str:
    """The text, one fact a line. weights: the lines of `weights.account_table`."""
    counts, trainable = resolved.parameters["total"], resolved.parameters["trainable"]
    batch, memory = resolved.batch, dict(resolved.memory)
    total, host = memory.pop("total"), memory.pop("host")
    kernels = select(recipe.kernels, device.split(":")[0])
    facts: dict[str, str | list[str]] = {
        "recipe": f"{recipe.run_name}  hash {resolved.recipe_hash}",
        "code": [
            f"git {attempt['git']}",
            "  ".join(f"{name} {version}" for name, version in attempt["versions"].items()),
        ],
        "world": f"{launch.verdict}, {device}",
        "weights": weights,
        "parameters": [
            f"{sum(counts.values()):,} in all, {sum(trainable.values()):,} trained",
            *(f"{module}: {count:,} {_training(recipe, resolved, module)}" for module, count in counts.items()),
        ],
        "batch": [
            (
                f"{batch.samples} samples a step in packs of {batch.pack_tokens} tokens"
                if batch.packs is None
                else f"{batch.packs} packs of {batch.pack_tokens} tokens a step"
            )
            + f", {batch.world_size} ranks x {batch.micro_batch_size} packs a micro-step, {resolved.num_steps} steps",
            *expected_step(plan),
        ],
        "data": data_lines(plan),
        "memory": [
            f"{_bytes(total)} predicted per rank" + (f", {_bytes(host)} more in host memory" if host else ""),
            ", ".join(f"{kind} {_bytes(size)}" for kind, size in memory.items() if size),
        ],
        "rehearsal": rehearsal,
        "kernels": [
            f"{op}: {name} ({reason})"
            for op, (name, reason) in kernels.items()
            if op != "cross_attention" or recipe.model.architecture != "nvlm_d"
        ],
        "run": f"{start.run}, " + (f"resumed from {start.checkpoint}" if start.checkpoint else "from the beginning"),
    }
    if start.branch is not None:
        facts["began"] = f"in {start.branch.checkpoint}; never draws the data of steps {start.branch.skips()}"
    if start.changes:
        facts["changed"] = f"{', '.join(start.changes)} since the last attempt"
    if idle_gpus:
        facts["hint"] = (
            f"{idle_gpus} more GPUs of this host are not used by this run; use them with: torchrun --standalone "
            f"--nproc_per_node {idle_gpus + 1} -m nvlm_train train {command_line}"
        )
    lines = []
    for name, fact in facts.items():
        first, *rest = [fact] if isinstance(fact, str) else fact
        lines += [f"{name:>10}  {first}", *(f"{'':>10}  {line}" for line in rest)]
    return "\n".join(lines)


def _training(recipe: Recipe, resolved: Resolved, module: str) -> str:
    """`trained, lr 1e-05`, `frozen`, or `frozen, 8,192 in adapters trained, lr 1e-04 (lora rank 16, ...)`."""
    mode, kept = recipe.train.modes[module], storage(recipe, module)
    frozen = "frozen" + (f" ({kept})" if kept else "")
    if mode == "frozen":
        return frozen
    rate = f"trained, lr {resolved.module_lr[module]:g}"
    if mode == "full":
        return rate
    return f"{frozen}, {resolved.parameters['trainable'][module]:,} in adapters {rate} ({adapters(recipe, module)})"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
