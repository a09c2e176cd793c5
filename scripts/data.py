"""Rows for training and evaluation: conversations with pictures, of one data set or of several."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from typing import Any

import PIL.Image
from datasets import Dataset, Features, LargeList, List, Value, interleave_datasets

from ..configuration.configuration_duostream import MAX_LABELS
from ..processing.chat_template_duostream import check_messages, parts_of
from ..processing.conversations_duostream import conversations_of, is_plain_text
from ..processing.data_collator_duostream import load_picture
from .arguments import DataArguments, check_unused
from .bad_rows import BadRows
from .rows import UNDECODED, class_names, make_rows, num_chars
from .scenes import MESSAGES_FEATURE, build_scenes, caption_rows, question_rows, training_rows
from .sources import CONVERSATIONS, MADE_BY, Rows, load_source
from .tasks import task_of, with_defaults

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
    if args.task in ("masked", "retrieval"):
        check_unused(args, ["prompt_column"], f"for {args.task!r} there is no prompt")
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
        # `with_transform`, by which pictures are blank, is lost in `concatenate_datasets`: they are blanked at the end
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
        if part.conversations_per_row > 1 and not task_of(part.task).is_generative:
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
        if not task_of(part.task).is_generative:
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

    def make_alike(row: dict[str, Any], index: int, made_by: str) -> dict[str, Any]:
        turns = {
            name: None if row[name] is None else [with_parts(message, index) for message in row[name]]
            for name in ("prompt", "completion")
        }
        length = row["length"] if "length" in row else num_chars(row, args.chars_per_picture)
        origin = {"dataset": args.dataset, "source": row.get("source", index)}
        return {"images": row.get("images") or [], **turns, "length": length, **origin}

    turns = {"prompt": MESSAGES_FEATURE, "completion": MESSAGES_FEATURE}
    numbers = {"length": Value("int64"), "source": Value("int64")}
    features = Features({"images": List(UNDECODED), **turns, "dataset": Value("string"), **numbers})
    return rows.map(
        make_alike, with_indices=True, remove_columns=rows.column_names, features=features, fn_kwargs=MADE_BY
    )


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

    def join(batch: dict[str, list], made_by: str) -> dict[str, list]:
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
            out["length"].append(chars_per_picture * num_images + sum(map(num_chars, conversations)))
        return out

    return Dataset.from_dict({"members": members}).map(
        join,
        batched=True,
        remove_columns=["members"],
        features=features,
        fn_kwargs=MADE_BY,
        desc="putting rows together",
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
    rows = load_source(args, args.train_split, bad_rows)
    column = args.label_column
    columns = rows.column_names or list(next(iter(rows.take(1))))
    if column not in columns:
        raise ValueError(f"`label_column` is {column!r}, but the columns are {columns}")
    if names := class_names(rows, column):
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
    if isinstance(first, int) and (highest := max(values)) >= MAX_LABELS:
        raise ValueError(
            f"`{column}` has the number {highest}; expected those of classes, from 0 to {MAX_LABELS - 1}. Names, as "
            "texts, are numbered by themselves, and numbers to come near to have a point"
        )
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
    rows = load_source(args, split, bad_rows)
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
    return make_rows(rows, columns, args, is_evaluation, classes, bad_rows)


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
