"""
Trains a model from scratch: a preset's three transformers, and a tokenizer if none is given.

Example:

    duostream-pretrain --preset tiny --dataset scenes --output_dir runs/pretrained --max_steps 300
"""

import json
from dataclasses import dataclass, field
from itertools import islice

from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import DuoStreamConfig, DuoStreamForConditionalGeneration, DuoStreamProcessor, train_tokenizer
from .arguments import DataArguments, DuoStreamTrainingArguments, parse
from .compose import load_vision
from .data import Rows, load_rows, texts_of
from .training import train


@dataclass
class PretrainArguments:
    """What to train from scratch."""

    preset: str = field(default="tiny", metadata={"help": "`tiny` or `base`."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Local folder or Hub id. By default one is trained on the rows' text."}
    )
    vocab_size: int = field(default=2048, metadata={"help": "Size at most of a tokenizer that is trained."})
    tokenizer_rows: int = field(default=5000, metadata={"help": "Rows whose text a tokenizer is trained on."})
    vision: str | None = field(
        default=None, metadata={"help": "Local folder or Hub id of a vision model to take instead of the preset's."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Fields that differ from the preset, as JSON: {"text_config": {"hidden_size": 256}}.'},
    )
    bidirectional_prefix: bool = field(
        default=False, metadata={"help": "Read what comes before the first answer both ways (prefix-LM)."}
    )


def new_model(args: PretrainArguments, rows: Rows) -> tuple[DuoStreamForConditionalGeneration, DuoStreamProcessor]:
    """
    A preset's model with random weights (but for a given vision model's), and its processor.

    Raises:
        ValueError: The parts don't fit together.
    """
    tokenizer: PreTrainedTokenizerBase
    if args.tokenizer is None:
        tokenizer = train_tokenizer(islice(texts_of(rows), args.tokenizer_rows), args.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    fields = json.loads(args.config_overrides)
    if args.vision is not None:
        image_processor, fields["vision_config"] = load_vision(args.vision)
    config = DuoStreamConfig.from_preset(args.preset, vocab_size=len(tokenizer), **fields)
    if args.vision is None:
        size = config.vision_config.image_size
        image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    processor = DuoStreamProcessor(
        image_processor,
        tokenizer,
        image_seq_length=config.image_seq_length,
        bidirectional_prefix=args.bidirectional_prefix,
    )
    config.image_token_id = processor.image_token_id
    model = DuoStreamForConditionalGeneration(config)
    if args.vision is not None:
        model.model.vision_model = AutoModel.from_pretrained(
            args.vision, config=config.vision_config, dtype=model.dtype
        )
    return model, processor


def main(args: list[str] | None = None) -> None:
    pretrain_args, data_args, training_args = parse(
        PretrainArguments, DataArguments, DuoStreamTrainingArguments, args=args, doc=__doc__
    )
    set_seed(training_args.seed)
    rows = load_rows(data_args, data_args.train_split, data_args.max_train_rows)
    eval_rows = None
    if training_args.eval_strategy != "no":
        eval_rows = load_rows(data_args, data_args.eval_split, data_args.max_eval_rows)
    model, processor = new_model(pretrain_args, rows)
    model.freeze(*training_args.freeze)
    train(model, processor, training_args, rows, eval_rows, data_args.max_length)


if __name__ == "__main__":
    main()
