"""Rows for training and evaluation: conversations with pictures, from any of the places data comes from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import PIL.Image
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets, load_dataset

from ..processing.data_collator_duostream import load_picture
from .arguments import DataArguments
from .scenes import MESSAGES_FEATURE, PROMPT_FEATURES, build_scenes, caption_rows, question_rows

Rows: TypeAlias = Dataset | IterableDataset

BLANK_GRAY = (128, 128, 128)


def load_rows(args: DataArguments, split: str, max_rows: int | None = None) -> Rows:
    """
    Loads a split in the conversational form that `apply_chat_template` and TRL use: `images`, and `messages` or
    `prompt` and `completion`.

    Args:
        args (`DataArguments`): Where from, and which columns.
        split (`str`): Name of the split.
        max_rows (`int`, *optional*): Only the first rows of the source.

    Returns:
        `Dataset`, or `IterableDataset` with `args.streaming`, with a column `row` that numbers the rows, by which
        errors name them.

    Raises:
        ValueError: A column that the options name is missing, or there are no rows.
    """
    rows = number_rows(_conversational_rows(args, split, max_rows))
    return blank(rows) if args.blank_images else rows


def _conversational_rows(args: DataArguments, split: str, max_rows: int | None) -> Rows:
    if args.dataset == "scenes":
        scenes = build_scenes(split, num_rows=max_rows)
        if split == "train":
            return training_rows(scenes)
        return question_rows(scenes)
    try:
        rows = _load(args, split)
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise ValueError(f"`dataset` {args.dataset!r} has no rows in split {split!r}") from error
    if max_rows is not None:
        rows = rows.take(max_rows)
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"`dataset` {args.dataset!r} has no rows in split {split!r}")
    columns = rows.column_names or list(next(iter(rows.take(1))))
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        # Files, or bytes and paths, are pictures whatever type they were stored as
        return rows.cast_column("images", List(Image())) if "images" in columns else rows
    return _to_prompt_completion(rows, columns, args)


def training_rows(scenes: Dataset) -> Dataset:
    """
    Every question and every caption of the scenes in a row of its own.

    With several to a row it takes many times as long to learn to pick out the object that is asked for, as an answer
    then has the other questions before it, too, and a batch has fewer pictures. `length` is 1 for captions, the longer
    rows, and 0 for questions of all kinds: with `--train_sampling_strategy group_by_length` neither pads the other.
    """
    kinds = [question_rows(scenes), caption_rows(scenes)]
    rows = [
        rows.select_columns(list(PROMPT_FEATURES)).add_column("length", [length] * len(rows))
        for length, rows in enumerate(kinds)
    ]
    # A scene's rows stay together, so that the first rows are a sample of all kinds
    return concatenate_datasets(rows).sort("scene")


def _load(args: DataArguments, split: str) -> Rows:
    path = Path(args.dataset)
    options: dict[str, Any] = {"split": split, "streaming": args.streaming}
    if not path.exists():
        return load_dataset(args.dataset, args.dataset_config, **options)
    suffixes = {file.suffix.lower() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    pictures = suffixes & {".jpg", ".jpeg", ".png", ".webp"}
    if path.is_dir() and pictures:
        return load_dataset("imagefolder", data_dir=args.dataset, **options)
    for builder, known in (("json", {".jsonl", ".json"}), ("parquet", {".parquet"})):
        if suffixes & known:
            if path.is_file():
                # A file is one split, whatever its name
                return load_dataset(builder, data_files={split.split("[")[0]: args.dataset}, **options)
            return load_dataset(builder, data_dir=args.dataset, **options)
    raise ValueError(
        f"`dataset` {args.dataset!r} has files of types {sorted(suffixes)}; expected pictures with a "
        "metadata file, JSONL or Parquet"
    )


def _to_prompt_completion(rows: Rows, columns: list[str], args: DataArguments) -> Rows:
    wanted = {"answer_column": args.answer_column, "prompt_column": args.prompt_column}
    if args.answer_column is None:
        raise ValueError(
            f"The rows have no `messages`, and no `prompt` and `completion`, but {columns}: name the column to learn "
            "with `--answer_column`"
        )
    for option, column in wanted.items():
        if column is not None and column not in columns:
            raise ValueError(f"`{option}` is {column!r}, but the columns are {columns}")
    has_images = args.image_column in columns
    if not has_images and args.image_column not in (DataArguments.image_column, ""):
        raise ValueError(f"`image_column` is {args.image_column!r}, but the columns are {columns}")
    features: dict[str, Any] = {"prompt": MESSAGES_FEATURE, "completion": MESSAGES_FEATURE, "source": Value("int64")}
    if has_images:
        is_list = isinstance(rows.features[args.image_column], List) if rows.features else False
        # Files are opened by the collator, not here
        undecoded = List(Image(decode=False)) if is_list else Image(decode=False)
        rows = rows.cast_column(args.image_column, undecoded)
        features["images"] = List(Image())

    def expand(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in features}
        for i, index in enumerate(indices):
            row = {name: values[i] for name, values in batch.items()}
            for prompt, completion, images in _turns(row, args, has_images, index):
                out["prompt"].append(prompt)
                out["completion"].append(completion)
                out["source"].append(index)
                if has_images:
                    out["images"].append(images)
        return out

    return rows.map(expand, batched=True, with_indices=True, remove_columns=columns, features=Features(features))


def _turns(row: dict, args: DataArguments, has_images: bool, index: int) -> Iterator[tuple[list, list, list]]:
    """Prompt, completion and pictures: once for each answer of a row."""
    images = row[args.image_column] if has_images else []
    images = [image for image in (images if isinstance(images, list) else [images]) if image is not None]
    question = row[args.prompt_column] if args.prompt_column else args.prompt
    answers = row[args.answer_column]
    parts = [{"type": "image", "text": None}] * len(images) + [{"type": "text", "text": question}]
    for answer in answers if isinstance(answers, list) else [answers]:
        if not isinstance(answer, str) or not isinstance(question, str):
            raise ValueError(
                f"Row {index}: expected text in the columns of prompt and answer, not {question!r} and {answer!r}"
            )
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        yield [{"role": "user", "content": parts}], completion, images


def number_rows(rows: Rows) -> Rows:
    """Adds a column `row` that counts from 0."""
    if isinstance(rows, Dataset):
        return rows.add_column("row", list(range(len(rows))))

    def number(row: dict, index: int) -> dict:
        # A stream passes its pictures on as they are stored
        pictures = {"images": [load_picture(image) for image in row["images"] or []]} if "images" in row else {}
        return {**row, **pictures, "row": index}

    return rows.map(number, with_indices=True)


def blank(rows: Rows) -> Rows:
    """Puts a gray picture of the same size in place of every picture, as rows are read."""

    def blank_batch(batch: dict[str, list]) -> dict[str, list]:
        if "images" not in batch:
            return batch
        sizes = [[load_picture(image).size for image in row or []] for row in batch["images"]]
        return {**batch, "images": [[PIL.Image.new("RGB", size, BLANK_GRAY) for size in row] for row in sizes]}

    if isinstance(rows, Dataset):
        return rows.with_transform(blank_batch)
    return rows.map(blank_batch, batched=True)


def texts_of(rows: Rows) -> Iterator[str]:
    """Everything that is said in the rows, message by message, for training a tokenizer."""
    columns = [name for name in ("messages", "prompt", "completion") if name in (rows.column_names or [])]
    for row in rows.select_columns(columns) if columns else rows:
        for message in row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]:
            content = message["content"]
            yield from [content] if isinstance(content, str) else (part["text"] for part in content if part["text"])
