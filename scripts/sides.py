"""The models that `duostream benchmark quality` sets side by side: DuoStream, and its peer for each task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .. import (
    DuoStreamConfig,
    DuoStreamForConditionalGeneration,
    DuoStreamPreTrainedModel,
    DuoStreamProcessor,
)
from ..configuration.image_tokens_duostream import image_token_shape, image_tokens
from ..processing.data_collator_duostream import load_picture
from ..processing.packing_duostream import IGNORE_INDEX
from .arguments import DataArguments, DuoStreamTrainingArguments, json_mapping
from .backbones import check_answers_end, load_vision, take_vision
from .measuring import evaluate, references_of, score_answers, text_of
from .scenes import rows_of_batch
from .sources import Rows
from .tasks import task_of
from .training import collator_of
from .vision_cache import with_states

if TYPE_CHECKING:
    from .quality import QualityArguments

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class Side:
    """
    A model, what makes its batches, what measures it on rows, its parts that are a pretrained language model's, and
    what makes of rows those it is trained on, which takes of its time.
    """

    model: PreTrainedModel
    collator: Collator
    measure: Callable[[Rows], dict[str, Any]]
    pretrained: tuple[nn.Module, ...] = ()
    prepare: Callable[[Rows, DuoStreamTrainingArguments, str], Rows] = lambda rows, args, folder: rows


class FrozenVision(PreTrainedModel):
    """
    A pretrained convolutional model, frozen, whose feature map is read as tokens with a norm and positions of their
    own: for peers that read no feature maps. DuoStream's projector has both, too.
    """

    main_input_name = "pixel_values"

    def __init__(self, vision: str, image_size: int | None = None):
        _, config, size = load_vision(vision, image_size)
        own_size = getattr(config, "image_size", size)
        if own_size not in (size, [size, size]):
            raise ValueError(
                f"`vision_size`: pictures of {size} pixels a side, but {vision!r} is for {own_size}, and the peer "
                "reads those alone"
            )
        config.image_size = own_size  # of patches, too, whose config tells of no pictures' size
        num_tokens, config.hidden_size = image_token_shape(config)  # the peers ask the config for it
        super().__init__(config)
        self.backbone = AutoModel.from_pretrained(vision, config=config).requires_grad_(False)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.position_embeddings = nn.Parameter(0.02 * torch.randn(num_tokens, config.hidden_size))

    def train(self, mode: bool = True) -> FrozenVision:
        # As in DuoStream, batch norms stay as they are
        return super().train(False)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        # As in DuoStream, the memory layout in which convolutions are fastest
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        states = image_tokens(self.backbone(pixel_values=pixel_values))  # (batch, num_tokens, channels)
        states = self.norm(states.contiguous()) + self.position_embeddings
        return BaseModelOutputWithPooling(states, pooler_output=states.mean(dim=1), hidden_states=(states,))


def initializer_range(args: QualityArguments) -> float:
    return args.hidden_size**-0.5 if args.initializer_range is None else args.initializer_range


def num_heads(args: QualityArguments) -> int:
    return max(1, args.hidden_size // 32)


def new_duostream(
    args: QualityArguments, data_args: DataArguments, processor: DuoStreamProcessor, options: dict[str, Any]
) -> DuoStreamPreTrainedModel:
    """DuoStream with new weights, but for those of `vision`."""
    stack = {
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_attention_heads": num_heads(args),
        "initializer_range": initializer_range(args),
        "attention_dropout": args.dropout,
        "resid_pdrop": args.dropout,
        **json_mapping(args, "stack"),
    }
    options = dict(options)
    vision_config: Any = {"image_size": args.image_size, **json_mapping(args, "vision_config")}
    if args.vision is not None:
        _, vision_config, options["image_size"] = load_vision(args.vision, args.vision_size)
    text_stack = {**stack, "num_hidden_layers": args.num_text_layers, **json_mapping(args, "text_stack")}
    num_fusion_layers = args.num_fusion_layers or args.num_layers - args.num_text_layers
    config = DuoStreamConfig.from_preset(
        "tiny",
        vocab_size=len(processor.tokenizer),
        text_config={**text_stack, "embd_pdrop": args.dropout},
        fusion_stack_config={**stack, "num_hidden_layers": num_fusion_layers},
        vision_config=vision_config,
        initializer_range=stack["initializer_range"],
        image_token_id=processor.image_token_id,
        contrastive_loss="softmax",
        classifier_dropout=args.dropout,
        **{**options, **json_mapping(args, "config_overrides")},
    )
    model = task_of(data_args.task).model_class(config)
    if args.vision is not None:
        take_vision(model, args.vision)
    return model


def duostream_side(
    args: QualityArguments, data_args: DataArguments, processor: DuoStreamProcessor, options: dict[str, Any]
) -> Side:
    pretrained: tuple[nn.Module, ...] = ()
    if args.text is None:
        model = new_duostream(args, data_args, processor, options)
    else:
        check_answers_end(processor)
        model = DuoStreamForConditionalGeneration.from_backbones(
            args.text,
            args.vision,
            num_fusion_layers=args.num_fusion_layers,
            image_size=load_vision(args.vision, args.vision_size)[2],
            image_token_id=processor.image_token_id,
            dtype=torch.float32,
            **json_mapping(args, "config_overrides"),
        )
        pretrained = (model.model.text_model, model.model.fusion_model, model.lm_head)
    processor.image_seq_length = model.config.image_seq_length
    if args.vision is not None:
        model.freeze("vision")
    generation = {}
    if task_of(data_args.task).is_generative:
        generation = {"max_new_tokens": args.max_new_tokens}
        stop_at_the_end(model, processor.tokenizer)
    side = Side(
        model,
        collator_of(data_args, processor, model),
        lambda rows: evaluate(model, processor, rows, data_args.task, **generation)[0],
        pretrained,
    )
    if args.cache_vision:
        side.prepare = lambda rows, training_args, folder: with_states(rows, model, processor, training_args, folder)
    return side


def stop_at_the_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a model how an answer ends, which `Trainer` does only where it has the processor."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def only_what_is_read(collator: Collator, model: PreTrainedModel) -> Collator:
    """A collator without the inputs that a model doesn't know."""
    names = set(signature(model.forward).parameters)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in collator(rows).items() if name in names}

    return collate


def peer_side(
    args: QualityArguments,
    data_args: DataArguments,
    processor: DuoStreamProcessor,
    options: dict[str, Any],
    reads_text: bool,
) -> Side:
    """
    Raises:
        ValueError: The task has no peer here.
    """
    size: dict[str, Any] = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_peer_layers,
        "num_attention_heads": num_heads(args),
        "intermediate_size": 4 * args.hidden_size,
    }
    size |= {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    size["initializer_range"] = args.peer_initializer_range
    tokenizer = processor.tokenizer
    if data_args.task in ("classification", "retrieval"):
        processor = with_first_token(processor)
    bert = BertConfig(vocab_size=len(processor.tokenizer), pad_token_id=tokenizer.pad_token_id, **size, **options)
    vit = ViTConfig(**size, image_size=args.image_size, patch_size=args.image_size // 6, **options)
    model: PreTrainedModel
    if data_args.task == "classification":
        model = BertForSequenceClassification(bert) if reads_text else ViTForImageClassification(vit)
        collator = only_what_is_read(collator_of(data_args, processor, model), model)
        return Side(
            model, collator, lambda rows: evaluate(model, processor, rows, data_args.task, collator=collator)[0]
        )
    if data_args.task in ("translation", "summarization"):
        if args.llava:
            raise ValueError(f"`llava` is for pictures; `task` {data_args.task!r} has none")
        return seq2seq_side(args, data_args, processor, encoder_decoder(args, data_args.task, tokenizer))
    if args.vision is not None:
        vision: PreTrainedModel = FrozenVision(args.vision, args.vision_size)
    elif args.llava:
        # The same as DuoStream's, so that what differs is where pictures join
        fields = {"image_size": args.image_size, **json_mapping(args, "vision_config")}
        vision_config = DuoStreamConfig.from_preset("tiny", vision_config=fields).vision_config
        if not hasattr(vision_config, "patch_size"):
            raise ValueError("`llava` reads patches: give `vision`, or a `vision_config` with `patch_size`")
        vision = AutoModel.from_config(vision_config)
    else:
        vision = ViTModel(vit)
    if data_args.task == "vqa" or (args.llava and data_args.task in ("caption", "chat")):
        return llava_side(args, data_args, processor, vision)
    if data_args.task == "caption":
        return seq2seq_side(args, data_args, processor, captioner(args, vision, tokenizer))
    if data_args.task == "retrieval":
        model = VisionTextDualEncoderModel(vision_model=vision, text_model=BertModel(bert))
        collator = only_what_is_read(collator_of(data_args, processor, model), model)
        return Side(model, collator, lambda rows: evaluate(model, processor, rows, data_args.task)[0])
    raise ValueError(f"`task` {data_args.task!r} has no peer here")


def with_first_token(processor: DuoStreamProcessor) -> DuoStreamProcessor:
    """A processor whose tokenizer puts BERT's [CLS], whose state is all that its heads read, in front of each text."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    special = [("[CLS]", tokenizer.cls_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=special)
    return DuoStreamProcessor(processor.image_processor, tokenizer, image_seq_length=processor.image_seq_length)


def encoder_decoder(args: QualityArguments, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """
    Marian for translation, BART for summaries: an encoder and a decoder that share the layers between them.

    Raises:
        ValueError: They can't.
    """
    if args.num_peer_layers % 2:
        raise ValueError(f"The peer has {args.num_peer_layers} layers, half of which decode: expected an even number")
    config_class = MarianConfig if task == "translation" else BartConfig
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=args.hidden_size,
        encoder_layers=args.num_peer_layers // 2,
        decoder_layers=args.num_peer_layers // 2,
        encoder_attention_heads=num_heads(args),
        decoder_attention_heads=num_heads(args),
        encoder_ffn_dim=4 * args.hidden_size,
        decoder_ffn_dim=4 * args.hidden_size,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
        max_position_embeddings=1024,
        init_std=args.peer_initializer_range,
        dropout=args.dropout,
        attention_dropout=args.dropout,
        # Marian's words would drown in its positions, as it has no norm between them and the layers
        scale_embedding=task == "translation",
    )
    return (MarianMTModel if task == "translation" else BartForConditionalGeneration)(config)


def captioner(
    args: QualityArguments, vision: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> VisionEncoderDecoderModel:
    """A vision model and a GPT-2 with cross-attention."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=args.hidden_size,
        n_layer=args.num_peer_layers,
        n_head=num_heads(args),
        n_positions=256,
        initializer_range=args.peer_initializer_range,
        bos_token_id=tokenizer.pad_token_id,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        resid_pdrop=args.dropout,
        is_decoder=True,
        add_cross_attention=True,
        **special,
    )
    model = VisionEncoderDecoderModel(encoder=vision, decoder=GPT2LMHeadModel(decoder))
    model.config.update({"decoder_start_token_id": tokenizer.pad_token_id, **special})
    model.generation_config.decoder_start_token_id = tokenizer.pad_token_id
    stop_at_the_end(model, tokenizer)
    return model


def llava_side(
    args: QualityArguments, data_args: DataArguments, processor: DuoStreamProcessor, vision: PreTrainedModel
) -> Side:
    """LLaVA: image tokens go through all layers."""
    num_tokens, _ = image_token_shape(vision.config)
    language: PreTrainedModel | None = None
    if args.text is not None:
        language = AutoModelForCausalLM.from_pretrained(args.text, dtype=torch.float32, use_safetensors=True)
        # It looks up its placeholders' embeddings
        language.resize_token_embeddings(max(len(processor.tokenizer), language.config.vocab_size))
    text_config = (
        language.config
        if language is not None
        else LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=args.hidden_size,
            # Three matrices of this size weigh as much as two of four times the width
            intermediate_size=args.hidden_size * 8 // 3,
            num_attention_heads=num_heads(args),
            num_hidden_layers=args.num_peer_layers,
            initializer_range=args.peer_initializer_range,
            attention_dropout=args.dropout,
            pad_token_id=processor.tokenizer.pad_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        )
    )
    # A ViT's first token is no part of the picture
    has_first_token = isinstance(vision, ViTModel)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        image_seq_length=num_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if has_first_token else "full",
        tie_word_embeddings=language is None or language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    if language is not None:
        model.model.language_model, model.lm_head = language.base_model, language.get_output_embeddings()
        model.generation_config.suppress_tokens = [processor.image_token_id]
    stop_at_the_end(model, processor.tokenizer)
    own = DuoStreamProcessor(
        processor.image_processor, processor.tokenizer, image_seq_length=num_tokens - has_first_token
    )
    own.return_mm_token_type_ids = False  # unknown to LLaVA
    return Side(
        model,
        only_what_is_read(collator_of(data_args, own, model), model),
        lambda rows: evaluate(model, own, rows, data_args.task, max_new_tokens=args.max_new_tokens)[0],
        () if language is None else (language,),
    )


def seq2seq_side(
    args: QualityArguments, data_args: DataArguments, processor: DuoStreamProcessor, model: PreTrainedModel
) -> Side:
    """Batches and figures of a model that reads with an encoder, a text or a picture, and writes with a decoder."""
    tokenizer = processor.tokenizer
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)
    reads_pictures = model.main_input_name == "pixel_values"

    def encode(text: str) -> list[int]:
        return [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(
            [
                {"input_ids": encode(text_of(row["prompt"][0])), "labels": encode(text_of(row["completion"][0]))}
                for row in rows
            ]
        )
        if not reads_pictures:
            return dict(batch)
        pictures = [load_picture(row["images"][0]) for row in rows]
        pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": batch["labels"]}

    @torch.no_grad()
    def measure(rows: Rows) -> dict[str, Any]:
        model.eval()
        results: list[dict[str, Any]] = []
        for batch in tqdm(rows.iter(batch_size=64), desc="answering", leave=False):
            listed = rows_of_batch(batch)
            inputs = {name: value.to(model.device) for name, value in collate(listed).items() if name != "labels"}
            said = model.generate(
                **inputs, max_new_tokens=args.max_new_tokens, max_length=None, num_beams=1, do_sample=False
            )
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            for row, text in zip(listed, texts, strict=True):
                result = {"reference": text_of(row["completion"][0]), "references": row.get("references")}
                results.append({**result, "references": references_of(result), "prediction": text.strip()})
        return score_answers(results, data_args.task)

    return Side(model, collate, measure)
