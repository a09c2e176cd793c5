"""The rows of a task, made of plain columns: prompts, answers, labels and pictures, and how long each row is."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Json,
    LargeList,
    List,
    Value,
)
from transformers.utils import logging

from ..processing.chat_template_duostream import check_messages, parts_of
from .arguments import DataArguments
from .bad_rows import BAD_ROW_ERRORS, BadRows
from .scenes import MESSAGES_FEATURE, rows_of_batch
from .sources import CONVERSATIONS, MADE_BY, Rows

logger = logging.get_logger(__name__)

# Files are opened by the collator, which names the row of one that can't be read
UNDECODED = Image(decode=False)
LISTS = (List, LargeList)
# The column by which WebDataset's archives name their samples
SAMPLE = "__key__"


def make_rows(
    rows: Rows,
    columns: list[str],
    args: DataArguments,
    is_evaluation: bool,
    classes: Sequence[str] | None,
    bad_rows: BadRows | None,
) -> Rows:
    """Rows of a task from rows with plain columns."""
    kind = args.task if args.task in ("classification", "masked") else "generated"
    if args.images_last and kind != "generated":
        raise ValueError(f"`images_last` is for prompts, of which `task` {args.task!r} has none")
    wanted = {"prompt_column": args.prompt_column}
    if kind == "classification":
        wanted["label_column"] = args.label_column
    else:
        wanted["answer_column"] = args.answer_column
        if args.answer_column is None:
            raise ValueError(
                "The rows have no `messages`, and no `prompt` and `completion` with lists of them, but "
                f"{columns}: name the column to learn with `--answer_column`"
            )
    for option, column in wanted.items():
        if column is not None and column not in columns:
            raise ValueError(f"`{option}` is {column!r}, but the columns are {columns}")
    in_prompt = columns_in(args.prompt or "") if not args.prompt_column else []
    for name in in_prompt:
        if name not in columns:
            raise ValueError(f"`prompt` {args.prompt!r} names {name!r}, but the columns are {columns}")
    texts = {name for name in (*wanted.values(), *in_prompt) if name is not None}
    if mixed := sorted(name for name in texts if _has_json((rows.features or {}).get(name))):
        logger.warning(
            f"The columns {mixed} of {args.dataset!r} have texts beside values of other types: `datasets` reads those "
            'that are JSON as what they say, `12` as a number and `"STOP"` without its quotes. Expected one type'
        )
    has_images = args.image_column in columns
    if not has_images and args.image_column not in (DataArguments.image_column, ""):
        raise ValueError(f"`image_column` is {args.image_column!r}, but the columns are {columns}")
    if not has_images and args.image_dir is not None:
        raise ValueError(f"`image_dir` is for the paths in `image_column`, but the columns are {columns}")
    if not has_images and args.image_column:
        found = _picture_columns(rows, columns)
        if found or args.task == "caption":
            hint = f", as in `--image_column {found[0]}`" if found else ""
            raise ValueError(
                f"`image_column` is {args.image_column!r}, but the columns are {columns}: name the one with "
                f'pictures{hint}, or "" to read text alone'
            )
    stored = (rows.features or {}).get(args.image_column) if has_images else None
    if not _may_hold_pictures(stored, may_be_empty=True):
        raise ValueError(
            f"`image_column` {args.image_column!r} is {stored}; expected a picture or its path in each row, or a list "
            "of them in each"
        )
    if has_images and args.image_dir is not None:
        options = {"column": args.image_column, "image_dir": args.image_dir, **MADE_BY}
        rows = rows.map(_join_paths, batched=True, features=rows.features, fn_kwargs=options)
    features: dict[str, Any] = {"source": Value("int64"), "length": Value("int64")}
    label_names: list[str] | None = None
    if has_images:
        if rows.features is not None:  # of a stream they may be unknown
            is_list = isinstance(rows.features[args.image_column], LISTS)
            rows = rows.cast_column(args.image_column, List(UNDECODED) if is_list else UNDECODED)
        features["images"] = List(UNDECODED)
    if kind == "generated":
        features |= {"prompt": MESSAGES_FEATURE, "completion": MESSAGES_FEATURE}
        features |= {"references": List(Value("string"))} if is_evaluation else {}
    else:
        features["text"] = Value("string")
    if kind == "classification":
        stored = None if rows.features is None else rows.features[args.label_column]
        is_soft = isinstance(stored, LISTS)
        names = class_names(rows, args.label_column)
        if set(names) & set(classes or ()):
            # Numbers are those of these rows, and another split, or the checkpoint, may count its classes otherwise
            label_names = names
        elif names and classes and not are_numbered(names) and not are_numbered(classes):
            raise ValueError(
                f"`label_column` {args.label_column!r} has the classes {names}, but the model knows {list(classes)}, "
                "none of which is one of these: give the labels the model's names"
            )
        features["label"] = List(Value("float32")) if is_soft else Value("int64" if classes else "float32")
        features |= {"references": List(Value("string"))} if is_soft and is_evaluation else {}

    def make(row: dict[str, Any], num_images: int, index: int) -> list[dict[str, Any]]:
        if kind == "classification":
            return [_labelled(row, args, index, classes)]
        if kind == "masked":
            return [{"text": text} for text in _answers_of(row, args, index)]
        return _turns(row, args, num_images, index, is_evaluation)

    def expand(batch: dict[str, list], indices: list[int], made_by: str) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in features}
        for row, index in zip(rows_of_batch(batch), indices, strict=True):
            if label_names is not None:
                row[args.label_column] = _named(row[args.label_column], label_names)
            images = row[args.image_column] if has_images else None
            images = images if isinstance(images, list) else [] if images is None else [images]
            try:
                if not images and has_images and SAMPLE in row:
                    # `datasets` reads those types of files that the first samples have
                    raise ValueError(
                        f"Row {index}: sample {row[SAMPLE]!r} has no {args.image_column!r}, and pictures of other "
                        "types are not read; expected one type in all archives"
                    )
                if None in images:
                    raise ValueError(f"Row {index}: picture {images.index(None)} of `{args.image_column}` is null")
                all_made = make(row, len(images), index)
            except BAD_ROW_ERRORS as error:
                if bad_rows is None:
                    raise
                bad_rows.add(index, error, row if args.streaming else None)
                continue
            for made in all_made:
                made = {**made, "images": images, "source": index}
                for name, value in {**made, "length": num_chars(made, args.chars_per_picture)}.items():
                    if name in features:
                        out[name].append(value)
        return out

    # A cached result would leave bad rows out, but write nothing down
    caching = {} if args.streaming or bad_rows is None else {"load_from_cache_file": False}
    return rows.map(
        expand,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=Features(features),
        fn_kwargs=MADE_BY,
        **caching,
    )


def _has_json(feature: Any) -> bool:
    """Whether values of several types are somewhere in a column."""
    if isinstance(feature, dict):
        return any(map(_has_json, feature.values()))
    return _has_json(feature.feature) if isinstance(feature, LISTS) else isinstance(feature, Json)


def _picture_columns(rows: Rows, columns: Sequence[str]) -> list[str]:
    """
    The columns that hold pictures, or lists of them: as such, as bytes, or as files with `bytes` and `path`; and
    `images`, by its name, unless it holds what can't be pictures, such as numbers. Of a stream the others may be
    unknown.
    """

    def holds_pictures(feature: Any) -> bool:
        if isinstance(feature, LISTS):
            return holds_pictures(feature.feature)
        is_file = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
        is_bytes = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        return isinstance(feature, Image) or is_file or is_bytes

    features = rows.features or {}
    # What is empty in the first rows of a stream may hold anything later on
    may_be = "images" in columns and _may_hold_pictures(features.get("images"), isinstance(rows, IterableDataset))
    return [name for name in columns if holds_pictures(features.get(name)) or (name == "images" and may_be)]


def _may_hold_pictures(feature: Any, may_be_empty: bool) -> bool:
    """Whether what is stored so may be pictures; or, where that is asked for, there is nothing in it."""
    if isinstance(feature, LISTS):
        # Of lists in lists, as of arrays, `datasets` makes pictures
        return isinstance(feature.feature, LISTS) or _may_hold_pictures(feature.feature, may_be_empty)
    if isinstance(feature, dict):  # of a file, or of where it lies
        return any(_may_hold_pictures(each, may_be_empty) for each in feature.values())
    if isinstance(feature, Value):
        is_empty = feature.dtype == "null" and may_be_empty
        return is_empty or feature.dtype in ("string", "large_string", "binary", "large_binary")
    return feature is None or isinstance(feature, Array2D | Array3D | Image)


def num_chars(row: dict[str, Any], chars_per_picture: int = DataArguments.chars_per_picture) -> int:
    """
    Length of a row in characters, by which `--train_sampling_strategy group_by_length` saves padding: of its texts,
    and so much for each picture.
    """
    texts = [row.get("text") or "", *(part.get("text") or "" for part in _parts_of(row))]
    return sum(map(len, texts)) + chars_per_picture * len(row.get("images") or ())


def _parts_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of all messages of a row; none of what are no messages, which the collator names."""
    parts = []
    for messages in filter(None, map(row.get, CONVERSATIONS)):
        with suppress(ValueError):
            check_messages(messages)
            parts += [part for message in messages for part in parts_of(message)]
    return parts


def with_lengths(rows: Dataset, chars_per_picture: int) -> Dataset:
    """
    Rows with a column `length` (see [`num_chars`]), where they have none. Pictures are not read for it: they are
    counted by the parts of messages.
    """
    texts = [name for name in ("text", *CONVERSATIONS) if name in rows.column_names]
    if "length" in rows.column_names or not texts:
        return rows
    lengths = []
    for row in rows.with_format(None).select_columns(texts):
        images = [part for part in _parts_of(row) if part["type"] == "image"]
        lengths.append(num_chars({**row, "images": images}, chars_per_picture))
    return rows.add_column("length", lengths)


def _join_paths(batch: dict[str, list], column: str, image_dir: str, made_by: str) -> dict[str, list]:
    # Not a closure that calls itself, which `datasets` can't hash: it would map the rows anew in each run
    return {column: [_join_path(name, image_dir) for name in batch[column]]}


def _join_path(name: Any, image_dir: str) -> Any:
    if isinstance(name, list):
        return [_join_path(each, image_dir) for each in name]
    return str(Path(image_dir) / name) if isinstance(name, str) else name


class ColumnFormatter(Formatter):
    """Fills in columns by their names, which may hold dots and brackets, and reads nothing of what they hold."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def columns_in(prompt: str) -> list[str]:
    """
    The columns that a prompt names as `{name}`.

    Raises:
        ValueError: Its braces don't match.
    """
    try:
        parsed = [(name, form or "") for _, name, form, _ in Formatter().parse(prompt) if name is not None]
        # How a column is written may name another, as in `{name:{width}}`
        return [each for name, form in parsed for each in (name, *columns_in(form))]
    except ValueError as error:
        raise ValueError(f"`prompt` is {prompt!r}: {error}. A brace that is text is written twice") from error


def _prompt_of(row: dict, args: DataArguments, index: int) -> str:
    """The row's prompt: a column, or the template with the row's columns in it."""
    if args.prompt_column:
        prompt = row[args.prompt_column]
        if not isinstance(prompt, str):
            raise ValueError(f"Row {index}: expected text in `prompt_column` {args.prompt_column!r}, not {prompt!r}")
        return prompt
    template = args.prompt or ""
    for name in columns_in(template):
        if not isinstance(row[name], str | int | float):
            raise ValueError(f"Row {index}: expected text in column {name!r} of `prompt`, not {row[name]!r}")
    filled = {name: row[name] for name in columns_in(template)}
    if args.max_column_chars is not None:
        filled = {name: _cut(text, args.max_column_chars, name, index) for name, text in filled.items()}
    try:
        return ColumnFormatter().vformat(template, (), filled)
    except ValueError as error:  # of what stands behind a colon
        raise ValueError(f"Row {index}: `prompt` {template!r} can't be filled: {error}") from error


def _cut(text: Any, length: int, name: str, index: int) -> Any:
    if not isinstance(text, str) or len(text) <= length:
        return text
    logger.warning(f"Row {index}: column {name!r} was cut from {len(text)} to {length} characters")
    return text[:length]


def _answers_of(row: dict, args: DataArguments, index: int) -> list[str]:
    answers = row[args.answer_column]
    answers = answers if isinstance(answers, list) else [answers]
    if not answers:
        raise ValueError(f"Row {index}: `answer_column` {args.answer_column!r} holds no answer")
    for answer in answers:
        if not isinstance(answer, str):
            raise ValueError(f"Row {index}: expected text in `answer_column` {args.answer_column!r}, not {answer!r}")
    return answers


def _turns(row: dict, args: DataArguments, num_images: int, index: int, is_evaluation: bool) -> list[dict[str, Any]]:
    """Prompt and completion: once for each answer of a row, or once with all of them as references."""
    question, answers = _prompt_of(row, args, index), _answers_of(row, args, index)
    images, words = [{"type": "image", "text": None}] * num_images, [{"type": "text", "text": question}]
    parts = words + images if args.images_last else images + words
    prompt = [{"role": "user", "content": parts}]
    return [
        {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
            "references": answers,
        }
        for answer in (answers[:1] if is_evaluation else answers)
    ]


def class_names(rows: Rows, column: str) -> list[str]:
    """The names of the classes that a column's numbers, or lists of them, stand for; none, if it tells none."""
    feature = None if rows.features is None else rows.features[column]
    feature = feature.feature if isinstance(feature, LISTS) else feature
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def are_numbered(classes: Sequence[str]) -> bool:
    """Whether classes have no names but numbers, as a new head's `LABEL_0`: others' numbers may stand for them."""
    return all(re.fullmatch(r"(LABEL_)?\d+", name) for name in classes)


def _named(label: Any, names: Sequence[str]) -> Any:
    """A class's name for its number, or for each of a list; anything else as it is."""
    if isinstance(label, list):
        return [_named(each, names) for each in label]
    return names[label] if label in range(len(names)) else label


def _name_of_number(number: int | float, classes: Sequence[str]) -> str | None:
    """The class that has this number for its name: written just so, or with or without a `.0`."""
    short = str(number).removesuffix(".0")
    return next((name for name in (str(number), short, f"{short}.0") if name in classes), None)


def _labelled(row: dict, args: DataArguments, index: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """The text to classify, with its class's number, a score for every class, or a number."""
    label, known = row[args.label_column], list(classes or [])
    references = list(dict.fromkeys(label)) if isinstance(label, list) else None
    if isinstance(label, list):
        # An answer that is no class can't be chosen, and counts as wrong
        label = [float(name in label) for name in known]
    elif isinstance(label, str):
        if label not in known:
            raise ValueError(f"Row {index}: `{args.label_column}` {label!r} is none of the classes {known}")
        label = known.index(label)
    elif isinstance(label, int | float) and (name := _name_of_number(label, known)) is not None:
        # The classes may have numbers for names, not all, or not in their order
        label = known.index(name)
    elif known and all(re.fullmatch(r"\d+(\.\d+)?", name) for name in known):
        raise ValueError(f"Row {index}: `{args.label_column}` is {label!r}; expected one of the classes {known}")
    elif not known and not (isinstance(label, int | float) and math.isfinite(label)):
        raise ValueError(f"Row {index}: `{args.label_column}` is {label!r}; expected a number to come near to")
    elif known and label not in range(len(known)):
        raise ValueError(
            f"Row {index}: `{args.label_column}` is {label!r}; expected a class from 0 to {len(known) - 1}"
        )
    return {"text": _prompt_of(row, args, index), "label": label, "references": references}
