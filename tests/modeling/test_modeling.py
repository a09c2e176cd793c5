"""The forward pass: whatever stands beside a token, and whoever computes it, it gets the states it should."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    BERT,
    KINDS,
    LLAMA,
    PICTURE,
    SIGLIP,
    VOCAB_SIZE,
    Row,
    batch,
    difference,
    needs_compiler,
    places,
    ragged_rows,
    roughen,
    small_config,
    small_model,
)
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
    StaticCache,
)

from duostream import (
    DuoStreamConfig,
    DuoStreamForConditionalGeneration,
    DuoStreamForMaskedLM,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
)
from duostream.modeling.modeling_duostream import own_attention
from duostream.modeling.objectives_duostream import find_labelled

# float32, with logits of up to ten; an error of layout is of the order of one
CLOSE = 2e-4


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return small_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return small_model("llama")


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).logits


@torch.no_grad()
def alone(model: Any, row: Row) -> Tensor:
    return logits(model, row.inputs, use_cache=False)[0]


def changed(left: Tensor, right: Tensor) -> list[bool]:
    """Which positions of one row differ."""
    return ((left - right).abs().amax(dim=-1) > CLOSE).flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_auto_classes_load_what_was_saved(kind: str, tied: bool, tmp_path: Path) -> None:
    model = small_model(kind, tie_word_embeddings=tied)
    inputs = batch(ragged_rows(model))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is DuoStreamForConditionalGeneration
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert torch.equal(logits(loaded, inputs), expected)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
        assert set(loaded.state_dict()) == set(model.state_dict())
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is DuoStreamModel
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_saved_keys_are_those_of_the_state_dict(tmp_path: Path) -> None:
    # Trainer resumes by them
    from safetensors import safe_open

    model = small_model("tiny")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize("config", [DuoStreamConfig, lambda: DuoStreamConfig.from_preset("tiny")])
def test_a_model_of_the_defaults_reads_and_learns(config: Any) -> None:
    model = DuoStreamForConditionalGeneration(config()).train()
    ids = torch.full((2, 50), model.config.image_token_id)
    ids[:, model.config.image_seq_length :] = torch.randint(3, 2048, (2, 50 - model.config.image_seq_length))
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    outputs = model(input_ids=ids, pixel_values=torch.randn(2, 3, 48, 48), labels=labels)
    outputs.loss.backward()
    assert outputs.loss < 1.3 * torch.tensor(2048.0).log()  # guessing
    assert outputs.past_key_values is None
    unmoved = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # Softmax does not feel what all keys share
    assert all("k_proj.bias" in name for name in unmoved), unmoved


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_gets_the_same_logits_alone_and_in_a_ragged_batch(model: Any, side: str, use_cache: bool) -> None:
    rows = ragged_rows(model)
    together = logits(model, batch(rows, side), use_cache=use_cache)
    for i, place in places(rows, side):
        assert difference(together[i, place], alone(model, rows[i])) < CLOSE


@pytest.mark.parametrize(
    "parts",
    [
        (6,),
        (PICTURE,),
        (PICTURE, 5),
        (3, PICTURE, 5),
        (3, PICTURE),
        (PICTURE, PICTURE, 4),
        (2, PICTURE, 1, PICTURE, PICTURE, 3),
    ],
    ids=str,
)
def test_text_and_pictures_may_stand_anywhere(model: Any, parts: tuple) -> None:
    row = Row(model, *parts)
    expected = alone(model, row)
    assert expected.shape == (len(row), VOCAB_SIZE)
    assert expected.isfinite().all()
    assert difference(logits(model, row.inputs, use_cache=True)[0], expected) < CLOSE
    # Beside a longer row it is padded, beside a shorter one it pads
    for other in (Row(model, 1), Row(model, 2, PICTURE, PICTURE, 2, PICTURE, PICTURE, 20)):
        for side in ("left", "right"):
            rows = [other, row]
            together = logits(model, batch(rows, side))
            assert difference(together[1, dict(places(rows, side))[1]], expected) < CLOSE


ROW = st.lists(st.one_of(st.just(PICTURE), st.integers(1, 4)), min_size=1, max_size=5)


@given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 999))
@settings(max_examples=25)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_rows_give_in_any_batch_what_they_give_alone(
    kind: str, plans: list[list], side: str, use_cache: bool, seed: int
) -> None:
    model = MODELS.setdefault(kind, small_model(kind))
    torch.manual_seed(seed)
    rows = [Row(model, *plan) for plan in plans]
    together = logits(model, batch(rows, side), use_cache=use_cache)
    for i, place in places(rows, side):
        assert difference(together[i, place], alone(model, rows[i])) < CLOSE


# Hypothesis calls a test many times, and fixtures once
MODELS: dict[str, Any] = {}


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_pad_holds_never_changes_anything(model: Any, side: str) -> None:
    rows = ragged_rows(model)
    clean = batch(rows, side)
    pads = clean["attention_mask"] == 0
    garbage = torch.randint(3, VOCAB_SIZE, pads.shape)
    dirty = {**clean, "input_ids": torch.where(pads, garbage, clean["input_ids"])}
    for use_cache in (True, False):
        left, right = logits(model, clean, use_cache=use_cache), logits(model, dirty, use_cache=use_cache)
        assert torch.equal(left[~pads], right[~pads])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_more_padding_never_changes_anything(model: Any, use_cache: bool) -> None:
    rows = ragged_rows(model)
    inputs = batch(rows, "right")
    expected = logits(model, inputs, use_cache=use_cache)
    for left, right in ((5, 0), (0, 5), (3, 4)):
        padded = {
            **inputs,
            "input_ids": torch.nn.functional.pad(inputs["input_ids"], (left, right)),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (left, right)),
        }
        got = logits(model, padded, use_cache=use_cache)[:, left : left + expected.shape[1]]
        assert difference(got[inputs["attention_mask"].bool()], expected[inputs["attention_mask"].bool()]) < CLOSE


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("parts", [(9,), (PICTURE, 7), (4, PICTURE, 5), (2, PICTURE, 3, PICTURE, 3)], ids=str)
def test_a_future_token_never_changes_an_earlier_logit(model: Any, parts: tuple, use_cache: bool) -> None:
    row = Row(model, *parts)
    before = logits(model, row.inputs, use_cache=use_cache)[0]
    for i, token in enumerate(row.ids.tolist()):
        if token == model.config.image_token_id:
            continue
        inputs = row.inputs
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0, i] = 3 + (token - 2) % (VOCAB_SIZE - 3)
        after = logits(model, inputs, use_cache=use_cache)[0]
        assert torch.equal(after[:i], before[:i])
        assert all(changed(after[i:], before[i:]))


def test_a_future_answer_token_never_changes_an_earlier_logit(model: Any) -> None:
    # In a batch with pads, and with the prompt as a prefix that is seen both ways
    rows = ragged_rows(model)
    inputs = batch(rows, "right")
    num_answer_tokens = 3
    lengths = inputs["attention_mask"].sum(dim=1)
    is_answer = torch.arange(inputs["input_ids"].shape[1]) >= (lengths - num_answer_tokens)[:, None]
    for kwargs in ({}, {"token_type_ids": is_answer.long()}):
        before = logits(model, inputs, **kwargs)
        for i in range(1, num_answer_tokens + 1):
            ids = inputs["input_ids"].clone()
            ids[torch.arange(len(rows)), lengths - i] = 5
            after = logits(model, {**inputs, "input_ids": ids}, **kwargs)
            for row, length in enumerate(lengths.tolist()):
                assert torch.equal(after[row, : length - i], before[row, : length - i])
                assert all(changed(after[row, length - i : length], before[row, length - i : length]))


def features(model: Any, row: Row) -> dict[str, Any]:
    """A row's inputs with its pictures read already, so that single image tokens can be changed."""
    with torch.no_grad():
        return {"input_ids": row.ids[None], "mm_encoder_outputs": {"image": model.get_image_features(row.pictures)}}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_pictures_tokens_see_each_other_both_ways_and_not_a_later_picture(model: Any, use_cache: bool) -> None:
    row = Row(model, 3, PICTURE, 2, PICTURE, 2)
    inputs, L = features(model, row), model.config.image_seq_length
    before = logits(model, inputs, use_cache=use_cache)
    starts = [3, 3 + L + 2]
    for picture, start in enumerate(starts):
        for token in range(L):
            moved = copy.deepcopy(inputs)
            states = moved["mm_encoder_outputs"]["image"].pooler_output
            states[picture, token] += torch.randn_like(states[picture, token])  # a layer norm hides a constant
            after = logits(model, moved, use_cache=use_cache)
            # Everything from the picture's own first token on, and nothing before it
            assert torch.equal(after[:, :start], before[:, :start])
            assert all(changed(after[:, start:], before[:, start:]))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_picture_may_be_read_forwards_only(model: Any, use_cache: bool) -> None:
    model = copy.deepcopy(model)
    model.config.bidirectional_images = False
    row = Row(model, 3, PICTURE, 2)
    inputs = features(model, row)
    before = logits(model, inputs, use_cache=use_cache)
    for token in range(model.config.image_seq_length):
        moved = copy.deepcopy(inputs)
        states = moved["mm_encoder_outputs"]["image"].pooler_output
        states[0, token] += torch.randn_like(states[0, token])  # a layer norm hides a constant
        after = logits(model, moved, use_cache=use_cache)
        assert changed(after, before) == [False] * (3 + token) + [True] * (len(row) - 3 - token)
    # Beside other rows, as alone
    rows = ragged_rows(model)
    got = logits(model, batch(rows), use_cache=use_cache)
    for i, place in places(rows, "left"):
        assert difference(got[i, place], alone(model, rows[i])) < CLOSE


@pytest.mark.parametrize("how", ["cached", "uncached", "with positions", "with segments"])
@pytest.mark.parametrize("parts", [(PICTURE, 6), (3, PICTURE, 5), (PICTURE, 2, PICTURE, 5)], ids=str)
def test_a_picture_that_is_hidden_changes_nothing(model: Any, parts: tuple, how: str) -> None:
    row = Row(model, *parts)
    start = parts.index(PICTURE) and parts[0]
    hidden = slice(start, start + model.config.image_seq_length)
    mask = torch.ones(1, len(row), dtype=torch.long)
    mask[0, hidden] = 0
    is_seen = mask[0].bool()
    without = {"input_ids": row.ids[is_seen][None]} | (
        {"pixel_values": row.pictures[1:]} if parts.count(PICTURE) > 1 else {}
    )
    kwargs: dict[str, Any] = {"use_cache": how == "cached"}
    if how == "with positions":
        kwargs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    elif how == "with segments":
        kwargs["segment_ids"] = torch.ones_like(mask)
    got = logits(model, row.inputs, attention_mask=mask, **kwargs)[0, is_seen]
    assert difference(got, logits(model, without, use_cache=False)[0]) < CLOSE


def test_a_picture_changes_what_is_said_about_it(model: Any) -> None:
    row = Row(model, 3, PICTURE, 5)
    before = alone(model, row)
    row.pictures = row.pictures + torch.randn_like(row.pictures)
    assert changed(alone(model, row), before) == [False] * 3 + [True] * (len(row) - 3)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("parts", [(9,), (PICTURE, 6), (3, PICTURE, 5)], ids=str)
def test_the_prefix_sees_the_whole_prefix_and_the_suffix_is_causal(model: Any, parts: tuple, use_cache: bool) -> None:
    row = Row(model, *parts)
    prefix_len = len(row) - 3
    token_type_ids = (torch.arange(len(row)) >= prefix_len).long()[None]

    def read(ids: Tensor) -> Tensor:
        inputs = {**row.inputs, "input_ids": ids}
        return logits(model, inputs, use_cache=use_cache, token_type_ids=token_type_ids)[0]

    before = read(row.ids[None])
    for i, token in enumerate(row.ids.tolist()):
        if token == model.config.image_token_id:
            continue
        ids = row.ids[None].clone()
        ids[0, i] = 3 + (token - 2) % (VOCAB_SIZE - 3)
        first = 0 if i < prefix_len else i
        assert changed(read(ids), before) == [False] * first + [True] * (len(row) - first)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_with_a_prefix_gets_the_same_logits_in_a_ragged_batch(model: Any, side: str, use_cache: bool) -> None:
    rows = ragged_rows(model)
    inputs = batch(rows, side)
    token_type_ids = torch.zeros_like(inputs["input_ids"])
    types = [(torch.arange(len(row)) >= len(row) - 3).long() for row in rows]
    for i, place in places(rows, side):
        token_type_ids[i, place] = types[i]
    together = logits(model, inputs, token_type_ids=token_type_ids, use_cache=use_cache)
    for i, place in places(rows, side):
        single = logits(model, rows[i].inputs, token_type_ids=types[i][None], use_cache=False)[0]
        assert difference(together[i, place], single) < CLOSE
        assert any(changed(single, alone(model, rows[i])))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_alone_gives_exactly_the_backbones_logits(kind: str) -> None:
    config = small_config(kind)
    config.text_config.num_hidden_layers = 4
    backbone = roughen(AutoModelForCausalLM.from_config(config.text_config))
    vision = AutoModel.from_config(config.vision_config)
    model = DuoStreamForConditionalGeneration.from_backbones(backbone, vision, num_fusion_layers=2).eval()
    ids = torch.randint(3, VOCAB_SIZE, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, 11:] = mask[1, 19:] = 0
    for use_cache in (True, False):
        assert (
            difference(
                logits(model, {"input_ids": ids}, use_cache=use_cache),
                logits(backbone, {"input_ids": ids}, use_cache=use_cache),
            )
            == 0.0
        )
        padded = {"input_ids": ids, "attention_mask": mask}
        ours, theirs = logits(model, padded, use_cache=use_cache), logits(backbone, padded, use_cache=use_cache)
        assert difference(ours[mask.bool()], theirs[mask.bool()]) == 0.0
    # In front, with the positions that `generate` makes of the mask
    left = {
        "input_ids": ids,
        "attention_mask": mask.flip(1),
        "position_ids": (mask.flip(1).cumsum(1) - 1).clamp(min=0),
    }
    kept = left["attention_mask"].bool()
    assert difference(logits(model, left)[kept], logits(backbone, left)[kept]) == 0.0
    labels = {**padded, "labels": ids.masked_fill(mask == 0, -100)}
    with torch.no_grad():
        assert model(**labels).loss == backbone(**labels).loss


def steps(model: Any, rows: list[Row], num_prompt: int, cache: Any, is_told: bool = True) -> Tensor:
    """Logits of all rows, left-padded: a prompt at once, and then token by token."""
    inputs = batch(rows, "left")
    ids, mask, pictures = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    types = (ids == model.config.image_token_id).long()
    pieces = []
    for start, stop in [(0, num_prompt)] + [(i, i + 1) for i in range(num_prompt, ids.shape[1])]:
        with torch.no_grad():
            outputs = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                pixel_values=pictures if start == 0 else None,
                mm_token_type_ids=types[:, :stop] if is_told else None,
                past_key_values=cache,
            )
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    return torch.cat(pieces, dim=1)


def test_reading_step_by_step_with_a_cache_gives_the_same_logits(model: Any) -> None:
    rows = ragged_rows(model)
    length = max(map(len, rows))
    got = steps(model, rows, num_prompt=length - 4, cache=None)
    for i, place in places(rows, "left"):
        assert difference(got[i, place], alone(model, rows[i])) < CLOSE


def test_one_row_without_padding_needs_no_types_to_continue(model: Any) -> None:
    for parts in ((PICTURE, 6), (3, PICTURE, 6), (1, PICTURE, 2, PICTURE, 6)):
        row = Row(model, *parts)
        expected, cache, pieces = alone(model, row), None, []
        for start, stop in [(0, len(row) - 5), *((i, i + 1) for i in range(len(row) - 5, len(row)))]:
            inputs = {"input_ids": row.ids[None, start:stop], "past_key_values": cache}
            with torch.no_grad():
                outputs = model(**inputs, pixel_values=row.pictures if start == 0 else None)
            cache = outputs.past_key_values
            pieces.append(outputs.logits[0])
        assert difference(torch.cat(pieces), expected) < CLOSE


def test_a_ragged_batch_cannot_continue_without_types(model: Any) -> None:
    rows = ragged_rows(model)
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        steps(model, rows, num_prompt=max(map(len, rows)) - 4, cache=None, is_told=False)


@pytest.mark.parametrize("picked", [[0], [1], [1, 2]])
def test_rows_picked_out_of_a_cache_whose_layout_was_that_of_others_are_refused(model: Any, picked: list[int]) -> None:
    rows = [Row(model, PICTURE, 6), Row(model, 4, PICTURE, 2), Row(model, 6, PICTURE)]
    with torch.no_grad():
        cache = model(**batch(rows), use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor(picked))
    ids = torch.cat([torch.stack([rows[i].ids for i in picked]), torch.full((len(picked), 1), 5)], dim=1)
    types = (ids == model.config.image_token_id).long()
    with pytest.raises(ValueError, match="picked out of it"):
        model(ids[:, -1:], past_key_values=cache, mm_token_type_ids=types, attention_mask=torch.ones_like(ids))


def test_so_are_rows_that_have_as_many_columns_of_text_at_other_places(model: Any) -> None:
    picture_len = model.config.image_seq_length
    rows = [Row(model, PICTURE, picture_len + 4), Row(model, 2, PICTURE, 2)]
    inputs = batch(rows, "left")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    ids = torch.cat([inputs["input_ids"][1:], torch.tensor([[5]])], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"][1:], (0, 1), value=1)
    types = (ids == model.config.image_token_id).long()
    with pytest.raises(ValueError, match="picked out of it"):
        model(ids[:, -1:], past_key_values=cache, mm_token_type_ids=types, attention_mask=mask)


def test_a_cache_is_cropped_behind_a_picture_and_not_back_to_before_it(model: Any) -> None:
    row, new = Row(model, 6, PICTURE, 3), torch.tensor([[5, 6]])
    image_len = model.config.image_seq_length
    for num_cut in (2, image_len + 3, image_len + 5):
        with torch.no_grad():
            cache = model(**row.inputs).past_key_values
        cache.crop(-num_cut)
        ids = torch.cat([row.ids[None, :-num_cut], new], dim=1)
        types = (ids == model.config.image_token_id).long()
        for told in ({}, {"mm_token_type_ids": types}):
            inputs = {"input_ids": new, "past_key_values": copy.deepcopy(cache), **told}
            if num_cut == 2:
                whole = {"input_ids": ids, "pixel_values": row.pictures}
                assert difference(logits(model, inputs), logits(model, whole)[:, -2:]) < CLOSE
                continue
            with pytest.raises(ValueError, match="cropped back to before a picture"):
                model(**inputs)


def test_a_static_cache_that_was_reset_is_a_new_one(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(**batch([Row(model, PICTURE, 6), Row(model, 4, PICTURE, 2)]), past_key_values=cache)
    cache.reset()
    ids = torch.randint(3, VOCAB_SIZE, (2, 6))
    pieces = [logits(model, {"input_ids": piece, "past_key_values": cache}) for piece in ids.split([4, 1, 1], dim=1)]
    assert difference(torch.cat(pieces, dim=1), logits(model, {"input_ids": ids})) < CLOSE


def test_nor_can_rows_whose_cache_has_a_slot_for_each_column(model: Any) -> None:
    # In no column do both have a picture, so both streams' caches are as long
    picture_len = model.config.image_seq_length
    rows = [Row(model, PICTURE, picture_len, 5), Row(model, picture_len, PICTURE, 5)]
    inputs = batch(rows, "left")
    for cache in (None, StaticCache(config=model.config, max_cache_len=64)):
        with torch.no_grad():
            cache = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
        new = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
        for told in ({}, {"mm_token_type_ids": torch.zeros(2, 1, dtype=torch.long)}):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            with pytest.raises(ValueError, match="mm_token_type_ids"):
                model(**new, **told, attention_mask=mask)


@given(st.lists(ROW, min_size=1, max_size=3), st.integers(0, 999), st.data())
@settings(max_examples=25)
def test_a_conversation_may_be_cut_anywhere_but_in_a_picture(
    plans: list[list], seed: int, data: st.DataObject
) -> None:
    model = MODELS.setdefault("gpt2", small_model("gpt2"))
    torch.manual_seed(seed)
    rows = [Row(model, *plan) for plan in plans]
    inputs = batch(rows, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    types = (ids == model.config.image_token_id).long()
    whole = types.cumsum(dim=1) % model.config.image_seq_length == 0
    cuts = [i + 1 for i in range(ids.shape[1] - 1) if whole[:, i].all()]
    stops = sorted(data.draw(st.sets(st.sampled_from(cuts), max_size=3))) if cuts else []
    seen = [0] * len(rows)
    cache, pieces = None, []
    for start, stop in zip([0, *stops], [*stops, ids.shape[1]], strict=True):
        pictures = []
        for i, row in enumerate(rows):
            num_new = int(types[i, start:stop].sum()) // model.config.image_seq_length
            pictures.append(row.pictures[seen[i] : seen[i] + num_new])
            seen[i] += num_new
        new = torch.cat(pictures)
        with torch.no_grad():
            outputs = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                pixel_values=new if len(new) else None,
                mm_token_type_ids=types[:, :stop],
                past_key_values=cache,
                use_cache=True,
            )
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    got = torch.cat(pieces, dim=1)
    for i, place in places(rows, "left"):
        assert difference(got[i, place], alone(model, rows[i])) < CLOSE


def loss_inputs(model: Any) -> dict[str, Tensor]:
    rows = ragged_rows(model) + ragged_rows(model)
    inputs = batch(rows, "right")
    is_masked = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
    is_masked[0, :-2] = True  # rows count for as many answers as they have, not each for the same
    return {**inputs, "labels": inputs["input_ids"].masked_fill(is_masked, -100)}


def gradients(model: Any) -> dict[str, Tensor]:
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, grad in left.items():
        scale = max(1.0, grad.abs().max().item())
        assert difference(grad, right[name]) / scale < 1e-4, name


def test_the_loss_is_the_cross_entropy_of_the_next_token(model: Any) -> None:
    inputs = loss_inputs(model)
    with torch.no_grad():
        outputs = model(**inputs)
    expected = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    )
    assert abs(outputs.loss - expected) < 1e-5
    assert outputs.past_key_values is None


def test_a_label_on_a_row_s_first_token_is_predicted_by_no_padding_in_front_of_it(model: Any) -> None:
    rows = ragged_rows(model)
    losses = []
    for side in ("left", "right"):
        inputs = batch(rows, side)
        is_masked = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
        labels = inputs["input_ids"].masked_fill(is_masked, -100)
        with torch.no_grad():
            losses.append(model(**inputs, labels=labels).loss)
    assert abs(losses[0] - losses[1]) < 1e-4


def test_merged_tokens_are_read_in_a_batch_as_alone_and_are_trained() -> None:
    model = small_model(vision_config={**SIGLIP, "image_size": 32}, spatial_merge_size=2)
    assert model.config.image_seq_length == 4
    rows = ragged_rows(model)
    together = logits(model, batch(rows))
    for i, place in places(rows, "left"):
        assert difference(together[i, place], logits(model, rows[i].inputs)[0]) < 1e-4
    row = Row(model, PICTURE, 5)
    labels = row.ids[None].masked_fill(row.ids[None] == model.config.image_token_id, -100)
    model(**row.inputs, labels=labels).loss.backward()
    assert model.model.vision_model.get_input_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_logits_are_of_labels_alone_with_the_same_loss_and_gradients(kind: str) -> None:
    model = small_model(kind)
    model.training = True  # the head alone: batch norm would tell batches apart
    inputs = loss_inputs(model)
    targets_per_row = int((inputs["labels"][:, 1:] != -100).sum(dim=1).max())
    whole = model(**inputs, num_items_in_batch=7)
    whole.loss.backward()
    expected = gradients(model)
    told = model(**inputs, num_items_in_batch=7, targets_per_row=targets_per_row)
    told.loss.backward()
    assert told.logits.shape[:2] == (8, targets_per_row) and whole.logits.shape[1] > targets_per_row
    assert abs(told.loss - whole.loss) < 1e-5
    assert_same_gradients(expected, gradients(model))
    # Of a few labels at a time, and none is returned
    model.config.loss_chunk_size = 5
    for hint in ({}, {"targets_per_row": targets_per_row}):
        chunked = model(**inputs, num_items_in_batch=7, **hint)
        chunked.loss.backward()
        assert chunked.logits is None
        assert abs(chunked.loss - whole.loss) < 1e-5
        assert_same_gradients(expected, gradients(model))
    # Labels that were shifted before, as where sequences are split over ranks
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    for chunk_size in (5, None):
        model.config.loss_chunk_size = chunk_size
        given = model(**{**inputs, "labels": torch.full_like(shifted, 3)}, shift_labels=shifted, num_items_in_batch=7)
        assert abs(given.loss - whole.loss) < 1e-5
    mean = model(**inputs).loss
    model.eval()
    evaluated = model(**inputs)
    assert abs(mean - evaluated.loss) < 1e-5 and evaluated.logits.shape == whole.logits.shape
    assert torch.equal(logits(model, {**inputs, "targets_per_row": 1}), logits(model, inputs))


@pytest.mark.parametrize("num_items_in_batch", [0, torch.tensor(0)], ids=["number", "tensor"])
@pytest.mark.parametrize("loss_chunk_size", [None, 4])
def test_from_rows_whose_answers_were_all_cut_away_nothing_is_learnt(
    num_items_in_batch: Any, loss_chunk_size: int | None
) -> None:
    model = small_model("llama", loss_chunk_size=loss_chunk_size).train()
    inputs = loss_inputs(model)
    labels = torch.full_like(inputs["labels"], -100)
    for hint in ({}, {"targets_per_row": 0}):
        loss = model(**{**inputs, "labels": labels}, num_items_in_batch=num_items_in_batch, **hint).loss
        loss.backward()
        assert loss == 0 and not any(grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("windowed", ["text_config", "fusion_stack_config"])
def test_a_window_over_sequences_that_share_a_beginning_is_refused_where_it_is_short(windowed: str) -> None:
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
    model = small_model("llama", **{windowed: mistral})
    beginning = Row(model, PICTURE, 3)
    words = torch.randint(3, VOCAB_SIZE, (1, 3 * 8))
    inputs = {
        "input_ids": torch.cat([beginning.ids[None], words], dim=1),
        "pixel_values": beginning.pictures,
        "segment_ids": torch.tensor([[0] * len(beginning) + [1] * 8 + [2] * 8 + [3] * 8]),
    }
    with pytest.raises(ValueError, match=f"`{windowed}.sliding_window`"):
        model(**inputs)
    short = {**inputs, **{name: inputs[name][:, :-16] for name in ("input_ids", "segment_ids")}}
    alone = {name: value for name, value in short.items() if name != "segment_ids"}
    assert difference(logits(model, short), logits(model, alone, use_cache=False)) < CLOSE
    # Without a shared beginning each sequence is in one piece
    apart = inputs["segment_ids"].clamp(min=1)
    assert logits(model, {**inputs, "segment_ids": apart}).shape[1] == apart.shape[1]


def test_collated_rows_with_pictures_at_different_places_are_read_without_labels_as_alone(model: Any) -> None:
    # As where `Trainer` smooths labels, in an evaluation
    rows = [Row(model, 2, PICTURE, 5), Row(model, 6, PICTURE, 3)]
    got = logits(model, {**batch(rows, "right"), "images_per_row": 1})
    for i, place in places(rows, "right"):
        assert difference(got[i, place], alone(model, rows[i])) < CLOSE


def test_fewer_labels_than_there_are_would_be_lost_and_are_refused() -> None:
    model = small_model("llama").train()
    inputs = loss_inputs(model)
    targets_per_row = int((inputs["labels"][:, 1:] != -100).sum(dim=1).max())
    with pytest.raises(ValueError, match=f"more labels than `targets_per_row`, which is {targets_per_row - 1}"):
        model(**inputs, targets_per_row=targets_per_row - 1)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 2))
def test_labelled_positions_are_packed_in_order(labelled: list[list[bool]], spare: int) -> None:
    has_label = torch.tensor(labelled)
    places = torch.arange(5).expand(len(labelled), -1)
    labels = places.masked_fill(~has_label, -100)
    count = min(int(has_label.sum(dim=1).max()) + spare, 5)
    index, kept = find_labelled(labels, count)
    for i, row in enumerate(has_label):
        own = places[0][row].tolist()
        assert kept[i].tolist() == own + [-100] * (count - len(own))
        assert index[i, : len(own)].tolist() == own


def test_gradients_of_one_batch_of_eight_are_those_of_two_of_four() -> None:
    for kind in KINDS:
        model = small_model(kind)  # not in training: batch norm would tell the batches apart
        inputs = loss_inputs(model)
        num_items = int((inputs["labels"][:, 1:] != -100).sum())
        model(**inputs, num_items_in_batch=num_items).loss.backward()
        whole = gradients(model)
        num_images = [0, len(inputs["pixel_values"]) // 2, len(inputs["pixel_values"])]
        for half in range(2):
            part = {name: values[4 * half : 4 * half + 4] for name, values in inputs.items() if name != "pixel_values"}
            part["pixel_values"] = inputs["pixel_values"][num_images[half] : num_images[half + 1]]
            model(**part, num_items_in_batch=num_items).loss.backward()
        assert_same_gradients(whole, gradients(model))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    model = small_model(kind).train()
    inputs = loss_inputs(model)
    model(**inputs).loss.backward()
    expected = gradients(model)

    runs = {"text": 0, "fusion": 0}
    for name, stack in (("text", model.model.text_model), ("fusion", model.model.fusion_model)):
        layers = stack.h if kind == "gpt2" else stack.layers

        def count(*_: Any, name: str = name) -> None:
            runs[name] += 1

        layers[0].mlp.register_forward_pre_hook(count)
    model.activation_checkpointing_enable()
    model(**inputs).loss.backward()
    assert runs == {"text": 2, "fusion": 2}  # the second time on the way back
    assert_same_gradients(expected, gradients(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_larger_vocabulary_keeps_the_old_logits(kind: str, tied: bool, tmp_path: Path) -> None:
    model = small_model(kind, tie_word_embeddings=tied)
    rows = ragged_rows(model)
    inputs = batch(rows)
    expected = logits(model, inputs)
    model.resize_token_embeddings(VOCAB_SIZE + 11, mean_resizing=False)
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 11
    grown = logits(model, inputs)
    assert grown.shape[-1] == VOCAB_SIZE + 11
    assert difference(grown[..., :VOCAB_SIZE], expected) < 1e-5
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied

    ids = inputs["input_ids"].clone()
    ids[:, -1] = VOCAB_SIZE + 10
    with torch.no_grad():
        assert model(**{**inputs, "input_ids": ids}, labels=ids.where(ids > 2, -100)).loss.isfinite()
    assert model.generate(**inputs, max_new_tokens=2).shape == (len(rows), inputs["input_ids"].shape[1] + 2)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, inputs), grown)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_reads_and_writes_finite_numbers(kind: str) -> None:
    model = small_model(kind)
    inputs = batch(ragged_rows(model))
    expected = logits(model, inputs)
    model.to(torch.bfloat16)
    got = logits(model, inputs)  # the pictures are float32, as image processors give them
    kept = inputs["attention_mask"].bool()
    assert got.dtype == torch.bfloat16
    assert got[kept].isfinite().all()
    assert torch.nn.functional.cosine_similarity(got[kept].float(), expected[kept], dim=-1).min() > 0.98
    assert model.generate(**inputs, max_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_is_loaded_in_the_dtype_asked_for(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small_model(kind).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    assert logits(loaded, batch(ragged_rows(loaded))).dtype == dtype


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_eager_attention_gives_what_sdpa_gives(model: Any, use_cache: bool) -> None:
    inputs = batch(ragged_rows(model))
    kept = inputs["attention_mask"].bool()
    types = (torch.arange(kept.shape[1]) >= kept.shape[1] - 3).long().expand(len(kept), -1)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for name in ("text_model", "fusion_model"):
        assert getattr(model.model, name).config._attn_implementation == "sdpa"
        assert getattr(eager.model, name).config._attn_implementation == "eager"
    for token_type_ids in (None, types):
        left, right = (logits(m, inputs, use_cache=use_cache, token_type_ids=token_type_ids) for m in (model, eager))
        assert difference(left[kept], right[kept]) < 1e-5 * max(1, left[kept].abs().max().item())


def test_an_attention_implementation_may_be_asked_for_where_the_vision_stream_has_no_attention(tmp_path: Path) -> None:
    # As users and recipes do, for all of a model; a convolutional vision stream has nothing to choose
    model = small_model("tiny")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.model.fusion_model.config._attn_implementation == "sdpa"
    loaded.set_attn_implementation("eager")
    loaded.set_attn_implementation("sdpa")
    assert loaded.model.fusion_model.config._attn_implementation == "sdpa"


def test_flash_attention_leaves_the_fusion_stack_to_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    # Flash kernels can't see a picture both ways. That the text stream uses them shows where they are installed only.
    config = small_config("llama")
    config.fusion_stack_config._attn_implementation = "flash_attention_2"
    logger = transformers.utils.logging.get_logger("duostream.modeling.modeling_duostream")
    logger.addHandler(caplog.handler)
    logger.warning_once.cache_clear()
    try:
        model = DuoStreamForConditionalGeneration(config)
    finally:
        logger.removeHandler(caplog.handler)
    assert model.model.fusion_model.config._attn_implementation == "sdpa"
    assert "flash" in caplog.text and "sdpa" in caplog.text


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/vllm-flash-attn3", "sdpa", "eager", None])
def test_flash_attention_by_any_name_leaves_the_fusion_stack_to_sdpa(name: str | None) -> None:
    # The kernels themselves show where they are installed only
    both_ways, forwards = (small_config("llama", bidirectional_images=value) for value in (True, False))
    is_flash = name is not None and "flash" in name
    assert own_attention(both_ways, name) == ({"fusion_stack_config": "sdpa"} if is_flash else {})
    assert own_attention(forwards, name) == {}


@torch.no_grad()
def test_flash_attention_is_refused_what_its_kernels_would_not_see() -> None:
    config = small_config("llama", bidirectional_images=False)
    model = DuoStreamForConditionalGeneration(config).eval()
    inputs = Row(model, PICTURE, 3).inputs
    # As where its kernels are installed
    model.config.fusion_stack_config._attn_implementation = "flash_attention_2"
    for name in ("token_type_ids", "segment_ids"):
        with pytest.raises(ValueError, match=f"`{name}`.*fusion_stack_config"):
            model(**inputs, **{name: torch.zeros_like(inputs["input_ids"])})


@pytest.mark.slow
@needs_compiler
def test_flex_attention_gives_what_sdpa_gives() -> None:
    # Compiled for the CPU. With a cache, a batch with pads needs a kernel that torch 2.13 makes C++ of that does not
    # compile (`cur_qSplitSize2` is not declared), so a cache is filled by one row here.
    model = small_model("llama")
    rows = ragged_rows(model)
    expected = logits(model, batch(rows), use_cache=False)
    cached = logits(model, rows[1].inputs, use_cache=True)
    model.set_attn_implementation("flex_attention")
    got = logits(model, batch(rows), use_cache=False)
    for i, place in places(rows, "left"):
        assert difference(got[i, place], expected[i, place]) < 1e-5
    assert difference(logits(model, rows[1].inputs, use_cache=True), cached) < 1e-5


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to reads as NaN (or as the largest integer)."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def loadable_config(kind: str) -> DuoStreamConfig:
    if kind == "bert":
        return small_config("bert", text_config={**BERT, "is_decoder": True})
    if kind == "gemma3":
        gemma = {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16}
        return small_config("llama", text_config=gemma, fusion_stack_config=gemma)
    if kind in ("dinov2", "clip_vision_model"):
        return small_config("llama", vision_config={**SIGLIP, "model_type": kind})
    return small_config(kind, projector_position_embeddings=True)


LOADABLE = [*KINDS, "bert", "gemma3", "dinov2", "clip_vision_model"]


@pytest.mark.parametrize("kind", LOADABLE)
def test_loading_leaves_nothing_uninitialised(kind: str, poisoned_memory: None, tmp_path: Path) -> None:
    saved = roughen(DuoStreamForConditionalGeneration(loadable_config(kind)))
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    weights, buffers = loaded.state_dict(), dict(loaded.named_buffers())
    for name, weight in saved.state_dict().items():
        assert torch.equal(weights[name], weight), name
    for name, buffer in saved.named_buffers():  # those that are not saved, too
        assert torch.equal(buffers.pop(name), buffer), name
    assert not buffers


@pytest.mark.parametrize("kind", LOADABLE)
def test_loading_from_nothing_leaves_nothing_uninitialised(kind: str, poisoned_memory: None) -> None:
    made = DuoStreamForConditionalGeneration(loadable_config(kind))
    loaded = DuoStreamForConditionalGeneration.from_pretrained(None, config=loadable_config(kind), state_dict={})
    for name, weight in loaded.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.abs().max() < 10, name
        expected = made.get_parameter(name)
        if expected.numel() > 1 and expected.std() == 0:  # norms and biases
            assert torch.equal(weight, expected), name
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, made.get_buffer(name)), name


@pytest.mark.parametrize("kind", LOADABLE)
def test_weights_that_a_checkpoint_lacks_spread_as_in_a_new_model(kind: str) -> None:
    # GPT-2 and CLIP draw some weights narrower or wider than `initializer_range`
    made = DuoStreamForConditionalGeneration(loadable_config(kind))
    loaded = DuoStreamForConditionalGeneration.from_pretrained(None, config=loadable_config(kind), state_dict={})
    for name, weight in loaded.named_parameters():
        expected = made.get_parameter(name)
        if expected.ndim > 1 and expected.std() > 0:
            assert 0.6 < weight.std() / expected.std() < 1.6, name


NO_MATCH = "don't match the pictures"


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_placeholders_and_pictures_that_do_not_match_are_refused(model: Any, use_cache: bool) -> None:
    row = Row(model, 2, PICTURE, 1, PICTURE, 3)
    with pytest.raises(ValueError, match="no pictures were given"):
        model(input_ids=row.ids[None], use_cache=use_cache)
    for num_pictures in (1, 3):
        pictures = row.pictures[:1].expand(num_pictures, -1, -1, -1)
        with pytest.raises(ValueError, match=NO_MATCH):
            model(input_ids=row.ids[None], pixel_values=pictures, use_cache=use_cache)
    with pytest.raises(ValueError, match=NO_MATCH):
        model(input_ids=Row(model, 6).ids[None], pixel_values=row.pictures, use_cache=use_cache)
    with pytest.raises(ValueError, match=NO_MATCH):  # as a truncated row would
        model(input_ids=row.ids[None, :-4], pixel_values=row.pictures, use_cache=use_cache)


@pytest.mark.parametrize("segments", [[1, 1, 2, 2, 1, 1], [1, 1, 2, 2, 0, 0], [-1, -1, 1, 1, 1, 1]], ids=str)
def test_sequences_that_are_numbered_out_of_order_are_refused(llama: Any, segments: list[int]) -> None:
    inputs = {"input_ids": Row(llama, 6).ids[None], "segment_ids": torch.tensor([segments])}
    with pytest.raises(ValueError, match=r"`segment_ids` are 0 in the beginning .* expected none below 0"):
        logits(llama, inputs)
    # Of padding any number may be told
    is_ordered = torch.tensor([segments]) >= torch.tensor([segments]).clamp(min=0).cummax(dim=1).values
    assert logits(llama, inputs, attention_mask=is_ordered.long()).isfinite().all()


def test_a_picture_split_over_two_rows_is_refused(model: Any) -> None:
    row = Row(model, PICTURE, PICTURE)
    ids = torch.cat([row.ids[:1], torch.tensor([5, 5]), row.ids[1:]]).view(2, -1)
    assert (ids == model.config.image_token_id).sum() == 2 * model.config.image_seq_length
    with pytest.raises(ValueError, match=NO_MATCH):
        model(input_ids=ids, pixel_values=row.pictures)


def test_pictures_of_another_size_are_refused() -> None:
    model = small_model("tiny")
    row = Row(model, PICTURE, 3)
    with pytest.raises(ValueError, match=r"pixel_values.*image_seq_length"):
        model(input_ids=row.ids[None], pixel_values=torch.randn(1, 3, 48, 48))


def test_arguments_that_contradict_each_other_are_refused(llama: Any) -> None:
    row = Row(llama, PICTURE, 3)
    inputs = features(llama, row)
    with pytest.raises(ValueError, match="input_ids"):
        llama()
    with pytest.raises(ValueError, match="input_ids"):
        llama(input_ids=row.ids[None], inputs_embeds=torch.zeros(1, len(row), 32))
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        llama(**inputs, pixel_values=row.pictures)
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        llama(**inputs, mm_token_type_ids=torch.zeros(1, 3, dtype=torch.long))
    types = (row.ids == llama.config.image_token_id).long()[None]
    with pytest.raises(ValueError, match="at other places than their placeholders"):
        llama(**inputs, mm_token_type_ids=types.roll(1, dims=1))


@pytest.mark.parametrize("has_cache", [None, DynamicCache, StaticCache], ids=["no cache", "cache", "static cache"])
@pytest.mark.parametrize("parts", [(6,), (PICTURE, 6)], ids=str)
@torch.no_grad()
def test_what_tells_of_other_tokens_than_there_are_is_refused(llama: Any, parts: tuple, has_cache: Any) -> None:
    row, num_past = Row(llama, *parts), 0
    inputs = {**row.inputs, "use_cache": has_cache is not None}
    if has_cache is not None:
        num_past = len(row)
        size = {"max_cache_len": 64} if has_cache is StaticCache else {}
        cache = has_cache(config=llama.config, **size)
        llama(**row.inputs, past_key_values=cache)
        ids = torch.cat([row.ids[None], torch.full((1, 3), 5)], dim=1)
        inputs = {"input_ids": ids[:, -3:], "mm_token_type_ids": (ids == llama.config.image_token_id).long()}
    seq_len = inputs["input_ids"].shape[1]
    total_len = num_past + seq_len
    right = {"attention_mask": {total_len}, "position_ids": {seq_len}, "token_type_ids": {seq_len, total_len}}
    if has_cache is None:
        right["segment_ids"] = {seq_len}
    for name, lengths in right.items():
        for length in {*lengths, 1, seq_len - 1, seq_len + 1, total_len - 1, total_len + 1, 64}:
            told = {name: torch.arange(length)[None] if name == "position_ids" else torch.ones(1, length).long()}
            given_cache = {"past_key_values": copy.deepcopy(cache)} if num_past else {}
            if length in lengths:
                llama(**inputs, **told, **given_cache)
                continue
            with pytest.raises(ValueError, match=rf"`{name}` is of (shape|another length).*expected \(batch, "):
                llama(**inputs, **told, **given_cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_that_restart_may_be_told_once_for_all_rows(attention: str) -> None:
    model = small_model("llama", restart_positions=True)
    model.set_attn_implementation(attention)
    inputs = batch([Row(model, PICTURE, 5), Row(model, 2, PICTURE, 3)])
    del inputs["attention_mask"]
    told = {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
    got, expected = (logits(model, inputs, **each, use_cache=False) for each in (told, {}))
    assert difference(got, expected) < CLOSE


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"])
def test_so_is_what_tells_of_other_rows(llama: Any, name: str) -> None:
    ids = torch.full((2, 6), 5)
    told = torch.arange(6) if name == "position_ids" else torch.zeros(6).long()
    for wrong in (told, told.expand(3, -1), told.expand(2, 1, -1)):
        with pytest.raises(ValueError, match=rf"`{name}` is of shape .*expected \(batch, .*here 2 x 6"):
            llama(input_ids=ids, **{name: wrong})


def test_ids_embeddings_and_pixels_of_another_kind_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"`input_ids` is of shape \(6,\); expected \(batch, seq_len\)"):
        llama(input_ids=torch.full((6,), 5))
    with pytest.raises(
        ValueError, match=r"`inputs_embeds` is of shape \(6, 32\); expected \(batch, seq_len, hidden\)"
    ):
        llama(inputs_embeds=torch.zeros(6, 32))
    row = Row(llama, PICTURE, 3)
    with pytest.raises(ValueError, match="`pixel_values` is a list; expected a tensor"):
        llama(input_ids=row.ids[None], pixel_values=list(row.pictures))


def test_token_types_of_pictures_that_are_not_given_are_refused(llama: Any) -> None:
    ids = torch.full((1, 6), 5)
    for tokens in ({"input_ids": ids}, {"inputs_embeds": llama.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="`mm_token_type_ids` tell of pictures, but no pictures were given"):
            llama(**tokens, mm_token_type_ids=torch.ones_like(ids))


def test_sequences_that_positions_alone_tell_apart_are_refused_with_pictures(llama: Any) -> None:
    rows = [Row(llama, PICTURE, 3), Row(llama, 4)]
    inputs = {"input_ids": torch.cat([row.ids for row in rows])[None], "pixel_values": rows[0].pictures}
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    for mask in (None, torch.ones_like(positions)):
        with pytest.raises(ValueError, match=r"`position_ids` start anew.* give `segment_ids`"):
            llama(**inputs, position_ids=positions, attention_mask=mask, use_cache=False)
    segments = torch.cat([torch.full_like(row.ids, number) for number, row in enumerate(rows, start=1)])[None]
    with torch.no_grad():
        packed = llama(**inputs, position_ids=positions, segment_ids=segments).logits[0, len(rows[0]) :]
    assert difference(packed, alone(llama, rows[1])) < CLOSE


def test_sequences_of_text_that_positions_alone_tell_apart_are_refused_where_they_would_see_each_other() -> None:
    # Tokens that differ: of equal ones any attention is the same
    inputs = {"input_ids": torch.arange(5, 12)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    plain = small_model("llama")
    with torch.no_grad():
        own = plain(input_ids=inputs["input_ids"][:, 3:], use_cache=False).logits[0]
        assert difference(plain(**inputs, use_cache=False).logits[0, 3:], own) < CLOSE
        seen = plain(input_ids=inputs["input_ids"], use_cache=False).logits[0, 3:]
        assert difference(seen, own) > CLOSE
    for model in (small_model("llama", restart_positions=True), small_model("llama", cls=DuoStreamForMaskedLM)):
        options = {} if isinstance(model, DuoStreamForMaskedLM) else {"use_cache": False}
        with pytest.raises(ValueError, match=r"`position_ids` start anew.* give `segment_ids`"):
            model(**inputs, **options)


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told of no picture"])
def test_sequences_of_text_that_positions_alone_tell_apart_see_themselves_alone(llama: Any, told: bool) -> None:
    ids = torch.arange(5, 19).view(2, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    types = {"mm_token_type_ids": torch.zeros_like(ids)} if told else {}
    with torch.no_grad():
        own = llama(input_ids=ids[:, 3:], use_cache=False).logits
        packed = llama(input_ids=ids, position_ids=positions, use_cache=False, **types).logits
    assert difference(packed[:, 3:], own) < CLOSE


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 32, 8), (2, 3, 20, 16), (3, 16, 16), (1, 2, 3, 16, 16)])
def test_pixels_of_another_shape_than_the_vision_model_s_pictures_are_refused(
    llama: Any, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"`pixel_values` .*expected"):
        llama.get_image_features(torch.randn(shape))


def test_no_pictures_at_all_are_none(model: Any) -> None:
    row = Row(model, 7)
    assert torch.equal(logits(model, {**row.inputs, "pixel_values": row.pictures[:0]}), logits(model, row.inputs))


def test_a_mask_for_one_stack_of_layers_is_refused(llama: Any) -> None:
    row = Row(llama, PICTURE, 5)
    mask = torch.ones(1, 1, len(row), len(row), dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"`attention_mask` is of shape .*expected \(batch, past_len \+ seq_len\)"):
        llama(**row.inputs, attention_mask=mask)


@torch.no_grad()
def test_positions_that_restart_behind_a_prefix_need_no_attention_mask(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.config.restart_positions = True
    row = Row(model, 8)
    inputs = {"input_ids": row.ids[None], "prefix_length": torch.tensor([5]), "use_cache": False}
    mask = torch.ones(1, len(row), dtype=torch.long)
    assert difference(model(**inputs).logits, model(**inputs, attention_mask=mask).logits) < CLOSE


def test_a_cache_of_other_layers_is_refused(llama: Any) -> None:
    cache = DynamicCache(config=llama.config.fusion_stack_config)
    with pytest.raises(ValueError, match=r"2 layers.*have 4"):
        llama(input_ids=Row(llama, 3).ids[None], past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("num_images", [1, 2])
def test_the_hint_changes_no_logit(model: Any, num_images: int, use_cache: bool) -> None:
    rows = [Row(model, *[PICTURE] * num_images, n) for n in (5, 2, 7)]
    inputs = batch(rows, "right")
    kept = inputs["attention_mask"].bool()
    told = logits(model, inputs, images_per_row=num_images, use_cache=use_cache)
    assert torch.equal(told[kept], logits(model, inputs, use_cache=use_cache)[kept])


def test_the_hint_holds_wherever_the_pictures_stand_without_a_cache(model: Any) -> None:
    inputs = batch([Row(model, 2, PICTURE, 3), Row(model, PICTURE, 5), Row(model, 1, PICTURE, 1)], "right")
    kept = inputs["attention_mask"].bool()
    told = logits(model, inputs, images_per_row=1, use_cache=False)
    assert torch.equal(told[kept], logits(model, inputs, use_cache=False)[kept])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_wrong_hint_is_refused(model: Any, use_cache: bool) -> None:
    inputs = batch([Row(model, PICTURE, 5), Row(model, PICTURE, 5)], "right")
    with pytest.raises(ValueError, match="images_per_row=2"):
        model(**inputs, images_per_row=2, use_cache=use_cache)
    with pytest.raises(ValueError, match="images_per_row=1"):
        uneven = batch([Row(model, PICTURE, PICTURE, 2), Row(model, 30)], "right")
        model(**uneven, images_per_row=1, use_cache=use_cache)


def test_a_wrong_hint_that_holds_the_text_changes_no_logit(model: Any) -> None:
    inputs = batch([Row(model, PICTURE, 5), Row(model, PICTURE, PICTURE, 5)], "right")
    kept = inputs["attention_mask"].bool()
    expected = logits(model, inputs, use_cache=False)[kept]
    for images_per_row in (1, 2):
        got = logits(model, inputs, use_cache=False, images_per_row=images_per_row)[kept]
        assert difference(got, expected) < CLOSE


class Record(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_with_the_hint_the_host_never_waits_for_the_data(kind: str, use_cache: bool) -> None:
    # Fake tensors have no data: whoever needs some (`int(tensor)`, `if tensor`, `nonzero`, a boolean index) raises.
    # While they are used the library leaves out its own questions about masks, as it does in a compiled graph.
    model = small_model(kind)
    inputs = batch([Row(model, PICTURE, n) for n in (5, 2, 7)], "right")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        with Record() as record:
            outputs = model(**fake, images_per_row=1, use_cache=use_cache)
        # A device is told what must hold, and goes on
        assert any("_assert_async" in name for name in record.names)
        assert outputs.logits.shape == (*inputs["input_ids"].shape, VOCAB_SIZE)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            model(**fake, use_cache=use_cache)  # how long the text is must then be found out


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_states_and_attentions_are_the_fusion_stacks_over_all_positions(model: Any, use_cache: bool) -> None:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    rows = ragged_rows(model)
    inputs = batch(rows)
    shape, config = inputs["input_ids"].shape, model.config.fusion_stack_config
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=use_cache)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert {states.shape for states in outputs.hidden_states} == {(*shape, config.hidden_size)}
    assert {a.shape for a in outputs.attentions} == {(shape[0], config.num_attention_heads, shape[1], shape[1])}
    assert len(outputs.attentions) == config.num_hidden_layers
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    # What enters the fusion stack: projected pictures at their places
    is_image = inputs["input_ids"] == model.config.image_token_id
    entering = outputs.hidden_states[0][is_image].view_as(outputs.image_hidden_states)
    assert torch.equal(entering, outputs.image_hidden_states)
    i, place = list(places(rows, "left"))[3]
    attention = outputs.attentions[0][i, :, place, place]
    picture = slice(0, model.config.image_seq_length)
    assert (attention[:, picture, picture] > 0).all()
    assert (attention[:, picture, picture.stop :] == 0).all()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_pictures_never_pass_the_text_stream(llama: Any, use_cache: bool) -> None:
    model, lengths = copy.deepcopy(llama), []
    model.model.text_model.layers[0].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    logits(
        model, batch([Row(model, PICTURE, PICTURE, 3), Row(model, PICTURE, PICTURE, 5)], "right"), use_cache=use_cache
    )
    assert lengths == [5]


def test_outputs_come_as_a_tuple_when_asked(llama: Any) -> None:
    inputs = Row(llama, PICTURE, 3).inputs
    with torch.no_grad():
        outputs = llama(**inputs, return_dict=False, use_cache=False)
        assert isinstance(outputs, tuple) and torch.equal(outputs[0], llama(**inputs, use_cache=False).logits)


def test_pictures_that_were_read_before_give_the_same_logits(model: Any) -> None:
    row = Row(model, 2, PICTURE, 3, PICTURE, 2)
    expected, inputs = logits(model, row.inputs), features(model, row)
    assert torch.equal(logits(model, inputs), expected)
    # What the vision stream alone gave is as good
    inputs["mm_encoder_outputs"]["image"].pooler_output = None
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_embeddings_give_the_logits_of_their_tokens(model: Any, use_cache: bool) -> None:
    inputs = batch(ragged_rows(model))
    expected = logits(model, inputs, use_cache=use_cache)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
    kept = inputs["attention_mask"].bool()
    assert torch.equal(logits(model, inputs, use_cache=use_cache)[kept], expected[kept])
    # Placeholders found by their types need no embedding
    types = (ids == model.config.image_token_id).long()
    inputs["inputs_embeds"] = inputs["inputs_embeds"].masked_fill(types[..., None] == 1, 7.0)
    got = logits(model, inputs, use_cache=use_cache, mm_token_type_ids=types)
    assert torch.equal(got[kept], expected[kept])


def test_a_placeholder_may_be_beyond_the_vocabulary() -> None:
    within, beyond = small_model("llama"), small_model("llama", image_token_id=VOCAB_SIZE)
    rows = ragged_rows(within)
    for inputs in (rows[0].inputs, rows[1].inputs, batch(rows)):
        expected = logits(within, inputs)
        ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == 2, VOCAB_SIZE)
        for use_cache in (True, False):
            got = logits(beyond, {**inputs, "input_ids": ids}, use_cache=use_cache)
            kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            assert difference(got[kept], expected[kept]) < CLOSE
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        beyond(inputs_embeds=torch.zeros(1, len(rows[0]), 32), pixel_values=rows[0].pictures)


def test_logits_are_kept_where_asked(model: Any) -> None:
    inputs = batch(ragged_rows(model))
    everywhere = logits(model, inputs)
    # A product of fewer rows may round otherwise
    assert difference(logits(model, inputs, logits_to_keep=1), everywhere[:, -1:]) < 1e-5
    assert difference(logits(model, inputs, logits_to_keep=3), everywhere[:, -3:]) < 1e-5
    positions = torch.tensor([0, 4])
    assert difference(logits(model, inputs, logits_to_keep=positions), everywhere[:, positions]) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_default_positions_may_be_given(model: Any, use_cache: bool) -> None:
    for parts in ((6,), (PICTURE, 4), (2, PICTURE, 3, PICTURE, 2)):
        row = Row(model, *parts)
        expected = alone(model, row)
        got = logits(model, row.inputs, position_ids=torch.arange(len(row))[None], use_cache=use_cache)
        assert difference(got[0], expected) < CLOSE
    inputs = batch(ragged_rows(model))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    kept = inputs["attention_mask"].bool()
    got, expected = (logits(model, inputs, position_ids=p, use_cache=use_cache)[kept] for p in (positions, None))
    assert difference(got, expected) < CLOSE


def test_a_static_cache_gives_the_same_logits(model: Any) -> None:
    for row in ragged_rows(model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert difference(logits(model, row.inputs, past_key_values=cache)[0], alone(model, row)) < CLOSE


def test_a_training_model_keeps_no_cache_unless_asked(llama: Any) -> None:
    model = copy.deepcopy(llama).train()
    inputs = Row(model, PICTURE, 3).inputs
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None
    assert llama(**inputs).past_key_values is not None


@pytest.mark.parametrize("projector_type", ["mlp", "linear", "none"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no positions"])
def test_every_projector_gives_tokens_of_the_fusion_stacks_width(projector_type: str, positions: bool) -> None:
    model = small_model(
        "llama",
        vision_config={**SIGLIP, "hidden_size": 32},
        projector_type=projector_type,
        projector_hidden_size=20,
        projector_position_embeddings=positions,
    )
    # In the layout the model gives its pictures: in another one a convolution may round differently
    picture = torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        outputs = model.get_image_features(picture)
        assert outputs.pooler_output.shape == (1, 4, 32)
        plain = model.model.vision_model(pixel_values=picture).last_hidden_state
        assert torch.equal(outputs.last_hidden_state, plain)
        model.model.vision_model.post_layernorm = torch.nn.Identity()
    assert (difference(outputs.pooler_output, plain) == 0) is (projector_type == "none" and not positions)


def test_new_positions_are_as_large_as_the_tokens_they_are_added_to() -> None:
    torch.manual_seed(0)
    model = DuoStreamForConditionalGeneration(DuoStreamConfig.from_preset("tiny")).eval()
    projector = model.model.projector
    with torch.no_grad():
        tokens = model.get_image_features(torch.randn(8, 3, 48, 48)).pooler_output
        positions = projector.position_embeddings.weight
        assert 0.5 < positions.std() / (tokens - positions).std() < 2


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
def test_any_layer_of_the_vision_stream_may_be_read(layer: int) -> None:
    model = small_model("llama", vision_feature_layer=layer)
    # In the layout the model gives its pictures: in another one a convolution may round differently
    picture = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        outputs = model.model.vision_model(pixel_values=picture, output_hidden_states=True)
        got = model.get_image_features(picture).last_hidden_state
    assert torch.equal(got, outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer])


@pytest.mark.parametrize(
    ("field", "value"),
    [("vision_feature_layer", -9), ("vision_feature_layer", [0, 9]), ("num_image_update_layers", 7)],
)
def test_a_layer_that_is_not_there_is_named_when_a_picture_is_read(field: str, value: int | list[int]) -> None:
    model = small_model("llama")
    model.config.update({field: value})
    number = value[-1] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=f"`{field}` (is )?{number}"):
        model(**Row(model, PICTURE, 5).inputs)


def test_several_layers_of_the_vision_stream_may_be_read_and_come_back_from_disk(tmp_path: Path) -> None:
    model = small_model("llama", vision_feature_layer=[0, -1])
    row = Row(model, PICTURE, 5)
    with torch.no_grad():
        outputs = model.model.vision_model(pixel_values=row.pictures, output_hidden_states=True)
        got = model.get_image_features(row.pictures).last_hidden_state
        assert torch.equal(got, torch.cat([outputs.hidden_states[0], outputs.last_hidden_state], dim=-1))
        model.save_pretrained(tmp_path)
        again = DuoStreamForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert again.config.vision_feature_layer == [0, -1]
        assert torch.equal(again(**row.inputs).logits, model(**row.inputs).logits)
    # The weights are those for two layers
    again.config.vision_feature_layer = -1
    with pytest.raises(ValueError, match=r"of width 24, but .*`config.image_hidden_size` are 4 and 48"):
        again.get_image_features(row.pictures)


def test_a_model_that_writes_refuses_a_stream_that_looks_ahead() -> None:
    with pytest.raises(ValueError, match=r"text_config.*bert.*is_decoder"):
        DuoStreamForConditionalGeneration(small_config("bert"))
    with pytest.raises(ValueError, match=r"fusion_stack_config.*bert"):
        DuoStreamForConditionalGeneration(small_config("llama", fusion_stack_config=BERT))


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_reads_a_row_the_same_alone_and_in_a_ragged_batch(side: str) -> None:
    model = small_model("bert", cls=DuoStreamModel)
    rows = ragged_rows(model)
    with torch.no_grad():
        together = model(**batch(rows, side)).last_hidden_state
        for i, place in places(rows, side):
            assert difference(together[i, place], model(**rows[i].inputs).last_hidden_state[0]) < CLOSE


def test_an_encoder_reads_text_both_ways_and_keeps_no_cache() -> None:
    model = small_model("bert", cls=DuoStreamModel)
    row = Row(model, 3, PICTURE, 4)
    with torch.no_grad():
        before = model(**row.inputs)
        row.ids[-1] = 3 + (row.ids[-1] - 2) % (VOCAB_SIZE - 3)
        after = model(**row.inputs)
    assert before.past_key_values is None
    # Pictures hear of it only through the text before them
    assert all(changed(before.last_hidden_state, after.last_hidden_state))
    with pytest.raises(ValueError, match="past_key_values"):
        model(**row.inputs, past_key_values=DynamicCache(config=model.config))


def test_a_frozen_stream_learns_nothing_and_keeps_its_statistics() -> None:
    model = small_model("tiny").train()
    model.freeze("vision", "text")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = Row(model, PICTURE, 5).inputs
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 2, -100)
    model(**inputs, labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {".".join(name.split(".")[:2]) for name in moved} == {"model.projector", "model.fusion_model"}
    with pytest.raises(ValueError, match="'eyes'"):
        model.freeze("eyes")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_frozen_head_goes_with_its_embeddings_or_with_the_fusion_stack(is_tied: bool) -> None:
    for parts, frozen in ((("text", "vision", "fusion"), True), (("fusion",), not is_tied), (("text",), is_tied)):
        model = small_model(tie_word_embeddings=is_tied)
        model.freeze(*parts)
        assert model.lm_head.weight.requires_grad is not frozen
        assert all(weight.requires_grad for weight in model.model.projector.parameters())


@pytest.mark.parametrize("parts", [(9,), (PICTURE, 6)], ids=str)
def test_types_of_the_new_tokens_alone_are_enough_with_a_cache(parts: tuple) -> None:
    model = small_model("gpt2")
    row = Row(model, *parts)
    cut, pictures = len(row) - 4, {"pixel_values": row.pictures} if len(row.pictures) else {}
    types = (torch.arange(len(row)) < cut).long()[None]
    expected = logits(model, row.inputs, token_type_ids=types, use_cache=False)[:, cut:]
    for some in (types, types[:, cut:]):
        with torch.no_grad():
            cache = model(input_ids=row.ids[None, :cut], **pictures).past_key_values
            got = model(input_ids=row.ids[None, cut:], past_key_values=cache, token_type_ids=some).logits
        assert difference(got, expected) < CLOSE


def test_saved_configs_name_the_model_that_wrote_them(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "duostream"
    assert saved["architectures"] == ["DuoStreamForConditionalGeneration"]


@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize("restart_positions", [False, True])
@torch.no_grad()
def test_rows_in_one_get_the_logits_of_rows_of_their_own(
    model: Any, has_prefix: bool, restart_positions: bool
) -> None:
    model = copy.deepcopy(model)
    model.config.restart_positions = restart_positions
    rows = ragged_rows(model)
    input_ids = torch.cat([row.ids for row in rows])
    segments = torch.cat([torch.full_like(row.ids, number) for number, row in enumerate(rows, start=1)])
    # Beside a row that fills the other's end with pads
    attention_mask = torch.ones(2, len(input_ids), dtype=torch.long)
    attention_mask[1, len(rows[0]) :] = 0
    second = torch.nn.functional.pad(rows[0].ids, (0, len(input_ids) - len(rows[0])))
    types = {}
    if has_prefix:
        # All but the last three tokens of each
        suffixes = torch.cat([(torch.arange(len(row)) >= len(row) - 3).long() for row in rows])
        types = {"token_type_ids": torch.stack([suffixes, suffixes])}
    got = model(
        input_ids=torch.stack([input_ids, second]),
        pixel_values=torch.cat([*(row.pictures for row in rows), rows[0].pictures]),
        attention_mask=attention_mask,
        segment_ids=torch.stack([segments, torch.ones_like(segments)]),
        **types,
    ).logits
    together = [*got[0].split([len(row) for row in rows]), got[1, : len(rows[0])]]
    for row, own_logits in zip([*rows, rows[0]], together, strict=True):
        own = {"token_type_ids": (torch.arange(len(row)) >= len(row) - 3).long()[None]} if has_prefix else {}
        expected = model(**row.inputs, **own, use_cache=False).logits[0]
        torch.testing.assert_close(own_logits, expected, atol=2e-4, rtol=1e-4)


def packed(rows: list[Row], num_shared: int) -> dict[str, Tensor]:
    """Rows that begin alike as one: the beginning once, then what follows it in each."""
    beginning, rests = rows[0].ids[:num_shared], [row.ids[num_shared:] for row in rows]
    numbers = [torch.full_like(rest, number) for number, rest in enumerate(rests, start=1)]
    pictures = {"pixel_values": rows[0].pictures} if len(rows[0].pictures) else {}
    return {
        "input_ids": torch.cat([beginning, *rests])[None],
        "segment_ids": torch.cat([torch.zeros_like(beginning), *numbers])[None],
        **pictures,
    }


@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize("parts", [(PICTURE, 3), (2, PICTURE, 3, PICTURE), (5,)], ids=str)
@pytest.mark.parametrize("restart_positions", [False, True])
@torch.no_grad()
def test_continuations_of_one_beginning_get_the_logits_of_rows_of_their_own(
    model: Any, parts: tuple, has_prefix: bool, restart_positions: bool
) -> None:
    model = copy.deepcopy(model)
    model.config.restart_positions = restart_positions
    beginning = Row(model, *parts)
    rows = []
    for length in (4, 1, 6):
        row = Row(model, length)
        row.ids, row.pictures = torch.cat([beginning.ids, row.ids]), beginning.pictures
        rows.append(row)
    together = packed(rows, len(beginning))
    padding = {
        name: torch.nn.functional.pad(value, (0, 3), value=0)
        for name, value in together.items()
        if name != "pixel_values"
    }
    padding["attention_mask"] = torch.nn.functional.pad(torch.ones_like(together["input_ids"]), (0, 3))
    for inputs in (together, {**together, **padding}):
        if has_prefix:
            inputs = {**inputs, "token_type_ids": (inputs["segment_ids"] > 0).long()}
            if "attention_mask" in inputs:
                inputs["token_type_ids"][inputs["attention_mask"] == 0] = 1
        logits = model(**inputs, use_cache=False).logits[0]
        for number, row in enumerate(rows, start=1):
            types = {}
            if has_prefix:
                types["token_type_ids"] = (torch.arange(len(row)) >= len(beginning)).long()[None]
            alone = model(**row.inputs, **types, use_cache=False).logits[0]
            segments = inputs["segment_ids"][0]
            is_own = (segments == 0) | (segments == number)
            if "attention_mask" in inputs:
                is_own &= inputs["attention_mask"][0] == 1
            torch.testing.assert_close(logits[is_own], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_continuations_give_the_loss_and_gradients_of_rows_of_their_own(attn_implementation: str) -> None:
    model = small_model("llama")
    model.set_attn_implementation(attn_implementation)
    model.train()
    beginning = Row(model, PICTURE, 3)
    rows = []
    for length in (4, 2, 6):
        row = Row(model, length)
        row.ids, row.pictures = torch.cat([beginning.ids, row.ids]), beginning.pictures
        rows.append(row)
    alone = batch(rows, side="right")
    together = packed(rows, len(beginning))
    losses, gradients = [], []
    for inputs in (alone, together):
        model.zero_grad()
        labels = inputs["input_ids"].clone()
        # What is predicted: all but the first token of each continuation
        labels[:, : len(beginning) + 1] = -100
        labels[inputs.get("attention_mask", torch.ones_like(labels)) == 0] = -100
        if "segment_ids" in inputs:
            segments = inputs["segment_ids"]
            labels[:, 1:][segments[:, 1:] != segments[:, :-1]] = -100
        loss = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(9)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_prefix_in_two_pieces_would_see_what_is_between_and_is_refused(llama: Any, side: str) -> None:
    rows = [Row(llama, PICTURE, 9), Row(llama, 6)]
    inputs = batch(rows, side)
    types = torch.zeros_like(inputs["input_ids"])
    for i, place in places(rows, side):
        types[i, place] = (torch.arange(len(rows[i])) >= len(rows[i]) - 4).long()
    # Padding has any type
    llama(**inputs, token_type_ids=types)
    llama(**inputs, token_type_ids=types.masked_fill(inputs["attention_mask"] == 0, 1))
    for i, place in places(rows, side):
        two = types.clone()
        two[i, place.stop - 1] = 0
        with pytest.raises(ValueError, match=r"`token_type_ids` 0\) goes on behind"):
            llama(**inputs, token_type_ids=two)
    # Each of several sequences in a row has its own
    inputs = {"input_ids": torch.full((1, 8), 5), "token_type_ids": torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]])}
    llama(**inputs, segment_ids=torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]]))
    with pytest.raises(ValueError, match="goes on behind"):
        llama(**inputs, segment_ids=torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2]]))


@torch.no_grad()
def test_what_continuations_cannot_share_is_refused(llama: Any) -> None:
    inputs = packed([Row(llama, 2, PICTURE, 3)], 3)
    with pytest.raises(ValueError, match="A picture must stand where"):
        llama(**inputs, use_cache=False)
    inputs = packed([Row(llama, 5)], 2)
    with pytest.raises(ValueError, match=r"A prefix .* must stand where"):
        llama(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]))
    with pytest.raises(ValueError, match="without `past_key_values`"):
        llama(**inputs, past_key_values=DynamicCache(config=llama.config))
    with pytest.raises(ValueError, match="decoder"):
        small_model("bert", DuoStreamForSequenceClassification)(**inputs)
