"""How a question becomes what a model reads, how much room is left behind it, and what the model writes there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel
from transformers.utils import logging

from ..modeling.composition_duostream import POSITION_EMBEDDINGS
from ..modeling.stream_layout_duostream import segment_positions
from ..processing import DuoStreamProcessor

logger = logging.get_logger(__name__)


def num_positions(model: PreTrainedModel) -> int | None:
    """How many tokens of text a text stream with learned positions has places for; `None` for all others."""
    for name, table in model.named_modules():
        parts = name.split(".")
        is_table = isinstance(table, nn.Embedding) and parts[-1] in (*POSITION_EMBEDDINGS, "position_embeddings")
        if is_table and "text_model" in parts:
            # OPT counts from 2, and RoBERTa from behind its padding token's number
            unused = getattr(table, "offset", 0) + (0 if table.padding_idx is None else table.padding_idx + 1)
            own = getattr(model.get_submodule(".".join(parts[:-1])), "position_ids", None)
            if table.padding_idx is None and own is not None:
                unused += int(own[0, 0])  # Nystromformer counts from 2, too
            return table.num_embeddings - unused
    return None


class TextRoom:
    """
    How much text a model reads, and how much it can write behind that. Its positions are looked for once, so one is
    made for all batches.

    Args:
        model (`PreTrainedModel`): Of this library, or a peer. Its positions end if its text stream has learned ones.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.positions = model, num_positions(model)
        self.is_told = False

    def num_text_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """
        How many tokens of each row are text: of `input_ids` of shape `(batch, seq_len)`, no pictures or padding. Of
        several conversations in a row, which `segment_ids` number, those of the longest, as their positions count on
        from the beginning that they share.
        """
        # A peer that reads no pictures has no placeholder of them
        is_text = inputs["input_ids"] != getattr(self.model.config, "image_token_id", -1)
        if inputs.get("attention_mask") is not None:
            is_text = is_text & (inputs["attention_mask"] != 0)
        if inputs.get("segment_ids") is None:
            return is_text.sum(dim=1).tolist()
        return (segment_positions(inputs["segment_ids"], is_text) + is_text.long()).amax(dim=1).tolist()

    def check(
        self,
        inputs: Mapping[str, Any],
        names: Sequence[str],
        max_length: int | None = None,
        is_prompt: bool = False,
    ) -> None:
        """
        Looks whether the model has a position for each token of text. Beyond its last one it would fail on a CPU, and
        on a GPU so that nothing else could be done with it.

        Args:
            inputs (`Mapping`): As [`num_text_tokens`] takes them.
            names (`Sequence[str]`): Of the rows.
            max_length (`int`, *optional*): How many the rows may have whatever the model's positions are: the
                tokenizer's `model_max_length`.
            is_prompt (`bool`, *optional*, defaults to `False`): An answer follows, of a token at least.

        Raises:
            ValueError: A row is too long. It is named.
        """
        for name, number in zip(names, self.num_text_tokens(inputs), strict=True):
            if max_length is not None and number > max_length:
                raise ValueError(
                    f"{name} has {number} tokens of text, more than the {max_length} of the tokenizer's "
                    "`model_max_length`"
                )
            if self.positions is not None and number + is_prompt > self.positions:
                no_room = ", which leave no room for an answer" if is_prompt else ""
                raise ValueError(
                    f"{name} has {number} tokens of text{no_room}; the text model has positions for {self.positions}"
                )

    def behind(self, inputs: Mapping[str, Any]) -> int | None:
        """How many tokens can be written behind all of these prompts; `None` for as many as one likes."""
        return None if self.positions is None else self.positions - max(self.num_text_tokens(inputs))

    def fit(self, inputs: Mapping[str, Any], names: Sequence[str], max_new_tokens: int) -> int:
        """`max_new_tokens`, or as many as there is room for, of which the first time a warning tells."""
        room = self.behind(inputs)
        if room is None or room >= max_new_tokens:
            return max_new_tokens
        if not self.is_told:
            lengths = self.num_text_tokens(inputs)
            logger.warning(
                f"{names[lengths.index(max(lengths))]} has {max(lengths)} tokens of text, which leave room for {room} "
                f"more, not for the {max_new_tokens} of `max_new_tokens`: its answer ends there, as do those that are "
                "written beside it. Others that are cut so aren't told"
            )
            self.is_told = True
        return room


def prompt_inputs(processor: DuoStreamProcessor, conversations: Sequence[list[dict]]) -> BatchFeature:
    """What a model reads to answer conversations, as [`answer`] takes them."""
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def answer(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    conversations: Sequence[list[dict]],
    names: Sequence[str] | None = None,
    max_prompt_length: int | None = None,
    room: TextRoom | None = None,
    **kwargs: Any,
) -> list[str]:
    """
    What the assistant says next in each of `conversations`, whose picture parts carry their picture
    (`{"type": "image", "image": ...}`), and which may have `max_prompt_length` tokens of text. `kwargs` go to
    `generate`; greedy by default. Answers end where the model has no position for more, whatever `max_new_tokens` is.

    Args:
        room (`TextRoom`, *optional*): Of the model, made once by who asks it several times.

    Raises:
        ValueError: A conversation is longer than the model reads, or leaves no room for an answer. It is told by its
            name of `names`, by default its number.
    """
    inputs = prompt_inputs(processor, conversations).to(model.device)
    names = [f"Conversation {number}" for number in range(len(conversations))] if names is None else names
    room = TextRoom(model) if room is None else room
    room.check(inputs, names, max_prompt_length, is_prompt=True)
    if kwargs.get("max_new_tokens") is not None:
        kwargs["max_new_tokens"] = room.fit(inputs, names, kwargs["max_new_tokens"])
    with torch.no_grad():
        # The tokenizer is for strings to stop at, which the generation config may name, too
        sequences = model.generate(**inputs, tokenizer=processor.tokenizer, **{"do_sample": False, **kwargs})
    new_tokens = sequences[:, inputs["input_ids"].shape[1] :]  # (batch, new_tokens)
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
