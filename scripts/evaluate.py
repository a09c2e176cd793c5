"""
Measures a checkpoint at a task, on held-out rows: what it writes, how it classifies, what it finds.

Example:

    duostream evaluate --checkpoint runs/finetuned --task caption --dataset path/to/photographs \\
        --output_dir runs/evaluation
"""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, ReadInstruction
from sacrebleu import sentence_chrf
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoProcessor, PreTrainedModel, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from ..processing import (
    DuoStreamClassificationCollator,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamProcessor,
    DuoStreamRetrievalCollator,
)
from ..processing.data_collator_duostream import IGNORE_INDEX, is_plain_text, load_pictures, tools_of
from ..processing.processing_duostream import check_messages, parts_of
from . import metrics
from .arguments import DataArguments, check_at_least_one, check_unused, parse
from .card import read_run, save_samples, source_of, weights_fingerprints
from .checkpoints import load_model
from .data import load_rows, picture_key
from .generate import TextRoom, answer, prompt_inputs
from .places import check_place
from .report import write_evaluation
from .scenes import rows_of_batch
from .sources import Rows
from .tasks import task_of

logger = logging.get_logger(__name__)

# A number of rows of which all percentages are whole: how many there are isn't known where slices are compared
MANY_ROWS = 10**9


@dataclass
class EvaluateArguments:
    """What to evaluate, and how to generate."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})
    output_dir: str = field(
        default="runs/evaluation",
        metadata={
            "help": "`metrics.json` and `predictions.jsonl` are written here, and small pictures of some rows, which "
            "`push --evaluations` puts into the card."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Rows at a time."})
    report: bool = field(
        default=False,
        metadata={"help": "Write `report.html`, too: figures, how the rows score, some rows, and the worst."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})
    seed: int = field(default=0, metadata={"help": "Random seed of which tokens are masked."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "batch_size", "max_new_tokens", "num_beams")


def generate_answers(
    model: PreTrainedModel, processor: DuoStreamProcessor, rows: Rows, batch_size: int = 64, **kwargs: Any
) -> list[dict[str, Any]]:
    """
    Answers every row's last question, from the turns before it.

    Args:
        rows (`Dataset` or `IterableDataset`): With `prompt` and `completion`, or `messages` that end in an answer.
        kwargs: Go to `generate`.

    Returns:
        A `dict` for each row with `row`, `prompt`, `reference`, `prediction`, and `kind`, `held_out` and `references`
        where the row has them.
    """
    model.eval()
    results: list[dict[str, Any]] = []
    room = TextRoom(model)
    for conversations, names, asked in questions_of(rows, batch_size, "answering"):
        predictions = answer(model, processor, conversations, names, room=room, **kwargs)
        results += [
            {**result, "prediction": prediction} for result, prediction in zip(asked, predictions, strict=True)
        ]
    return results


def questions_of(
    rows: Rows, batch_size: int, desc: str
) -> Iterator[tuple[list[list[dict]], list[str], list[dict[str, Any]]]]:
    """
    Batches of what [`generate_answers`] asks: conversations that an answer is to follow, their rows' names, and its
    results without the predictions. With a progress bar.
    """
    num_rows = 0
    for batch in tqdm(rows.iter(batch_size=batch_size), desc=desc, leave=False):
        conversations, names, asked = [], [], []
        for row in rows_of_batch(batch):
            name = f"Row {row.get('row', num_rows)}"
            num_rows += 1
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise ValueError(
                    f"{name}: expected messages that end in an answer of the assistant, to a message before it; "
                    f"their roles are {[message['role'] for message in messages]}"
                )
            if tools_of(row):
                raise ValueError(f"{name} has `tools`, which aren't given to a model that is measured")
            *prompt, last = messages
            pictures = load_pictures(row.get("images") or [], name)
            num_markers = sum(part["type"] == "image" for message in messages for part in parts_of(message))
            if num_markers != len(pictures):
                raise ValueError(f"{name} has {num_markers} picture markers but {len(pictures)} pictures")
            conversations.append(with_pictures(prompt, pictures))
            names.append(name)
            kept: dict[str, Any] = {
                name: row[name] for name in ("row", "kind", "held_out", "references") if name in row
            }
            asked.append({**kept, "prompt": text_of(prompt[-1]), "reference": text_of(last)})
        yield conversations, names, asked


def check_questions(
    model: PreTrainedModel, processor: DuoStreamProcessor, rows: Rows, batch_size: int = 64
) -> int | None:
    """
    Looks whether the model has room to answer each row, before it is asked to. Of a model without learned positions
    nothing is read.

    Returns:
        `int`: How many tokens it can write behind the longest question; `None` for as many as one likes.

    Raises:
        ValueError: A question leaves no room for an answer. Its row is named.
    """
    room = TextRoom(model)
    if room.positions is None:
        return None
    left = []
    for conversations, names, _ in questions_of(rows, batch_size, "reading"):
        inputs = prompt_inputs(processor, conversations)
        room.check(inputs, names, is_prompt=True)
        left.append(room.behind(inputs))
    return min(filter(None, left), default=None)


def with_pictures(messages: list[dict], images: list[PIL.Image.Image]) -> list[dict]:
    """The messages with each picture in its part, as `apply_chat_template` takes them."""
    pictures = iter(images)
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


def text_of(message: dict) -> str:
    """The text of a message, without its pictures."""
    return "".join(part.get("text") or "" for part in parts_of(message))


def exact_match(results: list[dict[str, Any]]) -> dict[str, float]:
    """The share of predictions that equal a reference of theirs: of all rows, by `kind`, and of those `held_out`."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        is_equal = result["prediction"] in [text.strip() for text in references_of(result)]
        groups["exact_match"].append(is_equal)
        if result.get("kind") is not None:
            groups[f"exact_match_{result['kind']}"].append(is_equal)
        if result.get("held_out"):
            groups["exact_match_held_out"].append(is_equal)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def references_of(result: dict[str, Any]) -> list[str]:
    return result.get("references") or [result["reference"]]


def check_rows(rows: Rows, task: str) -> None:
    """
    Raises:
        ValueError: A task's figures can't be had of the rows, which the model has yet to answer: there are too few, or
            one has nothing to compare an answer with. A stream isn't looked at.
    """
    scorers = task_of(task).scorers
    if not scorers or not isinstance(rows, Dataset):
        return
    if metrics.cider_d in scorers:
        metrics.check_number_of_rows(len(rows))
    columns = [name for name in ("references", "messages", "completion") if name in rows.column_names]
    references = []
    for index, row in enumerate(rows.with_format(None).select_columns(columns)):
        messages = row.get("messages") or row.get("completion")
        try:
            check_messages(messages)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        references.append(references_of({"reference": text_of(messages[-1]), **row}))
    metrics.check_references([""] * len(references), references)


def score_answers(results: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """The figures of a task whose answers are generated."""
    if not results:
        raise ValueError("There are no answers to score")
    scores: dict[str, Any] = exact_match(results)
    for scorer in task_of(task).scorers:
        scores |= scorer([result["prediction"] for result in results], [references_of(result) for result in results])
    return scores


def batches_of(rows: Rows, collator: Any, batch_size: int, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """
    Collated batches on the model's device, with a progress bar.

    Raises:
        ValueError: A row is longer than the model reads. It is named.
    """
    room = TextRoom(model)
    num_rows = 0

    def collate(listed: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return listed, collator(listed)

    for listed, batch in tqdm(
        DataLoader(rows, batch_size=batch_size, collate_fn=collate), desc="reading", leave=False
    ):
        if "input_ids" in batch:  # a peer may read pictures alone
            room.check(batch, [f"Row {row.get('row', num_rows + i)}" for i, row in enumerate(listed)])
        num_rows += len(listed)
        yield {name: to_device(value, model.device) for name, value in batch.items()}


@torch.no_grad()
def classify(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    rows: Rows,
    batch_size: int = 64,
    max_length: int | None = None,
    collator: Callable[[list[dict]], dict] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a classifier, and for each row its `label` (or labels), the `prediction` and what it scores."""
    model.eval()
    logits, labels = [], []
    collator = collator or DuoStreamClassificationCollator(processor, max_length, num_labels=model.config.num_labels)
    for batch in batches_of(rows, collator, batch_size, model):
        labels.append(batch.pop("labels").cpu())
        logits.append(model(**batch).logits.float().cpu())
    scores, wanted = torch.cat(logits), torch.cat(labels)  # (num_rows, num_labels)
    names, results = model.config.id2label, []
    for i, (row, label) in enumerate(zip(scores, wanted.tolist(), strict=True)):
        if model.config.num_labels == 1:
            result = {"label": label, "prediction": row.item(), "score": -abs(label - row.item())}
        else:
            chosen = int(row.argmax())
            soft = label if isinstance(label, list) else [float(number == label) for number in names]
            right = [names[number] for number, score in enumerate(soft) if score]
            result = {"label": right, "prediction": names[chosen], "score": soft[chosen]}
        results.append({"row": i, **result})
    return metrics.classification(scores, wanted), results


def embed(outputs: BaseModelOutputWithPooling) -> torch.Tensor:
    """Pooled states of unit length, which not all models give, of shape `(num_rows, projection_dim)`."""
    return torch.nn.functional.normalize(outputs.pooler_output.float(), dim=-1).cpu()


@torch.no_grad()
def retrieve(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    rows: Rows,
    batch_size: int = 64,
    max_length: int | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of finding pictures by their texts and texts by their picture, and for each text what it found."""
    model.eval()
    collator = DuoStreamRetrievalCollator(processor, max_length)
    image_embeds, text_embeds = [], []
    texts: list[str] = []
    image_of_text: list[int] = []
    # Rows may share a picture, which is then one to find
    image_of_key: dict[str | bytes | int, int] = {}
    row_of_image: list[int] = []
    num_rows = 0
    room = TextRoom(model)
    for batch in tqdm(rows.iter(batch_size=batch_size), desc="reading", leave=False):
        listed = rows_of_batch(batch)
        pixel_values = collator(listed)["pixel_values"].to(model.device)
        # Not of pictures that are drawn, as blank ones are: these stand for different ones
        pictures = [row["images"][0] for row in listed]
        keys = [
            picture_key(picture) if isinstance(picture, dict) else num_rows + i for i, picture in enumerate(pictures)
        ]
        new = [i for i, key in enumerate(keys) if key not in image_of_key and key not in keys[:i]]
        for i in new:
            image_of_key[keys[i]] = len(row_of_image)
            row_of_image.append(num_rows + i)
        image_embeds.append(embed(model.get_image_features(pixel_values=pixel_values))[new])
        names = collator.names(listed)
        own = [row.get("references") or [collator.answer_text(row, n)] for row, n in zip(listed, names, strict=True)]
        for name, each in zip(names, own, strict=True):
            if not all(text and text.strip() for text in each):
                raise ValueError(f"{name}: expected texts that belong to the picture, found an empty one in {each}")
        flat = [text for each in own for text in each]
        flat_names = [name for name, each in zip(names, own, strict=True) for _ in each]
        inputs = {name: value.to(model.device) for name, value in collator.tokenize_texts(flat, flat_names).items()}
        room.check(inputs, flat_names)
        text_embeds.append(embed(model.get_text_features(**inputs)))
        texts += flat
        image_of_text += [image_of_key[key] for key, each in zip(keys, own, strict=True) for _ in each]
        num_rows += len(listed)
    scores = torch.cat(text_embeds) @ torch.cat(image_embeds).T  # (num_texts, num_images)
    belongs = torch.tensor(image_of_text)
    ranks = metrics.ranks_of_own(scores, belongs)  # (num_texts,)
    results = [
        {"row": row_of_image[own], "prompt": text, "prediction": row_of_image[int(found)], "score": -int(rank)}
        for own, text, found, rank in zip(image_of_text, texts, scores.argmax(dim=1), ranks, strict=True)
    ]
    return metrics.retrieval(scores, belongs), results


@torch.no_grad()
def fill_masks(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    rows: Rows,
    batch_size: int = 64,
    max_length: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loss and accuracy at masked tokens, which are drawn from the seed: the same in batches of any size."""
    model.eval()
    total, num_right, num_masked = 0.0, 0, 0
    collator = DuoStreamMaskedLMCollator(processor, max_length, mask_seed=seed)
    for batch in batches_of(rows, collator, batch_size, model):
        labels = batch["labels"]
        is_masked = labels != IGNORE_INDEX
        if not is_masked.any():
            continue
        outputs = model(**batch)
        count = int(is_masked.sum())
        total, num_masked = total + float(outputs.loss) * count, num_masked + count
        num_right += int((outputs.logits.argmax(dim=-1) == labels)[is_masked].sum())
    if not num_masked:
        raise ValueError("No token was masked: the rows hold too little text")
    return {"loss": total / num_masked, "accuracy": num_right / num_masked, "num_masked": num_masked}, []


@torch.no_grad()
def evaluation_loss(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    rows: Rows,
    batch_size: int = 64,
    max_length: int | None = None,
) -> float:
    """
    The mean loss of the answers' tokens, given the tokens before them.

    Raises:
        ValueError: All of them are cut off.
    """
    total, num_tokens = 0.0, 0
    for batch in batches_of(rows, DuoStreamDataCollator(processor, max_length), batch_size, model):
        # Each token counts the same, however many others are in its batch
        num_learnt = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        if num_learnt:  # else it is not a number
            total, num_tokens = total + float(model(**batch).loss) * num_learnt, num_tokens + num_learnt
    if not num_tokens:
        raise ValueError(f"`max_length` is {max_length}, which cuts off all answers: expected more")
    return total / num_tokens


def to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def evaluate(
    model: PreTrainedModel, processor: DuoStreamProcessor, rows: Rows, task: str, batch_size: int = 64, **kwargs: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    The figures of a task, and what the model said to each row. `kwargs` go to `generate`, or to [`classify`],
    [`retrieve`] or [`fill_masks`].
    """
    if task_of(task).is_generative:
        results = generate_answers(model, processor, rows, batch_size, **kwargs)
        figures = score_answers(results, task)
        for result in results:
            result["score"] = sentence_chrf(result["prediction"], references_of(result)).score
        return figures, results
    measure: Callable = {"classification": classify, "retrieval": retrieve, "masked": fill_masks}[task]
    return measure(model, processor, rows, batch_size, **kwargs)


def overlap(split: str, other: str, is_file: bool) -> bool:
    """Whether two splits, or slices, have rows in common, as far as that doesn't hang on how many there are."""

    def parts_of(spec: str) -> list[tuple[str, int, int]]:
        names = {part.split("[")[0].strip() for part in spec.split("+")}
        parts = ReadInstruction.from_spec(spec).to_absolute(dict.fromkeys(names, MANY_ROWS))
        # A file is one split, whatever it is called
        return [("" if is_file else part.splitname, part.from_, part.to) for part in parts]

    return any(
        name == other_name and max(start, other_start) < min(end, other_end)
        for name, start, end in parts_of(split)
        for other_name, other_start, other_end in parts_of(other)
    )


def warn_of_learnt_rows(checkpoint: str, data_args: DataArguments, split: str) -> None:
    """Warns where rows are measured that the checkpoint has learnt from, as far as `run.json` tells."""
    run, asked = read_run(Path(checkpoint)), source_of(data_args, split)
    is_file = Path(data_args.dataset).is_file()
    for source in [*run.get("sources", []), *(run.get("sources_before") or [])]:
        is_same = all(source[name] == asked[name] for name in ("name", "kind", "config"))
        if is_same and overlap(split, source["split"], is_file):
            logger.warning(
                f"{checkpoint} has learnt from split {source['split']!r} of {source['name']!r}, or of another of this "
                f"name, and is measured on {split!r}{', which is all of this file' * (is_file and '[' not in split)}: "
                "for figures of rows that it hasn't seen hold some out, as in `--train_split 'train[:90%]'` and "
                "`--eval_split 'train[90%:]'`"
            )
            return


OPTIONS = (EvaluateArguments, DataArguments)


def main(args: list[str] | None = None) -> None:
    evaluate_args, data_args = parse(*OPTIONS, args=args, doc=__doc__)
    if evaluate_args.report and (data_args.streaming or data_args.task == "masked"):
        raise ValueError(
            "`report` shows rows again: not with `streaming`, nor for `masked`, which has no scores of rows"
        )
    for_training = ("mixture", "conversations_per_row", "on_bad_rows", "max_train_rows", "train_split", "weight")
    check_unused(data_args, (*for_training, "chars_per_picture"), "it is for rows to train on")
    if not task_of(data_args.task).is_generative:
        check_unused(evaluate_args, ["max_new_tokens", "num_beams"], f"{data_args.task!r} writes nothing")
    output_dir = Path(evaluate_args.output_dir)
    there = next(each for each in (output_dir, *output_dir.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` is {str(output_dir)!r}, but {str(there)!r} is a file; expected a folder")
    check_place(evaluate_args.checkpoint)
    started = time.time()
    set_seed(evaluate_args.seed)
    task, batch_size = task_of(data_args.task), evaluate_args.batch_size
    model = load_model(task.auto_class, evaluate_args.checkpoint)
    processor = AutoProcessor.from_pretrained(evaluate_args.checkpoint)
    classes = list(model.config.id2label.values()) if model.config.num_labels > 1 else []
    split, max_rows = data_args.eval_split, data_args.max_eval_rows
    warn_of_learnt_rows(evaluate_args.checkpoint, data_args, split)
    rows = load_rows(data_args, split, max_rows, is_evaluation=True, classes=classes)
    check_rows(rows, data_args.task)
    options: dict[str, Any] = {"max_length": data_args.max_length}
    if data_args.task == "masked":
        options["seed"] = evaluate_args.seed
    losses: dict[str, float] = {}
    if task.is_generative:
        # First, as what it refuses would else be told when all is answered
        rows_of_answers = load_rows(data_args, split, max_rows)
        losses["loss"] = evaluation_loss(model, processor, rows_of_answers, batch_size, data_args.max_length)
        options = {name: getattr(evaluate_args, name) for name in ("max_new_tokens", "num_beams")}
    figures, results = evaluate(model, processor, rows, data_args.task, batch_size, **options)
    if data_args.task == "classification" and isinstance(rows, Dataset) and is_plain_text(rows.features):
        results = [{**result, "prompt": text} for result, text in zip(results, rows["text"], strict=True)]
    if data_args.task == "classification" and isinstance(rows, Dataset) and "references" in rows.column_names:
        # Some may be no class
        results = [{**result, "label": names} for result, names in zip(results, rows["references"], strict=True)]
    has_row_results = data_args.task not in ("retrieval", "masked")
    record = {
        "command": sys.argv[1:] if args is None else args,
        "task": data_args.task,
        "data": source_of(data_args, split),
        "weights_fingerprints": weights_fingerprints(model),
        "seed": evaluate_args.seed,
        # Of what was read and how; a stream has none
        "data_fingerprint": rows._fingerprint if isinstance(rows, Dataset) else None,
        "versions": {name: version(name) for name in ("duostream", "transformers", "torch", "datasets")},
        # What is no number, as the correlation of figures that are all alike, has no place in JSON
        **{name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()},
        **losses,
        # Of a stream it isn't known where results are not one for each row
        "num_rows": len(rows) if isinstance(rows, Dataset) else len(results) if has_row_results else None,
        "seconds": time.time() - started,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
    (output_dir / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    save_samples(output_dir, rows, results)
    # An earlier one has other figures
    (output_dir / "report.html").unlink(missing_ok=True)
    if evaluate_args.report:
        write_evaluation(output_dir / "report.html", data_args.task, record, rows, results)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
