"""Small configs of the library's own types, by the names that people know them by."""

from collections.abc import Callable
from typing import Any

import transformers
from tiny_models import VOCAB_SIZE
from transformers import PreTrainedConfig

NUM_LAYERS = 4

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MANY = {**COMMON, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
OPT = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | {"ffn_dim": 48}
GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
}

FULL: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**MANY),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    # Every fourth layer without positions, which must stay where it was
    "smollm3": lambda: transformers.SmolLM3Config(**COMMON, num_key_value_heads=2, no_rope_layers=[1, 0, 1, 0]),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED),
    "phi3": lambda: transformers.Phi3Config(**COMMON, num_key_value_heads=2),
    "opt": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=32),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
}
SLIDING: dict[str, Callable[[], PreTrainedConfig]] = {
    # Layers of both kinds, in an order that differs between the two halves
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=8),
}
TEXTS = FULL | SLIDING
ENCODERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**COMMON),
    "roberta": lambda: transformers.RobertaConfig(**COMMON),
    "modernbert": lambda: transformers.ModernBertConfig(**COMMON, local_attention=8),
}

SMALL_VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VISION |= {"image_size": 16, "patch_size": 8}
VISIONS: dict[str, Callable[[], PreTrainedConfig]] = {
    "siglip": lambda: transformers.SiglipVisionConfig(**SMALL_VISION),
    "clip": lambda: transformers.CLIPVisionConfig(**SMALL_VISION),
    "vit": lambda: transformers.ViTConfig(**SMALL_VISION),
    "dinov2": lambda: transformers.Dinov2Config(
        **{key: value for key, value in SMALL_VISION.items() if key != "intermediate_size"}, mlp_ratio=2
    ),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersConfig(
        **{key: value for key, value in SMALL_VISION.items() if key != "intermediate_size"}, mlp_ratio=2
    ),
    "mobilenet": lambda: transformers.MobileNetV1Config(depth_multiplier=0.25, min_depth=8, image_size=64),
    "mobilenet v2": lambda: transformers.MobileNetV2Config(depth_multiplier=0.25, min_depth=8, image_size=64),
    "convnextv2": lambda: transformers.ConvNextV2Config(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=64
    ),
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
    "regnet": lambda: transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, image_size=48
    ),
    "swin": lambda: transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "beit": lambda: transformers.BeitConfig(**SMALL_VISION),
    "dinov3": lambda: transformers.DINOv3ViTConfig(
        **{**SMALL_VISION, "num_attention_heads": 3}, num_register_tokens=2
    ),
    "a whole siglip": lambda: transformers.SiglipConfig(
        text_config={**SMALL_VISION, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=SMALL_VISION,
    ),
    "a whole clip": lambda: transformers.CLIPConfig(
        text_config={**SMALL_VISION, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=SMALL_VISION,
    ),
}
# Takes more than pixels: patches of pictures of any shape
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "siglip2": lambda: transformers.Siglip2VisionConfig(
        **{key: value for key, value in SMALL_VISION.items() if key != "image_size"}, num_patches=4
    ),
}
