"""Every kernel compiled for GPUs that are not here, against the committed table of budgets.

It proves that the code compiles, spills nothing and loads 128 bits at a time; not that it is fast, nor that it is free
of races.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (scripts/install does)")

from compile_ahead import ARCHITECTURES, BUDGETS, builds, compile_for

SLOW = {name for name in builds() if "8192" in name or "without" in name}  # like others that are compiled always
CASES = [
    pytest.param(name, architecture, marks=[] if architecture == 90 and name not in SLOW else [pytest.mark.slow])
    for name in builds()
    for architecture in ARCHITECTURES
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_a_kernel_keeps_its_budget(
    name: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    registers, loads, wide = json.loads(BUDGETS.read_text())[name][f"sm_{architecture}"]
    found = compile_for(architecture, builds()[name])
    assert found["spilled"] == 0, found
    assert found["registers"] <= registers * 1.25, found  # another ptxas may need a few more
    assert found["loads_of_128_bits"] >= wide and found["loads"] <= loads, found


def test_the_table_names_the_kernels_and_without_divisibility_nothing_is_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads(BUDGETS.read_text()).keys() == builds().keys()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build = builds()["add_rms_norm 8192 forward"]
    build.divisible.clear()
    assert compile_for(90, build)["loads_of_128_bits"] < 6  # the check can fail
