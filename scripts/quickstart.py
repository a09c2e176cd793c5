"""
The whole way on scenes that are drawn here: pretrain, fine-tune, evaluate, save, load, answer, and write a report.

Example:

    duostream quickstart --output_dir runs/quickstart
"""

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed

from .. import DuoStreamProcessor, __version__
from .answering import answer
from .arguments import DataArguments, DuoStreamTrainingArguments, check_at_least_one, parse
from .data import blank, number_rows, pack_rows
from .measuring import exact_match, generate_answers, text_of
from .pretrain import PretrainArguments, new_model
from .report import NUM_SHOWN, attended_tokens, pick, write_report
from .scenes import ALL_COMBINATIONS, build_scenes, caption_rows, question_rows, training_rows
from .training import train

SCENES = DataArguments(dataset="scenes")


@dataclass
class QuickstartArguments:
    """How much of everything. The defaults are chosen for two CPU cores."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Checkpoints, metrics and report go here."})
    train_scenes: int = field(default=12_000, metadata={"help": "Scenes to train on."})
    eval_scenes: int = field(default=300, metadata={"help": "Held-out scenes of each kind to evaluate on."})
    pretrain_steps: int = field(default=230, metadata={"help": "Steps of 64 captions."})
    question_steps: int = field(default=1000, metadata={"help": "Steps of up to five questions about 28 pictures."})
    finetune_steps: int = field(
        default=950, metadata={"help": "Steps of such questions, and every third of 28 captions."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed of the scenes, the weights and their order."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "train_scenes", "eval_scenes", "pretrain_steps", "question_steps", "finetune_steps")


def training_arguments(output_dir: Path, **kwargs: Any) -> DuoStreamTrainingArguments:
    """The recipe: AdamW (0.9, 0.98) with a short warm-up."""
    steps = kwargs["max_steps"]
    defaults = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "weight_decay": 0.3,
        "adam_beta2": 0.98,
        "warmup_steps": min(50, steps // 4),
        "logging_steps": max(1, min(25, steps // 10)),
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 1,
    }
    return DuoStreamTrainingArguments(**{**defaults, **kwargs})


class Stopwatch:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def questions_and_captions(questions: Dataset, captions: Dataset) -> Dataset:
    """All rows of both; by `length`, `group_by_length` keeps them apart, so that neither pads the other."""
    parts = [
        part.select_columns(["images", "conversations"]).add_column("length", [i] * len(part))
        for i, part in enumerate((questions, pack_rows(captions, conversations_per_row=1)))
    ]
    return number_rows(concatenate_datasets(parts))


def caption_names_objects(prediction: str, objects: list[dict]) -> bool:
    """Whether a caption names exactly the colours and shapes that are there, each pair as often as it is there."""
    words = prediction.lower().replace(".", " ").replace(",", " ").split()
    named = [pair for pair in pairwise(words) if pair in ALL_COMBINATIONS]
    return sorted(named) == sorted((item["colour"], item["shape"]) for item in objects)


def evaluate(
    model: PreTrainedModel, processor: DuoStreamProcessor, num_scenes: int, seed: int
) -> tuple[dict[str, Any], list[dict], Dataset]:
    """Answers by `generate` on held-out scenes, blank pictures, and held-out combinations of colour and shape."""
    held_out_scenes = build_scenes("validation", num_scenes, seed=seed)
    questions = number_rows(question_rows(held_out_scenes))
    results = generate_answers(model, processor, questions, max_new_tokens=12)
    blank_results = generate_answers(model, processor, blank(questions), max_new_tokens=12)
    combinations = number_rows(question_rows(build_scenes("combinations", num_scenes, seed=seed)))
    combination_results = generate_answers(model, processor, combinations, max_new_tokens=12)
    captions = caption_rows(held_out_scenes)
    caption_results = generate_answers(model, processor, captions, max_new_tokens=64)
    are_right = [
        caption_names_objects(result["prediction"], objects)
        for result, objects in zip(caption_results, captions["objects"], strict=True)
    ]
    metrics = {
        "held_out_scenes": exact_match(results),
        "blank_picture": exact_match(blank_results),
        "held_out_combinations": exact_match(combination_results),
        "captions_with_all_colours_and_shapes": sum(are_right) / len(are_right),
        "num_questions": {
            "held_out_scenes": len(results),
            "held_out_combinations": sum(result["held_out"] for result in combination_results),
        },
        "num_captions": len(are_right),
    }
    return metrics, results, questions


OPTIONS = (QuickstartArguments,)


def main(args: list[str] | None = None) -> None:
    (quickstart_args,) = parse(*OPTIONS, args=args, doc=__doc__)
    output_dir, seed = Path(quickstart_args.output_dir), quickstart_args.seed
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    watch = Stopwatch()

    with watch.stage("draw scenes"):
        scenes = build_scenes("train", quickstart_args.train_scenes, seed=seed)
        captions = number_rows(caption_rows(scenes))
        # Pictures are read once for five questions: how fast a model learns to look goes by the number of its steps
        questions = pack_rows(question_rows(scenes), conversations_per_row=5)
        rows = questions_and_captions(questions, captions)

    with watch.stage("pretrain"):
        steps = quickstart_args.pretrain_steps
        model, processor = new_model(PretrainArguments(), training_rows(scenes.take(1000)))
        pretrain_args = training_arguments(
            output_dir / "pretrained",
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=4e-3,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps // 2, "decay_type": "linear"},
            # Features of colour and shape that are no larger than need be combine to pairs that were never seen
            weight_decay=1.0,
            seed=seed,
        )
        pretraining = train(model, processor, pretrain_args, captions, data=SCENES)

    # Captions go through the objects in order, questions look for one by what it is: that is learnt far sooner where
    # captions don't come between, and both together while the learning rate falls
    with watch.stage("fine-tune on questions"):
        question_args = training_arguments(
            output_dir / "questions",
            max_steps=quickstart_args.question_steps,
            per_device_train_batch_size=28,
            lr_scheduler_type="constant_with_warmup",
            seed=seed,
        )
        questioning = train(model, processor, question_args, number_rows(questions), data=SCENES)

    with watch.stage("fine-tune"):
        finetune_args = training_arguments(
            output_dir / "finetuned",
            max_steps=quickstart_args.finetune_steps,
            per_device_train_batch_size=28,
            lr_scheduler_type="linear",
            train_sampling_strategy="group_by_length",
            seed=seed,
        )
        finetuning = train(model, processor, finetune_args, rows, data=SCENES)

    with watch.stage("load"):
        model = AutoModelForImageTextToText.from_pretrained(output_dir / "finetuned").eval()
        processor = AutoProcessor.from_pretrained(output_dir / "finetuned")

    with watch.stage("evaluate"):
        metrics, results, questions = evaluate(model, processor, quickstart_args.eval_scenes, seed)

    with watch.stage("answer"):
        row = questions[0]
        question = {"type": "text", "text": text_of(row["prompt"][0])}
        conversation = [{"role": "user", "content": [{"type": "image", "image": row["images"][0]}, question]}]
        print(f"{question['text']} {answer(model, processor, [conversation], max_new_tokens=12)[0]}")

    with watch.stage("report"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        metrics |= {
            "seconds": watch.seconds,
            # In KiB, and on macOS in bytes
            "peak_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2),
            "num_parameters": model.num_parameters(),
            "versions": {
                "duostream": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "datasets": datasets.__version__,
                "python": platform.python_version(),
            },
            "arguments": vars(quickstart_args),
        }
        # The report shows them, and may fail
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        stages = {"pretraining": pretraining, "questions": questioning, "questions and captions": finetuning}
        losses = {
            name: [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
            for name, trainer in stages.items()
        }
        shown = [(questions[result["row"]]["images"][0], result) for result in pick(results, NUM_SHOWN)]
        attention = [(p, r, attended_tokens(output_dir / "finetuned", p, r)) for p, r in shown[:2]]
        write_report(output_dir / "report.html", metrics, losses, shown, attention)
    # Now with the seconds of the report
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))
    print(f"\nThe report is in {output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
