"""From conversations with pictures to a batch for `Trainer`."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import datasets
import PIL.Image
import torch
from jinja2 import TemplateError
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START, encode_marked_chat, render_jinja_template

from .chat_template_duostream import check_contents, check_text, check_tools, default_chat_template
from .pictures_duostream import read_picture
from .processing_duostream import DuoStreamProcessor

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100


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


def is_plain_text(row: dict[str, Any]) -> bool:
    """Whether a row is a text, and no conversation that has one beside it."""
    return "text" in row and "messages" not in row and "prompt" not in row


def conversations_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said in a row: its `conversations`, which begin alike, or the row itself."""
    if "messages" in row or "prompt" in row:
        return [row]
    conversations = row.get("conversations") or [row]
    if not isinstance(conversations, list) or not all(isinstance(each, dict) for each in conversations):
        raise ValueError(f"expected a list of `conversations`, not {conversations!r:.100}")
    return conversations


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """What a row's `tools` hold, as TRL has them: a list of JSON schemas, or such a list written as JSON."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"`tools` is {tools!r:.100}, which is no JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise ValueError(f"`tools` is {tools!r:.100}; expected a list of JSON schemas")
    return tools or None


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
                input_ids[n], frame = self.encode_text(conversation["text"], len(images[i]), names[i])
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
                shared.append(self.shared_length(own_ids, own_labels, own_types, name))
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
                pieces += [(n, text, is_answer) for text, is_answer in self.render({**rows[i], **conversation})]
            except Exception as error:
                raise ValueError(f"{names[i]}: {error}") from error
        input_ids: list[list[int]] = [[] for _ in owned]
        labels: list[list[int]] = [[] for _ in owned]
        continues = [k > 0 and pieces[k - 1][0] == n for k, (n, _, _) in enumerate(pieces)]
        encoded = self.tokenize([text for _, text, _ in pieces], continues) if pieces else []
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

    def shared_length(
        self, input_ids: list[list[int]], labels: list[list[int]], types: list[list[int]], name: str
    ) -> int:
        """
        How many tokens a row's conversations have in common at their beginning.

        Raises:
            ValueError: They differ before their last picture, or within a prefix that is read both ways.
        """
        differ = (position for position, tokens in enumerate(zip(*input_ids, strict=False)) if len(set(tokens)) > 1)
        shared = next(differ, min(map(len, input_ids)))
        for row in labels:
            # Behind the beginning stands one more token, so that each first label is predicted in its own part
            first_label = next((position for position, label in enumerate(row) if label != IGNORE_INDEX), len(row))
            shared = min(shared, max(first_label - 1, 0))
        if any(self.processor.image_token_id in ids[shared:] for ids in input_ids):
            raise ValueError(f"{name}: its `conversations` differ before their last picture, which they are to share")
        if len(input_ids) > 1 and any(0 in row[shared:] for row in types):
            raise ValueError(
                f"{name}: its `conversations` ask different things, which a prefix that is read both ways can't "
                "share: use a processor with `bidirectional_prefix=False`"
            )
        return shared

    def names(self, rows: list[dict[str, Any]]) -> list[str]:
        """What errors call the rows. Raises `ValueError` where there is none, or one has no columns."""
        if not rows:
            raise ValueError(f"expected rows to make a batch of, not {rows!r:.100}")
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"Row {i} of the batch: expected columns, not {row!r:.100}")
        return [f"Row {row.get('row', f'{i} of the batch')}" for i, row in enumerate(rows)]

    def render(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        """The conversation as the chat template writes it, in pieces, with whether the piece is to be learnt."""
        if "messages" in row:
            messages, num_given = row["messages"], 0
        elif "prompt" in row and "completion" in row:
            for name in ("prompt", "completion"):
                if not isinstance(row[name], list | tuple):
                    raise ValueError(f"there are no messages in `{name}`, which is {row[name]!r:.100}")
            messages, num_given = [*row["prompt"], *row["completion"]], len(row["prompt"])
        else:
            raise ValueError(
                f"expected `messages`, or `prompt` and `completion`, or `text`; its columns are {sorted(row)} "
                "(`Trainer` takes away those that no model reads, unless `remove_unused_columns=False`)"
            )
        if not isinstance(messages, list | tuple):
            raise ValueError(f"there are no messages in {messages!r:.100}")
        # As `apply_chat_template` reads them, which takes a list for a batch
        (messages,), _ = self.processor._normalize_conversations([messages])
        # Control tokens in the messages' text are marked, and later encoded as plain text: see `apply_chat_template`
        tokenizer, template = self.processor.tokenizer, default_chat_template(self.processor.chat_template)
        tools = tools_of(row)
        check_tools(template, messages, tools)
        check_contents(template, messages)
        marked, tools, *_ = tokenizer._mark_chat_inputs(template, [messages], tools, None, {}, True, False)
        text, answers = self.render_marked(marked[0], tools)
        check_text(text, "the conversation")
        num_given_answers = sum(message["role"] == "assistant" for message in messages[:num_given])
        if num_given_answers:
            # A template may mark several pieces of a message, or none; one that takes no prompt alone, each as one
            with suppress(TemplateError):
                num_given_answers = len(self.render_marked(marked[0][:num_given], tools)[1])
        pieces, end = [], 0
        for start, stop in answers[num_given_answers:]:
            pieces += [(text[end:start], False), (text[start:stop], True)]
            end = stop
        if not pieces:
            raise ValueError("no message of the assistant to learn from")
        return [*pieces, (text[end:], False)]

    def encode_text(self, text: Any, num_images: int, name: str) -> tuple[list[int], list[int]]:
        """
        Token ids of a text without a chat behind its pictures' markers, as the library's pipelines encode it, and
        which of them the tokenizer put around it (1). Control tokens in it stay text.
        """
        check_text(text, name)
        tokenizer, image_token_id = self.processor.tokenizer, self.processor.image_token_id
        encoded = tokenizer(
            text, split_special_tokens=True, return_attention_mask=False, return_special_tokens_mask=True
        )
        ids, frame = encoded["input_ids"], encoded["special_tokens_mask"]
        # As where the processor reads pictures and text: behind [CLS] or the like
        front = tokenizer.encode(self.processor.image_token).index(image_token_id) if num_images else 0
        images = [image_token_id] * num_images
        return ids[:front] + images + ids[front:], frame[:front] + [0] * num_images + frame[front:]

    def render_marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as one text, and where in it each answer starts and stops (in characters)."""

        def render(messages: list, **kwargs: Any) -> tuple[list[str], list]:
            return render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                **kwargs,
                **self.processor.tokenizer.special_tokens_map,
            )

        template = default_chat_template(self.processor.chat_template)
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            texts, spans = render(messages, return_assistant_tokens_mask=True)
            return texts[0], spans[0]
        # A template that doesn't mark its answers: each is what it adds to the conversation before it
        text, spans = render(messages)[0][0], []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                if i == 0:  # without any message templates that read `messages[0]` write nothing
                    _, prompt = self.processor.generation_prompt()
                    before = text[: text.find(prompt)] + prompt
                else:
                    before = render(messages[:i], add_generation_prompt=True)[0][0]
                after = render(messages[: i + 1])[0][0]
                if not (after.startswith(before) and text.startswith(after)):
                    raise ValueError(
                        "the chat template rewrites earlier turns, so that answers can't be told apart: give one "
                        "answer a row, or a template with `{% generation %}`"
                    )
                spans.append((len(before), len(after)))
        return text, spans

    def tokenize(self, texts: list[str], continues: list[bool]) -> list[list[int]]:
        """Token ids of rendered pieces, in which control tokens that a user wrote are marked, and which may go on."""
        tokenizer = self.processor.tokenizer

        def encode(texts: list[str]) -> list[list[int]]:
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            marked = [i for i, text in enumerate(texts) if _CONTROL_TOKEN_START in text]
            for i in marked:
                encoded[i] = encode_marked_chat(tokenizer, texts[i])
            return encoded

        newline, x, newline_x = encode(["\n", "x", "\nx"])
        if newline_x == newline + x:
            return encode(texts)
        # SentencePiece begins a text with a space: a piece that goes on is read behind the special token that it
        # follows, or a newline, or a period, which is taken off where the tokenizer has kept it apart
        added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        fronts = ["."] if newline_x == x else ["\n", "."]
        untried = [
            [*[token for token in added if texts[i - 1].endswith(token)][:1], *fronts, ""] if goes_on else [""]
            for i, goes_on in enumerate(continues)
        ]
        encoded: list[list[int]] = [[] for _ in texts]
        left = list(range(len(texts)))
        while left:
            tried = {i: untried[i].pop(0) for i in left}
            kinds = sorted({*tried.values()} - {""})
            front_ids = {"": [], **dict(zip(kinds, encode(kinds) if kinds else [], strict=True))}
            behind = dict(zip(left, encode([front + texts[i] for i, front in tried.items()]), strict=True))
            left = []
            for i, ids in behind.items():
                front = front_ids[tried[i]]
                if ids[: len(front)] == front:
                    encoded[i] = ids[len(front) :]
                else:
                    left.append(i)
        return encoded

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
