"""DuoStream's processor: a stock tokenizer and a stock image processor, and placeholders for image tokens."""

import os
import re
from bisect import bisect
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_utils import (
    ImageInput,
    make_flat_list_of_images,
)
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER, TextInput
from transformers.utils import PROCESSOR_NAME, logging
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START

from ..configuration.saved_code_duostream import AUTO_MAP, is_foreign, save_code
from .chat_template_duostream import (
    IMAGE_TOKEN,
    check_contents,
    check_messages,
    check_text,
    check_tools,
    multimodal_chat_template,
)
from .pictures_duostream import is_array, num_images, read_picture

logger = logging.get_logger(__name__)


class DuoStreamProcessor(ProcessorMixin):
    r"""
    Turns text and pictures into a model's inputs.

    Args:
        image_processor (`BaseImageProcessor`): Any stock image processor.
        tokenizer (`PreTrainedTokenizerBase`): Any stock tokenizer. It is changed in place: it gets the `image_token`;
            one without an `eos_token` (BERT's) gets its `sep_token` as that, with which answers end; and one that
            tells segments apart (BERT's) returns its `token_type_ids` only if asked (`return_token_type_ids=True`),
            because the model would read them as marks of a prefix.
        chat_template (`str` or `dict`, *optional*): Defaults to the tokenizer's own, with pictures, or else to
            DuoStream's. Of several named ones, rows to train on are rendered by `"default"`.
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
        chat_template: str | dict[str, str] | None = None,
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
        if tokenizer.eos_token is None and tokenizer.sep_token is not None:
            tokenizer.eos_token = tokenizer.sep_token
        if "token_type_ids" in tokenizer.model_input_names:
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
            # Of its attributes a tokenizer saves those that are named here
            tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
        if chat_template is None:
            chat_template = multimodal_chat_template(tokenizer.chat_template, image_token)
            if tokenizer.chat_template is None and tokenizer.eos_token is None:
                logger.warning(
                    "The tokenizer has no `eos_token` and no `sep_token`, so that answers have no end in DuoStream's "
                    "chat template: a model can't learn to stop"
                )
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
                Of a text and its `text_pair` it cuts what the tokenizer cuts, and nothing beside pictures. And
                `chat_template`, what wrote the text, or its name, where it isn't the processor's own: by it the end
                of a bidirectional prefix is found.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` and `mm_token_type_ids` (1 = image token) of shape
            `(batch, seq_len)`, `pixel_values` of shape `(num_images, channels, height, width)` and, for a model with a
            bidirectional prefix, `token_type_ids` (0 = prefix) of shape `(batch, seq_len)`.

        Raises:
            ValueError: Markers and pictures of a row differ in number, pictures or texts that `truncation` doesn't
                cut exceed `max_length`, there is something that is no text, no picture or no length, or the end of a
                prefix can't be found.
        """
        # No argument of its own: the library forbids one that is an attribute, too
        chat_template = kwargs.pop("chat_template", None)
        rows = [text] if isinstance(text, str) else text
        if text is not None and not (isinstance(rows, list | tuple) and rows):
            raise ValueError(f"`text` is {text!r:.100}; expected a text, or a list of them")
        for row, each in enumerate(rows or ()):
            check_text(each, f"Row {row} of `text`")
        if isinstance(text, str) and isinstance(kwargs.get("text_pair"), str):
            kwargs["text_pair"] = [kwargs["text_pair"]]  # as the library makes a list of `text`
        for row, each in enumerate(kwargs.get("text_pair") or ()):
            check_text(each, f"Row {row} of `text_pair`")
            if self.image_token in each:
                raise ValueError(f"Row {row} of `text_pair` has a marker of a picture; expected them in `text`")
        for name in ("videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is given; expected text and pictures, which are all that is read")
        # A tokenizer's own segment ids (BERT) would be read as marks of a prefix
        kwargs["return_token_type_ids"] = False
        text_kwargs = self._merge_kwargs(tokenizer_init_kwargs=getattr(self.tokenizer, "init_kwargs", {}), **kwargs)[
            "text_kwargs"
        ]
        for name in ("max_length", "pad_to_multiple_of"):
            if (value := text_kwargs.get(name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected 1 or more")
        for name in ("stride", "return_overflowing_tokens"):
            if text_kwargs.get(name):
                raise ValueError(f"`{name}` is {text_kwargs[name]}; what is cut off a text is not returned")
        if text_kwargs.get("is_split_into_words"):
            raise ValueError("`is_split_into_words` is True; expected texts, not the words of a text")
        truncation = text_kwargs.get("truncation")
        marker = self.answer_marker(chat_template) if self.bidirectional_prefix and rows is not None else None
        # Role markers in a text that is read without special tokens are none
        checked = None if text_kwargs.get("split_special_tokens") else marker
        is_cut = rows is not None and truncation and truncation != "do_not_truncate"
        if is_cut and text_kwargs.get("text_pair") is not None and not any(self.image_token in row for row in rows):
            try:
                # The tokenizer knows where the second text begins, which its tokens don't tell
                outputs = super().__call__(images=images, text=text, **kwargs)
            except Exception as error:
                raise ValueError(
                    f"`text` and `text_pair` can't be read with `truncation`={truncation!r}: {error}"
                ) from error
            self._check_markers(outputs, rows, checked)
        elif is_cut:
            outputs = self._call_truncated(images, text, text_kwargs, kwargs, checked)
        else:
            outputs = super().__call__(images=images, text=text, **kwargs)
            self._check_markers(outputs, rows, checked)
        if marker is not None:
            if checked is None:
                outputs["token_type_ids"] = [[1] * len(ids) for ids in outputs["input_ids"]]
            elif "token_type_ids" not in outputs:
                token_type_ids = [self.prefix_types(list(map(int, ids)), marker) for ids in outputs["input_ids"]]
                outputs["token_type_ids"] = token_type_ids
            outputs.convert_to_tensors(text_kwargs.get("return_tensors"), skip_tensor_conversion=["pixel_values"])
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor) and not value.numel():
                outputs[name] = value.long()  # the library makes fractions of texts without any token
        return outputs

    def _check_markers(self, outputs: BatchFeature, rows: Any, marker: tuple[str, str] | None) -> None:
        if marker is not None:
            for row, (ids, text) in enumerate(zip(outputs["input_ids"], rows, strict=True)):
                self.check_marker(list(map(int, ids)), text, marker, f"Row {row}")

    def _call_truncated(
        self, images: Any, text: Any, text_kwargs: dict, kwargs: dict, marker: tuple[str, str] | None
    ) -> BatchFeature:
        """Tokenizes in full, drops text tokens, then pads: the tokenizer alone would cut through pictures."""
        max_length = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        late = ("truncation", "max_length", "padding", "pad_to_multiple_of", "return_tensors", "padding_side")
        # Not the merged options, which leave out what `apply_chat_template` says of its text
        early = {name: value for name, value in kwargs.items() if name not in late}
        for group in ("text_kwargs", "common_kwargs"):
            if group in early:
                early[group] = {name: value for name, value in early[group].items() if name not in late}
        wants_mask = text_kwargs.get("return_special_tokens_mask", False)
        if "text_kwargs" in early:
            early.pop("return_special_tokens_mask", None)
            early["text_kwargs"]["return_special_tokens_mask"] = True
        else:
            early["return_special_tokens_mask"] = True
        outputs = super().__call__(images=images, text=text, truncation=False, padding=False, **early)
        self._check_markers(outputs, [text] if isinstance(text, str) else text, marker)
        for row, ids in enumerate(outputs["input_ids"]):
            if len(ids) > max_length:
                too_long = f"Row {row} has {len(ids)} tokens, more than `max_length`={max_length}"
                if text_kwargs.get("text_pair") is not None:
                    raise ValueError(f"{too_long}, and beside pictures neither `text` nor `text_pair` is cut")
                if text_kwargs["truncation"] == "only_second":
                    raise ValueError(f"{too_long}, and `truncation`='only_second' cuts only a `text_pair`")
        # Without one where text is what a chat template wrote
        frames = outputs.get("special_tokens_mask") or [None] * len(outputs["input_ids"])
        kept = [
            self.truncated_positions(ids, max_length, f"Row {row}", frame)
            for row, (ids, frame) in enumerate(zip(outputs["input_ids"], frames, strict=True))
        ]
        if marker is not None:
            # Of the whole: what is cut may hold the marker
            outputs["token_type_ids"] = [self.prefix_types(ids, marker) for ids in outputs["input_ids"]]
        if not wants_mask:
            outputs.pop("special_tokens_mask", None)
        padded_names = ("input_ids", "attention_mask", "special_tokens_mask")
        for name in (*padded_names, "token_type_ids", "offset_mapping"):
            if name in outputs:
                outputs[name] = [[ids[i] for i in keep] for ids, keep in zip(outputs[name], kept, strict=True)]
        if "length" in outputs:
            outputs["length"] = [len(keep) for keep in kept]
        padding = text_kwargs.get("padding", False)
        if padding == "max_length" and max_length > LARGE_INTEGER:
            padding = False  # there is no such length, and the tokenizer alone pads nothing then
        padded = self.tokenizer.pad(
            {name: outputs[name] for name in padded_names if name in outputs},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            padding_side=text_kwargs.get("padding_side"),
            return_attention_mask=text_kwargs.get("return_attention_mask"),
        )
        outputs.update(padded)
        is_left = (text_kwargs.get("padding_side") or self.tokenizer.padding_side) == "left"
        for name, pad in (("offset_mapping", (0, 0)), ("token_type_ids", 1)):
            for ids, values in zip(outputs["input_ids"], outputs.get(name, ()), strict=name in outputs):
                filler = [pad] * (len(ids) - len(values))
                values[:] = filler + values if is_left else values + filler
        if "mm_token_type_ids" in outputs:
            outputs["mm_token_type_ids"] = self.create_mm_token_type_ids(outputs["input_ids"])
        return BatchFeature(
            dict(outputs),
            tensor_type=text_kwargs.get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def truncated_positions(
        self, input_ids: list[int], max_length: int, name: str, special_tokens_mask: list[int] | None = None
    ) -> list[int]:
        """
        Which positions of `input_ids` remain when text tokens are dropped, on the tokenizer's truncation side, until
        `max_length` is left. Those that `special_tokens_mask` marks, which the tokenizer puts around a text, stay if
        there is room.

        Raises:
            ValueError: the pictures alone are longer; names the row, by its `name`, and both lengths.
        """
        frame = special_tokens_mask or [0] * len(input_ids)
        num_image_tokens = sum(token == self.image_token_id for token in input_ids)
        if num_image_tokens + sum(frame) > max_length:
            frame = [0] * len(input_ids)
        text = [i for i, token in enumerate(input_ids) if token != self.image_token_id and not frame[i]]
        room = max_length - (len(input_ids) - len(text))
        if room < 0:
            raise ValueError(f"{name}: pictures take {num_image_tokens} tokens, more than `max_length`={max_length}")
        dropped = text[room:] if self.tokenizer.truncation_side == "right" else text[: max(len(text) - room, 0)]
        return sorted(set(range(len(input_ids))) - set(dropped))

    def prefix_types(self, input_ids: list[int], marker: tuple[str, str]) -> list[int]:
        """
        Types of a row: 0 before the first answer's role marker, as [`answer_marker`] gives it, 1 from there on; all 1
        without one.
        """
        _, spelling = marker
        spelled = self.spelled(input_ids)
        start = "".join(spelled).find(spelling)
        if start < 0:
            return [1] * len(input_ids)
        # A token that begins before the marker and goes on in it (".<") is no prefix
        num_prefix = bisect(list(accumulate(map(len, spelled))), start)
        return [0] * num_prefix + [1] * (len(input_ids) - num_prefix)

    def check_marker(
        self, input_ids: list[int], text: str, marker: tuple[str, str], name: str, at_least: int = 0
    ) -> None:
        """
        Raises:
            ValueError: The role markers of answers in a text, or `at_least` as many, are not all among its tokens, so
                that a prefix would end late or not at all; names the row, by its `name`.
        """
        marker_text, spelling = marker
        expected = len(re.findall(f"(?<!{_CONTROL_TOKEN_START}){re.escape(marker_text)}", text))
        expected = max(expected, at_least)
        found = "".join(self.spelled(input_ids)).count(spelling)
        if found < expected:
            raise ValueError(
                f"{name}: expected {expected} role markers {marker_text!r} among its tokens, found {found}, so "
                "nothing tells where the prefix that is read both ways ends: use another template, or "
                "`bidirectional_prefix=False`"
            )

    def answer_marker(self, chat_template: str | None = None) -> tuple[str, str]:
        """
        What tells where an answer begins: what the chat template writes before it, without spaces at the end, and how
        tokens behind other text spell it.

        Args:
            chat_template (`str`, *optional*): A chat template, or its name. Defaults to the processor's own.

        Raises:
            ValueError: The chat template writes nothing there.
        """
        before, prompt = self.generation_prompt(chat_template)
        prompt = prompt.rstrip()
        if not prompt:
            raise ValueError(
                "The chat template writes nothing in front of an answer, so nothing tells where the prefix that is "
                "read both ways ends: use another template, or `bidirectional_prefix=False`"
            )
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        # On its own it would begin with a space (SentencePiece)
        spelled = ["".join(self.spelled(encode(text))) for text in (before, before + prompt)]
        return prompt, spelled[1][len(spelled[0]) :]

    def spelled(self, input_ids: list[int]) -> list[str]:
        """Tokens as the vocabulary spells them, but added ones by number: a user's `<|assistant|>` is another text."""
        added = set(self.tokenizer.added_tokens_encoder.values())
        tokens = self.tokenizer.convert_ids_to_tokens(input_ids)
        return [f"\0{i}\0" if i in added else token for i, token in zip(input_ids, tokens, strict=True)]

    def generation_prompt(self, chat_template: str | None = None) -> tuple[str, str]:
        """A conversation as the chat template writes it, and what it writes behind that before an answer."""
        message = [{"role": "user", "content": [{"type": "text", "text": "."}]}]
        before = self.apply_chat_template(message, chat_template)
        return before, self.apply_chat_template(message, chat_template, add_generation_prompt=True)[len(before) :]

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        As the library's, but for three defaults when `tokenize=True`: a user's text that happens to contain control
        tokens or the picture marker stays text (`sanitize_control_tokens`), no special tokens are added to those the
        template writes (neither holds with `return_assistant_tokens_mask`), and prompts that are to be written on are
        padded on the left.

        Raises:
            ValueError: There is no conversation of text and pictures, or the chat template would leave out `tools`,
                `documents`, or `tool_calls` in a message, or a text that is no list of parts.
        """
        template = self._resolve_chat_template(chat_template)
        for messages in self._normalize_conversations(conversation)[0]:
            check_tools(template, messages, kwargs.get("tools"), kwargs.get("documents"))
            check_contents(template, messages)
        if kwargs.get("tokenize"):
            given = kwargs.get("processor_kwargs") or {}
            defaults: dict[str, Any] = {} if chat_template is None else {"chat_template": chat_template}
            if not kwargs.get("return_assistant_tokens_mask"):
                kwargs.setdefault("sanitize_control_tokens", True)
                defaults["add_special_tokens"] = False
            if kwargs.get("add_generation_prompt") or kwargs.get("continue_final_message"):
                defaults["padding_side"] = "left"
            # The library refuses an option that is given twice, in a group and by itself
            grouped = {**given.get("text_kwargs", {}), **given.get("common_kwargs", {})}
            kwargs["processor_kwargs"] = {k: v for k, v in defaults.items() if k not in grouped} | given
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _normalize_conversations(self, conversation: Any) -> tuple[list, bool]:
        try:
            conversations, is_batched = super()._normalize_conversations(conversation)
        except Exception as error:
            raise ValueError(f"expected a conversation, or a list of them, not {conversation!r:.100}") from error
        for messages in conversations:
            check_messages(messages)
        return conversations, is_batched

    def prepare_inputs_layout(self, images: ImageInput | None = None, **kwargs: Any) -> Any:
        if isinstance(images, list | tuple) and all(isinstance(each, list | tuple) and not each for each in images):
            images = None  # rows without any picture have no `pixel_values`, not empty ones
        return super().prepare_inputs_layout(images=None if images is None else self._read(images), **kwargs)

    def _process_images(self, images: ImageInput, **kwargs: Any) -> Any:
        try:
            if kwargs.get("do_rescale", getattr(self.image_processor, "do_rescale", False)):
                for i, image in enumerate(make_flat_list_of_images(images)):
                    if is_array(image) and re.search("float|bool", str(image.dtype)) and 0 < image.max() <= 1:
                        raise ValueError(
                            f"picture {i} is of fractions up to {float(image.max()):g}, which would be divided by "
                            "255: give `do_rescale=False`, or pixels from 0 to 255"
                        )
            return super()._process_images(images, **kwargs)
        except Exception as error:
            # What arrays an image processor can't take, each says in its own way
            raise ValueError(f"`images` has what the image processor can't take: {error}") from error

    def _read(self, images: Any) -> Any:
        """
        Paths, addresses, pictures, and arrays of bytes that are grayscale or RGBA, which not all image processors turn
        into RGB, read by [`read_picture`]; other arrays as they are.
        """
        if isinstance(images, list | tuple):
            return [self._read(each) for each in images]
        if is_array(images) and images.ndim != 2:
            if 0 in images.shape:
                raise ValueError(f"`images` has an array without numbers, of shape {tuple(images.shape)}")
            ends = {*images.shape[:1], *images.shape[-1:]}
            has_other_channels = images.ndim == 3 and 3 not in ends and bool(ends & {1, 4})
            if not has_other_channels or not str(images.dtype).endswith("uint8"):
                return images
        try:
            return read_picture(images)
        except Exception as error:
            raise ValueError(f"`images` has {images!r:.100}, which can't be read: {error}") from error

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
            elif sum(markers) != (num_pictures := num_images(images)):
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
