"""Where rows come from: files, folders, streams and data sets of the Hub, as `datasets` reads them."""

import glob
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from tarfile import TarError
from typing import Any, TypeAlias

import datasets
import pyarrow
from datasets import Dataset, Features, IterableDataset, Json, Value, load_dataset, load_dataset_builder
from datasets.data_files import _get_data_files_patterns, resolve_pattern
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import JsonConfig
from transformers.utils import logging
from transformers.utils.versions import require_version

from .arguments import DataArguments, check_unused
from .bad_rows import BadRows, broken_lines

logger = logging.get_logger(__name__)

# Else a server is told of each data set that is loaded, of local files, too
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

Rows: TypeAlias = Dataset | IterableDataset

# Columns of rows that are ready
CONVERSATIONS = ("messages", "prompt", "completion")

# By the types of files that each reads, in the order in which they are looked for: JSON may tell of Parquet and Arrow
BUILDERS = {
    "parquet": {".parquet"},
    "arrow": {".arrow"},
    "json": {".jsonl", ".json"},
    "webdataset": {".tar"},
}
# Versions of `datasets` from which on it reads rows without columns, and rows of an image folder without a picture
READS_EMPTY_LINES, READS_EMPTY_PICTURES = "4.8", "5.0"
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}
# `datasets` keeps what `map` returns under a hash of the function, in which functions of modules count by their names
# alone: with a hash of our code among its arguments it doesn't give back rows that another version of that has made
CODE = [path for part in ("scripts", "processing") for path in sorted(Path(__file__).parents[1].glob(f"{part}/*.py"))]
MADE_BY = {"made_by": sha256(b"".join(path.read_bytes() for path in CODE)).hexdigest()}


def load_source(args: DataArguments, split: str, bad_rows: BadRows | None = None) -> Rows:
    path = Path(args.dataset)
    options: dict[str, Any] = {"split": split, "streaming": args.streaming}
    try:
        if path.exists():
            check_unused(args, ["dataset_config"], f"{args.dataset!r} is here, and no data set of the Hub")
            rows = _load_files(path, options, bad_rows)
        else:
            rows = load_as_written(args.dataset, args.dataset_config, **options)
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise ValueError(f"`dataset` {args.dataset!r} has no rows in split {split!r}") from error
    return _patient(rows) if args.streaming else rows


def load_as_written(*args: Any, **options: Any) -> Rows:
    """
    What `load_dataset` loads, with conversations as they stand in JSON. Where some messages are texts and others lists
    of parts, `datasets` keeps both as `Json`, by which texts that are JSON, too (`12`, or `"STOP"` in quotes) are read
    as what they say; or, where the lists come late, lists as texts. Whole conversations, kept so, lose nothing.
    """
    source = {name: value for name, value in options.items() if name not in ("split", "streaming")}
    if load_dataset_builder(*args, **source).name != "json":
        return load_dataset(*args, **options)
    # The first rows tell the columns of all
    splits = load_dataset(*args, **source, streaming=True)
    rows = splits.get(re.split(r"[+\[]", options["split"])[0].strip(), next(iter(splits.values())))
    features = rows.features
    if features is None:  # of one array, which is read whole
        _, table = next(iter(rows._ex_iterable.iter_arrow()))
        features = Features.from_arrow_schema(table.schema)
    whole = {name: Json() for name in CONVERSATIONS if not isinstance(features.get(name, Value("null")), Value)}
    return load_dataset(*args, **options, **({"features": Features({**features, **whole})} if whole else {}))


def _patient(rows: IterableDataset) -> IterableDataset:
    """A stream that reads its shards by `read_patiently`, however it is dealt out over ranks and workers."""
    source = rows._ex_iterable
    while hasattr(source, "ex_iterable"):
        source = source.ex_iterable
    if isinstance(files := getattr(source, "kwargs", {}).get("metadata_files"), set):
        # An image folder's, which each process, and one that resumes, would read in an order of its own
        source.kwargs = {**source.kwargs, "metadata_files": sorted(files, key=str)}
    if hasattr(source, "generate_tables_fn"):
        source.generate_tables_fn = partial(read_patiently, partial(_valid_tables, source.generate_tables_fn))
    if hasattr(source, "generate_examples_fn"):
        source.generate_examples_fn = partial(read_patiently, source.generate_examples_fn)
    return rows


def _valid_tables(generate: Callable[..., Iterator[tuple[Any, pyarrow.Table]]], **shard: Any) -> Iterator[Any]:
    """The tables of a shard. Bytes that are no UTF-8 `datasets` passes over, and who reads the row fails."""
    for key, table in generate(**shard):
        table.validate(full=True)
        yield key, table


def read_patiently(generate: Callable[..., Iterator[Any]], **shard: Any) -> Iterator[Any]:
    """
    What `generate` reads from a shard. If the shard can't be read, it is opened again a moment later and read on from
    where it was left: so often, and after so long, as `datasets` does where a connection is lost
    (`datasets.config.STREAMING_READ_MAX_RETRIES` and `STREAMING_READ_RETRY_INTERVAL`).

    Raises:
        OSError: The shard didn't come back. It is named.
        ValueError: It is broken.
    """
    max_tries, seconds = datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RETRY_INTERVAL
    paths = [each for value in shard.values() if isinstance(value, list) for each in value if isinstance(each, str)]
    name = ", ".join(dict.fromkeys(paths)) or "A shard"
    num_read = num_tries = 0
    was_away = False
    while True:
        try:
            for item in islice(generate(**shard), num_read, None):
                num_read, num_tries = num_read + 1, 0
                yield item
            return
        except (OSError, ValueError, TarError) as error:
            if not was_away and not isinstance(error, OSError):
                # Broken, while one that is just being put back may be half a file
                raise ValueError(f"{name}: {error}") from error
            was_away = True
            # Of a lost connection `datasets` has tried it so often
            num_tries = max_tries if isinstance(error, ConnectionError) else num_tries + 1
            if num_tries >= max_tries:
                raise OSError(
                    f"{name} can't be read, after {num_tries} tries, {seconds} s apart: {error}. Expected it to stay "
                    "as long as it is streamed: put it back, and start again"
                ) from error
            logger.warning(f"{name} can't be read: {error}. Try {num_tries + 1} of {max_tries} follows in {seconds} s")
            time.sleep(seconds)


def _load_files(path: Path, options: dict[str, Any], bad_rows: BadRows | None) -> Rows:
    builder, splits = _files_of(path, options["split"])
    if bad_rows is not None:
        path, splits = _readable(path, builder, splits, options, bad_rows)
    # `datasets` takes names for patterns: of `a[1].jsonl` it would read `a1.jsonl`
    data_files = {name: [glob.escape(file) for file in files] for name, files in splits.items()}
    is_image_folder = builder == "imagefolder"
    source: dict[str, Any] = {"data_dir": glob.escape(str(path))} if is_image_folder else {"data_files": data_files}
    if builder == "json" and "parse_agent_traces" in JsonConfig.__dataclass_fields__:
        source["parse_agent_traces"] = False  # Rows may look like one by what else they tell
    try:
        rows = (load_as_written if builder == "json" else load_dataset)(builder, **source, **options)
        if builder == "json" and isinstance(rows, Dataset):
            # It passes over bytes that are no UTF-8, and who reads the row fails. Of a gigabyte it takes a second.
            rows.data.validate(full=True)
    except (ValueError, TypeError, OSError, DatasetGenerationError) as error:
        # The library's message names no file, or no row
        for _, _, reason in broken_lines(chain(*_lines_read(path, builder, splits).values())):
            raise reason from error
        if isinstance(error, OSError):
            raise
        told = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise ValueError(f"{path}: {told or error}") from error
    return rows


def _lines_read(path: Path, builder: str, splits: dict[str, list[str]]) -> dict[str, list[Path]]:
    """The files with lines that are read for each split. Of an image folder these are all splits."""
    if path.is_file():
        return {name: [path] for name in splits}
    is_image_folder = builder == "imagefolder"
    splits = _splits_of(path, {".jsonl", *ImageFolder.EXTENSIONS}) if is_image_folder else splits
    return {
        name: [
            path / file.relative_to(path.resolve())
            for file in map(Path, files)
            if builder == "json" or (is_image_folder and file.name == "metadata.jsonl")
        ]
        for name, files in splits.items()
    }


def _readable(
    path: Path, builder: str, splits: dict[str, list[str]], options: dict[str, Any], bad_rows: BadRows
) -> tuple[Path, dict[str, list[str]]]:
    """Where the rows are and the files of each split, or, if some of their lines can't be read, those of a copy."""
    lines = _lines_read(path, builder, splits)
    broken: dict[Path, dict[int, str]] = defaultdict(dict)
    for file, row, error in broken_lines(dict.fromkeys(chain(*lines.values()))):
        broken[file][row] = str(error)
    if not broken:
        return path, splits
    first = next(iter(next(iter(broken.values())).values()))
    needed = READS_EMPTY_PICTURES if builder == "imagefolder" else READS_EMPTY_LINES
    require_version(f"datasets>={needed}", f"To leave out what can't be read it is needed: {first}")
    wanted = {part.split("[")[0] for part in options["split"].split("+")}
    files = {name: each for name, each in lines.items() if name in wanted}
    # Of JSON it isn't known how many rows it holds, nor in which order an image folder's metadata files are read
    is_ordered = all(file.suffix == ".jsonl" for file in chain(*files.values()))
    if not wanted <= set(files):
        return path, splits  # the library says which there are
    if is_ordered and (builder == "json" or options["streaming"] or all(len(each) == 1 for each in files.values())):
        bad_rows.number_broken(broken, files, options["split"])
    else:
        bad_rows.tell_broken(chain(*(broken[file].values() for file in chain(*files.values()) if file in broken)))
    copy = bad_rows.without_broken_lines(path, broken)
    if path.is_file():
        return copy, {name: [str(copy)] for name in splits}
    place = path.resolve()
    return copy, {name: [str(copy / Path(file).relative_to(place)) for file in each] for name, each in splits.items()}


def _files_of(path: Path, split: str) -> tuple[str, dict[str, list[str]]]:
    """Which builder of `datasets` reads a file or folder, and the files of each split; none of an image folder."""
    names = {part.split("[")[0] for part in split.split("+")}
    files = [path] if path.is_file() else list(_data_files(file for file in path.rglob("*") if file.is_file()))
    suffixes = {file.suffix.lower() for file in files}
    # Pictures lie beside the tables that name them. JSON may be such a table, but often tells of other things
    has_table = any(suffixes & known - {".json"} for known in BUILDERS.values())
    has_metadata = any(file.name in ImageFolder.METADATA_FILENAMES for file in files)
    if path.is_dir() and suffixes & set(ImageFolder.EXTENSIONS) and (has_metadata or not has_table):
        return "imagefolder", {}
    if path.is_file() and len(names) > 1:
        raise ValueError(f"`dataset` {str(path)!r} is a file, which is one split, not {split!r}")
    found = {
        # A file is one split, whatever its name
        builder: {name: [str(path)] for name in names} if path.is_file() else _splits_of(path, known)
        for builder, known in BUILDERS.items()
        if suffixes & known
    }
    if not any(found.values()):
        raise ValueError(
            f"`dataset` {str(path)!r} has files of types {sorted(suffixes)}; expected pictures with a "
            "metadata file, JSONL, Parquet, Arrow, or WebDataset's tar files"
        )
    # Those with all the splits that are wanted come first
    builder, splits = max(found.items(), key=lambda each: (names <= set(each[1]), bool(each[1])))
    if path.is_dir() and names <= set(splits):
        _warn_of_splits(path, files, found, splits, names)
    if names <= set(splits):
        # Of the wanted ones alone: others may have other columns and classes, or lines that are broken
        splits = {name: splits[name] for name in names}
        left_out = sorted(
            str(Path(file).relative_to(path.resolve()))
            for other, others in found.items()
            for name in names & set(others)
            for file in others[name]
            # JSON often tells of other files
            if other != builder and Path(file).suffix.lower() != ".json"
        )
        if left_out:
            logger.warning(
                f"`dataset` {str(path)!r} has files of several types, of which {builder} is read; not read: {left_out}"
            )
    return builder, splits


def _warn_of_splits(
    path: Path,
    files: Sequence[Path],
    found: dict[str, dict[str, list[str]]],
    splits: dict[str, list[str]],
    names: set[str],
) -> None:
    """Warns of files that are in no split by their names, which nobody reads, or, of the wanted ones, in several."""
    known = {str(Path(file).relative_to(path.resolve())) for each in found.values() for file in chain(*each.values())}
    tables = set().union(*BUILDERS.values()) - {".json"}  # JSON often tells of other files
    types = {file: (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix.lower() for file in files}
    relative = [file.relative_to(path) for file in files if types[file] in tables]
    # What is hidden is meant to be passed over
    shown = [str(file) for file in relative if not any(part.startswith((".", "__")) for part in file.parts)]
    if unread := sorted(set(shown) - known):
        logger.warning(
            f"`dataset` {str(path)!r}: not read, by the names that files and folders of splits have, or for their "
            f"type: {unread}"
        )
    for file in sorted({file for name in names for file in splits[name]}):
        if len(several := [str(name) for name in splits if file in splits[name]]) > 1:
            logger.warning(
                f"`dataset` {str(path)!r}: by its name {str(Path(file).relative_to(path.resolve()))!r} is in the "
                f"splits {several}, so its rows are read in each; rename it if it is of one"
            )


def _data_files(files: Iterable[Path]) -> Iterator[Path]:
    """The files without those that `map`, `filter` and `shuffle` cached beside what `save_to_disk` wrote."""
    listed: dict[Path, set[str] | None] = {}
    for file in files:
        if file.suffix.lower() == ".arrow":
            if file.parent not in listed:
                listed[file.parent] = _saved_files(file.parent)
            names = listed[file.parent]
            if names is not None and file.name not in names:
                continue
        yield file


def _saved_files(folder: Path) -> set[str] | None:
    """
    The names of the files with the rows that `save_to_disk` wrote into a folder; `None` if it wrote nothing there.

    Raises:
        ValueError: What it wrote is broken, or not all there.
    """
    path = folder / datasets.config.DATASET_STATE_JSON_FILENAME
    if not path.is_file():
        return None
    try:
        names = {each["filename"] for each in json.loads(path.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} doesn't tell which files beside it hold the rows, as `save_to_disk` has it"
        ) from error
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{path} names {missing}, which are not beside it: save the data set again")
    return names


def _splits_of(folder: Path, suffixes: set[str]) -> dict[str, list[str]]:
    """The files of these types in each split, by the names that `datasets` knows splits by."""

    def find(pattern: str) -> list[str]:
        try:
            paths = resolve_pattern(pattern, glob.escape(str(folder.resolve())))
        except FileNotFoundError:
            return []
        return [str(path) for path in _data_files(map(Path, paths)) if path.suffix.lower() in suffixes]

    # Not the public `get_data_patterns`, for which a folder of pictures may be a split
    try:
        patterns = _get_data_files_patterns(find)
    except FileNotFoundError:
        # It passes over files that tell of others, such as `dataset_info.json`
        return {}
    # A name may fit several patterns of one split, as `validation_dev.jsonl` does
    return {name: list(dict.fromkeys(path for each in patterns[name] for path in find(each))) for name in patterns}
