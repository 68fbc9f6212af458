"""What the Triton kernels share: sizes of blocks, and the one torch.library of our ops.

Every op is registered below autograd, with a fake implementation, so that torch.compile and selective recompute see one
operator; the autograd functions around them live beside their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from nvlm_train.errors import SetupError

MAX_WIDTH = 16384  # of a row that one program holds in registers
LIBRARY = torch.library.Library("nvlm_train", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `nvlm_train::<schema>` for every device and returns the operator. fake: shapes and types alone."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvlm_train::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.nvlm_train, name).default


def block_of(width: int, op: str) -> int:
    """The power of two that holds a row of `width`. Raises SetupError where a program cannot hold it."""
    if width > MAX_WIDTH:
        raise SetupError(f"kernels: {op} in triton takes rows of at most {MAX_WIDTH}, this one has {width}; use torch")
    return 1 << (width - 1).bit_length()


def warps_of(block: int) -> int:
    """Warps of a program that holds `block` elements of a row: at most 16 a thread, and 32 warps."""
    return min(32, max(1, block // 512))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def programs_of(rows: int, device: torch.device) -> int:
    """Programs that share `rows` rows where each sums over its own: two for each multiprocessor, no more than rows."""
    return max(1, min(rows, 2 * _multiprocessors(device)))


def is_double(x: torch.Tensor) -> bool:
    """fp64 accumulates in fp64 (gradient checks), everything else in fp32."""
    return x.dtype == torch.float64
