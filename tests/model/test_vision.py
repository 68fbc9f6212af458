"""The tower against transformers' InternVLVisionModel, and tile chunks against one call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model_cases import VISION, at_most, gradients, largest_difference, make_config, randomise, worst
from nvlm_train.model import vision
from nvlm_train.model.vision import IMAGE_MEAN, IMAGE_STD, InternVit, encode_tiles, normalise
from nvlm_train.recipe import schema

torch.set_num_threads(1)

LIKE_300M = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}
CASES = {
    "3 heads, 16 patches": {},
    "one head, 64 patches": {"hidden_size": 20, "num_attention_heads": 1, "image_size": 56, "num_hidden_layers": 4},
    "5 heads, eps 1e-5": {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 24, "layer_norm_eps": 1e-5},
    "as the 300M tower": {**LIKE_300M, "hidden_size": 32, "num_attention_heads": 4, "layer_norm_eps": 1e-5},
}


def tower_pair(**sizes: object) -> tuple[InternVit, torch.nn.Module]:
    """Our tower and transformers', with the same random weights."""
    transformers = pytest.importorskip("transformers")
    config = schema.Vision.model_validate({**VISION, **sizes})
    ours = InternVit(config)
    randomise(ours, seed=4, scale=3.0)
    theirs = transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=[config.image_size] * 2,
            patch_size=[config.patch_size] * 2,
            layer_norm_eps=config.layer_norm_eps,
            norm_type=config.norm_type,
            use_qk_norm=config.qk_normalization,
            attention_bias=config.qkv_bias,
            use_mean_pooling=True,
            hidden_act="gelu",
            attn_implementation="eager",
        )
    )
    for module in theirs.modules():  # its q/k norms have 1e-6 whatever the configuration says
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = config.layer_norm_eps
    missing, unexpected = theirs.load_state_dict(to_theirs(ours.state_dict()), strict=False)
    assert not missing and not unexpected
    return ours, theirs


def to_theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = (
        ("class_embedding", "cls_token"), ("position_embedding", "position_embeddings"),
        ("patch_embedding", "patch_embeddings.projection"), ("encoder.layers", "encoder.layer"),
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("ls1", "lambda_1"), ("ls2", "lambda_2"),
        ("attn.", "attention."), (".proj.", ".projection_layer."),
    )  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_features_and_every_gradient_equal_transformers(sizes: dict[str, object]) -> None:
    ours, theirs = tower_pair(**sizes)
    px = ours.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, px, px, generator=generator)
    features, expected = ours(pixels), theirs(pixel_values=pixels).last_hidden_state
    at_most(largest_difference(features, expected), 3e-7, "features")  # worst seen 7.7e-8
    weight = torch.randn(features.shape, generator=generator)
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    own = {name: grad for name, grad in gradients(ours).items() if grad is not None}
    assert len(own) == len(ours.state_dict())  # the class token's reaches the patches through attention
    at_most(worst(to_theirs(own), gradients(theirs)), 8e-7, "gradients")  # worst seen 1.9e-7


@pytest.mark.parametrize("sizes", [{}, LIKE_300M], ids=["6B", "300M"])
def test_a_weight_that_is_left_out_would_show(sizes: dict[str, object]) -> None:
    ours, theirs = tower_pair(**sizes)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixel_values=pixels).last_hidden_state
    for name, parameter in ours.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.ones_like(kept) if "norm" in name else torch.zeros_like(kept))
            assert largest_difference(ours(pixels), expected) > 1e-4, name  # parity holds to 2e-6
            parameter.copy_(kept)


def test_bf16_runs_in_bf16() -> None:
    ours, _ = tower_pair()
    tiles = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    exact = encode_tiles(ours, tiles, torch.float32)
    rounded = encode_tiles(ours.bfloat16(), tiles, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    at_most(largest_difference(rounded, exact), 0.02, "bf16 features")  # worst seen 0.0059, one bf16 step is 0.008


def test_normalise_is_imagenets() -> None:
    tiles = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    tiles[0, 0, 0, 0] = 255
    pixels = normalise(tiles, torch.float32)
    assert abs(float(pixels[0, 0, 0, 0]) - (1 - 0.485) / 0.229) < 1e-6
    assert abs(float(pixels[0, 2, 1, 1]) + 0.406 / 0.225) < 1e-6


def test_normalising_on_the_device_is_normalising_on_the_host() -> None:
    """Every value of every channel, bit for bit in fp32, against numpy, which is what a host would do."""
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    host = torch.from_numpy((tiles.numpy().astype(np.float32) / np.float32(255) - mean) / std)
    assert torch.equal(normalise(tiles, torch.float32), host)
    assert torch.equal(normalise(tiles, torch.bfloat16), host.bfloat16())
    if torch.cuda.is_available():  # not yet run on a GPU
        assert torch.equal(normalise(tiles.cuda(), torch.float32).cpu(), host)


def test_only_a_chunk_is_ever_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles stay bytes until their chunk's turn, on a tower without gradients in bf16: nothing grows with T but bytes
    and features."""
    seen: list[tuple[torch.dtype, int, torch.dtype]] = []

    def noted(tiles: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append((tiles.dtype, len(tiles), dtype))
        return normalise(tiles, dtype)

    monkeypatch.setattr(vision, "normalise", noted)
    tower = counting_tower(False).bfloat16()
    features = encode_tiles(tower, torch.zeros(5, 3, 28, 28, dtype=torch.uint8), torch.bfloat16, tiles_per_chunk=2)
    assert [(dtype, count) for dtype, count, _ in seen] == [(torch.uint8, n) for n in (2, 2, 1)]
    assert {made for *_, made in seen} == {torch.bfloat16} and features.grad_fn is None and not features.requires_grad


class Counting(InternVit):
    """Notes how many tiles each call had."""

    calls: list[int]

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls.append(len(pixels))
        return super().forward(pixels)


def counting_tower(trained: bool) -> Counting:
    tower = Counting(make_config().vision)
    tower.calls = []
    randomise(tower, seed=2)
    return tower.requires_grad_(trained)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("tiles", "chunk", "planned", "calls"),
    [
        (5, 16, 0, [5]),
        (5, 2, 0, [2, 2, 1]),
        (5, 2, 3, [2, 2, 1]),
        (5, 2, 5, [2, 2, 1, 1, 1]),
        (0, 2, 0, []),
        (0, 2, 2, [1, 1]),
    ],
)
def test_the_tower_runs_as_often_as_planned(
    tiles: int, chunk: int, planned: int, calls: list[int], trained: bool
) -> None:
    tower = counting_tower(trained)
    images = torch.randint(0, 256, (tiles, 3, 28, 28), dtype=torch.uint8)
    features = encode_tiles(tower, images, torch.float32, tiles_per_chunk=chunk, num_chunks=planned)
    assert tower.calls == calls
    empty = sum(calls) - tiles
    assert features.shape == (tiles + (empty if trained else 0), 16, 24)
    assert features.requires_grad == (trained and bool(calls))
    if tiles:
        with torch.no_grad():
            whole = tower(normalise(images, torch.float32))[:, 1:]
        # the same arithmetic, in matrices of other heights; worst seen 0
        at_most(largest_difference(features[:tiles], whole), 5e-7, "chunks")


def test_more_tiles_than_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tiles need 3 chunks of 2, but every rank was planned 2"):
        encode_tiles(
            counting_tower(False),
            torch.zeros(5, 3, 28, 28, dtype=torch.uint8),
            torch.float32,
            tiles_per_chunk=2,
            num_chunks=2,
        )
