"""
Measures speed and memory: DuoStream, whose upper layers alone read pictures, beside models of `transformers` that send
image tokens through all layers, around the same language model and vision model, with random weights.

prefill     reading a picture and a text, up to the first token
decode      the tokens behind it, one by one
memory      the keys and values that are cached, and the peak of a prefill
training    a step's time and peak memory
overhead    the model's forward over its three backbones run by hand on the same tokens

Figures are written as JSON, with a Markdown table and a plot beside it.

Example:

    duostream benchmark prefill --image_tokens 576 --batch_sizes 1 8 --peers llava --output runs/benchmark/prefill.json
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Cache,
    CompileConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.masking_utils import create_masks_for_generate

from ..modeling.kept_states_duostream import lower_half
from ..modeling.masks_duostream import block_sequence_ids
from ..processing.packing_duostream import IGNORE_INDEX
from .arguments import check_dtype, parse
from .comparison import (
    CLOCKS,
    Row,
    check_clock,
    check_repeats,
    compare,
    in_turn,
    peak_bytes,
    record_of,
    synchronize,
    timer,
    write_rows,
)
from .peers import IMAGE_TOKEN_ID, PEERS, check_preset, freeze, make_inputs, make_sides, with_features

CACHES = ("dynamic", "static")
CACHE_ROOM = 32  # for tokens that would be written behind a prompt


@dataclass
class SpeedArguments:
    """
    Which models, on how much, how often.

    Raises:
        ValueError: An option is out of range.
    """

    preset: str = field(
        default="smollm2",
        metadata={
            "help": "`smollm2`: as large as SmolLM2-135M and SigLIP-B/16; `smollm2-1.7b`, with SigLIP-SO400M, which "
            "keeps a GPU busy; or `tiny`."
        },
    )
    peers: list[str] = field(
        default_factory=lambda: list(PEERS),
        metadata={"help": "llava; paligemma, whose language model is a Gemma of that size; smolvlm."},
    )
    fusion_layers: list[int] = field(
        default_factory=lambda: [8, 4], metadata={"help": "How many of the language model's layers read pictures."}
    )
    image_tokens: list[int] = field(
        default_factory=lambda: [196, 576, 2304], metadata={"help": "Tokens of a picture: square numbers."}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "Rows, with one picture each, in front of the text."}
    )
    max_image_tokens: int = field(
        default=5000, metadata={"help": "Leave out batches with more: 8 rows of 2304 take a minute for each run."}
    )
    attn_implementations: list[str] = field(
        default_factory=lambda: ["sdpa"], metadata={"help": "sdpa, eager, ...; of all sides."}
    )
    bidirectional_images: bool = field(
        default=True, metadata={"help": "Whether our pictures are read both ways, as PaliGemma's; LLaVA's are not."}
    )
    num_image_update_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "How many of our lowest fusion layers make new states of image tokens, which those above only "
            "read: a number for each of `fusion_layers`. By default half of them, as `from_backbones` has it."
        },
    )
    text_len: int = field(default=32, metadata={"help": "Text tokens a row."})
    repeats: int = field(default=3, metadata={"help": "How often each side is run, after one run to warm up."})
    clock: str = field(
        default="wall",
        metadata={"help": "wall; or cpu, the time of this process alone, where others are in the way."},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, ..."})
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for the figures: runs/benchmark/PART.json by default."}
    )

    def __post_init__(self) -> None:
        check_preset(self.preset, self.peers, self.image_tokens)
        check_dtype(self.dtype)
        check_repeats(self.repeats)
        check_clock(self.clock)
        if len(set(self.fusion_layers)) < len(self.fusion_layers):
            # Models are told apart by it
            raise ValueError(f"`fusion_layers` are {self.fusion_layers}; expected each number once")
        if self.num_image_update_layers and len(self.num_image_update_layers) != len(self.fusion_layers):
            raise ValueError(
                f"`num_image_update_layers` holds {len(self.num_image_update_layers)} numbers; expected one for each "
                f"of `fusion_layers`, which are {len(self.fusion_layers)}"
            )

    @property
    def fusion_depths(self) -> list[tuple[int, int]]:
        """How many layers are fusion layers, and how many of those make new states of image tokens."""
        num_updating = self.num_image_update_layers or map(lower_half, self.fusion_layers)
        return list(zip(self.fusion_layers, num_updating, strict=True))


@dataclass
class PrefillArguments(SpeedArguments):
    vision: list[str] = field(
        default_factory=lambda: ["left out"],
        metadata={"help": "Whether the vision model's time, about the same on all sides, is `counted` or `left out`."},
    )
    caches: list[str] = field(
        default_factory=lambda: ["dynamic"],
        metadata={"help": "dynamic; static, where the forward is compiled, to a graph on a GPU."},
    )
    weight_layout: str = field(
        default="rows",
        metadata={
            "help": "How the matrices of all sides lie in memory: by `rows`, as in torch, or by `columns`, which "
            "some CPUs multiply with few tokens faster."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("weight_layout", [self.weight_layout], ("rows", "columns"))
        check_known("vision", self.vision, ("left out", "counted"))
        check_known("caches", self.caches, CACHES)


@dataclass
class DecodeArguments(SpeedArguments):
    image_tokens: list[int] = field(default_factory=lambda: [196, 576], metadata={"help": "As in `prefill`."})
    new_tokens: int = field(default=24, metadata={"help": "How many tokens are written."})
    caches: list[str] = field(
        default_factory=lambda: ["dynamic"], metadata={"help": "dynamic; static, where a step is compiled."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_tokens < 2:
            raise ValueError(f"`new_tokens` is {self.new_tokens}; expected 2 or more, as those behind the first count")
        check_known("caches", self.caches, CACHES)


@dataclass
class TrainingStepArguments(SpeedArguments):
    peers: list[str] = field(default_factory=lambda: ["llava"], metadata={"help": "As in `prefill`."})
    image_tokens: list[int] = field(default_factory=lambda: [576], metadata={"help": "As in `prefill`."})
    batch_sizes: list[int] = field(default_factory=lambda: [2], metadata={"help": "As in `prefill`."})
    frozen: list[str] = field(
        default_factory=lambda: ["nothing", "vision", "language"],
        metadata={"help": "nothing; vision; language, and vision: then the projector alone is trained."},
    )
    checkpointing: list[str] = field(
        default_factory=lambda: ["off", "on"], metadata={"help": "Gradient checkpointing: off, on."}
    )
    loss_chunk_sizes: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "How many labels' logits we make at a time (`config.loss_chunk_size`); 0: all at once."},
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "Compile each layer of all sides (`torch.compile`), not the whole models."}
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "What the device reaches at best, in 10^12 operations a second, to tell the share of it that a "
            "step reaches: 989 for an H100 or H200 and bfloat16, by the vendor."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_len < 2:
            raise ValueError(f"`text_len` is {self.text_len}; expected 2 or more, as the last half of it is learnt")
        check_known("frozen", self.frozen, ("nothing", "vision", "language"))
        check_known("checkpointing", self.checkpointing, ("off", "on"))


@dataclass
class OverheadArguments(SpeedArguments):
    peers: list[str] = field(default_factory=list, metadata={"help": "None: it is compared with its parts."})
    fusion_layers: list[int] = field(default_factory=lambda: [8], metadata={"help": "As in `prefill`."})
    image_tokens: list[int] = field(default_factory=lambda: [196, 576], metadata={"help": "As in `prefill`."})
    repeats: int = field(default=7, metadata={"help": "As in `prefill`."})
    num_image_update_layers: list[int] = field(
        default_factory=list, metadata={"help": "Not to be given: by hand, the fusion stack makes all states."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_image_update_layers:
            raise ValueError("`num_image_update_layers` can't be given: by hand, the fusion stack makes all states")

    @property
    def fusion_depths(self) -> list[tuple[int, int]]:
        return [(number, number) for number in self.fusion_layers]


def check_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Raises `ValueError` where an option has a value that means nothing, and would be measured as another."""
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"`{name}` has {unknown}; there are {', '.join(map(repr, known))}")


Cell = tuple[Row, dict[str, PreTrainedModel], dict[str, dict[str, Any]]]


def cells(args: SpeedArguments) -> Iterator[Cell]:
    """Each case: what it is, the models of all sides, and their inputs."""
    for attention, image_tokens in product(args.attn_implementations, args.image_tokens):
        batch_sizes = [size for size in args.batch_sizes if size * image_tokens <= args.max_image_tokens]
        if not batch_sizes:
            continue
        set_seed(args.seed)
        # First weights of billions take minutes on a CPU
        with torch.device(args.device):
            sides = make_sides(args.preset, image_tokens, args.fusion_layers, args.peers)
        for number, num_updating in args.fusion_depths:
            sides[str(number)].config.bidirectional_images = args.bidirectional_images
            sides[str(number)].config.num_image_update_layers = num_updating
        for model in sides.values():
            model.to(args.device, getattr(torch, args.dtype)).eval()
            model.set_attn_implementation(attention)
            model.generation_config.eos_token_id = None  # all write as many tokens
        for batch_size in batch_sizes:
            told = {
                "attention": attention,
                "both_ways": args.bidirectional_images,
                "image_tokens": image_tokens,
                "batch_size": batch_size,
            }
            inputs = {
                name: make_inputs(model, image_tokens, batch_size, args.text_len) for name, model in sides.items()
            }
            yield told, sides, inputs


def pairs(args: SpeedArguments) -> Iterator[tuple[str, str, Row]]:
    """Each of ours with each peer."""
    for (number, num_updating), peer in product(args.fusion_depths, args.peers):
        yield str(number), peer, {"fusion_layers": number, "image_update_layers": num_updating, "peer": peer}


@torch.no_grad()
def read(model: PreTrainedModel, inputs: dict[str, Any]) -> Cache:
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def compiled_read(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Callable[[], Cache]:
    """Reads into one static cache, which is emptied each time, by a compiled forward: on a GPU one launch."""
    seq_len = inputs["input_ids"].shape[1]
    inputs = dict(inputs)
    if "mm_token_type_ids" in inputs:
        # As our processor's users may say, so that the device need not be asked what the shapes are
        inputs["images_per_row"] = 1
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=seq_len + CACHE_ROOM)
    read(model, {**inputs, "past_key_values": cache})  # the cache makes its memory, which a graph can't
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **(options or {"mode": "reduce-overhead"}))

    @torch.no_grad()
    def run() -> Cache:
        cache.reset()
        return forward(**inputs, past_key_values=cache, logits_to_keep=1).past_key_values

    run()
    return run


def lay_out_by_columns(model: PreTrainedModel) -> None:
    """Of the layers' matrices alone: the head's, of one token, is multiplied no faster, and its rows are looked up."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = module.weight.data.t().contiguous().t()


def measure_prefill(args: PrefillArguments) -> Iterator[Row]:
    bars = {("8", 196): 2.5, ("8", 576): 3.0, ("8", 2304): 3.5, ("4", 196): 3.3, ("4", 576): 4.5, ("4", 2304): 5.5}
    for cell, sides, inputs in cells(args):
        if args.weight_layout == "columns":
            for model in sides.values():
                lay_out_by_columns(model)
        for vision, cache in product(args.vision, args.caches):
            is_counted = vision == "counted"
            given = {name: inputs[name] if is_counted else with_features(sides[name], inputs[name]) for name in sides}
            torch.compiler.reset()
            reading = {
                name: partial(read, sides[name], given[name])
                if cache == "dynamic"
                else compiled_read(sides[name], given[name])
                for name in sides
            }
            runs = {name: timer(run, args.clock) for name, run in reading.items()}
            seconds = in_turn(runs, args.repeats)
            case = {**cell, "vision": vision, "cache": cache, "weight_layout": args.weight_layout}
            for ours, peer, told in pairs(args):
                bar = None if is_counted else bars.get((ours, cell["image_tokens"]))
                yield {**case, **told, **compare(seconds, ours, peer), "at_least": bar}


class Stamps(StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self, clock: str):
        self.clock = CLOCKS[clock]
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        synchronize()
        self.seconds.append(self.clock())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def seconds_per_token(
    model: PreTrainedModel, inputs: dict[str, Any], new_tokens: int, cache: str, clock: str
) -> float:
    """The median time that `generate` takes for a token behind the first."""
    options: dict[str, Any] = {}
    if cache == "static":
        options = {"cache_implementation": "static", "compile_config": CompileConfig()}
        options["compile_config"]._compile_all_devices = True  # by itself the library compiles on accelerators alone
    stamps = Stamps(clock)
    model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([stamps]),
        **options,
    )
    return statistics.median(b - a for a, b in zip(stamps.seconds, stamps.seconds[1:], strict=False))


def measure_decode(args: DecodeArguments) -> Iterator[Row]:
    for cell, sides, inputs in cells(args):
        given = {name: with_features(sides[name], inputs[name]) for name in sides}
        for cache in args.caches:
            runs = {
                name: partial(seconds_per_token, sides[name], given[name], args.new_tokens, cache, args.clock)
                for name in sides
            }
            seconds = in_turn(runs, args.repeats)
            bar = 1.25 if (cell["image_tokens"], cell["batch_size"]) == (576, 8) else 1.0
            for ours, peer, told in pairs(args):
                figures = compare(seconds, ours, peer)
                for side in ("ours", "theirs"):
                    figures[f"tokens_per_second_{side}"] = cell["batch_size"] / figures.pop(f"seconds_{side}")
                yield {**cell, "cache": cache, **told, **figures, "at_least": bar}


def cache_bytes(cache: Cache) -> int:
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def measure_memory(args: SpeedArguments) -> Iterator[Row]:
    for cell, sides, inputs in cells(args):
        given = {name: with_features(sides[name], inputs[name]) for name in sides}
        cached = {name: cache_bytes(read(sides[name], given[name])) for name in sides}
        peaks = {name: peak_bytes(partial(read, sides[name], given[name]), args.device) for name in sides}
        for ours, peer, told in pairs(args):
            figures = {"cache_bytes_ours": cached[ours], "cache_bytes_theirs": cached[peer]}
            peak = {"peak_bytes_ours": peaks[ours], "peak_bytes_theirs": peaks[peer]}
            bar = {"8": 3.0, "4": 5.0}.get(ours) if cell["image_tokens"] == 576 else None
            yield {**cell, **told, **figures, **peak, "ratio": cached[peer] / cached[ours], "at_least": bar}


def training_step(
    model: PreTrainedModel, inputs: dict[str, Any], num_labels: int, frozen: str, is_checkpointing: bool
) -> Callable[[], None]:
    """Forward, backward and AdamW, on labels at the end of the text."""
    labels = inputs["input_ids"].clone()
    labels[:, :-num_labels] = IGNORE_INDEX
    batch: dict[str, Any] = {**inputs, "labels": labels}
    if "mm_token_type_ids" in inputs:
        # Our collator says these
        batch |= {"targets_per_row": num_labels, "images_per_row": 1}
    freeze(model, frozen)
    model.train()
    (model.activation_checkpointing_enable if is_checkpointing else model.activation_checkpointing_disable)()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # as `Trainer` makes it

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_operations(step: Callable[[], None], device: str) -> int:
    """
    Multiplications and additions of all matrix products and attention of a step, run once and not compiled: with what
    is computed twice to save memory, and of causal attention the half, too, that kernels may leave out.
    """
    # torch counts no attention in the kernel that CPUs have for it
    kernel = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with kernel, FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@contextmanager
def compiled_layers(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """
    Compiles what each layer does, and not the hooks around it. Layers of one kind share what is compiled, which takes
    seconds where whole models take minutes (as `accelerate.utils.compile_regions`, which puts other modules in their
    places).
    """
    torch.compiler.reset()
    stacks = [each for model in models for each in model.modules() if isinstance(each, nn.ModuleList)]
    layers = list(dict.fromkeys(layer for stack in stacks for layer in stack))  # some peers share theirs
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def measure_training(args: TrainingStepArguments) -> Iterator[Row]:
    for cell, sides, inputs in cells(args):
        for frozen, checkpointing, chunk_size in product(args.frozen, args.checkpointing, args.loss_chunk_sizes):
            for name in map(str, args.fusion_layers):
                sides[name].config.loss_chunk_size = chunk_size or None
            steps = {
                name: training_step(model, inputs[name], args.text_len // 2, frozen, checkpointing == "on")
                for name, model in sides.items()
            }
            operations = {name: count_operations(step, args.device) for name, step in steps.items()}
            with compiled_layers(sides.values() if args.compile_layers else ()):
                seconds = in_turn({name: timer(step, args.clock) for name, step in steps.items()}, args.repeats)
                peaks = {name: peak_bytes(step, args.device) for name, step in steps.items()}
            tokens = cell["batch_size"] * (cell["image_tokens"] + args.text_len)
            bar = 2.0 if frozen == "nothing" and cell["image_tokens"] == 576 else None
            for ours, peer, told in pairs(args):
                peak = {"peak_bytes_ours": peaks[ours], "peak_bytes_theirs": peaks[peer]}
                case = {
                    **cell,
                    "frozen": frozen,
                    "checkpointing": checkpointing,
                    "loss_chunk_size": chunk_size,
                    "compiled": args.compile_layers,
                    **told,
                }
                figures = compare(seconds, ours, peer)
                for name, side in ((ours, "ours"), (peer, "theirs")):
                    tflops = operations[name] / figures[f"seconds_{side}"] / 1e12
                    figures |= {f"tokens_per_second_{side}": tokens / figures[f"seconds_{side}"]}
                    figures |= {f"tflops_{side}": tflops}
                    if args.peak_tflops:
                        figures |= {f"peak_share_{side}": tflops / args.peak_tflops}
                yield {**case, **peak, **figures, "at_least": bar}


def measure_overhead(args: OverheadArguments) -> Iterator[Row]:
    """
    `DuoStreamModel.forward` over its three backbones run by hand: the text stream on the text, the vision stream on
    the pictures, the fusion stack on states of the joined length, with a mask that is ready. What is over is the
    projector, dealing out and joining the tokens, and making the mask.
    """
    for cell, sides, inputs in cells(args):
        for name in map(str, args.fusion_layers):
            runs = {"parts": by_hand(sides[name], inputs[name]), "whole": at_once(sides[name], inputs[name])}
            seconds = in_turn({name: timer(run, args.clock) for name, run in runs.items()}, args.repeats)
            figures = compare(seconds, "parts", "whole", names=("parts", "whole"))
            bar = 1.02 if (cell["image_tokens"], cell["batch_size"]) == (576, 8) else 1.05
            yield {**cell, "fusion_layers": int(name), **figures, "at_most": bar}


def at_once(model: PreTrainedModel, inputs: dict[str, Any]) -> Callable[[], None]:
    given = {name: inputs[name] for name in ("input_ids", "pixel_values")}

    @torch.no_grad()
    def run() -> None:
        model.model(**given, use_cache=False, images_per_row=1)

    return run


def by_hand(model: PreTrainedModel, inputs: dict[str, Any]) -> Callable[[], None]:
    config, input_ids = model.config, inputs["input_ids"]
    text = input_ids[:, config.image_seq_length :]
    states = torch.randn(*input_ids.shape, config.text_config.hidden_size, device=model.device, dtype=model.dtype)
    blocks = block_sequence_ids(input_ids == IMAGE_TOKEN_ID, config.image_seq_length)
    mask = create_masks_for_generate(
        config=config.fusion_stack_config,
        inputs_embeds=states,
        attention_mask=None,
        past_key_values=None,
        block_sequence_ids=blocks if config.bidirectional_images else None,
    )

    @torch.no_grad()
    def run() -> None:
        model.model.text_model(input_ids=text, use_cache=False)
        model.model.vision_model(pixel_values=inputs["pixel_values"])
        model.model.fusion_model(inputs_embeds=states, attention_mask=mask, use_cache=False)

    return run


PARTS: dict[str, tuple[type[SpeedArguments], Callable[[Any], Iterator[Row]]]] = {
    "prefill": (PrefillArguments, measure_prefill),
    "decode": (DecodeArguments, measure_decode),
    "memory": (SpeedArguments, measure_memory),
    "training": (TrainingStepArguments, measure_training),
    "overhead": (OverheadArguments, measure_overhead),
}


def main(part: str, args: list[str] | None = None) -> None:
    arguments, measure = PARTS[part]
    (speed_args,) = parse(arguments, args=args, doc=__doc__)
    record = record_of(part, sys.argv[1:] if args is None else args, speed_args)
    write_rows(Path(speed_args.output or f"runs/benchmark/{part}.json"), record, measure(speed_args))


def all_parts(args: list[str]) -> None:
    """
    Raises:
        ValueError: There is one `output`, which each part would write anew.
    """
    for arguments, _ in PARTS.values():
        (speed_args,) = parse(arguments, args=args, doc=__doc__)
        if speed_args.output is not None:
            raise ValueError("`speed` writes runs/benchmark/PART.json for each of its parts: it takes no `output`")
    for part in PARTS:
        main(part, args)
