"""
Uploads a checkpoint to the Hub, whole and at once: weights, configs, processor, code and card, and nothing else that
training left beside them. Of an adapter that PEFT saved, its own files.

Example:

    duostream push --checkpoint runs/finetuned --repo_id me/my-duostream --evaluations runs/evaluation --private true
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from transformers import AutoConfig, AutoProcessor
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, PROCESSOR_NAME, logging

import duostream

from .arguments import parse
from .card import CARD, PICTURES, RUN, are_same_weights, is_by_hand, read_evaluation, weights_fingerprints, write_card
from .checkpoints import MERGE, check_files, check_place, is_adapter, load_model
from .demo import import_gradio, space_files

logger = logging.get_logger(__name__)

# What pushing again replaces
PROCESSOR = ("processor_config.json", "tokenizer*.json", "special_tokens_map.json", "*.jinja", "*_duostream.py")
MODEL = ("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json")
# What is told of other weights' training must not stay beside these
OURS = (*MODEL, *PROCESSOR, RUN)
ADAPTER = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
# How the card begins that PEFT writes for somebody to fill
BLANK_HEADING = "# Model Card for Model ID"


@dataclass
class PushArguments:
    """What to upload, and where to."""

    checkpoint: str = field(
        metadata={"help": "Local folder of a DuoStream model with its processor, or of a PEFT adapter of one."}
    )
    repo_id: str = field(metadata={"help": "Name of the repository on the Hub, `user/name`; made if it isn't there."})
    private: bool | None = field(
        default=None, metadata={"help": "Whether the repository is private: by default as the account has it."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to upload to: `main` by default."})
    card: str | None = field(
        default=None,
        metadata={
            "help": "A card of your own, as Markdown. By default the checkpoint's README.md if you wrote or changed "
            "it, else one that is filled from the training, and from `evaluations`."
        },
    )
    evaluations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Output folders of `duostream evaluate`: figures, and some rows with their pictures and answers, "
            "go into the card, for all to see."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the weights, for the card: `apache-2.0`, `mit`."}
    )
    language: list[str] = field(
        default_factory=list, metadata={"help": "Languages of the texts, for the card: codes such as `en`."}
    )
    space: str | None = field(
        default=None,
        metadata={"help": "Name of a Space, `user/name`, that is made or renewed, too: a page to try the model."},
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    commit_message: str = field(default="Upload DuoStream", metadata={"help": "Message of the commit."})
    json: bool = field(default=False, metadata={"help": "Print what was uploaded as JSON."})


def is_ours(name: str, patterns: Sequence[str] = OURS) -> bool:
    """Whether a file of a repository belongs to a checkpoint, and not to an adapter, an app or whatever is there."""
    return any(fnmatch(name, pattern) for pattern in patterns) and "/" not in name


def copy_card(card: Path, folder: Path) -> None:
    """Copies somebody's own card, and the pictures beside it that it shows."""
    text = card.read_text(encoding="utf-8")
    (folder / CARD).write_bytes(card.read_bytes())
    for name in re.findall(r"!\[[^\]]*\]\(([\w-]+\.(?:png|jpe?g|webp|gif))\)", text):
        if (card.parent / name).exists():
            copyfile(card.parent / name, folder / name)


def push(args: PushArguments) -> tuple[CommitInfo, str]:
    """
    The commit, and which card it has. The token is the one that `hf auth login` left, or that of
    `HF_TOKEN`.

    Raises:
        OSError: There is no processor beside the model.
        ValueError: There is no such folder or card, its model is none of DuoStream's, an evaluation is none of it or
            would go into a card that somebody wrote, or the repository, which is to be private, is public.
    """
    if not Path(args.checkpoint).is_dir():
        raise ValueError(
            f"`checkpoint` is {args.checkpoint!r}: there is no such folder; expected one of a model with its processor"
        )
    if args.card is not None and not Path(args.card).is_file():
        raise ValueError(f"`card` is {args.card!r}: there is no such file")
    if is_adapter(Path(args.checkpoint)):
        return push_adapter(args)
    check_place(args.checkpoint)
    config = AutoConfig.from_pretrained(args.checkpoint)
    name = ", ".join(config.architectures or [config.model_type])
    model_class = getattr(duostream, name, None)
    if model_class is None:
        raise ValueError(f"{args.checkpoint!r} holds {name!r}, which is no model of DuoStream")
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = load_model(model_class, args.checkpoint)
    card = Path(args.card or Path(args.checkpoint) / CARD)
    is_own = args.card is not None or is_by_hand(card)
    fills = [name for name in ("evaluations", "license", "language") if getattr(args, name)]
    if is_own and fills:
        raise ValueError(f"`{fills[0]}` is for a card that is filled: {str(card)!r} was written or changed by hand")
    evaluations = list(dict.fromkeys(map(Path, args.evaluations)))
    fingerprints = weights_fingerprints(model) if evaluations else {}
    for each in evaluations:
        if not are_same_weights(read_evaluation(each)["weights_fingerprints"], fingerprints):
            raise ValueError(f"`evaluations` has {str(each)!r}, which measured other weights than {args.checkpoint!r}")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Written anew, so that nothing that training left beside them is among the files
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
        if is_own:
            copy_card(card, folder)
        repo_id, there = open_repository(args)
        replaced: Sequence[str] = (*OURS, *PICTURES)
        if is_own:
            told = f"The card is {card}"
        elif CARD in there and is_by_hand(Path(HfApi().hf_hub_download(repo_id, CARD, revision=args.revision))):
            told = f"The card of {repo_id!r} was written or changed there, and stays as it is: `card` replaces it"
            if fills:
                raise ValueError(f"`{fills[0]}` is for a card that is filled. {told}")
            replaced = OURS
        else:
            write_card(
                Path(args.checkpoint), evaluations, folder, repo_id, license=args.license, language=args.language
            )
            told = f"The card was filled from {', '.join([args.checkpoint, *args.evaluations])}"
        if (run := Path(args.checkpoint) / RUN).exists():
            # By which the demo knows where pictures stood in training
            copyfile(run, folder / RUN)
        return upload(args, folder, repo_id, [name for name in there if is_ours(name, replaced)]), told


def push_adapter(args: PushArguments) -> tuple[CommitInfo, str]:
    """
    The same of an adapter that PEFT saved: its config and weights, the processor if it lies beside them, and the card.

    Raises:
        ValueError: Who loads it could not find its base model, or it has no safetensors, or an option asks for
            something that only a whole model has.
    """
    source = Path(args.checkpoint)
    if wholes := [name for name in ("evaluations", "license", "language", "space") if getattr(args, name)]:
        raise ValueError(f"`{wholes[0]}` is for a whole model, and {args.checkpoint!r} is an adapter of PEFT: {MERGE}")
    if missing := [name for name in ADAPTER if not (source / name).is_file()]:
        raise ValueError(f"{args.checkpoint!r} is an adapter of PEFT without {missing[0]!r}, which PEFT saves")
    check_files(source)
    base = json.loads((source / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or Path(base).exists():
        raise ValueError(
            f"{args.checkpoint!r} is an adapter of {base!r}, which is no model on the Hub: push that first, and write "
            f"its name there into {ADAPTER_CONFIG_NAME!r}, as `base_model_name_or_path`; or merge both: {MERGE}"
        )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if (source / PROCESSOR_NAME).is_file():
            AutoProcessor.from_pretrained(source).save_pretrained(folder)
        for name in ADAPTER:
            copyfile(source / name, folder / name)
        repo_id, there = open_repository(args)
        card = Path(args.card or source / CARD)
        if args.card is None and CARD in there:
            told = f"The card of {repo_id!r} stays as it is: `card` replaces it"
        elif not card.exists():
            told = f"There is no card: {str(card)!r} doesn't exist"
        else:
            copy_card(card, folder)
            told = f"The card is {card}"
            if BLANK_HEADING in card.read_text(encoding="utf-8").splitlines():
                logger.warning(
                    f"{card} has the heading of PEFT's blank template, {BLANK_HEADING!r}: fill it in on the Hub, in "
                    f"{repo_id!r}, where pushing again leaves it as it is"
                )
            if args.card is None:
                # PEFT's says where the base model was when the adapter was saved
                filled = ModelCard.load(folder / CARD)
                filled.data.base_model = base
                tags = [tag for tag in filled.data.tags or [] if not tag.startswith("base_model:")]
                filled.data.tags = [*tags, f"base_model:adapter:{base}"]
                filled.save(folder / CARD)
        patterns = ADAPTER if not (folder / PROCESSOR_NAME).exists() else (*ADAPTER, *PROCESSOR)
        return upload(args, folder, repo_id, [name for name in there if is_ours(name, patterns)]), told


def open_repository(args: PushArguments) -> tuple[str, list[str]]:
    """Makes the repository and the branch if they aren't there; its whole name, and the files in it."""
    api = HfApi()
    repo_id = api.create_repo(args.repo_id, private=args.private, exist_ok=True).repo_id
    if args.private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id!r} is public already: nothing was uploaded, as `private` asks otherwise")
    if args.revision is not None:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
    return repo_id, api.list_repo_files(repo_id, revision=args.revision)


def upload(args: PushArguments, folder: Path, repo_id: str, replaced: list[str]) -> CommitInfo:
    """Uploads the files of a folder, in place of those that are `replaced`; the commit, which is its address."""
    # One commit: whoever loads meanwhile gets all of it, or all of what was there before, and never old weights that
    # the library would find before new shards
    return HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=args.revision,
        commit_message=args.commit_message,
        delete_patterns=replaced,
    )


def push_space(space: str, files: dict[str, str], repo_id: str, private: bool | None = None) -> str:
    """
    Uploads the app of a Space that shows the page of the model `repo_id`; the address of the commit.

    Raises:
        ValueError: It is to be private, and is public.
    """
    api = HfApi()
    space = api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True).repo_id
    if private and not api.space_info(space).private:
        raise ValueError(f"The model is on the Hub, but its page isn't: {space!r} is public already, not `private`")
    operations = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
    message = f"A page to try {repo_id}"
    return str(api.create_commit(space, operations, repo_type="space", commit_message=message))


OPTIONS = (PushArguments,)


def main(args: list[str] | None = None) -> None:
    (push_args,) = parse(*OPTIONS, args=args, doc=__doc__)
    if push_args.space is not None:
        if push_args.revision not in (None, "main"):
            raise ValueError("`space` shows what is on the main branch: it goes without `revision`")
        # First, so that what is missing for it is told before anything is uploaded
        import_gradio()
    commit, told = push(push_args)
    uploaded = {"card": told, "commit": str(commit)}
    if push_args.space is not None:
        # The whole name, with whose it is, which may not have been given
        repo_id = commit.repo_url.repo_id
        uploaded["space"] = push_space(push_args.space, space_files(repo_id), repo_id, push_args.private)
    print(json.dumps(uploaded) if push_args.json else "\n".join(uploaded.values()))


if __name__ == "__main__":
    main()
