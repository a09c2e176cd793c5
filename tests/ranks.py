"""
Several processes that train, or read, together: how tests start them; and, as a script, the training command that each
of them runs, told apart from pretraining by its `--checkpoint`.
"""

import os
import subprocess
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from duostream.scripts import finetune, pretrain

RECIPES = Path(pretrain.__file__).parent / "recipes/accelerate"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
# Most of what a short-lived rank does is to import, so the launcher does that once and forks them, which torch's knows
# how to: with `--run-path` a script runs in the rank that was forked, and in no interpreter of its own
FORK = {"PET_RUN_PATH": "1", "PET_START_METHOD": "fork"}
IMPORT_FIRST = """
import sys
from runpy import run_module
import pytest
import ranks
del sys.argv[0]
run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def accelerate(recipe: str, num_ranks: int, port: int = 0) -> list[str]:
    """Of the recipe all is kept but for the number of GPUs, half precision, and the port, which others may have."""
    line = ["accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe}.yaml"), "--num_processes"]
    return [*line, str(num_ranks), "--mixed_precision", "no", "--main_process_port", str(port)]


def launch(launcher: list[str], *command: object) -> subprocess.CompletedProcess:
    """As a user does."""
    return _run(["-m", *launcher, *map(str, command)])


def launch_forks(launcher: list[str], script: str, *args: object) -> subprocess.CompletedProcess:
    """The same of a script, in a fraction of the time."""
    return _run(
        ["-c", IMPORT_FIRST, *launcher, script, *map(str, args)], PYTHONPATH=str(Path(__file__).parent), **FORK
    )


def _run(line: list[str], **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment, timeout=400)


if __name__ == "__main__":
    create_accelerator = Trainer.create_accelerator_and_postprocess

    def as_on_gpus(trainer: Trainer) -> None:
        # Of processes on CPUs accelerate shares out no weights, whatever its configuration says, and is silent
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create_accelerator(trainer)
        # In one piece, as other ranks write, too
        sys.stdout.write(f"weights are shared by {'FSDP2' if trainer.accelerator.is_fsdp2 else 'none'}\n")
        sys.stdout.flush()

    Trainer.create_accelerator_and_postprocess = as_on_gpus
    (finetune if "--checkpoint" in sys.argv else pretrain).main()
