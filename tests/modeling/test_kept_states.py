"""Layers make the states alone that are read, and nothing that is read is another for it."""

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import compile_regions
from backbones import TEXTS, VISIONS
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import (
    LLAMA,
    PICTURE,
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
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from duostream import DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification, DuoStreamModel
from duostream.configuration.configuration_duostream import layer_types
from duostream.modeling.composition_duostream import FINAL_NORMS, stack_of
from duostream.modeling.kept_states_duostream import (
    KNOWN_TYPES,
    CacheOfKeptStates,
    is_worth_it,
    layers_of,
    make_kept_states_alone,
    take,
)

ENOUGH = 1e-4
# Layers that are called, or made, in different ways
EVERYDAY = ("tiny", "llama", "gpt2", "opt", "gemma3")


def small_reader(num_image_update_layers: int | None, **kwargs: Any) -> Any:
    """A small model with three fusion layers: of the last one image states are read by nobody, whether made or not."""
    stack = {**LLAMA, "num_hidden_layers": 3}
    return small_model(fusion_stack_config=stack, num_image_update_layers=num_image_update_layers, **kwargs)


@contextmanager
def watched(model: Any, layer: int = -1) -> Iterator[list[int]]:
    """How many positions went through the last fusion layer, or another one, up to its end, each time."""
    stack = next(each for each in stack_of(model.model.fusion_model).children() if isinstance(each, nn.ModuleList))
    # A layer's last part of its own: what comes out of it has been through the whole layer
    part = list(stack[layer].children())[-1]
    lengths: list[int] = []

    def note(part: nn.Module, args: Any, output: torch.Tensor) -> None:
        lengths.append(output.numel() // output.shape[-1])

    handle = part.register_forward_hook(note)
    yield lengths
    handle.remove()


@pytest.fixture(
    scope="module",
    params=[name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in (*TEXTS, "tiny")],
)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "tiny":
        # Phi, whose head has a bias, is no language model to be split
        return small_model("tiny")
    return composed_model(request.param)


def composed_model(kind: str) -> Any:
    """Three fusion layers, of which image tokens are updated by two."""
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(TEXTS[kind]())
    vision = AutoModel.from_config(VISIONS["siglip"]())
    return roughen(DuoStreamForConditionalGeneration.from_backbones(language, vision, num_fusion_layers=3), 0.05)


def prompts(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """A picture and text, more of it than a sliding window holds; text; and several rows, padded."""
    yield Row(model, PICTURE, 9).inputs
    yield Row(model, 9).inputs
    if "sliding_attention" not in layer_types(model.config.text_config):
        # With windows, rows with pictures in different places are refused
        yield batch(ragged_rows(model), "left")


@torch.no_grad()
def test_a_prompt_gives_the_logits_and_the_cache_of_one_whose_every_state_is_made(model: Any) -> None:
    for inputs in prompts(model):
        whole, last = model(**inputs), model(**inputs, logits_to_keep=1)
        assert difference(last.logits, whole.logits[:, -1:]) < ENOUGH
        for cached, expected in zip(last.past_key_values.layers, whole.past_key_values.layers, strict=True):
            assert difference(cached.keys, expected.keys) == difference(cached.values, expected.values) == 0
        input_ids = inputs["input_ids"]
        attention_mask = inputs.get("attention_mask", torch.ones_like(input_ids))
        further = {
            "input_ids": torch.full((len(input_ids), 1), 5),
            "attention_mask": nn.functional.pad(attention_mask, (0, 1), value=1),
            "mm_token_type_ids": nn.functional.pad((input_ids == model.config.image_token_id).long(), (0, 1)),
        }
        next_logits = model(**further, past_key_values=last.past_key_values).logits
        assert difference(next_logits, model(**further, past_key_values=whole.past_key_values).logits) < ENOUGH


@torch.no_grad()
def test_the_last_layer_works_for_the_end_of_a_prompt_alone(model: Any) -> None:
    inputs = Row(model, PICTURE, 9).inputs
    for num_kept in (1, 3):
        with watched(model) as lengths:
            model(**inputs, logits_to_keep=num_kept)
        assert set(lengths) == {num_kept}


def query_makers(model: Any) -> list[nn.Module]:
    """Those of the fusion layers, where they make queries apart from keys and values."""
    return [part for name, part in model.model.fusion_model.named_modules() if name.endswith("q_proj")]


@pytest.mark.parametrize("num_image_update_layers", [None, 1])
@torch.no_grad()
def test_where_keys_and_values_alone_are_made_one_query_is_made(num_image_update_layers: int | None) -> None:
    model = small_reader(num_image_update_layers)
    row = Row(model, PICTURE, 8)
    lengths: list[int] = []
    for part in query_makers(model):
        # Behind the model's own hook, which cuts the input
        part.register_forward_pre_hook(lambda part, args: lengths.append(args[0].shape[1]))
    model(**row.inputs, logits_to_keep=1)
    # Nine states are made where image tokens are read alone: eight words' and the picture's last
    assert lengths == [len(row), *([len(row)] if num_image_update_layers is None else [1, 9]), 1, 1]


@torch.no_grad()
def test_another_thread_gets_all_its_queries_meanwhile() -> None:
    model = small_reader(None)
    queries = query_makers(model)[-1]
    states = torch.randn(2, 7, queries.in_features)
    expected = queries(states)
    got: list[torch.Tensor] = []
    with ThreadPoolExecutor(max_workers=1) as other:
        # Between the queries and the values of a run for keys and values, and then of a run to the end
        model.model.fusion_model.layers[-1].self_attn.k_proj.register_forward_pre_hook(
            lambda part, args: got.append(other.submit(queries, states).result())
        )
        model(**Row(model, PICTURE, 9).inputs, logits_to_keep=1)
    assert len(got) == 2 and all(torch.equal(each, expected) for each in got)


@pytest.mark.parametrize("num_image_update_layers", [None, 1])
def test_adapters_around_queries_say_and_learn_the_same(num_image_update_layers: int | None) -> None:
    model = small_reader(num_image_update_layers)
    adapters = LoraConfig(target_modules=r".*fusion_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(model, adapters).base_model.model.train()
    row = Row(model, PICTURE, 8)
    labels = row.ids[None].clone()
    labels[:, :-4] = -100
    inputs = {**row.inputs, "labels": labels}
    expected = trained(model, inputs, output_hidden_states=True)
    with watched(model) as lengths:
        cut = trained(model, inputs, targets_per_row=4)
    assert set(lengths) == {4}
    assert_learnt_the_same(cut, expected)


@torch.no_grad()
def test_some_last_positions_are_those_of_all(model: Any) -> None:
    for inputs in prompts(model):
        whole = model(**inputs).logits
        for num_kept in (2, 4, whole.shape[1], whole.shape[1] + 1):
            expected = whole[:, -num_kept:]
            assert difference(model(**inputs, logits_to_keep=num_kept).logits, expected) < ENOUGH


@pytest.mark.parametrize("num_image_update_layers", [None, 1, 0])
@torch.no_grad()
def test_a_second_picture_is_read_behind_a_cached_one(num_image_update_layers: int | None) -> None:
    model = small_reader(num_image_update_layers)
    row = Row(model, PICTURE, 4, PICTURE, 5)
    first_len = model.config.image_seq_length + 4
    expected = model(**row.inputs).logits[:, -1:]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        for place, picture in ((slice(first_len), 0), (slice(first_len, None), 1)):
            ids = row.ids[None, place]
            types = (row.ids[None, : place.stop] == model.config.image_token_id).long()
            logits = model(
                input_ids=ids,
                pixel_values=row.pictures[picture : picture + 1],
                attention_mask=torch.ones_like(types),
                mm_token_type_ids=types,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
        assert difference(logits, expected) < ENOUGH


@torch.no_grad()
def test_states_that_are_asked_for_are_all_made() -> None:
    model = small_model()
    inputs = Row(model, PICTURE, 9).inputs
    outputs = model(**inputs, logits_to_keep=1, output_hidden_states=True)
    assert difference(outputs.hidden_states[-1], model.model(**inputs).last_hidden_state) == 0
    assert outputs.logits.shape[1] == 1
    model.set_attn_implementation("eager")
    seq_len = inputs["input_ids"].shape[1]
    assert model(**inputs, logits_to_keep=1, output_attentions=True).attentions[-1].shape[-2:] == (seq_len, seq_len)


def test_the_base_model_gives_the_states_that_are_kept() -> None:
    model = small_model(cls=DuoStreamModel)
    inputs = Row(model, PICTURE, 9).inputs
    whole = model(**inputs).last_hidden_state
    for options in ({}, {"use_cache": False}):
        with torch.set_grad_enabled(not options):
            states = model(**inputs, **options, states_to_keep=2).last_hidden_state
        assert difference(states, whole[:, -2:]) < ENOUGH


def with_last_words_labelled(rows: list[Row], side: str) -> dict[str, torch.Tensor]:
    """A padded batch in which the last three words of each row are to be learnt, and all before is the prefix."""
    inputs = batch(rows, side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, place in places(rows, side):
        labels[i, place.stop - 3 : place.stop] = inputs["input_ids"][i, place.stop - 3 : place.stop]
    return inputs | {"token_type_ids": (labels != -100).long(), "labels": labels}


def trained(model: Any, inputs: dict[str, Any], **kwargs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_learnt_the_same(got: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = got, expected
    assert abs(loss - expected_loss) < ENOUGH
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert difference(gradient, gradients[name]) < ENOUGH * max(1, gradient.abs().max().item()), name


def test_in_training_the_last_layer_works_for_labelled_positions_alone_with_the_same_gradients(model: Any) -> None:
    rows = ragged_rows(model)
    model.training = True  # of the head alone: there is no dropout
    for side in ("left", "right"):
        inputs = with_last_words_labelled(rows, side)
        expected = trained(model, inputs)
        with watched(model) as lengths:
            # As `Trainer` says how many labels there are
            count = (inputs["labels"][:, 1:] != -100).sum()
            cut = trained(model, inputs, targets_per_row=3, num_items_in_batch=count)
        assert set(lengths) == {3 * len(rows)}
        assert_learnt_the_same(cut, expected)
    model.eval()


def test_with_checkpoints_of_activations_all_states_are_made_with_the_same_loss() -> None:
    model = small_model().train()
    row = Row(model, PICTURE, 9)
    labels = row.ids[None].clone()
    labels[:, :-4] = -100
    inputs = {**row.inputs, "labels": labels, "targets_per_row": 4}
    expected = trained(model, inputs)
    model.gradient_checkpointing_enable()
    with watched(model) as lengths:
        again = trained(model, inputs)
    assert set(lengths) == {len(row)}
    assert_learnt_the_same(again, expected)


def test_most_positions_are_not_worth_a_second_run() -> None:
    model = small_model()
    row = Row(model, PICTURE, 9)
    num_kept = len(row) - 1
    with watched(model) as lengths, torch.no_grad():
        assert model(**row.inputs, logits_to_keep=num_kept).logits.shape[1] == num_kept
    assert lengths == [len(row)]


def test_on_a_device_that_the_host_only_launches_few_tokens_are_not_worth_a_second_run() -> None:
    layer = nn.Linear(1000, 1000, bias=False)
    for device, batch_size, is_worth in (("cpu", 1, True), ("cuda", 1, False), ("cuda", 50_000, True)):
        assert is_worth_it(1, (batch_size, 21, 0), torch.device(device), layer) == is_worth


def test_each_type_whose_last_layer_is_cut_is_tested_here() -> None:
    tiny = small_config("tiny").fusion_stack_config
    assert {config.model_type for config in (tiny, *(make() for make in TEXTS.values()))} == set(KNOWN_TYPES)


def test_a_layer_with_an_argument_that_is_not_known_makes_all_states() -> None:
    stack = small_model().model.fusion_model
    layer = layers_of(stack)[-1]
    states = torch.randn(1, 5, stack.config.hidden_size)
    positions = torch.arange(5)[None]
    given = {"position_embeddings": stack.rotary_emb(states, positions), "position_ids": positions}
    cache = CacheOfKeptStates(None, stack.config, {layer: 1})
    with torch.no_grad():
        cut = layer(states, **given, past_key_values=cache)
        whole = layer(states, **given, past_key_values=cache, something_new=torch.ones(1, 5))
    assert difference(cut[:, -1], whole[:, -1]) < ENOUGH
    assert torch.equal(cut[:, :-1], states[:, :-1]) and (whole != states).all()


def test_gpt_neo_whose_windows_go_by_numbers_of_queries_makes_all_states() -> None:
    fields = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
    stack = AutoModel.from_config(transformers.GPTNeoConfig(**fields, attention_types=[[["global", "local"], 1]]))
    make_kept_states_alone(stack)
    assert not layers_of(stack) and not stack.h[-1]._forward_pre_hooks


@torch.no_grad()
def test_a_copy_of_the_last_layer_behind_it_is_one_more_layer() -> None:
    model = small_model()
    stack = model.model.fusion_model
    stack.layers.append(copy.deepcopy(stack.layers[-1]))
    stack.layers[-1].self_attn.layer_idx += 1
    stack.config.num_hidden_layers += 1
    inputs = Row(model, PICTURE, 9).inputs
    assert difference(model(**inputs, logits_to_keep=1).logits, model(**inputs).logits[:, -1:]) < ENOUGH


@pytest.mark.parametrize(
    "wrap",
    [
        # Not among those that the lowest versions pass: torch 2.6 can't compile a decoder of transformers 5.23
        pytest.param(lambda stack: torch.compile(stack, backend="eager"), id="compiled", marks=pytest.mark.slow),
        pytest.param(lambda stack: get_peft_model(stack, LoraConfig(target_modules=["q_proj"])), id="with adapters"),
    ],
)
@torch.no_grad()
def test_a_stack_with_something_wrapped_around_it_makes_all_states(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for num_image_update_layers in (None, 0, 1):
        model = small_reader(num_image_update_layers)
        inputs = Row(model, PICTURE, 9).inputs
        expected = model(**inputs).logits[:, -1:]
        model.model.fusion_model = wrap(model.model.fusion_model)
        assert difference(model(**inputs, logits_to_keep=1).logits, expected) < ENOUGH


@torch.no_grad()
def test_a_hook_of_ones_own_gets_the_last_layers_states_in_their_place() -> None:
    model = small_model()
    seen: list[int] = []
    model.model.fusion_model.layers[-1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    inputs = Row(model, PICTURE, 9).inputs
    model(**inputs, logits_to_keep=1)
    assert seen == [inputs["input_ids"].shape[1], 1]


def is_left(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Where image tokens stand that upper layers leave as they are, but the last of each picture."""
    is_image = input_ids == model.config.image_token_id
    for row in is_image:
        row[row.nonzero()[model.config.image_seq_length - 1 :: model.config.image_seq_length]] = False
    return is_image


@pytest.fixture(params=[0, 1], ids=["of no layer", "of the first layer"])
def reader(model: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The model with image states that no fusion layer changes, or the first alone."""
    model.config.num_image_update_layers = request.param
    yield model
    model.config.num_image_update_layers = None


@torch.no_grad()
def test_image_states_that_are_read_alone_come_out_of_each_layer_as_they_went_in(reader: Any) -> None:
    stack, num_updating = stack_of(reader.model.fusion_model), reader.config.num_image_update_layers
    final_norm = next(getattr(stack, name) for name in FINAL_NORMS if hasattr(stack, name))
    for inputs in prompts(reader):
        states = list(reader(**inputs, output_hidden_states=True).hidden_states)
        assert len(states) > 2
        left = is_left(reader, inputs["input_ids"])
        last = final_norm(states[num_updating])
        assert torch.equal(states[-1][left], last[left])
        assert all(torch.equal(each[left], states[num_updating][left]) for each in states[num_updating:-1])
        for before, after in itertools.pairwise(states[: num_updating + 1]):
            assert (before[left] != after[left]).any(dim=-1).all()
        is_updated = ~left & inputs.get("attention_mask", torch.ones_like(left)).bool()
        for before, after in itertools.pairwise(states):
            assert (before[is_updated] != after[is_updated]).any(dim=-1).all()


@torch.no_grad()
def test_image_states_that_are_read_alone_go_through_no_layer(reader: Any) -> None:
    row, num_updating = Row(reader, 3, PICTURE, 5), reader.config.num_image_update_layers
    # Eight words, and the picture's last token
    for options, num_last in (({}, 9), ({"logits_to_keep": 1}, 1)):
        for layer in range(reader.config.fusion_stack_config.num_hidden_layers):
            with watched(reader, layer) as lengths:
                reader(**row.inputs, **options)
            is_last = layer == reader.config.fusion_stack_config.num_hidden_layers - 1
            num_read = num_last if is_last else 9
            assert set(lengths) == {len(row) if layer < num_updating else num_read}


@torch.no_grad()
def test_layers_that_leave_image_states_out_give_the_logits_and_the_cache_of_those_that_make_all(reader: Any) -> None:
    # Rows with their pictures in common columns but for one that has a picture more: of it the most states are made,
    # and in the others as many.
    rows = [*(Row(reader, PICTURE, PICTURE, num_words) for num_words in (3, 2, 4)), Row(reader, *[PICTURE] * 3, 4)]
    cases = [
        (Row(reader, PICTURE, 2, PICTURE, 5).inputs, 9),
        (Row(reader, 9).inputs, 9),
        (Row(reader, 3, PICTURE).inputs, 4),
    ]
    if "sliding_attention" not in layer_types(reader.config.text_config):
        cases.append((batch(rows), 7 * len(rows)))
    for inputs, num_kept in cases:
        # Whoever asks for states gets all of them
        whole = reader(**inputs, output_hidden_states=True)
        with watched(reader, reader.config.num_image_update_layers) as lengths:
            cut = reader(**inputs)
        assert set(lengths) == {num_kept}
        is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        is_updated = is_token & ~is_left(reader, inputs["input_ids"])
        assert difference(cut.logits[is_updated], whole.logits[is_updated]) < ENOUGH
        for cached, expected in zip(cut.past_key_values.layers, whole.past_key_values.layers, strict=True):
            keys, values = cached.keys.transpose(1, 2), cached.values.transpose(1, 2)  # (batch, len, heads, head_dim)
            # A text stream's is shorter; the padding's states are read by nobody
            where = is_token[:, -keys.shape[1] :] if keys.shape[1] == is_token.shape[1] else slice(None)
            assert difference(keys[where], expected.keys.transpose(1, 2)[where]) < ENOUGH
            assert difference(values[where], expected.values.transpose(1, 2)[where]) < ENOUGH


def test_layers_that_leave_image_states_out_learn_the_same(reader: Any) -> None:
    rows = ragged_rows(reader)
    reader.training = True
    for side in ("left", "right"):
        inputs = with_last_words_labelled(rows, side)
        expected = trained(reader, inputs, output_hidden_states=True)
        with watched(reader, reader.config.num_image_update_layers) as lengths:
            cut = trained(reader, inputs)
        # As many in each row as in that of most words and pictures
        assert set(lengths) == {12 * len(rows)}
        assert_learnt_the_same(cut, expected)
    reader.eval()


@pytest.mark.parametrize("num_items", [None, 2, torch.tensor(2)], ids=repr)
def test_a_classifier_leaves_image_states_out_however_its_labels_are_counted(num_items: Any) -> None:
    model = small_reader(0, cls=DuoStreamForSequenceClassification, num_labels=3).train()
    inputs = batch([Row(model, PICTURE, 5), Row(model, PICTURE, 5)])
    with watched(model) as lengths:
        model(**inputs, labels=torch.tensor([0, 2]), num_items_in_batch=num_items)
    # Of each row five words, and the picture's last token
    assert set(lengths) == {2 * 6}


@pytest.mark.parametrize("num_image_update_layers", [0, 1])
def test_checkpoints_of_activations_leave_image_states_as_they_are(num_image_update_layers: int) -> None:
    model = small_reader(num_image_update_layers).train()
    row = Row(model, PICTURE, 9)
    inputs = {**row.inputs, "labels": row.ids[None].masked_fill(row.ids == model.config.image_token_id, -100)}
    expected = trained(model, inputs)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_learnt_the_same(trained(model, inputs), expected)


@pytest.mark.parametrize("bidirectional_images", [True, False])
@pytest.mark.parametrize("num_updating", [0, 1])
@torch.no_grad()
def test_rows_that_read_pictures_alone_are_written_on_as_each_is_on_its_own(
    bidirectional_images: bool, num_updating: int
) -> None:
    model = small_reader(num_updating, bidirectional_images=bidirectional_images)
    rows = [*(Row(model, PICTURE, PICTURE, num_words) for num_words in (3, 2, 4)), Row(model, 12)]
    options = {"max_new_tokens": 6, "do_sample": False}
    with watched(model, num_updating) as lengths:
        model(**batch(rows[:-1]))
        model(**rows[0].inputs)
    assert lengths == [3 * 6, 5]
    alone = [model.generate(**row.inputs, **options, use_cache=False)[0, -6:].tolist() for row in rows]
    for kind in (None, "static"):
        answers = model.generate(**batch(rows), **options, cache_implementation=kind)[:, -6:]
        assert answers.tolist() == alone
    beams = [model.generate(**batch(rows), **options, num_beams=3, use_cache=cached) for cached in (False, True)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("num_updating", [0, 1])
@torch.no_grad()
def test_the_word_right_behind_a_picture_is_told_by_a_state_that_all_layers_made(num_updating: int) -> None:
    model = small_reader(num_updating)
    rows = [Row(model, 3, PICTURE), Row(model, PICTURE, PICTURE), Row(model, PICTURE)]
    for row in rows:
        whole = model(**row.inputs, output_hidden_states=True)
        assert all((a[0, -1] != b[0, -1]).any() for a, b in itertools.pairwise(whole.hidden_states))
        with watched(model, -1) as lengths:
            logits = model(**row.inputs, logits_to_keep=1).logits
        assert lengths == [1]
        assert difference(logits, whole.logits[:, -1:]) < ENOUGH
        other = model(**{**row.inputs, "pixel_values": -row.inputs["pixel_values"]}, logits_to_keep=1).logits
        assert difference(logits, other) > ENOUGH
        written = model.generate(**row.inputs, max_new_tokens=1, do_sample=False)
        is_no_picture = torch.arange(logits.shape[-1]) != model.config.image_token_id
        expected = logits[0, -1].where(is_no_picture, -torch.inf).argmax()
        assert written[0, -1] == expected
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [model.generate(**row.inputs, **options, use_cache=False)[0, -4:].tolist() for row in rows]
    assert model.generate(**batch(rows, "left"), **options)[:, -4:].tolist() == alone


@pytest.mark.parametrize("num_image_update_layers", [None, 1, 0])
@torch.no_grad()
def test_the_last_layer_may_be_on_a_device_of_its_own(num_image_update_layers: int | None) -> None:
    model = small_reader(num_image_update_layers, cls=DuoStreamModel)
    for part in (model.fusion_model.layers[-1], model.fusion_model.norm):
        add_hook_to_module(part.to("meta"), AlignDevicesHook(execution_device="meta"))
    inputs = Row(model, PICTURE, PICTURE, 3).inputs
    for options in ({"states_to_keep": 1}, {"states_to_keep": 1, "use_cache": False}, {"output_hidden_states": True}):
        states = model(**inputs, **options).last_hidden_state
        assert states.device.type == "meta" and states.shape[1] == options.get(
            "states_to_keep", len(inputs["input_ids"][0])
        )


@pytest.mark.parametrize("cls", [DuoStreamModel, DuoStreamForSequenceClassification])
@torch.no_grad()
def test_the_text_stream_may_end_on_a_device_of_its_own(cls: type) -> None:
    reader = small_reader(None, cls=cls)
    model = getattr(reader, "model", reader)
    head = [reader.score] if hasattr(reader, "score") else []
    for part in (model.text_model.layers[-1], model.text_model.norm, model.fusion_model, *head):
        add_hook_to_module(part.to("meta"), AlignDevicesHook(execution_device="meta"))
    rows = [Row(reader, PICTURE, 3), Row(reader, 2, PICTURE, 4)]
    outputs = reader(**batch(rows), **({} if head else {"use_cache": False}))
    assert next(iter(outputs.values())).device.type == "meta"


@torch.no_grad()
def test_a_stack_that_something_is_wrapped_around_makes_all_states() -> None:
    model = small_model(num_image_update_layers=1)
    inputs = batch([Row(model, PICTURE, 4), Row(model, 2, PICTURE, 3)])
    expected = model(**inputs).logits

    class Wrapped(torch.nn.Module):
        def __init__(self, stack: torch.nn.Module):
            super().__init__()
            self.stack = stack
            self.is_activation_checkpointing = False

        def forward(self, **kwargs: Any) -> Any:
            return self.stack(**kwargs)

    model.model.fusion_model = Wrapped(model.model.fusion_model)
    assert difference(model(**inputs).logits, expected) < 1e-5


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("compile_layers", ["with hooks", "without"])
def test_layers_that_are_compiled_alone_say_the_same(compile_layers: str) -> None:
    model = small_reader(1)
    inputs = Row(model, PICTURE, 9).inputs
    expected = model(**inputs, logits_to_keep=1).logits
    torch.compiler.reset()
    if compile_layers == "with hooks":
        model = compile_regions(model, backend="aot_eager")
    else:
        for layer in layers_of(model.model.fusion_model):
            layer.forward = torch.compile(layer.forward, backend="aot_eager")
    # And as parts of a compiled whole
    for forward in (model, model, torch.compile(model, backend="eager")):
        assert difference(forward(**inputs, logits_to_keep=1).logits, expected) < ENOUGH


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "has_cache"), [("llama", True), ("llama", False), ("gemma3", True)])
@torch.no_grad()
def test_a_compiled_forward_makes_no_more_states_and_says_the_same(kind: str, has_cache: bool) -> None:
    model = composed_model(kind)
    inputs = {**Row(model, PICTURE, 8).inputs, "images_per_row": 1, "use_cache": has_cache}
    input_ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (input_ids == model.config.image_token_id).long()
    if has_cache:
        cache = StaticCache(config=model.config, max_cache_len=input_ids.shape[1] + 3)
        model(**inputs, past_key_values=cache)  # which makes its memory
        inputs["past_key_values"] = cache
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    # Of all words and the picture's last token, and of the last word
    for num_kept, num_made in ((0, 9), (1, 1)):
        given = []
        for forward in (model.forward, compiled):
            if has_cache:
                cache.reset()
            with watched(model) as lengths:
                outputs = forward(**inputs, logits_to_keep=num_kept)
            assert lengths == [num_made]
            layers = outputs.past_key_values.layers if has_cache else []
            given.append([outputs.logits[:, -8:], *(each.keys.clone() for each in layers)])
        for got, expected in zip(*given, strict=True):
            assert difference(got, expected) < ENOUGH


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["for the sizes that come", "for any size"])
@torch.no_grad()
def test_a_compiled_forward_goes_on_with_prompts_of_other_sizes(dynamic: bool | None) -> None:
    model = small_reader(1)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    num_graphs = []
    # Long ones have too many words for it to be worth it
    for num_rows, num_words in ((4, 6), (3, 7), (2, 50), (5, 4), (3, 60), (6, 5)):
        inputs = batch([Row(model, PICTURE, num_words - number % 2) for number in range(num_rows)], "left")
        inputs |= {"images_per_row": 1, "use_cache": False, "logits_to_keep": 1}
        assert difference(compiled(**inputs).logits, model(**inputs).logits) < ENOUGH
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[-1] == num_graphs[2] <= 4


@torch.no_grad()
def test_a_picture_of_one_token_is_updated_by_all_layers() -> None:
    vision = VISIONS["siglip"]()
    vision.patch_size = vision.image_size
    model, same = (small_reader(number, vision_config=vision) for number in (1, None))
    assert model.config.image_seq_length == 1
    inputs = Row(model, PICTURE, 3, PICTURE, 2).inputs
    assert torch.equal(model(**inputs).logits, same(**inputs).logits)


@torch.no_grad()
def test_a_wrong_number_of_pictures_a_row_is_refused_or_does_no_harm_where_they_are_read_alone() -> None:
    model = small_reader(1)
    inputs = batch([Row(model, PICTURE, PICTURE, 3), Row(model, PICTURE, PICTURE, 5)])
    expected = model(**inputs).logits[:, -1]
    for enough in (1, 2):
        assert difference(model(**inputs, images_per_row=enough).logits[:, -1], expected) < ENOUGH
    with pytest.raises(ValueError, match="Not all rows have as many pictures as is told: `images_per_row=3`"):
        model(**inputs, images_per_row=3)


@torch.no_grad()
def test_pictures_that_are_read_forwards_need_a_mask_only_where_layers_leave_something_out() -> None:
    masks: list[Any] = []
    model = small_reader(1, bidirectional_images=False)
    for layer in model.model.fusion_model.layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    # More than three quarters are text
    model(**Row(model, PICTURE, 30).inputs)
    assert masks == [None] * 3
    masks.clear()
    model(**Row(model, PICTURE, 3).inputs)
    assert masks and all(mask.ndim == 4 for mask in masks)


@pytest.mark.parametrize("num_updating", [0, 1])
@torch.no_grad()
def test_pictures_make_a_difference_where_they_are_read_alone_and_none_to_text(num_updating: int) -> None:
    model, same = small_reader(num_updating), small_reader(None)
    text = Row(model, 9).inputs
    assert torch.equal(model(**text).logits, same(**text).logits)
    inputs = Row(model, PICTURE, 9).inputs
    logits = model(**inputs).logits[:, -1]
    assert difference(logits, same(**inputs).logits[:, -1]) > ENOUGH
    assert difference(logits, model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits[:, -1]) > ENOUGH


@pytest.mark.parametrize("num_updating", [0, 1])
@torch.no_grad()
def test_pairs_of_states_that_come_ready_are_fused_as_those_of_a_prompt(num_updating: int) -> None:
    model = small_reader(num_updating, cls=DuoStreamModel)
    row = Row(model, PICTURE, 9)
    image_states = model.get_image_features(row.pictures).pooler_output
    text_states = model.read_text(row.ids[None, -9:]).last_hidden_state
    expected = model(**row.inputs, token_type_ids=torch.zeros(1, len(row), dtype=torch.long)).last_hidden_state
    assert difference(model.fuse(image_states, text_states), expected) < ENOUGH


def test_a_stack_whose_layers_are_not_known_can_not_leave_image_states_as_they_are() -> None:
    fields = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
    stack = transformers.GPTNeoConfig(**fields, attention_types=[[["global", "local"], 1]])
    with pytest.raises(ValueError, match=r"`num_image_update_layers=1` .*llama.*, not with gpt_neo"):
        small_model(fusion_stack_config=stack, num_image_update_layers=1)


@given(st.data())
def test_kept_positions_are_taken_along_any_dimension(data: st.DataObject) -> None:
    batch_size, num_heads, seq_len, width = (data.draw(st.integers(1, 4)) for _ in range(4))
    states = torch.randn(batch_size, num_heads, seq_len, width)
    num_kept = data.draw(st.integers(1, seq_len))
    assert torch.equal(take(states, num_kept, dim=2), states[:, :, -num_kept:])
    assert torch.equal(take(states, 0, dim=2), states)
    kept = torch.stack([torch.randperm(seq_len)[:num_kept] for _ in range(batch_size)])  # (batch, num_kept)
    taken = take(states, kept, dim=2)
    assert all(torch.equal(taken[i], states[i][:, kept[i]]) for i in range(batch_size))
    one = take(states[:1, 0, :, 0], kept)
    assert all(torch.equal(one[i], states[0, 0, kept[i], 0]) for i in range(batch_size))
