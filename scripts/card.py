"""
The card of a checkpoint: filled from what training and `duostream evaluate` wrote, so that a figure in it is one that
was measured, and without paths of this machine.
"""

import csv
import json
import math
import platform
import re
import shlex
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from string import Formatter
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, Trainer
from transformers.integrations import CodeCarbonCallback
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.utils import logging

from ..configuration import DuoStreamConfig
from ..processing.data_collator_duostream import load_picture
from .arguments import DataArguments
from .long_runs import TrainingTime
from .report import draw_losses, pick
from .tasks import TASKS, task_of, with_defaults

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).parent / "model_card.md"
CARD, RUN, CURVE = "README.md", "run.json", "training_curve.png"
# What pushing again replaces, beside the card
PICTURES = (CURVE, "sample_*_*_*.png")
MARK = "\n<!-- filled by duostream "  # and the hash of what stands before
PICTURE_SIDE = 192  # pixels at most
NUM_SPREAD, NUM_WORST = 4, 2
# Options of `duostream evaluate` that name folders or files
PATHS = {"checkpoint", "output_dir", "dataset", "image_dir", "mixture"}

# What loads a checkpoint of each class, and what the Hub calls that
HEADS = {
    "DuoStreamForConditionalGeneration": ("AutoModelForImageTextToText", "image-text-to-text"),
    "DuoStreamForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "DuoStreamForImageTextRetrieval": ("AutoModelForZeroShotImageClassification", "zero-shot-image-classification"),
    "DuoStreamForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "DuoStreamForPreTraining": ("AutoModel", "feature-extraction"),
    "DuoStreamModel": ("AutoModel", "feature-extraction"),
}


def source_of(args: DataArguments, split: str) -> dict[str, str | None]:
    """What a data set is called, and whether it is drawn here (`scenes`), on the Hub (`hub`), or a file (`local`)."""
    path = Path(args.dataset)
    kind = "scenes" if args.dataset == "scenes" else "local" if path.exists() else "hub"
    name = path.resolve().name if kind == "local" else args.dataset
    return {"name": name, "kind": kind, "config": args.dataset_config, "split": split}


def rows_of(rows: Any) -> dict[str, Any] | None:
    """How many rows there are, and the fingerprint of what was read and how; a stream has neither."""
    if rows is None:
        return None
    num_rows = len(rows) if hasattr(rows, "__len__") else None
    return {"num_rows": num_rows, "fingerprint": rows._fingerprint if isinstance(rows, Dataset) else None}


def prompt_of(data: DataArguments) -> str:
    """What is asked in training, with `{name}` where a row's column is filled in."""
    data = with_defaults(data)
    if data.prompt_column:
        return f"{{{data.prompt_column}}}"
    asked = ""
    # Of a template, in which braces that are text are written twice
    for text, name, form, conversion in Formatter().parse(data.prompt or ""):
        marks = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        asked += text if name is None else f"{text}{{{name}{marks}}}"
    return asked


def processor_name(device: torch.device) -> str:
    """What trained: the name of the GPU, or of the CPU with the threads that it was given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def energy_of(trainer: Trainer) -> dict[str, float] | None:
    """What CodeCarbon has just measured, if it has: an older file may lie there, too."""
    is_measured = any(isinstance(each, CodeCarbonCallback) for each in trainer.callback_handler.callbacks)
    path = Path(str(trainer.args.output_dir)) / "emissions.csv"
    if not is_measured or not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    # It has the place of the machine, too
    return {name: float(last[name]) for name in ("energy_consumed", "emissions", "duration")}


def time_of(trainer: Trainer) -> dict[str, float] | None:
    """How long training took, if it was counted, and from which steps on: see [`TrainingTime`]."""
    for each in trainer.callback_handler.callbacks:
        if isinstance(each, TrainingTime):
            return {name: getattr(each, name) for name in ("seconds", "since_step", "resumed_at")}
    return None


def write_run(trainer: Trainer, data: DataArguments | None = None) -> None:
    """
    Writes what a card tells of a training run into `run.json` in its folder. The library's `trainer_state.json` names
    folders of this machine, and is no part of it.

    Args:
        trainer (`Trainer`): After training.
        data (`DataArguments`, *optional*): Where the rows came from, which the rows themselves don't tell.
    """
    args, config, rows = trainer.args, trainer.model.config, trainer.train_dataset
    metric_rows = getattr(trainer, "metric_rows", None)
    is_written = metric_rows is not None and task_of(trainer.task).is_generative
    # What was loaded and is no folder here came from the Hub
    name = str(getattr(trainer, "began_with", None) or config.name_or_path)
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    earlier = read_run(Path(name)) if name and not is_on_hub else {}
    is_known = not name or earlier.get("are_sources_all", False)
    parts = [data, *data.mixture_parts] if data is not None else []
    record = {
        "base_models": [name]
        if is_on_hub
        else getattr(config, "base_models", None) or earlier.get("base_models") or [],
        "sources": [{**source_of(part, part.train_split), "task": part.task} for part in parts],
        # What the weights that it began with had learnt from, as far as it is known, and whether that is all
        "sources_before": [*(earlier.get("sources_before") or []), *earlier.get("sources", [])],
        "are_sources_before_all": is_known,
        "are_sources_all": is_known and data is not None,
        # Text as it is answers no prompt
        "prompt": prompt_of(data) if data is not None and data.task != "masked" else None,
        "images_last": data is not None and data.images_last,
        "reads_pictures": "images" in (getattr(rows, "column_names", None) or ["images"]),
        "train": rows_of(rows),
        "evaluation": rows_of(trainer.eval_dataset),
        "metric_rows": None if metric_rows is None else len(metric_rows),
        "max_new_tokens": args.max_new_tokens if is_written else None,
        "hyperparameters": extract_hyperparameters_from_trainer(trainer)
        | {
            name: value
            for name in ("freeze", "learning_rates")
            if (value := getattr(args, name, None)) not in ([], "{}")
        },
        "log_history": trainer.state.log_history,
        "hardware": processor_name(args.device),
        "ranks": args.world_size,
        "time": time_of(trainer),
        "energy": energy_of(trainer),
        "num_parameters": trainer.model.num_parameters(),
        "versions": {name: version(name) for name in ("duostream", "transformers", "torch", "datasets")},
    }
    (Path(str(args.output_dir)) / RUN).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """What [`write_run`] wrote; nothing where it didn't."""
    path = folder / RUN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def weights_fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """By which a card tells figures of these weights from those of others: of the base model, and of each head."""
    base = model.base_model
    parts = {} if base is model else {name: part for name, part in model.named_children() if part.state_dict()}
    found = {}
    for part_name, part in {**parts, model.base_model_prefix: base}.items():
        digest = sha256()
        for name, weight in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        found[part_name] = digest.hexdigest()[:16]
    return found


def are_same_weights(ones: dict[str, str], others: dict[str, str]) -> bool:
    """Whether fingerprints agree. Heads that only one model has were new there, or aren't asked for."""
    return all(others[name] == fingerprint for name, fingerprint in ones.items() if name in others)


def pick_samples(results: list[dict]) -> list[dict]:
    """Rows that a card shows: some spread over all, and those that score lowest."""
    worst = sorted(results, key=lambda result: result["score"])[:NUM_WORST]
    return [result for result in pick(results, NUM_SPREAD) if result not in worst] + worst


def save_samples(folder: Path, rows: Any, results: list[dict]) -> None:
    """Saves the pictures of the rows that a card may show, small and as `samples/ROW_NUMBER.png`."""
    folder = folder / "samples"
    for old in folder.glob("*.png"):
        old.unlink()  # of other rows, whose numbers may be the same
    if not isinstance(rows, Dataset) or "images" not in rows.column_names:
        return
    for result in pick_samples(results):
        for i, image in enumerate(rows[result["row"]]["images"] or ()):
            folder.mkdir(exist_ok=True)
            picture = load_picture(image).convert("RGB")
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            picture.info.clear()  # a photograph's tells where and when it was taken
            picture.save(folder / f"{result['row']}_{i}.png")


def as_text(value: Any, max_chars: int = 300) -> str:
    """
    A row's text, in a line or a cell of a table, as it is. Some readers of Markdown make links of addresses whatever
    is escaped in them, but in code none makes links, pictures, tags or formulas of anything.
    """
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join((text if len(text) <= max_chars else text[:max_chars] + " …").split())
    # A bar would end the cell in code, too
    return r"\|".join(_as_code(part) for part in text.split("|"))


def _as_code(text: str) -> str:
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Of a space at each end the reader takes both away, and a backtick at an end would lengthen the fence
    pad = " " if text.strip() and (text[0] in "` " or text[-1] in "` ") else ""
    return fence + pad + text + pad + fence


def without_folders(command: Sequence[str]) -> list[str]:
    """
    Arguments of `duostream evaluate`. Of a path that begins at the root, at home or above, its last name alone; what
    other options have is text, which may begin so, too.
    """
    shown, is_path = [], True  # a file of options may come first
    for argument in command:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if option:
            is_path = option.removeprefix("--").replace("-", "_") in PATHS
        is_outside = is_path and (value.startswith(("~", "..")) or Path(value).is_absolute())
        shown.append(option + equals + (Path(value).name if is_outside else value))
    return shown


def read_evaluation(folder: Path) -> dict[str, Any]:
    """
    What `duostream evaluate` wrote into a folder, as a card shows it.

    Raises:
        ValueError: There is nothing of it, or it is of a version that did not say of which weights it is.
    """
    path = folder / "metrics.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "weights_fingerprints" not in record:
        raise ValueError(f"`evaluations` has {str(folder)!r}; expected an `output_dir` of `duostream evaluate`")
    with open(folder / "predictions.jsonl", encoding="utf-8") as lines:
        samples = pick_samples([json.loads(line) for line in lines])
    for sample in samples:
        # Of retrieval the number of the picture, as that which was found
        sample["expected"] = next(sample[name] for name in ("reference", "label", "row") if name in sample)
        sample["pictures"] = sorted((folder / "samples").glob(f"{sample['row']}_*.png"))
    is_figure = {name: isinstance(value, float) and math.isfinite(value) for name, value in record.items()}
    return {
        **record,
        "command": shlex.join(["duostream", "evaluate", *without_folders(record["command"])]),
        "figures": {name: record[name] for name in record if is_figure[name] and name != "seconds"},
        "samples": samples,
    }


def eval_results(record: dict[str, Any]) -> list[EvalResult]:
    """The figures of an evaluation for the card's `model-index`."""
    source = record["data"]
    # The Hub takes nothing else for a data set's name
    dataset_type = source["name"] if source["kind"] == "hub" else re.sub(r"[^A-Za-z0-9._-]+", "-", source["name"])
    return [
        EvalResult(
            task_type=TASKS[record["task"]].hub_name,
            task_name=record["task"],
            dataset_type=dataset_type,
            dataset_name=source["name"],
            dataset_config=source["config"],
            dataset_split=source["split"],
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in record["figures"].items()
    ]


def is_by_hand(path: Path) -> bool:
    """Whether a card is not as [`write_card`] left it: somebody wrote it, or changed it since."""
    if not path.exists():
        return False
    text, _, mark = path.read_text(encoding="utf-8").rpartition(MARK)
    return mark != f"{sha256(text.encode()).hexdigest()} -->\n"


def write_card(
    folder: Path,
    evaluations: Sequence[Path] = (),
    output_dir: Path | None = None,
    repo_id: str | None = None,
    **metadata: Any,
) -> bool:
    """
    Fills the card of a checkpoint, and saves it as `README.md` with its pictures beside it.

    Args:
        folder (`Path`): Of the model, with the `run.json` of its training if there was any.
        evaluations (`Sequence[Path]`, *optional*): Folders that `duostream evaluate` wrote. Their rows that
            [`pick_samples`] picks are shown, with their pictures.
        output_dir (`Path`, *optional*): Where to write to, by default `folder`.
        repo_id (`str`, *optional*): Where it is on the Hub.
        metadata: More of the header: `license`, `language`, `tags`, ...

    Returns:
        `bool`: Whether it did: a card that somebody wrote or changed is left as it is, which is logged.
    """
    output_dir = output_dir or folder
    path = output_dir / CARD
    if is_by_hand(path):
        logger.warning(f"{path} was written or changed by hand: it is left as it is")
        return False
    config = DuoStreamConfig.from_pretrained(folder)
    run = read_run(folder)
    auto_class, pipeline_tag = HEADS.get((config.architectures or [""])[0], HEADS["DuoStreamModel"])
    records = [read_evaluation(each) for each in evaluations]
    for number, record in enumerate(records):
        for sample in record["samples"]:
            names = {f"sample_{number}_{picture.name}": picture for picture in sample["pictures"]}
            for name, picture in names.items():
                copyfile(picture, output_dir / name)
            sample["pictures"] = list(names)
    title = (repo_id or folder.resolve().name).split("/")[-1]
    card = ModelCard.from_template(
        _header(run, config, records, pipeline_tag, title, **metadata),
        template_path=str(TEMPLATE),
        config=config,
        run=run,
        records=records,
        curve=_draw_curve(run, output_dir),
        measured=_measured(run),
        num_worst=NUM_WORST,
        auto_class=auto_class,
        checkpoint=repo_id,
        title=title,
        as_text=as_text,
    )
    text = str(card)
    path.write_text(f"{text}{MARK}{sha256(text.encode()).hexdigest()} -->\n", encoding="utf-8", newline="\n")
    return True


def _header(
    run: dict[str, Any],
    config: DuoStreamConfig,
    records: list[dict],
    pipeline_tag: str,
    name: str,
    **metadata: Any,
) -> ModelCardData:
    sources = [*(run.get("sources_before") or []), *run.get("sources", [])]
    base_models = run.get("base_models") or getattr(config, "base_models", None)
    energy = run.get("energy")
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag,
        "tags": ["duostream", "vision-language-model", *(metadata.pop("tags", None) or [])],
        "base_model": base_models or None,
        "datasets": sorted({source["name"] for source in sources if source["kind"] == "hub"}) or None,
    }
    if run.get("are_sources_all") and not base_models and {source["kind"] for source in sources} == {"scenes"}:
        # All of it is ours: of other data, the license of the weights is for whoever trained them to say
        fields |= {"license": "apache-2.0", "language": ["en"]}
    if energy is not None:
        resumed_at = (run.get("time") or {}).get("resumed_at")
        source = f"CodeCarbon, from step {resumed_at} on" if resumed_at else "CodeCarbon"
        fields["co2_eq_emissions"] = {"emissions": round(1000 * energy["emissions"], 3), "source": source}
    if results := [result for record in records for result in eval_results(record)]:
        fields |= {"model_name": name, "eval_results": results}
    return ModelCardData(**fields | {name: value for name, value in metadata.items() if value})


def _draw_curve(run: dict[str, Any], output_dir: Path) -> str | None:
    """The name of the picture, if there is a curve to draw."""
    log = run.get("log_history", [])
    curves = {
        title: [(entry["step"], float(entry[name])) for entry in log if name in entry]
        for title, name in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    curves = {title: curve for title, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    draw_losses(curves).savefig(output_dir / CURVE, dpi=110)
    return CURVE


def _measured(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The last figures of the evaluations while training, by the rows that they are of."""
    figures = {
        name.removeprefix("eval_"): value
        for entry in run.get("log_history", [])
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    }
    of_all = "the evaluation rows"
    of_some = of_all
    if num_rows := run.get("metric_rows"):
        of_some = f"the first {num_rows} rows of the evaluation split"
        if run["max_new_tokens"] is not None:
            of_some += f", with answers of at most {run['max_new_tokens']} tokens"
    measured: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        measured.setdefault(of_all if name.endswith("loss") else of_some, {})[name] = value
    return measured
