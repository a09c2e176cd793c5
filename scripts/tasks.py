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

from .. import (
    DuoStreamClassificationCollator,
    DuoStreamConfig,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamPreTrainedModel,
    DuoStreamRetrievalCollator,
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
        hub_name (`str`): What the Hub calls the task.
        prompt (`str`): What the user says, or the text to classify; `{name}` stands for a column.
        answer_column (`str`, *optional*): Column with what is to be said. Absent where it must be named.
        scorers (`tuple` of functions): Of predictions and references, for tasks whose answers are generated.
        collator: Makes the batches.
    """

    auto_class: Any
    hub_name: str
    prompt: str
    answer_column: str | None = None
    scorers: tuple[Scorer, ...] = ()
    collator: type[DuoStreamDataCollator] = DuoStreamDataCollator

    @property
    def is_generative(self) -> bool:
        """Whether the model writes the answers."""
        return self.model_class.can_generate()

    @property
    def model_class(self) -> type[DuoStreamPreTrainedModel]:
        """Which of DuoStream's classes `auto_class` loads."""
        return self.auto_class._model_mapping[DuoStreamConfig]


def lowercase_bleu(predictions: Sequence[str], references: metrics.References) -> dict[str, Any]:
    """Captions differ in case for no reason."""
    return metrics.bleu_and_chrf(predictions, references, lowercase=True)


CAPTION_SCORERS = (metrics.cider_d, lowercase_bleu)
WRITER, CLASSIFIER = AutoModelForImageTextToText, AutoModelForSequenceClassification
RETRIEVER, FILLER = AutoModelForZeroShotImageClassification, AutoModelForMaskedLM

TASKS = {
    "chat": Task(WRITER, "image-text-to-text", "Describe the picture."),
    "caption": Task(WRITER, "image-to-text", "Describe the picture.", "captions", CAPTION_SCORERS),
    "vqa": Task(WRITER, "visual-question-answering", "{question}", "answer", (metrics.vqa_accuracy,)),
    "translation": Task(WRITER, "translation", "Translate: {source}", "target", (metrics.bleu_and_chrf,)),
    "summarization": Task(WRITER, "summarization", "Summarize: {document}", "summary", (metrics.rouge,)),
    "classification": Task(CLASSIFIER, "text-classification", "{text}", collator=DuoStreamClassificationCollator),
    "retrieval": Task(
        RETRIEVER, "zero-shot-image-classification", "", "captions", collator=DuoStreamRetrievalCollator
    ),
    "masked": Task(FILLER, "fill-mask", "", "text", collator=DuoStreamMaskedLMCollator),
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
