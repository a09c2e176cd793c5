import copy
import json
import logging
import re

import numpy as np
import pytest
import torch
from chats import (
    ASSISTANT,
    CHATML,
    END,
    IMAGE,
    NUM_TOKENS,
    assistant,
    chatml_tokenizer,
    dialogue,
    learnt,
    make_processor,
    part,
    picture,
    question,
    read,
    states,
    user,
    without_generation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders, pre_tokenizers, processors
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer


def test_only_what_the_assistant_says_is_learnt(processor):
    batch = DuoStreamDataCollator(processor)([dialogue("What color?", "It is red.")])
    assert read(processor, batch) == "<|user|><|image|>What color?<|assistant|>It is red.<|end|>"
    assert learnt(processor, batch) == "It is red.<|end|>"
    is_learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_learnt], batch["input_ids"][is_learnt])


def test_every_answer_of_several_turns_is_learnt(processor):
    batch = DuoStreamDataCollator(processor)([dialogue("What color?", "Red.", "Where?", "There.", "Why?", "So.")])
    assert learnt(processor, batch) == "Red.<|end|>There.<|end|>So.<|end|>"
    assert "<|end|><|user|>Where?<|assistant|>There.<|end|>" in read(processor, batch)


def test_a_question_behind_the_last_answer_is_read_and_not_learnt(processor):
    batch = DuoStreamDataCollator(processor)([dialogue("What color?", "Red.", "Where?")])
    assert read(processor, batch).endswith("<|end|><|user|>Where?")
    assert learnt(processor, batch) == "Red.<|end|>"


def test_a_completion_is_learnt_and_answers_inside_its_prompt_are_not(processor):
    whole = dialogue("What color?", "Red.", "Where?", "There.")
    row = {"images": whole["images"], "prompt": whole["messages"][:3], "completion": whole["messages"][3:]}
    batch = DuoStreamDataCollator(processor)([row, whole])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert learnt(processor, batch, 0) == "There.<|end|>"
    assert learnt(processor, batch, 1) == "Red.<|end|>There.<|end|>"


def test_content_may_be_a_string(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is red?"},
        {"role": "assistant", "content": "A color."},
    ]
    batch = DuoStreamDataCollator(processor)([{"messages": messages}])
    assert read(processor, batch) == "<|system|>Be brief.<|user|>What is red?<|assistant|>A color.<|end|>"
    assert learnt(processor, batch) == "A color.<|end|>"


def test_an_empty_answer_is_its_end(processor):
    assert learnt(processor, DuoStreamDataCollator(processor)([dialogue("What?", "")])) == "<|end|>"


def test_rows_are_left_as_they_are(processor):
    rows = [dialogue("What?", "That."), question("What?", "That.")]
    before = copy.deepcopy(rows)
    DuoStreamDataCollator(processor)(rows)
    assert rows == before


@pytest.mark.parametrize("kind", ["own", "chatml"])
def test_a_template_that_does_not_mark_answers_gives_the_same_labels(kind):
    marking, plain = make_processor(kind), make_processor(kind)
    plain.chat_template = without_generation(plain.chat_template)
    rows = [
        dialogue("What color?", "It is red.", "Where?", "Left."),
        question("What?", "That."),
        dialogue("Hi", "Ho", "Hm", num_images=0),
    ]
    expected, batch = DuoStreamDataCollator(marking)(rows), DuoStreamDataCollator(plain)(rows)
    assert expected.keys() == batch.keys()
    assert learnt(plain, batch).startswith("It is red.<|")
    for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(expected[name], batch[name]), name


def test_a_template_may_say_generation_without_marking_answers():
    processor = make_processor("chatml without generation")
    rows = [dialogue("What color?", "Red.")]
    expected = DuoStreamDataCollator(processor)(rows)
    processor.chat_template = "{#- Written for text generation. -#}" + processor.chat_template
    batch = DuoStreamDataCollator(processor)(rows)
    assert torch.equal(batch["labels"], expected["labels"])


def test_a_template_that_rewrites_earlier_turns_and_marks_no_answers_is_refused():
    processor = make_processor("chatml without generation")
    # As some reasoning models' do: an answer is shortened once it is not the last
    processor.chat_template = processor.chat_template.replace(
        "message['content'] + '<|im_end|>\\n'", "(message['content'] if loop.last else '...') + '<|im_end|>\\n'"
    )
    collator = DuoStreamDataCollator(processor)
    with pytest.raises(ValueError, match="Row 0 of the batch: the chat template rewrites earlier turns"):
        collator([dialogue("What?", "That.", "Why?", "So.")])


def test_the_token_right_after_a_picture_is_never_learnt(byte_processor):
    processor = make_processor("bytes")
    processor.chat_template = (
        "{%- for message in messages -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
        "<|image|>{%- elif message['role'] == 'assistant' -%}{%- generation -%}{{- part['text'] -}}"
        "{%- endgeneration -%}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    )
    batch = DuoStreamDataCollator(processor)([dialogue("", "abc")])
    assert read(processor, batch) == "<|image|>abc"
    # What an image token predicts is not meant
    assert learnt(processor, batch) == "bc"


def test_of_a_prompt_nothing_is_learnt_however_many_pieces_of_it_a_template_marks(byte_processor):
    processor = make_processor("bytes")
    # Each part by itself, and none of a message that has a name
    processor.chat_template = (
        "{%- for message in messages -%}<{{ message['role'] }}>{%- for part in message['content'] -%}"
        "{%- if message['role'] == 'assistant' and not message['name'] -%}{%- generation -%}{{- part['text'] -}}"
        "{%- endgeneration -%}{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    )
    asked = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    completion = [{"role": "assistant", "content": [{"type": "text", "text": "So"}, {"type": "text", "text": "."}]}]
    for said in ({"content": parts}, {"content": parts[:1]}, {"content": parts, "name": "tool"}):
        row = {"images": [], "prompt": [*asked, {"role": "assistant", **said}, *asked], "completion": completion}
        batch = DuoStreamDataCollator(processor)([row])
        assert learnt(processor, batch) == "So."
    # A template may refuse what doesn't end with an answer
    refusal = "{{ raise_exception('No answer.') if messages[-1]['role'] == 'user' }}"
    processor.chat_template = refusal + processor.chat_template
    row["prompt"] = [*asked, {"role": "assistant", "content": parts[:1]}, *asked]
    assert learnt(processor, DuoStreamDataCollator(processor)([row])) == "So."


def test_rows_are_padded_on_the_right(processor):
    short, long = dialogue("What?", "That."), dialogue("What color is the square?", "It is red.", "Why?", "So.")
    processor.tokenizer.padding_side = "left"  # as `generate` wants it
    batch = DuoStreamDataCollator(processor)([short, long])
    processor.tokenizer.padding_side = "right"
    length = int(batch["attention_mask"][0].sum())
    assert length < batch["input_ids"].shape[1]
    assert batch["attention_mask"].tolist()[0] == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert batch["attention_mask"][1].all()
    assert (batch["input_ids"][0, length:] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][0, length:] == -100).all()
    assert (batch["mm_token_type_ids"][0, length:] == 0).all()


def test_padding_without_a_padding_token_is_not_seen():
    processor = make_processor("chatml")
    assert processor.tokenizer.pad_token_id is None
    batch = DuoStreamDataCollator(processor)([dialogue("What?", "That."), dialogue("What color?", "It is red.")])
    assert read(processor, batch, 0).endswith("assistant\nThat.<|im_end|>\n")


@pytest.mark.parametrize("multiple", [8, 64])
def test_rows_are_padded_to_a_multiple(processor, multiple):
    rows = [dialogue("What?", "That."), dialogue("What color?", "It is red.")]
    batch = DuoStreamDataCollator(processor, pad_to_multiple_of=multiple)(rows)
    plain = DuoStreamDataCollator(processor)(rows)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        length = plain[name].shape[1]
        assert batch[name].shape[1] == -(-length // multiple) * multiple
        assert torch.equal(batch[name][:, :length], plain[name])
    assert not batch["attention_mask"][:, length:].any()


texts = st.text(max_size=12)
rows_of_any_kind = st.builds(
    dialogue, texts, texts, texts, texts, num_images=st.integers(min_value=0, max_value=2)
) | st.builds(question, texts, texts, num_images=st.integers(min_value=0, max_value=2))


@given(rows=st.lists(rows_of_any_kind, min_size=1, max_size=4))
@settings(max_examples=25)
def test_rows_collated_together_are_each_row_collated_and_padded(processor, rows):
    collator = DuoStreamDataCollator(processor)
    batch = collator(rows)
    pixel_values = []
    fillers = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
    for i, row in enumerate(rows):
        alone = collator([row])
        for name, filler in fillers.items():
            length = alone[name].shape[1]
            assert torch.equal(batch[name][i, :length], alone[name][0])
            assert (batch[name][i, length:] == filler).all()
        pixel_values += list(alone.get("pixel_values", []))
    if pixel_values:
        assert torch.equal(batch["pixel_values"], torch.stack(pixel_values))
    else:
        assert "pixel_values" not in batch


@pytest.mark.parametrize(
    ("numbers", "images_per_row"), [([1, 1], 1), ([2, 2, 2], 2), ([1, 2], None), ([0, 1], None), ([0, 0], None)]
)
def test_images_per_row_is_told_only_where_it_is_the_same_for_all(processor, numbers, images_per_row):
    batch = DuoStreamDataCollator(processor)([dialogue("What?", "That.", num_images=number) for number in numbers])
    assert batch.get("images_per_row") == images_per_row


def test_rows_without_pictures_need_no_images(processor):
    messages = dialogue("What?", "That.", num_images=0)["messages"]
    rows = [{"messages": messages}, {"messages": messages, "images": None}, {"messages": messages, "images": []}]
    batch = DuoStreamDataCollator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "mm_token_type_ids", "labels", "targets_per_row"}
    assert not batch["mm_token_type_ids"].any()


def test_pictures_go_where_their_markers_stand(processor):
    rows = [dialogue("What?", "That.", num_images=2), dialogue("What?", "That.", num_images=0)]
    rows.append({"images": [picture(250)], "messages": [user("Hi"), assistant("Ho"), user("", 1), assistant("Hm")]})
    batch = DuoStreamDataCollator(processor)(rows)
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == IMAGE)
    assert batch["mm_token_type_ids"].sum(dim=1).tolist() == [2 * NUM_TOKENS, 0, NUM_TOKENS]
    reds = batch["pixel_values"][:, 0].mean(dim=(1, 2))
    assert reds.tolist() == sorted(reds.tolist())
    assert read(processor, batch, 2) == "<|user|>Hi<|assistant|>Ho<|end|><|user|><|image|><|assistant|>Hm<|end|>"


def test_pictures_may_be_paths(processor, tmp_path):
    row = dialogue("What?", "That.")
    row["images"][0].save(tmp_path / "a.png")
    expected = DuoStreamDataCollator(processor)([row])["pixel_values"]
    for path in (str(tmp_path / "a.png"), tmp_path / "a.png"):
        row["images"] = [path]
        assert torch.equal(DuoStreamDataCollator(processor)([row])["pixel_values"], expected)


def test_pictures_may_be_arrays(processor):
    row = dialogue("What?", "That.")
    pixels = np.asarray(row["images"][0])
    expected = DuoStreamDataCollator(processor)([row])["pixel_values"]
    channels_first = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    for images in ([pixels], [channels_first], pixels[None]):
        batch = DuoStreamDataCollator(processor)([{**row, "images": images}])
        assert torch.equal(batch["pixel_values"], expected)
    gray = {**row, "images": [Image.fromarray(pixels[..., 0])]}
    assert torch.equal(
        DuoStreamDataCollator(processor)([{**row, "images": [pixels[..., 0]]}])["pixel_values"],
        DuoStreamDataCollator(processor)([gray])["pixel_values"],
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_arrays_with_a_transparency_are_read_on_white_as_pictures_are(processor, axes):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 4), dtype=np.uint8)
    row = dialogue("What?", "That.")
    expected = DuoStreamDataCollator(processor)([{**row, "images": [Image.fromarray(pixels)]}])["pixel_values"]
    array = pixels.transpose(axes)
    assert torch.equal(DuoStreamDataCollator(processor)([{**row, "images": [array]}])["pixel_values"], expected)


def test_pictures_of_any_mode_and_size_fit_together(processor):
    rows = [dialogue("What?", "That.") for _ in range(3)]
    rows[1]["images"] = [Image.new("L", (7, 30), 90)]
    rows[2]["images"] = [Image.new("RGBA", (64, 9), (9, 9, 9, 100))]
    assert DuoStreamDataCollator(processor)(rows)["pixel_values"].shape == (3, 3, 16, 16)


def test_marker_and_control_tokens_in_what_is_said_stay_text(processor):
    said = "a <|image|> or <|assistant|> <|end|>"
    batch = DuoStreamDataCollator(processor)([dialogue(said, said)])
    ids = batch["input_ids"][0].tolist()
    assert (ids.count(IMAGE), ids.count(ASSISTANT), ids.count(END)) == (NUM_TOKENS, 1, 1)
    assert learnt(processor, batch) == f"{said}<|end|>"
    assert batch["labels"][0].tolist().count(END) == 1


def long_row():
    return dialogue("abcd", "efgh", "ij", "kl")


def test_a_long_row_loses_text_and_says_how_much_of_its_answers(byte_processor, caplog):
    # <|user|> [picture] a b c d <|assistant|> e f g h <|end|> <|user|> i j <|assistant|> k l <|end|>
    whole = DuoStreamDataCollator(byte_processor)([long_row()])
    assert whole["input_ids"].shape[1] == 22
    with caplog.at_level(logging.WARNING):
        batch = DuoStreamDataCollator(byte_processor, max_length=14)([{**long_row(), "row": 7}])
    assert read(byte_processor, batch) == "<|user|><|image|>abcd<|assistant|>efgh"
    assert learnt(byte_processor, batch) == "efgh"
    assert [record.message for record in caplog.records] == [
        "Row 7 was cut to `max_length=14` tokens; 4 tokens of answers are lost"
    ]


def test_a_picture_behind_the_cut_stays_whole(byte_processor):
    row = {"images": [picture()], "messages": [user("ab"), assistant("cd"), user("e", 1), assistant("f")]}
    batch = DuoStreamDataCollator(byte_processor, max_length=9)([row])
    assert read(byte_processor, batch) == "<|user|>ab<|assistant|>c<|image|>"
    assert batch["mm_token_type_ids"].sum() == NUM_TOKENS
    assert learnt(byte_processor, batch) == "c"


def test_the_tokenizers_truncation_side_is_kept_to():
    processor = make_processor("bytes")
    processor.tokenizer.truncation_side = "left"
    batch = DuoStreamDataCollator(processor, max_length=8)([long_row()])
    assert read(processor, batch) == "<|image|><|assistant|>kl<|end|>"
    assert learnt(processor, batch) == "kl<|end|>"


def test_what_comes_right_after_a_picture_only_by_the_cut_is_not_learnt():
    processor = make_processor("bytes")
    processor.tokenizer.truncation_side = "left"
    batch = DuoStreamDataCollator(processor, max_length=6)([long_row()])
    assert read(processor, batch) == "<|image|>l<|end|>"
    assert learnt(processor, batch) == "<|end|>"


def test_a_row_that_fits_is_not_cut_and_nothing_is_said(byte_processor, caplog):
    with caplog.at_level(logging.WARNING):
        batch = DuoStreamDataCollator(byte_processor, max_length=22)([long_row()])
    assert torch.equal(batch["input_ids"], DuoStreamDataCollator(byte_processor)([long_row()])["input_ids"])
    assert not caplog.records


def test_a_row_whose_pictures_alone_are_too_long_names_itself(byte_processor):
    collator = DuoStreamDataCollator(byte_processor, max_length=7)
    with pytest.raises(ValueError, match=r"^Row 5[^:]*: pictures take 8 tokens, more than `max_length`=7"):
        collator([{**dialogue("a", "b", num_images=2), "row": 5}])


def test_with_a_prefix_that_is_read_both_ways_types_start_at_the_first_answer():
    processor = make_processor(bidirectional_prefix=True)
    rows = [dialogue("What color?", "Red.", "Where?", "Left."), question("What?", "That.")]
    batch = DuoStreamDataCollator(processor)(rows)
    for ids, types in zip(batch["input_ids"].tolist(), batch["token_type_ids"].tolist(), strict=True):
        start = ids.index(ASSISTANT)
        assert types == [0] * start + [1] * (len(ids) - start)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape


def test_a_causal_prefix_has_no_types(processor):
    assert "token_type_ids" not in DuoStreamDataCollator(processor)([dialogue("What?", "That.")])


def in_use(processor, messages, images):
    """What `apply_chat_template` gives when the model is to answer."""
    pictures = iter(images)
    conversation = [
        {
            **message,
            "content": [
                {"type": "image", "image": next(pictures)} if piece["type"] == "image" else piece
                for piece in message["content"]
            ],
        }
        for message in messages
    ]
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


FOREIGN = ["metaspace", "metaspace everywhere", "space before", "line ends merged"]
FOREIGN += [f"{kind}, own template" for kind in ("chatml", *FOREIGN, "no line ends")]


@pytest.mark.parametrize("kind", ["own", "chatml", "chatml without generation", *FOREIGN])
@pytest.mark.parametrize("num_turns", [1, 2])
@pytest.mark.parametrize("bidirectional_prefix", [False, True])
def test_the_prompt_in_training_is_the_prompt_in_use(kind, num_turns, bidirectional_prefix):
    processor = make_processor(kind, bidirectional_prefix=bidirectional_prefix)
    row = dialogue("What color is it?", "It is red.", "Is it?", "Ein großer Kreis")
    row = {**row, "messages": row["messages"][: 2 * num_turns]}
    batch = DuoStreamDataCollator(processor)([row])
    prompt = in_use(processor, row["messages"][:-1], row["images"])
    length = prompt["input_ids"].shape[1]
    for name in ("input_ids", "mm_token_type_ids", *(["token_type_ids"] if bidirectional_prefix else [])):
        assert batch[name][:, :length].tolist() == prompt[name].tolist(), name
    assert torch.equal(batch["pixel_values"], prompt["pixel_values"])
    if bidirectional_prefix:
        is_prefix = batch["token_type_ids"][0] == 0
        assert "What color is it?" in processor.decode(batch["input_ids"][0][is_prefix])
        assert (batch["labels"][0][is_prefix] == -100).all()
    # All of the last answer, and nothing before it, comes behind the prompt
    assert (batch["labels"][0, length:] != -100).all()
    assert batch["labels"][0, length - 1] == -100
    assert row["messages"][-1]["content"][0]["text"] in processor.decode(batch["input_ids"][0, length:])


@pytest.mark.parametrize("template", ["", ", own template"])
def test_no_text_is_lost_where_a_line_end_is_read_as_a_space(template):
    processor = make_processor("no line ends" + template)
    batch = DuoStreamDataCollator(processor)([dialogue("What color is it?", "It is red.", "Is it?", "Ein Kreis")])
    assert "".join(learnt(processor, batch).split()) == "Itisred.<|im_end|>EinKreis<|im_end|>"


@pytest.mark.parametrize("kind", ["metaspace everywhere", "space before", "line ends merged"])
def test_a_line_end_that_an_answer_begins_with_is_learnt(kind):
    processor = make_processor(kind)
    batch = DuoStreamDataCollator(processor)([dialogue("What?", "\n\nIt is red.", num_images=0)])
    assert learnt(processor, batch).startswith("\n\nIt is red.<|im_end|>")


@pytest.mark.parametrize("kind", ["chatml", "own"])
def test_a_conversation_may_begin_with_the_assistant_where_the_template_reads_the_first_message(kind):
    processor = make_processor(kind)
    processor.chat_template = (
        "{%- if messages[0]['role'] != 'system' %}{{ 'Be brief. ' }}{% endif -%}"
        + without_generation(processor.chat_template)
    )
    row = {"images": [], "messages": [assistant("Hello."), user("What?"), assistant("That.")]}
    batch = DuoStreamDataCollator(processor)([row])
    assert read(processor, batch) == processor.apply_chat_template(row["messages"])
    ends = {"own": "<|end|>", "chatml": "<|im_end|>\n"}[kind]
    assert learnt(processor, batch) == f"Hello.{ends}That.{ends}"


def framed_processor(**kwargs):
    """With a tokenizer that puts tokens around a text."""
    tokenizer = train_tokenizer([], 263)
    tokenizer.add_special_tokens({"bos_token": "<s>", "sep_token": "</s>"})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=marks
    )
    tokenizer.truncation_side = kwargs.pop("truncation_side", "right")
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return DuoStreamProcessor(image_processor, tokenizer, image_seq_length=NUM_TOKENS, **kwargs)


@pytest.mark.parametrize("text", ["Hello", ""])
@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("max_length", [None, 11])
@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_a_text_without_a_chat_is_laid_out_as_in_use(text, num_images, max_length, truncation_side):
    processor = framed_processor(truncation_side=truncation_side)
    pictures = [picture(40 * i) for i in range(num_images)]
    batch = DuoStreamDataCollator(processor, max_length=max_length)([{"images": pictures, "text": text}])
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    in_use = processor(text="<|image|>" * num_images + text, images=pictures or None, **options)
    for name in ("input_ids", "mm_token_type_ids"):
        assert batch[name].tolist() == in_use[name], name
    assert processor.decode(batch["input_ids"][0][[0, -1]]) == "<s></s>"
    assert not (batch["labels"][0] == IMAGE).any()


@pytest.mark.parametrize("asked", ["Tell me.", "Tell me", "Is it?", "Tell me. <", ""])
def test_a_prefix_ends_at_the_role_marker_that_goes_on_a_token_before_it(asked):
    def merging(chat_template):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        return chatml_tokenizer(*byte_level, chat_template, texts=["<p>end.</p>", "x.<b>y</b>.<"] * 9)

    own = make_processor()
    processor = DuoStreamProcessor(
        own.image_processor, merging(None), image_seq_length=NUM_TOKENS, bidirectional_prefix=True
    )
    assert ".<" in processor.tokenizer.get_vocab()
    row = dialogue(asked, "Red.", "Why.", "So.")
    batch = DuoStreamDataCollator(processor)([row])
    prefix = batch["input_ids"][0][batch["token_type_ids"][0] == 0]
    assert f"{processor.decode(prefix)}<".replace(".<", "<").endswith(f"{asked.removesuffix('.')}<")
    for messages in (row["messages"][:1], row["messages"][:3]):
        types = in_use(processor, messages, row["images"])["token_type_ids"]
        assert int((types == 0).sum()) == len(prefix)


def test_a_prefix_in_use_ends_at_the_first_answer_though_that_goes_on_a_token_of_its_marker():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = chatml_tokenizer(*byte_level, CHATML, texts=["\n\n"] * 9)
    assert "ĊĊ" in tokenizer.get_vocab()
    processor = DuoStreamProcessor(
        make_processor().image_processor, tokenizer, image_seq_length=NUM_TOKENS, bidirectional_prefix=True
    )
    row = dialogue("What?", "\n\nRed.", "Why?", "So.")
    types = DuoStreamDataCollator(processor)([row])["token_type_ids"]
    assert (
        (in_use(processor, row["messages"][:3], row["images"])["token_type_ids"] == 0).sum() == (types == 0).sum() > 0
    )


def test_a_prefix_whose_end_a_row_does_not_show_names_the_row():
    processor = make_processor("chatml", bidirectional_prefix=True)
    # As some reasoning models': a prompt ends with what a conversation hasn't
    processor.chat_template = processor.chat_template.replace(
        "assistant\\n' }}{% endif", "assistant\\n<think></think>' }}{% endif"
    )
    with pytest.raises(ValueError, match=r"Row 7: expected 1 role markers '<\|im_start\|>assistant.* found 0"):
        DuoStreamDataCollator(processor)([{**dialogue("What?", "That."), "row": 7}])


@given(first=st.text(max_size=15), reply=st.text(max_size=15), second=st.text(max_size=15))
@settings(max_examples=25)
def test_any_prompt_in_training_is_the_prompt_in_use(processor, first, reply, second):
    row = dialogue(first, reply, second, "It is red.")
    ids = DuoStreamDataCollator(processor)([row])["input_ids"][0].tolist()
    prompt = in_use(processor, row["messages"][:-1], row["images"])["input_ids"][0].tolist()
    assert ids == [*prompt, *processor.tokenizer.encode("It is red."), END]


TOOLS = [{"type": "function", "function": {"name": "color_of", "description": "The color <|image|> of a thing."}}]
WRITES_TOOLS = "{% if tools %}Tools: {{ tools | tojson }}{% endif %}"
WRITES_CALLS = "{{ message['tool_calls'] | tojson if message['tool_calls'] }}"


@pytest.mark.parametrize("kind", ["own", "chatml without generation"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [], "[]", "", None], ids=str)
def test_tools_of_a_row_are_given_to_the_template_as_in_use(kind, tools):
    processor = make_processor(kind)
    processor.chat_template = WRITES_TOOLS + processor.chat_template
    row = dialogue("What color is it?", "It is red.", num_images=0)
    given = DuoStreamDataCollator(processor)([{**row, "tools": tools}])
    prompt = processor.apply_chat_template(
        row["messages"][:1],
        tools=TOOLS if "color_of" in str(tools) else None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    assert given["input_ids"][0, : len(prompt)].tolist() == prompt
    assert ("color_of" in read(processor, given)) == ("color_of" in str(tools))
    assert learnt(processor, given).startswith("It is red.<|")
    turns = {"images": [], "tools": tools, "conversations": [{"messages": row["messages"]}]}
    assert torch.equal(DuoStreamDataCollator(processor)([turns])["input_ids"], given["input_ids"])
    with pytest.raises(ValueError, match=r"^Row 0 of the batch: Tools should either be a JSON schema"):
        DuoStreamDataCollator(processor)([{**row, "tools": ["weather"]}])


@pytest.mark.parametrize("kind", ["own", "chatml"])
def test_calls_and_pictures_in_openais_form_are_read_as_in_use(kind):
    processor = make_processor(kind)
    processor.chat_template = re.sub(r"{%-? generation -?%}", r"\g<0>" + WRITES_CALLS, processor.chat_template)
    call = {"type": "function", "function": {"name": "color_of", "arguments": {"thing": "square"}}}
    messages = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, part("What color is it?")],
            "tool_calls": None,
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "red", "tool_calls": None},
        {"role": "assistant", "content": "It is red.", "tool_calls": None},
    ]
    before = copy.deepcopy(messages)
    batch = DuoStreamDataCollator(processor)([{"images": [picture()], "messages": messages}])
    assert messages == before
    assert read(processor, batch) == processor.apply_chat_template(messages)
    assert "It is red." in learnt(processor, batch)
    assert '"square"' in learnt(processor, batch) and "What color" not in learnt(processor, batch)


@pytest.mark.parametrize("kind", ["own", "chatml without generation"])
def test_tools_that_the_template_would_leave_out_name_their_row(kind):
    processor = make_processor(kind)
    several = make_processor(kind)
    several.chat_template = {"default": processor.chat_template, "tool_use": WRITES_TOOLS + WRITES_CALLS}
    call = {"type": "function", "function": {"name": "color_of", "arguments": {"thing": "square"}}}
    asked = dialogue("What color is it?", "It is red.", num_images=0)["messages"]
    called = [*asked[:1], {"role": "assistant", "content": None, "tool_calls": [call]}, *asked[1:]]
    for collate in (DuoStreamDataCollator(processor), DuoStreamDataCollator(several)):
        for tools in (TOOLS, json.dumps(TOOLS)):
            with pytest.raises(ValueError, match=r"^Row 7: the chat template writes no `tools`"):
                collate([{"images": [], "messages": asked, "tools": tools, "row": 7}])
        for row in ({"messages": called}, {"prompt": called[:2], "completion": called[2:]}):
            with pytest.raises(ValueError, match=r"^Row 7: the chat template writes no `tool_calls`"):
                collate([{"images": [], **row, "row": 7}])


def broken(**columns):
    """A good row with other columns."""
    return {**dialogue("What?", "That."), **columns}


class NotAPicture:
    pass


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (broken(messages=[user("What?", 1)]), "no message of the assistant to learn from"),
        (broken(messages=[]), "there are no messages"),
        (
            {"images": [], "question": "What?", "answer": "That."},
            r"expected `messages`, or `prompt` and `completion`, or `text`; its columns are \['answer', 'images'",
        ),
        ({"prompt": [user("What?")]}, r"its columns are \['prompt'"),
        (
            {"images": [], "prompt": [user("Hi"), assistant("Ho")], "completion": [user("Why?")]},
            "no message of the assistant to learn from",
        ),
        (broken(images=[]), "1 picture markers but 0 pictures"),
        (broken(images=[picture(), picture()]), "1 picture markers but 2 pictures"),
        (broken(images=None), "1 picture markers but 0 pictures"),
        (broken(images=["/nowhere/a.png"]), "a picture can't be read"),
        (broken(images=picture()), "expected a list of pictures in `images`, not <PIL"),
        (broken(images="/nowhere/a.png"), "expected a list of pictures in `images`, not '/nowhere"),
        (broken(images=np.zeros((9, 9, 3), np.uint8)), "expected a list of pictures in `images`, not array"),
        (broken(images=[np.zeros((9, 9, 3))]), "a picture can't be read: an array of float64; expected .* `uint8`"),
        (
            {"image": picture(), "messages": dialogue("What?", "That.", num_images=0)["messages"]},
            "a picture in `image`: expected a list of pictures in `images`",
        ),
        (broken(tools='[{"type"'), "`tools` is .* no JSON"),
        (broken(tools={"type": "function"}), "`tools` is .* expected a list of JSON schemas"),
        (broken(tools=["weather"]), r"the chat template writes no `tools`, which are \['weather'\]"),
        (broken(images=[NotAPicture()]), "a picture can't be read"),
        (broken(messages=None), ""),
        (broken(messages="What?"), ""),
        (broken(messages=[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]), ""),
        (broken(messages=[user("What?", 1), {"role": "assistant", "content": None}]), ""),
    ],
)
@pytest.mark.parametrize("number", [None, 123])
def test_a_broken_row_names_itself(processor, row, message, number):
    row, name = (row, "Row 1 of the batch") if number is None else ({**row, "row": number}, f"Row {number}")
    with pytest.raises(ValueError, match=f"^{name}.*{message}"):
        DuoStreamDataCollator(processor)([dialogue("What?", "That."), row])


@pytest.mark.parametrize("messages", [[user("What?", 1), assistant(None)], [user(None, 1), assistant("That.")]])
def test_a_text_that_is_missing_is_not_read_as_the_word_none(processor, messages):
    with pytest.raises(ValueError, match="Row 4"):
        DuoStreamDataCollator(processor)([broken(messages=messages, row=4)])


def test_a_damaged_picture_file_names_its_row(processor, tmp_path):
    path = tmp_path / "damaged.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:300])
    # Pillow opens it, and only finds the damage when it reads the pixels
    for damaged in (str(path), Image.open(path)):
        with pytest.raises(ValueError, match="Row 9: a picture can't be read"):
            DuoStreamDataCollator(processor)([broken(images=[damaged], row=9)])


def test_a_user_marker_does_not_make_up_for_a_missing_picture(processor):
    row = {"row": 3, "images": [picture()], "messages": [user("What is <|image|>?"), assistant("A marker.")]}
    with pytest.raises(ValueError, match="Row 3 has 0 picture markers but 1 pictures"):
        DuoStreamDataCollator(processor)([row])


@pytest.mark.parametrize("as_given", [lambda each: each, torch.Tensor.numpy, torch.Tensor.tolist])
def test_states_of_pictures_stand_in_their_place(processor, as_given):
    rows = [dialogue("What?", "That.", num_images=number) for number in (2, 0, 1)]
    given_states = [states(len(row["images"])) for row in rows]
    expected = DuoStreamDataCollator(processor)(rows)
    # Pictures that can't be read are not opened
    stored = [
        {**row, "images": ["/nowhere/a.png"] * len(own), "image_features": [as_given(each) for each in own]}
        for row, own in zip(rows, given_states, strict=True)
    ]
    batch = DuoStreamDataCollator(processor)(stored)
    assert batch.keys() == (expected.keys() - {"pixel_values"}) | {"mm_encoder_outputs"}
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    got = batch["mm_encoder_outputs"]["image"].last_hidden_state
    torch.testing.assert_close(got, torch.stack(given_states[0] + given_states[2]))
    assert DuoStreamDataCollator(processor)(stored[:1])["images_per_row"] == 2
    assert "mm_encoder_outputs" not in DuoStreamDataCollator(processor)(stored[1:2])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (states(2), "Row 7 has 1 picture markers but 2 pictures"),
        ([], "Row 7 has 1 picture markers but 0 pictures"),
        (states(length=3), r"Row 7: `image_features` .* \(3, 8\).*expected fractions of shape \(4, image_hidden"),
        ([torch.rand(4)], r"Row 7: `image_features` .* \(4,\)"),
        (states(dtype=torch.float64)[0].long()[None], r"Row 7: `image_features` .* torch.int64"),
        ("states", "Row 7: `image_features` are no numbers"),
        (3, "Row 7: `image_features` are no numbers"),
        (states(width=9), "Row 7 has states of width 9 in torch.float32, but Row 6 has states of width 8"),
        (states(dtype=torch.float16), "Row 7 has states of width 8 in torch.float16, but Row 6 has .* torch.float32"),
        (None, "Row 7 has a picture, but Row 6 has states of width 8"),
    ],
)
def test_states_that_do_not_fit_name_their_row(processor, features, message):
    rows = [broken(image_features=states(), row=6), broken(image_features=features, row=7)]
    with pytest.raises(ValueError, match=message):
        DuoStreamDataCollator(processor)(rows)


@pytest.fixture
def prefix_processor():
    tokenizer = train_tokenizer([], 263)
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return DuoStreamProcessor(image_processor, tokenizer, image_seq_length=NUM_TOKENS, bidirectional_prefix=True)


@pytest.mark.parametrize("max_length", [None, 40, 30, 20, 12, 6])
def test_nothing_is_learnt_within_a_prefix_whatever_is_cut_off(prefix_processor, max_length):
    prefix_processor.tokenizer.truncation_side = "left"
    row = dialogue("what is it", "one two three", "and that", "a dog")
    batch = DuoStreamDataCollator(prefix_processor, max_length=max_length)([row])
    is_learnt, types = batch["labels"] != -100, batch["token_type_ids"]
    assert is_learnt.any() and not (is_learnt & (types == 0)).any()
    prompt = prefix_processor.apply_chat_template(row["messages"])
    options = {"truncation": True, "max_length": max_length} if max_length else {}
    # In use as in training
    inputs = prefix_processor(
        images=row["images"], text=prompt, add_special_tokens=False, return_tensors="pt", **options
    )
    assert torch.equal(inputs["input_ids"], batch["input_ids"])
    assert torch.equal(inputs["token_type_ids"], types)


def test_a_text_without_a_chat_has_no_prefix_though_it_spells_the_marker_of_answers(prefix_processor):
    prefix_processor.chat_template = (
        "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{% for part in m.content %}"
        "{{ part.text }}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    text = "USER: one two ASSISTANT: three"
    for collate in (DuoStreamDataCollator(prefix_processor), DuoStreamDataCollator(prefix_processor, packing=True)):
        batch = collate([{"images": [], "text": text}, {"images": [], "text": "one"}])
        assert (batch["token_type_ids"] == 1).all()
    inputs = prefix_processor(text=text, text_kwargs={"split_special_tokens": True})
    assert inputs["token_type_ids"] == [[1] * len(inputs["input_ids"][0])]


def test_labels_of_the_first_column_are_counted_which_virtual_tokens_predict(processor):
    batch = DuoStreamDataCollator(processor)([{"images": [], "text": "one two three"}])
    assert batch["targets_per_row"] == (batch["labels"] != -100).sum() == batch["labels"].shape[1]
