"""Rows for training and evaluation: conversations with pictures, from any of the places data comes from."""

import glob
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from string import Formatter
from tarfile import TarError
from typing import Any, TypeAlias

import datasets
import PIL.Image
import pyarrow
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
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import _get_data_files_patterns, resolve_pattern
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import JsonConfig
from transformers.utils import logging
from transformers.utils.versions import require_version

from ..processing.data_collator_duostream import conversations_of, is_plain_text, load_picture
from ..processing.processing_duostream import check_messages, parts_of
from .arguments import DataArguments, check_unused
from .bad_rows import BAD_ROW_ERRORS, BadRows, broken_lines
from .scenes import MESSAGES_FEATURE, build_scenes, caption_rows, question_rows, rows_of_batch, training_rows
from .tasks import WRITER, task_of, with_defaults

logger = logging.get_logger(__name__)

# Else a server is told of each data set that is loaded, of local files, too
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

Rows: TypeAlias = Dataset | IterableDataset

# Files are opened by the collator, which names the row of one that can't be read
UNDECODED = Image(decode=False)
LISTS = (List, LargeList)

# Columns of rows that are ready
CONVERSATIONS = ("messages", "prompt", "completion")

# By the types of files that each reads, in the order in which they are looked for: JSON may tell of Parquet and Arrow
BUILDERS = {
    "parquet": {".parquet"},
    "arrow": {".arrow"},
    "json": {".jsonl", ".json"},
    "webdataset": {".tar"},
}
# Versions of `datasets` from which on it reads rows without columns, and rows of an image folder without a picture
READS_EMPTY_LINES, READS_EMPTY_PICTURES = "4.8", "5.0"
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}

BLANK_GRAY = (128, 128, 128)

# Options by which rows are made of columns; rows that are ready have their own words and pictures
MAKING_ROWS = (
    *("image_column", "image_dir", "prompt", "prompt_column", "answer_column"),
    *("images_last", "max_column_chars"),
)


def load_rows(
    args: DataArguments,
    split: str,
    max_rows: int | None = None,
    is_evaluation: bool = False,
    classes: Sequence[str] | None = None,
    bad_rows: BadRows | None = None,
) -> Rows:
    """
    Loads a split. What is to be said comes in the conversational form that `apply_chat_template` and TRL use:
    `images`, and `messages` or `prompt` and `completion`; what is to be classified, or filled in, as
    `images` and `text`.

    Args:
        args (`DataArguments`): Where from, which columns, for what task.
        split (`str`): Name of the split.
        max_rows (`int`, *optional*): Only the first rows of the source.
        is_evaluation (`bool`, *optional*, defaults to `False`): Several answers of a row stay together, as
            `references`, and don't make a row each.
        classes (`Sequence[str]`, *optional*): For classification: see [`read_classes`].
        bad_rows (`BadRows`, *optional*): Takes rows whose columns can't be read, which are otherwise an error.

    Returns:
        `Dataset`, or `IterableDataset` with `args.streaming`, with a column `row` that numbers the rows, by which
        errors name them, and, where the rows had plain columns, `length` in characters, a picture
        counting for `args.chars_per_picture`. Pictures are as they are stored: the collator opens them.

    Raises:
        ValueError: A column that the options name is missing, there are no rows, or they are ready, and an option
            would do nothing for them.
    """
    if args.task == "classification":
        check_unused(args, ["answer_column"], "for classification `label_column` names what is learnt")
    else:
        check_unused(args, ["label_column"], f"for {args.task!r} `answer_column` names what is learnt")
        check_unused(args, ["max_answers"], f"it is for classification, and `task` is {args.task!r}")
    named = [name for name in MAKING_ROWS if getattr(args, name) != getattr(DataArguments, name)]
    for name in ("prompt", "max_column_chars"):
        if name in named and (args.prompt_column or args.task in ("masked", "retrieval")):
            other = f"`prompt_column` {args.prompt_column!r}" if args.prompt_column else f"`task` {args.task!r}"
            raise ValueError(f"`{name}` would do nothing beside {other}")
    rows = _rows_of_task(with_defaults(args), split, max_rows, is_evaluation, classes, bad_rows, named)
    rows = number_rows(rows)
    return blank(rows) if args.blank_images else rows


def load_mixture(
    args: DataArguments, classes: Sequence[str] | None = None, seed: int = 0, bad_rows: BadRows | None = None
) -> Rows:
    """
    Loads the rows to train on: those of `args`, and of each of `args.mixture` drawn among them by weight, until every
    row of every data set has been drawn.

    Raises:
        ValueError: As `load_rows`; or a task in a mixture is not one that writes, or a weight is not positive; or
            `conversations_per_row` is out of range, or not for this task.
    """
    parts = [args, *args.mixture_parts]
    _check_parts(parts)
    is_packed = any(part.conversations_per_row > 1 for part in parts)
    if not args.mixture and not is_packed:
        return load_rows(args, args.train_split, args.max_train_rows, classes=classes, bad_rows=bad_rows)
    loaded = []
    for part in parts:
        if args.mixture and bad_rows is not None:
            bad_rows.dataset = part.dataset
        # What rows look like when they are read is lost in putting them together: they are blanked at the end
        unblanked = replace(part, blank_images=False)
        rows = load_rows(unblanked, part.train_split, part.max_train_rows, classes=classes, bad_rows=bad_rows)
        if "tools" in (rows.column_names or ()):
            raise ValueError(f"{part.dataset!r} has `tools`, which `mixture` and `conversations_per_row` don't take")
        if args.mixture:
            rows = _same_columns(rows, part)
        if is_packed:
            rows = pack_rows(rows, part.conversations_per_row, part.chars_per_picture)
        loaded.append(rows)
    rows = loaded[0]
    if bad_rows is not None:
        bad_rows.dataset = None  # From here on rows tell it themselves
    if args.mixture:
        total = sum(part.weight for part in parts)
        weights = [part.weight / total for part in parts]
        rows = interleave_datasets(loaded, probabilities=weights, seed=seed, stopping_strategy="all_exhausted")
    rows = number_rows(rows)
    return blank(rows) if args.blank_images else rows


def _check_parts(parts: Sequence[DataArguments]) -> None:
    """Raises `ValueError` where the options of a data set, or of several in a mixture, don't go together."""
    for part in parts:
        if part.conversations_per_row < 1:
            raise ValueError(f"`conversations_per_row` is {part.conversations_per_row}; expected 1 or more")
        if part.conversations_per_row > 1 and task_of(part.task).auto_class is not WRITER:
            raise ValueError(f"`conversations_per_row` is for tasks that write, not for {part.task!r}")
    if len(parts) == 1:
        check_unused(parts[0], ["weight"], "it tells rows of a `mixture` how often they are drawn")
        return
    if any(part.mixture for part in parts[1:]):
        raise ValueError("A file of a `mixture` names another `mixture`: name all files beside the first")
    if any(part.streaming for part in parts):
        raise ValueError("`mixture` reads whole data sets: it goes without `streaming`")
    for part in parts[1:]:
        whole = ("blank_images", "on_bad_rows", "max_length")
        check_unused(part, whole, "it is for the whole mixture: set it beside `mixture`, not in a file of it")
        check_unused(part, ("eval_split", "max_eval_rows"), "a mixture is evaluated on rows of its first data set")
    for part in parts:
        if task_of(part.task).auto_class is not WRITER:
            raise ValueError(f"`task` {part.task!r} can't be mixed with others: only tasks that write share a model")
        if part.weight <= 0:
            raise ValueError(f"`weight` of {part.dataset!r} is {part.weight}; expected more than 0")


def _same_columns(rows: Rows, args: DataArguments) -> Rows:
    """
    Rows as those of other data sets: `images`, which may be empty, `prompt`, `completion`, `length`, and where they
    come from: `dataset`, and `source`, the number in it.
    """
    columns = set(rows.column_names or next(iter(rows.take(1))))
    if not {"prompt", "completion"} <= columns:
        raise ValueError("A mixture takes rows with `prompt` and `completion`, or with an answer column")
    if "images" in columns:
        rows = rows.cast_column("images", List(UNDECODED))

    def with_parts(message: dict[str, Any], index: int) -> dict[str, Any]:
        """From JSON, a message may be a plain text, and a part lack what others have."""
        if message.get("tool_calls"):
            raise ValueError(f"Row {index} of {args.dataset!r}: a mixture takes no `tool_calls`")
        # What is no message says nothing, for the collator to refuse it by its row
        parts: list[dict[str, Any]] = [{"type": "text", "text": None}]
        with suppress(ValueError):
            check_messages([message])
            parts = [{"type": part["type"], "text": part.get("text")} for part in parts_of(message)] or parts
        return {"role": message.get("role"), "content": parts}

    def make_alike(row: dict[str, Any], index: int) -> dict[str, Any]:
        turns = {
            name: None if row[name] is None else [with_parts(message, index) for message in row[name]]
            for name in ("prompt", "completion")
        }
        length = row["length"] if "length" in row else _num_chars(row, args.chars_per_picture)
        origin = {"dataset": args.dataset, "source": row.get("source", index)}
        return {"images": row.get("images") or [], **turns, "length": length, **origin}

    turns = {"prompt": MESSAGES_FEATURE, "completion": MESSAGES_FEATURE}
    numbers = {"length": Value("int64"), "source": Value("int64")}
    features = Features({"images": List(UNDECODED), **turns, "dataset": Value("string"), **numbers})
    return rows.map(make_alike, with_indices=True, remove_columns=rows.column_names, features=features)


def pack_rows(
    rows: Rows, conversations_per_row: int, chars_per_picture: int = DataArguments.chars_per_picture
) -> Dataset:
    """
    Puts rows about the same pictures together, in the order of the first of each: `images`, and `conversations` with
    `prompt` and `completion` of each. Pictures are the same if their files or bytes are.

    Raises:
        ValueError: The rows are a stream, or hold no `prompt` and `completion`.
    """
    if not isinstance(rows, Dataset):
        raise ValueError("`conversations_per_row` puts rows together from anywhere: not with `streaming`")
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(
            "`conversations_per_row` takes rows with `prompt` and `completion`, or with an answer column; the columns "
            f"are {rows.column_names}"
        )
    if "images" in rows.column_names:
        rows = rows.cast_column("images", List(UNDECODED))
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, images in enumerate(rows["images"] if "images" in rows.column_names else [[]] * len(rows)):
        key = tuple(picture_key(image) for image in images or () if image is not None)
        groups[key or index].append(index)
    members = [
        group[start : start + conversations_per_row]
        for group in groups.values()
        for start in range(0, len(group), conversations_per_row)
    ]
    source = next((name for name in ("source", "row") if name in rows.features), None)
    kept = {name: rows.features[name] for name in ("images", "dataset") if name in rows.features}
    sources = {} if source is None else {"source": List(Value("int64"))}
    conversation = {name: rows.features[name] for name in ("prompt", "completion")}
    features = Features({**kept, **sources, "conversations": List(conversation), "length": Value("int64")})

    def join(batch: dict[str, list]) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in features}
        # All at once: each row by itself takes many times as long
        chosen = rows[[index for indices in batch["members"] for index in indices]]
        turns = zip(chosen["prompt"], chosen["completion"], strict=True)
        end = 0
        for indices in batch["members"]:
            for name in kept:
                out[name].append(chosen[name][end])
            if source is not None:
                # Of each: those that can't be read are to be counted
                out["source"].append(chosen[source][end : end + len(indices)])
            end += len(indices)
            pairs = islice(turns, len(indices))
            conversations = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
            out["conversations"].append(conversations)
            num_images = len(out["images"][-1] or ()) if "images" in out else 0
            out["length"].append(chars_per_picture * num_images + sum(map(_num_chars, conversations)))
        return out

    return Dataset.from_dict({"members": members}).map(
        join, batched=True, remove_columns=["members"], features=features, desc="putting rows together"
    )


def picture_key(image: dict[str, Any]) -> str | bytes:
    """What is the same for stored pictures whose files or bytes are."""
    return image["path"] if image["bytes"] is None else sha256(image["bytes"]).digest()


def read_classes(args: DataArguments, bad_rows: BadRows | None = None) -> list[str]:
    """
    The names of the classes in the training split, in the order of their numbers; none where labels are numbers to
    come near to (regression). Of lists of answers, the `args.max_answers` most frequent. Rows without a label are
    passed over, if there are `bad_rows` to write them to when they are made.

    Raises:
        ValueError: The column of labels is missing, or a row of it holds something else, or not what the others do.
    """
    args = with_defaults(args)
    rows = _load(args, args.train_split, bad_rows)
    column = args.label_column
    columns = rows.column_names or list(next(iter(rows.take(1))))
    if column not in columns:
        raise ValueError(f"`label_column` is {column!r}, but the columns are {columns}")
    if names := _class_names(rows, column):
        return names
    values = [row[column] for row in rows.select_columns([column])]
    first = next((value for value in values if value is not None), None)
    for row, value in enumerate(values):
        if value is None and bad_rows is not None:
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, str | list | float) and not (is_number and value >= 0):
            raise ValueError(
                f"Row {row}: `{column}` is {value!r}; expected a class's name, its number from 0, a number with a "
                "point, or a list of answers"
            )
        if type(value) is not type(first):
            raise ValueError(f"Row {row}: `{column}` is {value!r}, but {first!r} before it: expected one kind")
        if isinstance(value, list) and not all(isinstance(answer, str) for answer in value):
            raise ValueError(
                f"Row {row}: `{column}` is {value!r}; expected a list of answers, each a text. The model takes a "
                "score for every class as `labels`, but no column here does"
            )
    values = [value for value in values if value is not None]
    if not values:
        raise ValueError(f"No row of `dataset` {args.dataset!r} in split {args.train_split!r} has a `{column}`")
    if isinstance(first, list):
        counts = Counter(answer for answers in values for answer in answers)
        return [answer for answer, _ in counts.most_common(args.max_answers)]
    if isinstance(first, str):
        return sorted(set(values))
    return [] if isinstance(values[0], float) else [str(number) for number in range(max(values) + 1)]


def _rows_of_task(
    args: DataArguments,
    split: str,
    max_rows: int | None,
    is_evaluation: bool,
    classes: Sequence[str] | None,
    bad_rows: BadRows | None,
    named: Sequence[str],
) -> Rows:
    """`named` are those of the options by which rows are made that were given."""
    ready = f"`{'`, `'.join(named)}` would do nothing: the rows of {args.dataset!r} are ready, and not made of columns"
    if args.dataset == "scenes":
        if named:
            raise ValueError(ready)
        check_unused(args, ("streaming", "dataset_config"), "scenes are drawn here, all at once")
        return _rows_of_scenes(args, split, max_rows)
    rows = _load(args, split, bad_rows)
    if max_rows is not None:
        # Not `take`: before datasets 5 it wants as many rows as it is asked for
        rows = rows.take(max_rows) if args.streaming else rows.select(range(min(max_rows, len(rows))))
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"`dataset` {args.dataset!r} has no rows in split {split!r}")
    columns = rows.column_names or list(next(iter(rows.take(1))))
    if _are_conversations(rows, columns):
        name = DataArguments.image_column
        has_other_images = name in columns and "images" not in columns
        if has_other_images and args.image_column == "":
            rows, named = rows.remove_columns(name), [each for each in named if each != "image_column"]
        elif has_other_images:
            raise ValueError(
                f"The rows of {args.dataset!r} are conversations, but their pictures are in {name!r}: expected a list "
                'of them in `images`, and `{"type": "image"}` in the messages where each stands; or `image_column` '
                '"", to read text alone'
            )
        if named:
            raise ValueError(ready)
        # Names that are given to rows here: what else they hold under these is not read
        taken = ("source", "row", "references", "kind", "held_out")
        rows = rows.remove_columns([name for name in taken if name in columns])
        stored = (rows.features or {}).get("images")
        is_list = stored is None or isinstance(stored, (List, LargeList, list)) or stored == Value("null")
        if not is_list:
            raise ValueError(
                f"Column 'images' of {args.dataset!r} is {stored}; expected a list of pictures in each row"
            )
        # Files, or bytes and paths, are pictures whatever type they were stored as
        return rows.cast_column("images", List(UNDECODED)) if "images" in columns else rows
    return _make_rows(rows, columns, args, is_evaluation, classes, bad_rows)


def _are_conversations(rows: Rows, columns: Sequence[str]) -> bool:
    """Whether rows are ready. Texts in `prompt` and `completion` are plain columns, of which rows are made."""
    if "messages" in columns or not {"prompt", "completion"} <= set(columns):
        return "messages" in columns
    if rows.features is None:  # of a stream they may be unknown
        return not isinstance(next(iter(rows.take(1)))["prompt"], str)
    stored = rows.features["prompt"]
    return not (isinstance(stored, Value) and stored.dtype in ("string", "large_string"))


def _rows_of_scenes(args: DataArguments, split: str, max_rows: int | None) -> Dataset:
    if args.task not in ("caption", "retrieval", "chat", "vqa"):
        raise ValueError(f"`task` {args.task!r} needs a data set of its own: `scenes` has captions and questions")
    scenes = build_scenes(split, num_rows=max_rows)
    if args.task in ("caption", "retrieval"):
        return caption_rows(scenes)
    return training_rows(scenes) if args.task == "chat" and split == "train" else question_rows(scenes)


def _load(args: DataArguments, split: str, bad_rows: BadRows | None = None) -> Rows:
    path = Path(args.dataset)
    options: dict[str, Any] = {"split": split, "streaming": args.streaming}
    try:
        if path.exists():
            check_unused(args, ["dataset_config"], f"{args.dataset!r} is here, and no data set of the Hub")
            rows = _load_files(path, options, bad_rows)
        else:
            rows = load_as_written(args.dataset, args.dataset_config, **options)
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise ValueError(f"`dataset` {args.dataset!r} has no rows in split {split!r}") from error
    return _patient(rows) if args.streaming else rows


def load_as_written(*args: Any, **options: Any) -> Rows:
    """
    What `load_dataset` loads, with conversations as they stand in JSON. Where some messages are texts and others lists
    of parts, `datasets` keeps both as `Json`, by which texts that are JSON, too (`12`, or `"STOP"` in quotes) are read
    as what they say; or, where the lists come late, lists as texts. Whole conversations, kept so, lose nothing.
    """
    source = {name: value for name, value in options.items() if name not in ("split", "streaming")}
    if load_dataset_builder(*args, **source).name != "json":
        return load_dataset(*args, **options)
    # The first rows tell the columns of all
    splits = load_dataset(*args, **source, streaming=True)
    rows = splits.get(re.split(r"[+\[]", options["split"])[0].strip(), next(iter(splits.values())))
    features = rows.features
    if features is None:  # of one array, which is read whole
        _, table = next(iter(rows._ex_iterable.iter_arrow()))
        features = Features.from_arrow_schema(table.schema)
    whole = {name: Json() for name in CONVERSATIONS if not isinstance(features.get(name, Value("null")), Value)}
    return load_dataset(*args, **options, **({"features": Features({**features, **whole})} if whole else {}))


def _has_json(feature: Any) -> bool:
    """Whether values of several types are somewhere in a column."""
    if isinstance(feature, dict):
        return any(map(_has_json, feature.values()))
    return _has_json(feature.feature) if isinstance(feature, LISTS) else isinstance(feature, Json)


def _patient(rows: IterableDataset) -> IterableDataset:
    """A stream that reads its shards by `read_patiently`, however it is dealt out over ranks and workers."""
    source = rows._ex_iterable
    while hasattr(source, "ex_iterable"):
        source = source.ex_iterable
    if isinstance(files := getattr(source, "kwargs", {}).get("metadata_files"), set):
        # An image folder's, which each process, and one that resumes, would read in an order of its own
        source.kwargs = {**source.kwargs, "metadata_files": sorted(files, key=str)}
    if hasattr(source, "generate_tables_fn"):
        source.generate_tables_fn = partial(read_patiently, partial(_valid_tables, source.generate_tables_fn))
    if hasattr(source, "generate_examples_fn"):
        source.generate_examples_fn = partial(read_patiently, source.generate_examples_fn)
    return rows


def _valid_tables(generate: Callable[..., Iterator[tuple[Any, pyarrow.Table]]], **shard: Any) -> Iterator[Any]:
    """The tables of a shard. Bytes that are no UTF-8 `datasets` passes over, and who reads the row fails."""
    for key, table in generate(**shard):
        table.validate(full=True)
        yield key, table


def read_patiently(generate: Callable[..., Iterator[Any]], **shard: Any) -> Iterator[Any]:
    """
    What `generate` reads from a shard. If the shard can't be read, it is opened again a moment later and read on from
    where it was left: so often, and after so long, as `datasets` does where a connection is lost
    (`datasets.config.STREAMING_READ_MAX_RETRIES` and `STREAMING_READ_RETRY_INTERVAL`).

    Raises:
        OSError: The shard didn't come back. It is named.
        ValueError: It is broken.
    """
    max_tries, seconds = datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RETRY_INTERVAL
    paths = [each for value in shard.values() if isinstance(value, list) for each in value if isinstance(each, str)]
    name = ", ".join(dict.fromkeys(paths)) or "A shard"
    num_read = num_tries = 0
    was_away = False
    while True:
        try:
            for item in islice(generate(**shard), num_read, None):
                num_read, num_tries = num_read + 1, 0
                yield item
            return
        except (OSError, ValueError, TarError) as error:
            if not was_away and not isinstance(error, OSError):
                # Broken, while one that is just being put back may be half a file
                raise ValueError(f"{name}: {error}") from error
            was_away = True
            # Of a lost connection `datasets` has tried it so often
            num_tries = max_tries if isinstance(error, ConnectionError) else num_tries + 1
            if num_tries >= max_tries:
                raise OSError(
                    f"{name} can't be read, after {num_tries} tries, {seconds} s apart: {error}. Expected it to stay "
                    "as long as it is streamed: put it back, and start again"
                ) from error
            logger.warning(f"{name} can't be read: {error}. Try {num_tries + 1} of {max_tries} follows in {seconds} s")
            time.sleep(seconds)


def _load_files(path: Path, options: dict[str, Any], bad_rows: BadRows | None) -> Rows:
    builder, splits = _files_of(path, options["split"])
    if bad_rows is not None:
        path, splits = _readable(path, builder, splits, options, bad_rows)
    # `datasets` takes names for patterns: of `a[1].jsonl` it would read `a1.jsonl`
    data_files = {name: [glob.escape(file) for file in files] for name, files in splits.items()}
    is_image_folder = builder == "imagefolder"
    source: dict[str, Any] = {"data_dir": glob.escape(str(path))} if is_image_folder else {"data_files": data_files}
    if builder == "json" and "parse_agent_traces" in JsonConfig.__dataclass_fields__:
        source["parse_agent_traces"] = False  # Rows may look like one by what else they tell
    try:
        rows = (load_as_written if builder == "json" else load_dataset)(builder, **source, **options)
        if builder == "json" and isinstance(rows, Dataset):
            # It passes over bytes that are no UTF-8, and who reads the row fails. Of a gigabyte it takes a second.
            rows.data.validate(full=True)
    except (ValueError, TypeError, OSError, DatasetGenerationError) as error:
        # The library's message names no file, or no row
        for _, _, reason in broken_lines(chain(*_lines_read(path, builder, splits).values())):
            raise reason from error
        if isinstance(error, OSError):
            raise
        told = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise ValueError(f"{path}: {told or error}") from error
    return rows


def _lines_read(path: Path, builder: str, splits: dict[str, list[str]]) -> dict[str, list[Path]]:
    """The files with lines that are read for each split. Of an image folder these are all splits."""
    if path.is_file():
        return {name: [path] for name in splits}
    is_image_folder = builder == "imagefolder"
    splits = _splits_of(path, {".jsonl", *ImageFolder.EXTENSIONS}) if is_image_folder else splits
    return {
        name: [
            path / file.relative_to(path.resolve())
            for file in map(Path, files)
            if builder == "json" or (is_image_folder and file.name == "metadata.jsonl")
        ]
        for name, files in splits.items()
    }


def _readable(
    path: Path, builder: str, splits: dict[str, list[str]], options: dict[str, Any], bad_rows: BadRows
) -> tuple[Path, dict[str, list[str]]]:
    """Where the rows are and the files of each split, or, if some of their lines can't be read, those of a copy."""
    lines = _lines_read(path, builder, splits)
    broken: dict[Path, dict[int, str]] = defaultdict(dict)
    for file, row, error in broken_lines(dict.fromkeys(chain(*lines.values()))):
        broken[file][row] = str(error)
    if not broken:
        return path, splits
    first = next(iter(next(iter(broken.values())).values()))
    needed = READS_EMPTY_PICTURES if builder == "imagefolder" else READS_EMPTY_LINES
    require_version(f"datasets>={needed}", f"To leave out what can't be read it is needed: {first}")
    wanted = {part.split("[")[0] for part in options["split"].split("+")}
    files = {name: each for name, each in lines.items() if name in wanted}
    # Of JSON it isn't known how many rows it holds, nor in which order an image folder's metadata files are read
    is_ordered = all(file.suffix == ".jsonl" for file in chain(*files.values()))
    if not wanted <= set(files):
        return path, splits  # the library says which there are
    if is_ordered and (builder == "json" or options["streaming"] or all(len(each) == 1 for each in files.values())):
        bad_rows.number_broken(broken, files, options["split"])
    else:
        bad_rows.tell_broken(chain(*(broken[file].values() for file in chain(*files.values()) if file in broken)))
    copy = bad_rows.without_broken_lines(path, broken)
    if path.is_file():
        return copy, {name: [str(copy)] for name in splits}
    place = path.resolve()
    return copy, {name: [str(copy / Path(file).relative_to(place)) for file in each] for name, each in splits.items()}


def _files_of(path: Path, split: str) -> tuple[str, dict[str, list[str]]]:
    """Which builder of `datasets` reads a file or folder, and the files of each split; none of an image folder."""
    names = {part.split("[")[0] for part in split.split("+")}
    files = [path] if path.is_file() else list(_data_files(file for file in path.rglob("*") if file.is_file()))
    suffixes = {file.suffix.lower() for file in files}
    # Pictures lie beside the tables that name them. JSON may be such a table, but often tells of other things
    has_table = any(suffixes & known - {".json"} for known in BUILDERS.values())
    has_metadata = any(file.name in ImageFolder.METADATA_FILENAMES for file in files)
    if path.is_dir() and suffixes & set(ImageFolder.EXTENSIONS) and (has_metadata or not has_table):
        return "imagefolder", {}
    if path.is_file() and len(names) > 1:
        raise ValueError(f"`dataset` {str(path)!r} is a file, which is one split, not {split!r}")
    found = {
        # A file is one split, whatever its name
        builder: {name: [str(path)] for name in names} if path.is_file() else _splits_of(path, known)
        for builder, known in BUILDERS.items()
        if suffixes & known
    }
    if not any(found.values()):
        raise ValueError(
            f"`dataset` {str(path)!r} has files of types {sorted(suffixes)}; expected pictures with a "
            "metadata file, JSONL, Parquet, Arrow, or WebDataset's tar files"
        )
    # Those with all the splits that are wanted come first
    builder, splits = max(found.items(), key=lambda each: (names <= set(each[1]), bool(each[1])))
    if path.is_dir() and names <= set(splits):
        _warn_of_splits(path, files, found, splits, names)
    if names <= set(splits):
        # Of the wanted ones alone: others may have other columns and classes, or lines that are broken
        splits = {name: splits[name] for name in names}
        left_out = sorted(
            str(Path(file).relative_to(path.resolve()))
            for other, others in found.items()
            for name in names & set(others)
            for file in others[name]
            # JSON often tells of other files
            if other != builder and Path(file).suffix.lower() != ".json"
        )
        if left_out:
            logger.warning(
                f"`dataset` {str(path)!r} has files of several types, of which {builder} is read; not read: {left_out}"
            )
    return builder, splits


def _warn_of_splits(
    path: Path,
    files: Sequence[Path],
    found: dict[str, dict[str, list[str]]],
    splits: dict[str, list[str]],
    names: set[str],
) -> None:
    """Warns of files that are in no split by their names, which nobody reads, or, of the wanted ones, in several."""
    known = {str(Path(file).relative_to(path.resolve())) for each in found.values() for file in chain(*each.values())}
    tables = set().union(*BUILDERS.values()) - {".json"}  # JSON often tells of other files
    types = {file: (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix.lower() for file in files}
    relative = [file.relative_to(path) for file in files if types[file] in tables]
    # What is hidden is meant to be passed over
    shown = [str(file) for file in relative if not any(part.startswith((".", "__")) for part in file.parts)]
    if unread := sorted(set(shown) - known):
        logger.warning(
            f"`dataset` {str(path)!r}: not read, by the names that files and folders of splits have, or for their "
            f"type: {unread}"
        )
    for file in sorted({file for name in names for file in splits[name]}):
        if len(several := [str(name) for name in splits if file in splits[name]]) > 1:
            logger.warning(
                f"`dataset` {str(path)!r}: by its name {str(Path(file).relative_to(path.resolve()))!r} is in the "
                f"splits {several}, so its rows are read in each; rename it if it is of one"
            )


def _data_files(files: Iterable[Path]) -> Iterator[Path]:
    """The files without those that `map`, `filter` and `shuffle` cached beside what `save_to_disk` wrote."""
    listed: dict[Path, set[str] | None] = {}
    for file in files:
        if file.suffix.lower() == ".arrow":
            if file.parent not in listed:
                listed[file.parent] = _saved_files(file.parent)
            names = listed[file.parent]
            if names is not None and file.name not in names:
                continue
        yield file


def _saved_files(folder: Path) -> set[str] | None:
    """
    The names of the files with the rows that `save_to_disk` wrote into a folder; `None` if it wrote nothing there.

    Raises:
        ValueError: What it wrote is broken, or not all there.
    """
    path = folder / datasets.config.DATASET_STATE_JSON_FILENAME
    if not path.is_file():
        return None
    try:
        names = {each["filename"] for each in json.loads(path.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} doesn't tell which files beside it hold the rows, as `save_to_disk` has it"
        ) from error
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{path} names {missing}, which are not beside it: save the data set again")
    return names


def _splits_of(folder: Path, suffixes: set[str]) -> dict[str, list[str]]:
    """The files of these types in each split, by the names that `datasets` knows splits by."""

    def find(pattern: str) -> list[str]:
        try:
            paths = resolve_pattern(pattern, glob.escape(str(folder.resolve())))
        except FileNotFoundError:
            return []
        return [str(path) for path in _data_files(map(Path, paths)) if path.suffix.lower() in suffixes]

    # Not the public `get_data_patterns`, for which a folder of pictures may be a split
    try:
        patterns = _get_data_files_patterns(find)
    except FileNotFoundError:
        # It passes over files that tell of others, such as `dataset_info.json`
        return {}
    # A name may fit several patterns of one split, as `validation_dev.jsonl` does
    return {name: list(dict.fromkeys(path for each in patterns[name] for path in find(each))) for name in patterns}


def _make_rows(
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
        options = {"column": args.image_column, "image_dir": args.image_dir}
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
        names = _class_names(rows, args.label_column)
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

    def expand(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in features}
        for row, index in zip(rows_of_batch(batch), indices, strict=True):
            if label_names is not None:
                row[args.label_column] = _named(row[args.label_column], label_names)
            images = row[args.image_column] if has_images else []
            images = [image for image in (images if isinstance(images, list) else [images]) if image is not None]
            try:
                all_made = make(row, len(images), index)
            except BAD_ROW_ERRORS as error:
                if bad_rows is None:
                    raise
                bad_rows.add(index, error, row if args.streaming else None)
                continue
            for made in all_made:
                made = {**made, "images": images, "source": index}
                for name, value in {**made, "length": _num_chars(made, args.chars_per_picture)}.items():
                    if name in features:
                        out[name].append(value)
        return out

    # A cached result would leave bad rows out, but write nothing down
    caching = {} if args.streaming or bad_rows is None else {"load_from_cache_file": False}
    return rows.map(
        expand, batched=True, with_indices=True, remove_columns=columns, features=Features(features), **caching
    )


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


def _num_chars(row: dict[str, Any], chars_per_picture: int = DataArguments.chars_per_picture) -> int:
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
    Rows with a column `length` (see [`_num_chars`]), where they have none. Pictures are not read for it: they are
    counted by the parts of messages.
    """
    texts = [name for name in ("text", *CONVERSATIONS) if name in rows.column_names]
    if "length" in rows.column_names or not texts:
        return rows
    lengths = []
    for row in rows.with_format(None).select_columns(texts):
        images = [part for part in _parts_of(row) if part["type"] == "image"]
        lengths.append(_num_chars({**row, "images": images}, chars_per_picture))
    return rows.add_column("length", lengths)


def _join_paths(batch: dict[str, list], column: str, image_dir: str) -> dict[str, list]:
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


def _class_names(rows: Rows, column: str) -> list[str]:
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


def number_rows(rows: Rows) -> Rows:
    """Adds a column `row` that counts from 0."""
    if isinstance(rows, Dataset):
        return rows.add_column("row", list(range(len(rows))))

    def number(row: dict, index: int) -> dict:
        return {**row, "row": index}

    return rows.map(number, with_indices=True)


def blank(rows: Rows) -> Rows:
    """Puts a gray picture of the same size in place of every picture, as rows are read."""

    def blank_batch(batch: dict[str, list]) -> dict[str, list]:
        if "images" not in batch:
            return batch
        return {**batch, "images": [[gray(image) for image in row or []] for row in batch["images"]]}

    def gray(image: Any) -> Any:
        try:
            return PIL.Image.new("RGB", load_picture(image).size, BLANK_GRAY)
        except Exception:
            return image  # the collator can't read it either, and names the row

    if isinstance(rows, Dataset):
        return rows.with_transform(blank_batch)
    return rows.map(blank_batch, batched=True)


def texts_of(rows: Rows) -> Iterator[str]:
    """Everything that is said in the rows, message by message, for training a tokenizer."""
    known = ("text", *CONVERSATIONS, "conversations")
    columns = [name for name in known if name in (rows.column_names or [])]
    for row in rows.select_columns(columns) if columns else rows:
        for each in conversations_of(row):
            if is_plain_text(each):
                yield from [each["text"]] if isinstance(each["text"], str) else []
                continue
            parts = (each["messages"],) if "messages" in each else (each.get("prompt"), each.get("completion"))
            messages = [message for part in parts for message in part or ()]
            try:
                check_messages(messages)
            except ValueError:
                continue  # the collator, which names the row, comes later
            texts = (part.get("text") for message in messages for part in parts_of(message))
            yield from filter(None, texts)
