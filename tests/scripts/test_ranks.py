"""Several processes together learn what one learns from the same rows."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import psutil
import pytest
import ranks
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from ranks import RECIPES, TORCHRUN, accelerate, launch, launch_forks
from transformers import AutoConfig

import duostream
from duostream.scripts import cli, finetune, pretrain
from duostream.scripts.arguments import DataArguments, DuoStreamTrainingArguments
from duostream.scripts.data import load_rows
from duostream.scripts.trainer import DuoStreamTrainer

COMMANDS = ranks.__file__
TOLERANCE = 1e-5


def losses(folder, wanted="loss"):
    """What was logged, step by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {name: float(value) for name, value in entry.items() if name.endswith(wanted)}
        for entry in history
        if any(name.endswith(wanted) for name in entry) and "train_loss" not in entry
    ]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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
        answer = [{"role": "assistant", "content": [{"type": "text", "text": f"{i * 'very '}number {i}"}]}]
        rows.append({"images": images, "prompt": [{"role": "user", "content": parts}], "completion": answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(rows, freeze="vision"):
    args = ["--dataset", str(rows), "--max_steps", "4", "--logging_steps", "1"]
    args += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    # Batch norm reads the rows of its own rank
    return [*args, "--freeze", freeze, "--learning_rate", "1e-3", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def checkpoint(rows, tmp_path_factory):
    """What one process has learnt in a step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pretrain.main([*options(rows), "--vocab_size", "300", "--max_steps", "1", "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def finetuning(rows, checkpoint):
    """Evaluated on seven rows, and measured on five: no number of them for two ranks."""
    args = [*options(rows), "--checkpoint", str(checkpoint), "--task", "caption", "--eval_split", "train"]
    args += ["--max_eval_rows", "7", "--metric_rows", "5", "--max_new_tokens", "8", "--eval_strategy", "steps"]
    return [*args, "--eval_steps", "2", "--per_device_eval_batch_size", "1"]


@pytest.fixture(scope="module")
def alone(finetuning, tmp_path_factory):
    """The fine-tuning by one process."""
    folder = tmp_path_factory.mktemp("alone")
    finetune.main([*finetuning, "--per_device_train_batch_size", "4", "--output_dir", str(folder)])
    return folder


def assert_same(alone, together):
    for wanted in ("loss", "eval_chrf", "eval_bleu"):
        expected, found = losses(alone, wanted), losses(together, wanted)
        assert len(expected) >= 2
        for one, other in zip(expected, found, strict=True):
            assert other == pytest.approx(one, abs=TOLERANCE)


def assert_same_weights(alone, together, undetermined=()):
    """As one process loads them, however many have saved them; but for those that the loss leaves undetermined."""
    weights = []
    for folder in (alone, together):
        (name,) = AutoConfig.from_pretrained(folder).architectures
        weights.append(getattr(duostream, name).from_pretrained(folder).state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0].keys() - set(undetermined):
        torch.testing.assert_close({name: weights[1][name]}, {name: weights[0][name]}, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "fsdp2"])
def test_two_ranks_of_a_recipe_learn_and_measure_as_one(alone, finetuning, tmp_path, recipe):
    args = [*finetuning, "--per_device_train_batch_size", "2", "--output_dir", tmp_path]
    finished = launch(accelerate(recipe, 2), COMMANDS, *args)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count(f"shared by {'FSDP2' if recipe == 'fsdp2' else 'none'}") == 2
    assert_same(alone, tmp_path)
    assert_same_weights(alone, tmp_path)


@pytest.fixture(scope="module")
def training(rows, checkpoint):
    """The same steps, without evaluation."""
    return [*options(rows), "--checkpoint", str(checkpoint), "--task", "caption", "--eval_split", ""]


def assert_same_losses(alone, together):
    expected, found = ([entry["loss"] for entry in losses(folder) if "loss" in entry] for folder in (alone, together))
    assert len(expected) == 4 and found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
def test_four_ranks_learn_as_one(alone, training, tmp_path):
    args = [*training, "--per_device_train_batch_size", "1", "--output_dir", tmp_path]
    finished = launch_forks(accelerate("ddp", 4), COMMANDS, *args)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("shared by none") == 4
    assert_same_losses(alone, tmp_path)
    assert_same_weights(alone, tmp_path)


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_of_layers_that_are_named_learn_as_one(alone, training, tmp_path):
    # The projector is none of them, by which a rank without pictures must still know that weights are shared
    launcher = [*accelerate("fsdp2", 2), "--fsdp_transformer_layer_cls_to_wrap", "PhiDecoderLayer"]
    args = [*training, "--per_device_train_batch_size", "2", "--output_dir", tmp_path]
    finished = launch_forks(launcher, COMMANDS, *args)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("shared by FSDP2") == 2
    assert_same_losses(alone, tmp_path)
    assert_same_weights(alone, tmp_path)


@pytest.mark.slow
def test_four_ranks_go_on_from_the_shards_of_two_and_learn_as_one(alone, training, tmp_path):
    args = [*training, "--save_strategy", "steps", "--save_steps", "2", "--resume", "true", "--output_dir", tmp_path]
    for num_ranks, first in ((2, 0), (4, 2)):
        launcher = [*accelerate("fsdp2", num_ranks), "--fsdp_state_dict_type", "SHARDED_STATE_DICT"]
        finished = launch_forks(launcher, COMMANDS, *args, "--per_device_train_batch_size", 4 // num_ranks)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert finished.stdout.count("shared by FSDP2") == num_ranks
        assert finished.stdout.count("'loss'") == 4 - first
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            assert len(list((tmp_path / "checkpoint-4" / part).glob("*.distcp"))) == num_ranks
        assert_same_losses(alone, tmp_path)
        shutil.rmtree(tmp_path / "checkpoint-4")
        (tmp_path / "trainer_state.json").unlink()


@pytest.mark.slow
def test_stored_states_of_pictures_are_refused_where_ranks_share_weights(training, tmp_path):
    args = [*training, "--cache_vision", "true", "--output_dir", tmp_path]
    finished = launch_forks(accelerate("fsdp2", 2), COMMANDS, *args)
    assert finished.returncode != 0 and "`cache_vision` goes without FSDP" in finished.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed, nor among the tests' packages")
def test_two_ranks_that_share_weights_by_deepspeed_learn_as_one(alone, training, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    args = [*training, "--per_device_train_batch_size", "2", "--output_dir", tmp_path]
    finished = launch([*accelerate("deepspeed_zero3", 2, port=free_port()), "-m"], finetune.__name__, *args)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_losses(alone, tmp_path)
    assert_same_weights(alone, tmp_path)


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_though_one_of_them_may_have_no_pictures(rows, tmp_path):
    args = [*options(rows), "--vocab_size", "300", "--itc_weight", "1", "--contrastive_loss", "softmax"]
    args += ["--gradient_checkpointing", "true"]
    pretrain.main([*args, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one")])
    output = ["--per_device_train_batch_size", "2", "--output_dir", tmp_path / "two"]
    two = launch_forks([*TORCHRUN, "2"], COMMANDS, *args, *output)
    assert two.returncode == 0, two.stderr[-3000:]
    alone = losses(tmp_path / "one")
    assert len(alone) == 4 and any(entry["itc_loss"] for entry in alone)
    for one, other in zip(alone, losses(tmp_path / "two"), strict=True):
        # Of each objective four digits are logged
        assert other == pytest.approx(one, abs=2e-4)
    # A softmax takes no notice of the bias: its gradient is rounding alone, of which Adam makes whole steps
    assert_same_weights(tmp_path / "one", tmp_path / "two", undetermined=["image_text_head.logit_bias"])


@pytest.mark.slow
def test_ranks_that_share_weights_pretrain_as_those_that_do_not_though_one_may_have_no_pairs(rows, tmp_path):
    # Of the eight rows that two ranks read in two steps three are about no picture, so that sooner or later each has
    # two pairs, one or none while the other has another number
    lines = rows.read_text().splitlines()
    mixed = tmp_path / "rows.jsonl"
    mixed.write_text("\n".join([*lines[:6:2], *lines[1::2], lines[1]]))
    args = [*options(mixed), "--max_steps", "20", "--learning_rate", "1e-4", "--vocab_size", "300"]
    args += ["--contrastive_loss", "softmax"]
    for weight in ("mlm", "itc", "itm"):
        args += [f"--{weight}_weight", "1"]
    for recipe, sharing in (("ddp", "none"), ("fsdp2", "FSDP2")):
        output = ["--per_device_train_batch_size", "2", "--output_dir", tmp_path / recipe]
        finished = launch_forks(accelerate(recipe, 2), COMMANDS, *args, *output)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert finished.stdout.count(f"shared by {sharing}") == 2
    whole, shared = (losses(tmp_path / recipe) for recipe in ("ddp", "fsdp2"))
    assert len(whole) == 20 and {entry["itm_loss"] > 0 for entry in whole} == {True, False}
    for one, other in zip(whole, shared, strict=True):
        assert other == pytest.approx(one, abs=2e-3)


@pytest.mark.slow
def test_what_two_ranks_measure_is_what_they_save_though_each_has_statistics_of_its_own(rows, checkpoint, tmp_path):
    args = [*options(rows, freeze=""), "--checkpoint", str(checkpoint), "--eval_split", "train"]
    args += ["--per_device_eval_batch_size", "1", "--output_dir", str(tmp_path)]
    two = launch_forks([*TORCHRUN, "2"], COMMANDS, *args, "--per_device_train_batch_size", "2")
    assert two.returncode == 0, two.stderr[-3000:]
    told = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    processor = duostream.DuoStreamProcessor.from_pretrained(tmp_path)
    saved = DuoStreamTrainer(
        model=duostream.DuoStreamForConditionalGeneration.from_pretrained(tmp_path),
        args=DuoStreamTrainingArguments(str(tmp_path / "again"), per_device_eval_batch_size=2, use_cpu=True),
        data_collator=duostream.DuoStreamDataCollator(processor),
        eval_dataset=load_rows(DataArguments(task="chat", dataset=str(rows)), "train"),
        processing_class=processor,
    )
    assert told == pytest.approx(saved.evaluate()["eval_loss"], abs=TOLERANCE)


EVALUATE = """
import sys
import torch
from datasets import Dataset
from transformers import set_seed
from duostream import DuoStreamConfig, DuoStreamForSequenceClassification
from duostream.scripts.arguments import DuoStreamTrainingArguments
from duostream.scripts.trainer import DuoStreamTrainer

for problem_type, num_labels, label in (
    ("regression", 1, lambda i: i * i / 9),
    ("multi_label_classification", 2, lambda i: [i / 9, 1 - i / 9]),
    ("single_label_classification", 2, lambda i: i % 2),
):
    set_seed(0)
    config = DuoStreamConfig.from_preset("tiny", vocab_size=99, image_token_id=98)
    config.num_labels, config.problem_type = num_labels, problem_type
    trainer = DuoStreamTrainer(
        model=DuoStreamForSequenceClassification(config),
        args=DuoStreamTrainingArguments(sys.argv[1], per_device_eval_batch_size=2, use_cpu=True, report_to="none"),
        data_collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
        eval_dataset=Dataset.from_list([{"input_ids": [3 + i, 5, 6], "labels": label(i)} for i in range(7)]),
    )
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        sys.stdout.write(f"loss {loss}\\n")
# A rank whose threads still wait for others when Python ends is aborted
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_ranks_have_the_loss_of_one_though_some_rows_are_read_twice(tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    losses = []
    for num_ranks in (1, 2):
        run = launch_forks([*TORCHRUN, str(num_ranks)], str(script), tmp_path / "out")
        assert run.returncode == 0, run.stderr[-3000:]
        losses.append([float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("loss ")])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)


PAIRS = """
import sys
import torch
import torch.distributed as dist
from tiny_models import PICTURE, Row, batch, small_model
from duostream import DuoStreamForPreTraining

dist.init_process_group("gloo")
others = {"lm_weight": 0.0, "mlm_weight": 0.0, "itm_weight": 0.0}
model = small_model(cls=DuoStreamForPreTraining, **others).train()
inputs = batch([Row(model, *([PICTURE] if dist.get_rank() == 0 else []), 4) for _ in range(2)])
if dist.get_rank() == 0:
    inputs["paired_input_ids"] = inputs["input_ids"][:, -4:]
loss = model(**inputs).loss
loss.backward()
# In one piece, as the other rank writes, too
sys.stdout.write(f"loss {loss.item()}\\n")
sys.stdout.flush()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_rank_without_pairs_and_labels_learns_beside_one_that_has_pairs(tmp_path):
    (tmp_path / "pairs.py").write_text(PAIRS)
    run = launch_forks([*TORCHRUN, "2"], str(tmp_path / "pairs.py"))
    assert run.returncode == 0, run.stderr[-3000:]
    losses = sorted(float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("loss "))
    assert losses[0] == 0 < losses[1]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_within_a_minute(rows, checkpoint, tmp_path):
    args = [*options(rows), "--checkpoint", str(checkpoint), "--eval_split", "", "--max_steps", "100000"]
    line = [sys.executable, "-m", *TORCHRUN, "2", "-m", cli.__name__, "finetune", *args, "--output_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        ranks = []
        for told in run.stdout:
            if "'loss'" in told:
                ranks = psutil.Process(run.pid).children()
                assert len(ranks) == 2
                ranks[1].kill()
                killed = time.monotonic()
                break
        last = run.stdout.read()
    assert ranks and time.monotonic() - killed < 60
    assert run.returncode == 1 and f"Signal 9 (SIGKILL) received by PID {ranks[1].pid}" in last
    assert not ranks[0].is_running()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_knows_every_key_of_a_recipe(name):
    # Of an unknown key it says which
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
