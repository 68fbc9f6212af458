#!/usr/bin/env python
"""Trains the demo's two backbones and writes them as folders in the published formats of InternViT and Qwen2.

The tower learns to read digits: on a tile, every image token must name the digit; on a thumbnail, the left and the
right one. It stays frozen ever after, as NVLM's does, so its patch tokens must carry all that questions may ask for.
The decoder learns the text-only tasks in chat format; it never sees a picture.

    OUT/vision/          config.json, model.safetensors                     as OpenGVLab/InternViT-6B-448px-V1-5
    OUT/language_model/  config.json, model.safetensors, tokenizer files    as Qwen/Qwen2-72B-Instruct

Plain PyTorch on one thread each; the two are trained side by side where there are two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from make_demo_data import load_digits, picture, split_digits
from make_tiny_checkpoints import write_internvit_folder, write_qwen2_folder
from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.model.decoder import LanguageModel
from nvlm_train.model.projector import pixel_shuffle
from nvlm_train.model.vision import InternVit, normalise
from nvlm_train.recipe import schema
from nvlm_train.recipe.load import load_recipe

VISION_STEPS, LANGUAGE_MODEL_STEPS = 600, 400
BATCH = 64  # pictures, or text samples, a step
NUM_PICTURES = 5000


def step_by_step(
    name: str, steps: int, lr: float, parameters: Sequence[nn.Parameter], loss_of_step: Callable[[], Tensor]
) -> None:
    """AdamW with warm-up and cosine, one progress bar."""
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 30) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    bar = tqdm(range(steps), desc=f"{name:14}", unit="step", position=int(os.environ.get("BAR_POSITION", "0")))
    if not sys.stderr.isatty():
        bar.miniters, bar.mininterval = steps // 5, 5.0  # a few lines in a log, not hundreds
    for _ in bar:
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shape.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()


def random_weights(module: nn.Module, std: float) -> None:
    """Normal weights, zero biases; norms and LayerScale as the modules make them."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# ------------------------------------------------------------------------------------------------------------- tower


def draw_pictures(part: str, count: int, tile: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of two digits, cut as the data pipeline cuts them.

    Returns u8[count, 3, 3, px, px] left tile, right tile, thumbnail; i64[count, 2] the digits.
    """
    from nvlm_train.data.tiling import cut

    inks, labels = load_digits()
    digits = split_digits(0, len(inks))[part]
    rng = np.random.default_rng([seed, 9])
    tiles, targets = [], []
    for _ in range(count):
        left, right = rng.choice(digits, 2)
        tiles.append(cut(picture([inks[left], inks[right]], rng), max_tiles=2, tile_size=tile, thumbnail=True))
        targets.append((labels[left], labels[right]))
    return torch.from_numpy(np.stack([np.asarray(t) for t in tiles])), torch.tensor(np.array(targets))


class Readers(nn.Module):
    """Three linear readings of each image token: the tile's digit, a thumbnail's left and right one. Thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.out = nn.Linear(4 * width, 30)

    def forward(self, features: Tensor) -> Tensor:
        """[T, P, E] -> [T, Q, 3, 10]."""
        return self.out(self.norm(pixel_shuffle(features))).unflatten(-1, (3, 10))


def train_vision(out: Path, vision: schema.Vision, steps: int) -> dict[str, float]:
    """Trains and writes the tower; returns held-out accuracies of the readers (mean over image tokens)."""
    torch.manual_seed(0)
    tower, readers = InternVit(vision), Readers(vision.hidden_size)
    random_weights(tower, 0.02)
    for layer in tower.encoder.layers:  # 0.1 is for 45 layers; three of them learn faster with more
        nn.init.constant_(layer.ls1, 0.5)
        nn.init.constant_(layer.ls2, 0.5)
    pictures, digits = draw_pictures("train", NUM_PICTURES if steps >= 100 else 100, vision.image_size, seed=0)
    generator = torch.Generator().manual_seed(0)

    def read(tiles: Tensor) -> Tensor:
        """u8[n, 3, 3, px, px] -> [n, 3 tiles, Q, 3 readings, 10]."""
        features = tower(normalise(tiles.flatten(0, 1), torch.float32))[:, 1:]  # [3n, P, E]
        return readers(features).unflatten(0, (-1, 3))

    # tile, reading, digit, weight
    tasks = ((0, 0, 0, 1.0), (1, 0, 1, 1.0), (2, 1, 0, 0.5), (2, 2, 1, 0.5))

    def loss_of_step() -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        found, wanted = read(pictures[chosen]), digits[chosen]  # [BATCH, 3, Q, 3, 10], [BATCH, 2]
        losses = []
        for tile, reading, digit, weight in tasks:
            scores = found[:, tile, :, reading]  # [BATCH, Q, 10]
            losses.append(
                weight * F.cross_entropy(scores.flatten(0, 1), wanted[:, digit].repeat_interleave(scores.shape[1]))
            )
        return torch.stack(losses).sum()

    step_by_step("vision tower", steps, 4e-3, [*tower.parameters(), *readers.parameters()], loss_of_step)
    pictures, digits = draw_pictures("validation", 100, vision.image_size, seed=1)
    with torch.no_grad():
        found = read(pictures).argmax(-1)  # [n, 3, Q, 3]
    right = [(found[:, t, :, r] == digits[:, d : d + 1]).float().mean().item() for t, r, d, _ in tasks]
    write_internvit_folder(out / "vision", vision, dict(tower.state_dict()))
    return {"tile": (right[0] + right[1]) / 2, "thumbnail": (right[2] + right[3]) / 2}


# ----------------------------------------------------------------------------------------------------------- decoder


def encode_rows(rows: Sequence[dict], recipe: schema.Recipe) -> list[tuple[list[int], list[int]]]:
    """(input ids, shifted labels) of text-only rows, rendered as in training."""
    from nvlm_train.data.chat import render
    from nvlm_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.tokenizer.path)
    samples = []
    for row in rows:
        messages = [{"role": m["role"], "content": [{"text": m["content"]}]} for m in row["messages"]]
        rendered = render(
            messages, [], tokenizer, recipe.tokenizer.template, recipe.data.tiling, 0, recipe.tokenizer.system
        )
        samples.append((rendered.input_ids.tolist(), rendered.labels.tolist()))
    return samples


def pack(samples: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """All samples in one row, without images."""
    ids, labels, positions, ends = [], [], [], [0]
    for sample_ids, sample_labels in samples:
        ids += sample_ids
        labels += sample_labels
        positions += range(len(sample_ids))
        ends.append(len(ids))
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(len(s[0]) for s in samples),
        tiles=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        image_slots=torch.full((1, len(ids)), -1),
        num_trained_tokens=sum(label != IGNORE_INDEX for label in labels),
    )


def train_language_model(out: Path, data: Path, recipe: schema.Recipe, steps: int) -> dict[str, float]:
    """Trains and writes the decoder; returns the share of validation answers that are right, token by token."""
    torch.manual_seed(0)
    model = LanguageModel(recipe.model.language_model)
    random_weights(model, 0.06)  # 0.02 is for thousands of channels; 128 learn to add in half the steps with more
    rows = [json.loads(line) for line in (data / "text.jsonl").read_text().splitlines()]
    tasks = sorted({row["task"] for row in rows})  # add, rev
    samples = [encode_rows([row for row in rows if row["task"] == task], recipe) for task in tasks]
    generator = random.Random(0)

    def run(batch: Batch) -> Tensor:
        return model.model(
            model.model.embed_tokens(batch.input_ids), batch.position_ids, batch.cu_seqlens, batch.max_seqlen
        )

    def loss_of_step() -> Tensor:
        # adding is the harder task: two samples of it for one of the other
        batch = pack([generator.choice(samples[generator.choice((0, 0, 1))]) for _ in range(BATCH)])
        return model.lm_head(run(batch), batch.labels, batch.num_trained_tokens) / batch.num_trained_tokens

    step_by_step("language model", steps, 3e-3, list(model.parameters()), loss_of_step)
    rows = [json.loads(line) for line in (data / "validation_text.jsonl").read_text().splitlines()]
    batch = pack(encode_rows(rows, recipe))
    with torch.no_grad():
        found = model.lm_head(run(batch)).argmax(-1)  # [1, S]
    wrong = (found != batch.labels) & (batch.labels != IGNORE_INDEX)
    starts = batch.cu_seqlens.tolist()
    right = [not bool(wrong[0, a:b].any()) for a, b in zip(starts[:-1], starts[1:], strict=True)]

    folder = out / "language_model"
    write_qwen2_folder(folder, recipe.model.language_model, dict(model.state_dict()))
    for file in Path(recipe.tokenizer.path).iterdir():
        shutil.copy(file, folder / file.name)
    return {"text": sum(right) / len(right)}


# -------------------------------------------------------------------------------------------------------------- main


def side_by_side(argv: Sequence[str]) -> int:
    """Both parts at the same time, each in a process of its own; Ctrl-C ends both."""
    parts = ("vision", "language_model")
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *argv, "--part", part],
            env={**os.environ, "OMP_NUM_THREADS": "1", "BAR_POSITION": str(i)},
            stdout=subprocess.PIPE,  # one line each, shown when both bars are done
            text=True,
        )
        for i, part in enumerate(parts)
    ]
    try:
        lines = [process.communicate()[0] for process in running]
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        return 130
    print("".join(lines), end="")
    return next((process.returncode for process in running if process.returncode), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder written by make_demo_data.py")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, for example demo/backbones")
    parser.add_argument(
        "--recipe", default="recipes/quickstart.yaml", help="where the sizes are (default: %(default)s)"
    )
    parser.add_argument("--part", choices=("both", "vision", "language_model"), default="both")
    parser.add_argument("--steps", type=int, help="fewer or more steps than the default, for tests")
    args = parser.parse_args()
    if args.part == "both":
        return side_by_side(sys.argv[1:])

    torch.set_num_threads(1)
    recipe = load_recipe(args.recipe, [f"tokenizer.path={args.data / 'tokenizer'}"]).recipe
    if args.part == "vision":
        found = train_vision(args.out, recipe.model.vision, args.steps or VISION_STEPS)
        print(
            f"{args.out / 'vision'}: digits named right on held-out tiles {found['tile']:.1%}, "
            f"on thumbnails {found['thumbnail']:.1%}"
        )
    else:
        found = train_language_model(args.out, args.data, recipe, args.steps or LANGUAGE_MODEL_STEPS)
        print(f"{args.out / 'language_model'}: held-out text answers right {found['text']:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
