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
    DuoStreamForConditionalGeneration,
    DuoStreamForSequenceClassification,
    DuoStreamProcessor,
    train_tokenizer,
)
from duostream.scripts import evaluate, generate
from duostream.scripts.generate import answer, check_lengths, num_positions, num_text_tokens
from duostream.scripts.serve import fit_answer

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


@pytest.mark.parametrize("text", [GPT2, BERT, ROBERTA, TEXTS["opt"]().to_dict()], ids=lambda text: text["model_type"])
def test_a_model_reads_as_many_tokens_of_text_as_it_has_positions_for(text: dict[str, Any]) -> None:
    model = small_model(cls=DuoStreamForSequenceClassification, text_config=text, pad_token_id=0)
    positions = num_positions(model)
    ids = torch.full((1, positions + 1), 5)
    model(input_ids=ids[:, 1:])
    check_lengths(model, {"input_ids": ids[:, 1:]}, ["It"])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=f"It has {positions + 1} tokens of text; .* positions for {positions}"):
        check_lengths(model, {"input_ids": ids}, ["It"])


def test_without_a_table_of_positions_none_is_the_last() -> None:
    assert num_positions(small_model("llama")) is None


@pytest.mark.parametrize("num_pictures", [0, 20])
def test_an_answer_may_fill_the_positions_of_text_and_no_more(short: Any, num_pictures: int) -> None:
    model, processor = short
    conversation = asking("Hello", num_pictures)
    inputs = prompt(processor, conversation)
    (length,) = num_text_tokens(model, inputs)
    assert inputs["input_ids"].shape[1] == length + num_pictures * model.config.image_seq_length
    room = NUM_POSITIONS - length
    assert len(model.generate(**inputs, max_new_tokens=room)[0]) == inputs["input_ids"].shape[1] + room
    answer(model, processor, [conversation, asking("Hi")], max_new_tokens=room)
    with pytest.raises(ValueError, match=rf"Conversation 1 has {length} tokens of text, which {room + 1} may follow"):
        answer(model, processor, [asking("Hi"), conversation], max_new_tokens=room + 1)


def test_a_prompt_that_is_longer_than_the_tokenizer_allows_is_refused(short: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Conversation 0 has \d+ tokens of text, more than the 2048 of the tokenizer"
    ):
        answer(*short, [asking("Hello" * 1000)], max_prompt_length=2048, max_new_tokens=1)


def test_the_command_says_that_its_prompt_is_too_long(short: Any, tmp_path: Any) -> None:
    for part in short:
        part.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"The prompt has \d+ tokens of text, which 64 may follow \(`max_new_tokens`\)"
    ):
        generate.main(arguments(checkpoint=tmp_path, prompt="Hello"))


def test_a_row_that_is_too_long_is_named_where_a_model_is_measured(short: Any) -> None:
    model, processor = short
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    rows = Dataset.from_list([{"messages": [*asking(words), reply]} for words in ("Hi", "Hi", "Hi", "Hello " * 9)])
    told = r"Row 3 has \d+ tokens of text"
    with pytest.raises(ValueError, match=told):
        evaluate.evaluation_loss(model, processor, rows, batch_size=2)
    with pytest.raises(ValueError, match=told):
        evaluate.generate_answers(model, processor, rows, batch_size=2, max_new_tokens=3)


def test_a_served_answer_ends_where_the_positions_do(short: Any) -> None:
    model, processor = short
    inputs = prompt(processor, asking("Hello", num_pictures=1))
    (length,) = num_text_tokens(model, inputs)
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
