# SPDX-License-Identifier: Apache-2.0
"""From prompts and images to the inputs of an NVLM: tiles, tile tags and chat format as in training.

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor("What is this?", images=[image])

How it was trained (largest number of tiles, thumbnail, tags, template, system text) is read from processor_config.json.

Where the tiles go depends on the architecture. NVLM-D: all into the prompt, a place for each image token. NVLM-X:
none; a tile's tag stands in the prompt and reads that tile by cross-attention. NVLM-H: an image's last tile (the
thumbnail, or its only one) into the prompt, the others with their tags into the memory that cross-attention reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature
from transformers.utils import cached_file

SETTINGS_FILE = "processor_config.json"
MARKER = "<image>"


def choose_grid(width: int, height: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """(columns, rows) of tiles for an image: the grid of at most max_tiles tiles nearest in aspect to width/height.

    Grids are tried by area; of two equally near ones the larger wins when the image has more than half its pixels.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < smallest or (distance == smallest and large_enough):
            best, smallest = (columns, rows), distance
    return best


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, rows first, as in training: Pillow 13 takes the columns of tall images first, and the order shows."""
    half = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return half.resize((width, height), Image.Resampling.BICUBIC)


def shared_max_tiles(images: Any, settings: dict[str, Any]) -> int:
    """The tile maximum of each image of a prompt: the largest with which all tiles together, thumbnails counted, keep
    within max_tiles_per_sample; 1 where even that is too much."""
    budget = settings.get("max_tiles_per_sample")
    limit = settings["max_tiles"] if images else 1  # a folder of text alone has no tiling
    while budget is not None and limit > 1:
        grids = [choose_grid(i.width, i.height, limit, settings["tile_size"]) for i in images]
        if sum(c * r + (settings["thumbnail"] and c * r > 1) for c, r in grids) <= budget:
            break
        limit -= 1
    return limit


def cut_tiles(image: Image.Image, max_tiles: int, tile_size: int, thumbnail: bool) -> np.ndarray:
    """u8[t, 3, px, px]: the image resized to its grid and cut row by row; a thumbnail of the whole comes last."""
    image = image.convert("RGB")
    columns, rows = choose_grid(image.width, image.height, max_tiles, tile_size)
    whole = resize(image, columns * tile_size, rows * tile_size)
    tiles = [
        whole.crop((c * tile_size, r * tile_size, (c + 1) * tile_size, (r + 1) * tile_size))
        for r in range(rows)
        for c in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(resize(image, tile_size, tile_size))
    return np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2)


class Tile(NamedTuple):
    """Where one tile of a prompt is, and who reads it by cross-attention.

    image: its image, counted from 0. in_memory: whether cross-attention reads it. tag: token ids before it in the
    memory. own: [begin, end) of the tokens that read this tile alone. behind: where the tokens after its image begin.
    """

    image: int
    in_memory: bool
    tag: list[int]
    own: tuple[int, int]
    behind: int


class NVLM_Processor:
    """Tokenizer, tiling and prompt format in one. Rows are padded on the left, ready for `generate`."""

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.architecture = settings.get("architecture", "nvlm_d")
        self.image_token_id = tokenizer.convert_tokens_to_ids(settings["image_token"])

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> NVLM_Processor:
        """Reads the tokenizer and processor_config.json of a folder or a Hub repository."""
        kwargs.pop("_from_auto", None)
        trust = kwargs.pop("trust_remote_code", None)
        where = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
        settings = json.loads(Path(cached_file(path, SETTINGS_FILE, **where)).read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=trust, **where), settings)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """AutoProcessor calls this; the file travels with the export, nothing is left to do."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer and settings; the code itself is copied by the model's save_pretrained."""
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def __call__(self, prompts: Any, images: Any = None, system: str | None = None) -> BatchFeature:
        """input_ids i64[B, S], attention_mask i64[B, S] and, where there are images, pixel_values f32[T, 3, px, px];
        for NVLM-X and NVLM-H also what `_memory` says.

        prompts: a question; a conversation, [{"role", "content"}] with text content in which `<image>` marks an
        image, or with parts [{"type": "text", "text": ...}, {"type": "image"}]; or a list of either.
        images: for one prompt an image or a list of them, for several a list with an entry (None, image or list) each.
        Images without a mark come first, one to a line. system: replaces the system text of training.
        """
        several = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], dict))
        rows = prompts if several else [prompts]
        of_row = ([None] * len(rows) if images is None else list(images)) if several else [images]
        if len(of_row) != len(rows):
            raise ValueError(f"{len(rows)} prompts, but images holds {len(of_row)} entries; give one for each prompt")
        encoded, pixels = [], []
        for prompt, own in zip(rows, of_row):  # noqa: B905 (lengths compared above; Python 3.9 knows no strict)
            own = [] if own is None else own if isinstance(own, (list, tuple)) else [own]
            limit = shared_max_tiles(own, self.settings) if own else 1
            cut = [cut_tiles(i, limit, self.settings["tile_size"], self.settings["thumbnail"]) for i in own]
            encoded.append(self.lay_out(prompt, [len(part) for part in cut], system))
            pixels += cut
        longest = max(len(ids) for ids, _ in encoded)
        pad = self.tokenizer.pad_token_id
        data = {
            "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in encoded]),
            "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in encoded]),
        }
        if pixels:
            mean, std = (torch.tensor(self.settings[key]).reshape(1, 3, 1, 1) for key in ("image_mean", "image_std"))
            data["pixel_values"] = (torch.from_numpy(np.concatenate(pixels)).float() / 255 - mean) / std
            if self.architecture != "nvlm_d":
                data.update(self._memory([tiles for _, tiles in encoded]))
        return BatchFeature(data)

    def _memory(self, tiles_of_row: list[list[Tile]]) -> dict[str, torch.Tensor]:
        """Of a batch with images, what cross-attention reads.

        reads i64[C, 5]: tokens [1] to [2] (exclusive, padding not counted) of row [0] read tiles [3] to [4] of the
        memory. NVLM-H also: memory_tiles i64[N], which of the batch's tiles are in the memory; memory_tags i64[N, L],
        the tokens of the tag before each, filled with -1.
        """
        reads: list[list[int]] = []
        in_memory: list[int] = []
        tags: list[list[int]] = []
        before = 0
        for row, tiles in enumerate(tiles_of_row):
            places = np.cumsum([len(in_memory), *(tile.in_memory for tile in tiles)]).tolist()
            reads += [[row, begin, end, places[a], places[b]] for begin, end, a, b in self.runs(tiles)]
            in_memory += [before + k for k, tile in enumerate(tiles) if tile.in_memory]
            tags += [tile.tag for tile in tiles if tile.in_memory]
            before += len(tiles)
        data = {"reads": torch.tensor(reads, dtype=torch.int64).reshape(-1, 5)}
        if self.architecture == "nvlm_h":
            longest = max((len(tag) for tag in tags), default=0)
            data["memory_tiles"] = torch.tensor(in_memory, dtype=torch.int64)
            filled = [tag + [-1] * (longest - len(tag)) for tag in tags]
            data["memory_tags"] = torch.tensor(filled, dtype=torch.int64).reshape(len(tags), longest)
        return data

    def runs(self, tiles: list[Tile]) -> list[tuple[int, int, int, int]]:
        """Tokens [begin, end) of a prompt that read its tiles [first, last). The last run has no end: new tokens too.

        A tag reads its own tile, other text the tiles of the images before it: all of them, or the last image's, as
        `text_reads` says.
        """
        endless = 2**31 - 1
        found = []
        images: list[list[int]] = []  # numbers of each image's tiles
        for k, tile in enumerate(tiles):
            images += [[]] if tile.image == len(images) else []
            images[-1].append(k)
        # a thumbnail's own tokens, the last of its image, may read its other tiles
        early = self.settings["image_tokens_per_tile"] * bool(self.settings.get("thumbnail_reads_tiles"))
        text_from = [tiles[numbers[0]].behind - early for numbers in images]
        firsts = [tiles[numbers[0]].own for numbers in images]
        begins = [own[0] if own[0] < own[1] else text for own, text in zip(firsts, text_from)]  # noqa: B905
        until = [*begins[1:], endless]  # where the next image's own tokens begin
        for i, numbers in enumerate(images):
            found += [(*tiles[k].own, k, k + 1) for k in numbers if tiles[k].own[0] < tiles[k].own[1]]
            first = 0 if self.settings["text_reads"] == "preceding_images" else numbers[0]
            seen = any(tile.in_memory for tile in tiles[first : numbers[-1] + 1])
            if self.settings["text_reads"] != "tags_only" and text_from[i] < until[i] and seen:
                found.append((text_from[i], until[i], first, numbers[-1] + 1))
        return found

    def encode_prompt(self, prompt: Any, tiles_per_image: list[int], system: str | None = None) -> list[int]:
        """Token ids of a question or conversation up to where the assistant's answer begins."""
        return self.lay_out(prompt, tiles_per_image, system)[0]

    def lay_out(
        self, prompt: Any, tiles_per_image: list[int], system: str | None = None
    ) -> tuple[list[int], list[Tile]]:
        """The same ids, and where the tiles are."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        system = self.settings["system"] if system is None else system
        if system is not None and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        contents = [self._parts(message["content"]) for message in messages]
        marks = sum(part is None for parts in contents for part in parts)
        if marks == 0 and tiles_per_image:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if first is None:
                raise ValueError("images without a user turn to put them in")
            contents[first] = [part for _ in tiles_per_image for part in (None, "\n")] + contents[first]
        elif marks != len(tiles_per_image):
            raise ValueError(f"the conversation marks {marks} images, but {len(tiles_per_image)} are given")
        counts = enumerate(tiles_per_image)
        bos = self.settings.get("bos_token")
        ids: list[int] = self._control(bos) if bos else []
        tiles: list[Tile] = []
        for message, parts in zip(messages, contents):  # noqa: B905
            ids += self._control("<|im_start|>")
            text = message["role"] + "\n"
            if message["role"] == "assistant":  # an answer is tokenised apart from its header, as when it is generated
                ids, text = ids + self._text(text), ""
            for part in parts:
                if part is not None:
                    text += part
                    continue
                text = self._image(ids, tiles, text, *next(counts))
            ids += self._text(text) + self._control("<|im_end|>")
            if self.settings["prompt_template"] != "hf_nvlm":
                ids += self._text("\n")
        return ids + self._control("<|im_start|>") + self._text("assistant\n"), tiles

    def decode(self, ids: Any) -> str:
        """The text of one answer, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def batch_decode(self, rows: Any) -> list[str]:
        """The texts of several answers."""
        return [self.decode(row) for row in rows]

    @staticmethod
    def _parts(content: Any) -> list[str | None]:
        """Texts, and None where an image stands."""
        if isinstance(content, str):
            texts = content.split(MARKER)
            return [part for text in texts for part in (None, text)][1:]
        return [part["text"] if part["type"] == "text" else None for part in content]

    def _image(self, ids: list[int], tiles: list[Tile], text: str, image: int, num_tiles: int) -> str:
        """Adds the text before an image and its tiles to `ids` and `tiles`; returns the text that goes on behind."""
        whole = num_tiles == 1 or self.settings["thumbnail"]  # whether the last tile shows the whole image
        thumbnail = self.settings.get("thumbnail_tag", "<tile_global_thumbnail>")
        tags = [f"<tile_{k}>" for k in range(1, num_tiles + (not whole))] + [thumbnail] * whole
        if self.settings["tile_tags"] == "none":
            tags = [""] * num_tiles
        num_in_memory = {"nvlm_d": 0, "nvlm_x": num_tiles, "nvlm_h": num_tiles - 1}[self.architecture]
        # a tag is tokenised apart from what is before it, except in the published format; one that reads, in any case
        apart = self.settings["prompt_template"] != "hf_nvlm" or self.architecture == "nvlm_x"
        text += "<Image>"
        added = []
        for number, tag in enumerate(tags):
            if number < num_in_memory or (apart and tag):
                ids += self._text(text)
                text = ""
            begin = len(ids)
            if self.architecture == "nvlm_h" and number < num_in_memory:
                added.append((True, self._text(tag), (begin, begin)))
            elif self.architecture == "nvlm_x":
                ids += self._text(tag)
                added.append((True, [], (begin, len(ids))))
            else:
                ids += self._text(text + tag)
                text = ""
                begin = len(ids)
                ids += [self.image_token_id] * self.settings["image_tokens_per_tile"]
                added.append((False, [], (begin, begin)))
        tiles += [Tile(image, in_memory, tag, own, len(ids)) for in_memory, tag, own in added]
        return "</Image>"

    def _control(self, token: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token)]

    def _text(self, text: str) -> list[int]:
        """Ordinary text: what looks like a control token in it stays text."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
