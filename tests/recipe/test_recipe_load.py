"""extends, overrides, origins, paths, and every kind of bad input with its exact message."""

from __future__ import annotations

import os

import pytest

from nvlm_train.errors import RecipeError
from nvlm_train.recipe.load import load_recipe
from recipe_files import BASE, write


def problems(path: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error without the head that counts them, file names shortened to r.yaml."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).replace(os.path.dirname(path) + os.sep, "").splitlines()
    if len(lines) > 1:
        assert lines.pop(0) == f"{os.path.basename(path)}: {len(lines)} problems"
    return lines


def test_the_base_recipe_is_good(tmp_path):
    recipe = load_recipe(write(tmp_path)).recipe
    assert recipe.optimizer.lr == 1e-3 and recipe.data.mixture["digits"].weight == 3.0
    assert recipe.model.vision.layer_norm_eps == 1e-6


# line of BASE changed (from 1), new text, the whole message
BAD_LINES = [
    (21, "max_step: 100", ["r.yaml:21 max_step: 100 is not a key of a recipe; did you mean max_steps?"]),
    (21, "max_steps: '100'", ["r.yaml:21 max_steps: '100' is not a whole number; write 100 without quotes"]),
    (21, "max_steps: 1_000", ["r.yaml:21 max_steps: '1_000' is not a whole number; write 1000"]),
    (21, "max_steps: 1e3", ["r.yaml:21 max_steps: 1000.0 is not a whole number; write 1000"]),
    (21, "max_steps: true", ["r.yaml:21 max_steps: true is not a whole number; give a whole number > 0 or null"]),
    (21, "max_steps: 0", ["r.yaml:21 max_steps: 0 is out of range; it must be more than 0"]),
    (
        21,
        "max_steps:",
        [
            "r.yaml:21 max_steps: null is not given, but a run needs a length; give one of max_steps, max_samples, "
            "max_tokens, num_epochs"
        ],
    ),
    (
        21,
        "",
        [
            "r.yaml:1 max_steps: is not given, but a run needs a length; give one of max_steps, max_samples, "
            "max_tokens, num_epochs"
        ],
    ),
    (
        21,
        "max_steps: 3\nnum_epochs: 1",
        [
            "r.yaml:22 num_epochs: 1 stands beside max_steps, but a run has one length; remove one of the two "
            "(`max_steps: null` takes back what a parent recipe says)"
        ],
    ),
    (21, "num_epochs: 0", ["r.yaml:21 num_epochs: 0 is out of range; it must be more than 0"]),
    (
        20,
        "global_batch: {samples: 8, packs: 8}",
        [
            "r.yaml:20 global_batch.packs: 8 stands beside samples 8, but a step has one unit; remove one of the two "
            "(`samples: null` takes back what a parent recipe says)"
        ],
    ),
    (
        20,
        "global_batch: {packs: x}",
        ["r.yaml:20 global_batch.packs: 'x' is not a whole number; give a whole number > 0 or null"],
    ),
    (
        19,
        "  pack_tokens: 512\n  pack_tiles: 6",
        [
            "r.yaml:20 data.pack_tiles: 6 is less than the 7 tiles that one image may have (tiling.max_tiles 6, and a "
            "thumbnail); use 7 or more, or lower tiling.max_tiles"
        ],
    ),
    (23, "  lr: fast", ["r.yaml:23 optimizer.lr: 'fast' is not a number; give a number > 0"]),
    (23, "  lr: .inf", ["r.yaml:23 optimizer.lr: inf is not a finite number; give a number > 0"]),
    (23, "  lr: .nan", ["r.yaml:23 optimizer.lr: nan is not a finite number; give a number > 0"]),
    (23, "  lr: 1\n  betas: [0.9]", ["r.yaml:24 optimizer.betas: [0.9] has too few values (1); it needs at least 2"]),
    (23, "  lr: 1\n  betas: [0.9, a]", ["r.yaml:24 optimizer.betas.1: 'a' is not a number; give a number"]),
    (23, "  lrr: 1", ["r.yaml:23 optimizer.lrr: 1 is not a key of a recipe; did you mean optimizer.lr?"]),
    (20, "global_batch: 32", ["r.yaml:20 global_batch: 32 is not a section; give a section with samples, packs"]),
    (
        20,
        "global_batch: {}",
        [
            "r.yaml:20 global_batch: has no unit; give samples: N (exact learning-rate arithmetic) or packs: N "
            "(throughput)"
        ],
    ),
    (20, "", ["r.yaml:1 global_batch: is missing; give a section: What one optimizer step is made of."]),
    (
        14,
        "data: {}\nx:",
        [
            "r.yaml:14 data.mixture: is missing; give a mapping of names to section: The sources by name.",
            "r.yaml:14 data.max_tokens_per_sample: is missing; give a whole number > 0: A longer sample is "
            "handled by `overlong`.",
            "r.yaml:14 data.pack_tokens: is missing; give a whole number > 0: Tokens in one pack: what one row "
            "of a micro batch "
            "holds.",
        ],
    ),
    (
        16,
        "    digits: 3",
        [
            "r.yaml:16 data.mixture.digits: 3 is not a section; give one with kind, path, image_root, columns, "
            "roles, system, train_on, prompt, min_ratings, split, max_samples, max_tiles, max_tiles_shared, shuffle, "
            "shards_per_group, weight, max_epochs, license, source"
        ],
    ),
    (
        16,
        "    di.gits: {path: x}",
        ["r.yaml:16 data.mixture.di.gits: is not a good name; use letters, digits, dash and underscore"],
    ),
    (16, "    digits: {path: 3}", ["r.yaml:16 data.mixture.digits.path: 3 is not a string; write '3' in quotes"]),
    (
        19,
        "  pack_tokens: 100",
        [
            "r.yaml:18 data.max_tokens_per_sample: 128 is more than pack_tokens 100: the longest sample "
            "must fit into a pack; use at most 100, or raise pack_tokens"
        ],
    ),
    (
        13,
        "tokenizer: {path: tok, template: qwen2}",
        ["r.yaml:13 tokenizer.template: 'qwen2' is not one of nvlm_qwen2, hf_nvlm, nvlm_yi; did you mean nvlm_qwen2?"],
    ),
    (
        1,
        "run_name: a b",
        [
            "r.yaml:1 run_name: 'a b' holds characters that a file name should not; use letters, digits, dot, "
            "dash and underscore"
        ],
    ),
]


@pytest.mark.parametrize(
    ("line", "text", "expected"), BAD_LINES, ids=[text.strip() or "removed" for _, text, _ in BAD_LINES]
)
def test_a_bad_line_is_named(tmp_path, line, text, expected):
    lines = BASE.splitlines()
    lines[line - 1] = text
    found = problems(write(tmp_path, "\n".join(lines)))
    if "x:" in text:  # what stood below the replaced section, now below an unknown key
        found = [problem for problem in found if " x: " not in problem]
    assert found == expected


# added to the end of BASE (line 24 on), the whole message
ADDED = [
    (
        "per_device_train_batch_size: 4",
        [
            "r.yaml:24 per_device_train_batch_size: 4 is a name of HF Trainer, LLaMA-Factory, ms-swift, "
            "InternVL; here it is "
            "micro_batch_size (counts packs, not samples; samples per step are global_batch.samples)"
        ],
    ),
    (
        "resume_from_checkpoint: x",
        [
            "r.yaml:24 resume_from_checkpoint: 'x' is a name of HF Trainer, LLaMA-Factory, ms-swift, Axolotl, "
            "InternVL; starting "
            "again resumes by itself; `train --resume never` refuses a run directory that holds a run"
        ],
    ),
    ("lr: 1", ["r.yaml:24 lr: 1 is not a key of a recipe; did you mean optimizer.lr?"]),
    ("betas: [1, 2]", ["r.yaml:24 betas: [1, 2] is not a key of a recipe; did you mean optimizer.betas?"]),
    (
        "optimizer.lr: 1",
        [
            "r.yaml:24 optimizer.lr: 1 is not a key here: in a file keys are nested, only overrides have dots; "
            "write `optimizer: {lr: ...}`"
        ],
    ),
    ("data: {}", ["r.yaml:24 data: is given a second time (first on line 14); keep one of them"]),
    (
        "train: {vision: frozen, projector: frozen, language_model: frozen}",
        [
            "r.yaml:24 train: freezes every module, so nothing would be trained; set one of vision, projector, "
            "language_model to full or lora"
        ],
    ),
    (
        "schedule: {warmup_steps: 1.5}",
        ["r.yaml:24 schedule.warmup_steps: 1.5 is neither a whole number of steps nor a share below 1; use 2"],
    ),
    (
        "schedule: {warmup_steps: x}",
        ["r.yaml:24 schedule.warmup_steps: 'x' is not a whole number; give a whole number or number >= 0"],
    ),
    (
        "schedule: {warmup_steps: 101, decay_steps: 100, min_lr: 1}",
        [
            "r.yaml:24 schedule.min_lr: 1 is above optimizer.lr 0.001; use a value from 0 to 0.001",
            "r.yaml:24 schedule.warmup_steps: 101 is more than schedule.decay_steps 100; use at most 100",
        ],
    ),
    (
        "validation: {sources: {text: {path: x}}}",
        ["r.yaml:24 validation.sources.text: is the name of a source of data.mixture too; give it a name of its own"],
    ),
    (
        "validation: {best: txt, held_out_share: 0.1}",
        ["r.yaml:24 validation.best: 'txt' is not the name of a validated source; use one of digits, text"],
    ),
    ("log: {to: wandb}", ["r.yaml:24 log.to: 'wandb' is not a list; write [wandb]"]),
    ("log: {to: [wandbb]}", ["r.yaml:24 log.to.0: 'wandbb' is not one of wandb, tensorboard; did you mean wandb?"]),
    ("zero: {stage: 4}", ["r.yaml:24 zero.stage: 4 is not one of 0, 1, 2, 3"]),
    (
        "zero: 3",
        [
            "r.yaml:24 zero: 3 is not a section; give a section with stage, reduce_bucket_size, prefetch_bucket_size, "
            "param_persistence_threshold, max_live_parameters, max_reuse_distance, communication_data_type, tower, "
            "offload_optimizer, offload_param, experimental"
        ],
    ),
    ("extends: no.yaml", ["r.yaml:24 extends: 'no.yaml' is not there (no.yaml); the path is relative to this file"]),
    ("extends: [a, b]", ["r.yaml:24 extends: ['a', 'b'] is not the path of one file; write `extends: base.yaml`"]),
    (
        "init_from: {run: '${NVLM_NOT_SET}/x'}",
        [
            "r.yaml:24 init_from.run.path: '${NVLM_NOT_SET}/x' names the environment variable NVLM_NOT_SET, "
            "which is not set; "
            "export NVLM_NOT_SET=..., or write the path itself"
        ],
    ),
]


@pytest.mark.parametrize(("text", "expected"), ADDED, ids=[text for text, _ in ADDED])
def test_an_added_line_is_named(tmp_path, text, expected):
    assert problems(write(tmp_path, BASE + text + "\n")) == expected


MODEL = [
    (
        "model.vision.num_attention_heads=5",
        "model.vision.hidden_size: 64 is not a multiple of num_attention_heads 5; use 60 or 65",
    ),
    (
        "model.vision.image_size=36",
        "model.vision.image_size: 36 is not a multiple of 2 x patch_size 8 (the pixel shuffle joins "
        "patches two by two); use 32 or 48",
    ),
    (
        "model.language_model.num_key_value_heads=4",
        "model.language_model.num_key_value_heads: 4 does not divide num_attention_heads 6; use one of 1, 2, 3, 6",
    ),
    (
        "model.language_model.num_attention_heads=16",
        "model.language_model.hidden_size: 48 gives a head size of 3, which is "
        "odd, but rotary positions turn pairs of channels; use 32 or 64",
    ),
    (
        "model.language_model.max_position_embeddings=64",
        "data.max_tokens_per_sample: 128 is more than model.language_model.max_position_embeddings 64; use at most 64",
    ),
    (
        "optimizer.module_lr.vision=1",
        "optimizer.module_lr.vision: 1 has no effect, because train.vision is frozen; remove it, "
        "or set train.vision: full or lora",
    ),
    (
        "model.vision=internvit_6b",
        "model.vision.preset: 'internvit_6b' is not one of internvit_6b_448px_v1_5, internvit_300m_448px; did you mean "
        "internvit_6b_448px_v1_5?",
    ),
]


@pytest.mark.parametrize(("override", "message"), MODEL)
def test_sizes_that_do_not_fit(tmp_path, override, message):
    (found,) = problems(write(tmp_path), (override,))
    assert found.endswith(message)
    assert found.startswith(("r.yaml:", f"override {override} "))


X, H = "model.architecture=nvlm_x", "model.architecture=nvlm_h"
TILES = "data.pack_tiles=20"
ARCHITECTURES = [
    (
        (X,),
        "data.pack_tiles: is not given, but tiles are not in the token count of nvlm_x, so nothing else bounds them",
    ),
    (
        ("model.cross_attention.feed_forward=true",),
        "model.cross_attention.feed_forward: true has no effect in nvlm_d, which has no cross-attention; remove it",
    ),
    (("train.cross_attention=frozen",), "train.cross_attention: 'frozen' has no effect in nvlm_d, which has no"),
    (
        ("optimizer.module_lr.cross_attention=1",),
        "optimizer.module_lr.cross_attention: 1 has no effect in nvlm_d, which has no cross-attention; remove it",
    ),
    (
        (X, TILES, "model.cross_attention.every_layers=4"),
        "model.cross_attention.every_layers: 4 is more than the 3 layers of the decoder, so there would be no "
        "cross-attention; use at most 3",
    ),
    (
        (X, TILES, "model.cross_attention.num_attention_heads=5"),
        "model.cross_attention.num_attention_heads: 5 does not divide the decoder's hidden_size 48; use one of 1, 2, 3",
    ),
    (
        (X, TILES, "model.cross_attention.num_attention_heads=3"),
        "model.cross_attention.num_attention_heads: 3 is not a multiple of the decoder's 2 key/value heads; give",
    ),
    (
        (X, TILES, "model.cross_attention.num_key_value_heads=4"),
        "model.cross_attention.num_key_value_heads: 4 does not divide the 6 query heads; use one of 1, 2, 3, 6",
    ),
    (
        (X, TILES, "model.cross_attention.gate=none", "model.cross_attention.gate_init=0.5"),
        "model.cross_attention.gate_init: 0.5 has no effect, because gate is none; remove it",
    ),
    (
        (H, TILES, "model.cross_attention.text_reads=tags_only"),
        "model.cross_attention.text_reads: 'tags_only' leaves nothing that reads in nvlm_h",
    ),
    (
        (X, TILES, "model.cross_attention.thumbnail_reads_tiles=false"),
        "model.cross_attention.thumbnail_reads_tiles: false has no effect in nvlm_x",
    ),
    (
        (H, TILES, "data.tiling.thumbnail=false"),
        "data.tiling.thumbnail: false must be true in nvlm_h, whose sequence holds thumbnails; or max_tiles: 1",
    ),
    (
        (X, TILES, "model.cross_attention.text_reads=tags_only", "data.tiling.tags=none"),
        "data.tiling.tags: 'none' is none, but only tags read",
    ),
    (
        (X, TILES, "train.projector=frozen", "train.cross_attention=frozen", "train.language_model=frozen"),
        "train: freezes every module, so nothing would be trained; set one of vision, projector, cross_attention, "
        "language_model to full",
    ),
    (
        (X, TILES, "train.cross_attention=frozen", "optimizer.module_lr.cross_attention=1"),
        "optimizer.module_lr.cross_attention: 1 has no effect, because train.cross_attention is frozen",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), ARCHITECTURES, ids=[message[:50] for _, message in ARCHITECTURES])
def test_an_architecture_and_what_does_not_fit_it(tmp_path, overrides, message):
    (found,) = problems(write(tmp_path), overrides)
    assert message in found


@pytest.mark.parametrize("architecture", [X, H])
def test_what_an_architecture_can_be_told(tmp_path, architecture):
    more = [
        "model.cross_attention={every_layers: 2, place: after, num_attention_heads: 3, num_key_value_heads: 1, "
        "gate_init: 0.5, feed_forward: true, memory_norm: none, text_reads: last_image, initializer_std: 0.01}",
        "optimizer.module_lr.cross_attention=1e-4",
        "data.tiling.tags=none",
    ]
    recipe = load_recipe(write(tmp_path), [architecture, TILES, *more]).recipe
    assert recipe.model.cross_attention_layers == (1,) and recipe.model.cross_attention_heads == (3, 1)


OVERRIDES = [
    ("max_steps", "override max_steps: is not of the form key=value; write for example max_steps=100"),
    ("=3", "override =3: is not of the form key=value; write for example max_steps=100"),
    (
        "optimizer..lr=3",
        "override optimizer..lr=3: the key 'optimizer..lr' has an empty part; write for example optimizer.lr=1e-5",
    ),
    (
        "optimizer.lr=[1",
        "override optimizer.lr=[1: is not YAML: expected ',' or ']', but got '<stream end>' (while parsing a "
        "flow sequence, from line 1)",
    ),
    (
        "optimizer.betas.2=1",
        "override optimizer.betas.2=1: optimizer.betas is a list of 2 values; number them from 0 to 1",
    ),
    ("optimiser.lr=1", "override optimiser.lr=1 optimiser: is not a key of a recipe; did you mean optimizer?"),
    ("extends=x.yaml", "override extends=x.yaml: extends belongs in a file; make a recipe that extends the other"),
    ("max_steps=1e3", "override max_steps=1e3 max_steps: 1000.0 is not a whole number; write 1000"),
    (
        "data.mixture.digits.kind=parquet",
        "override data.mixture.digits.kind=parquet data.mixture.digits.kind: 'parquet' is not one of jsonl, json, "
        "internvl, hf, webdataset, energon, text; did you mean hf?",
    ),
    ("run_name.x=1", "override run_name.x=1 run_name: is not a string; give a string"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_bad_overrides(tmp_path, override, message):
    assert problems(write(tmp_path), (override,)) == [message]


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        BASE.replace("max_steps: 100", "max_steps: ten").replace("  lr: 1e-3", "  lrr: 1e-3")
        + "seed: -1\nschedule: {min_lr: 2}\n"
    )
    found = problems(write(tmp_path, text), ("precision=fp16",))
    assert [line.split(":")[0] + ":" + line.split(":")[1].split()[0] for line in found[1:]] == [
        "r.yaml:21",
        "r.yaml:23",
        "r.yaml:24",
        "r.yaml:25",
    ]
    assert found[0] == "override precision=fp16 precision: 'fp16' is not one of bf16, fp32; did you mean bf16?"
    # found at a second look, with the first mistakes put right
    assert "r.yaml:25 schedule.min_lr: 2 is above optimizer.lr 0.001; use a value from 0 to 0.001" in problems(
        write(tmp_path, text)
    )


def test_overrides_speak_the_same_yaml(tmp_path):
    overrides = (
        "optimizer.lr=2e-5",
        "optimizer.betas.1=0.98",
        "log.to=[wandb]",
        "tokenizer.system=yes",
        "optimizer.lr=3e-5",
        "data.mixture.more={path: a.jsonl, weight: 2}",
        "optimizer.module_lr.projector=1",
        "tokenizer.path=a=b",
    )
    recipe = load_recipe(write(tmp_path), overrides).recipe
    assert recipe.optimizer.lr == 3e-5 and recipe.optimizer.betas == [0.9, 0.98] and recipe.log.to == ["wandb"]
    assert recipe.tokenizer.system == "yes" and recipe.tokenizer.path == "a=b"
    assert list(recipe.data.mixture) == ["digits", "text", "more"]
    assert recipe.optimizer.module_lr.projector == 1.0


def test_extends_is_relative_to_its_file_and_chains(tmp_path):
    write(tmp_path, BASE, "base/base.yaml")
    write(tmp_path, "extends: base/base.yaml\noptimizer: {lr: 1e-4, weight_decay: 0}\n", "middle.yaml")
    child = write(
        tmp_path, "extends: ../middle.yaml\noptimizer: {lr: 1e-5}\ndata: {mixture: {text: null}}\n", "deep/child.yaml"
    )
    loaded = load_recipe(child, ("max_steps=7",))
    assert (loaded.recipe.optimizer.lr, loaded.recipe.optimizer.weight_decay) == (1e-5, 0.0)
    assert list(loaded.recipe.data.mixture) == ["digits"]
    origins = {name: str(origin).replace(str(tmp_path) + os.sep, "") for name, origin in loaded.origins.items()}
    assert origins["optimizer.lr"] == "deep/child.yaml:2"
    assert origins["optimizer.weight_decay"] == "parent middle.yaml:2"
    assert origins["data.pack_tokens"] == "parent base/base.yaml:19"
    assert origins["max_steps"] == "override max_steps=7"
    assert origins["seed"] == "default"


def test_extends_in_a_circle_shows_the_circle(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: c.yaml\n", "b.yaml")
    start = write(tmp_path, "\nextends: a.yaml\n", "c.yaml")
    assert problems(start) == [
        "b.yaml:1 extends: goes in a circle (c.yaml -> a.yaml -> b.yaml -> c.yaml); remove one `extends`"
    ]


def test_a_problem_in_a_parent_names_the_parent(tmp_path):
    write(tmp_path, BASE.replace("max_steps: 100", "max_steps: 0"), "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nseed: 1\n", "r.yaml")
    assert problems(child) == ["base.yaml:21 max_steps: 0 is out of range; it must be more than 0"]


def test_null_removes_what_a_parent_says(tmp_path):
    write(tmp_path, BASE + "schedule: {warmup_steps: 5, name: constant}\n", "base.yaml")
    child = load_recipe(write(tmp_path, "extends: base.yaml\nschedule: {warmup_steps: null}\n"))
    assert child.recipe.schedule.warmup_steps == 0 and child.recipe.schedule.name == "constant"
    assert str(child.origins["schedule.warmup_steps"]) == "default"


def test_a_preset_fills_in_and_single_sizes_win(tmp_path):
    text = BASE + "init_from: {language_model: {path: a, license: old}}\n"
    loaded = load_recipe(
        write(tmp_path, text),
        (
            "model.language_model=qwen2_7b_instruct",
            "model.language_model.num_hidden_layers=2",
            "init_from.language_model=b",
        ),
    )
    lm = loaded.recipe.model.language_model
    # the preset replaces the file's sizes, it does not mix with them
    assert (lm.hidden_size, lm.num_hidden_layers, lm.vocab_size) == (3584, 2, 152064)
    assert str(loaded.origins["model.language_model.hidden_size"]) == "preset qwen2_7b_instruct"
    assert str(loaded.origins["model.language_model.num_hidden_layers"]).startswith("override")
    # a folder in short replaces the folder and what was said of it
    weights = loaded.recipe.init_from.language_model
    assert weights is not None and (weights.path, weights.license) == ("b", None)


def test_variables_and_home_expand_in_path_keys_only(tmp_path, monkeypatch):
    monkeypatch.setenv("NVLM_TEST_ROOT", "/data")
    monkeypatch.setenv("HOME", "/home/someone")
    text = BASE + "license: ${NVLM_TEST_ROOT} ~\ninit_from: {vision: '~/vit'}\n"
    recipe = load_recipe(
        write(tmp_path, text), ("data.mixture.text.path=${NVLM_TEST_ROOT}/${NVLM_TEST_ROOT}.jsonl",)
    ).recipe
    assert recipe.data.mixture["text"].path == "/data//data.jsonl"
    assert recipe.init_from.vision is not None and recipe.init_from.vision.path == "/home/someone/vit"
    assert recipe.license == "${NVLM_TEST_ROOT} ~"


def test_every_effective_key_has_an_origin(tmp_path):
    from nvlm_train.recipe.load import flatten
    from nvlm_train.recipe.resolve import recipe_to_dict

    loaded = load_recipe(write(tmp_path, BASE + "validation: {early_stop: {patience: 2}}\n"))
    values = flatten(recipe_to_dict(loaded.recipe))
    empty = {"validation.sources", "data.mixture.digits.roles", "data.mixture.text.roles"}
    assert set(loaded.origins) == {name for name in values if values[name] != {}} | empty
