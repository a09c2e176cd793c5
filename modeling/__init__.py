from .modeling_duostream import DuoStreamForConditionalGeneration, DuoStreamModel, DuoStreamPreTrainedModel

__all__ = ["DuoStreamForConditionalGeneration", "DuoStreamModel", "DuoStreamPreTrainedModel"]
