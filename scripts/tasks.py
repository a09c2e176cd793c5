"""What a model can be asked to do: one entry a task, which fine-tuning, evaluation and generation share."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForZeroShotImageClassification,
)

from . import metrics
from .arguments import DataArguments

Scorer = Callable[[Sequence[str], metrics.References], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """
    A task: which model does it, and what its rows and figures are by default.

    Args:
        auto_class: Loads the model.
        prompt (`str`): What the user says, or the text to classify; `{name}` stands for a column.
        answer_column (`str`, *optional*): Column with what is to be said. Absent where it must be named.
        scorers (`tuple` of functions): Of predictions and references, for tasks whose answers are generated.
    """

    auto_class: Any
    prompt: str
    answer_column: str | None = None
    scorers: tuple[Scorer, ...] = ()


def lowercase_bleu(predictions: Sequence[str], references: metrics.References) -> dict[str, Any]:
    """Captions differ in case for no reason."""
    return metrics.bleu_and_chrf(predictions, references, lowercase=True)


WRITER = AutoModelForImageTextToText

TASKS = {
    "chat": Task(WRITER, "Describe the picture."),
    "caption": Task(WRITER, "Describe the picture.", "captions", (metrics.cider_d, lowercase_bleu)),
    "vqa": Task(WRITER, "{question}", "answer", (metrics.vqa_accuracy,)),
    "translation": Task(WRITER, "Translate: {source}", "target", (metrics.bleu_and_chrf,)),
    "summarization": Task(WRITER, "Summarize: {document}", "summary", (metrics.rouge,)),
    "classification": Task(AutoModelForSequenceClassification, "{text}"),
    "retrieval": Task(AutoModelForZeroShotImageClassification, "", "captions"),
    "masked": Task(AutoModelForMaskedLM, "", "text"),
}


def task_of(name: str) -> Task:
    """
    Raises:
        ValueError: There is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"`task` is {name!r}; there are {', '.join(map(repr, TASKS))}")
    return TASKS[name]


def with_defaults(args: DataArguments) -> DataArguments:
    """The options with the task's prompt and column where none are given."""
    task = task_of(args.task)
    prompt = task.prompt if args.prompt is None else args.prompt
    return dataclasses.replace(args, prompt=prompt, answer_column=args.answer_column or task.answer_column)
