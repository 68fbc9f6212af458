"""What a recipe means on ranks: hash, batch arithmetic, schedule, DeepSpeed's configuration, memory; and resume."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_train.engine.deepspeed_config import SUPPORTED_BEFORE, SUPPORTED_FROM, deepspeed_config
from nvlm_train.engine.memory import KINDS, predict_memory
from nvlm_train.errors import RecipeError
from nvlm_train.model.flops import count_parameters, trainable_parameters
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import (
    check_resume,
    compare,
    lr_factor,
    recipe_hash,
    recipe_to_dict,
    refuse_unsupported,
    resolve,
    warmup_steps,
)
from nvlm_train.recipe.schema import Recipe, all_keys
from recipe_files import BASE, write


def predict(recipe, ranks):
    return predict_memory(
        recipe, ranks, count_parameters(recipe.model), trainable_parameters(recipe.model, recipe.train)
    )


@pytest.fixture
def load(tmp_path):
    path = write(tmp_path)
    return lambda *overrides: load_recipe(path, overrides).recipe


# ---------------------------------------------------------------------------------------------------------------- hash


def test_recipes_that_differ_in_nothing_have_one_hash(tmp_path, load):
    reordered = write(
        tmp_path,
        "seed: 1234\nvalidation: {}\nschedule: {name: cosine, warmup_steps: 0.0}\n"
        + BASE.replace("lr: 1e-3", "lr: 0.001\n  betas: [.9, 0.950]"),
        "other.yaml",
    )
    assert recipe_hash(load_recipe(reordered).recipe) == recipe_hash(load())


def test_a_preset_hashes_as_its_sizes(load):
    sizes = (
        "hidden_size=3584",
        "intermediate_size=18944",
        "num_hidden_layers=28",
        "num_attention_heads=28",
        "num_key_value_heads=4",
        "vocab_size=152064",
    )
    spelt = load(*(f"model.language_model.{size}" for size in sizes))
    assert recipe_hash(spelt) == recipe_hash(load("model.language_model=qwen2_7b_instruct"))


@pytest.mark.parametrize(
    "override",
    [
        "micro_batch_size=4",
        "output_dir=x",
        "zero.stage=1",
        "log.every_steps=7",
        "data.mixture.text.path=y",
        "checkpoint.keep_last=9",
        "init_from.vision=x",
        "validation={max_samples: 3}",
    ],
)
def test_free_keys_are_not_in_the_hash(load, override):
    assert recipe_hash(load(override)) == recipe_hash(load())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "optimizer.lr=2e-3",
        "max_steps=101",
        "data.mixture.text.weight=2",
        "precision=fp32",
        "data.mixture.new.path=x",
        "validation.held_out_share=0.1",
        "data.tiling.tags=none",
        "model.language_model.rope_theta=1",
    ],
)
def test_every_other_key_is_in_the_hash(load, override):
    assert recipe_hash(load(override)) != recipe_hash(load())


def test_the_hash_survives_json_and_python_versions(load):
    recipe = load()
    assert Recipe.model_validate(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    # a golden value: it changes with every new key that is not free
    assert recipe_hash(recipe) == "4cff5860cdece8f3"


# -------------------------------------------------------------------------------------------------------------- resume


def test_only_free_differences_pass(load):
    found = check_resume(recipe_to_dict(load()), load("micro_batch_size=2", "log.every_steps=5"))
    assert {(item.key, item.old, item.new, item.resume) for item in found} == {
        ("micro_batch_size", 1, 2, "free"),
        ("log.every_steps", 1, 5, "free"),
    }


def test_ask_needs_accept_and_sections_count(load):
    saved = recipe_to_dict(load())
    changed = load("max_steps=200", "data.mixture.text.weight=2")
    with pytest.raises(RecipeError) as caught:
        check_resume(saved, changed, ["max_steps"])
    assert str(caught.value) == (
        "runs/small: holds a run of another recipe\n"
        "  data.mixture.text.weight: 1.0 -> 2.0 (ask)\n"
        "ask keys may change when you mean it: --accept data.mixture.text.weight"
    )
    assert len(check_resume(saved, changed, ["max_steps", "data.mixture"])) == 2


def test_fixed_is_refused_with_the_whole_diff(load):
    with pytest.raises(RecipeError) as caught:
        check_resume(recipe_to_dict(load()), load("seed=1", "max_steps=5", "output_dir=here"), ["max_steps"])
    assert str(caught.value) == (
        "here: holds a run of another recipe\n"
        "  seed: 1234 -> 1 (fixed)\n"
        "fixed keys decide what is learned: set them back, or give this recipe an output_dir of its own"
    )


def test_a_source_more_or_less_is_asked_for_once(load):
    more = load("data.mixture.new={path: x, weight: 2}")
    (difference,) = compare(recipe_to_dict(load()), more)
    assert (difference.key, difference.old, difference.new, difference.resume) == (
        "data.mixture.new",
        None,
        "present",
        "ask",
    )
    (difference,) = compare(recipe_to_dict(more), load())
    assert (difference.old, difference.new) == ("present", None)


def test_validation_may_be_added_but_not_its_held_out_share(load):
    saved = recipe_to_dict(load())
    assert {
        item.resume for item in check_resume(saved, load("validation={every_steps: 5, sources: {v: {path: x}}}"))
    } == {"free"}
    with pytest.raises(RecipeError, match=r"validation.held_out_share: 0.0 -> 0.1 \(fixed\)"):
        check_resume(saved, load("validation.held_out_share=0.1"))
    with pytest.raises(RecipeError, match=r"--accept validation\.early_stop"):
        check_resume(saved, load("validation.early_stop.patience=3"))


def test_a_key_the_saved_recipe_does_not_know_counts_as_its_default(load):
    saved = recipe_to_dict(load())
    del saved["seed"], saved["optimizer"]["eps"], saved["schedule"]
    assert compare(saved, load()) == []
    assert [item.key for item in compare(saved, load("optimizer.eps=1e-6"))] == ["optimizer.eps"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_step", "--accept max_step: is not a key of a recipe; did you mean max_steps?"),
        ("seed", "--accept seed: this key is fixed for the life of a run; use an output_dir of its own"),
    ],
)
def test_accept_of_what_cannot_be_accepted(load, name, message):
    with pytest.raises(RecipeError) as caught:
        check_resume(recipe_to_dict(load()), load(), [name])
    assert str(caught.value) == message


def test_every_key_says_what_a_resume_may_do():
    assert {key.resume for key in all_keys().values()} == {"free", "ask", "fixed"}
    assert all(key.doc.endswith((".", "?")) for key in all_keys().values())


# --------------------------------------------------------------------------------------------------------------- batch


def test_batch_arithmetic_by_hand(load):
    # 32 samples of at most 128 tokens, 4 of them in a pack of 512: 8 packs; 3 ranks x 2: 6 slots, 2 micro-steps, 4 null
    batch = resolve(load("micro_batch_size=2"), 3).batch
    assert (batch.max_packs, batch.slots_per_micro_step, batch.max_micro_steps) == (8, 6, 2)
    assert batch.max_null_share == pytest.approx(4 / 12)
    (warning,) = resolve(load("micro_batch_size=2"), 3).warnings
    assert "33% of the slots" in warning and "24 or 48 samples would fill them" in warning
    assert resolve(load(), 8).warnings == ()


def test_fewer_samples_than_ranks_is_refused_with_what_would_do(load):
    with pytest.raises(RecipeError) as caught:
        resolve(load(), 40)
    assert str(caught.value) == (
        "global_batch.samples: 32 cannot fill 40 ranks: a rank needs a sample in each step, and 8 would never "
        "have one; use "
        "global_batch.samples=40 or more, or start on 32 ranks or fewer"
    )
    assert resolve(load(), 32).batch.max_micro_steps == 1


def test_a_step_of_packs_is_exact_and_its_null_share_is_known(load):
    packs = ("global_batch.samples=null", "global_batch.packs=9")
    batch = resolve(load(*packs, "micro_batch_size=2"), 2).batch  # 9 packs, 4 slots a micro-step: 3 of them, 3 null
    assert (batch.samples, batch.packs, batch.max_packs, batch.max_micro_steps) == (None, 9, 9, 3)
    assert batch.max_null_share == pytest.approx(3 / 12) and batch.max_tokens == 9 * 512
    (warning,) = resolve(load(*packs, "micro_batch_size=2"), 2).warnings
    assert "global_batch.packs 9: 25% of the slots" in warning and "8 or 12 packs would fill them" in warning
    assert resolve(load(*packs), 3).warnings == ()
    with pytest.raises(RecipeError) as caught:
        resolve(load(*packs), 10)
    assert str(caught.value) == (
        "global_batch.packs: 9 cannot fill 10 ranks: a rank needs a pack in each step, and 1 would never have one; use "
        "global_batch.packs=10 or more, or start on 9 ranks or fewer"
    )


def test_what_is_known_of_the_steps_before_indexing(load):
    assert resolve(load(), 1).num_steps == 100
    samples = load("max_steps=null", "max_samples=3201", "schedule.warmup_steps=0.1")
    assert (resolve(samples, 1).num_steps, resolve(samples, 1).warmup_steps) == (101, 10)  # 32 samples a step
    packs = "global_batch={samples: null, packs: 4}"
    for overrides in (("num_epochs=3",), ("max_tokens=9",), ("max_samples=9", packs)):
        recipe = load("max_steps=null", "schedule.warmup_steps=0.1", *overrides)
        found = resolve(recipe, 1)
        assert (found.num_steps, found.warmup_steps, found.decay_steps) == (None, None, None)
        known = resolve(recipe, 1, 200)
        assert (known.num_steps, known.warmup_steps, known.decay_steps) == (200, 20, 200)
    assert resolve(load(packs), 1).num_steps == 100


def test_a_run_that_ends_in_the_warmup_is_warned_of(load):
    assert resolve(load("schedule.warmup_steps=200"), 1).warnings == (
        "schedule.warmup_steps 200: the run ends in the warm-up, at step 100",
    )


def test_module_learning_rates_name_trained_modules_only(load):
    assert resolve(load("optimizer.module_lr.projector=5e-3"), 1).module_lr == {
        "projector": 5e-3,
        "language_model": 1e-3,
    }
    assert resolve(load("train.language_model=frozen"), 1).module_lr == {"projector": 1e-3}


# ------------------------------------------------------------------------------------------------------------ schedule


def test_learning_rate_factors_by_hand():
    found = [lr_factor(step, 2, 6, "cosine", 0.1) for step in range(8)]
    # after the warm-up (1 + cos(pi k / 4)) / 2 for k = 1..4, scaled to [0.1, 1]
    shape = [(2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]
    expected = [0.5, 1.0, *(0.1 + 0.9 * s for s in shape), 0.1, 0.1]
    assert found == pytest.approx(expected, abs=1e-15)  # a rounding of double precision; worst seen 1.1e-16
    assert [lr_factor(step, 2, 6, "constant", 0.1) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(0, 0, 1, "cosine", 0.25) == 0.25  # a run of one step ends at the minimum
    assert lr_factor(0, 0, 100, "constant", 0.0) == 1.0


@given(st.integers(0, 50), st.integers(1, 100), st.floats(0, 1))
def test_factors_rise_then_fall_and_stay(warmup, more, low):
    factors = [lr_factor(step, warmup, warmup + more, "cosine", low) for step in range(warmup + more + 5)]
    assert all(a < b for a, b in zip(factors[:warmup], factors[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(factors[max(warmup - 1, 0) :], factors[max(warmup, 1) :], strict=False))
    assert factors[warmup + more - 1 :] == [low] * 6 and max(factors) <= 1.0


def test_a_share_of_warmup_becomes_steps(load):
    assert warmup_steps(load("schedule.warmup_steps=0.03"), 40000) == 1200
    assert warmup_steps(load("schedule.warmup_steps=0.03"), None) is None
    assert warmup_steps(load("schedule.warmup_steps=7"), None) == 7
    assert resolve(load("schedule.warmup_steps=7"), 1).warmup_steps == 7
    assert resolve(load("schedule.decay_steps=60"), 1).decay_steps == 60
    assert resolve(load(), 1).decay_steps == 100


# ----------------------------------------------------------------------------------------------- DeepSpeed and memory


def test_the_deepspeed_dict_says_what_must_not_be_left_to_defaults(load):
    config = deepspeed_config(load("optimizer.max_grad_norm=0"))
    assert config["gradient_clipping"] == 0.0
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
    assert config["gradient_accumulation_steps"] == 1 and config["bf16"] == {"enabled": True}
    assert "optimizer" not in config and "scheduler" not in config and "train_batch_size" not in config
    assert "bf16" not in deepspeed_config(load("precision=fp32"))
    assert deepspeed_config(load("zero.stage=1"))["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 500_000_000,
    }


def test_deepspeed_accepts_and_understands_the_dict(load):
    pytest.importorskip("deepspeed")
    configs = [
        deepspeed_config(load(f"zero.stage={stage}", f"precision={p}"))
        for stage in range(4)
        for p in ("bf16", "fp32")
        if (stage, p) != (0, "bf16")  # refused: DeepSpeed has no fp32 masters there
    ]
    # a process of its own: importing deepspeed replaces F.linear for everything that runs after it
    code = """
import json, sys, torch
from deepspeed.runtime.config import DeepSpeedConfig
for given in json.loads(sys.argv[1]):
    c = DeepSpeedConfig(dict(given))
    z, zero = c.zero_config, given["zero_optimization"]
    assert (c.train_batch_size, c.gradient_accumulation_steps, c.gradient_clipping) == (1, 1, 1.0)
    assert c.communication_data_type == torch.float32 and c.grad_accum_dtype == "fp32"
    assert c.bfloat16_config.enabled == ("bf16" in given) and c.optimizer_name is None and not c.wall_clock_breakdown
    assert int(z.stage) == zero["stage"] and z.reduce_bucket_size == 500_000_000 and c.steps_per_print is None
    if z.stage == 3:
        assert (z.prefetch_bucket_size, z.param_persistence_threshold) == (50_000_000, 100_000)
        assert (z.max_live_parameters, z.max_reuse_distance) == (10**9, 10**9)
        assert z.memory_efficient_linear and not z.gather_16bit_weights_on_model_save
print("understood", len(json.loads(sys.argv[1])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(configs)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "understood 7" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero.tower=replicated", "train.vision=full"], r"zero\.tower: 'replicated' needs a frozen tower, but .*full"),
        (["zero.tower=partitioned", "zero.stage=2"], r"zero\.tower: 'partitioned' shares weights out, which .* 2 does"),
        (
            ["zero.tower=partitioned", "vision_feature_cache={path: c, max_gib: 1}"],
            r"vision_feature_cache: .*needs a tower that a rank can run alone",
        ),
        (
            ["zero.stage=0", "precision=fp32", "zero.offload_optimizer=cpu"],
            r"zero\.offload_optimizer: .*use zero\.stage=1",
        ),
        (["zero.stage=2", "zero.offload_param=cpu"], r"zero\.offload_param: 'cpu' needs weights that are shared out"),
        (["zero.offload_param=cpu"], r"zero\.offload_param: 'cpu' needs the optimizer beside it"),
        (["zero.offload_optimizer=nvme"], r"zero\.offload_optimizer: 'nvme' is not supported: DeepSpeed keeps"),
        (
            ["optimizer.implementation=deepspeed_cpu"],
            r"implementation: 'deepspeed_cpu' steps masters in host memory",
        ),
        (
            ["optimizer.implementation=adamw_8bit", "zero.offload_optimizer=cpu"],
            r"implementation: 'adamw_8bit' steps masters on the GPU, but zero\.offload_optimizer is cpu",
        ),
        (
            ["optimizer.implementation=adamw_8bit", "zero.stage=2"],
            r"implementation: 'adamw_8bit' was made to fit zero\.stage 3 alone",
        ),
        (
            ["attention=flash_attn_2", "precision=fp32"],
            r"attention: 'flash_attn_2' is flash attention, which takes b",
        ),
        (
            ["zero.stage=1", "zero.experimental.hpz_partition_size=2"],
            r"hpz_partition_size: 2 needs weights",
        ),
    ],
)
def test_zero_options_that_do_not_fit_are_refused_by_name(load, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load(*overrides)


def test_hpz_must_divide_the_ranks(load):
    recipe = load("zero.experimental.hpz_partition_size=8")
    with pytest.raises(RecipeError, match=r"hpz_partition_size: 8 does not divide 12 ranks"):
        resolve(recipe, 12)
    assert any("hpZ has run on a CPU only" in warning for warning in resolve(recipe, 16).warnings)
    assert resolve(recipe, 4)  # one group of 4


def test_options_reach_deepspeed(load):
    made = deepspeed_config(load("zero.offload_optimizer=cpu", "zero.offload_param=cpu"))
    zero = made["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
    assert made["zero_force_ds_cpu_optimizer"] is False and "zero_hpz_partition_size" not in zero
    hpz = deepspeed_config(load("zero.experimental.hpz_partition_size=4"))
    assert hpz["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_another_deepspeed_is_refused_with_the_options_by_name_and_line(tmp_path):
    loaded = load_recipe(write(tmp_path, BASE + "zero: {offload_optimizer: cpu}\n"), ["zero.stage=2"])
    for good in (None, "0.19.8", "0.19.12+cu128"):
        refuse_unsupported(loaded, good)
    for bad in ("0.18.3", "0.20.0", "1.0"):
        with pytest.raises(RecipeError) as error:
            refuse_unsupported(loaded, bad)
        lines = str(error.value).splitlines()
        assert lines[0].startswith(f"override zero.stage=2 zero.stage: deepspeed {bad} is installed")
        assert re.match(rf".*r\.yaml:\d+ zero\.offload_optimizer: deepspeed {re.escape(bad)} is installed", lines[1])
        assert "install deepspeed>=0.19.8,<0.20" in lines[1] and len(lines) == 2


def test_the_supported_range_is_that_of_pyproject():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"deepspeed>={SUPPORTED_FROM},<{SUPPORTED_BEFORE}"' in text


def test_stage_0_in_bf16_is_refused_with_what_would_do(load):
    with pytest.raises(RecipeError, match=r"zero\.stage: 0 has no fp32 masters .* use zero\.stage=1 or precision=fp32"):
        load("zero.stage=0")


def test_predicted_states_by_hand(load):
    recipe = load("micro_batch_size=2")
    parameters = resolve(recipe, 1).parameters["total"]
    inside = parameters["projector"] + parameters["language_model"]
    memory = predict(recipe, 4)
    share = -(-inside // 4)
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (2 * share, 4 * share, 12 * share)
    assert memory["tower_replicated"] == 2 * parameters["vision"]
    assert memory["total"] == sum(memory[kind] for kind in KINDS) and set(memory) == {*KINDS, "total", "host"}
    for stage, shared, precision, bytes_each in (
        (0, (), "fp32", {"weights": 4, "gradients": 4, "optimizer": 8}),  # the weights are their own masters
        (1, ("optimizer",), "bf16", {"weights": 2, "gradients": 6, "optimizer": 12}),
        (2, ("optimizer", "gradients"), "bf16", {"weights": 2, "gradients": 4, "optimizer": 12}),
        (3, ("optimizer", "gradients", "weights"), "bf16", {"weights": 2, "gradients": 4, "optimizer": 12}),
    ):
        found = predict(load("micro_batch_size=2", f"zero.stage={stage}", f"precision={precision}"), 4)
        for kind, size in bytes_each.items():
            assert found[kind] == size * (share if kind in shared else inside), (stage, kind)
    # a tower in training is inside the engine, and a frozen one where the recipe says so
    assert predict(load("train.vision=full"), 4)["tower_replicated"] == 0
    partitioned = predict(load("zero.tower=partitioned", "micro_batch_size=2"), 4)
    assert partitioned["tower_replicated"] == 0
    assert partitioned["weights"] == 2 * -(-(inside + parameters["vision"]) // 4)
    assert (partitioned["gradients"], partitioned["optimizer"]) == (memory["gradients"], memory["optimizer"])
    # fp32 masters, and two moments of 8 bits with an fp32 scale for each 256
    small = predict(load("micro_batch_size=2", "optimizer.implementation=adamw_8bit"), 4)
    assert small["optimizer"] == -(-share * (4 + 2 + 8 / 256) // 1)
    # what is offloaded is in the host's memory
    moved = predict(load("micro_batch_size=2", "zero.offload_optimizer=cpu"), 4)
    assert (moved["optimizer"], moved["gradients"], moved["host"]) == (0, 0, 16 * share)
    moved = predict(load("micro_batch_size=2", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"), 4)
    assert (moved["weights"], moved["host"]) == (0, 18 * share)


def test_predicted_activations_of_nvlm_x_by_hand(load):
    x = ("model.architecture=nvlm_x", "data.pack_tiles=20")
    # 512 tokens and 20 tiles of 4 image tokens; widths 48 and 16 (keys and values), tower 64, feed-forward 80; bf16
    decoder = 512 * (6 * 48 + 2 * 16 + 4 * 80) * 2
    crossing = (512 * 6 * 48 + 80 * (48 + 6 * 16)) * 2
    projector = 80 * (8 * 64 + 48) * 2
    memory = predict(load(*x), 1)
    ends = 2 * 512 * 48 * 2  # the last norm's input and output
    assert memory["activations"] == 3 * (decoder + crossing) + projector + ends and memory["recomputed_layer"] == 0
    memory = predict(load(*x, "activation_checkpointing=full"), 1)
    assert memory["activations"] == 3 * 512 * 48 * 2 + projector + ends
    assert memory["recomputed_layer"] == decoder + crossing
    wide = predict(load(*x, "model.cross_attention.feed_forward=true"), 1)
    assert wide["activations"] == 3 * (decoder + crossing + 512 * (2 * 48 + 4 * 80) * 2) + projector + ends


def test_predicted_memory_of_the_loss(load):
    """Never all logits: 16,384 tokens of 152,064 would be 30 GB in plain PyTorch. Head of 152064 x 3584."""
    pieces = ("model.language_model=qwen2_7b_instruct", "micro_batch_size=32")  # 512 tokens each

    def loss(*more):
        return predict(load(*pieces, *more), 1)["loss"]

    head, rows = 152064 * 3584, 16384 * 3584 * 2
    piece = 152064 * (2**27 // 152064) * 12
    assert loss() == loss("kernels=torch") == piece + 2 * head * 2
    assert loss("precision=fp32") == piece + 2 * head * 4
    assert loss("train.language_model=frozen") == piece
    few = predict(load("model.language_model=qwen2_7b_instruct"), 1)["loss"]
    assert few == 152064 * 512 * 12 + head * 2  # fits into one piece
    assert loss("kernels=triton") == 152064 * (2**29 // 152064) * 2 + rows + 8 * head
    assert loss("kernels=triton", "train.language_model=frozen") == 152064 * (2**29 // 152064) * 2 + rows
    assert loss("kernels=liger") == 512 * 152064 * 6 + rows + 2 * head  # 16384 / 43 rows, to a power of 2


def test_memory_of_the_full_size_is_that_of_the_table():
    # GiB per GPU from arithmetic made independently of this code (72B, fp32 gradients): 16, 64, 128 ranks
    recipe = load_recipe("recipes/nvlm_d_72b/2_sft.yaml").recipe
    for ranks, weights, optimizer in ((16, 8.5, 51.2), (64, 2.1, 12.8), (128, 1.1, 6.4)):
        memory = predict(recipe, ranks)
        assert memory["weights"] / 2**30 == pytest.approx(weights, abs=0.05)
        assert memory["optimizer"] / 2**30 == pytest.approx(optimizer, abs=0.05)
        assert memory["tower_replicated"] / 2**30 == pytest.approx(10.3, abs=0.05)


def test_a_validation_without_anything_to_validate_on_is_refused(load):
    with pytest.raises(RecipeError, match="names nothing to validate on"):
        resolve(load("validation={every_steps: 3}"), 1)


def test_a_licence_that_an_export_would_refuse_is_told_before_training(load):
    (warning,) = resolve(load("license=Apach-2.0"), 8).warnings
    assert warning.startswith("license 'Apach-2.0' is neither an SPDX identifier nor a licence known by name")
    first = next(iter(load().data.mixture))
    (warning,) = resolve(load(f"data.mixture.{first}.license=CC-BY4"), 8).warnings
    assert warning.startswith(f"data.mixture.{first}.license 'CC-BY4' is neither")
    assert resolve(load("license=tongyi-qianwen", f"data.mixture.{first}.license=unknown"), 8).warnings == ()
