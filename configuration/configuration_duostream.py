"""DuoStream's configuration: three transformers and what lies between them."""

import copy
import os
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME

from .image_tokens_duostream import image_size_of, image_token_shape
from .saved_code_duostream import AUTO_MAP, is_foreign, save_code

CHOICES = {
    "projector_type": ("mlp", "linear", "none"),
    "contrastive_loss": ("sigmoid", "softmax"),
    "projector_hidden_act": tuple(ACT2FN),
}
WEIGHTS = ("lm_weight", "mlm_weight", "itc_weight", "itm_weight")
SUB_CONFIGS = ("text_config", "vision_config", "fusion_stack_config")
# Of each layer and label a Python object is made: a config that names more of them would hang whoever reads it
MAX_LAYERS, MAX_LABELS = 1000, 1_000_000

# As `train_tokenizer` numbers them. Llama's default `eos_token_id`, 2, is here the default `image_token_id`, which is
# never written: no answer would end
SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1}

# Weights start at the inverse root of the width (Glorot and Bengio 2010): at 0.02 so narrow a stack learns slower.
SMALL_STACK: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.09,
    **SPECIAL_TOKENS,
}
SMALL_TEXT_STACK = {**SMALL_STACK, "num_hidden_layers": 1, "tie_word_embeddings": True}
SMALL_FUSION_STACK = {**SMALL_STACK, "num_hidden_layers": 3}
# Whose norms and activation are one kernel each on a CPU, and whose attention and MLP share a norm
SMALL_PHI = {
    "model_type": "phi",
    "intermediate_size": 512,
    "hidden_act": "gelu",
    "qk_layernorm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
BASE_STACK: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
    **SPECIAL_TOKENS,
}

PRESETS: dict[str, dict[str, Any]] = {
    # About a million parameters, to train from scratch on a CPU. The vision stream is convolutional: on 2 cores it
    # learns to see in minutes, where a small vision transformer first rests on a plateau for hundreds of steps. Small
    # groups and GELU tell shapes apart sooner than wider groups or deeper stages. With normed queries and keys (Henry
    # et al. 2020) words find the image tokens that they are about in fewer steps: a token's length no longer weighs in
    # on how well it matches.
    "tiny": {
        "text_config": {**SMALL_TEXT_STACK, **SMALL_PHI},
        "vision_config": {
            "model_type": "regnet",
            "image_size": 48,
            "embedding_size": 32,
            "hidden_sizes": [64, 128, 128],
            "depths": [1, 1, 1],
            "groups_width": 32,
            "layer_type": "x",
            "hidden_act": "gelu",
        },
        "fusion_stack_config": {**SMALL_FUSION_STACK, **SMALL_PHI},
        "projector_position_embeddings": True,
        "initializer_range": 0.09,
    },
    # About 200 million parameters: SigLIP-B/16 beside a Llama of 8 + 4 layers.
    "base": {
        "text_config": {**BASE_STACK, "num_hidden_layers": 8, "tie_word_embeddings": True},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": 224,
            "patch_size": 16,
            "vision_use_head": False,
        },
        "fusion_stack_config": {**BASE_STACK, "num_hidden_layers": 4},
    },
}


class DuoStreamConfig(PreTrainedConfig):
    r"""
    Configuration of a DuoStream model: a text stream, a vision stream, and the fusion stack that both go through
    together. Each is any `AutoConfig` type.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The text stream: a decoder (Llama, Qwen3, GPT-2, ...) or an encoder (BERT). Defaults to a small Llama.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The vision stream. Defaults to a small SigLIP.
        fusion_stack_config (`dict` or `PreTrainedConfig`, *optional*):
            The fusion stack: a decoder as wide as the text stream. Defaults to a small Llama. `fusion_config` is taken
            for it, too, but it can't be called so: `from_pretrained` reads `config.fusion_config` as its own switches
            for fused kernels.
        image_token_id (`int`, *optional*, defaults to 2):
            The placeholder token: one stands in `input_ids` for each image token. It needs no embedding, so it may be
            beyond the vocabulary.
        image_size (`int` or `list[int]`, *optional*):
            Side of the pictures in pixels, or height and width, if the vision stream is to read them in another size
            than its own: larger pictures give more image tokens. ViT, SigLIP, CLIP, DINOv2 and their like interpolate
            their positions then. Defaults to `vision_config.image_size`.
        image_seq_length (`int`, *optional*):
            Number of image tokens a picture gives. Derived from `vision_config` when absent.
        image_hidden_size (`int`, *optional*):
            Width of the vision stream's tokens. Derived from `vision_config` when absent.
        projector_type (`str`, *optional*, defaults to `"mlp"`):
            What maps image tokens to the width of the fusion stack: `"mlp"` (layer norm and two linear layers),
            `"linear"` (layer norm and one), or `"none"`, where the widths are equal.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            The activation of the `"mlp"` projector.
        projector_hidden_size (`int`, *optional*):
            The inner width of the `"mlp"` projector. Defaults to that of the fusion stack.
        projector_position_embeddings (`bool`, *optional*, defaults to `False`):
            Whether to add a learned position to each image token, for vision streams that don't mark positions.
        bidirectional_images (`bool`, *optional*, defaults to `True`):
            Whether a picture's tokens see each other both ways in the fusion stack, or, as those of text do, only what
            stands before them: then its masks are causal ones, for which there are faster kernels (flash attention).
        num_image_update_layers (`int`, *optional*):
            How many of the fusion layers, from the lowest up, make new states for all image tokens. Those above do so
            for the last one of each picture alone, and read the others' states as the last of the lower layers made
            them, or with 0 the projector, as keys and values: there a picture costs a fraction of it. Defaults to all.
            To be chosen before training. (0 is SAISA, Yuan et al. 2025, arXiv 2502.02458, here for fusion layers.)
        restart_positions (`bool`, *optional*, defaults to `False`):
            Whether positions in the fusion stack start at 0 again behind the prefix that `token_type_ids` tell, as
            those of a translation's two halves do (Lample and Conneau 2019, section 3.4). Without a prefix it has no
            effect.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1):
            Which hidden states of the vision stream are read: -1 for the last, else an index of `hidden_states`. A
            list has each image token made of several layers' states, side by side (as in LLaVA); feature maps that
            are larger than the smallest go from space to depth.
        spatial_merge_size (`int`, *optional*, defaults to 1):
            A square of so many by so many neighbouring tokens of the vision stream becomes one image token, as wide as
            all of them together: 2 makes a picture cost a quarter of the tokens. (Idefics3 and Qwen2-VL have such a
            step, too.) Not for vision streams with a class token.
        loss_chunk_size (`int`, *optional*):
            In training, how many tokens' logits are made at a time: they are thrown away, not returned, and made again
            in the backward, which takes less memory where the vocabulary is large. By default all at once.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the language-model head is the text stream's embedding matrix.
        projection_dim (`int`, *optional*, defaults to 256):
            Width of the space in which texts and pictures are compared for retrieval.
        contrastive_loss (`str`, *optional*, defaults to `"sigmoid"`):
            How they are: `"sigmoid"` (SigLIP) or `"softmax"` (CLIP).
        lm_weight, mlm_weight, itc_weight, itm_weight (`float`, *optional*, default to 1.0):
            Of the objectives of [`DuoStreamForPreTraining`]: language modelling, masked language modelling, image-text
            contrastive, image-text matching. 0 switches one off.
        classifier_dropout (`float`, *optional*, defaults to 0.0):
            Dropout before the classifier of [`DuoStreamForSequenceClassification`].
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the new weights outside the three backbones.
        base_models (`list[str]`, *optional*):
            Which models on the Hub it was composed from, for the card. Local ones are not named.

    Raises:
        ValueError: the parts don't fit together; the message names the fields.

    Example:

    ```python
    >>> from duostream import DuoStreamConfig, DuoStreamForConditionalGeneration

    >>> config = DuoStreamConfig.from_preset("tiny")
    >>> model = DuoStreamForConditionalGeneration(config)
    >>> config.image_seq_length
    9
    ```
    """

    model_type = "duostream"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs=SMALL_TEXT_STACK),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            init_kwargs={
                "image_size": 48,
                "patch_size": 8,
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "vision_use_head": False,
            },
        ),
        "fusion_stack_config": SubConfigSpec(
            config_class=AutoConfig, model_type="llama", init_kwargs=SMALL_FUSION_STACK
        ),
    }
    # No predictions, and not there in each batch: those without pictures have no image states, those without pairs or
    # masks no such losses
    keys_to_ignore_at_inference = [
        *("past_key_values", "image_hidden_states"),
        *("lm_loss", "mlm_loss", "itc_loss", "itm_loss"),
    ]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    fusion_stack_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 2
    image_size: int | list[int] | None = None
    image_seq_length: int | None = None
    image_hidden_size: int | None = None
    projector_type: Literal["mlp", "linear", "none"] = "mlp"
    projector_hidden_act: str = "gelu"
    projector_hidden_size: int | None = None
    projector_position_embeddings: bool = False
    vision_feature_layer: int | list[int] = -1
    spatial_merge_size: int = 1
    bidirectional_images: bool = True
    num_image_update_layers: int | None = None
    restart_positions: bool = False
    projection_dim: int = 256
    contrastive_loss: Literal["sigmoid", "softmax"] = "sigmoid"
    lm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    classifier_dropout: float | int = 0.0
    loss_chunk_size: int | None = None
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.02
    base_models: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.pop("update_image_states", True) is False and self.num_image_update_layers is None:
            # What checkpoints said until 27 November 2026
            self.num_image_update_layers = 0
        if _is_model_config(kwargs.get("fusion_config")):
            self.fusion_stack_config = kwargs.pop("fusion_config")
        self.check_fields()
        for name in SUB_CONFIGS:
            self._make_sub_config(name)
        num_labels = kwargs.get("num_labels", 0)
        if not isinstance(num_labels, int) or not 0 <= num_labels <= MAX_LABELS:
            raise ValueError(f"`num_labels` is {num_labels!r:.100}; expected a number, {MAX_LABELS} at most")
        try:
            super().__post_init__(**kwargs)
        except Exception as error:
            fields = ", ".join(f"`{name}`" for name in ("dtype", "id2label", *kwargs))
            raise ValueError(f"one of {fields} can't be read: {error}") from error
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"`dtype` is {self.dtype!r:.100}; expected one of torch's")
        self.check_layers()
        self._check_widths()
        self.check_picture()
        own_size = getattr(self.vision_config, "image_size", None)
        if self.image_size is not None and own_size is not None:
            sizes = [image_size_of(self.vision_config, size) for size in (self.image_size, own_size)]
            self.image_size = None if sizes[0] == sizes[1] else self.image_size
        if self.image_seq_length is None or self.image_hidden_size is None:
            image_seq_length, image_hidden_size = image_token_shape(
                self.vision_config, self.vision_feature_layer, self.spatial_merge_size, self.image_size
            )
            self.image_seq_length = self.image_seq_length or image_seq_length
            self.image_hidden_size = self.image_hidden_size or image_hidden_size
        if self.projector_type == "none" and self.image_hidden_size != self.fusion_stack_config.hidden_size:
            raise ValueError(
                f"`vision_config` gives tokens of width {self.image_hidden_size}, `fusion_stack_config.hidden_size` "
                f'is {self.fusion_stack_config.hidden_size}: with `projector_type="none"` they must be equal'
            )

    def to_dict(self) -> dict[str, Any]:
        # `Trainer` sets `use_cache` to `False` in the config of what it trains. Models that write have a generation
        # config, too, which says otherwise; of others with the same weights the next model that writes would make its
        # own by this one, and write without a cache from then on. Whether a stream has one, its own config says
        return {name: value for name, value in super().to_dict().items() if name != "use_cache"}

    def check_fields(self) -> None:
        """
        Checks types and ranges of the fields. Models do so, too, as `from_pretrained` may be given other fields than
        those that are stored.

        Raises:
            ValueError: One is of another type than it should be, or out of range.
        """
        for name, expected in DuoStreamConfig.__annotations__.items():
            try:
                # Choices are checked below, so that the message is the same with all versions of huggingface_hub
                type_validator(name, getattr(self, name), Any if name in CHOICES else expected)
            except TypeError as error:
                raise ValueError(f"`{name}`: {error}") from error
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; there are {', '.join(map(repr, known))}")
        for name in (*WEIGHTS, "initializer_range"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 0 (off) or more")
        if not 0 <= self.classifier_dropout <= 1:
            raise ValueError(f"`classifier_dropout` is {self.classifier_dropout}; expected a share, from 0 to 1")
        for name in (
            "projection_dim",
            "projector_hidden_size",
            "image_seq_length",
            "image_hidden_size",
            "loss_chunk_size",
            "spatial_merge_size",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 1 or more")

    def check_layers(self) -> None:
        """Raises `ValueError` where more layers are to update image tokens than there are. Models ask, too."""
        num_layers = self.fusion_stack_config.num_hidden_layers
        if self.num_image_update_layers is not None and not 0 <= self.num_image_update_layers <= num_layers:
            raise ValueError(
                f"`num_image_update_layers` is {self.num_image_update_layers}; expected 0 to {num_layers}, the number "
                "of fusion layers"
            )

    @property
    def num_image_reading_layers(self) -> int:
        """How many of the upper fusion layers read image states without making new ones."""
        # A field may have been set since the config was made
        self.check_layers()
        num_layers = self.fusion_stack_config.num_hidden_layers
        return 0 if self.num_image_update_layers is None else num_layers - self.num_image_update_layers

    def _make_sub_config(self, name: str) -> None:
        sub_config = getattr(self, name)
        if isinstance(sub_config, dict):
            model_type = sub_config.get("model_type")
            if model_type is not None and model_type not in list(CONFIG_MAPPING):
                raise ValueError(f"`{name}.model_type` is {model_type!r}, which is no type that `AutoConfig` knows")
            for field, value in sub_config.items():
                counts = value if isinstance(value, list) else [value]
                is_count = ("layer" in field and "per_layer" not in field) or "depth" in field
                if is_count and any(isinstance(count, int) and count > MAX_LAYERS for count in counts):
                    raise ValueError(f"`{name}.{field}` is {value!r:.100}; expected {MAX_LAYERS} at most")
        try:
            sub_config, _ = self.sub_configs_defaults[name].create_subconfig(name, sub_config)
        except Exception as error:
            raise ValueError(f"`{name}` can't be read: {error}") from error
        setattr(self, name, sub_config)

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        # Every save and every push writes the config here. The library's own `custom_object_save` expects the modules
        # in one folder, which ours are not.
        if Path(json_file_path).name == CONFIG_NAME:
            # Those of somebody's subclass stay
            own = {name: each for name, each in (getattr(self, "auto_map", None) or {}).items() if is_foreign(each)}
            self.auto_map = {**AUTO_MAP, **own}
            save_code(Path(json_file_path).parent)
            for name in SUB_CONFIGS:
                getattr(self, name).name_or_path = ""  # where the backbones lay on this machine
        super().to_json_file(json_file_path, use_diff=use_diff)

    def _check_widths(self) -> None:
        text, fusion = self.text_config, self.fusion_stack_config
        if text.hidden_size != fusion.hidden_size:
            raise ValueError(
                f"`text_config.hidden_size` is {text.hidden_size} and `fusion_stack_config.hidden_size` is "
                f"{fusion.hidden_size}: text goes from the one into the other, so they must be equal"
            )
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` is {self.image_token_id}; expected a token's number")
        windows = [getattr(sub_config, "sliding_window", None) for sub_config in (text, fusion)]
        if None not in windows and windows[0] != windows[1]:
            raise ValueError(
                f"`text_config.sliding_window` and `fusion_stack_config.sliding_window` differ ({windows}): "
                "the layers of both share one cache, which has one window"
            )

    def check_picture(self) -> None:
        """
        Checks the size of pictures. Models do so, too: see [`check_fields`].

        Raises:
            ValueError: It is none, no multiple of the patches', or gives another number of tokens than
                `image_seq_length`.
        """
        patch_size = getattr(self.vision_config, "patch_size", None)
        height, width = image_size_of(self.vision_config, self.image_size)
        if isinstance(patch_size, int) and (height % patch_size or width % patch_size):
            name = "vision_config.image_size" if self.image_size is None else "image_size"
            raise ValueError(f"`{name}` {height} x {width} is not divided by `vision_config.patch_size` {patch_size}")
        if self.image_size is not None and self.image_seq_length is not None:
            num_tokens, _ = image_token_shape(
                self.vision_config, self.vision_feature_layer, self.spatial_merge_size, self.image_size
            )
            if num_tokens != self.image_seq_length:
                raise ValueError(
                    f"`image_size` {height} x {width} gives {num_tokens} tokens a picture, but `image_seq_length` is "
                    f"{self.image_seq_length}: choose it when the model is made (`from_backbones`), or change both, "
                    "and the processor's `image_seq_length` and size"
                )

    @classmethod
    def from_preset(cls, preset: str, vocab_size: int | None = None, **kwargs: Any) -> "DuoStreamConfig":
        """
        A configuration for training from scratch.

        Args:
            preset (`str`): `"tiny"` (about a million parameters) or `"base"` (about 200 million).
            vocab_size (`int`, *optional*): Size of the tokenizer. Defaults to the preset's.
            kwargs: Any field of the configuration. A sub-config given as a `dict` without `model_type` updates the
                preset's; one with a `model_type` replaces it.

        Raises:
            ValueError: there is no such preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` is {preset!r}; there are {', '.join(map(repr, PRESETS))}")
        if _is_model_config(kwargs.get("fusion_config")):
            kwargs["fusion_stack_config"] = kwargs.pop("fusion_config")
        fields = copy.deepcopy(PRESETS[preset])
        for name, value in kwargs.items():
            updates_preset = name in SUB_CONFIGS and isinstance(value, dict) and "model_type" not in value
            fields[name] = {**fields[name], **value} if updates_preset else value
        if vocab_size is not None:
            for name in ("text_config", "fusion_stack_config"):
                # The caller's own stays as it is
                stack = fields[name] = copy.deepcopy(fields[name])
                if isinstance(stack, dict):
                    stack["vocab_size"] = vocab_size
                else:
                    stack.vocab_size = vocab_size
        return cls(**fields)

    @property
    def is_text_causal(self) -> bool:
        """Whether the text stream is a decoder, which never looks ahead: only then can the model write, and cache."""
        return is_causal(self.text_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        # `generate` builds its cache from the decoder's config: it must see the layers of both stacks, the fusion
        # stack's first, so that `cache.get_seq_length()` is the length of the whole sequence.
        if not (decoder and not encoder):
            return self.text_config
        cache_config = copy.copy(self.fusion_stack_config)
        # It also learns from it where an answer ends, which the stack that reads the tokens knows
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(cache_config, name, getattr(self.text_config, name, None))
        if not self.is_text_causal:
            return cache_config
        cache_config.vocab_size = self.text_config.vocab_size
        cache_config.layer_types = layer_types(self.fusion_stack_config) + layer_types(self.text_config)
        cache_config.num_hidden_layers = len(cache_config.layer_types)
        if getattr(cache_config, "sliding_window", None) is None:
            cache_config.sliding_window = getattr(self.text_config, "sliding_window", None)
        return cache_config


def _is_model_config(value: Any) -> bool:
    """Tells a model's config from the library's `fusion_config`, which maps names of kernels to switches."""
    is_switches = isinstance(value, dict) and all(isinstance(switch, bool | dict) for switch in value.values())
    return value is not None and not is_switches


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether `AutoModel` builds a decoder from `config`. BERT-like types are one only with `is_decoder=True`."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return False
    is_like_bert = config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation")
    return not is_like_bert or bool(getattr(config, "is_decoder", False))


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The kind of attention of each layer, as the library's caches infer it."""
    if getattr(config, "layer_types", None) is not None:
        return list(config.layer_types)
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


__all__ = ["DuoStreamConfig"]
