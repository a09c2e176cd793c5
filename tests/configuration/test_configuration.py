"""The configuration: what it derives, what it refuses, and that it comes back from disk as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BERT, GPT2, LLAMA, SIGLIP, VIT, small_config, small_model
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    ConvNextV2Config,
    Dinov2Config,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    ResNetConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.utils import ModelOutput

from duostream import DuoStreamConfig, DuoStreamForConditionalGeneration, train_tokenizer
from duostream.configuration.configuration_duostream import PRESETS
from duostream.configuration.image_tokens_duostream import image_tokens

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 8}

CONFIGS = {
    "defaults": lambda: DuoStreamConfig(),
    "tiny": lambda: DuoStreamConfig.from_preset("tiny"),
    "base": lambda: DuoStreamConfig.from_preset("base"),
    "gpt2 and vit": lambda: small_config("gpt2", image_token_id=99, projector_type="linear"),
    "bert": lambda: small_config("bert", vision_feature_layer=1),
    "untied": lambda: small_config("llama", tie_word_embeddings=False, projector_hidden_size=7),
}


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields but the folder that the config was read from."""
    fields = config.to_dict()
    fields.pop("_name_or_path", None)
    return fields


def num_parameters(config: DuoStreamConfig) -> int:
    with torch.device("meta"):
        model = DuoStreamForConditionalGeneration(config)
    return sum(weight.numel() for weight in model.parameters())


def test_the_defaults_are_a_llama_beside_a_siglip_below_a_llama() -> None:
    config = DuoStreamConfig()
    types = [config.text_config.model_type, config.vision_config.model_type, config.fusion_stack_config.model_type]
    assert types == ["llama", "siglip_vision_model", "llama"]
    assert config.image_seq_length == (config.vision_config.image_size // config.vision_config.patch_size) ** 2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_config_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DuoStreamConfig
    assert fields_of(loaded) == fields_of(config)
    for sub_config in ("text_config", "vision_config", "fusion_stack_config"):
        assert type(getattr(loaded, sub_config)) is type(getattr(config, sub_config))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_from_its_dict(name: str) -> None:
    config = CONFIGS[name]()
    assert DuoStreamConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


def test_making_a_config_leaves_the_given_sub_configs_as_they_were() -> None:
    text, vision, fusion = dict(LLAMA), dict(SIGLIP), LlamaConfig(**{**LLAMA, "num_hidden_layers": 3})
    before = fusion.to_dict()
    DuoStreamConfig(text_config=text, vision_config=vision, fusion_stack_config=fusion)
    assert (text, vision, fusion.to_dict()) == (LLAMA, SIGLIP, before)


@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_two_configs_of_a_preset_share_nothing(preset: str) -> None:
    first = DuoStreamConfig.from_preset(preset)
    first.text_config.hidden_size = 1
    first.vision_config.image_size = 1
    assert DuoStreamConfig.from_preset(preset).text_config.hidden_size > 1
    assert DuoStreamConfig.from_preset(preset).vision_config.image_size > 1


@pytest.mark.parametrize(("preset", "millions"), [("tiny", (0.5, 5)), ("base", (180, 220))])
def test_a_preset_is_as_large_as_it_says(preset: str, millions: tuple[float, float]) -> None:
    least, most = millions
    assert least < num_parameters(DuoStreamConfig.from_preset(preset)) / 1e6 < most


@pytest.mark.parametrize("config", [*map(DuoStreamConfig.from_preset, PRESETS), DuoStreamConfig()])
def test_an_answer_ends_with_the_end_of_a_trained_tokenizer_and_not_with_the_placeholder(
    config: DuoStreamConfig,
) -> None:
    tokenizer = train_tokenizer([], 300)
    generation_config = GenerationConfig.from_model_config(config)
    assert generation_config.eos_token_id == tokenizer.eos_token_id != config.image_token_id
    assert generation_config.bos_token_id == tokenizer.bos_token_id


def test_a_preset_takes_a_vocabulary_and_single_fields() -> None:
    config = DuoStreamConfig.from_preset("tiny", vocab_size=300, text_config={"num_hidden_layers": 2})
    assert config.text_config.vocab_size == config.fusion_stack_config.vocab_size == 300
    assert config.text_config.num_hidden_layers == 2
    assert config.text_config.hidden_size == DuoStreamConfig.from_preset("tiny").text_config.hidden_size


def test_a_whole_sub_config_replaces_that_of_the_preset() -> None:
    vision = {**SIGLIP, "image_size": 32}
    config = DuoStreamConfig.from_preset("tiny", vision_config=vision)
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.image_seq_length == 16


@pytest.mark.parametrize(
    ("vision", "tokens", "width"),
    [
        (SiglipVisionConfig(**SIGLIP), 4, 24),
        (ViTConfig(**VIT), 5, 24),  # a class token
        (CLIPVisionConfig(**VIT), 5, 24),
        (
            Dinov2Config(image_size=28, patch_size=14, hidden_size=24, num_hidden_layers=1, num_attention_heads=4),
            5,
            24,
        ),
        (ConvNextV2Config(image_size=64, hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1]), 4, 12),
        (ResNetConfig(**RESNET, image_size=48), 36, 16),
        (ResNetConfig(**RESNET, image_size=[48, 32]), 24, 16),
    ],
    ids=["siglip", "vit", "clip", "dinov2", "convnextv2", "resnet", "resnet, not square"],
)
def test_number_and_width_of_image_tokens_are_derived(vision: PreTrainedConfig, tokens: int, width: int) -> None:
    config = DuoStreamConfig(text_config=LLAMA, vision_config=vision, fusion_stack_config=LLAMA)
    assert (config.image_seq_length, config.image_hidden_size) == (tokens, width)


@pytest.mark.parametrize(
    ("vision", "tokens", "width"),
    [
        (SiglipVisionConfig(**SIGLIP), 1, 96),
        (SiglipVisionConfig(**{**SIGLIP, "image_size": 32}), 4, 96),
        (ResNetConfig(**RESNET, image_size=[48, 32]), 6, 64),
    ],
    ids=["siglip", "siglip, larger", "resnet, not square"],
)
def test_merged_tokens_are_fewer_and_wider(vision: PreTrainedConfig, tokens: int, width: int) -> None:
    config = DuoStreamConfig(text_config=LLAMA, vision_config=vision, fusion_stack_config=LLAMA, spatial_merge_size=2)
    assert (config.image_seq_length, config.image_hidden_size) == (tokens, width)


@pytest.mark.parametrize("kind", ["map", "sequence"])
def test_a_merged_token_is_its_square_of_neighbours(kind: str) -> None:
    features = torch.randn(2, 3, 4, 6)  # (num_images, channels, rows, columns)
    states = features if kind == "map" else features.flatten(2).transpose(1, 2)
    tokens = image_tokens(ModelOutput(last_hidden_state=states), spatial_merge_size=2, grid=(4, 6))
    for row in range(2):
        for column in range(3):
            square = features[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # (2, channels, 2, 2)
            assert torch.equal(tokens[:, 3 * row + column], square.flatten(1))


def test_tokens_of_an_inner_layer_are_counted_there() -> None:
    config = DuoStreamConfig(vision_config=ResNetConfig(**RESNET, image_size=48), vision_feature_layer=1)
    assert (config.image_seq_length, config.image_hidden_size) == (144, 8)  # one halving and one layer earlier


def test_of_several_layers_each_token_has_all_states_of_its_place() -> None:
    large, small = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)  # (num_images, channels, rows, columns)
    outputs = ModelOutput(last_hidden_state=small, hidden_states=(large, small))
    tokens = image_tokens(outputs, [0, -1])
    for row in range(2):
        for column in range(3):
            square = large[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # (2, channels, 2, 2)
            place = torch.cat([square.flatten(1), small[:, :, row, column]], dim=1)
            assert torch.equal(tokens[:, 3 * row + column], place)
    lower, upper = torch.randn(2, 6, 4), torch.randn(2, 6, 4)  # (num_images, tokens, width)
    states = ModelOutput(last_hidden_state=upper, hidden_states=(lower, upper))
    assert torch.equal(image_tokens(states, [0, -1]), torch.cat([lower, upper], dim=2))


def test_layers_that_do_not_go_side_by_side_are_refused() -> None:
    outputs = ModelOutput(last_hidden_state=torch.zeros(1, 5, 2, 3), hidden_states=(torch.zeros(1, 3, 5, 6),))
    with pytest.raises(ValueError, match="layers of 5 x 6 and 2 x 3 tokens, which can't be laid side by side"):
        image_tokens(outputs, [0, -1])
    outputs = ModelOutput(last_hidden_state=torch.zeros(1, 4, 5), hidden_states=(torch.zeros(1, 8, 5),))
    with pytest.raises(ValueError, match="layers of 8 and 4 tokens, which can't be laid side by side"):
        image_tokens(outputs, [0, -1])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"text_config": {**LLAMA, "hidden_size": 64}, "fusion_stack_config": LLAMA},
            ["text_config.hidden_size", "64", "fusion_stack_config.hidden_size", "32"],
        ),
        (
            {"projector_type": "none", "text_config": LLAMA, "fusion_stack_config": LLAMA},
            ["vision_config", "24", "fusion_stack_config.hidden_size", "32", "projector_type"],
        ),
        ({"text_config": {"model_type": "lama"}}, ["text_config.model_type", "lama"]),
        ({"vision_config": {"model_type": "siglap"}}, ["vision_config.model_type", "siglap"]),
        ({"fusion_stack_config": {"model_type": "lama"}}, ["fusion_stack_config.model_type", "lama"]),
        ({"fusion_config": {"model_type": "lama"}}, ["fusion_stack_config.model_type", "lama"]),
        (
            {"vision_config": {**SIGLIP, "image_size": 30}},
            ["vision_config.image_size", "30", "vision_config.patch_size", "8"],
        ),
        ({"vision_config": {**VIT, "image_size": [32, 30]}}, ["vision_config.image_size", "vision_config.patch_size"]),
        ({"vision_config": RESNET}, ["vision_config.image_size", "resnet"]),
        (
            {"text_config": MISTRAL, "fusion_stack_config": {**MISTRAL, "sliding_window": 9}},
            ["text_config.sliding_window", "fusion_stack_config.sliding_window", "8", "9"],
        ),
        ({"image_token_id": -1}, ["image_token_id", "-1"]),
        ({"vision_feature_layer": 9}, ["vision_feature_layer", "9"]),
        ({"vision_feature_layer": [0, 9]}, ["vision_feature_layer", "9"]),
        ({"vision_feature_layer": []}, ["vision_feature_layer", "no layers"]),
        ({"spatial_merge_size": 0}, ["spatial_merge_size", "0"]),
        ({"spatial_merge_size": 2, "vision_config": VIT}, ["spatial_merge_size", "5 tokens", "class token"]),
        (
            {"spatial_merge_size": 2, "vision_config": {**SIGLIP, "image_size": 24}},
            ["spatial_merge_size", "2", "3 x 3 tokens"],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else ", ".join(value),
)
def test_parts_that_do_not_fit_are_refused_by_name(fields: dict[str, Any], named: list[str]) -> None:
    if "text_config" not in fields:
        fields = {"vision_config": SIGLIP, **fields}
    else:
        fields = {"vision_config": SIGLIP, "fusion_stack_config": {}, **fields}
    with pytest.raises(ValueError) as error:
        DuoStreamConfig(**fields)
    for name in named:
        assert name in str(error.value)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"preset.*'huge'.*'tiny'.*'base'"):
        DuoStreamConfig.from_preset("huge")


def test_equal_widths_need_no_projector() -> None:
    config = small_config("llama", vision_config={**SIGLIP, "hidden_size": 32}, projector_type="none")
    assert config.image_hidden_size == config.fusion_stack_config.hidden_size


@pytest.mark.parametrize("fusion", [GPT2, LlamaConfig(**LLAMA)], ids=["a dict", "a config"])
def test_fusion_config_is_another_name_for_the_fusion_stack(fusion: Any) -> None:
    config = DuoStreamConfig(text_config=LLAMA, vision_config=SIGLIP, fusion_config=fusion)
    expected = fusion["model_type"] if isinstance(fusion, dict) else fusion.model_type
    assert config.fusion_stack_config.model_type == expected
    assert config.fusion_stack_config.num_hidden_layers == 2
    preset = DuoStreamConfig.from_preset(
        "tiny", text_config=LLAMA, fusion_config=fusion if isinstance(fusion, dict) else fusion.to_dict()
    )
    assert preset.fusion_stack_config.model_type == expected


@pytest.mark.parametrize("switches", [{"x": True}, {"x": {"scope": "all"}}, {}], ids=["switch", "options", "empty"])
def test_the_librarys_own_fusion_config_is_not_taken_for_a_stack(switches: dict, tmp_path: Path) -> None:
    config = small_config("llama", fusion_config=switches)
    assert config.fusion_stack_config.to_dict() == small_config("llama").fusion_stack_config.to_dict()
    config.save_pretrained(tmp_path)
    assert fields_of(AutoConfig.from_pretrained(tmp_path)) == fields_of(config)


def test_the_cache_sees_the_layers_of_both_stacks_the_fusion_stack_first() -> None:
    # Layers of different kinds tell the order
    mistral = {**MISTRAL, "num_hidden_layers": 3}
    config = DuoStreamConfig(text_config=mistral, vision_config=SIGLIP, fusion_stack_config=LLAMA)
    decoder = config.get_text_config(decoder=True)
    assert decoder.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    assert (decoder.num_hidden_layers, decoder.sliding_window) == (5, 8)
    assert len(DynamicCache(config=config).layers) == 5
    assert config.fusion_stack_config.num_hidden_layers == 2  # a copy was extended
    assert config.get_text_config() is config.text_config


@pytest.mark.parametrize("stored", [True, False, None])
def test_what_checkpoints_said_before_of_image_states_is_understood(stored: bool | None) -> None:
    fields = {} if stored is None else {"update_image_states": stored}
    config = DuoStreamConfig.from_dict({**small_config().to_dict(), **fields})
    assert config.num_image_update_layers == (0 if stored is False else None)
    assert "update_image_states" not in config.to_dict()


@pytest.mark.parametrize("own", [16, [16, 16]])
def test_a_picture_s_size_is_stored_where_it_is_not_the_vision_models_own(own: int | list[int]) -> None:
    vision_config = {**VIT, "image_size": own}
    assert small_config(vision_config=vision_config, image_size=16).image_size is None
    config = small_config(vision_config=vision_config, image_size=[24, 32])
    assert config.image_size == [24, 32] and config.image_seq_length == 1 + 3 * 4
    assert DuoStreamConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    merged = small_config(vision_config=SIGLIP, image_size=32, spatial_merge_size=2)
    assert merged.image_seq_length == 4


def test_another_size_of_pictures_than_a_checkpoint_has_tokens_for_is_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`image_size` 32 x 32 gives 16 tokens .* but `image_seq_length` is 4"):
        DuoStreamForConditionalGeneration.from_pretrained(tmp_path, image_size=32)
    with pytest.raises(ValueError, match=r"`image_size` 20 x 20 is not divided by `vision_config\.patch_size` 8"):
        DuoStreamForConditionalGeneration.from_pretrained(tmp_path, image_size=20)
    with pytest.raises(ValueError, match=r"`image_size` 16 x 16 gives 4 tokens .* but `image_seq_length` is 16"):
        small_config(image_size=16, image_seq_length=16)
    model = DuoStreamForConditionalGeneration.from_pretrained(tmp_path, image_size=32, image_seq_length=16)
    assert model.get_image_features(torch.zeros(1, 3, 32, 32)).pooler_output.shape[1] == 16


@pytest.mark.parametrize(
    ("field", "value"), [("num_image_update_layers", 3), ("num_image_update_layers", -1), ("loss_chunk_size", -5)]
)
def test_a_field_that_is_out_of_range_is_refused_when_a_model_is_loaded(
    field: str, value: int, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is {value}"):
        small_config(**{field: value})
    DuoStreamForConditionalGeneration(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{field}` is {value}"):
        DuoStreamForConditionalGeneration.from_pretrained(tmp_path, **{field: value})


def test_an_encoders_states_are_not_cached() -> None:
    config = small_config("bert")
    assert not config.is_text_causal
    assert config.get_text_config(decoder=True).num_hidden_layers == config.fusion_stack_config.num_hidden_layers


@pytest.mark.parametrize(
    ("text", "causal"),
    [
        (LLAMA, True),
        (GPT2, True),
        (BERT, False),
        ({**BERT, "is_decoder": True}, True),
        ({**MISTRAL, "model_type": "gemma3_text", "use_bidirectional_attention": True}, False),
    ],
    ids=["llama", "gpt2", "bert", "bert as a decoder", "gemma3, both ways"],
)
def test_a_config_knows_whether_its_text_stream_looks_ahead(text: dict, causal: bool) -> None:
    config = DuoStreamConfig(text_config=text, vision_config=SIGLIP, fusion_stack_config=LLAMA)
    assert config.is_text_causal is causal


def test_windows_of_equal_size_may_share_a_cache() -> None:
    config = DuoStreamConfig(
        text_config=MISTRAL,
        vision_config=SIGLIP,
        fusion_stack_config=MistralConfig(**{k: v for k, v in MISTRAL.items() if k != "model_type"}),
    )
    assert config.get_text_config(decoder=True).layer_types == ["sliding_attention"] * 4


@pytest.mark.parametrize("kind", [dict, LlamaConfig])
def test_a_presets_vocabulary_is_that_of_a_stack_that_replaces_its_own(kind: type) -> None:
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 500}
    given = LlamaConfig(**fields) if kind is LlamaConfig else {"model_type": "llama", **fields}
    config = DuoStreamConfig.from_preset("tiny", vocab_size=300, text_config=given, fusion_stack_config=given)
    assert config.text_config.vocab_size == config.fusion_stack_config.vocab_size == 300
    assert (given if kind is dict else given.to_dict())["vocab_size"] == 500
