"""
Measures each thing beside what it is compared with, in one process. The first argument says what:

prefill, decode, memory, training    DuoStream beside LLaVA, PaliGemma and SmolVLM
overhead                             the model's forward over its three backbones run by hand on the same tokens
input                                the processor beside stock ones; how much of training waits for batches
padding                              batches of random rows, of rows of like length, and of packed rows
speed                                prefill, decode, memory, training and overhead, with the options that all have
quality                              DuoStream and a model of `transformers` as large, trained for the same minutes

Each has options of its own (`duostream benchmark decode --help`), and sides that run in turn.

Example:

    duostream benchmark overhead --batch_sizes 8 --image_tokens 576
"""

import sys
from collections.abc import Callable
from functools import partial

from . import input_speed, padding, quality, speed

PARTS: dict[str, Callable[[list[str]], None]] = {
    **{part: partial(speed.main, part) for part in speed.PARTS},
    "input": input_speed.main,
    "padding": padding.main,
    "speed": speed.all_parts,
    "quality": quality.main,
}


def main(args: list[str] | None = None) -> None:
    part, *options = (sys.argv[1:] if args is None else args) or ["--help"]
    if part in ("-h", "--help"):
        print((__doc__ or "").strip())
        sys.exit(0)
    if part not in PARTS:
        print(f"There is no benchmark {part!r}; there are {', '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    PARTS[part](options)


if __name__ == "__main__":
    main()
