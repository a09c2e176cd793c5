"""
Answers about pictures, or about text alone.

Example:

    duostream generate --checkpoint runs/finetuned --image scene.png --prompt "What color is the square?"
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

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


def answer(
    model: PreTrainedModel, processor: DuoStreamProcessor, conversations: Sequence[list[dict]], **kwargs: Any
) -> list[str]:
    """
    What the assistant says next in each of `conversations`, whose picture parts carry their picture
    (`{"type": "image", "image": ...}`). `kwargs` go to `generate`; greedy by default.
    """
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
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
    (text,) = answer(model, processor, [[{"role": "user", "content": content}]], **options)
    record = {"prompt": generate_args.prompt, "images": paths, "answer": text}
    print(json.dumps(record, ensure_ascii=False) if generate_args.json else text)


if __name__ == "__main__":
    main()
