"""Looking through the sources of a recipe without training: `nvlm-train data index` and `nvlm-train data lint`.

`index` builds what training would build at its start, so that no GPU waits for it. `lint` tells every problem of every
source, grouped by reason: those that the index found, and with `--images` those that only decoding shows. What lint
calls good is what training loads: both go through `DataPlan.load`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nvlm_train.batch import SampleRef
from nvlm_train.data.fit import OVERLONG
from nvlm_train.data.images import BadSample
from nvlm_train.data.index import (
    BadRow,
    IndexSettings,
    SourceIndex,
    index_dir_of,
    index_key,
    make_index_dir,
    open_index,
    split_rows,
    too_bad,
)
from nvlm_train.data.plan import nothing_held_out, open_data
from nvlm_train.data.sources import BELOW_RATING, expand_sources, open_source
from nvlm_train.data.tokenizer import load_tokenizer
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger
from nvlm_train.recipe import schema
from nvlm_train.recipe.load import load_recipe

log = get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------- what is reported


@dataclass(frozen=True)
class Example:
    """One bad sample: where it is (file:line, or shard/key) and what is wrong with it."""

    where: str
    message: str


@dataclass
class Group:
    """All samples of a source that have the same thing wrong with them."""

    reason: str
    count: int
    examples: list[Example] = field(default_factory=list)


@dataclass
class SourceReport:
    """What lint found in one source.

    problems: samples or the whole source, that training would drop or refuse. notes: what is legal, but good to know.
    refused: why training would not start with this source, or None. images: samples whose images were decoded.
    """

    name: str
    path: str
    lines: int = 0
    samples: int = 0
    images: int = 0
    problems: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str | None = None

    @property
    def num_problems(self) -> int:
        """Bad samples, a source that cannot be read counted as one."""
        return sum(group.count for group in self.problems)


def expanded(recipe: schema.Recipe) -> tuple[schema.Recipe, dict[str, DataError]]:
    """The recipe with blends replaced by what they name, and the blends that cannot be read. Raises DataError when two
    sources have one name."""
    failed: dict[str, DataError] = {}

    def readable(sources: dict[str, schema.Source]) -> dict[str, schema.Source]:
        found = {}
        for name, given in sources.items():
            data = recipe.data.model_copy(update={"mixture": {name: given}})
            try:
                expand_sources(recipe.model_copy(update={"data": data, "validation": None}))
                found[name] = given
            except DataError as error:
                failed[name] = error
        return found

    data = recipe.data.model_copy(update={"mixture": readable(recipe.data.mixture)})
    validation = recipe.validation
    if validation is not None:
        validation = validation.model_copy(update={"sources": readable(validation.sources)})
    return expand_sources(recipe.model_copy(update={"data": data, "validation": validation})), failed


def sources_of(recipe: schema.Recipe) -> dict[str, schema.Source]:
    """Every source that a run of this recipe reads, those of validation last."""
    return {**recipe.data.mixture, **(recipe.validation.sources if recipe.validation else {})}


def printable(text: str) -> str:
    """Text of a data set as a terminal may see it: control characters spelt out, so that none is obeyed.

    Example: a red "no" (ESC [31m no) comes out as the letters \\x1b[31mno.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ------------------------------------------------------------------------------------------------------------- indexes


@dataclass(frozen=True)
class _Opened:
    index: SourceIndex
    existed: bool
    folder: Path
    seconds: float


def _open(
    name: str,
    given: schema.Source,
    settings: IndexSettings,
    index_dir: Path,
    *,
    num_workers: int,
    rebuild: bool = False,
) -> _Opened:
    """The index of one source, however bad it is; built where it is missing. Raises DataError."""
    begin = time.monotonic()
    source = open_source(name, given)
    folder = index_dir / f"{name}-{index_key(source, settings)}"
    if rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    existed = (folder / "meta.json").exists()
    index = open_index(source, settings, index_dir, max_bad_share=1.0, rank=0, judge=False, num_workers=num_workers)
    return _Opened(index, existed, folder, time.monotonic() - begin)


def _open_all(
    recipe: schema.Recipe, settings: IndexSettings, *, num_workers: int | None, rebuild: bool = False
) -> dict[str, _Opened | DataError]:
    """The indexes of all sources of an expanded recipe, or why one has none."""
    workers = recipe.data.index_workers if num_workers is None else num_workers
    index_dir = make_index_dir(recipe)
    opened: dict[str, _Opened | DataError] = {}
    for name, given in sources_of(recipe).items():
        try:
            opened[name] = _open(name, given, settings, index_dir, num_workers=workers, rebuild=rebuild)
        except DataError as error:
            opened[name] = error
    return opened


def index_command(args: Namespace) -> int:
    """`data index`: builds the index of every source, says which were there already; 2 when training would refuse."""
    recipe, failed = expanded(load_recipe(args.recipe, args.overrides).recipe)
    settings = IndexSettings.of(recipe, load_tokenizer(recipe.tokenizer.path))
    index_dir = index_dir_of(recipe)
    opened = {**failed, **_open_all(recipe, settings, num_workers=args.workers, rebuild=args.rebuild)}
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for name, one in opened.items():
        if isinstance(one, DataError):
            refused.append(str(one))
            rows.append({"source": name, "state": "failed", "error": str(one)})
            continue
        problem = too_bad(one.index, settings, recipe.data.max_bad_share)
        if problem is not None:
            refused.append(problem)
        rows.append(
            {
                "source": name,
                "state": "exists" if one.existed else "built",
                "samples": len(one.index.rows),
                "lines": one.index.num_lines,
                "dropped": dict(one.index.dropped),
                "bytes": sum(file.stat().st_size for file in one.folder.iterdir()),
                "seconds": round(one.seconds, 3),
                "folder": str(one.folder),
                **({"error": problem} if problem is not None else {}),
            }
        )
    if args.json:
        print(json.dumps({"ok": not refused, "index_dir": str(index_dir), "sources": rows}, indent=2))
        return 2 if refused else 0
    cells = [["source", "index", "samples", "lines", "dropped", "size", "seconds"]]
    for row in rows:
        if row["state"] == "failed":
            cells.append([str(row["source"]), "failed", "", "", "", "", ""])
            continue
        count, size = f"{row['samples']:,}", f"{row['bytes']:,}"
        dropped = f"{sum(row['dropped'].values()):,}"
        cells.append(
            [row["source"], row["state"], count, f"{row['lines']:,}", dropped, size + " B", f"{row['seconds']:.1f}"]
        )
    print(table(cells))
    print(f"\nin {index_dir}")
    if refused:
        raise DataError("\n".join(printable(line) for problem in refused for line in problem.splitlines()))
    return 0


def table(cells: Sequence[Sequence[str]], left: int = 2) -> str:
    """Rows of cells in columns; the first `left` columns flush left, numbers flush right."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for row in cells:
        parts = [f"{c:<{w}}" if k < left else f"{c:>{w}}" for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- lint


def lint_command(args: Namespace) -> int:
    """`data lint`: every problem of every source; 0 when there is none, 2 otherwise."""
    recipe = load_recipe(args.recipe, args.overrides).recipe
    reports = lint(recipe, images=args.images, threads=args.threads, index_workers=args.workers, examples=args.examples)
    found = sum(report.num_problems for report in reports)
    if args.json:
        print(json.dumps({"ok": not found, "problems": found, "sources": [asdict(r) for r in reports]}, indent=2))
    else:
        print("\n".join(_lines(reports, args.images)))
    return 2 if found else 0


def lint(
    recipe: schema.Recipe,
    *,
    images: bool = False,
    threads: int = 2,
    index_workers: int | None = None,
    examples: int = 3,
) -> list[SourceReport]:
    """Looks through all sources. Raises DataError only for what they share (the tokenizer)."""
    tokenizer = load_tokenizer(recipe.tokenizer.path)
    recipe, failed = expanded(recipe)
    settings = IndexSettings.of(recipe, tokenizer)
    opened = _open_all(recipe, settings, num_workers=index_workers)
    reports = [_unreadable(name, error) for name, error in failed.items()]
    with tempfile.TemporaryDirectory(prefix="nvlm-lint-") as scratch:
        for name, given in sources_of(recipe).items():
            one = opened[name]
            if isinstance(one, DataError):
                reports.append(_unreadable(name, one, given.path))
                continue
            report = SourceReport(name, given.path)
            reports.append(report)
            look_in = recipe
            if one.existed and any("image" in reason for reason in one.index.dropped):
                # Images are no part of the key: what was missing then may be there now.
                data = recipe.data.model_copy(update={"index_dir": scratch})
                look_in = recipe.model_copy(update={"data": data})
                then = one.index.num_bad
                one = _open(name, given, settings, Path(scratch), num_workers=0)
                if one.index.num_bad != then:
                    report.notes.append(
                        f"its index counts {then} bad samples, today there are {one.index.num_bad}: images have "
                        "changed since; `data index --rebuild` takes them in"
                    )
            index = one.index
            _from_index(report, index, settings, recipe.data, examples)
            if images and index.rows["tiles"].any():
                _decode(report, index, look_in, given, threads, examples)
            report.refused = report.refused or too_bad(index, settings, recipe.data.max_bad_share)
        reports += _judge_cache(recipe.data.remote_cache)
        _judge_validation(reports, {n: o.index for n, o in opened.items() if not isinstance(o, DataError)}, recipe)
        _doubles(reports, {n: o.index for n, o in opened.items() if not isinstance(o, DataError)}, recipe)
    return reports


def _unreadable(name: str, error: DataError, path: str = "") -> SourceReport:
    problem = Group("cannot be read", 1, [Example(path or name, str(error))])
    return SourceReport(name, path, problems=[problem], refused=str(error))


def _from_index(
    report: SourceReport, index: SourceIndex, settings: IndexSettings, data: schema.Data, examples: int
) -> None:
    report.lines, report.samples = index.num_lines, len(index.rows)
    report.notes += index.source.notes()
    kept: dict[str, list[BadRow]] = {}
    for row in index.bad:
        kept.setdefault(row.reason, []).append(row)
    if index.num_lines == 0:
        report.problems.append(Group("empty source", 1, [Example(report.path, "holds no sample")]))
    for reason, count in sorted(index.dropped.items(), key=lambda item: (-item[1], item[0])):
        shown = [Example(row.where, row.message) for row in kept.get(reason, ())[:examples]]
        if reason == OVERLONG and settings.overlong != "error":
            first = f"; the first: {shown[0].where}: {shown[0].message}" if shown else ""
            report.notes.append(
                f"{count:,} longer than data.max_tokens_per_sample {settings.max_tokens}, dropped "
                f"(data.overlong: {data.overlong}){first}"
            )
        elif reason == BELOW_RATING:
            report.notes.append(f"{count:,} left out, because no pair has the ratings of min_ratings")
        else:
            report.problems.append(Group(reason, count, shown))
    limit = f"to fit data.max_tokens_per_sample {settings.max_tokens}"
    if index.fewer_tiles:
        report.notes.append(f"{index.fewer_tiles:,} cut into fewer tiles {limit}")
    if index.truncated:
        report.notes.append(f"{index.truncated:,} lose text at their end {limit}")
    untrained = int((index.rows["trained"] == 0).sum())
    if untrained:
        report.notes.append(f"{untrained:,} have no trained token")


def _decode(
    report: SourceReport,
    index: SourceIndex,
    recipe: schema.Recipe,
    given: schema.Source,
    threads: int,
    examples: int,
) -> None:
    """Loads every sample with an image as training would, and groups what fails."""
    # A run of one step over this source: nothing but `load` is asked of its plan.
    data = recipe.data.model_copy(update={"mixture": {report.name: given}, "pack_tiles": None})
    length = {"max_steps": 1, "max_samples": None, "max_tokens": None, "num_epochs": None}
    step = schema.GlobalBatch(samples=1)
    alone = recipe.model_copy(update={"data": data, "validation": None, "global_batch": step, **length})
    plan = open_data(alone, rank=0, world_size=1, judge=False)

    def problem_of(row: int) -> tuple[int, BadSample] | None:
        try:
            plan.load(SampleRef(report.name, row, 0))
        except BadSample as error:
            return row, error
        return None

    rows = np.flatnonzero(index.rows["tiles"] > 0)
    report.images = len(rows)
    groups: dict[str, Group] = {}
    results = in_threads(problem_of, rows.tolist(), threads)
    for found in _progress(results, f"decode {report.name}", len(rows), "sample"):
        if found is None:
            continue
        row, error = found
        group = groups.setdefault(error.reason, Group(error.reason, 0))
        group.count += 1
        if len(group.examples) < examples:
            group.examples.append(Example(index.where(row), str(error)))
    report.problems += sorted(groups.values(), key=lambda group: -group.count)


def _judge_cache(cache: schema.RemoteCache | None) -> list[SourceReport]:
    """A problem where the cache of remote files cannot be written: training would go on, and fetch everything."""
    if cache is None:
        return []
    try:
        Path(cache.path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.path):
            return []
    except OSError as error:
        message = f"{cache.path} cannot be written ({error.strerror}), so nothing would be kept; give another path"
        return [
            SourceReport("data.remote_cache", cache.path, problems=[Group("not writable", 1, [Example("", message)])])
        ]


def _judge_validation(reports: Sequence[SourceReport], indexes: dict[str, SourceIndex], recipe: schema.Recipe) -> None:
    """A problem where the held-out share leaves nothing to validate on; told only when every source can be read."""
    if recipe.validation is None or set(indexes) != set(sources_of(recipe)):
        return
    folder = make_index_dir(recipe)
    share = recipe.validation.held_out_share
    held = {
        name: len(split_rows(index, share, recipe.data.pack_tiles, folder)[1])
        for name, index in indexes.items()
        if name in recipe.data.mixture
    }
    if found := nothing_held_out(recipe, held, indexes):
        name, message = found
        report = next(one for one in reports if one.name == name)
        report.problems.append(Group("nothing held out", 1, [Example(report.path, message)]))
        report.refused = report.refused or message


def _doubles(reports: Sequence[SourceReport], indexes: dict[str, SourceIndex], recipe: schema.Recipe) -> None:
    """Notes on samples that come twice: inside a source, and in validation as well as in training."""
    keys = {}
    for name, index in indexes.items():
        columns = [index.rows[column].astype(np.uint64) for column in ("hash", "tokens", "tiles")]
        # one number a sample: hash, tokens, tiles; equal for equal samples, and hardly ever for others
        keys[name] = np.unique((columns[0] << np.uint64(32)) ^ (columns[1] << np.uint64(12)) ^ columns[2])
    for report in reports:
        if report.name not in keys:
            continue
        repeated = len(indexes[report.name].rows) - len(keys[report.name])
        if repeated:
            report.notes.append(f"{repeated:,} repeat an earlier sample of this source")
        if report.name in recipe.data.mixture:
            continue
        for other in recipe.data.mixture:
            shared = len(np.intersect1d(keys[report.name], keys[other])) if other in keys else 0
            if shared:
                report.notes.append(f"{shared:,} are trained on as well, in source {other!r}: validation is not apart")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` with threads, in order, with a bounded number of items on their way."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="nvlm-lint") as threads:
        try:
            for item in items:
                waiting.append(threads.submit(function, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _progress(items: Iterable[Item], what: str, total: int, unit: str) -> Iterator[Item]:
    from tqdm import tqdm

    yield from tqdm(items, desc=what, total=total, unit=unit, delay=2.0, leave=False, disable=None)


def _lines(reports: Sequence[SourceReport], images: bool) -> list[str]:
    lines: list[str] = []
    for report in reports:
        decoded = f", images of {report.images:,} decoded" if images else ""
        lines.append(f"{report.name}  {report.path}: {report.samples:,} of {report.lines:,} records usable{decoded}")
        for group in report.problems:
            lines.append(f"  {group.count:>7,}  {group.reason}")
            shown = [f"{item.where}: {item.message}" if item.where else item.message for item in group.examples]
            lines += [f"           {printable(one)}" for one in shown]
            if group.examples and group.count > len(group.examples):
                lines.append(f"           ... and {group.count - len(group.examples):,} more")
        lines += [f"     note  {printable(note)}" for note in report.notes]
        if not report.problems:
            lines.append("       ok")
        lines.append("")
    counts: Counter[str] = Counter({report.name: report.num_problems for report in reports if report.problems})
    if not counts:
        more = "" if images else " that can be seen without decoding images (--images does that)"
        lines.append(f"no problem in {len(reports)} sources{more}")
        return lines
    total = sum(counts.values())
    lines.append(f"{total:,} problem{'s' * (total > 1)} in {len(counts)} of {len(reports)} sources")
    lines += [
        f"training would refuse {printable(report.refused.splitlines()[0])}" for report in reports if report.refused
    ]
    return lines
