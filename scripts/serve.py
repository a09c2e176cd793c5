"""
Serves a checkpoint over HTTP as OpenAI's API, by `transformers serve`, whose options it takes. `transformers chat` and
other clients talk to it. Pictures come in the request itself, and no other model is loaded.

Example:

    duostream serve runs/finetuned --port 8000
"""

import json
from collections.abc import Callable
from functools import wraps
from inspect import getsource
from typing import Any

import torch
import typer
from jinja2 import TemplateError
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from ..processing.chat_template_duostream import ToolsNotWrittenError, check_messages, check_text
from ..processing.data_collator_duostream import load_pictures
from .answering import TextRoom
from .checkpoints import check_place

# What of the library's server is open: its other routes open files and addresses that a request names
ROUTES = ("/health", "/load_model", "/v1/models", "/v1/chat/completions")
# What OpenAI's clients expect to be told of a model
MADE = {"created": 0, "owned_by": "duostream"}

# What the library's server leaves out without a word, or fails at; each with the values that ask for nothing, which
# some clients always send
NOT_TAKEN: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
}
# The library adds `frequency_penalty` to 1 and divides scores by the sum
NUMBERS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -0.9, 2),
    "max_tokens": (int, 1, 2**31 - 1),
    "max_completion_tokens": (int, 1, 2**31 - 1),
    "seed": (int, -(2**63), 2**63 - 1),
}
# What of a `generation_config`, as `transformers chat` sends it, says how a text is written
GENERATION: dict[str, tuple[type[int] | type[float], float, float]] = {
    **dict.fromkeys(("max_length", "max_new_tokens"), (int, 1, 2**31 - 1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "top_k"), (int, 0, 2**31 - 1)),
    "num_beams": (int, 1, 64),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_p", "top_p", "typical_p"), (float, 0, 1)),
    "temperature": (float, 0, 2),
    "repetition_penalty": (float, 0.01, 100),
    "length_penalty": (float, -100, 100),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (int, 0, 2**31 - 1)),
}
SWITCHES = ("do_sample", "early_stopping", "use_cache")
# Fields of other kinds, with what asks for nothing, or tells where the config is from
IDLE: dict[str, Any] = {"num_return_sequences": 1, "early_stopping": "never", "_from_model_config": True}
# OpenAI's: a template writes others as they come, or fails at them
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Below, scores that are divided by it overflow, and the answer is the greedy one
LOWEST_TEMPERATURE = 1e-5


def refusal(body: Any, model: str) -> str | None:
    """Why a request isn't answered: it asks for what the server can't do, or for a file or an address to be opened."""
    if not isinstance(body, dict):
        return "expected a JSON object"
    if body.get("model") not in (None, model):
        return f"`model` is {body['model']!r}; this server has {model!r}"
    if "chat_template_kwargs" in body:
        return "`chat_template_kwargs` is not taken: it could name files to open"
    for name, idle in NOT_TAKEN.items():
        if body.get(name) not in (None, *idle):
            return f"`{name}` is not taken, unless it is {' or '.join(map(json.dumps, (*idle, None)))}"
    if body.get("tool_choice") == "none" and body.get("tools"):
        return '`tool_choice` is not taken beside `tools`, unless it is "auto"'
    for name, expected in NUMBERS.items():
        if body.get(name) is not None and (problem := number_refusal(body[name], *expected)):
            return f"`{name}` {problem}"
    tools = [] if body.get("tools") is None else body["tools"]
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return f"`tools` is {tools!r:.100}; expected a list of objects"
    return None if body.get("generation_config") is None else generation_refusal(body["generation_config"])


def number_refusal(value: Any, kind: type[int] | type[float], low: float, high: float) -> str | None:
    """Why a value isn't taken where a number is expected."""
    if isinstance(value, (int, kind)) and not isinstance(value, bool) and low <= value <= high:
        return None
    return f"is {value!r:.100}; expected {'an integer' if kind is int else 'a number'} from {low} to {high}"


def generation_refusal(generation_config: Any) -> str | None:
    """Why a `generation_config`, a JSON text, isn't taken: it can't be read, or asks for another thing than a text."""
    try:
        config = json.loads(generation_config)
    except (TypeError, ValueError, RecursionError) as error:
        return f"`generation_config` can't be read: {error}"
    if not isinstance(config, dict):
        return f"`generation_config` is {generation_config!r:.100}; expected an object"
    for name, value in config.items():
        told = f"`{name}` of `generation_config`"
        is_idle = value is None or value is False or value == [] or (name in IDLE and value == IDLE[name])
        if is_idle or name == "transformers_version":
            continue
        if name in SWITCHES:
            problem = None if value is True else f"is {value!r:.100}; expected true or false"
        elif name in GENERATION:
            is_several = name == "eos_token_id" and isinstance(value, list)
            problems = [number_refusal(each, *GENERATION[name]) for each in (value if is_several else [value])]
            problem = next(filter(None, problems), None)
        elif name == "stop_strings":
            texts = value if isinstance(value, list) else [value]
            is_right = all(isinstance(text, str) and text for text in texts)
            problem = None if is_right else f"is {value!r:.100}; expected a text, or a list of texts"
        else:
            return f"{told} is not taken; there are {', '.join((*SWITCHES, *GENERATION, 'stop_strings'))}"
        if problem is not None:
            return f"{told} {problem}"
    return None


def messages_refusal(messages: Any) -> str | None:
    """Why messages aren't answered: they are none, or have something else than text and pictures of their own."""
    if not isinstance(messages, list) or not messages:
        return f"`messages` is {messages!r:.100}; expected a list of messages"
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(message, dict) and content is None and message.get("role") in ("assistant", "tool"):
            # As clients send back a turn in which nothing was said
            message = {**message, "content": ""}
        try:
            if isinstance(content, list):
                message = {**message, "content": [checked_part(part) for part in content]}
            elif isinstance(content, str):
                check_text(content, "`content`")
            check_messages([message])
            check_text(message["role"], "`role`")
            if message["role"] not in ROLES:
                raise ValueError(f"`role` is {message['role']!r:.100}; expected one of {', '.join(ROLES)}")
        except ValueError as error:
            return f"Message {number}: {error}"
    return None


def checked_part(part: Any) -> dict[str, Any]:
    """A part of a message as the processor's messages have it, without its picture."""
    kind = part.get("type") if isinstance(part, dict) else part
    if kind in ("image_url", "input_image"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not (isinstance(url, str) and url.startswith("data:image/")):
            raise ValueError("expected the picture itself, as a `data:image/...` URL, not its address")
        return {"type": "image"}
    if kind in ("text", "input_text", "output_text"):
        check_text(part.get("text"), "`text`")
        return {"type": "text", "text": part["text"]}
    raise ValueError(f"expected text and pictures, not {kind!r:.100}")


def answering(base: Any) -> Any:
    """The library's handler of chats; it reads pictures as the processor does, and draws answers if asked to."""
    from fastapi import HTTPException

    class Handler(base):
        async def handle_request(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().handle_request(*args, **kwargs)
            except (ToolsNotWrittenError, TemplateError) as error:
                # Of the template: what it refuses itself, such as a system message, or two turns of one role
                raise HTTPException(400, str(error)) from error

        @staticmethod
        def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
            # Where there are tool calls the library leaves the content out, and takes null and [] for some
            given = [{name: each for name, each in message.items() if each not in (None, [])} for message in messages]
            try:
                inputs = base.get_processor_inputs_from_messages(given, modality)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                # All else in the messages has been looked at
                raise HTTPException(400, f"`tool_calls` can't be read: {error!r}") from error
            for number, message in enumerate(inputs):
                parts = [part for part in message["content"] if part["type"] == "image"]
                try:
                    pictures = load_pictures([part.pop("url") for part in parts], f"Message {number}")
                except ValueError as error:
                    raise HTTPException(400, str(error)) from error
                for part, picture in zip(parts, pictures, strict=True):
                    part["image"] = picture
            return inputs

        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # The library seeds at once, which would disturb the answer that is being written
            rest = {name: value for name, value in body.items() if name not in ("seed", *NOT_TAKEN)}
            if body.get("generation_config") is not None:
                given = json.loads(body["generation_config"])
                # Where they hold nothing, `generate` fails
                given = {name: value for name, value in given.items() if value != []}
                rest["generation_config"] = json.dumps(given)
            temperature = body.get("temperature")
            try:
                config = super()._build_generation_config(rest, *args, **kwargs)
                if temperature is not None:
                    # The library sets it and goes on writing greedily
                    config.do_sample = True
                if config.temperature is not None and config.temperature < LOWEST_TEMPERATURE:
                    config.do_sample = False
                config.validate()
            except (TypeError, ValueError) as error:
                raise HTTPException(400, f"`generation_config` can't be read: {error}") from error
            if temperature is None and body.get("top_p") not in (None, 1) and not config.do_sample:
                raise HTTPException(400, "`top_p` is not taken without a `temperature`: the answer is greedy")
            if body.get("seed") is not None:
                # By the thread that writes the answer, right before it does
                model = self.model_manager.process_model_name(body["model"])
                self.generation_state.get_manager(model).submit(torch.manual_seed, body["seed"])
            return config

        def _streaming(self, request_id: str, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
            if (args[2].num_beams or 1) > 1:
                raise HTTPException(400, "`num_beams` doesn't go with `stream`: the best answer is known at the end")
            fit_answer(model, processor, *args[1:3])
            # Not the processor, which the library would have `generate` take for a tokenizer (`stop_strings`)
            return super()._streaming(request_id, model, processor.tokenizer, *args, **kwargs)

        async def _non_streaming(self, request_id: str, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
            fit_answer(model, processor, *args[1:3])
            return await super()._non_streaming(request_id, model, processor.tokenizer, *args, **kwargs)

    return Handler


def fit_answer(model: Any, processor: Any, inputs: Any, config: Any) -> None:
    """
    Ends an answer where the model has no position for more, in place, as OpenAI's do: its reason to finish is
    "length", as clients know it. Of a prompt that leaves no room for an answer it raises `HTTPException`.
    """
    from fastapi import HTTPException

    text_room = TextRoom(model)
    try:
        text_room.check(inputs, ["The conversation"], processor.tokenizer.model_max_length, is_prompt=True)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    room = text_room.behind(inputs)
    if room is not None:
        if config.max_new_tokens is not None:
            config.max_new_tokens = min(config.max_new_tokens, room)
        elif config.max_length is not None:
            config.max_length = min(config.max_length, inputs["input_ids"].shape[-1] + room)


def guarded(build_server: Callable[..., Any]) -> Callable[..., Any]:
    """The library's `build_server`, whose app asks [`refusal`] and [`messages_refusal`] first."""

    def build(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        from fastapi.middleware import Middleware
        from fastapi.responses import JSONResponse
        from starlette.middleware.base import BaseHTTPMiddleware

        model = model_manager.force_model
        if model is None:
            raise typer.BadParameter("name the checkpoint to serve: with none, each request could load any model")
        app = build_server(model_manager, *args, **kwargs)

        async def guard(request: Any, call_next: Any) -> Any:
            if request.url.path not in ROUTES:
                return JSONResponse({"detail": f"there are {', '.join(ROUTES)}"}, 404)
            if request.url.path == "/v1/models":
                # The library's lists the Hub's cache: models that this server refuses, and no local folder
                return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", **MADE}]})
            if request.method == "POST":
                try:
                    body = await request.json()
                except (ValueError, RecursionError):
                    return JSONResponse({"detail": "the request is no JSON"}, 400)
                problem = refusal(body, model)
                if problem is None and request.url.path == "/v1/chat/completions":
                    problem = messages_refusal(body.get("messages"))
                if problem is not None:
                    return JSONResponse({"detail": problem}, 400)
            return await call_next(request)

        # Within the library's own, so that those see to what it refuses, too, for pages of other sites (CORS)
        app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=guard))
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
    from transformers.cli.serving import chat_completion, server

    if "from .serving.server import build_server" not in getsource(Serve.__init__):
        raise RuntimeError("This version of transformers builds its server elsewhere: nothing would guard it")
    server.build_server = guarded(server.build_server)
    chat_completion.ChatCompletionHandler = answering(chat_completion.ChatCompletionHandler)
    # The package's own import has registered DuoStream in this process, which the library's command could not know
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=__doc__)(serve)
    app(args)


if __name__ == "__main__":
    main()
