from .heads_duostream import (
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
)
from .modeling_duostream import DuoStreamForConditionalGeneration, DuoStreamModel, DuoStreamPreTrainedModel

__all__ = [
    "DuoStreamForConditionalGeneration",
    "DuoStreamForImageTextRetrieval",
    "DuoStreamForMaskedLM",
    "DuoStreamForPreTraining",
    "DuoStreamForSequenceClassification",
    "DuoStreamModel",
    "DuoStreamPreTrainedModel",
]
