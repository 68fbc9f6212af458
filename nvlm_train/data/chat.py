"""Messages to tokens: templates, tile tags, labels.

A sample is first laid out as runs (a text to tokenise, a control token, the placeholders of one tile), and the runs are
joined into one stream. Where runs begin decides how tags merge with their neighbours. The templates:

    nvlm_qwen2   the stream the released Megatron code trains on
                 <|im_start|>user\n<Image> | <tile_1> | [256] | ... | </Image>\nWhat is it? | <|im_end|> | \n
    hf_nvlm      the stream of the published chat(): tags joined to the text before them, no newline after <|im_end|>
                 <|im_start|>user\n<Image><tile_1> | [256] | ... | </Image>\nWhat is it? | <|im_end|>
    nvlm_yi      nvlm_qwen2 behind one <|startoftext|>, with Yi's shorter tag of the thumbnail, <tile_global>

Trained are an assistant turn's text, its <|im_end|>, and the newline after it where the template has one, unless the
turn says `"loss": False`. Everything else is masked: other turns, the assistant's header, tags and image positions, the
position before an image (its target is a tag or an image token, which are never targets).

In nvlm_x no tile has placeholders: its tag alone stands in the stream, tokenised apart in every template, and reads
that tile by cross-attention. In nvlm_h only an image's last tile (the thumbnail, or its only tile) stands in the
stream, as in nvlm_d; the others and their tags are in the memory that cross-attention reads:

    nvlm_x       <|im_start|>user\n<Image> | <tile_1> | <tile_2> | <tile_global_thumbnail> | </Image>\nWhat is it? | ...
    nvlm_h       <|im_start|>user\n<Image> | <tile_global_thumbnail> | [256] | </Image>\nWhat is it? | ...

A plain text (one message of the role "text") stands alone, all of it trained, and ends with <|endoftext|>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.data.tokenizer import BOS, ChatTokenizer
from nvlm_train.errors import DataError
from nvlm_train.recipe.schema import Tiling

Message = Mapping[str, Any]  # {"role": "user", "content": [{"text": "..."} | {"image": 0}, ...]}


class Template(NamedTuple):
    """after_turn: text after each <|im_end|>. tags_apart: whether a tag is tokenised without the text before it.
    system: system text of a sample that brings none, unless the recipe names one ('' there: no system turn).
    thumbnail_tag: the tag of a thumbnail, or of an image's only tile. bos: whether a sample begins with the bos token.
    """

    after_turn: str
    tags_apart: bool
    system: str | None
    thumbnail_tag: str = "<tile_global_thumbnail>"
    bos: bool = False


TEMPLATES: dict[str, Template] = {
    "nvlm_qwen2": Template(after_turn="\n", tags_apart=True, system=None),
    "hf_nvlm": Template(after_turn="", tags_apart=False, system="Answer the questions."),
    "nvlm_yi": Template(after_turn="\n", tags_apart=True, system=None, thumbnail_tag="<tile_global>", bos=True),
}


def check_tokenizer(tokenizer: ChatTokenizer, template: str, where: str) -> None:
    """DataError where the tokenizer at `where` lacks what the template needs."""
    if TEMPLATES[template].bos and tokenizer.bos is None:
        raise DataError(
            f"{where}: the tokenizer has no {BOS}, which tokenizer.template {template} puts before every sample; use "
            "Yi's tokenizer, or another template."
        )


class Run(NamedTuple):
    """A stretch of the stream: `text` to tokenise, or `times` times the control token `token`.

    is_tile: whether it stands for a tile. image: the tile's image, counted from 0 in the order of appearance.
    memory_tag: of a tile that cross-attention reads, the text before it in the memory; None: it is not in the memory.
    """

    text: str | None
    token: int
    times: int
    trained: bool
    is_tile: bool
    image: int = -1
    memory_tag: str | None = None


class TileReads(NamedTuple):
    """Which tokens of a sample read one of its tiles by cross-attention.

    image: of the sample's images in order of appearance. in_memory: False for a tile that is in the sequence instead.
    own: [begin, end) of the tokens that read this tile and nothing else, its tag; (0, 0) where there are none.
    behind: where its image ends: ordinary text from here on may read it. tag_ids: what stands before it in the memory.
    """

    image: int
    in_memory: bool
    own: tuple[int, int]
    behind: int
    tag_ids: tuple[int, ...]


@dataclass(frozen=True)
class Rendered:
    """A sample as tokens.

    input_ids: i32[L]. labels: i32[L], shifted: labels[t] is what position t must predict, or IGNORE_INDEX.
    tile_starts: for each tile, where its Q placeholders begin in input_ids; -1 where it has none.
    reads: for each tile, who reads it by cross-attention; empty in nvlm_d.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    tile_starts: tuple[int, ...]
    reads: tuple[TileReads, ...] = ()


def tile_tags(tiles: int, tiling: Tiling, template: str = "nvlm_qwen2") -> list[str]:
    """The tags of one image's tiles, in order.

    Example, 3 tiles with thumbnail: <tile_1>, <tile_2>, <tile_global_thumbnail>. A single tile is the whole image and
    takes the thumbnail's tag. Without thumbnails every tile of several has its number.
    """
    if tiling.tags == "none":
        return [""] * tiles
    tags = [f"<tile_{k}>" for k in range(1, tiles + 1)]
    if tiles == 1 or tiling.thumbnail:
        tags[-1] = TEMPLATES[template].thumbnail_tag
    return tags


def lay_out(
    messages: Sequence[Message],
    tiles_per_image: Sequence[int],
    tokenizer: ChatTokenizer,
    template: str,
    tiling: Tiling,
    image_tokens_per_tile: int,
    system: str | None,
    *,
    architecture: str = "nvlm_d",
    prompt: bool = False,
) -> list[Run]:
    """The runs of a sample; with `prompt` the header of the answer to come follows the last turn."""
    form = TEMPLATES[template]
    runs: list[Run] = []
    if form.bos:
        assert tokenizer.bos is not None  # see `check_tokenizer`
        runs.append(Run(None, tokenizer.bos, 1, False, False))
    if messages and messages[0]["role"] == "text":  # a plain text: no chat around it, all of it trained
        text = "".join(part["text"] for message in messages for part in message["content"])
        return [*runs, Run(text, -1, 0, True, False), Run(None, tokenizer.pad, 1, True, False)]
    if system is None:
        system = form.system
    turns: list[Message] = list(messages)
    if system and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": [{"text": system}]})
    start = Run(None, tokenizer.im_start, 1, False, False)
    image = -1
    for turn in turns:
        trained = turn["role"] == "assistant" and turn.get("loss", True) is True
        runs.append(start)
        text = f"{turn['role']}\n"
        if turn["role"] == "assistant":
            # The header is tokenised apart from the answer, so that the prompt of a generation is a prefix of the
            # training stream even where the answer begins with a newline.
            runs.append(Run(text, -1, 0, False, False))
            text = ""
        for part in turn["content"]:
            if "text" in part:
                text += part["text"]
                continue
            text += "<Image>"
            image += 1
            tags = tile_tags(tiles_per_image[part["image"]], tiling, template)
            in_memory = {"nvlm_d": 0, "nvlm_x": len(tags), "nvlm_h": len(tags) - 1}[architecture]
            for number, tag in enumerate(tags):
                if number < in_memory and architecture == "nvlm_h":
                    runs.append(Run(None, -1, 0, False, True, image, tag))  # no token: the text goes on
                    continue
                reads = number < in_memory  # nvlm_x: what reads a tile is its tag and nothing else
                if text and (reads or (tag and form.tags_apart)):
                    runs.append(Run(text, -1, 0, False, False))
                    text = ""
                if reads:
                    runs.append(Run(tag or None, -1, 0, False, True, image, ""))
                    continue
                text += tag
                if text:
                    runs.append(Run(text, -1, 0, False, False))
                    text = ""
                runs.append(Run(None, tokenizer.image_token, image_tokens_per_tile, False, True, image))
            text = "</Image>"
        if text:
            runs.append(Run(text, -1, 0, trained, False))
        runs.append(Run(None, tokenizer.im_end, 1, trained, False))
        if form.after_turn:
            runs.append(Run(form.after_turn, -1, 0, trained, False))
    if prompt:
        runs += [start, Run("assistant\n", -1, 0, False, False)]
    return runs


def join(runs: Sequence[Run], encode: Callable[[str], Sequence[int]]) -> Rendered:
    """The stream of `runs` and its labels.

    Five-token example, runs `<|im_start|>`, "assistant\\n" (two tokens), "Yes" (trained), `<|im_end|>` (trained):

        input_ids   im_start  assistant  \\n    Yes      im_end
        labels      -100      -100       Yes   im_end   -100
    """
    ids: list[int] = []
    trained: list[bool] = []
    tile_starts: list[int] = []
    spans: list[tuple[Run, int, int]] = []
    behind: dict[int, int] = {}
    for run in runs:
        begin = len(ids)
        more = [run.token] * run.times if run.text is None else encode(run.text)
        ids.extend(more)
        trained.extend([run.trained] * len(more))
        if run.is_tile:
            tile_starts.append(begin if run.times else -1)
            spans.append((run, begin, len(ids)))
            behind[run.image] = len(ids)
    reads: tuple[TileReads, ...] = ()
    if any(run.memory_tag is not None for run, _, _ in spans):
        reads = tuple(
            TileReads(
                run.image,
                run.memory_tag is not None,
                (begin, end) if run.text else (0, 0),
                behind[run.image],
                tuple(encode(run.memory_tag)) if run.memory_tag else (),
            )
            for run, begin, end in spans
        )
    input_ids = np.asarray(ids, dtype=np.int32)  # [L]
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)  # [L]
    labels[:-1] = np.where(np.asarray(trained[1:], dtype=bool), input_ids[1:], IGNORE_INDEX)
    return Rendered(input_ids, labels, tuple(tile_starts), reads)


def render(
    messages: Sequence[Message],
    tiles_per_image: Sequence[int],
    tokenizer: ChatTokenizer,
    template: str,
    tiling: Tiling,
    image_tokens_per_tile: int,
    system: str | None,
    *,
    architecture: str = "nvlm_d",
) -> Rendered:
    """Tokens, labels and tile positions of a training sample in canonical messages.

    `tiles_per_image[i]` counts the tiles of image i, thumbnail included; `system` stands in for a sample without a
    system turn (None: the template's own).
    """
    runs = lay_out(
        messages, tiles_per_image, tokenizer, template, tiling, image_tokens_per_tile, system, architecture=architecture
    )
    return join(runs, tokenizer.encode)


def render_prompt(
    messages: Sequence[Message],
    tiles_per_image: Sequence[int],
    tokenizer: ChatTokenizer,
    template: str,
    tiling: Tiling,
    image_tokens_per_tile: int,
    system: str | None,
    *,
    architecture: str = "nvlm_d",
) -> Rendered:
    """The same stream up to and with the header of the next assistant turn: what a generation starts from."""
    given = (messages, tiles_per_image, tokenizer, template, tiling, image_tokens_per_tile, system)
    runs = lay_out(*given, architecture=architecture, prompt=True)
    return join(runs, tokenizer.encode)


def count_tokens(runs: Sequence[Run], length_of: Mapping[str, int], limit: int | None = None) -> tuple[int, int]:
    """Tokens and trained tokens of a sample, from the lengths of its texts alone; of its first `limit` tokens."""
    tokens = trained = 0
    for run in runs:
        length = run.times if run.text is None else length_of[run.text]
        if limit is not None:
            length = min(length, limit - tokens)
        # The first token of all is nobody's target; only a plain text begins with a trained one.
        trained += (length - (1 if tokens == 0 and length > 0 else 0)) if run.trained else 0
        tokens += length
    return tokens, trained


def texts(runs: Sequence[Run]) -> Iterator[str]:
    """The texts of a layout that need tokenising."""
    return (run.text for run in runs if run.text is not None)
