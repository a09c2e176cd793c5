"""Where a checkpoint is: in a folder, or on the Hub. Looked at first, so that a wrong name is told before any work."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

EXPECTED = (
    "expected a folder with a model's `config.json` and its processor, or a model's name on the Hub, `user/name`"
)
MERGE = (
    "`PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(FOLDER)` makes a whole model of it"
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds what PEFT saves, without the model that it was trained on."""
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file()


def check_place(checkpoint: str) -> None:
    """
    Looks whether there is a model, in a folder or on the Hub.

    Raises:
        ValueError: There is none. Of a folder that isn't there the library would say what a name on the Hub may be.
    """
    path, told = Path(checkpoint), f"`checkpoint` is {checkpoint!r}"
    if is_adapter(path):
        raise ValueError(f"{told}, an adapter of PEFT without its model: {MERGE}, and the processor belongs beside it")
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise ValueError(f"{told}, a folder without `config.json`; {EXPECTED}")
        return
    if path.is_file():
        raise ValueError(f"{told}, a file; {EXPECTED}")
    try:
        validate_repo_id(checkpoint)
    except HFValidationError as error:
        raise ValueError(f"{told}: there is no such folder; {EXPECTED}") from error
    try:
        cached_file(checkpoint, CONFIG_NAME)
    except OSError as error:
        raise ValueError(f"{told}: there is no such folder, and from the Hub it can't be had: {error}") from error
