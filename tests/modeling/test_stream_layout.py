"""Where each token goes, on drawn batches: rows of text and pictures in any order, padded on either side."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duostream.modeling.masks_duostream import block_sequence_ids
from duostream.modeling.stream_layout_duostream import (
    StreamLayout,
    count_text,
    first_where,
    kept_columns,
    lay_out,
    prefix_length_of,
    restart_positions,
    text_padding_mask,
)

FEW = settings(max_examples=60)


@dataclass
class Batch:
    """`kinds` holds for each row a string of `t` (text), `i` (image) and `.` (padding); `L` tokens are a picture."""

    kinds: list[str]
    L: int

    def __post_init__(self) -> None:
        self.is_image = torch.tensor([[kind == "i" for kind in row] for row in self.kinds])
        self.is_text = torch.tensor([[kind == "t" for kind in row] for row in self.kinds])
        self.attention_mask = (self.is_image | self.is_text).long()
        # A name for each token
        self.tokens = torch.arange(1, self.is_image.numel() + 1).view_as(self.is_image)

    @property
    def position_ids(self) -> Tensor:
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def lay_out(self, cached: bool, start: int = 0, stop: int | None = None, **kwargs: object) -> StreamLayout:
        """Deals out the columns from `start` to `stop`; those before are cached."""
        stop = self.is_image.shape[1] if stop is None else stop
        arguments = {
            "is_image": self.is_image[:, :stop],
            "attention_mask": self.attention_mask[:, :stop],
            "position_ids": self.position_ids[:, start:stop] if cached else None,
            "seq_len": stop - start,
            "num_image_tokens": int(self.is_image[:, start:stop].sum()),
            "image_seq_length": self.L,
            "cached": cached,
            "text_is_causal": True,
        }
        return lay_out(**{**arguments, **kwargs})  # type: ignore[arg-type]

    def cuts(self) -> list[int]:
        """The columns before which a cache may end: no row has a part of a picture there."""
        so_far = self.is_image.cumsum(dim=1)
        return [0] + [i + 1 for i in range(so_far.shape[1]) if (so_far[:, i] % self.L == 0).all()]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    L = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(st.sampled_from(["t", "t", "i"]), max_size=6), min_size=1, max_size=4))
    if not any("i" in row for row in rows):
        rows[0] = [*rows[0], "i"]
    texts = ["".join(kind * (L if kind == "i" else 1) for kind in row) for row in rows]
    length = max(map(len, texts))
    side = draw(st.sampled_from([str.rjust, str.ljust]))
    return Batch([side(text, length, ".") for text in texts], L)


@given(batches(), st.booleans())
@FEW
def test_every_token_comes_out_where_it_stood(batch: Batch, cached: bool) -> None:
    layout = batch.lay_out(cached)
    text = batch.tokens.gather(1, layout.text_index)
    joined = torch.cat([text.flatten(), batch.tokens[batch.is_image]])[layout.join_index]
    valid = batch.attention_mask.bool()
    assert torch.equal(joined[valid], batch.tokens[valid])


@given(batches())
@FEW
def test_without_a_cache_the_text_stream_is_as_short_as_the_longest_text(batch: Batch) -> None:
    layout = batch.lay_out(cached=False)
    text = batch.tokens.gather(1, layout.text_index)
    assert text.shape[1] == batch.is_text.sum(dim=1).max()
    for row, tokens, is_text in zip(text, batch.tokens, batch.is_text, strict=True):
        assert row[: is_text.sum()].tolist() == tokens[is_text].tolist()
    # A decoder never looks behind a row's text, and its positions are the default ones
    assert layout.text_attention_mask is None and layout.text_position_ids is None


@given(batches())
@FEW
def test_an_encoder_is_told_where_a_rows_text_ends(batch: Batch) -> None:
    layout = batch.lay_out(cached=False, text_is_causal=False)
    lengths = batch.is_text.sum(dim=1)
    assert torch.equal(layout.text_attention_mask, torch.arange(int(lengths.max())) < lengths[:, None])


@given(batches(), st.data())
@FEW
def test_what_comes_later_never_moves_cached_text(batch: Batch, data: st.DataObject) -> None:
    whole = batch.lay_out(cached=True)
    cut = data.draw(st.sampled_from(batch.cuts()))
    num_kept = int(kept_columns(batch.is_image[:, :cut], batch.is_text[:, :cut]).sum())
    earlier = text_padding_mask(batch.is_image[:, :cut], batch.attention_mask[:, :cut])
    assert torch.equal(earlier[:, :num_kept], whole.text_attention_mask[:, :num_kept])
    if batch.is_image[:, cut:].any():
        later = batch.lay_out(cached=True, start=cut)
        assert torch.equal(later.text_index + cut, whole.text_index[:, num_kept:])
        assert torch.equal(later.text_position_ids, whole.text_position_ids[:, num_kept:])
        assert torch.equal(later.text_attention_mask, whole.text_attention_mask)


@given(batches())
@FEW
def test_the_padding_mask_of_a_cache_holds_where_a_slot_holds_text(batch: Batch) -> None:
    layout = batch.lay_out(cached=True)
    text_len = layout.text_index.shape[1]
    holds_text = batch.is_text.gather(1, layout.text_index)
    assert torch.equal(layout.text_attention_mask[:, :text_len], holds_text)
    assert not layout.text_attention_mask[:, text_len:].any()


@given(batches())
@FEW
def test_text_is_counted_without_the_pictures_before_it(batch: Batch) -> None:
    counted = count_text(batch.position_ids, batch.is_image, batch.attention_mask)
    assert torch.equal(counted[batch.is_text], (batch.is_text.cumsum(dim=1) - 1)[batch.is_text])
    assert (counted >= 0).all()


@given(batches(), st.booleans())
@FEW
def test_positions_go_with_the_text(batch: Batch, cached: bool) -> None:
    # Not those of a mask: rows that are packed start anew somewhere in their midst
    position_ids = batch.position_ids + 7
    layout = batch.lay_out(cached, position_ids=position_ids)
    expected = count_text(position_ids, batch.is_image, batch.attention_mask).gather(1, layout.text_index)
    assert torch.equal(layout.text_position_ids, expected)


@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.booleans())
@FEW
def test_a_hint_changes_nothing_but_the_waiting(L: int, num_images: int, lengths: list[int], cached: bool) -> None:
    length = max(lengths)
    batch = Batch(["i" * L * num_images + ("t" * n).ljust(length, ".") for n in lengths], L)
    told, found = batch.lay_out(cached, images_per_row=num_images), batch.lay_out(cached)
    assert all(left is right is None or torch.equal(left, right) for left, right in zip(told, found, strict=True))


@given(batches(), st.data())
@FEW
def test_tokens_see_each_other_both_ways_in_a_picture_and_in_the_prefix_only(
    batch: Batch, data: st.DataObject
) -> None:
    shape = batch.is_image.shape
    ends = data.draw(st.lists(st.integers(0, shape[1]), min_size=shape[0], max_size=shape[0]))
    token_type_ids = (torch.arange(shape[1]) >= torch.tensor(ends)[:, None]).long()
    for types in (None, token_type_ids):
        blocks = block_sequence_ids(batch.is_image, batch.L, types)
        for row, kinds in enumerate(batch.kinds):
            pictures = [-1 if kind != "i" else kinds[:i].count("i") // batch.L for i, kind in enumerate(kinds)]
            for i in range(shape[1]):
                for j in range(shape[1]):
                    in_prefix = [types is not None and k < ends[row] for k in (i, j)]
                    same_picture = pictures[i] == pictures[j] != -1 and not any(in_prefix)
                    together = blocks[row, i] == blocks[row, j] != -1
                    assert together == (same_picture or all(in_prefix))


@pytest.mark.parametrize(
    ("kinds", "num_image_tokens"),
    [
        (["tiit", "titi"], 2),  # features for one picture, placeholders of two
        (["tiit", "tttt"], 4),  # the other way round
        (["tiii", "ittt"], 4),  # right in sum, but rows hold parts of pictures
    ],
)
def test_placeholders_that_do_not_match_the_pictures_are_refused(kinds: list[str], num_image_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"don't match the pictures: expected {num_image_tokens} in all, 2 for each"):
        Batch(kinds, L=2).lay_out(cached=False, num_image_tokens=num_image_tokens)


@pytest.mark.parametrize(
    ("kinds", "images_per_row", "cached"),
    [
        (["iitt", "iiii"], 2, False),  # the first row has one
        (["iitt", "tiit"], 1, True),  # in a cache, a column would hold both
        (["iitt", "iitt"], 2, True),
    ],
)
def test_a_wrong_hint_is_refused(kinds: list[str], images_per_row: int, cached: bool) -> None:
    with pytest.raises(ValueError, match=f"images_per_row={images_per_row}"):
        Batch(kinds, L=2).lay_out(cached, images_per_row=images_per_row)


def test_a_hint_of_too_few_pictures_is_refused_or_costs_time_only() -> None:
    batch = Batch(["iiiitt", "iiiit."], L=2)
    with pytest.raises(ValueError, match="images_per_row=1"):
        batch.lay_out(cached=True, images_per_row=1)
    layout = batch.lay_out(cached=False, images_per_row=1)
    text = batch.tokens.gather(1, layout.text_index)
    joined = torch.cat([text.flatten(), batch.tokens[batch.is_image]])[layout.join_index]
    assert torch.equal(joined[:, :5], batch.tokens[:, :5])


@pytest.mark.parametrize(
    ("kinds", "fits"),
    [
        (["iitttt", "iitttt"], True),
        (["tttt", "tttt"], True),
        (["iitttt", "..iitt"], True),  # one row starts later, and none has an empty slot in its midst
        (["iitttt", "ttiitt"], False),
        (["iit", "tii"], True),  # no longer than the window
    ],
)
def test_a_sliding_window_over_slots_is_right_or_refused(kinds: list[str], fits: bool) -> None:
    batch = Batch(kinds, L=2)
    if fits:
        text_padding_mask(batch.is_image, batch.attention_mask, sliding_window=3)
    else:
        with pytest.raises(ValueError, match="sliding window of 3 tokens"):
            text_padding_mask(batch.is_image, batch.attention_mask, sliding_window=3)


def test_one_row_without_padding_needs_no_mask() -> None:
    assert text_padding_mask(torch.tensor([[False, True, False]]), None) is None


def test_positions_start_anew_behind_each_rows_own_prefix() -> None:
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    token_type_ids = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    length = prefix_length_of(token_type_ids, attention_mask)
    assert length.tolist() == [2, 0]
    position_ids = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    assert restart_positions(position_ids, length).tolist() == [[0, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="whole sequence"):
        prefix_length_of(token_type_ids[:, 1:], attention_mask)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_positions_where_a_mask_holds_come_first_and_all_others_behind_them_in_order(rows: list[list[bool]]) -> None:
    expected = [
        [i for i, holds in enumerate(row) if holds] + [i for i, holds in enumerate(row) if not holds] for row in rows
    ]
    assert first_where(torch.tensor(rows)).tolist() == expected
    assert first_where(torch.tensor(rows[0])).tolist() == expected[0]


def test_each_token_may_be_a_sequence_of_its_own() -> None:
    token_type_ids = torch.tensor([[0, 0, 1]])
    assert prefix_length_of(token_type_ids, None, torch.tensor([[1, 2, 3]])).tolist() == [[1, 1, 0]]
    assert prefix_length_of(token_type_ids, None, torch.tensor([[0, 0, 1]])).tolist() == [[2, 2, 2]]
