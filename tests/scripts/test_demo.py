"""The page to try a checkpoint: what it is made of, and the page itself in a headless Chromium, with screenshots."""

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import GPT2, SIGLIP, answered_row, save_learnt, small_model

from duostream import (
    DuoStreamForImageTextRetrieval,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
    DuoStreamProcessor,
)
from duostream.scripts import demo
from duostream.scripts.answering import answer, prompt_inputs
from duostream.scripts.measuring import evaluation_loss
from duostream.scripts.report import attention_to_pictures, render

COLORS = {"red": "It is a red picture", "blue": "This one looks blue"}
ASKED = "Which color is it?"
NEW_TOKENS = 12
SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"
SECONDS = 120  # a page is waited for so long, on a machine that does other things too


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to tell two colors apart."""
    asked = (ASKED, "Describe the picture.")
    rows = [answered_row(text, said, color) for color, said in COLORS.items() for text in asked]
    return save_learnt(tmp_path_factory.mktemp("demo") / "colors", rows, "Translate: Summarize:")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, DuoStreamProcessor]:
    writer, finder, processor = demo.load(str(checkpoint))
    assert finder is None
    return writer, processor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a picture of each color."""
    folder = tmp_path_factory.mktemp("pictures")
    for color in COLORS:
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
    return {color: str(folder / f"{color}.png") for color in COLORS}


def conversation(text: str, *images: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images] or [{"type": "image"}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_an_answer_is_written_word_by_word_as_generate_writes_it_whole(loaded, pictures):
    model, processor = loaded
    for color, said in COLORS.items():
        turns = demo.conversation_of([demo.user_turn(ASKED, [pictures[color]])])
        steps = list(demo.write(model, processor, turns, NEW_TOKENS))
        texts = [text for text, _ in steps]
        assert texts[-1] == answer(model, processor, [turns], max_new_tokens=NEW_TOKENS)[0] == said
        assert len(set(texts)) > 2 and all(said.startswith(text) for text in texts)
        assert all(not looked for _, looked in steps[:-1])
        assert steps[-1][1].count('tabindex="0"') >= len(said.split())


def test_an_answer_about_text_alone_has_no_overlay(loaded):
    model, processor = loaded
    steps = list(demo.write(model, processor, demo.conversation_of([demo.user_turn("Hello", [])]), NEW_TOKENS))
    assert steps[-1][1] == ""


@pytest.mark.parametrize("bidirectional_prefix", [False, True])
def test_attention_in_one_pass_is_what_generating_attended_to(loaded, monkeypatch, bidirectional_prefix):
    model, processor = loaded
    monkeypatch.setattr(processor, "bidirectional_prefix", bidirectional_prefix)
    images = [Image.effect_noise((20, 20), 90).convert("RGB") for _ in range(2)]
    inputs = prompt_inputs(processor, [conversation("Which is it?", *images)])
    generated = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    num_tokens = len(generated.attentions)
    assert ("token_type_ids" in inputs) == bidirectional_prefix
    maps = attention_to_pictures(model, inputs, generated.sequences[:, inputs["input_ids"].shape[1] :])
    side = int(model.config.image_seq_length**0.5)
    assert maps.shape == (num_tokens, 2, side, side)
    shares = maps.sum(dim=(1, 2, 3))
    assert (maps >= 0).all() and (shares > 0).all() and (shares < 1).all()
    is_image = inputs["input_ids"][0] == processor.image_token_id
    for step, own in zip(generated.attentions, maps, strict=True):
        expected = torch.stack(step)[:, 0, :, -1].mean(dim=(0, 1))[: len(is_image)][is_image]
        torch.testing.assert_close(own.flatten(), expected, atol=1e-5, rtol=1e-4)


def test_an_answer_that_nobody_waits_for_is_not_written_on(loaded):
    model, processor = loaded
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    steps: list[Any] = []
    hook = model.register_forward_hook(lambda *args: steps.append(args))
    try:
        answers = demo.write(model, processor, demo.conversation_of([demo.user_turn("Hello", [])]), 150)
        next(answers)
        answers.close()
    finally:
        hook.remove()
        model.generation_config.eos_token_id = ends
    assert 0 < len(steps) < 100


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.png", b"", "can't be read as a picture"),
        ("page.jpg", b"<html><script>alert(1)</script></html>", "can't be read as a picture"),
        ("half.png", b"half", "can't be read as a picture: it is empty, broken, or none of JPEG, PNG"),
        ("vector.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "can't be read as a picture"),
        ("line.bmp", (1, 1_000), "can't be read as a picture: 1 x 1000 pixels; one side may be up to"),
        ("bomb.bmp", (20_000, 20_000), "too many pixels: pictures may have 20 MB and 64 megapixels"),
        ("wide.bmp", (70_000, 1_000), "70000 × 1000 pixels: pictures may have 20 MB and 64 megapixels"),
        ("long.png", b"0" * (20 * 2**20 + 1), "20 MB: pictures may have 20 MB and 64 megapixels"),
    ],
)
def test_a_file_that_is_no_picture_or_a_huge_one_is_named(tmp_path, name, content, told):
    file = BytesIO()
    Image.effect_noise((99, 99), 90).save(file, "BMP" if isinstance(content, tuple) else "PNG")
    data = bytearray(file.getvalue())
    if isinstance(content, tuple):
        struct.pack_into("<2i", data, 18, *content)  # what the file says of its width and height
    path = tmp_path / name
    path.write_bytes(data if isinstance(content, tuple) else data[:4000] if content == b"half" else content)
    with pytest.raises(ValueError, match=name) as refused:
        demo.read_picture(path)
    assert told in str(refused.value)


def test_no_text_becomes_html(loaded):
    evil = "<img src=x onerror='alert(1)'>"
    turn = demo.user_turn(evil, [])
    assert "<" not in turn["content"][0]["text"]
    assert demo.conversation_of([turn])[0]["content"] == [{"type": "text", "text": evil}]
    token = {"text": evil, "share": 0.5, "heat": "data:,"}
    page = render("attention.html.jinja", picture="data:,", width=1, height=1, num_pictures=1, mean="", tokens=[token])
    assert evil not in page and "&lt;img src=x" in page


def test_turns_that_were_not_answered_are_left_out_and_a_picture_alone_is_described(pictures):
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    turns = [demo.user_turn("lost", []), demo.user_turn("", [pictures["red"]]), said, demo.user_turn("And?", [])]
    first, second, third = demo.conversation_of(turns)
    assert first["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert first["content"][1]["text"] == "Describe the picture."
    assert [second["content"][0]["text"], third["content"][0]["text"]] == ["red", "And?"]
    with pytest.raises(ValueError, match="Write something"):
        demo.user_turn(" ", [])


def test_the_likelihood_of_a_text_is_that_after_pictures_and_words_in_the_order_of_training(loaded, pictures):
    model, processor = loaded
    image = demo.read_picture(pictures["red"])
    for images_last in (False, True):
        row = answered_row("Describe the picture.", "red")
        words = row["messages"][0]["content"]
        parts = [*words, {"type": "image"}] if images_last else [{"type": "image"}, *words]
        row = {"images": [image], "messages": [{"role": "user", "content": parts}, row["messages"][1]]}
        expected = -evaluation_loss(model, processor, [row])
        assert demo.score(model, None, processor, "red", image, images_last) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("recorded", "option", "images_last"),
    [(None, None, False), (False, None, False), (True, None, True), (True, False, False), (None, True, True)],
)
def test_pictures_stand_where_they_stood_in_training(checkpoint, pictures, tmp_path, recorded, option, images_last):
    pytest.importorskip("gradio", reason="the page needs gradio")
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    if recorded is not None:
        (tmp_path / "run.json").write_text(json.dumps({"images_last": recorded}))
    page = demo.build(str(tmp_path), NEW_TOKENS, option)
    (chat,) = (each.fn for each in page.fns.values() if each.api_name == "chat")
    turns, *_ = next(chat({"text": ASKED, "files": [pictures["red"]]}, []))
    assert [part["type"] for part in turns[0]["content"]] == (["text", "file"] if images_last else ["file", "text"])


def test_pictures_take_no_positions_of_the_text(loaded):
    _, processor = loaded
    stack = {**GPT2, "vocab_size": len(processor.tokenizer), "n_positions": 40}
    parts = {"text_config": stack, "vision_config": SIGLIP, "fusion_stack_config": stack}
    model = small_model("gpt2", image_token_id=processor.image_token_id, attn_implementation="eager", **parts)
    turns = conversation("Hi", *[Image.new("RGB", (16, 16), "red")] * 12)  # 48 image tokens
    assert list(demo.write(model, processor, turns, 1))
    with pytest.raises(ValueError, match="the text model has positions for 40"):
        list(demo.write(model, processor, demo.conversation_of([demo.user_turn("Hello " * 50, [])]), 1))


@pytest.mark.parametrize("options", [{"port": 99999}, {"port": -1}, {"max_new_tokens": 0}], ids=str)
def test_numbers_that_can_not_be_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected"):
        demo.DemoArguments("anywhere", **options)


def test_what_fails_while_an_answer_is_written_reaches_the_page(loaded):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio")
    model, processor = loaded
    turns = demo.conversation_of([demo.user_turn("Hello " * 300, [])])
    with pytest.raises(gradio.Error, match="more than the model reads"), demo.told():
        list(demo.write(model, processor, turns, NEW_TOKENS))
    # Fails in the thread that generates
    with pytest.raises(gradio.Error, match="max_new_tokens"), demo.told():
        list(demo.write(model, processor, demo.conversation_of([demo.user_turn("<b>", [])]), -1))


def test_pictures_are_ranked_by_the_head_or_else_by_what_the_model_would_write(checkpoint, loaded, pictures, tmp_path):
    model, processor = loaded
    images = {color: demo.read_picture(path) for color, path in pictures.items()}
    for color, said in COLORS.items():
        scores = {name: demo.score(model, None, processor, said, image) for name, image in images.items()}
        assert max(scores, key=lambda name: scores[name]) == color
        assert all(value < 0 for value in scores.values())
    trained = DuoStreamForPreTraining.from_pretrained(checkpoint)
    trained.config.itc_weight = 1.0
    for part in (trained, processor):
        part.save_pretrained(tmp_path)
    writer, finder, _ = demo.load(str(tmp_path))
    assert isinstance(finder, DuoStreamForImageTextRetrieval)
    assert finder.model is writer.model
    text = {name: value for name, value in processor.tokenizer("red", return_tensors="pt").items()}
    with torch.no_grad():
        text_embeds = finder.get_text_features(text["input_ids"], text["attention_mask"]).pooler_output
        pixels = processor.image_processor(images["red"], return_tensors="pt")["pixel_values"]
        cosine = (text_embeds @ finder.get_image_features(pixels).pooler_output.T).item()
        head = finder.image_text_head
        expected = float(head.logit_scale.exp()) * cosine + float(head.logit_bias)
    assert demo.score(writer, finder, processor, "red", images["red"]) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_that_neither_writes_nor_finds_is_named(checkpoint, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio")
    DuoStreamForSequenceClassification.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds DuoStreamForSequenceClassification; the page is for"):
        demo.main([str(tmp_path)])


def test_without_gradio_it_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'duostream\[demo\]'"):
        demo.main(["--checkpoint", str(checkpoint)])


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[str]:
    """The address of the page."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    page = demo.build(str(checkpoint), NEW_TOKENS)
    _, address, _ = demo.launch(page, prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    yield address
    page.close()


def call(address: str, name: str, *data: Any) -> str:
    """What the page's server answers to a request that no browser made."""
    with httpx.Client(base_url=f"{address}gradio_api/call/", timeout=SECONDS) as client:
        event = client.post(name, json={"data": data}).json()["event_id"]
        return client.get(f"{name}/{event}").text


@pytest.mark.slow
def test_no_path_that_a_request_names_is_opened(server, pictures):
    named = {"path": pictures["red"], "meta": {"_type": "gradio.FileData"}, "mime_type": "image/png"}
    turn = {"role": "user", "content": [{"type": "file", "file": named}, {"type": "text", "text": ASKED}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    for message, turns in (({"text": ASKED, "files": [named]}, []), ({"text": "And?", "files": []}, [turn, said])):
        answered = call(server, "chat", message, turns)
        assert "event: error" in answered and "event: complete" not in answered
        assert COLORS["red"] not in answered and "Traceback" not in answered
    assert httpx.get(f"{server}gradio_api/file={pictures['red']}").status_code == 403
    assert "event: complete" in call(server, "chat", {"text": ASKED, "files": []}, [])


@pytest.fixture(scope="module")
def browser(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is driven by selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in f"{switches} disable-component-update disable-sync window-size=1280,900".split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any, server: str) -> Any:
    """The page as one opens it, wide."""
    browser.set_window_size(1280, 900)
    browser.get(server)
    until(lambda: shown(browser, "textarea"))
    return browser


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives, as soon as it gives something."""
    from selenium.common.exceptions import StaleElementReferenceException

    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        try:
            if value := condition():
                return value
        except StaleElementReferenceException:
            pass
        time.sleep(0.05)
    raise AssertionError("the page did not get there")


def shown(browser: Any, selector: str) -> list[Any]:
    return [element for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def box_of(browser: Any) -> Any:
    """Where one writes, beside the button that adds pictures."""
    (button,) = shown(browser, "[data-testid=upload-button]")
    return button.find_element("xpath", "ancestor::*[.//textarea][1]//textarea")


def send(browser: Any, text: str, *files: str) -> None:
    """Puts files into the box that is shown, writes, and presses Enter."""
    from selenium.webdriver.common.keys import Keys

    box = box_of(browser)
    upload = box.find_element("xpath", "ancestor::*[.//input[@type='file']][1]//input[@type='file']")
    # The driver adds to what was chosen before, which a person's choice replaces
    browser.execute_script("arguments[0].value = null", upload)
    for number, path in enumerate(files, start=1):
        upload.send_keys(path)
        until(lambda number=number: len(shown(browser, ".thumbnail-item")) >= number)
    box.send_keys(text, Keys.ENTER)


def opacities(browser: Any) -> list[float]:
    script = "return [...document.querySelectorAll('.attention .heat')].map(e => +getComputedStyle(e).opacity)"
    return browser.execute_script(script)


def screenshot(browser: Any, name: str) -> None:
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def answered(browser: Any, number: int, text: str) -> None:
    """Waits until the chat has so many answers, the last is `text`, and it is shown where that looked."""
    until(lambda: len(said := shown(browser, "[data-testid=bot]")) == number and said[-1].text == text)
    until(lambda: shown(browser, ".attention .tokens span"))


def message(browser: Any) -> str:
    """What the page says went wrong."""
    return until(lambda: " ".join(each.text for each in shown(browser, "[data-testid=toast-body]")))


def open_tab(browser: Any, label: str) -> None:
    # Those that a narrow window has no room for come back as it is widened
    tab = until(lambda: next((each for each in shown(browser, "button[role=tab]") if each.text == label), None))
    tab.click()
    until(lambda: tab.get_attribute("aria-selected") == "true")


@pytest.mark.slow
def test_a_picture_goes_in_and_an_answer_comes_out_with_where_it_looked(page, loaded, pictures):
    from selenium.webdriver import ActionChains

    model, processor = loaded
    page.get_log("performance")
    turns: list[dict] = []
    for number, (color, text) in enumerate((("red", f"<i>{ASKED}</i>"), ("blue", ASKED)), start=1):
        send(page, text, pictures[color])
        turns.append(demo.user_turn(text, [pictures[color]]))
        said = answer(model, processor, [demo.conversation_of(turns)], max_new_tokens=NEW_TOKENS)[0]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": escape(said)}]})
        answered(page, number, said)
        assert shown(page, "[data-testid=user]")[-1].text.endswith(text)
        assert len(shown(page, "[data-testid=user] img")) == number
    tokens = shown(page, ".attention .tokens span")
    assert "".join(token.get_property("textContent") for token in tokens) == said
    at_rest = opacities(page)
    assert [bool(value) for value in at_rest] == [True] + [False] * len(tokens)
    overlays = set()
    for number, token in enumerate(tokens, start=1):
        ActionChains(page).move_to_element(token).perform()
        until(lambda number=number: [bool(value) for value in opacities(page)].index(True) == number)
        assert sum(map(bool, opacities(page))) == 1
        overlays.add(token.find_element("tag name", "img").get_attribute("src"))
    assert len(overlays) > 1
    screenshot(page, "chat")
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in urls)


@pytest.mark.slow
def test_the_page_works_from_the_keyboard(page, pictures):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def tab_to(selector: str) -> Any:
        for _ in range(40):
            ActionChains(page).send_keys(Keys.TAB).perform()
            focused = page.switch_to.active_element
            if page.execute_script("return arguments[0].matches(arguments[1])", focused, selector):
                return focused
        raise AssertionError(f"no {selector} is reached by Tab")

    tab_to("button[role=tab]")
    tab_to("[data-testid=upload-button]")
    send(page, "", pictures["red"])
    answered(page, 1, COLORS["red"])
    token = tab_to(".attention .tokens span")
    until(lambda: [bool(value) for value in opacities(page)][:2] == [False, True])
    assert re.fullmatch(r"\d+ % of its attention was on the picture", token.get_attribute("title"))


@pytest.mark.slow
def test_a_narrow_screen_needs_no_scrolling_sideways(page, pictures):
    send(page, ASKED, pictures["red"])
    answered(page, 1, COLORS["red"])
    for label in ("Find pictures", "Summarize", "Translate", "Caption", "Chat"):
        page.set_window_size(1280, 900)
        open_tab(page, label)
        page.set_window_size(390, 844)
        until(lambda: page.execute_script("return document.documentElement.clientWidth") <= 390)
        assert page.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        ), label
    page.execute_script("arguments[0].scrollIntoView()", box_of(page))
    screenshot(page, "narrow")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("page.jpg", b"<html></html>", "page.jpg can't be read"),
        ("huge.png", b"0" * (20 * 2**20 + 1), "maximum allowed size of 20.0 Mb"),
    ],
)
def test_a_broken_or_huge_file_gives_its_message(page, tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content)
    if name == "huge.png":
        page.find_element("css selector", "input[type=file]").send_keys(str(path))
    else:
        send(page, ASKED, str(path))
    assert told in message(page)
    screenshot(page, path.stem)


@pytest.mark.slow
def test_tabs_write_with_their_prompts(page, pictures):
    open_tab(page, "Caption")
    assert box_of(page).get_property("value") == "Describe the picture."
    send(page, "", pictures["blue"])
    until(lambda: COLORS["blue"] in [each.get_property("value") for each in shown(page, "textarea")])
    until(lambda: shown(page, ".attention"))
    screenshot(page, "caption")
    open_tab(page, "Translate")
    prompt = shown(page, "textarea")[0]
    assert prompt.get_property("value") == "Translate: {source}"
    prompt.clear()
    prompt.send_keys("nothing")
    send(page, "Hello")
    assert "{source}" in message(page)
    screenshot(page, "translate")


@pytest.mark.slow
def test_pictures_of_ones_own_are_found(page, pictures, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    open_tab(page, "Find pictures")
    folder = str(Path(pictures["red"]).parent)
    uploads = ".tabitem:not([style*='none']) input[type=file]"
    page.find_element("css selector", f"{uploads}:not([webkitdirectory])").send_keys(str(tmp_path / "notes.png"))
    until(lambda: len(shown(page, ".file-preview tr.file")) == 1)
    page.find_element("css selector", f"{uploads}[webkitdirectory]").send_keys(folder)
    until(lambda: len(shown(page, ".file-preview tr.file")) == 3)
    (query,) = shown(page, "textarea, input[type=text]")
    query.send_keys(COLORS["blue"], "\n")
    captions = until(lambda: [each.text for each in shown(page, ".caption-label")])
    assert [caption.split(" · ")[0] for caption in captions] == ["blue.png", "red.png"]
    assert "notes.png" in message(page)
    screenshot(page, "find")


@pytest.mark.slow
def test_a_space_runs_from_its_own_files(checkpoint, tmp_path):
    pytest.importorskip("gradio", reason="a Space names its version of gradio")
    for name, text in demo.space_files("me/colors").items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.sdk, card.app_file, card.models) == ("gradio", "app.py", ["me/colors"])
    required = (tmp_path / "requirements.txt").read_text().split()
    assert any(line.startswith("transformers") for line in required) and not any("pytest" in line for line in required)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Without `site`, and so without the finder of an editable install
    environment = {
        **os.environ,
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "CHECKPOINT": str(checkpoint),
        "GRADIO_SERVER_PORT": port,
    }
    process = subprocess.Popen([sys.executable, "-S", "app.py"], cwd=tmp_path, env=environment)
    try:
        address = f"http://127.0.0.1:{port}/"

        def is_up() -> bool:
            assert process.poll() is None, "the app ended"
            try:
                return httpx.get(address).status_code == 200
            except httpx.TransportError:
                return False

        until(is_up)
        assert "event: complete" in call(address, "chat", {"text": ASKED, "files": []}, [])
    finally:
        process.terminate()
        process.wait(20)
