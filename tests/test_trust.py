"""No pickle is loaded, nothing is fetched that was not named, and tokens stay out of what is logged."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any
from zipfile import ZipFile, is_zipfile

import pytest
import torch
from hub_server import running_hub
from PIL import Image
from test_bad_data import QUIET, train, turns
from tiny_models import LLAMA, SIGLIP
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from duostream import DuoStreamForConditionalGeneration, DuoStreamModel
from duostream.scripts import finetune, pretrain
from duostream.scripts.checkpoints import check_files

# The states of the library's `Trainer`, by which training resumes: it opens them with `weights_only`
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
TOKEN = "hf_thisIsASecretThatNobodyShallRead"

COMMANDS = """
import sys
reached = []
def watch(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        reached.append(f"{event} {arguments[1:]}" if event == "socket.connect" else f"{event} {arguments}")
        raise OSError("there is no network")
sys.addaudithook(watch)

from duostream.scripts import evaluate, finetune, generate, pretrain, push
rows, picture, out = sys.argv[1:]
common = ["--dataset", rows, "--max_steps", "2", "--use_cpu", "true", "--per_device_train_batch_size", "2"]
pretrain.main([*common, "--output_dir", out + "/a", "--vocab_size", "300"])
splits = ["--train_split", "train", "--eval_split", "train"]
finetune.main([*common, *splits, "--checkpoint", out + "/a", "--output_dir", out + "/b", "--metric_rows", "1"])
data = ["--dataset", rows, "--eval_split", "train", "--max_eval_rows", "1", "--max_new_tokens", "2"]
evaluate.main(["--checkpoint", out + "/b", *data, "--output_dir", out + "/c", "--report", "true"])
generate.main(["--checkpoint", out + "/b", "--image", picture, "--max_new_tokens", "2"])
try:
    push.main(["--checkpoint", out + "/c", "--repo_id", "me/mine"])
except (ValueError, OSError) as error:
    print(error)
print("reached", reached)
"""

PUSH = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
import transformers
from huggingface_hub.utils import logging as hub_logging
hub_logging.set_verbosity_debug()
transformers.logging.set_verbosity_debug()
from duostream.scripts import push
push.main(["--checkpoint", sys.argv[1], "--repo_id", "me/mine"])
"""


def pickles_in(folder: Path) -> set[str]:
    """Names of files that hold a pickle, as they are or within a zip archive, as torch writes them."""
    found = set()
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        data = [path.read_bytes()]
        if is_zipfile(path):
            with ZipFile(path) as archive:
                data += [archive.read(name) for name in archive.namelist()]
        for each in data:
            if each[:1] != b"\x80":  # the protocol, with which all but the oldest begin
                continue
            try:
                list(pickletools.genops(each))
            except Exception:
                continue
            found.add(path.name)
    return found


class Touch:
    """What a hostile pickle does: run something as it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    row = {"images": [str(folder / "red.png")], "messages": turns("What is it?")}
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(4)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def run(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training writes, with a checkpoint in it to resume from."""
    folder = tmp_path_factory.mktemp("run")
    train(rows, folder, "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    return folder


@pytest.fixture
def hostile(run: Path, tmp_path: Path) -> Any:
    """Writes a checkpoint in which some files are hostile pickles, and then says whether one was run."""
    ran = tmp_path / "ran"

    def write(*names: str, without: str = "") -> Path:
        folder = copytree(run, tmp_path / "copy")
        for path in [*folder.rglob(without)] if without else ():
            path.unlink()
        for name in names:
            torch.save(Touch(ran), folder / name)
        return folder

    return write, ran


def test_a_hostile_pickle_is_seen_and_would_run(tmp_path: Path) -> None:
    torch.save(Touch(tmp_path / "ran"), tmp_path / "model.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps([1]))
    assert pickles_in(tmp_path) == {"model.pt", "old.bin"}
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_nothing_that_is_saved_is_a_pickle_but_the_states_to_resume_from(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = run.glob("checkpoint-*")
    assert pickles_in(checkpoint) == STATES
    assert pickles_in(run) == STATES
    DuoStreamForConditionalGeneration.from_pretrained(run).save_pretrained(tmp_path)
    assert not pickles_in(tmp_path)


@pytest.mark.parametrize(
    "auto_class", [DuoStreamModel, DuoStreamForConditionalGeneration, AutoModelForImageTextToText]
)
def test_weights_that_are_a_pickle_are_refused(hostile: Any, auto_class: Any) -> None:
    write, ran = hostile
    folder = write("pytorch_model.bin", without="model.safetensors")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        auto_class.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        check_files(folder)
    assert not ran.exists()


def test_backbones_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").unlink()
    torch.save(Touch(tmp_path / "ran"), tmp_path / "text" / "pytorch_model.bin")
    vision = AutoConfig.for_model(**SIGLIP)
    AutoModel.from_config(vision).save_pretrained(tmp_path / "vision")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        DuoStreamForConditionalGeneration.from_backbones(
            str(tmp_path / "text"), str(tmp_path / "vision"), num_fusion_layers=1
        )
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_the_weights_are_never_opened(hostile: Any, rows: Path, tmp_path: Path) -> None:
    write, ran = hostile
    folder = write("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt")
    splits = ["--dataset", str(rows), "--train_split", "train", "--eval_split", "train"]
    finetune.main(
        ["--checkpoint", str(folder), *splits, "--output_dir", str(tmp_path / "tuned"), "--max_steps", "1", *QUIET]
    )
    assert not ran.exists()


@pytest.mark.parametrize("name", sorted(STATES))
def test_states_that_would_run_something_are_not_resumed_from(hostile: Any, rows: Path, name: str) -> None:
    write, ran = hostile
    folder = write(f"checkpoint-1/{name}")
    command = ["--dataset", str(rows), "--output_dir", str(folder), "--vocab_size", "300", "--max_steps", "2"]
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        pretrain.main([*command, "--resume", "true", *QUIET])
    assert not ran.exists()


@pytest.mark.slow
def test_nothing_is_fetched_that_was_not_named(rows: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMMANDS, str(rows), str(rows.with_name("red.png")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "reached []"


@pytest.mark.slow
def test_a_token_is_never_logged(run: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
        command = [sys.executable, "-c", PUSH, str(run)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DEBUG" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
