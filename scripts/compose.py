"""
Writes a checkpoint made of a language model and a vision model.

Example:

    duostream compose --text HuggingFaceTB/SmolLM2-135M --vision google/siglip-base-patch16-224 \\
        --num_fusion_layers 8 --output_dir runs/composed
"""

import json
from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoTokenizer,
    set_seed,
)

from .. import DuoStreamPreTrainedModel, DuoStreamProcessor
from .arguments import check_at_least_one, check_dtype, json_mapping, parse
from .backbones import check_answers_end, load_vision
from .checkpoints import warn_of_unknown_tokens
from .tasks import task_of


@dataclass
class ComposeArguments:
    """Which backbones, and where to write the checkpoint."""

    text: str = field(metadata={"help": "Local folder or Hub id of a language model, or of a text encoder."})
    vision: str = field(metadata={"help": "Local folder or Hub id of a vision model."})
    output_dir: str = field(metadata={"help": "Folder to write model and processor to."})
    num_fusion_layers: int | None = field(
        default=None, metadata={"help": "How many upper layers of the language model pictures go through."}
    )
    fusion_config: str | None = field(
        default=None, metadata={"help": "Local folder or Hub id of a config for a new fusion stack instead."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels to which whole pictures are resized, if not as the vision model has them."},
    )
    spatial_merge_size: int = field(
        default=1, metadata={"help": "A square of so many by so many tokens of the vision model becomes one."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Other fields of its configuration, as JSON: {"num_image_update_layers": 2}.'},
    )
    task: str = field(
        default="chat",
        metadata={"help": "What it is for. A text encoder keeps reading both ways, unless the model is to write."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "New weights everywhere: beside it shows what pretraining bought."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights, as bfloat16: by default, the language model's."}
    )
    seed: int = field(default=42, metadata={"help": "Random seed of the new weights."})
    json: bool = field(default=False, metadata={"help": "Print what was made as JSON."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "image_size")
        if self.dtype is not None:
            check_dtype(self.dtype)


def compose(args: ComposeArguments) -> tuple[DuoStreamPreTrainedModel, DuoStreamProcessor]:
    """
    The model and its processor.

    Raises:
        ValueError: The parts can't work together, there is no such task, or a field is told twice.
    """
    overrides = json_mapping(args, "config_overrides")
    model_class = task_of(args.task).model_class
    # Answers are written behind prompts. Of a tokenizer is saved what it is made with
    side = {"padding_side": "left"} if model_class.can_generate() else {}
    tokenizer = AutoTokenizer.from_pretrained(args.text, **side)
    image_processor, _, image_size = load_vision(args.vision, args.image_size)
    processor = DuoStreamProcessor(image_processor, tokenizer)
    if model_class.can_generate():
        check_answers_end(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {
        "num_fusion_layers": args.num_fusion_layers,
        "fusion_config": None if args.fusion_config is None else AutoConfig.from_pretrained(args.fusion_config),
        "image_size": image_size,
        "spatial_merge_size": args.spatial_merge_size,
        "image_token_id": processor.image_token_id,
        "dtype": args.dtype,
    }
    if twice := sorted({"text", "vision", *options} & set(overrides)):
        raise ValueError(f"`config_overrides` has {twice}, which options of their own tell")
    model = model_class.from_backbones(args.text, args.vision, **options, **overrides)
    if model.can_generate() and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id  # a text encoder ends nothing
    if args.from_scratch:
        model.config.base_models = None
        generation_config = model.generation_config
        model = model_class(model.config).to(model.dtype)
        model.generation_config = generation_config
    warn_of_unknown_tokens(tokenizer, model.config)
    processor.image_seq_length = model.config.image_seq_length
    return model, processor


OPTIONS = (ComposeArguments,)


def main(args: list[str] | None = None) -> None:
    (compose_args,) = parse(*OPTIONS, args=args, doc=__doc__)
    set_seed(compose_args.seed)
    model, processor = compose(compose_args)
    model.save_pretrained(compose_args.output_dir)
    processor.save_pretrained(compose_args.output_dir)
    config = model.config
    made = {
        "output_dir": compose_args.output_dir,
        "num_parameters": model.num_parameters(),
        "num_text_layers": config.text_config.num_hidden_layers,
        "num_fusion_layers": config.fusion_stack_config.num_hidden_layers,
        "num_image_update_layers": config.fusion_stack_config.num_hidden_layers - config.num_image_reading_layers,
        "image_seq_length": config.image_seq_length,
    }
    if compose_args.json:
        print(json.dumps(made))
    else:
        print(
            "\n".join(
                f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}" for name, value in made.items()
            )
        )


if __name__ == "__main__":
    main()
