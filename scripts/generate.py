"""
Answers about pictures, or about text alone.

Example:

    duostream generate --checkpoint runs/finetuned --image scene.png --prompt "What color is the square?"
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ..modeling.composition_duostream import POSITION_EMBEDDINGS
from ..processing import DuoStreamProcessor
from ..processing.data_collator_duostream import load_pictures
from .arguments import check_at_least_one, parse
from .checkpoints import load_model
from .places import check_place


@dataclass
class GenerateArguments:
    """What to answer."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})
    prompt: str = field(default="Describe the picture.", metadata={"help": "What the user says."})
    image: list[str] = field(default_factory=list, metadata={"help": "Paths of the pictures that go before it."})
    images_last: bool = field(default=False, metadata={"help": "They go behind it, as `images_last` in training."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest."})
    json: bool = field(default=False, metadata={"help": "Print the answer as JSON, with what it answers."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_new_tokens", "num_beams")


def num_positions(model: PreTrainedModel) -> int | None:
    """How many tokens of text a text stream with learned positions has places for; `None` for all others."""
    for name, table in model.named_modules():
        parts = name.split(".")
        is_table = isinstance(table, nn.Embedding) and parts[-1] in (*POSITION_EMBEDDINGS, "position_embeddings")
        if is_table and "text_model" in parts:
            # OPT counts from 2, and RoBERTa from behind its padding token's number
            unused = getattr(table, "offset", 0) + (0 if table.padding_idx is None else table.padding_idx + 1)
            return table.num_embeddings - unused
    return None


def check_lengths(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    max_new_tokens: int = 0,
    max_length: int | None = None,
) -> None:
    """
    Looks whether the model has a position for each token of text. Beyond its last one it would fail on a CPU, and on a
    GPU so that nothing else could be done with it.

    Args:
        inputs (`Mapping`): With `input_ids` of shape `(batch, seq_len)`, and `attention_mask` if any are padding.
        names (`Sequence[str]`): Of the rows.
        max_new_tokens (`int`, *optional*, defaults to 0): How many may follow.
        max_length (`int`, *optional*): How many the rows may have whatever the model's positions are: the tokenizer's
            `model_max_length`.

    Raises:
        ValueError: A row is too long. It is named.
    """
    positions = num_positions(model)
    for name, number in zip(names, num_text_tokens(model, inputs), strict=True):
        if max_length is not None and number > max_length:
            raise ValueError(
                f"{name} has {number} tokens of text, more than the {max_length} of the tokenizer's `model_max_length`"
            )
        if positions is not None and number + max_new_tokens > positions:
            following = f", which {max_new_tokens} may follow (`max_new_tokens`)" if max_new_tokens else ""
            raise ValueError(
                f"{name} has {number} tokens of text{following}; the text model has positions for {positions}"
            )


def num_text_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
    """How many tokens of each row are text: of `input_ids` of shape `(batch, seq_len)`, no pictures or padding."""
    # A peer that reads no pictures has no placeholder of them
    is_text = inputs["input_ids"] != getattr(model.config, "image_token_id", -1)
    if inputs.get("attention_mask") is not None:
        is_text = is_text & (inputs["attention_mask"] != 0)
    return is_text.sum(dim=1).tolist()


def answer(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    conversations: Sequence[list[dict]],
    names: Sequence[str] | None = None,
    max_prompt_length: int | None = None,
    **kwargs: Any,
) -> list[str]:
    """
    What the assistant says next in each of `conversations`, whose picture parts carry their picture
    (`{"type": "image", "image": ...}`), and which may have `max_prompt_length` tokens of text. `kwargs` go to
    `generate`; greedy by default.

    Raises:
        ValueError: A conversation is longer than the model reads. It is told by its name of `names`, by default its
            number.
    """
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    names = [f"Conversation {number}" for number in range(len(conversations))] if names is None else names
    check_lengths(model, inputs, names, kwargs.get("max_new_tokens") or 0, max_prompt_length)
    with torch.no_grad():
        sequences = model.generate(**inputs, **{"do_sample": False, **kwargs})
    new_tokens = sequences[:, inputs["input_ids"].shape[1] :]  # (batch, new_tokens)
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


OPTIONS = (GenerateArguments,)


def main(args: list[str] | None = None) -> None:
    (generate_args,) = parse(*OPTIONS, args=args, doc=__doc__)
    check_place(generate_args.checkpoint)
    paths = generate_args.image
    pictures = [
        {"type": "image", "image": each} for path in paths for each in load_pictures([path], f"`image` {path!r}")
    ]
    model = load_model(AutoModelForImageTextToText, generate_args.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(generate_args.checkpoint)
    prompt = [{"type": "text", "text": generate_args.prompt}]
    content = prompt + pictures if generate_args.images_last else pictures + prompt
    options = {name: getattr(generate_args, name) for name in ("max_new_tokens", "num_beams", "do_sample")}
    options["max_prompt_length"] = processor.tokenizer.model_max_length
    (text,) = answer(model, processor, [[{"role": "user", "content": content}]], ["The prompt"], **options)
    record = {"prompt": generate_args.prompt, "images": paths, "answer": text}
    print(json.dumps(record, ensure_ascii=False) if generate_args.json else text)


if __name__ == "__main__":
    main()
