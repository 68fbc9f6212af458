# SPDX-License-Identifier: Apache-2.0
"""From prompts and images to the inputs of an NVLM: tiles, tile tags and chat format as in training.

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor("What is this?", images=[image])

    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)

How it was trained (largest number of tiles, thumbnail, tags, template, system text, how a file becomes RGB) is read
from processor_config.json. Nothing is fetched: images are PIL images or files.

Where the tiles go depends on the architecture. NVLM-D: all into the prompt, a place for each image token. NVLM-X:
none; a tile's tag stands in the prompt and reads that tile by cross-attention. NVLM-H: an image's last tile (the
thumbnail, or its only one) into the prompt, the others with their tags into the memory that cross-attention reads.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature
from transformers.utils import cached_file

SETTINGS_FILE = "processor_config.json"
MARKER = "<image>"
RUNS_PROGRAMS = ("EPS", "WMF")  # Pillow starts a program, or the system's renderer, to decode these
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes of more than 8 bits


def open_image(image: Any) -> Image.Image:
    """A PIL image as it is; the file of a path. ValueError for anything else: nothing is fetched."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"an image is a {type(image).__name__}; right would be a PIL image or the path of a file")
    if "://" in str(image):
        raise ValueError(f"image {str(image)[:200]!r}: nothing is fetched here; give a PIL image or the path of a file")
    opened = Image.open(image)
    if opened.format in RUNS_PROGRAMS:
        raise ValueError(f"image {str(image)!r} is {opened.format}, which is not decoded; convert it to PNG")
    return opened


def to_rgb(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """As training made RGB of it: turning marks, transparency and 16-bit greys as exif, alpha and sixteen_bit say."""
    if settings.get("exif") == "apply" and image.format != "TIFF":  # Pillow turns TIFF files by itself
        image = ImageOps.exif_transpose(image)
    if settings.get("sixteen_bit") == "scale" and image.mode in DEEP:
        values = np.asarray(image, dtype=np.float64)  # [height, width]
        image = Image.fromarray(np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8))
    elif settings.get("alpha") == "white" and image.has_transparency_data:
        drawn = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", drawn.size, (255, 255, 255, 255)), drawn)
    return image.convert("RGB")


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


def resize_fast(image: Image.Image, width: int, height: int) -> Image.Image:
    """The same filter in whole numbers, by torch: that of a model trained with `decode: fast`."""
    if (width, height) == image.size:
        return image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)  # u8[1, 3, H, W]
    scaled = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)  # u8[1, 3, height, width]
    return Image.fromarray(scaled.squeeze(0).permute(1, 2, 0).contiguous().numpy())


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


def cut_tiles(image: Image.Image, max_tiles: int, tile_size: int, thumbnail: bool, fast: bool = False) -> np.ndarray:
    """u8[t, 3, px, px]: an RGB image resized to its grid and cut row by row; a thumbnail of the whole comes last."""
    scale = resize_fast if fast else resize
    columns, rows = choose_grid(image.width, image.height, max_tiles, tile_size)
    whole = scale(image, columns * tile_size, rows * tile_size)
    tiles = [
        whole.crop((c * tile_size, r * tile_size, (c + 1) * tile_size, (r + 1) * tile_size))
        for r in range(rows)
        for c in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(scale(image, tile_size, tile_size))
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


def pad(filling: list[int], row: list[int], side: str) -> list[int]:
    return filling + row if side == "left" else row + filling


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """A question as a conversation; a conversation as it is."""
    if not isinstance(prompt, str):
        return list(prompt)
    if prompt.startswith(("<|im_start|>", "<|startoftext|>")):
        raise ValueError(
            "the prompt is a conversation that was rendered to text, which would be taken for the words of a question; "
            "give the messages themselves"
        )
    return [{"role": "user", "content": prompt}]


def parts_of(content: Any) -> list[str | None]:
    """Texts, and None where an image stands."""
    if isinstance(content, str):
        return [part for text in content.split(MARKER) for part in (None, text)][1:]
    unknown = [part.get("type") for part in content if part.get("type") not in ("text", "image")]
    if unknown:
        raise ValueError(f"a part of a message has the type {unknown[0]!r}; known are 'text' and 'image'")
    return [part["text"] if part["type"] == "text" else None for part in content]


def images_of(prompt: Any, given: list[Any]) -> list[Any]:
    """The images of a prompt in the order of their marks: those that its parts bring, the others from `given`."""
    own = []
    for message in as_messages(prompt):
        content = message["content"]
        marks = [{}] * content.count(MARKER) if isinstance(content, str) else content
        own += [
            next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
            for part in marks
            if part.get("type", "image") == "image"
        ]
    brought = sum(image is not None for image in own)
    if not brought:
        return given  # whether their number is right shows when they are laid out
    if len(given) != len(own) - brought:
        raise ValueError(
            f"the conversation marks {len(own)} images and brings {brought} of them, but {len(given)} are given besides"
        )
    rest = iter(given)
    return [next(rest) if image is None else image for image in own]


class NVLM_Processor:
    """Tokenizer, tiling and prompt format in one.

    Rows are padded on the left, as decoders want it that generate; `padding_side` here or on the tokenizer changes it.
    """

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self.settings = settings
        self.architecture = settings.get("architecture", "nvlm_d")
        self.image_token_id = tokenizer.convert_tokens_to_ids(settings["image_token"])

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> NVLM_Processor:
        """Reads the tokenizer and processor_config.json of a folder or a Hub repository."""
        trust = kwargs.pop("trust_remote_code", None)
        names = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
        where = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
        settings = json.loads(Path(cached_file(path, SETTINGS_FILE, **where)).read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=trust, **where), settings)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """AutoProcessor calls this; `save_pretrained` copies the code anyway."""

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Writes what `from_pretrained` reads: tokenizer, settings and this file."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder, **kwargs)
        config = folder / "tokenizer_config.json"
        content = json.loads(config.read_text(encoding="utf-8"))
        if content.get("tokenizer_class") == "TokenizersBackend":  # what version 5 calls it, and version 4 knows not
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
            config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        code = Path(__file__)
        if not (folder / code.name).exists() or not code.samefile(folder / code.name):
            shutil.copyfile(code, folder / code.name)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's: for text, and to look at."""
        return self.tokenizer.chat_template

    def __call__(
        self,
        prompts: Any,
        images: Any = None,
        system: str | None = None,
        *,
        padding_side: str | None = None,
        add_generation_prompt: bool = True,
    ) -> BatchFeature:
        """input_ids i64[B, S], attention_mask i64[B, S] and, where there are images, pixel_values f32[T, 3, px, px];
        for NVLM-X and NVLM-H also what `_memory` says.

        prompts: a question; a conversation, [{"role", "content"}] with text content in which `<image>` marks an
        image, or with parts [{"type": "text", "text": ...}, {"type": "image"}]; or a list of either. A part may bring
        its image, {"type": "image", "image": PIL image or path}; the others are taken from images in order.
        images: for one prompt an image or a list of them, for several a list with an entry (None, image or list) each.
        Where nothing is marked they come first, one to a line.
        system: replaces the system text of training; "" leaves it out.
        add_generation_prompt: whether the header of the answer follows, as `generate` needs it.

        Raises ValueError for prompts and images that do not fit together.
        """
        several = isinstance(prompts, (list, tuple)) and not (prompts and isinstance(prompts[0], dict))
        rows = list(prompts) if several else [prompts]
        of_row = ([None] * len(rows) if images is None else list(images)) if several else [images]
        if not rows:
            raise ValueError("no prompt given")
        if len(of_row) != len(rows):
            raise ValueError(f"{len(rows)} prompts, but images holds {len(of_row)} entries; give one for each prompt")
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side {side!r} is neither 'left' nor 'right'")
        encoded, pixels = [], []
        for prompt, own in zip(rows, of_row):  # noqa: B905 (lengths compared above; Python 3.9 knows no strict)
            given = [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]
            opened = [to_rgb(open_image(image), self.settings) for image in images_of(prompt, given)]
            cut = self.cut(opened)
            encoded.append(self.lay_out(prompt, [len(part) for part in cut], system, add_generation_prompt))
            pixels += cut
        longest = max(len(ids) for ids, _ in encoded)
        padded = {
            "input_ids": [pad([self.tokenizer.pad_token_id] * (longest - len(ids)), ids, side) for ids, _ in encoded],
            "attention_mask": [pad([0] * (longest - len(ids)), [1] * len(ids), side) for ids, _ in encoded],
        }
        data = {name: torch.tensor(values) for name, values in padded.items()}
        if pixels:
            mean, std = (torch.tensor(self.settings[key]).reshape(1, 3, 1, 1) for key in ("image_mean", "image_std"))
            data["pixel_values"] = (torch.from_numpy(np.concatenate(pixels)).float() / 255 - mean) / std
            if self.architecture != "nvlm_d":
                data.update(self._memory([tiles for _, tiles in encoded]))
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Any,
        images: Any = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        padding: bool = True,
        padding_side: str | None = None,
    ) -> Any:
        """With tokenize=True the model's inputs for a conversation or a list of them, as `__call__` makes them.

        Without, the text of it, to look at only: text cannot tell a control token from words that look like one.
        """
        if tokenize:
            if not return_dict or return_tensors != "pt" or not padding:
                raise ValueError(
                    "apply_chat_template gives padded PyTorch tensors by name: return_dict=True, return_tensors='pt', "
                    "padding=True"
                )
            return self(conversation, images, padding_side=padding_side, add_generation_prompt=add_generation_prompt)
        return self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def cut(self, images: list[Image.Image]) -> list[np.ndarray]:
        """u8[t, 3, px, px]: the tiles of each image of a prompt."""
        limit = shared_max_tiles(images, self.settings)
        fast = self.settings.get("decode") == "fast"
        return [
            cut_tiles(image, limit, self.settings["tile_size"], self.settings["thumbnail"], fast) for image in images
        ]

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
        self, prompt: Any, tiles_per_image: list[int], system: str | None = None, add_generation_prompt: bool = True
    ) -> tuple[list[int], list[Tile]]:
        """The same ids, and where the tiles are."""
        messages = as_messages(prompt)
        system = self.settings["system"] if system is None else system
        if system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        contents = [parts_of(message["content"]) for message in messages]
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
        if add_generation_prompt:
            ids += self._control("<|im_start|>") + self._text("assistant\n")
        return ids, tiles

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """The text of one answer, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, rows: Any, **kwargs: Any) -> list[str]:
        """The texts of several answers."""
        return [self.decode(row, **kwargs) for row in rows]

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
