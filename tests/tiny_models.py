"""Small models whose weights are large enough that every difference shows, and rows of text and pictures for them."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import (
    DuoStreamConfig,
    DuoStreamDataCollator,
    DuoStreamForConditionalGeneration,
    DuoStreamProcessor,
    train_tokenizer,
)

VOCAB_SIZE = 99
PICTURE = "picture"

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # So that a model in training gives the same as one that is not
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
# Counts positions from behind its padding token's number
ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 260}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vision_use_head": False,
}
VIT = {**SIGLIP, "model_type": "vit"}
VIT.pop("vision_use_head")

# Llama counts positions relative to each other, so a text stream that counted from the wrong place would go
# unnoticed; GPT-2 adds them to its inputs.
KINDS = ("llama", "tiny", "gpt2")


def small_config(kind: str = "llama", **kwargs: Any) -> DuoStreamConfig:
    if kind == "llama":
        fields: dict[str, Any] = {"text_config": LLAMA, "vision_config": SIGLIP, "fusion_stack_config": LLAMA}
    elif kind == "tiny":
        kwargs = {"vocab_size": VOCAB_SIZE, "vision_config": {"image_size": 24}, **kwargs}
        return DuoStreamConfig.from_preset("tiny", **kwargs)
    elif kind == "gpt2":
        fields = {"text_config": GPT2, "vision_config": VIT, "fusion_stack_config": GPT2}
    elif kind == "bert":
        fields = {"text_config": BERT, "vision_config": SIGLIP, "fusion_stack_config": LLAMA}
    elif kind == "roberta":
        fields = {"text_config": ROBERTA, "vision_config": SIGLIP, "fusion_stack_config": LLAMA}
    else:
        raise ValueError(kind)
    return DuoStreamConfig(**{**fields, **kwargs})


def roughen(model: nn.Module, scale: float = 0.2) -> Any:
    """Moves every weight, those that start at zero or one too, in place: nothing cancels, everything matters."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=scale)
    return model.eval()


def small_model(kind: str = "llama", cls: type = DuoStreamForConditionalGeneration, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = roughen(cls(small_config(kind, **kwargs)), scale=0.1 if kind == "tiny" else 0.2)
    if isinstance(model, DuoStreamForConditionalGeneration):
        # A row that ends early would be padded, and could not be compared token by token
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = None  # nor is a mask to be read off the tokens
    return model


def answered_row(asked: str, said: str, color: str | None = None) -> dict[str, Any]:
    """A row to train on: a question, about a picture of one color where there is one, and its answer."""
    pictures = [] if color is None else [Image.new("RGB", (16, 16), color)]
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": asked}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": said}]}
    return {"images": pictures, "messages": [{"role": "user", "content": parts}, answer]}


NUM_PHOTOGRAPHS = {"train": 4, "validation": 2}


def save_photographs(folder: Path) -> Path:
    """A folder laid out as Flickr8k: two captions for each photograph, which make a row each."""
    for split, number in NUM_PHOTOGRAPHS.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(number):
            Image.effect_noise((90 + 10 * i, 70), 60).convert("RGB").save(folder / split / f"{i}.jpg")
            captions = [f"Picture {i} of {split} .", "A dog runs through the snow ."]
            lines.append(json.dumps({"file_name": f"{i}.jpg", "captions": captions}) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


def save_learnt(folder: Path, rows: list[dict[str, Any]], *texts: str) -> Path:
    """Saves a model that has learnt `rows` by heart, with a processor that knows their words and those of `texts`."""
    said = [part["text"] for row in rows for turn in row["messages"] for part in turn["content"] if "text" in part]
    tokenizer = train_tokenizer([*said, *texts] * 4, 360)
    stack = {**LLAMA, "vocab_size": len(tokenizer)}
    image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    config = small_config(text_config=stack, fusion_stack_config=stack, image_token_id=image_token_id)
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = DuoStreamProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    torch.manual_seed(0)
    model = DuoStreamForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    batch = DuoStreamDataCollator(processor)(rows)
    batch.pop("targets_per_row")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Row:
    """One row: `Row(model, 3, PICTURE, 2)` is three words of text, a picture and two words."""

    def __init__(self, model: Any, *parts: int | str):
        config = model.config
        image = torch.full((config.image_seq_length,), config.image_token_id)
        # 0 pads, and 2 stands for pictures in most of the models here
        pieces = [image if part == PICTURE else torch.randint(3, VOCAB_SIZE, (int(part),)) for part in parts]
        self.ids = torch.cat(pieces)
        size = config.vision_config.image_size
        self.pictures = torch.randn(parts.count(PICTURE), 3, size, size)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def inputs(self) -> dict[str, Tensor]:
        inputs = {"input_ids": self.ids[None]}
        return inputs | ({"pixel_values": self.pictures} if len(self.pictures) else {})


def ragged_rows(model: Any) -> list[Row]:
    """A picture in front, one in the middle, none, and two in one row, the second right behind some text."""
    return [
        Row(model, PICTURE, 7),
        Row(model, 4, PICTURE, 5),
        Row(model, 12),
        Row(model, PICTURE, 2, PICTURE, 6),
    ]


def places(rows: Sequence[Row], side: str) -> Iterator[tuple[int, slice]]:
    """Where each row stands in a padded batch."""
    length = max(map(len, rows))
    for i, row in enumerate(rows):
        yield i, slice(length - len(row), length) if side == "left" else slice(0, len(row))


def batch(rows: Sequence[Row], side: str = "left", pad: int = 0) -> dict[str, Tensor]:
    """All rows as one padded batch."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros_like(input_ids)
    for i, place in places(rows, side):
        input_ids[i, place] = rows[i].ids
        attention_mask[i, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    pictures = torch.cat([row.pictures for row in rows])
    return inputs | ({"pixel_values": pictures} if len(pictures) else {})


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape, (left.shape, right.shape)
    return (left - right).abs().max().item()


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile makes C++ for a CPU; no compiler here"
)
