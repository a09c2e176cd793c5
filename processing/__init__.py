from .data_collator_duostream import DuoStreamDataCollator
from .objective_collators_duostream import (
    DuoStreamClassificationCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamPreTrainingCollator,
    DuoStreamRetrievalCollator,
)
from .processing_duostream import DuoStreamProcessor
from .tokenizer_training import train_tokenizer

__all__ = [
    "DuoStreamClassificationCollator",
    "DuoStreamDataCollator",
    "DuoStreamMaskedLMCollator",
    "DuoStreamPreTrainingCollator",
    "DuoStreamProcessor",
    "DuoStreamRetrievalCollator",
    "train_tokenizer",
]
