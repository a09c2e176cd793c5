"""
Measures a checkpoint at a task, on held-out rows: what it writes, how it classifies, what it finds.

Example:

    duostream evaluate --checkpoint runs/finetuned --task caption --dataset path/to/photographs \\
        --output_dir runs/evaluation
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, ReadInstruction
from transformers import AutoProcessor, set_seed
from transformers.utils import logging

from ..processing.conversations_duostream import is_plain_text
from .arguments import DataArguments, check_at_least_one, check_unused, parse
from .card import read_run, save_samples, source_of, weights_fingerprints
from .checkpoints import check_place, load_model
from .data import load_rows
from .measuring import check_rows, evaluate, evaluation_loss
from .report import write_evaluation
from .tasks import task_of

logger = logging.get_logger(__name__)

# A number of rows of which all percentages are whole: how many there are isn't known where slices are compared
MANY_ROWS = 10**9


@dataclass
class EvaluateArguments:
    """What to evaluate, and how to generate."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})
    output_dir: str = field(
        default="runs/evaluation",
        metadata={
            "help": "`metrics.json` and `predictions.jsonl` are written here, and small pictures of some rows, which "
            "`push --evaluations` puts into the card."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Rows at a time."})
    report: bool = field(
        default=False,
        metadata={"help": "Write `report.html`, too: figures, how the rows score, some rows, and the worst."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})
    seed: int = field(default=0, metadata={"help": "Random seed of which tokens are masked."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "batch_size", "max_new_tokens", "num_beams")


def overlap(split: str, other: str, is_file: bool) -> bool:
    """Whether two splits, or slices, have rows in common, as far as that doesn't hang on how many there are."""

    def parts_of(spec: str) -> list[tuple[str, int, int]]:
        names = {part.split("[")[0].strip() for part in spec.split("+")}
        parts = ReadInstruction.from_spec(spec).to_absolute(dict.fromkeys(names, MANY_ROWS))
        # A file is one split, whatever it is called
        return [("" if is_file else part.splitname, part.from_, part.to) for part in parts]

    return any(
        name == other_name and max(start, other_start) < min(end, other_end)
        for name, start, end in parts_of(split)
        for other_name, other_start, other_end in parts_of(other)
    )


def warn_of_learnt_rows(checkpoint: str, data_args: DataArguments, split: str) -> None:
    """Warns where rows are measured that the checkpoint has learnt from, as far as `run.json` tells."""
    run, asked = read_run(Path(checkpoint)), source_of(data_args, split)
    is_file = Path(data_args.dataset).is_file()
    for source in [*run.get("sources", []), *(run.get("sources_before") or [])]:
        is_same = all(source[name] == asked[name] for name in ("name", "kind", "config"))
        if is_same and overlap(split, source["split"], is_file):
            logger.warning(
                f"{checkpoint} has learnt from split {source['split']!r} of {source['name']!r}, or of another of this "
                f"name, and is measured on {split!r}{', which is all of this file' * (is_file and '[' not in split)}: "
                "for figures of rows that it hasn't seen hold some out, as in `--train_split 'train[:90%]'` and "
                "`--eval_split 'train[90%:]'`"
            )
            return


OPTIONS = (EvaluateArguments, DataArguments)


def main(args: list[str] | None = None) -> None:
    evaluate_args, data_args = parse(*OPTIONS, args=args, doc=__doc__)
    if evaluate_args.report and (data_args.streaming or data_args.task == "masked"):
        raise ValueError(
            "`report` shows rows again: not with `streaming`, nor for `masked`, which has no scores of rows"
        )
    for_training = ("mixture", "conversations_per_row", "on_bad_rows", "max_train_rows", "train_split", "weight")
    check_unused(data_args, (*for_training, "chars_per_picture"), "it is for rows to train on")
    if not task_of(data_args.task).is_generative:
        check_unused(evaluate_args, ["max_new_tokens", "num_beams"], f"{data_args.task!r} writes nothing")
    output_dir = Path(evaluate_args.output_dir)
    there = next(each for each in (output_dir, *output_dir.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` is {str(output_dir)!r}, but {str(there)!r} is a file; expected a folder")
    check_place(evaluate_args.checkpoint)
    started = time.time()
    set_seed(evaluate_args.seed)
    task, batch_size = task_of(data_args.task), evaluate_args.batch_size
    model = load_model(task.auto_class, evaluate_args.checkpoint)
    processor = AutoProcessor.from_pretrained(evaluate_args.checkpoint)
    classes = list(model.config.id2label.values()) if model.config.num_labels > 1 else []
    split, max_rows = data_args.eval_split, data_args.max_eval_rows
    warn_of_learnt_rows(evaluate_args.checkpoint, data_args, split)
    rows = load_rows(data_args, split, max_rows, is_evaluation=True, classes=classes)
    check_rows(rows, data_args.task)
    options: dict[str, Any] = {"max_length": data_args.max_length}
    if data_args.task == "masked":
        options["seed"] = evaluate_args.seed
    losses: dict[str, float] = {}
    if task.is_generative:
        # First, as what it refuses would else be told when all is answered
        rows_of_answers = load_rows(data_args, split, max_rows)
        losses["loss"] = evaluation_loss(model, processor, rows_of_answers, batch_size, data_args.max_length)
        options = {name: getattr(evaluate_args, name) for name in ("max_new_tokens", "num_beams")}
    figures, results = evaluate(model, processor, rows, data_args.task, batch_size, **options)
    if data_args.task == "classification" and isinstance(rows, Dataset) and is_plain_text(rows.features):
        results = [{**result, "prompt": text} for result, text in zip(results, rows["text"], strict=True)]
    if data_args.task == "classification" and isinstance(rows, Dataset) and "references" in rows.column_names:
        # Some may be no class
        results = [{**result, "label": names} for result, names in zip(results, rows["references"], strict=True)]
    has_row_results = data_args.task not in ("retrieval", "masked")
    record = {
        "command": sys.argv[1:] if args is None else args,
        "task": data_args.task,
        "data": source_of(data_args, split),
        "weights_fingerprints": weights_fingerprints(model),
        "seed": evaluate_args.seed,
        # Of what was read and how; a stream has none
        "data_fingerprint": rows._fingerprint if isinstance(rows, Dataset) else None,
        "versions": {name: version(name) for name in ("duostream", "transformers", "torch", "datasets")},
        # What is no number, as the correlation of figures that are all alike, has no place in JSON
        **{name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()},
        **losses,
        # Of a stream it isn't known where results are not one for each row
        "num_rows": len(rows) if isinstance(rows, Dataset) else len(results) if has_row_results else None,
        "seconds": time.time() - started,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
    (output_dir / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    save_samples(output_dir, rows, results)
    # An earlier one has other figures
    (output_dir / "report.html").unlink(missing_ok=True)
    if evaluate_args.report:
        write_evaluation(output_dir / "report.html", data_args.task, record, rows, results)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
