"""The same exports in transformers 4.57, in an environment of its own beside this one, and what both versions make of
them. `./scripts/test --slow tests/export/test_transformers_4.py -s`
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import use_export
from test_use import KINDS, check_use, make_export

HERE = Path(__file__).parent
TIED = {"model.language_model.tie_word_embeddings": True}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has transformers 4.57 and sees torch and all else in the environment of this one."""
    folder = tmp_path_factory.mktemp("transformers_4") / "env"
    python = folder / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", HERE / "constraints_4.txt"],
    ):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"transformers 4 cannot be installed here: {' '.join(map(str, command[1:5]))} ...: {last}")
    # only now, so that pip neither counts on this environment's packages nor removes any
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def in_4(python: Path, home: Path, *arguments: Any) -> str:
    """Runs the interpreter with a cache of code of its own; its output."""
    environment = {
        **os.environ, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    }  # fmt: skip
    done = subprocess.run(
        [python, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_both_versions_make_the_same_of_an_export(python_4: Path, tmp_path: Path) -> None:
    """Loaded strictly, logits, answers, prompts and tiles equal; and what either has saved, the other reads alike.

    The logits are equal to the bit, here.
    """
    import transformers

    assert int(transformers.__version__.split(".")[0]) >= 5
    kinds = {**KINDS, "d_tied": TIED}
    for kind, changes in kinds.items():
        make_export(changes, tmp_path / kind)
        use_export.use(tmp_path / kind / "out", tmp_path / kind / "by_5")
    pairs = [
        path
        for kind in kinds
        for path in (
            (tmp_path / kind / "out", tmp_path / kind / "by_4"),
            (tmp_path / kind / "by_5" / "saved", tmp_path / kind / "by_5_then_4"),
        )
    ]
    in_4(python_4, tmp_path / "home", HERE / "use_export.py", *[path for pair in pairs for path in pair])
    worst = 0.0
    for kind in kinds:
        use_export.use(tmp_path / kind / "by_4" / "saved", tmp_path / kind / "by_4_then_5")
        expected = load_file(tmp_path / kind / "by_5" / "tensors.safetensors")
        for name, version in (("by_5", "5."), ("by_4", "4.57."), ("by_5_then_4", "4.57."), ("by_4_then_5", "5.")):
            found = json.loads((tmp_path / kind / name / "found.json").read_text())
            tensors = load_file(tmp_path / kind / name / "tensors.safetensors")
            assert found["transformers"].startswith(version)
            check_use(found, tensors)
            assert tensors.keys() == expected.keys()
            for key, value in expected.items():
                if key.endswith("logits"):
                    worst = max(worst, float((tensors[key] - value).abs().max()))
                else:
                    assert torch.equal(tensors[key], value), (kind, name, key)
            config = json.loads((tmp_path / kind / name / "saved" / "config.json").read_text())
            before = json.loads((tmp_path / kind / "out" / "config.json").read_text())
            for key in ("rope_theta", "torch_dtype", "architectures", "tie_word_embeddings"):
                assert config["llm_config"][key] == before["llm_config"][key]
            assert config["auto_map"] == before["auto_map"] and config["architectures"] == before["architectures"]
    print(f"logits of transformers 4.57 and 5: at most {worst:.1e} apart")
    assert worst <= 2e-5  # worst case here 0: the same products in the same order


def test_the_tests_of_the_exported_code_pass_in_4(python_4: Path, tmp_path: Path) -> None:
    files = [HERE / f"test_{name}.py" for name in ("use", "remote_code", "members")]
    out = in_4(python_4, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "t", *files)
    print(out.strip().splitlines()[-1])
    assert " passed" in out and " failed" not in out
