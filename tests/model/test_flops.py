"""Parameters and operations from the configuration alone, against published and independently derived figures."""

from __future__ import annotations

import pytest

from nvlm_train.model.flops import (
    count_flops,
    count_parameters,
    image_tokens_per_tile,
    modules_of,
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
        ("yi_34b", 34_388_917_248),  # 34.389 B on its model page
    ],
)
def test_the_smaller_decoders(lm, count):
    assert count_parameters(model(lm))["language_model"] == count


@pytest.mark.parametrize(
    ("lm", "architecture", "projector", "attention", "swiglu"),
    [
        # projectors: the sheet's 104,857,600 and 91,750,400 and a LayerNorm of 2 x 12,800; NVLM-H has NVLM-D's.
        # cross-attention of 10 layers: "1.51 B (GQA-8)", with a feed-forward part "about 8.8 B"; at 34 B from "1.17 B"
        ("qwen2_72b_instruct", "nvlm_x", 104_857_600 + 25_600, 1_509_949_440, 7_266_631_680),
        ("qwen2_72b_instruct", "nvlm_h", 620_717_056, 1_509_949_440, 7_266_631_680),
        ("yi_34b", "nvlm_x", 91_750_400 + 25_600, 1_174_405_120, 4_404_019_200),
        ("yi_34b", "nvlm_h", 408_970_240, 1_174_405_120, 4_404_019_200),
    ],
)
def test_x_and_h_have_the_paper_s_sizes(lm, architecture, projector, attention, swiglu):
    sizes = {"vision": "internvit_6b_448px_v1_5", "language_model": lm, "architecture": architecture}
    config = Model.model_validate(sizes)
    assert len(config.cross_attention_layers) == 10  # every 8th of 80, every 6th of 60
    width = config.language_model.hidden_size
    counts = count_parameters(config)
    assert counts["projector"] == projector
    assert counts["cross_attention"] == attention + 10 * (2 * width + 1)  # two norms and a gate in each layer
    assert counts["language_model"] == count_parameters(model(lm))["language_model"]
    wide = Model.model_validate({**sizes, "cross_attention": {"feed_forward": True, "num_key_value_heads": None}})
    assert count_parameters(wide)["cross_attention"] == attention + swiglu + 10 * (3 * width + 2)
    heads = config.language_model.num_attention_heads
    full = Model.model_validate({**sizes, "cross_attention": {"num_key_value_heads": heads, "memory_norm": "none"}})
    # "2.68 B" and "2.06 B" with as many key/value heads as query heads
    assert count_parameters(full)["cross_attention"] == 40 * width**2 + 10 * (width + 1)


def test_a_step_of_x_costs_less_than_one_of_d():
    """34 B, an image of 7 tiles, 1024 tokens of text. Measured in the paper: D 1.00 : H 1.26 : X 1.76 in throughput."""
    useful = {}
    for architecture, tokens in (("nvlm_d", 1024 + 7 * 256), ("nvlm_x", 1024), ("nvlm_h", 1280)):
        sizes = {"vision": "internvit_6b_448px_v1_5", "language_model": "yi_34b", "architecture": architecture}
        flops = count_flops(Model.model_validate(sizes), Train(), tokens, recompute="full")
        useful[architecture] = flops.step(tokens, 7)[0]
        assert flops.executed_per_token > flops.useful_per_token
        assert (flops.executed_per_tile > flops.useful_per_tile) == (architecture != "nvlm_d")
    print({name: useful["nvlm_d"] / value for name, value in useful.items()})
    assert 1.76 < useful["nvlm_d"] / useful["nvlm_x"] < 2.4  # operations alone: 2.23
    assert 1.26 < useful["nvlm_d"] / useful["nvlm_h"] < 2.1


def test_the_smaller_tower():
    config = Model.model_validate({"vision": "internvit_300m_448px", "language_model": "qwen2_0_5b_instruct"})
    assert count_parameters(config)["vision"] == 304_012_288  # "304 M" on its model page


def test_counts_equal_the_tensors_of_a_real_model():
    torch = pytest.importorskip("torch")
    from nvlm_train.engine.optim import module_of
    from nvlm_train.model.nvlm import class_of

    cross = {
        "nvlm_d": {},
        "nvlm_x": {"feed_forward": True, "num_key_value_heads": 3},
        "nvlm_h": {"gate": "none", "memory_norm": "none", "num_attention_heads": 4, "every_layers": 2},
    }
    # pairwise different sizes, tied and untied, of both kinds of tower and of decoder
    for tied, architecture in ((tied, architecture) for tied in (False, True) for architecture in cross):
        other = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True} if tied else {}
        config = Model.model_validate(
            {
                "architecture": architecture,
                "cross_attention": cross[architecture],
                "projector": {"norm": "none" if tied else "layer_norm"},
                "vision": dict(
                    hidden_size=30,
                    intermediate_size=44,
                    num_hidden_layers=3,
                    num_attention_heads=5,
                    image_size=24,
                    patch_size=3,
                    **other,
                ),
                "language_model": dict(
                    hidden_size=48,
                    intermediate_size=72,
                    num_hidden_layers=2,
                    num_attention_heads=6,
                    num_key_value_heads=2,
                    vocab_size=130,
                    tie_word_embeddings=tied,
                    model_type="llama" if tied else "qwen2",
                ),
            }
        )
        with torch.device("meta"):
            built = class_of(config)(config)
        real = dict.fromkeys(modules_of(config), 0)
        for name, parameter in built.named_parameters():  # names a tied parameter once
            real[module_of(name)] += parameter.numel()
        assert count_parameters(config) == real and len(real) == (3 if architecture == "nvlm_d" else 4)


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
