"""Sources behind URLs, by fsspec: its memory file system, and HTTP from a server on this machine."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from corpus import make_recipe, turns, write_image, write_rows
from nvlm_train.data import index
from nvlm_train.data.images import BadSample
from nvlm_train.data.plan import open_data
from nvlm_train.data.sources import ImageRef, files
from nvlm_train.errors import DataError
from test_formats import cauldron, members_of, samples, source_of, widths, write_parquet, write_tar

fsspec = pytest.importorskip("fsspec")


class Ranges(SimpleHTTPRequestHandler):
    """Files with byte ranges, as object stores have them. `asked` keeps the ranges; `fail` refuses so many requests."""

    asked: ClassVar[list[tuple[str, int, int]]] = []
    fail = 0
    knows_ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()
            return
        if Ranges.fail:
            Ranges.fail -= 1
            self.send_error(503)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self.knows_ranges:
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            Ranges.asked.append((path.name, begin, end))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
            data = data[begin:end]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    Ranges.asked, Ranges.fail, Ranges.knows_ranges = [], 0, True
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()


def fill(folder: Path) -> None:
    rows = [{"image": write_image(folder / f"{k}.png", 3 + k, 4), "messages": turns(f"{k}", "yes")} for k in range(5)]
    write_rows(folder / "a.jsonl", rows)
    for k in range(2):
        write_tar(folder / f"t-{k}.tar", [m for i in range(3) for m in members_of(f"{k}{i}", f"{k}{i}")])
    write_parquet(folder / "p.parquet", cauldron(7))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    fill(tmp_path / "data")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "data"), "/bucket", recursive=True)
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def check(url: str, tars: str) -> None:
    rows = source_of(f"{url}/a.jsonl", "jsonl")
    assert [widths(sample) for sample in samples(rows)] == [[3 + k] for k in range(5)]
    assert [sample.messages[0]["content"][-1]["text"] for sample in samples(source_of(tars, "webdataset"))] == [
        f"\n{k}{i}" for k in range(2) for i in range(3)
    ]
    found = samples(source_of(f"{url}/p.parquet", "hf"))
    assert [len(sample.images) for sample in found] == [k % 3 for k in range(7)]


def test_memory(memory: str) -> None:
    check(memory, f"{memory}/t-{{0..1}}.tar")
    check(memory, memory)  # the folder's tars
    check(memory, f"{memory}/t-*.tar")


def test_http(tmp_path: Path, server: str) -> None:
    fill(tmp_path)
    check(server, f"{server}/t-{{0..1}}.tar")


def test_a_sample_is_one_range(tmp_path: Path, server: str) -> None:
    """Indexing goes through a tar in large pieces; training asks for exactly the bytes of a sample."""
    fill(tmp_path)
    source = source_of(f"{server}/t-{{0..1}}.tar", "webdataset")
    Ranges.asked.clear()
    records = [record for unit in source.units() for record in source.scan(unit)]
    assert len(Ranges.asked) == 2
    Ranges.asked.clear()
    row = {"position": (1 << 40) | records[4].offset, "num_bytes": records[4].num_bytes, "hash": records[4].hash}
    source.sample(row)
    assert Ranges.asked == [("t-1.tar", records[4].offset, records[4].offset + records[4].num_bytes)]


def test_a_server_without_ranges_and_one_that_fails(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    fill(tmp_path)
    source = source_of(f"{server}/a.jsonl", "jsonl")
    data = (tmp_path / "a.jsonl").read_bytes()
    Ranges.fail = 2
    assert source.file(0).read(5, 10) == data[5:15]
    Ranges.fail = 9
    with pytest.raises(OSError, match=r"a\.jsonl: bytes 5 to 15"):
        source.file(0).read(5, 10)
    Ranges.fail, Ranges.knows_ranges = 0, False
    assert source.file(0).read(5, 10) == data[5:15]


def test_trained_from_memory_as_from_disk(tmp_path: Path, memory: str) -> None:
    """The same rows and the same samples; and what has vanished is a bad sample, not a crash."""

    def plan(root: str, out: str) -> Any:
        mixture = {
            "rows": {"path": f"{root}/a.jsonl"},
            "tars": {"kind": "webdataset", "path": f"{root}/t-{{0..1}}.tar"},
            "table": {"kind": "hf", "path": f"{root}/p.parquet"},
        }
        return open_data(make_recipe(tmp_path, mixture, output_dir=str(tmp_path / out)), rank=0, world_size=1)

    here, there = plan(str(tmp_path / "data"), "run1"), plan(memory, "run2")
    assert here.fingerprint == there.fingerprint
    for ref in here.draws(0):
        one, two = here.load(ref), there.load(ref)
        assert one.rendered.input_ids.tolist() == two.rendered.input_ids.tolist()
        assert [t.tobytes() for t in one.tiles] == [t.tobytes() for t in two.tiles]
    fsspec.filesystem("memory").rm("/bucket/2.png")
    lost = next(ref for step in range(4) for ref in there.draws(step) if ref.source == "rows" and ref.row == 2)
    with pytest.raises(BadSample) as error:
        there.load(lost)
    assert error.value.reason == "missing image"
    fsspec.filesystem("memory").rm("/bucket/a.jsonl")
    with pytest.raises(BadSample) as error:
        there.load(lost)
    assert error.value.reason == "missing file"


def test_remote_paths_stay_in_the_root(memory: str) -> None:
    source = source_of(f"{memory}/a.jsonl", "jsonl")
    assert source.image_path("0.png") == f"{memory}/0.png"
    for outside in ("../x.png", "/etc/passwd", "memory://other/x.png", f"{memory}/../x.png", "s3://a/b.png"):
        with pytest.raises(BadSample, match="lies outside"):
            source.image_path(outside)
    assert isinstance(source.located(samples(source)[0]).images[0], ImageRef)


def test_unknown_urls(memory: str) -> None:
    for url in (f"{memory}/none.jsonl", "nosuchscheme://x/a.jsonl"):
        with pytest.raises(DataError, match=r"cannot open"):
            source_of(url, "jsonl")


def test_a_changed_remote_file_is_indexed_anew(tmp_path: Path, memory: str) -> None:
    recipe = make_recipe(tmp_path, {"rows": {"path": f"{memory}/a.jsonl"}})
    first = index.build_index(recipe)["rows"]
    rows = write_rows(tmp_path / "b.jsonl", [{"messages": turns("new", "yes")}])
    fsspec.filesystem("memory").put(str(rows), "/bucket/a.jsonl")
    second = index.build_index(recipe)["rows"]
    assert (len(first.rows), len(second.rows), first.key != second.key) == (5, 1, True)
