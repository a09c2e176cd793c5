import functools
import gzip
import json
import tarfile
from dataclasses import replace

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, Value
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer
from duostream.processing.data_collator_duostream import load_pictures
from duostream.scripts import rows as making_rows
from duostream.scripts import sources
from duostream.scripts.arguments import DataArguments
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.data import (
    BLANK_GRAY,
    MAKING_ROWS,
    blank,
    load_mixture,
    load_rows,
    number_rows,
    read_classes,
    texts_of,
)
from duostream.scripts.measuring import generate_answers
from duostream.scripts.rows import with_lengths
from duostream.scripts.sources import load_as_written

CAPTIONS = [["A black dog .", "A dog runs ."], ["Zwei Hunde spielen ."], ["一只狗。", "Snow .", "A dog ."]]
FLAT = [(i, caption) for i, captions in enumerate(CAPTIONS) for caption in captions]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Nothing is written into the home folder, and nothing is found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def collator():
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return DuoStreamDataCollator(DuoStreamProcessor(image_processor, train_tokenizer([], 263), image_seq_length=4))


def pictures(row):
    return load_pictures(row["images"], "A row")


def picture(i):
    return Image.new("RGB", (20 + i, 16), (60 * i, 200, 30))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_image_folder(folder, rows, suffix=".png", first=0):
    """Pictures beside a `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(rows)):
        picture(first + i).save(folder / f"{first + i:05}{suffix}")
    named = [{"file_name": f"{first + i:05}{suffix}", **row} for i, row in enumerate(rows)]
    write_lines(folder / "metadata.jsonl", named)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Laid out as Flickr8k's photographs: a folder for each split, JPEG files, and several captions for each."""
    folder = tmp_path_factory.mktemp("photographs")
    rows = [{"image_id": str(i), "captions": captions} for i, captions in enumerate(CAPTIONS)]
    write_image_folder(folder / "train", rows, suffix=".jpg")
    write_image_folder(folder / "validation", rows[:1], suffix=".jpg", first=7)
    (folder / "README.md").write_text("Photographs")
    return folder


def conversation(question, answer, has_picture=False):
    parts = [{"type": "image", "text": None}] if has_picture else []
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def said(row):
    """Question and answer of a row, and how many pictures stand before the question."""
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    contents = [message["content"] for message in messages]
    if isinstance(contents[0], str):
        return 0, *contents
    assert [part["type"] for part in contents[0][:-1]] == ["image"] * (len(contents[0]) - 1)
    return len(contents[0]) - 1, contents[0][-1]["text"], contents[1][0]["text"]


def load(path, split="train", max_rows=None, **kwargs):
    return load_rows(DataArguments(dataset=str(path), **kwargs), split, max_rows)


def test_each_caption_of_a_photograph_is_a_row_of_its_own(photographs):
    rows = load(photographs, answer_column="captions")
    assert [said(row) for row in rows] == [(1, "Describe the picture.", caption) for _, caption in FLAT]
    # The pictures' widths tell them apart
    assert [[image.size for image in pictures(row)] for row in rows] == [[(20 + i, 16)] for i, _ in FLAT]


def test_rows_tell_how_long_they_are_so_that_those_with_pictures_come_together(photographs):
    args = DataArguments(dataset=str(photographs), answer_column="captions", prompt="Say it.")
    texts = [len("Say it.") + len(caption) for _, caption in FLAT]
    assert load_rows(args, "train")["length"] == [args.chars_per_picture + length for length in texts]
    assert load_rows(replace(args, image_column=""), "train")["length"] == texts
    assert load_rows(replace(args, chars_per_picture=7), "train")["length"] == [7 + length for length in texts]


def test_splits_are_the_folders(photographs):
    rows = load(photographs, "validation", answer_column="captions")
    assert [said(row)[2] for row in rows] == CAPTIONS[0]
    assert pictures(rows[0])[0].size == (27, 16)


def test_a_split_can_be_sliced(photographs):
    rows = load(photographs, "train[1:2]", answer_column="captions")
    assert [said(row)[2] for row in rows] == CAPTIONS[1]


def test_only_the_first_rows_of_the_source_are_used(photographs):
    for streaming in (False, True):
        rows = load(photographs, max_rows=2, answer_column="captions", streaming=streaming)
        assert [said(row)[2] for row in rows] == [*CAPTIONS[0], *CAPTIONS[1]]


def test_more_rows_than_there_are_may_be_asked_for(photographs):
    assert len(load(photographs, max_rows=50, answer_column="captions")) == len(FLAT)


def test_the_prompt_can_be_chosen(photographs):
    rows = load(photographs, answer_column="captions", prompt="What do you see?")
    assert {said(row)[1] for row in rows} == {"What do you see?"}


def test_questions_come_from_a_column(tmp_path):
    rows = [{"question": "What?", "answer": "That.", "n": 1}, {"question": "Why?", "answer": "So.", "n": 2}]
    write_image_folder(tmp_path / "train", rows)
    rows = load(tmp_path, prompt_column="question", answer_column="answer")
    assert [said(row) for row in rows] == [(1, "What?", "That."), (1, "Why?", "So.")]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".JPG"])
def test_pictures_may_be_of_any_usual_type(tmp_path, suffix):
    write_image_folder(tmp_path / "train", [{"caption": "A dog ."}], suffix=suffix)
    rows = load(tmp_path, answer_column="caption")
    assert [image.size for image in pictures(rows[0])] == [(20, 16)]


def in_files(folder, kind, rows):
    """The rows in a file of this kind: JSONL, or Parquet."""
    path = folder / f"train.{kind}"
    if kind == "jsonl":
        return write_lines(path, rows)
    Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("whole_folder", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
class TestFiles:
    @pytest.fixture
    def write(self, kind, whole_folder, streaming, tmp_path):
        def write(rows, **kwargs):
            path = in_files(tmp_path, kind, rows)
            return load(tmp_path if whole_folder else path, streaming=streaming, **kwargs)

        return write

    def test_messages_are_kept_as_they_are(self, write):
        expected = [conversation("What is a dog?", "An animal."), conversation("Was ist das?", "狗。")]
        rows = write([{"messages": messages} for messages in expected])
        assert [row["messages"] for row in rows] == expected

    def test_messages_may_be_plain_text(self, write):
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
        rows = list(write([{"messages": messages}]))
        assert [said(row) for row in rows] == [(0, "What?", "That.")]

    def test_prompts_and_completions_are_kept_as_they_are(self, write):
        question, answer = conversation("What is a dog?", "An animal.")
        rows = write([{"prompt": [question], "completion": [answer]}])
        assert [(row["prompt"], row["completion"]) for row in rows] == [([question], [answer])]

    def test_text_without_pictures_needs_only_its_columns(self, write):
        rows = write(
            [{"question": "What?", "answer": "That."}, {"question": "Why?", "answer": "So."}],
            prompt_column="question",
            answer_column="answer",
        )
        rows = list(rows)
        assert [said(row) for row in rows] == [(0, "What?", "That."), (0, "Why?", "So.")]
        assert not any(row.get("images") for row in rows)

    def test_pictures_are_found_by_their_paths(self, write, tmp_path):
        paths = [str(tmp_path / f"{i}.bin") for i in range(2)]
        for i, path in enumerate(paths):
            picture(i).save(path, format="PNG")
        rows = list(
            write([{"image": path, "caption": f"It is {i}."} for i, path in enumerate(paths)], answer_column="caption")
        )
        assert [said(row) for row in rows] == [(1, "Describe the picture.", f"It is {i}.") for i in range(2)]
        assert [[image.size for image in pictures(row)] for row in rows] == [[(20, 16)], [(21, 16)]]

    def test_pictures_may_stand_behind_the_words(self, write, tmp_path):
        picture(0).save(tmp_path / "a.bin", format="PNG")
        lines = [{"image": str(tmp_path / "a.bin"), "caption": "A."}, {"image": None, "caption": "B."}]
        for images_last in (False, True):
            rows = list(write(lines, answer_column="caption", images_last=images_last))
            kinds = [[part["type"] for part in row["prompt"][0]["content"]] for row in rows]
            assert kinds == [["text", "image"] if images_last else ["image", "text"], ["text"]]
        with pytest.raises(ValueError, match="of which `task` 'masked' has none"):
            write(lines, task="masked", answer_column="caption", images_last=True)

    @pytest.mark.parametrize("name", MAKING_ROWS)
    def test_an_option_that_would_do_nothing_is_refused(self, write, name):
        option = {name: {"images_last": True, "max_column_chars": 9, "image_column": ""}.get(name, "other")}
        with pytest.raises(ValueError, match=f"`{name}` would do nothing: the rows of .* are ready"):
            write([{"messages": conversation("What?", "That.")}], **option)
        with pytest.raises(ValueError, match=f"`{name}` would do nothing: the rows of 'scenes' are ready"):
            load_rows(DataArguments(**option), "validation")

    def test_rows_are_numbered(self, write):
        rows = write([{"messages": conversation("What?", str(i))} for i in range(3)])
        assert [row["row"] for row in rows] == [0, 1, 2]

    def test_a_broken_row_is_named_by_its_number(self, write, collator):
        good, bad = {"messages": conversation("What?", "That.")}, {"messages": conversation("What?", "That.")[:1]}
        rows = list(write([good, good, bad, good]))
        with pytest.raises(ValueError, match="Row 2: no message of the assistant"):
            collator(rows[1:3])


def test_a_file_is_one_split_whatever_its_name_and_can_be_sliced(tmp_path):
    rows = [{"messages": conversation("What?", str(i))} for i in range(4)]
    path = write_lines(tmp_path / "notes.jsonl", rows)
    for split, answers in (("validation", "0123"), ("train[:50%]", "01"), ("train[3:]", "3")):
        assert [said(row)[2] for row in load(path, split)] == list(answers)


def test_parquet_with_pictures_inside_is_read(tmp_path):
    source = Dataset.from_list([{"image": picture(i), "caption": f"It is {i}."} for i in range(3)])
    source.to_parquet(str(tmp_path / "train.parquet"))
    for streaming in (False, True):
        rows = list(load(tmp_path, answer_column="caption", streaming=streaming))
        assert [said(row)[2] for row in rows] == ["It is 0.", "It is 1.", "It is 2."]
        assert [pictures(row)[0].getpixel((0, 0))[0] for row in rows] == [0, 60, 120]


def test_a_row_may_have_several_pictures_or_none(tmp_path):
    features = datasets.Features({"photos": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    numbers = [2, 0, 1]
    source = [{"photos": [picture(i) for i in range(n)], "caption": f"{n} pictures"} for n in numbers]
    Dataset.from_list(source, features=features).to_parquet(str(tmp_path / "train.parquet"))
    for streaming in (False, True):
        rows = list(load(tmp_path, image_column="photos", answer_column="caption", streaming=streaming))
        assert [said(row) for row in rows] == [(n, "Describe the picture.", f"{n} pictures") for n in numbers]
        assert [len(row["images"]) for row in rows] == numbers


def test_messages_with_pictures_in_parquet_are_ready_for_the_collator(tmp_path, collator):
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                }
            ),
        }
    )
    source = [{"images": [picture(i)], "messages": conversation("What?", str(i), has_picture=True)} for i in range(2)]
    Dataset.from_list(source, features=features).to_parquet(str(tmp_path / "train.parquet"))
    batch = collator(list(load(tmp_path)))
    assert batch["pixel_values"].shape == (2, 3, 16, 16)


def test_messages_with_paths_of_pictures_are_ready_for_the_collator(tmp_path, collator):
    picture(0).save(tmp_path / "a.png")
    row = {"images": [str(tmp_path / "a.png")], "messages": conversation("What?", "That.", has_picture=True)}
    path = write_lines(tmp_path / "lines" / "train.jsonl", [row])
    assert collator(list(load(path)))["pixel_values"].shape == (1, 3, 16, 16)


def test_streaming_gives_the_same_rows(photographs):
    stored = load(photographs, answer_column="captions")
    streamed = load(photographs, answer_column="captions", streaming=True)
    assert isinstance(stored, Dataset) and isinstance(streamed, IterableDataset)
    for a, b in zip(stored, streamed, strict=True):
        assert a.keys() == b.keys()
        assert [image.tobytes() for image in pictures(a)] == [image.tobytes() for image in pictures(b)]
        assert {**a, "images": None} == {**b, "images": None}


def test_a_stream_of_several_metadata_files_has_one_order_in_every_process(tmp_path):
    captions = list("abcdefg")
    for i, caption in enumerate(captions):
        write_image_folder(tmp_path / "train" / caption, [{"captions": [caption]}], first=i)
    rows = load(tmp_path, answer_column="captions", streaming=True)
    assert [said(row)[2] for row in rows] == captions
    # Of so many shards each rank and each worker takes its own
    assert rows.num_shards == len(captions)


def test_rows_of_photographs_are_numbered(photographs):
    for streaming in (False, True):
        rows = load(photographs, answer_column="captions", streaming=streaming)
        assert [row["row"] for row in rows] == list(range(len(FLAT)))


def test_rows_go_straight_into_the_collator(photographs, collator):
    rows = list(load(photographs, answer_column="captions"))
    batch = collator(rows)
    assert batch["pixel_values"].shape == (len(FLAT), 3, 16, 16)
    assert batch["images_per_row"] == 1
    decode = collator.processor.decode
    learnt = [decode([i for i in labels if i != -100]) for labels in batch["labels"].tolist()]
    assert learnt == [f"{caption}<|end|>" for _, caption in FLAT]


def test_a_photograph_that_cannot_be_read_is_named(photographs, tmp_path, collator):
    write_image_folder(tmp_path / "train", [{"caption": f"It is {i}."} for i in range(3)], suffix=".jpg")
    (tmp_path / "train" / "00001.jpg").write_bytes(b"no picture")
    with pytest.raises(Exception, match=r"00001\.jpg|Row 1\b"):
        collator(list(load(tmp_path, answer_column="caption")))


def test_a_missing_column_is_named_beside_those_that_are_there(photographs):
    with pytest.raises(ValueError, match=r"`answer_column` is 'caption', but the columns are \[.*'captions'"):
        load(photographs, answer_column="caption")
    with pytest.raises(ValueError, match=r"`prompt_column` is 'question', but the columns are \[.*'captions'"):
        load(photographs, answer_column="captions", prompt_column="question")


def test_a_missing_image_column_is_named_where_it_was_asked_for(photographs):
    # Otherwise the model would be trained without a picture, and nobody told
    with pytest.raises(ValueError, match=r"`image_column` is 'photo', but the columns are \[.*'image'"):
        load(photographs, answer_column="captions", image_column="photo")


def test_pictures_are_never_left_out_because_their_column_has_another_name(tmp_path):
    rows = [{"img": str(tmp_path / "a.png"), "captions": "A dog ."}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"`image_column` is 'image', but the columns are \['img'.*read text alone"):
        load(path, task="caption")
    with pytest.raises(ValueError, match=r"`image_dir` is for the paths in `image_column`.*\['img'"):
        load(path, answer_column="captions", image_dir=str(tmp_path), image_column="")
    assert said(load(path, task="caption", image_column="")[0]) == (0, "Describe the picture.", "A dog .")
    features = Features({"jpg": datasets.Image(), "txt": Value("string")})
    Dataset.from_list([{"jpg": picture(0), "txt": "A dog ."}], features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"`image_column` is 'image', but the columns are \['jpg', 'txt'\]"):
        load(tmp_path / "a.parquet", answer_column="txt")


@pytest.mark.parametrize("task", ["vqa", "classification", "masked"])
@pytest.mark.parametrize("kind", ["path", "paths", "bytes", "list of bytes", "files", "large list"])
def test_pictures_in_a_column_of_the_readme_s_name_are_never_left_out(tmp_path, task, kind):
    picture(0).save(tmp_path / "a.png")
    path, data = str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    file = {"bytes": data, "path": None}
    value = {"path": path, "paths": [path], "bytes": data, "list of bytes": [data], "files": [file]}.get(kind, [data])
    rows = Dataset.from_list([{"images": value, "question": "?", "answer": "!", "text": "x", "label": 0}])
    if kind == "large list":
        rows = rows.cast_column("images", LargeList(Value("large_binary")))
    rows.to_parquet(tmp_path / "rows.parquet")
    options = {"task": task, **({"answer_column": "text"} if task == "masked" else {})}
    with pytest.raises(
        ValueError, match=r"`image_column` is 'image', .* as in `--image_column images`, or \"\" to read"
    ):
        load(tmp_path / "rows.parquet", **options)
    (row,) = load(tmp_path / "rows.parquet", image_column="images", **options)
    assert [image.size for image in pictures(row)] == [picture(0).size]
    assert "images" not in load(tmp_path / "rows.parquet", image_column="", **options).column_names
    if kind not in ("path", "paths"):
        rows.rename_column("images", "img").to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match="as in `--image_column img`"):
            load(tmp_path / "rows.parquet", **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", [3, 0.5, True, [1, 2], {"count": 3}], ids=str)
def test_numbers_in_a_column_of_the_readme_s_name_are_no_pictures(tmp_path, value, streaming):
    path = write_lines(tmp_path / "rows.jsonl", [{"images": value, "question": "?", "answer": "!"}])
    assert [said(row) for row in load(path, task="vqa", streaming=streaming)] == [(0, "?", "!")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", [{"path": "a.png"}, [{"url": "a.png"}], [[[0, 255]]]], ids=str)
def test_what_may_be_pictures_in_a_column_of_the_readme_s_name_is_not_left_out(tmp_path, value, streaming):
    path = write_lines(tmp_path / "rows.jsonl", [{"images": value, "question": "?", "answer": "!"}])
    with pytest.raises(ValueError, match="as in `--image_column images`"):
        load(path, task="vqa", streaming=streaming)


@pytest.mark.parametrize("value", [None, []], ids=str)
def test_a_stream_may_hold_pictures_where_its_first_rows_have_none(tmp_path, value):
    path = write_lines(tmp_path / "rows.jsonl", [{"images": value, "question": "?", "answer": "!"}])
    with pytest.raises(ValueError, match="as in `--image_column images`"):
        load(path, task="vqa", streaming=True)
    assert said(load(path, task="vqa")[0]) == (0, "?", "!")


@pytest.mark.parametrize("streaming", [False, True])
def test_large_lists_are_lists(tmp_path, streaming):
    picture(0).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    kinds = {"image": LargeList(datasets.Image()), "answer": LargeList(Value("string"))}
    features = Features({**kinds, "text": Value("string"), "label": LargeList(ClassLabel(names=["eel", "dog"]))})
    rows = [{"image": [data] * 2, "answer": ["a", "b"], "text": "?", "label": [1]}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    options = {"dataset": str(tmp_path / "rows.parquet"), "streaming": streaming}
    rows = list(load_rows(DataArguments(task="vqa", prompt="{text}", **options), "train"))
    assert [(*said(row), len(pictures(row))) for row in rows] == [(2, "?", "a", 2), (2, "?", "b", 2)]
    args = DataArguments(task="classification", **options)
    assert read_classes(args) == ["eel", "dog"]
    assert [row["label"] for row in load_rows(args, "train", classes=["dog", "eel"])] == [[1, 0]]


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_in_prompt_and_completion_are_columns_as_any_other(tmp_path, streaming):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": "So.", "label": "good"}])
    options = {"task": "classification", "prompt": "{prompt} {completion}", "streaming": streaming}
    assert read_classes(DataArguments(dataset=str(path), **options)) == ["good"]
    (row,) = load_rows(DataArguments(dataset=str(path), **options), "train", classes=["good"])
    assert (row["text"], row["label"]) == ("Why? So.", 0)
    (row,) = load(path, prompt_column="prompt", answer_column="completion", streaming=streaming)
    assert said(row) == (0, "Why?", "So.")
    with pytest.raises(
        ValueError, match=r"no `prompt` and `completion` with lists of them, but .*'completion'.*answer"
    ):
        load(path, streaming=streaming)


def test_a_picture_beside_a_conversation_is_not_left_out_in_silence(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"image": "a.png", "messages": conversation("?", "A dog .")}])
    with pytest.raises(ValueError, match=r"their pictures are in 'image': expected a list of them in `images`"):
        load(path)
    assert said(load(path, image_column="")[0]) == (0, "?", "A dog .")
    assert "image" not in load(path, image_column="").column_names


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".gif"])
def test_a_folder_of_pictures_may_be_of_any_type_that_datasets_knows(tmp_path, suffix):
    folder = write_image_folder(tmp_path / "train", [{"captions": "A dog ."}], suffix=suffix)
    assert pictures(load(folder.parent, task="caption")[0])[0].size == picture(0).size


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (("cats", "dogs"), "train.jsonl"),
        (("pictures/train", "pictures/validation"), "train.jsonl"),
        (("train", "validation"), "train.JSONL"),
        (("train2017", "val2017"), "rows.jsonl"),
    ],
)
def test_a_table_among_pictures_is_read_and_not_the_names_of_their_folders(tmp_path, folders, name):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        picture(0).save(tmp_path / folder / "a.png")
    rows = [{"image": str(tmp_path / folders[0] / "a.png"), "text": "", "label": "good"}]
    write_lines(tmp_path / name, rows)
    args = DataArguments(dataset=str(tmp_path), task="classification")
    assert read_classes(args) == ["good"]
    assert len(pictures(load_rows(args, "train", classes=["good"])[0])) == 1


def test_parquet_is_read_where_json_tells_of_it_and_so_is_what_a_dataset_saves(tmp_path):
    rows = Dataset.from_list([{"source": "one", "target": "eins"}])
    (tmp_path / "cloned").mkdir()
    rows.to_parquet(tmp_path / "cloned" / "train-00000-of-00001.parquet")
    (tmp_path / "cloned" / "dataset_infos.json").write_text("{}")
    rows.save_to_disk(tmp_path / "saved")
    for place in ("cloned", "saved"):
        assert said(load(tmp_path / place, task="translation", image_column="")[0])[2] == "eins"


@pytest.mark.parametrize("use", ["map", "filter", "shuffle"])
def test_what_datasets_cached_beside_saved_rows_is_not_read(tmp_path, use):
    rows = Dataset.from_list([{"source": f"{i}", "target": str(i)} for i in range(4)])
    datasets.DatasetDict(train=rows, validation=rows.select([0])).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows", num_shards=2)
    for saved in (datasets.load_from_disk(tmp_path / "splits")["train"], datasets.load_from_disk(tmp_path / "rows")):
        if use == "shuffle":
            saved.shuffle(seed=0)
        else:
            getattr(saved, use)(lambda row: {"target": "no"})
    assert len(list((tmp_path / "rows").glob("cache-*.arrow"))) == 1
    for name in ("splits", "rows"):
        assert [said(row)[2] for row in load(tmp_path / name, task="translation")] == [*"0123"]
    assert len(load(tmp_path / "splits", "validation", task="translation")) == 1


def test_saved_rows_that_are_not_all_there_are_refused_by_name(tmp_path):
    rows = Dataset.from_list([{"source": f"{i}", "target": str(i)} for i in range(4)])
    rows.save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        ValueError, match=r"state\.json names \['data-00001-of-00002\.arrow'\], which are not beside it"
    ):
        load(tmp_path, task="translation")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json doesn't tell which files beside it hold the rows"):
        load(tmp_path, task="translation")


def test_files_that_are_left_out_for_their_type_are_named(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(sources.logger, "warning", warned.append)
    rows = [{"source": "one", "target": "eins"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(load(tmp_path, task="translation")) == 1 and not warned
    write_lines(tmp_path / "b.jsonl", rows)
    assert len(load(tmp_path, task="translation")) == 1
    assert "of which parquet is read; not read: ['b.jsonl']" in warned[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_pair", [False, True])
def test_texts_that_are_json_are_read_as_they_stand_beside_lists_of_parts(tmp_path, is_pair, streaming, collator):
    answers = ["3", "Yes", '"STOP"', "1.50", "true", "null", '{"a": 1}', "[1, 2]", "a/b", "2021-05-03"]
    picture(0).save(tmp_path / "a.png")
    rows = []
    for answer in answers:
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
            {"role": "assistant", "content": answer},
        ]
        turns = {"prompt": turns[:1], "completion": turns[1:]} if is_pair else {"messages": turns}
        rows.append({"images": [str(tmp_path / "a.png")], **turns})
    path = write_lines(tmp_path / "rows.jsonl", rows)
    loaded = list(load(path, task="chat", streaming=streaming))
    name = "completion" if is_pair else "messages"
    assert [row[name][-1]["content"] for row in loaded] == answers
    assert len(collator(loaded)["labels"]) == len(answers)
    if is_pair and not streaming:
        (packed,) = load_mixture(DataArguments(dataset=str(path), conversations_per_row=20))
        assert [each["completion"][0]["content"] for each in packed["conversations"]] == answers
        (tmp_path / "other.yaml").write_text(f"{{task: chat, dataset: {path}}}")
        mixed = load_mixture(DataArguments(dataset=str(path), mixture=[str(tmp_path / "other.yaml")]))
        assert {row["completion"][0]["content"][0]["text"] for row in mixed} == set(answers)


@pytest.mark.parametrize("kind", ["lines", "array"])
@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_parts_that_come_behind_texts_are_lists(tmp_path, streaming, kind):
    texts = [{"role": "user", "content": "?"}, {"role": "assistant", "content": '"STOP"'}]
    turns = [texts, conversation("?", "Yes")]
    (tmp_path / "train").mkdir()
    if kind == "array":
        # A column may be empty for long
        turns = [texts] * 6 + turns
        rows = [{"messages": each, "images": [] if each is texts else ["a.png"]} for each in turns]
        (tmp_path / "train" / "a.json").write_text(json.dumps(rows))
    else:
        for name, each in zip("ab", turns, strict=True):
            write_lines(tmp_path / "train" / f"{name}.jsonl", [{"messages": each}])
    assert [row["messages"] for row in load(tmp_path, task="chat", streaming=streaming)] == turns


@pytest.mark.parametrize("split", ["all", "train[:50%]+validation", "validation"])
def test_splits_of_json_are_named_as_datasets_names_them(tmp_path, split):
    for name in ("train", "validation"):
        write_lines(tmp_path / f"{name}.jsonl", [{"messages": conversation(name, str(i))} for i in range(2)])
    rows = load_as_written(str(tmp_path), None, split=split, streaming=False)
    assert len(rows) == {"all": 4, "train[:50%]+validation": 3, "validation": 2}[split]
    assert rows["messages"][-1] == conversation("validation", "1")


def test_columns_of_texts_beside_other_values_are_told_of(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(making_rows.logger, "warning", warned.append)
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "?", "answer": answer} for answer in (["12"], "Yes")])
    assert [said(row)[2] for row in load(path, task="vqa")] == ["12", "Yes"]
    assert "The columns ['answer'] of" in warned[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("images", [[5, 5], ["a.png", ["a.png"]]], ids=["numbers", "paths and lists"])
def test_a_column_that_is_named_but_holds_no_pictures_is_refused(tmp_path, images, streaming):
    path = write_lines(tmp_path / "rows.jsonl", [{"image": image, "captions": "a"} for image in images])
    with pytest.raises(ValueError, match=r"`image_column` 'image' is .*; expected a picture or its path in each row"):
        load(path, task="caption", streaming=streaming)


def test_what_datasets_takes_for_traces_of_agents_is_read_as_conversations(tmp_path):
    others = {name: "a" for name in ("id", "source", "model", "system_prompt")}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write_lines(tmp_path / "rows.jsonl", [{**others, "messages": turns}] * 2)
    assert [row["messages"] for row in load(path, task="chat")] == [turns] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_files_with_different_columns_are_refused_by_name(tmp_path, streaming):
    (tmp_path / "train").mkdir()
    for name, column in (("a", "answer"), ("b", "reply")):
        write_lines(tmp_path / "train" / f"{name}.jsonl", [{"question": "?", column: "!"}])
    with pytest.raises(ValueError, match=f"{tmp_path}.*\n(.*\n)*.*reply"):
        list(load(tmp_path, task="vqa", streaming=streaming))


def test_a_file_with_a_line_that_is_no_utf_8_is_named_in_a_stream(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"source": "café", "target": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl: .*(UTF8|utf-8)"):
        list(load(path, task="translation", streaming=True))


def test_a_line_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good, bad = (json.dumps({"source": each, "target": each}, ensure_ascii=False) for each in ("cafe", "café"))
    path.write_bytes(f"{good}\n{bad}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"Row 1 of .*rows\.jsonl: 'utf-8' codec can't decode"):
        load(path, task="translation")


def test_files_that_are_left_out_for_their_names_are_named(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(sources.logger, "warning", warned.append)
    row = {"source": "one", "target": "eins"}
    write_lines(tmp_path / "train.jsonl", [row])
    write_lines(tmp_path / "validation.jsonl", [row])
    write_lines(tmp_path / ".cache" / "train.jsonl", [row])
    (tmp_path / "notes.json").write_text("{}")
    write_lines(tmp_path / "train.jsonl.bak", [row])
    assert len(load(tmp_path, task="translation")) == 1 and not warned
    write_lines(tmp_path / "more.jsonl", [row])
    with gzip.open(tmp_path / "train2.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(row))
    assert len(load(tmp_path, task="translation")) == 1
    assert warned.pop().endswith("or for their type: ['more.jsonl', 'train2.jsonl.gz']") and not warned


def test_a_file_that_is_in_two_splits_by_its_name_is_named(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(sources.logger, "warning", warned.append)
    for name in ("train", "train_val", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"source": name, "target": "."}])
    assert len(load(tmp_path, "test", task="translation")) == 1 and not warned
    for split, count in (("train", 2), ("validation", 1)):
        assert len(load(tmp_path, split, task="translation")) == count
        assert "'train_val.jsonl' is in the splits ['train', 'validation']" in warned.pop() and not warned


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_whose_name_fits_a_split_twice_is_read_once(tmp_path, streaming):
    write_lines(tmp_path / "validation_dev.jsonl", [{"source": "one", "target": "eins"}])
    rows = load(tmp_path, "validation", task="translation", streaming=streaming)
    assert [said(row)[2] for row in rows] == ["eins"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a[1]", "a*", "a?"])
def test_names_of_files_are_no_patterns(tmp_path, name, streaming):
    # Nothing beside them is read in their place, or with them
    for each in ("a1", name):
        row = {"source": "?", "target": each}
        write_lines(tmp_path / "files" / f"{each}.jsonl", [row])
        write_lines(tmp_path / "folders" / each / f"{each}.jsonl", [row])
        (tmp_path / "pictures" / each).mkdir(parents=True)
        picture(0).save(tmp_path / "pictures" / each / f"{each}.png")
        write_lines(tmp_path / "pictures" / each / "metadata.jsonl", [{"file_name": f"{each}.png", **row}])
    for place in (f"files/{name}.jsonl", f"folders/{name}", f"pictures/{name}"):
        rows = load(tmp_path / place, task="translation", streaming=streaming)
        assert [said(row)[2] for row in rows] == [name]


def test_a_file_is_one_split(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"source": "one", "target": "eins"}])
    with pytest.raises(ValueError, match=r"is a file, which is one split, not 'train\+validation'"):
        load(path, "train+validation", task="translation")


def test_other_files_beside_a_table_do_no_harm(tmp_path):
    picture(0).save(tmp_path / "preview.gif")
    (tmp_path / "a.txt").write_text("A dog .")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "preview.gif", "a.gif")
        tar.add(tmp_path / "a.txt", "a.txt")
    assert said(load(tmp_path, answer_column="txt", image_column="gif", prompt="Say it")[0]) == (
        1,
        "Say it",
        "A dog .",
    )
    write_lines(tmp_path / "mixed" / "train.jsonl", [{"source": "one", "target": "eins"}])
    Dataset.from_list([{"source": "two", "target": "zwei"}]).to_parquet(tmp_path / "mixed" / "validation.parquet")
    for split, answer in (("train", "eins"), ("validation", "zwei")):
        assert said(load(tmp_path / "mixed", split, task="translation")[0])[2] == answer


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("in_one", [False, True], ids=["two archives", "one archive"])
def test_pictures_of_another_type_in_an_archive_are_not_passed_over(tmp_path, in_one, streaming):
    (tmp_path / "a.txt").write_text("A dog .")
    for name in ("train-0", "train-1"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(12):
                is_other = i > 5 if in_one else name == "train-1"
                picture(0).save(tmp_path / ("a.png" if is_other else "a.JPG"))
                tar.add(tmp_path / ("a.png" if is_other else "a.JPG"), f"{name}/{i}.{'png' if is_other else 'JPG'}")
                tar.add(tmp_path / "a.txt", f"{name}/{i}.txt")
    options = {"task": "caption", "answer_column": "txt", "image_column": "JPG", "streaming": streaming}
    errors = (ValueError, datasets.exceptions.DatasetsError)
    with pytest.raises(errors, match=r"Row \d+: sample '.*train-./\d+' has no 'JPG', and pictures of other types"):
        list(load(tmp_path, **options))
    if not in_one:
        (tmp_path / "train-1.tar").unlink()
        assert [said(row)[0] for row in load(tmp_path, **options)] == [1] * 12


@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_that_is_null_among_others_is_a_bad_row(tmp_path, streaming):
    picture(0).save(tmp_path / "a.png")
    rows = [{"image": images, "captions": "A dog ."} for images in (["a.png"], [], ["a.png", None])]
    path = write_lines(tmp_path / "train.jsonl", rows)
    options = {"task": "caption", "image_dir": str(tmp_path), "streaming": streaming}
    with pytest.raises((ValueError, datasets.exceptions.DatasetsError), match="Row 2: picture 1 of `image` is null"):
        list(load(path, **options))
    bad_rows = BadRows(tmp_path / "bad_rows.jsonl")
    kept = load_rows(DataArguments(dataset=str(path), **options), "train", bad_rows=bad_rows)
    assert [said(row)[0] for row in kept] == [1, 0]


def test_rows_that_other_code_has_made_are_made_anew(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "train.jsonl", [{"question": "What?", "answer": "That.", "image": "a.png"}])
    make, join = making_rows._turns, making_rows._join_path

    @functools.wraps(make)  # by its name the same
    def earlier(row, *args):
        return make({**row, "answer": "This."}, *args)

    @functools.wraps(join)
    def earlier_join(name, image_dir):
        return join("b.png", image_dir)

    def made():
        row = load(path, task="vqa", image_dir=str(tmp_path))[0]
        return said({**row, "images": []})[2], row["images"][0]["path"]

    with monkeypatch.context() as before:
        before.setattr(making_rows, "_turns", earlier)
        before.setattr(making_rows, "_join_path", earlier_join)
        assert made() == ("This.", str(tmp_path / "b.png"))
    assert made() == ("This.", str(tmp_path / "b.png"))  # as they were kept
    monkeypatch.setitem(sources.MADE_BY, "made_by", "other code")
    assert made() == ("That.", str(tmp_path / "a.png"))


def test_a_split_is_read_by_itself_whatever_the_others_hold(tmp_path):
    # Classes in another order, and a broken line
    for split, names in (("train", ["eel", "dog"]), ("validation", ["dog", "eel"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = [{"text": name, "label": i} for i, name in enumerate(names)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "classes" / f"{split}.parquet")
    args = DataArguments(dataset=str(tmp_path / "classes"), task="classification")
    rows = load_rows(args, "validation", classes=["eel", "dog"])
    assert [(row["text"], row["label"]) for row in rows] == [("dog", 1), ("eel", 0)]
    write_lines(tmp_path / "lines" / "validation.jsonl", [{"source": "one", "target": "eins"}])
    (tmp_path / "lines" / "train.jsonl").write_text("{broken")
    assert len(load(tmp_path / "lines", "validation", task="translation")) == 1
    with pytest.raises(ValueError, match=r"Row 0 of .*train.jsonl"):
        load(tmp_path / "lines", task="translation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "target", "prompt": "Say {source}"}, "`prompt` would do nothing beside `prompt_column`"),
        ({"prompt_column": "target", "max_column_chars": 3}, "`max_column_chars` would do nothing beside"),
        ({"task": "masked", "answer_column": "target", "prompt": "Hi"}, "`prompt` would do nothing beside `task`"),
        ({"prompt": "Say {source"}, r"`prompt` is 'Say {source': .*written twice"),
        ({"prompt": "{source:{nope}}"}, r"`prompt` '{source:{nope}}' names 'nope', but the columns are"),
        ({"prompt": "{source:d}"}, r"Row 0: `prompt` '{source:d}' can't be filled: Unknown format code 'd'"),
    ],
)
def test_a_prompt_that_cannot_be_said_is_refused(tmp_path, options, message):
    path = write_lines(tmp_path / "rows.jsonl", [{"source": "one", "target": "eins"}])
    with pytest.raises(ValueError, match=message):
        load(path, **{"task": "translation", **options})


def test_a_number_is_the_class_that_has_it_for_a_name(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a", "label": 3}, {"text": "b", "label": 1}])
    args = DataArguments(dataset=str(path), task="classification")
    assert load_rows(args, "train", classes=["1", "2", "3"])["label"][:] == [2, 0]
    assert load_rows(args, "train", classes=["none", "few", "some", "many"])["label"][:] == [3, 1]
    for wrong, classes, message in (
        (0.5, ["few", "many"], r"Row 0: `label` is 0.5; expected a class from 0 to 1"),
        (float("nan"), ["few", "many"], r"Row 0: `label` is nan; expected a class from 0 to 1"),
        (float("inf"), ["few", "many"], r"Row 0: `label` is inf; expected a class from 0 to 1"),
        (0, ["2", "3"], r"Row 0: `label` is 0; expected one of the classes \['2', '3'\]"),
    ):
        path = write_lines(tmp_path / "wrong.jsonl", [{"text": "a", "label": wrong}])
        with pytest.raises(ValueError, match=message):
            load_rows(replace(args, dataset=str(path)), "train", classes=classes)
    for classes, labels in ((["1.0", "3.0", "4.0"], [1, 0]), (["3", "1.0", "1"], [0, 2])):
        assert load_rows(args, "train", classes=classes)["label"][:] == labels
    # As pandas stores whole numbers where some rows have none
    path = write_lines(tmp_path / "floats.jsonl", [{"text": "a", "label": 3.0}])
    for classes in (["1", "2", "3"], ["1.0", "2.0", "3.0"], ["0", "3", "3.0"]):
        assert load_rows(replace(args, dataset=str(path)), "train", classes=classes)["label"][:] == [2]
    with pytest.raises(ValueError, match=r"Row 0: `label` is 3.0; expected one of the classes \['1.5', '2.5'"):
        load_rows(replace(args, dataset=str(path)), "train", classes=["1.5", "2.5", "3.5", "4.5"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": conversation("?", "a")[:1], "completion": [{"role": "assistant", "content": None}]},
        {"prompt": None, "completion": conversation("?", "a")[1:]},
        {"prompt": conversation("?", "a")[:1], "completion": [{"role": "assistant", "content": 5}]},
        {"prompt": conversation("?", "a")[:1], "completion": [{"role": "assistant", "content": ["a"]}]},
    ],
    ids=["an answer", "a prompt", "an answer, but a number", "an answer, but a list"],
)
def test_what_is_missing_in_a_row_of_a_mixture_is_never_learnt_as_empty(tmp_path, photographs, collator, row):
    ready = {"prompt": conversation("?", "a")[:1], "completion": [{"role": "assistant", "content": "a", "name": "x"}]}
    path = write_lines(tmp_path / "pairs.jsonl", [ready, row])
    (tmp_path / "other.yaml").write_text(f"task: chat\ndataset: {path}\n")
    mixture = [str(tmp_path / "other.yaml")]
    rows = load_mixture(DataArguments(task="caption", dataset=str(photographs), mixture=mixture))
    wrong = [each for each in rows if each["dataset"] == str(path) and each["source"] == 1]
    assert wrong
    with pytest.raises(
        ValueError, match=r"Row .*(expected text from the assistant, not None|there are no messages in `prompt`)"
    ):
        collator(wrong[:1])


def test_tools_are_not_lost_where_rows_are_put_together_or_answered(tmp_path):
    row = {"prompt": conversation("?", "a")[:1], "completion": conversation("?", "a")[1:], "tools": "[]"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match="has `tools`, which `mixture` and `conversations_per_row` don't take"):
        load_mixture(DataArguments(task="chat", dataset=str(path), conversations_per_row=2))
    row["tools"] = json.dumps([{"type": "function", "function": {"name": "look"}}])
    path = write_lines(tmp_path / "with_tools.jsonl", [row])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="Row 0 has `tools`, which aren't given to a model that is measured"):
            generate_answers(torch.nn.Module(), None, load(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_column_to_learn_the_columns_are_listed(photographs, streaming):
    with pytest.raises(ValueError, match=r"no `messages`.*\['image', .*'captions'.*--answer_column"):
        load(photographs, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("answer", [3, None, ["a", None]])
def test_an_answer_that_is_no_text_names_its_row(tmp_path, answer, streaming):
    good = ["a", "b"] if isinstance(answer, list) else "a"
    answers = [4, 3] if isinstance(answer, int) else [good, answer]
    write_image_folder(tmp_path / "train", [{"caption": caption} for caption in answers])
    number = 0 if isinstance(answer, int) else 1
    with pytest.raises(ValueError, match=f"Row {number}: expected text"):
        list(load(tmp_path, answer_column="caption", streaming=streaming))


def test_a_row_without_any_answer_is_not_left_out_in_silence(tmp_path):
    rows = [{"question": "?", "answers": ["a"]}, {"question": "?", "answers": []}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for is_evaluation in (False, True):
        args = DataArguments(dataset=str(path), task="vqa", answer_column="answers")
        with pytest.raises(ValueError, match="Row 1: `answer_column` 'answers' holds no answer"):
            load_rows(args, "train", is_evaluation=is_evaluation)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_numbers_of_classes_are_those_of_their_names_however_a_split_counts_them(tmp_path, streaming):
    names = ["eel", "dog", "cat"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    stored = Dataset.from_list([{"text": name, "label": i} for i, name in enumerate(names)], features=features)
    stored.to_parquet(tmp_path / "rows.parquet")
    args = DataArguments(dataset=str(tmp_path / "rows.parquet"), task="classification", streaming=streaming)
    for classes in (["cat", "dog", "eel"], names):
        rows = load_rows(args, "train", is_evaluation=True, classes=classes)
        assert [classes[row["label"]] for row in rows] == [row["text"] for row in rows] == names
    with pytest.raises(ValueError, match="Row 2: `label` 'cat' is none of the classes"):
        list(load_rows(args, "train", classes=["dog", "eel"]))
    # Classes without names are known by their numbers
    for classes in (["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]):
        assert [row["label"] for row in load_rows(args, "train", classes=classes)] == [0, 1, 2]
    with pytest.raises(
        ValueError, match=r"has the classes \['eel', 'dog', 'cat'\], but the model knows \['a', 'b', 'c'\]"
    ):
        load_rows(args, "train", classes=["a", "b", "c"])


def test_columns_of_messages_that_are_called_as_those_that_rows_get_are_not_read(tmp_path):
    named = {"source": "books", "row": "first", "references": ["a.org"], "kind": "short", "held_out": True}
    rows = [{"messages": conversation("?", str(i)), **named} for i in range(2)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert load(path)["row"][:] == [0, 1]
    assert {"messages", "row"} == set(load(path).column_names)
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:], "source": "books"} for row in rows]
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    packed = load_mixture(DataArguments(dataset=str(path), task="chat", conversations_per_row=2))
    assert packed["source"][:] == [[0], [1]]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_a_conversation_that_are_no_list_are_refused(tmp_path, streaming):
    row = {"messages": conversation("?", "Yes."), "images": "a.png"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"Column 'images' of .* is .*; expected a list of pictures in each row"):
        list(load(path, streaming=streaming))


@pytest.mark.parametrize("name", ["meta.question", "q[en]", "0"])
def test_a_prompt_names_columns_as_they_are_called(tmp_path, name):
    path = write_lines(tmp_path / "rows.jsonl", [{name: "Why?", "answer": "So."}])
    (row,) = load(path, task="vqa", prompt="{" + name + "!s:>5} Say.")
    assert row["prompt"][0]["content"][-1]["text"] == " Why? Say."


def test_rows_that_share_a_row_may_have_no_pictures(tmp_path):
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    pairs = [
        {
            "images": images,
            "prompt": conversation("?", "a", has_picture=bool(images))[:1],
            "completion": [{"role": "assistant", "content": "a"}],
        }
        for images in ([str(tmp_path / "a.png")], None, [str(tmp_path / "a.png")])
    ]
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    packed = load_mixture(DataArguments(dataset=str(path), task="chat", conversations_per_row=2))
    assert [len(row["conversations"]) for row in packed] == [2, 1]


def test_messages_get_a_length_of_their_texts_and_pictures_where_it_is_asked_for():
    parts = [{"images": ["a.png"], "messages": conversation("What?", "Red", has_picture=True)}]
    assert with_lengths(Dataset.from_list(parts), 100)["length"][:] == [len("WhatX") + len("Red") + 100]
    strings = [{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red"}]}]
    assert with_lengths(Dataset.from_list(strings), 100)["length"][:] == [8]
    numbers = [{"messages": [{"role": "assistant", "content": 5}]}]
    assert with_lengths(Dataset.from_list(numbers), 100)["length"][:] == [0], "the collator names the row"
    known = Dataset.from_list([{**strings[0], "length": 3}])
    assert with_lengths(known, 100) is known


def test_a_question_that_is_no_text_names_its_row(tmp_path):
    write_image_folder(tmp_path / "train", [{"q": "Why?", "a": "So."}, {"q": None, "a": "So."}])
    with pytest.raises(ValueError, match="Row 1: expected text"):
        list(load(tmp_path, prompt_column="q", answer_column="a"))


def test_a_split_without_rows_is_refused(photographs):
    with pytest.raises(ValueError, match=r"train\[50:\].* no data"):
        load(photographs, "train[50:]", answer_column="captions")
    with pytest.raises(ValueError, match="no rows in split 'train'"):
        load(photographs, max_rows=0, answer_column="captions")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows_is_refused(tmp_path, streaming):
    with pytest.raises(ValueError, match="no rows in split 'train'"):
        load(write_lines(tmp_path / "train.jsonl", []), answer_column="answer", streaming=streaming)


def test_files_of_an_unknown_type_are_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has files of types \['\.txt'\]"):
        load(tmp_path)


def test_scenes_are_questions_and_in_training_captions_too(collator):
    args = DataArguments()
    training, held_out = load_rows(args, "train", 5), load_rows(args, "validation", 5)
    prompts = [row["prompt"][0]["content"][-1]["text"] for row in training]
    assert prompts.count("Describe the picture.") == 5
    assert len(training) > 20
    # A scene's rows stay together, so that the first rows are a sample of all kinds
    assert list(training["scene"]) == sorted(training["scene"])
    assert {"prompt", "completion", "kind", "held_out"} <= set(held_out.column_names)
    assert len(held_out) > 20
    for rows in (training, held_out):
        assert rows["row"][:] == list(range(len(rows)))
        batch = collator([rows[i] for i in range(5)])
        assert batch["pixel_values"].shape == (5, 3, 16, 16)


def test_pictures_can_be_left_out(photographs):
    rows = load(photographs, answer_column="captions", image_column="")
    assert len(rows) == len(FLAT)
    assert "images" not in rows.column_names
    assert all(part["type"] == "text" for row in rows for part in row["prompt"][0]["content"])


def test_scenes_of_an_unknown_split_are_refused():
    with pytest.raises(ValueError, match="`split` must be one of"):
        load_rows(DataArguments(), "test")


def test_blank_pictures_are_gray_and_of_the_same_size(photographs):
    for streaming in (False, True):
        rows = load(photographs, answer_column="captions", streaming=streaming)
        blanked = list(blank(rows))
        assert len(blanked) == len(FLAT)
        for old, new in zip(rows, blanked, strict=True):
            assert [image.size for image in pictures(new)] == [image.size for image in pictures(old)]
            assert all(image.getcolors() == [(image.width * image.height, BLANK_GRAY)] for image in pictures(new))
            assert {**new, "images": None} == {**old, "images": None}


def test_blanking_leaves_the_rows_it_was_given(photographs):
    rows = load(photographs, answer_column="captions")
    blank(rows)[0]
    assert pictures(rows[0])[0].getcolors() != [(20 * 16, BLANK_GRAY)]


def test_blank_rows_can_be_read_in_batches(photographs):
    rows = blank(load(photographs, answer_column="captions"))
    (batch,) = rows.iter(batch_size=10)
    assert [images[0].getpixel((0, 0)) for images in batch["images"]] == [BLANK_GRAY] * len(FLAT)


def test_text_without_pictures_can_be_blanked(tmp_path):
    rows = load(write_lines(tmp_path / "train.jsonl", [{"messages": conversation("What?", "That.")}]))
    (row,) = blank(rows)
    assert said(row) == (0, "What?", "That.")


def test_pictures_given_by_their_paths_can_be_blanked(tmp_path):
    picture(3).save(tmp_path / "a.png")
    row = {"images": [str(tmp_path / "a.png")], "messages": conversation("What?", "That.", has_picture=True)}
    (blanked,) = blank(load(write_lines(tmp_path / "lines" / "train.jsonl", [row])))
    assert [image.size for image in pictures(blanked)] == [(23, 16)]
    assert pictures(blanked)[0].getpixel((5, 5)) == BLANK_GRAY


def test_numbers_count_rows_in_their_order():
    rows = Dataset.from_list([{"a": letter} for letter in "cab"])
    assert [row["row"] for row in number_rows(rows)] == [0, 1, 2]
    assert list(number_rows(rows.to_iterable_dataset())) == list(number_rows(rows))


def test_a_tokenizer_is_trained_on_everything_that_is_said(photographs, tmp_path):
    expected = [text for _, caption in FLAT for text in ("Describe the picture.", caption)]
    for streaming in (False, True):
        assert list(texts_of(load(photographs, answer_column="captions", streaming=streaming))) == expected
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    path = write_lines(tmp_path / "train.jsonl", [{"messages": plain}])
    for streaming in (False, True):
        assert list(texts_of(load(path, streaming=streaming))) == ["What?", "That."]


def test_reading_again_gives_the_same_rows(photographs):
    args = DataArguments(dataset=str(photographs), answer_column="captions")
    first, second = load_rows(args, "train"), load_rows(replace(args), "train")
    assert first.remove_columns("images").to_list() == second.remove_columns("images").to_list()


def conversations(row):
    return [said(each) for each in row["conversations"]]


def test_captions_of_a_photograph_can_share_a_row(photographs, collator):
    args = DataArguments(task="caption", dataset=str(photographs), conversations_per_row=2)
    rows = load_mixture(args)
    # Two to a row, in their order; of three captions the last has a row of its own
    expected = [
        [(1, "Describe the picture.", caption) for caption in captions[start : start + 2]]
        for captions in CAPTIONS
        for start in range(0, len(captions), 2)
    ]
    assert [conversations(row) for row in rows] == expected
    widths = [20 + i for i, captions in enumerate(CAPTIONS) for _ in range(0, len(captions), 2)]
    assert [[image.size for image in pictures(row)] for row in rows] == [[(width, 16)] for width in widths]
    assert rows["row"][:] == list(range(len(rows)))
    texts = sum(len("Describe the picture.") + len(text) for *_, text in expected[0])
    assert rows["length"][0] == args.chars_per_picture + texts
    assert list(texts_of(rows)) == list(texts_of(load_mixture(replace(args, conversations_per_row=1))))
    batch = collator(list(rows))
    assert len(batch["pixel_values"]) == len(rows) and batch["segment_ids"].max() == 2
    blanked = load_mixture(replace(args, blank_images=True))
    assert [conversations(row) for row in blanked] == expected
    assert {image.getcolors()[0][1] for row in blanked for image in row["images"]} == {(128, 128, 128)}


def test_rows_with_an_image_dir_are_mapped_once_for_all_runs(tmp_path):
    for column, some in (("image", ["a.png", "c/d.png", None]), ("photos", [["a.png"], ["b.png", "c/d.png"], []])):
        rows = [{column: name, "question": f"{i}?", "answer": str(i)} for i, name in enumerate(some)]
        path = write_lines(tmp_path / column / "questions.jsonl", rows)
        options = {"task": "vqa", "image_column": column, "image_dir": str(tmp_path)}
        first, second = load(path, **options), load(path, **options)
        assert first._fingerprint == second._fingerprint
        assert first.cache_files == second.cache_files != []
        given = [name if isinstance(name, list) else [name] * (name is not None) for name in some]
        assert [[image["path"] for image in row["images"]] for row in first] == [
            [str(tmp_path / name) for name in row] for row in given
        ]


def test_questions_about_the_same_picture_find_each_other(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    files = ["a.png", "b.png", "a.png", None, "a.png", None]
    rows = [{"image": name, "question": f"{i}?", "answer": str(i)} for i, name in enumerate(files)]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    args = DataArguments(task="vqa", dataset=str(path), image_dir=str(tmp_path), conversations_per_row=8)
    rows = load_mixture(args)
    # Rows without a picture have nothing to share
    assert [[answer for *_, answer in conversations(row)] for row in rows] == [["0", "2", "4"], ["1"], ["3"], ["5"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conversations_per_row": 0}, "is 0; expected 1 or more"),
        ({"task": "retrieval"}, "for tasks that write, not for 'retrieval'"),
        ({"streaming": True}, "not with `streaming`"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(photographs, options, message):
    options = {"task": "caption", "dataset": str(photographs), "conversations_per_row": 2, **options}
    with pytest.raises(ValueError, match=message):
        load_mixture(DataArguments(**options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mixture: [another.yaml]", "names another `mixture`"),
        ("max_length: 9", "`max_length` would do nothing: it is for the whole mixture"),
        ("eval_split: test", "`eval_split` would do nothing: a mixture is evaluated on rows of its first data set"),
    ],
)
def test_what_a_file_of_a_mixture_cannot_say_is_refused(photographs, tmp_path, line, message):
    part = f"task: caption\ndataset: {photographs}\n"
    (tmp_path / "other.yaml").write_text(part + line)
    with pytest.raises(ValueError, match=message):
        load_mixture(DataArguments(task="caption", dataset=str(photographs), mixture=[str(tmp_path / "other.yaml")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classification", "answer_column": "text"}, "`answer_column` would do nothing: for classification"),
        ({"task": "vqa", "label_column": "class"}, "`label_column` would do nothing: for 'vqa' `answer_column` names"),
        (
            {"task": "retrieval", "prompt_column": "question"},
            "`prompt_column` would do nothing: for 'retrieval' there",
        ),
        ({"task": "vqa", "max_answers": 9}, "`max_answers` would do nothing: it is for classification"),
        ({"task": "vqa", "dataset_config": "small"}, "`dataset_config` would do nothing: '.*' is here"),
        ({"dataset": "scenes", "dataset_config": "small"}, "`dataset_config` would do nothing: scenes are drawn here"),
        ({"dataset": "scenes", "streaming": True}, "`streaming` would do nothing: scenes are drawn here"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, options, message):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "b", "question": "c", "answer": "d"}\n')
    with pytest.raises(ValueError, match=message):
        load_rows(DataArguments(**{"dataset": str(tmp_path), **options}), "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no rows in split 'train'"),
        ('{"text": "a", "label": null}\n' * 2, "No row of `dataset` .* has a `label`"),
        (
            '{"text": "a", "label": 30000000}\n',
            "`label` has the number 30000000; expected those of classes, from 0 to",
        ),
    ],
)
def test_classes_of_nothing_or_too_many_are_told(tmp_path, lines, message):
    (tmp_path / "train.jsonl").write_text(lines)
    args = DataArguments(task="classification", dataset=str(tmp_path), image_column="")
    with pytest.raises(ValueError, match=message):
        read_classes(args, BadRows(tmp_path / "out" / "bad_rows.jsonl"))
