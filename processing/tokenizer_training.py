"""A tokenizer for models trained from scratch: byte-level BPE, so that any text comes back as it was."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .chat_template_duostream import IMAGE_TOKEN

PAD_TOKEN, END_TOKEN, MASK_TOKEN = "<|pad|>", "<|end|>", "<|mask|>"
ROLE_TOKENS = ["<|user|>", "<|assistant|>", "<|system|>"]


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int = 2048) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer (Sennrich et al. 2016; byte level: Radford et al. 2019, section 2.2).

    Args:
        texts (`Iterable[str]`): What to learn merges from. Any other text is encoded, too, in more tokens.
        vocab_size (`int`): Size of the vocabulary at most: 256 bytes, 7 special tokens, and merges.
        model_max_length (`int`, *optional*, defaults to 2048): Tokens a model takes at most.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the special tokens.
    """
    special_tokens = [PAD_TOKEN, END_TOKEN, IMAGE_TOKEN, *ROLE_TOKENS, MASK_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special_tokens) + len(alphabet):
        raise ValueError(
            f"`vocab_size` is {vocab_size}; expected at least {len(special_tokens) + len(alphabet)}, for all bytes "
            "and the special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN, *ROLE_TOKENS],
        model_max_length=model_max_length,
        padding_side="left",  # answers are written behind prompts; the collators pad on the right by themselves
        clean_up_tokenization_spaces=False,
    )
