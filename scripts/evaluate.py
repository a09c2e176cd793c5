"""
Lets a checkpoint answer held-out prompts, compares the answers, and measures the loss.

Example:

    duostream-evaluate --checkpoint runs/finetuned --dataset scenes --output_dir runs/evaluation
"""

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ..processing import DuoStreamDataCollator, DuoStreamProcessor
from ..processing.data_collator_duostream import IGNORE_INDEX, load_picture
from .arguments import DataArguments, parse
from .data import Rows, load_rows
from .generate import answer


@dataclass
class EvaluateArguments:
    """What to evaluate, and how to generate."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})
    output_dir: str = field(
        default="runs/evaluation", metadata={"help": "`metrics.json` and `predictions.jsonl` are written here."}
    )
    batch_size: int = field(default=64, metadata={"help": "Rows at a time."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})


def generate_answers(
    model: PreTrainedModel, processor: DuoStreamProcessor, rows: Rows, batch_size: int = 64, **kwargs: Any
) -> list[dict[str, Any]]:
    """
    Answers every row's last question, from the turns before it.

    Args:
        rows (`Dataset` or `IterableDataset`): With `prompt` and `completion`, or `messages` that end in an answer.
        kwargs: Go to `generate`.

    Returns:
        A `dict` for each row with `row`, `prompt`, `reference`, `prediction`, and `kind` and `held_out` where the
        row has them.
    """
    model.eval()
    results: list[dict[str, Any]] = []
    batches = rows.iter(batch_size=batch_size)
    for batch in tqdm(batches, desc="answering", leave=False):
        size = len(next(iter(batch.values())))
        conversations = []
        for i in range(size):
            row = {name: values[i] for name, values in batch.items()}
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            *prompt, last = messages
            conversations.append(with_pictures(prompt, row.get("images") or []))
            kept = {name: row[name] for name in ("row", "kind", "held_out") if name in row}
            results.append({**kept, "prompt": text_of(prompt[-1]), "reference": text_of(last)})
        predictions = answer(model, processor, conversations, **kwargs)
        for result, prediction in zip(results[-size:], predictions, strict=True):
            result["prediction"] = prediction
    return results


def with_pictures(messages: list[dict], images: list[Any]) -> list[dict]:
    """The messages with each picture in its part, as `apply_chat_template` takes them."""
    pictures = map(load_picture, images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                for part in parts_of(message)
            ],
        }
        for message in messages
    ]


def parts_of(message: dict) -> list[dict]:
    """The content of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: dict) -> str:
    """The text of a message, without its pictures."""
    return "".join(part["text"] for part in parts_of(message) if part["text"])


def exact_match(results: list[dict[str, Any]]) -> dict[str, float]:
    """The share of predictions that equal their reference: of all rows, by `kind`, and of those `held_out`."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        is_equal = result["prediction"] == result["reference"]
        groups["exact_match"].append(is_equal)
        if "kind" in result:
            groups[f"exact_match_{result['kind']}"].append(is_equal)
        if result.get("held_out"):
            groups["exact_match_held_out"].append(is_equal)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def evaluation_loss(model: PreTrainedModel, processor: DuoStreamProcessor, rows: Rows, batch_size: int = 64) -> float:
    """The mean loss of the answers' tokens, given the tokens before them."""
    collator = DuoStreamDataCollator(processor)
    total, num_tokens = 0.0, 0
    for batch in tqdm(DataLoader(rows, batch_size=batch_size, collate_fn=collator), desc="loss", leave=False):
        with torch.no_grad():
            loss = model(**{name: to_device(value, model.device) for name, value in batch.items()}).loss
        # Each token counts the same, however many others are in its batch
        num_learnt = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total, num_tokens = total + float(loss) * num_learnt, num_tokens + num_learnt
    return total / num_tokens


def to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def main(args: list[str] | None = None) -> None:
    evaluate_args, data_args = parse(EvaluateArguments, DataArguments, args=args, doc=__doc__)
    started = time.time()
    model = AutoModelForImageTextToText.from_pretrained(evaluate_args.checkpoint)
    processor = AutoProcessor.from_pretrained(evaluate_args.checkpoint)
    rows = load_rows(data_args, data_args.eval_split, data_args.max_eval_rows)
    results = generate_answers(
        model,
        processor,
        rows,
        evaluate_args.batch_size,
        max_new_tokens=evaluate_args.max_new_tokens,
        num_beams=evaluate_args.num_beams,
    )
    loss = evaluation_loss(model, processor, rows, evaluate_args.batch_size)
    metrics = {"loss": loss, **exact_match(results), "num_rows": len(results), "seconds": time.time() - started}
    output_dir = Path(evaluate_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    command = sys.argv[1:] if args is None else args
    (output_dir / "metrics.json").write_text(json.dumps({"command": command, **metrics}, indent=2) + "\n")
    lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
    (output_dir / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
