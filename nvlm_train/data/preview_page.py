"""The page of `nvlm-train data preview --html`: one file, nothing loaded from anywhere, no script.

Everything that comes from data or from the recipe goes through `_text`, which escapes it; and should that ever fail,
the page's own policy forbids scripts, frames, forms and every request.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from nvlm_train.batch import SampleRef
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan
from nvlm_train.data.preview import Picture, Span, View, refs_of
from nvlm_train.data.stats import source_colours

_PICTURE_PX = 440  # longest side of a picture on the page; larger ones are made smaller
_TILE_PX = 168
_PACKS_SHOWN = 64

_STYLE = """
:root { --ink:#1f2328; --soft:#59636e; --paper:#fff; --panel:#f6f8fa; --line:#d1d9e0; --trained:#a9eebb;
  --trained-other:#86dfa0; --other:#e7ebf0; --trained-ink:#0b4a1e; --control:#6e7781;
  --tile:#ddf0ff; --tile-ink:#0550ae; --bad:#cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --soft:#9198a1; --paper:#0d1117; --panel:#161b22;
  --line:#3d444d; --trained:#12491f;
  --trained-other:#1b6330; --other:#232b36; --trained-ink:#b8f5c4; --control:#8b949e; --tile:#0d2f54;
  --tile-ink:#9fd0ff; --bad:#ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: .8rem; margin: 1.1rem 0 .35rem; color: var(--soft); font-weight: 600; text-transform: uppercase;
  letter-spacing: .04em; }
.soft { color: var(--soft); } .bad { color: var(--bad); } code, .mono { font-family: ui-monospace, Menlo, monospace; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: .6rem 0; font-size: .85rem; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; }
.swatch { width: .95rem; height: .95rem; border-radius: 3px; display: inline-block; }
.pack { display: grid; grid-template-columns: 9.5rem 1fr; gap: .2rem .8rem; align-items: center; margin: .3rem 0; }
.pack .name { font-size: .8rem; line-height: 1.25; } .pack .facts { grid-column: 2; font-size: .78rem;
  color: var(--soft); margin: -.1rem 0 .35rem; }
.bar { display: flex; height: 2.1rem; background: var(--panel); border-radius: 4px; overflow: hidden; gap: 1px; }
.seg { position: relative; min-width: 1px; overflow: hidden; font-size: .68rem; line-height: 1.75rem;
  text-align: center;  color: #fff; text-decoration: none; white-space: nowrap; container-type: inline-size; }
.seg b { font-weight: 600; display: none; text-shadow: 0 0 3px rgb(0 0 0 / .65); }
@container (min-width: 1.6rem) { .seg b { display: inline; } }
.seg i { position: absolute; right: 0; bottom: 0; height: .34rem; background: #2ee35c; border-top: 1px solid #fff8; }
.seg.shown { outline: 2px solid var(--ink); outline-offset: -2px; z-index: 1; }
.pad, .swatch.pad { background: repeating-linear-gradient(135deg, var(--line) 0 2px, transparent 2px 7px); }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem 1.2rem; margin: 1rem 0; }
.card header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; border-bottom: 1px solid
  var(--line); padding-bottom: .5rem; }
.card header strong { font-size: 1.05rem; } .card header .swatch { align-self: center; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; align-items: flex-start; margin-bottom: 1rem; }
figure { margin: 0; } figcaption { font-size: .78rem; color: var(--soft); margin-top: .3rem; overflow-wrap: anywhere; }
.picture { position: relative; display: inline-block; line-height: 0; max-width: 100%; }
.picture img { max-width: 100%; border: 1px solid var(--line); } .picture svg { position: absolute; inset: 0;
  width: 100%; height: 100%; }
.tiles { display: grid; gap: .5rem; width: max-content; max-width: 100%; }
.tiles img { width: 100%; max-width: 9.5rem; display: block; border: 1px solid var(--line); }
.pixels { image-rendering: pixelated; }
.tag { display: block; font: .72rem ui-monospace, Menlo, monospace; color: var(--tile-ink); margin-top: .15rem; }
.cut { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
dl.messages { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; }
dl.messages dt { color: var(--soft); } dl.messages dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.stream { font: 13px/1.95 ui-monospace, Menlo, monospace; background: var(--panel); border-radius: 6px;
  padding: .7rem .9rem; display: grid; grid-template-columns: max-content 1fr; gap: 0 .9rem; }
.stream .at { color: var(--soft); text-align: right; user-select: none; font-size: .85em; }
.stream .run { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.t { padding: .14em 0; } .t:nth-child(even) { background: var(--other); }
.t.control { color: var(--control); }
.t.trained { background: var(--trained); color: var(--trained-ink); font-weight: 600; }
.t.trained:nth-child(even) { background: var(--trained-other); }
.t.tile { background: var(--tile); color: var(--tile-ink); padding: .12em .55em; border-radius: 1em; }
.pill { background: var(--tile); color: var(--tile-ink); border-radius: 1em; padding: 0 .5em; font-size: .85em; }
"""


def page(plan: DataPlan, views: Sequence[View], dealt: Sequence[Sequence[Sequence[Pack]]] | None, step: int) -> str:
    """The whole page: a step's packs (unless `dealt` is None), then the samples."""
    colours = source_colours([*plan.mixture.names, *(n for n in plan.indexes if n not in plan.mixture.names)])
    recipe = plan.recipe
    what = f"step {step}" if dealt is not None else ", ".join(dict.fromkeys(one.ref.source for one in views))
    title = _text(f"{recipe.run_name}: {what}")
    facts = (
        f"template {recipe.tokenizer.template}, tiles of {plan.settings.tile_size} px with "
        f"{plan.settings.image_tokens_per_tile} image tokens each, at most {recipe.data.tiling.max_tiles} and "
        + ("a thumbnail" if recipe.data.tiling.thumbnail else "no thumbnail")
        + f", packs of {recipe.data.pack_tokens:,} tokens"
    )
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{title}</h1><div class="soft">{_text(facts)}</div>',
    ]
    if dealt is not None:
        parts += _packs(plan, dealt, colours, {one.ref: _anchor(k) for k, one in enumerate(views)})
    if views:
        parts.append("<h2>Samples</h2>")
        parts.append(
            '<div class="legend"><span><span class="t trained mono">&nbsp;trained&nbsp;</span> the model must say '
            'it</span><span><span class="t mono">&nbsp;text&nbsp;</span> it only reads it</span>'
            '<span><span class="t control mono">&lt;|im_end|&gt;</span> control token</span>'
            '<span><span class="t tile mono">tile 1 × 256</span> image tokens of a tile</span>'
            '<span class="soft">shades tell tokens apart; point at one for its position and id</span></div>'
        )
    parts += [_card(one, colours[one.ref.source], _anchor(k)) for k, one in enumerate(views)]
    return "\n".join([*parts, "</body></html>\n"])


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _anchor(number: int) -> str:
    return f"sample-{number + 1}"


# --------------------------------------------------------------------------------------------------------------- packs


def _packs(
    plan: DataPlan,
    dealt: Sequence[Sequence[Sequence[Pack]]],
    colours: dict[str, str],
    anchors: dict[SampleRef, str],
) -> list[str]:
    refs = refs_of(dealt)
    packs = [pack for ranks in dealt for held in ranks for pack in held if not pack.is_null]
    capacity = plan.recipe.data.pack_tokens
    most = max((pack.cost for pack in packs), default=0.0) or 1.0
    tokens = sum(pack.tokens for pack in packs)
    ranks_text = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    parts = [
        "<h2>Packs</h2>",
        f"<div>{len(refs):,} samples in {len(packs):,} packs, {tokens / (capacity * max(1, len(packs))):.1%} full; "
        f"{len(dealt)} micro-step{'s' * (len(dealt) > 1)} on {ranks_text}. "
        '<span class="soft">A box is a sample; attention stays inside it.</span></div>',
        '<div class="legend">',
    ]
    drawn = [ref.source for ref in refs]
    for name in dict.fromkeys(drawn):
        parts.append(
            f'<span>{_swatch(colours[name])}{_text(name)} <span class="soft">{drawn.count(name)}</span></span>'
        )
    parts.append(
        '<span><span class="swatch" style="background:linear-gradient(90deg,#59636e 50%,#59636e80 50%)"></span>image '
        'tokens, then text</span><span><span class="swatch" style="background:#2ee35c;height:.34rem"></span>trained '
        'share</span><span><span class="swatch pad"></span>padding</span></div>'
    )
    shown = 0
    for number, ranks in enumerate(dealt):
        for rank, held in enumerate(ranks):
            for pack in held:
                shown += 1
                if shown > _PACKS_SHOWN:
                    continue
                name = f"micro-step {number}<br>rank {rank}"
                if pack.is_null:
                    facts = "null pack: one token, no label"
                    parts.append(_pack_row(name, [f'<div class="pad" style="flex:{capacity}"></div>'], facts))
                    continue
                boxes = [_box(plan, ref, colours, anchors.get(ref)) for ref in pack.samples]
                if pack.tokens < capacity:
                    left = capacity - pack.tokens
                    boxes.append(f'<div class="pad" style="flex:{left}" title="{left:,} tokens of room"></div>')
                facts = (
                    f"{pack.tokens:,} of {capacity:,} tokens, {len(pack.samples):,} samples, {pack.tiles:,} tiles, "
                    f"cost {pack.cost / most:.0%} of the costliest"
                )
                parts.append(_pack_row(name, boxes, facts))
    if shown > _PACKS_SHOWN:
        parts.append(f'<div class="soft">... and {shown - _PACKS_SHOWN:,} more</div>')
    return parts


def _pack_row(name: str, boxes: Sequence[str], facts: str) -> str:
    return (
        f'<div class="pack"><div class="name">{name}</div><div class="bar">{"".join(boxes)}</div>'
        f'<div class="facts">{facts}</div></div>'
    )


def _box(plan: DataPlan, ref: SampleRef, colours: dict[str, str], anchor: str | None) -> str:
    source, number, epoch = ref
    row = plan.indexes[source].rows[number]
    tokens, trained, tiles = int(row["tokens"]), int(row["trained"]), int(row["tiles"])
    in_sequence = (
        tiles if plan.settings.architecture == "nvlm_d" else 0
    )  # of nvlm_h's, an index row does not say how many are thumbnails
    image = 100 * in_sequence * plan.settings.image_tokens_per_tile / tokens
    colour = colours[source]
    tip = _text(f"{source} row {number}, epoch {epoch}: {tokens:,} tokens, {trained:,} trained, {tiles} tiles")
    style = f"flex:{tokens};background:linear-gradient(90deg,{colour} {image:.1f}%,{colour}99 {image:.1f}%)"
    inside = f'<b>{tokens:,}</b><i style="width:{max(2.0, 100 * trained / tokens):.1f}%"></i>'
    if anchor is not None:
        return f'<a class="seg shown" href="#{anchor}" title="{tip}" style="{style}">{inside}</a>'
    return f'<div class="seg" title="{tip}" style="{style}">{inside}</div>'


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


# -------------------------------------------------------------------------------------------------------------- sample


def _card(one: View, colour: str, anchor: str) -> str:
    seen = f", epoch {one.ref.epoch}" if one.ref.epoch else ""
    head = (
        f'<article class="card" id="{anchor}"><header>{_swatch(colour)}<strong>{_text(one.ref.source)}</strong>'
        f'<span>row {one.ref.row:,}{seen}</span><span class="mono soft">{_text(one.where)}</span>'
    )
    if one.problem is not None:
        return f'{head}</header><p class="bad">cannot be used: {_text(one.problem)}</p></article>'
    parts = [
        f"{head}<span>{one.num_tokens:,} tokens, {one.num_trained:,} trained, {one.num_tiles} "
        f"tile{'s' * (one.num_tiles != 1)}</span></header>"
    ]
    if one.pictures:
        parts.append("<h3>Images and their tiles</h3>")
        parts += [_picture(picture, number) for number, picture in enumerate(one.pictures, start=1)]
    parts.append('<h3>Messages</h3><dl class="messages">')
    for message in one.messages:
        content = "".join(
            _text(part["text"]) if "text" in part else f'<span class="pill">image {part["image"] + 1}</span>'
            for part in message["content"]
        )
        untrained = "" if message.get("loss", True) else ' <span class="soft">(loss: false)</span>'
        parts.append(f"<dt>{_text(message['role'])}</dt><dd>{content}{untrained}</dd>")
    parts.append("</dl><h3>Token stream</h3>")
    parts.append(f'<div class="stream">{_stream(one.spans)}</div></article>')
    return "\n".join(parts)


def _picture(picture: Picture, number: int) -> str:
    columns, rows = picture.grid
    width, height = picture.image.size
    scale = min(1.0, _PICTURE_PX / max(width, height))
    shown = (
        picture.image
        if scale == 1.0
        else picture.image.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
        )
    )
    enlarge = max(1, min(16, 224 // max(shown.size)))  # tiny pictures are shown larger, pixel by pixel
    box = f"width:{shown.width * enlarge}px;height:auto;aspect-ratio:{shown.width}/{shown.height}"
    pixels = ' class="pixels"' if enlarge > 1 else ""
    lines = "".join(
        [f'<line x1="{c}" y1="0" x2="{c}" y2="{rows}" vector-effect="non-scaling-stroke"/>' for c in range(1, columns)]
        + [
            f'<line x1="0" y1="{r}" x2="{columns}" y2="{r}" vector-effect="non-scaling-stroke"/>'
            for r in range(1, rows)
        ]
    )
    overlay = (
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" stroke="#ff2d95" stroke-width="2">'
        f"{lines}</svg>"
        if lines
        else ""
    )
    tiles = []
    for tile, tag in zip(picture.tiles, picture.tags, strict=True):
        pixel = ' class="pixels"' if tile.shape[-1] < 64 else ""
        label = f'<span class="tag">{_text(tag)}</span>' if tag else ""
        tiles.append(
            f'<div><img{pixel} style="width:{_tile_width(columns)}px" src="{_tile_data(tile)}" alt="tile">{label}</div>'
        )
    grid, apart = tiles[: columns * rows], tiles[columns * rows :]
    cut = f'<div class="tiles" style="grid-template-columns:repeat({columns},max-content)">{"".join(grid)}</div>'
    cut += "".join(f'<div class="tiles">{tile}</div>' for tile in apart)
    thumbnail = " + thumbnail" if apart else ""
    return (
        f'<div class="pictures"><figure><span class="picture"><img{pixels} style="{box}" src="{_data(shown)}" '
        f'alt="image {number}">{overlay}</span><figcaption>image {number}: {_text(picture.name)}<br>{width} × {height} '
        f"pixels, grid {columns} × {rows}{thumbnail}</figcaption></figure>"
        f'<figure><div class="cut">{cut}</div></figure></div>'
    )


def _tile_width(columns: int) -> int:
    return max(56, min(_TILE_PX, 620 // (columns + 1)))


def _tile_data(tile: np.ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))  # [px, px, 3]
    if image.width > _TILE_PX:
        image = image.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS)
    return _data(image)


def _data(image: Image.Image) -> str:
    """The picture inside the page: small ones as they are, others as a JPEG."""
    buffer = io.BytesIO()
    small = image.width * image.height <= 128 * 128
    image.save(buffer, format="PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _stream(spans: Sequence[Span]) -> str:
    """A row a stretch: a new one at each turn and around each tile, with the position of its first token."""
    rows: list[tuple[int, list[str]]] = []
    fresh = True
    for span in spans:
        begins_turn = span.kind == "control" and "start" in span.text
        if fresh or begins_turn:
            rows.append((span.begin, []))
        rows[-1][1].append(_token(span))
        fresh = span.kind == "tile"
    return "".join(f'<div class="at">{begin}</div><div class="run">{"".join(tokens)}</div>' for begin, tokens in rows)


def _token(span: Span) -> str:
    kinds = "t " + span.kind + (" trained" if span.trained else "")
    if span.kind == "tile":
        last = span.begin + len(span.ids) - 1
        return (
            f'<span class="{kinds}" title="positions {span.begin} to {last}, never trained">tile {span.tile + 1} × '
            f"{len(span.ids)}</span>"
        )
    ids = " ".join(map(str, span.ids))
    tip = f"position {span.begin}, id {ids}" + (", trained" if span.trained else "")
    shown = _text(span.text).replace("\n", "↵\n").replace("\t", "→\t")
    shown = "".join(c if c.isprintable() or c in "\n\t" else _text(repr(c).strip("'")) for c in shown)
    return f'<span class="{kinds}" title="{tip}">{shown}</span>'
