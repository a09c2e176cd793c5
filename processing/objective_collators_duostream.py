"""Batches for what is not written answers: masked tokens, classes, and pictures with the texts that belong to them."""

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tokenizers.models import WordPiece
from transformers import DataCollatorForLanguageModeling
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .chat_template_duostream import check_text
from .conversations_duostream import conversations_of, is_plain_text
from .data_collator_duostream import DuoStreamDataCollator, targets_per_row
from .packing_duostream import IGNORE_INDEX

# Byte-level BPE spells each byte as a letter, and SentencePiece those of a letter that it doesn't know by number
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
SENTENCE_PIECE_SPACE, NUMBERED_BYTE = "▁", re.compile("<0x([0-9A-F]{2})>")


def check_unpacked(batch: dict[str, Any]) -> None:
    """Raises `ValueError` if rows hold several texts, which are read apart, where each is to be read as one."""
    if "segment_ids" in batch:
        raise ValueError("What is read both ways can't share its beginning: give one conversation a row")


@dataclass
class DuoStreamMaskedLMCollator(DuoStreamDataCollator):
    """
    Makes a batch in which some of the answers' tokens are masked, for `DuoStreamForMaskedLM`. What to predict is drawn
    and replaced by the library's `DataCollatorForLanguageModeling`: 80% become the mask token, 10% any token, 10% stay
    (BERT: Devlin et al. 2019, section 3.1).

    Args:
        mlm_probability (`float`, *optional*, defaults to 0.15): Share of the answers' tokens to predict.
        whole_word_mask (`bool`, *optional*, defaults to `False`):
            Predict all tokens of a word, or none; the library then replaces all of them by the mask token.
        mask_seed (`int`, *optional*):
            Draw what is masked from this number and the row's tokens alone, for figures that can be compared: it is
            the same in whatever batch a row stands. By default torch's generator draws, each time anew.

    Raises:
        ValueError: the tokenizer has no mask token, or a row is broken.
    """

    mlm_probability: float = 0.15
    whole_word_mask: bool = False
    mask_seed: int | None = None
    can_pack: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processor.tokenizer.mask_token_id is None:
            raise ValueError(
                "The tokenizer has no mask token: add one (`tokenizer.add_special_tokens({'mask_token': ...})`) and "
                "a row for it (`model.resize_token_embeddings`)"
            )
        self.masking = DataCollatorForLanguageModeling(
            self.processor.tokenizer, mlm_probability=self.mlm_probability, whole_word_mask=self.whole_word_mask
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        check_unpacked(batch)
        batch["input_ids"], batch["labels"] = self.mask_batch(batch)
        batch["targets_per_row"] = targets_per_row(batch["labels"])
        return batch

    def mask_batch(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What [`mask`] makes of a batch, or, by `mask_seed`, of each row without its padding."""
        input_ids, labels = batch["input_ids"], batch["labels"]
        if self.mask_seed is None:
            return self.mask(input_ids, labels)
        input_ids, labels = input_ids.clone(), labels.clone()
        for i, is_valid in enumerate(batch["attention_mask"].to(torch.bool)):
            own = input_ids[i, is_valid]  # (num_valid,)
            with torch.random.fork_rng(devices=[]):
                # Python's hash of numbers is the same in each process
                torch.default_generator.manual_seed(hash((self.mask_seed, *own.tolist())) % 2**63)
                masked, masked_labels = self.mask(own[None], labels[i, is_valid][None])  # (1, num_valid)
            input_ids[i, is_valid], labels[i, is_valid] = masked[0], masked_labels[0]
        return input_ids, labels

    def mask(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` with some of the tokens in `labels` masked, and what they were; both `(batch, seq_len)`."""
        special = torch.isin(input_ids, torch.tensor(self.processor.tokenizer.all_special_ids))
        kept = (labels == IGNORE_INDEX) | special  # (batch, seq_len)
        offsets = self.word_offsets(input_ids) if self.whole_word_mask else None
        masked, masked_labels = self.masking.torch_mask_tokens(
            input_ids.clone(), special_tokens_mask=kept, offset_mapping=offsets
        )
        # "Any token" may be the placeholder of a picture, which there is none of
        is_stray = (masked == self.processor.image_token_id) & (input_ids != self.processor.image_token_id)
        return masked.masked_fill(is_stray, self.processor.tokenizer.mask_token_id), masked_labels

    def word_offsets(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Starts and ends of tokens, of shape `(batch, seq_len, 2)`, by which the library tells words: a token goes on a
        word where it starts at the end of the one before it.
        """
        tokenizer = self.processor.tokenizer
        rows = [tokenizer.convert_ids_to_tokens(row) for row in input_ids.tolist()]
        vocab = tokenizer.get_vocab()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Tokenizers that are written in Python have none to ask. Of others' words some begin with hashes, too
        is_word_piece = (
            any(token.startswith("##") for token in vocab) if backend is None else isinstance(backend.model, WordPiece)
        )
        if is_word_piece:
            is_first = torch.tensor([[not token.startswith("##") for token in row] for row in rows]).long()
        else:
            # SentencePiece has the letter, too, for words of Malta
            is_byte_level = "Ġ" in vocab and SENTENCE_PIECE_SPACE not in vocab
            is_first = torch.tensor([begin_words(row, is_byte_level) for row in rows]).long()  # (batch, seq_len)
        # A gap before the first token of a word, none within one
        starts = torch.arange(input_ids.shape[1]) + is_first.cumsum(dim=1)  # (batch, seq_len)
        return torch.stack([starts, starts + 1], dim=-1)


def begin_words(tokens: list[str], is_byte_level: bool) -> list[bool]:
    """
    Which tokens begin a word: those that begin with a whole character that is no letter, sign above or below one, or
    digit; such as a space.

    Args:
        tokens (`list[str]`): As a vocabulary spells them.
        is_byte_level (`bool`): Whether it spells bytes, as GPT-2's (Radford et al. 2019, section 2.2).
    """
    spelled = [_bytes_of(token, is_byte_level) for token in tokens]
    written, start, begins = b"".join(spelled), 0, []
    for each in spelled:
        # A character of several bytes may be in as many tokens
        is_inside = 0x80 <= (each[0] if each else 0) < 0xC0
        character = written[start : start + 4].decode("utf-8", errors="ignore")[:1]
        begins.append(not is_inside and unicodedata.category(character or " ")[0] not in "LMN")
        start += len(each)
    return begins


def _bytes_of(token: str, is_byte_level: bool) -> bytes:
    if numbered := NUMBERED_BYTE.fullmatch(token):
        return bytes.fromhex(numbered[1])
    if is_byte_level and all(letter in BYTES for letter in token):
        return bytes(BYTES[letter] for letter in token)
    return token.replace(SENTENCE_PIECE_SPACE, " ").encode()


@dataclass
class DuoStreamRetrievalCollator(DuoStreamDataCollator):
    """
    Makes a batch of pictures and the texts that belong to them, for `DuoStreamForImageTextRetrieval`: what the
    assistant says last in a row belongs to the row's one picture.

    Raises:
        ValueError: a row has no picture, or several, or no text.
    """

    can_pack: ClassVar[bool] = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        names = self.names(rows)
        for row, name in zip(rows, names, strict=True):
            if row.get("image_features") is not None:
                raise ValueError(
                    f"{name}: expected a picture in `images`, which `image_features` can't stand for here"
                )
        images = [self.load_images(row, name) for row, name in zip(rows, names, strict=True)]
        for pictures, name in zip(images, names, strict=True):
            if len(pictures) != 1:
                raise ValueError(f"{name}: expected one picture that the text belongs to, not {len(pictures)}")
        texts = [self.answer_text(row, name) for row, name in zip(rows, names, strict=True)]
        return {**self.tokenize_texts(texts, names), **self.model_inputs(images, names), "return_loss": True}

    def answer_text(self, row: dict[str, Any], name: str) -> str:
        """
        The row's text, or what the assistant says last in it.

        Raises:
            ValueError: There is none, or several `conversations` with one each. The message names the row.
        """
        try:
            row, *others = conversations_of(row)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if others:
            raise ValueError(
                f"{name} has {len(others) + 1} `conversations`: expected one, whose text belongs to the picture"
            )
        if is_plain_text(row):
            text = row["text"]
        else:
            messages = row.get("messages") or row.get("completion") or []
            try:
                content = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), None)
                parts = content if isinstance(content, list) else [{"text": content}]
                text = "".join(part.get("text") or "" for part in parts)
            except Exception as error:
                raise ValueError(f"{name}: expected messages of text, not {messages!r:.100}") from error
        check_text(text, name)
        if not text.strip():
            raise ValueError(f"{name}: expected a text that belongs to the picture, of the assistant or in `text`")
        return text

    def tokenize_texts(self, texts: list[str], names: list[str]) -> dict[str, torch.Tensor]:
        """Texts on their own, as the library's pipelines encode them: `(batch, text_len)`. Control tokens are text."""
        tokenizer = self.processor.tokenizer
        encoded = dict(
            tokenizer(
                texts,
                padding=True,
                padding_side="right",
                truncation=self.max_length is not None,
                max_length=self.max_length,
                split_special_tokens=True,
                return_token_type_ids=False,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )
        for length, name in zip(encoded["attention_mask"].sum(dim=1).tolist(), names, strict=True):
            self.check_length(length, name)
        return encoded


@dataclass
class DuoStreamPreTrainingCollator(DuoStreamMaskedLMCollator, DuoStreamRetrievalCollator):
    """
    Makes a batch for all objectives of `DuoStreamForPreTraining`: that of `DuoStreamDataCollator`, and beside it the
    same rows with masked tokens, and the texts of the rows that have one picture.

    Args:
        mlm (`bool`, *optional*, defaults to `True`): Whether to mask.
        pairs (`bool`, *optional*, defaults to `True`): Whether to give the texts of pictures on their own.

    Raises:
        ValueError: a row is broken, or, with `pairs`, has one picture and no text.
    """

    mlm: bool = True
    pairs: bool = True

    def __post_init__(self) -> None:
        if self.mlm:
            super().__post_init__()
        else:
            DuoStreamDataCollator.__post_init__(self)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = DuoStreamDataCollator.__call__(self, rows)
        if self.mlm:
            check_unpacked(batch)
            batch["masked_input_ids"], batch["masked_labels"] = self.mask_batch(batch)
            batch["masked_per_row"] = targets_per_row(batch["masked_labels"])
        else:
            # A plain `Trainer` evaluates where all labels are there that the model takes
            batch["masked_labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        read = [row.get("images") if row.get("image_features") is None else row["image_features"] for row in rows]
        numbers = [0 if each is None else len(each) for each in read]
        paired = [i for i, number in enumerate(numbers) if number == 1]
        if self.pairs and paired:
            names = self.names(rows)
            texts = [self.answer_text(rows[i], names[i]) for i in paired]
            encoded = self.tokenize_texts(texts, [names[i] for i in paired])
            batch["paired_input_ids"] = encoded["input_ids"]
            batch["paired_attention_mask"] = encoded["attention_mask"]
            if len(paired) < len(rows):
                batch["paired_images"] = torch.tensor([sum(numbers[:i]) for i in paired])
        return batch


@dataclass
class DuoStreamClassificationCollator(DuoStreamDataCollator):
    """
    Makes a batch for `DuoStreamForSequenceClassification` of rows with `images` and `text`, either of which may be
    empty, and a `label`: the number of a class, or a list with a score for every class.

    Args:
        num_labels (`int`): How many classes there are; with 1, labels are numbers to come near to (regression).

    Raises:
        ValueError: a row is broken, or has a `text_pair`; its label is missing or not among the classes.
    """

    num_labels: int = field(kw_only=True)
    can_pack: ClassVar[bool] = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        check_unpacked(batch)
        names = self.names(rows)
        for row, name in zip(rows, names, strict=True):
            if row.get("text_pair") is not None:
                raise ValueError(f"{name} has a `text_pair`, which is not read: expected both texts in one `text`")
        labels = [self.check_label(row.get("label"), name) for row, name in zip(rows, names, strict=True)]
        for label, name in zip(labels, names, strict=True):
            if isinstance(label, list) != isinstance(labels[0], list):
                raise ValueError(
                    f"{name}: its `label` is {label!r:.100}, and that of {names[0]} {labels[0]!r:.100}: expected the "
                    "number of a class in all rows of a batch, or scores in all"
                )
        batch["labels"] = torch.tensor(labels)
        del batch["targets_per_row"]  # of tokens, which are not predicted
        return batch

    def check_label(self, label: Any, name: str) -> Any:
        # Arrays and numbers of NumPy and torch
        label = label.tolist() if hasattr(label, "tolist") else label
        if isinstance(label, list | tuple):
            if self.num_labels == 1 or len(label) != self.num_labels:
                raise ValueError(f"{name}: expected {self.num_labels} scores in `label`, not {len(label)}")
            if not all(isinstance(score, int | float) for score in label):
                raise ValueError(f"{name}: expected numbers in `label`, not {label!r:.100}")
            return [float(score) for score in label]
        if self.num_labels == 1 and isinstance(label, int | float) and not isinstance(label, bool):
            return float(label)
        if not isinstance(label, int) or not 0 <= label < self.num_labels:
            raise ValueError(f"{name}: expected a `label` from 0 to {self.num_labels - 1}, not {label!r}")
        return int(label)  # a tensor of truth values would be read as scores
