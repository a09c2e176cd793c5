"""A model made of pretrained backbones does what they did, and backbones that can't be used say why."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import (
    COMMON,
    EXPERTS,
    FULL,
    GPT2,
    GROUPED,
    MANY,
    NUM_LAYERS,
    OPT,
    SLIDING,
    SMALL_VISION,
    TEXTS,
    VISIONS,
)
from tiny_models import LLAMA, PICTURE, VOCAB_SIZE, Row, batch, difference, places, roughen, small_config
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from duostream import (
    DuoStreamConfig,
    DuoStreamForConditionalGeneration,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
)

CLOSE = 2e-4
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a random checkpoint to disk, once, and says where it is."""
    root = tmp_path_factory.mktemp("backbones")

    def write(name: str) -> Path:
        path = root / name.replace(" ", "_").replace(",", "")
        if not path.exists():
            torch.manual_seed(0)
            if name in TEXTS:
                model = AutoModelForCausalLM.from_config(TEXTS[name]())
            elif name == "bert":
                model = AutoModel.from_config(transformers.BertConfig(**COMMON))
            else:
                model = AutoModel.from_config(VISIONS[name]())
            roughen(model, scale=0.1).save_pretrained(path)
        return path

    return write


def compose(folder: Callable[[str], Path], text: str = "llama", vision: str = "siglip", **kwargs: Any) -> Any:
    arguments = {"num_fusion_layers": 2, **kwargs}
    model = DuoStreamForConditionalGeneration.from_backbones(folder(text), folder(vision), **arguments).eval()
    # A row that ends early could not be compared token by token
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).logits


@pytest.mark.parametrize(
    # Either stack may be the deeper one
    ("text", "num_fusion_layers"),
    [(text, 1 + 2 * (i % 2)) for i, text in enumerate(TEXTS)] + [("smollm3", 1), ("gemma3", 1)],
)
def test_text_alone_gives_exactly_the_backbones_logits(
    text: str, num_fusion_layers: int, folder: Callable[[str], Path]
) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(folder(text)).eval()
    model = compose(folder, text, num_fusion_layers=num_fusion_layers)
    ids = torch.randint(3, VOCAB_SIZE, (3, 20))  # longer than the sliding windows
    mask = torch.ones_like(ids)
    mask[0, 11:] = mask[1, 19:] = 0
    for use_cache in (True, False):
        ours, theirs = (logits(m, {"input_ids": ids}, use_cache=use_cache) for m in (model, backbone))
        assert difference(ours, theirs) == 0.0
        padded = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache}
        ours, theirs = (logits(m, padded)[mask.bool()] for m in (model, backbone))
        assert difference(ours, theirs) == 0.0
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    left = {"input_ids": ids, "attention_mask": mask.flip(1)}
    assert torch.equal(model.generate(**left, **settings), backbone.generate(**left, **settings))


@pytest.mark.parametrize("text", TEXTS)
def test_a_backbones_weights_are_the_models_and_only_the_projector_is_new(
    text: str, folder: Callable[[str], Path]
) -> None:
    torch.manual_seed(1)
    first = compose(folder, text)
    torch.manual_seed(2)
    second = compose(folder, text)
    drawn = [name for name, weight in first.named_parameters() if not torch.equal(weight, second.get_parameter(name))]
    assert drawn and all(name.startswith("model.projector.") for name in drawn)
    backbone = AutoModelForCausalLM.from_pretrained(folder(text))
    streams = [first.model.text_model, first.model.fusion_model, first.lm_head]
    weights = {id(weight): weight for stream in streams for weight in stream.parameters()}
    assert sum(weight.numel() for weight in weights.values()) == sum(
        weight.numel() for weight in backbone.parameters()
    )


def test_the_lower_half_of_the_fusion_layers_updates_image_tokens_unless_it_is_told(
    folder: Callable[[str], Path],
) -> None:
    for num_fusion_layers, expected in ((1, 1), (2, 1), (3, 2)):
        model = compose(folder, num_fusion_layers=num_fusion_layers)
        assert model.config.num_image_update_layers == expected
    for told in (0, 2, None):
        assert compose(folder, num_image_update_layers=told).config.num_image_update_layers == told
    # A classifier averages all states, and of pictures it would have few
    text, vision = folder("llama"), folder("siglip")
    model = DuoStreamForSequenceClassification.from_backbones(text, vision, num_fusion_layers=2)
    assert model.config.num_image_update_layers is None
    # Where layers can't leave states out, all make all
    neo = AutoModelForCausalLM.from_config(OTHERS["gpt_neo"][1]())
    model = DuoStreamForConditionalGeneration.from_backbones(neo, folder("siglip"), num_fusion_layers=2)
    assert model.config.num_image_update_layers is None


def test_experts_that_are_to_be_balanced_by_a_loss_of_their_own_are_refused(folder: Callable[[str], Path]) -> None:
    config = OTHERS["mixtral"][1]()
    config.output_router_logits = True
    language = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="`output_router_logits=True`"):
        DuoStreamForConditionalGeneration.from_backbones(language, folder("siglip"), num_fusion_layers=1)


def test_what_ends_an_answer_is_what_ended_the_language_models() -> None:
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED))
    vision = AutoModel.from_config(VISIONS["siglip"]())
    # Instruct models have the token that ends a turn there alone
    language.generation_config.eos_token_id = [1, 7]
    model = DuoStreamForConditionalGeneration.from_backbones(language, vision, num_fusion_layers=2)
    assert model.generation_config.eos_token_id == [1, 7]
    model.generation_config.eos_token_id.append(3)
    assert language.generation_config.eos_token_id == [1, 7]


def test_what_ends_an_answer_is_kept_by_heads_that_write_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**GROUPED, "pad_token_id": 0}))
    vision = AutoModel.from_config(VISIONS["siglip"]())
    language.generation_config.eos_token_id = [1, 7]
    language.generation_config.pad_token_id = None
    model = DuoStreamForPreTraining.from_backbones(language, vision, num_fusion_layers=2)
    model.save_pretrained(tmp_path)
    writer = DuoStreamForConditionalGeneration.from_pretrained(tmp_path)
    assert writer.generation_config.eos_token_id == [1, 7]
    assert writer.get_input_embeddings().padding_idx == model.get_input_embeddings().padding_idx == 0


def test_an_encoder_that_takes_no_mask_is_refused(folder: Callable[[str], Path]) -> None:
    fnet = AutoModel.from_config(
        transformers.FNetConfig(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="`text` of type 'fnet' takes no `attention_mask`"):
        DuoStreamForSequenceClassification.from_backbones(fnet, folder("siglip"), fusion_config=LLAMA)


def test_a_new_fusion_stack_says_nothing_of_what_ends_an_answer() -> None:
    assert transformers.LlamaConfig().eos_token_id == 2 != COMMON["eos_token_id"]
    fusion = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = DuoStreamForConditionalGeneration(small_config("gpt2", fusion_stack_config=fusion))
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id == 1


@pytest.mark.parametrize("text", TEXTS)
def test_a_composed_model_comes_back_from_disk(text: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = compose(folder, text)
    row = Row(model, 2, PICTURE, 5)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded, row.inputs), logits(model, row.inputs))
    tied = AutoModelForCausalLM.from_pretrained(folder(text)).config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert loaded.config.image_token_id == VOCAB_SIZE  # no row of the embeddings changes its meaning


@pytest.mark.parametrize("text", FULL)
def test_pictures_anywhere_give_the_same_with_a_cache_and_without(text: str, folder: Callable[[str], Path]) -> None:
    model = compose(folder, text)
    rows = [Row(model, PICTURE, 9), Row(model, 5, PICTURE, 7), Row(model, 15), Row(model, PICTURE, 3, PICTURE, 4)]
    for side in ("left", "right"):
        together = {use_cache: logits(model, batch(rows, side), use_cache=use_cache) for use_cache in (True, False)}
        for i, place in places(rows, side):
            alone = logits(model, rows[i].inputs, use_cache=False)[0]
            for use_cache in (True, False):
                assert difference(together[use_cache][i, place], alone) < CLOSE
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    inputs = batch(rows)
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    static = model.generate(**inputs, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, cached)
    for tokens, row in zip(cached, rows, strict=True):
        alone = model.generate(**row.inputs, **settings, use_cache=False)
        assert torch.equal(tokens[-NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("text", SLIDING)
def test_a_window_slides_over_text_and_pictures_with_a_cache_as_without(
    text: str, folder: Callable[[str], Path]
) -> None:
    model = compose(folder, text)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for parts in ((20,), (PICTURE, 12), (10, PICTURE, 4), (3, PICTURE, 5, PICTURE, 12)):
        row = Row(model, *parts)
        cached, uncached = (logits(model, row.inputs, use_cache=use_cache) for use_cache in (True, False))
        assert difference(cached, uncached) < CLOSE
        expected = model.generate(**row.inputs, **settings, use_cache=False)
        assert torch.equal(model.generate(**row.inputs, **settings), expected)
        static = model.generate(**row.inputs, **settings, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)


@pytest.mark.parametrize("text", SLIDING)
def test_a_window_slides_over_a_batch_without_a_cache(text: str, folder: Callable[[str], Path]) -> None:
    model = compose(folder, text)
    rows = [Row(model, PICTURE, 9), Row(model, 12, PICTURE, 5), Row(model, 25), Row(model, PICTURE, 3, PICTURE, 12)]
    for side in ("left", "right"):
        together = logits(model, batch(rows, side), use_cache=False)
        for i, place in places(rows, side):
            assert difference(together[i, place], logits(model, rows[i].inputs, use_cache=False)[0]) < CLOSE


@pytest.mark.parametrize("text", SLIDING)
def test_a_window_slides_over_a_batch_with_pictures_in_front(text: str, folder: Callable[[str], Path]) -> None:
    model = compose(folder, text)
    rows = [Row(model, PICTURE, 14), Row(model, PICTURE, 9)]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(**batch(rows), **settings)
    for tokens, row in zip(together, rows, strict=True):
        assert torch.equal(tokens[-12:], model.generate(**row.inputs, **settings, use_cache=False)[0, -12:])


@pytest.mark.parametrize("text", SLIDING)
def test_a_window_and_pictures_at_different_places_are_refused_with_a_cache(
    text: str, folder: Callable[[str], Path]
) -> None:
    # A cached window counts slots, and the row with the picture in its midst has empty ones
    model = compose(folder, text)
    inputs = batch([Row(model, PICTURE, 12), Row(model, 8, PICTURE, 4)])
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        model.generate(**inputs, max_new_tokens=NEW)


def test_gpt_neos_local_layers_have_windows_too(folder: Callable[[str], Path]) -> None:
    neo = AutoModelForCausalLM.from_config(OTHERS["gpt_neo"][1]())
    model = DuoStreamForConditionalGeneration.from_backbones(neo, folder("siglip"), num_fusion_layers=2).eval()
    rows = [Row(model, PICTURE, 12), Row(model, 8, PICTURE, 4)]
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        model.generate(**batch(rows), max_new_tokens=NEW)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "use_cache": False}
    for tokens, row in zip(model.generate(**batch(rows), **settings), rows, strict=True):
        assert torch.equal(tokens[-NEW:], model.generate(**row.inputs, **settings)[0, -NEW:])


def test_a_window_that_the_text_outgrows_while_it_is_written_is_refused_then(folder: Callable[[str], Path]) -> None:
    model = compose(folder, "mistral")
    rows = [Row(model, PICTURE, 3), Row(model, 2, PICTURE, 1)]
    settings: dict[str, Any] = {"do_sample": False}
    together = model.generate(**batch(rows), **settings, max_new_tokens=2)
    for tokens, row in zip(together, rows, strict=True):
        alone = model.generate(**row.inputs, **settings, max_new_tokens=2, use_cache=False)
        assert torch.equal(tokens[-2:], alone[0, -2:])
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        model.generate(**batch(rows), **settings, max_new_tokens=12)


@pytest.mark.parametrize(
    "fusion",
    # Phi's head, which has a bias, is not taken over
    [LLAMA, transformers.LlamaConfig(**GROUPED), transformers.PhiConfig(**COMMON)],
    ids=["a dict", "a config", "phi"],
)
def test_an_encoder_takes_a_fusion_stack_of_its_own(fusion: Any, folder: Callable[[str], Path]) -> None:
    model = compose(folder, "bert", num_fusion_layers=None, fusion_config=fusion)
    assert model.config.text_config.is_decoder  # it would see the text it is to write
    bert = AutoModel.from_pretrained(folder("bert"), is_decoder=True).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 9))
    with torch.no_grad():
        states = model.model.text_model(ids).last_hidden_state
        assert torch.equal(states, bert(ids).last_hidden_state)
    rows = [Row(model, PICTURE, 9), Row(model, 5, PICTURE, 7), Row(model, 12)]
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    together = model.generate(**batch(rows), **settings)
    for tokens, row in zip(together, rows, strict=True):
        assert torch.equal(tokens[-NEW:], model.generate(**row.inputs, **settings, use_cache=False)[0, -NEW:])


def test_a_model_without_a_head_keeps_the_encoder_an_encoder(folder: Callable[[str], Path]) -> None:
    model = DuoStreamModel.from_backbones(folder("bert"), folder("siglip"), fusion_config=LLAMA).eval()
    assert not model.config.is_text_causal
    bert = AutoModel.from_pretrained(folder("bert")).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 9))
    with torch.no_grad():
        assert torch.equal(model.text_model(ids).last_hidden_state, bert(ids).last_hidden_state)


def test_a_type_that_reads_both_ways_by_default_is_made_a_decoder_to_write(folder: Callable[[str], Path]) -> None:
    text = AutoModel.from_config(transformers.BertGenerationConfig(**COMMON))
    model = DuoStreamForConditionalGeneration.from_backbones(text, folder("siglip"), fusion_config=LLAMA).eval()
    ids = torch.randint(3, VOCAB_SIZE, (1, 9))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 5) % VOCAB_SIZE
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt"])
def test_a_decoder_may_be_kept_whole_under_a_new_fusion_stack(text: str, folder: Callable[[str], Path]) -> None:
    model = compose(folder, text, num_fusion_layers=None, fusion_config=LLAMA)
    assert model.config.text_config.num_hidden_layers == NUM_LAYERS
    backbone = AutoModelForCausalLM.from_pretrained(folder(text))
    for name, weight in backbone.base_model.named_parameters():
        if "norm" not in name.split(".")[-2] and "ln_f" not in name:
            assert torch.equal(model.model.text_model.get_parameter(name), weight), name
    assert torch.equal(model.lm_head.weight, backbone.get_output_embeddings().weight)
    row = Row(model, 2, PICTURE, 3)
    assert difference(logits(model, row.inputs), logits(model, row.inputs, use_cache=False)) < CLOSE


@pytest.mark.parametrize("vision", VISIONS)
def test_image_features_are_the_vision_models_own_last_states(vision: str, folder: Callable[[str], Path]) -> None:
    model = compose(folder, vision=vision, image_size=48 if vision == "resnet" else None)
    own = AutoModel.from_pretrained(folder(vision)).eval()
    own = getattr(own, "vision_model", own)
    size, L = model.config.vision_config.image_size, model.config.image_seq_length
    pictures = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = own(pixel_values=pictures).last_hidden_state
        if expected.ndim == 4:  # a feature map, read like a page
            height, width = expected.shape[2:]
            expected = torch.stack([expected[:, :, y, x] for y in range(height) for x in range(width)], dim=1)
        got = model.get_image_features(pictures)
    # Pictures come in channels-last, where kernels of convolutions may round otherwise
    torch.testing.assert_close(got.last_hidden_state, expected)
    assert got.pooler_output.shape == (2, L, 32)
    row = Row(model, 2, PICTURE, 3)
    assert logits(model, row.inputs).isfinite().all()


@pytest.mark.parametrize(
    "vision", ["siglip", "clip", "vit", "dinov2", "dinov2 with registers", "dinov3", "convnextv2"]
)
def test_pictures_may_have_another_size_than_the_vision_models_own(
    vision: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    size = 96 if vision == "convnextv2" else 32
    small, model = compose(folder, vision=vision), compose(folder, vision=vision, image_size=size)
    model.save_pretrained(tmp_path)
    model = DuoStreamForConditionalGeneration.from_pretrained(tmp_path).eval()
    own = AutoModel.from_pretrained(folder(vision)).eval()
    pictures = torch.randn(2, 3, size, size)
    takes_option = "interpolate_pos_encoding" in inspect.signature(own.forward).parameters
    with torch.no_grad():
        expected = own(pictures, **({"interpolate_pos_encoding": True} if takes_option else {})).last_hidden_state
        got = model.get_image_features(pictures)
    expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected
    torch.testing.assert_close(got.last_hidden_state, expected)
    assert got.pooler_output.shape[1] == model.config.image_seq_length > small.config.image_seq_length
    for name, weight in model.model.vision_model.state_dict().items():
        assert torch.equal(weight, own.get_parameter(name)), name
    with pytest.raises(ValueError, match=rf"{size} x {size} pixels \(`config.image_size`\)"):
        model.get_image_features(pictures[..., : size // 2, : size // 2])


def test_patches_of_pictures_of_no_size_of_their_own_are_read() -> None:
    # PoolFormer's config tells of patches, but of no size of pictures
    stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_encoder_blocks": 4}
    config = small_config(vision_config=transformers.PoolFormerConfig(**stages), image_size=64)
    model = DuoStreamForConditionalGeneration(config).eval()
    features = model.get_image_features(torch.randn(1, 3, 64, 64)).pooler_output
    assert features.shape[1] == config.image_seq_length
    with pytest.raises(ValueError, match=r"expected 64 x 64 pixels \(`config.image_size`\)"):
        model.get_image_features(torch.randn(1, 3, 32, 32))


def test_backbones_may_be_loaded_already(folder: Callable[[str], Path]) -> None:
    text = AutoModelForCausalLM.from_pretrained(folder("gpt2"))
    vision = AutoModel.from_pretrained(folder("a whole siglip"))
    before = {name: weight.clone() for name, weight in [*text.state_dict().items(), *vision.state_dict().items()]}
    torch.manual_seed(0)
    model = DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=2).eval()
    torch.manual_seed(0)
    from_disk = compose(folder, "gpt2", "a whole siglip")
    row = Row(model, 2, PICTURE, 3)
    assert torch.equal(logits(model, row.inputs), logits(from_disk, row.inputs))
    # They stay as they were
    for name, weight in [*text.state_dict().items(), *vision.state_dict().items()]:
        assert torch.equal(weight, before[name]), name
    assert text.config.num_hidden_layers == NUM_LAYERS
    assert AutoModelForCausalLM.from_config(text.config).config.n_layer == NUM_LAYERS


@pytest.mark.parametrize("quantized", ["text", "vision"])
@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "on disk"])
def test_a_quantized_backbone_is_refused(
    quantized: str, is_loaded: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    backbones: dict[str, Any] = {"text": folder("llama"), "vision": folder("siglip")}
    loader = AutoModelForCausalLM if quantized == "text" else AutoModel
    in_8_bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
    backbone = loader.from_pretrained(backbones[quantized], quantization_config=in_8_bits, device_map="cpu")
    if not is_loaded:
        backbone.save_pretrained(tmp_path)
    backbones[quantized] = backbone if is_loaded else tmp_path
    with pytest.raises(ValueError, match=rf"`{quantized}` is quantized.*`from_pretrained\(.*quantization_config"):
        DuoStreamForConditionalGeneration.from_backbones(**backbones, num_fusion_layers=2)


def whole_model(name: str) -> Any:
    """A model that has a language model and a vision tower of its own."""
    torch.manual_seed(0)
    parts = {"text_config": TEXTS["gemma3" if name == "gemma3" else "llama"](), "vision_config": VISIONS["siglip"]()}
    if name == "duostream":
        text, vision = (
            AutoModelForCausalLM.from_config(parts["text_config"]),
            AutoModel.from_config(VISIONS["siglip"]()),
        )
        return DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=2)
    if name == "gemma3":
        config = transformers.Gemma3Config(**parts, mm_tokens_per_image=4, image_token_index=5)
    elif name == "smolvlm":
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16}
        config = transformers.SmolVLMConfig(text_config=parts["text_config"], vision_config=vision, image_token_id=5)
    else:
        config = transformers.LlavaConfig(**parts, image_token_index=5, vision_feature_layer=-1)
    return roughen(AutoModelForImageTextToText.from_config(config), scale=0.1)


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "on disk"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "duostream"])
def test_the_vision_tower_of_a_whole_model_is_taken_with_its_weights(
    name: str, is_loaded: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = whole_model(name).eval()
    if not is_loaded:
        whole.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(folder("llama"))
    vision = whole if is_loaded else tmp_path
    model = DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=2).eval()
    pictures = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = whole.get_encoder("image")(pixel_values=pictures).last_hidden_state
        assert difference(model.get_image_features(pictures).last_hidden_state, expected) < CLOSE


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "on disk"])
@pytest.mark.parametrize("name", ["gemma3", "smolvlm"])
def test_the_language_model_of_a_whole_model_is_taken_with_its_weights(
    name: str, is_loaded: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = whole_model(name).eval()
    if not is_loaded:
        whole.save_pretrained(tmp_path)
    vision = AutoModel.from_pretrained(folder("siglip"))
    text = whole if is_loaded else tmp_path
    model = DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=2).eval()
    ids = {"input_ids": torch.arange(6, 20)[None]}
    assert difference(logits(model, ids), logits(whole, ids)) < CLOSE


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "on disk"])
@pytest.mark.parametrize("name", ["a classifier", "SAM"])
def test_a_vision_model_is_found_by_its_type(
    name: str, is_loaded: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    if name == "SAM":
        config = transformers.SamVisionConfig(**size, output_channels=8, window_size=2, global_attn_indexes=[1])
        vision = AutoModel.from_config(config)
    else:
        config = transformers.ViTConfig(**size, intermediate_size=48)
        vision = transformers.AutoModelForImageClassification.from_config(config)
    if not is_loaded:
        vision.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(folder("llama"))
    given = vision if is_loaded else tmp_path
    model = DuoStreamForConditionalGeneration.from_backbones(text, given, num_fusion_layers=2)
    for parameter, weight in model.model.vision_model.named_parameters():
        if "pool" not in parameter:
            assert torch.equal(vision.base_model.get_parameter(parameter), weight), parameter


def test_an_untied_head_is_shared_as_all_weights_are(folder: Callable[[str], Path]) -> None:
    text = AutoModelForCausalLM.from_pretrained(folder("llama"))
    model = DuoStreamForConditionalGeneration.from_backbones(text, folder("siglip"), num_fusion_layers=2)
    assert model.lm_head.weight.data_ptr() == text.lm_head.weight.data_ptr()


def test_a_duostream_is_no_language_model_to_compose_from(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="name the one it was composed from"):
        DuoStreamForConditionalGeneration.from_backbones(
            whole_model("duostream"), folder("siglip"), num_fusion_layers=1
        )


def test_weights_by_other_names_than_the_stacks_are_an_error(folder: Callable[[str], Path]) -> None:
    text = AutoModelForCausalLM.from_pretrained(folder("llama"))
    text.model.layers[0].self_attn = torch.nn.ModuleDict({"attention": text.model.layers[0].self_attn})
    with pytest.raises(
        ValueError, match=r"weights fewer than its config tells, as 'model\.text_model\.layers\.0\.self_attn"
    ):
        DuoStreamForConditionalGeneration.from_backbones(text, folder("siglip"), num_fusion_layers=2)


def test_a_tied_head_that_is_untied_is_a_matrix_of_its_own(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = compose(folder, "llama, tied", tie_word_embeddings=False)
    ids = {"input_ids": torch.arange(3, 9)[None]}
    before = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert difference(logits(DuoStreamForConditionalGeneration.from_pretrained(tmp_path).eval(), ids), before) == 0
    model.lm_head.weight.data.zero_()
    assert model.get_input_embeddings().weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=str)
def test_the_dtype_may_be_asked_for(dtype: Any, folder: Callable[[str], Path]) -> None:
    model = compose(folder, "llama", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    row = Row(model, 2, PICTURE, 3)
    assert logits(model, row.inputs).isfinite().all()


def test_other_fields_of_the_config_are_taken(folder: Callable[[str], Path]) -> None:
    model = compose(folder, image_token_id=7, projector_type="linear", vision_feature_layer=-2)
    config = model.config
    assert (config.image_token_id, config.projector_type, config.vision_feature_layer) == (7, "linear", -2)
    assert isinstance(config, DuoStreamConfig)


def test_dropout_of_embeddings_stays_in_the_text_stream(folder: Callable[[str], Path]) -> None:
    config = compose(folder, "gpt2").config
    assert config.text_config.embd_pdrop > 0
    assert config.fusion_stack_config.embd_pdrop == 0


class Unloadable:
    """Folders with a config and no weights: only an error that comes before they are looked for is the right one."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, config: PreTrainedConfig) -> Path:
        path = self.root / config.model_type
        config.save_pretrained(path)
        return path


@pytest.fixture
def unloadable(tmp_path: Path) -> Unloadable:
    return Unloadable(tmp_path)


def test_weights_that_are_not_there_are_an_error_of_another_kind(unloadable: Unloadable) -> None:
    # What the tests below would see if weights were looked for first
    with pytest.raises(OSError):
        DuoStreamForConditionalGeneration.from_backbones(
            unloadable(TEXTS["llama"]()), unloadable(VISIONS["siglip"]()), num_fusion_layers=2
        )


def bloom() -> PreTrainedConfig:
    return transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=4, n_head=4)


@pytest.mark.parametrize(
    ("text", "kwargs", "reason"),
    [
        (lambda: transformers.BertConfig(**COMMON), {"num_fusion_layers": 2}, r"bert.*no decoder.*fusion_config"),
        (TEXTS["llama"], {"num_fusion_layers": 4}, r"num_fusion_layers.* is 4; expected 1 to 3"),
        (TEXTS["llama"], {"num_fusion_layers": 0}, r"num_fusion_layers.* is 0; expected 1 to 3"),
        (TEXTS["llama"], {"num_fusion_layers": -1}, r"num_fusion_layers.* is -1; expected 1 to 3"),
        (TEXTS["llama"], {}, r"num_fusion_layers.*fusion_config"),
        (TEXTS["llama"], {"num_fusion_layers": 2, "fusion_config": LLAMA}, r"num_fusion_layers.*fusion_config"),
        (TEXTS["llama"], {"fusion_config": {**LLAMA, "hidden_size": 64}}, r"text_config.hidden_size.* 32 .* 64"),
        (lambda: transformers.ModernBertConfig(**COMMON), {"fusion_config": LLAMA}, r"modernbert.*both ways"),
        (
            lambda: transformers.GraniteConfig(**COMMON, embedding_multiplier=2.0),
            {"num_fusion_layers": 2},
            r"granite.*embedding_multiplier=2.0",
        ),
        (bloom, {"num_fusion_layers": 2}, r"bloom.*`position_ids`"),
        (
            lambda: transformers.MptConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=4, n_heads=4),
            {"fusion_config": LLAMA},
            r"mpt.*`position_ids`",
        ),
        (
            lambda: transformers.RoFormerConfig(**COMMON, is_decoder=True),
            {"fusion_config": LLAMA},
            r"roformer.*`position_ids`",
        ),
        (lambda: transformers.GitConfig(**COMMON), {"fusion_config": LLAMA}, r"'git'.*padded rows"),
        (
            lambda: transformers.TrOCRConfig(vocab_size=VOCAB_SIZE, d_model=32, decoder_layers=4),
            {"num_fusion_layers": 2},
            r"trocr.*no type that `AutoModel` builds",
        ),
        (lambda: transformers.OpenAIGPTConfig(**GPT2), {"fusion_config": LLAMA}, r"openai-gpt.*`past_key_values`"),
        (
            lambda: transformers.Qwen3NextConfig(**GROUPED, layer_types=["linear_attention", "full_attention"] * 2),
            {"fusion_config": LLAMA},
            r"`text` of type 'qwen3_next'.*linear_attention",
        ),
        (
            TEXTS["llama"],
            {"fusion_config": {**LLAMA, "model_type": "bert"}},
            r"`fusion_config` of type 'bert'.*decoder",
        ),
        (
            lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16),
            {"num_fusion_layers": 2},
            r"opt.*word_embed_proj_dim",
        ),
        (
            lambda: transformers.Qwen3NextConfig(**GROUPED, layer_types=["linear_attention", "full_attention"] * 2),
            {"num_fusion_layers": 2},
            r"qwen3_next.*linear_attention",
        ),
        (
            lambda: transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
            {"num_fusion_layers": 2},
            r"gpt2.*scale_attn_by_inverse_layer_idx=True",
        ),
        (lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4), {"num_fusion_layers": 2}, r"gptj.*bias"),
        (TEXTS["llama"], {"num_fusion_layers": 2, "projector_type": "none"}, r"projector_type"),
        (TEXTS["llama"], {"num_fusion_layers": 2, "image_size": 20}, r"`image_size` 20 x 20.*patch_size` 8"),
        (TEXTS["llama"], {"num_fusion_layers": 2, "image_size": [16]}, r"`image_size` is \[16\]; expected pixels"),
        (TEXTS["llama"], {"num_fusion_layers": 2, "vision_feature_layer": 9}, r"vision_feature_layer"),
    ],
)
def test_backbones_that_can_not_work_say_why_before_any_weight_is_loaded(
    text: Callable[[], PreTrainedConfig], kwargs: dict[str, Any], reason: str, unloadable: Unloadable
) -> None:
    folders = unloadable(text()), unloadable(VISIONS["siglip"]())
    with pytest.raises(ValueError, match=reason):
        DuoStreamForConditionalGeneration.from_backbones(*folders, **kwargs)


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        (VISIONS["resnet"], "resnet.*image_size"),
        (TEXTS["llama"], "vision"),
        (lambda: transformers.ViTConfig(**{**SMALL_VISION, "image_size": 20}), r"image_size.*20.*patch_size.*8"),
        (lambda: transformers.BertConfig(**COMMON, image_size=16), "vision_config.*bert.*no image tokens"),
        (lambda: transformers.ViTMAEConfig(**SMALL_VISION), "vit_mae.*hides three quarters .* at random"),
        (lambda: transformers.PixtralVisionConfig(**SMALL_VISION), "pixtral.*of 2 pictures it makes 1 sequences"),
        (
            lambda: transformers.Sam2VisionConfig(image_size=64),
            r"sam2.*is not \(num_images, channels, rows",
        ),
    ],
    ids=[
        "no size",
        "no vision model",
        "a size that patches do not fill",
        "no pixels taken",
        "patches that are hidden",
        "one sequence of all pictures",
        "channels last",
    ],
)
def test_vision_models_that_can_not_work_say_why_before_any_weight_is_loaded(
    vision: Callable[[], PreTrainedConfig], reason: str, unloadable: Unloadable
) -> None:
    folders = unloadable(TEXTS["gpt2"]()), unloadable(vision())
    with pytest.raises(ValueError, match=reason):
        DuoStreamForConditionalGeneration.from_backbones(*folders, num_fusion_layers=2)


@pytest.mark.parametrize("cls", [DuoStreamForMaskedLM, DuoStreamForSequenceClassification, DuoStreamForPreTraining])
def test_a_split_decoder_with_its_head_may_get_any_other(cls: Any) -> None:
    text = AutoModelForCausalLM.from_config(TEXTS["llama"]())
    vision = AutoModel.from_config(VISIONS["siglip"]())
    assert cls.from_backbones(roughen(text, scale=0.3), vision, num_fusion_layers=2).config.is_text_causal


def test_a_decoder_that_was_cast_to_half_precision_can_be_split() -> None:
    text = roughen(AutoModelForCausalLM.from_config(TEXTS["llama"]()), scale=0.3).bfloat16()
    vision = AutoModel.from_config(VISIONS["siglip"]())
    model = DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=2)
    assert model.dtype == torch.bfloat16


def gemma4(first: str, second: str) -> PreTrainedConfig:
    """Four layers, of which those that see all have wider heads."""
    return transformers.Gemma4TextConfig(
        **GROUPED,
        global_head_dim=16,
        sliding_window=64,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        layer_types=[first, second, "sliding_attention", "full_attention"],
    )


OTHERS: dict[str, tuple[bool, Callable[[], PreTrainedConfig]]] = {
    # Whether it can be split, and what it is
    "qwen2": (True, lambda: transformers.Qwen2Config(**MANY)),
    "qwen2_moe": (True, lambda: transformers.Qwen2MoeConfig(**MANY, **EXPERTS, num_experts=2)),
    "qwen3_moe": (True, lambda: transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=2)),
    "qwen3_moe, dense in part": (
        False,
        lambda: transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=2, mlp_only_layers=[1]),
    ),
    "mixtral": (True, lambda: transformers.MixtralConfig(**MANY, num_local_experts=2, num_experts_per_tok=1)),
    "stablelm": (True, lambda: transformers.StableLmConfig(**MANY)),
    "granite": (
        True,
        lambda: transformers.GraniteConfig(**COMMON, residual_multiplier=0.5, attention_multiplier=0.3),
    ),
    "granite, scaled logits": (False, lambda: transformers.GraniteConfig(**COMMON, logits_scaling=2.0)),
    "cohere": (False, lambda: transformers.CohereConfig(**MANY)),
    "cohere2": (False, lambda: transformers.Cohere2Config(**MANY, sliding_window=8)),
    "phi": (False, lambda: transformers.PhiConfig(**MANY)),  # a head with a bias
    "falcon": (
        True,
        lambda: transformers.FalconConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
        ),
    ),
    "falcon, alibi": (
        False,
        lambda: transformers.FalconConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True
        ),
    ),
    "gpt_neo": (
        True,
        lambda: transformers.GPTNeoConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            window_size=8,
            attention_types=[[["global", "local"], 2]],
        ),
    ),
    "gptj": (False, lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4)),  # a head with a bias
    "gpt_bigcode": (True, lambda: transformers.GPTBigCodeConfig(**GPT2)),
    "starcoder2": (True, lambda: transformers.Starcoder2Config(**MANY)),
    "nemotron": (True, lambda: transformers.NemotronConfig(**MANY)),
    "mpt": (False, lambda: transformers.MptConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=4, n_heads=4)),
    "glm4": (True, lambda: transformers.Glm4Config(**GROUPED)),
    "olmo3": (True, lambda: transformers.Olmo3Config(**MANY, sliding_window=8)),
    "exaone4": (True, lambda: transformers.Exaone4Config(**MANY, sliding_window=8)),
    "gpt_oss": (
        True,
        lambda: transformers.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
    ),
    "llama4": (
        False,
        lambda: transformers.Llama4TextConfig(**GROUPED, num_local_experts=2, intermediate_size_mlp=48),
    ),
    "deepseek_v3": (
        False,
        lambda: transformers.DeepseekV3Config(
            **{**COMMON, "num_key_value_heads": 4},
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=1,
            first_k_dense_replace=1,
            moe_intermediate_size=16,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
    ),
    "gemma3n": (
        False,
        lambda: transformers.Gemma3nTextConfig(
            **{**GROUPED, "intermediate_size": [48] * 4},
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "xglm": (
        False,
        lambda: transformers.XGLMConfig(
            vocab_size=VOCAB_SIZE, d_model=32, ffn_dim=48, num_layers=4, attention_heads=4, max_position_embeddings=256
        ),
    ),
    "biogpt": (False, lambda: transformers.BioGptConfig(**COMMON)),
    # Their layers or norms depend on where they stand, which no field tells
    "nanochat": (False, lambda: transformers.NanoChatConfig(**MANY)),
    "diffllama": (False, lambda: transformers.DiffLlamaConfig(**MANY)),
    "gemma4": (True, lambda: gemma4("sliding_attention", "full_attention")),
    # The text stream's last layer would be read again as one that sees all
    "gemma4, cut behind a window": (False, lambda: gemma4("sliding_attention", "sliding_attention")),
    "apertus": (True, lambda: transformers.ApertusConfig(**MANY)),
    "helium": (True, lambda: transformers.HeliumConfig(**GROUPED)),
    "ernie4_5": (True, lambda: transformers.Ernie4_5Config(**GROUPED)),
}


@pytest.mark.parametrize("text", OTHERS)
def test_any_other_decoder_is_exactly_itself_or_refused(text: str) -> None:
    can_be_split, config = OTHERS[text]
    torch.manual_seed(0)
    backbone = roughen(AutoModelForCausalLM.from_config(config()), scale=0.1)
    vision = AutoModel.from_config(VISIONS["siglip"]())
    if not can_be_split:
        with pytest.raises(ValueError, match="`text` of type"):
            DuoStreamForConditionalGeneration.from_backbones(backbone, vision, num_fusion_layers=2)
        return
    model = DuoStreamForConditionalGeneration.from_backbones(backbone, vision, num_fusion_layers=2).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    # A mixture multiplies tokens in groups, padding among them, and rounds by what else is in the group
    allowed = 1e-5 if text == "mixtral" else 0.0
    for use_cache in (True, False):
        padded = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache}
        ours, theirs = (logits(m, padded)[mask.bool()] for m in (model, backbone))
        assert difference(ours, theirs) <= allowed
    row = Row(model, 3, PICTURE, 4)
    cached, uncached = (logits(model, row.inputs, use_cache=use_cache) for use_cache in (True, False))
    assert difference(cached, uncached) < CLOSE


@pytest.mark.parametrize(
    "arguments",
    [
        {"projector": "linear"},
        {"num_fusion_layer": 2},
        {"revision": "main"},
        {"torch_dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"trust_remote_code": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_would_do_nothing_are_refused(arguments: dict[str, Any], folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=f"^`{next(iter(arguments))}`: expected fields of `DuoStreamConfig`"):
        compose(folder, **arguments)


def test_a_token_by_which_backbones_are_fetched_is_in_no_config(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = compose(folder, token="hf_secret", local_files_only=True)
    model.save_pretrained(tmp_path)
    assert "hf_secret" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", ["bert", "roberta", "nystromformer", "yoso", "mra"])
@torch.no_grad()
def test_an_encoder_counts_its_positions_from_where_it_does_by_itself(
    kind: str, folder: Callable[[str], Path]
) -> None:
    sizes: dict[str, Any] = {**COMMON, "num_hidden_layers": 1, "pad_token_id": 1, "max_position_embeddings": 64}
    sizes |= {"num_landmarks": 64, "segment_means_seq_len": 64} if kind == "nystromformer" else {}
    backbone = roughen(AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes)), scale=0.1).eval()
    model = DuoStreamForMaskedLM.from_backbones(backbone, folder("siglip"), fusion_config=LLAMA).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 9))
    for mask in (None, torch.ones_like(ids)):
        expected = backbone(ids, attention_mask=mask).last_hidden_state
        assert difference(model.model.read_text(ids, mask).last_hidden_state, expected) < 1e-5


def test_embeddings_that_are_narrower_than_the_layers_are_not_the_head(folder: Callable[[str], Path]) -> None:
    electra = AutoModel.from_config(transformers.ElectraConfig(**COMMON, embedding_size=16))
    model = DuoStreamForMaskedLM.from_backbones(electra, folder("siglip"), fusion_config=LLAMA)
    assert not model.config.tie_word_embeddings
    assert model(torch.randint(3, VOCAB_SIZE, (1, 5))).logits.shape == (1, 5, VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"`tie_word_embeddings` is True, but .* 16 wide .* of 32: expected False"):
        DuoStreamForMaskedLM.from_backbones(electra, folder("siglip"), fusion_config=LLAMA, tie_word_embeddings=True)


def test_an_encoder_and_decoder_in_one_is_refused(folder: Callable[[str], Path]) -> None:
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    t5 = AutoModel.from_config(transformers.T5Config(**sizes))
    with pytest.raises(ValueError, match="`text` of type 't5' is an encoder and a decoder"):
        DuoStreamForMaskedLM.from_backbones(t5, folder("siglip"), fusion_config=LLAMA)


def test_the_language_model_within_a_multimodal_checkpoint_is_found(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = transformers.LlavaConfig(vision_config=SMALL_VISION, text_config={**LLAMA, "num_hidden_layers": 3})
    llava = roughen(transformers.LlavaForConditionalGeneration(config), scale=0.1).eval()
    llava.save_pretrained(tmp_path)
    model = DuoStreamForConditionalGeneration.from_backbones(tmp_path, folder("siglip"), num_fusion_layers=2).eval()
    ids = {"input_ids": torch.randint(3, VOCAB_SIZE, (1, 7))}
    assert difference(logits(model, ids), logits(llava, ids)) == 0.0
