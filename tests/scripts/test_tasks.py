"""Each task makes its rows from plain columns, trains from one pretrained checkpoint, and is measured."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_lines import arguments
from datasets import ClassLabel, Dataset, List
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from duostream import DuoStreamForPreTraining, DuoStreamPreTrainingCollator
from duostream.processing.data_collator_duostream import load_pictures
from duostream.scripts import evaluate, finetune, measuring, pretrain
from duostream.scripts import rows as making_rows
from duostream.scripts.arguments import DataArguments, DuoStreamTrainingArguments, parse
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.card import read_evaluation
from duostream.scripts.data import blank, load_mixture, load_rows, read_classes
from duostream.scripts.tasks import TASKS
from duostream.scripts.trainer import OBJECTIVES, DuoStreamTrainer

pytestmark = pytest.mark.usefixtures("workplace")

RECIPES = Path(finetune.__file__).parent / "recipes"
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 4, **QUIET}
SENTENCES = ["a good film", "a bad film", "a very good film", "a very bad film"]
GENERATED = {name for name, task in TASKS.items() if task.answer_column and name not in ("retrieval", "masked")}


def pictures(row):
    return load_pictures(row["images"], "A row")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def photographs(workplace):
    folder = workplace / "photographs"
    for split in ("train", "validation"):
        rows = []
        for i in range(4):
            (folder / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30 + i, 24), (60 * i, 90, 20)).save(folder / split / f"{i}.jpg")
            captions = [f"picture {i} of four", "a dog runs through the snow"]
            rows.append({"file_name": f"{i}.jpg", "captions": captions, "label": ["dark", "light"][i // 2]})
        write(folder / split / "metadata.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def texts(workplace):
    """Sentences with classes of every kind, and what is said of them."""
    rows = [
        {
            "text": sentence,
            "label": i % 2,
            "name": ["good", "bad"][i % 2],
            "score": i + 0.5,
            "answers": ["film", "good film"] if i % 2 == 0 else ["film"],
            "question": f"Is {sentence} good?",
            "answer": ["yes", "no"][i % 2],
            "source": sentence,
            "target": sentence[::-1],
            "document": f"{sentence}. It is long.",
            "summary": sentence,
        }
        for i, sentence in enumerate(SENTENCES)
    ]
    for split in ("train", "validation"):
        write(workplace / "texts" / f"{split}.jsonl", rows)
    return workplace / "texts"


@pytest.fixture(scope="module")
def pretrained(workplace, photographs):
    """With all objectives."""
    weights = {f"{name}_weight": 1.0 for name in ("lm", "mlm", "itc", "itm")}
    options = {"task": "caption", "dataset": photographs, "vocab_size": 300, "output_dir": "pretrained"}
    pretrain.main(arguments(**options, **weights, logging_steps=1, **SHORT))
    return workplace / "pretrained"


def text_of(messages):
    return next(part["text"] for part in messages[0]["content"] if part["type"] == "text")


def load(path, split="train", is_evaluation=False, classes=None, **options):
    return load_rows(DataArguments(dataset=str(path), **options), split, None, is_evaluation, classes)


def test_a_prompt_is_made_of_the_rows_columns(texts):
    rows = load(texts, task="translation", prompt="Backwards, {name}: {source}")
    assert [text_of(row["prompt"]) for row in rows][:2] == [
        "Backwards, good: a good film",
        "Backwards, bad: a bad film",
    ]
    assert [text_of(row["completion"]) for row in rows] == [sentence[::-1] for sentence in SENTENCES]


@pytest.mark.parametrize("task", sorted(GENERATED - {"caption"}))
def test_a_task_knows_its_prompt_and_its_columns(texts, task):
    columns = {
        "vqa": ("question", "answer"),
        "translation": ("source", "target"),
        "summarization": ("document", "summary"),
    }
    asked, said = columns[task]
    plain = Dataset.from_json(str(texts / "train.jsonl"))
    rows = load(texts, task=task)
    assert [plain[i][asked] in text_of(row["prompt"]) for i, row in enumerate(rows)] == [True] * 4
    assert [text_of(row["completion"]) for row in rows] == plain[said]


def test_a_caption_is_a_row_in_training_and_a_reference_in_evaluation(photographs):
    assert len(load(photographs, task="caption")) == 8
    rows = load(photographs, "validation", is_evaluation=True, task="caption")
    assert [row["references"] for row in rows][1] == ["picture 1 of four", "a dog runs through the snow"]
    assert len(rows) == 4


def test_pictures_may_be_paths_that_start_from_a_folder(photographs, workplace):
    path = write(workplace / "paths.jsonl", [{"image": f"{i}.jpg", "question": "?", "answer": "!"} for i in range(4)])
    rows = load(path, task="vqa", image_dir=str(photographs / "train"))
    assert [pictures(row)[0].size for row in rows] == [(30 + i, 24) for i in range(4)]


def test_a_row_may_have_several_paths_of_pictures(photographs, workplace):
    rows = [{"image": ["0.jpg", "2.jpg"], "question": "?", "answer": "!"}]
    rows = load(write(workplace / "lists.jsonl", rows), task="vqa", image_dir=str(photographs / "train"))
    assert [image.size for image in pictures(rows[0])] == [(30, 24), (32, 24)]


def test_what_fills_a_prompt_can_be_cut_and_that_is_said(texts, monkeypatch):
    said = []
    monkeypatch.setattr(making_rows.logger, "warning", said.append)
    rows = load(texts, task="summarization", max_column_chars=6)
    assert text_of(rows[0]["prompt"]) == "Summarize: a good"
    assert f"Row 0: column 'document' was cut from {len(SENTENCES[0]) + 13} to 6 characters" in said
    assert [text_of(row["completion"]) for row in rows] == SENTENCES
    # Of no other column, as the answers, which are whole
    assert len(said) == len(SENTENCES)


@pytest.mark.parametrize(
    ("column", "classes", "labels"),
    [
        ("label", ["0", "1"], [0, 1, 0, 1]),
        ("name", ["bad", "good"], [1, 0, 1, 0]),
        ("score", [], [0.5, 1.5, 2.5, 3.5]),
        ("answers", ["film", "good film"], [[1, 1], [1, 0], [1, 1], [1, 0]]),
    ],
)
def test_classes_are_names_numbers_or_lists_of_answers(texts, column, classes, labels):
    args = DataArguments(dataset=str(texts), task="classification", label_column=column)
    assert read_classes(args) == classes
    rows = load_rows(args, "train", classes=classes)
    assert rows["label"] == labels
    assert rows["text"] == SENTENCES


def test_one_class_is_none_to_tell_from_others(pretrained, workplace, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": text, "label": "good"} for text in SENTENCES])
    options = {"checkpoint": pretrained, "task": "classification", "eval_split": "", **SHORT}
    with pytest.raises(ValueError, match="leave one class, 'good'; expected two or more"):
        finetune.main(arguments(**options, dataset=path, output_dir=tmp_path / "out"))


def test_only_the_most_frequent_answers_are_classes(texts):
    args = DataArguments(dataset=str(texts), task="classification", label_column="answers", max_answers=1)
    assert read_classes(args) == ["film"]


def test_an_answer_that_is_no_class_is_told_beside_what_was_predicted(pretrained, tmp_path):
    answers = [["yes"], ["yes", "no"], ["other"], ["no", "other"]]
    rows = [{"text": text, "label": each} for text, each in zip(SENTENCES, answers, strict=True)]
    data = {"task": "classification", "dataset": write(tmp_path / "rows.jsonl", rows), "eval_split": "train"}
    options = {"checkpoint": pretrained, "max_answers": 2, "output_dir": tmp_path / "out", **SHORT}
    finetune.main(arguments(**options, **data))
    evaluate.main(arguments(checkpoint=tmp_path / "out", **data, output_dir=tmp_path / "figures"))
    lines = (tmp_path / "figures" / "predictions.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert [result["label"] for result in results] == answers
    assert results[2]["score"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "guess"}, "`task` is 'guess'; there are 'chat', 'caption'"),
        ({"task": "translation", "prompt": "{fr}"}, "names 'fr', but the columns are"),
        ({"task": "caption"}, "`answer_column` is 'captions', but the columns are"),
        ({"task": "classification", "label_column": "class"}, "`label_column` is 'class', but the columns are"),
    ],
)
def test_what_a_task_misses_is_named(texts, options, message):
    with pytest.raises(ValueError, match=message):
        load(texts, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [("new", "Row 1: `label` 'new' is none of the classes"), (7, "Row 1: `label` is 7; expected")],
)
def test_an_unknown_class_names_its_row(workplace, value, message):
    known = ["a", "b"] if isinstance(value, str) else ["0", "1"]
    first = "a" if isinstance(value, str) else 0
    path = write(workplace / f"labels_{value}.jsonl", [{"text": "x", "label": first}, {"text": "y", "label": value}])
    with pytest.raises(ValueError, match=message):
        load(path, task="classification", classes=known)


def test_scores_are_no_answers(workplace):
    for name, scores in (("hot", [1, 0]), ("soft", [0.25, 0.75])):
        path = write(workplace / f"{name}.jsonl", [{"text": "x", "label": scores}])
        with pytest.raises(
            ValueError, match=rf"Row 0: `label` is {re.escape(str(scores))}; expected a list of answers"
        ):
            read_classes(DataArguments(dataset=str(path), task="classification"))


def test_lists_of_numbers_that_stand_for_names_are_those_names(workplace):
    feature = List(ClassLabel(names=["film", "good", "bad"]))
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [[2, 0], [1]]})
    path = workplace / "named.parquet"
    rows.cast_column("label", feature).to_parquet(path)
    args = DataArguments(dataset=str(path), task="classification")
    assert read_classes(args) == ["film", "good", "bad"]
    assert load_rows(args, "train", classes=["bad", "film", "good"])["label"] == [[1, 1, 0], [0, 0, 1]]


def test_a_row_without_a_label_is_left_out_and_written_down(workplace):
    path = write(workplace / "gaps.jsonl", [{"text": "x", "label": value} for value in ("a", None, "b")])
    args = DataArguments(dataset=str(path), task="classification")
    bad_rows = BadRows(workplace / "bad_rows.jsonl")
    assert read_classes(args, bad_rows) == ["a", "b"]
    assert load_rows(args, "train", classes=["a", "b"], bad_rows=bad_rows)["label"] == [0, 1]
    assert bad_rows.report() == 1
    with pytest.raises(ValueError, match="Row 1: `label` is None"):
        read_classes(args)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
def test_a_label_to_come_near_to_that_is_no_number_names_its_row(workplace, wrong):
    path = write(workplace / f"near_{wrong}.jsonl", [{"text": "x", "label": value} for value in (0.5, wrong)])
    with pytest.raises(ValueError, match=f"Row 1: `label` is {wrong}; expected a number to come near to"):
        load(path, task="classification", classes=[])


@pytest.mark.parametrize("wrong", [-1, None])
def test_a_label_that_is_none_of_the_kinds_names_its_row(workplace, wrong):
    path = write(workplace / f"odd_{wrong}.jsonl", [{"text": "x", "label": value} for value in (1, wrong, 0)])
    with pytest.raises(ValueError, match=f"Row 1: `label` is {wrong}"):
        read_classes(DataArguments(dataset=str(path), task="classification"))


def test_scenes_have_no_classes():
    with pytest.raises(ValueError, match="`task` 'classification' needs a data set of its own"):
        load("scenes", task="classification")


def test_a_mixture_draws_every_row_and_the_heavier_task_more_often(photographs, texts, workplace):
    recipe = workplace / "translation.yaml"
    recipe.write_text(yaml.safe_dump({"task": "translation", "dataset": str(texts), "weight": 3.0}))
    args = DataArguments(task="caption", dataset=str(photographs), mixture=[str(recipe)])
    rows = load_mixture(args)
    prompts = [text_of(row["prompt"]) for row in rows]
    captions = [text_of(row["completion"]) for row in rows if row["images"]]
    assert len(set(prompts)) == 5 and len(set(captions)) == 5
    assert sum(prompt.startswith("Translate") for prompt in prompts) > len(prompts) / 2
    assert [row["row"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"task": "classification"}, "can't be mixed"), ({"task": "translation", "weight": 0.0}, "expected more than 0")],
)
def test_a_mixture_of_what_does_not_mix_is_an_error(photographs, texts, workplace, options, message):
    recipe = workplace / "wrong.yaml"
    recipe.write_text(yaml.safe_dump({"dataset": str(texts), **options}))
    with pytest.raises(ValueError, match=message):
        load_mixture(DataArguments(task="caption", dataset=str(photographs), mixture=[str(recipe)]))


def test_a_mixture_takes_conversations_as_they_stand_in_files(photographs, texts, workplace):
    recipe = workplace / "beside.yaml"
    recipe.write_text(yaml.safe_dump({"task": "translation", "dataset": str(texts)}))
    picture = str(photographs / "train" / "0.jpg")
    question, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    for name, images, asked in (("parts", [picture], {**question, "content": parts}), ("plain", [], question)):
        path = write(workplace / f"{name}.jsonl", [{"images": images, "prompt": [asked], "completion": [answer]}] * 2)
        rows = load_mixture(DataArguments(task="chat", dataset=str(path), mixture=[str(recipe)]))
        found = [row for row in rows if row["completion"][0]["content"] == [{"type": "text", "text": "That."}]]
        assert found and len(found) < len(rows)
        words = [{"type": "text", "text": "What?"}]
        told = [{"type": "image", "text": None}, *words] if images else words
        assert all(row["prompt"][0]["content"] == told and len(row["images"]) == len(images) for row in found)


@pytest.mark.parametrize("conversations_per_row", [1, 2])
def test_a_bad_row_of_a_mixture_is_named_by_its_data_set_and_number(workplace, conversations_per_row):
    lines = [{"image": "nowhere.png", "captions": "a dog"}, {"image": None, "captions": "a cat"}]
    broken = write(workplace / "broken.jsonl", [*lines, lines[0]])
    gaps = write(workplace / "gaps_in_text.jsonl", [{"source": "x", "target": text} for text in ("a", None, "b")])
    recipe = workplace / "gaps.yaml"
    recipe.write_text(yaml.safe_dump({"task": "translation", "dataset": str(gaps)}))
    options = {"task": "caption", "dataset": str(broken), "image_dir": str(workplace), "mixture": [str(recipe)]}
    bad_rows = BadRows(workplace / "bad_rows_of_a_mixture.jsonl")
    rows = load_mixture(DataArguments(**options, conversations_per_row=conversations_per_row), bad_rows=bad_rows)
    bad_rows.leave_out(rows, lambda row: load_pictures(row["images"], "a row"))
    told = [json.loads(line) for line in bad_rows.path.read_text().splitlines()]
    named = {(Path(line["dataset"]).name, line["row"]) for line in told}
    assert named == {("broken.jsonl", 0), ("broken.jsonl", 2), ("gaps_in_text.jsonl", 1)}
    assert bad_rows.report() == 3


def test_a_mixture_can_hide_its_pictures(photographs, texts, workplace):
    recipe = workplace / "text.yaml"
    recipe.write_text(yaml.safe_dump({"task": "translation", "dataset": str(texts)}))
    args = DataArguments(task="caption", dataset=str(photographs), mixture=[str(recipe)], blank_images=True)
    pictures = [picture for row in load_mixture(args) for picture in row["images"]]
    assert pictures and all(picture.getextrema() == ((128, 128),) * 3 for picture in pictures)
    for option, value in (("blank_images", True), ("on_bad_rows", "skip")):
        recipe.write_text(yaml.safe_dump({"task": "translation", "dataset": str(texts), option: value}))
        with pytest.raises(ValueError, match=f"`{option}` would do nothing: it is for the whole mixture"):
            load_mixture(replace(args))


def test_pretraining_without_masks_measures_a_loss(photographs, tmp_path):
    options = {
        "task": "caption",
        "dataset": photographs,
        "vocab_size": 300,
        "itc_weight": 1.0,
        "eval_strategy": "steps",
    }
    pretrain.main(arguments(**options, eval_steps=1, output_dir=tmp_path, **SHORT))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["eval_loss"] > 0 for entry in state["log_history"] if "eval_loss" in entry] == [True, True]


@pytest.mark.slow
def test_smoothed_labels_are_for_tokens_and_classes_only(pretrained, photographs, texts, tmp_path):
    options = {"checkpoint": pretrained, "output_dir": tmp_path, "label_smoothing_factor": 0.1, **SHORT}
    with pytest.raises(ValueError, match="other losses know no smoothing"):
        finetune.main(arguments(task="retrieval", dataset=photographs, **options))
    finetune.main(arguments(task="caption", dataset=photographs, **options))
    finetune.main(arguments(task="classification", dataset=texts, **options))
    with pytest.raises(ValueError, match="with one class a row"):
        finetune.main(arguments(task="classification", dataset=texts, label_column="answers", **options))


@pytest.mark.slow
def test_a_classifier_goes_on_to_other_classes(pretrained, texts, tmp_path):
    checkpoint = pretrained
    for column, kind in (("label", "single_label"), ("answers", "multi_label"), ("score", "regression")):
        options = {"task": "classification", "dataset": texts, "label_column": column}
        finetune.main(arguments(checkpoint=checkpoint, **options, output_dir=tmp_path / column, **SHORT))
        checkpoint = tmp_path / column
        problem_type = json.loads((checkpoint / "config.json").read_text())["problem_type"]
        assert problem_type.startswith(kind)
        evaluate.main(arguments(checkpoint=checkpoint, **options, output_dir=tmp_path / "out", report=True))
    assert "mse" in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "<h2>The rows that score lowest</h2>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("names", [["good", "bad"], ["sun", "rain"], [0, 1]])
def test_a_classifier_keeps_its_head_for_its_classes_in_its_order_and_no_other(pretrained, texts, tmp_path, names):
    options = {"task": "classification", "label_column": "name", **SHORT}
    first = {**options, "checkpoint": pretrained, "dataset": texts, "output_dir": tmp_path / "first"}
    finetune.main(arguments(**first))
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    # In an order that no rows have by themselves
    config |= {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    rows = [{"text": sentence, "name": names[i % 2]} for i, sentence in enumerate(SENTENCES)]
    for split in ("train", "validation"):
        write(tmp_path / "rows" / f"{split}.jsonl", rows)
    again = {"checkpoint": tmp_path / "first", "dataset": tmp_path / "rows", "output_dir": tmp_path / "again"}
    finetune.main(arguments(**options, **again, learning_rate=0))
    one, other = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("first", "again"))
    classes = {"good": ["good", "bad"], "sun": ["rain", "sun"], 0: ["0", "1"]}[names[0]]
    assert list(other.config.id2label.values()) == classes
    # Numbers may be those of any names
    assert torch.equal(one.score.weight, other.score.weight) == (names != ["sun", "rain"])
    assert other.score.weight.std().item() == pytest.approx(other.config.initializer_range, rel=0.5)


def test_a_figure_that_is_no_number_is_null(pretrained, texts, tmp_path):
    options = {"task": "classification", "dataset": texts, "label_column": "score"}
    finetune.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "model", **SHORT))
    options |= {"checkpoint": tmp_path / "model", "output_dir": tmp_path / "out", "max_eval_rows": 1}
    evaluate.main(arguments(**options, report=True))
    written = (tmp_path / "out" / "metrics.json").read_text()
    # Of one row there is no correlation
    assert json.loads(written, parse_constant=pytest.fail)["pearson"] is None
    assert "pearson" not in read_evaluation(tmp_path / "out")["figures"]
    assert "<td>pearson</td><td>None</td>" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_of_captions_shows_pictures(pretrained, photographs, tmp_path):
    options = {"checkpoint": pretrained, "task": "caption", "dataset": photographs, "max_new_tokens": 3}
    evaluate.main(arguments(**options, output_dir=tmp_path, report=True))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 1 + 2 * 4
    assert "cider_d" in page and "http" not in page.replace("https://github.com", "")
    with pytest.raises(ValueError, match="not with `streaming`"):
        evaluate.main(arguments(**options, output_dir=tmp_path, report=True, streaming=True))


def test_an_earlier_report_does_not_stay_beside_new_figures(pretrained, texts, tmp_path):
    (tmp_path / "report.html").touch()
    options = {"checkpoint": pretrained, "task": "translation", "dataset": texts, "max_new_tokens": 2}
    evaluate.main(arguments(**options, max_eval_rows=1, output_dir=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "predictions.jsonl"}


def test_answers_that_are_all_cut_off_are_told_before_any_is_generated(pretrained, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "answer", None)
    options = {"checkpoint": pretrained, "task": "translation", "dataset": texts, "max_length": 2}
    with pytest.raises(ValueError, match="`max_length` is 2, which cuts off all answers"):
        evaluate.main(arguments(**options, output_dir=tmp_path / "out"))


@pytest.mark.parametrize(
    "options",
    [
        {"mixture": ["a.yaml"]},
        {"conversations_per_row": 5},
        {"on_bad_rows": "skip"},
        {"max_train_rows": 9},
        {"train_split": "train[90%:]"},
        {"weight": 2},
        {"chars_per_picture": 9},
    ],
    ids=str,
)
def test_options_of_rows_to_train_on_are_refused_in_evaluation(options, tmp_path):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` would do nothing: it is for rows to train on"):
        evaluate.main(arguments(checkpoint="nowhere", output_dir=tmp_path / "out", **options))


def test_texts_are_cut_where_they_are_measured_on_the_way_too(pretrained, tmp_path):
    rows = [{"text": f"{word} " * 5000, "label": word} for word in ("good", "bad")]
    for split in ("train", "validation"):
        write(tmp_path / "rows" / f"{split}.jsonl", rows)
    options = {"task": "classification", "dataset": tmp_path / "rows", "image_column": "", "max_length": 16}
    finetune.main(arguments(checkpoint=pretrained, **options, metric_rows=2, output_dir=tmp_path / "model", **SHORT))
    measured = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    evaluate.main(arguments(checkpoint=tmp_path / "model", **options, output_dir=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["accuracy"] == measured["eval_accuracy"]


def test_rows_without_pictures_beside_rows_with_some_are_evaluated_and_shown(pretrained, photographs, tmp_path):
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"}]
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, said[1]]
    picture = str(next(photographs.rglob("*.jpg")))
    write(tmp_path / "chats" / "validation.jsonl", [{"messages": said}, {"images": [picture], "messages": seen}])
    options = {"task": "chat", "dataset": tmp_path / "chats", "max_new_tokens": 2, "report": True}
    evaluate.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out" / "samples").iterdir()} == {"1_0.png"}
    assert (tmp_path / "out" / "report.html").read_text().count("<img") >= 2


@pytest.mark.parametrize("is_ready", [False, True], ids=["columns", "messages"])
def test_an_empty_reference_is_told_before_training_and_answers(pretrained, tmp_path, monkeypatch, is_ready):
    monkeypatch.setattr(measuring, "batches_of", None)
    monkeypatch.setattr(measuring, "answer", None)
    pairs = [("a?", "b"), ("b?", " ")]
    rows = [{"question": question, "answer": text} for question, text in pairs]
    if is_ready:
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    write(tmp_path / "rows" / "train.jsonl", rows[:1] * 4)
    write(tmp_path / "rows" / "validation.jsonl", rows)
    options = {"checkpoint": pretrained, "task": "vqa", "dataset": tmp_path / "rows", "output_dir": tmp_path / "out"}
    told = r"Row 1: expected references with some text in each, not \[' '\]"
    with pytest.raises(ValueError, match=told):
        evaluate.main(arguments(**options))
    with pytest.raises(ValueError, match=told):
        finetune.main(arguments(**options, metric_rows=2, eval_strategy="steps", **{**SHORT, "logging_steps": 1}))
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_an_answer_that_is_cut_off_does_not_change_the_loss_of_the_others(pretrained):
    model, processor = (each.from_pretrained(pretrained) for each in (AutoModelForImageTextToText, AutoProcessor))
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes"}]}
        for question in ("What?", "What? " * 50)
    ]
    losses = [
        measuring.evaluation_loss(model, processor, Dataset.from_list(some), batch_size, max_length=60)
        for some, batch_size in ((rows[:1], 1), (rows, 1), (rows, 2))
    ]
    assert losses == [pytest.approx(losses[0], rel=1e-4)] * 3


def test_pretraining_logs_each_objective(pretrained):
    state = json.loads((pretrained / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        total = sum(entry[name] for name in OBJECTIVES)
        assert float(entry["loss"]) == pytest.approx(total, rel=1e-2)
    assert json.loads((pretrained / "config.json").read_text())["architectures"] == ["DuoStreamForPreTraining"]


FIGURES = {
    "caption": {"exact_match", "cider_d", "bleu", "chrf", "bleu_signature", "loss"},
    "vqa": {"exact_match", "vqa_accuracy", "loss"},
    "translation": {"bleu", "chrf", "loss"},
    "summarization": {"rouge1", "rouge2", "rougeL", "loss"},
    "classification": {"accuracy", "f1_macro"},
    "retrieval": {"text_to_image_recall@1", "image_to_text_median_rank"},
    "masked": {"accuracy", "loss", "num_masked"},
}


@pytest.mark.parametrize("task", FIGURES)
def test_each_task_is_learnt_and_measured(pretrained, photographs, texts, tmp_path, task):
    options = {"task": task, "dataset": photographs if task in ("caption", "retrieval") else texts}
    finetune.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "model", metric_rows=4, **SHORT))
    measured = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    names = {name for name in FIGURES[task] if not name.endswith("signature")}
    assert {f"eval_{name}" for name in names} <= set(measured)
    evaluate.main(arguments(checkpoint=tmp_path / "model", **options, output_dir=tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert FIGURES[task] | {"command", "seed", "data_fingerprint", "versions", "num_rows"} <= set(record)
    assert record["num_rows"] == 4
    same = {name for name in names if name != "loss"}
    assert {name: record[name] for name in same} == {name: measured[f"eval_{name}"] for name in same}


def test_pictures_are_classified_by_name(pretrained, photographs, tmp_path):
    options = {"task": "classification", "dataset": photographs, "prompt": ""}
    finetune.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "model", **SHORT))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "dark", 1: "light"}
    evaluate.main(arguments(checkpoint=tmp_path / "model", **options, output_dir=tmp_path / "out"))
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [["dark"], ["dark"], ["light"], ["light"]]


def test_conversations_are_classified(pretrained, workplace, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "So."}], "label": i % 2}
        for i, text in enumerate(SENTENCES)
    ]
    for split in ("train", "validation"):
        write(workplace / "conversations" / f"{split}.jsonl", rows)
    options = {"task": "classification", "dataset": workplace / "conversations"}
    finetune.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "model", **SHORT))
    evaluate.main(arguments(checkpoint=tmp_path / "model", **options, output_dir=tmp_path / "out"))
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [["0"], ["1"]] * 2


def test_an_empty_text_of_a_picture_is_refused_and_its_row_named(pretrained, photographs, workplace, tmp_path):
    rows = [{"image": f"{i}.jpg", "captions": ["a dog", text]} for i, text in enumerate(("a cat", " "))]
    path = write(workplace / "empty_captions.jsonl", rows)
    options = {"checkpoint": pretrained, "task": "retrieval", "dataset": path, "image_dir": photographs / "train"}
    with pytest.raises(ValueError, match="Row 1: expected texts that belong to the picture, found an empty one"):
        evaluate.main(arguments(**options, output_dir=tmp_path / "out"))


@pytest.mark.slow
def test_pictures_that_are_learnt_by_heart_are_found(pretrained, photographs, tmp_path):
    options = {"task": "retrieval", "dataset": photographs, "answer_column": "captions"}
    rows = [json.loads(line) for line in (photographs / "train" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["captions"] = row["captions"][:1]
    folder = tmp_path / "one_caption"
    for split in ("train", "validation"):
        write(folder / split / "metadata.jsonl", rows)
        for i in range(4):
            (folder / split / f"{i}.jpg").write_bytes((photographs / "train" / f"{i}.jpg").read_bytes())
    training = {"max_steps": 60, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **QUIET}
    options["dataset"] = folder
    finetune.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "model", **training))
    evaluate.main(arguments(checkpoint=tmp_path / "model", **options, output_dir=tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["text_to_image_recall@1"] == record["image_to_text_recall@1"] == 1


def test_a_picture_that_several_rows_have_is_one_to_find(pretrained, photographs):
    model = AutoModelForZeroShotImageClassification.from_pretrained(pretrained)
    processor = AutoProcessor.from_pretrained(pretrained)
    stored = [{"bytes": (photographs / "train" / f"{i}.jpg").read_bytes(), "path": None} for i in (0, 1)]
    rows = [{"images": [stored[i]], "text": f"picture {number}"} for number, i in enumerate((0, 1, 0, 0))]
    for batch_size in (1, 4):
        _, results = measuring.retrieve(model, processor, Dataset.from_list(rows), batch_size)
        assert [result["row"] for result in results] == [0, 1, 0, 0]
        assert {result["prediction"] for result in results} <= {0, 1}
        assert max(-result["score"] for result in results) <= 2
    # But blank ones stand for different pictures, of which none can be told from another
    blanked, _ = measuring.retrieve(model, processor, blank(Dataset.from_list(rows[1:])))
    assert blanked["text_to_image_recall@1"] < 1
    same, _ = measuring.retrieve(model, processor, Dataset.from_list(rows[2:]))
    assert same["text_to_image_recall@1"] == same["image_to_text_recall@1"] == 1


def test_a_chat_that_ends_with_the_user_has_no_answer_to_measure(pretrained, workplace, tmp_path):
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    without_an_answer = "expected messages that end in an answer of the assistant"
    for i, (messages, told) in enumerate(
        ((turns, without_an_answer), (turns[:1], "no message of the assistant"), (turns[1:2], without_an_answer))
    ):
        path = write(workplace / f"chat_{i}.jsonl", [{"messages": turns[:2]}, {"messages": messages}])
        options = {"checkpoint": pretrained, "task": "chat", "dataset": path, "output_dir": tmp_path / "out"}
        with pytest.raises(ValueError, match=f"Row 1: {told}"):
            evaluate.main(arguments(**options, batch_size=2))


def test_a_data_set_of_one_row_is_measured(pretrained, workplace, tmp_path):
    path = write(workplace / "one.jsonl", [{"source": "a", "target": "b"}])
    options = {"task": "translation", "dataset": path}
    finetune.main(arguments(checkpoint=pretrained, **options, output_dir=tmp_path / "model", **SHORT))
    evaluate.main(arguments(checkpoint=tmp_path / "model", **options, output_dir=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_rows"] == 1


def test_accumulated_batches_move_the_weights_as_one_batch_does(pretrained, photographs, tmp_path):
    processor = AutoProcessor.from_pretrained(pretrained)
    rows = load(photographs, task="caption")
    moved = []
    for name, size, number in (("one", 8, 1), ("four", 2, 4)):
        model = DuoStreamForPreTraining.from_pretrained(pretrained, itc_weight=0.0, itm_weight=0.0)
        # Batch norm reads other rows beside its own
        model.freeze("vision")
        args = DuoStreamTrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=number,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **QUIET,
        )
        collator = DuoStreamPreTrainingCollator(processor, pairs=False)
        # All of it masked, as which tokens are drawn depends on the batches
        collator.masking.mlm_probability, collator.masking.mask_replace_prob = 1.0, 1.0
        DuoStreamTrainer(model=model, args=args, data_collator=collator, train_dataset=rows).train()
        moved.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    start = DuoStreamForPreTraining.from_pretrained(pretrained).state_dict()
    assert any((moved[0][name] - start[name]).abs().max() > 1e-3 for name in moved[0])
    for name, weight in moved[0].items():
        assert torch.allclose(weight, moved[1][name], atol=1e-5), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classification"}, "nothing to pretrain on"),
        ({"contrastive_loss": "triplet"}, "contrastive_loss"),
        ({"lm_weight": -1.0}, "`lm_weight` is -1"),
    ],
)
def test_pretraining_refuses_what_it_can_not_do(photographs, tmp_path, options, message):
    options = {"task": "caption", "dataset": photographs, "vocab_size": 300, "output_dir": tmp_path, **options}
    with pytest.raises(ValueError, match=message):
        pretrain.main(arguments(**options, **SHORT))


def test_language_modelling_alone_is_of_texts_as_they_are(texts, tmp_path):
    # Any masked token would stand in front of the one it is, and the loss of what follows would differ
    losses = []
    for name in ("a", "b"):
        options = {"task": "masked", "dataset": texts, "vocab_size": 300, "output_dir": tmp_path / name}
        pretrain.main(arguments(**options, seed=1, data_seed=ord(name), logging_steps=1, **SHORT))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses.append(float(state["log_history"][0]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pretraining_reads_plain_texts(texts, tmp_path):
    options = {"task": "masked", "dataset": texts, "mlm_weight": 1.0, "vocab_size": 300, "bidirectional_prefix": True}
    pretrain.main(arguments(**options, output_dir=tmp_path, logging_steps=1, **SHORT))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert {"lm_loss", "mlm_loss"} < set(state["log_history"][0])
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    assert len(tokenizer("film")["input_ids"]) < 4  # it was trained on them


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_in_a_recipe_is_one_that_its_options_belong_to(recipe, monkeypatch):
    comments = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    command = " ".join(line.removesuffix("\\") for line in comments[1:])
    program, subcommand, path, *args = shlex.split(command)
    assert (program, path) == ("duostream", f"scripts/recipes/{recipe.name}")
    options = {"pretrain": pretrain.OPTIONS, "finetune": finetune.OPTIONS}[subcommand]
    _, data_args, training_args = parse(*options, args=[str(recipe), *args, "--use_cpu", "true"])
    assert data_args.task in TASKS and training_args.learning_rate > 0
