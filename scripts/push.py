"""
Uploads a checkpoint to the Hub, whole and at once: weights, configs, processor, code and card, and nothing else that
training left beside them.

Example:

    duostream-push --checkpoint runs/finetuned --repo_id me/my-duostream --private true
"""

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from transformers import AutoConfig, AutoProcessor

import duostream

from .arguments import parse

# What pushing again replaces
OURS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "*.jinja",
    "*_duostream.py",
)


@dataclass
class PushArguments:
    """What to upload, and where to."""

    checkpoint: str = field(metadata={"help": "Local folder of a DuoStream model with its processor."})
    repo_id: str = field(metadata={"help": "Name of the repository on the Hub, `user/name`; made if it isn't there."})
    private: bool | None = field(
        default=None, metadata={"help": "Whether the repository is private: by default as the account has it."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to upload to: `main` by default."})
    card: str | None = field(
        default=None, metadata={"help": "A card, as Markdown; by default the checkpoint's README.md, if there is one."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    commit_message: str = field(default="Upload DuoStream", metadata={"help": "Of the commit."})


def is_ours(name: str) -> bool:
    """Whether a file of a repository belongs to a checkpoint, and not to an adapter, an app or whatever is there."""
    return any(fnmatch(name, pattern) for pattern in OURS) and "/" not in name


def push(args: PushArguments) -> str:
    """
    The address of the commit. The token is the one that `hf auth login` left, or that of `HF_TOKEN`.

    Raises:
        OSError: There is no processor beside the model.
        ValueError: There is no such folder, its model is none of DuoStream's, or the repository, which is to be
            private, is public.
    """
    if not Path(args.checkpoint).is_dir():
        raise ValueError(f"`checkpoint` is {args.checkpoint!r}; expected the folder of a model with its processor")
    config = AutoConfig.from_pretrained(args.checkpoint)
    name = ", ".join(config.architectures or [config.model_type])
    model_class = getattr(duostream, name, None)
    if model_class is None:
        raise ValueError(f"{args.checkpoint!r} holds {name!r}, which is no model of DuoStream")
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = model_class.from_pretrained(args.checkpoint)
    card = Path(args.card or Path(args.checkpoint) / "README.md")
    with TemporaryDirectory() as folder:
        # Written anew, so that nothing that training left beside them is among the files
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
        if args.card is not None or card.exists():
            (Path(folder) / "README.md").write_bytes(card.read_bytes())
        api = HfApi()
        repo_id = api.create_repo(args.repo_id, private=args.private, exist_ok=True).repo_id
        if args.private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id!r} is public already: nothing was uploaded, as `private` asks otherwise")
        if args.revision is not None:
            api.create_branch(repo_id, branch=args.revision, exist_ok=True)
        # One commit: whoever loads meanwhile gets all of it, or all of what was there before, and never old weights
        # that the library would find before new shards
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=args.revision,
            commit_message=args.commit_message,
            delete_patterns=[name for name in api.list_repo_files(repo_id, revision=args.revision) if is_ours(name)],
        )
    return str(commit)


def main(args: list[str] | None = None) -> None:
    (push_args,) = parse(PushArguments, args=args, doc=__doc__)
    print(push(push_args))


if __name__ == "__main__":
    main()
