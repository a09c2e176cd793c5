"""
Fine-tunes a checkpoint at a task: to write captions, answers, translations or summaries, to classify, to find.

Example:

    duostream finetune --checkpoint runs/pretrained --task caption --dataset path/to/photographs \\
        --output_dir runs/finetuned --num_train_epochs 3
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoProcessor, set_seed
from transformers.utils import logging

from ..configuration import DuoStreamConfig
from ..modeling import DuoStreamForSequenceClassification
from .arguments import DataArguments, DuoStreamTrainingArguments, json_mapping, merged, parse
from .checkpoints import check_place, load_model
from .data import load_mixture, load_rows, read_classes
from .rows import are_numbered
from .tasks import task_of
from .training import bad_rows_of, check_output_dir, check_packing, collator_of, prepare, train
from .vision_cache import check_cacheable

logger = logging.get_logger(__name__)


@dataclass
class FinetuneArguments:
    """Where to start from."""

    checkpoint: str = field(metadata={"help": "Local folder or Hub id of a DuoStream model with its processor."})
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Fields of its configuration to change, as JSON: {"loss_chunk_size": 256}.'},
    )


def class_options(classes: list[str], label: Any) -> dict[str, Any]:
    """
    Fields of the config that tell how many classes there are, their names, and of what kind a `label` is.

    Raises:
        ValueError: There is one class, and nothing to tell apart.
    """
    if not classes:
        return {"num_labels": 1, "problem_type": "regression"}
    if len(classes) == 1:
        raise ValueError(
            f"`label_column` (and `max_answers`) leave one class, {classes[0]!r}; expected two or more in the rows to "
            "train on"
        )
    is_soft = isinstance(label, list)
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if is_soft else "single_label_classification",
    }


def known_classes(checkpoint: str) -> list[str]:
    """The classes that a checkpoint's head tells apart, in the order of its scores; none, if it has no such head."""
    config = AutoConfig.from_pretrained(checkpoint)
    is_classifier = config.architectures == [DuoStreamForSequenceClassification.__name__]
    return [config.id2label[number] for number in range(config.num_labels)] if is_classifier else []


def has_other_classes(known: list[str], classes: list[str]) -> bool:
    """
    Whether a head that was loaded for `classes`, as it is of their size (another is made anew by the loading), is of
    other classes. Numbers may be those of any names.
    """
    is_told = are_numbered(known) == are_numbered(classes)
    one, other = ({name.removeprefix("LABEL_") for name in names} for names in (known, classes))
    return len(known) == len(classes) and is_told and one != other


def changed_config(args: FinetuneArguments) -> dict[str, Any]:
    """
    `config_overrides`, with which the checkpoint's configuration was tried out.

    Raises:
        ValueError: They are no fields of it, or no values for them, or make a part another type.
    """
    overrides = json_mapping(args, "config_overrides")
    if overrides:
        fields = AutoConfig.from_pretrained(args.checkpoint).to_dict()
        changed = merged(fields, overrides)
        for name, part in fields.items():
            kind = part.get("model_type") if isinstance(part, dict) else None
            if kind is not None and not (isinstance(changed[name], dict) and changed[name]["model_type"] == kind):
                raise ValueError(
                    f"`config_overrides` makes `{name}` {changed[name]!r:.100}, but the checkpoint has weights of a "
                    f"{kind!r}"
                )
        # `from_pretrained` sets fields without looking at them
        DuoStreamConfig.from_dict(changed)
    return overrides


OPTIONS = (FinetuneArguments, DataArguments, DuoStreamTrainingArguments)


def main(args: list[str] | None = None) -> None:
    finetune_args, data_args, training_args = parse(*OPTIONS, args=args, doc=__doc__)
    check_output_dir(training_args)
    set_seed(training_args.seed)
    check_place(finetune_args.checkpoint)
    if training_args.metric_rows and data_args.streaming:
        raise ValueError("`metric_rows` are read again and again: not with `streaming`")
    if training_args.cache_vision:
        check_cacheable(data_args)
    if training_args.packing and not task_of(data_args.task).is_generative:
        raise ValueError(f"`packing` is for tasks that write, not for {data_args.task!r}")
    is_classification = data_args.task == "classification"
    bad_rows = bad_rows_of(data_args, training_args)
    classes = read_classes(data_args, bad_rows) if is_classification else []
    known = known_classes(finetune_args.checkpoint) if classes else []
    if set(known) == set(classes):
        classes = known  # so that its head is theirs, whatever their order is here
    rows = load_mixture(data_args, classes, training_args.seed, bad_rows)
    check_packing(training_args, rows)
    eval_rows, metric_rows = None, None
    if data_args.eval_split:
        held_out: dict[str, Any] = {"classes": classes, "bad_rows": bad_rows and bad_rows.elsewhere()}
        eval_rows = load_rows(data_args, data_args.eval_split, data_args.max_eval_rows, **held_out)
        if Path(data_args.dataset).is_file() and "[" not in data_args.train_split + data_args.eval_split:
            logger.warning(
                f"{data_args.dataset} is one file: it is evaluated on the rows it is trained on. Part it, as in "
                "`--train_split 'train[:90%]' --eval_split 'train[90%:]'`, or evaluate nothing by `--eval_split ''`"
            )
    elif training_args.metric_rows:
        raise ValueError("`metric_rows` are of `eval_split`, which is empty")
    if training_args.metric_rows:
        metric_rows = load_rows(
            data_args, data_args.eval_split, training_args.metric_rows, is_evaluation=True, **held_out
        )
    options = changed_config(finetune_args)
    if is_classification:
        options |= class_options(classes, next(iter(rows))["label"])
        # A head for more classes, or fewer, is made anew, which the loading reports
        options["ignore_mismatched_sizes"] = True
    auto_class = task_of(data_args.task).auto_class
    model = load_model(auto_class, finetune_args.checkpoint, may_have_new_head=True, **options)
    if is_classification and has_other_classes(known, classes):
        logger.warning(
            f"The head of {finetune_args.checkpoint} tells {known!r:.200} apart, not {classes!r:.200}: it is made anew"
        )
        # Of weights that were loaded the library would leave the values
        model.score = nn.Linear(model.score.in_features, len(classes)).to(model.score.weight)
        model._init_weights(model.score)
    processor = AutoProcessor.from_pretrained(finetune_args.checkpoint)
    prepare(model, processor, training_args.freeze)
    collator = collator_of(data_args, processor, model)
    collator.packing = training_args.packing
    train(
        model,
        processor,
        training_args,
        rows,
        eval_rows,
        collator,
        task=data_args.task,
        metric_rows=metric_rows,
        bad_rows=bad_rows,
        data=data_args,
    )


if __name__ == "__main__":
    main()
