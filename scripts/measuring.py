"""What a model makes of held-out rows at each task, and the task's figures."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import torch
from datasets import Dataset
from sacrebleu import sentence_chrf
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..processing import (
    DuoStreamClassificationCollator,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamProcessor,
    DuoStreamRetrievalCollator,
)
from ..processing.chat_template_duostream import check_messages, parts_of
from ..processing.conversations_duostream import tools_of
from ..processing.data_collator_duostream import load_pictures
from ..processing.packing_duostream import IGNORE_INDEX
from . import metrics
from .answering import TextRoom, answer, prompt_inputs
from .data import picture_key
from .scenes import rows_of_batch
from .sources import Rows
from .tasks import task_of


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
