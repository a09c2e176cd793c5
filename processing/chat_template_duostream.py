"""The chat templates: DuoStream's own, and a text model's own with pictures added."""

from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import _get_template_variables

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

# Turns lists of parts into strings, with a marker for each picture, so that a text model's template can go on.
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
    {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


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
            preamble that turns message parts into text; of several named ones, `"default"`. Defaults to DuoStream's
            template.
        image_token (`str`, *optional*, defaults to `"<|image|>"`): The marker of a picture.

    Raises:
        ValueError: Of several templates none is named `"default"`.
    """
    template = CHAT_TEMPLATE if text_template is None else FLATTEN_PARTS + default_chat_template(text_template)
    return template.replace(IMAGE_TOKEN, image_token)
