"""The hang watch: silent while the rank gets on, loud when it does not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from nvlm_train.train.watch import HangWatch


def test_a_stuck_rank_tells_where_and_ends(tmp_path: Path) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    def stuck_in_a_collective() -> None:
        ended.wait(20)

    file = tmp_path / "stacks.txt"
    with HangWatch(0.3, file, end) as watch:
        for _ in range(8):  # longer than the limit in all, never silent for so long
            time.sleep(0.1)
            watch.alive()
        assert not codes
        stuck_in_a_collective()
    assert codes == [1]
    text = file.read_text()
    assert "no step has ended for" in text and "distributed.hang_s is 0.3" in text
    assert "stuck_in_a_collective" in text


def test_it_ends_with_the_run(tmp_path: Path) -> None:
    before = threading.active_count()
    with HangWatch(60, tmp_path / "stacks.txt", lambda code: None):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before and not (tmp_path / "stacks.txt").exists()
