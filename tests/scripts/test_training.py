import json
import logging

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import (
    DuoStreamConfig,
    DuoStreamDataCollator,
    DuoStreamForConditionalGeneration,
    DuoStreamProcessor,
    train_tokenizer,
)
from duostream.scripts.arguments import DuoStreamTrainingArguments
from duostream.scripts.data import number_rows, texts_of
from duostream.scripts.scenes import build_scenes, question_rows, to_conversations
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

    def new_parts(vision="transformer"):
        set_seed(0)
        config = DuoStreamConfig(
            text_config={**LLAMA, "vocab_size": len(tokenizer)},
            vision_config=VISION[vision],
            fusion_stack_config={**LLAMA, "vocab_size": len(tokenizer)},
        )
        image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        processor = DuoStreamProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
        return DuoStreamForConditionalGeneration(config), processor

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


@pytest.mark.parametrize("vision", VISION)
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


@pytest.mark.parametrize("vision", VISION)
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


def test_resuming_without_a_checkpoint_starts_from_the_beginning(new_parts, rows, tmp_path):
    steps = Steps()
    train(*new_parts(), options(tmp_path, max_steps=2, resume=True), rows, callbacks=[steps])
    assert steps.taken == [1, 2]


def test_a_run_that_is_not_resumed_ignores_earlier_checkpoints(new_parts, rows, tmp_path):
    for _ in range(2):
        steps = Steps()
        saving = options(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        train(*new_parts(), saving, rows, callbacks=[steps])
        assert steps.taken == [1, 2]


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


@pytest.mark.parametrize("rates", ['{"eyes": 1e-3}', '{"text": "fast"}', '{"text": -1}'])
def test_learning_rates_of_unknown_parts_are_refused(tmp_path, rates):
    with pytest.raises(ValueError, match=r"`learning_rates` has .*; expected rates of 'text', 'vision'"):
        options(tmp_path, learning_rates=rates)
