"""Whatever comes in, a right result comes out, or an error that a caller expects and that names what was wrong."""

import copy
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import BERT, GPT2, LLAMA, SIGLIP, VIT
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from duostream import (
    DuoStreamClassificationCollator,
    DuoStreamConfig,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamPreTrainingCollator,
    DuoStreamProcessor,
    DuoStreamRetrievalCollator,
    train_tokenizer,
)

NUM_TOKENS, SIDE = 3, 16
MAX_BYTES, MAX_SECONDS = 2 * 2**30, 20
EXPECTED = (ValueError, TypeError, OSError)
# Of the four together, and both amounts, 10,000
AMOUNTS = [60, pytest.param(2440, marks=pytest.mark.slow)]
ROW = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "segment_ids"}


class TooLongError(BaseException):
    """None of the errors that code may catch."""


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """No more memory than this, beside what is used before; and no warnings for each of 10,000 rows."""

    def stop(*_: Any) -> None:
        raise TooLongError

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits, verbosity = resource.getrlimit(resource.RLIMIT_AS), logging.get_verbosity()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, limits[1]))
    # Time of the processor: the clock's is used by `pytest-timeout`
    previous = signal.signal(signal.SIGVTALRM, stop)
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)
    signal.signal(signal.SIGVTALRM, previous)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(amount: int, inputs: st.SearchStrategy, check: Callable[[Any], None], named: Callable[[Any], list]) -> None:
    """Checks so many inputs: `check` may raise what callers expect, with one of those in `named` in its message."""

    def run(given_inputs: Any) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        try:
            check(given_inputs)
        except EXPECTED as error:
            causes = f"{error.__cause__!r} {error.__context__!r}"
            assert "MemoryError" not in causes and "allocate" not in causes, causes
            assert any(name in str(error) for name in named(given_inputs)), repr(error)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    settings(max_examples=amount, suppress_health_check=list(HealthCheck))(given(inputs)(run))()


MARKERS = ["<|image|>", "<|end|>", "<|assistant|>", "<|pad|>", "{{ 7 * 7 }}", "{% generation %}", "\U000f0000", "None"]
characters = st.characters(exclude_categories=())  # with lone surrogates
words = st.lists(st.text(max_size=20) | st.sampled_from(MARKERS) | st.text(characters, max_size=3), max_size=4)
texts = st.builds(lambda parts, times: "".join(parts) * times, words, st.sampled_from([1, 1, 1, 1, 1, 1, 100]))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=20)
KEYS = ["role", "content", "type", "text", "image", "images", "messages", "prompt", "completion", "conversations"]
anything = st.recursive(
    scalars,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(KEYS), each, max_size=3),
    max_leaves=6,
)

MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "La",
]
sides = st.sampled_from([1, 1, 2, 3, 4, 16, 50, 3000, 0])
# One side at most is long: what 3000 x 3000 pixels take is time, and the same
sizes = st.tuples(sides, sides).filter(lambda size: min(size) < 100)
drawn = st.builds(Image.new, st.sampled_from(MODES), sizes)
few = st.sampled_from([1, 2, 3, 4, 17, 0])
arrays = st.builds(
    np.ones, st.lists(few, max_size=4), st.sampled_from(["uint8", "float32", "int64", "uint16", "bool"])
)
good_pictures = st.builds(Image.new, st.sampled_from(MODES[:13]), st.just((9, 8)))
pictures = good_pictures | drawn | arrays | arrays.map(torch.from_numpy) | scalars
images_of_rows = st.none() | pictures | st.lists(pictures | st.lists(pictures, max_size=2), max_size=3)


@st.composite
def matching(draw: Any) -> tuple[list, list]:
    """Texts and as many pictures as they have markers, in a list for each, or in one."""
    rows = draw(st.lists(st.tuples(texts, st.integers(0, 2)), min_size=1, max_size=3))
    written = [text.replace("<|image|>", "") + "<|image|>" * number for text, number in rows]
    images = [draw(st.lists(good_pictures | drawn | arrays, min_size=n, max_size=n)) for _, n in rows]
    return (images if draw(st.booleans()) else [each for row in images for each in row]), written


@pytest.fixture(scope="module")
def processors() -> list[DuoStreamProcessor]:
    image_processors = [
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
    ]
    tokenizers = [train_tokenizer(["What color is the square? It is red."], 300) for _ in image_processors]
    return [
        DuoStreamProcessor(each, tokenizer, image_seq_length=NUM_TOKENS, bidirectional_prefix=number == 1)
        for number, (each, tokenizer) in enumerate(zip(image_processors, tokenizers, strict=True))
    ]


def check_batch(batch: Any, processor: DuoStreamProcessor, num_rows: int, num_images: int) -> None:
    rows = [np.asarray(row) for row in batch["input_ids"]]
    assert len(rows) == num_rows and all(np.issubdtype(row.dtype, np.integer) for row in rows if row.size)
    for name in ROW & set(batch):
        assert [np.shape(row) for row in batch[name]] == [row.shape for row in rows], name
    assert sum((row == processor.image_token_id).sum() for row in rows) == NUM_TOKENS * num_images
    assert ("pixel_values" in batch) == (num_images > 0)
    if num_images:
        pixels = np.asarray(batch["pixel_values"])
        assert pixels.shape == (num_images, 3, SIDE, SIDE) and np.isfinite(pixels).all()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_of_any_texts_and_pictures_the_processor_makes_inputs_or_names_them(
    processors: list[DuoStreamProcessor], amount: int
) -> None:
    options = st.fixed_dictionaries(
        {},
        optional={
            "padding": st.sampled_from([True, True, False, "max_length", "longest", "longer"]),
            "truncation": st.sampled_from([True, False, "longest_first", "shortest"]),
            "max_length": st.sampled_from([None, 64, 16, 4, 1, 0, -1]),
            "return_tensors": st.sampled_from(["pt", "np", None, "xy"]),
            "pad_to_multiple_of": st.sampled_from([None, 8, 0, -1]),
        },
    )
    junk = st.tuples(images_of_rows, st.none() | texts | st.lists(texts, max_size=3) | anything)
    inputs = st.tuples(st.sampled_from(range(3)), matching() | matching() | junk, options)

    def check(given_inputs: Any) -> None:
        kind, (images, text), options = given_inputs
        outputs = processors[kind](images=images, text=text, **options)
        if text is None:
            assert set(outputs) == {"pixel_values"} and len(outputs["pixel_values"])
            return
        rows = [text] if isinstance(text, str) else text
        check_batch(outputs, processors[kind], len(rows), sum(row.count("<|image|>") for row in rows))

    names = ["image", "text", "Row", "rows", "pictures", "padding", "Padding", "Truncation", "TensorType", "tensor"]
    fuzz(amount, inputs, check, lambda _: [*names, "max_length", "pad_to_multiple_of", "at least one input"])


part = (
    st.just({"type": "image"})
    | texts.map(lambda text: {"type": "text", "text": text})
    | st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "video"]), "text": scalars})
)
contents = texts | st.lists(part, max_size=3) | anything
roles = st.sampled_from(["user", "assistant", "system"])
messages = st.lists(st.fixed_dictionaries({"role": roles | scalars, "content": contents}) | anything, max_size=3)


def turns(question: str, answer: str, number: int) -> list[dict]:
    asked = [{"type": "image"}] * number + [{"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


@st.composite
def good_rows(draw: Any) -> dict[str, Any]:
    number, answers = draw(st.integers(0, 2)), draw(st.lists(texts, min_size=1, max_size=2))
    row = {"images": draw(st.lists(good_pictures, min_size=number, max_size=number))}
    question, kind = draw(texts), draw(st.sampled_from(["messages", "completion", "text", "conversations"]))
    each = [turns(question, answer, number) for answer in answers]
    written: dict[str, Any] = {
        "messages": {"messages": each[0]},
        "completion": {"prompt": each[0][:1], "completion": each[0][1:]},
        "text": {"text": question, "label": draw(st.integers(0, 2))},
        "conversations": {"conversations": [{"messages": each} for each in each]},
    }
    return row | written[kind]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_of_any_rows_the_collators_make_a_batch_or_name_one(processors: list[DuoStreamProcessor], amount: int) -> None:
    collators = [
        make(processor)
        for processor in processors
        for make in (
            DuoStreamDataCollator,
            lambda each: DuoStreamDataCollator(each, max_length=12, pad_to_multiple_of=8),
            DuoStreamMaskedLMCollator,
            DuoStreamRetrievalCollator,
            DuoStreamPreTrainingCollator,
            lambda each: DuoStreamClassificationCollator(each, num_labels=3),
        )
    ]
    images = st.lists(pictures, max_size=2) | anything
    broken = st.fixed_dictionaries(
        {"images": images},
        optional={
            "messages": messages,
            "prompt": messages,
            "completion": messages,
            "text": scalars,
            "label": scalars | st.lists(scalars, max_size=3),
            "conversations": st.lists(st.fixed_dictionaries({"text": texts}) | anything, max_size=3),
        },
    )
    rows = st.lists(good_rows(), min_size=1, max_size=3) | st.lists(good_rows() | broken | anything, max_size=3)

    def check(given_inputs: Any) -> None:
        collator, rows = collators[given_inputs[0]], given_inputs[1]
        batch = collator(rows)
        num_images = sum(len(row.get("images") or ()) for row in rows)
        if isinstance(collator, DuoStreamRetrievalCollator) and "labels" not in batch:
            assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["input_ids"]) == len(rows)
            assert batch["pixel_values"].shape == (num_images, 3, SIDE, SIDE)
            return
        check_batch(batch, collator.processor, len(rows), num_images)
        if not isinstance(collator, DuoStreamClassificationCollator):
            assert batch["labels"].shape == batch["input_ids"].shape
            assert collator.processor.image_token_id not in batch["labels"]

    fuzz(
        amount,
        st.tuples(st.sampled_from(range(len(collators))), rows),
        check,
        lambda _: ["Row", "expected rows", "can't share"],
    )


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_conversation_is_written_as_it_is_or_named(processors: list[DuoStreamProcessor], amount: int) -> None:
    shown = st.builds(lambda image: {"type": "image", "image": image}, good_pictures | drawn)
    found = st.fixed_dictionaries(
        {"type": st.just("image")}, optional={"url": texts, "path": scalars, "image": scalars}
    )
    said = texts.map(lambda text: {"type": "text", "text": text})
    good = st.fixed_dictionaries({"role": roles, "content": texts | st.lists(shown | said, max_size=3)})
    broken = st.fixed_dictionaries({"role": roles | scalars, "content": contents | st.lists(shown | found | part)})
    conversations = st.lists(good, min_size=1, max_size=3) | st.lists(good | broken | anything, max_size=3)
    options = st.fixed_dictionaries({"add_generation_prompt": st.booleans()})
    inputs = st.tuples(st.sampled_from(range(3)), conversations | anything, options)

    def check(given_inputs: Any) -> None:
        kind, conversation, options = given_inputs
        processor = processors[kind]
        outputs = processor.apply_chat_template(
            copy.deepcopy(conversation), tokenize=True, return_dict=True, **options
        )
        parts = [part for turn in conversation for part in turn["content"] if isinstance(part, dict)]
        check_batch(outputs, processor, 1, sum(part["type"] == "image" for part in parts))
        if any(turn["role"] not in ("user", "assistant", "system") for turn in conversation):
            return
        # What a user writes never becomes a control token
        ids, specials = list(outputs["input_ids"][0]), set(processor.tokenizer.all_special_ids)
        num_answers = sum(turn["role"] == "assistant" for turn in conversation)
        num_images = ids.count(processor.image_token_id)
        marks = len(conversation) + num_answers + options["add_generation_prompt"]
        assert sum(token in specials for token in ids) == marks + num_images

    fuzz(amount, inputs, check, lambda _: ["expected", "no messages", "image", "Row", "text"])


numbers = st.integers(-2, 5) | st.sampled_from([7, 8, 16, 32, 10**9, 10**18]) | st.floats()
plain = st.none() | st.booleans() | numbers | st.text(max_size=5)  # what JSON holds
values = plain | st.lists(st.integers(-1, 40) | plain, max_size=3) | st.just({})
FIELDS = sorted(set(DuoStreamConfig.__annotations__) | {"num_labels", "id2label", "dtype", "fusion_config"})
PARTS = {"text_config": [LLAMA, GPT2, BERT], "fusion_stack_config": [LLAMA, GPT2], "vision_config": [SIGLIP, VIT]}


@st.composite
def configs(draw: Any) -> tuple[dict[str, Any], list[str]]:
    """Fields of a config of which two at most are changed, and their names."""
    fields: dict[str, Any] = {name: dict(draw(st.sampled_from(known))) for name, known in PARTS.items()}
    names = []
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from([None, *PARTS]))
        changed = fields if part is None or not isinstance(fields[part], dict) else fields[part]
        known = (
            FIELDS if changed is fields else [*changed, "num_channels", "sliding_window", "layer_types", "head_dim"]
        )
        names.append(draw(st.sampled_from(known)))
        changed[names[-1]] = draw(values)
        names.append(part or names[-1])
    return fields, names


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_config_holds_together_or_names_its_fields(amount: int) -> None:
    def check(given_inputs: Any) -> None:
        config = DuoStreamConfig(**copy.deepcopy(given_inputs[0]))
        again = DuoStreamConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        for number in (config.image_seq_length, config.image_hidden_size):
            assert isinstance(number, int) and number > 0

    fuzz(amount, configs(), check, lambda given_inputs: [*given_inputs[1], "hidden_size", "fusion_stack_config"])


# What was found, one by one


@pytest.mark.parametrize("given_row", [{"messages": turns("half \ud83d", "a", 0)}, {"text": "half \ud83d"}])
def test_half_a_character_names_its_row(processors: list[DuoStreamProcessor], given_row: dict) -> None:
    for make in (DuoStreamDataCollator, DuoStreamMaskedLMCollator):
        with pytest.raises(ValueError, match=r"Row 5: .*surrogates not allowed"):
            make(processors[0])([{**given_row, "row": 5}])
    with pytest.raises(ValueError, match=r"Row 0: .*surrogates not allowed|Row 0 of the batch: .*surrogates"):
        DuoStreamRetrievalCollator(processors[0])([{"images": [Image.new("RGB", (9, 9))], "text": "half \ud83d"}])
    with pytest.raises(ValueError, match=r"Row 1 of `text`: .*surrogates not allowed"):
        processors[0](text=["a", "half \ud83d"])


def test_a_row_of_nothing_is_named_and_makes_no_batch_of_floats(processors: list[DuoStreamProcessor]) -> None:
    with pytest.raises(ValueError, match="Row 0 of the batch has no text and no picture"):
        DuoStreamMaskedLMCollator(processors[0])([{"text": "", "images": []}])
    with pytest.raises(ValueError, match="expected rows to make a batch of"):
        DuoStreamRetrievalCollator(processors[0])([])


@pytest.mark.parametrize("row", [None, 3, "text", ["messages"], {"conversations": 3}, {"conversations": [3]}])
def test_what_is_no_row_is_named(processors: list[DuoStreamProcessor], row: Any) -> None:
    with pytest.raises(ValueError, match="Row 1 of the batch: expected"):
        DuoStreamDataCollator(processors[0])([{"text": "a"}, row])


def test_scores_that_are_no_numbers_name_their_row(processors: list[DuoStreamProcessor]) -> None:
    with pytest.raises(ValueError, match="Row 0 of the batch: expected numbers in `label`"):
        DuoStreamClassificationCollator(processors[0], num_labels=3)([{"text": "a", "label": [0, "b", None]}])


@pytest.mark.parametrize("text", [[], {}, 3, b"a", [None], ["a", 3]])
def test_what_is_no_text_is_named(processors: list[DuoStreamProcessor], text: Any) -> None:
    with pytest.raises(ValueError, match="`text`"):
        processors[0](text=text)


@pytest.mark.parametrize("option", [{"max_length": -1}, {"pad_to_multiple_of": 0}, {"pad_to_multiple_of": -1}])
def test_lengths_that_are_none_are_named(processors: list[DuoStreamProcessor], option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` is .*; expected 1 or more"):
        processors[0](text=["a"], padding=True, truncation=True, **option)


@pytest.mark.parametrize("shape", [(0, 3, 0, 1), (0, 4, 4, 3), (4,), (2, 2, 7)])
def test_arrays_that_are_no_pictures_are_named(processors: list[DuoStreamProcessor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`images`"):
        processors[1](images=[np.zeros(shape, np.uint8)], text="<|image|>")


@pytest.mark.parametrize("conversation", [[], {}, None, 3, "a", [3], [[]], [{}], [{"role": "user"}], [[{"role": 3}]]])
def test_what_is_no_conversation_is_named(processors: list[DuoStreamProcessor], conversation: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a |there are no messages|expected text from the user"):
        processors[0].apply_chat_template(conversation)


CONFIG = {name: known[0] for name, known in PARTS.items()}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text_config": 3}, "text_config"),
        ({"vision_config": {**SIGLIP, "hidden_size": "wide"}}, "`vision_config` can't be read: .*hidden_size"),
        ({"vision_config": {**VIT, "image_size": []}}, "`vision_config.image_size`"),
        ({"vision_config": {**SIGLIP, "hidden_size": 10**18}}, "`vision_config` of type"),
        ({"vision_config": {**SIGLIP, "num_hidden_layers": 10**9}}, "`vision_config.num_hidden_layers` is 1000000000"),
        ({"text_config": {**LLAMA, "num_hidden_layers": 10**9}}, "`text_config.num_hidden_layers` is 1000000000"),
        ({name: {**LLAMA, "sliding_window": [3, name]} for name in ("text_config", "fusion_stack_config")}, "window"),
        ({"num_labels": 10**12}, "`num_labels` is 1000000000000"),
        ({"dtype": "nn"}, "`dtype`"),
        ({"id2label": "a"}, "`id2label`"),
        ({"lm_weight": float("nan")}, "`lm_weight` is nan"),
        ({"lm_weight": "much"}, "lm_weight"),
        ({"projection_dim": 0}, "`projection_dim` is 0"),
        ({"image_token_id": 2.5}, "image_token_id"),
        ({"classifier_dropout": 2}, "`classifier_dropout` is 2"),
        ({"projector_hidden_act": "step"}, "`projector_hidden_act` is 'step'"),
    ],
)
def test_a_field_that_makes_no_model_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        DuoStreamConfig(**{**CONFIG, **fields})
