"""The `Trainer` of all commands: what it reports beside the loss, saves, pads and refuses."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import is_liger_kernel_available, logging

from ..modeling import (
    DuoStreamForConditionalGeneration,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
)
from ..modeling.liger_duostream import register_liger_kernel
from ..processing.packing_duostream import IGNORE_INDEX
from .arguments import DataArguments
from .card import write_card, write_run
from .long_runs import LongRunTrainer
from .measuring import check_questions, check_rows, evaluate, generate_answers, score_answers
from .tasks import task_of

logger = logging.get_logger(__name__)


# What is not uploaded: a pickle, paths and place of this machine (`runs` holds TensorBoard's), and rows of the user's
STAYS_HERE = (TRAINING_ARGS_NAME, TRAINER_STATE_NAME, "emissions.csv", "runs/", "bad_rows.jsonl", "bad_losses.jsonl")
SMOOTHED = (DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification)
OBJECTIVES = ("lm_loss", "mlm_loss", "itc_loss", "itm_loss")


class DuoStreamTrainer(LongRunTrainer):
    """
    `Trainer` that reports each pretraining objective, and at each evaluation the figures of the task.

    Args:
        task (`str`, *optional*): Measured at each evaluation, if there are `metric_rows`.
        metric_rows (`Dataset`, *optional*): Rows with all of their references. Answers are generated from prompts
            without them, shared out over the ranks.
        data (`DataArguments`, *optional*): Where the rows came from, for the card.
        began_with (`str`, *optional*): Where weights came from, for the card, too. By default the config tells.
    """

    def __init__(
        self,
        *args: Any,
        task: str = "chat",
        metric_rows: Dataset | None = None,
        data: DataArguments | None = None,
        began_with: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        # Else one rank would read a stream for all, join batches of different lengths, and deal out pictures as if
        # there were one in each row
        self.accelerator.dataloader_config.dispatch_batches = False
        if self.args.use_liger_kernel and is_liger_kernel_available():
            register_liger_kernel()
        if self.args.cache_vision and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # A rank whose rows have no pictures gathers the vision stream's weights, for which the others would wait
            raise ValueError("`cache_vision` goes without FSDP and DeepSpeed: ranks that share weights read pictures")
        # None: of classes that the model has yet to see
        knows_classes = self.model.config.problem_type in (None, "single_label_classification")
        if self.args.label_smoothing_factor and not (isinstance(self.model, SMOOTHED) and knows_classes):
            # The library would take the labels away, and with them these losses
            names = " and ".join(each.__name__ for each in SMOOTHED)
            raise ValueError(
                f"`label_smoothing_factor` is for {names}, with one class a row: other losses know no smoothing"
            )
        self.has_objectives = isinstance(self.model, DuoStreamForPreTraining)
        weights = self.model.config.to_dict() if self.has_objectives else {}
        self.objectives = [name for name in OBJECTIVES if weights.get(name.replace("_loss", "_weight"))]
        if self.has_objectives:
            # Batches without masked tokens have labels, too
            self.label_names: list[str] = ["labels"]
            # What no objective trains has no gradient, for which ranks would wait
            head = self.model.image_text_head
            head.requires_grad_(self.model.config.itc_weight > 0)
            head.matching.requires_grad_(self.model.config.itm_weight > 0)
            sizes = ["per_device_train_batch_size"]
            sizes += [] if self.eval_dataset is None else ["per_device_eval_batch_size"]
            for name in sizes:
                if self.model.config.itm_weight and getattr(self.args, name) < 2:
                    raise ValueError(
                        f"`itm_weight` goes with a `{name}` of 2 or more: one pair alone has no other text or picture "
                        "to be told from"
                    )
        self.task, self.metric_rows, self.data, self.began_with = task, metric_rows, data, began_with
        self.answer_room: int | None = None
        if metric_rows is not None:
            # Not after all the steps before the first evaluation
            check_rows(metric_rows, task)
            if task_of(task).is_generative:
                batch_size = self.args.per_device_eval_batch_size
                self.answer_room = check_questions(self.model, self.processing_class, metric_rows, batch_size)
        elif self.compute_metrics is None:
            self.check_is_measured(["loss", *self.objectives])
        self.objective_sums = torch.zeros(len(self.objectives))
        self.steps_since_log = 0
        self.num_items: torch.Tensor | None = None
        self.num_labels: torch.Tensor | None = None
        # Of each part of the loss: what it is summed to, and over how many labels
        self.eval_sums: dict[str, tuple[float, float]] | None = None
        self.eval_losses: dict[str, torch.Tensor | None] = {}

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # With activation checkpointing the library looks for no weights without a gradient, for the sake of reentrant
        # checkpoints. No gradient reaches the vision stream from a rank's batch without pictures, though, and the
        # ranks would take each other's for it.
        is_reentrant = (self.args.activation_checkpointing_kwargs or {}).get("use_reentrant")
        if self.args.ddp_find_unused_parameters is None and not is_reentrant:
            self.args.ddp_find_unused_parameters = True
        return super()._build_accelerator_args(**kwargs)

    def check_is_measured(self, figures: list[str]) -> None:
        """Raises `ValueError` if training looks for the best model by a figure that is none of these."""
        # Of several data sets each has figures by its own name
        if self.args.eval_strategy == "no" or isinstance(self.eval_dataset, dict):
            return
        wanted = self.args.metric_for_best_model
        if wanted is not None and wanted.removeprefix("eval_") not in figures:
            hint = "" if self.metric_rows is not None else "; with `--metric_rows`, those of the task, too"
            raise ValueError(
                f"`metric_for_best_model` is {wanted!r}, which is not measured; there are "
                f"{', '.join(map(repr, sorted(figures)))}{hint}"
            )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # Rows to evaluate on may have no lengths, which the library would then look for in `input_ids`
        is_grouped = self.args.train_sampling_strategy == "group_by_length"
        columns = getattr(eval_dataset, "column_names", ())
        if is_grouped and isinstance(eval_dataset, Dataset | list) and "length" not in columns:
            return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
        return super()._get_eval_sampler(eval_dataset)

    def weight_rates(self) -> dict[torch.nn.Parameter, float]:
        """Learning rates of weights that have one of their own."""
        rates = json.loads(self.args.learning_rates)
        return {weight: rate for name, rate in rates.items() for weight in self.model.stream_parameters(name)}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # The library has one learning rate for all: each of its groups, with weight decay and without, is parted
        if self.optimizer is None:
            optimizer = super().create_optimizer(*args, **kwargs)
            rate_of = self.weight_rates()
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

    def check_has_learnt(self) -> None:
        """Raises `ValueError` if no step of this run had a label."""
        # Of masked tokens few rows may have none by chance
        if self.num_labels is None or self.has_objectives or self.task == "masked":
            return
        if not self.accelerator.gather(self.num_labels.to(self.args.device).reshape(-1)).any():
            raise ValueError(
                "Nothing was learnt: none of the rows that were trained on has a label. `max_length` may cut off all "
                "answers, of which the warnings tell"
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        self.steps_since_log += 1
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if num_items is not None:
            # On its device, for which nothing waits
            self.num_labels = num_items if self.num_labels is None else self.num_labels + num_items
        return batches, num_items

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
            self.num_masked, self.num_pairs = counts.clamp(min=1)
            for batch in batch_samples:
                batch["num_masked_in_batch"], batch["num_pairs_in_batch"] = self.num_masked, self.num_pairs
        self.num_items = super()._get_num_items_in_batch(batch_samples, *args, **kwargs)
        return self.num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # The library keeps the sum alone
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.has_objectives and not model.training:
            self.eval_losses = {name: outputs.get(name) for name in self.objectives}
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

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        # The library takes the mean of batches, whatever number of labels is in each, leaves out those whose loss is
        # no number, and of several ranks' last ones keeps some of the losses alone: here all labels weigh the same.
        labels = inputs.get("labels")
        if labels is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        num_rows = self._leave_out_repeated_rows(labels)
        if "masked_labels" in inputs:
            self._leave_out_repeated_rows(inputs["masked_labels"])
        are_scores = labels.is_floating_point()
        loss, logits, own_labels = super().prediction_step(
            model, inputs, prediction_loss_only and not are_scores, *args, **kwargs
        )
        if self.has_objectives:
            sums = self._sums_of_objectives(inputs)
        elif are_scores:
            # There is no score that is left out, as -100 is of classes
            scores = logits[0] if isinstance(logits, tuple) else logits
            sums = {"loss": (num_rows * self._loss_of_scores(scores[:num_rows], own_labels[:num_rows]), num_rows)}
        else:
            weight = num_rows if self.num_items is None else torch.as_tensor(self.num_items).sum()
            sums = {"loss": (weight * loss, weight)}
        self.eval_sums = self.eval_sums or {}
        for name, (own_sum, own_weight) in sums.items():
            total, total_weight = self.eval_sums.get(name, (0.0, 0.0))
            # Without a label there is no mean
            self.eval_sums[name] = total + (float(own_sum) if own_weight else 0.0), total_weight + float(own_weight)
        return (loss, None, None) if prediction_loss_only else (loss, logits, own_labels)

    def _sums_of_objectives(self, inputs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """
        What each objective's loss is summed to in a batch, and over how many labels, or pairs. Pairs are compared with
        those of their batch, among which rows may be that fill up a last one.
        """
        num_pairs = len(inputs.get("paired_input_ids", ())), self.num_pairs
        labels, masked_labels = inputs["labels"][:, 1:], inputs.get("masked_labels", torch.empty(0))
        # How many there are, and what the model has divided by: all ranks' where these average
        counts = {
            "lm_loss": ((labels != IGNORE_INDEX).sum(), self.num_items),
            "mlm_loss": ((masked_labels != IGNORE_INDEX).sum(), self.num_masked),
            "itc_loss": num_pairs,
            "itm_loss": num_pairs,
        }
        means = self.eval_losses.items()
        return {name: (mean * counts[name][1], counts[name][0]) for name, mean in means if mean is not None}

    def _gather_losses(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Each loss, over the labels of all ranks. Raises `ValueError` if none of them has any."""
        names = self.objectives if self.has_objectives else ["loss"]
        own = torch.tensor([[sums.get(name, (0.0, 0.0)) for name in names]], device=self.args.device)
        totals = self.accelerator.gather(own).sum(dim=0)  # (number of losses, 2)
        losses = {name: total / weight for name, (total, weight) in zip(names, totals.tolist(), strict=True) if weight}
        if not losses:
            raise ValueError("There is no label to measure the loss by: `max_length` may cut off all answers")
        return losses

    def _loss_of_scores(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model = self.accelerator.unwrap_model(self.model)
        return model.loss_function(labels=labels, pooled_logits=logits, config=model.config)

    def _leave_out_repeated_rows(self, labels: torch.Tensor) -> int:
        """Takes the labels from rows that fill up the ranks' last batches; returns how many there are of others."""
        state = self.accelerator.gradient_state
        size = len(labels)
        # Of packed rows it can't be told which are whose
        if not state.end_of_dataloader or state.remainder <= 0 or size != self.args.eval_batch_size:
            return size
        num_rows = min(max(0, state.remainder - self.args.process_index * size), size)
        if not labels.is_floating_point():
            labels[num_rows:] = IGNORE_INDEX
        return num_rows

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.eval_sums = None
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.eval_sums is not None and description != "Prediction":
            losses = self._gather_losses(self.eval_sums)
            if "loss" not in losses:
                output.metrics.update({f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()})
                weights = self.model.config.to_dict()
                losses["loss"] = sum(weights[name.replace("_loss", "_weight")] * loss for name, loss in losses.items())
            output.metrics[f"{metric_key_prefix}_loss"] = losses["loss"]
        # `predict_with_generate` is for encoder-decoders only, and `compute_metrics` would hold all logits. What is
        # added here is what callbacks see, such as those that stop early, and what finds the best checkpoint.
        if self.metric_rows is not None and description != "Prediction":
            figures = self.measure(self.metric_rows)
            named = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
            # That of the rows to evaluate on, of which there may be more, is there already
            named.pop(f"{metric_key_prefix}_loss", None)
            output.metrics.update({name: value for name, value in named.items() if isinstance(value, int | float)})
            if self.is_in_train:
                self.check_is_measured([name.removeprefix(f"{metric_key_prefix}_") for name in output.metrics])
        return output

    def measure(self, rows: Dataset) -> dict[str, Any]:
        """The figures of the task, the same on all ranks."""
        was_training = self.model.training
        batch_size = self.args.per_device_eval_batch_size
        if task_of(self.task).is_generative:
            own = list(range(self.args.process_index, len(rows), self.args.world_size))
            # As many on each rank: those that share weights read each batch together
            num_missing = -(-len(rows) // self.args.world_size) - len(own)
            asked = rows.select(own + [0] * num_missing)
            options: dict[str, Any] = {"max_new_tokens": self.args.max_new_tokens}
            if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.args.world_size > 1:
                if self.is_fsdp_enabled:
                    # Of FSDP2 by `accelerate` the library's `generate` doesn't know
                    options["synced_gpus"] = True
                if self.answer_room is not None and self.answer_room < self.args.max_new_tokens:
                    # A rank whose answers are ended reads on until the others' are, as far as theirs may go
                    options["max_new_tokens"] = self.answer_room
                    logger.warning_once(
                        f"`max_new_tokens` is {self.args.max_new_tokens}, but the longest question of `metric_rows` "
                        f"leaves room for {self.answer_room}: on ranks that share weights all answers end there"
                    )
            results = generate_answers(self.model, self.processing_class, asked, batch_size, **options)[: len(own)]
            if self.args.world_size > 1:
                results = gather_object(results)
            figures = score_answers(results, self.task)
        else:
            max_length = getattr(self.data_collator.collator, "max_length", None)
            figures, _ = evaluate(
                self.model, self.processing_class, rows, self.task, batch_size, max_length=max_length
            )
        self.model.train(was_training)
        return figures
