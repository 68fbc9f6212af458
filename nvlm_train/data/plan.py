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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import SampleRef
from nvlm_train.data import chat, packing, tiling
from nvlm_train.data.fit import shorten
from nvlm_train.data.images import AUGMENTATIONS, BadSample, open_image
from nvlm_train.data.index import IndexSettings, SourceIndex, index_dir_of, open_index
from nvlm_train.data.mixture import Mixture
from nvlm_train.data.packing import Pack
from nvlm_train.data.slow import SlowReads
from nvlm_train.data.sources import Source, expand_sources, open_source
from nvlm_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger
from nvlm_train.recipe import schema

log = get_logger(__name__)


@dataclass(frozen=True)
class LoadedSample:
    """A sample read, rendered and decoded."""

    ref: SampleRef
    rendered: chat.Rendered
    tiles: list[NDArray[np.uint8]]  # one u8[t, 3, px, px] per image


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
    dropped_at_index: dict[tuple[str, str], int] = field(default_factory=dict)
    fewer_tiles: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Equal for two plans that yield the same samples in the same order and packs."""
        order = [str(share) for share in self.mixture.shares]
        limits = [self.mixture.seed, self.recipe.global_batch.samples, self.recipe.data.pack_tokens]
        digest = hashlib.sha256(json.dumps([self.mixture.names, order, limits]).encode())
        for name in self.mixture.names:
            rows = self.indexes[name].rows[self.train_rows[name]]
            for column in ("hash", "tokens", "tiles", "max_tiles"):  # not the paths: data may be moved
                digest.update(np.ascontiguousarray(rows[column]).tobytes())
        return digest.hexdigest()[:16]

    def draws(self, step: int) -> list[SampleRef]:
        """The samples of a step: positions step*N to (step+1)*N - 1 of the mixture, N = global_batch.samples."""
        size = self.recipe.global_batch.samples
        drawn = self.mixture.draws(step * size, (step + 1) * size)
        names = self.mixture.names
        return [
            SampleRef(names[d], int(self.train_rows[names[d]][row]), epoch)
            for d, row, epoch in zip(drawn.source.tolist(), drawn.row.tolist(), drawn.epoch.tolist(), strict=True)
        ]

    def plan_step(self, step: int) -> list[Pack]:
        """The packs of a step, the same on every rank and for every number of ranks."""
        return self._pack(self.draws(step))

    def deal_step(self, step: int) -> list[list[list[Pack]]]:
        """The step's packs as [micro_step][rank] -> packs."""
        return packing.deal(self.plan_step(step), self.world_size, self.recipe.micro_batch_size)

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
        return packing.pack(refs, tokens, tiles, self.recipe.data.pack_tokens, self.cost)

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


def open_data(recipe: schema.Recipe, *, rank: int, world_size: int, judge: bool = True) -> DataPlan:
    """Reads the tokenizer, indexes the sources (rank 0; others wait) and fixes the order.

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
    index_dir = index_dir_of(recipe)
    sources: dict[str, Source] = {}
    indexes: dict[str, SourceIndex] = {}
    problems: list[str] = []
    for name, given in {**recipe.data.mixture, **(validation.sources if validation else {})}.items():
        try:
            source = open_source(name, given)
            begin = time.monotonic()
            share = recipe.data.max_bad_share
            indexes[name] = open_index(source, settings, index_dir, max_bad_share=share, rank=rank, judge=judge)
            sources[name] = source
        except DataError as error:
            problems.append(str(error))
            continue
        _report(indexes[name], index_dir, time.monotonic() - begin)
    if problems:
        raise DataError("\n".join(problems))
    share = validation.held_out_share if validation else 0.0
    train_rows: dict[str, NDArray[np.int64]] = {}
    held_out: dict[str, NDArray[np.int64]] = {}
    for name in recipe.data.mixture:
        apart = indexes[name].rows["hash"] < share * 2.0**32
        train_rows[name], held_out[name] = np.flatnonzero(~apart), np.flatnonzero(apart)
        if not len(train_rows[name]):
            raise DataError(
                f"source {name!r}: validation.held_out_share {share} leaves none of its {len(apart)} samples to train "
                "on; lower the share."
            )
        if share > 0 and not len(held_out[name]):
            log.warning("source %r: held_out_share %g takes none of its %d samples", name, share, len(apart))
    for name in validation.sources if validation else ():
        held_out[name] = np.arange(len(indexes[name].rows), dtype=np.int64)
    return DataPlan(
        recipe=recipe,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer,
        settings=settings,
        sources=sources,
        indexes=indexes,
        mixture=Mixture(
            recipe.seed,
            {name: len(rows) for name, rows in train_rows.items()},
            {name: source.weight for name, source in recipe.data.mixture.items()},
        ),
        train_rows=train_rows,
        held_out=held_out,
        cost=packing.Cost.of(recipe),
        dropped_at_index={
            (n, reason): count for n, index in indexes.items() for reason, count in index.dropped.items()
        },
        fewer_tiles={n: index.fewer_tiles for n, index in indexes.items() if index.fewer_tiles},
        truncated={n: index.truncated for n, index in indexes.items() if index.truncated},
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
    if index.fewer_tiles:
        log.info("source %r: %d samples cut into fewer tiles to fit", index.name, index.fewer_tiles)
    if index.truncated:
        log.info("source %r: %d samples lose text at their end to fit", index.name, index.truncated)
