"""What a vision model yields as tokens: the one place that knows how a feature map becomes a sequence."""

import copy
from functools import lru_cache

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.utils import ModelOutput


def image_tokens(outputs: ModelOutput, vision_feature_layer: int = -1) -> torch.Tensor:
    """
    Takes one sequence of image tokens out of a vision model's outputs.

    Args:
        outputs (`ModelOutput`):
            Outputs of any vision `AutoModel`. `hidden_states` must be there unless `vision_feature_layer` is -1.
        vision_feature_layer (`int`, *optional*, defaults to -1):
            -1 takes `last_hidden_state`; any other number indexes `hidden_states`.

    Returns:
        `torch.Tensor` of shape `(num_images, image_seq_length, image_hidden_size)`. Sequences are taken as they are,
        class and register tokens included; feature maps are read row by row.
    """
    features = outputs.last_hidden_state if vision_feature_layer == -1 else outputs.hidden_states[vision_feature_layer]
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)  # (num_images, height * width, channels)
    return features


def image_token_shape(vision_config: PreTrainedConfig, vision_feature_layer: int = -1) -> tuple[int, int]:
    """
    Number and width of the tokens that one picture gives, found by running the vision model on the meta device: no
    memory, no weights, and right for every architecture without knowing any.

    Args:
        vision_config (`PreTrainedConfig`): A config of any vision `AutoModel`, with an `image_size`.
        vision_feature_layer (`int`, *optional*, defaults to -1): See `image_tokens`.

    Returns:
        `(image_seq_length, image_hidden_size)`.

    Raises:
        ValueError: `vision_config` has no `image_size`, or its model can't be run on the meta device.
    """
    return _image_token_shape(vision_config.model_type, vision_config.to_json_string(), vision_feature_layer)


@lru_cache(maxsize=64)
def _image_token_shape(model_type: str, config_json: str, vision_feature_layer: int) -> tuple[int, int]:
    import json

    from transformers import CONFIG_MAPPING

    vision_config = CONFIG_MAPPING[model_type].from_dict(json.loads(config_json))
    height, width = image_size_of(vision_config)
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModel.from_config(copy.deepcopy(vision_config)).eval()
            pixel_values = torch.empty(1, getattr(vision_config, "num_channels", 3), height, width)
            outputs = model(pixel_values=pixel_values, output_hidden_states=vision_feature_layer != -1)
        _, image_seq_length, image_hidden_size = image_tokens(outputs, vision_feature_layer).shape
    except Exception as error:
        raise ValueError(
            f"`vision_config` of type {model_type!r} gives no image tokens at `vision_feature_layer="
            f"{vision_feature_layer}` for pictures of {height} x {width} pixels: {error}"
        ) from error
    return image_seq_length, image_hidden_size


def image_size_of(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures that `vision_config` is for. Raises `ValueError` without one."""
    image_size = getattr(vision_config, "image_size", None)
    if image_size is None:
        raise ValueError(
            f"`vision_config` of type {vision_config.model_type!r} has no `image_size`: set `vision_config.image_size`"
            " to the height and width of the pictures in pixels"
        )
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    is_pair = isinstance(sides, list | tuple) and len(sides) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"`vision_config.image_size` is {image_size!r:.100}; expected pixels, or height and width")
    return sides[0], sides[1]
