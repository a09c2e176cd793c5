"""
Measures whether batches come as fast as they are trained on: rows a second of the processor, beside those of LLaVA and
SmolVLM, and how much of its time training waits for batches, of JPEG files, of Parquet, and of a stream.

Example:

    duostream benchmark input --task caption --dataset path/to/flickr8k
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from math import isqrt
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from transformers import Idefics3Processor, LlavaProcessor, set_seed
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from .. import DuoStreamConfig, DuoStreamForConditionalGeneration, DuoStreamProcessor, train_tokenizer
from .arguments import DataArguments, DuoStreamTrainingArguments, check_unused, parse
from .comparison import Row, check_clock, check_repeats, compare, in_turn, record_of, timer, write_rows
from .data import load_rows
from .peers import check_squares
from .tasks import TASKS, task_of
from .trainer import DuoStreamTrainer
from .training import collator_of

PATCH_SIZE = 16
JPEG_SIZE = (500, 375)  # as of most photographs in captioned sets
NUM_WARM_STEPS = 5
CAPTION = "A photograph of two dogs that run over a meadow behind a red ball."


@dataclass
class InputArguments:
    """
    How much is read, and how often.

    Raises:
        ValueError: `image_tokens` is no square number.
    """

    image_tokens: list[int] = field(
        default_factory=lambda: [196, 576], metadata={"help": "Tokens of a picture, for the processors."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows a batch."})
    repeats: int = field(default=5, metadata={"help": "How often each processor is run, after one run to warm up."})
    steps: int = field(default=40, metadata={"help": "Of training, after a few to warm up."})
    workers: int = field(default=1, metadata={"help": "Processes that make batches."})
    image_size: int = field(default=48, metadata={"help": "Side of the pictures that are trained on."})
    clock: str = field(default="wall", metadata={"help": "Of the processors: wall, or cpu."})
    output: str = field(default="runs/benchmark/input.json", metadata={"help": "JSON file for the figures."})

    def __post_init__(self) -> None:
        check_squares(self.image_tokens)
        check_repeats(self.repeats)
        check_clock(self.clock)


def draw_jpeg() -> bytes:
    """A photograph's size, and about its bytes: a blurred picture of noise."""
    noise = torch.randint(0, 256, (38, 50, 3), dtype=torch.uint8).numpy()
    jpeg = BytesIO()
    PIL.Image.fromarray(noise).resize(JPEG_SIZE, PIL.Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def make_processors(image_tokens: int) -> dict[str, Any]:
    """Ours and stock ones that give pictures of one size as many tokens."""
    side = isqrt(image_tokens) * PATCH_SIZE
    square = {"height": side, "width": side}

    def tokenizer() -> Any:
        # Each adds tokens of its own to it
        trained = train_tokenizer([CAPTION], vocab_size=300)
        trained.add_special_tokens({"additional_special_tokens": ["<image>", "<global-img>"]})
        return trained

    return {
        "ours": DuoStreamProcessor(
            SiglipImageProcessorPil(size=square), tokenizer(), image_token="<image>", image_seq_length=image_tokens
        ),
        "llava": LlavaProcessor(
            LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=square),
            tokenizer(),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="full",
        ),
        # SmolVLM's own wants packages for videos; its first checkpoints came with this one
        "smolvlm": Idefics3Processor(
            SmolVLMImageProcessorPil(
                size={"longest_edge": side}, max_image_size={"longest_edge": side}, do_image_splitting=False
            ),
            tokenizer(),
            image_seq_len=image_tokens,
        ),
    }


def measure_processors(args: InputArguments) -> Iterator[Row]:
    jpegs = [draw_jpeg() for _ in range(args.batch_size)]

    def process(processor: Any) -> None:
        images = [[PIL.Image.open(BytesIO(jpeg))] for jpeg in jpegs]
        processor(images=images, text=[f"<image> {CAPTION}"] * len(jpegs), return_tensors="pt", padding=True)

    for image_tokens in args.image_tokens:
        processors = make_processors(image_tokens)
        runs = {name: timer(partial(process, processor), args.clock) for name, processor in processors.items()}
        seconds = in_turn(runs, args.repeats)
        for peer in ("llava", "smolvlm"):
            figures = compare(seconds, "ours", peer)
            for side in ("ours", "theirs"):
                figures[f"rows_per_second_{side}"] = args.batch_size / figures.pop(f"seconds_{side}")
            yield {"measured": "processor", "of": f"{image_tokens} tokens", "peer": peer, **figures}


class WaitingTrainer(DuoStreamTrainer):
    """Notes how long each step waited for its batch, and when."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        started = time.perf_counter()
        batch = super().get_batch_samples(*args, **kwargs)
        self.waits = [*getattr(self, "waits", []), (started, time.perf_counter())]
        return batch


def tiny_model(
    image_size: int, vocab_size: int, texts: Iterable[str]
) -> tuple[DuoStreamForConditionalGeneration, DuoStreamProcessor]:
    """The preset `tiny` with random weights, and a processor for it."""
    config = DuoStreamConfig.from_preset("tiny", vocab_size=vocab_size, vision_config={"image_size": image_size})
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        train_tokenizer(texts, vocab_size=vocab_size),
        image_seq_length=config.image_seq_length,
    )
    config.image_token_id = processor.image_token_id
    return DuoStreamForConditionalGeneration(config), processor


def check_writes(data_args: DataArguments) -> None:
    """Raises `ValueError` if a task is none of the model's that is trained here, which writes."""
    if not task_of(data_args.task).is_generative:
        writing = ", ".join(name for name, task in TASKS.items() if task.is_generative)
        raise ValueError(
            f"`task` is {data_args.task!r}, but a model that writes is trained: expected one of {writing}"
        )


def share_waited(args: InputArguments, data_args: DataArguments) -> Row:
    """Trains the tiny model, and returns the share of the time that it waited."""
    set_seed(0)
    rows = load_rows(data_args, data_args.train_split, data_args.max_train_rows)
    model, processor = tiny_model(args.image_size, vocab_size=1024, texts=[CAPTION])
    with tempfile.TemporaryDirectory() as folder:
        training_args = DuoStreamTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps + NUM_WARM_STEPS,
            dataloader_num_workers=args.workers,
            dataloader_persistent_workers=args.workers > 0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
        )
        trainer = WaitingTrainer(
            model=model,
            args=training_args,
            data_collator=collator_of(data_args, processor, model),
            train_dataset=rows,
        )
        trainer.train()
    measured = trainer.waits[NUM_WARM_STEPS:]
    seconds = time.perf_counter() - measured[0][0]
    return {"ratio": sum(end - start for start, end in measured) / seconds, "seconds_per_step": seconds / args.steps}


def write_pictures(folder: Path, num_rows: int) -> dict[str, DataArguments]:
    """The same rows as JPEG files, as Parquet, and as streams of both."""
    train = folder / "files" / "train"
    train.mkdir(parents=True)
    lines = [json.dumps({"file_name": f"{i}.jpg", "caption": CAPTION}) for i in range(num_rows)]
    (train / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for i in range(num_rows):
        (train / f"{i}.jpg").write_bytes(draw_jpeg())
    stored = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": (train / f"{i}.jpg").read_bytes(), "path": None} for i in range(num_rows)],
            "caption": [CAPTION] * num_rows,
        },
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    stored.to_parquet(str(folder / "train.parquet"))
    files = DataArguments(task="caption", dataset=str(folder / "files"), answer_column="caption")
    parquet = replace(files, dataset=str(folder / "train.parquet"))
    return {
        "JPEG files": files,
        "Parquet": parquet,
        "JPEG files, streamed": replace(files, streaming=True),
        "Parquet, streamed": replace(parquet, streaming=True),
    }


def measure_waits(args: InputArguments, data_args: DataArguments) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        if data_args.dataset == "scenes":
            sources = write_pictures(Path(folder), num_rows=args.batch_size * (args.steps + NUM_WARM_STEPS))
        else:
            sources = {Path(data_args.dataset).name: data_args}
        for name, source in sources.items():
            figures = share_waited(args, source)
            yield {"measured": "share of training waited", "of": name, "peer": None, **figures, "at_most": 0.05}


def main(args: list[str] | None = None) -> None:
    input_args, data_args = parse(InputArguments, DataArguments, args=args, doc=__doc__)
    unused = ("mixture", "conversations_per_row", "on_bad_rows")
    check_unused(data_args, unused, "the rows of one data set are read, as they are")
    check_writes(data_args)
    record = record_of("input", sys.argv[1:] if args is None else args, input_args)

    def rows() -> Iterator[Row]:
        yield from measure_processors(input_args)
        yield from measure_waits(input_args, data_args)

    write_rows(Path(input_args.output), record, rows())
