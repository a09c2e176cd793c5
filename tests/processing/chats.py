"""Conversations with pictures, and processors that read them."""

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamProcessor, train_tokenizer

NUM_TOKENS = 4  # a picture's
IMAGE, ASSISTANT, END = 2, 4, 1  # ids in a trained tokenizer
TEXTS = ["What color is the square?", "It is red.", "Ein großer roter Kreis", "左上角有一个红色圆形"]

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}
    {%- else -%}
        {{- message['content'] + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def without_generation(template):
    for tag in ("{%- generation -%}", "{%- endgeneration -%}", "{% generation %}", "{% endgeneration %}"):
        template = template.replace(tag, "")
    assert "generation" not in template.replace("add_generation_prompt", "")
    return template


def chatml_tokenizer(pre_tokenizer, decoder, chat_template, normalizer=None, texts=TEXTS):
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "\n"],
        show_progress=False,
    )
    backend.train_from_iterator([*texts, "user", "assistant", "What color is it?", "Is it?"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def spaces_of(*replaced):
    """A normalizer that makes a space of each of these, and one of several."""
    single = [normalizers.Replace(each, " ") for each in replaced]
    return normalizers.Sequence([*single, normalizers.Replace(Regex(" {2,}"), " ")])


LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def make_processor(kind="own", **kwargs):
    """With a tokenizer trained by us, or with one of a language model from elsewhere."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = {
        "own": lambda: train_tokenizer(TEXTS, 300),
        "bytes": lambda: train_tokenizer([], 263),  # no merges: every letter is a token
        "chatml": lambda: chatml_tokenizer(*byte_level, CHATML),
        "chatml without generation": lambda: chatml_tokenizer(*byte_level, without_generation(CHATML)),
        # As Llama 2's: a word starts with "▁", and so does a text
        "metaspace": lambda: chatml_tokenizer(
            pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(), CHATML
        ),
        "metaspace everywhere": lambda: chatml_tokenizer(pre_tokenizers.Metaspace(), decoders.Metaspace(), CHATML),
        # As GPT-2's may be told to, and a vocabulary in which line ends are one token
        "space before": lambda: chatml_tokenizer(
            pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(), CHATML, texts=[*TEXTS, "\n", "\n\n"]
        ),
        "line ends merged": lambda: chatml_tokenizer(
            None, decoders.Metaspace(), CHATML, LLAMA2, texts=[*TEXTS, "a\n\nb", "\n\n"]
        ),
        # As XGLM's, whose normalizer takes a line end for a space
        "no line ends": lambda: chatml_tokenizer(
            pre_tokenizers.Metaspace(), decoders.Metaspace(), CHATML, spaces_of("\n")
        ),
    }[kind.removesuffix(", own template")]()
    if kind.endswith(", own template"):
        tokenizer.chat_template = None
    return DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=NUM_TOKENS, **kwargs
    )


def picture(shade=0):
    return Image.new("RGB", (20, 16), (shade, 255 - shade, 30))


def user(content, num_images=0):
    return {"role": "user", "content": [{"type": "image", "text": None}] * num_images + [part(content)]}


def assistant(content):
    return {"role": "assistant", "content": [part(content)]}


def part(content):
    return {"type": "text", "text": content}


def dialogue(*texts, num_images=1):
    """A row in which user and assistant take turns."""
    messages = [(assistant if i % 2 else user)(content) for i, content in enumerate(texts)]
    messages[0] = user(texts[0], num_images)
    return {"images": [picture(40 * i) for i in range(num_images)], "messages": messages}


def question(prompt, completion, num_images=1):
    row = dialogue(prompt, completion, num_images=num_images)
    return {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]}


def learnt(processor, batch, row=0):
    """What is to be learnt, as text."""
    return processor.decode([i for i in batch["labels"][row].tolist() if i != -100])


def read(processor, batch, row=0):
    """The whole row as text, a picture as one marker."""
    text = processor.decode(batch["input_ids"][row][batch["attention_mask"][row] == 1])
    return text.replace("<|image|>" * NUM_TOKENS, "<|image|>")


def states(number=1, length=NUM_TOKENS, width=8, **kwargs):
    return [torch.rand(length, width, **kwargs) for _ in range(number)]
