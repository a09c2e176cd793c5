"""Liger's kernels (Hsu et al. 2024, arXiv 2410.10989) in a model that has several streams and one loss."""

from torch import nn
from transformers import PreTrainedModel

from .modeling_duostream import DuoStreamLMHeadModel

MODEL_TYPE = "duostream"


def apply_liger_kernel_to_duostream(
    model: PreTrainedModel,
    rope: bool = True,
    rms_norm: bool = True,
    layer_norm: bool = True,
    swiglu: bool = True,
    geglu: bool = True,
    fused_linear_cross_entropy: bool = True,
) -> None:
    """
    Has a model run on Liger's kernels (`pip install liger-kernel`): its text, fusion and vision streams, where Liger
    knows their types, and the loss of words, for which training then makes no logits. Results and checkpoints stay
    what they are. As ever with Liger, `rope` changes all models of a stream's type in this process. To be called
    before training; `duostream finetune --use_liger_kernel true` does it.

    Args:
        model (`PreTrainedModel`): Any of DuoStream's.
        rope, rms_norm, layer_norm, swiglu, geglu (`bool`, *optional*, defaults to `True`):
            Which kernels the streams get, of those that there are for their types.
        fused_linear_cross_entropy (`bool`, *optional*, defaults to `True`):
            Whether the loss, too, is Liger's. A head that is no plain matrix, as with an adapter or shared out over
            ranks, goes on without.

    Raises:
        ImportError: Liger isn't installed.
        ValueError: `model` is not of type `duostream`.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if model.config.model_type != MODEL_TYPE:
        raise ValueError(f"`model` is of type {model.config.model_type!r}; expected {MODEL_TYPE!r}")
    inner = model.base_model
    for stream in (inner.text_model, inner.vision_model, inner.fusion_model):
        left_out = [name for name, module in stream.named_modules() if isinstance(module, nn.Identity)]
        _apply_liger_kernel_to_instance(
            stream,
            rope=rope,
            rms_norm=rms_norm,
            layer_norm=layer_norm,
            swiglu=swiglu,
            geglu=geglu,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
        # Liger makes a norm of what stands where the text stream's last norm was
        for name in left_out:
            stream.set_submodule(name, nn.Identity())
    if fused_linear_cross_entropy and isinstance(model, DuoStreamLMHeadModel):
        model.linear_cross_entropy = liger_fused_linear_cross_entropy


def register_liger_kernel() -> None:
    """
    Has `TrainingArguments(use_liger_kernel=True)` find DuoStream among the models that Liger knows, for any `Trainer`.

    Raises:
        ImportError: Liger isn't installed.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[MODEL_TYPE] = apply_liger_kernel_to_duostream
