"""What `pretrain` and `finetune` have in common: `Trainer`, what it reports beside the loss, and where it starts."""

import json
import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ..modeling import (
    DuoStreamForConditionalGeneration,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
)
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
from .card import write_card, write_run
from .checkpoints import UNFINISHED, check_files, publish, publish_files
from .data import Rows
from .evaluate import evaluate, generate_answers, score_answers
from .tasks import WRITER, task_of

logger = logging.get_logger(__name__)

# What is not uploaded: a pickle, paths and place of this machine (`runs` holds TensorBoard's), and rows of the user's
STAYS_HERE = (TRAINING_ARGS_NAME, TRAINER_STATE_NAME, "emissions.csv", "runs/", "bad_rows.jsonl", "bad_losses.jsonl")
SMOOTHED = (DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification)
OBJECTIVES = ("lm_loss", "mlm_loss", "itc_loss", "itm_loss")


def collator_of(args: DataArguments, processor: DuoStreamProcessor, model: PreTrainedModel) -> DuoStreamDataCollator:
    """Makes the batches of a task."""
    if args.task == "classification":
        return DuoStreamClassificationCollator(processor, args.max_length, num_labels=model.config.num_labels)
    collators = {"retrieval": DuoStreamRetrievalCollator, "masked": DuoStreamMaskedLMCollator}
    return collators.get(args.task, DuoStreamDataCollator)(processor, args.max_length)


class ReproducibleCollator:
    """
    Makes batches in which what is random depends on the seed and the rows alone, and which carry their rows' numbers.

    The library's position in the data is that of batches, but the next one has been drawn when a checkpoint is saved.

    Args:
        collator: Makes the batches.
        seed (`int`): Of what is random.
        is_stream (`bool`): Of rows that come again in the same order: batches are counted, so that each time something
            else is drawn. Resuming makes the batches of a stream again, which keeps the count. Of other rows the epoch
            tells one time from another.
    """

    def __init__(self, collator: Any, seed: int, is_stream: bool):
        self.collator, self.seed, self.is_stream = collator, seed, is_stream
        self.num_to_skip = self.num_made = self.epoch = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.num_made += 1
        if self.num_made <= self.num_to_skip:
            return {}
        numbers = [row.get("row", -1) for row in rows]
        if -1 in numbers:
            return self.collator(rows)
        with torch.random.fork_rng(devices=[]):
            # Python's hash of numbers is the same in each process
            seed = hash((self.seed, self.num_made if self.is_stream else self.epoch, *numbers))
            torch.default_generator.manual_seed(seed % 2**63)
            return {**self.collator(rows), "row_numbers": torch.tensor(numbers)}


class EpochSampler(Sampler):
    """Rows in an order that depends on the seed and the epoch alone, wherever training began."""

    def __init__(self, sampler: RandomSampler | LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class SaveWhenTerminated(TrainerCallback):
    """Saves and stops at the end of the step in which one of the ranks is sent SIGTERM, as a preempted machine is."""

    def __init__(self, accelerator: Any):
        self.accelerator, self.is_terminated = accelerator, False

    def __enter__(self) -> "SaveWhenTerminated":
        self.previous = signal.signal(signal.SIGTERM, lambda *_: self.accelerator.set_trigger())
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.accelerator.check_trigger():
            self.is_terminated = control.should_save = control.should_training_stop = True


class DuoStreamTrainer(Trainer):
    """
    `Trainer` that reports each pretraining objective, and at each evaluation the figures of the task. A run that is
    interrupted and resumed ends with the weights of one that was not, and a checkpoint is complete or absent.

    Args:
        task (`str`, *optional*): Measured at each evaluation, if there are `metric_rows`.
        metric_rows (`Dataset`, *optional*): Rows with all of their references. Answers are generated from prompts
            without them, shared out over the ranks.
        data (`DataArguments`, *optional*): Where the rows came from, for the card.
    """

    def __init__(
        self,
        *args: Any,
        task: str = "chat",
        metric_rows: Dataset | None = None,
        data: DataArguments | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        # Of a stream one rank would read all batches, and deal out pictures as if there were one in each row
        self.accelerator.dataloader_config.dispatch_batches = False
        # FSDP looks for each of these layers, and RegNet names one that not all of its kinds have
        kinds = {type(module).__name__ for module in self.model.modules()}
        self.model._no_split_modules = set(self.model._no_split_modules or ()) & kinds
        if self.args.label_smoothing_factor and not isinstance(self.model, SMOOTHED):
            # The library would take the labels away, and with them these losses
            names = " and ".join(each.__name__ for each in SMOOTHED)
            raise ValueError(f"`label_smoothing_factor` is for {names}: the losses of others know no smoothing")
        is_stream = isinstance(self.train_dataset, IterableDataset)
        self.data_collator: Any = ReproducibleCollator(self.data_collator, self.args.seed, is_stream)
        self.epoch_sampler: EpochSampler | None = None
        self.is_saving = self.has_bad_loss = False
        self.rows_at_hand: torch.Tensor | None = None
        self.bad_losses = Path(str(self.args.output_dir)) / "bad_losses.jsonl"
        self.has_objectives = isinstance(self.model, DuoStreamForPreTraining)
        if self.has_objectives:
            # Batches without masked tokens have labels, too
            self.label_names: list[str] = ["labels"]
            # What no objective trains has no gradient, for which ranks would wait
            head = self.model.image_text_head
            head.requires_grad_(self.model.config.itc_weight > 0)
            head.matching.requires_grad_(self.model.config.itm_weight > 0)
        self.task, self.metric_rows, self.data = task, metric_rows, data
        config = self.model.config
        self.objectives = [name for name in OBJECTIVES if getattr(config, name.replace("_loss", "_weight"), 0)]
        self.objective_sums = torch.zeros(len(self.objectives))
        self.steps_since_log = 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        # Of a data set's column each length would be read from disk by itself: 40 s for 150,000 rows
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = list(sampler.lengths)
        if isinstance(sampler, RandomSampler | LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = self.epoch_sampler = EpochSampler(sampler, seed)
        return sampler

    def _run_epoch(self, *, epoch: int, steps_trained_in_current_epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last checkpoint: the library would take one step more
            self.control.should_training_stop = True
            return
        if self.epoch_sampler is not None:
            # The library's `set_epoch` does not reach it on several ranks, or where batches are skipped
            self.epoch_sampler.epoch = epoch
        if not self.args.dataloader_persistent_workers:
            # Workers that stay would never hear of it, and those of a resumed run would
            self.data_collator.epoch = epoch
        if self.data_collator.is_stream and not self.args.dataloader_num_workers:
            # The library makes the batches that it skips, in which pictures would be opened. Of several processes none
            # would know which of its batches are skipped.
            self.data_collator.num_to_skip = steps_trained_in_current_epoch
        super()._run_epoch(epoch=epoch, steps_trained_in_current_epoch=steps_trained_in_current_epoch, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing:
            raise ValueError(f"The checkpoint to resume from lacks weights: {', '.join(sorted(missing))}")

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.is_saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The library writes a checkpoint where it stays, and of one that was half written when the process was killed
        # it knows by its number alone that it is the newest
        run_dir = Path(self._get_output_dir(trial))
        place = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = run_dir / UNFINISHED / place.name
        self.clear_unfinished(run_dir)
        self.is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # What the library says of a full disk may be a file's position
            free = shutil.disk_usage(run_dir).free
            shutil.rmtree(written.parent, ignore_errors=True)
            raise OSError(
                f"{place} can't be saved, with {free:,} bytes free on its disk: {error}. Earlier checkpoints are as "
                "they were"
            ) from error
        finally:
            self.is_saving = False
        best_checkpoint = self.state.best_model_checkpoint
        if best_checkpoint is not None and Path(best_checkpoint) == written:
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(written, place)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), limit, best_model_checkpoint=best, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(str(self.args.output_dir))
        written = folder / UNFINISHED / "model"
        self.clear_unfinished(folder)
        super().save_model(str(written), _internal_call)
        # Uploading saves once more, and has published it
        if self.args.should_save and written.exists():
            publish_files(written, folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle, with this machine's paths in it, that nothing reads
            Path(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def clear_unfinished(self, run_dir: Path) -> None:
        """Deletes what a process that was killed while it saved has left."""
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.rows_at_hand = inputs.pop("row_numbers", None)
        return super()._prepare_inputs(inputs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        is_skipping = self.args.on_nan_loss == "skip"
        # Running statistics have read the batch, too
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if is_skipping else []
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            rows = [] if self.rows_at_hand is None else self.rows_at_hand.tolist()
            if not is_skipping:
                raise ValueError(
                    f"Step {step}: the loss is {loss.item()} on rows {rows}. `--on_nan_loss skip` leaves such steps "
                    "out"
                )
            logger.warning(f"Step {step} is left out: the loss is {loss.item()} on rows {rows}")
            with self.bad_losses.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rows": rows, "loss": str(loss.item())}) + "\n")
            self.has_bad_loss = True
            for buffer, value in before:
                buffer.copy_(value)
        if is_skipping and self.accelerator.sync_gradients:
            is_bad = torch.tensor(float(self.has_bad_loss), device=self.args.device)
            self.has_bad_loss = False
            if self.accelerator.reduce(is_bad) > 0 and self.accelerator.scaler is None:
                # Without gradients an optimizer changes nothing, be it by its momentum. A scaler of losses in half
                # precision leaves such steps out by itself, and wants to see the gradients.
                model.zero_grad()
        return loss

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # Its batches don't count among those of training, which a resumed run would not have made again
        collator = self.data_collator
        self.data_collator = ReproducibleCollator(collator.collator, collator.seed, is_stream=False)
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # Rows to evaluate on may have no lengths, which the library would then look for in `input_ids`
        is_grouped = self.args.train_sampling_strategy == "group_by_length"
        if is_grouped and isinstance(eval_dataset, Dataset) and "length" not in eval_dataset.column_names:
            return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
        return super()._get_eval_sampler(eval_dataset)

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
        path = Path(str(self.args.output_dir)) / ".gitignore"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if self.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*dict.fromkeys([*lines, *STAYS_HERE]), ""]), encoding="utf-8")

    def create_model_card(self, license: str | None = None, language: str | None = None, **kwargs: Any) -> None:
        # The library's card says nothing of the data, the curve, or what DuoStream is. Uploading makes it.
        if self.is_world_process_zero():
            write_run(self, self.data)
            folder = Path(str(self.args.output_dir))
            write_card(folder, repo_id=self.hub_model_id, license=license, language=language)

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            # At the end of an epoch it comes after the checkpoint, and not again when that is resumed
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # `predict_with_generate` is for encoder-decoders only, and `compute_metrics` would hold all logits. What is
        # added here is what callbacks see, such as those that stop early, and what finds the best checkpoint.
        if self.metric_rows is not None and description != "Prediction":
            figures = self.measure(self.metric_rows)
            output.metrics.update(
                {
                    f"{metric_key_prefix}_{name}": value
                    for name, value in figures.items()
                    if isinstance(value, int | float)
                }
            )
        return output

    def measure(self, rows: Dataset) -> dict[str, Any]:
        """The figures of the task, the same on all ranks."""
        was_training = self.model.training
        batch_size = self.args.per_device_eval_batch_size
        if task_of(self.task).auto_class is WRITER:
            own = list(range(self.args.process_index, len(rows), self.args.world_size))
            # As many on each rank: those that share weights read each batch together
            num_missing = -(-len(rows) // self.args.world_size) - len(own)
            asked = rows.select(own + [0] * num_missing)
            options: dict[str, Any] = {"max_new_tokens": self.args.max_new_tokens}
            if self.is_fsdp_enabled and self.args.world_size > 1:
                # Of FSDP2 by `accelerate` the library's `generate` doesn't know
                options["synced_gpus"] = True
            results = generate_answers(self.model, self.processing_class, asked, batch_size, **options)[: len(own)]
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

    Raises:
        SystemExit: SIGTERM came, with the exit code that says so (143). A checkpoint is saved.
        ValueError: A row is broken, or the loss is no number, or so is a file of the checkpoint to resume from.
        OSError: A checkpoint can't be saved.
    """
    collator = DuoStreamDataCollator(processor) if collator is None else collator
    if bad_rows is not None:
        # Before training, so that batches, epochs and resuming are those of a data set without them
        train_rows = bad_rows.leave_out(train_rows, lambda row: collator([row]))
    if isinstance(train_rows, IterableDataset):
        # Where one ends, the library begins anew within what it counts as one epoch, and resuming can't tell where
        train_rows = train_rows.repeat(None)
    if isinstance(eval_rows, IterableDataset) and training_args.world_size > 1:
        # Ranks whose parts of a stream differ in length would wait for each other
        eval_rows = Dataset.from_list(list(eval_rows))
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
    # Another rank may not have made it yet
    Path(str(training_args.output_dir)).mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(training_args.output_dir) if training_args.resume else None
    if checkpoint is not None:
        check_files(Path(checkpoint), has_states=True)
    elif trainer.is_world_process_zero():
        trainer.bad_losses.unlink(missing_ok=True)
    with SaveWhenTerminated(trainer.accelerator) as termination:
        trainer.add_callback(termination)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if termination.is_terminated:
        logger.warning(f"Terminated after step {trainer.state.global_step}, which is saved: `--resume true` goes on")
        sys.exit(128 + signal.SIGTERM)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if eval_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.create_model_card()
    if bad_rows is not None:
        bad_rows.report()
    if trainer.bad_losses.exists():
        # A step that came again after an interruption is written down again
        steps = {json.loads(line)["step"] for line in trainer.bad_losses.read_text(encoding="utf-8").splitlines()}
        logger.warning(f"{len(steps)} steps were left out for their loss; {trainer.bad_losses} says which")
    return trainer
