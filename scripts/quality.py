"""
Measures quality at equal cost: DuoStream and a model of `transformers` as large, from scratch or with the same
pretrained parts, on the same rows with the same tokenizer, optimizer, schedule and batch size for the same minutes.

Example:

    duostream benchmark quality --task classification --dataset path/to/sst2 --prompt "{sentence}" --image_column ""
"""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import DuoStreamProcessor, train_tokenizer
from .arguments import DataArguments, DuoStreamTrainingArguments, check_at_least_one, check_unused, parse
from .backbones import load_vision
from .data import load_mixture, load_rows, read_classes, texts_of
from .finetune import class_options
from .report import new_figure
from .sides import Side, duostream_side, peer_side
from .sources import Rows
from .trainer import DuoStreamTrainer
from .vision_cache import check_cacheable


@dataclass
class QualityArguments:
    """
    How large, how long, how often.

    Raises:
        ValueError: An option is out of range.
    """

    minutes: float = field(default=5.0, metadata={"help": "Of training, for each side and seed."})
    max_steps: int | None = field(default=None, metadata={"help": "Of training, instead of minutes."})
    hidden_size: int = field(default=256, metadata={"help": "Of both sides' transformers."})
    num_layers: int = field(default=4, metadata={"help": "Of each side; half of an encoder-decoder's decode."})
    peer_num_layers: int | None = field(
        default=None,
        metadata={"help": "The peer's, whose layers may be larger; those of its own ViT, too. By default as many."},
    )
    num_text_layers: int = field(
        default=1, metadata={"help": "How many of DuoStream's are the text stream's; the others are fusion layers."}
    )
    num_fusion_layers: int | None = field(
        default=None, metadata={"help": "Fewer fusion layers than that: a step costs less, and more of them fit in."}
    )
    initializer_range: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of DuoStream's first weights: by default the inverse root of `hidden_size`."
        },
    )
    peer_initializer_range: float = field(
        default=0.02,
        metadata={"help": "The peer's: by default that of its own config. Norms behind the layers (BERT) need it."},
    )
    image_size: int = field(default=48, metadata={"help": "Side of the pictures in pixels, for both."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer, which is trained on the rows."})
    text: str | None = field(
        default=None,
        metadata={
            "help": "Local folder or Hub id of a pretrained language model that, with its tokenizer, serves both: "
            "the upper layers of DuoStream read pictures, and all of LLaVA's. It goes with `vision`, and "
            "`num_fusion_layers` or `duostream-N`; sizes of layers and of the vocabulary are then its own."
        },
    )
    text_learning_rate: float = field(
        default=1e-4, metadata={"help": "Of that language model's weights, while what is new has `learning_rate`."}
    )
    vision: str | None = field(
        default=None,
        metadata={
            "help": "Local folder or Hub id of a vision model that serves both sides, frozen: a convolutional one, or "
            "with `text` any."
        },
    )
    vision_size: int | None = field(
        default=None, metadata={"help": "Side of that model's pictures in pixels, if not the one it was trained with."}
    )
    cache_vision: bool = field(
        default=False,
        metadata={
            "help": "Have DuoStream keep on disk what that model gives, as in fine-tuning: reading each picture once "
            "is a part of its minutes."
        },
    )
    stack: str = field(
        default="{}",
        metadata={"help": "Fields of DuoStream's text and fusion stacks, as JSON; a `model_type` replaces Phi."},
    )
    text_stack: str = field(
        default="{}", metadata={"help": "Fields of DuoStream's text stack that are not those of its fusion stack."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={
            "help": "Other fields of DuoStream's configuration, as JSON; of image tokens all fusion layers make new "
            "states, and with `text` half of them, if `num_image_update_layers` isn't told."
        },
    )
    bidirectional_prefix: bool | None = field(
        default=None,
        metadata={
            "help": "Whether DuoStream reads prompts both ways: by default where there is no pretrained `text`."
        },
    )
    vision_config: str = field(
        default="{}", metadata={"help": "Fields of DuoStream's vision stream, where no `vision` is given, as JSON."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Highest; it rises for 5%% of the time, then falls."})
    peer_learning_rate: float | None = field(
        default=None, metadata={"help": "The peer's, where another suits it better: the same by default."}
    )
    batch_size: int = field(
        default=32,
        metadata={"help": "Rows a step; answers a step, where `conversations_per_row` puts several in DuoStream's."},
    )
    dataloader_num_workers: int = field(
        default=1,
        metadata={"help": "Processes that make batches, for each side: more where the device would wait for one."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    sides: list[str] = field(
        default_factory=lambda: ["duostream", "peer"],
        metadata={
            "help": "duostream; duostream-N, of whose `num_layers` the upper N are fusion layers; peer; blind: "
            "DuoStream on the same rows without their pictures."
        },
    )
    llava: bool = field(
        default=False,
        metadata={"help": "Have LLaVA as the peer for chats and captions, too, with DuoStream's own vision stream."},
    )
    curve_points: int = field(
        default=0, metadata={"help": "How often the validation loss is measured on the way, while the clock stands."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "In training, of both sides' layers, where they have it."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each trains all sides once more."})
    output: str = field(default="runs/quality.json", metadata={"help": "File the figures are written to."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "vision_size")
        if self.bidirectional_prefix is None:
            self.bidirectional_prefix = self.text is None
        if self.cache_vision and self.vision is None:
            raise ValueError("`cache_vision` keeps what a frozen vision model gives: it goes with `vision`")
        if self.peer_num_layers is not None and self.peer_num_layers < 1:
            raise ValueError(f"`peer_num_layers` is {self.peer_num_layers}; expected 1 or more")
        if self.text is None:
            self.check_layers()
            return
        if self.vision is None:
            raise ValueError("`text` goes with `vision`: a pretrained model that serves both sides, too")
        if self.num_fusion_layers is None and {"duostream", "blind"} & set(self.sides):
            raise ValueError(
                "`text` needs `num_fusion_layers`: how many of its layers read pictures in DuoStream; or `sides` of "
                "the kind 'duostream-4'"
            )
        self.llava = True

    def take_layers(self, num_layers: int) -> None:
        """
        Deals out the layers of `text`, of which there are so many.

        Raises:
            ValueError: There are fewer than an option says.
        """
        if self.num_fusion_layers is not None and not 0 < self.num_fusion_layers < num_layers:
            raise ValueError(
                f"`num_fusion_layers` is {self.num_fusion_layers}; expected 1 to {num_layers - 1}, as `text` has "
                f"{num_layers} layers"
            )
        self.num_layers, self.num_text_layers = num_layers, num_layers - (self.num_fusion_layers or 1)
        self.check_layers()

    def check_layers(self) -> None:
        depths = {f"duostream-{depth}" for depth in range(1, self.num_layers)}
        unknown = set(self.sides) - {"duostream", "peer", "blind"} - depths
        if unknown:
            raise ValueError(
                f"`sides` has {sorted(unknown)}; there are 'duostream', 'peer', 'blind', and 'duostream-1' to "
                f"'duostream-{self.num_layers - 1}'"
            )
        if not 0 < self.num_text_layers < self.num_layers:
            raise ValueError(
                f"`num_text_layers` is {self.num_text_layers}; expected at least 1 and fewer than `num_layers`, "
                f"which is {self.num_layers}"
            )
        most = self.num_layers - self.num_text_layers
        if self.num_fusion_layers is not None and not 0 < self.num_fusion_layers <= most:
            raise ValueError(f"`num_fusion_layers` is {self.num_fusion_layers}; expected 1 to {most}")

    @property
    def num_peer_layers(self) -> int:
        return self.peer_num_layers or self.num_layers


class Clock(TrainerCallback):
    """
    How much of the training is over, and an end to it: by time, or by steps where there is a number of them. It stands
    still while the validation loss is measured, `num_points` times on the way. Of `seconds`, `spent` were over before.

    Raises:
        ValueError: No time is left.
    """

    def __init__(self, seconds: float, max_steps: int | None, num_points: int = 0, spent: float = 0.0):
        if max_steps is None and spent >= seconds:
            raise ValueError(f"To read each picture once took {spent:.0f} s, which is all of `minutes`: give it more")
        self.seconds, self.max_steps, self.num_points, self.spent = seconds - spent, max_steps, num_points, spent
        self.started, self.steps, self.stood = time.perf_counter(), 0, 0.0
        self.stopped_at = 0.0
        self.curve: list[dict[str, float]] = []

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started - self.stood

    @property
    def share(self) -> float:
        return self.elapsed / self.seconds if self.max_steps is None else self.steps / self.max_steps

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        control.should_training_stop = self.share >= 1
        if len(self.curve) + 1 <= self.share * self.num_points:
            self.stopped_at = time.perf_counter()
            self.curve.append({"seconds": self.spent + self.elapsed, "steps": self.steps})
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.curve[-1]["loss"] = metrics["eval_loss"]
        self.stood += time.perf_counter() - self.stopped_at


class TimedTrainer(DuoStreamTrainer):
    """
    A trainer whose learning rate goes by the clock, so that both sides have the same schedule in the same time, and is
    another one for `rates`' weights.
    """

    def __init__(self, *args: Any, clock: Clock, rates: dict[nn.Parameter, float] | None = None, **kwargs: Any):
        super().__init__(*args, callbacks=[clock], **kwargs)
        self.clock, self.rates = clock, rates or {}

    def weight_rates(self) -> dict[nn.Parameter, float]:
        return self.rates

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LambdaLR:
        # The library's schedules count steps, and how many there will be isn't known
        self.lr_scheduler = LambdaLR(
            self.optimizer, lambda step: max(0.0, min(self.clock.share / 0.05, (1 - self.clock.share) / 0.95))
        )
        return self.lr_scheduler


def train_and_measure(
    side: Side, rows: Rows, eval_rows: Rows, loss_rows: Rows, args: QualityArguments, learning_rate: float, seed: int
) -> dict[str, Any]:
    # As many answers a step for all sides, however many of them a row holds
    answers_per_row = 1.0
    if "conversations" in rows.column_names:
        answers_per_row = sum(map(len, rows["conversations"])) / len(rows)
    training_args = DuoStreamTrainingArguments(
        output_dir=str(Path(args.output).parent / "quality"),
        per_device_train_batch_size=max(1, round(args.batch_size / answers_per_row)),
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        weight_decay=0.1,
        adam_beta2=0.98,
        max_steps=10**9,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=args.dataloader_num_workers,
        # A worker for each pass over few rows would take longer than the pass
        dataloader_persistent_workers=args.dataloader_num_workers > 0,
        # As much padding for all sides: little
        train_sampling_strategy="group_by_length" if "length" in rows.column_names else "random",
    )
    cpu_seconds, started = time.process_time(), time.perf_counter()
    # Of this run alone: what an earlier one had left would take no time
    with TemporaryDirectory(dir=Path(args.output).parent) as folder:
        rows = side.prepare(rows, training_args, folder)
        preparing = time.perf_counter() - started
        clock = Clock(60 * args.minutes, args.max_steps, args.curve_points, spent=preparing)
        trainer = TimedTrainer(
            model=side.model,
            args=training_args,
            data_collator=side.collator,
            train_dataset=rows,
            eval_dataset=loss_rows if args.curve_points else None,
            clock=clock,
            rates={weight: args.text_learning_rate for part in side.pretrained for weight in part.parameters()},
        )
        trainer.train()
    # Far below minutes times threads, if other processes were in the way
    cpu_seconds = time.process_time() - cpu_seconds
    trained = sum(weight.numel() for weight in trainer.optimizer.state)  # what never had a gradient has no state
    figures = side.measure(eval_rows)
    counts = {"parameters": side.model.num_parameters(), "trained_parameters": trained}
    passes = {"preparing_seconds": preparing, "steps": trainer.state.global_step, "epochs": trainer.state.epoch}
    curve = {"curve": clock.curve} if args.curve_points else {}
    return {**counts, "learning_rate": learning_rate, **passes, "cpu_seconds": cpu_seconds, **figures, **curve}


def draw_curves(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation loss by seconds of training, a line for each run."""
    figure, axis = new_figure(figsize=(6, 4))
    for run in runs:
        seconds, losses = zip(*((point["seconds"], point["loss"]) for point in run["curve"]), strict=True)
        axis.plot(seconds, losses, marker=".", label=f"{run['side']} ({run['model']}), seed {run['seed']}")
    axis.set(xlabel="seconds of training", ylabel="validation loss", xscale="log", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=150)


def main(args: list[str] | None = None) -> None:
    quality_args, data_args = parse(QualityArguments, DataArguments, args=args, doc=__doc__)
    if data_args.streaming:
        raise ValueError("All sides read the rows from the start: not with `streaming`")
    check_unused(data_args, ("mixture", "on_bad_rows"), "all sides read the rows of one data set, each of them")
    is_beside_llava = quality_args.llava or data_args.task == "vqa"
    if data_args.max_length is not None and "peer" in quality_args.sides and not is_beside_llava:
        raise ValueError(
            "`max_length` would cut rows of one side alone, or in training alone: beside a 'peer' in `sides` it is "
            "for LLaVA, which is that of `task` 'vqa', and with `llava` of others that write about pictures"
        )
    if quality_args.text is not None:
        quality_args.take_layers(AutoConfig.from_pretrained(quality_args.text).get_text_config().num_hidden_layers)
    if quality_args.cache_vision:
        check_cacheable(data_args)
    classes = read_classes(data_args) if data_args.task == "classification" else []

    def load(data_args: DataArguments) -> tuple[Rows, Rows, Rows]:
        """Rows to train on; to be answered, with all references; and held-out rows as those to train on."""
        rows = load_rows(data_args, data_args.train_split, data_args.max_train_rows, classes=classes)
        held_out = data_args.eval_split, data_args.max_eval_rows
        eval_rows = load_rows(data_args, *held_out, is_evaluation=True, classes=classes)
        return rows, eval_rows, load_rows(data_args, *held_out, classes=classes) if quality_args.curve_points else rows

    seeing = load(data_args)
    rows_of = dict.fromkeys(quality_args.sides, seeing)
    if "blind" in rows_of:
        try:
            rows_of["blind"] = load(replace(data_args, image_column=""))
        except ValueError as error:
            raise ValueError(f"`sides` has 'blind', which reads these rows without pictures: {error}") from error
    rows = seeing[0]
    if data_args.conversations_per_row > 1:
        packed = load_mixture(data_args)
        rows_of |= {name: (packed, *seeing[1:]) for name in rows_of if name.startswith("duostream")}
    is_classification = data_args.task == "classification"
    options = class_options(classes, rows[0]["label"]) if is_classification else {}
    reads_text = any(text.strip() for text, _ in zip(texts_of(rows), range(100), strict=False))
    if quality_args.text is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts_of(rows), quality_args.vocab_size)
    elif data_args.task not in ("caption", "chat", "vqa"):
        raise ValueError(f"`text` is for tasks that write about pictures, not for {data_args.task!r}")
    else:
        tokenizer = AutoTokenizer.from_pretrained(quality_args.text, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    size = {"height": quality_args.image_size, "width": quality_args.image_size}
    if is_classification and reads_text and "images" in rows.column_names:
        raise ValueError(
            'BERT reads no pictures: for texts alone, give `--image_column ""`; for pictures, `--prompt ""`'
        )
    image_processor = SiglipImageProcessorPil(size=size)
    if quality_args.vision is not None:
        image_processor, *_ = load_vision(quality_args.vision, quality_args.vision_size)
    processor = DuoStreamProcessor(
        image_processor, tokenizer, image_seq_length=1, bidirectional_prefix=quality_args.bidirectional_prefix
    )

    def make(name: str) -> Side:
        if name == "peer":
            return peer_side(quality_args, data_args, processor, options, reads_text)
        side_args = quality_args
        if name.startswith("duostream-"):
            depth = int(name.removeprefix("duostream-"))
            side_args = replace(quality_args, num_text_layers=quality_args.num_layers - depth, num_fusion_layers=depth)
        return duostream_side(side_args, data_args, processor, options)

    # Before any training: an error now costs nothing
    for name in quality_args.sides:
        make(name)
    runs: list[dict[str, Any]] = []
    record = {
        "command": sys.argv[1:] if args is None else args,
        "threads": torch.get_num_threads(),
        "num_train_rows": len(rows),
        "num_eval_rows": len(seeing[1]),
        "runs": runs,
    }
    Path(quality_args.output).parent.mkdir(parents=True, exist_ok=True)
    for seed in quality_args.seeds:
        for name in quality_args.sides:
            set_seed(seed)
            side = make(name)
            learning_rate = quality_args.learning_rate
            if name == "peer" and quality_args.peer_learning_rate is not None:
                learning_rate = quality_args.peer_learning_rate
            figures = train_and_measure(side, *rows_of[name], quality_args, learning_rate, seed)
            runs.append({"side": name, "model": type(side.model).__name__, "seed": seed, **figures})
            print(json.dumps(runs[-1], indent=2), flush=True)
            # After each, so that what was measured is never lost
            Path(quality_args.output).write_text(json.dumps(record, indent=2) + "\n")
            if quality_args.curve_points:
                draw_curves(runs, Path(quality_args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
