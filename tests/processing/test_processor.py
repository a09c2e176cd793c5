import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, BertTokenizer, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from duostream import DuoStreamProcessor, train_tokenizer

NUM_TOKENS = 4  # a picture's
IMAGE, USER, ASSISTANT = 2, 3, 4  # ids in a trained tokenizer
TEXTS = ["What color is the square?", "It is red.", "Ein großer roter Kreis", "左上角有一个红色圆形"]

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


def picture(shade=0, size=(20, 16)):
    return Image.new("RGB", size, (shade, 255 - shade, 30))


def image_processor():
    return SiglipImageProcessorPil(size={"height": 16, "width": 16})


def chatml_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer = train_tokenizer(TEXTS, 300)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "red", "user", "assistant", "<", ">", "|"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


@pytest.fixture(scope="module")
def processor():
    return DuoStreamProcessor(image_processor(), train_tokenizer(TEXTS, 300), image_seq_length=NUM_TOKENS)


@pytest.fixture(scope="module")
def prefix_processor():
    return DuoStreamProcessor(
        image_processor(), train_tokenizer(TEXTS, 300), image_seq_length=NUM_TOKENS, bidirectional_prefix=True
    )


def text(content):
    return {"type": "text", "text": content}


def image(shade=0, **kwargs):
    return {"type": "image", "image": picture(shade, **kwargs)}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(content):
    return {"role": "assistant", "content": [text(content)]}


CONVERSATIONS = {
    "one picture": [user(image(), text("What color?"))],
    "several pictures": [user(text("Compare "), image(10), text(" and "), image(200), image(90))],
    "several turns": [user(image(), text("Color?")), assistant("It is red."), user(text("And "), image(99))],
    "text only": [user(text("What is red?"))],
    "content as a string": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is red?"},
    ],
}


def tokenize(processor, conversation, **kwargs):
    # A copy, because the library puts lists where conversations have other sequences
    return processor.apply_chat_template(
        copy.deepcopy(conversation), tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs
    )


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


# What a call gives


def test_a_marker_becomes_as_many_placeholders_as_a_picture_has_tokens(processor):
    outputs = processor(text="a<|image|>b<|image|>", images=[picture(), picture(9)])
    a, b = processor.tokenizer.encode("a"), processor.tokenizer.encode("b")
    assert outputs["input_ids"] == [[*a, *[IMAGE] * NUM_TOKENS, *b, *[IMAGE] * NUM_TOKENS]]


def test_mm_token_types_tell_pictures_from_text_and_padding(processor):
    outputs = processor(
        text=["a<|image|>b", "a<|image|><|image|>bcd"],
        images=[[picture()], [picture(), picture()]],
        padding=True,
        return_tensors="pt",
    )
    assert outputs["mm_token_type_ids"].tolist() == (outputs["input_ids"] == IMAGE).long().tolist()
    assert outputs["mm_token_type_ids"].sum(dim=1).tolist() == [NUM_TOKENS, 2 * NUM_TOKENS]
    assert outputs["pixel_values"].shape == (3, 3, 16, 16)


def test_pictures_stay_in_the_order_of_their_markers(processor):
    shades = [10, 80, 160]
    nested = processor(
        text=["<|image|>", "<|image|><|image|>"],
        images=[[picture(shades[0])], [picture(shades[1]), picture(shades[2])]],
    )
    flat = processor(text=["<|image|>", "<|image|><|image|>"], images=[picture(shade) for shade in shades])
    means = [float(np.mean(pixels[0])) for pixels in nested["pixel_values"]]
    assert means == sorted(means)
    assert equal(nested, flat)


def test_text_alone_needs_no_picture_and_a_picture_no_text(processor):
    assert set(processor(text=["a", "bc"])) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert set(processor(images=[picture()])) == {"pixel_values"}


@pytest.mark.parametrize("has_picture", [(True, False), (False, True), (False, True, False, True)])
def test_rows_with_and_without_pictures_go_together(processor, has_picture):
    outputs = processor(
        text=["<|image|>a" if has else "a" for has in has_picture],
        images=[[picture()] if has else [] for has in has_picture],
    )
    assert [row.count(IMAGE) for row in outputs["input_ids"]] == [NUM_TOKENS * has for has in has_picture]
    assert len(outputs["pixel_values"]) == sum(has_picture)


def test_outputs_carry_nothing_but_what_model_input_names_says(processor, prefix_processor):
    for each in (processor, prefix_processor):
        outputs = each(text=["<|image|>a"], images=[picture()])
        assert set(outputs) == set(each.model_input_names)
        assert len(each.model_input_names) == len(set(each.model_input_names))
    assert "token_type_ids" in prefix_processor.model_input_names
    assert "token_type_ids" not in processor.model_input_names


def test_placeholders_are_counted_for_pictures_of_any_size(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[[16, 20], [640, 480], [1, 1]])
    assert counts["num_image_tokens"] == [NUM_TOKENS] * 3
    assert counts["num_image_patches"] == [1] * 3
    given = processor(text="<|image|>" * 3, images=[picture(size=(20, 16)), picture(size=(480, 640)), picture()])
    assert given["input_ids"][0].count(IMAGE) == sum(counts["num_image_tokens"])


def test_a_picture_must_have_tokens():
    with pytest.raises(ValueError, match="`image_seq_length` is 0"):
        DuoStreamProcessor(image_processor(), train_tokenizer(TEXTS, 300), image_seq_length=0)


# Markers and pictures that don't match


@pytest.mark.parametrize(
    ("texts", "counts", "message"),
    [
        (["<|image|>a", "b"], [2, 0], r"Row 0 has 1 picture markers '<\|image\|>' but 2 pictures"),
        (["a", "<|image|><|image|>", "b"], [0, 1, 0], "Row 1 has 2 picture markers .* but 1 pictures"),
        # Four of each in all: the totals alone would not show it
        (["<|image|>", "<|image|>" * 3], [2, 2], "Row 0 has 1 picture markers .* but 2 pictures"),
    ],
)
def test_a_row_with_too_many_or_too_few_pictures_is_named(processor, texts, counts, message):
    with pytest.raises(ValueError, match=message):
        processor(text=texts, images=[[picture()] * count for count in counts])


def test_flat_pictures_that_do_not_match_are_refused_with_both_counts(processor):
    with pytest.raises(ValueError, match=r"\[1, 2\] picture markers '<\|image\|>', 3 in all, but there are 2 pict"):
        processor(text=["<|image|>a", "<|image|><|image|>"], images=[picture(), picture()])


def test_pictures_for_another_number_of_rows_are_refused(processor):
    with pytest.raises(ValueError, match="`images` has pictures for 1 rows, but `text` has 2 rows"):
        processor(text=["<|image|>a", "b"], images=[[picture()]])


def test_markers_without_any_picture_are_refused(processor):
    with pytest.raises(ValueError, match=r"2 <\|image\|> tokens .* no images"):
        processor(text=["<|image|>a", "<|image|>b"])


# The chat template


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokenizing_the_chat_template_equals_calling_on_what_it_renders(processor, name):
    conversation = CONVERSATIONS[name]
    rendered = processor.apply_chat_template(copy.deepcopy(conversation), add_generation_prompt=True)
    pictures = [
        part["image"]
        for message in conversation
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image"
    ]
    assert equal(
        tokenize(processor, conversation, return_tensors="pt"),
        processor(text=rendered, images=pictures or None, return_tensors="pt"),
    )


def test_the_chat_template_writes_roles_pictures_and_ends_of_answers(processor):
    rendered = processor.apply_chat_template(CONVERSATIONS["several turns"], add_generation_prompt=True)
    assert rendered == (
        "<|user|><|image|>Color?<|assistant|>It is red.<|end|><|user|>And <|image|><|assistant|>"
    )
    assert processor.apply_chat_template([user(text("a"))]) == "<|user|>a"


def test_content_as_a_string_is_the_same_as_one_text_part(processor):
    as_string = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert processor.apply_chat_template(as_string) == processor.apply_chat_template(
        [user(text("What?")), assistant("That.")]
    )


def test_parts_with_empty_columns_are_as_those_without(processor):
    # Parts of a data set share one schema, so that a picture has a `text` of None
    conversation = [user({"type": "image", "image": picture(), "text": None}, text("a"))]
    assert equal(tokenize(processor, conversation), tokenize(processor, [user(image(), text("a"))]))


def test_a_batch_of_conversations_is_each_of_them_padded(processor):
    conversations = [CONVERSATIONS[name] for name in ("text only", "several pictures", "one picture")]
    batch = tokenize(processor, conversations, return_tensors="pt", processor_kwargs={"padding": True})
    for i, conversation in enumerate(conversations):
        alone = tokenize(processor, conversation)["input_ids"][0]
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == alone
    assert len(batch["pixel_values"]) == 4


@pytest.mark.parametrize("written", ["<|image|>", "<|assistant|>", "<|end|><|user|>", "<|pad|>"])
def test_control_tokens_that_a_user_writes_stay_text(processor, written):
    plain, tricky = user(image(), text("What is a b?")), user(image(), text(f"What is a{written} b?"))
    ids = tokenize(processor, [tricky])["input_ids"][0]
    expected = tokenize(processor, [plain])["input_ids"][0]
    for special in range(6):
        assert ids.count(special) == expected.count(special)
    start = ids.index(IMAGE) + NUM_TOKENS
    assert processor.decode(ids[start:-1]) == f"What is a{written} b?"


def test_user_text_with_the_marker_does_not_become_a_picture(processor):
    outputs = tokenize(processor, [user(text("What does <|image|> mean?"))])
    assert "pixel_values" not in outputs
    assert not any(outputs["mm_token_type_ids"][0])
    assert "What does <|image|> mean?" in processor.decode(outputs["input_ids"][0])


def test_a_marker_in_user_text_takes_no_other_picture_away(processor):
    outputs = tokenize(processor, [user(text("Is <|image|> this? "), image(), text("<|image|>"))])
    ids = outputs["input_ids"][0]
    assert ids.count(IMAGE) == NUM_TOKENS
    # The placeholders stand where the picture does, not at the text before it
    assert processor.decode(ids[1 : ids.index(IMAGE)]) == "Is <|image|> this? "


@given(content=st.text(max_size=40))
@settings(max_examples=40, deadline=None, database=None)
def test_any_user_text_is_kept_exactly_between_the_role_markers(processor, content):
    ids = tokenize(processor, [user(text(content))])["input_ids"][0]
    assert (ids[0], ids[-1]) == (USER, ASSISTANT)
    # The library's own marks of control tokens, which are of a private-use area, are taken out of any text
    assert processor.decode(ids[1:-1]) == content.replace("\U000f0000", "").replace("\U000f0001", "")


def test_a_tokenizer_keeps_its_own_chat_template_with_pictures_added():
    tokenizer = chatml_tokenizer()
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    for name in ("text only", "content as a string"):
        as_strings = [
            {**message, "content": content if isinstance(content := message["content"], str) else content[0]["text"]}
            for message in CONVERSATIONS[name]
        ]
        assert processor.apply_chat_template(
            CONVERSATIONS[name], add_generation_prompt=True
        ) == tokenizer.apply_chat_template(as_strings, add_generation_prompt=True, tokenize=False)
    assert processor.apply_chat_template(CONVERSATIONS["several turns"]) == (
        "<|im_start|>user\n<|image|>Color?<|im_end|>\n<|im_start|>assistant\nIt is red.<|im_end|>\n"
        "<|im_start|>user\nAnd <|image|><|im_end|>\n"
    )
    outputs = tokenize(processor, CONVERSATIONS["several turns"])
    assert outputs["input_ids"][0].count(processor.image_token_id) == 2 * NUM_TOKENS


def test_a_template_given_to_the_processor_wins(processor):
    tokenizer = chatml_tokenizer()
    own = DuoStreamProcessor(image_processor(), tokenizer, chat_template="{{ messages[0]['role'] }}!")
    assert own.apply_chat_template([{"role": "user", "content": "a"}]) == "user!"


def test_the_assistants_tokens_can_be_told(processor):
    outputs = processor.apply_chat_template(
        [user(image(), text("Color?")), assistant("It is red.")],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = [i for i, is_said in zip(outputs["input_ids"][0], outputs["assistant_masks"][0], strict=True) if is_said]
    assert processor.decode(said) == "It is red.<|end|>"


# The image token


def test_a_tokenizer_without_the_image_token_gets_it_behind_its_vocabulary():
    tokenizer = chatml_tokenizer()
    size, specials = len(tokenizer), set(tokenizer.all_special_tokens)
    assert tokenizer.pad_token is None
    del tokenizer
    plain = BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])})
    processor = DuoStreamProcessor(image_processor(), plain, image_seq_length=2)
    assert processor.image_token_id == 6
    assert len(plain) == 7
    ids = processor(text="a<|image|>a", images=[picture()])["input_ids"][0]
    assert ids == [2, 5, 6, 6, 5, 3]
    assert size and specials
