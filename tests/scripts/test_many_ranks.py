"""Rows that are streamed from many files are shared out over ranks and workers, in memory that stays as it was."""

import tarfile
from collections import Counter
from io import BytesIO

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from duostream.scripts.arguments import DataArguments
from duostream.scripts.data import load_rows

SIZES = [3, 11, 7, 1, 5, 13, 2, 9]


def write_parquet(path, numbers):
    columns = {"question": [f"Which is {i}?" for i in numbers], "answer": [str(i) for i in numbers]}
    pq.write_table(pa.table(columns), path, row_group_size=5000)


def write_tar(path, numbers):
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for name, content in ((f"{i:06}.jpg", picture.getvalue()), (f"{i:06}.txt", str(i).encode())):
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


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_row_of_a_stream_is_read_by_one_worker_of_one_rank(tmp_path, suffix, num_workers):
    PartialState(cpu=True)
    rows = load_rows(write_shards(tmp_path, suffix), "train")
    read = []
    for rank in range(2):
        loader = DataLoader(
            rows, batch_size=2, num_workers=num_workers, collate_fn=lambda batch: [number_of(row) for row in batch]
        )
        # As the Trainer does, for the ranks that it doesn't have here
        own = prepare_data_loader(loader, num_processes=2, process_index=rank, dispatch_batches=False)
        read.append([number for batch in own.base_dataloader for number in batch])
    assert all(len(numbers) < sum(SIZES) for numbers in read)
    assert Counter(read[0] + read[1]) == Counter(range(sum(SIZES)))


def test_a_shard_that_disappears_while_it_is_streamed_is_named(tmp_path):
    # Rows are read a thousand at a time
    stream = iter(load_rows(write_shards(tmp_path, ".parquet", sizes=[2000] * 3), "train"))
    assert number_of(next(stream)) == 0
    (tmp_path / "train-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002\.parquet"):
        list(stream)


@pytest.mark.slow
def test_a_stream_takes_no_more_memory_after_a_hundred_thousand_rows_than_after_ten(tmp_path):
    args = write_shards(tmp_path, ".parquet", sizes=[10_000] * 10)
    process, used = psutil.Process(), []
    for count, _ in enumerate(load_rows(args, "train"), 1):
        if count % 10_000 == 0:
            used.append(process.memory_info().rss)
    assert len(used) == 10
    assert max(used) < 1.1 * used[0]
