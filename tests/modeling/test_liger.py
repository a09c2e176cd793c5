"""
With Liger's kernels a model learns what it learns without. They are made for GPUs; where there is none, Triton
interprets them, of Liger 0.7.0 (of 0.8.5 it can't):

    pip install liger-kernel==0.7.0 triton
    TRITON_INTERPRET=1 python -m pytest tests/modeling/test_liger.py
"""

import copy
import os
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import LLAMA, PICTURE, SIGLIP, Row, batch, difference, small_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel, Trainer
from transformers.trainer import TrainingArguments

from duostream import DuoStreamForConditionalGeneration, apply_liger_kernel_to_duostream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-4
# What Triton 3.9 can't interpret is the kernel of norms
KERNELS = {"rms_norm": DEVICE != "cpu"}

pytest.importorskip("liger_kernel", reason="Liger isn't installed")
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="without a GPU, needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def llama_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger changes the library's module."""
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


def composed() -> Any:
    """A split language model, whose text stream has no last norm."""
    text = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 3, "initializer_range": 0.3}))
    vision = SiglipVisionModel(SiglipVisionConfig(**SIGLIP))
    return DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=1).to(DEVICE)


def rows_of(model: Any) -> dict[str, Tensor]:
    inputs = batch([Row(model, PICTURE, 6), Row(model, 2, PICTURE, 3)])
    hidden = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
    inputs["labels"] = inputs["input_ids"].masked_fill(hidden, -100)
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def learn(model: Any, inputs: dict[str, Tensor], **hints: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    outputs = model(**inputs, **hints)
    outputs.loss.backward()
    return outputs, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_from_rows_without_labels_nothing_is_learnt() -> None:
    model = composed().train()
    apply_liger_kernel_to_duostream(model, **KERNELS)
    inputs = rows_of(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    outputs, gradients = learn(model, inputs, targets_per_row=0, num_items_in_batch=0)
    assert outputs.loss == 0 and "model.fusion_model.layers.0.mlp.up_proj.weight" in gradients


@pytest.mark.parametrize("hints", [{}, {"targets_per_row": 8}, {"num_items_in_batch": 7}], ids=str)
@pytest.mark.parametrize("make", [composed, lambda: small_model("llama").to(DEVICE)], ids=["composed", "from nothing"])
def test_the_loss_and_the_gradients_are_the_same_and_no_logits_are_made(make: Any, hints: dict[str, Any]) -> None:
    model = make().train()
    inputs = rows_of(model)
    expected, gradients = learn(model, inputs, **hints)
    apply_liger_kernel_to_duostream(model, **KERNELS)
    got, with_liger = learn(model, inputs, **hints)
    assert expected.logits is not None and got.logits is None
    assert abs(got.loss - expected.loss) < CLOSE
    assert set(gradients) == set(with_liger)
    for name, gradient in gradients.items():
        assert difference(gradient, with_liger[name]) < CLOSE * max(1.0, gradient.abs().max().item()), name


def test_what_is_read_and_written_is_the_same() -> None:
    model = composed().eval()
    inputs = rows_of(model)
    prompt = {**inputs, "labels": None}
    with torch.no_grad():
        expected = model(**inputs)
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    apply_liger_kernel_to_duostream(model, **KERNELS)
    with torch.no_grad():
        got = model(**inputs)
    assert difference(got.logits, expected.logits) < CLOSE and abs(got.loss - expected.loss) < CLOSE
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), written)


def test_where_the_text_stream_has_no_last_norm_it_gets_none() -> None:
    model = composed()
    apply_liger_kernel_to_duostream(model)
    assert "Liger" in repr(model.model.fusion_model.norm) and "Liger" in repr(model.model.text_model.layers)
    states = torch.randn(1, 2, 32, device=DEVICE)
    assert torch.equal(model.model.text_model.norm(states), states)


def test_some_kernels_can_be_left_out() -> None:
    model = composed().train()
    apply_liger_kernel_to_duostream(model, rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=False)
    outputs, _ = learn(model, rows_of(model))
    assert outputs.logits is not None
    assert "Liger" not in repr(model)


def test_a_head_with_an_adapter_makes_logits() -> None:
    model = composed()
    apply_liger_kernel_to_duostream(model, **KERNELS)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).train()
    inputs = rows_of(model)
    with torch.no_grad():
        outputs = adapted(**inputs)
        with adapted.disable_adapter():
            assert abs(adapted(**inputs).loss - outputs.loss) > 1e-3
    assert outputs.logits is not None


def test_trainers_find_it_by_the_librarys_option(tmp_path: Any) -> None:
    from duostream.modeling.liger_duostream import register_liger_kernel

    register_liger_kernel()
    losses, start = [], composed()
    inputs = {name: value.cpu() for name, value in rows_of(start).items()}
    for uses_liger in (False, True):
        model = copy.deepcopy(start)
        args = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            use_liger_kernel=uses_liger,
            liger_kernel_config=KERNELS,
            report_to="none",
            use_cpu=DEVICE == "cpu",
        )
        trainer = Trainer(model, args, train_dataset=[inputs] * 2, data_collator=lambda rows: rows[0])
        trainer.train()
        assert model.fuses_loss is uses_liger
        # And evaluation, which asks Liger's models for no logits
        losses.append(trainer.evaluate([inputs])["eval_loss"])
    assert abs(losses[0] - losses[1]) < 1e-3


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="`model` is of type 'llama'; expected 'duostream'"):
        apply_liger_kernel_to_duostream(LlamaForCausalLM(LlamaConfig(**LLAMA)))
