"""Composing a DuoStream model out of pretrained backbones: which parts of them go where, and which can't."""

import copy
import dataclasses
import inspect
import os
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from ..configuration.configuration_duostream import DuoStreamConfig, is_causal, layer_types

Backbone: TypeAlias = str | os.PathLike | PreTrainedModel

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
POSITION_EMBEDDINGS = ("wpe", "embed_positions")
# Options of `from_pretrained` by which backbones are fetched. They are no fields of the config, which is saved: the
# token would be for all to see
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
# Of these whole models `AutoModel` reads the vision tower alone, if it is given that one's config
READ_BY_TOWER = ("clip", "siglip", "chinese_clip")

# Fields by which a decoder treats its input embeddings, its layers' numbers or its logits in a way of its own, which
# its upper layers alone would repeat, miss or get wrong. Each with the values that change nothing.
INDIVISIBLE_FIELDS: dict[str, tuple] = {
    "embedding_multiplier": (1, 1.0),
    "scale_emb": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "scale_attn_by_inverse_layer_idx": (False,),
    "alibi": (False,),
    "hidden_size_per_layer_input": (0,),
    "num_kv_shared_layers": (0,),
    "first_k_dense_replace": (0,),
    "num_dense_layers": (0,),
    "moe_layer_start_index": (0,),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    # By which the library adds a loss that balances experts: here the loss is that of tokens
    "output_router_logits": (False,),
}
# Decoders that take no `position_ids` but count by the mask, as the text stream needs it: its cache has empty slots
COUNTS_BY_MASK = ("bloom",)


def stack_of(model: nn.Module) -> nn.Module:
    """The module that holds a decoder's layers: OPT-like models keep them one level down."""
    return getattr(model, "decoder", model)


class NoPositions(nn.Module):
    """Stands where the fusion stack would add learned positions, which its inputs already carry."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def remove_final_norm(model: PreTrainedModel) -> None:
    """Takes the last norm off a decoder, in place: the fusion stack goes on where its layers end."""
    stack = stack_of(model)
    for name in FINAL_NORMS:
        if hasattr(stack, name):
            setattr(stack, name, nn.Identity())
            return


def remove_embeddings(model: PreTrainedModel) -> None:
    """Takes token and position embeddings off a decoder, in place: it starts from the states of the two streams."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    if model._tp_plan:
        # The library checks that each entry of the plan is there
        model._tp_plan.pop(name, None)
    model.set_input_embeddings(None)
    stack = stack_of(model)
    for name in POSITION_EMBEDDINGS:
        if hasattr(stack, name):
            setattr(stack, name, NoPositions())


def config_of(backbone: Backbone, **kwargs: Any) -> PreTrainedConfig:
    """The config of a backbone that is a loaded model, a local folder or a Hub id."""
    return backbone.config if isinstance(backbone, PreTrainedModel) else AutoConfig.from_pretrained(backbone, **kwargs)


def check_layers(config: PreTrainedConfig, field: str) -> None:
    """Raises `ValueError` if a decoder has layers whose states run through slots that hold no token of a row."""
    if unknown := set(layer_types(config)) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"`{field}` of type {config.model_type!r} has layers of kinds {sorted(unknown)}; expected attention layers"
        )


def check_inputs(config: PreTrainedConfig, field: str, *names: str) -> None:
    """Raises `ValueError` if the model that `AutoModel` builds from `config` doesn't take inputs of these names."""
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"`{field}` of type {config.model_type!r} is no type that `AutoModel` builds")
    known = inspect.signature(MODEL_MAPPING[type(config)].forward).parameters
    if missing := [f"`{name}`" for name in names if name not in known]:
        raise ValueError(f"`{field}` of type {config.model_type!r} takes no {', '.join(missing)}")


def check_decoder(config: PreTrainedConfig, field: str, is_split: bool) -> None:
    """
    Raises `ValueError` if `config` is not a decoder that can start or stop between any two of its layers, or, where it
    is split and so its head is taken over, if it has one of another kind than the model's.
    """
    kind = f"`{field}` of type {config.model_type!r}"
    if not is_causal(config):
        advice = (
            "so it can't be split: give a `fusion_config` instead" if is_split else "which the fusion stack must be"
        )
        raise ValueError(f"{kind} is no decoder, {advice}")
    check_layers(config, field)
    for name, harmless in INDIVISIBLE_FIELDS.items():
        value = getattr(config, name, None)
        if value is not None and value not in harmless:
            raise ValueError(f"{kind} has `{name}={value}`, which its layers apart from each other can't keep to")
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise ValueError(f"{kind} has a `word_embed_proj_dim` other than its `hidden_size`")
    check_inputs(config, field, "inputs_embeds", "position_ids", "past_key_values")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if is_split and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"{kind} has a language-model head with a bias")
    if not any(hasattr(stack_of(model.base_model), name) for name in FINAL_NORMS):
        raise ValueError(f"{kind} has no final norm by any of the names {', '.join(FINAL_NORMS)}")


def split_config(config: PreTrainedConfig, num_fusion_layers: int) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """
    Configs of a decoder's lower and upper layers.

    Args:
        config (`PreTrainedConfig`): A decoder's.
        num_fusion_layers (`int`): How many of its layers, counted from the top, are the fusion stack.

    Raises:
        ValueError: The decoder can't be split, or not there.
    """
    check_decoder(config, "text", is_split=True)
    num_layers = config.num_hidden_layers
    if not 1 <= num_fusion_layers < num_layers:
        raise ValueError(
            f"`num_fusion_layers` is {num_fusion_layers}; expected 1 to {num_layers - 1}, as `text` has {num_layers} "
            "layers and the text stream keeps at least one"
        )
    num_text_layers = num_layers - num_fusion_layers
    text_config, fusion_config = copy.deepcopy(config), copy.deepcopy(config)
    for name, value in config.to_dict().items():
        is_per_layer = isinstance(value, list) and len(value) == num_layers and not name.endswith(("_id", "_ids"))
        if is_per_layer and name != "architectures":
            setattr(text_config, name, value[:num_text_layers])
            setattr(fusion_config, name, value[num_text_layers:])
    text_config.num_hidden_layers, fusion_config.num_hidden_layers = num_text_layers, num_fusion_layers
    for half, first in ((text_config, 0), (fusion_config, num_text_layers)):
        if getattr(config, "is_heterogeneous", False):
            each = {int(number) - first: fields for number, fields in config.to_dict()["per_layer_config"].items()}
            own = range(half.num_hidden_layers)
            half.per_layer_config = {number: fields for number, fields in each.items() if number in own}
        check_is_stored(half, num_fusion_layers)
    if hasattr(fusion_config, "embd_pdrop"):
        fusion_config.embd_pdrop = 0.0  # GPT-2's dropout of embeddings, which are the text stream's
    return text_config, fusion_config


def check_is_stored(half: PreTrainedConfig, num_fusion_layers: int) -> None:
    """Raises `ValueError` if a part of a decoder would be read again with other layers: Gemma 4's last sees all."""
    again = type(half).from_dict(half.to_dict())
    if layer_types(again) != layer_types(half):
        raise ValueError(
            f"`text` of type {half.model_type!r} can't be split where `num_fusion_layers={num_fusion_layers}` does: "
            f"its layers {layer_types(half)} would be read again as {layer_types(again)}"
        )


def compose_config(
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    num_fusion_layers: int | None = None,
    fusion_config: PreTrainedConfig | dict | None = None,
    image_size: int | None = None,
    writes: bool = True,
    **kwargs: Any,
) -> DuoStreamConfig:
    """
    The config of a model made of these backbones, or an error that says why there can be none. Loads no weights.

    Args:
        text_config (`PreTrainedConfig`): Of a language model or a text encoder.
        vision_config (`PreTrainedConfig`): Of a vision model, or of one that has a vision tower.
        num_fusion_layers (`int`, *optional*): How many of the language model's upper layers become the fusion stack.
        fusion_config (`PreTrainedConfig` or `dict`, *optional*): A new fusion stack instead.
        image_size (`int`, *optional*): Side of the pictures in pixels, for vision models whose config has none, or
            to read them in another size than its own.
        writes (`bool`, *optional*, defaults to `True`): Whether the model is to write text. If so, an encoder that
            knows how to is made a decoder.
        kwargs: Other fields of [`DuoStreamConfig`].

    Raises:
        ValueError: The parts can't work together, or `kwargs` has a name that is no field's.
    """
    # A config keeps whatever it is given
    known = {field.name for field in dataclasses.fields(DuoStreamConfig)} | {"attn_implementation", "num_labels"}
    if unknown := sorted(set(kwargs) - known):
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in unknown)}: expected fields of `DuoStreamConfig`, or of "
            f"{', '.join(f'`{name}`' for name in HUB_OPTIONS)}. A backbone that needs other options of "
            "`from_pretrained` (`revision`) can be loaded by itself, and given as a model"
        )
    for name, given in (("text", text_config), ("vision", vision_config)):
        if getattr(given, "quantization_config", None) is not None:
            raise ValueError(
                f"`{name}` is quantized: expected whole weights. Compose and save the model first, then load it by "
                "`from_pretrained(..., quantization_config=...)`"
            )
    if text_config.model_type == DuoStreamConfig.model_type:
        raise ValueError(
            "`text` is a DuoStream model, whose language model is in two parts: name the one it was composed from"
        )
    if (num_fusion_layers is None) == (fusion_config is None):
        raise ValueError("Exactly one of `num_fusion_layers` and `fusion_config` must be given")
    # What is no folder here came from the Hub
    names = [str(config.name_or_path) for config in (text_config, vision_config)]
    on_hub = [name for name in names if re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name) and not os.path.exists(name)]
    kwargs.setdefault("base_models", on_hub or None)
    text_config = copy.deepcopy(text_config.get_text_config(decoder=True))
    vision_config = copy.deepcopy(getattr(vision_config, "vision_config", vision_config))
    if type(vision_config) not in MODEL_MAPPING:
        raise ValueError(f"`vision` of type {vision_config.model_type!r} is no type that `AutoModel` builds")
    if image_size is not None:
        if getattr(vision_config, "image_size", None) is None:
            vision_config.image_size = image_size
        else:
            kwargs["image_size"] = image_size
    if hasattr(vision_config, "vision_use_head"):
        vision_config.vision_use_head = False  # SigLIP's pooling, which is not read

    if num_fusion_layers is not None:
        text_config, fusion_config = split_config(text_config, num_fusion_layers)
    elif writes and not is_causal(text_config):
        if not hasattr(text_config, "is_decoder"):
            raise ValueError(
                f"`text` of type {text_config.model_type!r} reads both ways and can't be made a decoder: it would see "
                "the text it is to write"
            )
        text_config.is_decoder = True
    if num_fusion_layers is None and is_causal(text_config):
        if text_config.model_type == "git":
            raise ValueError("`text` of type 'git' writes other words from padded rows with a cache than without one")
        check_layers(text_config, "text")
        counts = () if text_config.model_type in COUNTS_BY_MASK else ("position_ids",)
        check_inputs(text_config, "text", "inputs_embeds", *counts, "past_key_values")
    if num_fusion_layers is None and not is_causal(text_config):
        check_inputs(text_config, "text", "attention_mask")
    if num_fusion_layers is None and getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(
            f"`text` of type {text_config.model_type!r} is an encoder and a decoder: expected one of them by itself"
        )
    # An embedding that is narrower than the layers (ALBERT, ELECTRA) is no head
    is_narrow = getattr(text_config, "embedding_size", text_config.hidden_size) != text_config.hidden_size
    is_tied = bool(getattr(text_config, "tie_word_embeddings", True)) and not is_narrow
    kwargs.setdefault("tie_word_embeddings", is_tied)
    kwargs.setdefault("image_token_id", text_config.vocab_size)
    config = DuoStreamConfig(
        text_config=text_config, vision_config=vision_config, fusion_stack_config=fusion_config, **kwargs
    )
    if num_fusion_layers is None:
        check_decoder(config.fusion_stack_config, "fusion_config", is_split=False)
    return config


def load_backbones(
    text: Backbone, vision: Backbone, config: DuoStreamConfig, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Loads what is not loaded yet: the text backbone with its language-model head if it has one. No pickles."""
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    kwargs.setdefault("use_safetensors", True)
    if not isinstance(text, PreTrainedModel):
        whole_config = config_of(text, **hub)
        has_head = is_causal(whole_config.get_text_config(decoder=True))
        text_class: Any = AutoModelForCausalLM if has_head else AutoModel
        if has_head and type(whole_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            text_class = AutoModelForImageTextToText  # LLaVA's language model is a part of it
        text, loading = text_class.from_pretrained(text, output_loading_info=True, **kwargs)
        # A head may be missing, where none is needed
        base = f"{text.base_model_prefix}." if has_head else ""
        check_found(name for name in loading["missing_keys"] if name.startswith(base))
    if not isinstance(vision, PreTrainedModel):
        whole_config = config_of(vision, **hub)
        if not hasattr(whole_config, "vision_config") or whole_config.model_type in READ_BY_TOWER:
            kwargs["config"] = config.vision_config
        vision, loading = AutoModel.from_pretrained(vision, output_loading_info=True, **kwargs)
        check_found(loading["missing_keys"])
    tower_class = MODEL_MAPPING[type(config.vision_config)]
    towers = (module for module in vision.modules() if isinstance(module, tower_class))
    return text, next(towers, vision.get_encoder("image"))


def check_found(missing_names: Iterable[str]) -> None:
    """Raises `ValueError` if weights are missing. What pools (BERT, ViT) may be missing, as it is not read."""
    if lost := sorted(name for name in missing_names if "pool" not in name):
        raise ValueError(f"A backbone has {len(lost)} weights fewer than its config tells, as {lost[0]!r}")


def compose_state_dict(
    text: PreTrainedModel, vision: PreTrainedModel, config: DuoStreamConfig, is_split: bool
) -> dict[str, torch.Tensor]:
    """
    The backbones' weights under their names in `DuoStreamForConditionalGeneration`; nothing is copied, but for a head
    that was tied and is not to be.
    """
    state_dict = {f"model.vision_model.{name}": weight for name, weight in vision.state_dict().items()}
    base = text.base_model
    if text.config.get_text_config(decoder=True) is not text.config:
        # A multimodal model has its decoder one level down
        decoder = getattr(base, "language_model", getattr(base, "text_model", None))
        if decoder is None:
            raise ValueError(f"`text` of type {text.config.model_type!r} has no `language_model` and no `text_model`")
        base = decoder
    layers_name, num_text_layers = "", config.text_config.num_hidden_layers
    if is_split:
        num_layers = num_text_layers + config.fusion_stack_config.num_hidden_layers
        names = (
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == num_layers
        )
        layers_name = next(names, "")
        if not layers_name:
            raise ValueError(f"`text` of type {base.config.model_type!r} has no list of {num_layers} layers to split")
    for name, weight in base.state_dict().items():
        layer = re.match(rf"{re.escape(layers_name)}\.(\d+)\.(.+)", name) if is_split else None
        if layer and int(layer[1]) >= num_text_layers:
            name = f"fusion_model.{layers_name}.{int(layer[1]) - num_text_layers}.{layer[2]}"
        elif re.fullmatch(rf"(decoder\.)?({'|'.join(FINAL_NORMS)})\.\w+", name):
            if not is_split:
                continue  # the new fusion stack ends in a norm of its own
            name = f"fusion_model.{name}"
        else:
            name = f"text_model.{name}"
        state_dict[f"model.{name}"] = weight
    head = text.get_output_embeddings()
    if head is not None:
        was_tied = head.weight is text.get_input_embeddings().weight
        # Tied ones that are untied are two matrices from here on
        is_untied = was_tied and not config.tie_word_embeddings
        state_dict["lm_head.weight"] = head.weight.detach().clone() if is_untied else head.weight
    return state_dict


@torch.no_grad()
def check_is_unchanged(model: PreTrainedModel, text: PreTrainedModel) -> None:
    """
    Raises `ValueError` if a decoder that was split says other things on text alone than in one piece: its code may
    depend on where a layer stands in ways that no field of its config tells.
    """
    weights = [*model.parameters(), *text.parameters()]
    if any(weight.is_meta for weight in weights) or len({weight.device for weight in weights}) > 1:
        return  # such a model can't be run as it is
    # Casting a model rounds its rotary frequencies, too, which a model that is loaded in half precision has in full
    is_cast = any(each.is_floating_point() and each.dtype != torch.float32 for each in text.buffers())
    if model.dtype != text.dtype or is_cast:
        return  # one of them is rounded
    # A head that fills masks reads both ways, and says other things for that
    has_heads = model.can_generate() and text.get_output_embeddings() is not None
    words = set(range(min(9, model.config.text_config.vocab_size))) - {model.config.image_token_id}
    input_ids = torch.tensor([sorted(words)], device=text.device)  # (1, seq_len)
    modes = [(module, module.training) for module in text.modules()]
    text.eval()
    try:
        if has_heads:
            got, expected = (each(input_ids=input_ids).logits for each in (model, text))
        else:
            got, expected = (each.base_model(input_ids=input_ids).last_hidden_state for each in (model, text))
    finally:
        for module, mode in modes:
            module.training = mode
    if (got - expected).abs().max() > 0.01 * expected.abs().max():
        raise ValueError(
            f"`text` of type {text.config.model_type!r} says other things on text alone once it is split: its layers "
            "depend on where they stand. Give a `fusion_config` instead of `num_fusion_layers`"
        )
