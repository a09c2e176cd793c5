"""Reports: one HTML file each, with its plots and pictures inside."""

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ..processing import DuoStreamProcessor
from ..processing.data_collator_duostream import load_picture
from .answering import prompt_inputs

PICTURE_SIDE = 144  # pixels on the page
NUM_SHOWN = 12


def attended_tokens(checkpoint: Path, picture: PIL.Image.Image, result: dict[str, Any]) -> torch.Tensor:
    """
    How much the first token of an answer attended to each image token.

    Args:
        checkpoint (`Path`): Folder of the model.
        picture (`PIL.Image.Image`): What the question is about.
        result (`dict`): With `prompt`, the question.

    Returns:
        `torch.Tensor` of shape `(rows, columns)`: see [`attention_to_pictures`].
    """
    # Only the eager implementation returns attentions
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    content = [{"type": "image", "image": picture}, {"type": "text", "text": result["prompt"]}]
    inputs = prompt_inputs(AutoProcessor.from_pretrained(checkpoint), [[{"role": "user", "content": content}]])
    # Whatever is answered is not read
    return attention_to_pictures(model, inputs, new_tokens=inputs["input_ids"][:, :1])[0, 0]


@torch.no_grad()
def attention_to_pictures(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], new_tokens: torch.Tensor
) -> torch.Tensor:
    """
    How much each token of an answer, in the position that predicts it, attended to each image token.

    Args:
        model ([`DuoStreamForConditionalGeneration`]): With `attn_implementation="eager"`.
        inputs (`Mapping`): The prompt, one row with a picture or more.
        new_tokens (`torch.LongTensor` of shape `(1, num_tokens)`): The answer.

    Returns:
        `torch.Tensor` of shape `(num_tokens, num_images, rows, columns)`: the mean over the fusion stack's layers and
        heads, over each picture's square grid of image tokens. Of each token it sums up to 1 or, where it attended to
        text too, less.
    """
    num_tokens = new_tokens.shape[1]
    # The last token predicts nothing
    whole = {"input_ids": torch.cat([inputs["input_ids"], new_tokens[:, :-1]], dim=1)}
    if "token_type_ids" in inputs:
        whole["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, num_tokens - 1), value=1)
    outputs = model(**whole, pixel_values=inputs["pixel_values"], output_attentions=True, use_cache=False)
    attention = torch.stack([layer[0, :, -num_tokens:].mean(dim=0) for layer in outputs.attentions]).mean(dim=0)
    attention = attention[:, whole["input_ids"][0] == model.config.image_token_id].float()
    attention = attention.unflatten(1, (-1, model.config.image_seq_length))  # (num_tokens, num_images, image_seq)
    side = int(attention.shape[-1] ** 0.5)
    # Behind a class token, where there is one
    return attention[..., -side * side :].unflatten(-1, (side, side))  # (num_tokens, num_images, rows, columns)


def show_attention(
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    pictures: list[PIL.Image.Image],
    inputs: Mapping[str, torch.Tensor],
    new_tokens: torch.Tensor,
) -> str:
    """
    Where an answer looked, as HTML: the pictures as the model sees them, and an overlay for each token.

    Args:
        model, inputs, new_tokens: See [`attention_to_pictures`].
        processor ([`DuoStreamProcessor`]): Of the model.
        pictures (`list[PIL.Image.Image]`): Of the prompt.
    """
    maps = attention_to_pictures(model, inputs, new_tokens).cpu()  # (num_tokens, num_images, rows, columns)
    seen = processor.image_processor(pictures, do_rescale=False, do_normalize=False, return_tensors="pt")
    strip = side_by_side(seen["pixel_values"].clamp(0, 255)).byte()  # (channels, height, num_images * width)
    tokens = [
        {"text": text, "share": float(heat.sum()), "heat": embed(draw_heat(heat))}
        for text, heat in zip(pieces_of(processor, new_tokens[0]), maps, strict=True)
        if text
    ]
    return render(
        "attention.html.jinja",
        picture=embed(PIL.Image.fromarray(strip.permute(1, 2, 0).numpy())),
        width=strip.shape[2],
        height=strip.shape[1],
        num_pictures=len(pictures),
        mean=embed(draw_heat(maps.mean(dim=0))),
        tokens=tokens,
    )


def side_by_side(pictures: torch.Tensor) -> torch.Tensor:
    """`(num_images, ..., height, width)` as `(..., height, num_images * width)`."""
    return torch.cat(tuple(pictures), dim=-1)


def draw_heat(heat: torch.Tensor) -> PIL.Image.Image:
    """Attention of shape `(num_images, rows, columns)` in colours, from none to the most there is in it."""
    colors = matplotlib.colormaps["magma"]((side_by_side(heat) / heat.max().clamp(min=1e-9)).numpy(), bytes=True)
    return PIL.Image.fromarray(np.ascontiguousarray(colors[..., :3]))


def pieces_of(processor: DuoStreamProcessor, tokens: torch.Tensor) -> list[str]:
    """What each token adds to the text: nothing, where it is a special one or a part of a character."""
    pieces, text = [], ""
    for end in range(1, len(tokens) + 1):
        longer = processor.decode(tokens[:end], skip_special_tokens=True)
        is_whole = not longer.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(longer[len(text) :] if is_whole else "")
        text = longer if is_whole else text
    return pieces


def write_report(
    path: Path,
    metrics: dict[str, Any],
    losses: dict[str, list[tuple[int, float]]],
    shown: list[tuple[PIL.Image.Image, dict[str, Any]]],
    attention: list[tuple[PIL.Image.Image, dict[str, Any], torch.Tensor]],
) -> None:
    """
    Writes the report.

    Args:
        path (`Path`): The HTML file.
        metrics (`dict`): What `metrics.json` holds.
        losses (`dict`): For each stage its steps and losses.
        shown (`list`): Pictures, and their results with `prompt`, `reference` and `prediction`.
        attention (`list`): Pictures, results, and what `attended_tokens` gave.
    """
    page = render(
        "report.html.jinja",
        metrics=metrics,
        losses=embed(draw_losses(losses)),
        accuracies=embed(draw_accuracies(metrics)),
        shown=[(embed(enlarge(picture)), result) for picture, result in shown],
        attention=[(embed(draw_attention(picture, weights)), result) for picture, result, weights in attention],
        picture_side=PICTURE_SIDE,
    )
    path.write_text(page, encoding="utf-8")


def write_evaluation(path: Path, task: str, record: dict[str, Any], rows: Dataset, results: list[dict]) -> None:
    """
    Writes the report of an evaluation: figures, how the rows' scores are spread, some rows, and the worst.

    Args:
        path (`Path`): The HTML file.
        task (`str`): What was evaluated.
        record (`dict`): What `metrics.json` holds.
        rows (`Dataset`): With `images`, where there are any.
        results (`list`): Of the rows, each with `row` and `score`.
    """

    def with_pictures(chosen: list[dict]) -> list[tuple[list[str], dict]]:
        if "images" not in rows.column_names:
            return [([], result) for result in chosen]
        pictures = [[load_picture(image) for image in rows[result["row"]]["images"] or ()] for result in chosen]
        return [([embed(picture) for picture in own], result) for own, result in zip(pictures, chosen, strict=True)]

    page = render(
        "evaluation.html.jinja",
        task=task,
        record=record,
        histogram=embed(draw_histogram([result["score"] for result in results])),
        spread=with_pictures(pick(results, NUM_SHOWN)),
        worst=with_pictures(sorted(results, key=lambda result: result["score"])[:NUM_SHOWN]),
        picture_side=PICTURE_SIDE,
    )
    path.write_text(page, encoding="utf-8")


def render(template: str, **kwargs: Any) -> str:
    environment = Environment(loader=PackageLoader("duostream.scripts", "."), autoescape=True)
    return environment.get_template(template).render(**kwargs)


def pick(results: list[dict], number: int) -> list[dict]:
    """Rows spread evenly over all."""
    number = min(number, len(results))
    return [results[i * len(results) // number] for i in range(number)]


def new_figure(*args: int, figsize: tuple[float, float], **kwargs: Any) -> tuple[Figure, Any]:
    """
    A figure and its axes, as `pyplot.subplots` makes them, but without `pyplot`: that has one backend for the whole
    process, which may be a notebook's, and keeps figures until they are closed.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*args, **kwargs)


def draw_histogram(scores: list[float]) -> Figure:
    figure, axis = new_figure(figsize=(6, 2.6))
    axis.hist(scores, bins=20)
    axis.set(xlabel="score", ylabel="rows")
    return figure


def draw_losses(losses: dict[str, list[tuple[int, float]]]) -> Figure:
    figure, axes = new_figure(1, len(losses), figsize=(4.5 * len(losses), 3), squeeze=False)
    for axis, (stage, curve) in zip(axes[0], losses.items(), strict=True):
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    return figure


def draw_accuracies(metrics: dict[str, Any]) -> Figure:
    """Exact answers of each kind of question: with the picture, and with a blank one in its place."""
    kinds = [name for name in metrics["held_out_scenes"] if name != "exact_match"]
    figure, axis = new_figure(figsize=(9, 3))
    for offset, (group, label) in enumerate((("held_out_scenes", "picture"), ("blank_picture", "blank picture"))):
        values = [100 * metrics[group][kind] for kind in kinds]
        bars = axis.bar([i + 0.4 * offset for i in range(len(kinds))], values, width=0.38, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks([i + 0.2 for i in range(len(kinds))], [kind.removeprefix("exact_match_") for kind in kinds])
    axis.set(ylabel="exact answers (%)", ylim=(0, 112))
    axis.legend(loc="lower right")
    return figure


def draw_attention(picture: PIL.Image.Image, attention: torch.Tensor) -> Figure:
    figure, (left, right) = new_figure(1, 2, figsize=(5, 2.6))
    left.imshow(picture)
    right.imshow(picture)
    width, height = picture.size
    heat = right.imshow(attention, cmap="magma", alpha=0.65, extent=(0, width, height, 0))
    figure.colorbar(heat, ax=right, shrink=0.8)
    for axis in (left, right):
        axis.set_axis_off()
    return figure


def enlarge(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture.resize((PICTURE_SIDE, PICTURE_SIDE), PIL.Image.Resampling.NEAREST)


def embed(picture: Figure | PIL.Image.Image) -> str:
    """A figure or picture as a `data:` address."""
    buffer = BytesIO()
    if isinstance(picture, PIL.Image.Image):
        picture.convert("RGB").save(buffer, format="PNG")
    else:
        picture.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
