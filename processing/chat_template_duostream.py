"""The chat templates: DuoStream's own, and a text model's own with pictures added."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

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
PROBE = "What is this?"


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


@lru_cache(maxsize=32)
def loses_text(template: str, is_string: bool) -> bool:
    """
    Whether a chat template leaves out what a user says, as those do that read lists of parts alone, or strings alone.

    Args:
        template (`str`): The template.
        is_string (`bool`): Whether it is given a string, not a list of one part.
    """
    content = PROBE if is_string else [{"type": "text", "text": PROBE}]
    no_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    try:
        (text,), _ = render_jinja_template(
            [[{"role": "user", "content": content}]], chat_template=template, **no_tokens
        )
    except (TemplateError, TypeError):
        return False  # it says so itself where it is used
    return PROBE not in text


def check_contents(template: str, messages: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` where a chat template would leave out a message's text, as it reads lists of parts alone."""
    if not loses_text(template, is_string=True) or loses_text(template, is_string=False):
        return
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            raise ValueError(
                f"the chat template leaves out contents that are strings, as the {message['role']}'s "
                f"{content!r:.100}: "
                "expected a list of parts, [{'type': 'text', 'text': ...}]"
            )


class ToolsNotWrittenError(ValueError):
    """A chat template would leave out tools, or calls of them."""


def check_tools(template: str, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> None:
    """
    Raises:
        ToolsNotWrittenError: The chat template would leave out `tools`, or the `tool_calls` of a message: an empty
            turn, which training would teach.
    """
    if tools and "tools" not in _get_template_variables(template):
        raise ToolsNotWrittenError(
            f"the chat template writes no `tools`, which are {tools!r:.100}: expected one that does"
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
        ValueError: Of several templates none is named `"default"`; or it writes nothing of what a user says.
    """
    template = CHAT_TEMPLATE
    if text_template is not None:
        own = default_chat_template(text_template)
        candidates = [FLATTEN_PARTS.replace("FLAT_CONTENT", flat) + own for flat in (FLAT_STRING, FLAT_PART)]
        template = next((each for each in candidates if not loses_text(each, is_string=True)), "")
        if not template:
            raise ValueError(
                f"The tokenizer's chat template writes nothing of what a user says: give the processor another "
                f"`chat_template`. It is {own!r:.300}"
            )
    return template.replace(IMAGE_TOKEN, image_token)
