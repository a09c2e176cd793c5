"""DuoStream's processor: a stock tokenizer and a stock image processor, and placeholders for image tokens."""

import os
from pathlib import Path
from typing import Any

from transformers import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import TextInput
from transformers.utils import PROCESSOR_NAME

from ..configuration.saved_code_duostream import AUTO_MAP, is_foreign, save_code
from .chat_template_duostream import IMAGE_TOKEN, multimodal_chat_template


class DuoStreamProcessor(ProcessorMixin):
    r"""
    Turns text and pictures into a model's inputs.

    Args:
        image_processor (`BaseImageProcessor`): Any stock image processor.
        tokenizer (`PreTrainedTokenizerBase`): Any stock tokenizer.
        chat_template (`str`, *optional*): Defaults to the tokenizer's own, with pictures, or else to DuoStream's.
        image_token (`str`, *optional*, defaults to `"<|image|>"`):
            The marker of a picture in text, and the placeholder that it is expanded to. Added to the tokenizer as a
            special token if it isn't one.
        image_seq_length (`int`, *optional*, defaults to 36): Placeholders a picture: the model's
            `config.image_seq_length`.
        bidirectional_prefix (`bool`, *optional*, defaults to `False`):
            Whether the model reads what comes before the first answer both ways. If so, `token_type_ids` are
            returned: 0 in this prefix, 1 from the answer's role marker on, and 1 in a text without any: a completion.

    Raises:
        ValueError: `image_seq_length` is not positive.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        image_seq_length: int = 36,
        bidirectional_prefix: bool = False,
        **kwargs: Any,
    ):
        if image_seq_length < 1:
            raise ValueError(f"`image_seq_length` is {image_seq_length}; expected the number of tokens of a picture")
        if image_token not in tokenizer.all_special_tokens:
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_seq_length = image_seq_length
        self.bidirectional_prefix = bidirectional_prefix
        if chat_template is None:
            chat_template = multimodal_chat_template(tokenizer.chat_template, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        # See `DuoStreamConfig.to_json_file`
        if Path(json_file_path).name != PROCESSOR_NAME:
            return super().to_json_file(json_file_path)
        reference = (getattr(self, "auto_map", None) or {}).get("AutoProcessor", "")
        self.auto_map = {"AutoProcessor": reference if is_foreign(reference) else AUTO_MAP["AutoProcessor"]}
        save_code(Path(json_file_path).parent)
        super().to_json_file(json_file_path)
        del self.auto_map  # which a processor that is loaded hasn't, either

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*): Pictures: one, a list in the order of the markers, or a list for each
                row of `text`.
            text (`str` or `list[str]`, *optional*): Text with `image_token` where a picture stands.
            kwargs: Anything the tokenizer and the image processor take. `truncation` shortens text, never a picture.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` and `mm_token_type_ids` (1 = image token) of shape
            `(batch, seq_len)`, `pixel_values` of shape `(num_images, channels, height, width)` and, for a model with a
            bidirectional prefix, `token_type_ids` (0 = prefix) of shape `(batch, seq_len)`.

        Raises:
            ValueError: Markers and pictures of a row differ in number, or pictures alone exceed `max_length`.
        """
        # A tokenizer's own segment ids (BERT) would be read as marks of a prefix
        kwargs["return_token_type_ids"] = False
        text_kwargs = self._merge_kwargs(tokenizer_init_kwargs=getattr(self.tokenizer, "init_kwargs", {}), **kwargs)[
            "text_kwargs"
        ]
        truncation = text_kwargs.get("truncation")
        if text is not None and truncation and truncation != "do_not_truncate":
            outputs = self._call_truncated(images, text, text_kwargs, kwargs)
        else:
            outputs = super().__call__(images=images, text=text, **kwargs)
        if self.bidirectional_prefix and text is not None:
            rows, marker = outputs["input_ids"], self.generation_prompt_ids
            token_type_ids = [self.prefix_types(list(map(int, row)), marker) for row in rows]
            outputs["token_type_ids"] = token_type_ids
            outputs.convert_to_tensors(text_kwargs.get("return_tensors"), skip_tensor_conversion=["pixel_values"])
        return outputs

    def _call_truncated(self, images: Any, text: Any, text_kwargs: dict, kwargs: dict) -> BatchFeature:
        """Tokenizes in full, drops text tokens, then pads: the tokenizer alone would cut through pictures."""
        max_length = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        late = ("truncation", "max_length", "padding", "pad_to_multiple_of", "return_tensors", "padding_side")
        early = {name: value for name, value in kwargs.items() if name not in late}
        if "text_kwargs" in early:
            early["text_kwargs"] = {name: v for name, v in early["text_kwargs"].items() if name not in late}
        outputs = super().__call__(images=images, text=text, truncation=False, padding=False, **early)
        kept = [self.truncated_positions(ids, max_length, row) for row, ids in enumerate(outputs["input_ids"])]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in outputs:
                outputs[name] = [[ids[i] for i in keep] for ids, keep in zip(outputs[name], kept, strict=True)]
        padding = text_kwargs.get("padding", False)
        padded = self.tokenizer.pad(
            {name: outputs[name] for name in ("input_ids", "attention_mask") if name in outputs},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            padding_side=text_kwargs.get("padding_side"),
        )
        outputs.update(padded)
        if "mm_token_type_ids" in outputs:
            outputs["mm_token_type_ids"] = self.create_mm_token_type_ids(outputs["input_ids"])
        return BatchFeature(dict(outputs), tensor_type=text_kwargs.get("return_tensors"))

    def truncated_positions(self, input_ids: list[int], max_length: int, row: int = 0) -> list[int]:
        """
        Which positions of `input_ids` remain when text tokens are dropped, on the tokenizer's truncation side, until
        `max_length` is left.

        Raises:
            ValueError: the pictures alone are longer; names the `row` and both lengths.
        """
        text = [i for i, token in enumerate(input_ids) if token != self.image_token_id]
        room = max_length - (len(input_ids) - len(text))
        if room < 0:
            raise ValueError(
                f"Row {row}: pictures take {len(input_ids) - len(text)} tokens, more than `max_length`={max_length}"
            )
        dropped = text[room:] if self.tokenizer.truncation_side == "right" else text[: max(len(text) - room, 0)]
        return sorted(set(range(len(input_ids))) - set(dropped))

    def prefix_types(self, input_ids: list[int], marker: list[int] | None = None) -> list[int]:
        """
        Types of a row: 0 before the first answer's role marker, 1 from there on; all 1 without one. The marker is
        `generation_prompt_ids`; for many rows it is found once and given.
        """
        marker = self.generation_prompt_ids if marker is None else marker
        for i in range(len(input_ids) - len(marker) + 1):
            if input_ids[i : i + len(marker)] == marker:
                return [0] * i + [1] * (len(input_ids) - i)
        return [1] * len(input_ids)

    @property
    def generation_prompt_ids(self) -> list[int]:
        """The tokens that the chat template writes before an answer."""
        message = [{"role": "user", "content": [{"type": "text", "text": "."}]}]
        with_prompt = self.apply_chat_template(message, add_generation_prompt=True)
        prompt = with_prompt[len(self.apply_chat_template(message)) :]
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        As the library's, but for two defaults when `tokenize=True`: a user's text that happens to contain control
        tokens or the picture marker stays text (`sanitize_control_tokens`), and no special tokens are added to those
        the template writes.
        """
        if kwargs.get("tokenize") and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
            kwargs["processor_kwargs"] = {"add_special_tokens": False, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def validate_inputs(
        self, images: ImageInput | None = None, text: TextInput | list[TextInput] | None = None, **kwargs: Any
    ) -> None:
        # The library compares the totals, so that one picture too many in a row makes up for one missing in another
        if text is not None and images is not None:
            texts = [text] if isinstance(text, str) else text
            markers = [row.count(self.image_token) for row in texts]
            is_nested = isinstance(images, list | tuple) and all(isinstance(row, list | tuple) for row in images)
            if is_nested:
                if len(images) != len(texts):
                    raise ValueError(
                        f"{self.image_token!r} tokens in the prompts should be the same as the number of pictures: "
                        f"`images` has pictures for {len(images)} rows, but `text` has {len(texts)} rows"
                    )
                for row, (num_markers, pictures) in enumerate(zip(markers, images, strict=True)):
                    if num_markers != len(pictures):
                        raise ValueError(
                            f"Row {row} has {num_markers} picture markers {self.image_token!r} but {len(pictures)} "
                            "pictures"
                        )
            elif sum(markers) != (num_pictures := len(make_flat_list_of_images(images))):
                raise ValueError(
                    f"The rows have {markers} picture markers {self.image_token!r}, {sum(markers)} in all, but there "
                    f"are {num_pictures} pictures"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Placeholders for pictures of these sizes, `(height, width)` each: all take `image_seq_length`."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    @property
    def model_input_names(self) -> list[str]:
        own = ["mm_token_type_ids"] + (["token_type_ids"] if self.bidirectional_prefix else [])
        return [name for name in super().model_input_names if name != "token_type_ids"] + own


__all__ = ["DuoStreamProcessor"]
