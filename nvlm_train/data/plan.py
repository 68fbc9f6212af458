"""The plan: from a recipe and an index alone, which samples a step holds, in which packs, and who trains them.

Every rank computes it alone and all get the same; nothing here opens an image before `DataPlan.load`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import SampleRef
from nvlm_train.data import chat, packing, tiling
from nvlm_train.data.fit import shorten
from nvlm_train.data.images import AUGMENTATIONS, BadSample, open_image
from nvlm_train.data.index import (
    IndexSettings,
    SourceIndex,
    index_dir_of,
    make_index_dir,
    open_index,
    pieces,
    split_rows,
)
from nvlm_train.data.mixture import Draws, Mixture, Shards
from nvlm_train.data.packing import Balance, Pack
from nvlm_train.data.slow import SlowReads
from nvlm_train.data.sources import Source, expand_sources, open_source
from nvlm_train.data.sources.block_cache import BlockCache
from nvlm_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nvlm_train.data.windows import (
    Column,
    RunLength,
    Steps,
    Stretch,
    Windows,
    data_step,
    first_packs,
    locate,
    resolve_steps,
    window_samples,
)
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger
from nvlm_train.recipe import schema

log = get_logger(__name__)

STATE_VERSION = 1
TOO_MANY_TILES = "more tiles than pack_tiles"


@dataclass(frozen=True)
class LoadedSample:
    """A sample read, rendered and decoded."""

    ref: SampleRef
    rendered: chat.Rendered
    tiles: list[NDArray[np.uint8]]  # one u8[t, 3, px, px] per image


@dataclass(frozen=True)
class Prediction:
    """What some steps hold on average, and what the cost model says of them.

    efficiency: tokens of samples by tokens that their packs could hold. null_share: of all packs that ranks run.
    balance: mean over the steps. utilisation: see `packing.utilisation`.
    """

    steps: int
    samples_per_step: float
    packs_per_step: float
    tokens_per_step: float
    tiles_per_step: float
    efficiency: float
    null_share: float
    balance: Balance
    utilisation: float


def order_digest(
    names: Sequence[str],
    order: Sequence[str],
    limits: Sequence[Any],
    settings: IndexSettings,
    indexes: Mapping[str, SourceIndex],
    train_rows: Mapping[str, NDArray[np.int64]],
) -> str:
    """16 hex digits of everything that an order depends on; not the paths, because data may be moved."""
    digest = hashlib.sha256(json.dumps([names, order, limits, settings.key_parts()], sort_keys=True).encode())
    for name in names:
        for column in ("hash", "tokens", "tiles", "max_tiles"):
            values = indexes[name].rows[column]
            for rows in pieces(train_rows[name]):
                digest.update(values[rows].tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class DataPlan:
    """What a run trains on, in which order, and who trains it: everything a rank can know without asking another.

    train_rows, held_out: rows of each mixture source's index on either side of validation.held_out_share.
    dropped_at_index: (source, reason) -> lines left out, over-long ones too.
    fewer_tiles: samples of each source that keep all images but in fewer tiles. truncated: whose text is cut.
    """

    recipe: schema.Recipe
    rank: int
    world_size: int
    tokenizer: ChatTokenizer
    settings: IndexSettings
    sources: Mapping[str, Source]
    indexes: Mapping[str, SourceIndex]
    mixture: Mixture
    train_rows: Mapping[str, NDArray[np.int64]]
    held_out: Mapping[str, NDArray[np.int64]]
    cost: packing.Cost
    windows: Windows
    steps: Steps
    dropped_at_index: dict[tuple[str, str], int] = field(default_factory=dict)
    fewer_tiles: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    _dealt: dict[int, list[list[list[Pack]]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two plans that yield the same samples in the same order and packs."""
        order = [str(share) for share in self.mixture.shares]
        batch = self.recipe.global_batch
        limits: list[Any] = [self.mixture.seed, batch.samples, self.recipe.data.pack_tokens]
        if batch.packs is not None:  # the samples of a step are those of its packs
            limits += [batch.packs, self.recipe.data.pack_tiles, self.windows.size, packing.VERSION]
        if any(limit is not None for limit in self.mixture.limits):
            limits.append(self.mixture.limits)
        limits += self.mixture.shard_digests()
        return order_digest(self.mixture.names, order, limits, self.settings, self.indexes, self.train_rows)

    def source_digests(self) -> dict[str, str]:
        """SHA-256 of each source's samples, by the hashes and lengths in its index; paths do not count."""
        found = {}
        for name in self.mixture.names:
            digest = hashlib.sha256()
            rows = self.indexes[name].rows
            for column in ("hash", "tokens", "tiles"):
                for piece in pieces(rows[column]):
                    digest.update(piece.tobytes())
            found[name] = digest.hexdigest()
        return found

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps.number

    @property
    def num_samples(self) -> int:
        """Samples in all steps of the run; in steps of packs exact up to the last window."""
        samples, packs = self.recipe.global_batch.samples, self.recipe.global_batch.packs
        if samples is not None:
            return samples * self.num_steps
        assert packs is not None
        return self._positions(packs * self.num_steps)

    def ended_sources(self) -> list[str]:
        """What happens to sources whose max_epochs are over within the run, a line each."""
        total, lines = self.num_samples, []
        for name, (begin, end) in sorted(self.mixture.ends().items(), key=lambda item: item[1]):
            if begin >= total:
                continue
            first, last = (1 + (at * self.num_steps) // total for at in (begin, min(end, total) - 1))
            lines.append(
                f"{name}: max_epochs {self.recipe.data.mixture[name].max_epochs:g} end between steps {first} and "
                f"{last} (samples {begin + 1:,} to {min(end, total):,}); what is left of it is spread over them, below "
                "its weight, and the others share the rest"
            )
        return lines

    def _positions(self, pack: int) -> int:
        """About the position of the order where a pack stands: that of its window, and the same share of it."""
        window, offset = locate(self._first_packs, pack)
        if window >= len(self.steps.table):
            return min(window * self.windows.size, self.mixture.length or window * self.windows.size)
        return window * self.windows.size + round(self.windows.size * offset / int(self.steps.table[window, 0]))

    @cached_property
    def _first_packs(self) -> NDArray[np.int64]:
        return first_packs(self.steps.table)

    def state(self, step: int, skipped: Sequence[Stretch] | None = None) -> dict[str, Any]:
        """Where the data stands before `step`: the same on all ranks, under 1 kB, for a checkpoint.

        Everything follows from `step` and the skipped data steps (`skipped`: others than this plan's); the rest lets a
        resume notice that it would not go on where the run stopped.
        """
        skipped = self.steps.skipped if skipped is None else skipped
        found: dict[str, Any] = {
            "version": STATE_VERSION,
            "seed": self.mixture.seed,
            "fingerprint": self.fingerprint,
            "step": step,
        }
        drawn = data_step(step, skipped)
        if skipped:
            found |= {"data_step": drawn, "skip_steps": [list(stretch) for stretch in skipped]}
        if self.recipe.global_batch.packs is None:
            return found | {"position": drawn * (self.recipe.global_batch.samples or 0)}
        window, pack = locate(self._first_packs, drawn * self.recipe.global_batch.packs)
        return found | {"window": window, "pack_in_window": pack}

    def draws(self, step: int) -> list[SampleRef]:
        """The samples of a step: positions k*N to (k+1)*N - 1 of the mixture, N = global_batch.samples, k = its data
        step (the step itself where none are skipped); where a step is a number of packs, the samples of its packs."""
        size = self.recipe.global_batch.samples
        if size is None:
            return [ref for item in self.plan_step(step) for ref in item.samples]
        step = self.steps.data_step(step)
        return self._refs(self.mixture.draws(step * size, (step + 1) * size))

    def _refs(self, drawn: Draws) -> list[SampleRef]:
        names = self.mixture.names
        return [
            SampleRef(names[d], int(self.train_rows[names[d]][row]), epoch)
            for d, row, epoch in zip(drawn.source.tolist(), drawn.row.tolist(), drawn.epoch.tolist(), strict=True)
        ]

    def plan_step(self, step: int) -> list[Pack]:
        """The packs of a step, the same on every rank and for every number of ranks; the costliest first."""
        packs = self.recipe.global_batch.packs
        if packs is None:
            return self._pack(self.draws(step))
        found: list[Pack] = []
        window, begin = locate(self._first_packs, self.steps.data_step(step) * packs)
        while len(found) < packs:  # a step may end in another window than it began in
            planned = self.windows.plan(window)
            for held in planned.packs[begin : begin + packs - len(found)]:
                number = np.array(held)
                refs = self._refs(Draws(*(column[number] for column in planned.draws)))
                tokens, tiles = planned.tokens[number], planned.tiles[number]
                found.append(packing.make_pack(refs, tokens, tiles, range(len(refs)), self.cost))
            window, begin = window + 1, 0
        return packing.by_cost(found)

    def deal_step(self, step: int) -> list[list[list[Pack]]]:
        """The step's packs as [micro_step][rank] -> packs."""
        dealt = self._dealt.get(step)
        if dealt is None:
            dealt = packing.deal(self.plan_step(step), self.world_size, self.recipe.micro_batch_size)
            while len(self._dealt) > self.recipe.data.prefetch_steps + 2:  # asked for again when the step is recorded
                self._dealt.pop(next(iter(self._dealt)), None)
            self._dealt[step] = dealt
        return dealt

    def balance(self, step: int) -> Balance:
        """How evenly a step loads the ranks, from the plan alone; holes of bad samples are not known to it."""
        return packing.balance(self.deal_step(step), self.cost)

    def predict(self, num_steps: int, first: int = 0) -> Prediction:
        """What a run's `num_steps` steps from `first` hold and how well they use the ranks, predicted."""
        dealt = [self.deal_step(step) for step in range(first, min(first + num_steps, self.num_steps))]
        packs = [item for ranks in dealt for held in ranks for row in held for item in row]
        real = [item for item in packs if not item.is_null]
        pairs = [packing.work_and_time(ranks, self.cost) for ranks in dealt]
        spent = sum(time_ for _, time_ in pairs)
        balances = [packing.balance(ranks, self.cost) for ranks in dealt]
        steps = max(len(dealt), 1)
        return Prediction(
            steps=len(dealt),
            samples_per_step=sum(len(item.samples) for item in real) / steps,
            packs_per_step=len(real) / steps,
            tokens_per_step=sum(item.tokens for item in real) / steps,
            tiles_per_step=sum(item.tiles for item in real) / steps,
            efficiency=sum(item.tokens for item in real) / max(len(real) * self.recipe.data.pack_tokens, 1),
            null_share=1 - len(real) / max(len(packs), 1),
            balance=Balance(*(sum(ratios) / steps for ratios in zip(*balances, strict=True)))
            if balances
            else Balance(1.0, 1.0, 1.0),
            utilisation=sum(work for work, _ in pairs) / spent if spent else 1.0,
        )

    def validation_sources(self) -> list[str]:
        """What can be validated on: validation.sources, and the sources of the mixture that have a held-out part."""
        if self.recipe.validation is None:
            return []
        return [*self.recipe.validation.sources, *(name for name in self.mixture.names if len(self.held_out[name]))]

    def plan_validation(self, source_name: str) -> list[Pack]:
        """The packs of a validation source: its first validation.max_samples samples, the same for every world size."""
        if self.recipe.validation is None or source_name not in self.validation_sources():
            raise DataError(
                f"{source_name!r} is no validation source; there are {', '.join(self.validation_sources()) or 'none'}."
            )
        rows = self.held_out[source_name][: self.recipe.validation.max_samples]
        return self._pack([SampleRef(source_name, int(row), 0) for row in rows])

    def _pack(self, refs: Sequence[SampleRef]) -> list[Pack]:
        rows = [self.indexes[ref.source].rows[ref.row] for ref in refs]
        tokens = np.array([row["tokens"] for row in rows], dtype=np.int64)
        tiles = np.array([row["tiles"] for row in rows], dtype=np.int64)
        data = self.recipe.data
        return packing.pack(refs, tokens, tiles, data.pack_tokens, self.cost, data.pack_tiles)

    def chunks(self, ranks: Sequence[Sequence[Pack]]) -> int:
        """How often every rank runs a tower inside the engine in a micro-step: the most that any rank's tiles need."""
        most = max(sum(item.tiles for item in packs) for packs in ranks)
        return -(-most // self.recipe.vision_tiles_per_chunk)

    def load(
        self,
        ref: SampleRef,
        out: NDArray[np.uint8] | None = None,
        augment: bool = False,
        watch: SlowReads | None = None,
    ) -> LoadedSample:
        """Reads, renders and decodes one sample. Raises BadSample.

        out: u8[row's tiles, 3, px, px] that the tiles are written to. augment: whether data.augment applies.
        watch: told of every read, so that a slow one can be named.
        """
        index, source, settings = self.indexes[ref.source], self.sources[ref.source], self.settings
        watch = watch or SlowReads(math.inf)
        row = index.rows[ref.row]
        with watch.reading(index.where(ref.row)):
            sample = source.sample(row)
        tiles: list[NDArray[np.uint8]] = []
        for image in sample.images:
            with watch.reading(image.path or image.name):
                data = image.read()
            pixels = open_image(data, image.name, settings.images)
            if augment and self.recipe.data.augment != "none":
                alter = AUGMENTATIONS[self.recipe.data.augment]
                pixels = alter(pixels, self.recipe.seed, ref.source, ref.row, ref.epoch)
            free = None if out is None else out[sum(len(t) for t in tiles) :]
            fast = self.recipe.data.decode == "fast"
            tiles.append(
                tiling.cut(pixels, int(row["max_tiles"]), settings.tile_size, settings.tiling.thumbnail, fast, free)
            )
        rendered = chat.join(settings.lay_out(sample, [len(t) for t in tiles]), settings.tokenizer.encode)
        if settings.overlong == "truncate_text":
            rendered = shorten(rendered, settings.max_tokens)
        if len(rendered.tile_starts) != row["tiles"] or len(rendered.input_ids) != row["tokens"]:
            raise BadSample(
                "changed image",
                f"{len(rendered.tile_starts)} tiles and {len(rendered.input_ids)} tokens, but {row['tiles']} and "
                f"{row['tokens']} when it was indexed: an image has another size now",
            )
        return LoadedSample(ref, rendered, tiles)


def nothing_held_out(
    recipe: schema.Recipe, held_out: Mapping[str, int], indexes: Mapping[str, SourceIndex]
) -> tuple[str, str] | None:
    """The source and what is wrong, where validation.held_out_share leaves nothing to judge the run by.

    held_out: samples of each source that are validated on. A share is taken by each sample's hash, so a small source
    may well give none.
    """
    validation = recipe.validation
    if validation is None or not validation.held_out_share:
        return None
    if validation.best is not None:
        if validation.best not in held_out:  # a blend, which has become several sources
            return next(iter(recipe.data.mixture)), (
                f"validation.best: {validation.best!r} is not a source of its own, but stands for several; use one of "
                f"{', '.join(held_out)}"
            )
        if held_out[validation.best]:
            return None
        wrong, name = "validation.best", validation.best
        which = f"source {name!r} has no held-out sample"
        other = ", name another source in validation.best"
    elif any(held_out.values()) or validation.sources:
        return None
    else:
        wrong, name = "validation", max(recipe.data.mixture, key=lambda one: len(indexes[one].rows))
        which, other = f"no source has a held-out sample; the largest is {name!r}", ", name files in validation.sources"
    size = len(indexes[name].rows)
    enough = min(0.5, 10 / max(size, 1))
    return name, (
        f"{wrong}: {which}: validation.held_out_share {validation.held_out_share:g} takes none of its {size} samples. "
        f"Raise the share (validation.held_out_share={enough:.2g} takes about {enough * size:.0f} of them){other}, or "
        "validate nothing (validation=null)"
    )


def open_data(
    recipe: schema.Recipe, *, rank: int, world_size: int, judge: bool = True, skipped: tuple[Stretch, ...] = ()
) -> DataPlan:
    """Reads the tokenizer, indexes the sources (rank 0; others wait) and fixes the order. skipped: see `Steps`.

    Raises DataError with every problem of every source; with `judge=False` (to look, not to train) bad lines are none.
    """
    recipe = expand_sources(recipe)
    tokenizer = load_tokenizer(recipe.tokenizer.path)
    rows_of_embedding = recipe.model.language_model.vocab_size
    if tokenizer.vocab_size > rows_of_embedding:
        raise DataError(
            f"{recipe.tokenizer.path}: the tokenizer has {tokenizer.vocab_size} ids, but "
            f"model.language_model.vocab_size is {rows_of_embedding}; they must belong together."
        )
    settings = IndexSettings.of(recipe, tokenizer)
    validation = recipe.validation
    index_dir = make_index_dir(recipe) if rank == 0 else index_dir_of(recipe)
    sources: dict[str, Source] = {}
    indexes: dict[str, SourceIndex] = {}
    problems: list[str] = []
    cache = BlockCache(recipe.data.remote_cache) if recipe.data.remote_cache else None
    for name, given in {**recipe.data.mixture, **(validation.sources if validation else {})}.items():
        try:
            source = open_source(name, given)
            source.remote_cache = cache
            begin = time.monotonic()
            share = recipe.data.max_bad_share
            indexes[name] = open_index(source, settings, index_dir, max_bad_share=share, rank=rank, judge=judge)
            sources[name] = source
        except DataError as error:
            problems.append(str(error))
            continue
        if rank == 0:
            _report(indexes[name], index_dir, time.monotonic() - begin)
    if problems:
        raise DataError("\n".join(problems))
    share = validation.held_out_share if validation else 0.0
    train_rows: dict[str, NDArray[np.int64]] = {}
    held_out: dict[str, NDArray[np.int64]] = {}
    dropped = {(n, reason): count for n, index in indexes.items() for reason, count in index.dropped.items()}
    for name, index in indexes.items():
        _judge_tiles(index, recipe.data, dropped)
        if name not in recipe.data.mixture:
            held_out[name] = split_rows(index, 0.0, recipe.data.pack_tiles, index_dir)[0]
            continue
        train_rows[name], held_out[name] = split_rows(index, share, recipe.data.pack_tiles, index_dir)
        if not len(train_rows[name]):
            raise DataError(
                f"source {name!r}: validation.held_out_share {share} leaves none of its {len(index.rows)} samples to "
                "train on; lower the share."
            )
        if share > 0 and not len(held_out[name]):
            log.warning("source %r: held_out_share %g takes none of its %d samples", name, share, len(index.rows))
    if problem := nothing_held_out(recipe, {name: len(rows) for name, rows in held_out.items()}, indexes):
        raise DataError(problem[1])
    mixture = Mixture(
        recipe.seed,
        {name: len(rows) for name, rows in train_rows.items()},
        _weights(recipe.data, indexes, train_rows),
        {name: source.max_epochs for name, source in recipe.data.mixture.items()},
        {
            name: Shards(indexes[name].shard_sizes(rows), sources[name].settings.shards_per_group)
            for name, rows in train_rows.items()
            if sources[name].by_groups
        },
    )
    for d, name in enumerate(mixture.names):
        if sources[name].settings.shuffle == "shard_groups" and d not in mixture.shards:
            log.info("source %r: all its rows are mixed, because it has no more shards than shards_per_group", name)
    order = Windows(
        mixture,
        [Column(indexes[n].rows["tokens"], indexes[n].rows["tiles"], train_rows[n]) for n in mixture.names],
        recipe.data.pack_tokens,
        recipe.data.pack_tiles,
        window_samples(sum(mixture.sizes)),
    )
    return DataPlan(
        recipe=recipe,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer,
        settings=settings,
        sources=sources,
        indexes=indexes,
        mixture=mixture,
        train_rows=train_rows,
        held_out=held_out,
        cost=packing.Cost.of(recipe),
        windows=order,
        steps=_steps(recipe, order, settings, indexes, train_rows, index_dir, rank, skipped),
        dropped_at_index=dropped,
        fewer_tiles={n: index.fewer_tiles for n, index in indexes.items() if index.fewer_tiles},
        truncated={n: index.truncated for n, index in indexes.items() if index.truncated},
    )


def _weights(
    data: schema.Data, indexes: Mapping[str, SourceIndex], train_rows: Mapping[str, NDArray[np.int64]]
) -> dict[str, Fraction]:
    """Shares of samples: as given, or a share of tokens by the mean length of the source's samples."""
    weights = {name: Fraction(source.weight) for name, source in data.mixture.items()}
    if data.weight_unit == "tokens":
        for name, rows in train_rows.items():
            weights[name] *= Fraction(len(rows), int(indexes[name].rows["tokens"][rows].sum(dtype=np.int64)))
    return weights


def _judge_tiles(index: SourceIndex, data: schema.Data, dropped: dict[tuple[str, str], int]) -> None:
    """Counts the samples that have more tiles than a pack may hold, which are left out. Raises DataError."""
    if data.pack_tiles is None:
        return
    tiles = index.rows["tiles"]
    count = sum(int((piece > data.pack_tiles).sum()) for piece in pieces(tiles))
    if count and (data.overlong == "error" or count == len(tiles)):
        raise DataError(
            f"source {index.name!r}: {count} of {len(tiles)} samples have more tiles than data.pack_tiles "
            f"{data.pack_tiles}; raise it to {int(tiles.max())} or more, or lower data.tiling.max_tiles."
        )
    if count:
        log.warning("source %r: %d dropped as having %s %d", index.name, count, TOO_MANY_TILES, data.pack_tiles)
        dropped[index.name, TOO_MANY_TILES] = count


def _steps(
    recipe: schema.Recipe,
    order: Windows,
    settings: IndexSettings,
    indexes: Mapping[str, SourceIndex],
    train_rows: Mapping[str, NDArray[np.int64]],
    index_dir: Path,
    rank: int,
    skipped: tuple[Stretch, ...],
) -> Steps:
    """How many steps the run has; counts the packs of its windows where that is needed."""
    mixture, batch = order.mixture, recipe.global_batch
    length = RunLength.of(
        max_steps=recipe.max_steps,
        max_samples=recipe.max_samples,
        max_tokens=recipe.max_tokens,
        num_epochs=recipe.num_epochs,
        rows=sum(mixture.sizes),
    )
    table = index_dir / "windows"
    if batch.packs is not None or length.tokens is not None:
        kind = "packs" if batch.packs is not None else "tokens"
        limits = [kind, mixture.seed, order.capacity, order.tile_capacity, order.size, mixture.limits, packing.VERSION]
        limits += mixture.shard_digests()
        shares = [str(share) for share in mixture.shares]
        table /= f"{order_digest(mixture.names, shares, limits, settings, indexes, train_rows)}.npy"
    return resolve_steps(
        order, length, samples=batch.samples, packs=batch.packs, file=table, rank=rank, skipped=skipped
    )


def _report(index: SourceIndex, index_dir: Path, seconds: float) -> None:
    log.info("source %r: %d samples of %d lines (index %.1f s)", index.name, len(index.rows), index.num_lines, seconds)
    for reason, count in sorted(index.dropped.items()):
        first = next((row for row in index.bad if row.reason == reason), None)
        where = f", first {first.where}: {first.message}" if first else ""
        log.warning("source %r: %d dropped as %s%s", index.name, count, reason, where)
    if index.num_bad:
        folder = index_dir / f"{index.name}-{index.key}"
        log.warning(
            "source %r: the dropped lines are in %s; delete that folder to look again", index.name, folder / "meta.json"
        )
    for note in index.source.notes():
        log.warning("source %r: %s", index.name, note)
    if index.fewer_tiles:
        log.info("source %r: %d samples cut into fewer tiles to fit", index.name, index.fewer_tiles)
    if index.truncated:
        log.info("source %r: %d samples lose text at their end to fit", index.name, index.truncated)
