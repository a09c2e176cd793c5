"""
Serves checkpoints over HTTP as OpenAI's API, by `transformers serve`, whose options it takes. `transformers chat` and
other clients talk to it. Pictures come in the request itself.

Example:

    duostream-serve runs/finetuned --port 8000
"""

from typing import Any

import typer
from fastapi import HTTPException
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import BaseHandler

read_messages = BaseHandler.get_processor_inputs_from_messages


def read_messages_without_links(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
    """
    Messages of a request, for the processor.

    Raises:
        HTTPException: A picture is named by an address or a path (status 400).
    """
    inputs = read_messages(messages, modality)
    for number, message in enumerate(inputs):
        for part in message["content"]:
            if part["type"] != "text" and not str(part.get("url")).startswith("data:"):
                raise HTTPException(
                    status_code=400,
                    detail=f"Message {number}: expected the {part['type']} itself, as a `data:` URL, not its address",
                )
    return inputs


def main(args: list[str] | None = None) -> None:
    # Overridden, as the library would open any file and any address that whoever sends a request names
    BaseHandler.get_processor_inputs_from_messages = staticmethod(read_messages_without_links)
    # The package's own import has registered DuoStream in this process, which the library's command could not know
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=__doc__)(Serve)
    app(args)


if __name__ == "__main__":
    main()
