"""DuoStream gives any Hugging Face language model eyes. Importing it registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration import DuoStreamConfig
from .modeling import DuoStreamForConditionalGeneration, DuoStreamModel, DuoStreamPreTrainedModel
from .processing import DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer

__version__ = "0.1.0"

AutoConfig.register("duostream", DuoStreamConfig)
AutoProcessor.register(DuoStreamConfig, DuoStreamProcessor)
AutoModel.register(DuoStreamConfig, DuoStreamModel)
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(DuoStreamConfig, DuoStreamForConditionalGeneration)

__all__ = [
    "DuoStreamConfig",
    "DuoStreamDataCollator",
    "DuoStreamForConditionalGeneration",
    "DuoStreamModel",
    "DuoStreamPreTrainedModel",
    "DuoStreamProcessor",
    "train_tokenizer",
]
