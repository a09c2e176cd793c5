"""
Trains a model from scratch: a preset's three transformers, and a tokenizer if none is given.

Example:

    duostream pretrain --preset tiny --dataset scenes --output_dir runs/pretrained --max_steps 300
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import (
    DuoStreamConfig,
    DuoStreamDataCollator,
    DuoStreamForConditionalGeneration,
    DuoStreamForPreTraining,
    DuoStreamPreTrainedModel,
    DuoStreamPreTrainingCollator,
    DuoStreamProcessor,
    train_tokenizer,
)
from ..configuration.image_tokens_duostream import image_size_of
from .arguments import (
    DataArguments,
    DuoStreamTrainingArguments,
    check_at_least_one,
    json_mapping,
    merged,
    parse,
)
from .backbones import check_answers_end, load_vision, take_vision
from .data import load_mixture, load_rows, texts_of
from .sources import Rows
from .training import bad_rows_of, check_output_dir, check_packing, prepare, train
from .vision_cache import check_cacheable


@dataclass
class PretrainArguments:
    """What to train from scratch."""

    preset: str = field(default="tiny", metadata={"help": "`tiny` or `base`."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Local folder or Hub id. By default one is trained on the rows' text."}
    )
    vocab_size: int = field(default=2048, metadata={"help": "Size at most of a tokenizer that is trained."})
    tokenizer_rows: int = field(default=5000, metadata={"help": "Texts, or messages, a tokenizer is trained on."})
    vision: str | None = field(
        default=None, metadata={"help": "Local folder or Hub id of a vision model to take instead of the preset's."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Fields that differ from the preset, as JSON: {"text_config": {"hidden_size": 256}}.'},
    )
    bidirectional_prefix: bool = field(
        default=False, metadata={"help": "Read what comes before the first answer both ways (prefix-LM)."}
    )
    lm_weight: float = field(default=1.0, metadata={"help": "Weight of language modelling; 0 leaves it out."})
    mlm_weight: float = field(default=0.0, metadata={"help": "Weight of masked language modelling."})
    itc_weight: float = field(default=0.0, metadata={"help": "Weight of the image-text contrastive loss."})
    itm_weight: float = field(default=0.0, metadata={"help": "Weight of image-text matching."})
    contrastive_loss: str = field(default="sigmoid", metadata={"help": "`sigmoid` (SigLIP) or `softmax` (CLIP)."})
    whole_word_mask: bool = field(default=False, metadata={"help": "Mask all tokens of a word, or none."})


def new_model(args: PretrainArguments, rows: Rows) -> tuple[DuoStreamPreTrainedModel, DuoStreamProcessor]:
    """
    A preset's model with random weights (but for a given vision model's), and its processor: one that writes, or with
    more objectives than that, `DuoStreamForPreTraining`.

    Raises:
        ValueError: The parts don't fit together, or something is told twice.
    """
    check_at_least_one(args, "tokenizer_rows")
    overrides = check_overrides(args)
    tokenizer: PreTrainedTokenizerBase
    if args.tokenizer is None:
        tokenizer = train_tokenizer(islice(texts_of(rows), args.tokenizer_rows), args.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="left")  # prompts are written on
    fields = {
        "contrastive_loss": args.contrastive_loss,
        **objective_weights(args),
        **overrides,
    }
    if args.vision is not None:
        image_processor, fields["vision_config"], fields["image_size"] = load_vision(args.vision)
        fields["base_models"] = None if Path(args.vision).exists() else [args.vision]
    config = DuoStreamConfig.from_preset(args.preset, vocab_size=len(tokenizer), **fields)
    if args.vision is None:
        height, width = image_size_of(config.vision_config, config.image_size)
        image_processor = SiglipImageProcessorPil(size={"height": height, "width": width})
    processor = DuoStreamProcessor(
        image_processor,
        tokenizer,
        image_seq_length=config.image_seq_length,
        bidirectional_prefix=args.bidirectional_prefix,
    )
    if args.lm_weight:
        check_answers_end(processor)
    config.image_token_id = processor.image_token_id
    for stack in (config.text_config, config.fusion_stack_config):
        # A preset's own would end answers at whatever token has that number
        stack.bos_token_id, stack.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model = (DuoStreamForConditionalGeneration if writes_only(args) else DuoStreamForPreTraining)(config)
    if args.vision is not None:
        take_vision(model, args.vision)
    return model, processor


def check_overrides(args: PretrainArguments) -> dict[str, Any]:
    """
    `config_overrides`, for the preset.

    Raises:
        ValueError: They are no fields of it, or have options of their own.
    """
    overrides = json_mapping(args, "config_overrides")
    own = {*objective_weights(args), "contrastive_loss", "vocab_size", "image_token_id"}
    own |= {"vision_config", "image_size"} if args.vision is not None else set()
    if twice := sorted(own & set(overrides)):
        raise ValueError(f"`config_overrides` has {twice}, which options of their own, or the tokenizer, tell")
    fields = DuoStreamConfig.from_preset(args.preset).to_dict()
    # What else a preset may be told
    merged({**fields, "attn_implementation": None, "fusion_config": fields["fusion_stack_config"]}, overrides)
    return overrides


def objective_weights(args: PretrainArguments) -> dict[str, float]:
    return {name: getattr(args, name) for name in ("lm_weight", "mlm_weight", "itc_weight", "itm_weight")}


def writes_only(args: PretrainArguments) -> bool:
    """Whether language modelling is the only objective."""
    return [name for name, weight in objective_weights(args).items() if weight] == ["lm_weight"]


OPTIONS = (PretrainArguments, DataArguments, DuoStreamTrainingArguments)


def main(args: list[str] | None = None) -> None:
    pretrain_args, data_args, training_args = parse(*OPTIONS, args=args, doc=__doc__)
    check_output_dir(training_args)
    if data_args.task == "classification":
        raise ValueError("`task` 'classification' is nothing to pretrain on: fine-tune a pretrained checkpoint at it")
    if training_args.metric_rows:
        raise ValueError("`metric_rows` is for fine-tuning: pretraining is measured by its losses")
    if training_args.eval_strategy != "no" and not data_args.eval_split:
        raise ValueError(
            f"`eval_strategy` {training_args.eval_strategy.value!r} evaluates on `eval_split`, which is empty"
        )
    if training_args.cache_vision:
        check_cacheable(data_args)
    if not any(objective_weights(pretrain_args).values()):
        raise ValueError(f"{', '.join(objective_weights(pretrain_args))} are all 0: there is nothing to learn")
    for option in ("cache_vision", "packing"):
        if getattr(training_args, option) and not writes_only(pretrain_args):
            raise ValueError(f"`{option}` goes with language modelling alone, not with the other objectives")
    set_seed(training_args.seed)
    bad_rows = bad_rows_of(data_args, training_args)
    rows = load_mixture(data_args, seed=training_args.seed, bad_rows=bad_rows)
    check_packing(training_args, rows)
    eval_rows = None
    if training_args.eval_strategy != "no":
        eval_rows = load_rows(
            data_args, data_args.eval_split, data_args.max_eval_rows, bad_rows=bad_rows and bad_rows.elsewhere()
        )
    model, processor = new_model(pretrain_args, rows)
    prepare(model, processor, training_args.freeze)
    collator = DuoStreamDataCollator(processor, data_args.max_length, packing=training_args.packing)
    if not writes_only(pretrain_args):
        collator = DuoStreamPreTrainingCollator(
            processor,
            data_args.max_length,
            whole_word_mask=pretrain_args.whole_word_mask,
            mlm=bool(pretrain_args.mlm_weight),
            pairs=bool(pretrain_args.itc_weight or pretrain_args.itm_weight),
        )
    told = {"data": data_args, "began_with": pretrain_args.vision}
    train(model, processor, training_args, rows, eval_rows, collator, bad_rows=bad_rows, **told)


if __name__ == "__main__":
    main()
