"""DuoStream gives any Hugging Face language model eyes. Importing it registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration import DuoStreamConfig
from .modeling import (
    DuoStreamForConditionalGeneration,
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
    DuoStreamPreTrainedModel,
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
AutoModel.register(DuoStreamConfig, DuoStreamModel)
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(DuoStreamConfig, DuoStreamForConditionalGeneration)
AutoModelForPreTraining.register(DuoStreamConfig, DuoStreamForPreTraining)
AutoModelForMaskedLM.register(DuoStreamConfig, DuoStreamForMaskedLM)
for auto_class in (AutoModelForSequenceClassification, AutoModelForVisualQuestionAnswering):
    auto_class.register(DuoStreamConfig, DuoStreamForSequenceClassification)
AutoModelForZeroShotImageClassification.register(DuoStreamConfig, DuoStreamForImageTextRetrieval)

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
    "train_tokenizer",
]
