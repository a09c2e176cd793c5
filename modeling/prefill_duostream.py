"""
Reading a prompt: the last layer's states are read at the last positions alone, where the next token is predicted. At
all others, image tokens first of all, that layer makes no more than the keys and values that later tokens attend to.
"""

from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from .composition_duostream import stack_of

AnyCache = TypeVar("AnyCache", bound=Cache)


class PrefillCache(Cache):
    """
    A view of a stack's cache, which tells the stack's last layer how many positions are read.

    Args:
        layers (`list`): Of the cache.
        num_kept (`int`): States of so many last positions are read.
    """

    def __init__(self, layers: list[Any], num_kept: int):
        super().__init__(layers=layers)
        self.num_kept = num_kept


class _KeysAndValuesMade(Exception):
    """Ends a layer's run where its keys and values are cached."""


class _LastLayerCache(Cache):
    """For a layer that is run twice: caches its keys and values, ends the first run, and hands them to the second."""

    def __init__(self, layers: list[Any], seq_len: int):
        super().__init__(layers=layers)
        self.seq_len = seq_len
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.states is None:
            self.states = super().update(*args, **kwargs)
            raise _KeysAndValuesMade
        return self.states


def read_last_positions(stack: nn.Module) -> None:
    """
    Has the last layer of a stack, wherever a [`PrefillCache`] comes, run for the positions that are read alone. Its
    states of the others are zero. Any decoder's layer will do, as it is run by its own code: once for its keys and
    values, and once more, for few positions, on all of them.

    Args:
        stack (`nn.Module`): A decoder of `transformers`.
    """
    layers = [each for each in stack_of(stack).children() if isinstance(each, nn.ModuleList)]
    layer = layers[0][-1]
    layer.register_forward_pre_hook(_cut, with_kwargs=True)
    layer.register_forward_hook(_pad, with_kwargs=True)


def _cut(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    cache = _find(PrefillCache, args, kwargs)
    if cache is None:
        return None
    given = dict(zip(signature(layer.forward).parameters, args, strict=False)) | kwargs
    last = {name: _last_positions(name, value, cache) for name, value in given.items()}
    if any(value is NotImplemented for value in last.values()):
        return None
    name = next(name for name, value in given.items() if value is cache)
    keys_and_values = _LastLayerCache(cache.layers, given["hidden_states"].shape[1])
    try:
        layer(**{**given, name: keys_and_values})
    except _KeysAndValuesMade:
        return (), {**last, name: keys_and_values}
    raise RuntimeError(f"{type(layer).__name__} was given a cache, and left it as it was")


def _last_positions(name: str, value: Any, cache: PrefillCache) -> Any:
    """A layer's argument for the last positions alone; `NotImplemented` where its kind isn't known."""
    num_kept = cache.num_kept
    if name == "hidden_states":
        return value[:, -num_kept:]  # (batch, num_kept, hidden)
    if name == "attention_mask":
        if value is None:
            # Causal: the last position sees all that is cached, but neither do those before it, nor is there an end
            # to what a static cache holds
            return None if num_kept == 1 and not cache.is_compileable else NotImplemented
        is_mask = isinstance(value, torch.Tensor) and value.ndim == 4
        return value[:, :, -num_kept:] if is_mask else NotImplemented  # (batch, heads or 1, num_kept, all tokens)
    if value is None or isinstance(value, (bool, int, float, str, Cache)):
        return value
    if name == "position_ids":
        return value[..., -num_kept:]  # (batch or 1, num_kept)
    if name == "position_embeddings":
        return tuple(each[..., -num_kept:, :] for each in value)  # (batch or 1, num_kept, rotary_dim) each
    return NotImplemented


def _find(cache_class: type[AnyCache], args: tuple, kwargs: dict[str, Any]) -> AnyCache | None:
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, cache_class)), None)


def _pad(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    cache = _find(_LastLayerCache, args, kwargs)
    if cache is None:
        return None
    hidden_states = output[0] if isinstance(output, tuple) else output
    num_missing = cache.seq_len - hidden_states.shape[1]
    hidden_states = nn.functional.pad(hidden_states, (0, 0, num_missing, 0))  # (batch, seq_len, hidden)
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
