"""What makes long runs safe: a `Trainer` that may be interrupted at any time, and whose losses may be no numbers."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import IterableDataset
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from .saving import UNFINISHED, publish, publish_files

logger = logging.get_logger(__name__)


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
    """
    Saves and stops at the end of the step in which one of the ranks is sent SIGTERM, as a preempted machine is. (The
    library's `enable_jit_checkpoint` waits three seconds first, and saves on the rank alone that got the signal.)
    """

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


class TrainingTime(TrainerCallback, ExportableState):
    """
    Counts how long training takes. Checkpoints keep it, and a run that is resumed counts on; `Trainer` would begin at
    zero. It has

    - `seconds`: How long the steps took that made the weights, without those that an interruption undid.
    - `since_step`: Of those after this one. Above zero where the checkpoint to resume from tells no time.
    - `resumed_at`: The step that training was last resumed from; zero, if it wasn't.
    """

    def __init__(self) -> None:
        self.seconds, self.since_step, self.resumed_at = 0.0, 0, 0
        self.counted_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name, self.resumed_at = type(self).__name__, state.global_step
        # Checkpoints of earlier versions have none
        saved = state.stateful_callbacks.get(name) if self.resumed_at else None
        before: dict[str, Any] = (
            {"seconds": 0.0, "since_step": self.resumed_at} if saved is None else saved["attributes"]
        )
        self.seconds, self.since_step, self.counted_at = before["seconds"], before["since_step"], time.monotonic()
        # The library replaces it as it saves, and only if it is there
        state.stateful_callbacks[name] = self.state()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.count()

    def count(self) -> None:
        now = time.monotonic()
        self.seconds, self.counted_at = self.seconds + now - self.counted_at, now

    def state(self) -> dict[str, Any]:
        self.count()
        return {"args": {}, "attributes": {"seconds": self.seconds, "since_step": self.since_step}}


class LongRunTrainer(Trainer):
    """
    `Trainer` whose run, when it is interrupted and resumed, ends with the weights of one that was not; whose
    checkpoints are complete or absent; and which stops at a loss that is no number, or leaves its step out.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(TrainingTime())
        is_stream = isinstance(self.train_dataset, IterableDataset)
        self.data_collator: Any = ReproducibleCollator(self.data_collator, self.args.seed, is_stream)
        self.epoch_sampler: EpochSampler | None = None
        self.is_saving = self.has_bad_loss = False
        self.rows_at_hand: torch.Tensor | None = None
        self.bad_losses = Path(str(self.args.output_dir)) / "bad_losses.jsonl"

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        # Of a data set's column each length would be read from disk by itself: 40 s for 150,000 rows
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = list(sampler.lengths)
        if isinstance(sampler, RandomSampler | LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = self.epoch_sampler = EpochSampler(sampler, seed)
        return sampler

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        started = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self._find_best_checkpoint(Path(resume_from_checkpoint))
        if self.state.global_step > max_steps:
            # The library would end without a step, and keep weights of a longer run for those of this one
            raise ValueError(
                f"The checkpoint to resume from is of step {self.state.global_step}, beyond the {max_steps} of this "
                "run: take more (`max_steps`, `num_train_epochs`), or another `output_dir`"
            )
        return started

    def _find_best_checkpoint(self, checkpoint: Path) -> None:
        """
        Names the best checkpoint by where it lies now, beside the one to resume from. The library goes by the path as
        it was once given: where that leads nowhere, or is spelled in another way, `save_total_limit` would delete it.
        """
        path = checkpoint / TRAINER_STATE_NAME
        best = json.loads(path.read_text(encoding="utf-8")).get("best_model_checkpoint") if path.is_file() else None
        if best is None:
            return
        place = checkpoint.parent / Path(best).name
        if place.is_dir():
            if self.state.best_model_checkpoint is None:
                # The library has just warned that it would be ignored
                logger.warning(f"The best checkpoint, once {best}, is found at {place}")
            self.state.best_model_checkpoint = str(place)
        elif self.state.best_model_checkpoint is None and self.args.load_best_model_at_end:
            raise ValueError(
                f"`load_best_model_at_end` needs the best checkpoint so far, which is neither {best} nor {place}: put "
                "it back, or resume with `--load_best_model_at_end false`, which keeps the last weights"
            )

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
        step = self.state.global_step
        super()._run_epoch(epoch=epoch, steps_trained_in_current_epoch=steps_trained_in_current_epoch, **kwargs)
        if self.data_collator.is_stream and self.state.global_step == step:
            # The library warns and ends as if it had trained, while other ranks wait for this one
            raise ValueError(
                f"The stream has no row to train on for rank {self.args.process_index} of {self.args.world_size}: its "
                f"files are empty, or all their rows are bad (bad_rows.jsonl in {self.args.output_dir} says why)"
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing:
            raise ValueError(f"The checkpoint to resume from lacks weights: {', '.join(sorted(missing))}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            # torch names these, and no option
            raise ValueError(
                f"{checkpoint} was saved while other weights were trained, or at other rates: resume with `freeze`, "
                f"`learning_rates` and `weight_decay` as they were ({error})"
            ) from error

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
        # Each row by itself, by the number of which a batch's loss is weighed, and masked alike each time
        changes: dict[str, Any] = {"packing": False} if getattr(collator.collator, "packing", False) else {}
        if getattr(collator.collator, "mask_seed", 0) is None:
            changes["mask_seed"] = collator.seed
        apart = replace(collator.collator, **changes) if changes else collator.collator
        self.data_collator = ReproducibleCollator(apart, collator.seed, is_stream=False)
        # The library leaves rows out of evaluation, too, or all of them where they are fewer than a batch
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Each rank's running statistics have read its own last batch, and those of the first are what is saved
            broadcast(list(self.model.buffers()))
        with torch.random.fork_rng(devices=[]):
            # At the end of an epoch it comes after the checkpoint, and not again when that is resumed
            return super().evaluate(*args, **kwargs)
