"""A picture as it is seen, from whatever holds one: a path, an address, base64, bytes of pixels."""

import base64
import os
from io import BytesIO
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub.utils import httpx
from PIL.TiffImagePlugin import TiffImageFile
from transformers.image_transforms import convert_to_rgb, to_pil_image
from transformers.image_utils import (
    infer_channel_dimension_format,
    is_valid_image,
    make_flat_list_of_images,
)

# Qwen2-VL's: an image processor that scales the shorter side would make gigabytes of one row of pixels
MAX_ASPECT_RATIO = 200


def read_picture(image: str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor) -> PIL.Image.Image:
    """
    A picture as it is seen, in RGB: a file's first frame, upright as its EXIF says, on white where it is transparent.
    Of 16 bits a channel the upper 8 are taken.

    Args:
        image (`str`, `os.PathLike`, `PIL.Image.Image`, or an array of `uint8`): An address, a path and base64 are
            opened as the library's `load_image` opens them. What it then makes of 16 bits is white, and of
            transparency the colours that it hides. An array of two dimensions is grayscale, one of four channels RGBA.

    Raises:
        TypeError, ValueError: It is no picture, its pixels are no known brightness, or one side is more than
            `MAX_ASPECT_RATIO` times the other.
        Exception: It can't be read; which one depends on the kind of file.
    """
    picture = open_picture(os.fspath(image)) if isinstance(image, str | os.PathLike) else image
    if is_array(picture):
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8:
            raise ValueError(f"an array of {pixels.dtype}; expected a picture's pixels in `uint8`")
        if pixels.ndim == 2:
            picture = PIL.Image.fromarray(pixels)
        else:
            channels = infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
            picture = to_pil_image(pixels, input_data_format=channels)
    if not isinstance(picture, PIL.Image.Image):
        raise TypeError(f"expected a picture, or where to find one, not {picture!r:.100}")
    width, height = picture.size
    if not width or not height or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels; one side may be up to {MAX_ASPECT_RATIO} times the other")
    # Pillow before 10.3 gives PNGs of 16 bits the mode of 32
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if picture.mode in ("I", "F") and not is_16_bit:
        raise ValueError(f"pixels of mode {picture.mode!r}; expected 8 or 16 bits a channel")
    if isinstance(picture, TiffImageFile):
        # A file with a name Pillow (12.3) maps, and reads rows from it that are as long as those of the turned picture
        name, picture.filename = picture.filename, ""
        try:
            picture.load()
        finally:
            picture.filename = name
    picture.load()
    # TIFFs are turned as they are loaded, which their EXIF tells of no more, or (10.0) still
    if not isinstance(picture, TiffImageFile) and picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        picture = PIL.ImageOps.exif_transpose(picture)
    hidden = picture.info.get("transparency")
    if is_16_bit:
        values = np.asarray(picture)
        pixels = (values >> 8).astype(np.uint8)
        if hidden is not None:
            pixels[values == hidden] = 255
        return PIL.Image.fromarray(pixels).convert("RGB")
    if isinstance(hidden, tuple) and max(hidden) > 255:
        # Of 16 bits, where Pillow keeps 8 of the pixels'
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in hidden)
    if "A" in picture.getbands() or "transparency" in picture.info:
        return PIL.Image.fromarray(convert_to_rgb(picture, return_numpy=True))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def is_array(image: Any) -> bool:
    return is_valid_image(image) and not isinstance(image, PIL.Image.Image)


def open_picture(source: str) -> PIL.Image.Image:
    if source.startswith(("http://", "https://")):
        return PIL.Image.open(BytesIO(httpx.get(source, follow_redirects=True).raise_for_status().content))
    if os.path.isfile(source):
        return PIL.Image.open(source)
    try:
        return PIL.Image.open(BytesIO(base64.b64decode(source.split(",")[-1])))
    except (ValueError, PIL.UnidentifiedImageError) as error:
        raise ValueError("no address, no file that is there, and no picture in base64") from error


def num_images(images: Any) -> int:
    """How many pictures there are in a list, in lists for rows, or in an array. Raises `ValueError` if it is mixed."""
    try:
        return len(make_flat_list_of_images(images))
    except Exception as error:
        raise ValueError(
            f"`images` is {images!r:.100}; expected pictures in a list, or a list for each row"
        ) from error
