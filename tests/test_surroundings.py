"""What people do with a model of transformers beside `Trainer` and `generate`, done with the real thing."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from optuna.samplers import RandomSampler
from peft import LoraConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import (
    LLAMA,
    Row,
    answered_row,
    batch,
    difference,
    ragged_rows,
    save_learnt,
    small_config,
    small_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trackio.sqlite_storage import SQLiteStorage
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from duostream import (
    DuoStreamDataCollator,
    DuoStreamForConditionalGeneration,
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
    DuoStreamPreTrainingCollator,
    DuoStreamProcessor,
    train_tokenizer,
)

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]}
PICTURE = Image.new("RGB", (48, 48), "red")


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def make_parts(
    tokenizer: Any, bidirectional_prefix: bool = False, cls: type = DuoStreamForConditionalGeneration, **kwargs: Any
) -> tuple[Any, DuoStreamProcessor]:
    stack = {**LLAMA, "vocab_size": len(tokenizer)}
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=small_config().image_seq_length,
        bidirectional_prefix=bidirectional_prefix,
    )
    image_token_id = processor.image_token_id
    config = small_config(text_config=stack, fusion_stack_config=stack, image_token_id=image_token_id, **kwargs)
    return cls(config), processor


def small_tokenizer() -> Any:
    return train_tokenizer(["How many objects are there? one two three red"] * 4, 320)


def bytes_tokenizer() -> Any:
    """One that knows no placeholder, whose number then is the first behind the vocabulary."""
    vocab = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(params=[False, True], ids=["causal", "bidirectional prefix"])
def parts(request: pytest.FixtureRequest) -> tuple[DuoStreamForConditionalGeneration, DuoStreamProcessor]:
    """A small model and its processor."""
    return make_parts(small_tokenizer(), bidirectional_prefix=request.param)


OPTIONS: dict[str, Any] = {
    "report_to": "none",
    "max_length": None,  # a cut may go through a picture
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
ROWS = {
    "messages": {"images": [PICTURE], "messages": [QUESTION, reply("two red")]},
    "prompt and completion": {"images": [PICTURE], "prompt": [QUESTION], "completion": [reply("two red")]},
}


@pytest.mark.parametrize("form", ROWS)
def test_trl_fine_tunes_a_checkpoint_on_our_rows_with_the_processor(parts: tuple, form: str, tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path / "start")
    trainer = SFTTrainer(
        model=str(tmp_path / "start"),
        args=SFTConfig(str(tmp_path), max_steps=30, learning_rate=1e-2, **OPTIONS),
        train_dataset=Dataset.from_list([ROWS[form]] * 8),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=r".*q_proj")], ids=["plain", "lora"])
@pytest.mark.parametrize("tokenizer", [small_tokenizer, bytes_tokenizer], ids=["in the vocabulary", "behind it"])
@pytest.mark.parametrize(
    ("form", "options"),
    [("messages", {}), ("prompt and completion", {"completion_only_loss": False})],
    ids=["messages", "prompt, too"],
)
def test_trl_has_the_models_loss_which_no_placeholder_is_in(
    form: str, options: dict, tokenizer: Any, peft_config: Any, tmp_path: Path
) -> None:
    model, processor = make_parts(tokenizer())
    is_behind = processor.image_token_id >= model.config.text_config.vocab_size
    assert is_behind == (tokenizer is bytes_tokenizer)
    rows = Dataset.from_list([ROWS[form]] * 2)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), max_steps=1, **options, **OPTIONS),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    is_placeholder = inputs["labels"] == processor.image_token_id
    assert is_placeholder.any()
    with torch.no_grad():
        # Adapters start at nothing
        expected = model.eval()(**inputs).loss.item()
        kept = {**inputs, "labels": inputs["labels"].masked_fill(is_placeholder, -100)}
        assert model(**kept).loss.item() == expected
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
        # `Trainer` counts the placeholders
        count = (inputs["labels"][:, 1:] != -100).sum()
        expected = model.eval()(**inputs, num_items_in_batch=count).loss.item()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("bidirectional_prefix", [False, True])
def test_trl_writes_and_learns_or_says_that_it_would_see_what_is_written(
    bidirectional_prefix: bool, tmp_path: Path
) -> None:
    model, processor = make_parts(small_tokenizer(), bidirectional_prefix)
    options = {name: value for name, value in OPTIONS.items() if name != "max_length"}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        args=GRPOConfig(str(tmp_path), max_steps=1, num_generations=2, max_completion_length=4, **options),
        train_dataset=Dataset.from_list([{"images": [PICTURE], "prompt": [QUESTION]}] * 2),
        processing_class=processor,
    )
    if bidirectional_prefix:
        with pytest.raises(ValueError, match="`bidirectional_prefix=False`"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == 1


def test_trl_learns_rewards_of_texts(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model, processor = make_parts(tokenizer, cls=DuoStreamForSequenceClassification, num_labels=1)
    tokenizer.chat_template = processor.chat_template
    question = {"role": "user", "content": "How many objects are there?"}
    chosen, rejected = ([question, {"role": "assistant", "content": text}] for text in ("two", "one"))
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(str(tmp_path), max_steps=16, learning_rate=1e-2, **OPTIONS),
        train_dataset=Dataset.from_list([{"chosen": chosen, "rejected": rejected}] * 8),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_trl_learns_preferences_about_a_picture(parts: tuple, tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path / "start")
    row = {"images": [PICTURE], "prompt": [QUESTION], "chosen": [reply("two")], "rejected": [reply("one")]}
    trainer = DPOTrainer(
        # It loads the reference, what it starts from, by itself
        model=DuoStreamForConditionalGeneration.from_pretrained(tmp_path / "start"),
        args=DPOConfig(str(tmp_path), max_steps=16, learning_rate=1e-2, **OPTIONS),
        train_dataset=Dataset.from_list([row] * 8),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693, abs=1e-3) and losses[-1] < 0.5 * losses[0]


def test_parts_that_memory_has_no_room_for_are_read_from_disk(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    offloaded = DuoStreamForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": num_bytes // 2},
        offload_folder=tmp_path / "offload",
    )
    assert {"cpu", "disk"} == set(offloaded.hf_device_map.values())
    inputs = batch(ragged_rows(model))
    with torch.no_grad():
        assert difference(offloaded(**inputs).logits, model(**inputs).logits) == 0
    settings: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(offloaded.generate(**inputs, **settings), model.generate(**inputs, **settings))


def test_what_compares_pictures_and_texts_may_be_on_disk(tmp_path: Path) -> None:
    model = small_model(cls=DuoStreamForImageTextRetrieval)
    model.save_pretrained(tmp_path / "model")
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    offloaded = DuoStreamForImageTextRetrieval.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": num_bytes // 2}, offload_folder=tmp_path / "offload"
    )
    assert offloaded.hf_device_map["image_text_head"] == "disk"
    inputs = {"input_ids": torch.randint(3, 90, (2, 5)), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        got, expected = offloaded(**inputs, return_loss=True), model(**inputs, return_loss=True)
    assert torch.equal(got.logits_per_text, expected.logits_per_text) and got.loss == expected.loss


def test_positions_of_the_projector_may_be_fetched_when_they_are_needed() -> None:
    model = small_model("tiny")
    assert model.config.projector_position_embeddings
    inputs = batch(ragged_rows(model))
    with torch.no_grad():
        expected = model(**inputs).logits
        cpu_offload(model.model.projector)
        assert difference(model(**inputs).logits, expected) == 0


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_learnt(tmp_path_factory.mktemp("counting"), [answered_row("How many?", "two", "red")])


@pytest.mark.parametrize("num_pictures", [0, 2, 4])
def test_predictions_are_logits_alone_however_many_batches_have_pictures(
    num_pictures: int, counting: Path, tmp_path: Path
) -> None:
    rows = [answered_row("How many?", "two", "red" if i < num_pictures else None) for i in range(4)]
    model, processor = (each.from_pretrained(counting) for each in (DuoStreamForConditionalGeneration, AutoProcessor))
    args = plain_arguments(tmp_path, per_device_eval_batch_size=2, remove_unused_columns=False)
    trainer = Trainer(model=model, args=args, data_collator=DuoStreamDataCollator(processor))
    predicted = trainer.predict(rows).predictions
    assert predicted.shape[0] == 4 and predicted.shape[2] == model.config.text_config.vocab_size


def test_of_pretraining_predictions_are_logits_and_no_losses(tmp_path: Path) -> None:
    # Which of them are there hangs on the batch, and ranks that gathered them would wait for each other
    rows = [answered_row("How many?", "two", color) for color in ("red", None, "blue", "green")]
    model, processor = make_parts(small_tokenizer(), cls=DuoStreamForPreTraining)
    args = plain_arguments(tmp_path, per_device_eval_batch_size=2, remove_unused_columns=False)
    trainer = Trainer(model=model, args=args, data_collator=DuoStreamPreTrainingCollator(processor))
    predicted = trainer.predict(rows).predictions
    assert predicted.shape[0] == 4 and predicted.shape[2] == model.config.text_config.vocab_size


@pytest.mark.parametrize("objective", ["lm", "mlm"])
def test_labels_of_pretraining_are_not_smoothed(objective: str, tmp_path: Path) -> None:
    weights = {f"{name}_weight": float(name == objective) for name in ("lm", "mlm", "itc", "itm")}
    model, processor = make_parts(small_tokenizer(), cls=DuoStreamForPreTraining, **weights)
    args = plain_arguments(tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False)
    collator = DuoStreamPreTrainingCollator(processor, mlm=objective == "mlm", pairs=False)
    rows = [answered_row("How many?", "two", "red")] * 4
    trainer = Trainer(model=model, args=args, data_collator=collator, train_dataset=rows, eval_dataset=rows)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"`labels` are missing, .*`label_smoothing_factor`"):
            run()


def plain_rows() -> list[dict[str, torch.Tensor]]:
    """What somebody else's data set and the library's own collator give."""
    torch.manual_seed(0)
    input_ids = torch.randint(3, LLAMA["vocab_size"], (8, 12))  # (rows, seq_len)
    return [{"input_ids": row, "labels": row} for row in input_ids]


def plain_arguments(path: Path, **kwargs: Any) -> TrainingArguments:
    options = {"max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", **kwargs}
    return TrainingArguments(str(path), **options, use_cpu=True, disable_tqdm=True)


def test_the_library_s_trainer_evaluates_rows_that_have_nothing_but_labels(tmp_path: Path) -> None:
    rows = plain_rows()
    trainer = Trainer(model=small_model(), args=plain_arguments(tmp_path), eval_dataset=rows)
    batch_of_all = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = float(trainer.model(**batch_of_all).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_who_writes_with_weights_of_a_head_that_does_not_has_a_cache(tmp_path: Path) -> None:
    # `Trainer` says otherwise in the config, which is all that this head saves
    rows = [{"input_ids": row["input_ids"], "labels": torch.tensor(0)} for row in plain_rows()]
    model = small_model(cls=DuoStreamForSequenceClassification)
    trainer = Trainer(model=model, args=plain_arguments(tmp_path), train_dataset=rows)
    trainer.train()
    assert model.config.use_cache is False
    trainer.save_model(str(tmp_path))
    writer = DuoStreamForConditionalGeneration.from_pretrained(tmp_path)
    trainer = Trainer(model=writer, args=plain_arguments(tmp_path), train_dataset=plain_rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "writer"))
    saved = DuoStreamForConditionalGeneration.from_pretrained(tmp_path / "writer")
    assert saved.generation_config.use_cache is not False
    prompt, options = plain_rows()[0]["input_ids"][None], {"return_dict_in_generate": True, "eos_token_id": None}
    assert saved.generate(prompt, max_new_tokens=2, **options).past_key_values.get_seq_length() == 13


def test_smoothed_labels_are_those_of_the_next_token(tmp_path: Path) -> None:
    rows = plain_rows()
    model = small_model().eval()
    trainer = Trainer(model=model, args=plain_arguments(tmp_path, label_smoothing_factor=0.1), eval_dataset=rows)
    input_ids = torch.stack([row["input_ids"] for row in rows])  # (rows, seq_len)
    with torch.no_grad():
        logits = model(input_ids).logits[:, :-1].flatten(0, 1)  # (rows * (seq_len - 1), vocab_size)
    expected = torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten(), label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_losses_are_logged_where_people_look_at_them(tmp_path: Path) -> None:
    arguments = plain_arguments(
        tmp_path, logging_steps=1, report_to=["tensorboard", "trackio"], run_name="first", project="duostream"
    )
    trainer = Trainer(model=small_model(), args=arguments, train_dataset=plain_rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")))).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    logged = SQLiteStorage.get_logs("duostream", "first")
    assert [entry["train/loss"] for entry in logged if "train/loss" in entry] == pytest.approx(losses)


@pytest.mark.slow
def test_a_search_finds_the_learning_rate_that_learns(tmp_path: Path) -> None:
    rows = plain_rows()
    arguments = plain_arguments(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer = Trainer(model_init=lambda: small_model(), args=arguments, train_dataset=rows, eval_dataset=rows)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-6, 1e-2])},
        n_trials=4,
        direction="minimize",
        backend="optuna",
        sampler=RandomSampler(seed=0),
    )
    assert best.hyperparameters == {"learning_rate": 1e-2}


def test_no_processor_of_the_library_takes_what_lmms_eval_gives_to_any(parts: tuple) -> None:
    # Its generic classes call any processor like this (lmms-eval 0.7.3, models/chat/huggingface.py)
    processor = parts[1]
    stock = LlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=8)
    for each in (processor, stock):
        with pytest.raises(ValueError, match="`audios` which is deprecated"):
            each(text=["What is it?"], images=None, videos=None, audios=[], return_tensors="pt")


class SmallMemory(DuoStreamForConditionalGeneration):
    """As on a device that has room for two rows."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(input_ids, labels=labels, **kwargs)


@pytest.mark.slow
def test_a_batch_that_memory_has_no_room_for_is_made_smaller(tmp_path: Path) -> None:
    arguments = plain_arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
    trainer = Trainer(model=small_model(cls=SmallMemory), args=arguments, train_dataset=plain_rows())
    trainer.train()
    assert trainer.state.train_batch_size == 2 and trainer.state.global_step == 3


def test_placeholders_in_labels_are_ignored() -> None:
    # One number behind the vocabulary, where the loss would have no logit for it
    model = small_model(image_token_id=LLAMA["vocab_size"])
    inputs = batch(ragged_rows(model))
    labels = inputs["input_ids"]
    without = labels.masked_fill(labels == model.config.image_token_id, -100)
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, model(**inputs, labels=without).loss)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_exported_graph_says_what_the_model_says(backend: str, tmp_path: Path) -> None:
    # Not above: it needs a newer torch than the rest (2.11)
    from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

    model = small_model()
    rows = [Row(model, "picture", 6) for _ in range(4)]
    first, second = batch(rows[:2]), batch(rows[2:])
    # A graph can't wait to see how long the text is
    hint = {"images_per_row": 1}
    if backend == "torch":
        program, _ = DynamoExporter().export_program(model, {**first, **hint}, DynamoConfig())
        exported = program.module()(**second, **hint).logits
    else:
        program, _ = OnnxExporter().export_program(model, {**first, **hint}, OnnxConfig())
        OnnxExporter.save_program(program, str(tmp_path / "model.onnx"))
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in second.items()})
        exported = torch.from_numpy(logits)
    with torch.no_grad():
        assert difference(exported, model(**second).logits) < 1e-4


class Reader(torch.nn.Module):
    """What of a model a graph is made of: it takes tensors alone."""

    def __init__(self, use_cache: bool):
        super().__init__()
        self.model, self.use_cache = small_model(), use_cache

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "images_per_row": 1}
        return self.model(**inputs, use_cache=self.use_cache).logits


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_exported_graph_takes_rows_of_any_length(use_cache: bool) -> None:
    reader = Reader(use_cache)
    rows = [batch([Row(reader.model, "picture", num_words) for _ in range(2)]) for num_words in (6, 11)]
    (ids, pixels), (other_ids, other_pixels) = ((row["input_ids"], row["pixel_values"]) for row in rows)
    lengths = {"input_ids": {1: torch.export.Dim("length", min=8, max=64)}, "pixel_values": None}
    program = torch.export.export(reader, (ids, pixels), dynamic_shapes=lengths, strict=False)
    assert difference(program.module()(other_ids, other_pixels), reader(other_ids, other_pixels)) < 1e-4


class Head(torch.nn.Module):
    """A head that reads a picture in front of each text, as a graph is made of it."""

    def __init__(self, cls: type):
        super().__init__()
        self.model = small_model(cls=cls)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        options = {} if isinstance(self.model, DuoStreamForMaskedLM) else {"use_cache": False}
        outputs = self.model(input_ids=input_ids, pixel_values=pixel_values, images_per_row=1, **options)
        return outputs[0]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("cls", [DuoStreamModel, DuoStreamForMaskedLM, DuoStreamForSequenceClassification])
def test_an_exported_graph_takes_any_number_of_rows(cls: type) -> None:
    head = Head(cls)
    rows = [batch([Row(head.model, "picture", 6) for _ in range(number)]) for number in (3, 5)]
    (ids, pixels), (other_ids, other_pixels) = ((row["input_ids"], row["pixel_values"]) for row in rows)
    number = {0: torch.export.Dim("number", min=2, max=64)}
    sizes = {"input_ids": number, "pixel_values": number}
    program = torch.export.export(head, (ids, pixels), dynamic_shapes=sizes, strict=False)
    assert difference(program.module()(other_ids, other_pixels), head(other_ids, other_pixels)) < 1e-5
