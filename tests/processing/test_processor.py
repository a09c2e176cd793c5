import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import small_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoProcessor, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from duostream import DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer

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
    """As of a language model from elsewhere: no image token, no padding token, and a chat template of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
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
    def is_equal(x, y):
        is_ragged = isinstance(x, list) and not isinstance(x[0], np.ndarray)
        return x == y if is_ragged else np.array_equal(np.asarray(x), np.asarray(y))

    return a.keys() == b.keys() and all(is_equal(a[name], b[name]) for name in a)


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


def test_one_text_and_one_picture_need_no_lists(processor):
    assert equal(
        processor(text="a<|image|>", images=picture(), return_tensors="pt"),
        processor(text=["a<|image|>"], images=[[picture()]], return_tensors="pt"),
    )


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
    assert rendered == ("<|user|><|image|>Color?<|assistant|>It is red.<|end|><|user|>And <|image|><|assistant|>")
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


def test_prompts_to_be_written_on_are_padded_on_the_left(processor):
    processor = copy.deepcopy(processor)
    conversations = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("What?", TEXTS[0])]
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True}}
    assert processor.tokenizer.padding_side == "left"
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        prompts = processor.apply_chat_template(conversations, add_generation_prompt=True, **options)
        assert prompts["attention_mask"][0][0] == 0 and prompts["attention_mask"][0][-1] == 1
        whole = processor.apply_chat_template(conversations, **options)
        assert (whole["attention_mask"][0][0] == 0) == (side == "left")
        for told in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
            as_told = {**options, "processor_kwargs": {"padding": True, **told}}
            prompts = processor.apply_chat_template(conversations, add_generation_prompt=True, **as_told)
            assert prompts["attention_mask"][0][-1] == 0


def test_a_prefix_that_nothing_ends_is_refused():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = CHATML.split("{%- if")[0]
    options = {"image_seq_length": NUM_TOKENS, "bidirectional_prefix": True}
    processor = DuoStreamProcessor(image_processor(), tokenizer, **options)
    with pytest.raises(ValueError, match="nothing tells where the prefix that is read both ways ends"):
        processor(text="What?")


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
    for special in range(7):
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
@settings(max_examples=40)
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


# Reads contents that are lists of parts alone, as of models that have pictures, with another marker than ours
READS_PARTS = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + ': ' -}}
    {%- for part in message['content'] -%}
        {{- '<picture>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif -%}
"""


def test_a_tokenizers_own_template_that_reads_parts_alone_writes_all_texts_and_pictures():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = READS_PARTS
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    expected = "<|im_start|>user: <|image|>Color?<|im_end|><|im_start|>assistant: It is red.<|im_end|>"
    assert processor.apply_chat_template(CONVERSATIONS["several turns"]).startswith(expected)
    as_strings = [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Red."}]
    expected = "<|im_start|>user: Color?<|im_end|><|im_start|>assistant: Red.<|im_end|>"
    assert processor.apply_chat_template(as_strings) == expected
    outputs = tokenize(processor, CONVERSATIONS["several turns"])
    assert outputs["input_ids"][0].count(processor.image_token_id) == 2 * NUM_TOKENS


def test_a_template_that_would_leave_out_what_is_said_is_refused():
    tokenizer = chatml_tokenizer()
    given = DuoStreamProcessor(
        image_processor(), tokenizer, chat_template=READS_PARTS, image_seq_length=NUM_TOKENS, image_token="<picture>"
    )
    as_parts = [user(text("Color?")), {"role": "assistant", "content": [text("Red.")]}]
    assert "Color?" in given.apply_chat_template(as_parts)
    as_strings = [user(text("Color?")), {"role": "assistant", "content": "Red."}]
    message = "the chat template leaves out contents that are strings, as the assistant's 'Red.'"
    with pytest.raises(ValueError, match=message):
        given.apply_chat_template(as_strings)
    with pytest.raises(ValueError, match="Row 0 of the batch: " + message):
        DuoStreamDataCollator(given)([{"images": [], "messages": as_strings}])


# One role's contents as strings, and the other's as parts
READS_BOTH = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' %}{% for part in message['content'] %}{{ part['text'] }}{% endfor -%}
    {%- else %}{{ message['content'] }}{% endif -%}
{%- endfor -%}
"""


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (CHATML.replace("message['content']", "(message['content'] | upper)"), "COLOR?"),
        # On strings it fails, where others write nothing
        (READS_PARTS.replace("part['text']", "part['text'] + ' '"), "<|image|>Color? "),
        ("{{ raise_exception('Never.') if messages | length < 4 }}" + CHATML, "<|image|>Color?"),
        ("{% for message in messages %}{{ message['content'].index('?') }}{% endfor %}", None),
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", None),
        (READS_BOTH, None),
    ],
)
def test_a_template_is_asked_whether_it_writes_and_a_doubt_is_told(template, written, caplog):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    with caplog.at_level("WARNING"):
        processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    asked = [user(image(), text("Color?")), assistant("It is red."), user(text("And?")), assistant("So.")]
    if written is not None:
        assert written in processor.apply_chat_template(asked)
    assert ("fails at, or leaves out, what is said" in caplog.text) == (written is None or "Never" in template)


def test_strings_are_refused_for_the_role_alone_whose_parts_a_template_reads():
    given = DuoStreamProcessor(
        image_processor(), chatml_tokenizer(), chat_template=READS_BOTH, image_seq_length=NUM_TOKENS
    )
    answered = [user(text("Color?")), {"role": "assistant", "content": "Red."}]
    assert given.apply_chat_template(answered) == "Color?Red."
    with pytest.raises(ValueError, match="leaves out contents that are strings, as the user's 'Color"):
        given.apply_chat_template([{"role": "user", "content": "Color?"}])


def test_of_several_chat_templates_the_default_one_is_kept():
    tokenizer = chatml_tokenizer()
    expected = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS).chat_template
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    assert processor.chat_template == expected
    tokenizer.chat_template = {"tool_use": "{{ tools }}"}
    with pytest.raises(ValueError, match=r"\['tool_use'\], and none named 'default'"):
        DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)


CALL = {"type": "function", "function": {"name": "color_of", "arguments": {"thing": "square"}}}
TOOLS = [{"type": "function", "function": {"name": "color_of", "description": "The color of a thing."}}]
WRITES_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ message['tool_calls'] | tojson if message['tool_calls'] }}{% endfor %}"
)


@pytest.mark.parametrize("make", [chatml_tokenizer, lambda: train_tokenizer(TEXTS, 300)], ids=["chatml", "own"])
def test_tools_that_a_template_would_leave_out_are_refused(make):
    processor = DuoStreamProcessor(image_processor(), make(), image_seq_length=NUM_TOKENS)
    asked = [user(text("What color?"))]
    called = [*asked, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    beside = [*asked, {**assistant("Let me see."), "tool_calls": [CALL]}]
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=r"^the chat template writes no `tools`, which are \[\{'type'"):
            processor.apply_chat_template(asked, tools=TOOLS, tokenize=tokenize)
        with pytest.raises(ValueError, match=r"^the chat template writes no `documents`, which are \[\{'title'"):
            processor.apply_chat_template(asked, documents=[{"title": "a", "text": "b"}], tokenize=tokenize)
        for conversation in (called, beside, [asked, called]):
            with pytest.raises(ValueError, match=r"^the chat template writes no `tool_calls`, and the assistant's"):
                processor.apply_chat_template(conversation, tokenize=tokenize)
    idle = [*asked, {**assistant("Red."), "tool_calls": []}, {**asked[0], "tool_calls": None}]
    for tools in (None, []):
        assert processor.apply_chat_template(idle, tools=tools) == processor.apply_chat_template(
            [*asked, assistant("Red."), *asked]
        )


def test_tools_are_left_to_a_template_that_writes_them(processor):
    called = [user(text("What color?")), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert "color of a thing" in processor.apply_chat_template(called, WRITES_CALLS, tools=TOOLS)
    assert '"square"' in processor.apply_chat_template(called, chat_template=WRITES_CALLS)
    several = {"default": processor.chat_template, "tool_use": WRITES_CALLS}
    named = DuoStreamProcessor(
        image_processor(), processor.tokenizer, chat_template=several, image_seq_length=NUM_TOKENS
    )
    assert '"square"' in named.apply_chat_template(called, chat_template="tool_use", tools=TOOLS)
    with pytest.raises(ValueError, match=r"^the chat template writes no `tools`"):
        named.apply_chat_template(called, tools=TOOLS)


def test_several_chat_templates_read_the_same_once_saved(tmp_path):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    for folder in ("first", "second"):
        processor.save_pretrained(tmp_path / folder)
        loaded = AutoProcessor.from_pretrained(tmp_path / folder)
        conversation = [{**CONVERSATIONS["one picture"][0]}, assistant("Red.")]
        for each in (processor, loaded):
            assert each.apply_chat_template(conversation).startswith("<|im_start|>user\n<|image|>What")
        row = {"images": [Image.new("RGB", (16, 16))], "messages": conversation}
        before, after = (DuoStreamDataCollator(each)([row]) for each in (processor, loaded))
        assert torch.equal(before["labels"], after["labels"]) and torch.equal(before["input_ids"], after["input_ids"])
        processor = loaded


def test_a_tokenizer_that_ends_texts_with_a_separator_ends_answers_with_it(tmp_path):
    assert bert_tokenizer().eos_token is None
    processor = DuoStreamProcessor(image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS)
    processor.save_pretrained(tmp_path)
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert each.tokenizer.eos_token_id == each.tokenizer.sep_token_id
        assert each.apply_chat_template([user(text("a")), assistant("b")]) == "<|user|>a<|assistant|>b[SEP]"


@pytest.mark.parametrize("has_template", [True, False])
def test_answers_without_an_end_are_warned_of(has_template, caplog):
    tokenizer = chatml_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = CHATML if has_template else None
    with caplog.at_level("WARNING"):
        DuoStreamProcessor(image_processor(), tokenizer)
    assert any("answers have no end" in record.message for record in caplog.records) != has_template


@pytest.mark.parametrize(
    "option",
    [
        {"stride": 2},
        {"return_overflowing_tokens": True},
        {"is_split_into_words": True},
        {"videos": [[]]},
        {"audio": [0.0]},
    ],
)
def test_what_would_be_left_out_is_refused(processor, option):
    (name,) = option
    for options in ({}, {"truncation": True, "max_length": 4}):
        with pytest.raises(ValueError, match=f"^`{name}` is "):
            processor(text="abcdefgh", **options, **option)
        processor(text="abcdefgh", **options, videos=None, audio=None, stride=0, is_split_into_words=False)


@pytest.mark.parametrize("truncation", [False, True])
def test_a_role_marker_that_no_token_shows_is_refused(truncation):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?<", "!")
    processor = DuoStreamProcessor(image_processor(), tokenizer, bidirectional_prefix=True)
    options = {"truncation": truncation, "max_length": 99}
    types = processor(text=["What.<|assistant|>", "What"], **options)["token_type_ids"]
    assert 0 in types[0] and 1 in types[0] and 0 not in types[1]
    with pytest.raises(
        ValueError, match=r"Row 1: expected 1 role markers '<\|assistant\|>' among its tokens, found 0"
    ):
        processor(text=["What.<|assistant|>", "What?<|assistant|>"], **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_tokenizer_puts_around_a_text_stays_where_the_text_is_cut(side):
    tokenizer = bert_tokenizer()
    tokenizer.truncation_side = side
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    texts = ["a b c red a b", "a b"]
    options = {"truncation": True, "max_length": 5, "padding": True, "return_tensors": "pt"}
    outputs = processor(text=texts, **options, text_kwargs={"return_special_tokens_mask": True})
    expected = tokenizer(texts, **options, return_special_tokens_mask=True)
    for name in ("input_ids", "attention_mask", "special_tokens_mask"):
        assert torch.equal(outputs[name], expected[name])
    assert "special_tokens_mask" not in processor(text=texts, **options)
    with_picture = processor(text=processor.image_token + texts[0], images=picture(), **{**options, "max_length": 8})
    ids = with_picture["input_ids"][0].tolist()
    assert len(ids) == 8 and ids.count(processor.image_token_id) == NUM_TOKENS
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


PAIR = {"text": ["a b c red a", "a"], "text_pair": ["c b a", "b"]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first", "only_second"])
def test_two_texts_are_cut_as_the_tokenizer_cuts_them(truncation, side):
    tokenizer = bert_tokenizer()
    tokenizer.truncation_side = side
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    options = {"truncation": truncation, "max_length": 9, "padding": True, "return_tensors": "pt"}
    expected = tokenizer(**PAIR, **options)["input_ids"]
    assert expected.shape == (2, 9) and (expected[0] == tokenizer.sep_token_id).sum() == 2
    for images in (None, [[], []]):
        assert torch.equal(processor(**PAIR, images=images, **options)["input_ids"], expected)
    in_a_group = {"text_kwargs": {"text_pair": PAIR["text_pair"], **options}}
    assert torch.equal(processor(text=PAIR["text"], **in_a_group)["input_ids"], expected)


@pytest.mark.parametrize("options", [{}, {"truncation": True, "max_length": 6}], ids=["whole", "cut"])
def test_a_text_and_its_pair_are_read_as_the_tokenizer_reads_them(options):
    processor = DuoStreamProcessor(image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS)
    expected = processor.tokenizer("a b c", "red a", **options)["input_ids"]
    assert processor(text="a b c", text_pair="red a", **options)["input_ids"] == [expected]
    with pytest.raises(ValueError, match=r"^Row 1 of `text_pair`: expected text, not 5"):
        processor(text=["a", "b"], text_pair=["a", 5], **options)
    with pytest.raises(ValueError, match=r"^Row 0 of `text_pair` has a marker of a picture; expected them in `text`"):
        processor(text=["a"], text_pair=["<|image|> a"], images=[picture()], **options)


def test_a_text_that_its_strategy_cannot_cut_is_refused():
    processor = DuoStreamProcessor(image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS)
    for truncation in ("only_first", "only_second"):
        with pytest.raises(
            ValueError, match=f"^`text` and `text_pair` can't be read with `truncation`='{truncation}'"
        ):
            processor(text=["a b c"], text_pair=["a b c"], truncation=truncation, max_length=5)
    options = {"truncation": "only_second", "max_length": 5}
    assert len(processor(text=["a b c"], **options)["input_ids"][0]) == 5
    with pytest.raises(ValueError, match=r"^Row 1 has 6 tokens, more than `max_length`=5, and `truncation`='only_s"):
        processor(text=["a b c", "a b c red"], **options)


def test_two_texts_with_pictures_are_not_cut():
    processor = DuoStreamProcessor(image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS)
    inputs = {"text": ["<|image|> a b", "c"], "text_pair": ["c", "a"], "images": [[picture()], []]}
    fits = processor(**inputs, truncation=True, max_length=10, padding=True)
    assert equal(fits, processor(**inputs, padding=True))
    for truncation in (True, "only_first", "only_second"):
        with pytest.raises(ValueError, match=r"^Row 0 has 10 tokens, more than `max_length`=9, and beside pic"):
            processor(**inputs, truncation=truncation, max_length=9)


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


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("return_tensors", [None, "pt"])
@pytest.mark.parametrize("padding", [True, "max_length"])
def test_the_assistants_tokens_can_be_told_where_rows_are_cut_and_filled_up(
    processor, padding_side, return_tensors, padding
):
    outputs = processor.apply_chat_template(
        [
            [user(image(), text("Color?")), assistant("Red.")],
            [user(text("What color is the square?")), assistant("It is red.")],
        ],
        tokenize=True,
        return_dict=True,
        return_tensors=return_tensors,
        return_assistant_tokens_mask=True,
        processor_kwargs={"truncation": True, "max_length": 64, "padding": padding, "padding_side": padding_side},
    )
    said = [
        processor.decode([int(i) for i, is_said in zip(ids, mask, strict=True) if is_said])
        for ids, mask in zip(outputs["input_ids"], outputs["assistant_masks"], strict=True)
    ]
    assert said == ["Red.<|end|>", "It is red.<|end|>"]


@pytest.mark.parametrize("truncation", [False, True])
def test_a_mask_that_is_not_wanted_is_not_returned(processor, truncation):
    outputs = processor(text=["a", "bc"], return_attention_mask=False, truncation=truncation, max_length=9)
    assert set(outputs) == {"input_ids", "mm_token_type_ids"}


@pytest.mark.parametrize("truncation", [False, True])
@pytest.mark.parametrize("texts", ["", ["", ""]])
def test_texts_without_any_token_are_tensors_of_whole_numbers_too(prefix_processor, texts, truncation):
    outputs = prefix_processor(text=texts, truncation=truncation, max_length=9, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        assert outputs[name].dtype == torch.long and outputs[name].shape[1] == 0


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("as_given", [lambda a: a, torch.from_numpy], ids=["numpy", "torch"])
def test_fractions_are_not_divided_by_255_again(processor, as_given):
    fractions = as_given((PIXELS / 255).astype(np.float32))
    with pytest.raises(ValueError, match=r"`images` has .*: picture 1 is of fractions .* give `do_rescale=False`"):
        processor(text="<|image|><|image|>", images=[picture(), fractions])
    with pytest.raises(ValueError, match="picture 0 is of fractions up to 1"):
        processor(images=[as_given(PIXELS > 99)])
    expected = processor(images=[Image.fromarray(PIXELS)], return_tensors="pt")["pixel_values"]
    whole = processor(images=[as_given(PIXELS.astype(np.float32))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(whole, expected)
    for told in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        given = processor(images=[fractions], return_tensors="pt", **told)["pixel_values"]
        torch.testing.assert_close(given, expected, atol=0.01, rtol=0)
    own = SiglipImageProcessorPil(size={"height": 16, "width": 16}, do_rescale=False)
    as_configured = DuoStreamProcessor(own, processor.tokenizer, image_seq_length=NUM_TOKENS)
    as_configured(images=[fractions])
    with pytest.raises(ValueError, match="picture 0 is of fractions"):
        as_configured(images=[fractions], do_rescale=True)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("is_first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("num_channels", [1, 4])
def test_gray_and_transparent_arrays_are_read_as_in_training(num_channels, is_first, kind):
    """By an image processor that turns nothing into RGB by itself, too."""
    own = DuoStreamProcessor(
        ViTImageProcessorPil(size={"height": 16, "width": 16}),
        train_tokenizer(TEXTS, 300),
        image_seq_length=NUM_TOKENS,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, num_channels), dtype=np.uint8)
    array = kind(np.ascontiguousarray(pixels.transpose(2, 0, 1)) if is_first else pixels)
    got = own(images=[array], text=own.image_token, return_tensors="pt")["pixel_values"]
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "red"}]
    learnt = DuoStreamDataCollator(own)([{"images": [array], "messages": messages}])["pixel_values"]
    assert torch.equal(got, learnt) and got.shape == (1, 3, 16, 16)


def test_a_picture_may_be_a_path_or_an_array_of_grays(processor, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    gray = PIXELS[..., 0]
    for source, same in (
        (tmp_path / "a.png", Image.fromarray(PIXELS)),
        (gray, Image.fromarray(gray)),
        (gray[:3], Image.fromarray(gray[:3])),
        (torch.from_numpy(gray), Image.fromarray(gray)),
    ):
        expected = processor(text="<|image|>", images=same, return_tensors="pt")["pixel_values"]
        for images in (source, [source], [[source]]):
            outputs = processor(text="<|image|>", images=images, return_tensors="pt")
            assert torch.equal(outputs["pixel_values"], expected)
    with pytest.raises(ValueError, match="an array of float64; expected a picture's pixels in `uint8`"):
        processor(images=[gray / 255])


@pytest.mark.parametrize("make", [chatml_tokenizer, bert_tokenizer])
def test_a_tokenizer_without_the_image_token_gets_it_behind_its_vocabulary(make):
    tokenizer = make()
    size, specials = len(tokenizer), tokenizer.all_special_tokens
    before = tokenizer.encode("a red b")
    processor = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    assert (processor.image_token_id, len(tokenizer)) == (size, size + 1)
    assert set(specials) < set(tokenizer.all_special_tokens)
    assert tokenizer.encode("a red b") == before
    ids = processor(text="a<|image|>b", images=[picture()])["input_ids"][0]
    assert ids.count(size) == NUM_TOKENS


def test_a_tokenizer_that_has_the_image_token_is_left_as_it_is():
    tokenizer = train_tokenizer(TEXTS, 300)
    vocabulary = tokenizer.get_vocab()
    assert DuoStreamProcessor(image_processor(), tokenizer).image_token_id == IMAGE
    assert tokenizer.get_vocab() == vocabulary


def test_another_image_token_is_used_in_text_and_template():
    processor = DuoStreamProcessor(
        image_processor(), chatml_tokenizer(), image_token="<image>", image_seq_length=NUM_TOKENS
    )
    assert "<|im_start|>user\n<image>What" in processor.apply_chat_template(CONVERSATIONS["one picture"])
    ids = tokenize(processor, CONVERSATIONS["one picture"])["input_ids"][0]
    assert ids.count(processor.image_token_id) == NUM_TOKENS
    assert processor.tokenizer.convert_ids_to_tokens(processor.image_token_id) == "<image>"


def test_a_prompt_is_a_prefix_up_to_the_role_marker_of_its_answer(prefix_processor):
    outputs = tokenize(prefix_processor, CONVERSATIONS["one picture"], return_tensors="pt")
    assert outputs["input_ids"][0, -1] == ASSISTANT
    length = outputs["input_ids"].shape[1]
    assert outputs["token_type_ids"].tolist() == [[0] * (length - 1) + [1]]
    assert outputs["token_type_ids"].dtype == torch.long


def test_a_completion_alone_is_no_prefix(prefix_processor):
    outputs = prefix_processor(text=["It is red.<|end|>", "No."])
    assert outputs["token_type_ids"] == [[1] * len(row) for row in outputs["input_ids"]]


@pytest.mark.parametrize("name", ["one picture", "several turns", "text only"])
def test_types_of_prompt_and_completion_join_to_those_of_the_whole(prefix_processor, name):
    # TRL tokenizes both on their own and joins them
    prompt = prefix_processor.apply_chat_template(CONVERSATIONS[name], add_generation_prompt=True)
    completion = "It is red.<|end|>"
    images = [picture()] * prompt.count("<|image|>") or None
    first = prefix_processor(text=prompt, images=images)
    second = prefix_processor(text=completion)
    whole = prefix_processor(text=prompt + completion, images=images)
    for key in ("input_ids", "token_type_ids"):
        assert first[key][0] + second[key][0] == whole[key][0]


def test_later_turns_belong_to_the_suffix(prefix_processor):
    outputs = tokenize(prefix_processor, CONVERSATIONS["several turns"])
    first_answer = outputs["input_ids"][0].index(ASSISTANT)
    types = outputs["token_type_ids"][0]
    assert types == [0] * first_answer + [1] * (len(types) - first_answer)


def test_a_role_marker_in_user_text_does_not_end_the_prefix(prefix_processor):
    outputs = tokenize(prefix_processor, [user(text("What does <|assistant|> mean?"))])
    assert outputs["token_type_ids"][0] == [0] * (len(outputs["input_ids"][0]) - 1) + [1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_types_of_the_tokens_as_they_are(prefix_processor, side):
    conversations = [CONVERSATIONS["text only"], CONVERSATIONS["several pictures"]]
    batch = tokenize(
        prefix_processor,
        conversations,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": side},
    )
    assert batch["attention_mask"].min() == 0
    for i, conversation in enumerate(conversations):
        alone = tokenize(prefix_processor, conversation)["token_type_ids"][0]
        assert batch["token_type_ids"][i][batch["attention_mask"][i] == 1].tolist() == alone


def test_a_role_marker_of_several_tokens_is_found_whole():
    processor = DuoStreamProcessor(
        image_processor(), chatml_tokenizer(), image_seq_length=NUM_TOKENS, bidirectional_prefix=True
    )
    outputs = tokenize(processor, CONVERSATIONS["one picture"])
    (ids,), (types,) = outputs["input_ids"], outputs["token_type_ids"]
    assert processor.decode([i for i, kind in zip(ids, types, strict=True) if kind]) == "<|im_start|>assistant\n"
    assert types == sorted(types)


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "given"])
@pytest.mark.parametrize("options", [{}, {"processor_kwargs": {"truncation": True, "max_length": 40}}], ids=str)
def test_a_prefix_ends_where_the_template_that_is_asked_for_begins_an_answer(prefix_processor, is_named, options):
    other = prefix_processor.chat_template.replace("<|assistant|>", "<assistant>")
    other = other.replace("'<|' + message['role'] + '|>'", "'<' + message['role'] + '>'")
    named = DuoStreamProcessor(
        image_processor(),
        prefix_processor.tokenizer,
        chat_template={"default": prefix_processor.chat_template, "other": other},
        image_seq_length=NUM_TOKENS,
        bidirectional_prefix=True,
    )
    for name in ("one picture", "several turns"):
        outputs = tokenize(named, CONVERSATIONS[name], chat_template="other" if is_named else other, **options)
        (ids,), (types,) = outputs["input_ids"], outputs["token_type_ids"]
        assert types == sorted(types)
        suffix = named.decode([i for i, kind in zip(ids, types, strict=True) if kind])
        assert suffix.startswith("<assistant>") and ("red" in suffix) == (name == "several turns")
        own = tokenize(named, CONVERSATIONS[name], **options)
        assert equal(own, tokenize(named, CONVERSATIONS[name], chat_template="default", **options))
    with pytest.raises(ValueError, match="writes nothing in front of an answer"):
        tokenize(named, CONVERSATIONS["one picture"], chat_template=other.replace("<assistant>", ""), **options)


def test_a_causal_prefix_has_no_types(processor):
    assert "token_type_ids" not in tokenize(processor, CONVERSATIONS["one picture"])


def test_segment_ids_of_a_bert_tokenizer_are_not_taken_for_types():
    tokenizer = bert_tokenizer()
    assert "token_type_ids" in tokenizer("a b")
    causal = DuoStreamProcessor(image_processor(), tokenizer, image_seq_length=NUM_TOKENS)
    assert "token_type_ids" not in causal(text="a <|image|> b", images=[picture()])
    assert "token_type_ids" not in causal(text="a b c", truncation=True, max_length=4)
    prefix = DuoStreamProcessor(
        image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS, bidirectional_prefix=True
    )
    outputs = tokenize(prefix, [user(text("a b"))])
    assert set(outputs["token_type_ids"][0]) == {0, 1}
    assert outputs["token_type_ids"][0] == sorted(outputs["token_type_ids"][0])


@pytest.mark.parametrize("bidirectional_prefix", [False, True])
def test_the_tokenizer_alone_marks_no_prefix_either(tmp_path, bidirectional_prefix):
    processor = DuoStreamProcessor(
        image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS, bidirectional_prefix=bidirectional_prefix
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.model_input_names == processor.model_input_names
    for tokenizer in (processor.tokenizer, loaded.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert set(tokenizer("a b")) == {"input_ids", "attention_mask"}
        assert tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"] == [0, 0, 0, 1, 1]


def test_a_model_reads_the_same_from_a_bert_tokenizer_and_from_its_processor():
    processor = DuoStreamProcessor(image_processor(), bert_tokenizer(), image_seq_length=NUM_TOKENS)
    model = small_model(vocab_size=len(processor.tokenizer), image_token_id=processor.image_token_id).model
    with torch.no_grad():
        states = [
            model(**read(text=["a b c red"], return_tensors="pt")).last_hidden_state
            for read in (processor, processor.tokenizer)
        ]
    assert torch.equal(*states)


def numbered(processor, **kwargs):
    """Text of one-token letters around two pictures, a b c [picture] d e [picture] f g h, cut to `max_length`."""
    return processor(text=["abc<|image|>de<|image|>fgh"], images=[[picture(), picture()]], truncation=True, **kwargs)


def letters(processor, ids):
    return [processor.decode([i]) for i in ids if i not in (IMAGE, processor.tokenizer.pad_token_id)]


@pytest.fixture
def byte_processor():
    """No merges, so that every letter is a token. For each test its own, because its truncation side changes."""
    return DuoStreamProcessor(image_processor(), train_tokenizer([], 263), image_seq_length=NUM_TOKENS)


def test_without_any_limit_nothing_is_cut_or_filled_up(byte_processor):
    byte_processor.tokenizer.model_max_length = int(1e30)
    outputs = byte_processor(text=["ab", "abcd"], truncation=True, padding="max_length")
    assert [len(ids) for ids in outputs["input_ids"]] == [2, 4]


def test_options_of_text_may_come_in_groups(byte_processor):
    text = ["ab", "abcdefgh"]
    expected = byte_processor(text=text, truncation=True, max_length=4, padding=True, return_tensors="pt")
    groups = {"text_kwargs": {"truncation": True, "max_length": 4, "padding": True}}
    found = byte_processor(text=text, **groups, common_kwargs={"return_tensors": "pt"})
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("side", "max_length", "kept"),
    [
        ("right", 16, "abcdefgh"),
        ("right", 13, "abcde"),
        ("right", 10, "ab"),
        ("right", 8, ""),
        ("left", 13, "defgh"),
        ("left", 9, "h"),
        ("left", 8, ""),
    ],
)
def test_truncation_shortens_text_and_never_a_picture(byte_processor, side, max_length, kept):
    byte_processor.tokenizer.truncation_side = side
    outputs = numbered(byte_processor, max_length=max_length)
    (ids,) = outputs["input_ids"]
    assert len(ids) == max_length
    assert "".join(letters(byte_processor, ids)) == kept
    assert ids.count(IMAGE) == 2 * NUM_TOKENS
    assert outputs["attention_mask"] == [[1] * max_length]
    assert outputs["mm_token_type_ids"] == [[int(i == IMAGE) for i in ids]]
    assert len(outputs["pixel_values"]) == 2


@pytest.mark.parametrize("name", ["padding", "padding_side"])
def test_truncation_with_padding_fills_up_short_rows(byte_processor, name):
    padding_side = "left" if name == "padding_side" else "right"
    outputs = byte_processor(
        text=["abcdefghijkl<|image|>", "a<|image|>"],
        images=[[picture()], [picture()]],
        truncation=True,
        max_length=10,
        padding="max_length",
        padding_side=padding_side,
        return_tensors="pt",
    )
    assert outputs["input_ids"].shape == outputs["attention_mask"].shape == (2, 10)
    assert outputs["mm_token_type_ids"].tolist() == (outputs["input_ids"] == IMAGE).long().tolist()
    short = [1] * 5 + [0] * 5
    assert outputs["attention_mask"].tolist() == [[1] * 10, short[::-1] if padding_side == "left" else short]
    assert letters(byte_processor, outputs["input_ids"][0].tolist()) == list("abcdef")


def test_truncation_of_what_is_short_enough_changes_nothing(byte_processor):
    assert equal(
        numbered(byte_processor, max_length=40, padding=True, return_tensors="pt"),
        byte_processor(
            text=["abc<|image|>de<|image|>fgh"], images=[[picture(), picture()]], padding=True, return_tensors="pt"
        ),
    )


def test_truncation_of_text_alone_is_the_tokenizers(byte_processor):
    outputs = byte_processor(text=["abcdef", "ab"], truncation=True, max_length=4)
    assert (
        outputs["input_ids"] == byte_processor.tokenizer(["abcdef", "ab"], truncation=True, max_length=4)["input_ids"]
    )


def test_truncation_without_a_length_goes_by_what_the_model_takes(byte_processor):
    byte_processor.tokenizer.model_max_length = 12
    assert len(numbered(byte_processor)["input_ids"][0]) == 12


def test_truncation_works_through_the_chat_template(byte_processor):
    outputs = tokenize(
        byte_processor,
        [user(image(), text("a <|image|> of long text"))],
        return_tensors="pt",
        processor_kwargs={"truncation": True, "max_length": 12},
    )
    assert outputs["input_ids"].shape == (1, 12)
    assert (outputs["input_ids"] == IMAGE).sum() == NUM_TOKENS


def test_truncation_keeps_the_types_of_a_prefix_in_step():
    processor = DuoStreamProcessor(
        image_processor(), train_tokenizer([], 263), image_seq_length=NUM_TOKENS, bidirectional_prefix=True
    )
    conversation = "<|user|>ab<|image|><|assistant|>yes"
    outputs = processor(text=conversation, images=[picture()], truncation=True, max_length=10, return_tensors="pt")
    assert processor.decode(outputs["input_ids"][0][-3:]) == "<|assistant|>ye"
    assert outputs["token_type_ids"].tolist() == [[0] * 7 + [1] * 3]


def test_pictures_longer_than_the_limit_are_refused_with_their_row(byte_processor):
    with pytest.raises(ValueError, match="Row 1: pictures take 8 tokens, more than `max_length`=7"):
        byte_processor(
            text=["a", "<|image|>b<|image|>"], images=[[], [picture(), picture()]], truncation=True, max_length=7
        )


@pytest.mark.parametrize("bidirectional_prefix", [False, True])
def test_a_saved_processor_loads_as_it_was(tmp_path, bidirectional_prefix):
    processor = DuoStreamProcessor(
        image_processor(),
        chatml_tokenizer(),
        image_token="<image>",
        image_seq_length=7,
        bidirectional_prefix=bidirectional_prefix,
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DuoStreamProcessor
    for name in ("image_token", "image_token_id", "image_seq_length", "bidirectional_prefix", "chat_template"):
        assert getattr(loaded, name) == getattr(processor, name), name
    assert loaded.model_input_names == processor.model_input_names
    for conversation in CONVERSATIONS.values():
        assert equal(
            tokenize(loaded, conversation, return_tensors="pt"), tokenize(processor, conversation, return_tensors="pt")
        )


def test_a_processor_saved_twice_is_still_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path / "first")
    AutoProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_without_torchvision_the_pil_image_processor_is_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path).image_processor) is SiglipImageProcessorPil
    assert "torchvision" not in sys.modules
