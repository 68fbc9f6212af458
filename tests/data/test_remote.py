"""Sources behind URLs, by fsspec: its memory file system, and HTTP from a server on this machine."""

from __future__ import annotations

import os
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from corpus import make_recipe, turns, write_image, write_rows
from nvlm_train.data import index
from nvlm_train.data.images import BadSample
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.data.sources import ImageRef, block_cache, files
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema
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
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
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


@pytest.mark.parametrize("path", ["nowhere.tar", "nowhere.jsonl"])
def test_why_a_url_cannot_be_opened(server: str, path: str) -> None:
    kind = "webdataset" if path.endswith("tar") else "jsonl"
    with pytest.raises(DataError, match=rf"cannot open {server}/{path} \(404, message='File not found'"):
        source_of(f"{server}/{path}", kind)
    with pytest.raises(DataError, match=r"cannot open http://127.0.0.1:9/a.tar \(Cannot connect to host 127.0.0.1:9"):
        source_of("http://127.0.0.1:9/a.tar", "webdataset")


def test_a_server_without_ranges_and_one_that_fails(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    for _ in range(3):
        assert source.file(0).read(5, 10) == data[5:15]
    (warning,) = (record.getMessage() for record in caplog.records if "ignores byte ranges" in record.getMessage())
    assert (
        f"source 's': the server of {server}/a.jsonl ignores" in warning and f"this one: {len(data)} bytes" in warning
    )


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


def test_a_prepared_folder_behind_a_url_is_not_taken_without_its_split(memory: str) -> None:
    """Its tars would be those of all splits: validation would be trained on."""
    fsspec.filesystem("memory").pipe("/bucket/.nv-meta/split.yaml", b"{}")
    with pytest.raises(DataError, match=r"was prepared by Energon, whose \.nv-meta is only read on a local path"):
        source_of(memory, "webdataset")
    assert len(source_of(f"{memory}/t-{{0..1}}.tar", "webdataset").files) == 2


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


# ------------------------------------------------------------------------------------------------ groups and the cache


def fill_shards(folder: Path, tars: int, each: int) -> None:
    for k in range(tars):
        write_tar(folder / f"s-{k:03}.tar", [m for i in range(each) for m in members_of(f"{k}_{i}", f"{k} {i}")])


def plan_of(folder: Path, url: str, tars: int, world_size: int = 1, **changes: Any) -> list[DataPlan]:
    source = {"kind": "webdataset", "path": f"{url}/s-{{000..{tars - 1:03}}}.tar", "shards_per_group": 4}
    recipe = make_recipe(folder, {"tars": {**source, **changes.pop("source", {})}}, **changes)
    return [open_data(recipe, rank=rank, world_size=world_size) for rank in range(world_size)]


def tars_asked(plan: DataPlan, steps: range) -> list[str]:
    """The tar of every request that loading some steps makes."""
    Ranges.asked.clear()
    for step in steps:
        for ref in plan.draws(step):
            plan.load(ref)
    return [name for name, _, _ in Ranges.asked]


def test_a_stretch_of_samples_touches_the_shards_of_its_groups(tmp_path: Path, server: str) -> None:
    """24 tars of 8 samples, 4 tars a group, steps of 16: two steps ask 4 tars where the order of rows asks nearly all;
    an epoch asks every sample once, by a range of its own."""
    fill_shards(tmp_path, 24, 8)
    (groups,) = plan_of(tmp_path, server, 24)
    for first in range(0, 12, 2):
        asked = tars_asked(groups, range(first, first + 2))
        assert len(asked) == 32 and len(set(asked)) == 4
    (rows,) = plan_of(tmp_path, server, 24, source={"shuffle": "rows"})
    assert len(set(tars_asked(rows, range(2)))) > 12
    assert rows.fingerprint != groups.fingerprint
    (other,) = plan_of(tmp_path, server, 24, source={"shards_per_group": 5})
    assert other.fingerprint not in (groups.fingerprint, rows.fingerprint)
    (local,) = plan_of(tmp_path, str(tmp_path), 24)  # auto: files of this machine come in the order of rows
    assert local.fingerprint == rows.fingerprint
    (named,) = plan_of(tmp_path, str(tmp_path), 24, source={"shuffle": "shard_groups"})
    assert named.fingerprint == groups.fingerprint  # where it lies is no part of it
    assert [named.draws(step) for step in range(8)] == [groups.draws(step) for step in range(8)]


def test_parquet_by_groups_of_row_groups(tmp_path: Path) -> None:
    """60 row groups of 3 rows, of which 4 may be kept decoded: each is decoded once in an epoch, not once a sample."""
    write_parquet(tmp_path / "p.parquet", [{"question": f"q {k}", "answer": "yes"} for k in range(180)])

    def decoded(**source: Any) -> int:
        mixture = {"t": {"kind": "hf", "path": str(tmp_path / "p.parquet"), **source}}
        plan = open_data(make_recipe(tmp_path, mixture), rank=0, world_size=1)
        opened: Any = plan.sources["t"]
        count = 0
        reader = opened._reader

        def counted(k: int) -> Any:
            nonlocal count
            count += 1
            return reader(k)

        opened._reader = counted
        opened._tables.clear()
        for step in range(8):
            for ref in plan.draws(step):
                plan.load(ref)
                while len(opened._tables) > 4:
                    opened._tables.popitem(last=False)
        return count

    assert decoded(shuffle="shard_groups", shards_per_group=4) <= 128 / 3 + 4  # measured 44
    assert decoded() > 100  # of 128 samples


@pytest.mark.parametrize("packs", [False, True])
def test_groups_give_the_same_batches_on_any_ranks_and_from_anywhere(tmp_path: Path, packs: bool) -> None:
    fill_shards(tmp_path, 24, 8)
    changes: dict[str, Any] = {"source": {"shuffle": "shard_groups"}, "max_steps": 12}
    if packs:
        changes["global_batch"] = {"packs": 6}
    (alone,) = plan_of(tmp_path, str(tmp_path), 24, **changes, output_dir=str(tmp_path / "one"))
    whole = [sorted(ref for pack in alone.plan_step(step) for ref in pack.samples) for step in range(12)]
    for world_size in (2, 3, 4):
        ranks = plan_of(tmp_path, str(tmp_path), 24, world_size, **changes)
        for step in (7, 0, 11):
            found = [
                ref
                for plan in ranks
                for dealt in plan.deal_step(step)
                for pack in dealt[plan.rank]
                for ref in pack.samples
            ]
            assert sorted(found) == whole[step]
        assert {plan.fingerprint for plan in ranks} == {alone.fingerprint}


def test_the_cache_asks_for_each_block_once_on_a_machine(tmp_path: Path, server: str) -> None:
    """Tars of less than a block: an epoch is one request a tar instead of one a sample, and the next rank asks none."""
    fill_shards(tmp_path, 8, 16)
    cache = {"path": str(tmp_path / "cache"), "max_gib": 1}
    (plan,) = plan_of(tmp_path, server, 8, data__remote_cache=cache)
    (plain,) = plan_of(tmp_path, server, 8)
    assert plan.fingerprint == plain.fingerprint
    assert sorted(tars_asked(plan, range(8))) == [f"s-{k:03}.tar" for k in range(8)]
    again = pickle.loads(pickle.dumps(plan.sources["tars"]))  # as the loader process gets it
    Ranges.asked.clear()
    for ref in plan.draws(3):
        row = plan.indexes["tars"].rows[ref.row]
        assert again.sample(row).messages == plain.sources["tars"].sample(row).messages
    assert len(Ranges.asked) == len(plan.draws(3))  # those of `plain`


def test_the_cache_gives_the_bytes_of_the_file(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any range over 5 blocks of 100 bytes; missing neighbours are one request; damage is fetched again; a file that
    changed never answers from before; and above the limit the oldest go."""
    monkeypatch.setattr(block_cache, "BLOCK", 100)
    data = bytes(np.random.default_rng(0).integers(0, 256, 450, dtype=np.uint8))
    (tmp_path / "a.bin").write_bytes(data)
    folder = tmp_path / "cache"
    settings = schema.RemoteCache(path=str(folder), max_gib=1.0)
    cache = block_cache.BlockCache(settings)
    file = files.ByteFile("s", f"{server}/a.bin")
    Ranges.asked.clear()
    assert cache.read(file, 130, 20) == data[130:150]
    assert cache.read(file, 90, 400) == data[90:]
    assert Ranges.asked == [("a.bin", 100, 200), ("a.bin", 0, 100), ("a.bin", 200, 450)]
    draw = np.random.default_rng(1)
    for begin, length in draw.integers(0, 460, (200, 2)).tolist():
        assert cache.read(file, begin, length) == data[begin : begin + length]
    assert len(Ranges.asked) == 3
    one = next(path for path in folder.rglob("*") if path.is_file())
    one.write_bytes(one.read_bytes()[:-1] + b"x")
    assert cache.read(file, 0, 450) == data and len(Ranges.asked) == 4
    new = data[::-1]
    (tmp_path / "a.bin").write_bytes(new)
    os.utime(tmp_path / "a.bin", (1, 1))
    assert cache.read(files.ByteFile("s", f"{server}/a.bin"), 0, 450) == new
    small = block_cache.BlockCache(settings.model_copy(update={"max_gib": 500 / (1 << 30)}))
    os.utime(tmp_path / "a.bin", (2, 2))
    for begin in range(0, 450, 100):
        small.read(files.ByteFile("s", f"{server}/a.bin"), begin, 50)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 500


def test_a_cache_that_cannot_be_written_costs_nothing_but_speed(tmp_path: Path, server: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "cache").write_text("a file, no folder")
    cache = block_cache.BlockCache(schema.RemoteCache(path=str(tmp_path / "cache"), max_gib=1.0))
    for _ in range(2):
        assert cache.read(files.ByteFile("s", f"{server}/a.bin"), 2, 3) == b"234"


def test_many_writers_share_a_cache_that_is_too_small(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches that know nothing of each other, as in several processes: always the right bytes, and the limit holds."""
    monkeypatch.setattr(block_cache, "BLOCK", 1000)
    data = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    (tmp_path / "a.bin").write_bytes(data.tobytes())
    settings = schema.RemoteCache(path=str(tmp_path / "cache"), max_gib=20_000 / (1 << 30))

    def read(seed: int) -> None:
        cache, file = block_cache.BlockCache(settings), files.ByteFile("s", f"{server}/a.bin")
        for begin in np.random.default_rng(seed).integers(0, 49_000, 40).tolist():
            assert cache.read(file, begin, 900) == data[begin : begin + 900].tobytes()

    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(read, seed) for seed in range(3)]:
            job.result()
    held = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in held) <= 20_000 * 1.15 and all("." not in path.name for path in held)
