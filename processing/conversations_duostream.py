"""What is said in a row: its texts, with what of them is to be learnt, and their tokens."""

import json
import re
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START, encode_marked_chat, render_jinja_template

from .chat_template_duostream import check_contents, check_text, check_tools, default_chat_template
from .processing_duostream import DuoStreamProcessor


def is_plain_text(row: dict[str, Any]) -> bool:
    """Whether a row is a text, and no conversation that has one beside it."""
    return "text" in row and "messages" not in row and "prompt" not in row


def conversations_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said in a row: its `conversations`, which begin alike, or the row itself."""
    if "messages" in row or "prompt" in row:
        return [row]
    conversations = row.get("conversations") or [row]
    if not isinstance(conversations, list) or not all(isinstance(each, dict) for each in conversations):
        raise ValueError(f"expected a list of `conversations`, not {conversations!r:.100}")
    return conversations


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """What a row's `tools` hold, as TRL has them: a list of JSON schemas, or such a list written as JSON."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"`tools` is {tools!r:.100}, which is no JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise ValueError(f"`tools` is {tools!r:.100}; expected a list of JSON schemas")
    return tools or None


def render(processor: DuoStreamProcessor, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """The conversation as the chat template writes it, in pieces, with whether the piece is to be learnt."""
    if "messages" in row:
        messages, num_given = row["messages"], 0
    elif "prompt" in row and "completion" in row:
        for name in ("prompt", "completion"):
            if not isinstance(row[name], list | tuple):
                raise ValueError(f"there are no messages in `{name}`, which is {row[name]!r:.100}")
        messages, num_given = [*row["prompt"], *row["completion"]], len(row["prompt"])
    else:
        raise ValueError(
            f"expected `messages`, or `prompt` and `completion`, or `text`; its columns are {sorted(row)} "
            "(`Trainer` takes away those that no model reads, unless `remove_unused_columns=False`)"
        )
    if not isinstance(messages, list | tuple):
        raise ValueError(f"there are no messages in {messages!r:.100}")
    # As `apply_chat_template` reads them, which takes a list for a batch
    (messages,), _ = processor._normalize_conversations([messages])
    # Control tokens in the messages' text are marked, and later encoded as plain text: see `apply_chat_template`
    tokenizer, template = processor.tokenizer, default_chat_template(processor.chat_template)
    tools = tools_of(row)
    check_tools(template, messages, tools)
    check_contents(template, messages)
    marked, tools, *_ = tokenizer._mark_chat_inputs(template, [messages], tools, None, {}, True, False)
    text, answers = render_marked(processor, marked[0], tools)
    check_text(text, "the conversation")
    num_given_answers = sum(message["role"] == "assistant" for message in messages[:num_given])
    if num_given_answers:
        # A template may mark several pieces of a message, or none; one that takes no prompt alone, each as one
        with suppress(TemplateError):
            num_given_answers = len(render_marked(processor, marked[0][:num_given], tools)[1])
    pieces, end = [], 0
    for start, stop in answers[num_given_answers:]:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    if not pieces:
        raise ValueError("no message of the assistant to learn from")
    return [*pieces, (text[end:], False)]


def render_marked(
    processor: DuoStreamProcessor, messages: list[dict[str, Any]], tools: list[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one text, and where in it each answer starts and stops (in characters)."""

    def write(messages: list, **kwargs: Any) -> tuple[list[str], list]:
        return render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            **kwargs,
            **processor.tokenizer.special_tokens_map,
        )

    template = default_chat_template(processor.chat_template)
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        texts, spans = write(messages, return_assistant_tokens_mask=True)
        return texts[0], spans[0]
    # A template that doesn't mark its answers: each is what it adds to the conversation before it
    text, spans = write(messages)[0][0], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            if i == 0:  # without any message templates that read `messages[0]` write nothing
                _, prompt = processor.generation_prompt()
                before = text[: text.find(prompt)] + prompt
            else:
                before = write(messages[:i], add_generation_prompt=True)[0][0]
            after = write(messages[: i + 1])[0][0]
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "the chat template rewrites earlier turns, so that answers can't be told apart: give one "
                    "answer a row, or a template with `{% generation %}`"
                )
            spans.append((len(before), len(after)))
    return text, spans


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], continues: list[bool]) -> list[list[int]]:
    """Token ids of rendered pieces, in which control tokens that a user wrote are marked, and which may go on."""

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        marked = [i for i, text in enumerate(texts) if _CONTROL_TOKEN_START in text]
        for i in marked:
            encoded[i] = encode_marked_chat(tokenizer, texts[i])
        return encoded

    newline, x, newline_x = encode(["\n", "x", "\nx"])
    if newline_x == newline + x:
        return encode(texts)
    # SentencePiece begins a text with a space: a piece that goes on is read behind the special token that it
    # follows, or a newline, or a period, which is taken off where the tokenizer has kept it apart
    added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    fronts = ["."] if newline_x == x else ["\n", "."]
    untried = [
        [*[token for token in added if texts[i - 1].endswith(token)][:1], *fronts, ""] if goes_on else [""]
        for i, goes_on in enumerate(continues)
    ]
    encoded: list[list[int]] = [[] for _ in texts]
    left = list(range(len(texts)))
    while left:
        tried = {i: untried[i].pop(0) for i in left}
        kinds = sorted({*tried.values()} - {""})
        front_ids = {"": [], **dict(zip(kinds, encode(kinds) if kinds else [], strict=True))}
        behind = dict(zip(left, encode([front + texts[i] for i, front in tried.items()]), strict=True))
        left = []
        for i, ids in behind.items():
            front = front_ids[tried[i]]
            if ids[: len(front)] == front:
                encoded[i] = ids[len(front) :]
            else:
                left.append(i)
    return encoded


def encode_text(processor: DuoStreamProcessor, text: Any, num_images: int, name: str) -> tuple[list[int], list[int]]:
    """
    Token ids of a text without a chat behind its pictures' markers, as the library's pipelines encode it, and
    which of them the tokenizer put around it (1). Control tokens in it stay text.
    """
    check_text(text, name)
    tokenizer, image_token_id = processor.tokenizer, processor.image_token_id
    encoded = tokenizer(text, split_special_tokens=True, return_attention_mask=False, return_special_tokens_mask=True)
    ids, frame = encoded["input_ids"], encoded["special_tokens_mask"]
    # As where the processor reads pictures and text: behind [CLS] or the like
    front = tokenizer.encode(processor.image_token).index(image_token_id) if num_images else 0
    images = [image_token_id] * num_images
    return ids[:front] + images + ids[front:], frame[:front] + [0] * num_images + frame[front:]
