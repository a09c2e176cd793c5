"""Rows that are streamed from many files are shared out over ranks and workers, in memory that stays as it was."""

import errno
import os
import tarfile
import time
from collections import Counter
from io import BytesIO

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from duostream.scripts.arguments import DataArguments
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.data import load_rows
from duostream.scripts.sources import read_patiently

# To stream more of them: docs/large_data.md has the command
NUM_ROWS = int(os.environ.get("DUOSTREAM_TEST_ROWS", 100_000))
SIZES = [3, 11, 7, 1, 5, 13, 2, 9]


def picture():
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path, numbers):
    columns = {"question": [f"Which is {i}?" for i in numbers], "answer": [str(i) for i in numbers]}
    columns["image"] = [{"bytes": picture(), "path": None}] * len(numbers)
    pq.write_table(pa.table(columns), path, row_group_size=5000)


def write_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for name, content in ((f"{i:06}.jpg", picture()), (f"{i:06}.txt", str(i).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def write_shards(folder, suffix, sizes=SIZES):
    write, start = {".parquet": write_parquet, ".tar": write_tar}[suffix], 0
    for shard, size in enumerate(sizes):
        write(folder / f"train-{shard:05}{suffix}", range(start, start + size))
        start += size
    options = {"image_column": "jpg", "answer_column": "txt", "prompt": "Which?"} if suffix == ".tar" else {}
    return DataArguments(task="vqa", dataset=str(folder), streaming=True, **options)


def number_of(row):
    return int(row["completion"][0]["content"][0]["text"])


def numbers_of(batch):
    return [number_of(row) for row in batch]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_row_of_a_stream_is_read_by_one_worker_of_one_rank(tmp_path, suffix, num_workers):
    PartialState(cpu=True)
    rows = load_rows(write_shards(tmp_path, suffix), "train")
    read = []
    for rank in range(2):
        loader = DataLoader(rows, batch_size=2, num_workers=num_workers, collate_fn=numbers_of)
        # As the Trainer does, for the ranks that it doesn't have here
        own = prepare_data_loader(loader, num_processes=2, process_index=rank, dispatch_batches=False)
        read.append([number for batch in own.base_dataloader for number in batch])
    assert all(len(numbers) < sum(SIZES) for numbers in read)
    assert Counter(read[0] + read[1]) == Counter(range(sum(SIZES)))


@pytest.fixture
def short_wait(monkeypatch):
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 3)


@pytest.mark.parametrize("on_bad_rows", ["raise", "skip"])
def test_a_shard_that_disappears_while_it_is_streamed_is_tried_again_and_then_named(
    tmp_path, short_wait, caplog, on_bad_rows
):
    # Rows are read a thousand at a time
    (tmp_path / "rows").mkdir()
    args = write_shards(tmp_path / "rows", ".parquet", sizes=[2000] * 3)
    bad_rows = BadRows(tmp_path / "bad_rows.jsonl") if on_bad_rows == "skip" else None
    stream = iter(load_rows(args, "train", bad_rows=bad_rows))
    assert number_of(next(stream)) == 0
    lost = tmp_path / "rows" / "train-00002.parquet"
    lost.unlink()
    with pytest.raises(OSError, match=rf"{lost} can't be read, after 3 tries, 0\.1 s apart: .*put it back"):
        list(stream)
    assert [record.getMessage().split(". ")[-1] for record in caplog.records if str(lost) in record.getMessage()] == [
        f"Try {number} of 3 follows in 0.1 s" for number in (2, 3)
    ]


@pytest.mark.parametrize("half_first", [False, True], ids=["whole", "half first"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_each_row_of_a_shard_that_comes_back_is_read_once(
    tmp_path, monkeypatch, short_wait, suffix, num_workers, half_first
):
    rows = load_rows(write_shards(tmp_path, suffix, sizes=[40] * 4), "train")
    lost = tmp_path / f"train-00002{suffix}"
    content = lost.read_bytes()
    lost.unlink()
    waits = tmp_path / "waits"

    def wait(seconds):
        # Of the process that reads the shard: a worker, if there are any
        with waits.open("a") as file:
            file.write(f"{seconds}\n")
        is_whole = not half_first or waits.read_text().count("\n") == 2
        lost.write_bytes(content if is_whole else content[: len(content) // 2 - 99])

    monkeypatch.setattr(time, "sleep", wait)
    loader = DataLoader(rows, batch_size=4, num_workers=num_workers, collate_fn=numbers_of)
    assert Counter(number for batch in loader for number in batch) == Counter(range(160))
    assert waits.read_text() == "0.1\n" * (1 + half_first)


def test_a_shard_that_fails_half_way_is_read_on_from_where_it_was_left(short_wait):
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def rows_of(files, fails):
        for number in range(9):
            if fails and number == 4 + len(fails):
                raise fails.pop()
            yield number

    assert list(read_patiently(rows_of, files=["a.parquet"], fails=failures[:])) == list(range(9))
    with pytest.raises(OSError, match=r"^a\.parquet can't be read, after 3 tries, 0\.1 s apart: .*Stale file handle"):
        list(read_patiently(rows_of, files=["a.parquet"], fails=[*failures[:1], *failures]))


def test_a_file_that_is_broken_or_was_tried_again_already_is_not_tried_again(short_wait, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))

    def broken(files, error):
        yield 0
        raise error

    with pytest.raises(ValueError, match="no row"):
        list(read_patiently(broken, files=["a.parquet"], error=ValueError("no row")))
    with pytest.raises(OSError, match=r"^a\.parquet can't be read, after 3 tries.*Server Disconnected"):
        list(read_patiently(broken, files=["a.parquet"], error=ConnectionError("Server Disconnected")))


@pytest.mark.slow
def test_a_stream_takes_no_more_memory_after_all_its_rows_than_after_ten_thousand(tmp_path):
    args = write_shards(tmp_path, ".parquet", sizes=[10_000] * (NUM_ROWS // 10_000))
    process, used = psutil.Process(), []
    for count, _ in enumerate(load_rows(args, "train"), 1):
        if count % 10_000 == 0:
            used.append(process.memory_info().rss)
    mebibytes = [round(each / 2**20) for each in used]
    print(f"{count} rows: {mebibytes[0]} MiB after 10,000, {mebibytes[-1]} at the end, at most {max(mebibytes)}")
    assert len(used) == NUM_ROWS // 10_000 >= 2
    assert max(used) < 1.1 * used[0]
