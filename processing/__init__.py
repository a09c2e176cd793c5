from .data_collator_duostream import DuoStreamDataCollator
from .processing_duostream import DuoStreamProcessor
from .tokenizer_training import train_tokenizer

__all__ = ["DuoStreamDataCollator", "DuoStreamProcessor", "train_tokenizer"]
