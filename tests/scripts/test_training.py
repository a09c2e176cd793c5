import json
import logging
import math
import os
import re
import resource
import signal

import datasets
import pytest
import ranks
import torch
from datasets import Dataset
from packaging.version import Version
from ranks import TORCHRUN, launch_forks
from safetensors.torch import load_file, save_file
from tiny_models import small_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    EarlyStoppingCallback,
    TrainerCallback,
    set_seed,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import (
    DuoStreamConfig,
    DuoStreamDataCollator,
    DuoStreamForConditionalGeneration,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamMaskedLMCollator,
    DuoStreamPreTrainingCollator,
    DuoStreamProcessor,
    train_tokenizer,
)
from duostream.scripts import measuring
from duostream.scripts.arguments import DuoStreamTrainingArguments
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.data import number_rows, texts_of
from duostream.scripts.scenes import build_scenes, question_rows, to_conversations
from duostream.scripts.trainer import DuoStreamTrainer
from duostream.scripts.training import train

NUM_ROWS = 8
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
VISION = {
    "transformer": {
        "model_type": "siglip_vision_model",
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vision_use_head": False,
    },
    # With the running statistics of batch norm, which are no weights but must be kept, too
    "convolution": {
        "model_type": "resnet",
        "image_size": 16,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Conversations of different lengths about drawn scenes."""
    scenes = build_scenes("train", NUM_ROWS, image_size=32, cache_dir=str(tmp_path_factory.mktemp("scenes")))
    return number_rows(to_conversations(scenes, max_turns=2))


@pytest.fixture(scope="module")
def new_parts(rows):
    """Makes a model, always with the same weights, and its processor."""
    tokenizer = train_tokenizer(texts_of(rows), 320)

    def new_parts(vision="transformer", cls=DuoStreamForConditionalGeneration):
        set_seed(0)
        config = DuoStreamConfig(
            text_config={**LLAMA, "vocab_size": len(tokenizer)},
            vision_config=VISION[vision],
            fusion_stack_config={**LLAMA, "vocab_size": len(tokenizer)},
        )
        image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        processor = DuoStreamProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
        return cls(config), processor

    return new_parts


def options(output_dir, **kwargs):
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DuoStreamTrainingArguments(**{**defaults, **kwargs})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(a, b, **tolerance):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("vision", ["convolution", pytest.param("transformer", marks=pytest.mark.slow)])
def test_training_learns_a_few_rows(new_parts, rows, tmp_path, vision):
    trainer = train(*new_parts(vision), options(tmp_path, max_steps=40), rows)
    assert len(losses(trainer)) == 40
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


def test_training_reaches_every_part_of_the_model(new_parts, rows, tmp_path):
    model, processor = new_parts()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train(model, processor, options(tmp_path, max_steps=1), rows)
    untouched = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert not untouched


class Interruption(TrainerCallback):
    """Ends training before its time, as a power cut right after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Steps(TrainerCallback):
    """Which steps were taken."""

    def __init__(self):
        self.taken = []

    def on_step_end(self, args, state, control, **kwargs):
        self.taken.append(state.global_step)


@pytest.mark.parametrize("vision", ["convolution", pytest.param("transformer", marks=pytest.mark.slow)])
def test_an_interrupted_run_that_is_resumed_ends_where_an_uninterrupted_one_does(new_parts, rows, tmp_path, vision):
    # Three steps are in the middle of the second epoch of two
    def run(folder, callbacks=None, **kwargs):
        kwargs = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, **kwargs}
        return train(*new_parts(vision), options(tmp_path / folder, **kwargs), rows, callbacks=callbacks)

    whole = run("whole")
    cut = run("cut", callbacks=[Interruption(3)])
    assert cut.state.global_step == 3
    steps = Steps()
    resumed = run("cut", callbacks=[steps], resume=True)
    assert steps.taken == [4, 5, 6, 7]
    assert losses(resumed) == pytest.approx(losses(whole))
    assert_same_weights(resumed.model, whole.model)
    with pytest.raises(AssertionError):
        assert_same_weights(cut.model, whole.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_stream", "kwargs"),
    [
        (True, {}),
        (True, {"dataloader_num_workers": 1}),
        (False, {"train_sampling_strategy": "group_by_length"}),
        (False, {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}),
        (False, {"eval_strategy": "epoch"}),
    ],
    ids=str,
)
def test_rows_their_order_and_what_is_masked_are_those_of_an_uninterrupted_run(
    new_parts, rows, tmp_path, is_stream, kwargs
):
    # Three batches are an epoch, and the last of them is smaller; four steps are in the middle of the second
    rows = rows.add_column("length", [len(str(row["messages"])) for row in rows])
    train_rows = rows.to_iterable_dataset() if is_stream else rows

    def run(folder, callbacks=None, **more):
        model, processor = new_parts(cls=DuoStreamForMaskedLM)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        more |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "per_device_train_batch_size": 3, **kwargs}
        collator = DuoStreamMaskedLMCollator(processor, mlm_probability=0.5)
        args = options(tmp_path / folder, **more)
        return train(model, processor, args, train_rows, rows.select(range(2)), collator, callbacks=callbacks)

    whole = run("whole")
    for last in (2, 4):
        run("cut", callbacks=[Interruption(last)], resume=True)
    resumed = run("cut", resume=True)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed.model, whole.model, rtol=0, atol=0)


def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_step_more(new_parts, rows, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    whole = train(*new_parts(), options(tmp_path, **saving), rows)
    steps = Steps()
    again = train(*new_parts(), options(tmp_path, resume=True, **saving), rows, callbacks=[steps])
    assert steps.taken == [] and again.state.global_step == 3
    assert_same_weights(again.model, whole.model, rtol=0, atol=0)


class Signal(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_exits_and_the_same_command_goes_on(new_parts, rows, tmp_path):
    whole = train(*new_parts(), options(tmp_path / "whole", max_steps=5), rows)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        train(*new_parts(), options(tmp_path / "cut", max_steps=5, resume=True), rows, callbacks=[Signal(3)])
    assert exit.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = train(*new_parts(), options(tmp_path / "cut", max_steps=5, resume=True), rows)
    assert_same_weights(resumed.model, whole.model, rtol=0, atol=0)


class FullDisk(TrainerCallback):
    """Lets no file grow beyond so many bytes, from a step on."""

    def __init__(self, step, num_bytes):
        self.step, self.num_bytes = step, num_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.RLIM_INFINITY))


# The weights, the optimizer's state, and the config are too large
@pytest.mark.parametrize(
    "num_bytes", [100_000, *(pytest.param(size, marks=pytest.mark.slow) for size in (300_000, 1_000))]
)
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_an_error_and_those_before_it_stay(
    new_parts, rows, tmp_path, num_bytes
):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "resume": True}
    try:
        with pytest.raises(OSError, match=r"checkpoint-3 can't be saved, with .* bytes free on its disk: "):
            train(*new_parts(), options(tmp_path, **saving), rows, callbacks=[FullDisk(3, num_bytes)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "_unfinished").exists()
    steps = Steps()
    train(*new_parts(), options(tmp_path, **saving), rows, callbacks=[steps])
    assert steps.taken == [3, 4]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_broken_file_of_the_checkpoint_to_resume_from_is_named(new_parts, rows, tmp_path, name):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "resume": True}
    train(*new_parts(), options(tmp_path, **saving), rows)
    path = tmp_path / "checkpoint-2" / name
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{path} is broken, cut short or overwritten"):
        train(*new_parts(), options(tmp_path, **saving), rows)


def test_weights_that_the_checkpoint_to_resume_from_lacks_are_named(new_parts, rows, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "resume": True}
    train(*new_parts(), options(tmp_path, **saving), rows)
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if ".fusion_model." in name)
    save_file({each: weight for each, weight in weights.items() if each != name}, path)
    with pytest.raises(ValueError, match=f"lacks weights: {name}"):
        train(*new_parts(), options(tmp_path, **saving), rows)


def test_resuming_with_other_weights_to_train_names_the_options(new_parts, rows, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "resume": True}
    train(*new_parts(), options(tmp_path, **saving), rows)
    model, processor = new_parts()
    model.freeze("text")
    with pytest.raises(ValueError, match=r"checkpoint-2 was saved while other weights .*: resume with `freeze`"):
        train(model, processor, options(tmp_path, **{**saving, "max_steps": 4}), rows)


def test_a_run_without_any_label_is_told_of(new_parts, rows, tmp_path):
    model, processor = new_parts()
    collator = DuoStreamDataCollator(processor, max_length=model.config.image_seq_length + 2)
    with pytest.raises(ValueError, match=r"Nothing was learnt: .* `max_length`"):
        train(model, processor, options(tmp_path / "none"), rows, collator=collator)
    # The last epoch, which is cut short, may have none
    some = options(tmp_path / "some", max_steps=len(rows) + 1, per_device_train_batch_size=1)
    train(*new_parts(), some, rows, collator=Silent(processor))
    assert (tmp_path / "some" / "model.safetensors").is_file()


class Silent(DuoStreamDataCollator):
    """Only row 5 has something to learn."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        if 5 not in [row["row"] for row in rows]:
            batch["labels"][:] = -100
        return batch


class Poisoned(DuoStreamDataCollator):
    """A picture of row 5 is no number, which no picture in a file can be."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        if 5 in [row["row"] for row in rows]:
            batch["pixel_values"][0] = float("nan")
        return batch


def test_a_loss_that_is_no_number_stops_training_and_names_step_and_rows(new_parts, rows, tmp_path):
    model, processor = new_parts()
    args = options(tmp_path, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match=r"Step 2: the loss is nan on rows \[4, 5, 6, 7\]"):
        train(model, processor, args, rows, collator=Poisoned(processor))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


class Weights(TrainerCallback):
    """Everything the model keeps, step by step."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.kept.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_is_skipped_and_changes_nothing(new_parts, rows, tmp_path, vision, accumulation):
    model, processor = new_parts(vision)
    args = options(
        tmp_path,
        on_nan_loss="skip",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        weight_decay=0.1,
    )
    weights = Weights()
    train(model, processor, args, rows, collator=Poisoned(processor), callbacks=[weights])
    first, second, third, _ = weights.kept
    is_statistic = [name for name in first if "running_" in name or "num_batches" in name]
    for name in first:
        # Statistics have read the first half of the step
        assert torch.equal(first[name], second[name]) or (accumulation == 2 and name in is_statistic), name
        assert third[name].isfinite().all()
    assert any(not torch.equal(second[name], third[name]) for name in first)
    written = [json.loads(line) for line in (tmp_path / "bad_losses.jsonl").read_text().splitlines()]
    assert [(each["step"], each["loss"]) for each in written] == [(2, "nan"), (4, "nan")]
    assert all(5 in each["rows"] for each in written)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_nan_loss": "hide"}, "`on_nan_loss` is 'hide'; there are 'stop' and 'skip'"),
        ({"resume": True, "save_only_model": True}, "`resume` needs the optimizer's state"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "`hub_strategy` 'checkpoint' uploads the optimizer's"),
        ({"push_to_hub": True, "bf16_full_eval": True}, "`bf16_full_eval` .* so `push_to_hub` would upload it"),
        ({"resume_from_checkpoint": "a"}, "`resume_from_checkpoint` is not read: `--resume true` continues"),
    ],
)
def test_options_that_would_lose_or_give_away_a_state_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **wrong)


def test_a_run_that_had_ended_keeps_its_figures_when_it_is_resumed(new_parts, rows, tmp_path):
    for resume in (False, True):
        train(*new_parts(), options(tmp_path, save_strategy="steps", save_steps=2, resume=resume), rows)
        results = json.loads((tmp_path / "train_results.json").read_text())
        if not resume:
            first = results
    assert results == first and results["train_loss"] > 1
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert not any(entry.get("train_loss") == 0 for entry in history)


@pytest.mark.parametrize(("name", "value"), [("metric_rows", -4), ("max_new_tokens", 0)])
def test_numbers_that_are_too_small_are_refused_before_training(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected"):
        options(tmp_path, **{name: value})


def test_resuming_without_a_checkpoint_starts_from_the_beginning(new_parts, rows, tmp_path):
    steps = Steps()
    train(*new_parts(), options(tmp_path, max_steps=2, resume=True), rows, callbacks=[steps])
    assert steps.taken == [1, 2]


def test_a_run_that_is_not_resumed_does_not_leave_its_checkpoints_among_those_of_another(new_parts, rows, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(*new_parts(), options(tmp_path, **saving), rows)
    steps = Steps()
    with pytest.raises(ValueError, match=f"`output_dir` {tmp_path} has checkpoint-1, checkpoint-2 .*`--resume true`"):
        train(*new_parts(), options(tmp_path, **saving), rows, callbacks=[steps])
    assert not steps.taken


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}], ids=str)
def test_a_checkpoint_beyond_the_steps_of_the_run_that_resumes_is_refused(new_parts, rows, tmp_path, length):
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(*new_parts(), options(tmp_path, max_steps=3, **saving), rows)
    with pytest.raises(ValueError, match=r"is of step 3, beyond the 2 of this run: take more \(`max_steps`"):
        train(*new_parts(), options(tmp_path, resume=True, **saving, **length), rows)


def test_model_and_processor_are_saved_together_ready_for_use(new_parts, rows, tmp_path):
    model, processor = new_parts()
    train(model, processor, options(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), rows)
    batch = DuoStreamDataCollator(processor)([rows[0], rows[1]])
    model.eval()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
        loaded_processor = AutoProcessor.from_pretrained(folder)
        assert loaded_processor.image_seq_length == loaded.config.image_seq_length == processor.image_seq_length
        again = DuoStreamDataCollator(loaded_processor)([rows[0], rows[1]])
        assert torch.equal(again["input_ids"], batch["input_ids"])
        with torch.no_grad():
            torch.testing.assert_close(loaded(**again).logits, model(**batch).logits)


def test_two_batches_of_four_accumulated_are_one_of_eight(new_parts, rows, tmp_path):
    # Answers differ in length, so that a mean of the batches' means would not do. Plain gradient descent, because Adam
    # would hide a wrong scale, and blow up rounding errors of small gradients.
    def run(folder, **kwargs):
        kwargs = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "max_grad_norm": 0.0, **kwargs}
        return train(*new_parts(), options(tmp_path / folder, **kwargs), rows)

    whole = run("whole", per_device_train_batch_size=8)
    accumulated = run("accumulated", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert losses(accumulated) == pytest.approx(losses(whole), rel=1e-4)
    assert_same_weights(accumulated.model, whole.model, rtol=1e-4, atol=1e-5)
    start, _ = new_parts()
    with pytest.raises(AssertionError):
        assert_same_weights(start, whole.model, rtol=1e-4, atol=1e-5)


def test_held_out_rows_are_evaluated_and_the_figures_are_written(new_parts, rows, tmp_path):
    model, processor = new_parts()
    held_out = rows.select(range(2))
    trainer = train(model, processor, options(tmp_path, max_steps=2), rows, held_out)
    written = json.loads((tmp_path / "eval_results.json").read_text())
    model.eval()
    with torch.no_grad():
        expected = model(**DuoStreamDataCollator(processor)(list(held_out))).loss
    assert written["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert trainer.state.log_history[-1]["eval_loss"] == written["eval_loss"]
    assert "train_loss" in json.loads((tmp_path / "train_results.json").read_text())


def evaluated(parts, tmp_path, rows, collator=None, **kwargs):
    model, processor = parts
    named = [name for name in kwargs if name.startswith(("per_device", "dataloader"))]
    args = options(tmp_path, **{name: kwargs.pop(name) for name in named})
    trainer = DuoStreamTrainer(
        model=model,
        args=args,
        data_collator=collator or DuoStreamDataCollator(processor),
        eval_dataset=rows,
        processing_class=processor,
        **kwargs,
    )
    return trainer.evaluate()


def test_the_loss_that_is_evaluated_is_that_of_all_tokens_whatever_batches_they_are_in(new_parts, rows, tmp_path):
    model, processor = new_parts()
    expected = measuring.evaluation_loss(model, processor, rows)
    for size in (1, 3, NUM_ROWS):
        got = evaluated((model, processor), tmp_path, rows, per_device_eval_batch_size=size)
        assert got["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_that_training_leaves_out_of_its_last_batch_are_evaluated(new_parts, rows, tmp_path):
    model, processor = new_parts()
    expected = measuring.evaluation_loss(model, processor, rows)
    for size in (3, 2 * NUM_ROWS):
        args = {"per_device_eval_batch_size": size, "dataloader_drop_last": True}
        assert evaluated((model, processor), tmp_path, rows, **args)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_objectives_that_is_evaluated_is_that_of_all_labels_whatever_batches_they_are_in(
    new_parts, rows, tmp_path
):
    model, processor = new_parts(cls=DuoStreamForPreTraining)
    model.config.itc_weight = model.config.itm_weight = 0.0
    model.config.lm_weight = 2.0
    collator = DuoStreamPreTrainingCollator(processor)
    several = [
        evaluated((model, processor), tmp_path, rows, collator, per_device_eval_batch_size=size)
        for size in (1, 3, NUM_ROWS)
    ]
    writer = DuoStreamForConditionalGeneration(model.config)
    writer.load_state_dict(model.state_dict(), strict=False)
    expected = measuring.evaluation_loss(writer, processor, rows)
    for got in several:
        assert got["eval_lm_loss"] == pytest.approx(expected, rel=1e-5)
        assert got["eval_mlm_loss"] == pytest.approx(several[0]["eval_mlm_loss"], rel=1e-5)
        assert got["eval_loss"] == pytest.approx(2 * got["eval_lm_loss"] + got["eval_mlm_loss"], rel=1e-5)


def test_a_loss_that_is_no_number_is_not_left_out_of_those_that_are_evaluated(new_parts, rows, tmp_path):
    model, processor = new_parts()
    collator = Poisoned(processor)
    got = evaluated((model, processor), tmp_path, rows, collator, per_device_eval_batch_size=1)
    assert math.isnan(got["eval_loss"])


def test_where_all_answers_are_cut_off_there_is_no_loss_to_evaluate(new_parts, rows, tmp_path):
    model, processor = new_parts()
    collator = DuoStreamDataCollator(processor, max_length=model.config.image_seq_length + 2)
    with pytest.raises(ValueError, match="`max_length` may cut off all answers"):
        evaluated((model, processor), tmp_path, rows, collator)


def test_the_loss_of_the_rows_to_measure_a_task_on_is_not_taken_for_that_of_the_rows_to_evaluate(
    new_parts, rows, tmp_path
):
    model, processor = new_parts(cls=DuoStreamForMaskedLM)
    collator = DuoStreamMaskedLMCollator(processor, mask_seed=0)
    alone = evaluated((model, processor), tmp_path, rows, collator)
    measured = evaluated((model, processor), tmp_path, rows, collator, metric_rows=rows.select([0, 1]), task="masked")
    assert measured["eval_loss"] == alone["eval_loss"] and measured["eval_num_masked"] > 0


@pytest.mark.parametrize(("watched", "stops_at", "best"), [("chrf", 4, 2), ("eval_loss", 6, 6)])
def test_training_stops_early_and_keeps_the_best_checkpoint_by_a_figure_of_the_task_as_by_the_loss(
    new_parts, rows, tmp_path, watched, stops_at, best
):
    # The loss falls from the first step on, while six steps are too few to answer anything
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = options(
        tmp_path, max_steps=6, load_best_model_at_end=True, metric_for_best_model=watched, max_new_tokens=4, **every
    )
    held_out, callbacks = rows.select(range(2)), [EarlyStoppingCallback(1)]
    trainer = train(*new_parts(), args, rows, held_out, callbacks=callbacks, task="caption", metric_rows=held_out)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry and "eval_chrf" in entry]
    assert [entry["step"] for entry in logged] == [*range(2, stops_at + 1, 2), stops_at]
    assert logged[1]["eval_loss"] < logged[0]["eval_loss"] and logged[1]["eval_chrf"] == logged[0]["eval_chrf"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    # Of the weights that are kept
    assert logged[-1]["eval_loss"] == pytest.approx(logged[best // 2 - 1]["eval_loss"])


def test_too_few_rows_for_the_figures_of_the_task_are_told_before_training(new_parts, rows, tmp_path):
    steps, one = Steps(), rows.select(range(1))
    with pytest.raises(ValueError, match=r"CIDEr-D .* needs at least two rows, got 1"):
        train(*new_parts(), options(tmp_path), rows, one, callbacks=[steps], task="caption", metric_rows=one)
    assert not steps.taken


@pytest.mark.parametrize(
    ("watched", "has_metric_rows", "message"),
    [
        ("cider_d", False, "is not measured; there are 'loss'; with `--metric_rows`, those of the task, too"),
        (
            "eval_cidr",
            True,
            "'eval_cidr', which is not measured; there are 'bleu', 'chrf', 'cider_d', 'exact_match', 'l",
        ),
    ],
)
def test_a_figure_that_is_not_measured_finds_no_best_checkpoint_and_is_told(
    new_parts, rows, tmp_path, watched, has_metric_rows, message
):
    held_out, steps = rows.select(range(2)), Steps()
    every = {"eval_strategy": "steps", "eval_steps": 1, "max_new_tokens": 4}
    args = options(tmp_path, metric_for_best_model=watched, **every)
    more = {"task": "caption", "metric_rows": held_out if has_metric_rows else None}
    with pytest.raises(ValueError, match=message):
        train(*new_parts(), args, rows, held_out, callbacks=[steps], **more)
    # What a task measures depends on its rows
    assert steps.taken == ([1] if has_metric_rows else [])


def test_the_model_is_saved_as_it_was_trained_where_it_is_evaluated_in_half_precision(new_parts, rows, tmp_path):
    trainer = train(*new_parts(), options(tmp_path, max_steps=1, bf16_full_eval=True), rows, rows.select(range(2)))
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    loss = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    assert json.loads((tmp_path / "run.json").read_text())["log_history"][-1]["eval_loss"] == loss


def test_what_is_uploaded_at_the_end_has_the_last_evaluation(new_parts, rows, tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(DuoStreamTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(
        DuoStreamTrainer, "push_to_hub", lambda self, **kwargs: uploaded.append(self.state.log_history[-1])
    )
    train(*new_parts(), options(tmp_path, max_steps=1, push_to_hub=True), rows, rows.select(range(2)))
    assert ["eval_loss" in last for last in uploaded] == [True]


def test_without_held_out_rows_nothing_is_evaluated(new_parts, rows, tmp_path):
    train(*new_parts(), options(tmp_path, max_steps=1), rows)
    assert not (tmp_path / "eval_results.json").exists()


def test_long_rows_are_cut(new_parts, rows, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model, processor = new_parts()
        collator = DuoStreamDataCollator(processor, max_length=16)
        train(model, processor, options(tmp_path, max_steps=1), rows, collator=collator)
    assert any("was cut to `max_length=16` tokens" in record.message for record in caplog.records)


def test_training_takes_rows_of_text_alone(new_parts, rows, tmp_path):
    def without_picture(row):
        first, *others = row["messages"]
        return {"messages": [{**first, "content": first["content"][1:]}, *others]}

    texts = rows.map(without_picture, remove_columns=["images"], keep_in_memory=True)
    trainer = train(*new_parts(), options(tmp_path, max_steps=20), texts)
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_training_takes_rows_with_and_without_pictures_in_one_batch(new_parts, rows, tmp_path):
    mixed = [dict(row) for row in rows]
    for row in mixed[::2]:
        row["images"] = []
        first, *others = row["messages"]
        row["messages"] = [{**first, "content": first["content"][1:]}, *others]
    assert len(losses(train(*new_parts(), options(tmp_path), mixed))) == 4


def test_training_takes_a_stream_of_rows(new_parts, rows, tmp_path):
    stored = train(*new_parts(), options(tmp_path / "a", max_steps=2, train_sampling_strategy="sequential"), rows)
    streamed = train(*new_parts(), options(tmp_path / "b", max_steps=2), rows.to_iterable_dataset())
    assert losses(streamed) == pytest.approx(losses(stored), rel=1e-4)


@pytest.mark.slow
def test_two_ranks_evaluate_a_stream_whose_content_is_text_here_and_parts_there_as_one_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    contents = ["What is it?", [{"type": "text", "text": "What is it?"}]]
    messages = [
        [{"role": "user", "content": contents[i % 2]}, {"role": "assistant", "content": f"{i * 'very '}number {i}"}]
        for i in range(7)
    ]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    args = ["--dataset", str(path), "--streaming", "true", "--eval_split", "train", "--eval_strategy", "steps"]
    # The weights stay as they are, whatever number of rows is in a step
    args += ["--learning_rate", "0", "--max_steps", "1", "--vocab_size", "300", "--per_device_eval_batch_size", "2"]
    args += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
    args += ["--train_sampling_strategy", "group_by_length"]
    found = []
    for num_ranks in (1, 2):
        output = ["--output_dir", tmp_path / str(num_ranks)]
        run = launch_forks([*TORCHRUN, str(num_ranks)], ranks.__file__, *args, *output)
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(json.loads((tmp_path / str(num_ranks) / "eval_results.json").read_text())["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.skipif(
    Version(datasets.__version__) < Version("5.2"), reason="older ones repeat a stream without rows for ever"
)
def test_a_stream_without_a_row_that_can_be_read_trains_nothing_and_says_so(new_parts, rows, tmp_path):
    broken = rows.map(lambda row: {**row, "messages": row["messages"][:1]}, keep_in_memory=True)
    bad_rows = BadRows(tmp_path / "bad_rows.jsonl")
    with pytest.raises(ValueError, match=r"no row to train on for rank 0 of 1.*bad_rows\.jsonl"):
        train(*new_parts(), options(tmp_path), broken.to_iterable_dataset(), bad_rows=bad_rows)
    assert len(bad_rows.path.read_text().splitlines()) >= len(rows)


def test_matching_pairs_in_batches_of_one_is_refused(new_parts, rows, tmp_path):
    with pytest.raises(ValueError, match="`itm_weight` goes with a `per_device_train_batch_size` of 2 or more"):
        train(*new_parts(cls=DuoStreamForPreTraining), options(tmp_path, per_device_train_batch_size=1), rows)


def test_training_takes_questions_with_their_answers(new_parts, tmp_path):
    scenes = build_scenes("validation", 2, image_size=32, cache_dir=str(tmp_path / "cache"))
    assert len(losses(train(*new_parts(), options(tmp_path / "run", max_steps=2), question_rows(scenes)))) == 2


def test_a_broken_row_ends_training_by_its_name(new_parts, rows, tmp_path):
    def break_one(row):
        return {**row, "messages": row["messages"][:1] if row["row"] == 5 else row["messages"]}

    broken = rows.map(break_one, keep_in_memory=True)
    with pytest.raises(ValueError, match="Row 5: no message of the assistant"):
        train(*new_parts(), options(tmp_path), broken)


def test_the_same_seed_gives_the_same_run(new_parts, rows, tmp_path):
    first, second = (train(*new_parts(), options(tmp_path / name, max_steps=3), rows) for name in "ab")
    assert losses(first) == losses(second)


def test_a_part_may_have_a_learning_rate_of_its_own(new_parts, rows, tmp_path):
    model, processor = new_parts()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rates = '{"text": 0, "vision": 0.0, "projector": 1e-3}'
    args = options(tmp_path, max_steps=3, lr_scheduler_type="constant", learning_rates=rates, weight_decay=0.1)
    trainer = train(model, processor, args, rows)
    # The head is the text stream's embedding
    changed = {
        name.split(".")[1] for name, weight in model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert changed == {"projector", "fusion_model"}
    groups = trainer.optimizer.param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (0, 1e-3, 1e-2) for decay in (0.0, 0.1)
    }
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_head_that_is_not_tied_has_the_learning_rate_of_the_fusion_stack(new_parts, rows, tmp_path):
    _, processor = new_parts()
    model = small_model(
        tie_word_embeddings=False,
        text_config={**LLAMA, "vocab_size": len(processor.tokenizer)},
        fusion_stack_config={**LLAMA, "vocab_size": len(processor.tokenizer)},
        image_token_id=processor.image_token_id,
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rates = '{"text": 0, "vision": 0, "projector": 0, "fusion": 0}'
    texts = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It."}], "row": 0}]
    train(model, processor, options(tmp_path, max_steps=1, learning_rates=rates), Dataset.from_list(texts))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("rates", ['{"eyes": 1e-3}', '{"text": "fast"}', '{"text": -1}'])
def test_learning_rates_of_unknown_parts_are_refused(tmp_path, rates):
    with pytest.raises(ValueError, match=r"`learning_rates` has .*; expected rates of 'text', 'vision'"):
        options(tmp_path, learning_rates=rates)


def test_a_learning_rate_of_a_part_that_is_frozen_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`learning_rates` has 'vision', which `freeze` keeps as it is"):
        options(tmp_path, learning_rates='{"vision": 1e-3}', freeze=["vision"])


@pytest.mark.parametrize("rates", ["[1]", "1e-3", "text: 1", ""])
def test_learning_rates_that_are_no_mapping_are_refused(tmp_path, rates):
    with pytest.raises(ValueError, match=rf"`learning_rates` is '{re.escape(rates)}'; expected a mapping in JSON"):
        options(tmp_path, learning_rates=rates)


@pytest.mark.parametrize("saving", [{"load_best_model_at_end": True}, {"save_strategy": "best"}], ids=str)
@pytest.mark.parametrize(
    ("watched", "is_better"),
    [("mse", False), ("eval_text_to_image_median_rank", False), ("loss", False), ("pearson", True)],
)
def test_the_best_checkpoint_is_that_of_the_lowest_error_and_the_highest_score(tmp_path, saving, watched, is_better):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **saving}
    assert options(tmp_path, metric_for_best_model=watched, **every).greater_is_better is is_better
    for given in (True, False):
        kept = options(tmp_path, metric_for_best_model=watched, greater_is_better=given, **every)
        assert kept.greater_is_better is given
