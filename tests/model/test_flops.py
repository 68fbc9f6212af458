"""Parameters and operations from the configuration alone, against published and independently derived figures."""

from __future__ import annotations

import pytest

from nvlm_train.model.flops import (
    count_flops,
    count_parameters,
    image_tokens_per_tile,
    patches_per_tile,
    vision_forward_flops,
    vision_parameters,
)
from nvlm_train.recipe.schema import Model, Train


def model(lm: str) -> Model:
    return Model.model_validate({"vision": "internvit_6b_448px_v1_5", "language_model": lm})


def test_nvlm_d_72b_has_the_published_number_of_parameters():
    config = model("qwen2_72b_instruct")
    counts = count_parameters(config)
    assert counts == {"vision": 5_536_496_000, "projector": 620_717_056, "language_model": 72_706_203_648}
    assert sum(counts.values()) == 78_863_416_704
    # as published, with the tower's 25 heads padded to 32
    assert sum(counts.values()) - counts["vision"] + vision_parameters(config.vision, 7) == 79_379_593_344


@pytest.mark.parametrize(
    ("lm", "count"),
    [
        # parameter counts on the model pages of Qwen2: 0.49 B, 1.54 B, 7.62 B
        ("qwen2_0_5b_instruct", 494_032_768),
        ("qwen2_1_5b_instruct", 1_543_714_304),
        ("qwen2_7b_instruct", 7_615_616_512),
    ],
)
def test_the_smaller_decoders(lm, count):
    assert count_parameters(model(lm))["language_model"] == count


def test_counts_equal_the_tensors_of_a_real_model():
    torch = pytest.importorskip("torch")
    from nvlm_train.model.nvlm import NvlmD

    # pairwise different sizes, tied and untied
    for tied in (False, True):
        config = Model.model_validate(
            {
                "vision": dict(
                    hidden_size=30,
                    intermediate_size=44,
                    num_hidden_layers=3,
                    num_attention_heads=5,
                    image_size=24,
                    patch_size=3,
                ),
                "language_model": dict(
                    hidden_size=48,
                    intermediate_size=72,
                    num_hidden_layers=2,
                    num_attention_heads=6,
                    num_key_value_heads=2,
                    vocab_size=130,
                    tie_word_embeddings=tied,
                ),
            }
        )
        with torch.device("meta"):
            built = NvlmD(config)
        real = {"vision": 0, "projector": 0, "language_model": 0}
        for name, parameter in built.named_parameters():  # names a tied parameter once
            real[{"vision_model": "vision"}.get(name.split(".")[0], name.split(".")[0])] += parameter.numel()
        assert count_parameters(config) == real


def test_tokens_of_a_tile():
    config = model("qwen2_7b_instruct")
    assert (patches_per_tile(config.vision), image_tokens_per_tile(config.vision)) == (1024, 256)


def test_tower_forward_is_11_9_tflop():
    assert vision_forward_flops(model("qwen2_7b_instruct").vision) == pytest.approx(11.9e12, rel=0.005)


@pytest.mark.parametrize(
    ("lm", "tokens", "tiles", "useful", "executed"),
    [
        # one step per GPU at a document length of 4096, from a roofline made independently of this code, TFLOP
        ("qwen2_7b_instruct", 16384, 28, 1083, 1310),
        ("qwen2_72b_instruct", 8192, 14, 3825, 5019),
    ],
)
def test_operations_of_a_step(lm, tokens, tiles, useful, executed):
    flops = count_flops(model(lm), Train(), 4096, recompute="full")
    found = flops.step(tokens, tiles)
    # worst seen 0.10 %: the roofline's parts are rounded to whole TFLOP
    assert found == pytest.approx((useful * 1e12, executed * 1e12), rel=0.002)
    assert count_flops(model(lm), Train(), 4096, recompute="none").step(tokens, tiles) == (found[0], found[0])


def test_a_frozen_decoder_needs_no_weight_gradients():
    config = model("qwen2_72b_instruct")
    full = count_flops(config, Train(), 0, recompute="none")
    frozen = count_flops(config, Train(language_model="frozen"), 0, recompute="none")
    nothing_below = count_flops(config, Train(projector="frozen"), 0, recompute="none")
    assert frozen.useful_per_token == pytest.approx(full.useful_per_token * 2 / 3)
    assert nothing_below.useful_per_token == full.useful_per_token  # its own embedding still needs the gradient
    assert frozen.useful_per_tile == full.useful_per_tile  # tower forward, projector three times
    thawed = count_flops(config, Train(vision="full"), 0, recompute="none")
    assert thawed.useful_per_tile - full.useful_per_tile == pytest.approx(2 * full.tile_forward)
