"""Who sees whom: masks of the two streams that are more than causal, which the library makes for any attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import is_flash_attention_requested

from ..configuration.configuration_duostream import DuoStreamConfig, layer_types
from .stream_layout_duostream import StreamLayout, check, segment_positions, without_padding


def number_pictures(is_image: torch.Tensor, image_seq_length: int) -> torch.Tensor:
    """Of shape `(batch, total_len)`: 1, 2, ... where a row's first, second, ... picture stands, -1 elsewhere."""
    picture = (is_image.cumsum(dim=1) - 1).div(image_seq_length, rounding_mode="floor") + 1  # (batch, total_len)
    return torch.where(is_image, picture, -1)


def block_sequence_ids(
    is_image: torch.Tensor,
    image_seq_length: int,
    token_type_ids: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Numbers the tokens that see each other both ways: a picture's tokens, and all tokens of the prefix.

    Args:
        is_image (`torch.BoolTensor` of shape `(batch, total_len)`): Where the image tokens stand.
        image_seq_length (`int`): Tokens a picture.
        token_type_ids (`torch.LongTensor` of shape `(batch, total_len)`, *optional*):
            0 = bidirectional prefix, 1 = causal suffix (prefix-LM: Raffel et al. 2020, section 3.2.1).
        segment_ids (`torch.LongTensor` of shape `(batch, total_len)`, *optional*):
            Sequences that share a row, each with a prefix of its own: see [`segment_positions`].

    Returns:
        `torch.LongTensor` of shape `(batch, total_len)`: 0 in the prefix, 1, 2, ... in the pictures outside of it, -1
        in causal text; with `segment_ids` each prefix has a number of its own.
    """
    blocks = number_pictures(is_image, image_seq_length)
    if token_type_ids is not None:
        # There are fewer pictures than tokens
        prefix = 0 if segment_ids is None else segment_ids + is_image.shape[1]
        blocks = torch.where(token_type_ids == 0, prefix, blocks)
    return blocks


def check_segments(
    segment_ids: torch.Tensor,
    is_image: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    image_seq_length: int,
) -> None:
    """
    All of shape `(batch, seq_len)`.

    Raises:
        ValueError: They don't count up from 0; or a picture, or a prefix that is read both ways, stands partly in what
            all sequences of a row share.
    """
    so_far = torch.where(without_padding(segment_ids > 0, attention_mask), segment_ids, 0).cummax(dim=1).values
    check(
        ~without_padding(segment_ids < so_far, attention_mask).any(),  # padding may have any number
        "`segment_ids` are 0 in the beginning that all sequences of a row share, then 1, 2, ... one after the other: "
        "expected none below 0, or below one before it",
    )
    if is_image is not None:
        picture = number_pictures(is_image, image_seq_length)
        is_inner = is_image[:, 1:] & (picture[:, 1:] == picture[:, :-1])
        is_cut = is_inner & (segment_ids[:, 1:] != segment_ids[:, :-1])
        check(~is_cut.any(), "A picture must stand where `segment_ids` are equal")
    if token_type_ids is not None:
        is_prefix = without_padding(token_type_ids == 0, attention_mask)
        is_shared = segment_ids == 0
        is_split = (is_prefix & is_shared).any(dim=1) & (is_prefix & ~is_shared).any(dim=1)
        check(~is_split.any(), "A prefix (`token_type_ids` 0) must stand where all `segment_ids` are 0, or none")


def check_prefix(
    token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None
) -> None:
    """
    Raises `ValueError` where a prefix goes on behind a suffix, whose future it then shows. All of shape `(batch,
    seq_len)`, but for an `attention_mask` that tells of cached tokens, too.
    """
    if attention_mask is not None:
        attention_mask = attention_mask[:, -token_type_ids.shape[1] :]

    def so_far(mask: torch.Tensor) -> torch.Tensor:
        # Of several sequences in a row, and the beginning that they share, each may have a prefix
        return mask.cumsum(dim=1) if segment_ids is None else segment_positions(segment_ids + 1, mask)

    is_prefix = without_padding(token_type_ids == 0, attention_mask)
    is_suffix = without_padding(token_type_ids != 0, attention_mask) & (so_far(is_prefix) > 0)
    check(
        ~(is_prefix & (so_far(is_suffix) > 0)).any(),
        "A prefix that is read both ways (`token_type_ids` 0) goes on behind a suffix that is read forwards (1). "
        "TRL's trainers that write in training (GRPO, RLOO) give 0 to what is written: use a processor with "
        "`bidirectional_prefix=False`",
    )


def see_own_segment(segment_ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A mask function, as the library combines them: a token sees a beginning that all share, and its own sequence."""

    def mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.Tensor:
        kv_segment = segment_ids[batch_idx, kv_idx]
        return (kv_segment == 0) | (kv_segment == segment_ids[batch_idx, q_idx])

    return mask


def refuse_flash_attention(config: DuoStreamConfig, stream: str) -> None:
    """Raises `ValueError` where flash attention would see what a mask hides, or hide what it shows, without a word."""
    if is_flash_attention_requested(getattr(config, stream)):
        raise ValueError(
            "Flash attention knows neither tokens that see each other both ways (`token_type_ids`, masked language "
            "modelling, image-text matching) nor `segment_ids`: use "
            f'`model.set_attn_implementation({{"{stream}": "sdpa"}})`'
        )


def fusion_mask(
    config: DuoStreamConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    block_ids: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> Any:
    """Masks of the fusion stack that are more than causal and padding masks, which its layers make themselves."""
    refuse_flash_attention(config, "fusion_stack_config")
    # Of a text stream on several devices the states come from the last one; the library moves `attention_mask` alone
    block_ids = None if block_ids is None else block_ids.to(hidden_states.device)
    segment_ids = None if segment_ids is None else segment_ids.to(hidden_states.device)
    return create_masks_for_generate(
        config=config.fusion_stack_config,
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=None if segment_ids is None else see_own_segment(segment_ids),
        block_sequence_ids=block_ids,
    )


def text_segment_mask(
    config: DuoStreamConfig, segment_ids: torch.Tensor, layout: StreamLayout, dtype: torch.dtype
) -> Any:
    """Masks by which the text stream, too, reads each continuation apart from the others."""
    refuse_flash_attention(config, "text_config")
    if layout.text_index is not None:
        segment_ids = segment_ids.gather(1, layout.text_index)  # (batch, text_len)
    return create_masks_for_generate(
        config=config.text_config,
        # Only the shape, dtype and device count
        inputs_embeds=torch.empty((*segment_ids.shape, 0), dtype=dtype, device=segment_ids.device),
        attention_mask=layout.text_attention_mask,
        past_key_values=None,
        and_mask_function=see_own_segment(segment_ids),
    )


def tokens_that_see_each_other(
    config: DuoStreamConfig,
    is_image: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    seq_len: int,
    segment_ids: torch.Tensor | None,
) -> torch.Tensor:
    """
    [`block_sequence_ids`] of the cached and the new tokens, of shape `(batch, past_len + seq_len)`.

    Raises:
        ValueError: Of a prefix that is read both ways a part is cached, and another new.
    """
    if not config.bidirectional_images:
        is_image = torch.zeros_like(is_image)
    if token_type_ids is not None and token_type_ids.shape[1] < is_image.shape[1]:
        # Types of the new tokens alone: what is cached has been read, and is seen by all of them anyway
        num_past = is_image.shape[1] - token_type_ids.shape[1]
        token_type_ids = nn.functional.pad(token_type_ids, (num_past, 0), value=1)
    elif token_type_ids is not None and token_type_ids.shape[1] > seq_len:
        is_prefix = without_padding(token_type_ids == 0, attention_mask)
        is_cut = is_prefix[:, :-seq_len].any(dim=1) & is_prefix[:, -seq_len:].any(dim=1)
        check(~is_cut.any(), "A prefix that is read both ways (`token_type_ids` 0) must be read at once")
    return block_sequence_ids(is_image, config.image_seq_length, token_type_ids, segment_ids)


def check_segment_windows(
    config: DuoStreamConfig, segment_ids: torch.Tensor, attention_mask: torch.Tensor | None, layout: StreamLayout
) -> None:
    """Raises `ValueError` where sequences share a beginning that those in between would push out of a window."""
    seq_len = segment_ids.shape[1]
    for name, length in (("text_config", layout.text_len(seq_len)), ("fusion_stack_config", seq_len)):
        stream = getattr(config, name)
        if "sliding_attention" in layer_types(stream) and length > stream.sliding_window:
            check(
                ~without_padding(segment_ids == 0, attention_mask).any(),
                f"`segment_ids` share a beginning, but windows of {stream.sliding_window} tokens "
                f"(`{name}.sliding_window`) slide over longer rows: give shorter ones, or each a row of its own",
            )
