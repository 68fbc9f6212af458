"""What a recipe's data amounts to, from the index alone: `nvlm-train data stats`.

Two views of a source. What it holds: counts of its samples, each once. What the run sees of it: shares of draws and of
trained tokens, epochs. The line `all` holds the sums of the counts, and distributions over draws of the mixture: what a
sample of a step looks like, not what a sample on disk does.

Packing and balance are measured by planning steps of the run, spread evenly over it, with the plan's own cost of a
pack: the same code that training calls, on as many ranks as asked for.
"""

from __future__ import annotations

import html
import json
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data import charts
from nvlm_train.data.fit import OVERLONG
from nvlm_train.data.lint import table
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.errors import DataError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import resolve
from nvlm_train.recipe.show import world_size_of

COLUMNS = ("tokens", "trained", "tiles")
FAR = 10**9  # a position of the mixture that no run reaches


def stats_command(args: Namespace) -> int:
    """`data stats`: tables, or JSON, and a plot where one is asked for."""
    if args.plot is not None and Path(args.plot).suffix.lower() not in (".svg", ".png", ".html"):
        raise DataError(f"--plot {args.plot}: is no kind of picture we draw; end the name in .svg, .png or .html")
    recipe = load_recipe(args.recipe, args.overrides).recipe
    world_size = world_size_of(args)
    resolve(recipe, world_size)  # refuses what training would refuse on so many ranks
    plan = open_data(recipe, rank=0, world_size=world_size, judge=False)
    found = stats(plan, args.steps)
    if args.plot is not None:
        _write_plot(plan, found, Path(args.plot))
    print(json.dumps(found, indent=2) if args.json else "\n".join(tables(found)))
    return 0


def stats(plan: DataPlan, num_steps: int = 32) -> dict[str, Any]:
    """All figures as plain values; `num_steps` steps of the run are packed and dealt out."""
    seek = measure_seek(plan)  # first, while nothing is kept yet
    packing = measure_packing(plan, num_steps)
    run_steps = plan.num_steps
    drawn = dict(zip(plan.mixture.names, plan.mixture.drawn(plan.num_samples), strict=True))
    shares = shares_of_run(plan)
    trained = {name: shares[name] * _mean(plan, name, "trained") for name in shares}
    tokens = {name: shares[name] * _mean(plan, name, "tokens") for name in shares}
    sources: dict[str, Any] = {}
    for name in plan.mixture.names:
        rows = plan.indexes[name].rows[plan.train_rows[name]]
        dropped = {reason: count for (n, reason), count in plan.dropped_at_index.items() if n == name}
        sources[name] = {
            "path": str(plan.indexes[name].path),
            "samples": len(rows),
            "held_out": len(plan.held_out[name]),
            **{column: int(rows[column].sum(dtype=np.int64)) for column in COLUMNS},
            "with_images": int((rows["tiles"] > 0).sum()),
            "per_sample": {column: spread(rows[column]) for column in COLUMNS},
            "share_of_samples": shares[name],
            "share_of_tokens": tokens[name] / sum(tokens.values()),
            "share_of_trained_tokens": trained[name] / (sum(trained.values()) or 1.0),
            "samples_drawn": drawn[name],
            "epochs": drawn[name] / len(rows),
            "over_long": dropped.get(OVERLONG, 0),
            "dropped": {reason: count for reason, count in dropped.items() if reason != OVERLONG},
            "fewer_tiles": plan.fewer_tiles.get(name, 0),
            "truncated": plan.truncated.get(name, 0),
        }
    weights = [
        np.full(len(plan.train_rows[name]), shares[name] / len(plan.train_rows[name])) for name in plan.mixture.names
    ]
    counts = ("samples", "held_out", *COLUMNS, "with_images", "over_long", "fewer_tiles", "truncated", "samples_drawn")
    everything: dict[str, Any] = {key: sum(source[key] for source in sources.values()) for key in counts}
    everything["dropped"] = dict(sum((Counter(source["dropped"]) for source in sources.values()), Counter()))
    everything["per_sample"] = {
        column: spread(np.concatenate([_column(plan, name, column) for name in plan.mixture.names]), weights)
        for column in COLUMNS
    }
    return {
        "world_size": plan.world_size,
        "steps": run_steps,
        "sources": sources,
        "all": everything,
        "ended_sources": plan.ended_sources(),
        "validation": {name: len(plan.held_out[name]) for name in plan.validation_sources()},
        "packing": packing,
        "seek_ms": seek,
    }


def shares_of_run(plan: DataPlan) -> dict[str, float]:
    """Each source's share of all samples that the run draws; where epochs are limited it is not that of the weights."""
    drawn = plan.mixture.drawn(plan.num_samples)
    return {name: count / sum(drawn) for name, count in zip(plan.mixture.names, drawn, strict=True)}


def _column(plan: DataPlan, name: str, column: str) -> NDArray[np.int64]:
    values: NDArray[np.int64] = plan.indexes[name].rows[column][plan.train_rows[name]].astype(np.int64)
    return values


def _mean(plan: DataPlan, name: str, column: str) -> float:
    return float(_column(plan, name, column).mean())


def spread(values: NDArray[Any], weights: Sequence[NDArray[np.float64]] | None = None) -> dict[str, float]:
    """Least, median, mean, 99th percentile and most; with `weights` (pieces, in the order of values) of draws.

    Example: [1, 2, 3, 10] gives min 1, median 2, mean 4, p99 10, max 10: a percentile is a value that occurs.
    """
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "p99", "max"), 0.0)
    order = np.argsort(values, kind="stable")
    weight = np.concatenate(weights) if weights is not None else np.full(len(values), 1.0 / len(values))
    reached = np.cumsum(weight[order])
    reached /= reached[-1]
    at = [min(len(values) - 1, int(np.searchsorted(reached, share - 1e-12))) for share in (0.5, 0.99)]
    return {
        "min": float(values.min()),
        "median": float(values[order[at[0]]]),
        "mean": float(np.average(values, weights=weight)),
        "p99": float(values[order[at[1]]]),
        "max": float(values.max()),
    }


def measure_packing(plan: DataPlan, num_steps: int) -> dict[str, Any]:
    """Packs of `num_steps` steps spread over the run, dealt to the plan's ranks.

    fill: tokens / (packs * pack_tokens). non_pad: tokens / tokens of the batches, whose rows are padded to the longest
    of a micro batch. null_share: turns of a rank without a pack. utilisation: mean cost of a rank / cost of the
    costliest, over micro-steps: 1 is perfect balance, and imbalance = 1 / utilisation is how much longer it takes.
    """
    from tqdm import tqdm

    run_steps = plan.num_steps
    chosen = sorted({run_steps * k // num_steps for k in range(min(num_steps, run_steps))})
    samples, packs, micro_steps, tokens, tiles = [], [], [], [], []
    padded = 0
    turns = nulls = 0
    useful = slowest = useful_tiles = slowest_tiles = 0.0
    begin = time.perf_counter()
    for step in tqdm(chosen, desc="pack", unit="step", delay=2.0, leave=False, disable=None):
        dealt = plan.deal_step(step)
        held = [pack for ranks in dealt for rank in ranks for pack in rank if not pack.is_null]
        samples.append(sum(len(pack.samples) for pack in held))
        packs.append(len(held))
        micro_steps.append(len(dealt))
        tokens.append(sum(pack.tokens for pack in held))
        tiles.append(sum(pack.tiles for pack in held))
        for ranks in dealt:
            turns += len(ranks)
            nulls += sum(all(pack.is_null for pack in rank) for rank in ranks)
            padded += sum(len(rank) * max(pack.tokens for pack in rank) for rank in ranks)
            costs = [sum(pack.cost for pack in rank) for rank in ranks]
            useful, slowest = useful + sum(costs), slowest + len(ranks) * max(costs)
            counts = [sum(pack.tiles for pack in rank) for rank in ranks]
            useful_tiles, slowest_tiles = useful_tiles + sum(counts), slowest_tiles + len(ranks) * max(counts)
    seconds = time.perf_counter() - begin
    return {
        "steps_planned": len(chosen),
        "samples_per_step": _range(samples),
        "packs_per_step": _range(packs),
        "micro_steps_per_step": _range(micro_steps),
        "tokens_per_step": _range(tokens),
        "tiles_per_step": _range(tiles),
        "fill": sum(tokens) / (sum(packs) * plan.recipe.data.pack_tokens),
        "non_pad": sum(tokens) / padded,
        "null_share": nulls / turns,
        "utilisation": useful / slowest,
        "imbalance": slowest / useful,
        "tile_utilisation": useful_tiles / slowest_tiles if slowest_tiles else 1.0,
        "us_per_sample": 1e6 * seconds / sum(samples),
    }


def _range(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def measure_seek(plan: DataPlan) -> dict[str, float]:
    """Milliseconds to all packs of a step that nobody has asked for before: the first, and one far away, at position
    10^9 of the order (where steps are packs or sources have a limit of epochs: the last of the run)."""
    begin = time.perf_counter()
    first = plan.plan_step(0)
    found = {"first": round(1e3 * (time.perf_counter() - begin), 3)}
    limited = plan.recipe.global_batch.packs is not None or plan.mixture.length is not None
    step = plan.num_steps - 1 if limited else FAR // sum(len(pack.samples) for pack in first)
    begin = time.perf_counter()
    plan.plan_step(step)
    return {**found, "far": round(1e3 * (time.perf_counter() - begin), 3)}


# -------------------------------------------------------------------------------------------------------------- tables


def tables(found: Mapping[str, Any]) -> list[str]:
    """The figures for a reader."""
    sources = found["sources"]
    cells = [
        ["source", "samples", "tokens", "trained", "tiles", "held out", "over-long", "fewer tiles", "cut text", "bad"]
    ]
    for name, one in [*sources.items(), ("all", found["all"])]:
        bad = sum(one["dropped"].values())
        numbers = [one[key] for key in ("samples", *COLUMNS, "held_out", "over_long", "fewer_tiles", "truncated")]
        cells.append([name, *(f"{number:,}" for number in numbers), f"{bad:,}"])
    lines = ["what the sources hold", "", *_indented(table(cells, left=1)), ""]

    cells = [["source", "of samples", "of tokens", "of trained tokens", "drawn", "epochs"]]
    for name, one in sources.items():
        shares = [one["share_of_samples"], one["share_of_tokens"], one["share_of_trained_tokens"]]
        cells.append(
            [name, *(f"{share:.1%}" for share in shares), f"{one['samples_drawn']:,.0f}", f"{one['epochs']:.2f}"]
        )
    lines += [f"what a run of {found['steps']:,} steps sees", "", *_indented(table(cells, left=1)), ""]
    lines += [*_indented("\n".join(found["ended_sources"])), ""] if found["ended_sources"] else []

    cells = [["a sample's", "source", "min", "median", "mean", "p99", "max"]]
    for column, label in (("tokens", "tokens"), ("trained", "trained tokens"), ("tiles", "tiles")):
        for name, one in [*sources.items(), ("all draws", found["all"])]:
            numbers = one["per_sample"][column]
            shown = [f"{numbers[k]:,.1f}" if k == "mean" else f"{numbers[k]:,.0f}" for k in cells[0][2:]]
            cells.append([label, name, *shown])
            label = ""
    lines += [*_indented(table(cells)), ""]

    packing, ranks = found["packing"], found["world_size"]
    lines += [
        f"packing and balance on {ranks} rank{'s' * (ranks > 1)}, from {packing['steps_planned']} steps of the run",
        "",
    ]
    for key, label in (
        ("samples_per_step", "samples a step"),
        ("packs_per_step", "packs a step"),
        ("micro_steps_per_step", "micro-steps a step"),
        ("tokens_per_step", "tokens a step"),
        ("tiles_per_step", "tiles a step"),
    ):
        one = packing[key]
        text = f"{one['mean']:,.1f}".removesuffix(".0")
        if one["min"] != one["max"]:
            text += f"  ({one['min']:,} to {one['max']:,})"
        lines.append(f"  {label:<22}{text}")
    seek = found["seek_ms"]
    lines += [
        f"  {'full packs':<22}{packing['fill']:.1%} of pack_tokens",
        f"  {'not padding':<22}{packing['non_pad']:.1%} of the tokens in batches",
        f"  {'null packs':<22}{packing['null_share']:.1%} of the ranks' turns",
        f"  {'balance':<22}{packing['utilisation']:.1%} predicted: the mean rank's cost over the costliest's "
        f"(tiles alone {packing['tile_utilisation']:.1%})",
        f"  {'planning':<22}{packing['us_per_sample']:.0f} µs a sample; to the packs of a step at "
        f"position 0 {seek['first']:.0f} ms, far away {seek['far']:.0f} ms",
    ]
    if found["validation"]:
        held = ", ".join(f"{name} {count:,}" for name, count in found["validation"].items())
        lines += ["", f"validation samples: {held}"]
    return lines


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


# ---------------------------------------------------------------------------------------------------------------- plot


def histograms(plan: DataPlan) -> list[charts.Histogram]:
    """How long, how much trained and how many tiles the samples of a step are, stacked by source."""
    found = []
    for column, title in (
        ("tokens", "Tokens of a sample"),
        ("trained", "Trained tokens of a sample"),
        ("tiles", "Tiles of a sample"),
    ):
        values = {name: _column(plan, name, column) for name in plan.mixture.names}
        least, most = min(int(v.min()) for v in values.values()), max(int(v.max()) for v in values.values())
        width = max(1, -(-(most - least + 1) // 48))
        edges = np.arange(least, most + width + 1, width).tolist()
        layers = {
            name: (share * np.histogram(values[name], bins=edges)[0] / len(values[name])).tolist()
            for name, share in shares_of_run(plan).items()
        }
        found.append(charts.Histogram(title, column if column != "trained" else "trained tokens", edges, layers))
    return found


def _write_plot(plan: DataPlan, found: Mapping[str, Any], path: Path) -> None:
    colours = source_colours(plan.mixture.names)
    scene = charts.draw_histograms(
        histograms(plan), colours, f"{plan.recipe.run_name}: what a sample of a step is like"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            charts.write_png(scene, path)
        elif path.suffix.lower() == ".svg":
            path.write_text(charts.svg(scene) + "\n", encoding="utf-8")
        else:
            path.write_text(_page(plan, found, charts.svg(scene)), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"--plot {path}: cannot be written ({error.strerror}); name a file in a folder of yours"
        ) from error


def source_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each source, the same in every picture of a recipe."""
    return {name: charts.COLOURS[k % len(charts.COLOURS)] for k, name in enumerate(names)}


def _page(plan: DataPlan, found: Mapping[str, Any], picture: str) -> str:
    text = html.escape("\n".join(tables(found)))
    title = html.escape(f"{plan.recipe.run_name}: data")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #24292f; }}
pre {{ font: 13px/1.5 ui-monospace, monospace; overflow-x: auto; background: #f6f8fa; padding: 1rem; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
{picture}
<pre>{text}</pre>
</body></html>
"""
