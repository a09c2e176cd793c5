"""What a vision model yields as tokens: the one place that knows how a feature map becomes a sequence."""

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.utils import ModelOutput

# Of a square picture, or height and width, in pixels
Side: TypeAlias = int | Sequence[int]


def image_tokens(
    outputs: ModelOutput,
    vision_feature_layer: int | Sequence[int] = -1,
    spatial_merge_size: int = 1,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """
    Takes one sequence of image tokens out of a vision model's outputs.

    Args:
        outputs (`ModelOutput`):
            Outputs of any vision `AutoModel`. `hidden_states` must be there unless `vision_feature_layer` is -1.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1):
            -1 takes `last_hidden_state`; any other number indexes `hidden_states`. A list takes several, side by side
            in each token; of feature maps, the larger ones go from space to depth first.
        spatial_merge_size (`int`, *optional*, defaults to 1):
            A square of so many by so many tokens becomes one, as wide as all of them together (Shi et al. 2016, from
            space to depth).
        grid (`tuple[int, int]`, *optional*): Rows and columns of a sequence that is merged: see `patch_grid`.

    Returns:
        `torch.Tensor` of shape `(num_images, image_seq_length, image_hidden_size)`. Sequences are taken as they are,
        class and register tokens included; feature maps are read row by row.

    Raises:
        ValueError: The tokens can't be merged: they are no grid, or one that the squares don't fill. Or layers of
            several sizes can't be laid side by side, or one isn't there.
    """
    numbers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    if not numbers:
        raise ValueError("`vision_feature_layer` is a list of no layers")
    num_states = len(getattr(outputs, "hidden_states", None) or ())
    for number in numbers:
        if number != -1 and not -num_states <= number < num_states:
            raise ValueError(
                f"`vision_feature_layer` {number} is none of the {num_states} states of the vision model's layers"
            )
    layers = [outputs.last_hidden_state if number == -1 else outputs.hidden_states[number] for number in numbers]
    features = layers[0] if len(layers) == 1 else side_by_side(layers)
    if spatial_merge_size > 1:
        if features.ndim == 3:
            if grid is None or features.shape[1] != grid[0] * grid[1]:
                patches = "without a patch size" if grid is None else f"of {grid[0]} x {grid[1]} patches"
                raise ValueError(
                    f"`spatial_merge_size` is {spatial_merge_size}, but a picture's {features.shape[1]} tokens are no "
                    f"grid {patches}: neither a class token nor tokens that the model itself has merged fit in"
                )
            features = features.transpose(1, 2).unflatten(2, grid)  # (num_images, channels, rows, columns)
        if features.shape[2] % spatial_merge_size or features.shape[3] % spatial_merge_size:
            raise ValueError(
                f"`spatial_merge_size` {spatial_merge_size} doesn't divide the {features.shape[2]} x "
                f"{features.shape[3]} tokens of a picture"
            )
        # (num_images, channels * spatial_merge_size ** 2, rows / spatial_merge_size, columns / spatial_merge_size)
        features = nn.functional.pixel_unshuffle(features, spatial_merge_size)
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)  # (num_images, height * width, channels)
    return features


def side_by_side(layers: list[torch.Tensor]) -> torch.Tensor:
    """
    Several layers' states as one, as wide as all of them together, with as many tokens as the smallest has.

    Args:
        layers (`list[torch.Tensor]`): Sequences of shape `(num_images, tokens, width)`, or feature maps of shape
            `(num_images, channels, rows, columns)`.

    Raises:
        ValueError: The sequences are of several lengths, or the smallest map's sides don't divide those of another.
    """
    sizes = [tuple(layer.shape[1:-1] if layer.ndim == 3 else layer.shape[2:]) for layer in layers]
    smallest = min(sizes)
    factors = [size[0] // smallest[0] for size in sizes]
    for size, factor in zip(sizes, factors, strict=True):
        if size != tuple(factor * side for side in smallest) or (len(size) == 1 and factor > 1):
            told = " and ".join(" x ".join(map(str, each)) for each in sizes)
            raise ValueError(f"`vision_feature_layer` names layers of {told} tokens, which can't be laid side by side")
    if len(smallest) == 1:
        return torch.cat(layers, dim=-1)  # (num_images, tokens, sum of widths)
    maps = [nn.functional.pixel_unshuffle(layer, factor) for layer, factor in zip(layers, factors, strict=True)]
    return torch.cat(maps, dim=1)  # (num_images, sum of channels, rows, columns)


def patch_grid(vision_config: PreTrainedConfig, image_size: Side | None = None) -> tuple[int, int] | None:
    """
    Rows and columns of patches in a picture, which a model that merges them (Swin) has fewer of at its end; `None` for
    a model without patches of one size. See `image_size_of` for the arguments.
    """
    patch_size = getattr(vision_config, "patch_size", None)
    if not isinstance(patch_size, int):
        return None
    height, width = image_size_of(vision_config, image_size)
    return height // patch_size, width // patch_size


def position_options(
    vision_config: PreTrainedConfig, image_size: Side | None, forward: Callable[..., Any]
) -> dict[str, Any]:
    """
    By what a vision model's `forward` reads pictures of another size than its own: most that learn positions
    interpolate those between them only where they are told to. (DINOv2 does so by itself.)
    """
    is_own = image_size is None or getattr(vision_config, "image_size", None) is None
    name = "interpolate_pos_encoding"
    return {} if is_own or name not in inspect.signature(forward).parameters else {name: True}


def image_token_shape(
    vision_config: PreTrainedConfig,
    vision_feature_layer: int | list[int] = -1,
    spatial_merge_size: int = 1,
    image_size: Side | None = None,
) -> tuple[int, int]:
    """
    Number and width of the tokens that one picture gives, found by running the vision model on the meta device: no
    memory, no weights, and right for every architecture without knowing any.

    Args:
        vision_config (`PreTrainedConfig`): A config of any vision `AutoModel`.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1): See `image_tokens`.
        spatial_merge_size (`int`, *optional*, defaults to 1): See `image_tokens`.
        image_size (`int` or `list[int]`, *optional*): See `image_size_of`.

    Returns:
        `(image_seq_length, image_hidden_size)`.

    Raises:
        ValueError: The size of the pictures isn't known, or the model can't be run so on the meta device.
    """
    given = vision_config.model_type, vision_config.to_json_string()
    # `lru_cache` takes what has a hash
    layers = vision_feature_layer if isinstance(vision_feature_layer, int) else tuple(vision_feature_layer)
    size = tuple(image_size) if isinstance(image_size, list) else image_size
    return _image_token_shape(*given, layers, spatial_merge_size, size)


@lru_cache(maxsize=64)
def _image_token_shape(
    model_type: str,
    config_json: str,
    vision_feature_layer: int | tuple[int, ...],
    spatial_merge_size: int,
    image_size: Side | None,
) -> tuple[int, int]:
    vision_config = CONFIG_MAPPING[model_type].from_dict(json.loads(config_json))
    height, width = image_size_of(vision_config, image_size)
    if model_type == "vit_mae":
        raise ValueError("`vision_config` of type 'vit_mae' hides three quarters of a picture at random: use 'vit'")
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModel.from_config(copy.deepcopy(vision_config)).eval()
            pixel_values = torch.empty(2, getattr(vision_config, "num_channels", 3), height, width)
            options = position_options(vision_config, image_size, model.forward)
            outputs = model(pixel_values=pixel_values, output_hidden_states=vision_feature_layer != -1, **options)
            grid = patch_grid(vision_config, image_size)
            shape = outputs.last_hidden_state.shape
            if len(shape) == 4 and height == width and shape[2] != shape[3]:
                raise ValueError(f"its map of shape {tuple(shape)} is not (num_images, channels, rows, columns)")
            tokens = image_tokens(outputs, vision_feature_layer, spatial_merge_size, grid)
            if len(tokens) != len(pixel_values):
                raise ValueError(f"of {len(pixel_values)} pictures it makes {len(tokens)} sequences")
        _, image_seq_length, image_hidden_size = tokens.shape
    except Exception as error:
        raise ValueError(
            f"`vision_config` of type {model_type!r} gives no image tokens at `vision_feature_layer` "
            f"{vision_feature_layer} for pictures of {height} x {width} pixels: {error}"
        ) from error
    return image_seq_length, image_hidden_size


def image_size_of(vision_config: PreTrainedConfig, image_size: Side | None = None) -> tuple[int, int]:
    """
    Height and width of the pictures in pixels: `image_size`, a side or both, or by default that of `vision_config`.

    Raises:
        ValueError: Neither tells it, or it is no such thing.
    """
    name = "image_size"
    if image_size is None:
        name, image_size = "vision_config.image_size", getattr(vision_config, "image_size", None)
    if image_size is None:
        raise ValueError(
            f"`vision_config` of type {vision_config.model_type!r} has no `image_size`: set "
            "`vision_config.image_size`, or the whole config's, to the height and width of the pictures in pixels"
        )
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    is_pair = isinstance(sides, list | tuple) and len(sides) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"`{name}` is {image_size!r:.100}; expected pixels, or height and width")
    return sides[0], sides[1]
