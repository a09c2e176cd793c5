"""
Fine-tunes a checkpoint on conversations with pictures, captions, or questions with answers.

Example:

    duostream-finetune --checkpoint runs/pretrained --dataset path/to/photographs --answer_column captions \\
        --output_dir runs/finetuned --num_train_epochs 3
"""

from dataclasses import dataclass, field

from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from .arguments import DataArguments, DuoStreamTrainingArguments, parse
from .data import load_rows
from .training import train


@dataclass
class FinetuneArguments:
    """Where to start from."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})


def main(args: list[str] | None = None) -> None:
    finetune_args, data_args, training_args = parse(
        FinetuneArguments, DataArguments, DuoStreamTrainingArguments, args=args, doc=__doc__
    )
    set_seed(training_args.seed)
    rows = load_rows(data_args, data_args.train_split, data_args.max_train_rows)
    eval_rows = load_rows(data_args, data_args.eval_split, data_args.max_eval_rows)
    model = AutoModelForImageTextToText.from_pretrained(finetune_args.checkpoint)
    processor = AutoProcessor.from_pretrained(finetune_args.checkpoint)
    model.freeze(*training_args.freeze)
    train(model, processor, training_args, rows, eval_rows, data_args.max_length)


if __name__ == "__main__":
    main()
