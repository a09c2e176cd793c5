"""
Measures each thing beside what it is compared with, in one process. The first argument says what (default: overhead):

overhead    the model's forward over its three backbones run by hand on the same tokens
quality     DuoStream and a model of `transformers` as large, trained on the same rows for the same minutes

Example:

    duostream-benchmark overhead --batch_size 8 --output runs/benchmark.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from .. import DuoStreamConfig, DuoStreamModel
from ..configuration.image_tokens_duostream import image_token_shape
from ..modeling.stream_layout_duostream import block_sequence_ids
from . import quality
from .arguments import parse


@dataclass
class OverheadArguments:
    """Which model, on how much."""

    preset: str = field(default="base", metadata={"help": "`tiny` or `base` (224 px)."})
    batch_size: int = field(default=8, metadata={"help": "Rows, with one picture each."})
    text_len: int = field(default=64, metadata={"help": "Text tokens a row."})
    repeats: int = field(default=15, metadata={"help": "How often each side is run."})
    output: str = field(default="runs/benchmark.json", metadata={"help": "File the figures are written to."})
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """
    Runs two functions in turn (A B B A ...), so that both meet the machine in the same moods.

    Returns:
        Median seconds of each, and the median and quartiles of the ratio of neighbouring runs, ours to theirs.
    """
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(repeats + 1):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, function in pair if i % 2 else reversed(pair):
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    # The first round warms up
    ratios = [a / b for a, b in zip(seconds["ours"][1:], seconds["theirs"][1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds_ours": statistics.median(seconds["ours"][1:]),
        "seconds_theirs": statistics.median(seconds["theirs"][1:]),
        "ratio_median": middle,
        "ratio_quartile_1": low,
        "ratio_quartile_3": high,
    }


def measure_overhead(args: OverheadArguments) -> dict[str, float]:
    """
    `DuoStreamModel.forward` over its three backbones run by hand: the text stream on the text, the vision stream on
    the pictures, the fusion stack on states of the joined length, with a mask that is ready. What is over is the
    projector, dealing out and joining the tokens, and making the mask.
    """
    torch.manual_seed(args.seed)
    config = DuoStreamConfig.from_preset(args.preset)
    model = DuoStreamModel(config).eval()
    image_seq_length, _ = image_token_shape(config.vision_config)
    size = config.vision_config.image_size
    seq_len = image_seq_length + args.text_len
    text = torch.randint(10, config.text_config.vocab_size, (args.batch_size, args.text_len))
    pictures = torch.full((args.batch_size, image_seq_length), config.image_token_id)
    input_ids = torch.cat([pictures, text], dim=1)  # (batch, seq_len)
    pixel_values = torch.randn(args.batch_size, 3, size, size)
    states = torch.randn(args.batch_size, seq_len, config.fusion_stack_config.hidden_size)
    mask = create_masks_for_generate(
        config=config.fusion_stack_config,
        inputs_embeds=states,
        attention_mask=None,
        past_key_values=None,
        block_sequence_ids=block_sequence_ids(input_ids == config.image_token_id, image_seq_length),
    )

    @torch.no_grad()
    def ours() -> None:
        model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False, images_per_row=1)

    @torch.no_grad()
    def by_hand() -> None:
        model.text_model(input_ids=text, use_cache=False)
        model.vision_model(pixel_values=pixel_values)
        model.fusion_model(inputs_embeds=states, attention_mask=mask, use_cache=False)

    return compare(ours, by_hand, args.repeats)


def overhead(args: list[str]) -> None:
    (overhead_args,) = parse(OverheadArguments, args=args, doc=__doc__)
    figures = measure_overhead(overhead_args)
    result = {"arguments": asdict(overhead_args), "threads": torch.get_num_threads(), **figures}
    Path(overhead_args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(overhead_args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


PARTS: dict[str, Callable[[list[str]], None]] = {"overhead": overhead, "quality": quality.main}


def main(args: list[str] | None = None) -> None:
    part, options = "overhead", sys.argv[1:] if args is None else args
    if options and options[0] in PARTS:
        part, *options = options
    PARTS[part](options)


if __name__ == "__main__":
    main()
