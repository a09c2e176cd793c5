"""DuoStream and models of `transformers` around one language model and one vision model, with random weights."""

from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any

import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from .. import DuoStreamForConditionalGeneration

IMAGE_TOKEN_ID = 0  # within the vocabulary, as peers look up the placeholder's embedding
FIRST_TEXT_ID = 10

# Fields of the language model and of the vision model
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # SmolLM2-135M and SigLIP-B/16
    "smollm2": (
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        {
            "patch_size": 16,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
    # SmolLM2-1.7B and SigLIP-SO400M, of a size that keeps a GPU busy
    "smollm2-1.7b": (
        {
            "vocab_size": 49152,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        {
            "patch_size": 14,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
        },
    ),
    "tiny": (
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        {
            "patch_size": 8,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
}
PEERS = ("llava", "paligemma", "smolvlm")


def make_sides(
    preset: str, image_tokens: int, fusion_layers: Iterable[int], peers: Iterable[str]
) -> dict[str, PreTrainedModel]:
    """DuoStream with each number of fusion layers, under that number, and the peers, under their names."""
    text_fields, vision_fields = PRESETS[preset]
    language = LlamaForCausalLM(LlamaConfig(**text_fields, tie_word_embeddings=True, max_position_embeddings=8192))
    image_size = isqrt(image_tokens) * vision_fields["patch_size"]
    vision = SiglipVisionModel(SiglipVisionConfig(**vision_fields, image_size=image_size, vision_use_head=False))
    sides: dict[str, PreTrainedModel] = {
        str(number): DuoStreamForConditionalGeneration.from_backbones(
            language, vision, num_fusion_layers=number, image_token_id=IMAGE_TOKEN_ID
        )
        for number in fusion_layers
    }
    return sides | {name: make_peer(name, language, vision) for name in peers}


def make_peer(name: str, language: LlamaForCausalLM, vision: SiglipVisionModel) -> PreTrainedModel:
    """A peer that has the given parts' weights, where it can."""
    text_config, vision_config = language.config, vision.config
    options: dict[str, Any] = {"image_token_id": IMAGE_TOKEN_ID, "tie_word_embeddings": True}
    model: PreTrainedModel
    if name == "llava":
        options |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        model = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text_config, vision_config=vision_config, **options)
        )
        model.model.language_model, model.lm_head = language.model, language.lm_head
        model.model.vision_tower = vision
    elif name == "paligemma":
        # Its language model can only be a Gemma
        shape = {field: getattr(text_config, field) for field in PRESETS["tiny"][0]}
        gemma = GemmaConfig(**shape, head_dim=text_config.head_dim)
        options |= {"projection_dim": gemma.hidden_size, "hidden_size": gemma.hidden_size}
        config = PaliGemmaConfig(text_config=gemma, vision_config=vision_config.to_dict(), **options)
        model = PaliGemmaForConditionalGeneration(config)
    else:
        # Its vision model is a SigLIP of its own; a larger scale would put several tokens in one
        shape = {field: getattr(vision_config, field) for field in ("image_size", *PRESETS["tiny"][1])}
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(text_config=text_config, vision_config=shape, scale_factor=1, **options)
        )
        model.model.text_model, model.lm_head = language.model, language.lm_head
    return model


def make_inputs(model: PreTrainedModel, image_tokens: int, batch_size: int, text_len: int) -> dict[str, torch.Tensor]:
    """A picture and random text behind it in each row, as the model's own processor gives them."""
    size = model.config.vision_config.image_size
    text = torch.randint(FIRST_TEXT_ID, model.config.get_text_config().vocab_size, (batch_size, text_len))
    input_ids = torch.cat([torch.full((batch_size, image_tokens), IMAGE_TOKEN_ID), text], dim=1)  # (batch, seq_len)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    pixel_values = torch.randn(batch_size, 3, size, size)
    if isinstance(model, DuoStreamForConditionalGeneration):
        inputs["mm_token_type_ids"] = (input_ids == IMAGE_TOKEN_ID).long()
    elif isinstance(model, PaliGemmaForConditionalGeneration):
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
    elif isinstance(model, SmolVLMForConditionalGeneration):
        pixel_values = pixel_values[:, None]  # (batch, images per row, 3, size, size)
    inputs["pixel_values"] = pixel_values
    return {name: value.to(model.device) for name, value in inputs.items()}


@torch.no_grad()
def with_features(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs whose pictures the vision model has read already."""
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    kept = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**kept, "mm_encoder_outputs": {"image": features}}


def freeze(model: PreTrainedModel, frozen: str) -> None:
    """Trains all (`nothing` is frozen), all but the vision model (`vision`), or the projector alone (`language`)."""
    for name, parameter in model.named_parameters():
        is_projector = "projector" in name or "connector" in name
        trains_it = {"nothing": True, "vision": "vision" not in name, "language": False}[frozen]
        parameter.requires_grad_(is_projector or trains_it)


def check_preset(preset: str, peers: Sequence[str], image_tokens: Sequence[int]) -> None:
    """Raises `ValueError` where one of these is unknown, or a picture is no square."""
    if preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}; there are {', '.join(map(repr, PRESETS))}")
    if unknown := set(peers) - set(PEERS):
        raise ValueError(f"`peers` has {sorted(unknown)}; there are {', '.join(map(repr, PEERS))}")
    check_squares(image_tokens)


def check_squares(image_tokens: Sequence[int]) -> None:
    """Raises `ValueError` where a picture of so many tokens is no square."""
    if odd := [number for number in image_tokens if isqrt(number) ** 2 != number]:
        raise ValueError(f"`image_tokens` has {odd}; expected square numbers, as pictures are square")
