"""DuoStream gives any Hugging Face language model eyes. Importing it registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
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
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_class.register(DuoStreamConfig, DuoStreamForConditionalGeneration)
AutoModelForPreTraining.register(DuoStreamConfig, DuoStreamForPreTraining)
AutoModelForMaskedLM.register(DuoStreamConfig, DuoStreamForMaskedLM)
for auto_class in (AutoModelForSequenceClassification, AutoModelForVisualQuestionAnswering):
    auto_class.register(DuoStreamConfig, DuoStreamForSequenceClassification)
AutoModelForZeroShotImageClassification.register(DuoStreamConfig, DuoStreamForImageTextRetrieval)
# What `register` doesn't fill, but the library asks: `transformers serve`, and `Trainer`, which by the last one knows
# that smoothed labels are those of the next token
for names in (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
):
    names[DuoStreamConfig.model_type] = DuoStreamForConditionalGeneration.__name__

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
