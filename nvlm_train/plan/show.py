"""`nvlm-train plan`: the figures of `plan.capacity` as text or JSON."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from nvlm_train.plan.capacity import GIB, Cluster, plan
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import refuse_unsupported, run_length
from nvlm_train.recipe.schema import Recipe

LINKS = (200, 400, 800, 1600, 3200)  # Gbit/s of a node that are told of where none is given


def plan_command(args: Namespace) -> int:
    """Prints the plan; 0 whether it fits or not, because both are answers."""
    loaded = load_recipe(args.recipe, args.overrides)
    refuse_unsupported(loaded)
    cluster = Cluster(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu_gib=args.gpu_gib,
        reserve_gib=args.reserve_gib,
        node_gbps=args.link_gbps,
        gpu_gbps=args.intra_gbps,
        mfu=args.mfu,
        peak_tflops=args.peak_tflops,
    )
    found = plan(loaded.recipe, cluster)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print("\n".join(lines(loaded.recipe, cluster, found)))
    return 0


def lines(recipe: Recipe, cluster: Cluster, found: dict[str, Any]) -> list[str]:
    """The report, part by part."""
    total, trained = found["parameters"]["total"], found["parameters"]["trainable"]
    return [
        f"{recipe.run_name} on {_nodes(cluster)}, {found['gpus']} GPUs of {cluster.gpu_gib:g} GiB; "
        f"{_billions(total)} parameters, {_billions(trained)} trained",
        *_memory(recipe, cluster, found),
        *_advice(found),
        *_time(cluster, found),
        *_run(recipe, found),
        *_table(cluster, found),
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]


def _memory(recipe: Recipe, cluster: Cluster, found: dict[str, Any]) -> list[str]:
    memory, host = found["memory"], found["host"]
    out = ["", "memory of a GPU, GiB"]
    out += [f"  {kind.replace('_', ' '):<20}{size / GIB:>8.2f}" for kind, size in memory["by_kind"].items() if size]
    out.append(
        f"  {'sum':<20}{memory['sum_bytes'] / GIB:>8.2f}  of {memory['limit_bytes'] / GIB:.1f}: {_verdict(memory)}"
    )
    peaks = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory["peaks"].items())
    out.append(
        f"  at one time: {peaks}; {cluster.reserve_gib:g} of {cluster.gpu_gib:g} are left to CUDA, NCCL and slack"
    )
    parts = {
        "offloaded": host["offloaded"],
        "copy for asynchronous saves": host["snapshot"],
        "prepared data, at most": host["prepared_data_at_most"],
    }
    text = ", ".join(f"{name} {size / GIB:.0f}" for name, size in parts.items() if size)
    out += ["", f"host memory of a node, GiB: {text}; Python and torch on top, for each rank"]
    return out


def _verdict(memory: dict[str, Any]) -> str:
    if memory["fits"]:
        return f"fits, {(memory['limit_bytes'] - memory['sum_bytes']) / GIB:.1f} left"
    over = (memory["sum_bytes"] - memory["limit_bytes"]) / GIB
    if memory["tight"]:
        return f"tight: {over:.1f} too much together, but not all of it is there at one time"
    return f"does not fit, {over:.1f} too much"


def _advice(found: dict[str, Any]) -> list[str]:
    smallest = found["smallest"]
    out = []
    if found["knobs"]:
        out += ["", "what makes room (each predicted again; `with those above`: one after the other until it fits)"]
        for knob in found["knobs"]:
            keys = " ".join(f"{name}={value}" for name, value in knob["keys"].items())
            fits = "fits" if knob["fits"] else "not enough"
            chain = ""
            if "together_bytes" in knob:
                more = "fits" if knob["together_fits"] else "not enough"
                chain = f", with those above {knob['together_bytes'] / GIB:.1f}: {more}"
            out.append(f"  {keys}")
            out.append(
                f"      -{knob['gain_bytes'] / GIB:.1f} GiB -> {knob['sum_bytes'] / GIB:.1f}: {fits}{chain}; "
                f"costs: {knob['cost']}"
            )
    if found["room_for"]:
        out += ["", "room for"]
        for wish in found["room_for"]:
            keys = " ".join(f"{name}={value}" for name, value in wish["keys"].items())
            out.append(f"  {keys}  ({wish['sum_bytes'] / GIB:.1f} GiB; {wish['gain']})")
    if smallest["gpus"]:
        out += [
            "",
            f"smallest number of GPUs on which it fits as it is: {smallest['gpus']} "
            f"({smallest['sum_bytes'] / GIB:.1f} GiB each)",
        ]
    else:
        out += ["", f"fits on no number of such GPUs as it is: {smallest['reason']}"]
    return out


def _time(cluster: Cluster, found: dict[str, Any]) -> list[str]:
    sent, work = found["communication"], found["micro_step"]
    batch, steps = found["batch"], work["micro_steps"]
    flops = found["flops_per_step_of_a_gpu"]
    out = [
        "",
        f"a step: at most {batch['packs']} packs, {steps} micro-step{'s' * (steps > 1)} of {work['tokens']:,} tokens "
        f"and {work['tiles']} tiles a GPU"
        + (f"; {batch['empty_share']:.0%} of the slots empty" * (batch["empty_share"] > 0)),
        f"  arithmetic       {_seconds(found['compute_s'])}  {flops / 1e15:.2f} PFLOP a GPU at {cluster.mfu:.0%} of "
        f"{cluster.peak_tflops:g} TFLOP/s (useful ones; with recompute {work['executed'] * steps / 1e15:.2f})",
    ]
    if found["gpus"] == 1:
        return out
    kinds = [f"{kind.replace('_', ' ')} {size / 1e9:.1f}" for kind, size in sent["micro_step"].items() if size]
    once = [f"{kind.replace('_', ' ')} {size / 1e9:.1f}" for kind, size in sent["update"].items() if size > 5e7]
    out.append(
        "  exchange         GB that a GPU receives: "
        + "; ".join(
            [f"in each micro-step {', '.join(kinds)}"] * bool(kinds) + [f"once a step {', '.join(once)}"] * bool(once)
        )
    )
    if sent["gathers_per_weight"]:
        out.append(f"                   a weight is gathered {sent['gathers_per_weight']:.2f} times in a micro-step")
    out.append(
        f"    inside a node  {_seconds(found['exchange_inside_s'])}  at {cluster.gpu_gbps:g} Gbit/s a GPU; from "
        f"{sent['needed_gpu_gbps']:.0f} on it hides"
    )
    if sent["nodes"] > 1:
        needed = sent["needed_node_gbps"]
        if cluster.node_gbps:
            out.append(
                f"    between nodes  {_seconds(found['exchange_between_s'])}  at {cluster.node_gbps:g} Gbit/s a node "
                f"({sent['into_node_per_step'] / 1e9:.0f} GB into each); from {needed:.0f} on it hides"
            )
        else:
            into = sent["into_node_per_step"] * 8e-9
            times = ", ".join(f"{_seconds(into / link).strip()} at {link}" for link in LINKS)
            out.append(
                f"    between nodes  {sent['into_node_per_step'] / 1e9:.0f} GB into each: {times} Gbit/s a node "
                f"(--link-gbps); from {needed:.0f} on it hides"
            )
    if found["step_s_hidden"] is not None:
        out.append(
            f"  step             {_seconds(found['step_s_hidden'])}  when the exchange hides behind the arithmetic, "
            f"{_seconds(found['step_s_exposed']).strip()} when nothing does; "
            f"{found['tokens_per_s_and_gpu']:,.0f} tokens/s a GPU"
        )
        out.append(
            f"  tokens of a GPU and micro-step that hide the exchange: {found['tokens_per_gpu_to_hide']:,} "
            f"(it has {found['tokens_per_gpu']:,})"
        )
    return out


def _run(recipe: Recipe, found: dict[str, Any]) -> list[str]:
    disk = found["disk"]
    out = [""]
    if found["steps"] is None:
        out.append(f"the run: steps known after indexing ({run_length(recipe)}; `nvlm-train data stats` tells them)")
    elif found.get("days") is None:
        out.append(f"the run: {found['steps']:,} steps")
    else:
        out.append(
            f"the run: {found['steps']:,} steps, {_days(found['days'])}, {found['gpu_hours']:,.0f} GPU-hours, without "
            "saves, validation and interruptions"
        )
    kept = f"{disk['checkpoints_kept']} kept, one more while one is saved"
    if disk["checkpoints_kept_for_good"] != 0:
        kept += f", {_count(disk['checkpoints_kept_for_good'])} for good (keep_every_steps)"
    out.append(
        f"disk: {_size(disk['checkpoint_bytes'])} a checkpoint, {_size(disk['checkpoint_bytes_per_gpu'])} of each GPU; "
        f"{kept}"
        + (
            f"; {_count(disk['milestones'])} milestones of {_size(disk['milestone_bytes'])}"
            if disk["milestones"] != 0
            else ""
        )
        + (f"; frozen weights once, {_size(disk['base_copy_bytes'])}" if disk["base_copy_bytes"] else "")
        + (f"; in all {_size(disk['run_bytes'])}" if disk["run_bytes"] is not None else "")
    )
    return out


def _table(cluster: Cluster, found: dict[str, Any]) -> list[str]:
    network = "exchange" if cluster.node_gbps else "Gbit/s"
    out = [
        "",
        f"{'GPUs':>5} {'GiB':>7} {'':<6}{'micro':>6}{'empty':>7}{'arithm.':>10}{network:>10}{'step':>10}{'days':>8}"
        f"{'GPU-hours':>11}",
    ]
    for row in found["sweep"]:
        if "error" in row:
            out.append(f"{row['gpus']:>5}  {row['error'].split(': a rank needs')[0]}")
            continue
        fits = "fits" if row["fits"] else "tight" if row["tight"] else "no"
        shown = _seconds(row["exchange_s"]) if row["exchange_s"] is not None else f"{row['needed_node_gbps']:.0f}"
        if not cluster.node_gbps:
            shown = f"{row['needed_node_gbps']:.0f}" if row["needed_node_gbps"] else "-"
        out.append(
            f"{row['gpus']:>5} {row['sum_bytes'] / GIB:>7.1f} {fits:<6}{row['micro_steps']:>6}"
            f"{row['empty_share']:>7.0%}{_seconds(row['compute_s']):>10}{shown:>10}"
            f"{_seconds(row['step_s']) if row['step_s'] is not None else '-':>10}"
            f"{'-' if row['days'] is None else format(row['days'], '.1f'):>8}"
            f"{'-' if row['gpu_hours'] is None else format(row['gpu_hours'], ',.0f'):>11}"
        )
    if not cluster.node_gbps:
        out.append("      Gbit/s: what a node's network must reach for the exchange to hide; --link-gbps gives times")
    return out


def _nodes(cluster: Cluster) -> str:
    return f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _count(number: int | None) -> str:
    return "a number known after indexing" if number is None else str(number)


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1e3:6.2f} ms"
    return f"{seconds:6.2f} s" if seconds < 100 else f"{seconds:6.0f} s"


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
