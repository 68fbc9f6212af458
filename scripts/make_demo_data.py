#!/usr/bin/env python
"""Makes the demo's data: pictures of real handwritten digits, questions about them, text-only tasks, a tokenizer.

Digits: the 1797 scans of 8x8 pixels that scikit-learn ships (`load_digits`, BSD-3-Clause), which are the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, CC BY 4.0).
1400 of them are for training, 397 held out: no held-out picture shows a digit that was trained on.

    OUT/images/{train,validation,heldout}/*.png    96x48 pixels: two digits, two tiles and a thumbnail; 48x48: one digit
    OUT/pairs.jsonl, OUT/digits.jsonl, OUT/text.jsonl                       training (digits.jsonl in LLaVA's form)
    OUT/validation_pairs.jsonl, OUT/validation_text.jsonl                   held out, watched during training
    OUT/heldout_pairs.jsonl, OUT/heldout_text.jsonl                         held out, used once at the end
    OUT/tokenizer/                                                          byte-level BPE with Qwen2's special tokens
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

TILE = 12  # pixels of the demo model's tile; a digit of 8x8 moves about in it
SCALE = 4  # pictures are stored this much larger, so that people can look at them and tiling has something to resize
LETTERS = "bcdfhjkp"  # no two of them stand together in a word the tokenizer is trained on: each is its own token
QUESTIONS = ("left", "right", "sum", "max")
NUM_TRAIN_DIGITS, NUM_VALIDATION_DIGITS = 1400, 100  # of 1797; the remaining 297 are for the final evaluation
NUM_TRAIN_PAIRS, NUM_TRAIN_SINGLES = 6000, 1400
NUM_VALIDATION_PAIRS, NUM_HELDOUT_PAIRS = 25, 100  # times four questions

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# What Qwen2 splits text at before the merges, from the tokenizer.json it is published with.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = "Answer the questions."
# As Qwen2's own template: a system text where the conversation brings none.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ------------------------------------------------------------------------------------------------------------ digits


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """u8[1797, 8, 8] ink (0 none, 255 full) and i64[1797] which digit it is."""
    from sklearn import datasets  # two seconds to import: only where digits are needed

    digits = datasets.load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def split_digits(seed: int, count: int = 1797) -> dict[str, np.ndarray]:
    """Which digits are for what, by index: train 1400, validation 100, heldout 297. They never overlap."""
    order = np.random.default_rng([seed, 1]).permutation(count)
    first, second = NUM_TRAIN_DIGITS, NUM_TRAIN_DIGITS + NUM_VALIDATION_DIGITS
    return {"train": order[:first], "validation": order[first:second], "heldout": order[second:]}


def draw(inks: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """u8[12, 12*n] one digit per tile, dark on light, each moved by up to a pixel, with noise."""
    paper = np.zeros((TILE, TILE * len(inks)), np.float32)
    for i, ink in enumerate(inks):
        top, left = rng.integers(1, TILE - 8, size=2)  # 1..3; 2 is the middle
        paper[top : top + 8, TILE * i + left : TILE * i + left + 8] = ink
    paper += rng.normal(0, 8, paper.shape)
    return (255 - np.clip(paper, 0, 255)).astype(np.uint8)


def picture(inks: Sequence[np.ndarray], rng: np.random.Generator) -> Image.Image:
    """The RGB picture of `draw`, stored SCALE times as large."""
    pixels = draw(inks, rng).repeat(SCALE, 0).repeat(SCALE, 1)  # [48, 48*n]
    return Image.fromarray(pixels).convert("RGB")


def answers(left: int, right: int) -> dict[str, str]:
    """The four questions about a picture of two digits. `answers(3, 4)["sum"] == "7"`."""
    return {"left": str(left), "right": str(right), "sum": str(left + right), "max": str(max(left, right))}


# -------------------------------------------------------------------------------------------------------------- rows


def pair_row(image: str, task: str, answer: str) -> dict[str, Any]:
    """A question about a picture, in the form of OpenAI's messages."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": f"\n{task}?"}]
    return {
        "task": task,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
    }


def digit_row(image: str, answer: str) -> dict[str, Any]:
    """A question about a picture, in LLaVA's form."""
    turns = [{"from": "human", "value": "<image>\ndigit?"}, {"from": "gpt", "value": answer}]
    return {"id": Path(image).stem, "task": "digit", "image": image, "conversations": turns}


def text_row(task: str, question: str, answer: str) -> dict[str, Any]:
    """A text-only sample."""
    return {
        "task": task,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def text_tasks() -> Iterator[tuple[str, str, str]]:
    """All (task, question, answer): sums `17+5=` of 0..99 and 0..9, and four letters to be reversed."""
    for a in range(100):
        for b in range(10):
            yield "add", f"{a}+{b}=", str(a + b)
    for number in range(len(LETTERS) ** 4):
        word = "".join(LETTERS[number // len(LETTERS) ** k % len(LETTERS)] for k in range(4))
        yield "rev", f"rev {word}", word[::-1]


def split_text(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the text tasks: 90 % of the strings of each task for training, 2 % validation, 8 % held out."""
    rng = np.random.default_rng([seed, 2])
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "heldout": []}
    by_task: dict[str, list[tuple[str, str, str]]] = {}
    for entry in text_tasks():
        by_task.setdefault(entry[0], []).append(entry)
    for entries in by_task.values():
        order = rng.permutation(len(entries))
        first, second = round(0.90 * len(entries)), round(0.92 * len(entries))
        for part, chosen in (
            ("train", order[:first]),
            ("validation", order[first:second]),
            ("heldout", order[second:]),
        ):
            parts[part] += [text_row(*entries[i]) for i in chosen]
    return parts


# --------------------------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE in Qwen2's form: 256 bytes, the merges of the demo's words and tags, Qwen2's special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [
        "Answer the questions.",
        "system\n",
        "user\n",
        "assistant\n",
        "Image",
        "</",
        "_",
        "rev",
        "digit",
        *QUESTIONS,
    ]
    words += ["tile", "_", "tile_global_thumbnail", "?", ">\n", "><"]  # a tile tag is then five tokens, as with Qwen2
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(words * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    first = tokenizer.get_vocab_size(with_added_tokens=False)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(first + i): {"content": t, **flags} for i, t in enumerate(SPECIAL_TOKENS)},
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- main


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(
    out: Path, part: Literal["train", "validation", "heldout"], count: int, inks: np.ndarray, labels: np.ndarray,
    digits: np.ndarray, rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    """Draws `count` pictures of two digits out of `digits` into OUT/images/<part>; four rows for each."""
    (out / "images" / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for n in tqdm(range(count), desc=f"{part} pictures", unit="picture", disable=None):
        left, right = rng.choice(digits, 2)
        name = f"images/{part}/pair_{n:05d}.png"
        picture([inks[left], inks[right]], rng).save(out / name)
        rows += [pair_row(name, task, a) for task, a in answers(int(labels[left]), int(labels[right])).items()]
    return rows


def make(out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Writes everything below `out`; `scale` makes it smaller for tests."""
    inks, labels = load_digits()
    split = split_digits(seed, len(inks))
    rng = np.random.default_rng([seed, 3])
    counts = {"train": NUM_TRAIN_PAIRS, "validation": NUM_VALIDATION_PAIRS, "heldout": NUM_HELDOUT_PAIRS}
    for part, count in counts.items():
        rows = write_pairs(out, part, max(1, round(scale * count)), inks, labels, split[part], rng)  # type: ignore[arg-type]
        write_rows(out / ("pairs.jsonl" if part == "train" else f"{part}_pairs.jsonl"), rows)

    rows = []
    for n, digit in enumerate(split["train"][: max(1, round(scale * NUM_TRAIN_SINGLES))]):
        name = f"images/train/digit_{n:05d}.png"
        picture([inks[digit]], rng).save(out / name)
        rows.append(digit_row(name, str(labels[digit])))
    write_rows(out / "digits.jsonl", rows)
    for n, digit in enumerate(split["heldout"][:3]):
        picture([inks[digit]], rng).save(out / f"images/heldout/digit_{n:05d}_is_{labels[digit]}.png")

    for part, text in split_text(seed).items():
        write_rows(out / ("text.jsonl" if part == "train" else f"{part}_text.jsonl"), text)
    write_tokenizer(out / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, for example demo/data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args.seed)
    print(f"demo data in {args.out}")


if __name__ == "__main__":
    main()
