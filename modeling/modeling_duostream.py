"""DuoStream: text and image tokens, each from a transformer of its own, go through one fusion stack together."""

import copy
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import nn, no_grad
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested

from ..configuration.configuration_duostream import DuoStreamConfig, is_causal
from ..configuration.image_tokens_duostream import image_size_of, image_tokens, patch_grid, position_options
from .composition_duostream import (
    HUB_OPTIONS,
    Backbone,
    check_found,
    check_is_unchanged,
    compose_config,
    compose_state_dict,
    config_of,
    load_backbones,
    remove_embeddings,
    remove_final_norm,
)
from .generation_duostream import DuoStreamGenerationMixin
from .image_locations_duostream import locate_images, note_pictures, pictures_read
from .kept_states_duostream import (
    KNOWN_TYPES,
    image_tokens_to_leave,
    keeping,
    layers_of,
    lower_half,
    make_kept_states_alone,
    positions_to_update,
    states_to_make,
    take,
)
from .masks_duostream import (
    check_prefix,
    check_segment_windows,
    check_segments,
    fusion_mask,
    text_segment_mask,
    tokens_that_see_each_other,
)
from .objectives_duostream import count_items, find_labelled, shift_labels, take_num_items
from .stream_layout_duostream import (
    SequencePlan,
    StreamLayout,
    check,
    check_one_sequence,
    check_shape,
    count_prefix,
    count_text,
    count_tokens,
    deal_out,
    default_segment_positions,
    restart_positions,
    text_padding_mask,
    text_window,
)

logger = logging.get_logger(__name__)

STREAMS = {"text": "text_model", "vision": "vision_model", "projector": "projector", "fusion": "fusion_model"}


@dataclass
class DuoStreamModelOutputWithPast(BaseModelOutputWithPast):
    """
    Outputs of `DuoStreamModel`. `hidden_states` and `attentions` are the fusion stack's, over text and image tokens.

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, image_seq_length, hidden_size)`, *optional*):
            The projected image tokens, as they enter the fusion stack.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class DuoStreamCausalLMOutputWithPast(ModelOutput):
    """
    Outputs of `DuoStreamForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Language-modelling loss (next-token prediction).
        logits (`torch.FloatTensor` of shape `(batch, seq_len, vocab_size)`):
            Scores of the next token at each position that `logits_to_keep` keeps; in training with `targets_per_row`,
            of shape `(batch, targets_per_row, vocab_size)`, at those that have a label; with `config.loss_chunk_size`
            or Liger's kernels none.
        past_key_values (`Cache`, *optional*): Keys and values of the fusion layers, then of the text layers.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): The fusion stack's.
        attentions (`tuple(torch.FloatTensor)`, *optional*): The fusion stack's.
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, image_seq_length, hidden_size)`, *optional*):
            The projected image tokens.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class DuoStreamProjector(nn.Module):
    """Image tokens to the width of the fusion stack: layer norm, one or two linear layers, learned positions."""

    def __init__(self, config: DuoStreamConfig):
        super().__init__()
        width, out = config.image_hidden_size, config.fusion_stack_config.hidden_size
        if config.projector_type == "mlp":
            inner = config.projector_hidden_size or out
            layers = [nn.LayerNorm(width), nn.Linear(width, inner), ACT2FN[config.projector_hidden_act]]
            self.layers: nn.Module = nn.Sequential(*layers, nn.Linear(inner, out))
        elif config.projector_type == "linear":
            self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))
        else:
            self.layers = nn.Identity()
        self.position_embeddings = (
            nn.Embedding(config.image_seq_length, out) if config.projector_position_embeddings else None
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layers(hidden_states)  # (num_images, image_seq_length, hidden)
        if self.position_embeddings is not None:
            # By its forward, for which weights that lie elsewhere are fetched
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            hidden_states = hidden_states + self.position_embeddings(positions)
        return hidden_states


def no_grad_if_frozen(
    part: nn.Module, *inputs: torch.Tensor | None, past_key_values: Cache | None = None
) -> AbstractContextManager:
    """
    `torch.no_grad()` where neither a part nor its inputs nor its cache (which a prefix of PEFT's is in) is trained,
    even if the library asks its embeddings for a graph (`enable_input_require_grads`, for adapters behind them); else
    a context that changes nothing.
    """
    if not torch.is_grad_enabled():
        # A walk through all weights at each token that is written is a hundredth to a tenth of the time it takes
        return nullcontext()
    cached = () if past_key_values is None else past_key_values.layers
    states = [states for layer in cached if layer.is_initialized for states in (layer.keys, layer.values)]
    tensors = [*part.parameters(), *states, *(each for each in inputs if each is not None)]
    return nullcontext() if any(each.requires_grad for each in tensors) else no_grad()


def own_attention(config: DuoStreamConfig, attn_implementation: str | None) -> dict[str, str]:
    """Attention implementations of the sub-configs, by name, that don't support the one chosen for the whole model."""
    own = {}
    if not MODEL_MAPPING[type(config.vision_config)]._supports_sdpa:
        # A convolutional stream has no attention to choose, but would refuse whatever is chosen for the others
        own["vision_config"] = "eager"
    is_flash = is_flash_attention_requested(requested_attention_implementation=attn_implementation)
    if is_flash and config.bidirectional_images:
        # Flash kernels know causal and padding masks only; a picture's tokens see each other both ways
        own["fusion_stack_config"] = "sdpa"
    return own


class DuoStreamPreTrainedModel(PreTrainedModel):
    """Common to all DuoStream models: first weights, loading, composing from backbones, what is trained."""

    config_class = DuoStreamConfig
    config: DuoStreamConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DuoStreamProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Models share their weights: a checkpoint of one loads into another, whose own head alone is then new
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^score\.", r"^image_text_head\."]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # Where there is no safetensors file the library would take `pytorch_model.bin`, which is a pickle
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        # One name is for all streams, but some can't take it
        if isinstance(attn_implementation, str):
            by_stream = dict.fromkeys(("", "text_config", "vision_config", "fusion_stack_config"), attn_implementation)
            attn_implementation = by_stream | own_attention(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # For models from outside of the library it leaves out what `_init_weights` does to modules without weights of
        # their own, and so the backbones' own rules (GPT-2, CLIP) when a checkpoint lacks some. All of these models
        # initialise by the library's `initialization`, which needs no such care.
        return False

    def post_init(self) -> None:
        super().post_init()
        # FSDP looks for each of these layers, of which some backbones (RegNet, SigLIP) name more than they have
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & kinds

    def enable_input_require_grads(self) -> None:
        # The library's hook takes what embeddings give for a tensor, but Swin's and its kin's give a tuple
        def require_grads(module: nn.Module, args: Any, output: Any) -> None:
            (output[0] if isinstance(output, tuple) else output).requires_grad_(True)

        hooks = []
        for stream in (self.base_model.text_model, self.base_model.vision_model):
            try:
                hooks.append(stream.get_input_embeddings().register_forward_hook(require_grads))
            except NotImplementedError:
                continue  # a convolutional stream has none
        self._require_grads_hooks, self._require_grads_hook = hooks, hooks[0]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DuoStreamProjector) and module.position_embeddings is not None:
            # As large as what they are added to (a GELU lets through about 0.6 of a unit normal). With the embedding's
            # own small range they drown, and it takes several times as long to learn where things are.
            positions = module.position_embeddings
            std = 0.6 * self.config.initializer_range * math.sqrt(positions.embedding_dim)
            init.normal_(positions.weight, std=std)

    def freeze(self, *streams: str) -> None:
        """
        Stops training of whole parts, which then stay in eval mode, too.

        Args:
            streams (`str`): Any of `"text"`, `"vision"`, `"projector"` and `"fusion"`. A language-model head goes with
                `"fusion"`, or, where it is tied to the text stream's embeddings, with `"text"`.

        Raises:
            ValueError: There is no such part.
        """
        for name in streams:
            if name not in STREAMS:
                raise ValueError(f"There is no stream {name!r} to freeze; there are {', '.join(map(repr, STREAMS))}")
            for weight in self.stream_parameters(name):
                weight.requires_grad_(False)
        self.train(self.training)

    def stream_parameters(self, stream: str) -> list[nn.Parameter]:
        """The weights of a part, and of a language-model head that goes with it: see [`freeze`]."""
        weights = list(getattr(self.base_model, STREAMS[stream]).parameters())
        head = self.get_output_embeddings()
        if stream == "fusion" and head is not None and head.weight is not self.get_input_embeddings().weight:
            weights += head.parameters()
        return weights

    @classmethod
    def from_backbones(
        cls,
        text: Backbone,
        vision: Backbone,
        num_fusion_layers: int | None = None,
        fusion_config: PreTrainedConfig | dict | None = None,
        image_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> "DuoStreamPreTrainedModel":
        """
        Composes a model out of pretrained ones.

        With `num_fusion_layers`, a decoder's upper layers, final norm and head become the fusion stack and its lower
        layers the text stream; only the projector is new, and on text alone the model is the decoder it was. With
        `fusion_config` the whole text backbone is the text stream, and the fusion stack is new, too.

        Args:
            text (`str`, `os.PathLike` or `PreTrainedModel`): A decoder with its head (Llama, Qwen3, GPT-2, ...), or an
                encoder (BERT, ...) with a `fusion_config`: a local folder, a Hub id, or a loaded model, which is not
                copied: the new model has its weights, and what trains the one trains the other.
            vision (`str`, `os.PathLike` or `PreTrainedModel`): A vision model (SigLIP, CLIP, ViT, DINOv2, ConvNeXtV2,
                ResNet, ...), or one with a vision tower.
            num_fusion_layers (`int`, *optional*): How many upper layers of `text` pictures go through.
            fusion_config (`PreTrainedConfig` or `dict`, *optional*): A new fusion stack, as wide as `text`.
            image_size (`int`, *optional*): Side of the pictures in pixels, where the vision config has none (ResNet),
                or to read them in another size than its own.
            dtype (`str` or `torch.dtype`, *optional*): Of the weights. Defaults to that of `text`.
            kwargs: Other fields of [`DuoStreamConfig`]: `image_token_id` (defaults to the first number behind the
                vocabulary, so that no row of the embeddings changes), `num_image_update_layers` (of a model that
                writes, defaults to half of the fusion layers, rounded up, where they are of a type that may leave
                states out), `projector_type`, ...; or `token`, `cache_dir`, `local_files_only` and `force_download`,
                by which both backbones are fetched. One that needs other options (`revision`) is loaded by itself, and
                given as a model. None may be quantized: a composed model is, where it is loaded.

        Raises:
            ValueError: The two can't work together, or an argument is unknown; raised before any weight is loaded,
                where the configs tell.

        Example:

        ```python
        >>> from duostream import DuoStreamForConditionalGeneration

        >>> model = DuoStreamForConditionalGeneration.from_backbones(
        ...     text="HuggingFaceTB/SmolLM2-135M", vision="google/siglip-base-patch16-224", num_fusion_layers=8
        ... )
        ```
        """
        writes = cls.can_generate()
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        configs = config_of(text, **hub), config_of(vision, **hub)
        config = compose_config(*configs, num_fusion_layers, fusion_config, image_size, writes, **kwargs)
        stack = config.fusion_stack_config
        if writes and "num_image_update_layers" not in kwargs and stack.model_type in KNOWN_TYPES:
            # A classifier averages the states that all layers made
            config.num_image_update_layers = lower_half(stack.num_hidden_layers)
        text, vision = load_backbones(text, vision, config, **hub, **({} if dtype is None else {"dtype": dtype}))
        state_dict = compose_state_dict(text, vision, config, is_split=num_fusion_layers is not None)
        model, loading = cls.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype or text.dtype, output_loading_info=True
        )
        old = "text_model|vision_model" if num_fusion_layers is None else "text_model|vision_model|fusion_model"
        check_found(name for name in loading["missing_keys"] if re.match(rf"(model\.)?({old})\.", name))
        if num_fusion_layers is not None:
            check_is_unchanged(model, text)
        if getattr(text, "generation_config", None) is not None:
            # What ends a turn may stand there alone. How to sample is left to whoever writes
            told = text.generation_config
            if writes:
                for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                    setattr(model.generation_config, name, copy.copy(getattr(told, name)))
            elif told.eos_token_id is not None:
                # Where a head that writes is put in this one's place, it finds it in the config
                model.config.text_config.eos_token_id = copy.copy(told.eos_token_id)
        return model


class DuoStreamModel(DuoStreamPreTrainedModel):
    """
    The three transformers without a head.

    Text goes through `text_model` on its own, pictures through `vision_model` and `projector`; their states are
    joined in the order of `input_ids` and go through `fusion_model` together. An image token thus costs the fusion
    layers only, and is cached there only.
    """

    def __init__(self, config: DuoStreamConfig):
        config.check_fields()
        config.check_layers()
        config.check_picture()
        super().__init__(config)
        own = own_attention(config, config.fusion_stack_config._attn_implementation)
        if "fusion_stack_config" in own:
            logger.warning_once(
                "The fusion stack's masks are beyond flash attention: it uses `sdpa` instead. With "
                "`bidirectional_images=False` they are not."
            )
        for name, implementation in own.items():
            getattr(config, name)._attn_implementation = implementation
        self.text_model = AutoModel.from_config(config.text_config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self._position_options = position_options(config.vision_config, config.image_size, self.vision_model.forward)
        self.projector = DuoStreamProjector(config)
        self.fusion_model = AutoModel.from_config(config.fusion_stack_config)
        remove_final_norm(self.text_model)
        remove_embeddings(self.fusion_model)
        make_kept_states_alone(self.fusion_model)
        if config.num_image_reading_layers and not layers_of(self.fusion_model):
            raise ValueError(
                f"`num_image_update_layers={config.num_image_update_layers}` goes with fusion stacks of the types "
                f"{', '.join(KNOWN_TYPES)}, not with {config.fusion_stack_config.model_type}"
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "DuoStreamModel":
        # The batch norms of a frozen stream would drift away from its weights, and its dropout be noise for nothing
        super().train(mode)
        for name in STREAMS.values():
            part = getattr(self, name)
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Reads pictures.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): All pictures of all
                rows, in the order of their placeholders.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is of shape `(num_images, image_seq_length, hidden_size)`,
            the tokens that enter the fusion stack; `last_hidden_state` is what the vision stream gave, as are
            `hidden_states` and `attentions`, where they are asked for.

        Raises:
            ValueError: `pixel_values` are not of the shape or size that the vision model is for.
        """
        self._check_pixels(pixel_values)
        layer = self.config.vision_feature_layer
        dtype = next(self.vision_model.parameters()).dtype
        pixel_values = pixel_values.to(dtype)
        # Convolutions are up to twice as fast on pixels whose channels lie side by side
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if layer != -1:
            kwargs["output_hidden_states"] = True
        with no_grad_if_frozen(self.vision_model, pixel_values):
            outputs = self.vision_model(pixel_values=pixel_values, **self._position_options, **kwargs)
        grid = patch_grid(self.config.vision_config, self.config.image_size)
        features = image_tokens(outputs, layer, self.config.spatial_merge_size, grid)  # (num_images, tokens, width)
        expected = self.config.image_seq_length, self.config.image_hidden_size
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` of shape {tuple(pixel_values.shape)} give {features.shape[1]} tokens a picture, of "
                f"width {features.shape[2]}, but `config.image_seq_length` and `config.image_hidden_size` are "
                f"{expected[0]} and {expected[1]}"
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.projector(features),
            hidden_states=outputs.hidden_states,
            # Convolutional models have none
            attentions=getattr(outputs, "attentions", None),
        )

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises `ValueError` where a vision model might take pixels for those of another picture, or cut some off."""
        vision = self.config.vision_config
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(f"`pixel_values` is a {type(pixel_values).__name__}; expected a tensor of all pictures")
        given = f"`pixel_values` of shape {tuple(pixel_values.shape)}"
        if pixel_values.ndim != 4:
            raise ValueError(f"{given} can't be read; expected (num_images, channels, height, width)")
        # Models without patches read any size, and the number of their tokens tells whether it fits
        size = image_size_of(vision, self.config.image_size)
        if patch_grid(vision, self.config.image_size) is not None and tuple(pixel_values.shape[-2:]) != size:
            name = "vision_config.image_size" if self.config.image_size is None else "config.image_size"
            raise ValueError(
                f"{given} are of another size than the vision model's pictures: expected {size[0]} x {size[1]} pixels "
                f"(`{name}`)"
            )

    def read_images(
        self,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> BaseModelOutputWithPooling | None:
        """
        The states of the pictures that are given, as [`get_image_features`] returns them; none without pictures. Of
        the vision stream's states alone, as they are stored where that stream is frozen, `pooler_output` is made anew.

        Raises:
            ValueError: Both are given.
        """
        is_empty = isinstance(pixel_values, torch.Tensor) and pixel_values.shape[0] == 0
        if pixel_values is not None and not is_empty:
            if mm_encoder_outputs:
                raise ValueError("Only one of `pixel_values` and `mm_encoder_outputs` can be given")
            return self.get_image_features(pixel_values, return_dict=True)
        images = mm_encoder_outputs.get("image") if mm_encoder_outputs else None
        if images is None or images.pooler_output is not None:
            return images
        states = self.projector(images.last_hidden_state.to(self.dtype))  # (num_images, image_seq_length, hidden)
        return BaseModelOutputWithPooling(last_hidden_state=images.last_hidden_state, pooler_output=states)

    @property
    def _has_sharded_weights(self) -> bool:
        """Whether weights are sharded: ranks gather a part's when it runs, as with FSDP and DeepSpeed's ZeRO-3."""
        if not torch.distributed.is_initialized():
            return False
        # Which parts FSDP2 wraps is for the user to say, and PEFT wraps some once more
        is_fsdp = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in self.modules())
        return is_fsdp or hasattr(next(self.vision_model.parameters()), "ds_id")

    def _read_unused_picture(self) -> torch.Tensor:
        """
        0, made of a blank picture: of weights that are sharded, a rank that left out the vision stream would leave the
        others waiting in its all-gather.
        """
        vision, was_training = self.config.vision_config, self.vision_model.training
        # Batch norm keeps nothing of it
        self.vision_model.eval()
        size = image_size_of(vision, self.config.image_size)
        picture = torch.zeros(1, getattr(vision, "num_channels", 3), *size, device=self.device)
        features = self.get_image_features(picture).pooler_output
        self.vision_model.train(was_training)
        return 0 * features.sum()

    def split_cache(self, past_key_values: Cache) -> tuple[Cache, Cache | None]:
        """Views of one cache: the fusion stack's layers, and the text stream's behind them (`None` for an encoder)."""
        is_text_causal = self.config.is_text_causal
        num_fusion_layers = self.config.fusion_stack_config.num_hidden_layers
        num_layers = num_fusion_layers + self.config.text_config.num_hidden_layers * is_text_causal
        while past_key_values.layer_class_to_replicate is not None and len(past_key_values.layers) < num_layers:
            past_key_values.layers.append(past_key_values.layer_class_to_replicate())
        if len(past_key_values.layers) != num_layers:
            raise ValueError(
                f"`past_key_values` has {len(past_key_values.layers)} layers, but fusion stack and text stream "
                f"have {num_layers}: make it from `model.config`"
            )
        views = []
        for layers in (past_key_values.layers[:num_fusion_layers], past_key_values.layers[num_fusion_layers:]):
            view = Cache(layers=layers)
            if past_key_values.offloading:
                view.offloading = True
                view.only_non_sliding = past_key_values.only_non_sliding
                view.prefetch_stream = past_key_values.prefetch_stream
            views.append(view)
        return views[0], views[1] if is_text_causal else None

    def image_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the placeholders of image tokens stand: a mask of shape `(batch, seq_len)`."""
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            return input_ids == image_token_id
        if image_token_id >= self.config.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` {image_token_id} has no embedding: with `inputs_embeds`, give `mm_token_type_ids`"
            )
        token = torch.tensor(image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def prepare_decoding(
        self,
        past_key_values: Cache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        batch_size: int,
    ) -> dict[str, Any]:
        """
        Masks and positions of both streams for the next text tokens, all of a fixed size, so that a compiled forward
        over a static cache is never recompiled. `mm_token_type_ids` is of shape `(batch, past_len + seq_len)`.
        """
        is_image = mm_token_type_ids == 1
        fusion_cache, text_cache = self.split_cache(past_key_values)
        # Only the shape, dtype and device count
        shape = (batch_size, position_ids.shape[1], 0)
        shape_only = torch.empty(shape, dtype=self.dtype, device=is_image.device)
        masks = {
            "text": create_masks_for_generate(
                config=self.config.text_config,
                inputs_embeds=shape_only,
                attention_mask=text_padding_mask(is_image, attention_mask, text_window(self.config)),
                past_key_values=text_cache,
            ),
            "fusion": create_masks_for_generate(
                config=self.config.fusion_stack_config,
                inputs_embeds=shape_only,
                attention_mask=attention_mask,
                past_key_values=fusion_cache,
            ),
        }
        return {"attention_mask": masks, "text_position_ids": count_text(position_ids, is_image, attention_mask)}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        text_position_ids: torch.Tensor | None = None,
        images_per_row: int | None = None,
        prefix_length: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        states_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DuoStreamModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Text, with `config.image_seq_length` times `config.image_token_id` where a picture stands.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The pictures of all rows, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(batch, past_len + seq_len)`, or `dict`, *optional*):
                1 = token, 0 = padding. Or, for tokens of text behind a cache, the masks that `prepare_decoding` makes:
                `"text"` and `"fusion"`.
            position_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Positions that count all tokens. Defaults to the number of unpadded tokens before each.
            past_key_values (`Cache`, *optional*): The fusion layers first, the text layers behind them.
            token_type_ids (`torch.LongTensor` of shape `(batch, past_len + seq_len)`, *optional*):
                0 = prefix, whose tokens see each other both ways, in one piece; 1 = causal suffix. Absent: all causal.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, past_len + seq_len)`, *optional*):
                1 = image token. Needed to continue from a cache with pictures when rows differ.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq_len, hidden)`, *optional*):
                Instead of `input_ids`. Placeholders are found by `mm_token_type_ids` or by their embedding.
            use_cache (`bool`, *optional*): Defaults to `True`, except in training and with `images_per_row`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}`, instead of `pixel_values`. Of its `last_hidden_state` alone, the
                vision stream's states, `pooler_output` is made anew.
            text_position_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Positions that count text only, with an `attention_mask` from `prepare_decoding`.
            images_per_row (`int`, *optional*):
                The number of pictures in every row, where all rows have the same number (and, for several rows with a
                cache, where they stand in front of the text). The forward pass then never waits for the device.
            prefix_length (`torch.LongTensor` of shape `(batch,)`, *optional*):
                How many tokens of each row are prefix, padding apart. With `config.restart_positions`, needed to
                continue from a cache without `token_type_ids` of the whole sequence; else it has no effect.
            segment_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                For rows that hold several sequences one after the other, numbered 1, 2, ...: several rows in one, or
                several continuations of one beginning, as questions about one picture, where the beginning has 0.
                Each sees the beginning and itself, and counts its positions on from the beginning's end, so that its
                states are those of a row of its own. Goes without a cache. With `inputs_embeds` they may tell of the
                last tokens alone: those in front, as PEFT's virtual tokens, are shared.
            states_to_keep (`int` or `torch.LongTensor` of shape `(batch, num_kept)`, *optional*, defaults to 0):
                `last_hidden_state` of the last so many positions alone, of these positions of each row, each named
                once, or of all (0). Of the others the last fusion layer makes keys and values only, where it may.

        Returns:
            [`DuoStreamModelOutputWithPast`], with `last_hidden_state` of shape `(batch, seq_len, hidden)`, or
            `(batch, num_kept, hidden)`.

        Raises:
            ValueError: placeholders and pictures don't match, or the arguments contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given")
        given = input_ids if input_ids is not None else inputs_embeds
        if given.ndim != (2 if input_ids is not None else 3):
            name, width = ("input_ids", "") if input_ids is not None else ("inputs_embeds", ", hidden")
            raise ValueError(f"`{name}` is of shape {tuple(given.shape)}; expected (batch, seq_len{width})")
        batch_size, seq_len = given.shape[:2]
        past_key_values = self._open_cache(past_key_values, use_cache, images_per_row, segment_ids)
        fusion_cache, text_cache = (None, None) if past_key_values is None else self.split_cache(past_key_values)
        past_len = fusion_cache.get_seq_length() if fusion_cache is not None else 0
        if segment_ids is not None and inputs_embeds is not None:
            # PEFT puts virtual tokens in front, which all of a row's sequences share
            segment_ids = nn.functional.pad(segment_ids, (max(seq_len - segment_ids.shape[-1], 0), 0))
        self._check_shapes(
            batch_size, seq_len, past_len, attention_mask, position_ids, token_type_ids, mm_token_type_ids, segment_ids
        )

        images = self.read_images(pixel_values, mm_encoder_outputs)
        image_states = None if images is None else images.pooler_output
        unused = None
        # Decoding reads no pictures on any rank. With a static cache only the device knows whether it decodes, and is
        # asked last.
        may_be_first = isinstance(past_len, torch.Tensor) or past_len == 0
        if image_states is None and may_be_first and self._has_sharded_weights and past_len == 0:
            unused = self._read_unused_picture()
        num_image_tokens = 0 if image_states is None else math.prod(image_states.shape[:-1])

        fusion_attention_mask = attention_mask
        if isinstance(attention_mask, dict):
            fusion_attention_mask = attention_mask["fusion"]
            layout = StreamLayout(text_attention_mask=attention_mask["text"], text_position_ids=text_position_ids)
            plan = SequencePlan(layout, position_ids)
        else:
            plan = self._plan(
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                token_type_ids,
                mm_token_type_ids,
                segment_ids,
                past_key_values,
                text_cache,
                past_len,
                num_image_tokens,
                images_per_row,
            )
        layout, position_ids = plan.layout, plan.position_ids

        if self.config.restart_positions:
            if prefix_length is None:
                prefix_length = count_prefix(position_ids, token_type_ids, attention_mask, past_len, segment_ids)
            position_ids = restart_positions(position_ids, prefix_length)

        if segment_ids is not None:
            check_segment_windows(self.config, segment_ids, attention_mask, layout)
        if layout.text_len(seq_len) > 0:
            hidden_states = self._read_new_text(input_ids, inputs_embeds, layout, segment_ids, text_cache)
        else:
            hidden_states = image_states.new_empty(batch_size, 0, image_states.shape[-1])
        if unused is not None:
            hidden_states = hidden_states + unused
        if layout.join_index is not None:
            image_states = image_states.to(hidden_states.device, hidden_states.dtype)
            hidden_states = layout.join(hidden_states, image_states)  # (batch, seq_len, hidden)
        has_own_mask = plan.block_ids is not None or segment_ids is not None
        if self.config.restart_positions and attention_mask is None and fusion_cache is None:
            # The library takes positions that start anew for another row packed into this one
            fusion_attention_mask = attention_mask = position_ids.new_ones(batch_size, seq_len)
        if has_own_mask:
            fusion_attention_mask = fusion_mask(
                self.config, hidden_states, attention_mask, fusion_cache, plan.block_ids, segment_ids
            )

        if self.training and self.fusion_model.is_activation_checkpointing and not hidden_states.requires_grad:
            # Reentrant checkpoints pass gradients to adapters only if their inputs have one, too
            hidden_states.requires_grad_()
        fusion, num_update_layers = self.fusion_model, self.config.num_image_update_layers
        kept = states_to_make(fusion, hidden_states, states_to_keep, plan.updated_index, num_update_layers)
        cache = fusion_cache
        if kept and not self._has_sharded_weights:
            cache = keeping(kept, fusion, fusion_cache, has_own_mask, kwargs)
        if plan.image_mask is not None:
            kwargs |= {"image_mask": plan.image_mask, "num_image_update_layers": num_update_layers}
        outputs = self.fusion_model(
            inputs_embeds=hidden_states,
            attention_mask=fusion_attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=fusion_cache is not None,
            **kwargs,
        )
        return DuoStreamModelOutputWithPast(
            last_hidden_state=take(outputs.last_hidden_state, states_to_keep),  # (batch, num_kept, hidden)
            past_key_values=past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_states,
        )

    def _plan(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        text_cache: Cache | None,
        past_len: int | torch.Tensor,
        num_image_tokens: int,
        images_per_row: int | None,
    ) -> SequencePlan:
        """Finds the pictures, checks what is told of tokens, counts positions and deals the tokens out."""
        given = input_ids if input_ids is not None else inputs_embeds
        batch_size, seq_len = given.shape[:2]
        has_new_images = num_image_tokens > 0
        is_image = locate_images(
            given,
            partial(self.image_placeholders, input_ids, inputs_embeds),
            attention_mask,
            mm_token_type_ids,
            past_len,
            text_cache.get_seq_length() if text_cache is not None else 0,
            has_new_images,
            noted=pictures_read(past_key_values, past_len),
        )
        image_mask, updated_index, block_ids = None, None, None
        if is_image is not None and has_new_images and self.config.num_image_reading_layers:
            image_seq_length = self.config.image_seq_length
            image_mask = image_tokens_to_leave(is_image[:, -seq_len:], image_seq_length)  # (batch, seq_len)
            updated_index = positions_to_update(
                self.fusion_model, image_mask, attention_mask, num_image_tokens, image_seq_length, images_per_row
            )
        if token_type_ids is not None:
            check_prefix(token_type_ids, attention_mask, segment_ids)
        if segment_ids is not None:
            check_segments(segment_ids, is_image, token_type_ids, attention_mask, self.config.image_seq_length)
        # Text alone that is read forwards is left to the library: without a mask and a cache it tells several
        # sequences apart by their positions
        has_own_order = has_new_images or token_type_ids is not None or self.config.restart_positions
        if segment_ids is not None and position_ids is None:
            position_ids = default_segment_positions(segment_ids, attention_mask)
        elif segment_ids is None and position_ids is not None and has_own_order and seq_len > 1:
            check_one_sequence(position_ids, attention_mask)
        given_position_ids = position_ids
        needs_positions = attention_mask is not None or is_image is not None or self.config.restart_positions
        if position_ids is None and needs_positions:
            position_ids = count_tokens(attention_mask, past_len, batch_size, seq_len, given.device)
        layout = deal_out(
            self.config,
            is_image,
            attention_mask,
            # Without a cache text is packed to the left: its positions are the default ones
            given_position_ids if has_new_images and text_cache is None else position_ids,
            seq_len,
            num_image_tokens,
            text_cache,
            images_per_row,
            segment_ids,
        )
        if text_cache is not None and layout.text_index is not None:
            num_left_out = seq_len - layout.text_len(seq_len)
            num_untold = 0 if mm_token_type_ids is None else is_image.shape[1] - mm_token_type_ids.shape[1]
            note_pictures(past_key_values, is_image, layout.kept_columns, num_left_out, num_image_tokens, num_untold)
        needs_mask = updated_index is not None or (has_new_images and self.config.bidirectional_images)
        if needs_mask or token_type_ids is not None:
            if is_image is None:
                is_image = torch.zeros(batch_size, int(past_len) + seq_len, dtype=torch.bool, device=given.device)
            block_ids = tokens_that_see_each_other(
                self.config, is_image, token_type_ids, attention_mask, seq_len, segment_ids
            )
        return SequencePlan(layout, position_ids, block_ids, image_mask, updated_index)

    def _check_shapes(
        self,
        batch_size: int,
        seq_len: int,
        past_len: int | torch.Tensor,
        attention_mask: torch.Tensor | dict[str, Any] | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
    ) -> None:
        """Raises `ValueError` where arguments tell of other tokens than there are, which masks would take for some."""
        new, whole = "(batch, seq_len)", "(batch, past_len + seq_len)"
        rows, total_len = (batch_size,), past_len + seq_len
        if isinstance(attention_mask, torch.Tensor):
            check_shape("attention_mask", attention_mask, f"{whole}, as each stream makes its own", rows, total_len)
        check_shape("position_ids", position_ids, new, (1, batch_size), seq_len)
        check_shape("token_type_ids", token_type_ids, f"{whole} or {new}", rows, total_len, seq_len)
        check_shape("segment_ids", segment_ids, new, rows, seq_len)
        if mm_token_type_ids is not None:
            # Whether they are as long as they must be is for `locate_images` to know
            check_shape("mm_token_type_ids", mm_token_type_ids, whole, rows, mm_token_type_ids.shape[-1])

    def _open_cache(
        self,
        past_key_values: Cache | None,
        use_cache: bool | None,
        images_per_row: int | None,
        segment_ids: torch.Tensor | None,
    ) -> Cache | None:
        """The cache that a forward pass reads and fills: the one that is given, a new one, or none."""
        is_text_causal = self.config.is_text_causal
        if segment_ids is not None and (past_key_values is not None or not is_text_causal):
            raise ValueError("`segment_ids` are for a text stream that is a decoder, and go without `past_key_values`")
        if past_key_values is not None:
            if not is_text_causal:
                raise ValueError(
                    "`past_key_values` can't be used: an encoder's text states change with every new token"
                )
            return past_key_values
        if use_cache is None:
            # The library's models fill a cache in training, too. Without one the text is packed closer, and rows of
            # which `images_per_row` was told, as the collator does, may have their pictures at different places.
            is_wanted = getattr(self.config.text_config, "use_cache", True)
            use_cache = is_wanted and not self.training and images_per_row is None
        return DynamicCache(config=self.config) if use_cache and is_text_causal and segment_ids is None else None

    def _read_new_text(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        layout: StreamLayout,
        segment_ids: torch.Tensor | None,
        text_cache: Cache | None,
    ) -> torch.Tensor:
        """What the text stream makes of the tokens that are dealt out to it: states `(batch, text_len, hidden)`."""
        text_attention_mask = layout.text_attention_mask
        if segment_ids is not None:
            text_attention_mask = text_segment_mask(self.config, segment_ids, layout, self.dtype)
        if layout.text_index is not None:
            if inputs_embeds is None:
                input_ids = input_ids.gather(1, layout.text_index)  # (batch, text_len)
                # Slots behind a row's text may hold placeholders, which need not have an embedding
                input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            else:
                index = layout.text_index.unsqueeze(-1).expand(-1, -1, inputs_embeds.shape[-1])
                inputs_embeds = inputs_embeds.gather(1, index)  # (batch, text_len, hidden)
        with no_grad_if_frozen(self.text_model, inputs_embeds, past_key_values=text_cache):
            return self.text_model(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=text_attention_mask,
                position_ids=self._as_the_text_stream_counts(layout.text_position_ids),
                past_key_values=text_cache,
                use_cache=text_cache is not None,
            ).last_hidden_state

    def read_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        What the text stream makes of text on its own, padded on either side: states `(batch, text_len, hidden)`.

        Raises:
            ValueError: There are placeholders of pictures in it.
        """
        check(
            (input_ids != self.config.image_token_id).all(),
            "`input_ids` hold placeholders of pictures: expected texts without markers, which are read on their own",
        )
        position_ids = None
        if attention_mask is not None:
            batch_size, seq_len = input_ids.shape
            position_ids = count_tokens(attention_mask, 0, batch_size, seq_len, input_ids.device)
        with no_grad_if_frozen(self.text_model):
            return self.text_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=self._as_the_text_stream_counts(position_ids),
                use_cache=False,
                **kwargs,
            )

    def _as_the_text_stream_counts(self, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """
        RoBERTa and its kin count from behind the number of the padding token, whose row in the table is zero; others
        (Nystromformer) from where a table of their own begins.
        """
        embeddings = getattr(self.text_model, "embeddings", None)
        if position_ids is None or embeddings is None:
            return position_ids
        padding_idx = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        if padding_idx is not None:
            return position_ids + padding_idx + 1
        own_position_ids = getattr(embeddings, "position_ids", None)
        return position_ids if own_position_ids is None else position_ids + own_position_ids[:, :1]

    def fuse(
        self,
        image_hidden_states: torch.Tensor,
        text_hidden_states: torch.Tensor,
        text_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The fusion stack's states of pairs, a picture in front of each text, that are read both ways. The two streams'
        states come ready, so that they can be paired anew at no further cost to the streams.

        Args:
            image_hidden_states (`torch.FloatTensor` of shape `(batch, image_seq_length, hidden)`):
                From `get_image_features(...).pooler_output`.
            text_hidden_states (`torch.FloatTensor` of shape `(batch, text_len, hidden)`): From `read_text`.
            text_attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*): 0 = padding.

        Returns:
            `torch.FloatTensor` of shape `(batch, image_seq_length + text_len, hidden)`.
        """
        hidden_states = torch.cat([image_hidden_states.to(text_hidden_states.dtype), text_hidden_states], dim=1)
        batch_size, seq_len = hidden_states.shape[:2]
        kwargs: dict[str, Any] = {}
        if self.config.num_image_reading_layers:
            image_seq_length = image_hidden_states.shape[1]
            is_image = torch.arange(seq_len, device=hidden_states.device) < image_seq_length
            # (batch, seq_len)
            kwargs["image_mask"] = image_tokens_to_leave(is_image.expand(batch_size, -1), image_seq_length)
            kwargs["num_image_update_layers"] = self.config.num_image_update_layers
        attention_mask = None
        if text_attention_mask is not None:
            # An image token is as valid as any
            attention_mask = nn.functional.pad(text_attention_mask, (image_hidden_states.shape[1], 0), value=1)
        prefix = torch.zeros(batch_size, seq_len, dtype=torch.long, device=hidden_states.device)
        return self.fusion_model(
            inputs_embeds=hidden_states,
            attention_mask=fusion_mask(self.config, hidden_states, attention_mask, block_ids=prefix),
            position_ids=count_tokens(attention_mask, 0, batch_size, seq_len, hidden_states.device),
            use_cache=False,
            **kwargs,
        ).last_hidden_state


class DuoStreamLMHeadModel(DuoStreamPreTrainedModel):
    """What the models with a language-model head have in common."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    # A fused cross-entropy of states, labels and the head's matrix, which makes no logits:
    # `apply_liger_kernel_to_duostream` sets it
    linear_cross_entropy: Callable[..., torch.Tensor] | None = None

    def __init__(self, config: DuoStreamConfig):
        super().__init__(config)
        self.model = DuoStreamModel(config)
        self.lm_head = nn.Linear(config.fusion_stack_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        width = getattr(embeddings, "embedding_dim", self.lm_head.in_features)
        if config.tie_word_embeddings and width != self.lm_head.in_features:
            raise ValueError(
                f"`tie_word_embeddings` is True, but the text stream's embeddings are {width} wide and the head reads "
                f"states of {self.lm_head.in_features}: expected False"
            )
        # The name of the embedding matrix is the text backbone's own
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}

    def post_init(self) -> None:
        super().post_init()
        embeddings = self._tied_weights_keys["lm_head.weight"].removesuffix(".weight")
        if self.config.tie_word_embeddings and embeddings not in self._tp_plan:
            # A text backbone without a plan (GPT-2) stays whole, and with its embeddings the head, which is the same
            # matrix: ranks would put together what none of them has split
            self._tp_plan.pop("lm_head", None)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`DuoStreamModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def without_placeholders(self, labels: torch.Tensor) -> torch.Tensor:
        """`labels` of tokens that can be written: placeholders never are."""
        return labels.masked_fill(labels == self.config.image_token_id, -100)

    def keep_labelled(
        self, labels: torch.Tensor | None, targets_per_row: int | None
    ) -> tuple[int | torch.Tensor, torch.Tensor | None]:
        """`states_to_keep` and their labels: all, or in training, with `targets_per_row`, those that have one."""
        if not self.training or labels is None or targets_per_row is None:
            return 0, labels
        return find_labelled(labels, targets_per_row)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores of the vocabulary, of shape `(batch, seq_len, vocab_size)`."""
        logits = self.lm_head(hidden_states)
        softcap = getattr(self.config.fusion_stack_config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    @property
    def fuses_loss(self) -> bool:
        """Whether [`linear_cross_entropy`] makes the loss: it needs the head's matrix, whole and alone."""
        weight = getattr(self.lm_head, "weight", None)
        is_plain = type(self.lm_head) is nn.Linear and not isinstance(weight, DTensor) and not hasattr(weight, "ds_id")
        return self.linear_cross_entropy is not None and is_plain

    def chunks_loss(self, labels: torch.Tensor | None) -> bool:
        """Whether the loss is made without logits of all labels at once: see `config.loss_chunk_size`."""
        return self.training and labels is not None and (self.fuses_loss or self.config.loss_chunk_size is not None)

    def chunked_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        Cross-entropy of states with what they predict, from the logits of `config.loss_chunk_size` tokens at a time,
        or by `linear_cross_entropy`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq_len, hidden)`): States.
            labels (`torch.Tensor` of shape `(batch, seq_len)`):
                What the state in the same place predicts; -100 = nothing.
            num_items_in_batch (`int`, *optional*): What the sum is divided by. Defaults to the number of labels.
        """

        def chunk_loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.compute_logits(states).float(), labels, reduction="sum")

        labels = labels.to(hidden_states.device).flatten()  # (batch * seq_len,)
        states = hidden_states.flatten(0, 1)  # (batch * seq_len, hidden)
        if not len(states):
            # Nothing to learn, but a graph that reaches every weight
            return self.compute_logits(states).sum()
        if self.linear_cross_entropy is not None and self.fuses_loss:
            softcap = getattr(self.config.fusion_stack_config, "final_logit_softcapping", None)
            loss = self.linear_cross_entropy(states, self.lm_head.weight, labels, reduction="sum", softcap=softcap)
            return loss / count_items(labels, num_items_in_batch)
        chunk_size = self.config.loss_chunk_size
        chunks = zip(states.split(chunk_size), labels.split(chunk_size), strict=True)
        # torch's own `linear_cross_entropy` (2.13) does this, too, but took 1.7 to 11 times as long on a CPU
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / count_items(labels, num_items_in_batch)

    def logits_and_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Cross-entropy of each position with its own label, the mean of all or the sum divided by `num_items`."""
        if self.chunks_loss(labels):
            return None, self.chunked_loss(hidden_states, labels, num_items)
        logits = self.compute_logits(hidden_states)
        labels = labels.to(logits.device)
        total = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return logits, total / count_items(labels, num_items)


def check_can_write(config: DuoStreamConfig) -> None:
    """Raises `ValueError` if a stream reads both ways: it would see the tokens it has yet to write."""
    for name in ("text_config", "fusion_stack_config"):
        sub_config = getattr(config, name)
        if not is_causal(sub_config):
            raise ValueError(
                f"`{name}` of type {sub_config.model_type!r} reads both ways: a model that writes would see the "
                "tokens it has yet to write. Use a decoder, or `is_decoder=True` where the type knows it"
            )


def leaving_out_placeholders(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
    """A `forward` that is put in the place of a model's own and makes the loss itself, of tokens that are written."""

    @wraps(forward)
    def call(self: DuoStreamLMHeadModel, *args: Any, **kwargs: Any) -> ModelOutput:
        for name in ("labels", "shift_labels"):
            if kwargs.get(name) is not None:
                kwargs[name] = self.without_placeholders(kwargs[name])
        return forward(self, *args, **kwargs)

    return call


class DuoStreamForConditionalGeneration(DuoStreamLMHeadModel, DuoStreamGenerationMixin):
    """DuoStream with a language-model head: it reads text and pictures and writes text."""

    def __init__(self, config: DuoStreamConfig):
        check_can_write(config)
        super().__init__(config)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL's trainers put a `forward` of their own here (`add_fused_lm_head`), which makes the loss from the base
        # model's states and all labels, placeholders' too. A hook would run in all other forwards, those that are
        # compiled and exported among them, and not where `forward` itself is called.
        is_replaced = name == "forward" and isinstance(value, MethodType)
        if is_replaced and "fused_lm_head" in signature(value, follow_wrapped=False).parameters:
            value = MethodType(leaving_out_placeholders(value.__func__), self)
        super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        text_position_ids: torch.Tensor | None = None,
        images_per_row: int | None = None,
        prefix_length: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        targets_per_row: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DuoStreamCausalLMOutputWithPast:
        r"""
        Takes what [`DuoStreamModel.forward`] takes, and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Tokens to predict, in their own positions: the loss shifts them. -100 is ignored, and so are
                placeholders, which are never written: TRL has them in its labels, and `Trainer` counts them there, so
                that the loss it reports is smaller by their share; so are those that padding would predict, on the
                left of a row. The token after a picture is predicted from an image token; the collator leaves it out.
                With `label_smoothing_factor`, `Trainer` makes the loss by itself, of all labels but -100: those of the
                collator hold no placeholders.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Logits of the last so many positions, of these positions, or of all (0).
            targets_per_row (`int`, *optional*):
                The largest number of `labels` in a row, not counting the first position, which nothing predicts. In
                training, `logits` are then of the positions that predict a label alone, of shape
                `(batch, targets_per_row, vocab_size)`.

        Example:

        ```python
        >>> from PIL import Image
        >>> from duostream import DuoStreamForConditionalGeneration, DuoStreamProcessor

        >>> model = DuoStreamForConditionalGeneration.from_pretrained("runs/quickstart/finetuned")
        >>> processor = DuoStreamProcessor.from_pretrained("runs/quickstart/finetuned")
        >>> picture = {"type": "image", "image": Image.open("scene.png")}
        >>> question = {"type": "text", "text": "What color is the square?"}
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": [picture, question]}],
        ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ... )
        >>> sequence = model.generate(**inputs, max_new_tokens=8)[0]  # (seq_len + new_tokens,)
        >>> answer = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```
        """
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
            labels = self.without_placeholders(labels)
        # Of a trainer that splits sequences over ranks, which shifts labels before
        shifted = kwargs.pop("shift_labels", None)
        if shifted is not None:
            shifted = self.without_placeholders(shifted)
        num_items_in_batch = take_num_items(kwargs)
        states_to_keep: int | torch.Tensor = 0
        if labels is not None:
            shifted = shift_labels(labels, attention_mask) if shifted is None else shifted
            states_to_keep, shifted = self.keep_labelled(shifted, targets_per_row)
        elif type(logits_to_keep) is int and logits_to_keep > 0:
            states_to_keep = logits_to_keep
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            token_type_ids=token_type_ids,
            mm_token_type_ids=mm_token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            text_position_ids=text_position_ids,
            images_per_row=images_per_row,
            prefix_length=prefix_length,
            segment_ids=segment_ids,
            states_to_keep=states_to_keep,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits, loss = None, None
        if self.chunks_loss(labels):
            loss = self.chunked_loss(hidden_states, shifted, num_items_in_batch)
        else:
            logits = self.compute_logits(slice_logits_to_keep(hidden_states, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=shifted,
                    **kwargs,
                )
        return DuoStreamCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = [
    "DuoStreamForConditionalGeneration",
    "DuoStreamLMHeadModel",
    "DuoStreamModel",
    "DuoStreamPreTrainedModel",
]


# Tables that `register` doesn't fill, but that the library reads: `transformers serve` knows by the first two what it
# may load, and `Trainer` by the last that smoothed labels are those of the next token. Here, so that the code that a
# checkpoint carries fills them, too.
for names in (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
):
    names[DuoStreamConfig.model_type] = DuoStreamForConditionalGeneration.__name__
