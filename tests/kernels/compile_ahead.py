"""Compiles every kernel for GPUs that are not here, and reads off what the code would need there.

    PYTHONPATH=. python tests/kernels/compile_ahead.py > tests/kernels/ahead_budgets.json

writes the table of budgets: registers a thread, global loads, and how many of these are 128 bits wide.

The Triton package brings ptxas and cuobjdump, so neither a GPU nor CUDA is needed. Shapes are those of the published
sizes in bf16, with the divisibility by 16 that the launcher would find: without it, other code is made.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).with_name("ahead_budgets.json")
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Build:
    """One kernel as the model would launch it. pointers: type of each; integers that 16 divides are in `divisible`."""

    kernel: Callable[[], Any]
    signature: str  # name:type, in order; types as Triton writes them
    constants: dict[str, Any]
    num_warps: int
    divisible: set[str] = field(default_factory=set)


def builds() -> dict[str, Build]:
    from nvlm_train.kernels import linear_cross_entropy, norm_rope, rms_norm, shuffle_layer_norm, splice
    from nvlm_train.kernels.launch import warps_of

    bf, fp = "*bf16", "*fp32"
    builds: dict[str, Build] = {}
    for grad in (True, False):
        builds[f"cross_entropy {'' if grad else 'without '}gradient 152064"] = Build(
            lambda: linear_cross_entropy.cross_entropy_kernel,
            f"logits:{bf} targets:*i64 losses:{fp} width:i32 stride:i32",
            {"BLOCK": 4096, "GRAD": grad, "DOUBLE": False},
            16,
            {"width", "stride"},
        )
    for width, block, forms in (
        (3200, 4096, ((False, 0), (True, 2))),
        (8192, 8192, ((True, 0), (True, 1))),
    ):
        for add, scale in forms:
            name = f"{'add_' * add}rms_norm{('', ' gated', ' scaled')[scale]} {width}"
            none: dict[str, Any] = {} if add else {"residual": None}
            none |= {} if scale else {"scale": None}
            own = {"ADD": add, "SCALE": scale, "BLOCK": block, "DOUBLE": False}
            builds[f"{name} forward"] = Build(
                lambda: rms_norm.rms_norm_forward_kernel,
                f"x:{bf} residual:{bf} weight:{bf} scale:{bf} stream:{bf} y:{bf} rstd:{fp} width:i32 eps:fp32",
                own | none,
                warps_of(block),
                {"width"},
            )
            none = {} if add else {"dstream": None}
            none |= {} if scale else {"x": None, "scale": None}
            builds[f"{name} backward"] = Build(
                lambda: rms_norm.rms_norm_backward_kernel,
                f"dy:{bf} dstream:{bf} stream:{bf} rstd:{fp} weight:{bf} x:{bf} scale:{bf} ds:{bf} dx:{bf} "
                f"dweight:{fp} dscale:{fp} rows:i32 width:i32",
                own | none | {"NEED_WEIGHT": True, "NEED_SCALE": scale > 0},
                min(32, 2 * warps_of(block)),
                {"rows", "width"},
            )
    for name, heads, norm, rope in (("norm 25", 32, True, False), ("rope 64", 64, False, True)):
        own = {"NORM": norm, "ROPE": rope, "HEADS": heads, "HALF": 64, "DOUBLE": False}
        tables = {} if rope else {"cos": None, "sin": None}
        builds[f"norm_rope {name} forward"] = Build(
            lambda: norm_rope.norm_rope_forward_kernel,
            f"x:{bf} weight:{bf} cos:{bf} sin:{bf} y:{bf} rstd:{fp} stride:i32 heads:i32 half:i32 eps:fp32 sign:fp32",
            own | tables | ({} if norm else {"weight": None}),
            warps_of(2 * heads * 64),
            {"stride", "half"},
        )
        if norm:
            builds[f"norm_rope {name} backward"] = Build(
                lambda: norm_rope.norm_rope_backward_kernel,
                f"dy:{bf} x:{bf} weight:{bf} cos:{bf} sin:{bf} rstd:{fp} dx:{bf} dweight:{fp} stride:i32 rows:i32 "
                "heads:i32 half:i32",
                {"ROPE": rope, "NEED_WEIGHT": True, "HEADS": heads, "HALF": 64, "DOUBLE": False} | tables,
                warps_of(2 * heads * 64),
                {"stride", "rows", "half"},
            )
    builds["splice forward"] = Build(
        lambda: splice.splice_forward_kernel,
        f"ids:*i64 slots:*i64 table:{bf} features:{bf} out:{bf} width:i32",
        {"IDS": True, "BLOCK": 1024},
        4,
        {"width"},
    )
    builds["splice backward"] = Build(
        lambda: splice.splice_backward_kernel,
        f"dout:{bf} slots:*i64 dfeatures:{bf} dtext:{bf} width:i32",
        {"NEED_TEXT": True, "BLOCK": 1024},
        4,
        {"width"},
    )
    builds["shuffle_layer_norm 3200 forward"] = Build(
        lambda: shuffle_layer_norm.shuffle_layer_norm_forward_kernel,
        f"features:{bf} weight:{bf} bias:{bf} y:{bf} mean:{fp} rstd:{fp} side:i32 width:i32 eps:fp32",
        {"BLOCK": 4096, "DOUBLE": False},
        16,
        {"side", "width"},
    )
    builds["shuffle_layer_norm 3200 backward"] = Build(
        lambda: shuffle_layer_norm.shuffle_layer_norm_backward_kernel,
        f"dy:{bf} features:{bf} mean:{fp} rstd:{fp} dweight:{fp} dbias:{fp} rows:i32 side:i32 width:i32",
        {"BLOCK": 4096, "DOUBLE": False},
        32,
        {"rows", "side", "width"},
    )
    return builds


def compile_for(architecture: int, build: Build) -> dict[str, int]:
    """Registers a thread, bytes spilled, global loads and how many of them are 128 bits wide."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(part.split(":") for part in build.signature.split())
    signature |= dict.fromkeys(build.constants, "constexpr")
    names = build.kernel().arg_names
    order = {name: signature[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if order[name].startswith("*") or name in build.divisible
    }
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    source = ASTSource(build.kernel(), order, constants, attributes)
    made = triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": build.num_warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]) + len(re.findall(r"\bSTL\b", code)),
        "loads": len(re.findall(r"\bLDG\b", code)),
        "loads_of_128_bits": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", code)),
    }


def table(architectures: tuple[int, ...]) -> dict[str, dict[str, dict[str, int]]]:
    """By kernel and architecture ("sm_90")."""
    return {name: {f"sm_{a}": compile_for(a, build) for a in architectures} for name, build in builds().items()}


if __name__ == "__main__":
    rows = [
        f" {json.dumps(name)}: "
        + json.dumps({a: [c["registers"], c["loads"], c["loads_of_128_bits"]] for a, c in by_architecture.items()})
        for name, by_architecture in table(ARCHITECTURES).items()
    ]
    print("{\n" + ",\n".join(rows) + "\n}")
