"""
Measures what padding costs: the same rows trained on in batches of random rows, of rows of like length, and of packed
rows, in turn.

Example:

    duostream benchmark padding --task summarization --dataset path/to/scitldr --image_column "" --max_length 400
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..processing import DuoStreamDataCollator
from ..processing.packing_duostream import IGNORE_INDEX
from .arguments import DataArguments, parse
from .comparison import Row, check_clock, check_repeats, compare, in_turn, record_of, timer, write_rows
from .data import load_mixture, texts_of
from .input_speed import check_writes, tiny_model


@dataclass
class PaddingArguments:
    """
    How much is trained on.

    Raises:
        ValueError: There are to be fewer rows than four batches have, which is too few to sort, or fewer than two
            repeats, or there is no such clock.
    """

    rows: int = field(default=128, metadata={"help": "How many rows, drawn at random."})
    batch_size: int = field(default=32, metadata={"help": "Rows a batch."})
    repeats: int = field(default=3, metadata={"help": "How often all are trained on, after one time to warm up."})
    image_size: int = field(default=48, metadata={"help": "Side of the pictures that are trained on."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer, which is trained on the rows."})
    clock: str = field(default="cpu", metadata={"help": "wall; or cpu, where others are in the way."})
    seed: int = field(default=0, metadata={"help": "Of the choice of rows, their order and the weights."})
    output: str = field(default="runs/benchmark/padding.json", metadata={"help": "JSON file for the figures."})

    def __post_init__(self) -> None:
        if self.rows < 4 * self.batch_size:
            raise ValueError(f"`rows` is {self.rows}; expected at least four batches of {self.batch_size}")
        check_repeats(self.repeats)
        check_clock(self.clock)


def in_batches(rows: Sequence[Any], batch_size: int) -> list[list[Any]]:
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def share_of_padding(batches: list[dict[str, Any]]) -> float:
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def training(model: torch.nn.Module, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """A step on each batch. The weights stay as they are, so that all are measured on the same ones."""

    def run() -> None:
        for batch in batches:
            num_labels = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            model(**batch, num_items_in_batch=num_labels).loss.backward()
            model.zero_grad()

    return run


def measure(args: PaddingArguments, data_args: DataArguments) -> Iterator[Row]:
    set_seed(args.seed)
    rows = load_mixture(data_args, seed=args.seed)
    if len(rows) < args.rows:
        raise ValueError(f"`rows` is {args.rows}, but the data set has {len(rows)}")
    rows = rows.shuffle(seed=args.seed).select(range(args.rows))
    model, processor = tiny_model(args.image_size, args.vocab_size, texts_of(rows))
    collator = DuoStreamDataCollator(processor, data_args.max_length)
    packed = replace(collator, packing=True)
    listed = list(rows)
    # All of these rows are sorted together, as the library does with 50 batches where there are more
    num_batches = len(listed) // args.batch_size
    lengths = [collator([row])["input_ids"].shape[1] for row in listed]
    grouped = get_length_grouped_indices(lengths, args.batch_size, num_batches)
    orders = {
        "random": (collator, listed),
        "group_by_length": (collator, [listed[i] for i in grouped]),
        "packing": (packed, listed),
    }
    batches = {
        name: [collate(batch) for batch in in_batches(ordered, args.batch_size)]
        for name, (collate, ordered) in orders.items()
    }
    runs = {name: timer(training(model.train(), each), args.clock) for name, each in batches.items()}
    seconds = in_turn(runs, args.repeats)
    for name in ("group_by_length", "packing"):
        shares = {"padding": share_of_padding(batches[name]), "padding_random": share_of_padding(batches["random"])}
        yield {"batches": name, **shares, **compare(seconds, name, "random", names=("pass", "pass_random"))}


def main(args: list[str] | None = None) -> None:
    padding_args, data_args = parse(PaddingArguments, DataArguments, args=args, doc=__doc__)
    if data_args.streaming:
        raise ValueError("The same rows are put together in several ways: not with `streaming`")
    check_writes(data_args)
    record = record_of("padding", sys.argv[1:] if args is None else args, padding_args)
    write_rows(Path(padding_args.output), record, measure(padding_args, data_args))


if __name__ == "__main__":
    main()
