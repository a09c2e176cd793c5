"""Where pictures stand among cached and new tokens: token types tell, or what was noted on the cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .stream_layout_duostream import check, kept_columns, without_padding

NEEDS_TYPES = (
    "Continuing from a cache that holds pictures needs `mm_token_type_ids` (1 = image token) of the whole sequence, "
    "cached tokens included, as `attention_mask` has"
)
WAS_CHANGED = (
    "The cache doesn't hold what `mm_token_type_ids` and `attention_mask` tell: text layers hold no image tokens, so "
    "it can't be cropped back to before a picture, nor can rows be picked out of it that have pictures at other "
    "places than those left out"
)


class PicturesRead(NamedTuple):
    """
    Noted on a cache, as its lengths don't tell.

    Attributes:
        differ (`bool` or `torch.BoolTensor`): Whether some rows have text in a column where others have pictures.
        num_untold (`int`): How many tokens stood in front of those that `mm_token_type_ids` told of.
        end (`torch.LongTensor`): A scalar: how many columns there are up to the end of the last picture.
        kept (`torch.BoolTensor` of shape `(num_columns,)`, *optional*):
            Which columns the text stream's cache has; absent where that can't have been changed since.
    """

    differ: bool | torch.Tensor
    num_untold: int
    end: int | torch.Tensor = 0
    kept: torch.Tensor | None = None


def pictures_read(past_key_values: Cache | None, past_len: int | torch.Tensor) -> PicturesRead | None:
    """What was noted on a cache, unless that has been emptied since."""
    read = getattr(past_key_values, "pictures_read", None)
    if read is None:
        return None
    if isinstance(past_len, torch.Tensor):
        is_filled = past_len != 0
        read = read._replace(differ=is_filled & read.differ, end=is_filled * read.end)
    elif past_len == 0:
        read = None
    if not (isinstance(past_len, torch.Tensor) and torch.compiler.is_compiling()):
        # Else it would be what a graph gives: see [`note_pictures`]
        past_key_values.pictures_read = read
    return read


def note_pictures(
    past_key_values: Cache,
    is_image: torch.Tensor,
    kept: torch.Tensor,
    num_left_out: int,
    num_image_tokens: int,
    num_untold: int,
) -> None:
    """
    Notes on a cache where its pictures are.

    Args:
        past_key_values (`Cache`): Is given an attribute `pictures_read`.
        is_image (`torch.BoolTensor` of shape `(batch, total_len)`): Where the image tokens stand.
        kept (`torch.BoolTensor` of shape `(total_len,)`): Which columns the text stream's cache has.
        num_left_out (`int`): How many of the new columns it has not.
        num_image_tokens (`int`): How many of the new tokens, of all rows, are a picture's.
        num_untold (`int`): How many tokens stand in front of those that `mm_token_type_ids` tell of.
    """
    before = getattr(past_key_values, "pictures_read", None)
    differ: bool | torch.Tensor = num_image_tokens != is_image.shape[0] * num_left_out
    if before is not None:
        differ = before.differ | differ
    if past_key_values.is_compileable and torch.compiler.is_compiling():
        # What a graph of a GPU gives is overwritten when it runs again, so nothing on the device is kept. No tokens or
        # rows can be taken out of a static cache.
        past_key_values.pictures_read = PicturesRead(differ, num_untold)
        return
    ends = torch.arange(1, is_image.shape[1] + 1, device=is_image.device) * is_image.any(dim=0)  # (total_len,)
    past_key_values.pictures_read = PicturesRead(differ, num_untold, ends.max(), kept)


def locate_images(
    new_tokens: torch.Tensor,
    find_placeholders: Callable[[], torch.Tensor],
    attention_mask: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    past_len: int | torch.Tensor,
    past_text_len: int | torch.Tensor,
    has_new_images: bool,
    noted: PicturesRead | None,
) -> torch.Tensor | None:
    """
    Where the image tokens stand among the cached and the new tokens.

    Args:
        new_tokens (`torch.Tensor` of shape `(batch, seq_len)` or `(batch, seq_len, hidden)`): Ids, or embeddings.
        find_placeholders (`Callable`): Finds the image tokens among the new ones: a mask of shape `(batch, seq_len)`.
        attention_mask (`torch.Tensor` of shape `(batch, past_len + seq_len)`, *optional*): 0 = padding.
        mm_token_type_ids (`torch.Tensor` of shape `(batch, past_len + seq_len)`, *optional*):
            1 = image token; of the new tokens alone where the cache tells the rest.
        past_len, past_text_len (`int` or `torch.LongTensor`):
            How many tokens the caches of the fusion stack and the text stream hold; of a static cache a tensor.
        has_new_images (`bool`): Whether there are pictures among the new tokens.
        noted (`PicturesRead`, *optional*): What [`note_pictures`] left on the cache.

    Returns:
        `torch.BoolTensor` of shape `(batch, past_len + seq_len)`, or `None` where there are none.

    Raises:
        ValueError: It can't be known, or the cache holds something else; or placeholders or types tell of new
            pictures, and there are none.
    """
    batch_size, seq_len = new_tokens.shape[:2]
    if not has_new_images and seq_len > 1:
        if new_tokens.ndim == 2:
            has_placeholder = find_placeholders().any()
            check(~has_placeholder, "`input_ids` holds placeholders of pictures, but no pictures were given")
        if mm_token_type_ids is not None:
            is_told = (mm_token_type_ids[:, -seq_len:] == 1).any()
            check(~is_told, "`mm_token_type_ids` tell of pictures, but no pictures were given")
    if mm_token_type_ids is not None:
        is_image = mm_token_type_ids == 1
        is_static = isinstance(past_len, torch.Tensor)
        num_untold = 0 if is_static else past_len + seq_len - is_image.shape[1]
        is_padded = (
            num_untold > 0
            and is_image.shape[1] != seq_len
            and (past_len or new_tokens.ndim == 3)
            and (noted is None or noted.num_untold == num_untold)
        )
        if is_padded:
            # PEFT's tokens in front of all others, of which it doesn't tell here either
            is_image = nn.functional.pad(is_image, (num_untold, 0))
        if has_new_images and is_image.shape[1] >= seq_len and (new_tokens.ndim == 2 or is_padded):
            is_same = (is_image[:, -seq_len:] == find_placeholders()).all()
            check(is_same, "`mm_token_type_ids` tell of pictures at other places than their placeholders are")
        if is_static:
            check(past_len + seq_len == is_image.shape[1], NEEDS_TYPES)
        if is_static or is_image.shape[1] == past_len + seq_len:
            if noted is not None:
                _check_unchanged(is_image, attention_mask, seq_len, past_len, noted)
            return is_image
        if is_image.shape[1] != seq_len:
            raise ValueError(
                f"`mm_token_type_ids` is of length {is_image.shape[1]}; expected {past_len + seq_len}, the length "
                "of the whole sequence, cached tokens included"
            )
    elif has_new_images:
        is_image = find_placeholders()
    else:
        is_image = torch.zeros(batch_size, seq_len, dtype=torch.bool, device=new_tokens.device)
    num_past, num_past_images = _count_cached(attention_mask, seq_len, past_len, past_text_len, has_new_images, noted)
    if not num_past_images and not has_new_images:
        return None
    if num_past_images and (batch_size > 1 or (attention_mask is not None and not attention_mask.all())):
        raise ValueError(NEEDS_TYPES)
    # With one row and no padding it matters how many image tokens are cached, not where.
    past = torch.arange(num_past, device=is_image.device) < num_past_images
    return torch.cat([past.expand(batch_size, -1), is_image], dim=1)  # (batch, past_len + seq_len)


def _check_unchanged(
    is_image: torch.Tensor,
    attention_mask: torch.Tensor | None,
    seq_len: int,
    past_len: int | torch.Tensor,
    noted: PicturesRead,
) -> None:
    """Raises `ValueError` where the cache isn't that of these types: it was cropped, or other rows picked out."""
    if noted.kept is None:
        return
    check(noted.end <= past_len, WAS_CHANGED)
    num_noted = min(len(noted.kept), is_image.shape[1] - seq_len)
    cached = is_image[:, :num_noted]  # (batch, num_noted)
    mask = None if attention_mask is None else attention_mask[:, :num_noted]
    kept = kept_columns(cached, without_padding(~cached, mask))  # (num_noted,)
    # Of a static cache that was reset the note has no end
    check((kept == noted.kept[:num_noted]).all() | (noted.end == 0), WAS_CHANGED)


def _count_cached(
    attention_mask: torch.Tensor | None,
    seq_len: int,
    past_len: int | torch.Tensor,
    past_text_len: int | torch.Tensor,
    has_new_images: bool,
    noted: PicturesRead | None,
) -> tuple[int, int]:
    """How many tokens, and how many image tokens, are cached, where no types tell."""
    if noted is not None:
        # The text stream's cache may then be as long as the fusion stack's, with slots in it that are empty
        if isinstance(noted.differ, torch.Tensor):
            check(~noted.differ, NEEDS_TYPES)
        elif noted.differ:
            raise ValueError(NEEDS_TYPES)
        if noted.kept is not None:
            check(noted.end <= past_len, WAS_CHANGED)
    if not isinstance(past_len, torch.Tensor):
        return past_len, past_len - int(past_text_len)
    check(past_len == past_text_len, NEEDS_TYPES)
    if not has_new_images:
        return 0, 0
    if attention_mask is None:
        raise ValueError(NEEDS_TYPES)
    return attention_mask.shape[1] - seq_len, 0
