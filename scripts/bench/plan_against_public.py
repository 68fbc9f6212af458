"""Figures that others have published, beside what `nvlm-train plan` computes from sizes alone.

    python scripts/bench/plan_against_public.py

A figure is in the table only where the plan's own functions give it; what cannot be derived is listed with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from nvlm_train.model.flops import count_flops
from nvlm_train.plan.capacity import Cluster, smallest
from nvlm_train.plan.communication import communication
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import resolve
from nvlm_train.recipe.schema import Model, Recipe, Train

ROOT = Path(__file__).parents[2]
GIB = 2**30
A100 = 312.0
LLAMA_70B = dict(
    model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip


class Row(NamedTuple):
    """A published figure, ours, and why they differ where they do."""

    what: str
    published: float
    ours: float
    unit: str
    source: str
    why: str = ""

    @property
    def deviation(self) -> float:
        return self.ours / self.published - 1


def recipe(*overrides: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes/nvlm_d_72b/2_sft.yaml"), overrides).recipe


def per_token(sequence: int, **train: Any) -> float:
    """Operations of a token in Llama-3 70B, in GFLOP."""
    model = Model.model_validate({"vision": "internvit_300m_448px", "language_model": LLAMA_70B})
    modes = Train.model_validate({"projector": "frozen", **train})
    return count_flops(model, modes, sequence, "none").useful_per_token / 1e9


def operations() -> list[Row]:
    nemo = "NeMo Automodel, docs/performance-summary.mdx"
    titan = "torchtitan, docs/performance.md"
    lora = {"language_model": "lora", "lora": {"language_model": {"rank": 16}}}
    arithmetic = "by hand, before this code"
    packs = recipe("global_batch.samples=64", "data.max_tokens_per_sample=4096")
    step = count_flops(packs.model, packs.train, 4096, "full").step(8192, 14)
    return [
        Row("Llama-3 70B, 8192 tokens, 867 tokens/s a GPU", 389, 867 * per_token(8192) / 1e3, "TFLOP/s", nemo),
        Row("the same, LoRA, 4096 tokens, 1092 tokens/s", 316, 1092 * per_token(4096, **lora) / 1e3, "TFLOP/s", nemo),
        Row(
            "Llama-3 70B, 64 A100, 331 tokens/s", 51.7, 331 * per_token(8192) / 1e3 / A100 * 100, "% MFU", titan,
            "attention counted whole there, half (causal) here",
        ),
        Row("NVLM-D-72B, 8192 tokens, 14 tiles, useful", 3825, step[0] / 1e12, "TFLOP", arithmetic),
        Row("the same, executed with full recompute", 5019, step[1] / 1e12, "TFLOP", arithmetic),
    ]  # fmt: skip


def volume() -> list[Row]:
    arithmetic = "by hand, before this code"
    why = "three legs in bf16 there; here gradients travel in fp32 (zero.communication_data_type)"
    rows = []
    for ranks, published in ((8, 385), (128, 437)):
        for kind, reason in (("bf16", ""), ("fp32", why)):
            of = recipe("zero.max_reuse_distance=0", f"zero.communication_data_type={kind}")
            of = of.model_copy(update={"activation_checkpointing": "none"})
            received = communication(of, ranks)["received_per_micro_step"] / 1e9
            what = f"ZeRO-3, 72B, {ranks} ranks, no recompute, gradients in {kind}"
            rows.append(Row(what, published, received, "GB a GPU and micro-step", arithmetic, reason))
    return rows


def memory() -> list[Row]:
    arithmetic = "by hand, before this code"
    of = recipe("data.pack_tokens=8192", "data.max_tokens_per_sample=4096", "global_batch.samples=256")
    rows = []
    for ranks, weights, optimizer in ((8, 17.1, 102.4), (16, 8.5, 51.2), (64, 2.1, 12.8), (128, 1.1, 6.4)):
        found = resolve(of, ranks).memory
        rows.append(Row(f"72B on {ranks}: weights", weights, found["weights"] / GIB, "GiB", arithmetic))
        rows.append(Row(f"72B on {ranks}: optimizer", optimizer, found["optimizer"] / GIB, "GiB", arithmetic))
    found = resolve(of, 64).memory
    kinds = {
        "tower_replicated": (10.3, ""),
        "activations": (10.0, "projector's included here"),
        "recomputed_layer": (2.4, "fused there"),
        "gathered": (5.6, "DeepSpeed's rules here, an estimate there"),
        "loss": (13.9, ""),
    }
    for kind, (published, why) in kinds.items():
        name = f"8192 tokens: {kind.replace('_', ' ')}"
        rows.append(Row(name, published, found[kind] / GIB, "GiB", arithmetic, why))
    states = sum(resolve(of, 1).memory[kind] for kind in ("weights", "gradients", "optimizer"))
    each = states / sum(resolve(of, 1).parameters["trainable"].values())
    rule = "LLaMA-Factory, README: 1200 GB for 70B"
    rows.append(
        Row("states of a 70B model", 1200, each * 70, "GB", rule, "gradients accumulate in fp32 here: 4 bytes more")
    )
    return rows


def gpus() -> list[Row]:
    cluster = Cluster(4, 8, 80, 4, None, 2880, 0.4, A100)
    of = recipe("data.pack_tokens=4096", "data.max_tokens_per_sample=4096", "data.tiling.max_tiles=6")
    whole = smallest(of, cluster)["gpus"]
    lora = of.model_copy(update={"train": Train.model_validate({"language_model": "lora"})})
    internvl = "InternVL, issues 516 and 526: InternVL2-76B on A100 of 80 GB"
    return [
        Row("72B, 6B tower, everything but it trained: least GPUs", 32, whole, "GPUs", internvl),
        Row(
            "the same, LoRA", 8, smallest(lora, cluster)["gpus"], "GPUs", internvl,
            "8 was the node; below a node 1, 2, 4 are tried here",
        ),
    ]  # fmt: skip


NOT_DERIVED = {
    "MPT 70B on 32 and 64 GPUs (llm-foundry)": "its feed-forward layer has no gate, which our decoder cannot be",
    "Llama-3 70B with 8-way tensor parallelism, float8 (torchtitan)": "no tensor parallelism, no float8 here",
    "GPT 2B to 462B, 3D parallel (Megatron-LM)": "no pipeline parallelism here",
    "IDEFICS-80B, 90 TFLOP/s on 340 Gbit/s": "its micro batch is not published",
    "LLaVA-NeXT 72B, 30 to 40 h on 64 A100": "its tokens and tiles are not published",
    "times with optimizer offload (LLaMA-7B, Falcon-7B)": "the plan knows no speed of host cores and PCIe",
    "throughput at a given MFU": "MFU is what the user says, not what the plan predicts",
}


def table() -> list[Row]:
    return [*operations(), *volume(), *memory(), *gpus()]


def main() -> None:
    print("| figure | published | plan | deviation | source |\n|---|---|---|---|---|")
    for row in table():
        why = f"; {row.why}" if row.why else ""
        print(
            f"| {row.what} | {row.published:g} {row.unit} | {row.ours:.4g} | {row.deviation:+.1%} | {row.source}{why} |"
        )
    print()
    for what, why in NOT_DERIVED.items():
        print(f"not derived: {what}: {why}")


if __name__ == "__main__":
    main()
