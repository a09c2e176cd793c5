"""A row that can't be read stops training and is named, or is left out and written down; the others stay."""

import json
import re
import shutil

import datasets
import pytest
from packaging.version import Version
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer
from duostream.scripts import pretrain
from duostream.scripts.arguments import DataArguments
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.data import load_mixture, load_rows, number_rows, read_classes
from duostream.scripts.sources import READS_EMPTY_LINES, READS_EMPTY_PICTURES

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


@pytest.mark.parametrize("bidirectional_prefix", [False, True])
def test_of_conversations_that_share_a_picture_the_bad_one_alone_is_left_out(
    tmp_path, monkeypatch, bidirectional_prefix
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for color in ("red", "blue", "green"):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{color}.png")
    said = [("red.png", "one"), ("red.png", None), ("red.png", "three"), ("blue.png", None), ("blue.png", None)]
    rows = [
        {
            "images": [str(tmp_path / name)],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{number}?"}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
        }
        for number, (name, text) in enumerate([*said, ("green.png", "four")])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad_rows = BadRows(tmp_path / "out" / "bad_rows.jsonl")
    args = DataArguments(task="chat", dataset=str(path), conversations_per_row=3)
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        train_tokenizer([], 263),
        image_seq_length=4,
        bidirectional_prefix=bidirectional_prefix,
    )
    collator = DuoStreamDataCollator(processor)
    *rows, last = bad_rows.leave_out(load_mixture(args, bad_rows=bad_rows), lambda row: collator([row]))
    assert last["source"] == [5]
    written = [json.loads(line) for line in bad_rows.path.read_text().splitlines()]
    # Different questions can't share what is read both ways, whether one of them is bad or not
    unshared = [0, 2] if bidirectional_prefix else []
    assert {each["row"] for each in written if "expected text" in each["reason"]} == {1, 3, 4}
    assert [each["row"] for each in written if "ask different things" in each["reason"]] == unshared
    assert len(written) == 3 + len(unshared)
    texts = [[each["completion"][0]["content"][0]["text"] for each in row["conversations"]] for row in rows]
    assert (texts, [row["source"] for row in rows]) == (([], []) if unshared else ([["one", "three"]], [[0, 2]]))


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def asked(number, count):
    return [{"question": f"{number} {i}?", "answer": str(i)} for i in range(count)]


def left_out(folder, output_dir, *options):
    """Rows to train on, and the number and reason of each that was left out."""
    bad_rows = BadRows(output_dir / "bad_rows.jsonl")
    args = DataArguments(dataset=str(folder), **{"task": "vqa", "image_column": "", **dict(options)})
    classes = read_classes(args, bad_rows) if args.task == "classification" else None
    rows = list(load_rows(args, args.train_split, classes=classes, bad_rows=bad_rows))
    written = [json.loads(line) for line in bad_rows.path.read_text().splitlines()]
    assert bad_rows.report() == len(written)
    return rows, [(each["row"], each["reason"]) for each in written]


BROKEN = '{"question": "half'
LINES = pytest.mark.skipif(
    Version(datasets.__version__) < Version(READS_EMPTY_LINES), reason="older ones read no row without columns"
)
PICTURES = pytest.mark.skipif(
    Version(datasets.__version__) < Version(READS_EMPTY_PICTURES), reason="older ones read no row without a picture"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@LINES
def test_an_array_of_rows_that_can_all_be_read_is_read_whole(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text(json.dumps(asked(0, 3), indent=1))
    rows, bad = left_out(tmp_path / "rows.jsonl", tmp_path / "out")
    assert len(rows) == 3 and not bad


@pytest.mark.skipif(
    Version(datasets.__version__) < Version(READS_EMPTY_LINES), reason="older ones don't read these files either"
)
@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize(
    "how",
    ["over several lines", "with a mark in front", "at last over several", "two on a line", "lines end elsewhere"],
)
def test_a_file_that_is_not_one_row_a_line_loses_none_but_is_refused(tmp_path, cache, how, streaming):
    first, second, third = map(json.dumps, asked(0, 3))
    (tmp_path / "rows.jsonl").write_text(
        {
            "over several lines": "\n".join(json.dumps(row, indent=1) for row in asked(0, 3)),
            "with a mark in front": "\ufeff" + json.dumps(asked(0, 3)[0], indent=1) + f"\n{second}\n{third}",
            "at last over several": f"{first}\n{second}\n" + json.dumps(asked(0, 3)[2], indent=1),
            "two on a line": f"{first}\n{second} {third}\n",
            "lines end elsewhere": "\r".join((first, second, third)),
        }[how]
    )
    assert len(load_rows(DataArguments(task="vqa", dataset=str(tmp_path / "rows.jsonl")), "train")) == 3
    with pytest.raises(ValueError, match=r"rows\.jsonl: expected one row, a JSON object, on each line"):
        left_out(tmp_path / "rows.jsonl", tmp_path / "out", ("streaming", streaming))


@LINES
@pytest.mark.parametrize(
    "line",
    ['{"question": "a", "answer": "b", "answer": "c"}', '["a", "b"]', '[{"question": "a"', '{"question": "a"}}'],
)
def test_lines_that_are_no_row_or_name_a_column_twice_are_left_out(tmp_path, cache, line):
    write_lines(tmp_path / "rows.jsonl", line, *asked(0, 3), line, line)
    rows, bad = left_out(tmp_path / "rows.jsonl", tmp_path / "out")
    assert [row["source"] for row in rows] == [1, 2, 3]
    ((number, reason), *others) = bad
    assert (
        number == 0
        and [number for number, _ in others] == [4, 5]
        and re.search(r"Row 0 of .*(is there twice|expected an object|delimiter|Extra data)", reason)
    )


@LINES
@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_a_broken_line_of_another_split_is_no_bad_row_to_train_on(tmp_path, cache, streaming):
    write_lines(tmp_path / "rows" / "train.jsonl", *asked(0, 4), BROKEN)
    write_lines(tmp_path / "rows" / "test.jsonl", *asked(1, 3), BROKEN)
    write_lines(tmp_path / "rows" / "validation.jsonl", *asked(2, 2))
    rows, bad = left_out(tmp_path / "rows", tmp_path / "out", ("streaming", streaming))
    assert [row["source"] for row in rows] == [0, 1, 2, 3]
    ((number, reason),) = bad
    assert number == 4 and re.search(r"Row 4 of .*train\.jsonl: Invalid control character", reason)


@LINES
@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_broken_lines_of_several_files_have_the_numbers_of_their_rows_in_the_split(tmp_path, cache, streaming):
    for name in ("a", "b"):
        write_lines(tmp_path / "rows" / "train" / f"{name}.jsonl", *asked(name, 4), BROKEN, *asked(name, 1))
    rows, bad = left_out(tmp_path / "rows", tmp_path / "out", ("streaming", streaming))
    assert [row["source"] for row in rows] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 11]
    assert [number for number, _ in bad] == [4, 10]
    for (_, reason), name in zip(bad, "ab", strict=True):
        assert re.search(rf"Row 4 of .*{name}\.jsonl: Invalid control character", reason)


@LINES
def test_broken_lines_of_a_slice_have_the_numbers_of_their_rows_in_it(tmp_path, cache):
    write_lines(tmp_path / "rows.jsonl", BROKEN, *asked(0, 4), BROKEN)
    rows, bad = left_out(tmp_path / "rows.jsonl", tmp_path / "out", ("train_split", "train[2:]"))
    assert [row["source"] for row in rows] == [0, 1, 2]
    ((number, reason),) = bad
    assert number == 3 and "Row 5 of" in reason


@LINES
def test_a_broken_line_is_written_down_once_where_classes_are_read_first(tmp_path, cache):
    write_lines(tmp_path / "rows.jsonl", {"text": "a", "label": "x"}, BROKEN, {"text": "b", "label": "y"})
    rows, bad = left_out(tmp_path / "rows.jsonl", tmp_path / "out", ("task", "classification"))
    assert [row["label"] for row in rows] == [0, 1]
    ((number, reason),) = bad
    assert number == 1 and "Invalid control character" in reason


@PICTURES
def test_a_broken_line_about_a_picture_of_another_split_is_no_bad_row(folder, tmp_path):
    shutil.copytree(folder / "train", folder / "validation")
    write_lines(folder / "validation" / "metadata.jsonl", '{"file_name": "0.jpg", "captions": ["a"]}', BROKEN)
    rows, bad = left_out(folder, tmp_path / "out", ("task", "caption"), ("image_column", "image"))
    assert len(rows) == 2 * (NUM_ROWS - 2) and [number for number, _ in bad] == [8, 9]


@PICTURES
def test_where_the_order_of_files_is_not_known_a_warning_says_what_is_wrong_with_a_line(folder, tmp_path, caplog):
    more = [{"file_name": name, "captions": ["a", "b"]} for name in ("0.jpg", "nowhere.jpg")]
    write_lines(folder / "train" / "more" / "metadata.jsonl", *more)
    shutil.copy(folder / "train" / "0.jpg", folder / "train" / "more")
    rows, bad = left_out(folder, tmp_path / "out", ("task", "caption"), ("image_column", "image"))
    assert len(rows) == 2 * (NUM_ROWS - 2 + 1) and len(bad) == 3
    assert all("expected text in `answer_column`" in reason for _, reason in bad)
    assert re.search(r"Row 1 of .*more/metadata\.jsonl: there is no picture 'nowhere\.jpg'", caplog.text)


def test_a_line_that_is_broken_in_another_split_is_not_what_an_error_names(tmp_path, cache):
    write_lines(tmp_path / "rows" / "train.jsonl", *asked(0, 4), BROKEN)
    write_lines(tmp_path / "rows" / "test.jsonl", BROKEN)
    with pytest.raises(ValueError, match=r"Row 4 of .*train\.jsonl"):
        load_rows(DataArguments(task="vqa", dataset=str(tmp_path / "rows")), "train")


def read_held_out(folder, output_dir, split, **options):
    """Rows to evaluate on, where those to train on may have been left out."""
    args = DataArguments(dataset=str(folder), **{"task": "vqa", "image_column": "", **options})
    bad_rows = BadRows(output_dir / "bad_rows.jsonl")
    load_rows(args, args.train_split, bad_rows=bad_rows)
    told = bad_rows.path.read_text()
    rows = list(load_rows(args, split, bad_rows=bad_rows.elsewhere()))
    assert told and bad_rows.path.read_text() == told
    return rows


@LINES
def test_a_broken_line_to_train_on_is_none_to_evaluate_on_in_the_same_file(tmp_path, cache):
    write_lines(tmp_path / "rows.jsonl", *asked(0, 4), BROKEN, *asked(1, 3))
    options = {"train_split": "train[:6]"}
    rows = read_held_out(tmp_path / "rows.jsonl", tmp_path / "out", "train[6:]", **options)
    assert [row["completion"][0]["content"][0]["text"] for row in rows] == ["1", "2"]
    with pytest.raises(ValueError, match=r"Row 4 of .*rows\.jsonl: Invalid control character"):
        read_held_out(tmp_path / "rows.jsonl", tmp_path / "out", "train[3:]", **options)


@PICTURES
def test_a_broken_line_to_train_on_is_none_to_evaluate_on_in_the_same_folder(folder, tmp_path):
    held_out = {"file_name": "0.jpg", "captions": ["a"]}
    shutil.copytree(folder / "train", folder / "validation")
    write_lines(folder / "validation" / "metadata.jsonl", held_out)
    lines = (folder / "train" / "metadata.jsonl").read_text().splitlines()
    write_lines(folder / "train" / "metadata.jsonl", *lines, BROKEN)
    options = {"task": "caption", "image_column": "image"}
    assert len(read_held_out(folder, tmp_path / "out", "validation", **options)) == 1
    write_lines(folder / "validation" / "metadata.jsonl", held_out, BROKEN)
    with pytest.raises(ValueError, match=r"Row 1 of .*validation/metadata\.jsonl: Invalid control character"):
        read_held_out(folder, tmp_path / "out", "validation", **options)


@LINES
def test_a_line_that_can_not_be_read_is_left_out_of_training_with_an_evaluation_beside_it(tmp_path, cache):
    write_lines(tmp_path / "rows.jsonl", *asked(0, 4), BROKEN, *asked(1, 3))
    splits = ["--train_split", "train[:6]", "--eval_split", "train[6:]", "--eval_strategy", "steps"]
    options = ["--task", "vqa", "--image_column", "", "--max_steps", "1", *splits]
    train(tmp_path / "rows.jsonl", tmp_path / "out", "--on_bad_rows", "skip", *options)
    assert bad_rows_counted(tmp_path / "out") == 1
