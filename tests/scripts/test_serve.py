"""A server of the real thing, asked over HTTP by the clients that people have."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from tiny_models import answered_row, save_learnt
from transformers import GenerationConfig

from duostream.scripts.serve import NOT_TAKEN

pytestmark = pytest.mark.slow

COLORS = ("red", "blue")
ASKED = "Which color is it?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to tell two colors apart, and to greet."""
    rows = [answered_row(ASKED, color, color) for color in COLORS] + [answered_row("Hello", "nice to meet you")]
    folder = save_learnt(tmp_path_factory.mktemp("served"), rows)
    # As templates that take no system message, or no two turns of one role
    template = folder / "chat_template.jinja"
    refusal = "{% if messages | length > 20 %}{{ raise_exception('Too many turns') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[str]:
    """Its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "duostream.scripts.serve", str(checkpoint), "--port", port, "--device", "cpu"]
    command.append("--enable-cors")
    process = subprocess.Popen(command)
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server ended"
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail("the server did not answer within two minutes")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def ask(server: str, checkpoint: Path) -> Any:
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)

    def ask(picture: str, **kwargs: Any) -> Any:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": ASKED}]
        messages: Any = [{"role": "user", "content": content}]
        return client.chat.completions.create(model=str(checkpoint), messages=messages, max_tokens=8, **kwargs)

    return ask


def picture(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def data_url(color: str) -> str:
    return f"data:image/png;base64,{b64encode(picture(color)).decode()}"


@pytest.mark.parametrize("color", COLORS)
def test_a_question_about_a_picture_is_answered_whole_or_as_it_is_written(ask: Any, color: str) -> None:
    assert ask(data_url(color)).choices[0].message.content == color
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(data_url(color), stream=True)]
    assert "".join(parts) == color


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address, and who asked for it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    listener = HTTPServer(("localhost", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://localhost:{listener.server_address[1]}/picture.png", asked
    listener.shutdown()
    listener.server_close()


def test_no_file_or_address_that_a_request_names_is_opened(
    ask: Any, server: str, checkpoint: Path, listener: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = listener
    path = tmp_path / "private.png"
    Image.new("RGB", (16, 16), "red").save(path)
    for picture in (str(path), f"file://{path}", address):
        with pytest.raises(BadRequestError) as refused:
            ask(picture)
        assert refused.value.response.json()["detail"].startswith("Message 0: expected the picture itself")
        for options in ({"images": [picture]}, {"processor_kwargs": {"images": [picture]}}):
            with pytest.raises(BadRequestError) as refused:
                ask(data_url("blue"), extra_body={"chat_template_kwargs": options})
            assert "`chat_template_kwargs` is not taken" in refused.value.response.json()["detail"]
        video = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": picture}}]}]
        answer = httpx.post(f"{server}/v1/chat/completions", json={"messages": video})
        assert answer.status_code == 400 and "expected text and pictures" in answer.json()["detail"]
        for model in (picture, "somebody/else"):
            for route in ("/v1/chat/completions", "/load_model"):
                answer = httpx.post(f"{server}{route}", json={"model": model})
                assert answer.status_code == 400 and answer.json()["detail"].startswith("`model` is"), (model, route)
    for route in ("/v1/systemone", "/v1/responses", "/v1/completions", "/v1/audio/transcriptions"):
        assert httpx.post(f"{server}{route}", json={}).status_code == 404
    assert httpx.post(f"{server}/v1/chat/completions", content=b"no JSON").status_code == 400
    assert not asked


def test_a_server_without_a_checkpoint_is_refused() -> None:
    command = [sys.executable, "-m", "duostream.scripts.serve", "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "name the checkpoint to serve" in ended.stderr


def test_the_library_s_chat_talks_to_it(server: str, checkpoint: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "transformers"), "chat", str(checkpoint), f"{server}/v1"]
    chat = subprocess.run(
        [*command, "max_new_tokens=8", "do_sample=False", "--save-folder", str(tmp_path)],
        input="Hello\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        # Offline it would not even talk to this machine
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )
    assert "nice to meet you" in chat.stdout, chat.stdout + chat.stderr


def test_the_server_names_its_one_model(server: str, checkpoint: Path) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [str(checkpoint)]


def words(server: str, **options: Any) -> str:
    """An answer to a greeting, streamed or not."""
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    asked: Any = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **options}
    answer = client.chat.completions.create(model=model, **asked)
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    return answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_drawn_if_a_temperature_is_given_and_the_same_with_the_same_seed(
    server: str, stream: bool
) -> None:
    greedy = [{}, {"temperature": 0, "top_p": 0.5}, {"temperature": 1e-40}, {"temperature": 2, "top_p": 0}]
    assert {words(server, stream=stream, **options) for options in greedy} == {"nice to meet you"}
    drawn = [words(server, stream=stream, temperature=2, seed=seed) for seed in (0, 1, 2, 0, 1, 2)]
    assert len(set(drawn)) > 1 and drawn[:3] == drawn[3:]


def test_answers_that_are_asked_for_at_the_same_time_are_those_of_their_seeds(server: str) -> None:
    def draw(seed: int) -> str:
        return words(server, temperature=2, seed=seed, stream=seed % 2 == 0)

    seeds = range(6)
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(draw, seeds)) == [draw(seed) for seed in seeds]


def test_what_clients_send_though_they_ask_for_nothing_by_it_is_taken(server: str) -> None:
    idle = {name: None for name in ("seed", "stop", "logprobs", "n", "temperature", "top_p", "max_tokens")}
    assert words(server, **idle) == "nice to meet you"
    for place in (0, -1):
        asked: Any = {name: values[place] for name, values in NOT_TAKEN.items() if values}
        assert words(server, **asked, top_p=1, frequency_penalty=0, user="me") == "nice to meet you"
    said = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "nice to meet you", "tool_calls": None},
        {"role": "user", "content": "Hello"},
    ]
    spelt: Any = [*said[:1], {**said[1], "tool_calls": []}, *said[2:]]
    assert words(server, messages=said) == words(server, messages=spelt)
    # A turn of the assistant in which nothing was said, as clients send it back
    silent, empty = ([said[0], {"role": "assistant", "content": content}, said[2]] for content in (None, ""))
    assert words(server, messages=silent) == words(server, messages=empty)


def test_an_answer_is_written_as_its_generation_config_says(server: str, checkpoint: Path) -> None:
    def answer(stream: bool = False, **config: Any) -> httpx.Response:
        body = {**saying("Hello"), "stream": stream, "generation_config": json.dumps(config)}
        return httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60)

    def content(response: httpx.Response) -> str:
        return response.json()["choices"][0]["message"]["content"]

    assert content(answer(max_new_tokens=99)) == "nice to meet you"
    assert content(answer(max_new_tokens=99, stop_strings=["meet"])).strip() == "nice to meet"
    assert content(answer(max_new_tokens=99, num_beams=2, num_return_sequences=1)) == "nice to meet you"
    # As `transformers chat --generation-config` sends it
    saved = GenerationConfig.from_pretrained(checkpoint)
    saved.update(do_sample=False, max_new_tokens=256, stop_strings=[])
    assert content(answer(**json.loads(saved.to_json_string()))) == "nice to meet you"
    assert content(answer(max_new_tokens=99, do_sample=True, temperature=0)) == "nice to meet you"
    streamed = answer(stream=True, max_new_tokens=99, stop_strings=["meet"])
    assert "error" not in streamed.text and "you" not in streamed.text
    refused = answer(stream=True, num_beams=2)
    assert refused.status_code == 400 and "`num_beams` doesn't go with `stream`" in refused.json()["detail"]


def test_pages_of_other_sites_may_ask_and_read_what_is_refused(server: str) -> None:
    origin = {"Origin": "http://a.example"}
    chat, models = f"{server}/v1/chat/completions", f"{server}/v1/models"
    asking = {**origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
    answers = [
        httpx.get(models, headers=origin),
        httpx.options(models, headers=asking),
        httpx.post(chat, json={}, headers=origin),
        httpx.post(chat, json={**saying("Hello"), "max_tokens": 2}, headers=origin),
        httpx.get(f"{server}/nowhere", headers=origin),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 200, 404]
    assert all(answer.headers["access-control-allow-origin"] in ("*", origin["Origin"]) for answer in answers)
    assert "authorization" in answers[1].headers["access-control-allow-headers"]


def saying(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def showing(picture: bytes, kind: str = "png", role: str = "user") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{b64encode(picture).decode()}"
    return saying([{"type": "image_url", "image_url": {"url": url}}], role)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        *(
            ({name: value}, f"`{name}` is not taken, unless it is ")
            for name, value in {
                "n": 3,
                "stop": ["."],
                "logprobs": True,
                "top_logprobs": 2,
                "logit_bias": {"5": 100},
                "presence_penalty": 0.5,
                "response_format": {"type": "json_object"},
                "functions": [{"name": "f", "parameters": {}}],
                "function_call": {"name": "f"},
                "tool_choice": "required",
                "modalities": ["audio"],
                "audio": {"voice": "alloy"},
            }.items()
        ),
        *(
            ({name: value}, f"`{name}` is {value!r}; expected ")
            for name, values in {
                "max_tokens": (0, -1, "a", True, 1.5),
                "max_completion_tokens": (0,),
                "temperature": (-0.1, "hot", 1e9),
                "top_p": (1.1, []),
                "seed": ("a", 0.5, 2**64),
                "frequency_penalty": (-1,),
                "messages": ("Hello", None, []),
                "tools": ("f", ["f"], 0, False),
            }.items()
            for value in values
        ),
        ({"top_p": 0.9}, "`top_p` is not taken without a `temperature`"),
        ({"generation_config": "{"}, "`generation_config` can't be read: "),
        ({"generation_config": {}}, "`generation_config` can't be read: the JSON object must be"),
        ({"generation_config": "[]"}, "`generation_config` is '[]'; expected an object"),
        *(
            ({"generation_config": json.dumps({name: value})}, f"`{name}` of `generation_config` {wrong}")
            for name, value, wrong in (
                ("max_new_tokens", 0, "is 0; expected an integer from 1 to "),
                ("num_return_sequences", 2, "is not taken; there are do_sample, "),
                ("return_dict_in_generate", True, "is not taken; there are "),
                ("prompt_lookup_num_tokens", 2, "is not taken; there are "),
                ("num_beams", "3", "is '3'; expected an integer from 1 to "),
                ("top_k", True, "is True; expected an integer from 0 to "),
                ("min_p", 5, "is 5; expected a number from 0 to 1"),
                ("eos_token_id", [3, "a"], "is 'a'; expected an integer from 0 to "),
                ("pad_token_id", [1], "is [1]; expected an integer from 0 to "),
                ("temperature", -1, "is -1; expected a number from 0 to 2"),
                ("repetition_penalty", 0.0, "is 0.0; expected a number from 0.01 to "),
                ("use_cache", "no", "is 'no'; expected true or false"),
                ("stop_strings", [""], "is ['']; expected a text, or a list of texts"),
            )
        ),
        ({"messages": ["Hello"]}, "Message 0: expected a message with its `role`"),
        ({"messages": [{"content": "Hello"}]}, "Message 0: expected a message with its `role`"),
        (saying(5), "Message 0: expected text from the user, not 5"),
        (saying("Hello", "banana"), "Message 0: `role` is 'banana'; expected one of system, developer, user"),
        (saying("Hello " * 6000), "The conversation has "),
        (saying(None), "Message 0: expected text from the user, not None"),
        (saying("\ud800"), "Message 0: `content`: "),
        (saying("Hello", "\ud800"), "Message 0: `role`: "),
        (saying([{"type": "text", "text": 5}]), "Message 0: `text`: expected text, not 5"),
        (saying([{"type": "text", "text": "\ud800"}]), "Message 0: `text`: "),
        (saying(["Hello"]), "Message 0: expected text and pictures, not 'Hello'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "`tool_calls` can't be read: ",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "the chat template writes no `tools`"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            "the chat template writes no `tool_calls`",
        ),
        ({"messages": [{"role": "user", "content": "Hello"}] * 21}, "Too many turns"),
        (showing(picture("red"), role="assistant"), "Message 0: expected text, or pictures of a user, from the assis"),
        (showing(b"no picture"), "Message 0: a picture can't be read: "),
        (showing(picture("red")[:60]), "Message 0: a picture can't be read: "),
        (showing(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "svg+xml"), "Message 0: a picture can't be read: "),
        (showing(picture("red", (2000, 5))), "Message 0: a picture can't be read: 2000 x 5 pixels"),
    ],
)
def test_what_a_client_gets_wrong_is_answered_400_with_what_is_wrong(
    server: str, asked: dict[str, Any], wrong: str, stream: bool
) -> None:
    body = json.dumps({**saying("Hello"), "max_tokens": 8, "stream": stream, **asked})
    answer = httpx.post(f"{server}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"].startswith(wrong)


def test_a_body_that_is_nested_too_deep_is_refused(server: str) -> None:
    answer = httpx.post(f"{server}/v1/chat/completions", content=b"[" * 100_000)
    assert answer.status_code == 400 and answer.json()["detail"] == "the request is no JSON"


def test_a_request_without_messages_is_refused(server: str) -> None:
    answer = httpx.post(f"{server}/v1/chat/completions", json={})
    assert answer.status_code == 400 and answer.json()["detail"].startswith("`messages` is None")
