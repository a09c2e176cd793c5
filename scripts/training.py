"""What `pretrain` and `finetune` have in common: `Trainer` as it is, and where it starts and ends."""

from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..processing import DuoStreamDataCollator, DuoStreamProcessor
from .arguments import DuoStreamTrainingArguments
from .data import Rows

logger = logging.get_logger(__name__)


def train(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    training_args: DuoStreamTrainingArguments,
    train_rows: Rows,
    eval_rows: Rows | None = None,
    max_length: int | None = None,
    callbacks: list[Any] | None = None,
) -> Trainer:
    """
    Trains, evaluates if there are `eval_rows`, and saves model and processor in `training_args.output_dir`.

    Returns:
        `Trainer`: after training; its `state.log_history` holds the losses.
    """
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DuoStreamDataCollator(processor, max_length=max_length),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=callbacks,
    )
    checkpoint = get_last_checkpoint(training_args.output_dir) if training_args.resume else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if eval_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    return trainer
