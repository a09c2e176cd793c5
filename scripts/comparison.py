"""Runs several sides in turn, and writes down how they compare: as JSON, as a table and as a plot."""

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .report import new_figure

Row = dict[str, Any]

# `cpu` leaves out what other processes take; with several threads it is the sum of theirs
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PROCESS = Path("/proc/self")


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timer(run: Callable[[], Any], clock: str) -> Callable[[], float]:
    """A function that runs another and returns the seconds it took."""

    def timed() -> float:
        started = CLOCKS[clock]()
        run()
        synchronize()
        return CLOCKS[clock]() - started

    return timed


def in_turn(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each run measures, all in turn (A B C, C B A, ...), so that all meet the machine in the same moods."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name in list(runs) if i % 2 else reversed(list(runs)):
            value = runs[name]()
            # The first round warms up
            if i > 0:
                measured[name].append(value)
    return measured


def compare(seconds: dict[str, list[float]], ours: str, theirs: str, names: Sequence[str] = ("ours", "theirs")) -> Row:
    """Median seconds of two sides, and median and quartiles of how many times as long theirs took, round by round."""
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        f"seconds_{names[0]}": statistics.median(seconds[ours]),
        f"seconds_{names[1]}": statistics.median(seconds[theirs]),
        "ratio": middle,
        "ratio_quartile_1": low,
        "ratio_quartile_3": high,
    }


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """The most memory that a run held at once beyond what was held before; on a CPU, `None` outside of Linux."""
    gc.collect()
    if device != "cpu":
        # `torch.accelerator` has these from torch 2.9 on
        memory = torch.get_device_module(torch.device(device))
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        run()
        return memory.max_memory_allocated() - before
    if not PROCESS.exists():
        return None
    # What was freed goes back to the system first, or it would be used again unseen
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")  # sets the peak back: man 5 proc
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def record_of(part: str, command: Sequence[str], arguments: Any) -> dict[str, Any]:
    """What is written beside the figures: what was measured, with which options, threads and versions."""
    return {
        "part": part,
        "command": command,
        "arguments": asdict(arguments),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("duostream", "transformers", "torch", "pillow")},
    }


def check_clock(clock: str) -> None:
    """Raises `ValueError` if there is no such clock."""
    if clock not in CLOCKS:
        raise ValueError(f"`clock` is {clock!r}; there are {', '.join(map(repr, CLOCKS))}")


def check_repeats(repeats: int) -> None:
    """Raises `ValueError` if a ratio that is measured so often has no quartiles."""
    if repeats < 2:
        raise ValueError(f"`repeats` is {repeats}; expected 2 or more, for quartiles")


def write_rows(path: Path, record: dict[str, Any], rows: Iterable[Row]) -> None:
    """
    Writes `record` with the rows as JSON, and beside it a Markdown table, which is printed, too, and a plot.

    Args:
        path (`Path`): The JSON file.
        record (`dict`): What was measured, and with what.
        rows (`Iterable`): Figures, each with a `ratio` and the bar it has `at_least` or `at_most`, or `None`.

    Raises:
        ValueError: The file's name doesn't end in `.json`, or there are no figures.
    """
    if path.suffix != ".json":
        raise ValueError(
            f"`output` is {str(path)!r}; expected a name that ends in .json, beside which table and plot go"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    measured: list[Row] = []
    for row in rows:
        measured.append(row)
        print(json.dumps(row), flush=True)
        # After each, so that what was measured is never lost
        path.write_text(json.dumps({**record, "rows": measured}, indent=2) + "\n")
    if not measured:
        raise ValueError("Nothing to measure: the options leave no case")
    table = as_table(measured)
    print(f"\n{table}")
    path.with_suffix(".md").write_text(table)
    draw(measured).savefig(path.with_suffix(".png"), dpi=120)


def as_table(rows: Sequence[Row]) -> str:
    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([shown(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Each row's ratio with its quartiles, and its bar."""
    fields = [name for name, value in rows[0].items() if not isinstance(value, float) and "bytes" not in name]
    varied = [name for name in fields if len({row[name] for row in rows}) > 1 and not name.startswith("at_")]
    labels = [", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in varied if row[name]) for row in rows]
    ratios = [row["ratio"] for row in rows]
    spread = [[row["ratio"] - row.get("ratio_quartile_1", row["ratio"]) for row in rows]]
    spread += [[row.get("ratio_quartile_3", row["ratio"]) - row["ratio"] for row in rows]]
    figure, axis = new_figure(figsize=(10, 1 + 0.25 * len(rows)))
    axis.barh(range(len(rows)), ratios, xerr=spread, color="tab:blue", ecolor="black")
    for i, row in enumerate(rows):
        bar = row.get("at_least", row.get("at_most"))
        if bar is not None:
            axis.vlines(bar, i - 0.4, i + 0.4, color="tab:red", linewidth=2)
    axis.axvline(1, color="gray", linewidth=1)
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="ratio (median and quartiles); red: the bar")
    return figure
