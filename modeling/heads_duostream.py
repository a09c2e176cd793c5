"""DuoStream's heads that understand: masked tokens, classes, which picture belongs to which text; and pretraining."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from ..configuration.configuration_duostream import DuoStreamConfig
from .modeling_duostream import (
    DuoStreamCausalLMOutputWithPast,
    DuoStreamLMHeadModel,
    DuoStreamModel,
    DuoStreamPreTrainedModel,
    check_can_write,
)
from .objectives_duostream import (
    contrastive_loss,
    count_items,
    hard_negatives,
    num_ranks,
    shift_labels,
    take_num_items,
)
from .stream_layout_duostream import check


@dataclass
class DuoStreamImageTextOutput(ModelOutput):
    """
    Outputs of `DuoStreamForImageTextRetrieval`.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `return_loss=True`): Contrastive loss.
        logits_per_image (`torch.FloatTensor` of shape `(num_images, batch)`): How well each text fits each picture.
        logits_per_text (`torch.FloatTensor` of shape `(batch, num_images)`): The same, transposed.
        text_embeds (`torch.FloatTensor` of shape `(batch, projection_dim)`): Of unit length.
        image_embeds (`torch.FloatTensor` of shape `(num_images, projection_dim)`): Of unit length.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


@dataclass
class DuoStreamForPreTrainingOutput(DuoStreamCausalLMOutputWithPast):
    """
    Outputs of `DuoStreamForPreTraining`: those of `DuoStreamForConditionalGeneration`, where `loss` is the weighted
    sum of the losses that follow, each absent where its weight is 0 or its inputs are.

    Args:
        lm_loss (`torch.FloatTensor`, *optional*): Language modelling.
        mlm_loss (`torch.FloatTensor`, *optional*): Masked language modelling.
        itc_loss (`torch.FloatTensor`, *optional*): Image-text contrastive.
        itm_loss (`torch.FloatTensor`, *optional*): Image-text matching.
    """

    lm_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    itc_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None


def mean_pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of the tokens that are not padding, of shape `(batch, hidden)`."""
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    # On the last layer's device, which may be another than the first one's
    weights = attention_mask.to(hidden_states.device, torch.float32).unsqueeze(-1)  # (batch, seq_len, 1)
    # The sum of a long text is beyond the numbers of half precision
    mean = (hidden_states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    return mean.to(hidden_states.dtype)


class DuoStreamImageTextHead(nn.Module):
    """The two streams' pooled states side by side (contrastive), and the fusion stack's on its own (matching)."""

    def __init__(self, config: DuoStreamConfig):
        super().__init__()
        hidden_size, dim = config.fusion_stack_config.hidden_size, config.projection_dim
        # The text stream's own final norm is the fusion stack's
        self.text_norm, self.image_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(config.image_hidden_size)
        self.text_projection = nn.Linear(hidden_size, dim, bias=False)
        self.visual_projection = nn.Linear(config.image_hidden_size, dim, bias=False)
        # Of one dimension, as SigLIP's: FSDP2 shares out no scalars
        self.logit_scale, self.logit_bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.matching = nn.Linear(hidden_size, 2)
        self.config = config

    def embed_text(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        pooled = mean_pool(self.text_norm(hidden_states), attention_mask)
        return nn.functional.normalize(self.text_projection(pooled), dim=-1)  # (batch, projection_dim)

    def embed_images(self, hidden_states: torch.Tensor) -> torch.Tensor:
        pooled = mean_pool(self.image_norm(hidden_states))
        return nn.functional.normalize(self.visual_projection(pooled), dim=-1)  # (num_images, projection_dim)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias of scores. Where parts are on disk, `accelerate` fetches what a module holds for a call."""
        return self.logit_scale, self.logit_bias

    def contrastive_loss(
        self,
        text_embeds: torch.Tensor,
        image_embeds: torch.Tensor,
        num_pairs: torch.Tensor | int | None = None,
        tp_size: int = 1,
    ) -> torch.Tensor:
        """See [`contrastive_loss`]."""
        scale, bias = self()
        loss_type = self.config.contrastive_loss
        return contrastive_loss(text_embeds, image_embeds, scale, bias, loss_type, num_pairs, tp_size)


class DuoStreamImageTextPreTrainedModel(DuoStreamPreTrainedModel):
    """Weight initialisation of models that have a [`DuoStreamImageTextHead`]."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DuoStreamImageTextHead):
            # Temperature and bias as in SigLIP (Zhai et al. 2023, 3.2) and CLIP (Radford et al. 2021, 2.5)
            scale, bias = (
                (math.log(10), -10.0) if self.config.contrastive_loss == "sigmoid" else (math.log(1 / 0.07), 0.0)
            )
            init.constant_(module.logit_scale, scale)
            init.constant_(module.logit_bias, bias)


class DuoStreamForMaskedLM(DuoStreamLMHeadModel):
    """DuoStream with a language-model head that fills in masked tokens; the fusion stack reads both ways."""

    def __init__(self, config: DuoStreamConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        images_per_row: int | None = None,
        targets_per_row: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Takes what [`DuoStreamModel.forward`] takes, but for a cache, and:

        Args:
            token_type_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Has no effect: the whole text is read both ways.
            labels (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                The tokens that belong in the masked positions, in their own positions; -100 elsewhere.
            use_cache (`bool`, *optional*): Has no effect, as in the library's encoders: trainers say `False`.
            targets_per_row (`int`, *optional*):
                The largest number of `labels` in a row. In training, `logits` are then of the masked positions alone,
                of shape `(batch, targets_per_row, vocab_size)`.
        """
        num_items_in_batch = take_num_items(kwargs)
        if labels is not None:
            labels = self.without_placeholders(labels)
        states_to_keep, labels = self.keep_labelled(labels, targets_per_row)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=whole_prefix(input_ids, inputs_embeds),
            mm_token_type_ids=mm_token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            mm_encoder_outputs=mm_encoder_outputs,
            images_per_row=images_per_row,
            states_to_keep=states_to_keep,
            return_dict=True,
            **kwargs,
        )
        if labels is None:
            logits, loss = self.compute_logits(outputs.last_hidden_state), None
        else:
            logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def whole_prefix(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """`token_type_ids` by which everything is read both ways."""
    given = input_ids if input_ids is not None else inputs_embeds
    return torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)


class DuoStreamForSequenceClassification(DuoStreamPreTrainedModel):
    """
    DuoStream with a classifier of texts, of pictures, or of both together: a linear layer on the mean of all tokens'
    states, which are read both ways.
    """

    def __init__(self, config: DuoStreamConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DuoStreamModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.fusion_stack_config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        images_per_row: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Takes what [`DuoStreamModel.forward`] takes, and:

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                Without `input_ids`, each picture is a row of its own, as each of `mm_encoder_outputs` is.
            token_type_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Has no effect: everything is read both ways.
            past_key_values (`Cache`, *optional*):
                What is read behind, as PEFT's learned prefix; it is no part of the mean.
            labels (`torch.Tensor`, *optional*):
                Class numbers, of shape `(batch,)` (`config.problem_type` "single_label_classification"); a score for
                every class, of shape `(batch, num_labels)` ("multi_label_classification", soft scores too); or
                numbers to come near to, of shape `(batch,)` ("regression", where `num_labels` is 1).
            use_cache (`bool`, *optional*): Has no effect, as in the library's encoders: trainers say `False`.

        Raises:
            ValueError: A class number is none of the `config.num_labels` classes, or there is nothing to classify.
        """
        if input_ids is None and inputs_embeds is None:
            images = self.model.read_images(pixel_values, mm_encoder_outputs)
            if images is None:
                raise ValueError("expected `input_ids`, `inputs_embeds`, or pictures alone")
            shape = (images.pooler_output.shape[0], self.config.image_seq_length)
            input_ids = torch.full(shape, self.config.image_token_id, device=images.pooler_output.device)
            pixel_values, mm_encoder_outputs, images_per_row = None, {"image": images}, 1
        num_items = take_num_items(kwargs)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=whole_prefix(input_ids, inputs_embeds),
            mm_token_type_ids=mm_token_type_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            mm_encoder_outputs=mm_encoder_outputs,
            images_per_row=images_per_row,
            return_dict=True,
            **kwargs,
        )
        if attention_mask is not None:
            attention_mask = attention_mask[:, -outputs.last_hidden_state.shape[1] :]  # (batch, seq_len)
        logits = self.score(self.dropout(mean_pool(outputs.last_hidden_state, attention_mask)))  # (batch, num_labels)
        loss = None
        if labels is not None:
            if self.num_labels > 1 and not labels.is_floating_point():
                check(
                    (((labels >= 0) & (labels < self.num_labels)) | (labels == -100)).all(),
                    f"`labels` must be from 0 to {self.num_labels - 1}, as `config.num_labels` is {self.num_labels}",
                )
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items, **kwargs
            )
            if self.config.problem_type != "single_label_classification" and num_items is not None:
                # The library sums over accumulated batches, but divides by the items of all only for class numbers.
                # It counts no -100, which is a number here: so each batch has the share of what it counts
                loss = loss * (labels != -100).sum() / num_items
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DuoStreamForImageTextRetrieval(DuoStreamImageTextPreTrainedModel):
    """
    DuoStream that finds pictures by text and texts by picture. The two streams' pooled states are compared by their
    cosine, so that each picture and text is read once; `match` reads a pair together in the fusion stack.
    """

    def __init__(self, config: DuoStreamConfig):
        super().__init__(config)
        self.model = DuoStreamModel(config)
        self.image_text_head = DuoStreamImageTextHead(config)
        self.post_init()

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Reads texts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, text_len)`): Text without pictures.
            attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*): 0 = padding.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is of shape `(batch, projection_dim)` and of unit length;
            `last_hidden_state` is what the text stream gave.

        Raises:
            ValueError: There are placeholders of pictures in a text.
        """
        outputs = self.model.read_text(input_ids, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.image_text_head.embed_text(outputs.last_hidden_state, attention_mask),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Reads pictures.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): The pictures.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is of shape `(num_images, projection_dim)` and of unit
            length; `last_hidden_state` is what the vision stream gave.
        """
        outputs = self.model.get_image_features(pixel_values, **{**kwargs, "return_dict": True})
        outputs.pooler_output = self.image_text_head.embed_images(outputs.last_hidden_state)
        return outputs

    def match(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Whether each text belongs to the picture of the same row, read together.

        Returns:
            `torch.FloatTensor` of shape `(batch, 2)`: logits of no and yes.

        Raises:
            ValueError: There are not as many pictures as texts, or placeholders of pictures in a text.
        """
        check_pairs(input_ids.shape[0], pixel_values.shape[0])
        image_states = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
        text_states = self.model.read_text(input_ids, attention_mask).last_hidden_state
        return matching_logits(self.model, self.image_text_head, image_states, text_states, attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DuoStreamImageTextOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, text_len)`): Text without pictures.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): The pictures.
            attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*): 0 = padding.
            return_loss (`bool`, *optional*):
                Whether to give the contrastive loss, `config.contrastive_loss`, of text i with picture i.

        Raises:
            ValueError: There are no texts or no pictures; `return_loss` with different numbers of them; or
                placeholders of pictures in a text.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(
                "expected both `input_ids` and `pixel_values`; one alone is read by `get_text_features` or "
                "`get_image_features`"
            )
        text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        image_embeds = self.get_image_features(pixel_values, return_dict=True).pooler_output
        head = self.image_text_head
        scale, bias = head()
        logits_per_text = scale.exp() * text_embeds @ image_embeds.T + bias
        loss = None
        if return_loss:
            check_pairs(text_embeds.shape[0], image_embeds.shape[0])
            loss = head.contrastive_loss(text_embeds, image_embeds, tp_size=self.tp_size or 1)
        return DuoStreamImageTextOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )


def check_pairs(num_texts: int, num_images: int) -> None:
    if num_texts != num_images:
        raise ValueError(f"Each text needs one picture of its own: there are {num_texts} texts, {num_images} pictures")


def matching_logits(
    model: DuoStreamModel,
    head: DuoStreamImageTextHead,
    image_states: torch.Tensor,
    text_states: torch.Tensor,
    text_attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of shape `(batch, 2)`, no and yes: does each text belong to the picture of its row?"""
    fused = model.fuse(image_states, text_states, text_attention_mask)  # (batch, image_seq_length + text_len, hidden)
    # At the text's positions, which have seen the picture
    return head.matching(mean_pool(fused[:, image_states.shape[1] :], text_attention_mask))


class DuoStreamForPreTraining(DuoStreamImageTextPreTrainedModel, DuoStreamLMHeadModel):
    """
    DuoStream with all pretraining objectives, each with a weight in the config, and 0 to switch it off: language
    modelling (`lm_weight`), masked language modelling (`mlm_weight`), image-text contrastive (`itc_weight`) and
    image-text matching (`itm_weight`). Pictures are read once for all of them.
    """

    def __init__(self, config: DuoStreamConfig):
        if config.lm_weight:
            check_can_write(config)
        super().__init__(config)
        # By this `Trainer` knows that `labels` are shifted, and which of them count
        self.loss_type = "ForCausalLM"
        self.image_text_head = DuoStreamImageTextHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_input_ids: torch.Tensor | None = None,
        masked_labels: torch.Tensor | None = None,
        paired_input_ids: torch.Tensor | None = None,
        paired_attention_mask: torch.Tensor | None = None,
        paired_images: torch.Tensor | None = None,
        images_per_row: int | None = None,
        targets_per_row: int | None = None,
        masked_per_row: int | None = None,
        num_masked_in_batch: torch.Tensor | int | None = None,
        num_pairs_in_batch: torch.Tensor | int | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DuoStreamForPreTrainingOutput:
        r"""
        Takes what [`DuoStreamForConditionalGeneration.forward`] takes, but for a cache, and:

        Args:
            masked_input_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                `input_ids` with some tokens masked.
            masked_labels (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                The tokens that belong there, in their own positions; -100 elsewhere. `Trainer` evaluates only batches
                that have all arguments with "label" in their names: `TrainingArguments(label_names=["labels"])` where
                these are absent.
            paired_input_ids (`torch.LongTensor` of shape `(num_pairs, text_len)`, *optional*):
                The texts that belong to pictures, on their own.
            paired_attention_mask (`torch.Tensor` of shape `(num_pairs, text_len)`, *optional*): 0 = padding.
            paired_images (`torch.LongTensor` of shape `(num_pairs,)`, *optional*):
                Which of `pixel_values` belongs to each. Defaults to their order.
            masked_per_row (`int`, *optional*):
                The largest number of `masked_labels` in a row, as `targets_per_row` of `labels`.
            num_masked_in_batch, num_pairs_in_batch (`int`, *optional*):
                What the sums of those losses are divided by, where batches are accumulated, as `num_items_in_batch`
                for language modelling. Default to what is in this batch; with `num_items_in_batch`, as `Trainer` gives
                it, such a loss then counts for the share of its labels that this batch has.

        Raises:
            ValueError: The labels of language modelling are missing, while `targets_per_row` tells of some, or in
                training others are there; or `masked_input_ids` come without `masked_labels`.
        """
        config = self.config
        if config.mlm_weight and masked_input_ids is not None and masked_labels is None:
            raise ValueError("`masked_input_ids` are given without `masked_labels`, the tokens that belong there")
        has_others = masked_input_ids is not None or paired_input_ids is not None
        needs_labels = "`targets_per_row` counts: leave out both, or none" if targets_per_row is not None else ""
        if self.training and config.lm_weight and has_others:
            needs_labels = "`lm_weight` needs in training: set it to 0 without them"
        if labels is None and needs_labels:
            # `Trainer` takes the labels that a collator made where it smooths them, or has another loss of its own
            raise ValueError(
                f"`labels` are missing, which {needs_labels}. `label_smoothing_factor` and `compute_loss_func`, which "
                "take them away, don't go with the objectives of pretraining"
            )
        # In training ranks wait for each other whatever their batches hold
        is_measured = self.training or labels is not None or has_others
        images = self.model.read_images(pixel_values, mm_encoder_outputs)
        # What all ranks run together where weights are sharded, and this one has no use for
        unused: list[torch.Tensor] = []
        is_shared = self.model._has_sharded_weights
        if images is None and is_shared:
            unused.append(self.model._read_unused_picture())
            # None of its tokens. Else each objective would read one more, where other ranks read none
            nothing = self.lm_head.weight.new_zeros(0, 1, 1)
            images = BaseModelOutputWithPooling(last_hidden_state=nothing, pooler_output=nothing)
        num_items_in_batch = take_num_items(kwargs)
        share: float | torch.Tensor = 1.0
        if labels is not None and num_items_in_batch is not None:
            share = count_items(labels[:, 1:], None) / num_items_in_batch
        common: dict[str, Any] = {
            "attention_mask": attention_mask,
            "mm_token_type_ids": mm_token_type_ids,
            "use_cache": False,
            "mm_encoder_outputs": None if images is None else {"image": images},
            "images_per_row": images_per_row,
            "return_dict": True,
            **kwargs,
        }
        outputs = DuoStreamForPreTrainingOutput()
        if config.lm_weight or labels is None:
            shifted = None if labels is None else shift_labels(self.without_placeholders(labels), attention_mask)
            states_to_keep, shifted = self.keep_labelled(shifted, targets_per_row)
            states = self.model(
                input_ids=input_ids, token_type_ids=token_type_ids, states_to_keep=states_to_keep, **common
            )
            outputs.hidden_states, outputs.attentions = states.hidden_states, states.attentions
            if shifted is None:
                outputs.logits = self.compute_logits(states.last_hidden_state)
            else:
                outputs.logits, outputs.lm_loss = self.logits_and_loss(
                    states.last_hidden_state, shifted, num_items_in_batch
                )
        if config.mlm_weight and masked_input_ids is not None:
            states_to_keep, masked_labels = self.keep_labelled(
                self.without_placeholders(masked_labels), masked_per_row
            )
            states = self.model(
                input_ids=masked_input_ids,
                token_type_ids=whole_prefix(masked_input_ids, None),
                states_to_keep=states_to_keep,
                **common,
            )
            _, outputs.mlm_loss = self.logits_and_loss(states.last_hidden_state, masked_labels, num_masked_in_batch)
        if (config.itc_weight or config.itm_weight) and paired_input_ids is not None:
            outputs.itc_loss, outputs.itm_loss = self.pair_losses(
                images, paired_input_ids, paired_attention_mask, paired_images, num_pairs_in_batch
            )
        elif is_measured and (config.itc_weight or config.itm_weight):
            unused += self.losses_of_no_pairs()
        if is_measured and config.itm_weight and outputs.itm_loss is None and is_shared:
            unused.append(self.fuse_unused_pair())
        masked_share = share if num_masked_in_batch is None else 1
        pair_share = share if num_pairs_in_batch is None else 1
        parts = (
            (config.lm_weight, outputs.lm_loss, 1),
            (config.mlm_weight, outputs.mlm_loss, masked_share),
            (config.itc_weight, outputs.itc_loss, pair_share),
            (config.itm_weight, outputs.itm_loss, pair_share),
        )
        losses = [weight * loss * part for weight, loss, part in parts if loss is not None] + unused
        if not losses and labels is not None and (config.itc_weight or config.itm_weight):
            # Of a batch in which there is no pair, or none to be told from another, nothing is learnt
            losses += [0 * weight.sum() for weight in self.image_text_head.parameters()]
        outputs.loss = torch.stack(losses).sum() if losses and is_measured else None
        return outputs

    def pair_losses(
        self,
        images: BaseModelOutputWithPooling | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        paired_images: torch.Tensor | None,
        num_pairs: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Losses of pictures and the texts that belong to them: contrastive, and of matching; see [`forward`]."""
        if images is None:
            check_pairs(len(input_ids), 0)
        chosen = slice(None) if paired_images is None else paired_images
        features, image_states = images.last_hidden_state[chosen], images.pooler_output[chosen]
        check_pairs(len(input_ids), len(features))
        text_states = self.model.read_text(input_ids, attention_mask).last_hidden_state
        head, itc_loss, itm_loss = self.image_text_head, None, None
        text_embeds = head.embed_text(text_states, attention_mask)
        image_embeds = head.embed_images(features)
        if self.config.itc_weight:
            itc_loss = head.contrastive_loss(text_embeds, image_embeds, num_pairs, self.tp_size or 1)
        if self.config.itm_weight and len(text_embeds) > 1:
            scale, _ = head()
            scores = (scale.exp() * text_embeds @ image_embeds.T).detach()
            itm_loss = self.matching_loss(scores, text_states, attention_mask, image_states, num_pairs)
        return itc_loss, itm_loss

    def losses_of_no_pairs(self) -> list[torch.Tensor]:
        """Zeros, for which this rank gathers with those that have pairs, which would else wait for it."""
        losses, nothing = [], self.lm_head.weight.new_zeros(0, 1, self.lm_head.in_features)
        if self.model._has_sharded_weights:
            # Any token but a picture's
            no_ids = torch.full((1, 1), int(self.config.image_token_id == 0), device=nothing.device)
            losses.append(0 * self.model.read_text(no_ids).last_hidden_state.sum())
        if num_ranks() > (self.tp_size or 1):
            # For both objectives, as pairs are embedded
            no_texts = self.image_text_head.embed_text(nothing, None)
            no_images = self.image_text_head.embed_images(nothing.new_zeros(0, 1, self.config.image_hidden_size))
            if self.config.itc_weight:
                losses.append(self.image_text_head.contrastive_loss(no_texts, no_images, 1, self.tp_size or 1))
        return losses

    def fuse_unused_pair(self) -> torch.Tensor:
        """0, made of a pair: where weights are sharded, ranks gather the fusion stack's together."""
        text = self.lm_head.weight.new_zeros(1, 1, self.lm_head.in_features)
        # As a pair's states do: FSDP2 puts off what it does in a backward pass where inputs need no gradient
        text.requires_grad_(torch.is_grad_enabled())
        image = text.expand(-1, self.config.image_seq_length, -1)
        return 0 * matching_logits(self.model, self.image_text_head, image, text, None).sum()

    def matching_loss(
        self,
        scores: torch.Tensor,
        text_states: torch.Tensor,
        text_attention_mask: torch.Tensor | None,
        image_states: torch.Tensor,
        num_pairs: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Each pair, each text with a wrong picture and each picture with a wrong text (Li et al. 2021, 3.2)."""
        count = len(text_states)
        own = torch.arange(count, device=text_states.device)
        # An evaluation gives the same loss each time
        wrong_texts = hard_negatives(scores.T, sample=self.training)
        wrong_images = hard_negatives(scores, sample=self.training)
        texts = torch.cat([own, own, wrong_texts])  # (3 * num_pairs,)
        images = torch.cat([own, wrong_images, own])  # (3 * num_pairs,)
        mask = None if text_attention_mask is None else text_attention_mask[texts]
        logits = matching_logits(self.model, self.image_text_head, image_states[images], text_states[texts], mask)
        is_right = (torch.arange(3 * count, device=own.device) < count).long()
        loss = nn.functional.cross_entropy(logits.float(), is_right, reduction="sum")
        return loss / (3 * (count if num_pairs is None else num_pairs))


__all__ = [
    "DuoStreamForImageTextRetrieval",
    "DuoStreamForMaskedLM",
    "DuoStreamForPreTraining",
    "DuoStreamForSequenceClassification",
]
