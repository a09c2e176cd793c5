"""Every DuoStream class under the tests that each model in the library must pass."""

import copy
import json
import unittest
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, Qwen3Config
from transformers.testing_utils import torch_device
from transformers_tests import test_modeling_common
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from duostream import (
    DuoStreamConfig,
    DuoStreamForConditionalGeneration,
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
)

# By these tables the library's tests know which models have a loss, and of what labels
for table, name in (
    ("MODEL_MAPPING_NAMES", "DuoStreamModel"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "DuoStreamForConditionalGeneration"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "DuoStreamForMaskedLM"),
    ("MODEL_FOR_PRETRAINING_MAPPING_NAMES", "DuoStreamForPreTraining"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "DuoStreamForSequenceClassification"),
):
    names = {**getattr(test_modeling_common, table), "duostream": name}
    setattr(test_modeling_common, table, names)

TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vision_use_head": False,
}


class DuoStreamModelTester:
    """Makes small configs and inputs, and says of what sizes, in the library's words."""

    batch_size = 7  # some tests fill smaller batches up with rows whose placeholders have no pictures
    text_len = 7
    image_seq_length = 4
    image_token_id = 30  # behind the 19 that the training mixin writes, within a vocabulary that is cut to 84
    is_training = True
    use_cache = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    text_config, vision_config = TEXT, VISION

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.seq_length = self.image_seq_length + self.text_len
        self.causal_lm_class = DuoStreamForConditionalGeneration

    def get_config(self) -> DuoStreamConfig:
        config = DuoStreamConfig(
            text_config={**TEXT, "use_cache": self.use_cache},
            vision_config=dict(VISION),
            fusion_stack_config=dict(TEXT),
            image_token_id=self.image_token_id,
            num_labels=3,
        )
        config.vocab_size = TEXT["vocab_size"]  # where the training mixin looks for it
        return config

    def text_ids(self, length: int) -> torch.Tensor:
        first = DuoStreamModelTester.image_token_id + 1
        return ids_tensor([self.batch_size, length], TEXT["vocab_size"] - first) + first

    def prepare_config_and_inputs_for_common(self) -> tuple[DuoStreamConfig, dict[str, torch.Tensor]]:
        input_ids = self.text_ids(self.seq_length)
        input_ids[:, : self.image_seq_length] = self.image_token_id
        size = VISION["image_size"]
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randn(self.batch_size, 3, size, size, device=torch_device),
        }


class DuoStreamModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        DuoStreamModel,
        DuoStreamForConditionalGeneration,
        DuoStreamForPreTraining,
        DuoStreamForMaskedLM,
        DuoStreamForSequenceClassification,
    )
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    # Ours are younger; the library reads that off a licence's year
    test_can_init_all_missing_weights_before_2023 = True
    all_objectives = True

    def setUp(self) -> None:
        self.model_tester = DuoStreamModelTester(self)
        if "rope_scaling" in self._testMethodName:
            # They draw tokens from the whole vocabulary, and give no pictures
            self.model_tester.image_token_id = TEXT["vocab_size"]  # none of these
        if any(name in self._testMethodName for name in ("rope_scaling", "attn_implementation_composite")):
            # These write into the decoder's config and expect the model to be made of it. DuoStream makes that config
            # anew each time, for `generate`, of the layers of both stacks: here it is to be the text stream's own.
            own = patch.object(DuoStreamConfig, "get_text_config", lambda config, *args, **kwargs: config.text_config)
            own.start()
            self.model_tester.use_cache = False  # which would need the other one
            self.addCleanup(own.stop)
        # Two parts of one type can't be told apart by that type, as one of the configuration tester's tests does
        fusion = Qwen3Config(hidden_size=128, num_hidden_layers=3, num_attention_heads=4)
        fields = json.loads(DuoStreamConfig(fusion_stack_config=fusion).to_json_string())
        self.config_tester = ConfigTester(
            self,
            config_class=DuoStreamConfig,
            has_text_modality=False,
            fusion_stack_config=fields["fusion_stack_config"],
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is DuoStreamForPreTraining:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            if self.all_objectives:
                text = inputs["input_ids"][:, self.model_tester.image_seq_length :]
                inputs |= {"masked_input_ids": inputs["input_ids"], "masked_labels": inputs["labels"]}
                inputs |= {"paired_input_ids": text, "paired_attention_mask": torch.ones_like(text)}
        return inputs

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        classes = self.all_model_classes
        self.all_model_classes = tuple(each for each in classes if each is not DuoStreamForPreTraining)
        super().check_training_gradient_checkpointing(*args, **kwargs)
        # It replaces a layer's forward by one mock, which can't tell a layer's several calls of one pass apart: with
        # one objective there is one. `tests/modeling/test_heads.py` has all objectives with checkpointing.
        self.all_model_classes = (DuoStreamForPreTraining,)
        self.all_objectives = self.test_all_params_have_gradient = False
        super().check_training_gradient_checkpointing(*args, **kwargs)


class DuoStreamRetrievalTester(DuoStreamModelTester):
    """Texts without placeholders, and a picture for each."""

    def prepare_config_and_inputs_for_common(self) -> tuple[DuoStreamConfig, dict[str, torch.Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        input_ids = self.text_ids(self.text_len)
        return config, {**inputs, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class DuoStreamRetrievalTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DuoStreamForImageTextRetrieval,)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False
    # The contrastive loss is of the two streams, and leaves projector, fusion stack and matching alone
    test_all_params_have_gradient = False

    def setUp(self) -> None:
        self.model_tester = DuoStreamRetrievalTester(self)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, Any]:
        return {**copy.deepcopy(inputs_dict), **({"return_loss": True} if return_labels else {})}

    @unittest.skip("As CLIP, whose output has no hidden states: those of the streams are in `get_*_features`")
    def test_hidden_states_output(self) -> None:
        pass

    @unittest.skip("As CLIP, whose output has no hidden states: those of the streams are in `get_*_features`")
    def test_retain_grad_hidden_states_attentions(self) -> None:
        pass
