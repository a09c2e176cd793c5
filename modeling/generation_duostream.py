"""How DuoStream writes: what `generate` carries from step to step where pictures are cached by one of two stacks."""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import get_head_shapes
from transformers.generation import (
    CandidateGenerator,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PromptLookupCandidateGenerator,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.utils import logging

from .kept_states_duostream import refuses_cache
from .stream_layout_duostream import prefix_length_of

logger = logging.get_logger(__name__)


class SuppressPlaceholder(LogitsProcessor):
    """
    Keeps the placeholder of pictures from being written. The library's `SuppressTokensLogitsProcessor` looks through
    the vocabulary at each step: of 49152 tokens that took 0.3 ms on a CPU, this 0.01 ms (docs/speed.md).

    Args:
        image_token_id (`int`): An index of the scores.
    """

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[..., self.image_token_id] = -math.inf
        return scores


class DuoStreamGenerationMixin(GenerationMixin):
    """`generate` for a model whose text and fusion stacks share a cache and need masks and positions of their own."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        # `generate` calls this once, before the first step. From here on it carries along what every step needs:
        # `mm_token_type_ids`, by which the text stream knows which of the cached tokens are text; their number, where
        # rows are alike, without padding and with pictures at the same places, so that no step need look at those; how
        # many tokens `token_type_ids` told of; and the length of the prefix, behind which positions may start anew.
        images = self.model.read_images(None, model_kwargs.get("mm_encoder_outputs"))
        if images is not None:
            # The library repeats them in place, for several sequences or beams: not those of whoever calls
            model_kwargs["mm_encoder_outputs"] = {"image": copy.copy(images)}
        if model_kwargs.get("mm_token_type_ids") is None and images is not None:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            ids = input_ids if inputs_embeds is None else None
            model_kwargs["mm_token_type_ids"] = self.model.image_placeholders(ids, inputs_embeds).long()
        types, mask = model_kwargs.get("mm_token_type_ids"), model_kwargs.get("attention_mask")
        if mask is None and types is not None and model_kwargs.get("past_key_values") is None:
            mask = torch.ones_like(types)
        if types is not None and mask is not None and mask.shape == types.shape:
            are_alike = ((types == types[:1]) & (mask != 0)).all()
            model_kwargs["image_tokens_per_row"] = int((types[0] == 1).sum()) if are_alike else None
        token_type_ids = model_kwargs.get("token_type_ids")
        if token_type_ids is not None:
            # An assistant is told by the model that it assists
            model_kwargs.setdefault("num_typed", token_type_ids.shape[1])
        if self.config.restart_positions and model_kwargs.get("prefix_length") is None:
            if token_type_ids is None:
                given = input_ids if input_ids is not None else model_kwargs["inputs_embeds"]
                model_kwargs["prefix_length"] = torch.zeros(len(given), dtype=torch.long, device=given.device)
            else:
                model_kwargs["prefix_length"] = prefix_length_of(token_type_ids, model_kwargs.get("attention_mask"))
        encoder_outputs = None
        if images is not None and expand_size > 1:
            # The library would count a row's pictures by the placeholders' embedding, which need not be there, or by
            # the placeholders in `input_ids`, of which some may be in the cache, and their pictures not given again
            images = copy.copy(images)
            cache = model_kwargs.get("past_key_values")
            num_past = 0 if cache is None else int(cache.get_seq_length())
            # They tell of the new tokens alone, or of those in the cache, too
            for types in (model_kwargs["mm_token_type_ids"], model_kwargs["mm_token_type_ids"][:, num_past:]):
                num_images = ((types == 1).sum(dim=1) // self.config.image_seq_length).tolist()
                if sum(num_images) == len(images.pooler_output):
                    break
            else:
                raise ValueError(
                    f"The new tokens hold placeholders of {sum(num_images)} pictures; expected as many as there are "
                    f"pictures, {len(images.pooler_output)}"
                )
            rows = images.pooler_output.split(num_images)
            # (num_images * expand_size, image_seq_length, hidden)
            images.pooler_output = torch.cat([row for row in rows for _ in range(expand_size)])
            del model_kwargs["mm_encoder_outputs"]
            encoder_outputs = {"image": images}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if encoder_outputs is not None:
            model_kwargs["mm_encoder_outputs"] = encoder_outputs
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        num_typed: int | None = None,
        is_first_iteration: bool | None = False,
        image_tokens_per_row: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # The library's version cuts the token types to the new tokens, and makes one 4D mask for the layers of a
        # static cache; here the two streams need different ones, and the types of the cached tokens, too.
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if past_key_values is None or is_first_iteration:
            # Generated tokens are causal; so the prefix matters only while it is read
            if token_type_ids is not None and num_typed is not None:
                # The library repeats the last type, which may be the prefix's; what is written, and candidates of
                # assisted decoding, belong to the suffix. Of a prompt in chunks it hands in those of one chunk
                num_untyped = max(token_type_ids.shape[1] - num_typed, 0)
                token_type_ids = nn.functional.pad(token_type_ids[:, :num_typed], (0, num_untyped), value=1)
            model_inputs["token_type_ids"] = token_type_ids
        if past_key_values is not None and past_key_values.is_compileable and not is_first_iteration:
            if mm_token_type_ids is None:
                mm_token_type_ids = torch.zeros_like(kwargs["position_ids"])
            new_position_ids = model_inputs["position_ids"]
            model_inputs |= self.model.prepare_decoding(
                past_key_values, attention_mask, new_position_ids, mm_token_type_ids, batch_size=input_ids.shape[0]
            )
        elif (
            image_tokens_per_row is not None
            and past_key_values is not None
            and not is_first_iteration
            # More is cached where PEFT has put virtual tokens in front
            and 0 < past_key_values.get_seq_length() < kwargs["position_ids"].shape[1]
        ):
            # Nothing that is cached is hidden from the new tokens
            model_inputs["attention_mask"] = {"text": None, "fusion": None}
            text_position_ids = model_inputs["position_ids"] - image_tokens_per_row
            model_inputs["text_position_ids"] = text_position_ids.clamp(min=0)
        elif mm_token_type_ids is not None:
            # Assisted decoding appends candidates without telling their type: they are text
            num_untold = max(kwargs["position_ids"].shape[1] - mm_token_type_ids.shape[1], 0)
            model_inputs["mm_token_type_ids"] = nn.functional.pad(mm_token_type_ids, (0, num_untold))
        return model_inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # The library would hand in one new token at a time to layers that it takes the cache from
        if generation_config.use_cache and any(map(refuses_cache, (self.model.text_model, self.model.fusion_model))):
            advice = "call `model.eval()` before `generate`"
            # The library reads embeddings at the first step alone
            for name in ("past_key_values", "inputs_embeds"):
                if model_kwargs.get(name) is not None:
                    raise ValueError(
                        f"`{name}` need a cache, which layers with gradient checkpointing don't read in training: "
                        f"{advice}"
                    )
            logger.warning_once(
                "In training, layers with gradient checkpointing fill no cache, without which each token takes as "
                f"long as the whole text: {advice}"
            )
            generation_config.use_cache = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_static_cache_init_shape(self) -> tuple[int | list[int], int | list[int]] | None:
        # The library takes the text stream's layers for the fusion stack's. Where they differ, each makes its cache
        # when it is first filled, as without `prefill_chunk_size`.
        shapes = [get_head_shapes(each) for each in (self.config.fusion_stack_config, self.config.text_config)]
        return super()._get_static_cache_init_shape() if shapes[0] == shapes[1] else None

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # As in `forward`, `None` and no pictures at all are none, which the library would read
        for name in ("pixel_values", "mm_encoder_outputs"):
            if name in model_kwargs and (model_kwargs[name] is None or len(model_kwargs[name]) == 0):
                del model_kwargs[name]
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        ids = kwargs.get("encoder_input_ids")
        if ids is not None and ids.ndim == 2:
            # `encoder_repetition_penalty` looks up scores of the prompt's tokens: a placeholder may have none
            tokens = ids.amin(dim=1, keepdim=True)  # (batch, 1)
            kwargs["encoder_input_ids"] = torch.where(ids == self.config.image_token_id, tokens, ids)
        # Whatever the generation config says: a placeholder that was generated would have no picture
        processors = super()._get_logits_processor(*args, **kwargs)
        guides = [isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in processors]
        if any(guides) and self.config.restart_positions:
            # It reads the other prompt by itself, and tells of no prefix
            raise ValueError("`guidance_scale` doesn't go with `config.restart_positions`")
        if self.config.image_token_id < self.config.text_config.vocab_size:
            # Behind guidance, which multiplies differences of scores: of infinite ones it makes no numbers
            processors.insert(sum(guides), SuppressPlaceholder(self.config.image_token_id))
        return processors

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # The library counts the rows of whichever tensor was named first, which may be the pictures
        inputs_embeds = model_kwargs.get("inputs_embeds")
        if inputs is None and inputs_embeds is not None:
            return torch.ones(len(inputs_embeds), 0, dtype=torch.long, device=inputs_embeds.device)
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        if generation_config.assistant_early_exit is not None:
            # The library cuts the layers of one stack; here the lower ones know no pictures
            raise ValueError("`assistant_early_exit` doesn't go with DuoStream's two stacks: use an `assistant_model`")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            # The library reads the whole prompt once more, behind what is cached
            raise ValueError(
                "`assistant_model` and `prompt_lookup_num_tokens` don't go with `past_key_values` that hold tokens: "
                "expected an empty cache, or none"
            )
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.config.model_type != self.config.model_type:
            # Another model can't take what is told of pictures and of the prefix
            own = ("mm_token_type_ids", "image_tokens_per_row", "token_type_ids", "num_typed", "prefix_length")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        generator = super()._get_candidate_generator(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        number = self.config.image_token_id
        if isinstance(generator, PromptLookupCandidateGenerator) and number >= self.config.text_config.vocab_size:
            # It looks up scores of what it copies from the prompt, of placeholders, too, which then have none
            generator.vocab_size = number + 1
            generator.logits_processor = LogitsProcessorList(
                [*generator.logits_processor, SuppressPlaceholder(number)]
            )
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        # The library's paged cache knows layers by their numbers, and both stacks count theirs from 0
        raise ValueError("DuoStream's two stacks don't go with continuous batching (`generate_batch`): use `generate`")

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor | None:
        # The library's hook makes one set of masks for all layers: `prepare_decoding` makes one for each stream
        return attention_mask
