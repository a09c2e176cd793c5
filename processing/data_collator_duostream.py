"""From conversations with pictures to a batch for `Trainer`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import datasets
import PIL.Image
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .conversations_duostream import conversations_of, encode_text, is_plain_text, render, tokenize
from .packing_duostream import IGNORE_INDEX, first_fit_decreasing, join, shared_length
from .pictures_duostream import read_picture
from .processing_duostream import DuoStreamProcessor

logger = logging.get_logger(__name__)


def load_picture(image: Any) -> PIL.Image.Image:
    """A picture from what [`read_picture`] takes, or the bytes and path that `datasets` stores, as streams give it."""
    if isinstance(image, dict):
        # Opened here where it can be: `datasets` turns TIFFs by their EXIF as older Pillow has turned them
        if image.get("bytes") is not None:
            image = PIL.Image.open(BytesIO(image["bytes"]))
        elif os.path.isfile(image.get("path") or ""):
            image = image["path"]
        else:
            image = datasets.Image().decode_example(image)
    return read_picture(image)


def load_pictures(images: Sequence[Any], name: str) -> list[PIL.Image.Image]:
    """
    The pictures of a row.

    Raises:
        ValueError: They are no list, or one can't be read. The message names the row.
    """
    is_list = isinstance(images, Sequence) and not isinstance(images, str)
    if not is_list and getattr(images, "ndim", None) not in (1, 4):
        raise ValueError(f"{name}: expected a list of pictures in `images`, not {images!r:.100}")
    try:
        return [load_picture(image) for image in images]
    except Exception as error:
        raise ValueError(f"{name}: a picture can't be read: {error}") from error


@dataclass
class ImageStates(BaseModelOutputWithPooling):
    """The vision stream's states of a batch's pictures, as a model takes them instead of `pixel_values`."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        # For a GPU `DataLoader` copies a mapping, and updates the copy with what it pinned; the library forbids it.
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


def targets_per_row(labels: torch.Tensor) -> int:
    """The largest number of labels in a row of `labels`, of shape `(batch, seq_len)`."""
    return int((labels != IGNORE_INDEX).sum(dim=1).max())


@dataclass
class DuoStreamDataCollator:
    """
    Makes a batch of rows in the conversational form: `images` (a list of pictures) and `messages`, or `images`,
    `prompt` and `completion` (lists of messages). Only what the assistant says, in `completion` if there is one, is
    left in the labels. Or of rows with `images` and a `text` that stands behind them without any chat; all of it is
    left in the labels. Or of rows with `images` and `conversations`, a list of any of these that begin alike, such as
    all captions of a picture: their beginning is read once, and the loss is that of a row for each.

    A row's `tools` (a list of JSON schemas, or one written as JSON) are given to the chat template, which has to write
    them, and the `tool_calls` of its messages.

    Instead of `images` a row may have `image_features`: for each picture the frozen vision stream's states, of shape
    `(image_seq_length, image_hidden_size)`. Its pictures are then not opened.

    Args:
        processor (`DuoStreamProcessor`): Gives the chat template, the tokenizer and the image processor.
        max_length (`int`, *optional*): Longer rows are cut, which is logged: text only, never a picture, on the
            tokenizer's truncation side.
        pad_to_multiple_of (`int`, *optional*): Pads to a multiple of this number of tokens.
        packing (`bool`, *optional*, defaults to `False`):
            Puts short rows of a batch one behind the other, into rows no longer than its longest (first-fit
            decreasing). The loss is that of the rows apart. For training of models that write, on rows of one
            conversation each.

    Returns (when called):
        `dict` with `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (-100 where nothing is to be learnt),
        with a bidirectional prefix `token_type_ids`, with several conversations or rows in a row `segment_ids`, all of
        shape `(batch, seq_len)` and padded on the right; `targets_per_row`, the largest number of labels in a row, by
        which the model makes no other logits in training; `pixel_values` of shape
        `(num_images, channels, height, width)`, or of `image_features` `mm_encoder_outputs`; and `images_per_row`
        where all rows have the same number of pictures.

    Raises:
        ValueError: a row is broken. The message names it (by its `row` column, or its place in the batch).
    """

    processor: DuoStreamProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    packing: bool = False
    can_pack: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is {self.max_length}; expected 1 or more")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        names = self.names(rows)
        owned = self.conversations(rows, names)
        marker = self.processor.answer_marker() if self.processor.bidirectional_prefix else None
        input_ids, labels = self.encode_chats(rows, owned, names, marker)
        images = [self.load_images(row, name) for row, name in zip(rows, names, strict=True)]
        types: list[list[int]] = [[] for _ in owned]
        for n, (i, conversation) in enumerate(owned):
            frame, is_text = None, is_plain_text(conversation)
            if is_text:
                input_ids[n], frame = encode_text(self.processor, conversation["text"], len(images[i]), names[i])
                image_token_id = self.processor.image_token_id
                labels[n] = [IGNORE_INDEX if token == image_token_id else token for token in input_ids[n]]
            num_markers = input_ids[n].count(self.processor.image_token_id)
            if num_markers != len(images[i]):
                raise ValueError(f"{names[i]} has {num_markers} picture markers but {len(images[i])} pictures")
            if not input_ids[n]:
                raise ValueError(f"{names[i]} has no text and no picture")
            # Of the whole row: what is cut may hold the marker. A text without a chat has none, whatever it says
            if marker is None or is_text:
                types[n] = [1] * len(input_ids[n])
            else:
                types[n] = self.processor.prefix_types(input_ids[n], marker)
            input_ids[n], labels[n], types[n] = self.expand_and_cut(input_ids[n], labels[n], types[n], names[i], frame)

        segment_ids = None
        if len(owned) > len(rows):
            owners = [i for i, _ in owned]
            groups = [[n for n, owner in enumerate(owners) if owner == i] for i in range(len(rows))]
            shared = []
            for group, name in zip(groups, names, strict=True):
                own_ids, own_labels, own_types = ([each[n] for n in group] for each in (input_ids, labels, types))
                try:
                    shared.append(shared_length(own_ids, own_labels, own_types, self.processor.image_token_id))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            input_ids, labels, types, segment_ids = join(input_ids, labels, types, groups, shared)
        groups = [[i] for i in range(len(rows))]
        packed = first_fit_decreasing([len(row) for row in input_ids]) if self.packing else groups
        if len(packed) < len(rows):
            groups = packed
            input_ids, labels, types, segment_ids = join(input_ids, labels, types, groups, [0] * len(groups))
        batch = self.pad(input_ids, labels, segment_ids, None if marker is None else types)
        # The first column's, too, which is predicted where PEFT puts virtual tokens in front
        batch["targets_per_row"] = targets_per_row(batch["labels"])
        if any(images):
            order = [i for group in groups for i in group]
            batch |= self.model_inputs([images[i] for i in order], [names[i] for i in order])
            counts = {sum(len(images[i]) for i in group) for group in groups}
            if len(counts) == 1:
                batch["images_per_row"] = counts.pop()
        return batch

    def conversations(self, rows: list[dict[str, Any]], names: list[str]) -> list[tuple[int, dict[str, Any]]]:
        """The conversations of all rows, of which one may hold several, each with the number of its row."""
        if self.packing and not self.can_pack:
            raise ValueError(f"`packing` is for models that write: {type(self).__name__} takes rows as they are")
        owned: list[tuple[int, dict[str, Any]]] = []
        for i, row in enumerate(rows):
            try:
                several = conversations_of(row)
            except ValueError as error:
                raise ValueError(f"{names[i]}: {error}") from error
            if self.packing and len(several) > 1:
                raise ValueError(
                    f"{names[i]} has several `conversations`, which go without `packing`: expected one a row"
                )
            owned += [(i, each) for each in several]
        return owned

    def encode_chats(
        self,
        rows: list[dict[str, Any]],
        owned: list[tuple[int, dict[str, Any]]],
        names: list[str],
        marker: tuple[str, str] | None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of conversations, a marker for each picture, and their labels; of plain texts both are empty."""
        pieces: list[tuple[int, str, bool]] = []
        for n, (i, conversation) in enumerate(owned):
            if is_plain_text(conversation):
                continue
            try:
                pieces += [
                    (n, text, is_answer) for text, is_answer in render(self.processor, {**rows[i], **conversation})
                ]
            except Exception as error:
                raise ValueError(f"{names[i]}: {error}") from error
        input_ids: list[list[int]] = [[] for _ in owned]
        labels: list[list[int]] = [[] for _ in owned]
        continues = [k > 0 and pieces[k - 1][0] == n for k, (n, _, _) in enumerate(pieces)]
        encoded = tokenize(self.processor.tokenizer, [text for _, text, _ in pieces], continues) if pieces else []
        for (n, _, is_answer), ids in zip(pieces, encoded, strict=True):
            input_ids[n] += ids
            labels[n] += ids if is_answer else [IGNORE_INDEX] * len(ids)
        if marker is not None:
            written = [""] * len(owned)
            for n, text, _ in pieces:
                written[n] += text
            for (i, _), ids, text in zip(owned, input_ids, written, strict=True):
                # What is rendered has an answer
                self.processor.check_marker(ids, text, marker, names[i], at_least=1 if text else 0)
        return input_ids, labels

    def names(self, rows: list[dict[str, Any]]) -> list[str]:
        """What errors call the rows. Raises `ValueError` where there is none, or one has no columns."""
        if not rows:
            raise ValueError(f"expected rows to make a batch of, not {rows!r:.100}")
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"Row {i} of the batch: expected columns, not {row!r:.100}")
        return [f"Row {row.get('row', f'{i} of the batch')}" for i, row in enumerate(rows)]

    def load_images(self, row: dict[str, Any], name: str) -> list[Any]:
        """The row's pictures, or their states from the vision stream, if it has `image_features`."""
        images, features = row.get("images"), row.get("image_features")
        if features is None:
            if images is None and row.get("image") is not None:
                raise ValueError(
                    f"{name} has a picture in `image`: expected a list of pictures in `images`, and for each "
                    '`{"type": "image"}` in the messages'
                )
            return load_pictures([] if images is None else images, name)
        length = self.processor.image_seq_length
        try:
            states = [torch.as_tensor(each) for each in features]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: `image_features` are no numbers: {error}") from error
        for each in states:
            if each.ndim != 2 or each.shape[0] != length or not each.is_floating_point():
                raise ValueError(
                    f"{name}: `image_features` of a picture are of shape {tuple(each.shape)} and {each.dtype}; "
                    f"expected fractions of shape ({length}, image_hidden_size)"
                )
        return states

    def model_inputs(self, images: list[list[Any]], names: list[str]) -> dict[str, Any]:
        """What the model reads of the pictures of all rows, some of which may have none, or of their states."""
        first: dict[str, str] = {}
        for row, name in zip(images, names, strict=True):
            for image in row:
                is_states = isinstance(image, torch.Tensor)
                kind = f"states of width {image.shape[1]} in {image.dtype}" if is_states else "a picture"
                first.setdefault(kind, name)
        if len(first) > 1:
            (kind, name), (other_kind, other), *_ = first.items()
            raise ValueError(f"{other} has {other_kind}, but {name} has {kind}: expected the same in all of a batch")
        flat = [image for row in images for image in row]
        if "a picture" in first:
            return {"pixel_values": self.processor.image_processor(flat, return_tensors="pt")["pixel_values"]}
        return {"mm_encoder_outputs": {"image": ImageStates(last_hidden_state=torch.stack(flat))}}

    def expand_and_cut(
        self,
        input_ids: list[int],
        labels: list[int],
        types: list[int],
        name: str,
        special_tokens_mask: list[int] | None = None,
    ) -> tuple[list[int], list[int], list[int]]:
        """
        Markers become as many placeholders as a picture has tokens; then text is cut to `max_length`, but for what
        `special_tokens_mask` marks.
        """
        processor = self.processor
        repeats = [processor.image_seq_length if token == processor.image_token_id else 1 for token in input_ids]

        def expanded(row: list[int]) -> list[int]:
            return [each for each, n in zip(row, repeats, strict=True) for _ in range(n)]

        input_ids, labels, types = expanded(input_ids), expanded(labels), expanded(types)
        if self.max_length is not None and len(input_ids) > self.max_length:
            frame = None if special_tokens_mask is None else expanded(special_tokens_mask)
            kept = processor.truncated_positions(input_ids, self.max_length, name, frame)
            num_labels = sum(label != IGNORE_INDEX for label in labels)
            input_ids, labels, types = ([each[i] for i in kept] for each in (input_ids, labels, types))
            num_lost = num_labels - sum(label != IGNORE_INDEX for label in labels)
            logger.warning(
                f"{name} was cut to `max_length={self.max_length}` tokens; {num_lost} tokens of answers are lost"
            )
        self.check_length(sum(token != processor.image_token_id for token in input_ids), name)
        return input_ids, self.without_image_predictions(input_ids, labels), types

    def check_length(self, num_text_tokens: int, name: str) -> None:
        """Raises `ValueError` if a row has more text than the tokenizer says, where there is no `max_length`."""
        limit = self.processor.tokenizer.model_max_length
        if self.max_length is None and num_text_tokens > limit:
            raise ValueError(
                f"{name} has {num_text_tokens} tokens of text, more than the {limit} of the tokenizer's "
                "`model_max_length`: `max_length` cuts such rows"
            )

    def without_image_predictions(self, input_ids: list[int], labels: list[int]) -> list[int]:
        """Leaves out what an image token would predict, which is not meant."""
        follows_image = [False, *(token == self.processor.image_token_id for token in input_ids)]
        return [IGNORE_INDEX if follows else label for follows, label in zip(follows_image, labels, strict=False)]

    def pad(
        self,
        input_ids: list[list[int]],
        labels: list[list[int]],
        segment_ids: list[list[int]] | None = None,
        token_type_ids: list[list[int]] | None = None,
    ) -> dict[str, Any]:
        processor, multiple = self.processor, self.pad_to_multiple_of or 1
        length = -(-max(map(len, input_ids)) // multiple) * multiple

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])  # (batch, seq_len)

        pad_token_id = processor.tokenizer.pad_token_id
        batch = {
            "input_ids": padded(input_ids, 0 if pad_token_id is None else pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in input_ids], 0),
            "mm_token_type_ids": padded(processor.create_mm_token_type_ids(input_ids), 0),
            "labels": padded(labels, IGNORE_INDEX),
        }
        if segment_ids is not None:
            # A pad sees the last sequence: of one that saw nothing a mask's row would be empty
            full = [row + row[-1:] * (length - len(row)) for row in segment_ids]
            batch["segment_ids"] = torch.tensor(full)  # (batch, seq_len)
        if token_type_ids is not None:
            batch["token_type_ids"] = padded(token_type_ids, 1)
        return batch
