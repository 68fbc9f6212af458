"""scripts/bench/gpu: what is recorded, gone on with, counted and called met; a few tiny cells really run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gpu_tables import kernel_cells, main, report, results, shapes, step_cells, worker
from nvlm_train.model.flops import count_parameters, vision_forward_flops

ABOUT = {"date": "2026-11-26", "device": "cuda", "gpu": "NVIDIA H200", "commit": "abc", "dirty": False,
         "versions": {"torch": "2"}, "memory": 150 * 10**9}  # fmt: skip


def opened(folder: Path, code: str = "c0de", **about: Any) -> results.Results:
    return results.Results(folder / "2026-11-26-h200", code, {**ABOUT, "commands": ["scripts/bench/gpu"], **about})


# ------------------------------------------------------------------------------------------------------- files, resume


def test_what_is_measured_is_kept_and_never_mixed_with_other_code(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.record("1/copy", {"status": "done", "values": {"rate": 1.0}})
    first.record("3/7b/peer/1", {"status": "out of memory", "error": "x"})
    first.record("3/7b/ours/1", {"status": "failed", "error": "x"})
    again = opened(tmp_path)
    assert not again.wanted("1/copy") and not again.wanted("3/7b/peer/1") and not again.wanted("3/7b/ours/1")
    assert again.wanted("1/gemm 2048x2048x2048")
    assert again.wanted("3/7b/ours/1", retry_failed=True) and not again.wanted("3/7b/peer/1", retry_failed=True)
    other = opened(tmp_path, code="other")
    assert other.wanted("1/copy")
    other.record("1/copy", {"status": "done", "values": {"rate": 2.0}})
    runs = {run["code"]: run for run in json.loads(other.path.read_text())["runs"]}
    assert runs["c0de"]["cells"]["1/copy"]["values"]["rate"] == 1.0
    assert runs["c0de"]["commands"] == ["scripts/bench/gpu"]  # not once a call
    assert [file.name for file in tmp_path.iterdir()] == ["2026-11-26-h200.json"]  # nothing half written


def test_the_code_is_told_apart_and_local_changes_are_marked(tmp_path: Path) -> None:
    for name in ("nvlm_train/a.py", "scripts/bench/gpu", "scripts/bench/gpu_tables/b.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = results.fingerprint(tmp_path)
    assert results.revision(tmp_path)[1]  # no git: nobody knows which commit it is
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit, dirty = results.revision(tmp_path)
    assert len(commit) == 10 and not dirty
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "scripts/bench/results").mkdir()
    (tmp_path / "scripts/bench/results/x.json").write_text("{}")
    assert results.fingerprint(tmp_path) == before and results.revision(tmp_path) == (commit, False)
    (tmp_path / "nvlm_train/new.py").write_text("1")
    assert results.fingerprint(tmp_path) != before and results.revision(tmp_path) == (commit, True)


class FakeWorker:
    """Plays what a process would answer: a list of messages; TimeoutError; or death, with its status."""

    scripts: ClassVar[list[list[Any]]] = []
    tasks: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, task: dict[str, Any], log: Path) -> None:
        cells = [dict(cell) for cell in task["cells"]]  # as they are now
        self.tasks.append({"cells": cells, "recompute": cells[0].get("recompute")})
        self.lines = iter(self.scripts.pop(0))
        self.process = self
        self.returncode = 0

    def answer(self, until: float) -> dict[str, Any] | None:
        line = next(self.lines, None)
        if isinstance(line, int):
            self.returncode = line
            return None
        if line is TimeoutError or line is KeyboardInterrupt:
            raise line
        return line

    def wait(self) -> None: ...

    def end(self) -> None: ...


def measured(
    monkeypatch: pytest.MonkeyPatch, cells: list[dict[str, Any]], scripts: list[list[Any]], **options: Any
) -> Any:
    """(what was recorded, the tasks that workers got)."""
    FakeWorker.scripts, FakeWorker.tasks = scripts, []
    monkeypatch.setattr(main, "Worker", FakeWorker)
    found: dict[str, Any] = {}
    deadline = time.monotonic() + options.pop("limit_s", 1000.0)
    main.measure(cells, "cuda", deadline, Path("log"), lambda key, cell: found.__setitem__(key, cell), {})
    return found, FakeWorker.tasks


def done(key: str) -> list[Any]:
    return [{"begin": key}, {"key": key, "status": "done", "values": {"ms": {"median": 1.0}}}]


def test_a_process_that_dies_costs_its_cell_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"table": 2, "key": f"2/{n}"} for n in "abcd"]
    found, tasks = measured(monkeypatch, cells, [[*done("2/a"), {"begin": "2/b"}, -9], [*done("2/c"), *done("2/d")]])
    assert [found[f"2/{n}"]["status"] for n in "abcd"] == ["done", "failed", "done", "done"]
    assert "status -9" in found["2/b"]["error"]
    assert [cell["key"] for cell in tasks[1]["cells"]] == ["2/c", "2/d"]


def step(provider: str, recompute: str) -> dict[str, Any]:
    return {"table": 3, "key": f"3/7b/{provider}/1", "provider": provider, "recompute": recompute}


def test_a_step_out_of_memory_tries_the_next_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"key": "3/7b/ours/1", "status": "out of memory", "error": "x"}
    cells = [step("ours", "none"), step("peer", "none")]
    theirs = {**full, "key": "3/7b/peer/1"}
    found, tasks = measured(monkeypatch, cells, [[full], [full], [full], [theirs], done("3/7b/peer/1")])
    assert found["3/7b/ours/1"]["status"] == "out of memory" and found["3/7b/peer/1"]["status"] == "done"
    tried = ["none", "selective", "full", "none", "full"]  # transformers has no selective
    assert [task["recompute"] for task in tasks] == tried


def test_the_time_limit_leaves_the_rest_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"table": 1, "key": "1/a"}, {"table": 1, "key": "1/b"}]
    found, _ = measured(monkeypatch, list(cells), [[*done("1/a"), TimeoutError]])
    assert list(found) == ["1/a"]
    found, _ = measured(monkeypatch, list(cells), [[{"begin": "1/a"}, TimeoutError]])
    assert found["1/a"]["error"] == "longer than --limit-s"  # it had the whole call: it would never end
    found, tasks = measured(monkeypatch, list(cells), [], limit_s=1.0)
    assert found == {} and tasks == []  # too late to begin


def test_an_interruption_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"gpu": "NVIDIA H200", "memory": 150 * 10**9, "versions": {}}
    monkeypatch.setattr(main, "probe", lambda device, log: machine)
    monkeypatch.setattr(main, "Worker", FakeWorker)
    copied = [{"begin": "1/copy"}, {"key": "1/copy", "status": "done", "values": {
        "ms": {"median": 1.0, "p20": 1.0, "p80": 1.0}, "rate": 4.3e12}}]  # fmt: skip
    FakeWorker.scripts, FakeWorker.tasks = [[*copied, KeyboardInterrupt], [TimeoutError]], []
    arguments = ["--tables", "1", "--out", str(tmp_path), "--date", "2026-11-26"]
    assert main.main(arguments) == 130
    assert main.main(arguments) == main.CELLS_LEFT
    assert "1/copy" not in [cell["key"] for cell in FakeWorker.tasks[1]["cells"]]
    shown = capsys.readouterr()
    assert "4.3 TB/s" in shown.out and "6 of 7 cells are left" in shown.err
    assert "4.3 TB/s" in (tmp_path / "2026-11-26-h200.md").read_text()


def test_what_cannot_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--tables", "1,7"], "'1,7' is not a list of numbers from 1 to 5"),
        (["--date", "today"], "'today' is no date"),
        (["--limit-s", "0"], "must be above 0"),
        (["--optimizer", "sgd"], "'sgd' is not known"),
    ):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert "example: " in capsys.readouterr().out.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------ shapes, counts


def test_the_samples_are_one_pack() -> None:
    assert sum(tokens for tokens, _ in shapes.SAMPLES) == 16384 and sum(tiles for _, tiles in shapes.SAMPLES) == 28
    assert shapes.padded_positions("cuda") == 4 * 4096 + 4 * 2688
    text = 16384 - 28 * 256
    assert sum(shapes.lengths("nvlm_d", "cuda", 256)) == 16384
    assert sum(shapes.lengths("nvlm_x", "cuda", 256)) == text
    assert sum(shapes.lengths("nvlm_h", "cuda", 256)) == text + 6 * 256  # six samples with a picture


def test_useful_operations_and_mfu() -> None:
    """kernels at the 7B shape: 641 body, 40 attention (at 4096 tokens a document), 54 head, 13 projector, 334 tower."""
    recipe = shapes.make_recipe("cuda", "7b")
    whole, without = shapes.operations(recipe, "cuda")
    tower = 28 * vision_forward_flops(recipe.model.vision)
    assert whole - without == pytest.approx(tower, rel=1e-12) and tower == pytest.approx(334e12, rel=0.01)
    lm, attention = recipe.model.language_model, 0.0
    for tokens, _ in shapes.SAMPLES:
        attention += 6.0 * lm.num_hidden_layers * tokens**2 * lm.hidden_size
    assert without - attention == pytest.approx((641 + 54 + 13) * 1e12, rel=0.01)
    assert results.mfu(990e12, 2.0, 990.0) == 0.5
    assert results.mfu(1.0, 1.0, None) is None
    assert results.peak_tflops("NVIDIA H200") == results.peak_tflops("NVIDIA H100 80GB HBM3") == 990.0
    assert results.peak_tflops("NVIDIA H100 PCIe") is None and results.peak_tflops("cpu") is None


def test_a_row_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "implementations", lambda: ())
    row = shapes.fit("7b", "cuda", 150 * 10**9, None)  # an H200
    assert row["decoder"] == "3b" and row["tower_layers"] == 45
    assert "a 3B shape, because 7B does not fit this device with fp32 masters" in row["note"]
    assert shapes.fit("7b", "cuda", 10**12, None)["decoder"] == "7b"
    small = shapes.fit("1.5b", "cuda", 55 * 10**9, None)
    layers = small["tower_layers"]
    assert 1 <= layers < 45 and small["recompute"] == "full" and f"{layers} of 45 layers" in small["note"]
    fits, more = (
        shapes.needed(shapes.make_recipe("cuda", "1.5b", recompute="full", tower_layers=n))
        for n in (layers, layers + 1)
    )
    assert fits <= shapes.FILLED * 55e9 < more


def test_the_providers_take_turns() -> None:
    keys = [cell["key"] for cell in main.plan((3, 4, 5), "cuda", 10**12, 2)]
    assert keys[:3] == ["3/1.5b/ours/1", "3/1.5b/torch/1", "3/1.5b/peer/1"]
    assert keys[6:9] == ["3/1.5b/torch/2", "3/1.5b/peer/2", "3/1.5b/ours/2"]
    assert keys[12:15] == ["4/nvlm_d/ours/1", "4/nvlm_x/ours/1", "4/nvlm_h/ours/1"] and len(set(keys)) == 18


@pytest.mark.parametrize("architecture", ["nvlm_d", "nvlm_x", "nvlm_h"])
def test_the_step_at_full_size(architecture: str) -> None:
    """Sizes alone: every parameter gets a value, every image token has one place, the same text is trained in all."""
    recipe = shapes.make_recipe("cuda", "7b", architecture=architecture)
    wanted = step_cells.shapes_of(recipe)
    assert sum(math.prod(shape) for shape in wanted.values()) == sum(count_parameters(recipe.model).values())
    batch = step_cells.make_batch(recipe, "cuda")
    assert tuple(batch.tiles.shape) == (28, 3, 448, 448) and batch.num_trained_tokens == 3627
    slots = batch.image_slots[batch.image_slots >= 0].tolist()
    if batch.memory is not None:
        assert batch.memory.max_queries <= batch.max_seqlen
        slots += batch.memory.slots[batch.memory.slots >= 0].tolist()
        text = batch.cu_seqlens[4:6].tolist()  # the fifth sample has no picture: nothing of it reads
        reads = batch.memory.query_rows
        assert not ((reads >= text[0]) & (reads < text[1])).any()
    assert sorted(slots) == ([] if architecture == "nvlm_x" else list(range(28 * 256)))


def test_the_spread() -> None:
    assert worker.spread([3.0, 1.0, 2.0]) == pytest.approx({"median": 2.0, "p20": 1.4, "p80": 2.6, "runs": 3})


# --------------------------------------------------------------------------------------------------------------- goals


def kernel(ours: float, other: float, amount: str = "bytes") -> dict[str, Any]:
    """A kernel cell: milliseconds of ours and of all others, for 4.3e9 bytes or 8e11 operations."""
    timed = {"error": 1e-3, "wrong": False, "peak_mib": 1.0}
    part = {"p20": 1.0, "p80": 1.0}
    providers = {
        name: timed | {step: {"median": took, **part} for step in ("forward", "backward", "both")}
        for name, took in (("eager", other), ("torch.compile", other), ("liger", other), ("ours", ours))
    }
    amounts = (
        {"bytes": [2.15e9, 2.15e9], "flop": [0.0, 0.0]}
        if amount == "bytes"
        else {"bytes": [0, 0], "flop": [3e11, 5e11]}
    )
    return {"status": "done", "values": {"providers": providers, **amounts}}


def step_cell(took: float, decoder: str = "7b", peak: float = 100.0) -> dict[str, Any]:
    values = {"times": [took] * 3, "ms": {}, "tokens": 16384, "tiles": 28, "positions": 16384, "flop": 990e12,
              "flop_without_tower": 660e12, "peak": peak, "predicted": {"total": 95.0}, "loss": 1.0, "note": "",
              "recompute": "none", "decoder": decoder, "parts": {"vision": 300.0}}  # fmt: skip
    return {"status": "done", "values": values}


def verdicts(cells: dict[str, Any], **about: Any) -> dict[str, tuple[str, str]]:
    return {text: (verdict, found) for text, verdict, found in report.goals({**ABOUT, "cells": cells, **about})}


def test_goals_are_met_not_met_or_not_measured() -> None:
    step_goal = "a step at the 7B shape takes at most 1 / 1.5 of the peer's way's time"
    nothing = verdicts({})
    assert {verdict for verdict, _ in nothing.values()} == {"not measured"} and len(nothing) == 13
    cells = {
        "1/copy": {"status": "done", "values": {"rate": 4.3e12}},
        "2/rms_norm 16384x3584": kernel(1.1, 1.2),  # 91 % of the copy
        "2/add_rms_norm a": kernel(1.1, 1.2),
        "2/add_rms_norm b": kernel(1.2, 1.1),  # 83 %, slower than torch.compile: the worst shape counts
        "2/linear_cross_entropy 16384x3584x152064, 100 % labelled": kernel(2.0, 2.1, "flop"),
        "2/linear_cross_entropy 16384x3584x152064, 20 % labelled": kernel(1.0, 2.9, "flop"),
        "3/7b/ours/1": step_cell(1900.0),
        "3/7b/peer/1": step_cell(2900.0),
    }
    found = verdicts(cells)
    assert found[step_goal] == ("met", "1.53 times as fast")
    assert found["at least 50 % MFU at the 7B shape"] == ("met", "52.6%")
    assert found["rms_norm: 85% of the copy's rate"] == ("met", "91% at the worst shape")
    assert found["add_rms_norm: 85% of the copy's rate"][0] == "not met"
    assert found["rms_norm: no slower than torch.compile"][0] == "met"
    assert found["add_rms_norm: no slower than torch.compile"] == ("not met", "0.92 times as fast at the worst shape")
    assert found["loss, all rows labelled: faster than Liger's fused one"][0] == "met"
    assert found["loss, 20 % labelled: 3 times as fast as Liger's"][0] == "not met"
    assert found["splice: 80% of the copy's rate"] == ("not measured", "not run")
    assert found["memory predicted within 10 %"] == ("met", "off by 5% at the worst row")

    at_3b = verdicts({"3/7b/ours/1": step_cell(1900.0, "3b"), "3/7b/peer/1": step_cell(2900.0, "3b", peak=200.0)})
    assert at_3b[step_goal] == ("not measured", "not at 7B; at 3B: 1.53 times as fast")
    cells["3/7b/peer/1"]["values"]["loss"] = 1.02
    assert verdicts(cells)[step_goal] == ("not measured", "first losses differ")
    assert at_3b["memory predicted within 10 %"][0] == "met"  # the peer's is not predicted
    assert {verdict for verdict, _ in verdicts(cells, device="cpu").values()} == {"not measured"}


def test_the_page_says_what_is_missing_and_why(tmp_path: Path) -> None:
    wrong = kernel(1.0, 1.0)
    wrong["values"]["providers"]["ours"] = {"error": 0.2, "wrong": True}
    wrong["values"]["providers"]["liger"] = {"na": "liger_kernel is not installed"}
    wrong["values"]["providers"]["eager"] = {"failed": "out of memory"}
    run = opened(tmp_path, dirty=True).run
    run["cells"] = {"2/splice a": wrong, "3/7b/peer/1": {"status": "out of memory"}, "3/7b/ours/1": step_cell(1900.0)}
    page = report.render(run)
    assert "**with local changes**" in page and "Commit abc" in page
    assert "| splice a | ours | WRONG: 2.0e-01 of the norm |" in page
    assert "n/a (liger_kernel is not installed)" in page and "| splice a | eager | out of memory |" in page
    assert "| 7B | the peer's way | out of memory |" in page and "| 7B | ours, kernels: torch | not run yet |" in page
    assert "52.6% | 35.1%" in page  # MFU with the tower's forward, and without
    assert "says how fast" not in page and "Proof of the harness" in report.render({**run, "device": "cpu"})


# ----------------------------------------------------------------------------------------------------------- real cells


def test_a_wrong_provider_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * w

    def crash(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    case = kernel_cells.Case(
        lambda g: [torch.randn(3, 4, generator=g), torch.randn(4, generator=g)],
        {"eager": right, "torch.compile": crash, "liger": "no such op", "ours": lambda x, w: x * w + 1e-3 * x},
        kernel_cells._plain(right),
        bytes=(1.0, 1.0),
    )
    monkeypatch.setattr(kernel_cells, "make_case", lambda *arguments: case)
    monkeypatch.setattr(kernel_cells, "_compiled", lambda function, device: function)
    found = kernel_cells.measure("rms_norm 8x24", "cpu")["providers"]
    assert found["eager"]["both"]["median"] > 0 and not found["eager"]["wrong"]
    assert found["ours"]["wrong"] and "both" not in found["ours"]
    assert found["liger"] == {"na": "no such op"} and found["torch.compile"] == {"failed": "out of memory"}


def test_the_references_in_pieces_are_the_plain_ones() -> None:
    """The loss's fp64 reference is written out, in pieces; every other is the op's own PyTorch version in fp64."""
    for share in (100, 20):
        case = kernel_cells.make_case("linear_cross_entropy", (24, 16, 67), share, "cpu")
        leaves = [leaf.double() for leaf in case.leaves(torch.Generator().manual_seed(3))]
        (loss,), grads = case.reference(leaves, [torch.tensor(0.5)])
        own = [leaf.requires_grad_() for leaf in leaves]
        plain = case.run["eager"](*own)  # type: ignore[operator]
        torch.testing.assert_close(plain.double(), loss, rtol=1e-6, atol=0)  # its softmax is in fp32
        for a, b in zip(torch.autograd.grad(plain, own, torch.tensor(0.5)), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_out_of_memory_ends_a_cell_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cell: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
        if cell["key"] == "a":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if cell["key"] == "b":
            raise ValueError("broken")
        return {"ms": 1}

    monkeypatch.setattr(worker, "_run", run)
    told: list[dict[str, Any]] = []
    worker.work({"device": "cpu", "cells": [{"key": key} for key in "abc"]}, told.append)
    assert [m["status"] for m in told if "status" in m] == ["out of memory", "failed", "done"]


def test_tiny_cells_really_run_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ceiling, a kernel in the interpreter, and steps of ours and of the peer's way, which compute the same loss."""
    pytest.importorskip("transformers", reason="transformers is not installed (scripts/install does)")
    kept = ("1/copy", "2/rms_norm 8x24", "3/1.5b/ours/1", "3/1.5b/peer/1")
    whole = main.plan
    monkeypatch.setattr(main, "plan", lambda *a: [cell for cell in whole(*a) if cell["key"] in kept])
    machine = {"gpu": "cpu", "memory": None, "versions": {}}
    monkeypatch.setattr(main, "probe", lambda device, log: machine)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--date", "2026-11-26"]
    assert main.main(arguments) == 0, capsys.readouterr().err
    page = capsys.readouterr().out
    run = json.loads((tmp_path / "2026-11-26-cpu.json").read_text())["runs"][0]
    assert {key: cell["status"] for key, cell in run["cells"].items()} == dict.fromkeys(kept, "done")
    assert "Proof of the harness" in page and "## Goals" in page
    kernel_found = run["cells"]["2/rms_norm 8x24"]["values"]["providers"]
    if "na" not in kernel_found["ours"]:  # Triton is installed
        assert kernel_found["ours"]["both"]["median"] > 0 and kernel_found["ours"]["error"] < 1e-6  # seen 1.1e-7
    ours, peer = (run["cells"][f"3/1.5b/{name}/1"]["values"] for name in ("ours", "peer"))
    assert (ours["tokens"], ours["tiles"], ours["positions"], peer["positions"]) == (512, 28, 512, 848)
    for a, b in zip(ours["losses"], peer["losses"], strict=True):  # three steps: gradients and optimizer too
        assert a == pytest.approx(b, rel=1e-6)  # seen 8.3e-8
    assert ours["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-6)  # seen 1.4e-9
    assert ours["losses"][2] < ours["losses"][0]
    monkeypatch.setattr(main, "Worker", None)  # nothing is left to run
    assert main.main(arguments) == 0


def test_the_command_starts(tmp_path: Path) -> None:
    command = Path(__file__).parents[2] / "scripts" / "bench" / "gpu"
    shown = subprocess.run([sys.executable, command, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: scripts/bench/gpu") and "example: " in shown
