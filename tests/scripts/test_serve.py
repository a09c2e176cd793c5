"""A server of the real thing, asked over HTTP by the clients that people have."""

import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from tiny_models import answered_row, save_learnt

from duostream.scripts.serve import refusal

pytestmark = pytest.mark.slow

COLORS = ("red", "blue")
ASKED = "Which color is it?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to tell two colors apart, and to greet."""
    rows = [answered_row(ASKED, color, color) for color in COLORS] + [answered_row("Hello", "nice to meet you")]
    return save_learnt(tmp_path_factory.mktemp("served"), rows)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[str]:
    """Its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "duostream.scripts.serve", str(checkpoint), "--port", port, "--device", "cpu"]
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


def data_url(color: str) -> str:
    file = BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


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
        for body in ({"messages": video}, {"model": picture}, {"model": "somebody/else"}):
            for route in ("/v1/chat/completions", "/load_model"):
                answer = httpx.post(f"{server}{route}", json={"model": str(checkpoint), **body})
                assert answer.status_code == 400, (body, route)
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


@pytest.mark.parametrize(("name", "value"), [("stop", ["."]), ("messages", [])])
def test_what_the_server_does_not_take_is_the_client_s_mistake(
    server: str, checkpoint: Path, name: str, value: Any
) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    asked: Any = {"messages": [{"role": "user", "content": "Hello"}], name: value}
    with pytest.raises(BadRequestError) as error:
        client.chat.completions.create(model=str(checkpoint), max_tokens=8, **asked)
    assert error.value.response.json()["detail"].startswith(f"`{name}` is")


def test_an_option_that_is_null_is_none() -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}]}
    assert refusal({**asked, "stop": None}, "a model") is None
    assert refusal({**asked, "stop": "."}, "a model") == "`stop` is not taken"
