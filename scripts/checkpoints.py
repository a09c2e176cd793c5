"""Checkpoints that are whole: written aside and moved to their place, and refused by name where they are broken."""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The library uploads nothing whose name begins so
UNFINISHED = "_unfinished"


def sync(folder: Path) -> None:
    """Waits until the files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def publish(written: Path, place: Path) -> None:
    """
    Moves a folder that is written to its place, so that all of it is there or none, whenever the process ends. What
    stood there stays until then, where the file system lets folders change places: on Linux most do, NFS doesn't.
    """
    sync(written)
    if not (place.exists() and _exchange(written, place)):
        if place.exists():
            # A folder that is deleted where it stands is for a while half of one
            place.rename(written.parent / "replaced")
        written.rename(place)
    shutil.rmtree(written.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change places at once, for which Python has no call, and says whether the system did so."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def publish_files(written: Path, folder: Path) -> None:
    """
    Moves the files of a model that is written to a folder that has others. Its weights are taken away first and come
    last: without them nothing can be loaded, so new weights never stand beside an old config.
    """
    sync(written)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for path in sorted(written.iterdir(), key=lambda path: (".safetensors" in path.name, path.suffix == ".json")):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)
    shutil.rmtree(written.parent)


def check_files(folder: Path, has_states: bool = False) -> None:
    """
    Looks whether the files of a checkpoint can be read, without reading the weights.

    Args:
        folder (`Path`): Of the checkpoint.
        has_states (`bool`, *optional*): Whether to look at those of optimizer, schedule and random numbers, too.

    Raises:
        ValueError: One can't, which is named; the library's messages don't, or it goes on without the file.
    """
    if not any(folder.glob("*.safetensors")) and (pickles := sorted(folder.glob("pytorch_model[.-]*bin"))):
        raise ValueError(f"{pickles[0]} is a pickle, which may run code when it is loaded; expected safetensors")
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif has_states and path.suffix in (".pt", ".pth") and not is_zipfile(path):
                raise ValueError("it isn't a whole archive")
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is broken, cut short or overwritten: {error}") from error


def check_meanings(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """
    Looks whether tokens and classes have the numbers by which a checkpoint's weights know them.

    Args:
        folder (`Path`): Of the checkpoint to resume from. Where weights are saved in shards it has neither tokenizer
            nor config, and nothing is looked at.
        tokenizer (`PreTrainedTokenizerBase`): Of the run that resumes.
        config (`PreTrainedConfig`): Of the run that resumes.

    Raises:
        ValueError: They have others, which are named.
    """
    if (folder / "tokenizer_config.json").exists():
        saved, own = AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab()
        others = sorted(token for token in saved.keys() | own.keys() if saved.get(token) != own.get(token))
        if others:
            named = ", ".join(f"{token!r} ({saved.get(token)} there, {own.get(token)} here)" for token in others[:3])
            raise ValueError(
                f"{folder} to resume from was trained with another tokenizer than this run's: {len(others)} tokens "
                f"have other numbers, or none, such as {named}. Resume with that (`pretrain --tokenizer {folder}`; "
                "`finetune` from the same `--checkpoint`), or take another `output_dir`"
            )
    if (folder / "config.json").exists():
        classes = AutoConfig.from_pretrained(folder).id2label
        if classes != config.id2label:
            raise ValueError(
                f"{folder} to resume from was trained on the classes {list(classes.values())}, but those of this run "
                f"are {list(config.id2label.values())}: resume with rows of the same classes, or take another "
                "`output_dir`"
            )


def warn_of_unknown_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """
    Warns of tokens without an embedding, at which a model fails; but for the placeholder of pictures, which needs
    none. No error, as there may be such that no text holds.
    """
    num_embeddings = config.text_config.vocab_size
    numbers = {number: token for token, number in tokenizer.get_vocab().items()}
    if without := sorted(number for number in numbers if number >= num_embeddings and number != config.image_token_id):
        logger.warning(
            f"The tokenizer has {len(without)} tokens that the text model, with its {num_embeddings} embeddings, "
            f"doesn't know, such as {numbers[without[0]]!r} ({without[0]}): it fails at a text with one. Resize its "
            "embeddings before (`model.resize_token_embeddings(len(tokenizer))`), or take the tokenizer that it was "
            "trained with"
        )


def load_model(auto_class: Any, checkpoint: str, may_have_new_head: bool = False, **options: Any) -> PreTrainedModel:
    """
    Loads a checkpoint of which nothing may be missing.

    Args:
        auto_class: One of the library's `AutoModelFor...`.
        checkpoint (`str`): Local folder or Hub id.
        may_have_new_head (`bool`, *optional*): Whether a head that the checkpoint lacks may be new, to be trained.
        options: Go to `from_pretrained`.

    Raises:
        ValueError: A file is broken, or weights are missing, which the library would draw anew.
    """
    if Path(checkpoint).is_dir():
        check_files(Path(checkpoint))
    saved_as = AutoConfig.from_pretrained(checkpoint).architectures or []
    model, report = auto_class.from_pretrained(checkpoint, output_loading_info=True, **options)
    is_new_head = may_have_new_head and type(model).__name__ not in saved_as
    missing = sorted(
        name for name in report["missing_keys"] if not is_new_head or name.startswith(f"{model.base_model_prefix}.")
    )
    if missing:
        named = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ValueError(
            f"{checkpoint} lacks weights of {type(model).__name__}: {named} (it was saved as "
            f"{', '.join(saved_as) or 'nothing known'})"
        )
    return model
