"""Pixel shuffle against its closed formula, and the projector against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_cases import make_config, randomise
from nvlm_train.model.projector import Projector, pixel_shuffle

torch.set_num_threads(1)


@pytest.mark.parametrize(("tiles", "side", "width"), [(1, 2, 3), (2, 4, 5), (3, 6, 2), (1, 32, 4)])
def test_every_element_stands_where_the_formula_says(tiles: int, side: int, width: int) -> None:
    """Token (i, j), channel c is channel c % E of patch (2i + block // 2, 2j + block % 2), block = c // E."""
    features = torch.arange(tiles * side * side * width).reshape(tiles, side * side, width)
    shuffled = pixel_shuffle(features)
    assert shuffled.shape == (tiles, side * side // 4, 4 * width)
    half = side // 2
    t, token, c = torch.meshgrid(torch.arange(tiles), torch.arange(half * half), torch.arange(4 * width), indexing="ij")
    block = c // width
    patch = (2 * (token // half) + block // 2) * side + 2 * (token % half) + block % 2
    assert torch.equal(shuffled, features[t, patch, c % width])


def test_the_transposed_grid_of_version_1_would_show() -> None:
    features = torch.arange(16).reshape(1, 16, 1)  # a grid of 4 x 4
    assert pixel_shuffle(features)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_the_projector_is_norm_linear_erf_gelu_linear() -> None:
    config = make_config()
    projector = Projector(config)
    randomise(projector, seed=6)
    layers = nn.Sequential(
        nn.LayerNorm(96, eps=1e-5), nn.Linear(96, 56, bias=False), nn.GELU(), nn.Linear(56, 32, bias=False)
    )
    names = {"0.weight": "norm.weight", "0.bias": "norm.bias", "1.weight": "fc1.weight", "3.weight": "fc2.weight"}
    state = projector.state_dict()
    assert set(state) == set(names.values())
    layers.load_state_dict({published: state[ours] for published, ours in names.items()})
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projector(x), layers(x))
