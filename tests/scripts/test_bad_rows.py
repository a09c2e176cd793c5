"""A row that can't be read stops training and is named, or is left out and written down; the others stay."""

import json

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from duostream.scripts import pretrain
from duostream.scripts.arguments import DataArguments
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.data import load_rows, number_rows

QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no"]
NUM_ROWS = 12


def break_file(path, how):
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "a page": b"<html>no picture</html>"}[how])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photographs, five rows of which are bad: three files that are no pictures, two captions that are no text."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train = tmp_path / "photographs" / "train"
    train.mkdir(parents=True)
    rows = []
    for i in range(NUM_ROWS):
        mode = ["RGB", "L", "CMYK", "P"][i % 4]
        Image.new("RGB", (40 + i, 40), (20 * i, 90, 9)).convert(mode).save(
            train / f"{i}.{'png' if mode == 'P' else 'jpg'}"
        )
        rows.append({"file_name": f"{i}.{'png' if mode == 'P' else 'jpg'}", "captions": [f"picture {i}", "a photo"]})
    for i, how in ((1, "truncated"), (4, "empty"), (6, "a page")):
        break_file(train / rows[i]["file_name"], how)
    rows[8]["captions"] = [None]
    rows[9]["captions"] = None
    (train / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train.parent


def bad_rows_counted(output_dir):
    """As at the end of a run, of what it wrote."""
    lines = (output_dir / "bad_rows.jsonl").read_text()
    bad_rows = BadRows(output_dir / "bad_rows.jsonl")
    bad_rows.path.write_text(lines)
    return bad_rows.report()


def train(folder, output_dir, *args):
    command = ["--task", "caption", "--dataset", str(folder), "--output_dir", str(output_dir), "--vocab_size", "300"]
    pretrain.main([*command, "--per_device_train_batch_size", "4", *QUIET, *args])


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_bad_rows_are_left_out_and_written_down_with_their_reasons(folder, tmp_path, streaming):
    options = ["--streaming", "true", "--max_steps", "4"] if streaming else ["--num_train_epochs", "1"]
    train(folder, tmp_path / "out", "--on_bad_rows", "skip", *options)
    written = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    reasons = {each["row"]: each["reason"] for each in written}
    assert set(reasons) == {1, 4, 6, 8, 9}
    for row in (1, 4, 6):
        assert "a picture can't be read" in reasons[row]
    for row in (8, 9):
        assert f"Row {row}: expected text in `answer_column` 'captions', not None" in reasons[row]
    assert bad_rows_counted(tmp_path / "out") == 5
    if not streaming:
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert state["global_step"] == -(-2 * (NUM_ROWS - 5) // 4)  # two captions a picture, four rows a step


def test_bad_rows_of_a_stream_are_counted_once_though_workers_number_their_own(tmp_path):
    for shard in range(2):
        lines = [{"text": f"{shard} {i}", "is_bad": i == 1} for i in range(4)]
        (tmp_path / f"train-{shard}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stream = datasets.load_dataset("json", data_dir=str(tmp_path), split="train", streaming=True)
    bad_rows = BadRows(tmp_path / "out" / "bad_rows.jsonl")

    def check(row):
        if row["is_bad"]:
            raise ValueError(f"Row {row['row']} is bad")

    kept = bad_rows.leave_out(number_rows(stream), check)
    for _ in range(2):  # in each epoch again
        rows = list(DataLoader(kept, batch_size=None, num_workers=2))
        assert sorted(row["text"] for row in rows) == [f"{shard} {i}" for shard in range(2) for i in (0, 2, 3)]
    assert bad_rows.report() == 2


def test_a_second_run_writes_them_down_again(folder, tmp_path):
    for _ in range(2):
        train(folder, tmp_path / "out", "--on_bad_rows", "skip", "--max_steps", "1")
    assert len({json.loads(line)["row"] for line in (tmp_path / "out" / "bad_rows.jsonl").open()}) == 5


def test_by_default_the_first_bad_row_stops_training_and_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"Row 8: expected text in `answer_column`"):
        train(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "bad_rows.jsonl").exists()


def test_a_picture_that_can_not_be_read_is_named_by_its_row(folder, tmp_path):
    lines = (folder / "train" / "metadata.jsonl").read_text().splitlines()
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines[:4]))
    for i in range(4, NUM_ROWS):
        (folder / "train" / json.loads(lines[i])["file_name"]).unlink()
    with pytest.raises(ValueError, match=r"Row [23]: a picture can't be read: .*runcated"):
        train(folder, tmp_path / "out")


def test_without_a_good_row_nothing_is_trained(folder, tmp_path):
    for path in (folder / "train").glob("*.*g"):
        break_file(path, "empty")
    with pytest.raises(ValueError, match=r"All rows are bad: .*bad_rows.jsonl says why"):
        train(folder, tmp_path / "out", "--on_bad_rows", "skip")


def test_evaluation_never_leaves_rows_out(folder):
    (folder / "train").rename(folder / "validation")
    args = DataArguments(task="caption", dataset=str(folder), on_bad_rows="skip")
    with pytest.raises(ValueError, match="Row 8"):
        load_rows(args, "validation", is_evaluation=True)


def test_anything_else_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="`on_bad_rows` is 'hide'; there are 'raise' and 'skip'"):
        train(folder, tmp_path / "out", "--on_bad_rows", "hide")


def test_all_rows_that_share_a_picture_that_cannot_be_read_are_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("good.png", "bad.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    break_file(tmp_path / "bad.png", "truncated")
    names = ["good.png", "bad.png", "good.png", "bad.png", "bad.png"]
    rows = [{"image": name, "question": f"{i}?", "answer": str(i)} for i, name in enumerate(names)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "vqa", "--image_dir", str(tmp_path), "--conversations_per_row", "2", "--max_steps", "1"]
    train(questions, tmp_path / "out", "--on_bad_rows", "skip", *options)
    written = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [each["row"] for each in written] == [1, 3, 4]
    assert all("a picture can't be read" in each["reason"] for each in written)
