"""LoRA, QLoRA and recompute in recipes: what is refused and why, what is counted, what is predicted."""

from __future__ import annotations

import pytest

from nvlm_train.errors import RecipeError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import resolve
from nvlm_train.recipe.show import explain
from recipe_files import write


@pytest.fixture
def load(tmp_path):
    path = write(tmp_path)
    return lambda *overrides: load_recipe(path, overrides).recipe


def refused(load, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    return str(caught.value)


LORA = "train.language_model=lora"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([LORA, "train.lora.language_model.targets=[lm_head]"],
         ["train.lora.language_model.targets", "names lm_head, which takes no adapter", "computes the loss"]),
        ([LORA, "train.lora.language_model.targets=[model.embed_tokens, q_prj]"],
         ["names embed_tokens, which takes no adapter", "did you mean q_proj?", "its linear layers are q_proj"]),
        ([LORA, "train.lora.language_model.targets=[qkv]"], ["names 'qkv', which the language_model does not have"]),
        (["train.vision=lora", "train.lora.vision.targets=[norm1]"], ["names norm1", "it is a vector"]),
        (["train.vision=lora", "train.lora.vision.targets=[patch_embedding]"], ["it is a convolution"]),
        ([LORA, "train.lora.language_model.targets=[]"], ["has too few values"]),
        (["train.lora.language_model.rank=8"], ["has no effect, because train.language_model is full"]),
        ([LORA, "train.lora.language_model.rank=0"], ["must be more than 0"]),
        (["train.quantize=nf4"], ["train.quantize", "train.language_model is full; set train.language_model: lora"]),
        ([LORA, "train.quantize=nf4"], ["zero.stage", "4-bit weights are whole on every rank; use zero.stage=2"]),
        (["init_from.adapters=continue"], ["has no effect without init_from.run"]),
        (["train.language_model=qlora"], ["is not one of frozen, full, lora"]),
        (["lora_rank=8"], ["here it is train.lora.language_model.rank"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(load, overrides, parts):
    message = refused(load, *overrides)
    for part in parts:
        assert part in message


def test_counts_rates_and_memory_know_adapters(load):
    full = resolve(load("precision=bf16"), 2)
    recipe = load(
        LORA, "precision=bf16", "train.vision=lora", "train.lora.vision={rank: 4, targets: [qkv, fc2]}",
        "train.lora.language_model={rank: 8, alpha: 16, dropout: 0.1}",
        "optimizer.module_lr={vision: 1e-5, language_model: 2e-4}",
    )  # fmt: skip
    found = resolve(recipe, 2)
    d, f, kv, e, ef = 48, 80, 16, 64, 96
    language_model = 3 * 8 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))
    assert found.parameters["trainable"] == {
        "vision": 2 * 4 * ((e + 3 * e) + (ef + e)),
        "projector": full.parameters["trainable"]["projector"],
        "language_model": language_model,
    }
    assert found.parameters["total"] == full.parameters["total"]
    assert found.module_lr == {"vision": 1e-5, "projector": 1e-3, "language_model": 2e-4}
    trained = sum(found.parameters["trainable"].values())
    assert found.memory["optimizer"] == -(-trained // 2) * 12 and found.memory["gradients"] == -(-trained // 2) * 4
    assert found.memory["tower_replicated"] == 0 < full.memory["tower_replicated"], "a tower with adapters is inside"
    screen = "\n".join(explain(found))
    assert "lora rank 8, alpha 16, dropout 0.1 on q_proj, k_proj" in screen and "rank 4, alpha 32 on qkv, fc2" in screen


def test_nf4_is_about_a_quarter_of_bf16(load):
    sizes = ["precision=bf16", "train.projector=frozen", LORA, "zero.stage=2"]
    plain, four = resolve(load(*sizes), 1), resolve(load(*sizes, "train.quantize=nf4"), 1)
    layers = 3 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 80)  # products only: embedding, head and norms stay
    assert plain.memory["weights"] - four.memory["weights"] == pytest.approx(layers * (2 - 4.127 / 8), rel=1e-4)
    assert any("linear layers in nf4" in line for line in explain(four))


def test_three_kinds_of_recompute(load):
    found = {m: resolve(load(f"activation_checkpointing={m}"), 1) for m in ("none", "selective", "full")}
    kept = {mode: resolved.memory["activations"] for mode, resolved in found.items()}
    assert kept["full"] < kept["selective"] < kept["none"]
    executed = {mode: resolved.flops.executed_per_token for mode, resolved in found.items()}
    assert executed["selective"] == executed["none"] < executed["full"]
    with_tower = resolve(load("train.vision=full", "activation_checkpointing=full"), 1)
    without = resolve(load("train.vision=full"), 1)
    assert with_tower.memory["vision_activations"] < without.memory["vision_activations"]
    assert with_tower.flops.executed_per_tile == with_tower.flops.useful_per_tile + with_tower.flops.tile_forward
