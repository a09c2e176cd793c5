"""Writing: with everything `generate` offers, each row gets what it gets alone, read anew for every token."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import (
    BERT,
    KINDS,
    LLAMA,
    PICTURE,
    VOCAB_SIZE,
    Row,
    batch,
    difference,
    needs_compiler,
    ragged_rows,
    roughen,
    small_config,
    small_model,
)
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from duostream import DuoStreamForConditionalGeneration

NEW = 8


def bert_that_writes() -> DuoStreamForConditionalGeneration:
    return small_model("bert", text_config={**BERT, "is_decoder": True})


@pytest.fixture(scope="module", params=[*KINDS, pytest.param("bert", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Any:
    return bert_that_writes() if request.param == "bert" else small_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """Its text stream adds positions, so that a wrong one shows."""
    return small_model("gpt2")


def write(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    """New tokens only."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, **inputs, **kwargs}
    if "past_key_values" in arguments:
        arguments["past_key_values"] = copy.deepcopy(arguments["past_key_values"])
    sequences = model.generate(**arguments)
    return sequences[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else sequences


def argmax_by_hand(model: Any, row: Row, num_tokens: int = NEW) -> list[int]:
    """Greedy decoding with no help from `generate`: everything is read anew for each token."""
    ids = row.inputs["input_ids"]
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(**{**row.inputs, "input_ids": ids}, use_cache=False).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_behind_a_picture_that_is_hidden_a_row_is_written_as_without_it(gpt2: Any, kwargs: dict) -> None:
    row, num_hidden = Row(gpt2, PICTURE, 6), gpt2.config.image_seq_length
    mask = torch.ones(1, len(row), dtype=torch.long)
    mask[0, :num_hidden] = 0
    expected = write(gpt2, {"input_ids": row.ids[num_hidden:][None]})
    got = write(gpt2, {**row.inputs, "attention_mask": mask}, disable_compile=True, **kwargs)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("are_alike", [True, False], ids=["alike", "of different lengths"])
def test_rows_that_are_alike_are_written_on_without_masks(gpt2: Any, are_alike: bool) -> None:
    rows = [Row(gpt2, 2, PICTURE, num_words) for num_words in ((4, 4, 4) if are_alike else (4, 5, 4))]
    masks: list[Any] = []
    handles = [
        stack.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for stack in (gpt2.model.text_model, gpt2.model.fusion_model)
    ]
    together = write(gpt2, batch(rows))
    for handle in handles:
        handle.remove()
    assert [mask is None for mask in masks[2:]] == [are_alike] * 2 * (NEW - 1)
    assert together.tolist() == [argmax_by_hand(gpt2, row) for row in rows]


def test_positions_of_ones_own_are_counted_on_by_both_streams(gpt2: Any) -> None:
    row = Row(gpt2, 3, PICTURE, 6)
    position_ids = torch.arange(len(row))[None] + 7
    expected = write(gpt2, row.inputs, position_ids=position_ids, use_cache=False)
    assert torch.equal(write(gpt2, row.inputs, position_ids=position_ids), expected)


def test_an_assistant_is_shown_no_pictures_and_says_so(gpt2: Any) -> None:
    with pytest.raises(ValueError, match="no pictures were given"):
        write(gpt2, Row(gpt2, PICTURE, 6).inputs, assistant_model=small_model("gpt2"))


def test_a_row_in_a_ragged_batch_writes_what_it_writes_alone(model: Any) -> None:
    rows = ragged_rows(model)
    together = write(model, batch(rows))
    assert len({tuple(tokens) for tokens in together.tolist()}) > 1
    for tokens, row in zip(together.tolist(), rows, strict=True):
        assert tokens == argmax_by_hand(model, row)
        assert tokens == write(model, row.inputs)[0].tolist()


def test_what_is_written_depends_on_the_picture(model: Any) -> None:
    row = Row(model, 2, PICTURE, 3)
    with_picture = write(model, row.inputs, max_new_tokens=20)
    row.pictures = torch.randn_like(row.pictures) * 2
    assert not torch.equal(write(model, row.inputs, max_new_tokens=20), with_picture)


def test_without_a_cache_the_same_is_written(model: Any) -> None:
    inputs = batch(ragged_rows(model))
    assert torch.equal(write(model, inputs, use_cache=False), write(model, inputs))


def test_a_picture_alone_is_written_about(model: Any) -> None:
    for row in (Row(model, PICTURE), Row(model, 2, PICTURE)):
        assert write(model, row.inputs)[0].tolist() == argmax_by_hand(model, row)


def test_a_row_that_ends_early_does_not_disturb_the_others(gpt2: Any) -> None:
    rows = ragged_rows(gpt2)
    free = write(gpt2, batch(rows)).tolist()
    eos = free[1][2]  # which the second row, the one with a picture in its middle, writes in its third step
    ended = write(gpt2, batch(rows), eos_token_id=eos, pad_token_id=0).tolist()
    for tokens, expected in zip(ended, free, strict=True):
        end = expected.index(eos) + 1 if eos in expected else len(expected)
        assert tokens[:end] == expected[:end]
        assert not any(tokens[end:])


def test_sampling_with_a_seed_repeats_itself(model: Any) -> None:
    inputs = batch(ragged_rows(model))

    def sample(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        return write(model, inputs, do_sample=True, top_k=0, **kwargs)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1), sample(1, use_cache=False))
    assert torch.equal(write(model, inputs, do_sample=True, top_k=1), write(model, inputs))


def test_several_samples_of_a_row_are_samples_of_that_row(model: Any) -> None:
    rows = ragged_rows(model)
    sequences = model.generate(**batch(rows), do_sample=True, num_return_sequences=3, max_new_tokens=NEW, top_k=0)
    length = max(map(len, rows))
    assert sequences.shape == (3 * len(rows), length + NEW)
    assert torch.equal(sequences[:, :length], batch(rows)["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(tokens) for tokens in sequences[:3].tolist()}) == 3
    # The only choice left is the best one: every copy sees its own row's pictures
    best = model.generate(**batch(rows), do_sample=True, num_return_sequences=3, max_new_tokens=NEW, top_k=1)
    for i, row in enumerate(rows):
        assert best[3 * i : 3 * i + 3, length:].tolist() == [argmax_by_hand(model, row)] * 3


@pytest.mark.parametrize("num_return_sequences", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_each_beam_of_a_row_is_that_of_the_row_alone(model: Any, num_return_sequences: int, use_cache: bool) -> None:
    rows = ragged_rows(model)
    beams = {"num_beams": 3, "num_return_sequences": num_return_sequences, "use_cache": use_cache}
    together = write(model, batch(rows), **beams)
    assert together.shape == (num_return_sequences * len(rows), NEW)
    for i, row in enumerate(rows):
        got = together[num_return_sequences * i : num_return_sequences * (i + 1)]
        assert torch.equal(got, write(model, row.inputs, **beams, attention_mask=torch.ones(1, len(row)).long()))


def test_beams_find_what_is_at_least_as_likely(gpt2: Any) -> None:
    row = Row(gpt2, 2, PICTURE, 4)

    def log_probability(new: Tensor) -> float:
        ids = torch.cat([row.ids[None], new], dim=1)
        with torch.no_grad():
            logits = gpt2(input_ids=ids, pixel_values=row.pictures).logits[:, :-1]
        logits[..., gpt2.config.image_token_id] = -torch.inf
        return logits.log_softmax(-1)[0, len(row) - 1 :].gather(-1, new[0, :, None]).sum().item()

    assert log_probability(write(gpt2, row.inputs, num_beams=8)) >= log_probability(write(gpt2, row.inputs)) - 1e-4


@pytest.mark.parametrize("parts", [(12,), (PICTURE, 9), (4, PICTURE, 8), (2, PICTURE, 3, PICTURE, 7)], ids=str)
def test_looking_candidates_up_in_the_prompt_changes_nothing(model: Any, parts: tuple) -> None:
    row = Row(model, *parts)
    # A prompt that repeats itself, so that candidates are found, and found right and wrong
    row.ids[-6:-3] = row.ids[-3:] = torch.tensor([7, 8, 9])
    for num_tokens in (2, 5):
        got = write(model, row.inputs, prompt_lookup_num_tokens=num_tokens, max_new_tokens=20)
        assert torch.equal(got, write(model, row.inputs, max_new_tokens=20))


def test_candidates_are_accepted_many_at_a_time(gpt2: Any) -> None:
    row = Row(gpt2, 3, PICTURE, 3)
    # The prompt holds the answer, behind what the prompt ends on
    answer = write(gpt2, row.inputs, max_new_tokens=6)
    calls = []
    handle = gpt2.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        row.ids = torch.cat([row.ids, answer[0], row.ids[-3:]])
        got = write(gpt2, row.inputs, prompt_lookup_num_tokens=6, max_new_tokens=30)
    finally:
        handle.remove()
    assert got[0].tolist() == argmax_by_hand(gpt2, row, 30)
    assert len(calls) < 30


def test_a_picture_in_the_prompt_is_no_candidate(gpt2: Any) -> None:
    # What is written next stands in front of a picture in the prompt, too: the lookup finds its placeholders there
    row = Row(gpt2, 3, PICTURE, 5)
    first = write(gpt2, row.inputs, max_new_tokens=1)[0, 0]
    row.ids[:3] = torch.cat([row.ids[-2:], first[None]])
    expected = argmax_by_hand(gpt2, row, 12)
    got = write(gpt2, row.inputs, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert got[0].tolist() == expected


@pytest.mark.parametrize("assistant", ["a language model", "a model with pictures"])
def test_another_model_may_assist_on_text(gpt2: Any, assistant: str) -> None:
    # On text alone: the library shows pictures to no assistant (transformers 5.23, `prepare_inputs_for_generation`)
    row = Row(gpt2, 9)
    if assistant == "a language model":
        helper = roughen(AutoModelForCausalLM.from_config(gpt2.config.text_config))
    else:
        helper = small_model("gpt2")
    assert torch.equal(write(gpt2, row.inputs, assistant_model=helper), write(gpt2, row.inputs))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("assistant", ["a language model", "the model itself"])
@pytest.mark.parametrize("restart_positions", [False, True])
def test_an_assistant_may_guess_from_whatever_a_processor_returns(
    kind: str, assistant: str, restart_positions: bool
) -> None:
    model = small_model(kind, restart_positions=restart_positions)
    if assistant == "a language model":
        helper = roughen(AutoModelForCausalLM.from_config(model.config.text_config))
    else:
        helper = copy.deepcopy(model)
    row = Row(model, 9)
    no_pictures, prefix = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
    given = {"attention_mask": torch.ones(1, 9, dtype=torch.long), "mm_token_type_ids": no_pictures}
    for types in (given, {**given, "token_type_ids": prefix}):
        expected = write(model, row.inputs, max_new_tokens=20, **types)
        assert torch.equal(write(model, row.inputs, max_new_tokens=20, assistant_model=helper, **types), expected)


def test_a_static_cache_writes_what_a_dynamic_one_writes(model: Any) -> None:
    rows = ragged_rows(model)
    for inputs in [batch(rows), *(row.inputs for row in rows)]:
        static = write(model, inputs, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, write(model, inputs))


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}], ids=str
)
def test_a_static_cache_holds_several_sequences_a_row(model: Any, kwargs: dict) -> None:
    inputs = batch(ragged_rows(model))
    static = write(model, inputs, cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(static, write(model, inputs, **kwargs))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compiled_forward_over_a_static_cache_writes_the_same_and_is_compiled_once(kind: str) -> None:
    model = small_model(kind)
    inputs = batch(ragged_rows(model))
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # `generate` leaves a CPU out unless told so
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        got = write(model, inputs, cache_implementation="static", compile_config=config)
        assert torch.equal(got, write(model, inputs))
        assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@pytest.mark.slow
def test_a_cache_that_was_emptied_and_filled_with_text_by_a_compiled_forward_knows_of_no_picture() -> None:
    model = small_model("llama")
    torch._dynamo.reset()
    cache = DynamicCache(config=model.config)
    model(**batch([Row(model, PICTURE, 4), Row(model, 3, PICTURE, 1)]), past_key_values=cache)
    cache.reset()
    text = {"input_ids": torch.full((2, 6), 5)}
    torch.compile(model.forward, backend="eager")(**text, past_key_values=cache)
    plain = model(**text, use_cache=True).past_key_values
    new = torch.full((2, 1), 7)
    got, expected = (model(input_ids=new, past_key_values=each).logits for each in (cache, plain))
    assert difference(got, expected) < 1e-5


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compiled_forward_reads_prompts_into_a_static_cache_that_is_emptied_and_filled_again(kind: str) -> None:
    model = small_model(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    rows = [Row(model, PICTURE, 6), Row(model, PICTURE, 6)]
    inputs = batch(rows)
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    cache = StaticCache(config=model.config, max_cache_len=len(rows[0]) + 1)
    model(**inputs, past_key_values=cache)  # an emptied cache has its memory already
    step = {"input_ids": torch.full((2, 1), 5), "attention_mask": torch.ones(2, len(rows[0]) + 1, dtype=torch.long)}
    told = {**step, "mm_token_type_ids": torch.nn.functional.pad(types, (0, 1))}
    for _ in range(2):
        inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
        cache.reset()
        plain = model(**inputs, use_cache=True)
        got = compiled(**inputs, mm_token_type_ids=types, past_key_values=cache, images_per_row=1)
        assert difference(got.logits, plain.logits) < 1e-5
        expected = model(**told, past_key_values=plain.past_key_values).logits
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model(**step, past_key_values=cache)
        assert difference(model(**told, past_key_values=cache).logits, expected) < 1e-5


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_a_picture_is_read_once_however_many_tokens_and_sequences_are_written(gpt2: Any, kwargs: dict) -> None:
    num_read = []
    handle = gpt2.model.vision_model.register_forward_hook(
        lambda module, args, inputs, output: num_read.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    try:
        gpt2.generate(**batch([Row(gpt2, PICTURE, 3), Row(gpt2, PICTURE, 5)]), max_new_tokens=4, **kwargs)
    finally:
        handle.remove()
    assert num_read == [2]


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_several_answers_to_a_picture_behind_a_cached_one_are_about_that_one(
    gpt2: Any, num_rows: int, options: dict[str, Any]
) -> None:
    first = [Row(gpt2, 3, PICTURE, 4) for _ in range(num_rows)]
    second = [Row(gpt2, 2, PICTURE, 3) for _ in range(num_rows)]
    said = gpt2.generate(**batch(first), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    said.past_key_values.batch_repeat_interleave(2)
    ids = torch.cat([said.sequences, torch.stack([row.ids for row in second])], dim=1)
    types = (ids == gpt2.config.image_token_id).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    pictures = [torch.cat([a.pictures, b.pictures]) for a, b in zip(first, second, strict=True)]
    expected = write(gpt2, {**inputs, "pixel_values": torch.cat(pictures)}, **options)
    new = {"pixel_values": torch.cat([row.pictures for row in second]), "past_key_values": said.past_key_values}
    assert torch.equal(write(gpt2, {**inputs, **new}, **options), expected)
    # The library takes the new tokens alone, too, with a mask of the whole sequence
    new["input_ids"] = ids[:, said.past_key_values.get_seq_length() :]
    assert torch.equal(write(gpt2, {**inputs, **new}, **options), expected)
    with pytest.raises(ValueError, match=r"placeholders .* pictures"):
        write(gpt2, {**inputs, **new, "pixel_values": torch.cat([new["pixel_values"], first[0].pictures])}, **options)


def test_candidates_behind_a_filled_cache_are_refused(gpt2: Any) -> None:
    said = gpt2.generate(**Row(gpt2, 5).inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    inputs = {"input_ids": torch.cat([said.sequences, torch.full((1, 2), 5)], dim=1)}
    with pytest.raises(ValueError, match="don't go with `past_key_values` that hold tokens"):
        write(gpt2, inputs, past_key_values=said.past_key_values, prompt_lookup_num_tokens=3)
    empty = DynamicCache(config=gpt2.config)
    assert torch.equal(write(gpt2, inputs, past_key_values=empty, prompt_lookup_num_tokens=3), write(gpt2, inputs))


@pytest.mark.parametrize("side", ["alone", "batch"])
def test_embeddings_are_continued_like_tokens(model: Any, side: str) -> None:
    rows = ragged_rows(model)
    for inputs in [batch(rows)] if side == "batch" else [row.inputs for row in rows]:
        expected = write(model, inputs)
        # Pictures in front: the library takes the batch size from the first tensor it meets
        in_front = [name for name in ("pixel_values", "attention_mask") if name in inputs]
        embeds = {name: inputs[name] for name in in_front}
        with torch.no_grad():
            embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(write(model, embeds), expected)
        types = (inputs["input_ids"] == model.config.image_token_id).long()
        assert torch.equal(write(model, embeds, mm_token_type_ids=types), expected)
        assert torch.equal(write(model, embeds, num_beams=2), write(model, inputs, num_beams=2))


def test_placeholders_beyond_the_vocabulary_write_the_same() -> None:
    within, beyond = small_model("gpt2"), small_model("gpt2", image_token_id=VOCAB_SIZE)
    inputs = batch(ragged_rows(within))
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == 2, VOCAB_SIZE)
    moved = {**inputs, "input_ids": ids}
    for kwargs in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
        expected = write(within, inputs, **kwargs)
        suppressed = write(beyond, moved, suppress_tokens=[2], **kwargs)
        assert torch.equal(suppressed, expected)
    types = (ids == VOCAB_SIZE).long()
    with torch.no_grad():
        embeds = within.get_input_embeddings()(inputs["input_ids"])
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
    }
    for kwargs in ({}, {"num_beams": 2}):
        got = write(beyond, inputs, mm_token_type_ids=types, suppress_tokens=[2], **kwargs)
        assert torch.equal(got, write(within, inputs, **kwargs))
    assert inputs["pixel_values"].shape[0] > 1


@pytest.mark.parametrize("suppressed", [None, [7]])
def test_a_picture_is_never_looked_up_for_words_to_write(suppressed: list[int] | None) -> None:
    model = small_model("llama", image_token_id=VOCAB_SIZE)
    row = Row(model, 4, PICTURE, 8)
    # What stands at the prompt's end stands in front of the picture, too
    row.ids[2:4] = row.ids[-2:] = torch.tensor([5, 6])
    options = {"max_new_tokens": 12, "suppress_tokens": suppressed}
    assert torch.equal(
        write(model, row.inputs, prompt_lookup_num_tokens=4, **options), write(model, row.inputs, **options)
    )


@pytest.mark.parametrize("told", [True, False], ids=["types given", "types found"])
def test_types_of_the_tokens_may_be_given(model: Any, told: bool) -> None:
    inputs = batch(ragged_rows(model))
    types = {"mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).long()} if told else {}
    for kwargs in ({}, {"use_cache": False}, {"num_beams": 2}):
        assert torch.equal(write(model, inputs, **types, **kwargs), write(model, inputs, **kwargs))


def test_pictures_that_were_read_before_write_the_same(model: Any) -> None:
    inputs = batch(ragged_rows(model))
    expected = write(model, inputs, num_beams=2)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
    assert torch.equal(write(model, inputs, mm_encoder_outputs={"image": features}, num_beams=2), expected)


@pytest.mark.parametrize("told", ["image tokens", "states of the vision stream"])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_pictures_that_were_read_before_serve_many_calls(model: Any, told: str, kwargs: dict) -> None:
    inputs = batch([Row(model, PICTURE, 5), Row(model, PICTURE, 3)])
    expected = write(model, inputs, **kwargs)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
    if told == "states of the vision stream":
        features = BaseModelOutputWithPooling(last_hidden_state=features.last_hidden_state)
    shapes = {name: each.shape for name, each in features.items()}
    for _ in range(2):
        assert torch.equal(write(model, inputs, mm_encoder_outputs={"image": features}, **kwargs), expected)
    assert {name: each.shape for name, each in features.items()} == shapes


def test_the_hint_for_pictures_in_front_writes_the_same(model: Any) -> None:
    inputs = batch([Row(model, PICTURE, 5), Row(model, PICTURE, 5)])
    assert torch.equal(write(model, inputs, images_per_row=1), write(model, inputs))


def turn(model: Any, row: Row, answer: Tensor, *parts: int | str) -> Row:
    """The conversation so far and one more turn of the user."""
    more = Row(model, *parts)
    new = Row(model, 1)
    new.ids = torch.cat([row.ids, answer, more.ids])
    new.pictures = torch.cat([row.pictures, more.pictures])
    return new


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((5,), (2, PICTURE, 3)),
        ((PICTURE, 4), (4,)),
        ((PICTURE, 4), (PICTURE, 3)),
        ((3, PICTURE, 4), (4,)),
        ((3, PICTURE, 4), (1, PICTURE, 1, PICTURE, 2)),
    ],
    ids=str,
)
def test_a_later_turn_continues_from_the_cache(model: Any, first: tuple, second: tuple, implementation: str) -> None:
    row = Row(model, *first)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    if implementation == "dynamic":
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=128)
    outputs = model.generate(**row.inputs, **settings, past_key_values=cache, return_dict_in_generate=True)
    answer = outputs.sequences[0, len(row) :]
    assert answer.tolist() == argmax_by_hand(model, row)

    whole = turn(model, row, answer, *second)
    inputs = {"input_ids": whole.ids[None], "past_key_values": outputs.past_key_values}
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    if len(whole.pictures) > len(row.pictures):
        inputs["pixel_values"] = whole.pictures[len(row.pictures) :]  # the others are in the cache
    expected = argmax_by_hand(model, whole)
    told = model.generate(**inputs, **settings, mm_token_type_ids=types)
    assert told[0, len(whole) :].tolist() == expected


@pytest.mark.parametrize("first", [(5,), (PICTURE, 4), (3, PICTURE, 4)], ids=str)
@pytest.mark.parametrize("second", [(4,), (PICTURE, 3), (2, PICTURE, 3)], ids=str)
def test_a_later_turn_of_one_row_needs_no_types(model: Any, first: tuple, second: tuple) -> None:
    row = Row(model, *first)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    outputs = model.generate(**row.inputs, **settings, return_dict_in_generate=True)
    whole = turn(model, row, outputs.sequences[0, len(row) :], *second)
    inputs = {"input_ids": whole.ids[None], "past_key_values": outputs.past_key_values}
    if len(whole.pictures) > len(row.pictures):
        inputs["pixel_values"] = whole.pictures[len(row.pictures) :]
    got = model.generate(**inputs, **settings)
    assert got[0, len(whole) :].tolist() == argmax_by_hand(model, whole)


def test_later_turns_of_a_ragged_batch_continue_from_the_cache(model: Any) -> None:
    rows = ragged_rows(model)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    inputs = batch(rows)
    outputs = model.generate(**inputs, **settings, return_dict_in_generate=True)
    seconds = [(PICTURE, 3), (3,), (1, PICTURE, 2), (2, PICTURE, 4)]
    longest = max(len(Row(model, *second)) for second in seconds)
    wholes = [
        turn(model, row, answer, *second)
        for row, answer, second in zip(
            rows, outputs.sequences[:, inputs["input_ids"].shape[1] :], seconds, strict=True
        )
    ]
    # The new turns are padded behind the old ones: pads in the midst of a row
    ids, mask = [outputs.sequences], [torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)]
    more = torch.zeros(len(rows), longest, dtype=torch.long)
    more_mask = torch.zeros_like(more)
    for i, (row, whole) in enumerate(zip(rows, wholes, strict=True)):
        new = whole.ids[len(row) + NEW :]
        more[i, longest - len(new) :] = new
        more_mask[i, longest - len(new) :] = 1
    ids, mask = torch.cat([*ids, more], dim=1), torch.cat([*mask, more_mask], dim=1)
    got = model.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=torch.cat([whole.pictures[len(row.pictures) :] for row, whole in zip(rows, wholes, strict=True)]),
        past_key_values=outputs.past_key_values,
        **settings,
    )
    for tokens, whole in zip(got[:, ids.shape[1] :].tolist(), wholes, strict=True):
        assert tokens == argmax_by_hand(model, whole)


def test_a_prompt_may_be_read_in_chunks(model: Any) -> None:
    # Chunks that end between pictures: here every one is a picture or as long as one
    L = model.config.image_seq_length
    rows = [
        Row(model, PICTURE, L, 3),
        Row(model, L, PICTURE, 3),
        Row(model, 2 * L + 3),
        Row(model, PICTURE, PICTURE, 3),
    ]
    for row in rows:
        got = write(model, row.inputs, prefill_chunk_size=L)
        assert got[0].tolist() == argmax_by_hand(model, row)
    inputs = batch(rows)
    assert torch.equal(write(model, inputs, prefill_chunk_size=L), write(model, inputs))


@pytest.mark.parametrize("num_image_update_layers", [0, 1])
def test_a_prompt_whose_pictures_are_read_alone_may_be_read_in_chunks(num_image_update_layers: int) -> None:
    model = small_model(num_image_update_layers=num_image_update_layers)
    inputs, length = Row(model, PICTURE, 5).inputs, model.config.image_seq_length
    assert torch.equal(write(model, inputs, prefill_chunk_size=length), write(model, inputs))


def test_a_prompt_may_be_read_in_chunks_into_a_static_cache_though_the_stacks_have_other_heads() -> None:
    model = small_model("gpt2", fusion_stack_config=LLAMA)
    inputs, length = Row(model, PICTURE, 5).inputs, model.config.image_seq_length
    options = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": length}
    assert torch.equal(write(model, inputs, **options), write(model, inputs))


@pytest.mark.parametrize("name", ["pixel_values", "mm_encoder_outputs"])
def test_pictures_that_are_none_are_none(gpt2: Any, name: str) -> None:
    text = Row(gpt2, 5).inputs
    assert torch.equal(write(gpt2, {**text, name: None}), write(gpt2, text))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_no_pictures_at_all_are_none(model: Any, num_beams: int) -> None:
    row = Row(model, 5)
    assert not len(row.pictures)
    expected = write(model, row.inputs, num_beams=num_beams)
    assert torch.equal(write(model, {**row.inputs, "pixel_values": row.pictures}, num_beams=num_beams), expected)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 100])
def test_a_chunk_that_splits_a_picture_is_right_or_refused(model: Any, chunk: int) -> None:
    for row in [Row(model, 5, PICTURE, 6), Row(model, 1, PICTURE, PICTURE, 2), Row(model, 9)]:
        ids = row.ids == model.config.image_token_id
        stops = [int(ids[:stop].sum()) % model.config.image_seq_length for stop in range(chunk, len(row), chunk)]
        if any(stops):
            with pytest.raises(ValueError, match="don't match the pictures"):
                write(model, row.inputs, prefill_chunk_size=chunk)
        else:
            assert write(model, row.inputs, prefill_chunk_size=chunk)[0].tolist() == argmax_by_hand(model, row)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_in_training_with_checkpoints_of_activations_the_same_is_written(options: dict[str, Any]) -> None:
    model = small_model()
    for inputs in (batch(ragged_rows(model)), batch([Row(model, PICTURE, 7)] * 2), batch([Row(model, 7)])):
        model.gradient_checkpointing_disable()
        expected = write(model.eval(), inputs, num_beams=options.get("num_beams", 1))
        model.gradient_checkpointing_enable()
        assert torch.equal(write(model.train(), inputs, **options), expected)
        with torch.no_grad():
            # The layers get the cache that is asked for, but fill none
            assert model(**inputs, use_cache=True, logits_to_keep=1).past_key_values.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"`model.eval\(\)`"):
        write(model, inputs, past_key_values=DynamicCache(config=model.config))
    # Which the library reads at the first step alone
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(ValueError, match=r"`inputs_embeds`.*`model.eval\(\)`"):
        write(model, {"inputs_embeds": embeds}, **options)


def test_logits_of_the_last_position_are_those_of_a_whole_forward(model: Any) -> None:
    rows = ragged_rows(model)
    outputs = model.generate(
        **batch(rows), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for i, row in enumerate(rows):
        ids = torch.cat([row.ids, outputs.sequences[i, -3:]])[None]
        with torch.no_grad():
            whole = model(**{**row.inputs, "input_ids": ids}, use_cache=False).logits[0]
        for step, logits in enumerate(outputs.logits):
            assert difference(logits[i], whole[len(row) - 1 + step]) < 2e-4


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"do_sample": True, "top_k": 0},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [5]},
    ],
    ids=str,
)
def test_a_placeholder_is_never_written_however_likely(model: Any, kwargs: dict[str, Any]) -> None:
    model, row = copy.deepcopy(model), Row(model, 2, PICTURE, 4)
    placeholder = model.config.image_token_id
    with torch.no_grad():
        # A head that answers what the model says next with a placeholder
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for _ in range(NEW):
            state = model.model(**row.inputs).last_hidden_state[0, -1]
            model.lm_head.weight[placeholder] = 50 * state
        assert model(**row.inputs).logits[0, -1].argmax() == placeholder
    new = write(model, row.inputs, **kwargs)
    assert new.shape == (1, NEW)
    assert placeholder not in new


@pytest.mark.parametrize("guidance_scale", [0.0, -0.5, 1.5])
def test_a_placeholder_is_not_written_where_another_prompt_guides(gpt2: Any, guidance_scale: float) -> None:
    row, other = Row(gpt2, 2, PICTURE, 4), Row(gpt2, 5)
    guided = {"negative_prompt_ids": other.ids[None], "guidance_scale": guidance_scale}
    new = write(gpt2, row.inputs, **guided)
    assert gpt2.config.image_token_id not in new
    if guidance_scale == 0:
        assert new[0].tolist() == argmax_by_hand(gpt2, other)


def test_guidance_is_refused_where_positions_start_anew() -> None:
    model = small_model("llama", restart_positions=True)
    with pytest.raises(ValueError, match=r"`guidance_scale` doesn't go with `config\.restart_positions`"):
        write(model, Row(model, 4).inputs, guidance_scale=1.5)


class Insist(LogitsProcessor):
    """A user's own processor that would have a placeholder."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] += 1e4
        return scores


def test_a_placeholder_is_not_written_for_a_logits_processor_either(model: Any) -> None:
    row = Row(model, 2, PICTURE, 4)
    processors = LogitsProcessorList([Insist(model.config.image_token_id)])
    assert model.config.image_token_id not in write(model, row.inputs, logits_processor=processors)


def test_the_cache_holds_text_and_pictures_for_the_fusion_layers_and_text_alone_for_the_others(model: Any) -> None:
    row = Row(model, 3, PICTURE, 5)
    outputs = model.generate(**row.inputs, max_new_tokens=4, return_dict_in_generate=True)
    config = model.config
    # The last token has been written, and not read
    whole, text = len(row) + 3, 8 + 3
    lengths = [layer.get_seq_length() for layer in outputs.past_key_values.layers]
    num_fusion, num_text = config.fusion_stack_config.num_hidden_layers, config.text_config.num_hidden_layers
    assert lengths == [whole] * num_fusion + [text] * num_text
    assert outputs.past_key_values.get_seq_length() == whole


def test_a_batch_with_pictures_in_front_caches_no_picture_in_the_text_layers(model: Any) -> None:
    outputs = model.generate(
        **batch([Row(model, PICTURE, 5), Row(model, PICTURE, 5)]), max_new_tokens=4, return_dict_in_generate=True
    )
    lengths = [layer.get_seq_length() for layer in outputs.past_key_values.layers]
    assert set(lengths) == {model.config.image_seq_length + 5 + 3, 5 + 3}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_prefix_is_read_both_ways_and_what_is_written_is_causal(model: Any, use_cache: bool) -> None:
    rows = ragged_rows(model)
    inputs = batch(rows)
    for i, row in enumerate(rows):
        ids = row.inputs["input_ids"]
        for _ in range(NEW):
            types = (torch.arange(ids.shape[1]) >= len(row)).long()[None]
            with torch.no_grad():
                logits = model(**{**row.inputs, "input_ids": ids}, token_type_ids=types, use_cache=False).logits[:, -1]
            logits[:, model.config.image_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        expected = ids[0, len(row) :].tolist()
        alone = {"token_type_ids": torch.zeros(1, len(row), dtype=torch.long)}
        assert write(model, row.inputs, use_cache=use_cache, **alone)[0].tolist() == expected
        types = torch.zeros_like(inputs["input_ids"])
        assert write(model, inputs, use_cache=use_cache, token_type_ids=types)[i].tolist() == expected


def test_a_prefix_is_read_both_ways_with_beams_and_a_static_cache(gpt2: Any) -> None:
    inputs = batch(ragged_rows(gpt2))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    expected = write(gpt2, inputs, use_cache=False)
    assert torch.equal(write(gpt2, inputs, cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(write(gpt2, inputs, num_beams=3), write(gpt2, inputs, num_beams=3, use_cache=False))


@pytest.mark.parametrize("parts", [(8,), (PICTURE, 6), (3, PICTURE, 5)], ids=str)
def test_a_prefix_must_be_read_at_once(gpt2: Any, parts: tuple) -> None:
    row = Row(gpt2, *parts)
    types = {"token_type_ids": torch.zeros(1, len(row), dtype=torch.long)}
    expected = write(gpt2, row.inputs, **types)
    assert torch.equal(write(gpt2, row.inputs, **types, prefill_chunk_size=len(row)), expected)
    with pytest.raises(ValueError, match="prefix"):
        write(gpt2, row.inputs, **types, prefill_chunk_size=len(row) - 2)


@pytest.mark.parametrize("len_prefix", [3, 6])
def test_a_prompt_whose_first_chunk_holds_its_prefix_is_read_as_a_whole_one(gpt2: Any, len_prefix: int) -> None:
    row = Row(gpt2, 2, PICTURE, 6)
    types = (torch.arange(len(row)) >= len_prefix).long()[None]

    def logits(**kwargs: Any) -> torch.Tensor:
        options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(gpt2.generate(**row.inputs, token_type_ids=types, **options, **kwargs).logits)

    expected = logits()
    # A picture is read at once, too
    for chunk_size in range(max(len_prefix, 2 + gpt2.config.image_seq_length), len(row) + 1):
        torch.testing.assert_close(logits(prefill_chunk_size=chunk_size), expected)
    with pytest.raises(ValueError, match=r"prefix|each whole"):
        logits(prefill_chunk_size=2)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_text_alone_is_continued_as_by_the_backbone(kwargs: dict) -> None:
    config = small_config("gpt2")
    config.text_config.num_hidden_layers = 4
    backbone = roughen(AutoModelForCausalLM.from_config(config.text_config))
    vision = AutoModel.from_config(config.vision_config)
    model = DuoStreamForConditionalGeneration.from_backbones(backbone, vision, num_fusion_layers=2).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    assert torch.equal(write(model, inputs), write(backbone, inputs))


def test_beams_without_a_cache_repeat_pictures_by_row(model: Any) -> None:
    rows = [Row(model, 3), Row(model, PICTURE, PICTURE, 2), Row(model, 1, PICTURE, 2)]
    together = write(model, batch(rows), num_beams=2, num_return_sequences=2, use_cache=False)
    for i, row in enumerate(rows):
        alone = write(model, row.inputs, num_beams=2, num_return_sequences=2, use_cache=False)
        assert torch.equal(together[2 * i : 2 * i + 2], alone)


def test_a_cache_may_be_cut_back(model: Any) -> None:
    # As assisted decoding does with candidates that were wrong
    row = Row(model, 2, PICTURE, 6)
    with torch.no_grad():
        cache = model(**row.inputs).past_key_values
        expected = model(**row.inputs, use_cache=False).logits[0, -3:]
        cache.crop(-3)
        assert cache.get_seq_length() == len(row) - 3
        again = model(input_ids=row.ids[None, -3:], past_key_values=cache).logits[0]
    assert difference(again, expected) < 2e-4


def test_a_streamer_gets_the_tokens_as_they_come(gpt2: Any) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    row, streamer = Row(gpt2, PICTURE, 4), Collect()
    new = write(gpt2, row.inputs, streamer=streamer)
    assert streamer.tokens == [*row.ids.tolist(), *new[0].tolist()]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_positions_that_restart_behind_the_prefix_do_so_at_every_step(kwargs: dict[str, Any]) -> None:
    model = small_model("llama", restart_positions=True)
    rows = ragged_rows(model)
    inputs = batch(rows)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    uncached = {key: value for key, value in kwargs.items() if key.startswith("num")}
    expected = write(model, inputs, use_cache=False, **uncached)
    assert torch.equal(write(model, inputs, **kwargs), expected)
    going_on = small_model("llama")
    assert not torch.equal(write(going_on, inputs, use_cache=False, **uncached), expected)
    causal = batch(rows)
    assert torch.equal(write(model, causal, **kwargs), write(going_on, causal, **kwargs)), "without a prefix"


@pytest.mark.parametrize("restart_positions", [False, True])
@pytest.mark.parametrize("parts", [(8,), (PICTURE, 6), (3, PICTURE, 5)], ids=str)
def test_looking_candidates_up_in_a_prefix_changes_nothing(parts: tuple, restart_positions: bool) -> None:
    model = small_model("llama", restart_positions=restart_positions)
    row = Row(model, *parts)
    # Of a prompt that repeats itself, candidates are found before its prefix is read
    row.ids[-4:-2] = row.ids[-2:] = torch.tensor([7, 8])
    types = {"token_type_ids": torch.zeros(1, len(row), dtype=torch.long)}
    expected = write(model, row.inputs, max_new_tokens=20, **types)
    assert torch.equal(write(model, row.inputs, max_new_tokens=20, prompt_lookup_num_tokens=3, **types), expected)


@torch.no_grad()
def test_going_on_behind_a_prefix_of_unknown_length_is_refused() -> None:
    model = small_model("llama", restart_positions=True)
    row = Row(model, 5)
    types = torch.zeros(1, 5, dtype=torch.long)
    cache = model(**row.inputs, token_type_ids=types, use_cache=True).past_key_values
    word = torch.tensor([[7]])
    for unknown in ({}, {"token_type_ids": torch.ones(1, 1, dtype=torch.long)}):
        with pytest.raises(ValueError, match="prefix_length"):
            model(input_ids=word, past_key_values=cache, **unknown)
    whole = torch.cat([row.inputs["input_ids"], word], dim=1)
    types = torch.nn.functional.pad(types, (0, 1), value=1)
    expected = model(input_ids=whole, token_type_ids=types, use_cache=False).logits[:, -1]
    told = model(input_ids=word, past_key_values=copy.deepcopy(cache), token_type_ids=types).logits[:, -1]
    length = torch.tensor([5])
    counted = model(input_ids=word, past_key_values=cache, prefix_length=length).logits[:, -1]
    torch.testing.assert_close(told, expected)
    torch.testing.assert_close(counted, expected)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_without_a_prefix_positions_have_nothing_to_restart_behind(kwargs: dict[str, Any]) -> None:
    inputs = Row(small_model("llama"), 2, PICTURE, 4).inputs
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    counted_on, restarted = (
        small_model("llama", restart_positions=restart).generate(**inputs, **settings) for restart in (False, True)
    )
    assert torch.equal(counted_on, restarted)


def test_the_prompt_s_tokens_may_be_favoured_though_placeholders_have_no_score() -> None:
    model = small_model("llama", image_token_id=VOCAB_SIZE)
    inputs = Row(model, 2, PICTURE, 4).inputs
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # So much that nothing else is written
    written = model.generate(**inputs, **settings, encoder_repetition_penalty=1e6)[0, -NEW:]
    assert set(written.tolist()) <= set(inputs["input_ids"][0].tolist())


def test_leaving_early_by_the_layers_of_one_stack_is_refused(gpt2: Any) -> None:
    with pytest.raises(ValueError, match="use an `assistant_model`"):
        write(gpt2, Row(gpt2, PICTURE, 5).inputs, assistant_early_exit=1)


def test_batching_that_the_two_stacks_do_not_know_is_refused(gpt2: Any) -> None:
    with pytest.raises(ValueError, match="use `generate`"):
        gpt2.generate_batch(inputs=[[5, 6, 7]])


def test_types_that_leave_out_the_first_tokens_of_a_cache_with_pictures_are_refused(model: Any) -> None:
    inputs = batch(ragged_rows(model))
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    with torch.no_grad():
        cache = model(**inputs, mm_token_type_ids=types, use_cache=True).past_key_values
    step = {"input_ids": torch.full((len(types), 1), 5), "past_key_values": cache}
    step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    told = torch.nn.functional.pad(types, (0, 1))
    with pytest.raises(ValueError, match="the length of the whole sequence, cached tokens included"):
        model(**step, mm_token_type_ids=told[:, 2:])
    assert model(**step, mm_token_type_ids=told).logits.shape[1] == 1


def test_types_that_put_a_picture_elsewhere_are_refused(model: Any) -> None:
    row = Row(model, 2, PICTURE, 3)
    types = (row.ids == model.config.image_token_id).long()[None]
    with torch.no_grad():
        text = model(input_ids=torch.arange(5, 9)[None], use_cache=True).past_key_values
        told = torch.nn.functional.pad(types, (4, 0))
        for num_missing in (1, 2):
            with pytest.raises(ValueError, match="at other places than their placeholders"):
                model(**row.inputs, mm_token_type_ids=told[:, num_missing:-1], past_key_values=text)
    # Tokens behind those that are told of
    embeds = model.get_input_embeddings()(torch.cat([row.ids, torch.tensor([5, 6])]))[None]
    with pytest.raises(ValueError, match="at other places than their placeholders"):
        model(inputs_embeds=embeds, pixel_values=row.pictures, mm_token_type_ids=types)
