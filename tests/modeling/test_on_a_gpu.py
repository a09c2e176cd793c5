"""
What shows on a GPU alone: that it says what a CPU says, that our code never makes the host wait, and which kernels
run. These tests are skipped without one.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PICTURE, Row, answered_row, batch, difference, places, ragged_rows, save_learnt, small_model
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoProcessor, DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from duostream import DuoStreamDataCollator, DuoStreamForConditionalGeneration
from duostream.modeling import kept_states_duostream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLASH = [
    pytest.param(
        f"flash_attention_{number}",
        marks=pytest.mark.skipif(not is_available(), reason="the package isn't installed"),
    )
    for number, is_available in (
        (2, is_flash_attn_2_available),
        (3, is_flash_attn_3_available),
        (4, is_flash_attn_4_available),
    )
]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@contextmanager
def host_waits() -> Iterator[set[str]]:
    """In which files the host waits for the device."""
    files: set[str] = set()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield files
    finally:
        torch.cuda.set_sync_debug_mode("default")
    files |= {Path(each.filename).name for each in caught if "synchronizing" in str(each.message)}


def rows_without_padding(model: Any) -> dict[str, torch.Tensor]:
    inputs = on_gpu(batch([Row(model, PICTURE, 6) for _ in range(3)]))
    del inputs["attention_mask"]  # the library looks whether it hides anything, and waits for the answer
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "tiny", "gpt2"])
@pytest.mark.parametrize("update", [None, 1, 0], ids=["updated", "updated once", "read"])
@pytest.mark.parametrize("is_cut", [True, False], ids=["kept states alone", "all states"])
def test_a_gpu_says_what_a_cpu_says(
    kind: str, update: int | None, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few tokens are not worth the launch of a second run
    monkeypatch.setattr(kept_states_duostream, "OPERATIONS_WORTH_A_LAUNCH", 0 if is_cut else torch.inf)
    model = small_model(kind, num_image_update_layers=update)
    rows = ragged_rows(model)
    inputs = batch(rows)
    expected = model(**inputs).logits
    for use_cache in (True, False):
        got = model.cuda()(**on_gpu(inputs), use_cache=use_cache).logits.cpu()
        for i, place in places(rows, "left"):
            assert difference(got[i, place], expected[i, place]) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "tiny", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_row_in_a_batch_writes_what_it_writes_alone(kind: str, cache: str) -> None:
    # A step over a static cache is compiled, to a graph of the GPU
    model = small_model(kind).cuda()
    rows = ragged_rows(model)
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**on_gpu(batch(rows)), **options, cache_implementation=cache)
    for i, row in enumerate(rows):
        alone = model.generate(**on_gpu(row.inputs), **options)
        assert torch.equal(together[i, -6:], alone[0, -6:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_are_read_by_one_graph_of_the_gpu(kind: str) -> None:
    model = small_model(kind).cuda()
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    inputs = rows_without_padding(model)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 1)
    model(**inputs, past_key_values=cache)  # an emptied cache has its memory already
    for _ in range(4):
        cache.reset()
        inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
        got = compiled(**inputs, past_key_values=cache, images_per_row=1).logits
        assert difference(got, model(**inputs, use_cache=True).logits) < 1e-3
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("update", [None, 1, 0], ids=["updated", "updated once", "read"])
def test_in_a_training_step_the_host_waits_for_the_librarys_look_at_positions_alone(update: int | None) -> None:
    model = small_model("llama", num_image_update_layers=update).cuda().train()
    inputs = rows_without_padding(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    hints = {"targets_per_row": 3, "images_per_row": 1}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(**inputs, labels=labels, **hints).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with host_waits() as files:
        step()
    assert files <= {"masking_utils.py"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_host_does_not_wait_for_a_step_of_rows_that_are_alike(kind: str) -> None:
    model = small_model(kind).cuda()
    inputs = rows_without_padding(model)
    cache = DynamicCache(config=model.config)
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    model_kwargs = {"mm_token_type_ids": types, "past_key_values": cache, "use_cache": True}
    model_kwargs["attention_mask"] = torch.ones_like(types)
    ids, kwargs = model._expand_inputs_for_generation(**inputs, **model_kwargs)
    model(**inputs, past_key_values=cache, logits_to_keep=1)
    new = torch.full((3, 1), 5, device="cuda")
    kwargs["position_ids"] = torch.full((3, 1), ids.shape[1], device="cuda")
    step = model.prepare_inputs_for_generation(new, is_first_iteration=False, **kwargs)
    model(**step)  # warms up
    with host_waits() as files:
        model(**step)
    assert files <= {"modeling_gpt2.py"}  # the library's own


@torch.no_grad()
def test_pictures_that_are_read_forwards_only_go_through_torchs_flash_kernel() -> None:
    model = small_model("llama", bidirectional_images=False).cuda()
    inputs = rows_without_padding(model)
    expected = model(**inputs).logits
    model.to(torch.bfloat16)
    # Which takes no masks: no other kernel is there to take one
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = model(**inputs).logits.float()
    assert difference(got, expected) < 0.1 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("implementation", FLASH)
def test_flash_attention_gives_what_sdpa_gives(implementation: str) -> None:
    model = small_model("llama", bidirectional_images=False).cuda().to(torch.bfloat16)
    rows = ragged_rows(model)
    inputs = on_gpu(batch(rows))
    expected = model(**inputs).logits.float()
    model.set_attn_implementation(implementation)
    assert model.model.fusion_model.config._attn_implementation == implementation
    for use_cache in (True, False):
        got = model(**inputs, use_cache=use_cache).logits.float()
        for i, place in places(rows, "left"):
            assert difference(got[i, place], expected[i, place]) < 0.1 * expected.abs().max()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_trainer_learns_on_a_gpu(precision: str, tmp_path: Path) -> None:
    rows = [answered_row("What colour?", color, color) for color in ("red", "green", "blue")]
    folder = save_learnt(tmp_path / "learnt", rows)
    model = DuoStreamForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for weight in model.model.projector.parameters():
        weight.data.normal_(std=0.02)  # there is something to learn again
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=30,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        **{precision: True},
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=DuoStreamDataCollator(processor))  # type: ignore[arg-type]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert next(model.parameters()).is_cuda
    assert losses[-1] < 0.5 * losses[0]
