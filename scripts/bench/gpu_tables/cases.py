"""What tables 1 and 2 measure, by device. No torch."""

from __future__ import annotations

from typing import Any

from gpu_tables.shapes import SAMPLES

GEMMS = {  # m, n, k
    "cuda": [(2048,) * 3, (4096,) * 3, (8192,) * 3, (16384, 18944, 3584), (28700, 12800, 3200), (3584, 152064, 3584)],
    "cpu": [(64,) * 3, (128, 96, 64)],
}

PACK = tuple((tokens, tokens) for tokens, _ in SAMPLES)

# op, sizes, option; one line of the table each. 28 tiles are 28700 rows of the tower.
CASES: dict[str, dict[str, tuple[str, tuple[int, ...], Any]]] = {
    "cuda": {
        "linear_cross_entropy 16384x3584x152064, 100 % labelled": ("linear_cross_entropy", (16384, 3584, 152064), 100),
        "linear_cross_entropy 16384x3584x152064, 40 % labelled": ("linear_cross_entropy", (16384, 3584, 152064), 40),
        "linear_cross_entropy 16384x3584x152064, 20 % labelled": ("linear_cross_entropy", (16384, 3584, 152064), 20),
        "linear_cross_entropy 16384x3584x152064, 5 % labelled": ("linear_cross_entropy", (16384, 3584, 152064), 5),
        "linear_cross_entropy 8192x8192x152064, 20 % labelled": ("linear_cross_entropy", (8192, 8192, 152064), 20),
        "rms_norm 16384x3584": ("rms_norm", (16384, 3584), None),
        "add_rms_norm 16384x3584": ("add_rms_norm", (16384, 3584), None),
        "add_rms_norm 28700x3200, LayerScale": ("add_rms_norm", (28700, 3200), "vector"),
        "add_rms_norm 8192x8192, gate": ("add_rms_norm", (8192, 8192), "number"),
        "norm_rope 28700x25x128 of a packed qkv, norm": ("norm_rope", (28700, 25, 128), "norm"),
        "norm_rope 16384x28x128, rotary": ("norm_rope", (16384, 28, 128), "rope"),
        "splice 16384x3584, 7168 image rows, table 152064": ("splice", (16384, 3584, 7168, 152064), None),
        "shuffle_layer_norm 28 tiles 32x32x3200": ("shuffle_layer_norm", (28, 32, 3200), None),
        # PyTorch's varlen attention behind our adapter, on the samples of the steps; then 8 runs that read 7 tiles
        "attention 8 samples, 16384x28x128": ("attention", (28, 4, 128), PACK),
        "cross_attention 8 runs, 1024 to 1792, 28x128": ("attention", (28, 4, 128), ((1024, 1792),) * 8),
    },
    "cpu": {
        "linear_cross_entropy 24x16x67, 100 % labelled": ("linear_cross_entropy", (24, 16, 67), 100),
        "linear_cross_entropy 24x16x67, 20 % labelled": ("linear_cross_entropy", (24, 16, 67), 20),
        "rms_norm 8x24": ("rms_norm", (8, 24), None),
        "add_rms_norm 8x24": ("add_rms_norm", (8, 24), None),
        "add_rms_norm 8x24, LayerScale": ("add_rms_norm", (8, 24), "vector"),
        "add_rms_norm 8x24, gate": ("add_rms_norm", (8, 24), "number"),
        "norm_rope 6x3x8 of a packed qkv, norm": ("norm_rope", (6, 3, 8), "norm"),
        "norm_rope 6x3x8, rotary": ("norm_rope", (6, 3, 8), "rope"),
        "splice 12x16, 5 image rows, table 31": ("splice", (12, 16, 5, 31), None),
        "shuffle_layer_norm 2 tiles 4x4x8": ("shuffle_layer_norm", (2, 4, 8), None),
        "attention 3 samples, 12x4x8": ("attention", (4, 2, 8), ((5, 5), (3, 3), (4, 4))),
        "cross_attention 2 runs, 4x8": ("attention", (4, 2, 8), ((3, 6), (2, 4))),
    },
}
