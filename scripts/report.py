"""Reports: one HTML file each, with its plots and pictures inside."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
import torch
from datasets import Dataset
from jinja2 import Environment, PackageLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..processing.data_collator_duostream import load_picture

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
        `torch.Tensor` of shape `(rows, columns)`: the mean over the fusion stack's layers and heads of the attention
        of the token that predicts the answer, over the square grid of image tokens. Sums up to 1 or, where it attended
        to text too, less.
    """
    # Only the eager implementation returns attentions
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": result["prompt"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    attention = torch.stack(outputs.attentions).mean(dim=(0, 2))[0, -1]  # (seq_len,)
    attention = attention[inputs["input_ids"][0] == processor.image_token_id]  # (image_seq_length,)
    side = int(attention.numel() ** 0.5)
    return attention[-side * side :].view(side, side)  # (rows, columns)


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
        attention=[(embed(draw_attention(*example)), example[1]) for example in attention],
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
        pictures = [[load_picture(image) for image in rows[result["row"]]["images"]] for result in chosen]
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
    return results[:: max(1, len(results) // number)][:number]


def draw_histogram(scores: list[float]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
    axis.hist(scores, bins=20)
    axis.set(xlabel="score", ylabel="rows")
    return figure


def draw_losses(losses: dict[str, list[tuple[int, float]]]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(losses), figsize=(4.5 * len(losses), 3), layout="constrained", squeeze=False)
    for axis, (stage, curve) in zip(axes[0], losses.items(), strict=True):
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    return figure


def draw_accuracies(metrics: dict[str, Any]) -> plt.Figure:
    """Exact answers of each kind of question: with the picture, and with a blank one in its place."""
    kinds = [name for name in metrics["held_out_scenes"] if name != "exact_match"]
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    for offset, (group, label) in enumerate((("held_out_scenes", "picture"), ("blank_picture", "blank picture"))):
        values = [100 * metrics[group][kind] for kind in kinds]
        bars = axis.bar([i + 0.4 * offset for i in range(len(kinds))], values, width=0.38, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks([i + 0.2 for i in range(len(kinds))], [kind.removeprefix("exact_match_") for kind in kinds])
    axis.set(ylabel="exact answers (%)", ylim=(0, 112))
    axis.legend(loc="lower right")
    return figure


def draw_attention(picture: PIL.Image.Image, result: dict[str, Any], attention: torch.Tensor) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(5, 2.6), layout="constrained")
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


def embed(picture: plt.Figure | PIL.Image.Image) -> str:
    """A figure or picture as a `data:` address."""
    buffer = BytesIO()
    if isinstance(picture, PIL.Image.Image):
        picture.convert("RGB").save(buffer, format="PNG")
    else:
        picture.savefig(buffer, format="png", dpi=110)
        plt.close(picture)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
