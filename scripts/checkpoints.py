"""Checkpoints that are there: whether a name is one, whether its files are whole and fit together, and loading it."""

import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file, logging

logger = logging.get_logger(__name__)

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
