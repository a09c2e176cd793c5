"""Several sequences in one row: those that begin alike, and short ones one behind the other."""

from collections.abc import Sequence

IGNORE_INDEX = -100


def first_fit_decreasing(lengths: Sequence[int]) -> list[list[int]]:
    """Items put together so that none of the groups is longer than the longest item, each group in order."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((group for group, left in enumerate(room) if left >= lengths[i]), None)
        if fitting is None:
            groups.append([])
            room.append(max(lengths))
            fitting = len(groups) - 1
        groups[fitting].append(i)
        room[fitting] -= lengths[i]
    return [sorted(group) for group in groups]


def join(
    input_ids: list[list[int]],
    labels: list[list[int]],
    types: list[list[int]],
    groups: list[list[int]],
    shared: list[int],
) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]:
    """
    Joins sequences to rows: what those of a group have in common, and what follows it in each, one after the other.

    Args:
        groups (`list[list[int]]`): The sequences of each row.
        shared (`list[int]`): How many tokens those of each group have in common at their beginning.

    Returns:
        Token ids, labels, `token_type_ids`, and `segment_ids` of each row: 0 in what is shared, then the number of the
        sequence.
    """
    joined_ids = [input_ids[group[0]][:length] for group, length in zip(groups, shared, strict=True)]
    joined_types = [types[group[0]][:length] for group, length in zip(groups, shared, strict=True)]
    joined_labels = [[IGNORE_INDEX] * length for length in shared]
    segment_ids = [[0] * length for length in shared]
    for i, (group, length) in enumerate(zip(groups, shared, strict=True)):
        for number, n in enumerate(group, start=1):
            joined_ids[i] += input_ids[n][length:]
            # Nothing predicts the first token of a sequence without a beginning
            joined_labels[i] += [IGNORE_INDEX, *labels[n][length + 1 :]]
            joined_types[i] += types[n][length:]
            segment_ids[i] += [number] * (len(input_ids[n]) - length)
    return joined_ids, joined_labels, joined_types, segment_ids


def shared_length(
    input_ids: list[list[int]], labels: list[list[int]], types: list[list[int]], image_token_id: int
) -> int:
    """
    How many tokens sequences may have in common at their beginning, so that it is read once.

    Raises:
        ValueError: They differ before their last picture, or within a prefix that is read both ways.
    """
    differ = (position for position, tokens in enumerate(zip(*input_ids, strict=False)) if len(set(tokens)) > 1)
    shared = next(differ, min(map(len, input_ids)))
    for row in labels:
        # Behind the beginning stands one more token, so that each first label is predicted in its own part
        first_label = next((position for position, label in enumerate(row) if label != IGNORE_INDEX), len(row))
        shared = min(shared, max(first_label - 1, 0))
    if any(image_token_id in ids[shared:] for ids in input_ids):
        raise ValueError("its `conversations` differ before their last picture, which they are to share")
    if len(input_ids) > 1 and any(0 in row[shared:] for row in types):
        raise ValueError(
            "its `conversations` ask different things, which a prefix that is read both ways can't "
            "share: use a processor with `bidirectional_prefix=False`"
        )
    return shared
