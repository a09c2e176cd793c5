"""
Trains a model from scratch: a preset's three transformers, and a tokenizer if none is given.

Example:

    duostream-pretrain --preset tiny --dataset scenes --output_dir runs/pretrained --max_steps 300
"""

from dataclasses import dataclass, field
from itertools import islice

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import DuoStreamConfig, DuoStreamForConditionalGeneration, DuoStreamProcessor, train_tokenizer
from .arguments import DataArguments, DuoStreamTrainingArguments, parse
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
    bidirectional_prefix: bool = field(
        default=False, metadata={"help": "Read what comes before the first answer both ways (prefix-LM)."}
    )


def new_model(args: PretrainArguments, rows: Rows) -> tuple[DuoStreamForConditionalGeneration, DuoStreamProcessor]:
    """A preset's model with random weights, and its processor."""
    tokenizer: PreTrainedTokenizerBase
    if args.tokenizer is None:
        tokenizer = train_tokenizer(islice(texts_of(rows), args.tokenizer_rows), args.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    image_size = DuoStreamConfig.from_preset(args.preset).vision_config.image_size
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer,
        bidirectional_prefix=args.bidirectional_prefix,
    )
    config = DuoStreamConfig.from_preset(
        args.preset, vocab_size=len(tokenizer), image_token_id=processor.image_token_id
    )
    processor.image_seq_length = config.image_seq_length
    return DuoStreamForConditionalGeneration(config), processor


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
    train(model, processor, training_args, rows, eval_rows, data_args.max_length)


if __name__ == "__main__":
    main()
