"""What is longer than a model reads is refused and named, before the model fails at it."""

from typing import Any

import pytest
import torch
from backbones import TEXTS
from command_lines import arguments
from datasets import Dataset
from fastapi import HTTPException
from PIL import Image
from tiny_models import BERT, GPT2, ROBERTA, small_config, small_model
from transformers import GenerationConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import (
    DuoStreamDataCollator,
    DuoStreamForConditionalGeneration,
    DuoStreamForSequenceClassification,
    DuoStreamProcessor,
    train_tokenizer,
)
from duostream.scripts import answering, generate, measuring, training
from duostream.scripts import trainer as trainer_room
from duostream.scripts.answering import TextRoom, answer, num_positions
from duostream.scripts.arguments import DuoStreamTrainingArguments
from duostream.scripts.serve import fit_answer
from duostream.scripts.trainer import DuoStreamTrainer

NUM_POSITIONS = 40
PICTURE = {"type": "image", "image": Image.new("RGB", (16, 16), "red")}


@pytest.fixture(scope="module")
def short() -> tuple[Any, DuoStreamProcessor]:
    """A GPT-2 with few positions, which never ends an answer, and its processor, whose tokenizer allows for more."""
    tokenizer = train_tokenizer([], 263)
    stack = {**GPT2, "vocab_size": len(tokenizer), "n_positions": NUM_POSITIONS}
    image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    config = small_config("gpt2", text_config=stack, fusion_stack_config=stack, image_token_id=image_token_id)
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = DuoStreamProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    torch.manual_seed(0)
    model = DuoStreamForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model, processor


def asking(words: str, num_pictures: int = 0) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [PICTURE] * num_pictures + [{"type": "text", "text": words}]}]


def prompt(processor: DuoStreamProcessor, conversation: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


YOSO = {**BERT, "model_type": "yoso"}


@pytest.mark.parametrize(
    "text", [GPT2, BERT, ROBERTA, TEXTS["opt"]().to_dict(), YOSO], ids=lambda text: text["model_type"]
)
def test_a_model_reads_as_many_tokens_of_text_as_it_has_positions_for(text: dict[str, Any]) -> None:
    model = small_model(cls=DuoStreamForSequenceClassification, text_config=text, pad_token_id=0)
    positions = num_positions(model)
    ids = torch.full((1, positions + 1), 5)
    model(input_ids=ids[:, 1:])
    room = TextRoom(model)
    room.check({"input_ids": ids[:, 1:]}, ["It"])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=f"It has {positions + 1} tokens of text; .* positions for {positions}"):
        room.check({"input_ids": ids}, ["It"])


def test_an_answer_ends_at_a_string_that_the_generation_config_names(
    short: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = short
    writing = {"sequence_bias": [[[processor.tokenizer.convert_tokens_to_ids("a")], 100.0]], "max_new_tokens": 6}
    assert answer(model, processor, [asking("Hi")], **writing) == ["aaaaaa"]
    monkeypatch.setattr(model.generation_config, "stop_strings", ["aaa"])
    assert answer(model, processor, [asking("Hi")], **writing) == ["aaa"]


def test_without_a_table_of_positions_none_is_the_last() -> None:
    assert num_positions(small_model("llama")) is None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the module warns of."""
    messages: list[str] = []
    monkeypatch.setattr(answering.logger, "warning", messages.append)
    return messages


def length_of(processor: DuoStreamProcessor, words: str) -> int:
    return prompt(processor, asking(words))["input_ids"].shape[1]


def leaving(processor: DuoStreamProcessor, room: int) -> str:
    """A question that leaves room for so many tokens behind it."""
    texts = ("Q" * number for number in range(1, NUM_POSITIONS))
    return next(words for words in texts if length_of(processor, words) + room == NUM_POSITIONS)


@pytest.mark.parametrize("num_pictures", [0, 20])
def test_an_answer_may_fill_the_positions_of_text_and_no_more(short: Any, told: list[str], num_pictures: int) -> None:
    model, processor = short
    conversation = asking("Hello", num_pictures)
    inputs = prompt(processor, conversation)
    (length,) = TextRoom(model).num_text_tokens(inputs)
    assert inputs["input_ids"].shape[1] == length + num_pictures * model.config.image_seq_length
    room = NUM_POSITIONS - length
    assert len(model.generate(**inputs, max_new_tokens=room)[0]) == inputs["input_ids"].shape[1] + room
    asked = [asking("Hi"), conversation]
    filled = answer(model, processor, asked, max_new_tokens=room)
    assert not told
    assert answer(model, processor, asked, max_new_tokens=room + 1) == filled
    (message,) = told
    assert message.startswith(
        f"Conversation 1 has {length} tokens of text, which leave room for {room} more, not for the {room + 1} of "
        "`max_new_tokens`"
    )


def test_a_prompt_that_is_longer_than_the_tokenizer_allows_is_refused(short: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Conversation 0 has \d+ tokens of text, more than the 2048 of the tokenizer"
    ):
        answer(*short, [asking("Hello" * 1000)], max_prompt_length=2048, max_new_tokens=1)


def test_the_command_writes_as_much_as_there_is_room_for(
    short: Any, told: list[str], tmp_path: Any, capsys: Any
) -> None:
    for part in short:
        part.save_pretrained(tmp_path)
    generate.main(arguments(checkpoint=tmp_path, prompt="Hello"))
    assert capsys.readouterr().out
    assert [message.startswith("The prompt has ") for message in told] == [True]
    with pytest.raises(ValueError, match=rf"The prompt has \d+ tokens of text, .* positions for {NUM_POSITIONS}"):
        generate.main(arguments(checkpoint=tmp_path, prompt="Hello" * 9))


def row_of(words: str, reply: str = "Yes", **columns: Any) -> dict[str, Any]:
    return {
        "messages": [*asking(words), {"role": "assistant", "content": [{"type": "text", "text": reply}]}],
        **columns,
    }


def test_answers_end_where_the_positions_do_where_a_model_is_measured_which_is_told_once(
    short: Any, told: list[str]
) -> None:
    model, processor = short
    rows = Dataset.from_list(
        [row_of(words, row=7 + i) for i, words in enumerate(("Hi", "Hi", "Hi", "Hello", "Hi", "Hello"))]
    )
    length = length_of(processor, "Hello")
    options = {"batch_size": 2, "max_new_tokens": NUM_POSITIONS - length + 1}
    cut = measuring.generate_answers(model, processor, rows, **options)
    assert [message.split(" of text")[0] for message in told] == [f"Row 10 has {length} tokens"]
    # Only where there is no room
    whole = [answer(model, processor, [asking("Hi")], max_new_tokens=options["max_new_tokens"])[0]]
    assert [each["prediction"] for each in cut[:2]] == whole * 2


def test_a_question_that_leaves_no_room_for_an_answer_is_refused_and_one_that_leaves_room_for_a_token_is_not(
    short: Any,
) -> None:
    model, processor = short
    last = Dataset.from_list([row_of(leaving(processor, 1), row=5)])
    measuring.generate_answers(model, processor, last, max_new_tokens=3)
    rows = Dataset.from_list([row_of("Hi", row=4), row_of(leaving(processor, 0), row=5)])
    with pytest.raises(ValueError, match=f"Row 5 has {NUM_POSITIONS} tokens of text, which leave no room for an ans"):
        measuring.generate_answers(model, processor, rows, max_new_tokens=3)


def test_a_question_that_leaves_no_room_is_told_before_training(short: Any, tmp_path: Any) -> None:
    model, processor = short
    rows = Dataset.from_list([row_of("Hi", row=0)])
    asked = Dataset.from_list([row_of("Hi", row=0), row_of("Hello" * 9, row=1)])
    args = DuoStreamTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, eval_strategy="steps", report_to="none", use_cpu=True, disable_tqdm=True
    )
    started = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"Row 1 has \d+ tokens of text"):
        patch.setattr(type(model), "forward", lambda *args, **kwargs: started.append(1))
        training.train(model, processor, args, rows, rows, task="vqa", metric_rows=asked)
    assert not started
    assert measuring.check_questions(model, processor, asked.select([0])) == NUM_POSITIONS - length_of(processor, "Hi")
    # Of a model without a last position no row is looked at
    assert measuring.check_questions(small_model("llama"), processor, asked) is None


def test_ranks_that_share_weights_write_no_more_than_there_is_room_for_behind_the_longest_question(
    short: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = short
    rows = Dataset.from_list([row_of("Hi", row=0), row_of(leaving(processor, 2), row=1)])
    args = DuoStreamTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = DuoStreamTrainer(
        model=model, args=args, processing_class=processor, train_dataset=rows, task="vqa", metric_rows=rows
    )
    given: list[dict[str, Any]] = []

    def answers(*parts: Any, **options: Any) -> list[dict[str, Any]]:
        given.append(options)
        return [{"prediction": "Yes", "reference": "Yes"}]

    monkeypatch.setattr(trainer_room, "generate_answers", answers)
    monkeypatch.setattr(trainer_room, "gather_object", lambda results: results)
    trainer.measure(rows)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(type(args), "world_size", 2)
    trainer.measure(rows)
    assert [options["max_new_tokens"] for options in given] == [args.max_new_tokens, 2]


def test_the_positions_are_looked_for_once_where_a_model_is_measured(
    short: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(answering, "num_positions", lambda model: looked.append(model))
    rows = Dataset.from_list([row_of("Hi")] * 3)
    measuring.generate_answers(*short, rows, batch_size=1, max_new_tokens=2)
    measuring.evaluation_loss(*short, rows, batch_size=1)
    assert len(looked) == 2


@pytest.mark.parametrize("numbers", [[30, 31, 32, 33], [None] * 4])
def test_a_row_that_is_too_long_is_named_where_a_model_is_measured(short: Any, numbers: list[int | None]) -> None:
    model, processor = short
    listed = [row_of(words) for words in ("Hi", "Hi", "Hi", "Hello " * 9)]
    rows = Dataset.from_list(
        [row if number is None else {**row, "row": number} for row, number in zip(listed, numbers, strict=True)]
    )
    told = rf"Row {3 if numbers[3] is None else numbers[3]} has \d+ tokens of text"
    with pytest.raises(ValueError, match=told):
        measuring.evaluation_loss(model, processor, rows, batch_size=2)
    with pytest.raises(ValueError, match=told):
        measuring.generate_answers(model, processor, rows, batch_size=2, max_new_tokens=3)


@pytest.mark.parametrize("num_pictures", [0, 1])
def test_conversations_in_a_row_have_the_positions_of_the_longest(short: Any, num_pictures: int) -> None:
    model, processor = short
    empty = len(DuoStreamDataCollator(processor)([row_of("Hi", "")])["input_ids"][0])
    room = NUM_POSITIONS - empty
    pictures = [PICTURE["image"]] * num_pictures

    def row(*replies: str) -> dict[str, Any]:
        messages = [
            [*asking("Hi", num_pictures), {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
            for reply in replies
        ]
        return {"images": pictures, "conversations": [{"messages": each} for each in messages], "row": 3}

    def loss(*rows: dict[str, Any]) -> float:
        return measuring.evaluation_loss(model, processor, rows, batch_size=2)  # type: ignore[arg-type]

    assert loss(row("y" * room, "n" * room)) > 0
    # Padding behind the last conversation takes no position of its own
    assert loss(row("y" * room, "n" * room), row("y", "n" * room)) > 0
    with pytest.raises(ValueError, match=f"Row 3 has {NUM_POSITIONS + 1} tokens of text"):
        loss(row("y", "n" * (room + 1)))


def test_a_served_answer_ends_where_the_positions_do(short: Any) -> None:
    model, processor = short
    inputs = prompt(processor, asking("Hello", num_pictures=1))
    (length,) = TextRoom(model).num_text_tokens(inputs)
    for options in ({"max_new_tokens": 1024}, {"max_length": 1024}):
        config = GenerationConfig(**options)
        fit_answer(model, processor, inputs, config)
        (written,) = model.generate(**inputs, generation_config=config)
        assert len(written) == inputs["input_ids"].shape[1] + NUM_POSITIONS - length
    config = GenerationConfig(max_new_tokens=2)
    fit_answer(model, processor, inputs, config)
    assert config.max_new_tokens == 2
    for words, told in (("Hello" * 9, f"positions for {NUM_POSITIONS}"), ("Hello" * 900, "`model_max_length`")):
        with pytest.raises(HTTPException, match="400: The conversation has .*" + told):
            fit_answer(model, processor, prompt(processor, asking(words)), GenerationConfig(max_new_tokens=2))
