"""
Answers about pictures, or about text alone.

Example:

    duostream generate --checkpoint runs/finetuned --image scene.png --prompt "What color is the square?"
"""

import json
from dataclasses import dataclass, field

from transformers import AutoModelForImageTextToText, AutoProcessor

from ..processing.data_collator_duostream import load_pictures
from .answering import answer
from .arguments import check_at_least_one, parse
from .checkpoints import check_place, load_model


@dataclass
class GenerateArguments:
    """What to answer."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})
    prompt: str = field(default="Describe the picture.", metadata={"help": "What the user says."})
    image: list[str] = field(
        default_factory=list, metadata={"help": "Paths of pictures, which go in front of the prompt."}
    )
    images_last: bool = field(
        default=False, metadata={"help": "Pictures go behind the prompt, as with `images_last` in training."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest."})
    json: bool = field(default=False, metadata={"help": "Print the answer as JSON, with what it answers."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_new_tokens", "num_beams")


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
