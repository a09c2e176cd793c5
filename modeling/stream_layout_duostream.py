"""Where each token goes: which positions the text stream reads, and how the two streams are joined."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing, torch_compilable_check

from ..configuration.configuration_duostream import DuoStreamConfig, layer_types


class StreamLayout(NamedTuple):
    """
    How the tokens of one forward pass are dealt out to the streams. `None` stands for "as it is".

    Attributes:
        text_index (`torch.LongTensor` of shape `(batch, text_len)`):
            The position in the sequence of each token that the text stream reads.
        join_index (`torch.LongTensor` of shape `(batch, seq_len)`):
            For each position its row in the text states of all rows followed by the image states of all pictures.
        text_attention_mask (`torch.BoolTensor` of shape `(batch, past_text_len + text_len)`):
            Which of the tokens in the text stream, those in its cache included, are text.
        text_position_ids (`torch.LongTensor` of shape `(batch, text_len)`):
            Positions that count text only.
        kept_columns (`torch.BoolTensor` of shape `(past_len + seq_len,)`):
            Which columns a cached text stream reads.
    """

    text_index: torch.Tensor | None = None
    join_index: torch.Tensor | None = None
    text_attention_mask: torch.Tensor | None = None
    text_position_ids: torch.Tensor | None = None
    kept_columns: torch.Tensor | None = None

    def text_len(self, seq_len: int) -> int:
        """How many of `seq_len` tokens a row the text stream reads."""
        return seq_len if self.text_index is None else self.text_index.shape[1]

    def join(self, text_states: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
        """
        The states of both streams, `(batch, text_len, hidden)` and `(num_images, image_seq_length, hidden)`, in the
        order of the sequence: `(batch, seq_len, hidden)`.
        """
        states = torch.cat([text_states.flatten(0, 1), image_states.flatten(0, -2)])  # (all tokens, hidden)
        return states[self.join_index.to(states.device)]  # (batch, seq_len, hidden)


class SequencePlan(NamedTuple):
    """
    What is settled about a forward pass before any stream runs.

    Attributes:
        layout (`StreamLayout`): What each stream reads.
        position_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*): Positions that count all tokens.
        block_ids (`torch.LongTensor` of shape `(batch, past_len + seq_len)`, *optional*):
            Which tokens see each other both ways in the fusion stack: see [`block_sequence_ids`].
        image_mask (`torch.BoolTensor` of shape `(batch, seq_len)`, *optional*):
            The image tokens that upper fusion layers only read: see [`image_tokens_to_leave`].
        updated_index (`torch.LongTensor` of shape `(batch, num_updated)`, *optional*):
            The positions of which these layers make new states: see [`positions_to_update`].
    """

    layout: StreamLayout
    position_ids: torch.Tensor | None
    block_ids: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    updated_index: torch.Tensor | None = None


def check(condition: torch.Tensor, message: str, detail: Callable[[], str] | None = None) -> None:
    """
    Raises `ValueError` on a CPU; elsewhere, and while tracing, asserts without waiting for the device.

    Args:
        condition (`torch.BoolTensor`): A scalar.
        message (`str`): What is wrong. It holds no sizes of this batch, for which a compiled forward would be made.
        detail (function, *optional*): Gives what follows the message where there are sizes to tell.
    """
    if detail is not None and not is_tracing(condition):
        message += detail()
    if condition.device.type == "cpu" and not is_tracing(condition):
        torch_compilable_check(condition, message)
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)


def check_shape(
    name: str, given: torch.Tensor | None, expected: str, batch_sizes: tuple[int, ...], *lengths: int | torch.Tensor
) -> None:
    """
    Raises `ValueError` where an argument that tells of each token is not of one of these batch sizes and lengths. The
    length of a static cache is a tensor, of which the device is not waited for.
    """
    if given is None:
        return
    known = [length for length in lengths if not isinstance(length, torch.Tensor)]
    has_batch = given.ndim == 2 and any(given.shape[0] == batch_size for batch_size in batch_sizes)
    if has_batch and any(given.shape[1] == length for length in known):
        return
    # Numbers are written down where they are wrong alone: else a compiled forward would be one for these numbers
    if has_batch and len(known) < len(lengths):
        total_len = next(length for length in lengths if isinstance(length, torch.Tensor))
        return check(total_len == given.shape[1], f"`{name}` is of another length: expected {expected}")
    shapes = " or ".join(f"{batch_sizes[-1]} x {length}" for length in known)
    raise ValueError(
        f"`{name}` is of shape {tuple(given.shape)}; expected {expected}" + (shapes and f", here {shapes}")
    )


def first_where(mask: torch.Tensor) -> torch.Tensor:
    """
    The order of positions, of the shape of `mask`, in which those where it holds come first, each group as it stands:
    a stable sort of two values along the last dimension, which ONNX has no translation for.
    """
    place = torch.where(mask, mask.cumsum(dim=-1), mask.sum(dim=-1, keepdim=True) + (~mask).cumsum(dim=-1)) - 1
    positions = torch.arange(mask.shape[-1], device=mask.device).expand_as(place)
    return torch.zeros_like(place).scatter(-1, place, positions)


def without_padding(mask: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """A mask of tokens, and of none that are padding; both of shape `(batch, total_len)`."""
    return mask if attention_mask is None else mask & attention_mask.to(torch.bool)


def text_window(config: DuoStreamConfig) -> int | None:
    """The sliding window of the text stream's layers, in tokens; `None` where all see all that came before."""
    if "sliding_attention" in layer_types(config.text_config):
        return config.text_config.sliding_window
    # GPT-Neo has names of its own
    is_local = "local" in getattr(config.text_config, "attention_layers", ())
    return config.text_config.window_size if is_local else None


def deal_out(
    config: DuoStreamConfig,
    is_image: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_len: int,
    num_image_tokens: int,
    text_cache: Cache | None,
    images_per_row: int | None,
    segment_ids: torch.Tensor | None,
) -> StreamLayout:
    """
    The layout of any forward pass, with or without pictures, cached ones included: see [`lay_out`], which makes it
    where there are new ones. `is_image` is `None` where there are none at all.
    """
    if is_image is None or (not num_image_tokens and text_cache is None):
        return StreamLayout(text_attention_mask=attention_mask, text_position_ids=position_ids)
    if num_image_tokens:
        layout = lay_out(
            is_image,
            attention_mask,
            position_ids,
            seq_len,
            num_image_tokens,
            config.image_seq_length,
            cached=text_cache is not None,
            text_is_causal=config.is_text_causal,
            images_per_row=images_per_row,
            sliding_window=text_window(config),
            segment_ids=segment_ids,
        )
    else:
        layout = StreamLayout(
            text_attention_mask=text_padding_mask(is_image, attention_mask, text_window(config)),
            text_position_ids=count_text(position_ids, is_image, attention_mask),
        )
    past_text_len = text_cache.get_seq_length() if text_cache is not None else 0
    if layout.text_attention_mask is not None and not isinstance(past_text_len, torch.Tensor):
        # Behind the columns that are kept stand those that are left out
        text_attention_mask = layout.text_attention_mask[:, : past_text_len + layout.text_len(seq_len)]
        layout = layout._replace(text_attention_mask=text_attention_mask)
    return layout


def lay_out(
    is_image: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_len: int,
    num_image_tokens: int,
    image_seq_length: int,
    cached: bool,
    text_is_causal: bool,
    images_per_row: int | None = None,
    sliding_window: int | None = None,
    segment_ids: torch.Tensor | None = None,
) -> StreamLayout:
    """
    Deals out a sequence in which some positions are image tokens.

    Without a cache every row's text is packed to the left, row by row, so that the text stream is as short as the
    longest text, wherever the pictures stand; and a causal text stream then needs no padding mask. With a cache whole
    columns are left out, those with pictures and no text: what a column's slot is then depends on that column alone,
    so the layout of a cached text never changes, whatever comes after it.

    Args:
        is_image (`torch.BoolTensor` of shape `(batch, past_len + seq_len)`): Where the image tokens stand.
        attention_mask (`torch.Tensor` of shape `(batch, past_len + seq_len)`, *optional*): 0 = padding.
        position_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
            Positions that count all tokens; required with a cache.
        seq_len (`int`): Length of this forward's sequence: the last `seq_len` columns of the masks.
        num_image_tokens (`int`): How many image tokens there are features for.
        image_seq_length (`int`): Tokens a picture.
        cached (`bool`): Whether the text states go into, or continue, a cache.
        text_is_causal (`bool`): Whether the text stream is a decoder.
        images_per_row (`int`, *optional*):
            The number of pictures in *every* row, if all have the same number and, with a cache, the columns of
            pictures hold no text. It says how long the text is, so that the host need not wait for the device to tell.
        sliding_window (`int`, *optional*): Of the text stream's layers, in tokens.
        segment_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
            Without a cache: see [`segment_positions`].

    Raises:
        ValueError: placeholders and image tokens differ in number, or a row holds a part of a picture.
    """
    batch_size = is_image.shape[0]
    is_text = without_padding(~is_image, attention_mask)  # (batch, past_len + seq_len)
    image, text = is_image[:, -seq_len:], is_text[:, -seq_len:]  # (batch, seq_len)
    check(
        (image.sum() == num_image_tokens) & (image.sum(dim=1) % image_seq_length == 0).all(),
        "The placeholders in `input_ids` don't match the pictures",
        lambda: (
            f": expected {num_image_tokens} in all, {image_seq_length} for each picture of a row, and each whole "
            "(also where a prompt is read in chunks)"
        ),
    )
    if images_per_row is not None:
        text_len = seq_len - images_per_row * image_seq_length

    text_attention_mask, text_position_ids, kept = None, None, None
    if not cached:
        if images_per_row is None:
            text_len = int(text.sum(dim=1).max())
        else:
            check(
                (text.sum(dim=1) <= text_len).all(),
                "Not all rows have as many pictures as is told",
                lambda: f": `images_per_row={images_per_row}`",
            )
        text_index = first_where(text)[:, :text_len]  # (batch, text_len)
        slot = text.cumsum(dim=1) - 1  # (batch, seq_len)
        if not text_is_causal:
            text_attention_mask = text.gather(1, text_index)
    else:
        kept = kept_columns(is_image, is_text)  # (past_len + seq_len,)
        chunk_kept = kept[-seq_len:]
        if images_per_row is None:
            text_len = int(chunk_kept.sum())
        else:
            check(
                chunk_kept.sum() == text_len,
                "In a cache, columns of pictures must hold no text",
                lambda: f", which does not hold with `images_per_row={images_per_row}`",
            )
        order = first_where(kept)  # (past_len + seq_len,)
        # Each launch counts where the host is what takes time: nothing is sorted, or looked for, twice
        chunk_order = order if kept.shape[0] == seq_len else first_where(chunk_kept)  # (seq_len,)
        text_index = chunk_order[:text_len].expand(batch_size, -1)  # (batch, text_len)
        slot = (chunk_kept.cumsum(dim=0) - 1).expand(batch_size, -1)  # (batch, seq_len)
        if batch_size > 1 or attention_mask is not None:
            text_attention_mask = _mask_slots(is_image, is_text, kept, order, sliding_window)
    if cached or position_ids is not None:
        text_position_ids = count_text(position_ids, is_image, attention_mask, segment_ids)  # (batch, seq_len)
        text_position_ids = text_position_ids.gather(1, text_index)  # (batch, text_len)

    row = torch.arange(batch_size, device=is_image.device)[:, None]
    nth_image_token = image.flatten().cumsum(dim=0).view_as(image) - 1  # (batch, seq_len)
    # Padding has no slot of its own; any will do, as it is masked wherever it is read.
    join_index = torch.where(image, batch_size * text_len + nth_image_token, row * text_len + slot.clamp(min=0))
    return StreamLayout(text_index, join_index, text_attention_mask, text_position_ids, kept)


def kept_columns(is_image: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Columns of shape `(total_len,)` that a cached text stream reads: all but those with pictures and no text."""
    return ~is_image.any(dim=0) | is_text.any(dim=0)


def text_padding_mask(
    is_image: torch.Tensor, attention_mask: torch.Tensor | None, sliding_window: int | None = None
) -> torch.Tensor | None:
    """
    Which slots of a cached text stream hold text, of shape `(batch, total_len)`: those of the kept columns first, in
    order, then those left out. `None` for a single row without padding, whose kept slots all hold text.

    Args:
        is_image (`torch.BoolTensor` of shape `(batch, total_len)`): Where the image tokens stand.
        attention_mask (`torch.Tensor` of shape `(batch, total_len)`, *optional*): 0 = padding.
        sliding_window (`int`, *optional*): Of the text stream's layers, in tokens.

    Raises:
        ValueError: The text is longer than the window, which counts slots, and a row has empty slots in its midst.
    """
    if is_image.shape[0] == 1 and attention_mask is None:
        return None
    is_text = without_padding(~is_image, attention_mask)
    kept = kept_columns(is_image, is_text)
    return _mask_slots(is_image, is_text, kept, first_where(kept), sliding_window)


def _mask_slots(
    is_image: torch.Tensor, is_text: torch.Tensor, kept: torch.Tensor, order: torch.Tensor, sliding_window: int | None
) -> torch.Tensor:
    if sliding_window is not None and is_image.shape[1] > sliding_window:
        followed = is_text.flip(1).cumsum(dim=1).flip(1) > 0
        has_gap = (is_image & kept & followed & (is_text.cumsum(dim=1) > 0)).any()
        check(
            ~has_gap | (kept.sum() <= sliding_window),
            f"The text is longer than its sliding window of {sliding_window} tokens, and pictures stand at different "
            "places in different rows: generate these rows one by one, or without a cache",
        )
    return is_text[:, order] & kept[order]


def count_tokens(
    attention_mask: torch.Tensor | None,
    past_len: int | torch.Tensor,
    batch_size: int,
    seq_len: int,
    device: torch.device,
) -> torch.Tensor:
    """Positions of shape `(batch, seq_len)`: how many tokens that are not padding stand before each."""
    if attention_mask is not None:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -seq_len:]
    positions = torch.arange(seq_len, device=device) + past_len
    return positions.expand(batch_size, -1)


def count_text(
    position_ids: torch.Tensor,
    is_image: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Positions of text that count text alone, of shape `(batch, seq_len)`, from those that count all tokens but padding.
    `is_image` and `attention_mask` may tell of cached tokens, too. With `segment_ids` only the pictures count that a
    token sees.
    """
    is_image = without_padding(is_image, attention_mask)  # a picture that is hidden was not counted
    if segment_ids is not None:
        images_so_far = segment_positions(segment_ids, is_image)
    else:
        images_so_far = is_image.cumsum(dim=1)[:, -position_ids.shape[1] :]
    return (position_ids - images_so_far).clamp(min=0)


def count_prefix(
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    past_len: int | torch.Tensor,
    segment_ids: torch.Tensor | None,
) -> torch.Tensor:
    """
    [`prefix_length_of`] the rows of a forward pass, of which `position_ids` are those of the new tokens.

    Raises:
        ValueError: The types that are there don't tell.
    """
    if isinstance(past_len, torch.Tensor) or isinstance(attention_mask, dict):
        raise ValueError("With a static cache, `config.restart_positions` needs `prefix_length`")
    total_len = past_len + position_ids.shape[1]
    if past_len and (token_type_ids is None or token_type_ids.shape[1] != total_len):
        raise ValueError(
            "To continue from a cache, `config.restart_positions` needs `prefix_length`, or `token_type_ids` of "
            f"the whole sequence of {total_len} tokens, cached ones included"
        )
    if token_type_ids is None:
        return position_ids.new_zeros(1)
    return prefix_length_of(token_type_ids, attention_mask, segment_ids)


def prefix_length_of(
    token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """
    How many tokens of each row are prefix (`token_type_ids` 0), padding apart: of shape `(batch,)`. With `segment_ids`
    how many of those that a token sees, of shape `(batch, seq_len)`.

    Raises:
        ValueError: The two, both of shape `(batch, total_len)`, differ in shape.
    """
    if attention_mask is not None and attention_mask.shape != token_type_ids.shape:
        raise ValueError(
            f"`token_type_ids` are of shape {tuple(token_type_ids.shape)}, `attention_mask` is of shape "
            f"{tuple(attention_mask.shape)}: to count the prefix, both must tell of the whole sequence"
        )
    is_prefix = without_padding(token_type_ids == 0, attention_mask)  # (batch, total_len)
    if segment_ids is None:
        return is_prefix.sum(dim=1)  # (batch,)
    # There are as many segments as tokens at most, and number 0
    lengths = nn.functional.pad(torch.zeros_like(segment_ids), (0, 1))  # (batch, seq_len + 1)
    lengths = lengths.scatter_add(1, segment_ids, is_prefix.long())  # (batch, any segment)
    own = lengths.gather(1, segment_ids)  # (batch, seq_len)
    return own + torch.where(segment_ids == 0, 0, lengths[:, :1])


def restart_positions(position_ids: torch.Tensor, prefix_length: torch.Tensor) -> torch.Tensor:
    """
    Positions that start at 0 again behind the prefix, so that a word of an answer is as far from the words that it
    answers to whatever the length of the prompt (Lample and Conneau 2019, section 3.4, of translated pairs).

    Args:
        position_ids (`torch.LongTensor` of shape `(batch, seq_len)`): Positions that count all tokens.
        prefix_length (`torch.LongTensor` of shape `(batch,)` or `(batch, seq_len)`):
            Tokens of each row's prefix, or of the prefix that each token sees.
    """
    if prefix_length.ndim == 1:
        prefix_length = prefix_length[:, None]
    return torch.where(position_ids < prefix_length, position_ids, position_ids - prefix_length)


def segment_positions(segment_ids: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """
    How many tokens that are counted stand before each token among those that it sees, in rows that hold several
    sequences: its own sequence, and the beginning that all share. Of shape `(batch, seq_len)`.

    Args:
        segment_ids (`torch.LongTensor` of shape `(batch, seq_len)`):
            0 in a beginning that all share, if there is one, then 1, 2, ... in one sequence after the other.
        is_counted (`torch.Tensor` of shape `(batch, seq_len)`): 1 = counted, as tokens that are no padding are.
    """
    is_counted = is_counted.long()
    before = is_counted.cumsum(dim=1) - is_counted  # (batch, seq_len)
    shared = ((segment_ids == 0) * is_counted).sum(dim=1, keepdim=True)  # (batch, 1)
    is_start = torch.zeros_like(segment_ids, dtype=torch.bool)
    is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = torch.where(is_start, before, 0).cummax(dim=1).values  # (batch, seq_len)
    return torch.where(segment_ids == 0, before, shared + before - start)


def default_segment_positions(segment_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions as they would be with a row for each sequence; all of shape `(batch, seq_len)`."""
    is_valid = torch.ones_like(segment_ids) if attention_mask is None else attention_mask.long()
    # Padding has the position of the token before it: behind the last one there may be none
    return (segment_positions(segment_ids, is_valid) - 1 + is_valid).clamp(min=0)


def check_one_sequence(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises `ValueError` where `position_ids` start anew within a row, as where it holds several sequences."""
    goes_on = position_ids.diff(dim=1) >= 0  # (batch, seq_len - 1)
    if attention_mask is not None:
        is_valid = attention_mask[:, -position_ids.shape[1] :].to(torch.bool)
        goes_on = goes_on | ~(is_valid[:, 1:] & is_valid[:, :-1])
    check(goes_on.all(), "`position_ids` start anew, for several sequences in a row: give `segment_ids`")
