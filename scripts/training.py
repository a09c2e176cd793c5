"""What `pretrain` and `finetune` have in common: batches, what is refused first, where a run starts and ends."""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints
from transformers.utils import logging

from ..processing import (
    DuoStreamDataCollator,
    DuoStreamProcessor,
)
from .answering import num_positions
from .arguments import DataArguments, DuoStreamTrainingArguments
from .bad_rows import BadRows
from .checkpoints import check_files, check_meanings, warn_of_unknown_tokens
from .long_runs import SaveWhenTerminated
from .rows import with_lengths
from .sources import Rows
from .tasks import task_of
from .trainer import DuoStreamTrainer
from .vision_cache import with_states

logger = logging.get_logger(__name__)


def collator_of(args: DataArguments, processor: DuoStreamProcessor, model: PreTrainedModel) -> DuoStreamDataCollator:
    """Makes the batches of a task."""
    options = {"num_labels": model.config.num_labels} if args.task == "classification" else {}
    return task_of(args.task).collator(processor, args.max_length, **options)


def prepare(model: PreTrainedModel, processor: DuoStreamProcessor, freeze: Sequence[str]) -> None:
    """
    Freezes parts of a model, and lowers its tokenizer's `model_max_length` to the positions that its text stream has,
    so that collators name a row with more text, at which the model would fail.

    Raises:
        ValueError: A part is unknown, or no weight is left to train.
    """
    warn_of_unknown_tokens(processor.tokenizer, model.config)
    model.freeze(*freeze)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"`freeze` is {' '.join(freeze)}, which leaves no weight to train: leave a part out of it")
    if (positions := num_positions(model)) is not None:
        tokenizer = processor.tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def bad_rows_of(data_args: DataArguments, training_args: DuoStreamTrainingArguments) -> BadRows | None:
    """
    Where rows go that can't be read, if `on_bad_rows` is `skip`.

    Raises:
        ValueError: `on_bad_rows` is something else.
    """
    if data_args.on_bad_rows not in ("raise", "skip"):
        raise ValueError(f"`on_bad_rows` is {data_args.on_bad_rows!r}; there are 'raise' and 'skip'")
    return BadRows(Path(str(training_args.output_dir)) / "bad_rows.jsonl") if data_args.on_bad_rows == "skip" else None


def check_output_dir(args: DuoStreamTrainingArguments) -> None:
    """Raises `ValueError` if checkpoints of a run would lie among another's, which resuming can't tell apart."""
    found = [Path(path).name for path in sort_checkpoints(str(args.output_dir))]
    if found and not args.resume:
        raise ValueError(
            f"`output_dir` {args.output_dir} has {', '.join(found)} of an earlier run: `--resume true` continues it; "
            "for a new one take another folder, or remove them"
        )


def check_packing(args: DuoStreamTrainingArguments, rows: Rows) -> None:
    """Raises `ValueError` if rows that hold several conversations are to be packed."""
    if args.packing and "conversations" in (rows.column_names or []):
        raise ValueError("`packing` is for rows of one conversation each: it goes without `conversations_per_row`")


def check_batches(training_args: DuoStreamTrainingArguments, rows: Rows) -> None:
    """
    Raises:
        ValueError: There are fewer rows than a batch of all ranks, and `dataloader_drop_last` leaves such out; or
            their lengths are looked for in another column.
    """
    if isinstance(rows, IterableDataset):
        if training_args.train_sampling_strategy == "group_by_length":
            # As recipes for stored rows may say
            logger.warning(
                "A stream's rows come as they stand: `group_by_length` needs the lengths of all, and is not done"
            )
        return
    is_split = training_args.accelerator_config.split_batches
    rows_per_batch = training_args.train_batch_size * (1 if is_split else training_args.world_size)
    if training_args.dataloader_drop_last and len(rows) < rows_per_batch:
        raise ValueError(
            f"The rows to train on are {len(rows)}, fewer than a batch of {rows_per_batch}, which "
            "`dataloader_drop_last` leaves out: nothing would be learnt"
        )
    if training_args.length_column_name != "length":
        raise ValueError(
            f"`length_column_name` is {training_args.length_column_name!r}; the rows' lengths are in 'length'"
        )


def train(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    training_args: DuoStreamTrainingArguments,
    train_rows: Rows,
    eval_rows: Rows | None = None,
    collator: DuoStreamDataCollator | None = None,
    callbacks: list[Any] | None = None,
    bad_rows: BadRows | None = None,
    **kwargs: Any,
) -> Trainer:
    """
    Trains, evaluates if there are `eval_rows`, and saves model and processor in `training_args.output_dir`.

    Args:
        collator (`DuoStreamDataCollator`, *optional*): Makes the batches. By default one for answers to be written.
        bad_rows (`BadRows`, *optional*): Takes rows to train on that can't be read, which are otherwise an error.
        kwargs: Go to [`DuoStreamTrainer`].

    Returns:
        `Trainer`: after training; its `state.log_history` holds the losses.

    Raises:
        SystemExit: SIGTERM came, with the exit code that says so (143). A checkpoint is saved.
        ValueError: A row is broken, or the loss is no number, or so is a file of the checkpoint to resume from, or
            that is of another tokenizer or other classes, or there are checkpoints in `output_dir` without `resume`.
        OSError: A checkpoint can't be saved.
    """
    check_output_dir(training_args)
    # Another rank may not have made it yet
    Path(str(training_args.output_dir)).mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(training_args.output_dir) if training_args.resume else None
    if checkpoint is not None:
        check_files(Path(checkpoint), has_states=True)
        check_meanings(Path(checkpoint), processor.tokenizer, model.config)
    collator = DuoStreamDataCollator(processor) if collator is None else collator
    if bad_rows is not None:
        # Before training, so that batches, epochs and resuming are those of a data set without them
        train_rows = bad_rows.leave_out(train_rows, lambda row: collator([row]))
    check_batches(training_args, train_rows)
    if training_args.cache_vision:
        train_rows = with_states(train_rows, model, processor, training_args)
        eval_rows = None if eval_rows is None else with_states(eval_rows, model, processor, training_args)
    if training_args.train_sampling_strategy == "group_by_length" and isinstance(train_rows, Dataset):
        data_args = kwargs.get("data")
        chars_per_picture = (DataArguments if data_args is None else data_args).chars_per_picture
        train_rows = with_lengths(train_rows, chars_per_picture)
    if isinstance(train_rows, IterableDataset):
        # Where one ends, the library begins anew within what it counts as one epoch, and resuming can't tell where
        train_rows = train_rows.repeat(None)
    held_out: Rows | list[dict[str, Any]] | None = eval_rows
    if isinstance(eval_rows, IterableDataset) and training_args.world_size > 1:
        # Ranks whose parts of a stream differ in length would wait for each other. No `Dataset`, in which a column
        # holds one kind of values, as `content` need not, and has to be in the first row.
        held_out = list(eval_rows)
    trainer = DuoStreamTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=callbacks,
        **kwargs,
    )
    if checkpoint is None and trainer.is_world_process_zero():
        trainer.bad_losses.unlink(missing_ok=True)
    with SaveWhenTerminated(trainer.accelerator) as termination:
        trainer.add_callback(termination)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if termination.is_terminated:
        logger.warning(f"Terminated after step {trainer.state.global_step}, which is saved: `--resume true` goes on")
        sys.exit(128 + signal.SIGTERM)
    if checkpoint is None:
        trainer.check_has_learnt()
    if checkpoint is None or trainer.state.global_step > int(checkpoint.rsplit("-", 1)[1]):
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    else:
        # Of no step there are no figures: those of a run that had ended stay in `train_results.json`
        trainer.state.log_history.pop()
    trainer.save_state()
    # First, as `bf16_full_eval` makes the model one in half precision
    trainer.save_model(_internal_call=True)
    if eval_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        # With the evaluation's figures in the card
        trainer.push_to_hub(commit_message="Model save")
    else:
        trainer.create_model_card()
    if bad_rows is not None:
        bad_rows.report()
    if trainer.bad_losses.exists():
        # A step that came again after an interruption is written down again
        steps = {json.loads(line)["step"] for line in trainer.bad_losses.read_text(encoding="utf-8").splitlines()}
        logger.warning(f"{len(steps)} steps were left out for their loss; {trainer.bad_losses} says which")
    return trainer
