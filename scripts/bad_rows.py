"""Rows that can't be read: left out of training, each written down with its reason."""

import json
import os
import re
import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset, ReadInstruction
from torch.utils.data import get_worker_info
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a bad row may raise; anything else is an error of ours
BAD_ROW_ERRORS = (ValueError, TypeError, OSError)
MAX_LINES = 1000  # over which a row is looked for that isn't on one


def lines_of(file: Path) -> Iterator[bytes]:
    """The lines of a JSONL file that are rows: empty ones are none."""
    with file.open("rb") as lines:
        yield from filter(bytes.strip, lines)


def is_array(file: Path) -> bool:
    """Whether a file holds one JSON array of all rows, which `datasets` reads whole, and no row a line."""
    lines = (line.removeprefix(BOM_UTF8).strip() for line in lines_of(file))
    first, second = next(lines, b""), next(lines, b"")
    if not first.startswith(b"[") or not second:
        return first.startswith(b"[")
    # Else the first line is a bad row
    return first == b"[" or not (_num_rows(second) or first.endswith(b"]"))


def broken_lines(files: Iterable[Path]) -> Iterator[tuple[Path, int, ValueError]]:
    """
    The lines of JSONL files that are no JSON, hold half a character (a lone surrogate) or a column twice, or tell of a
    picture that isn't there: any of them keeps `datasets` from reading all others. Files of other types, and arrays,
    are passed over.

    Returns:
        The file, the row of it from 0, and what is wrong with it.

    Raises:
        ValueError: A file isn't one row a line, though `datasets` may read it.
    """
    for file in files:
        running: list[bytes] = []  # lines that are broken, one after the other
        for row, line in enumerate(lines_of(file) if file.suffix == ".jsonl" and not is_array(file) else ()):
            try:
                fields = _row_of(line)
                running = []
                name = fields.get("file_name")
                if file.stem == "metadata" and isinstance(name, str) and not (file.parent / name).is_file():
                    raise ValueError(f"there is no picture {name!r}")
            except ValueError as error:
                num_rows = _num_rows(line)
                # A row that is whole, and bad, is on a line of its own
                running = [] if num_rows == 1 else [*running[-MAX_LINES:], line]
                may_end = len(running) > 1 and line.rstrip().endswith(b"}")
                if num_rows > 1 or (may_end and _num_rows(b"".join(running))):
                    raise ValueError(
                        f"{file}: expected one row, a JSON object, on each line; this file has several on one, or "
                        "some that go over several"
                    ) from error
                yield file, row, ValueError(f"Row {row} of {file}: {error}")


def _row_of(line: bytes) -> dict[str, Any]:
    columns: list[str] = []

    def keep_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        columns[:] = [name for name, _ in pairs]  # at last those of the row itself
        return dict(pairs)

    fields = json.loads(line, object_pairs_hook=keep_names)
    json.dumps(fields, ensure_ascii=False).encode()
    if not isinstance(fields, dict):
        raise ValueError("expected an object with columns")
    if len(fields) < len(columns):
        raise ValueError(f"a column is there twice: {', '.join(columns)}")
    return fields


def _num_rows(text: bytes) -> int:
    """How many JSON objects there are, one behind the other; 0 if there is anything else."""
    decoder, blanks, end, count = json.JSONDecoder(), re.compile(r"\s*"), 0, 0
    decoded = text.decode("utf-8-sig", errors="replace").strip()
    while end < len(decoded):
        try:
            fields, end = decoder.raw_decode(decoded, blanks.match(decoded, end).end())
        except ValueError:
            return 0
        if not isinstance(fields, dict):
            return 0
        count += 1
    return count


class BadRows:
    """
    Leaves bad rows out, and writes them to a file: a JSON object a line, with `row` (of the source, from 0), `reason`,
    and in a mixture the `dataset`. Rows of a stream are numbered by each process that reads a part of it, from 0; so
    there is `content`, too, by which the same row is known again.

    Args:
        path (`Path`): The file. What an earlier run wrote is replaced.

    Attributes:
        dataset (`str`, *optional*): Of a mixture, the data set whose rows are being read.
    """

    # The library uploads nothing whose name begins so
    copies = "_readable"

    def __init__(self, path: Path):
        self.path = path
        self.dataset: str | None = None
        # Of rows that were emptied, by data set and number: what they fail for says nothing of it
        self.reasons: dict[tuple[str | None, int], str] = {}
        state = PartialState()
        self.num_ranks = state.num_processes
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        state.wait_for_everyone()

    def add(self, row: int, error: Exception, content: Any = None, dataset: str | None = None) -> None:
        dataset = dataset or self.dataset
        # Of a stream, each of several processes numbers its own part
        is_alone = content is None or (self.num_ranks == 1 and get_worker_info() is None)
        reason = self.reasons.get((dataset, row)) if is_alone else None
        if reason is not None and content is not None:
            content = reason  # rows that were emptied are else all the same one
        told = {"row": row, "reason": reason or str(error) or type(error).__name__}
        if dataset is not None:
            told["dataset"] = dataset
        if content is not None:
            told["content"] = sha256(repr(content).encode("utf-8", "backslashreplace")).hexdigest()[:16]
        line = json.dumps(told, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def number_broken(
        self, broken: Mapping[Path, Mapping[int, str]], files: Mapping[str, list[Path]], split: str
    ) -> None:
        """
        Keeps the reasons of lines that can't be read for when their rows, which are emptied, are left out.

        Args:
            broken (`Mapping`): By file and row of it.
            files (`Mapping`): JSONL files of each split, in the order in which they are read.
            split (`str`): What is read: splits, or slices of them.
        """
        reasons = {
            name: [broken.get(file, {}).get(row) for file in each for row, _ in enumerate(lines_of(file))]
            for name, each in files.items()
        }
        lengths = {name: len(each) for name, each in reasons.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
        read = [reason for part in parts for reason in reasons[part.splitname][part.from_ : part.to]]
        self.reasons |= {(self.dataset, row): reason for row, reason in enumerate(read) if reason is not None}

    def tell_broken(self, reasons: Iterable[str]) -> None:
        """Tells of lines that can't be read, where it isn't known which rows of a split they are."""
        for reason in reasons:
            logger.warning(reason)

    def without_broken_lines(self, place: Path, broken: Mapping[Path, Mapping[int, str]]) -> Path:
        """
        A copy of a file or folder, beside `bad_rows.jsonl`, in which lines that can't be read are rows without any
        column, so that all rows keep their numbers. Pictures are linked, not copied.
        """
        copy = self.path.parent / self.copies / sha256(str(place.resolve()).encode()).hexdigest()[:16] / place.name
        state = PartialState()
        # Others may still be reading an earlier copy
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(copy.parent, ignore_errors=True)
            copy.parent.mkdir(parents=True)
            if place.is_dir():
                shutil.copytree(place.resolve(), copy, copy_function=os.symlink)
            for file, rows in broken.items():
                kept = [b"{}\n" if row in rows else line for row, line in enumerate(lines_of(file))]
                written = copy if place.is_file() else copy / file.relative_to(place)
                written.unlink(missing_ok=True)
                written.write_bytes(b"".join(kept))
        state.wait_for_everyone()
        return copy

    def leave_out(
        self, rows: Dataset | IterableDataset, check: Callable[[dict[str, Any]], Any]
    ) -> Dataset | IterableDataset:
        """
        The rows that `check` doesn't refuse, of `conversations` that share a picture those that it doesn't. All are
        read once, now; of a stream, each as it comes.

        Args:
            check: Of a row; raises `ValueError`, `TypeError` or `OSError` if the row is bad.

        Raises:
            ValueError: No row is left.
        """

        is_stream = isinstance(rows, IterableDataset)

        def keep(row: dict[str, Any], index: int) -> bool:
            try:
                check(row)
            except BAD_ROW_ERRORS as error:
                sources = row.get("source", row.get("row", index))
                # A row may hold several of the source that share a picture
                for source in dict.fromkeys(sources if isinstance(sources, list) else [sources]):
                    # Of a row of the source each caption is a row here
                    same = {"images": row["images"], "source": source} if row.get("images") else row
                    content = {name: value for name, value in same.items() if name != "row"}
                    self.add(source, error, content if is_stream else None, row.get("dataset"))
                return False
            return True

        def with_good_conversations(row: Mapping[str, Any], index: int) -> dict[str, Any]:
            row = {**row}  # `map` gives something like it
            conversations, sources = row["conversations"], row.get("source")
            if is_good(row):
                return row
            numbers = [row.get("row", index)] * len(conversations) if sources is None else sources
            parts = [
                {**row, "conversations": [conversation], "source": [number], "row": number}
                for conversation, number in zip(conversations, numbers, strict=True)
            ]
            good = [place for place, part in enumerate(parts) if is_good(part)]
            # As where their picture can't be read, or they can't share it: then all are bad
            for part in [part for place, part in enumerate(parts) if place not in good] or [row]:
                keep(part, index)
            rest = {**row, "conversations": [conversations[place] for place in good]}
            if sources is not None:
                rest["source"] = [sources[place] for place in good]
            if len(good) == len(parts) or (good and not keep(rest, index)):
                rest["conversations"] = []
            return rest  # of at most the row's `length`

        def is_good(row: dict[str, Any]) -> bool:
            try:
                check(row)
            except BAD_ROW_ERRORS:
                return False
            return True

        if is_stream:
            return rows.filter(keep, with_indices=True)
        # A cached result would leave rows out, but write nothing down
        anew = {"with_indices": True, "load_from_cache_file": False, "desc": "looking for bad rows"}
        if "conversations" in rows.column_names:
            kept = rows.map(with_good_conversations, features=rows.features, **anew).filter(
                bool, input_columns="conversations", load_from_cache_file=False
            )
        else:
            kept = rows.filter(keep, **anew)
        if not len(kept):
            raise ValueError(f"All rows are bad: {self.path} says why")
        return kept

    def elsewhere(self) -> "BadRowsElsewhere":
        """The same for rows to evaluate on."""
        return BadRowsElsewhere(self.path)

    def report(self) -> int:
        """How many rows were left out, which is logged, too."""
        # A stream meets its rows in every epoch again, and so do several ranks
        with open(self.path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        count = len({line.get("content", (line.get("dataset"), line["row"])) for line in lines})
        logger.warning(f"{count} bad rows were left out; {self.path} says which, and why")
        return count


class BadRowsElsewhere(BadRows):
    """
    For rows to evaluate on, each of which is to be good: lines that can't be read elsewhere, among rows to train on
    in the same file or folder, are passed over, and a bad row of these is an error.
    """

    # Apart from those that training may be reading
    copies = "_readable_to_evaluate"

    def __init__(self, path: Path):
        self.path = path
        self.dataset = None
        self.reasons = {}

    def add(self, row: int, error: Exception, content: Any = None, dataset: str | None = None) -> None:
        raise error

    def number_broken(
        self, broken: Mapping[Path, Mapping[int, str]], files: Mapping[str, list[Path]], split: str
    ) -> None:
        super().number_broken(broken, files, split)
        self.tell_broken(self.reasons.values())

    def tell_broken(self, reasons: Iterable[str]) -> None:
        for reason in reasons:
            raise ValueError(reason)
