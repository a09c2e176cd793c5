"""The pretrained parts of a new model: a vision model with its image processor, and what a tokenizer must have."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
)

from .. import DuoStreamPreTrainedModel, DuoStreamProcessor
from ..processing.chat_template_duostream import default_chat_template


def load_vision(vision: str, image_size: int | None = None) -> tuple[BaseImageProcessor, PreTrainedConfig, int]:
    """
    A vision model's image processor, its config, and the side in pixels of the pictures that the image processor
    makes: its own, or another, to which whole pictures are resized.

    Raises:
        ValueError: The image processor makes pictures of several sizes, or of another than is asked for.
    """
    image_processor, (height, width) = _image_processor(vision, image_size)
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(
            f"`image_size` is {image_size}, but of a picture of 64 x 96 pixels the image processor of {vision!r} "
            f"makes one of {height} x {width}: it can't resize whole pictures to such squares"
        )
    if height != width:
        raise ValueError(
            f"The image processor of {vision!r} makes {height} x {width} pixels of a picture of 64 x 96; expected "
            "squares of all, as by `do_center_crop`, or a `size` of one height and width"
        )
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size"):
        config.image_size = height  # convolutions take any
    return image_processor, config, height


def _image_processor(vision: str, image_size: int | None) -> tuple[BaseImageProcessor, tuple[int, int]]:
    """A vision model's image processor, for pictures of another size if one is told, and what it makes of one."""
    gray = Image.fromarray(np.full((64, 96, 3), 128, dtype=np.uint8))
    sizes = [{"height": image_size, "width": image_size}, {"shortest_edge": image_size}]
    for size in sizes:
        options: dict[str, Any] = {} if image_size is None else {"size": size, "do_center_crop": False}
        image_processor = AutoImageProcessor.from_pretrained(vision, **options)
        try:
            return image_processor, image_processor(gray, return_tensors="np")["pixel_values"].shape[-2:]
        except (AttributeError, KeyError, ValueError) as error:
            if image_size is None:
                raise
            failed = error  # ConvNeXt's and ResNet's knows the second alone, and makes squares of it
    raise ValueError(f"`image_size` is {image_size}, which the image processor of {vision!r} can't make") from failed


def take_vision(model: DuoStreamPreTrainedModel, vision: str) -> None:
    """Puts a pretrained vision model into a model whose config has that model's config."""
    config = model.config.vision_config
    model.base_model.vision_model = AutoModel.from_pretrained(
        vision, config=config, dtype=model.dtype, use_safetensors=True
    )


def check_answers_end(processor: DuoStreamProcessor) -> None:
    """
    Raises:
        ValueError: The chat template ends answers with an `eos_token`, and the tokenizer has none.
    """
    template = default_chat_template(processor.chat_template)
    if processor.tokenizer.eos_token is None and "eos_token" in template:
        raise ValueError(
            "The tokenizer has no `eos_token` and no `sep_token`, so that nothing would end answers: add one "
            "(`tokenizer.add_special_tokens({'eos_token': ...})`), or give it a chat template that ends them"
        )
