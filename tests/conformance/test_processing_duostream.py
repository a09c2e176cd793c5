"""DuoStream's processor under the tests that each processor in the library must pass."""

import unittest

from transformers import PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers_tests.test_processing_common import ProcessorTesterMixin

from duostream import DuoStreamProcessor, train_tokenizer


class DuoStreamProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = DuoStreamProcessor

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerBase:
        return train_tokenizer(["lower newer upper older longer string"] * 3, vocab_size=300)

    @classmethod
    def _setup_image_processor(cls) -> SiglipImageProcessorPil:
        return SiglipImageProcessorPil(size={"height": 16, "width": 16})

    @staticmethod
    def prepare_processor_dict() -> dict:
        return {"image_seq_length": 4}
