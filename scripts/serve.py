"""
Serves a checkpoint over HTTP as OpenAI's API, by `transformers serve`, whose options it takes. `transformers chat` and
other clients talk to it. Pictures come in the request itself, and no other model is loaded.

Example:

    duostream serve runs/finetuned --port 8000
"""

from collections.abc import Callable
from functools import wraps
from inspect import getsource
from typing import Any

import typer
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from .places import check_place

# What of the library's server is open: its other routes open files and addresses that a request names
ROUTES = ("/health", "/load_model", "/v1/models", "/v1/chat/completions")
# What OpenAI's clients expect to be told of a model
MADE = {"created": 0, "owned_by": "duostream"}


def refusal(body: Any, model: str) -> str | None:
    """Why a request isn't answered: it asks for another model, or names a file or an address to be opened."""
    if not isinstance(body, dict):
        return "expected a JSON object"
    if body.get("model") not in (None, model):
        return f"`model` is {body['model']!r}; this server has {model!r}"
    if "chat_template_kwargs" in body:
        return "`chat_template_kwargs` is not taken: it could name files to open"
    if body.get("stop") is not None:
        # The library looks for a tokenizer's vocabulary on the processor
        return "`stop` is not taken"
    messages = body.get("messages") or []
    if "messages" in body and not messages:
        return "`messages` is empty"
    for number, message in enumerate(messages if isinstance(messages, list) else [messages]):
        content = message.get("content") if isinstance(message, dict) else message
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image_url", "input_image"):
                url = part.get("image_url")
                url = url.get("url") if isinstance(url, dict) else url
                if not (isinstance(url, str) and url.startswith("data:image/")):
                    return f"Message {number}: expected the picture itself, as a `data:image/...` URL, not its address"
            elif kind not in ("text", "input_text", "output_text"):
                return f"Message {number}: expected text and pictures, not {kind!r}"
    return None


def guarded(build_server: Callable[..., Any]) -> Callable[..., Any]:
    """The library's `build_server`, whose app asks [`refusal`] first."""

    def build(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        from fastapi.responses import JSONResponse

        model = model_manager.force_model
        if model is None:
            raise typer.BadParameter("name the checkpoint to serve: with none, each request could load any model")
        app = build_server(model_manager, *args, **kwargs)

        @app.middleware("http")
        async def guard(request: Any, call_next: Any) -> Any:
            if request.url.path not in ROUTES:
                return JSONResponse({"detail": f"there are {', '.join(ROUTES)}"}, 404)
            if request.url.path == "/v1/models":
                # The library's lists the Hub's cache: models that this server refuses, and no local folder
                return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", **MADE}]})
            if request.method == "POST":
                try:
                    problem = refusal(await request.json(), model)
                except ValueError:
                    problem = "the request is no JSON"
                if problem is not None:
                    return JSONResponse({"detail": problem}, 400)
            return await call_next(request)

        return app

    return build


@wraps(Serve)
def serve(*args: Any, force_model: str | None = None, **kwargs: Any) -> None:
    if force_model is not None:
        # A revision may follow
        check_place(force_model.partition("@")[0])
    Serve(*args, force_model=force_model, **kwargs)


def main(args: list[str] | None = None) -> None:
    if not is_serve_available():
        raise ImportError(
            "`duostream serve` needs more packages: pip install 'duostream[serving]' (in a clone: '.[serving]')"
        )
    # Overridden where `Serve` looks it up: the library's own server opens what whoever sends a request names
    from transformers.cli.serving import server

    if "from .serving.server import build_server" not in getsource(Serve.__init__):
        raise RuntimeError("This version of transformers builds its server elsewhere: nothing would guard it")
    server.build_server = guarded(server.build_server)
    # The package's own import has registered DuoStream in this process, which the library's command could not know
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=__doc__)(serve)
    app(args)


if __name__ == "__main__":
    main()
