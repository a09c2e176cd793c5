"""
DuoStream's commands. Each explains itself: `duostream COMMAND --help`.

Example:

    duostream finetune --checkpoint runs/pretrained --task caption --dataset path/to/photographs
"""

import sys
from argparse import ArgumentParser
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

import datasets
import shtab
import yaml

from .arguments import parser_of

COMMANDS = {
    "quickstart": "train a small model from nothing on scenes it draws, and report what it can do",
    "compose": "make a checkpoint of a language model and a vision model",
    "pretrain": "train from scratch, with one objective or several",
    "finetune": "train a checkpoint at a task",
    "evaluate": "measure a checkpoint at a task",
    "generate": "answer about pictures, or about text alone",
    "demo": "open a page to try a checkpoint",
    "serve": "serve a checkpoint as OpenAI's API",
    "push": "upload a checkpoint to the Hub",
    "benchmark": "measure speed, memory and quality beside peers",
    "completion": "print completions for a shell: bash, zsh or tcsh",
}
# What a user can set right. All else is a defect of ours, and shows where.
MISTAKES = (ValueError, OSError, ImportError, yaml.YAMLError, datasets.exceptions.DatasetsError)
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong options, 130 interrupted."


def overview() -> str:
    """What `duostream --help` shows."""
    description, example = (__doc__ or "").strip().split("\n\n", 1)
    commands = "\n".join(f"  {name:<12}{told}" for name, told in COMMANDS.items())
    return (
        f"usage: duostream COMMAND [options]\n\n{description}\n\n{commands}\n\n{example}\n\n"
        f"--debug shows where a command failed; --version says which version this is. {EXIT_CODES}"
    )


def completions(shell: str) -> str:
    """
    Completions of all commands and their options, as a script for a shell.

    Raises:
        ValueError: There are none for this shell.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"`completion` takes one of {', '.join(shtab.SUPPORTED_SHELLS)}, not {shell!r}")
    parser = ArgumentParser(prog="duostream")
    commands = parser.add_subparsers()
    for name, told in COMMANDS.items():
        options = getattr(import_module(f".{name}", __package__), "OPTIONS", ()) if name != "completion" else ()
        commands.add_parser(name, help=told, parents=[parser_of(*options)], add_help=False)
    return shtab.complete(parser, shell)


def main(args: list[str] | None = None) -> None:
    command, *options = (sys.argv[1:] if args is None else args) or ["--help"]
    # Before the command, as `TrainingArguments` has an option of this name
    is_debugging = command == "--debug" and bool(options)
    if is_debugging:
        command, *options = options
    if command in ("-h", "--help"):
        print(overview())
        return
    if command == "--version":
        print(f"duostream {version('duostream')} (transformers {version('transformers')}, torch {version('torch')})")
        return
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        print(f"duostream has no command {command!r}{f': did you mean {near[0]!r}?' if near else ''}", file=sys.stderr)
        print("duostream --help lists them", file=sys.stderr)
        sys.exit(2)
    # What parsers call the program, and what libraries record as the command
    sys.argv = [f"duostream {command}", *options]
    try:
        if command == "completion":
            if len(options) > 1:
                raise ValueError(f"`completion` takes one shell, not {' '.join(options)}")
            print(completions(*options or ["bash"]))
        else:
            import_module(f".{command}", __package__).main(options)
    except KeyboardInterrupt:
        print(f"\nduostream {command} was interrupted", file=sys.stderr)
        sys.exit(130)
    except MISTAKES as error:
        if is_debugging:
            raise
        print(f"duostream {command}: {error}", file=sys.stderr)
        print(f"`duostream --debug {command} ...` shows where", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
