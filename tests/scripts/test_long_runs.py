"""A run that is killed and started again ends as one that was left alone, and its checkpoints are whole or absent."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.trainer_utils import get_last_checkpoint

from duostream import DuoStreamForPreTraining
from duostream.scripts import finetune, pretrain, saving
from duostream.scripts.checkpoints import check_files, load_model
from duostream.scripts.long_runs import ReproducibleCollator
from duostream.scripts.saving import publish, publish_files

NUM_KILLS = 20
NUM_STEPS = 24

# Weights depend on each random state there is: dropout's, the masks', and that of the rows' order
STACK = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "attention_dropout": 0.2,
}
VISION = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "groups_width": 8}
CONFIG = json.dumps({"text_config": STACK, "vision_config": VISION, "fusion_stack_config": STACK})
COMMON = ["--task", "vqa", "--vocab_size", "300", "--max_steps", str(NUM_STEPS), "--config_overrides", CONFIG]
COMMON += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", "--resume", "true"]
COMMON += ["--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
# Ten rows: three steps are an epoch
KINDS = {
    "stored": ["--mlm_weight", "1", "--itc_weight", "1", "--train_sampling_strategy", "group_by_length"],
    "streamed": ["--mlm_weight", "1", "--streaming", "true", "--eval_strategy", "steps", "--eval_steps", "3"],
    "mixed": ["--mixture", "other.yaml", "--gradient_accumulation_steps", "2", "--on_bad_rows", "skip"],
}


def start(args):
    """The command in a process of its own, that need not import everything again."""
    pid = os.fork()
    if pid:
        return pid
    try:
        pretrain.main(args)
    except BaseException as error:
        traceback.print_exc()
        os._exit(error.code if isinstance(error, SystemExit) else 1)
    os._exit(0)


def wait_for(happened, pid):
    """Whether it happened before the process ended."""
    while not happened():
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    return True


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_again_and_again(kind):
    """Starts a run, kills it and starts it again, and compares what it ends with to a run that was left alone."""
    args = [*COMMON, "--dataset", "rows.jsonl", "--image_dir", ".", *KINDS[kind]]
    alone, killed = Path(f"{kind}_alone"), Path(f"{kind}_killed")
    assert os.waitpid(start([*args, "--output_dir", str(alone)]), 0)[1] == 0
    expected = names(alone / f"checkpoint-{NUM_STEPS}")
    draw, kills, reached = random.Random(kind), 0, []

    def newest():
        return max((int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*")), default=0)

    while kills < NUM_KILLS:
        pid, goal = start([*args, "--output_dir", str(killed)]), newest() + draw.randrange(2)
        # At any time, or while it saves
        is_due = (killed / "_unfinished").exists if draw.random() < 0.5 else lambda: True
        assert wait_for(lambda goal=goal: newest() >= goal, pid) and wait_for(is_due, pid)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), f"finished after {kills} kills"
        kills += 1
        for folder in killed.glob("checkpoint-*"):
            if folder.name != f"checkpoint-{newest()}" and names(folder) != expected:
                continue  # an old one that was being deleted
            assert names(folder) == expected, folder
            check_files(folder, has_states=True)
        reached.append(newest())
    assert os.waitpid(start([*args, "--output_dir", str(killed)]), 0)[1] == 0
    assert (killed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    print("killed:", kind, json.dumps(reached), flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten questions about pictures, and three more to mix in."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for i in range(10):
        Image.new("RGB", (20, 20), (25 * i, 200 - 20 * i, 40)).save(folder / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "question": f"Which of ten {'is' * i}?", "answer": f"number {i}, " * (i + 1)}
        )
    for name, some in (("rows.jsonl", rows), ("other.jsonl", rows[:3])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "other.yaml").write_text("{task: vqa, dataset: other.jsonl, image_dir: ., prompt: Say it.}")
    return folder


def test_what_is_random_in_a_batch_depends_on_the_epoch_and_the_rows_alone():
    collator = ReproducibleCollator(lambda rows: {"drawn": torch.rand(4)}, seed=1, is_stream=False)

    def drawn(epoch, *rows):
        collator.epoch = epoch
        return tuple(collator([{"row": row} for row in rows])["drawn"].tolist())

    assert drawn(0, 3, 5) == drawn(0, 3, 5)
    assert len({drawn(0, 3, 5), drawn(1, 3, 5), drawn(0, 5, 3), drawn(0, 3)}) == 4


@pytest.mark.slow
def test_the_best_checkpoint_is_found_however_its_folder_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = [*COMMON, "--dataset", "rows.jsonl", "--image_dir", ".", "--output_dir", "./best//run", "--max_steps", "3"]
    args += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true", "--resume", "false"]
    pretrain.main([*args, "--save_total_limit", "1"])
    state = json.loads((folder / "best/run/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).is_dir() and "_unfinished" not in state["best_model_checkpoint"]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_though_its_folder_is_now_written_otherwise_or_elsewhere(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = [*COMMON, "--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder), "--learning_rate", "1e-3"]
    args += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true"]
    # The loss falls, so that the first step is the best by this
    args += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    pretrain.main([*args, "--output_dir", "old", "--max_steps", "2"])
    pretrain.main([*args, "--output_dir", str(folder / "old"), "--max_steps", "3"])
    assert [path.name for path in sorted(Path("old").glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-3"]
    (folder / "old").rename(folder / "new")
    pretrain.main([*args, "--output_dir", str(folder / "new"), "--max_steps", "4"])
    assert [path.name for path in sorted(Path("new").glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-4"]
    state = json.loads((folder / "new/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "new/checkpoint-1")
    best, final = (
        load_file(folder / "new" / name) for name in ("checkpoint-1/model.safetensors", "model.safetensors")
    )
    assert all(torch.equal(best[name], final[name]) for name in final)
    shutil.rmtree(folder / "new/checkpoint-1")
    with pytest.raises(ValueError, match=r"`load_best_model_at_end` needs the best checkpoint so far.*checkpoint-1"):
        pretrain.main([*args, "--output_dir", str(folder / "new"), "--max_steps", "5"])


def test_a_run_is_not_resumed_with_another_tokenizer(folder):
    args = [*COMMON, "--output_dir", str(folder / "spoken")]
    own = ["--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder)]
    pretrain.main([*args, *own, "--max_steps", "1"])
    other = folder / "spoken.jsonl"
    # As many tokens, but others
    letters = "bcdfghjklmnpqrstvwxz"
    words = [f"{a}o{b}u" for a in letters for b in letters]
    other.write_text("".join(json.dumps({"question": word, "answer": f"{word} {word}"}) + "\n" for word in words))
    args += ["--dataset", str(other), "--max_steps", "2"]
    with pytest.raises(ValueError, match=r"checkpoint-1 to resume from was trained with another tokenizer.* here\)"):
        pretrain.main(args)
    pretrain.main([*args, "--tokenizer", str(folder / "spoken/checkpoint-1")])
    assert (folder / "spoken/checkpoint-2").is_dir()


@pytest.mark.slow
def test_a_run_is_not_resumed_with_rows_of_other_classes(folder):
    own = [*COMMON, "--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder)]
    pretrain.main([*own, "--output_dir", str(folder / "classless"), "--max_steps", "1"])
    args = ["--checkpoint", str(folder / "classless"), "--task", "classification", "--resume", "true"]
    args += ["--output_dir", str(folder / "classified"), "--save_strategy", "steps", "--save_steps", "1"]
    args += ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--eval_split", ""]

    def run(classes, max_steps):
        rows = [json.dumps({"text": f"A {name}.", "label": name}) for name in classes]
        (folder / "classes.jsonl").write_text("\n".join(rows))
        finetune.main([*args, "--dataset", str(folder / "classes.jsonl"), "--max_steps", str(max_steps)])

    run(["cat", "dog"], 1)
    for others in (["dog", "eel"], ["cat", "dog", "eel"]):
        with pytest.raises(ValueError, match=rf"classes \['cat', 'dog'\], .*{re.escape(str(others))}"):
            run(others, 2)
    run(["cat", "dog"], 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twenty_times_ends_with_the_weights_of_one_left_alone(folder):
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, __file__], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [line for line in finished.stdout.splitlines() if line.startswith("killed: ")]
    reached = {kind: json.loads(steps) for _, kind, steps in (line.split(maxsplit=2) for line in lines)}
    assert reached.keys() == KINDS.keys()
    for kind, steps in reached.items():
        assert len(steps) == NUM_KILLS and len(set(steps)) > 5 and steps[-1] < NUM_STEPS, kind


@pytest.fixture
def checkpoint(tmp_path):
    from tiny_models import small_model  # not where this file is a command

    small_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
@pytest.mark.parametrize("break_it", ["cut", "emptied", "overwritten"])
def test_a_broken_file_of_a_checkpoint_is_named(checkpoint, name, break_it):
    path = checkpoint / name
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "overwritten": b"\xff\x00" * 99}[break_it])
    with pytest.raises(ValueError, match=f"{path} is broken, cut short or overwritten"):
        load_model(AutoModelForImageTextToText, str(checkpoint))


def without(path, name):
    weights = load_file(path)
    assert name in weights
    save_file({each: weight for each, weight in weights.items() if each != name}, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["model.fusion_model.norm.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, name):
    assert load_model(AutoModelForImageTextToText, str(checkpoint)).config.architectures
    without(checkpoint / "model.safetensors", name)
    with pytest.raises(ValueError, match=f"{checkpoint} lacks weights of DuoStreamForConditionalGeneration: {name}"):
        load_model(AutoModelForImageTextToText, str(checkpoint))


def test_a_head_that_is_new_may_be_missing_but_nothing_below_it(checkpoint):
    options = {"may_have_new_head": True, "num_labels": 3}
    model = load_model(AutoModelForSequenceClassification, str(checkpoint), **options)
    assert model.config.num_labels == 3
    # Not where nobody would train it
    with pytest.raises(ValueError, match=r"lacks weights of DuoStreamForSequenceClassification: score\.bias"):
        load_model(AutoModelForSequenceClassification, str(checkpoint), num_labels=3)
    assert load_model(AutoModelForMaskedLM, str(checkpoint))
    without(checkpoint / "model.safetensors", "model.fusion_model.norm.weight")
    with pytest.raises(ValueError, match=r"lacks weights of DuoStreamForSequenceClassification: model\.fusion"):
        load_model(AutoModelForSequenceClassification, str(checkpoint), **options)


def test_heads_of_pretraining_load_into_others(tmp_path):
    from tiny_models import small_model

    small_model(cls=DuoStreamForPreTraining).save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMaskedLM):
        assert load_model(auto_class, str(tmp_path))
    assert load_model(AutoModelForSequenceClassification, str(tmp_path), may_have_new_head=True)


@pytest.mark.skipif(sys.platform != "linux", reason="others can't let folders change places at once")
def test_a_checkpoint_that_replaces_one_of_its_number_leaves_a_whole_one_at_each_moment(tmp_path):
    place, written = tmp_path / "checkpoint-3", tmp_path / "_unfinished" / "checkpoint-3"
    for folder, text in ((place, "old"), (written, "new")):
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt"):
            (folder / name).write_text(text)
    seen = []

    def watch(frame, event, argument):
        # What a process that ends at this line would leave
        if frame.f_code.co_filename == saving.__file__:
            found = get_last_checkpoint(tmp_path)
            seen.append(found and {path.name: path.read_text() for path in Path(found).iterdir()})
        return watch

    sys.settrace(watch)
    try:
        publish(written, place)
    finally:
        sys.settrace(None)
    old, new = (dict.fromkeys(("model.safetensors", "optimizer.pt"), text) for text in ("old", "new"))
    assert seen[0] == old and seen[-1] == new and all(each in (old, new) for each in seen)
    assert names(tmp_path) == ["checkpoint-3"]


def test_weights_never_stand_beside_the_config_of_others(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "_unfinished" / "model"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(text)
    seen = []
    replace = Path.replace

    def watch(self, target):
        # What a process that ends here would leave
        seen.append({path.name: path.read_text() for path in old.iterdir()})
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    publish_files(new, old)
    assert len(seen) == 3 and not any("model.safetensors" in files for files in seen)
    assert {path.name: path.read_text() for path in old.iterdir()} == dict.fromkeys(
        seen[0] | {"model.safetensors": 0}, "new"
    )


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        kill_again_and_again(kind)
