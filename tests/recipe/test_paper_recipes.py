"""The recipes of the paper's models against its Tables 4, 6, 10 and 11, and their numbers of parameters."""

from __future__ import annotations

from typing import Any

import pytest

from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import known_steps, resolve
from nvlm_train.recipe.schema import Recipe

VIT = 5_536_496_000
QWEN2_72B, YI_34B = 72_706_203_648, 34_388_917_248
# projector of D and H: LayerNorm over 12,800 with bias, 12,800 -> F -> D; of X: the norm, 12,800 -> D
PROJECTOR = {
    ("d", "72b"): 620_717_056, ("h", "72b"): 620_717_056, ("x", "72b"): 25_600 + 104_857_600,
    ("d", "34b"): 408_970_240, ("h", "34b"): 408_970_240, ("x", "34b"): 25_600 + 91_750_400,
}  # fmt: skip
# ten layers of q, k, v, o with 8 key/value groups, two norms and a gate (our choices)
CROSS_ATTENTION = {
    "72b": 10 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 2 * 8192 + 1),
    "34b": 10 * (2 * 7168 * 7168 + 2 * 7168 * 1024 + 2 * 7168 + 1),
}
# Table 10: batch, lr, min lr, warm-up, betas, weight decay, clipping, length, tiles, steps
PRETRAIN: dict[str, tuple[Any, ...]] = {
    "d": (2048, 1e-4, 2.5e-5, 500, [0.9, 0.95], 0.1, 10.0, 512, 1, 20000),
    "x": (2048, 1e-4, 1e-5, 1000, [0.9, 0.95], 0.05, 1.0, 512, 1, 20000),
    "h": (2048, 1e-4, 1e-5, 1000, [0.9, 0.98], 0.05, 1.0, 512, 7, 20000),
}
# Table 11
SFT: dict[tuple[str, str], tuple[Any, ...]] = {
    ("d", "72b"): (128, 2e-6, 2.5e-7, 1000, [0.9, 0.98], 0.1, 10.0, 3200, 7, 40000),
    ("d", "34b"): (128, 2e-6, 2.5e-7, 1000, [0.9, 0.98], 0.1, 10.0, 3200, 7, 40000),
    ("x", "72b"): (256, 1e-5, 1e-7, 500, [0.9, 0.98], 0.05, 1.0, 1024, 7, 20000),
    ("x", "34b"): (512, 1e-5, 1e-6, 500, [0.9, 0.98], 0.05, 1.0, 1024, 7, 20000),
    ("h", "72b"): (256, 1e-5, 1e-7, 1000, [0.9, 0.98], 0.05, 1.0, 1280, 7, 40000),
    ("h", "34b"): (256, 1e-5, 1e-7, 1000, [0.9, 0.98], 0.05, 1.0, 1280, 7, 40000),
}
MEMBERS = [(member, size) for size in ("72b", "34b") for member in "dxh"]


def hyper_parameters(recipe: Recipe) -> tuple[Any, ...]:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    return (
        recipe.global_batch.samples, optimizer.lr, schedule.min_lr, schedule.warmup_steps, list(optimizer.betas),
        optimizer.weight_decay, optimizer.max_grad_norm, recipe.data.max_tokens_per_sample,
        recipe.data.tiling.tiles_of_image, known_steps(recipe),
    )  # fmt: skip


@pytest.mark.parametrize(("member", "size"), MEMBERS)
def test_hyper_parameters_are_those_of_the_tables(member: str, size: str) -> None:
    pretrain = load_recipe(f"recipes/nvlm_{member}_{size}/1_pretrain.yaml").recipe
    sft = load_recipe(f"recipes/nvlm_{member}_{size}/2_sft.yaml").recipe
    assert hyper_parameters(pretrain) == PRETRAIN[member]
    assert hyper_parameters(sft) == SFT[member, size]
    for recipe in (pretrain, sft):
        assert recipe.schedule.name == "cosine" and recipe.schedule.decay_steps is None
        assert recipe.model.architecture == f"nvlm_{member}" and recipe.train.vision == "frozen"
        assert recipe.train.projector == "full" and recipe.train.cross_attention == "full"
        assert recipe.run_name.startswith(f"nvlm_{member}_{size}_")
    assert (pretrain.train.language_model, sft.train.language_model) == ("frozen", "full")
    assert sft.init_from.run is not None and sft.init_from.run.path == pretrain.output_dir
    assert pretrain.init_from.run is None and pretrain.data.tiling.tags == ("one_d" if member == "h" else "none")
    assert sft.data.tiling.tags == "one_d"
    if member != "d":  # every 8th of 80 layers, every 6th of 60: ten
        assert len(sft.model.cross_attention_layers) == 10


@pytest.mark.parametrize(("member", "size"), MEMBERS)
def test_numbers_of_parameters(member: str, size: str) -> None:
    expected = {"vision": VIT, "projector": PROJECTOR[member, size]}
    if member != "d":
        expected["cross_attention"] = CROSS_ATTENTION[size]
    expected["language_model"] = QWEN2_72B if size == "72b" else YI_34B
    for stage in ("1_pretrain", "2_sft"):
        resolved = resolve(load_recipe(f"recipes/nvlm_{member}_{size}/{stage}.yaml").recipe, 64)
        assert resolved.parameters["total"] == expected
        assert resolved.memory["total"] < 75 * 2**30
        packed = resolve(load_recipe(f"recipes/nvlm_{member}_{size}/{stage}_packs.yaml").recipe, 64)
        assert packed.parameters == resolved.parameters and packed.batch.max_null_share == 0
        assert packed.recipe.optimizer == resolved.recipe.optimizer


@pytest.mark.parametrize("member", list("dxh"))
@pytest.mark.parametrize("stage", ["1_pretrain", "2_sft"])
def test_small_models_fit_one_gpu_of_80_gb(member: str, stage: str) -> None:
    resolved = resolve(load_recipe(f"recipes/nvlm_{member}_2b/{stage}.yaml").recipe, 1)
    assert 1.8e9 < sum(resolved.parameters["total"].values()) < 2.1e9
    assert resolved.memory["total"] < 60 * 2**30
    assert resolved.recipe.init_from.vision is not None and "300M" in resolved.recipe.init_from.vision.path


def test_the_released_weights_are_fine_tuned_in_their_own_stream_and_licence() -> None:
    recipe = load_recipe("recipes/finetune_nvlm_d_72b.yaml").recipe
    assert recipe.init_from.model is not None and recipe.init_from.model.license == "CC-BY-NC-4.0"
    assert recipe.init_from.vision is None and recipe.init_from.language_model is None
    assert recipe.tokenizer.template == "hf_nvlm" and recipe.tokenizer.path == recipe.init_from.model.path
    assert sum(resolve(recipe, 64).parameters["total"].values()) == VIT + 620_717_056 + QWEN2_72B


def test_the_mixtures_have_the_five_published_weights() -> None:
    pretrain = load_recipe("recipes/nvlm_d_72b/1_pretrain.yaml").recipe.data.mixture
    sft = load_recipe("recipes/nvlm_d_72b/2_sft.yaml").recipe.data.mixture
    assert {n: pretrain[n].weight for n in ("laion_115m", "coco", "vqav2")} == {
        "laion_115m": 0.579, "coco": 0.02, "vqav2": 0.01,
    }  # fmt: skip
    assert (sft["coco"].weight, sft["clevr_math"].weight) == (0.01, 0.02)
    for mixture in (pretrain, sft):
        assert sum(source.weight or 0 for source in mixture.values()) == pytest.approx(1, abs=0.002)
    assert len(pretrain) == 18 and len(sft) == 97
