"""Tables and goals out of a run's cells. No torch, nothing measured."""

from __future__ import annotations

import statistics
from typing import Any

from gpu_tables.results import DONE, mfu, peak_tflops

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
PROVIDERS = ("eager", "torch.compile", "liger", "ours")
STEP_PROVIDERS = {"ours": "ours", "torch": "ours, kernels: torch", "peer": "the peer's way"}
ARCHITECTURES = ("nvlm_d", "nvlm_x", "nvlm_h")
SAME_LOSS = 0.01  # share by which two first losses of one model in bf16 may differ
GEMM_CEILING, COPY_CEILING = "1/gemm 8192x8192x8192", "1/copy"


def render(run: dict[str, Any], tables: tuple[int, ...] = (1, 2, 3, 4, 5)) -> str:
    """The page: what ran, the tables, the goals."""
    pages = {1: ceilings, 2: kernels, 3: steps, 4: architectures, 5: memory}
    return "\n".join([head(run), *(pages[number](run) for number in tables), goals_table(run)])


def head(run: dict[str, Any]) -> str:
    state = " **with local changes**" if run["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"# GPU bench, {run['date']}, {run['gpu']}",
        "",
        f"Commit {run['commit']}{state} (code {run['code']}). {versions}.",
        "Commands: " + ", ".join(f"`{command}`" for command in run["commands"]) + ".",
        "",
    ]
    if run["device"] == "cpu":
        lines += [
            "**Proof of the harness on a CPU, with tiny shapes. Nothing here says how fast anything is:** our kernels "
            "run in Triton's interpreter, torch.compile without Inductor, memory is the growth of a process.",
            "",
        ]
    return "\n".join(lines)


def table(columns: list[str], rows: list[list[str]]) -> str:
    line = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    return line + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def cell_of(run: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Values of a cell that was measured, else None."""
    cell = run["cells"].get(key)
    return cell["values"] if cell is not None and cell["status"] == DONE else None


def why_not(cell: dict[str, Any] | None) -> str:
    """What stands where a figure would: not run yet, out of memory, or what failed."""
    if cell is None:
        return "not run yet"
    return cell["status"] if cell["status"] != "failed" else f"failed: {cell['error'][:120]}".replace("|", "/")


def ms(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.3f} ({spread['p20']:.3f}-{spread['p80']:.3f})"


def provider_brief(own: dict[str, Any]) -> str:
    """One provider of a kernel in a word."""
    if "both" in own:
        return f"{own['both']['median']:.3f} ms"
    return "n/a" if "na" in own else "WRONG" if own.get("wrong") else str(own["failed"])


def ceilings(run: dict[str, Any]) -> str:
    rows = []
    for key in sorted(k for k in run["cells"] if k.startswith("1/")):
        values = cell_of(run, key)
        unit = "TB/s, read and written" if key == COPY_CEILING else "TFLOP/s"
        rows.append(
            [key[2:], why_not(run["cells"][key]), ""]
            if values is None
            else [key[2:], ms(values["ms"]), f"{values['rate'] / 1e12:.3g} {unit}"]
        )
    return "## 1. Ceilings\n\nbf16; random data for products. Median (p20-p80), ms.\n\n" + table(
        ["", "ms", "rate"], rows
    )


def rate(values: dict[str, Any], provider: str, part: str = "both") -> float | None:
    """Bytes/s or operations/s that a provider reached, by what the op needs at least; None where it was not timed."""
    own = values["providers"].get(provider, {})
    if part not in own:
        return None
    amounts = values["flop"] if any(values["flop"]) else values["bytes"]
    amount = amounts[0] if part == "forward" else sum(amounts)
    return float(amount / own[part]["median"] * 1e3)


def ceiling_share(run: dict[str, Any], values: dict[str, Any], provider: str) -> float | None:
    """Of the copy's or the product's rate, forward and backward together; None where either was not measured."""
    ceiling = cell_of(run, GEMM_CEILING if any(values["flop"]) else COPY_CEILING)
    reached = rate(values, provider)
    return None if ceiling is None or reached is None else reached / ceiling["rate"]


def kernels(run: dict[str, Any]) -> str:
    rows = []
    for key in (k for k in run["cells"] if k.startswith("2/")):
        values = cell_of(run, key)
        if values is None:
            rows.append([key[2:], "", why_not(run["cells"][key]), *[""] * 6])
            continue
        for provider in PROVIDERS:
            own = values["providers"][provider]
            start = [key[2:], provider]
            if "na" in own:
                rows.append([*start, f"n/a ({own['na']})", *[""] * 6])
            elif "failed" in own:
                rows.append([*start, own["failed"].replace("|", "/"), *[""] * 6])
            elif own["wrong"]:
                rows.append([*start, f"WRONG: {own['error']:.1e} of the norm", *[""] * 6])
            else:
                share, reached = ceiling_share(run, values, provider), rate(values, provider)
                assert reached is not None
                unit = "TF/s" if any(values["flop"]) else "TB/s"
                peak = own["peak_mib"]
                rows.append([
                    *start, f"{own['error']:.1e}", ms(own["forward"]), ms(own["backward"]), ms(own["both"]),
                    "n/a (cpu)" if peak is None else f"{peak:.0f}", f"{reached / 1e12:.3g} {unit}",
                    "n/a" if share is None else f"{share:.0%}",
                ])  # fmt: skip
    note = (
        "## 2. Kernels\n\nMilliseconds, median (p20-p80), providers by turns. Error: of outputs and gradients against "
        "fp64, by the norm, before anything was timed. Peak: above the inputs. Of ceiling: of the copy's rate, or of "
        "the 8192 product's for the loss, forward and backward together, by the least an op must move or multiply "
        "(labelled rows alone). Losses of ours and Liger make gradients in forward: only the sum compares.\n\n"
    )
    columns = ["op", "by", "error", "forward", "backward", "both", "peak MiB", "rate", "of ceiling"]
    return note + table(columns, rows)


def rounds(run: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """Values of all rounds of a row and provider that were measured, such as "3/7b/ours/"."""
    found = [cell_of(run, key) for key in run["cells"] if key.startswith(prefix)]
    return [values for values in found if values is not None]


def summary(run: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """One row out of its rounds: median of all steps, spread, and what follows from it."""
    found = rounds(run, prefix)
    if not found:
        return None
    times = sorted(t for values in found for t in values["times"])
    first, median = found[0], statistics.median(times)
    peak = peak_tflops(run["gpu"])
    return first | {
        "median": median,
        "low": times[0],
        "high": times[-1],
        "steps": len(times),
        "rounds": len(found),
        "mfu": mfu(first["flop"], median / 1e3, peak),
        "mfu_without_tower": mfu(first["flop_without_tower"], median / 1e3, peak),
        "peak": max(values["peak"] for values in found),
    }


def _step_row(run: dict[str, Any], prefix: str, names: list[str]) -> list[str]:
    own = summary(run, prefix)
    if own is None:
        cells = [run["cells"][key] for key in run["cells"] if key.startswith(prefix)]
        return [*names, why_not(cells[0] if cells else None), *[""] * 8]
    padding = 1 - own["tokens"] / own["positions"]

    def share(value: float | None) -> str:
        return "n/a (peak not known)" if value is None else f"{value:.1%}"

    parts = ", ".join(f"{part} {value:.0f}" for part, value in own["parts"].items())
    about = [own["note"], f"recompute {own['recompute']}", own.get("peer", ""), f"ms: {parts}" if parts else ""]
    if padding:
        about.append(f"{padding:.0%} of positions are padding")
    return [
        *names,
        f"{own['median']:.1f} ({own['low']:.1f}-{own['high']:.1f}, {own['steps']} steps, {own['rounds']} rounds)",
        f"{own['tokens'] / own['median'] * 1e3:.0f}",
        f"{own['tiles'] / own['median'] * 1e3:.1f}",
        share(own["mfu"]),
        share(own["mfu_without_tower"]),
        f"{own['peak'] / 2**30:.2f}",
        f"{own['loss']:.5f}",
        "; ".join(text for text in about if text),
    ]


STEP_COLUMNS = ["ms a step", "tokens/s", "tiles/s", "MFU", "MFU without tower", "peak GiB", "first loss", "what"]


def step_rows(run: dict[str, Any]) -> list[str]:
    """The rows of table 3 that the run has begun, in order."""
    return list(dict.fromkeys(key.split("/")[1] for key in run["cells"] if key.startswith("3/")))


def steps(run: dict[str, Any]) -> str:
    rows = [
        _step_row(run, f"3/{row}/{provider}/", [row.upper(), name])
        for row in step_rows(run)
        for provider, name in STEP_PROVIDERS.items()
    ]
    note = (
        "## 3. Whole training steps\n\nNVLM-D, one pack of 8 samples with 28 tiles, tower frozen, projector and "
        "decoder trained, random weights, ZeRO-3 on one rank, clipping, AdamW. Median of all steps (least-most). "
        "Tokens are those of the samples, padding left out. MFU: useful operations, frozen tower's forward included, "
        "over 990 TFLOP/s. Equal first losses show that all compute the same.\n\n"
    )
    return note + table(["row", "by", *STEP_COLUMNS], rows)


def architectures(run: dict[str, Any]) -> str:
    rows = [_step_row(run, f"4/{name}/ours/", [name.replace("nvlm_", "NVLM-").upper()]) for name in ARCHITECTURES]
    note = (
        "## 4. D, X and H side by side\n\nThe same pictures and text, ours; in X no image token enters the sequence, "
        "in H those of thumbnails. Samples a step are equal, tokens are not.\n\n"
    )
    return note + table(["", *STEP_COLUMNS], rows)


def memory_rows(run: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(row, predicted, measured) bytes of all rows whose memory is predicted."""
    prefixes = [f"3/{row}/{provider}/" for row in step_rows(run) for provider in ("ours", "torch")]
    prefixes += [f"4/{name}/ours/" for name in ARCHITECTURES]
    found = []
    for prefix in prefixes:
        own = summary(run, prefix)
        if own is not None:
            found.append((prefix[:-1], float(own["predicted"]["total"]), float(own["peak"])))
    return found


def memory(run: dict[str, Any]) -> str:
    rows = [
        [name, f"{predicted / 2**30:.3f}", f"{measured / 2**30:.3f}", f"{measured / predicted - 1:+.0%}"]
        for name, predicted, measured in memory_rows(run)
    ]
    note = (
        "## 5. Memory, predicted and measured\n\nGiB: `nvlm_train/engine/memory.py` and the peak of torch's allocator "
        "(on a CPU: growth of the process, which says nothing about so small a model).\n\n"
    )
    return note + table(["row (table/row/provider)", "predicted", "measured", "measured against predicted"], rows)


# ---------------------------------------------------------------------------------------------------------------- goals


def _goal(text: str, value: float | None, least: float, shown: str, why: str = "") -> tuple[str, str, str]:
    if value is None:
        return text, NOT_MEASURED, why
    return text, MET if value >= least else NOT_MET, shown.format(value)


def goals(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(goal, met | not met | not measured, what was found) of each goal, whatever it turned out to be."""
    if run["device"] == "cpu":
        return [(text, NOT_MEASURED, "a CPU proves the harness alone") for text, _, _ in _goals(run)]
    return _goals(run)


def _goals(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    ours, peer = summary(run, "3/7b/ours/"), summary(run, "3/7b/peer/")
    same = bool(ours and peer and abs(ours["loss"] - peer["loss"]) <= SAME_LOSS * abs(peer["loss"]))
    speedup = peer["median"] / ours["median"] if ours and peer and same else None
    is_7b = ours is not None and ours["decoder"] == "7b"
    other = "" if ours is None or is_7b else f"not at 7B; at {ours['decoder'].upper()}: "
    text = "a step at the 7B shape takes at most 1 / 1.5 of the peer's way's time"
    shown = (
        f"{other}{speedup:.2f} times as fast"
        if speedup
        else "first losses differ"
        if ours and peer
        else "a side is missing"
    )
    found.append(_goal(text, speedup if is_7b else None, 1.5, "{:.2f} times as fast", shown))
    share = ours["mfu"] if ours else None
    shown = f"{other}{share:.1%}" if share else "not run"
    found.append(_goal("at least 50 % MFU at the 7B shape", share if is_7b else None, 0.5, "{:.1%}", shown))

    def times(op: str, provider: str) -> tuple[float | None, str]:
        """How many times as fast as a provider ours is, at the worst of the op's shapes."""
        ratios = []
        for key in (k for k in run["cells"] if k.startswith(f"2/{op}")):
            values = cell_of(run, key)
            pair = [rate(values, name) for name in ("ours", provider)] if values is not None else [None]
            if None in pair:
                return None, f"not timed: {key[2:]}"
            ratios.append(pair[0] / pair[1])  # type: ignore[operator]
        return (min(ratios), "") if ratios else (None, "not run")

    def share_of(op: str) -> tuple[float | None, str]:
        shares = []
        for key in (k for k in run["cells"] if k.startswith(f"2/{op}")):
            values = cell_of(run, key)
            share = ceiling_share(run, values, "ours") if values is not None else None
            if share is None:
                return None, f"not timed: {key[2:]}"
            shares.append(share)
        return (min(shares), "") if shares else (None, "not run")

    head = "linear_cross_entropy 16384x3584x152064, "
    for text, op, provider, least in (
        ("loss, all rows labelled: faster than Liger's fused one", f"{head}100 %", "liger", 1.0),
        ("loss, 20 % labelled: 3 times as fast as Liger's", f"{head}20 %", "liger", 3.0),
        ("rms_norm: no slower than torch.compile", "rms_norm", "torch.compile", 1.0),
        ("add_rms_norm: no slower than torch.compile", "add_rms_norm", "torch.compile", 1.0),
    ):
        value, why = times(op, provider)
        found.append(_goal(text, value, least, "{:.2f} times as fast at the worst shape", why))
    found.append((
        "loss, all rows labelled: within 5 % of Liger's CuTe kernel", NOT_MEASURED,
        "the bench has no provider for it: an opt-in of its own, with a loss of another form",
    ))  # fmt: skip
    for op, least in (("rms_norm", 0.85), ("add_rms_norm", 0.85), ("norm_rope", 0.8), ("splice", 0.8),
                      ("shuffle_layer_norm", 0.8)):  # fmt: skip
        value, why = share_of(op)
        found.append(_goal(f"{op}: {least:.0%} of the copy's rate", value, least, "{:.0%} at the worst shape", why))
    rows = memory_rows(run)
    worst = max((abs(measured / predicted - 1) for _, predicted, measured in rows), default=None)
    found.append(
        ("memory predicted within 10 %", NOT_MEASURED, "not run")
        if worst is None
        else ("memory predicted within 10 %", MET if worst <= 0.1 else NOT_MET, f"off by {worst:.0%} at the worst row")
    )
    return found


def goals_table(run: dict[str, Any]) -> str:
    return "## Goals\n\n" + table(["goal", "", "found"], [list(goal) for goal in goals(run)])
