"""What the model will see, for a reader: `nvlm-train data preview`.

A sample is read, cut and rendered by the code that training calls (`DataPlan.load`), so what is shown is what is
trained: messages, pictures, tiles with their tags, and the token stream with the tokens that carry loss marked. A step
is shown as the packs that the plan makes of it. `--html` writes the same as one page (`preview_page`).
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from nvlm_train.batch import IGNORE_INDEX, SampleRef
from nvlm_train.data import chat, tiling
from nvlm_train.data.images import BadSample, open_image
from nvlm_train.data.index import SourceIndex
from nvlm_train.data.lint import printable
from nvlm_train.data.memory import ReadingRun, runs_of
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan, LoadedSample, open_data
from nvlm_train.data.sources import Sample
from nvlm_train.errors import DataError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.show import world_size_of

_WIDTH = 100  # characters of the stream in a line
_GREEN, _DIM, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Span:
    """A stretch of the stream that is shown as one: a token, a few that make one character, or a tile's placeholders.

    begin: position of the first token in the sample. trained: whether these tokens are predicted under loss.
    tile: number of the tile, or -1.
    """

    begin: int
    ids: tuple[int, ...]
    text: str
    kind: Literal["text", "control", "tile"]
    trained: bool
    tile: int = -1


@dataclass(frozen=True)
class Picture:
    """An image of a sample: as stored, and as cut. grid: columns and rows; tags: one a tile, the thumbnail's last."""

    name: str
    image: Image.Image
    grid: tuple[int, int]
    tiles: Any  # u8[t, 3, px, px]
    tags: list[str]


@dataclass(frozen=True)
class View:
    """A sample for showing. `problem` stands alone: the sample could not be loaded.

    reads: which tokens read which tiles by cross-attention; none in nvlm_d.
    """

    ref: SampleRef
    where: str
    messages: list[dict[str, Any]]
    pictures: list[Picture]
    spans: list[Span]
    problem: str | None = None
    reads: tuple[ReadingRun, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample."""
        return sum(len(span.ids) for span in self.spans)

    @property
    def num_trained(self) -> int:
        """Tokens under loss."""
        return sum(len(span.ids) for span in self.spans if span.trained)

    @property
    def num_tiles(self) -> int:
        """Tiles of all its images."""
        return sum(len(picture.tiles) for picture in self.pictures)


def preview_command(args: Namespace) -> int:
    """`data preview`: text, JSON or a page; 2 when a sample that was asked for cannot be loaded."""
    recipe = load_recipe(args.recipe, args.overrides).recipe
    if args.row is not None and args.source is None:
        raise DataError(f"--row {args.row}: needs --source NAME; rows are counted within a source")
    if args.line is not None and args.source is None:
        raise DataError(f"--line {args.line}: needs --source NAME")
    plan = open_data(recipe, rank=0, world_size=world_size_of(args), judge=False)
    if args.source is not None:
        one = args.row is not None or args.line is not None
        count = args.samples if args.samples is not None else (1 if one else 3)
        row = row_of_line(plan, args.source, args.line) if args.line is not None else args.row or 0
        refs, dealt = rows_of(plan, args.source, row, count), None
    else:
        dealt = plan.deal_step(args.step)
        refs = chosen_of(dealt, 3 if args.samples is None else args.samples)
    views = [view(plan, ref) for ref in refs]
    if args.html is not None:
        from nvlm_train.data.preview_page import page

        path = Path(args.html)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page(plan, views, dealt, args.step), encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"--html {path}: cannot be written ({error.strerror}); name a file in a folder of yours"
            ) from error
    if args.json:
        print(json.dumps({**_step_values(dealt, args.step), "samples": [_values(one) for one in views]}, indent=2))
    elif args.html is not None:
        print(f"{args.html}: {len(views)} samples" + (f", {len(refs_of(dealt))} in packs" if dealt else ""))
    else:
        lines = step_lines(plan, dealt, args.step) if dealt is not None else []
        colour = sys.stdout.isatty()
        print("\n".join([*lines, *(line for one in views for line in view_lines(one, colour))]))
    return 2 if any(one.problem for one in views) else 0


# ----------------------------------------------------------------------------------------------------- what to look at


def rows_of(plan: DataPlan, source: str, row: int, count: int) -> list[SampleRef]:
    """`count` usable samples of a source from number `row` on. Raises DataError for a name or number there is not."""
    held = len(_index_of(plan, source).rows)
    if row >= held:
        raise DataError(
            f"--row {row}: source {source!r} has {held} usable samples; use 0 to {held - 1}, or --line for the number "
            "that a message gives"
        )
    return [SampleRef(source, number, 0) for number in range(row, min(row + count, held))]


def row_of_line(plan: DataPlan, source: str, line: str) -> int:
    """The usable sample that stands at `[FILE:]N`, numbered as `lint` and bad_samples.jsonl do. Raises DataError, with
    the reason where the sample there was dropped."""
    index = _index_of(plan, source)
    file, _, number = line.rpartition(":")
    if not number.isascii() or not number.isdigit():
        raise DataError(f"--line {line}: is not N or FILE:N, with N the number that a message gives")
    rows = np.flatnonzero(index.rows["line"] == int(number)).tolist()
    found = {index.where(row): row for row in rows if file in index.where(row)}
    dropped = {bad.where: bad for bad in index.bad if bad.line == int(number) and file in bad.where}
    if len(found) + len(dropped) > 1:
        places = ", ".join(sorted([*found, *dropped])[:5])
        raise DataError(f"--line {line}: is in several files of source {source!r} ({places}); name one: FILE:{number}")
    if dropped:
        (bad,) = dropped.values()
        raise DataError(f"--line {line}: {bad.where} was dropped as {bad.reason}: {bad.message}")
    if not found:
        raise DataError(f"--line {line}: source {source!r} has no sample there; it has {index.num_lines} records")
    return next(iter(found.values()))


def _index_of(plan: DataPlan, source: str) -> SourceIndex:
    if source not in plan.indexes:
        raise DataError(f"--source {source}: is not a source of this recipe; use one of {', '.join(plan.indexes)}")
    return plan.indexes[source]


def refs_of(dealt: Sequence[Sequence[Sequence[Pack]]]) -> list[SampleRef]:
    """All samples of a step in the order of its packs."""
    return [ref for ranks in dealt for packs in ranks for pack in packs for ref in pack.samples]


def chosen_of(dealt: Sequence[Sequence[Sequence[Pack]]], count: int) -> list[SampleRef]:
    """`count` samples of a step: the first of each source, then others as they come."""
    refs = refs_of(dealt)
    first = {ref.source: ref for ref in reversed(refs)}
    chosen = sorted(first.values(), key=refs.index)
    return [*chosen, *(ref for ref in refs if ref not in chosen)][:count]


def read_sample(plan: DataPlan, ref: SampleRef) -> tuple[Sample, list[Image.Image]]:
    """Messages and pictures of a sample as they are stored. Raises BadSample."""
    sample = plan.sources[ref.source].sample(plan.indexes[ref.source].rows[ref.row])
    return sample, [open_image(image.read(), image.name, plan.settings.images) for image in sample.images]


def view(plan: DataPlan, ref: SampleRef) -> View:
    """Everything that is shown of a sample."""
    index = plan.indexes[ref.source]
    place = index.where(ref.row)
    try:
        loaded = plan.load(ref)
        sample, images = read_sample(plan, ref)
    except BadSample as error:
        return View(ref, place, [], [], [], f"{error.reason}: {error}")
    settings = plan.settings
    pictures = []
    for named, image, tiles in zip(sample.images, images, loaded.tiles, strict=True):
        limit = int(index.rows[ref.row]["max_tiles"])
        grid = tiling.choose_grid(image.width, image.height, limit, settings.tile_size)
        if grid[0] * grid[1] not in (len(tiles), len(tiles) - 1):
            grid = (len(tiles), 1)
        tags = chat.tile_tags(len(tiles), settings.tiling, settings.template)
        pictures.append(Picture(named.name, image, grid, tiles, tags))
    reads = tuple(runs_of(loaded.rendered, settings.image_tokens_per_tile, plan.recipe.model))
    return View(ref, place, sample.messages, pictures, spans_of(plan, loaded), reads=reads)


def spans_of(plan: DataPlan, loaded: LoadedSample) -> list[Span]:
    """The stream in pieces that can be shown.

    Label t is what position t must predict, so the token at position t is trained when label t-1 is not IGNORE_INDEX.
    Tokens that are only part of a character (byte-level BPE cuts through them) come together in one span.
    """
    tokenizer, rendered = plan.tokenizer, loaded.rendered
    ids = rendered.input_ids.tolist()
    trained = [False, *(label != IGNORE_INDEX for label in rendered.labels.tolist()[:-1])]
    control = {tokenizer.im_start, tokenizer.im_end, tokenizer.pad}
    starts = {start: number for number, start in enumerate(rendered.tile_starts) if start >= 0}
    per_tile = plan.settings.image_tokens_per_tile
    spans: list[Span] = []
    at = 0
    while at < len(ids):
        if at in starts:
            held = tuple(ids[at : at + per_tile])
            spans.append(Span(at, held, "", "tile", any(trained[at : at + per_tile]), starts[at]))
            at += per_tile
            continue
        end = at + 1
        text = tokenizer.decode(ids[at:end])
        if ids[at] in control:
            spans.append(Span(at, (ids[at],), text, "control", trained[at]))
            at = end
            continue
        while (
            text.endswith("\ufffd")
            and end < min(len(ids), at + 4)
            and trained[end] == trained[at]
            and ids[end] not in control
            and end not in starts
        ):
            end += 1
            text = tokenizer.decode(ids[at:end])
        spans.append(Span(at, tuple(ids[at:end]), text, "text", trained[at]))
        at = end
    return spans


# ---------------------------------------------------------------------------------------------------------- as text


def step_lines(plan: DataPlan, dealt: Sequence[Sequence[Sequence[Pack]]], step: int) -> list[str]:
    """A step's packs, one a line."""
    refs = refs_of(dealt)
    packs = sum(not pack.is_null for ranks in dealt for held in ranks for pack in held)
    lines = [
        f"step {step}: {len(refs)} samples in {packs} packs of at most {plan.recipe.data.pack_tokens:,} tokens, "
        f"{len(dealt)} micro-step{'s' * (len(dealt) > 1)} on {plan.world_size} rank{'s' * (plan.world_size > 1)}"
    ]
    most = max((pack.cost for ranks in dealt for held in ranks for pack in held), default=0.0) or 1.0
    for number, ranks in enumerate(dealt):
        for rank, held in enumerate(ranks):
            for pack in held:
                at = f"  micro-step {number} rank {rank}  "
                if pack.is_null:
                    lines.append(f"{at}null pack")
                    continue
                sources = [f"{ref.source}" for ref in pack.samples]
                counts = ", ".join(f"{sources.count(name)} {name}" for name in dict.fromkeys(sources))
                lines.append(
                    f"{at}{pack.tokens:>7,} tokens {pack.tiles:>5,} tiles  cost {pack.cost / most:4.0%}  {counts}"
                )
    return [*lines, ""]


def heading(one: View) -> str:
    """Which sample it is, and how large."""
    seen = f", epoch {one.ref.epoch}" if one.ref.epoch else ""
    text = f"{one.ref.source} row {one.ref.row}{seen}  {one.where}"
    if one.problem is not None:
        return text
    return f"{text}: {one.num_tokens:,} tokens, {one.num_trained:,} trained, {one.num_tiles} tiles"


def view_lines(one: View, colour: bool) -> list[str]:
    """A sample as text. Trained tokens stand in « », on a terminal in green; \\n and other control signs spelt out."""
    lines = [printable(heading(one))]
    if one.problem is not None:
        return [*lines, f"  cannot be used: {printable(one.problem)}", ""]
    for message in one.messages:
        text = "".join(
            part["text"] if "text" in part else f"<image {part['image'] + 1}>" for part in message["content"]
        )
        untrained = "" if message.get("loss", True) else "  (loss: false)"
        lines.append(f"  {message['role']:<10} {printable(text)}{untrained}")
    for number, picture in enumerate(one.pictures, start=1):
        columns, rows = picture.grid
        thumbnail = " and a thumbnail" if len(picture.tiles) > columns * rows else ""
        size = f"{picture.image.width} x {picture.image.height} pixels"
        cut = f"{columns} x {rows} tile{'s' * (columns * rows > 1)}{thumbnail}"
        lines.append(f"  image {number:<4} {printable(picture.name)}, {size}: {cut}")
    for number, run in enumerate(one.reads):
        tokens = f"{run.begin}" if run.end == run.begin + 1 else f"{run.begin} to {run.end - 1}"
        tiles = f"tile {run.first + 1}" if run.last == run.first + 1 else f"tiles {run.first + 1} to {run.last}"
        lines.append(f"  {'reads' if number == 0 else '':<10} tokens {tokens}: {tiles}")
    lines.append(
        "  stream     position of the first token, then the tokens; trained ones " + ("green" if colour else "in « »")
    )
    for position, text in _stream(one.spans, colour):
        lines.append(f"  {position:>9}  {text}")
    return [*lines, ""]


def _stream(spans: Sequence[Span], colour: bool) -> list[tuple[int, str]]:
    lines: list[tuple[int, str]] = []
    begin, text, width, trained = 0, "", 0, False

    def close() -> None:
        nonlocal text, width, trained
        if text:
            lines.append((begin, text + _mark(trained, False, colour)))
        text, width, trained = "", 0, False

    for span in spans:
        shown = f"[tile {span.tile + 1}: {len(span.ids)} image tokens]" if span.kind == "tile" else printable(span.text)
        if span.kind == "tile" or width + len(shown) > _WIDTH or (span.kind == "control" and "start" in span.text):
            close()
        if not text:
            begin = span.begin
        text += _mark(trained, span.trained, colour) + shown
        trained, width = span.trained, width + len(shown)
        if span.kind == "tile":
            close()
    close()
    return lines


def _mark(before: bool, now: bool, colour: bool) -> str:
    if before == now:
        return ""
    if colour:
        return _GREEN if now else _PLAIN
    return "«" if now else "»"


# ---------------------------------------------------------------------------------------------------------- as JSON


def _values(one: View) -> dict[str, Any]:
    values: dict[str, Any] = {"source": one.ref.source, "row": one.ref.row, "epoch": one.ref.epoch, "where": one.where}
    if one.problem is not None:
        return {**values, "problem": one.problem}
    return {
        **values,
        "tokens": one.num_tokens,
        "trained": one.num_trained,
        "messages": one.messages,
        "images": [
            {
                "name": picture.name,
                "width": picture.image.width,
                "height": picture.image.height,
                "grid": list(picture.grid),
                "tags": picture.tags,
            }
            for picture in one.pictures
        ],
        "reads": [
            {"tokens": list(range(run.begin, run.end)), "tiles": list(range(run.first, run.last))} for run in one.reads
        ],
        "stream": [
            {
                "position": span.begin,
                "ids": list(span.ids),
                "text": span.text,
                "kind": span.kind,
                "trained": span.trained,
            }
            for span in one.spans
        ],
    }


def _step_values(dealt: Sequence[Sequence[Sequence[Pack]]] | None, step: int) -> dict[str, Any]:
    if dealt is None:
        return {}
    packs = [
        {
            "micro_step": number,
            "rank": rank,
            "tokens": pack.tokens,
            "tiles": pack.tiles,
            "cost": pack.cost,
            "samples": [[ref.source, ref.row, ref.epoch] for ref in pack.samples],
        }
        for number, ranks in enumerate(dealt)
        for rank, held in enumerate(ranks)
        for pack in held
    ]
    return {"step": step, "packs": packs}
