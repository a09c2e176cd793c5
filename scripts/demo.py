"""
Opens a page to try a checkpoint: chat about pictures, captions, translations, summaries, and finding pictures by a
text; and beside an answer, where the model looked.

Example:

    duostream demo runs/finetuned --port 7860
"""

import json
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape, unescape
from importlib import import_module
from importlib.metadata import requires
from mimetypes import guess_type
from pathlib import Path
from threading import Event
from typing import Any

import PIL.Image
import torch
from huggingface_hub import SpaceCardData
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import cached_file

from ..processing import DuoStreamProcessor, DuoStreamRetrievalCollator
from ..processing.data_collator_duostream import load_picture
from .answering import TextRoom, prompt_inputs
from .arguments import check_at_least_one, parse
from .card import RUN
from .checkpoints import check_place, load_model
from .measuring import evaluation_loss, to_device
from .report import show_attention
from .rows import columns_in
from .tasks import TASKS

MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 64
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
TABS = {"caption": "Caption", "translation": "Translate", "summarization": "Summarize"}
NUM_FOUND = 12
THUMBNAIL_SIDE = 512  # pixels
# Nothing leaves the machine, and nothing comes from elsewhere: fonts are the system's, and answers are shown as text
LAUNCH: dict[str, Any] = {"share": False, "ssr_mode": False, "footer_links": [], "max_file_size": f"{MAX_MEGABYTES}mb"}
CSS = """
.gradio-container { width: 100%; max-width: 72rem !important; margin: 0 auto; }
footer, button[aria-label=Share] { display: none !important; }
"""
APP = """\
import os

from duostream.scripts import demo

demo.launch(demo.build(os.environ.get("CHECKPOINT", {repo_id!r})))
"""


@dataclass
class DemoArguments:
    """What to try, and where."""

    checkpoint: str = field(
        metadata={"help": "Local folder or Hub id of a DuoStream model with its processor; may stand first, bare."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 lets other machines in."})
    port: int | None = field(default=None, metadata={"help": "By default the first that is free from 7860 on."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    images_last: bool | None = field(
        default=None,
        metadata={
            "help": "Put pictures behind the words, as `images_last` in training. By default as the checkpoint's "
            f"`{RUN}` says, and in front of them where there is none."
        },
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_new_tokens")
        if self.port is not None and not 0 <= self.port < 2**16:
            raise ValueError(f"`port` is {self.port}; expected one from 0 to {2**16 - 1}")


def read_picture(path: str | Path) -> PIL.Image.Image:
    """
    A picture that somebody sent.

    Raises:
        ValueError: It is none, or too large.
    """
    name, num_bytes = Path(path).name, Path(path).stat().st_size
    limits = f"pictures may have {MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} megapixels"
    if num_bytes > MAX_MEGABYTES * 2**20:
        raise ValueError(f"{name} has {num_bytes / 2**20:.0f} MB: {limits}")
    try:
        with PIL.Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height <= MAX_MEGAPIXELS * 10**6:
                return load_picture(picture)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {limits}") from error
    except ValueError as error:
        raise ValueError(f"{name} can't be read as a picture: {error}") from error
    except Exception as error:
        known = ", ".join(FORMATS)
        raise ValueError(f"{name} can't be read as a picture: it is empty, broken, or none of {known}") from error
    raise ValueError(f"{name} has {width} × {height} pixels: {limits}")


def place_in(task: str) -> str:
    """What stands for the text in a task's prompt, in braces, if anything does."""
    names = columns_in(TASKS[task].prompt)
    return f"{{{names[0]}}}" if names else ""


def user_turn(text: str, files: list[str], images_last: bool = False) -> dict[str, Any]:
    """
    A turn as Gradio keeps it, who shows text as HTML. Pictures stand in front of the words, or behind.

    Raises:
        ValueError: There is nothing in it.
    """
    if not text.strip() and not files:
        raise ValueError("Write something, or add a picture")
    pictures = [{"type": "file", "file": {"path": path, "mime_type": guess_type(path)[0]}} for path in files]
    # To a picture alone belongs the prompt of a chat
    words = [{"type": "text", "text": escape(text.strip() or TASKS["chat"].prompt)}]
    return {"role": "user", "content": words + pictures if images_last else pictures + words}


def conversation_of(turns: list[dict]) -> list[dict]:
    """
    Gradio's turns as `apply_chat_template` takes them, with their pictures. Those without an answer are left out.

    Raises:
        ValueError: A file is no picture, or too large.
    """
    answered = [
        turn
        for number, turn in enumerate(turns)
        if number + 1 == len(turns) or turns[number + 1]["role"] != turn["role"]
    ]
    return [{"role": turn["role"], "content": [as_part(part) for part in turn["content"]]} for turn in answered]


def as_part(part: dict) -> dict:
    if part["type"] == "file":
        return {"type": "image", "image": read_picture(part["file"]["path"])}
    return {"type": "text", "text": unescape(part["text"])}


def write(
    model: PreTrainedModel, processor: DuoStreamProcessor, conversation: list[dict], max_new_tokens: int
) -> Iterator[tuple[str, str]]:
    """
    The answer as far as it is written, word by word, and in the end with an overlay of where it looked, as HTML.

    Raises:
        ValueError: The conversation is longer than the model reads.
    """
    inputs = prompt_inputs(processor, [conversation]).to(model.device)
    room, names = TextRoom(model), ["The conversation"]
    room.check(inputs, names, is_prompt=True)
    max_new_tokens = room.fit(inputs, names, max_new_tokens)
    length = inputs["input_ids"].shape[1]
    known = getattr(model.config.fusion_stack_config, "max_position_embeddings", None)
    if room.positions is None and known is not None:
        # Rotary positions don't end, but beyond those of its training a model knows none
        if length >= known:
            raise ValueError(
                f"The conversation has {length} tokens, more than the model reads: clear it and begin anew"
            )
        max_new_tokens = min(max_new_tokens, known - length)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped, text = Event(), ""
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: ids.new_full(ids.shape[:1], stopped.is_set()).bool()])
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "stopping_criteria": stop}
    with ThreadPoolExecutor(1) as thread:
        generated = thread.submit(model.generate, **inputs, **options, streamer=streamer)
        # An error, too, ends what is read here; `result` raises it
        generated.add_done_callback(lambda _: streamer.end())
        try:
            for piece in streamer:
                text += piece
                yield text.strip(), ""
            sequence = generated.result()
        finally:
            stopped.set()
    pictures = [part["image"] for turn in conversation for part in turn["content"] if part["type"] == "image"]
    yield text.strip(), show_attention(model, processor, pictures, inputs, sequence[:, length:]) if pictures else ""


def load(checkpoint: str) -> tuple[PreTrainedModel | None, PreTrainedModel | None, DuoStreamProcessor]:
    """
    The model that writes and the one that finds, if the checkpoint has them, and the processor.

    Raises:
        ValueError: There is none of this name, it has neither, or is broken.
    """
    check_place(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    name = ", ".join(config.architectures or [config.model_type])
    is_pretrained = name == "DuoStreamForPreTraining"
    writes = name == "DuoStreamForConditionalGeneration" or (is_pretrained and config.lm_weight)
    finds = name == "DuoStreamForImageTextRetrieval" or (is_pretrained and config.itc_weight)
    if not writes and not finds:
        raise ValueError(f"{checkpoint!r} holds {name}; the page is for DuoStream models that write or find pictures")
    # Only the eager implementation returns attentions
    options: dict[str, Any] = {"attn_implementation": "eager", "device_map": "auto"}
    writer = load_model(TASKS["chat"].auto_class, checkpoint, **options) if writes else None
    finder = load_model(TASKS["retrieval"].auto_class, checkpoint, **options) if finds else None
    if writer and finder:
        finder.model = writer.model  # the same weights, once
    return writer, finder, AutoProcessor.from_pretrained(checkpoint)


def recorded_images_last(checkpoint: str) -> bool:
    """Whether pictures stood behind the words in training, where that was recorded."""
    path = cached_file(
        checkpoint,
        RUN,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path is not None and json.loads(Path(path).read_text(encoding="utf-8")).get("images_last", False)


@torch.no_grad()
def score(
    writer: PreTrainedModel | None,
    finder: PreTrainedModel | None,
    processor: DuoStreamProcessor,
    text: str,
    picture: PIL.Image.Image,
    images_last: bool = False,
) -> float:
    """How well a picture fits a text: by the image-text head or, without one, the text's mean log-likelihood."""
    image, words = {"type": "image"}, {"type": "text", "text": TASKS["caption"].prompt}
    row = {
        "images": [picture],
        "prompt": [{"role": "user", "content": [words, image] if images_last else [image, words]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
    }
    if finder is None:
        return -evaluation_loss(writer, processor, [row])
    batch = DuoStreamRetrievalCollator(processor)([row])
    return finder(**{name: to_device(value, finder.device) for name, value in batch.items()}).logits_per_text.item()


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong, as a message on the page; where it is a defect, with its traceback in the terminal."""
    from gradio import Error

    try:
        yield
    except Exception as error:
        is_defect = not isinstance(error, ValueError)
        message = f"The model failed: {error}" if is_defect else str(error)
        raise Error(escape(message), duration=None, print_exception=is_defect) from error


def import_gradio() -> Any:
    try:
        return import_module("gradio")
    except ImportError as error:
        raise ImportError(
            "The page needs more packages: pip install 'duostream[demo]' (in a clone: pip install -e '.[demo]')"
        ) from error


def build(checkpoint: str, max_new_tokens: int = DemoArguments.max_new_tokens, images_last: bool | None = None) -> Any:
    """
    The page of a checkpoint, a `gradio.Blocks`. Arguments are those of [`DemoArguments`].

    Raises:
        ImportError: Gradio isn't installed.
        ValueError: The checkpoint can neither write nor find pictures.
    """
    gr = import_gradio()
    writer, finder, processor = load(checkpoint)
    is_behind = recorded_images_last(checkpoint) if images_last is None else images_last

    def chat(message: dict, turns: list[dict]) -> Iterator[tuple[list[dict], Any, str]]:
        with told():
            turns = [*turns, user_turn(message["text"], message["files"], is_behind)]
            conversation = conversation_of(turns)
            yield turns, gr.MultimodalTextbox(None, submit_btn=False, stop_btn=True), ""
            for text, looked in write(writer, processor, conversation, max_new_tokens):
                answer = {"role": "assistant", "content": [{"type": "text", "text": escape(text)}]}
                yield [*turns, answer], gr.skip(), looked

    def answer(task: str, message: dict, prompt: str | None = None) -> Iterator[tuple[str, str]]:
        with told():
            text = message["text"]
            if prompt is not None:
                if (place := place_in(task)) not in prompt:
                    raise ValueError(f"The prompt has no {place}, where the text goes")
                text = text and prompt.replace(place, text)
            conversation = conversation_of([user_turn(text, message["files"], is_behind)])
            yield from write(writer, processor, conversation, max_new_tokens)

    def find(text: str, files: list[str] | None, progress: Any = gr.Progress()) -> list:  # noqa: B008 gradio's way
        with told():
            if not text.strip() or not files:
                raise ValueError("Add pictures, and write what to find")
            found = []
            for path in progress.tqdm(files, desc="Reading"):
                try:
                    picture = read_picture(path)
                except ValueError as error:
                    gr.Warning(escape(f"Left out: {error}"))
                    continue
                value = score(writer, finder, processor, text, picture, is_behind)
                picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                found.append((value, picture, f"{Path(path).name} · {value:.2f}"))
            found.sort(key=lambda each: each[0], reverse=True)
            return [(picture, caption) for _, picture, caption in found[:NUM_FOUND]]

    def input_box(**kwargs: Any) -> Any:
        # Longer texts would become files
        options: dict[str, Any] = {"file_types": ["image"], "file_count": "multiple", "max_plain_text_length": 10**6}
        return gr.MultimodalTextbox(**options, show_label=False, **kwargs)

    quiet: dict[str, Any] = {"show_progress": "hidden"}  # the words that come are progress enough
    title = f"DuoStream · {Path(checkpoint).name if Path(checkpoint).is_dir() else checkpoint}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {escape(title)}")
        if writer:
            with gr.Tab("Chat"), gr.Row():
                with gr.Column(scale=3, min_width=300):
                    chat_options: dict[str, Any] = {
                        "render_markdown": False,
                        "allow_file_downloads": False,
                        "buttons": [],
                    }
                    chatbot = gr.Chatbot(height="55vh", show_label=False, **chat_options)
                    box = input_box(placeholder="Drop a picture, and ask about it")
                with gr.Column(scale=2, min_width=300):
                    looked = gr.HTML()
                asked = box.submit(chat, [box, chatbot], [chatbot, box, looked], **quiet, show_progress_on=looked)
                asked.then(lambda: gr.MultimodalTextbox(submit_btn=True, stop_btn=False), None, box)
                box.stop(None, cancels=asked)
            for task, label in TABS.items():
                with gr.Tab(label), gr.Row():
                    with gr.Column(scale=3, min_width=300):
                        prompts, place = [], place_in(task)
                        if place:
                            prompts = [gr.Textbox(TASKS[task].prompt, label=f"Prompt: {place} is your text")]
                            box = input_box(placeholder=place.strip("{}").capitalize())
                        else:
                            box = input_box(value={"text": TASKS[task].prompt, "files": []}, placeholder="Prompt")
                        output = gr.Textbox(label="Answer", lines=3, interactive=False)
                    with gr.Column(scale=2, min_width=300):
                        looked = gr.HTML()
                    inputs, outputs = [box, *prompts], [output, looked]
                    box.submit(partial(answer, task), inputs, outputs, **quiet, show_progress_on=looked)
        with gr.Tab("Find pictures"):
            pictures = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=200)
            folder = gr.UploadButton("Add a folder", file_count="directory", size="sm")
            query = gr.Textbox(label="What to find", submit_btn="Find")
            grid: dict[str, Any] = {"columns": 4, "fit_columns": False, "object_fit": "contain", "height": "auto"}
            gallery = gr.Gallery(label="Best first", interactive=False, **grid)
            how = "its image-text head" if finder else "how likely it is to write the text about each"
            gr.Markdown(f"The model ranks the pictures by {how}.")
            folder.upload(lambda old, new: [*(old or []), *new], [pictures, folder], pictures)
            query.submit(find, [query, pictures], gallery)
    return page


def launch(page: Any, **kwargs: Any) -> Any:
    """Serves the page; `kwargs` go to `gradio.Blocks.launch`."""
    from gradio.themes import Base

    theme = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(**LAUNCH, theme=theme, css=CSS, **kwargs)


def space_files(repo_id: str) -> dict[str, str]:
    """
    What a Space on the Hub needs to show the page of the model `repo_id`, by path: the app, its requirements, its
    card, and this package, so that the checkpoint's own code isn't trusted.

    Raises:
        ImportError: Gradio, whose version it names, isn't installed.
    """
    gradio = import_gradio()
    card = SpaceCardData(
        title=repo_id.split("/")[-1],
        sdk="gradio",
        sdk_version=gradio.__version__,
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        license="apache-2.0",
        models=[repo_id],
    )
    files = {
        "README.md": f"---\n{card.to_yaml()}\n---\n\nA page to try [{repo_id}](https://huggingface.co/{repo_id}).\n",
        "requirements.txt": "\n".join(line for line in requires("duostream") or () if "extra ==" not in line) + "\n",
        "app.py": APP.format(repo_id=repo_id),
    }
    for room in (
        "duostream",
        *(f"duostream.{name}" for name in ("configuration", "modeling", "processing", "scripts")),
    ):
        for path in sorted(Path(str(import_module(room).__file__)).parent.glob("*.*")):
            if path.suffix in (".py", ".jinja"):
                files[f"{room.replace('.', '/')}/{path.name}"] = path.read_text(encoding="utf-8")
    return files


OPTIONS = (DemoArguments,)


def main(args: list[str] | None = None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    if args and not args[0].startswith("-") and not args[0].endswith((".yaml", ".yml", ".json")):
        args.insert(0, "--checkpoint")
    (demo_args,) = parse(*OPTIONS, args=args, doc=__doc__)
    page = build(demo_args.checkpoint, demo_args.max_new_tokens, demo_args.images_last)
    launch(page, server_name=demo_args.host, server_port=demo_args.port)


if __name__ == "__main__":
    main()
