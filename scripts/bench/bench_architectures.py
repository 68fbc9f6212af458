#!/usr/bin/env python
"""Training throughput of NVLM-D, -X and -H at equal settings, beside the paper's ratio D 1.00 : H 1.26 : X 1.76.

    python scripts/bench/bench_architectures.py [--rounds 12] [--device cuda] [--out scripts/bench/results]

The paper's figures (table 3): Yi-34B, tower frozen, decoder trained, 128 H100, 6 tiles and a thumbnail of 256 image
tokens, sequences of 2816 (D), 1280 (H) and 1024 (X) tokens: 1024 of text and tags in each.

Here the same proportions at a scaled shape. cpu: a quarter of the tokens (64 a tile, 256 of text and tags, so sequences
of 704, 320 and 256), Yi-34B's ratios of feed-forward, vocabulary and depth of cross-attention (every sixth layer), and
a tower whose share of the operations is that of InternViT-6B beside 34 B. cuda: the paper's tokens, a decoder of about
0.9 B in bf16. A step is tower, projector, decoder, forward and backward, on one sample with pictures; without optimizer
and without communication, which a step of 256 samples spreads over many. The three take turns in one process, in an
order that turns with every round; a ratio is of one round's two steps.

What `nvlm_train.model.flops` predicts stands beside: operations of the same shape, and of the paper's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from nvlm_train.batch import Batch
    from nvlm_train.recipe import schema

ARCHITECTURES = ("nvlm_d", "nvlm_h", "nvlm_x")
PAPER = {"nvlm_d": 1.0, "nvlm_h": 1.26, "nvlm_x": 1.76}
TILES, TAG = 7, 5  # the last tile is the thumbnail; a tag is five tokens
VISION = {
    "cpu": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3,
            "image_size": 112, "patch_size": 7},
    "cuda": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 45, "num_attention_heads": 8,
             "image_size": 448, "patch_size": 14},
    "paper": "internvit_6b_448px_v1_5",
}  # fmt: skip
LANGUAGE_MODEL = {
    "cpu": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1464, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1024},
    "cuda": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5848, "num_hidden_layers": 18,
             "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 8192},
    "paper": "yi_34b",
}  # fmt: skip
WORDS = {"cpu": 256, "cuda": 1024, "paper": 1024}  # tokens of text and tags
EVERY = 6


def config(architecture: str, shape: str) -> schema.Model:
    """The model of a shape: cpu, cuda or paper."""
    from nvlm_train.recipe import schema

    values = {"architecture": architecture, "vision": VISION[shape], "language_model": LANGUAGE_MODEL[shape]}
    if architecture != "nvlm_d":
        values["cross_attention"] = {"every_layers": EVERY}
    return schema.Model.model_validate(values)


def sequence(architecture: str, words: int, per_tile: int) -> int:
    """Tokens in the decoder: 2816, 1280 and 1024 for 1024 words and 256 image tokens a tile."""
    return words + per_tile * {"nvlm_d": TILES, "nvlm_h": 1, "nvlm_x": 0}[architecture]


def operations(architecture: str, shape: str) -> float:
    """Of a step, as `count_flops` has them; of H's thumbnail, which nothing reads by cross-attention, without that."""
    from nvlm_train.model.flops import count_flops, image_tokens_per_tile
    from nvlm_train.recipe import schema

    model = config(architecture, shape)
    tokens = sequence(architecture, WORDS[shape], image_tokens_per_tile(model.vision))
    flops = count_flops(model, schema.Train(), tokens, "none")  # type: ignore[arg-type]
    total = flops.step(tokens, TILES)[0]
    if architecture == "nvlm_h":
        plain = count_flops(config("nvlm_d", shape), schema.Train(), tokens, "none")  # type: ignore[arg-type]
        total -= flops.useful_per_tile - plain.useful_per_tile
    return total


def make_batch(model: schema.Model, words: int) -> Batch:
    """One sample: 7 tiles, each behind its tag, then text, of which all but the last token is trained."""
    import torch

    from nvlm_train.batch import IGNORE_INDEX, Batch, Memory
    from nvlm_train.data.chat import Rendered, TileReads
    from nvlm_train.data.memory import lay_out_memory
    from nvlm_train.model.flops import image_tokens_per_tile

    per_tile, chance = image_tokens_per_tile(model.vision), torch.Generator().manual_seed(0)
    slots: list[int] = []
    own: list[tuple[int, int]] = []
    in_sequence = {"nvlm_d": range(TILES), "nvlm_h": range(TILES - 1, TILES), "nvlm_x": range(0)}[model.architecture]
    for tile in range(TILES):
        if model.architecture != "nvlm_h" or tile in in_sequence:  # in nvlm_h the other tags are in the memory
            own.append((len(slots), len(slots) + TAG))
            slots += [-1] * TAG
        if tile in in_sequence:
            slots += range(tile * per_tile, (tile + 1) * per_tile)
    behind, total = len(slots), sequence(model.architecture, words, per_tile)
    slots += [-1] * (total - behind)
    ids = torch.randint(5, model.language_model.vocab_size, (1, total), generator=chance)
    labels = torch.cat((ids[:, 1:], torch.full((1, 1), IGNORE_INDEX)), dim=1)
    labels[:, :behind] = IGNORE_INDEX
    memory = None
    if model.architecture != "nvlm_d":
        hybrid = model.architecture == "nvlm_h"
        reads = tuple(
            TileReads(0, k not in in_sequence, (0, 0) if hybrid else own[k], behind,
                      tuple(range(5, 5 + TAG)) if hybrid and k not in in_sequence else ())
            for k in range(TILES)
        )  # fmt: skip
        stream = np.zeros(total, dtype=np.int32)  # of which only the length counts here
        arrays = lay_out_memory(model, [(0, Rendered(stream, stream, (-1,) * TILES, reads))], per_tile, pad=0)
        memory = Memory(**{n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()})
    pixels = model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(total)[None],
        cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
        max_seqlen=total,
        tiles=torch.randint(0, 256, (TILES, 3, pixels, pixels), generator=chance, dtype=torch.uint8),
        image_slots=torch.tensor(slots)[None],
        num_trained_tokens=int((labels != IGNORE_INDEX).sum()),
        memory=memory,
    )


def measure(device: str, rounds: int, limit_s: float) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(what ran, seconds of each step by architecture). Ends after `limit_s` even if rounds are left."""
    import torch

    from nvlm_train.model.flops import count_parameters
    from nvlm_train.model.nvlm import class_of

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    models, batches, about = {}, {}, {}
    for name in ARCHITECTURES:
        torch.manual_seed(0)
        own = config(name, device)
        with torch.device(device):
            model = class_of(own)(own, tiles_per_chunk=TILES)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # gates too: they are open
        models[name] = model.to(dtype)
        model.vision_model.requires_grad_(False)
        batches[name] = make_batch(own, WORDS[device]).to(device)
        tokens = batches[name].input_ids.numel()
        about[name] = {"tokens": tokens, "parameters": count_parameters(own), "flop": operations(name, device)}

    def step(name: str) -> float:
        begun = time.perf_counter()
        models[name](batches[name]).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        models[name].zero_grad(set_to_none=False)  # between the times: gradients stay where they are
        return seconds

    times: dict[str, list[float]] = {name: [] for name in ARCHITECTURES}
    for name in ARCHITECTURES:  # allocations and first calls
        step(name)
    begun = time.monotonic()
    for turn in range(rounds):
        if turn >= 2 and time.monotonic() - begun > limit_s:
            break
        for name in ARCHITECTURES[turn % 3 :] + ARCHITECTURES[: turn % 3]:
            times[name].append(step(name))
        print(f"round {turn + 1}: " + ", ".join(f"{n} {times[n][-1]:.3f} s" for n in ARCHITECTURES), flush=True)
    return about, times


def report(found: dict[str, Any]) -> str:
    """The page beside the JSON."""
    rows = []
    for name in ARCHITECTURES:
        own = found["architectures"][name]
        low, high = own["ratio_range"]
        rows.append(
            f"| {name.replace('nvlm_', 'NVLM-').upper()} | {own['tokens']} | {sum(own['parameters'].values()):,} "
            f"| {own['step_s']:.3f} | {1 / own['step_s']:.2f} | {own['ratio']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {own['predicted']:.2f} | {own['predicted_paper_shape']:.2f} | {own['paper']:.2f} |"
        )
    return f"""# Throughput of the three architectures, {found["date"]}

Machine: {found["machine"]}. Command: `{found["command"]}`.
{found["rounds"]} rounds of one step each; load average {found["load"]:.1f}.

Shape: decoder {found["language_model"]}; tower {found["vision"]}; cross-attention every {EVERY} layers; {TILES} tiles.
Forward and backward of one sample, tower frozen, without optimizer and communication. Median step; ratios of samples/s
to NVLM-D of the same round: median, least and most. Predicted: operations of this shape, and of the paper's (Yi-34B and
InternViT-6B), from the FLOP model. The paper measured 28.8 (D), 36.2 (H) and 50.6 (X) samples/s on 128 H100.

| | tokens | parameters | step, s | samples/s | ratio | predicted | predicted, 34B | paper, 34B |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--limit-s", type=float, default=200.0, help="no round begins after this long (default 200)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of torch on a CPU (default: all cores)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    about, times = measure(args.device, args.rounds, args.limit_s)
    machine = f"{args.threads} CPU cores, no GPU" if args.device == "cpu" else torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "date": str(date.today()),
        "device": args.device,
        "command": " ".join(["python", "scripts/bench/bench_architectures.py", *sys.argv[1:]]),
        "machine": f"{machine}; torch {torch.__version__}, Python {platform.python_version()}",
        "load": os.getloadavg()[0],
        "rounds": len(times["nvlm_d"]),
        "language_model": LANGUAGE_MODEL[args.device],
        "vision": VISION[args.device],
        "architectures": {},
    }
    for name in ARCHITECTURES:
        ratios = [d / own for d, own in zip(times["nvlm_d"], times[name], strict=True)]
        found["architectures"][name] = about[name] | {
            "step_s": statistics.median(times[name]),
            "steps_s": times[name],
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "predicted": about["nvlm_d"]["flop"] / about[name]["flop"],
            "predicted_paper_shape": operations("nvlm_d", "paper") / operations(name, "paper"),
            "paper": PAPER[name],
        }
    args.out.mkdir(parents=True, exist_ok=True)
    device = "" if args.device == "cpu" else f"_{args.device}"
    stem = args.out / f"{date.today()}_architectures_throughput{device}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    stem.with_suffix(".md").write_text(report(found))
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
