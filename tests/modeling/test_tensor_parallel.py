"""Layers that two processes share say what they say in one: the file runs itself by torchrun."""

import sys
from pathlib import Path

import pytest
import torch
from ranks import TORCHRUN, launch_forks
from tiny_models import GPT2, LLAMA, PICTURE, VIT, Row, batch, difference, ragged_rows, small_model
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from duostream import DuoStreamForImageTextRetrieval, DuoStreamForPreTraining

pytestmark = pytest.mark.slow

MODELS = {
    "llama": {},
    "gated with biases": {"kind": "tiny"},
    # Its embeddings, and the head that is tied to them, stay whole
    "a text stream without a plan": {"text_config": GPT2, "vision_config": VIT, "fusion_stack_config": LLAMA},
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_read_and_write_what_one_does(name: str, tmp_path: Path) -> None:
    small_model(**MODELS[name]).save_pretrained(tmp_path)
    finished = launch_forks([*TORCHRUN, "2"], __file__, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("the same") == 2


@pytest.mark.parametrize("contrastive_loss", ["softmax", "sigmoid"])
def test_two_ranks_that_share_layers_have_the_loss_of_pairs_of_one(contrastive_loss: str, tmp_path: Path) -> None:
    small_model(cls=DuoStreamForPreTraining, contrastive_loss=contrastive_loss).save_pretrained(tmp_path)
    finished = launch_forks([*TORCHRUN, "2"], __file__, tmp_path, "pairs")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("the same") == 2


def test_a_model_whose_backbones_have_no_plan_is_refused_by_the_library(tmp_path: Path) -> None:
    small_model("gpt2").save_pretrained(tmp_path)
    finished = launch_forks([*TORCHRUN, "2"], __file__, tmp_path)
    assert finished.returncode != 0 and "has no `tp_plan`" in finished.stderr


def compare(checkpoint: str) -> None:
    """On each rank: its part of the model against the whole one."""
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    shared = AutoModelForImageTextToText.from_pretrained(
        checkpoint, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    sizes = [
        sum((weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in model.parameters())
        for model in (whole, shared)
    ]
    assert sizes[1] < 0.9 * sizes[0], sizes
    inputs = batch(ragged_rows(whole))
    with torch.no_grad():
        assert difference(whole(**inputs).logits, shared(**inputs).logits) < 1e-4
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(whole.generate(**inputs, **options), shared.generate(**inputs, **options))
    print("the same", flush=True)
    torch.distributed.destroy_process_group()


def compare_pairs(checkpoint: str) -> None:
    """On each rank: the loss of pairs that all ranks read together, against that of one process."""
    torch.manual_seed(0)
    classes = (DuoStreamForImageTextRetrieval, DuoStreamForPreTraining)
    whole, pretraining = (cls.from_pretrained(checkpoint).eval() for cls in classes)
    texts = batch([Row(whole, length) for length in (3, 8, 5)], "right")
    rows = batch([Row(whole, PICTURE, length) for length in (3, 8, 5)], "right")
    pairs = {"pixel_values": rows["pixel_values"], **texts, "return_loss": True}
    rows |= {f"paired_{name}": value for name, value in texts.items()}
    with torch.no_grad():
        expected = whole(**pairs).loss, pretraining(**rows).itc_loss
        plan = DistributedConfig(tp_plan="auto")
        whole, pretraining = (cls.from_pretrained(checkpoint, distributed_config=plan).eval() for cls in classes)
        torch.testing.assert_close((whole(**pairs).loss, pretraining(**rows).itc_loss), expected, rtol=1e-4, atol=1e-4)
        # Where nothing is measured there is no loss, and no rank is waited for
        assert pretraining(input_ids=texts["input_ids"]).loss is None
    print("the same", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2:]:
        compare_pairs(sys.argv[1])
    else:
        compare(sys.argv[1])
