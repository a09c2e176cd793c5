"""Options that the scripts share, on the command line or in a YAML or JSON file."""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from functools import cached_property
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..modeling.modeling_duostream import STREAMS

# Of `TrainingArguments`, those that short help shows
EVERYDAY = ("output_dir", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "seed")
# Of ours, those that it only names
RARE = (
    *("weight", "dataset_config", "streaming", "image_dir", "label_column", "max_answers", "max_length"),
    *("max_column_chars", "max_train_rows", "max_eval_rows", "blank_images", "tokenizer_rows", "whole_word_mask"),
    *("cache_vision", "packing", "images_last", "chars_per_picture"),
)
MAX_WIDTH = 119  # columns of help
# Metrics of which the lowest is best. Unless told, `Trainer` takes the highest for that, but of names ending in `loss`
LOWER_IS_BETTER = ("mse", "median_rank")


class OptionsLoader(yaml.SafeLoader):
    """Reads YAML as of version 1.2: `1e-5` is a number, and of words only `true` and `false` are no text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in each if tag != "tag:yaml.org,2002:bool"]
        for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


OptionsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
OptionsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def check_at_least_one(args: Any, *names: str) -> None:
    """Raises `ValueError` if one of the numbers is given and below 1."""
    for name in names:
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"`{name}` is {number}; expected at least 1")


def check_unused(args: Any, names: Sequence[str], reason: str) -> None:
    """Raises `ValueError` if one of the options is given, which for this `reason` would do nothing."""
    known = {each.name: each for each in fields(args)}
    for name in names:
        made = known[name].default_factory
        if getattr(args, name) != (known[name].default if made is MISSING else made()):
            raise ValueError(f"`{name}` would do nothing: {reason}")


def check_dtype(dtype: str) -> None:
    """Raises `ValueError` if this is no name of a type of numbers."""
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` is {dtype!r}; expected one of torch's, as float32, bfloat16 or float16")


def json_mapping(args: Any, name: str) -> dict[str, Any]:
    """
    What an option holds as JSON.

    Raises:
        ValueError: It is no JSON, or no mapping.
    """
    text = getattr(args, name)
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {text!r}; expected a mapping in JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"`{name}` is {text!r}; expected a mapping in JSON")
    return mapping


def merged(config: dict[str, Any], overrides: dict[str, Any], within: str = "") -> dict[str, Any]:
    """
    The fields of a configuration with others in their place. A mapping changes fields of the one that is there, unless
    it names another `model_type`.

    Raises:
        ValueError: The configuration has no such field.
    """
    if unknown := sorted(set(overrides) - set(config)):
        raise ValueError(
            f"`config_overrides` has {unknown}, which are no fields of the configuration{within and f' `{within}`'}"
        )
    changed = dict(config)
    for name, value in overrides.items():
        is_part = isinstance(value, dict) and isinstance(config[name], dict) and "model_type" in config[name]
        is_same = is_part and value.get("model_type") in (None, config[name]["model_type"])
        changed[name] = merged(config[name], value, name) if is_same else value
    return changed


@dataclass
class DataArguments:
    """What is to be done, where rows come from, and which columns hold what."""

    task: str = field(
        default="chat",
        metadata={
            "help": "caption, vqa, translation, summarization or chat (generated); classification; retrieval; masked. "
            "It gives prompt and columns where none are named, and the metrics."
        },
    )
    dataset: str = field(
        default="scenes",
        metadata={
            "help": "`scenes` (drawn here), a Hub id, a folder of pictures with a metadata file (imagefolder), or a "
            "file or folder of JSONL, Parquet, Arrow or WebDataset's tar files."
        },
    )
    mixture: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More data sets to mix in: YAML or JSON files of these same options, with `weight`. Generated "
            "tasks only."
        },
    )
    weight: float = field(default=1.0, metadata={"help": "How often rows of this data set are drawn in a mixture."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices like `train[:90%%]` work."})
    eval_split: str = field(default="validation", metadata={"help": 'Split to evaluate on; "" for none.'})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed, without a local copy."})
    image_column: str = field(
        default="image", metadata={"help": 'Column with a picture, or a list of them; "" reads text only.'}
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that paths in the image column start from, where they are bare paths."}
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the user says, or the text to classify; `{name}` stands for the row's column `name`. By "
            'default the task\'s: "Describe the picture." for most.'
        },
    )
    images_last: bool = field(
        default=False,
        metadata={
            "help": "Put pictures behind the words of a prompt, not in front: words then have the same positions with "
            "and without a picture."
        },
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column with what the user says: a question."})
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the answer, caption or text. Of a list, each makes a row of its own in training; in "
            "evaluation all are references."
        },
    )
    label_column: str = field(
        default="label",
        metadata={"help": "Column with the class: a name, a number, or a list of answers, all of them right."},
    )
    max_answers: int = field(default=1000, metadata={"help": "With lists of answers: the most frequent are classes."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Cut longer rows to this number of tokens. No prompt to answer is ever cut."},
    )
    max_column_chars: int | None = field(
        default=None,
        metadata={
            "help": "Cut what fills a `{name}` of the prompt to so many characters, in training and evaluation."
        },
    )
    chars_per_picture: int = field(
        default=200,
        metadata={
            "help": "What a picture counts for in a row's length, in characters, by which `--train_sampling_strategy "
            "group_by_length` goes: by default so much that rows with pictures come together. Of few tokens, about "
            "four for each have all kinds of rows in a batch."
        },
    )
    conversations_per_row: int = field(
        default=1,
        metadata={
            "help": "Train on up to so many captions of the same picture, or questions about it, in one row: the "
            "picture is read once for all of them, and each is learnt as in a row of its own."
        },
    )
    max_train_rows: int | None = field(
        default=None,
        metadata={
            "help": "Use only the first rows; of a stream that several ranks or workers read, the first that each "
            "of them reads."
        },
    )
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    on_bad_rows: str = field(
        default="raise",
        metadata={
            "help": "`raise` stops training at the first row that can't be read; `skip` leaves such rows out, and "
            "writes each with its reason to `bad_rows.jsonl` in `output_dir`."
        },
    )
    blank_images: bool = field(
        default=False, metadata={"help": "Replace every picture by a gray one: what a model says without seeing."}
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_length", "max_column_chars", "max_train_rows", "max_eval_rows", "max_answers")

    @cached_property
    def mixture_parts(self) -> list["DataArguments"]:
        """What the files of `mixture` say, each read once: it may be changed for another run while this one lasts."""
        return [parse_file(DataArguments, path) for path in self.mixture]


@dataclass
class DuoStreamTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults that rows with pictures need."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Checkpoints and logs are written here."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the collator makes the model's inputs out of raw columns."}
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts not to train: any of text, vision, projector, fusion; '' for none."},
    )
    cache_vision: bool = field(
        default=False,
        metadata={
            "help": "Read each picture once through a vision stream that is frozen (`--freeze vision`), and keep what "
            "it gives on disk, in the cache of `datasets`, for later epochs and runs."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put short rows of a training batch one behind the other, into rows no longer than its longest, "
            "each learnt as a row of its own: less padding. For tasks that write."
        },
    )
    learning_rates: str = field(
        default="{}",
        metadata={
            "help": 'Rates of parts that have one of their own, as JSON: {"text": 1e-5, "vision": 1e-5, "projector": '
            '1e-3, "fusion": 1e-4}. An untied head goes with `fusion`. `learning_rate` is that of all others, and all '
            "follow the one schedule."
        },
    )
    metric_rows: int = field(
        default=0, metadata={"help": "At each evaluation, measure the task on so many rows, too (0: the loss alone)."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer that is measured, in tokens."})
    resume: bool = field(
        default=False,
        metadata={
            "help": "Continue from the newest checkpoint in `output_dir`, if there is one; on a CPU, to the very "
            "weights of a run that was never interrupted."
        },
    )
    on_nan_loss: str = field(
        default="stop",
        metadata={
            "help": "`stop` at a loss that is no finite number, naming step and rows; `skip` leaves such steps out, "
            "and writes each to `bad_losses.jsonl` in `output_dir`."
        },
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better: bool | None = False
        super().__post_init__()
        check_at_least_one(self, "max_new_tokens", "gradient_accumulation_steps")
        if self.metric_rows < 0:
            raise ValueError(f"`metric_rows` is {self.metric_rows}; expected 0 or more")
        self.freeze = [name for name in self.freeze if name]
        for name, rate in json_mapping(self, "learning_rates").items():
            if name not in STREAMS or not isinstance(rate, int | float) or rate < 0:
                raise ValueError(
                    f"`learning_rates` has {name!r}: {rate!r}; expected rates of {', '.join(map(repr, STREAMS))}"
                )
            if name in self.freeze:
                raise ValueError(
                    f"`learning_rates` has {name!r}, which `freeze` keeps as it is: leave one of them out"
                )
        if self.cache_vision and "vision" not in self.freeze:
            raise ValueError("`cache_vision` keeps what a frozen vision stream gives: it goes with `--freeze vision`")
        if self.on_nan_loss not in ("stop", "skip"):
            raise ValueError(f"`on_nan_loss` is {self.on_nan_loss!r}; there are 'stop' and 'skip'")
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "`resume_from_checkpoint` is not read: `--resume true` continues from the newest checkpoint in "
                "`output_dir`"
            )
        if self.resume and self.save_only_model:
            raise ValueError("`resume` needs the optimizer's state, which `save_only_model` leaves out")
        if self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"`hub_strategy` {self.hub_strategy.value!r} uploads the optimizer's state, which is a pickle: "
                "take 'every_save' or 'end'"
            )
        if self.push_to_hub and (self.bf16_full_eval or self.fp16_full_eval):
            raise ValueError(
                "`bf16_full_eval` and `fp16_full_eval` leave the model in half precision, and so `push_to_hub` would "
                "upload it"
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator needs `images` and `messages`")


class OptionsFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the description as it is written."""


class ScreenHelp(argparse.Action):
    """Help that fits a screen: what the command does, an example, and a line for each option of ours."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        library = {each.name for each in fields(TrainingArguments)} - set(EVERYDAY)
        own = [each for each in parser._actions if each.nargs != 0 and each.dest not in library]
        rare = [f"--{each.dest}" for each in own if each.dest in RARE]
        own = [each for each in own if each.dest not in RARE]
        width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
        column = max(len(each.dest) for each in own) + 6
        print(
            f"usage: {parser.prog} [options.yaml | options.json] [options]\n\n{(parser.description or '').strip()}\n"
        )
        for action in own:
            told = (action.help or "").replace("%%", "%").split(". ")[0].rstrip(".")
            if action.required:
                told = f"(required) {told}"
            elif action.default not in (None, False, "", "{}", []):
                default = action.default if isinstance(action.default, list) else [action.default]
                told = f"[{' '.join(map(str, default))}] {told}"
            print(f"  --{action.dest}".ljust(column) + shorten(told, width - column, placeholder=" ..."))
        if rare:
            print("\n" + fill(f"Needed more rarely: {', '.join(rare)}.", width, break_on_hyphens=False))
        others = any(each.dest in library for each in parser._actions)
        print(
            f"\n--help_all says more of each{', and has the other options of `TrainingArguments`' if others else ''}."
        )
        parser.exit()


def parser_of(*classes: type, doc: str | None = None) -> HfArgumentParser:
    """A parser of the options in `classes`, whose help begins with `doc`."""
    # Of a name that is cut short, as in a file, another option may begin so, now or later
    parser = HfArgumentParser(
        classes, description=doc, formatter_class=OptionsFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action=ScreenHelp, help="Show a line for each option.")
    parser.add_argument("--help_all", action="help", help="Show all there is to say of every option.")
    return parser


def parse(*classes: type, args: Sequence[str] | None = None, doc: str | None = None) -> Any:
    """
    Parses options into one object for each of `classes`.

    A YAML or JSON file may come first; what follows it on the command line overrides it. There, an option that takes
    several values may stand once, or the command ends with exit code 2.

    Args:
        classes (`type`): Dataclasses of options.
        args (`Sequence[str]`, *optional*): Defaults to the command line.
        doc (`str`, *optional*): What `--help` says before the options.

    Raises:
        ValueError: The file is no mapping.
    """
    args = list(sys.argv[1:] if args is None else args)
    parser = parser_of(*classes, doc=doc)
    # An option's value may end so, too: `--dataset=rows.json`
    is_file = bool(args) and args[0].endswith((".yaml", ".yml", ".json")) and not args[0].startswith("-")
    from_file = _read_options(Path(args.pop(0))) if is_file else []
    names = [arg.split("=")[0] for arg in args]
    for action in parser._actions:
        # The values of the last one would count alone
        if action.nargs in ("+", "*") and sum(name in action.option_strings for name in names) > 1:
            parser.error(f"--{action.dest} is given twice; give all of its values at once: --{action.dest} A B")
    args = from_file + args
    *parsed, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def parse_file(cls: type, path: str) -> Any:
    """
    Reads one object of options from a YAML or JSON file.

    Raises:
        ValueError: The file is no mapping.
    """
    return parse(cls, args=_read_options(Path(path)))[0]


def _read_options(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    # A safe loader, with other numbers
    is_yaml = path.suffix != ".json"
    options = yaml.load(text, OptionsLoader) if is_yaml else json.loads(text)
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds a {type(options).__name__}; expected a mapping of options to values")
    if is_yaml:
        written = yaml.load(text, yaml.BaseLoader)
        options = {name: _as_written(value, written.get(name, value)) for name, value in options.items()}
    return [text for name, value in options.items() for text in _as_option(name, value)]


def _as_written(value: Any, written: Any) -> Any:
    """An option's value, or the text that stands for it where it may be one: a revision may look like a number."""
    if isinstance(value, list):
        return [_as_written(each, text) for each, text in zip(value, written, strict=True)]
    return written if isinstance(value, (int, float, date)) and not isinstance(value, bool) else value


def _as_option(name: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []  # the option's own default
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # With "=", as a value may begin with a dash
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
