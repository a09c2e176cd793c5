"""
A layer's states are made where they are read. The last layer's are at few positions: at the end of a prompt, where the
next token is predicted, and in training where there are labels. Of image tokens, but for each picture's last, the
layers above `config.num_image_update_layers` make none. At all other positions a layer needs to make no more than the
keys and values that those few attend to.
"""

from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import is_flash_attention_requested

from .composition_duostream import stack_of
from .stream_layout_duostream import first_where, without_padding

# Their layers attend by positions and masks as they are given, and cache keys and values alone. (GPT-Neo reads windows
# off the numbers of queries and keys, Llama 4 scales by a cache's length.) Each is tested; others make all states.
KNOWN_TYPES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)

# Multiplications and additions that a layer must be spared. On an H200, where a layer took a millisecond to launch, a
# second run of the layers lost with 8.5e11 and won with 9.2e11 and 28e11 (32 rows of 196 image tokens, 2048 wide, or
# of 2304, 576 wide, and 8 of 2304, 2048 wide, in `duostream benchmark prefill --num_image_update_layers 0 0`).
OPERATIONS_WORTH_A_LAUNCH = 9e11

# In a run for keys and values alone, of how many positions. Each thread has its own.
_num_unread_queries: ContextVar[int] = ContextVar("num_unread_queries", default=0)

AnyCache = TypeVar("AnyCache", bound=Cache)


def lower_half(num_fusion_layers: int) -> int:
    """`num_image_update_layers` of a model that is composed anew: the lower half of its layers, or one more."""
    return (num_fusion_layers + 1) // 2


class KeptPositions:
    """
    The positions of which states are kept, and the others. What follows from them is worked out once for all layers.

    Args:
        index (`torch.LongTensor` of shape `(batch, num_kept)`): Those that are kept.
        seq_len (`int`): Of all.
    """

    def __init__(self, index: torch.Tensor, seq_len: int):
        self.index, self.seq_len = index, seq_len
        # No `cached_property`: before Python 3.12 it has a lock, which no compiler knows
        self._others: torch.Tensor | None = None
        self._order: torch.Tensor | None = None
        self._places: torch.Tensor | None = None

    @property
    def others(self) -> torch.Tensor:
        """Those that are not kept, in order, of shape `(batch, seq_len - num_kept)`."""
        if self._others is None:
            batch_size, num_kept = self.index.shape
            is_other = torch.ones(batch_size, self.seq_len, dtype=torch.bool, device=self.index.device)
            self._others = first_where(is_other.scatter(1, self.index, False))[:, : self.seq_len - num_kept]
        return self._others

    @property
    def order(self) -> torch.Tensor:
        """The others, and then those that are kept, of shape `(batch, seq_len)`."""
        if self._order is None:
            self._order = torch.cat([self.others, self.index], dim=1)
        return self._order

    @property
    def places(self) -> torch.Tensor:
        """Where in that order each position stands, of shape `(batch, seq_len)`."""
        if self._places is None:
            numbers = torch.arange(self.seq_len, device=self.index.device).expand_as(self.order)
            self._places = torch.empty_like(self.order).scatter(1, self.order, numbers)
        return self._places


class CacheOfKeptStates(Cache):
    """
    A stack's cache, or what stands for one, that tells layers which of their states are read.

    Args:
        cache (`Cache`): Of the stack; or `None`, and nothing is cached.
        config (`PreTrainedConfig`): Of the stack.
        kept (`dict[nn.Module, int | KeptPositions]`):
            By layer: states of so many last positions, or of these. Other layers make all.
    """

    def __init__(self, cache: Cache | None, config: PreTrainedConfig, kept: dict[nn.Module, int | KeptPositions]):
        super().__init__(layers=(DynamicCache(config=config) if cache is None else cache).layers)
        self.kept, self.stores = kept, cache is not None
        # Of a whole that is compiled, not of a layer by itself
        self.is_traced = torch.compiler.is_compiling()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.stores:
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)


class _KeysAndValuesMade(Exception):
    """Ends a layer's run where its keys and values are made."""


class _CacheOfOneLayer(Cache):
    """
    For a layer that is run twice: takes the keys and values of its first run, ends that, and hands them to the second.

    Args:
        cache (`CacheOfKeptStates`): What they go into.
        kept (`int` or `KeptPositions`):
            The positions of the second run. The first is of the others, or, where this is a number, of all.
        hidden_states (`torch.Tensor` of shape `(batch, seq_len, hidden)`): What the layer was given.
        kept_states (`torch.Tensor` of shape `(batch, num_kept, hidden)`): Those of the second run.
    """

    def __init__(
        self,
        cache: CacheOfKeptStates,
        kept: int | KeptPositions,
        hidden_states: torch.Tensor,
        kept_states: torch.Tensor,
    ):
        super().__init__(layers=cache.layers)
        self.cache, self.kept, self.hidden_states, self.kept_states = cache, kept, hidden_states, kept_states
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.states is None:
            self.states = key_states, value_states
            if isinstance(self.kept, int):
                self.states = self.cache.update(key_states, value_states, *args, **kwargs)
            raise _KeysAndValuesMade
        if isinstance(self.kept, int):
            return self.states
        keys = torch.cat([self.states[0], key_states], dim=2)  # (batch, heads, seq_len, head_dim)
        values = torch.cat([self.states[1], value_states], dim=2)
        if self.cache.stores:
            keys, values = take(keys, self.kept.places, dim=2), take(values, self.kept.places, dim=2)
        return self.cache.update(keys, values, *args, **kwargs)


def refuses_cache(part: PreTrainedModel) -> bool:
    """
    Whether the library takes the cache from a part's layers: in training with checkpoints of activations, without
    gradients, too.
    """
    return part.training and part.is_activation_checkpointing


def layers_of(stack: PreTrainedModel) -> list[nn.Module]:
    """A decoder's layers; none, if its type isn't a known one or something is wrapped around it."""
    if getattr(getattr(stack, "config", None), "model_type", None) not in KNOWN_TYPES:
        return []
    return list(next((each for each in stack_of(stack).children() if isinstance(each, nn.ModuleList)), []))


def make_kept_states_alone(stack: PreTrainedModel) -> None:
    """
    Hooks the layers of a stack so that a layer that a [`CacheOfKeptStates`] names makes the kept states alone. It is
    run twice by its own code, as other hooks see: on the other positions (on all, where `kept` is a number) until keys
    and values are made, then on the kept ones to its end. Queries, which the first run has no use for, its `q_proj`
    makes for one position there, if it has one (and that wasn't replaced later). At all other positions its output is
    its input. So it is where an `image_mask` of shape `(batch, seq_len)` holds, too, in all but the lowest
    `num_image_update_layers`. Layers of types that are not known stay as they are.

    Args:
        stack (`PreTrainedModel`): A decoder of `transformers`.
    """
    for number, layer in enumerate(layers_of(stack)):
        layer.register_forward_pre_hook(_cut, with_kwargs=True)
        layer.register_forward_hook(partial(_put_back, number=number), with_kwargs=True)
        for name, part in layer.named_modules():
            if name.endswith("q_proj"):
                part.register_forward_pre_hook(_ask_once)
                part.register_forward_hook(_repeat_query)


def makes_all_states(config: PreTrainedConfig) -> bool:
    """
    Whether a stack leaves nothing out: with flash attention, which may read off the positions that a row holds several
    sequences, for which one position is too few; in a graph with gradients; in an exported one, whose sizes are open.
    """
    if torch.compiler.is_compiling():
        # Before torch 2.7 nothing tells an export apart
        is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
        if torch.is_grad_enabled() or is_exporting():
            return True
    return is_flash_attention_requested(config)


def is_worth_it(num_kept: int, shape: tuple[int, int, int], device: torch.device, layer: nn.Module) -> bool:
    """
    Whether more is saved than it costs: a run for keys and values, up to a quarter of a layer's, or the sorting; and,
    where the host only launches what a device does, the time it takes to launch a second run.

    Args:
        num_kept (`int`): How many positions are kept.
        shape (`tuple[int, int, int]`): `(batch, seq_len, hidden)`, of what the layer would be given.
        device (`torch.device`): Where it would be.
        layer (`nn.Module`): The layer.
    """
    batch_size, seq_len, width = shape
    if not 0 < num_kept <= 0.75 * seq_len:
        return False
    if device.type == "cpu":
        return True
    operations = 2 * sum(weight.numel() for weight in layer.parameters()) + 4 * seq_len * width
    return operations * batch_size * (seq_len - num_kept) >= OPERATIONS_WORTH_A_LAUNCH


def image_tokens_to_leave(is_image: torch.Tensor, image_seq_length: int) -> torch.Tensor:
    """
    The image tokens that upper layers may only read, as a mask of the shape of `is_image`, `(batch, seq_len)`: all but
    each picture's last, by whose state the word right behind the picture is told.
    """
    return is_image & (is_image.cumsum(dim=1) % image_seq_length != 0)


def positions_to_update(
    stack: PreTrainedModel,
    image_mask: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_image_tokens: int,
    image_seq_length: int,
    images_per_row: int | None = None,
) -> torch.Tensor | None:
    """
    The positions of which all layers make new states, of shape `(batch, num_updated)`. Rows that have fewer of them
    than others are filled up with positions that are padding, or that the mask names. `None` where layers are seen to
    leave nothing out, so that no mask need be made for it ([`keeping`] knows further cases).

    Args:
        stack (`PreTrainedModel`): The decoder.
        image_mask (`torch.BoolTensor` of shape `(batch, seq_len)`): See [`image_tokens_to_leave`].
        attention_mask (`torch.Tensor` of shape `(batch, past_len + seq_len)`, *optional*): 0 = padding.
        num_image_tokens (`int`): In all rows together.
        image_seq_length (`int`): Tokens a picture.
        images_per_row (`int`, *optional*): Of every row, if all have the same number: then no device is waited for.
    """
    layers = layers_of(stack)
    # What is wrapped around a stack need not have a config
    if not layers or makes_all_states(stack.config):
        return None
    batch_size, seq_len = image_mask.shape
    if attention_mask is not None:
        attention_mask = attention_mask[:, -seq_len:]
    is_updated = without_padding(~image_mask, attention_mask)
    if batch_size == 1:
        images_per_row = num_image_tokens // image_seq_length
    if images_per_row is None:
        if torch.compiler.is_compiling():
            return None  # the graph would end where the device is waited for
        num_updated = int(is_updated.sum(dim=1).max())
    else:
        num_updated = seq_len - images_per_row * (image_seq_length - 1)
    if not is_worth_it(num_updated, (batch_size, seq_len, stack.config.hidden_size), image_mask.device, layers[-1]):
        return None
    return first_where(is_updated)[:, :num_updated]  # (batch, num_updated)


def states_to_make(
    stack: PreTrainedModel,
    hidden_states: torch.Tensor,
    states_to_keep: int | torch.Tensor,
    updated_index: torch.Tensor | None,
    num_image_update_layers: int | None,
) -> dict[nn.Module, int | KeptPositions]:
    """
    The layers that need not make all states, with those that they need make: the last one those that are read
    (`states_to_keep`), and those that only read image tokens the others (`updated_index`, if there are any).
    """
    # All make the state of a single token
    seq_len = hidden_states.shape[1]
    layers = layers_of(stack) if seq_len > 1 else []
    kept: dict[nn.Module, int | KeptPositions] = {}
    if layers and updated_index is not None:
        kept = dict.fromkeys(layers[num_image_update_layers:], KeptPositions(updated_index, seq_len))
    num_kept = states_to_keep if isinstance(states_to_keep, int) else states_to_keep.shape[1]
    if layers and is_worth_it(num_kept, tuple(hidden_states.shape), hidden_states.device, layers[-1]):
        is_number = isinstance(states_to_keep, int)
        kept[layers[-1]] = states_to_keep if is_number else KeptPositions(states_to_keep, seq_len)
    return kept


def keeping(
    kept: dict[nn.Module, int | KeptPositions],
    stack: PreTrainedModel,
    cache: Cache | None,
    has_own_mask: bool,
    kwargs: dict[str, Any],
) -> Cache | None:
    """The cache, telling what is kept where nothing else is asked of the layers and they may be run twice."""
    config = stack.config
    if makes_all_states(config):
        return cache
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if kwargs.get(name) or getattr(config, name, False):
            return cache
    if cache is None:
        # The library would make the masks by the sizes of a cache that isn't there
        may_cut = has_own_mask and not stack.is_activation_checkpointing
    else:
        may_cut = not (torch.is_grad_enabled() or cache.offloading or refuses_cache(stack))
    return CacheOfKeptStates(cache, config, kept) if may_cut else cache


def take(states: torch.Tensor, kept: int | torch.Tensor, dim: int = 1) -> torch.Tensor:
    """
    The kept positions of states whose first dimension is the batch, or 1.

    Args:
        states (`torch.Tensor`): With positions along `dim`.
        kept (`int` or `torch.LongTensor` of shape `(batch, num_kept)`):
            So many last positions (0 = all), or these of each row.
        dim (`int`, defaults to 1): At least 1.
    """
    if isinstance(kept, int):
        # No `min`: a compiled forward for any length would not know that one is left, not even of one
        length = states.shape[dim]
        return states.narrow(dim, length - kept, kept) if 0 < kept < length else states
    batch_size, num_kept = kept.shape
    if batch_size == states.shape[0] == 1:
        # The same, in a fraction of the time: whole rows are copied
        return states.index_select(dim, kept[0].to(states.device))  # (1, ..., num_kept, ...)
    shape = [batch_size, *states.shape[1:]]
    states = states.expand(shape)
    shape[dim] = num_kept
    index = kept.to(states.device).view(batch_size, *[1] * (dim - 1), num_kept, *[1] * (states.ndim - dim - 1))
    return states.gather(dim, index.expand(shape))  # (batch, ..., num_kept, ...)


def _cut(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    cache = _find(CacheOfKeptStates, args, kwargs)
    # A copy of a layer has this hook, too. Where a layer is compiled by itself, with its hooks, it makes all states.
    if cache is None or layer not in cache.kept or torch.compiler.is_compiling() != cache.is_traced:
        return None
    kept = cache.kept[layer]
    is_static = cache.is_compileable
    # The class's: one that is compiled can't be looked at while a model around it is
    names = list(signature(type(layer).forward).parameters)[1 : len(args) + 1]
    if len(names) < len(args):
        return None
    given = dict(zip(names, args, strict=True)) | kwargs
    positions = kept if isinstance(kept, int) else kept.index
    cut = {name: _cut_argument(name, value, positions, is_static) for name, value in given.items()}
    if any(value is NotImplemented for value in cut.values()):
        return None
    keys_and_values = _CacheOfOneLayer(cache, kept, given["hidden_states"], cut["hidden_states"])
    if isinstance(kept, KeptPositions):
        # Keys and values are made without a mask
        given |= {
            name: _cut_argument(name, value, kept.others, is_static)
            for name, value in given.items()
            if name != "attention_mask"
        }
        if not cache.stores:
            mask = cut["attention_mask"]
            cut["attention_mask"] = take(mask, kept.order, dim=3)  # (batch, heads or 1, num_kept, seq_len)
    for arguments in (given, cut):
        arguments.update({name: keys_and_values for name, value in arguments.items() if value is cache})
    num_others = given["hidden_states"].shape[1]
    # By position what came so, as other hooks may look there
    in_place = [given.pop(name) for name in names]
    # Where a layer's forward is compiled, a run that ends in the middle is not: all others wouldn't be, either
    run = layer if cache.is_traced else getattr(layer.forward, "_torchdynamo_orig_callable", layer)
    # A compiler leaves out by itself what nobody reads
    token = None if cache.is_traced else _num_unread_queries.set(num_others)
    try:
        run(*in_place, **given)
    except _KeysAndValuesMade:
        return tuple(cut.pop(name) for name in names), cut
    finally:
        if token is not None:
            _num_unread_queries.reset(token)
    raise RuntimeError(f"{type(layer).__name__} was given a cache, but cached no keys and values")


def _ask_once(q_proj: nn.Module, args: tuple) -> tuple | None:
    if torch.compiler.is_compiling() or not _num_unread_queries.get():
        return None
    return args[0][:, :1], *args[1:]  # (batch, 1, hidden)


def _repeat_query(q_proj: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    if torch.compiler.is_compiling() or not (num_queries := _num_unread_queries.get()):
        return None
    # In memory of its own, as adapters around it may add to it
    return output.expand(-1, num_queries, -1).contiguous()  # (batch, num_queries, heads * head_dim)


def _cut_argument(name: str, value: Any, kept: int | torch.Tensor, is_static: bool) -> Any:
    """A layer's argument for the kept positions alone; `NotImplemented` where its kind isn't known."""
    if name == "hidden_states":
        return take(value, kept)  # (batch, num_kept, hidden)
    if name == "attention_mask":
        if value is None:
            # Causal: a last position sees all that is cached. Others don't, and a static cache has room behind it.
            is_last = isinstance(kept, int) and kept == 1
            return None if is_last and not is_static else NotImplemented
        is_mask = isinstance(value, torch.Tensor) and value.ndim == 4
        return take(value, kept, dim=2) if is_mask else NotImplemented  # (batch, heads or 1, num_kept, past+seq)
    if value is None or name == "image_mask" or isinstance(value, (bool, int, float, str, Cache)):
        return value
    if name == "position_ids":
        return take(value, kept)  # (batch or 1, num_kept)
    if name == "position_embeddings":
        return tuple(take(each, kept) for each in value)  # (batch or 1, num_kept, rotary_dim) each
    return NotImplemented


def _put_back(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, number: int) -> Any:
    keys_and_values = _find(_CacheOfOneLayer, args, kwargs)
    image_mask = kwargs.get("image_mask") if number >= kwargs.get("num_image_update_layers", 0) else None
    if keys_and_values is None and image_mask is None:
        return None
    states = output[0] if isinstance(output, tuple) else output
    # The layer may have taken what it was given to its own device
    if keys_and_values is None:
        states = _leave(states, args[0] if args else kwargs["hidden_states"], image_mask)
    else:
        kept, before = keys_and_values.kept, keys_and_values.hidden_states.to(states)
        if image_mask is not None:
            # Where a row holds more pictures than others do, some of their positions are among the kept ones
            positions = kept if isinstance(kept, int) else kept.index
            states = _leave(states, keys_and_values.kept_states, take(image_mask, positions))
        if isinstance(kept, int):
            states = torch.cat([before[:, :-kept], states], dim=1)  # (batch, seq_len, hidden)
        else:
            index = kept.index.to(states.device).unsqueeze(-1).expand_as(states)
            states = before.scatter(1, index, states)  # (batch, seq_len, hidden)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _leave(states: torch.Tensor, before: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """A layer's states, but for what it was given where the mask holds."""
    return torch.where(image_mask.to(states.device).unsqueeze(-1), before.to(states), states)  # (batch, len, hidden)


def _find(cache_class: type[AnyCache], args: tuple, kwargs: dict[str, Any]) -> AnyCache | None:
    # A plain loop: each layer asks twice a decoding step, when the host is what takes time
    for each in (*args, *kwargs.values()):
        if isinstance(each, cache_class):
            return each
    return None
