"""Every text type with every vision type: composed, read, trained, written with, saved and loaded; or refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ENCODERS, REFUSED, TEXTS, VISIONS
from tiny_models import LLAMA, PICTURE, Row, batch, roughen
from transformers import AutoModel, AutoModelForCausalLM

from duostream import DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
WRITES, READS, NEITHER = "writes", "reads", "–"
# What has no size of its own
IMAGE_SIZES = {"resnet": 48, "siglip2": 16}
# Their own last norm stands behind what is read
UNREAD = {"clip": "post_layernorm", "convnextv2": "layernorm"}
TYPES = {name: make for name, make in (TEXTS | ENCODERS).items() if name not in ("llama, tied", "gemma")}
VISION_TYPES = [name for name in VISIONS if not name.startswith("a whole") and name not in ("beit", "mobilenet v2")]
VISION_TYPES += REFUSED
outcomes: dict[tuple[str, str], str] = {}


def compose(text: str, vision: str) -> Any:
    # ModernBERT knows of no way to read forwards only
    cls = DuoStreamForSequenceClassification if text == "modernbert" else DuoStreamForConditionalGeneration
    auto_class = AutoModel if text in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    backbones = (auto_class.from_config(TYPES[text]()), AutoModel.from_config((VISIONS | REFUSED)[vision]()))
    stack: dict[str, Any] = {"fusion_config": LLAMA} if text in ENCODERS else {"num_fusion_layers": 2}
    return roughen(cls.from_backbones(*backbones, **stack, image_size=IMAGE_SIZES.get(vision)), scale=0.05)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("vision", VISION_TYPES)
@pytest.mark.parametrize("text", TYPES)
def test_a_pair_is_read_trained_written_with_and_comes_back_from_disk(text: str, vision: str, tmp_path: Path) -> None:
    if vision in REFUSED:
        with pytest.raises(ValueError, match=r"vision_config.*siglip2.*spatial_shapes"):
            compose(text, vision)
        outcomes[text, vision] = NEITHER
        return
    model = compose(text, vision)
    rows = [Row(model, 2, PICTURE, 5), Row(model, PICTURE, 4)]
    inputs = batch(rows)
    assert logits(model, inputs).isfinite().all()
    writes = isinstance(model, DuoStreamForConditionalGeneration)

    labels = torch.where(inputs["input_ids"] > 2, inputs["input_ids"], -100) if writes else torch.tensor([0, 1])
    labels = labels.where(labels != model.config.image_token_id, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    # What a backbone pools with, and what masks its patches, are not read
    unread = rf"(text|vision)_model\.pooler\.|vision_model\.(.*mask_token|{UNREAD.get(vision, '$')})"
    assert all(re.search(unread, name) for name in without), without
    optimizer.step()
    with torch.no_grad():
        assert model(**inputs, labels=labels).loss < loss

    if writes:
        settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        # All pictures in front: a window slides over slots, and slots must then be full
        front = batch([Row(model, PICTURE, 5), Row(model, PICTURE, 5)])
        cached = model.generate(**front, **settings)
        assert torch.equal(cached, model.generate(**front, **settings, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    outcomes[text, vision] = WRITES if writes else READS


@pytest.mark.slow
def test_the_page_has_the_matrix_as_it_came_out() -> None:
    if len(outcomes) < len(TYPES) * len(VISION_TYPES):
        pytest.skip("Not all pairs ran before this")
    lines = ["| | " + " | ".join(VISION_TYPES) + " |", "| --- " * (len(VISION_TYPES) + 1) + "|"]
    lines += [f"| {text} | " + " | ".join(outcomes[text, vision] for vision in VISION_TYPES) + " |" for text in TYPES]
    matrix = "\n".join(lines)
    print(matrix)
    assert matrix in PAGE.read_text(encoding="utf-8")
