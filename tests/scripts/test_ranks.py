"""Several processes together learn what one learns from the same rows."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


def losses(folder, num_ranks, *args):
    """The losses that were logged, step by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command += ["-m", "duostream.scripts.pretrain", "--output_dir", str(folder), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: float(value) for name, value in entry.items() if name.endswith("loss")} for entry in history[:-1]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight rows, every other one about a picture."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for i in range(8):
        parts = [{"type": "text", "text": "What is it?"}]
        if i % 2:
            path = folder / f"{i}.png"
            Image.new("RGB", (20, 20), (30 * i, 200 - 20 * i, 40)).save(path)
            parts.insert(0, {"type": "image", "text": None})
        images = [str(folder / f"{i}.png")] if i % 2 else []
        answer = [{"role": "assistant", "content": [{"type": "text", "text": f"number {i} of eight"}]}]
        rows.append({"images": images, "prompt": [{"role": "user", "content": parts}], "completion": answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(rows):
    args = ["--dataset", str(rows), "--vocab_size", "300", "--max_steps", "4", "--logging_steps", "1"]
    args += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    # Batch norm reads the rows of its own rank
    return [*args, "--freeze", "vision", "--learning_rate", "1e-3", "--disable_tqdm", "true"]


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_though_one_of_them_may_have_no_pictures(rows, tmp_path):
    args = [*options(rows), "--itc_weight", "1", "--contrastive_loss", "softmax"]
    args += ["--ddp_find_unused_parameters", "true"]
    one = losses(tmp_path / "one", 1, *args, "--per_device_train_batch_size", "4")
    two = losses(tmp_path / "two", 2, *args, "--per_device_train_batch_size", "2")
    assert len(one) == 4 and any(entry["itc_loss"] for entry in one)
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=2e-4)


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_have_the_losses_of_one(rows, tmp_path):
    one = losses(tmp_path / "one", 1, *options(rows), "--per_device_train_batch_size", "4")
    two = losses(tmp_path / "two", 2, *options(rows), "--per_device_train_batch_size", "2", "--fsdp")
    assert len(one) == 4
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=2e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-4, rtol=0)
