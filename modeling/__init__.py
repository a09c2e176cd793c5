from .heads_duostream import (
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
)
from .liger_duostream import apply_liger_kernel_to_duostream
from .modeling_duostream import DuoStreamForConditionalGeneration, DuoStreamModel, DuoStreamPreTrainedModel

__all__ = [
    "DuoStreamForConditionalGeneration",
    "DuoStreamForImageTextRetrieval",
    "DuoStreamForMaskedLM",
    "DuoStreamForPreTraining",
    "DuoStreamForSequenceClassification",
    "DuoStreamModel",
    "DuoStreamPreTrainedModel",
    "apply_liger_kernel_to_duostream",
]
