"""Losses: labels in the place of the states that predict them, and the contrastive loss over all ranks' pairs."""

from typing import Any

import torch
from torch import nn
from torch.distributed.nn.functional import all_gather

from .stream_layout_duostream import check, first_where


def shift_labels(labels: torch.Tensor, attention_mask: torch.Tensor | dict[str, Any] | None) -> torch.Tensor:
    """
    Labels in the place of the state that predicts them, of shape `(batch, seq_len)`: the last predicts none, and
    neither does padding, whose states are anything, that of the very label among them.
    """
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # (batch, seq_len)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_padding = attention_mask[:, -shifted.shape[1] :].to(shifted.device) == 0
        shifted = shifted.masked_fill(is_padding, -100)
    return shifted


def take_num_items(kwargs: dict[str, Any]) -> torch.Tensor | int | None:
    """Takes `num_items_in_batch` out: a tensor, as `Trainer` gives it, would go through all layers for nothing."""
    num_items = kwargs.pop("num_items_in_batch", None)
    # `Trainer` counts none in rows whose answers were all cut away, from which nothing is learnt
    return None if num_items is None else num_items + (num_items == 0)


def count_items(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    """What a sum over labels is divided by."""
    if num_items_in_batch is None:
        return (labels != -100).sum().clamp(min=1)
    # Layers may be spread over devices
    return num_items_in_batch.to(labels.device) if isinstance(num_items_in_batch, torch.Tensor) else num_items_in_batch


def find_labelled(labels: torch.Tensor, targets_per_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The positions that have a label, so that no logits are made of the others, which are most of them: a picture's
    tokens, the prompt and padding. Nothing waits for the device.

    Args:
        labels (`torch.Tensor` of shape `(batch, seq_len)`): What the state in the same place predicts; -100 = nothing.
        targets_per_row (`int`): How many labels a row has at most.

    Returns:
        Positions and their labels, both of shape `(batch, targets_per_row)`, in order.

    Raises:
        ValueError: A row has more labels.
    """
    has_label = labels != -100
    check(
        (has_label.sum(dim=1) <= targets_per_row).all(),
        "A row has more labels than `targets_per_row`",
        lambda: f", which is {targets_per_row}",
    )
    index = first_where(has_label)[:, :targets_per_row]  # (batch, targets_per_row)
    return index, labels.gather(1, index)  # (batch, targets_per_row)


def num_ranks() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather_rows(rows: torch.Tensor, tp_size: int = 1) -> tuple[torch.Tensor, int]:
    """
    The rows of all ranks, through which gradients flow back to where they came from, and how many stand before this
    rank's. Ranks may have different numbers of rows, or none.

    Args:
        rows (`torch.FloatTensor` of shape `(num_rows, hidden)`): This rank's.
        tp_size (`int`, *optional*, defaults to 1): How many ranks in a row share a model's layers by tensor
            parallelism, and have the same rows: those of one in each such group count.
    """
    world_size = num_ranks()
    if world_size == tp_size:
        return rows, 0
    rank = torch.distributed.get_rank() // tp_size
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(counts, own)
    sizes = [int(count) for count in counts[::tp_size]]
    padded = nn.functional.pad(rows, (0, 0, 0, max(sizes) - len(rows)))  # (max_rows, hidden)
    # Of those with the same part of the layers as this rank, to which their gradients belong
    gathered = all_gather(padded)[torch.distributed.get_rank() % tp_size :: tp_size]
    rows = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])  # (num_all_rows, hidden)
    return rows, sum(sizes[:rank])


def contrastive_loss(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    loss_type: str,
    num_pairs: torch.Tensor | int | None = None,
    tp_size: int = 1,
) -> torch.Tensor:
    """
    How badly texts and pictures find each other. Row i of either belongs to row i of the other.

    Args:
        text_embeds, image_embeds (`torch.FloatTensor` of shape `(num_pairs, projection_dim)`): Of unit length.
        logit_scale, logit_bias (`torch.FloatTensor` of shape `(1,)`): The scale is its exponential.
        loss_type (`str`): `"sigmoid"`, every pair a yes or no of its own (Zhai et al. 2023, section 3.2), or
            `"softmax"`, each the right one among all (Radford et al. 2021, section 2.3).
        num_pairs (`int`, *optional*): What the sum is divided by. Defaults to the pairs of this rank; a loop that sums
            over ranks and accumulated batches gives the number of all.
        tp_size (`int`, *optional*, defaults to 1): See [`gather_rows`].

    Returns:
        `torch.FloatTensor`, a scalar: the part of this rank's texts, and pictures, against those of all ranks.
    """
    all_texts, first = gather_rows(text_embeds, tp_size)
    all_images, _ = gather_rows(image_embeds, tp_size)
    own = torch.arange(first, first + len(text_embeds), device=text_embeds.device)
    scores = logit_scale.exp() * text_embeds @ all_images.T + logit_bias  # (num_pairs, all_pairs)
    if loss_type == "sigmoid":
        signs = torch.full_like(scores, -1).scatter(1, own[:, None], 1)  # (num_pairs, all_pairs)
        loss = -nn.functional.logsigmoid(signs * scores.float()).sum()
    else:
        image_scores = logit_scale.exp() * image_embeds @ all_texts.T + logit_bias  # (num_pairs, all_pairs)
        loss = (
            sum(nn.functional.cross_entropy(each.float(), own, reduction="sum") for each in (scores, image_scores)) / 2
        )
    return loss / (len(text_embeds) if num_pairs is None else num_pairs)


def hard_negatives(scores: torch.Tensor, sample: bool = True) -> torch.Tensor:
    """
    For each row another column than its own, drawn the likelier the higher it scores (Li et al. 2021, section 3.2).

    Args:
        scores (`torch.FloatTensor` of shape `(num_pairs, num_pairs)`): At least two pairs; the diagonal is right.
        sample (`bool`, *optional*, defaults to `True`): Whether to draw, or to take the one that scores highest.

    Returns:
        `torch.LongTensor` of shape `(num_pairs,)`.
    """
    is_own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    others = scores.float().masked_fill(is_own, -torch.inf)
    return others.softmax(dim=1).multinomial(1).squeeze(1) if sample else others.argmax(dim=1)
