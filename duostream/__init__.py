"""DuoStream gives any Hugging Face language model eyes. Importing it registers its classes with the Auto classes."""

import transformers
from transformers import AutoConfig, AutoProcessor

from .configuration import DuoStreamConfig
from .configuration.saved_code_duostream import AUTO_MAP
from .modeling import (
    DuoStreamForConditionalGeneration,
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
    DuoStreamPreTrainedModel,
    apply_liger_kernel_to_duostream,
)
from .processing import (
    DuoStreamClassificationCollator,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamPreTrainingCollator,
    DuoStreamProcessor,
    DuoStreamRetrievalCollator,
    train_tokenizer,
)

__version__ = "0.1.0"

AutoConfig.register("duostream", DuoStreamConfig)
AutoProcessor.register(DuoStreamConfig, DuoStreamProcessor)
for auto_class, reference in AUTO_MAP.items():
    if auto_class.startswith("AutoModel"):
        getattr(transformers, auto_class).register(DuoStreamConfig, globals()[reference.split(".")[1]])
__all__ = [
    "DuoStreamClassificationCollator",
    "DuoStreamConfig",
    "DuoStreamDataCollator",
    "DuoStreamForConditionalGeneration",
    "DuoStreamForImageTextRetrieval",
    "DuoStreamForMaskedLM",
    "DuoStreamForPreTraining",
    "DuoStreamForSequenceClassification",
    "DuoStreamMaskedLMCollator",
    "DuoStreamModel",
    "DuoStreamPreTrainedModel",
    "DuoStreamPreTrainingCollator",
    "DuoStreamProcessor",
    "DuoStreamRetrievalCollator",
    "apply_liger_kernel_to_duostream",
    "train_tokenizer",
]
