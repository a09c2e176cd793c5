"""Rows that can't be read: left out of training, each written down with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a bad row may raise; anything else is an error of ours
BAD_ROW_ERRORS = (ValueError, TypeError, OSError)


class BadRows:
    """
    Leaves bad rows out, and writes them to a file: a JSON object a line, with `row` (of the source, from 0) and
    `reason`.

    Args:
        path (`Path`): The file. What an earlier run wrote is replaced.
    """

    def __init__(self, path: Path):
        self.path = path
        state = PartialState()
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        state.wait_for_everyone()

    def add(self, row: int, error: Exception) -> None:
        line = json.dumps({"row": row, "reason": str(error) or type(error).__name__}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def leave_out(
        self, rows: Dataset | IterableDataset, check: Callable[[dict[str, Any]], Any]
    ) -> Dataset | IterableDataset:
        """
        The rows that `check` doesn't refuse. All are read once, now; of a stream, each as it comes.

        Args:
            check: Of a row; raises `ValueError`, `TypeError` or `OSError` if the row is bad.

        Raises:
            ValueError: No row is left.
        """

        def keep(row: dict[str, Any], index: int) -> bool:
            try:
                check(row)
            except BAD_ROW_ERRORS as error:
                sources = row.get("source", row.get("row", index))
                # A row may hold several of the source that share a picture
                for source in dict.fromkeys(sources if isinstance(sources, list) else [sources]):
                    self.add(source, error)
                return False
            return True

        if isinstance(rows, IterableDataset):
            return rows.filter(keep, with_indices=True)
        # A cached result would leave rows out, but write nothing down
        kept = rows.filter(keep, with_indices=True, load_from_cache_file=False, desc="looking for bad rows")
        if not len(kept):
            raise ValueError(f"All rows are bad: {self.path} says why")
        return kept

    def report(self) -> int:
        """How many rows were left out, which is logged, too."""
        # A stream meets its rows in every epoch again, and so do several ranks
        count = len({json.loads(line)["row"] for line in self.path.read_text(encoding="utf-8").splitlines()})
        logger.warning(f"{count} bad rows were left out; {self.path} says which, and why")
        return count
