"""`nvlm-train report`: numbers checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvlm_train import cli, report


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Killed in step 9, a while after its heartbeat, with a checkpoint of step 6 (4 ranks); requeued on 2 ranks and
    stopped after step 10; then running. Logged every 2 steps of 5 s."""
    (tmp_path / "recipe.json").write_text("{}")
    records = [
        {"step": n, "seconds": 10.0, "loss": 3.0 - n / 10, "tokens_per_s": 1234.0, "time": {"data": 1.5}}
        for n in (2, 4, 6, 8, 10)
    ]
    lines = [json.dumps(record) for record in records] + ['{"step": 10, "validation": {"held": 1.5}}', '{"step": 1']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    attempts = tmp_path / "attempts"
    write(attempts / "7.0" / "begin.json", {"started": 1000.0, "from_step": 0, "world_size": 4, "nodes": ["a", "b"]})
    write(attempts / "7.0" / "heartbeat.json", {"time": 1100.0, "step": 3, "first_step_began": 1020.0})
    write(
        attempts / "7.1" / "begin.json",
        {"started": 2000.0, "from_step": 6, "world_size": 2, "nodes": ["a"], "logged_step": 8},
    )
    write(attempts / "7.1" / "end.json", {"outcome": "stopped", "reason": "SIGUSR2", "ended": 2050.0, "last_step": 10,
                                          "first_step_began": 2010.0})  # fmt: skip
    write(attempts / "7.2" / "begin.json", {"started": 3000.0, "from_step": 10, "world_size": 2, "nodes": ["a"]})
    write(attempts / "7.2" / "heartbeat.json", {"time": 3030.0, "step": 11})
    (attempts / "empty").mkdir()
    (tmp_path / "step_10").mkdir()
    (tmp_path / "step_10" / "COMMITTED").touch()
    return tmp_path


def test_where_the_time_went(run: Path) -> None:
    found = report.describe(run, now=3040.0)
    first, second, third = found["attempts"]
    assert (first["outcome"], second["outcome"], third["outcome"]) == ("killed", "stopped", "running")
    assert (first["last_step"], first["lost_steps"], second["lost_steps"]) == (8, 2, 0)
    assert (first["seconds"], second["seconds"], third["seconds"]) == (100.0, 50.0, 40.0)
    assert (first["kept_s"], second["kept_s"], third["kept_s"]) == (30.0, 20.0, 0.0)
    assert first["redone_s"] == pytest.approx(10.0) and (first["startup_s"], third["startup_s"]) == (20.0, None)
    assert found["goodput"] == pytest.approx((4 * 30 + 2 * 20) / (4 * 100 + 2 * 50 + 2 * 40))
    assert found["damaged_lines"] == 1 and found["step"] == found["newest_checkpoint"] == 10
    text = report.text_of(found)
    assert "validation held 1.5000" in text and "1 lines of metrics.jsonl are no records" in text
    whole = "0:03:10 in 3 attempts: 0:00:50 in steps that were kept (0:00:08 of it waiting for data), "
    assert f"{whole}0:00:30 start-up, about 0:00:10 in 2 steps" in text
    assert f"goodput     {found['goodput']:.1%}" in text
    assert report.describe(run, now=9999.0)["attempts"][2]["outcome"] == "killed"


def test_the_command(run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any) -> None:
    assert cli.main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lost_steps"] == 2
    old = tmp_path_factory.mktemp("old")
    assert cli.main(["report", str(old)]) == 2
    assert "neither recipe.json nor attempts/" in capsys.readouterr().err
    (old / "recipe.json").write_text("{}")
    assert cli.main(["report", str(old)]) == 0
    assert "no attempts are on record" in capsys.readouterr().out
    assert cli.main(["report", str(old / "nowhere")]) == 2
