"""Messages, and the chat templates that write them: DuoStream's own, and a text model's own with pictures added."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers.utils import logging
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<|image|>"

# Role marker, text and pictures as they come; an answer ends with the end-of-sequence token. `generation` marks what
# the model is trained to write.
CHAT_TEMPLATE = """\
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- set parts = message['content'] -%}
    {%- if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
        {%- for part in parts %}{{ part['text'] }}{% endfor -%}
        {{- eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {%- for part in parts %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""

# Makes one text of each message, with a marker for each picture, so that a text model's template can go on.
FLATTEN_PARTS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set content = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set content.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set content.text = content.text + ('<|image|>' if part['type'] == 'image' else part['text']) -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [dict(message, content=FLAT_CONTENT)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
# What a text model's template reads, and what that of a model with pictures may read alone
FLAT_STRING, FLAT_PART = "content.text", "[{'type': 'text', 'text': content.text}]"


def default_chat_template(template: str | dict[str, str]) -> str:
    """
    A chat template, or of several named ones `"default"`.

    Raises:
        ValueError: Of several templates none is named `"default"`.
    """
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(
            f"The tokenizer has chat templates {sorted(template)}, and none named 'default': give the processor a "
            "`chat_template`"
        )
    return template["default"]


@lru_cache(maxsize=64)
def writes_text(template: str, role: str, is_string: bool) -> bool | None:
    """
    Whether a chat template writes what is said, which those that read lists of parts alone, or strings alone, may
    leave out without a word; `None` if it fails.

    Args:
        template (`str`): The template.
        role (`str`): Who says it: `"user"` or `"assistant"`.
        is_string (`bool`): Whether the template is given strings, not lists of one part.
    """
    texts = []
    for said in ("one", "two"):
        turns = [(each, said if each == role else "so") for each in ("user", "assistant", "user")]
        messages = [
            {"role": each, "content": text if is_string else [{"type": "text", "text": text}]} for each, text in turns
        ]
        try:
            (text,), _ = render_jinja_template(
                [messages],
                chat_template=template,
                add_generation_prompt=True,
                **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), ""),
            )
        except Exception:
            # A template is a program, and says itself what is wrong where it is used
            return None
        texts.append(text)
    # Not as lists of Python's are written
    return texts[0] != texts[1] and "{'type': 'text', 'text': 'one'" not in texts[0]


def check_text(text: Any, name: str) -> None:
    """
    Raises:
        ValueError: It is no text, or half a character (a lone surrogate), of which tokenizers say neither.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, not {text!r:.100}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {error}") from error


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def check_messages(messages: Any) -> None:
    """
    Raises:
        ValueError: They are no messages of text and pictures. Chat templates write "None", or nothing at all, for some
            of what they don't know.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"there are no messages in {messages!r:.100}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"expected a message with its `role`, not {message!r:.100}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        for part in content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else part
            # Our template has no place for a picture in an answer
            if kind not in (("text",) if message["role"] == "assistant" else ("text", "image")):
                raise ValueError(
                    f"expected text, or pictures of a user, from the {message['role']}, not {kind!r:.100}"
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"expected text from the {message['role']}, not {part.get('text')!r:.100}")


def check_contents(template: str, messages: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` where a chat template would leave out a message's text, as it reads lists of parts alone."""
    for message in messages:
        content, role = message.get("content"), "assistant" if message["role"] == "assistant" else "user"
        if not isinstance(content, str) or not content.strip():
            continue
        if writes_text(template, role, is_string=True) is False and writes_text(template, role, is_string=False):
            raise ValueError(
                f"the chat template leaves out contents that are strings, as the {message['role']}'s "
                f"{content!r:.100}: expected a list of parts, [{{'type': 'text', 'text': ...}}]"
            )


class ToolsNotWrittenError(ValueError):
    """A chat template would leave out tools, calls of them, or documents."""


def check_tools(
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None,
    documents: Sequence[Any] | None = None,
) -> None:
    """
    Raises:
        ToolsNotWrittenError: The chat template would leave out `tools`, `documents`, or the `tool_calls` of a message:
            an empty turn, which training would teach.
    """
    for name, given in (("tools", tools), ("documents", documents)):
        if given and name not in _get_template_variables(template):
            raise ToolsNotWrittenError(
                f"the chat template writes no `{name}`, which are {given!r:.100}: expected one that does"
            )
    for message in messages:
        if (calls := message.get("tool_calls")) and "tool_calls" not in template:
            raise ToolsNotWrittenError(
                f"the chat template writes no `tool_calls`, and the {message['role']}'s are {calls!r:.100}: expected "
                "one that does"
            )


def multimodal_chat_template(text_template: str | dict[str, str] | None, image_token: str = IMAGE_TOKEN) -> str:
    """
    A chat template that takes pictures.

    Args:
        text_template (`str` or `dict`, *optional*): The tokenizer's own template, which stays as it is behind a
            preamble that makes one text of each message's parts; of several named ones, `"default"`. Defaults to
            DuoStream's template.
        image_token (`str`, *optional*, defaults to `"<|image|>"`): The marker of a picture.

    Raises:
        ValueError: Of several templates none is named `"default"`.
    """
    template = CHAT_TEMPLATE
    if text_template is not None:
        own = default_chat_template(text_template)
        strings, parts = (FLATTEN_PARTS.replace("FLAT_CONTENT", flat) + own for flat in (FLAT_STRING, FLAT_PART))
        writes_parts, writes_strings = (
            all(writes_text(each, role, is_string=True) for role in ("user", "assistant")) for each in (parts, strings)
        )
        template = parts if writes_parts and not writes_strings else strings
        if not writes_parts and not writes_strings:
            logger.warning(
                "The tokenizer's chat template fails at, or leaves out, what is said in a conversation of a question, "
                f"an answer and a question: it may want another `chat_template`. It is {own!r:.300}"
            )
    return template.replace(IMAGE_TOKEN, image_token)
