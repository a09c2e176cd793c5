"""Options that the scripts share, on the command line or in a YAML or JSON file."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments


@dataclass
class DataArguments:
    """Where rows come from, and which columns hold what."""

    dataset: str = field(
        default="scenes",
        metadata={
            "help": "`scenes` (drawn here), a Hub id, a folder of pictures with a metadata file (imagefolder), or a "
            "file or folder of JSONL or Parquet."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices like `train[:90%%]` work."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed, without a local copy."})
    image_column: str = field(
        default="image", metadata={"help": 'Column with a picture, or a list of them; "" reads text only.'}
    )
    prompt: str = field(
        default="Describe the picture.", metadata={"help": "What the user says, where no column does."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column with what the user says: a question."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column with the answer or caption; from a list, each makes a row of its own."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Cut longer rows to this number of tokens."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    blank_images: bool = field(
        default=False, metadata={"help": "Replace every picture by a gray one: what a model says without seeing."}
    )


@dataclass
class DuoStreamTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults that rows with pictures need."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Checkpoints and logs are written here."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the collator makes the model's inputs out of raw columns."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parts not to train: any of text, vision, projector, fusion."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the newest checkpoint in `output_dir`, if there is one."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator needs `images` and `messages`")


class OptionsFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the description as it is written."""


def parse(*classes: type, args: Sequence[str] | None = None, doc: str | None = None) -> Any:
    """
    Parses options into one object for each of `classes`.

    A YAML or JSON file may come first; what follows it on the command line overrides it.

    Args:
        classes (`type`): Dataclasses of options.
        args (`Sequence[str]`, *optional*): Defaults to the command line.
        doc (`str`, *optional*): What `--help` says before the options.

    Raises:
        ValueError: The file is no mapping.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0].endswith((".yaml", ".yml", ".json")):
        path = Path(args.pop(0))
        options = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        if not isinstance(options, dict):
            raise ValueError(f"{path} holds a {type(options).__name__}; expected a mapping of options to values")
        args = [text for name, value in options.items() for text in _as_option(name, value)] + args
    parser = HfArgumentParser(classes, description=doc, formatter_class=OptionsFormatter)
    *parsed, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def _as_option(name: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []  # the option's own default
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # With "=", as a value may begin with a dash
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
