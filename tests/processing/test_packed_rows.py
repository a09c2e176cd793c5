"""Several sequences in one row say what each says alone."""

import copy

import pytest
import torch
from chats import (
    ASSISTANT,
    NUM_TOKENS,
    TEXTS,
    dialogue,
    make_processor,
    picture,
    question,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import LLAMA, small_model

from duostream import DuoStreamDataCollator


def packed_and_alone(processor, row):
    """A row of several conversations, and the same as rows of their own."""
    return [row], [{"images": row["images"], **each} for each in row["conversations"]]


def turn(question, reply, num_images=0):
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return {
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": reply}]}],
    }


CAPTIONS = {"images": [Image.new("RGB", (9, 9))], "conversations": [turn("What?", text, 1) for text in TEXTS]}
QUESTIONS = {
    "images": [Image.new("RGB", (9, 9), "red")],
    "conversations": [turn(text, "yes" * n, 1) for n, text in enumerate(TEXTS)],
}
PASSAGE = {"images": [], "conversations": [turn("A long text. " + text, "no") for text in TEXTS]}
PLAIN = {"images": [], "conversations": [{"text": text} for text in TEXTS]}


@pytest.mark.parametrize(
    ("row", "bidirectional_prefix"),
    [(CAPTIONS, False), (CAPTIONS, True), (QUESTIONS, False), (PASSAGE, False), (PLAIN, False)],
)
@pytest.mark.parametrize("kind", ["own", "chatml"])
def test_a_row_of_several_conversations_holds_each_and_their_beginning_once(kind, row, bidirectional_prefix):
    processor = make_processor(kind, bidirectional_prefix=bidirectional_prefix)
    collate = DuoStreamDataCollator(processor)
    packed, alone = (collate(rows) for rows in packed_and_alone(processor, row))
    ids, segments, labels = packed["input_ids"][0], packed["segment_ids"][0], packed["labels"][0]
    num_shared = int((segments == 0).sum())
    assert num_shared > 0 or row is PLAIN
    for number, (own, own_labels, mask) in enumerate(
        zip(alone["input_ids"], alone["labels"], alone["attention_mask"], strict=True), start=1
    ):
        is_own = (segments == 0) | (segments == number)
        length = int(mask.sum())
        assert ids[is_own].tolist() == own[:length].tolist()
        # The first token of all is never predicted
        assert labels[is_own][1:].tolist() == own_labels[1:length].tolist()
    assert len(ids) < int(alone["attention_mask"].sum()) or row is PLAIN
    if row["images"]:
        assert len(packed["pixel_values"]) == 1 and packed["images_per_row"] == 1
    if bidirectional_prefix:
        is_last = (segments == 0) | (segments == len(row["conversations"]))
        assert packed["token_type_ids"][0][is_last].tolist() == alone["token_type_ids"][-1][:length].tolist()
        assert 0 in packed["token_type_ids"]


def test_rows_of_one_conversation_and_of_several_go_together(processor):
    collate = DuoStreamDataCollator(processor)
    single = {"images": [], **turn("What?", "That.")}
    batch = collate([CAPTIONS, single])
    alone = collate([single])["input_ids"][0].tolist()
    segments = batch["segment_ids"][1][: len(alone)]
    assert batch["input_ids"][1][: len(alone)].tolist() == alone
    assert sorted(set(segments.tolist())) == [0, 1]
    assert "segment_ids" not in collate([single])


@pytest.mark.parametrize(
    ("row", "bidirectional_prefix", "message"),
    [
        (QUESTIONS, True, "Row 7: its `conversations` ask different things"),
        (
            {
                "images": [Image.new("RGB", (9, 9))],
                "conversations": [
                    {
                        **turn("", "yes"),
                        "prompt": [{"role": "user", "content": [{"type": "text", "text": text}, image]}],
                    }
                    for text, image in (("One", {"type": "image"}), ("Two", {"type": "image"}))
                ],
            },
            False,
            "Row 7: its `conversations` differ before their last picture",
        ),
        ({**CAPTIONS, "images": []}, False, "Row 7 has 1 picture markers but 0 pictures"),
    ],
)
def test_conversations_that_cannot_share_their_beginning_name_their_row(row, bidirectional_prefix, message):
    collate = DuoStreamDataCollator(make_processor(bidirectional_prefix=bidirectional_prefix))
    with pytest.raises(ValueError, match=message):
        collate([{**row, "row": 7}])


def sequences(batch):
    """What each sequence of a batch holds, padding apart: its tokens, and which of them are to be learnt."""
    found = []
    for i, ids in enumerate(batch["input_ids"]):
        is_token = batch["attention_mask"][i] == 1
        segments = batch["segment_ids"][i] if "segment_ids" in batch else torch.ones_like(ids)
        for number in segments.unique():
            own = is_token & (segments == number)
            labels = batch["labels"][i][own].tolist()
            # The first token of all is never predicted
            found.append((ids[own].tolist(), [-100, *labels[1:]]))
    return found


PACKING_PROCESSOR = make_processor()


@given(
    texts=st.lists(st.tuples(st.text(max_size=30), st.integers(0, 2)), min_size=1, max_size=8),
    bidirectional_prefix=st.booleans(),
)
@settings(max_examples=40)
def test_packed_rows_hold_each_row_and_picture_once_and_are_no_longer_than_the_longest(texts, bidirectional_prefix):
    processor = copy.copy(PACKING_PROCESSOR)
    processor.bidirectional_prefix = bidirectional_prefix
    rows = []
    for i, (text, num_images) in enumerate(texts):
        row = dialogue("What?", text, num_images=num_images) if i % 3 else {"images": [], "text": "a" + text}
        rows.append({**row, "images": [picture((7 * i + k) % 256) for k in range(len(row["images"]))]})
    apart, packed = (DuoStreamDataCollator(processor, packing=packing)(rows) for packing in (False, True))
    assert sorted(sequences(packed)) == sorted(sequences(apart))
    assert len(packed["input_ids"]) <= len(rows)
    assert packed["input_ids"].shape[1] == apart["input_ids"].shape[1]
    assert packed["attention_mask"].sum() == apart["attention_mask"].sum()
    num_images = sum(len(row["images"]) for row in rows)
    if num_images:
        shades = [sorted(batch["pixel_values"][:, 0].mean(dim=(1, 2)).tolist()) for batch in (apart, packed)]
        assert len(shades[0]) == num_images and shades[0] == shades[1]
    if "segment_ids" not in packed:
        assert packed.keys() == apart.keys() and torch.equal(packed["input_ids"], apart["input_ids"])
        return
    assert len(packed["input_ids"]) < len(rows)
    for segments, mask in zip(packed["segment_ids"], packed["attention_mask"], strict=True):
        # One sequence after the other, and pads belong to the last
        assert segments.tolist() == sorted(segments.tolist()) and segments[0] == 1
        assert segments[mask == 0].unique().tolist() in ([], [int(segments.max())])
    is_counted = packed["labels"][:, 1:] != -100
    assert is_counted.sum() == (apart["labels"][:, 1:] != -100).sum()
    assert packed["targets_per_row"] == is_counted.sum(dim=1).max()


def test_pictures_of_packed_rows_come_in_the_order_of_their_places(processor):
    texts = ["It is red, and large, and round.", "a", "It is red.", "b"]
    rows = [dialogue("What?", text, num_images=i % 2) for i, text in enumerate(texts)]
    for i, row in enumerate(rows):
        row["images"] = [picture(60 * i)] * len(row["images"])
    batch = DuoStreamDataCollator(processor, packing=True)(rows)
    assert len(batch["input_ids"]) < 4
    alone = [DuoStreamDataCollator(processor)([row]) for row in rows]
    of_row = {tuple(each["input_ids"][0].tolist()): each.get("pixel_values") for each in alone}
    expected = [of_row[tuple(ids)] for ids, _ in sequences(batch)]
    assert torch.equal(batch["pixel_values"], torch.cat([each for each in expected if each is not None]))


def test_a_row_of_several_conversations_is_not_packed(processor):
    single = {"images": [], **turn("What?", "That.")}
    with pytest.raises(ValueError, match="Row 7 has several `conversations`, which go without `packing`"):
        DuoStreamDataCollator(processor, packing=True)([single, {**CAPTIONS, "row": 7}])


def test_types_of_packed_rows_start_at_the_first_answer_of_each():
    processor = make_processor(bidirectional_prefix=True)
    rows = [question("What color is the square?", "Ein großer roter Kreis"), question("a", "b"), question("c", "d")]
    collate = DuoStreamDataCollator(processor, packing=True)
    batch = collate(rows)
    assert len(batch["input_ids"]) < 3
    for ids, types, segments in zip(batch["input_ids"], batch["token_type_ids"], batch["segment_ids"], strict=True):
        for number in segments.unique():
            own = segments == number
            start = ids[own].tolist().index(ASSISTANT)
            assert types[own].tolist() == [0] * start + [1] * (int(own.sum()) - start)


def tiny_model(processor, **kwargs):
    decoder = {**LLAMA, "vocab_size": 512}
    stack = {**decoder, "num_hidden_layers": 3}
    model = small_model("llama", text_config=decoder, fusion_stack_config=stack, **kwargs)
    assert model.config.image_seq_length == NUM_TOKENS
    model.config.image_token_id = processor.image_token_id
    return model.train()


@pytest.mark.parametrize("bidirectional_prefix", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"restart_positions": True}, {"num_image_update_layers": 0}, {"num_image_update_layers": 1}],
    ids=str,
)
@pytest.mark.parametrize("stored", [False, True])
def test_packed_rows_give_the_loss_and_gradients_of_rows_apart(bidirectional_prefix, fields, stored):
    processor = make_processor(bidirectional_prefix=bidirectional_prefix)
    model = tiny_model(processor, **fields)
    rows = [
        question("What color is the square, and where?", "It is red, and at the left.", num_images=2),
        question("What?", "That."),
        question("Where?", "At the left.", num_images=0),
        {"images": [picture(90)], "text": "Ein Kreis"},
        {"images": [], "text": "ein Kreis"},
        question("Why?", "No."),
    ]
    if stored:
        rows = [{**row, "image_features": states(len(row["images"]), width=24)} for row in rows]
    losses, gradients = [], []
    for packing in (False, True):
        batch = DuoStreamDataCollator(processor, packing=packing)(rows)
        assert ("segment_ids" in batch) == packing
        model.zero_grad()
        num_items = (batch["labels"][:, 1:] != -100).sum()
        loss = model(**batch, num_items_in_batch=num_items).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(batch["input_ids"]) < len(rows)
    torch.testing.assert_close(losses[1], losses[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)
