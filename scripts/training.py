"""What `pretrain` and `finetune` have in common: `Trainer`, what it reports beside the loss, and where it starts."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from ..modeling import DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification
from ..modeling.modeling_duostream import STREAMS
from ..processing import (
    DuoStreamClassificationCollator,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamProcessor,
    DuoStreamRetrievalCollator,
)
from ..processing.data_collator_duostream import IGNORE_INDEX
from .arguments import DataArguments, DuoStreamTrainingArguments
from .bad_rows import BadRows
from .data import Rows
from .evaluate import evaluate, generate_answers, score_answers
from .tasks import WRITER, task_of

SMOOTHED = (DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification)
OBJECTIVES = ("lm_loss", "mlm_loss", "itc_loss", "itm_loss")


def collator_of(args: DataArguments, processor: DuoStreamProcessor, model: PreTrainedModel) -> DuoStreamDataCollator:
    """Makes the batches of a task."""
    if args.task == "classification":
        return DuoStreamClassificationCollator(processor, args.max_length, num_labels=model.config.num_labels)
    collators = {"retrieval": DuoStreamRetrievalCollator, "masked": DuoStreamMaskedLMCollator}
    return collators.get(args.task, DuoStreamDataCollator)(processor, args.max_length)


class DuoStreamTrainer(Trainer):
    """
    `Trainer` that reports each pretraining objective, and at each evaluation the figures of the task.

    Args:
        task (`str`, *optional*): Measured at each evaluation, if there are `metric_rows`.
        metric_rows (`Dataset`, *optional*): Rows with all of their references. Answers are generated from prompts
            without them, shared out over the ranks.
    """

    def __init__(self, *args: Any, task: str = "chat", metric_rows: Dataset | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor and not isinstance(self.model, SMOOTHED):
            # The library would take the labels away, and with them these losses
            names = " and ".join(each.__name__ for each in SMOOTHED)
            raise ValueError(f"`label_smoothing_factor` is for {names}: the losses of others know no smoothing")
        self.has_objectives = hasattr(self.model, "matching_loss")
        if self.has_objectives:
            # Batches without masked tokens have labels, too
            self.label_names: list[str] = ["labels"]
            # What no objective trains has no gradient, for which ranks would wait
            weights, head = self.model.config, self.model.image_text_head
            head.requires_grad_(weights.itc_weight > 0)
            head.matching.requires_grad_(weights.itm_weight > 0)
        self.task, self.metric_rows = task, metric_rows
        config = self.model.config
        self.objectives = [name for name in OBJECTIVES if getattr(config, name.replace("_loss", "_weight"), 0)]
        self.objective_sums = torch.zeros(len(self.objectives))
        self.steps_since_log = 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        # Of a data set's column each length would be read from disk by itself: 40 s for 150,000 rows
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = list(sampler.lengths)
        return sampler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # The library has one learning rate for all: each of its groups, with weight decay and without, is parted
        if self.optimizer is None:
            optimizer = super().create_optimizer(*args, **kwargs)
            rates, model = json.loads(self.args.learning_rates), self.model.base_model
            rate_of = {
                weight: rate for name, rate in rates.items() for weight in getattr(model, STREAMS[name]).parameters()
            }
            parted: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                by_rate: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
                for weight in group["params"]:
                    by_rate[rate_of.get(weight, group["lr"])].append(weight)
                parted += [{**group, "params": weights, "lr": rate} for rate, weights in by_rate.items()] or [group]
            optimizer.param_groups = parted
        return self.optimizer

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        # The library saves its arguments as a pickle, with this machine's paths in it: it stays here
        path = Path(str(self.args.output_dir)) / ".gitignore"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if self.is_world_process_zero() and TRAINING_ARGS_NAME not in lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*lines, TRAINING_ARGS_NAME, ""]), encoding="utf-8")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        self.steps_since_log += 1
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        # The library counts the labels of all accumulated batches and ranks, so that each token weighs the same
        # however they are split. Masked tokens and pairs are counted likewise.
        if self.has_objectives:
            masked = [batch["masked_labels"] for batch in batch_samples if "masked_labels" in batch]
            num_masked = sum(int((labels != IGNORE_INDEX).sum()) for labels in masked)
            num_pairs = sum(len(batch.get("paired_input_ids", ())) for batch in batch_samples)
            counts = torch.tensor([num_masked, num_pairs], device=self.args.device)
            if self.args.world_size > 1 and self.args.average_tokens_across_devices:
                counts = self.accelerator.gather(counts[None]).sum(dim=0)
            for batch in batch_samples:
                batch["num_masked_in_batch"], batch["num_pairs_in_batch"] = counts.clamp(min=1)
        return super()._get_num_items_in_batch(batch_samples, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # The library keeps the sum alone
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.has_objectives:
            parts = [outputs.get(name) for name in self.objectives]
            zero = torch.zeros((), device=loss.device)
            losses = [zero if part is None else part.detach().float() for part in parts]
            self.objective_sums = self.objective_sums.to(loss.device) + torch.stack(losses)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.has_objectives:
            # Each rank has its part of what all ranks' rows have in one batch
            sums = self.accelerator.gather(self.objective_sums.to(self.args.device)[None]).sum(dim=0)
            means = (sums / max(1, self.steps_since_log)).tolist()
            logs |= {name: round(mean, 4) for name, mean in zip(self.objectives, means, strict=True)}
            self.objective_sums = torch.zeros(len(self.objectives))
        if "loss" in logs:
            self.steps_since_log = 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        # `predict_with_generate` is for encoder-decoders only, and `compute_metrics` would hold all logits
        figures = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.metric_rows is not None:
            measured = {
                f"{metric_key_prefix}_{name}": value
                for name, value in self.measure(self.metric_rows).items()
                if isinstance(value, int | float)
            }
            self.log(measured)
            figures |= measured
        return figures

    def measure(self, rows: Dataset) -> dict[str, Any]:
        """The figures of the task, the same on all ranks."""
        was_training = self.model.training
        batch_size = self.args.per_device_eval_batch_size
        if task_of(self.task).auto_class is WRITER:
            own = range(self.args.process_index, len(rows), self.args.world_size)
            options = {"max_new_tokens": self.args.max_new_tokens}
            results = generate_answers(self.model, self.processing_class, rows.select(own), batch_size, **options)
            if self.args.world_size > 1:
                results = gather_object(results)
            figures = score_answers(results, self.task)
        else:
            figures, _ = evaluate(self.model, self.processing_class, rows, self.task, batch_size)
        self.model.train(was_training)
        return figures


def bad_rows_of(data_args: DataArguments, training_args: DuoStreamTrainingArguments) -> BadRows | None:
    """
    Where rows go that can't be read, if `on_bad_rows` is `skip`.

    Raises:
        ValueError: `on_bad_rows` is something else.
    """
    if data_args.on_bad_rows not in ("raise", "skip"):
        raise ValueError(f"`on_bad_rows` is {data_args.on_bad_rows!r}; there are 'raise' and 'skip'")
    return BadRows(Path(str(training_args.output_dir)) / "bad_rows.jsonl") if data_args.on_bad_rows == "skip" else None


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
    """
    collator = DuoStreamDataCollator(processor) if collator is None else collator
    if bad_rows is not None:
        # Before training, so that batches, epochs and resuming are those of a data set without them
        train_rows = bad_rows.leave_out(train_rows, lambda row: collator([row]))
    trainer = DuoStreamTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=callbacks,
        **kwargs,
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
    if bad_rows is not None:
        bad_rows.report()
    return trainer
