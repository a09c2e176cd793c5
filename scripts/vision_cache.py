"""What a frozen vision stream makes of the pictures: made once, and kept on disk for later epochs and runs."""

import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import datasets
import pyarrow
import pyarrow.compute
import torch
import transformers
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel

from ..processing import DuoStreamProcessor
from ..processing.data_collator_duostream import load_pictures
from .arguments import DataArguments, DuoStreamTrainingArguments
from .rows import UNDECODED
from .sources import Rows

# All that reads pictures and makes their states
PARTS = ("configuration", "modeling", "processing")
SOURCES = [
    Path(__file__),
    *(path for part in PARTS for path in sorted(Path(__file__).parents[1].glob(f"{part}/*.py"))),
]
SOURCE_DIGEST = sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()


def check_cacheable(args: DataArguments) -> None:
    """Raises `ValueError` where the options leave no pictures to read once, or the task reads them otherwise."""
    if args.streaming:
        raise ValueError("`cache_vision` reads all pictures before training: it goes without `streaming`")
    if args.blank_images:
        raise ValueError("`cache_vision` reads the pictures that are stored: it goes without `blank_images`")
    if args.task == "retrieval":
        raise ValueError("`cache_vision` is not for `task` 'retrieval', whose model reads pictures alone")


class StoredStates:
    """
    A format of `datasets`, by which rows have `image_features` when they are read: for each picture its states.

    Args:
        states (`Dataset`): With columns `states`, the bytes of each picture's states, and `checksum`, their CRC-32.
        shape (`tuple[int, int]`): Of a picture's states: `(image_seq_length, image_hidden_size)`.
        dtype (`torch.dtype`): Of the states; Arrow doesn't know all of them.

    Raises (when called):
        ValueError: The file holds other bytes than were written.
    """

    def __init__(self, states: Dataset, shape: tuple[int, int], dtype: torch.dtype):
        self.states, self.shape, self.dtype = states, shape, dtype

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "image_numbers" not in batch:
            return batch
        numbers = batch["image_numbers"]
        # Rows of a batch may be about the same picture
        wanted = sorted({number for row in numbers for number in row})
        stored = self.states[wanted] if wanted else {"states": [], "checksum": []}
        if [crc32(each) for each in stored["states"]] != stored["checksum"]:
            raise broken(Path(self.states.cache_files[0]["filename"]), "its states are not those that were written")
        found = {
            number: torch.frombuffer(bytearray(each), dtype=self.dtype).view(self.shape)  # (image_seq_length, hidden)
            for number, each in zip(wanted, stored["states"], strict=True)
        }
        others = {name: values for name, values in batch.items() if name != "image_numbers"}
        return {**others, "image_features": [[found[number] for number in row] for row in numbers]}


def broken(path: Path, reason: object) -> ValueError:
    """What is said of a file of states that can't be used."""
    return ValueError(f"{path} is broken, cut short or overwritten: {reason}. Delete it: pictures are then read anew")


def check_stored(path: Path, num_pictures: int, num_bytes: int) -> None:
    """
    Looks whether a file holds states of so many pictures, of so many bytes each, without reading them.

    Raises:
        ValueError: It doesn't. It is named.
    """
    try:
        table = Dataset.from_file(str(path)).data
        table.validate()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise broken(path, error) from error
    if table.num_rows != num_pictures:
        raise broken(path, f"it has states of {table.num_rows} pictures; expected {num_pictures}")
    sizes = pyarrow.compute.unique(pyarrow.compute.binary_length(table.column("states"))).to_pylist()
    if sizes != [num_bytes]:
        raise broken(path, f"states of a picture have {sizes} bytes; expected {num_bytes}")


@dataclass
class PictureLoader:
    """
    Loads the pictures that stand at an `index` among rows, at a `position` of theirs: `pixel_values` of a batch; or
    gives the error to raise. Raised in a worker it would be in a traceback's midst, and the workers would outlive it.
    """

    rows: Rows
    image_processor: BaseImageProcessor

    def __call__(self, places: list[dict[str, int]]) -> torch.Tensor | ValueError:
        chosen = self.rows[[place["index"] for place in places]]
        try:
            pictures = [
                load_pictures([images[place["position"]]], f"Row {row}")[0]
                for images, row, place in zip(chosen["images"], chosen["row"], places, strict=True)
            ]
        except ValueError as error:
            return error
        return self.image_processor(pictures, return_tensors="pt")["pixel_values"]


def batches_of(loader: DataLoader) -> Generator[torch.Tensor | ValueError]:
    """Starts its workers when the first batch is asked for: a process that finds the states on disk needs none."""
    yield from loader


def with_states(
    rows: Rows,
    model: PreTrainedModel,
    processor: DuoStreamProcessor,
    args: DuoStreamTrainingArguments,
    folder: str | os.PathLike | None = None,
) -> Rows:
    """
    Rows that have the vision stream's states of their pictures, as `image_features`, instead of the pictures. Each
    picture is read once, however many rows are about it, unless an earlier run has kept its states on disk: of the
    same pictures, weights and image processor.

    Args:
        rows (`Dataset`): With pictures in a column `images`, or without.
        model (`PreTrainedModel`): Its vision stream is frozen.
        processor (`DuoStreamProcessor`): Of the model.
        args (`DuoStreamTrainingArguments`): Device, batch size and `dataloader_num_workers` of the reading.
        folder (`str` or `os.PathLike`, *optional*, defaults to one in the cache of `datasets`): Where they are kept.

    Raises:
        ValueError: A picture can't be read, or the file of the states. Its row, or the file, is named.
    """
    if "images" not in rows.column_names:
        return rows
    if rows.features["images"] != List(UNDECODED):
        rows = rows.cast_column("images", List(UNDECODED))
    numbers: dict[Any, int] = {}
    places: dict[str, list[int]] = {"index": [], "position": []}
    image_numbers: list[list[int]] = []
    for index, images in enumerate(rows["images"]):
        image_numbers.append([])
        for position, image in enumerate(images or []):
            key = identity_of(image)
            if key not in numbers:
                numbers[key] = len(numbers)
                places["index"].append(index)
                places["position"].append(position)
            image_numbers[-1].append(numbers[key])
    base = model.base_model
    vision_model, image_processor = base.vision_model, processor.image_processor
    dtype = next(vision_model.parameters()).dtype
    fingerprint = Hasher.hash(
        [
            list(numbers),
            dict(vision_model.state_dict()),
            vision_model.config.to_diff_dict(),
            base.config.vision_feature_layer,
            base.config.spatial_merge_size,
            image_processor.to_dict(),
            str(dtype),
            transformers.__version__,
            SOURCE_DIGEST,
        ]
    )
    vision_model.to(args.device)
    base.projector.to(args.device)
    to_read = Dataset.from_dict(places)
    batches = batches_of(
        DataLoader(
            to_read,
            batch_size=args.per_device_eval_batch_size,
            collate_fn=PictureLoader(rows, image_processor),
            num_workers=args.dataloader_num_workers,
            # One of its own, so that all that is random is the same whether pictures are read or not
            generator=torch.Generator(),
        )
    )

    @torch.no_grad()
    def read(batch: dict[str, list]) -> dict[str, list]:
        pixel_values = next(batches)
        if isinstance(pixel_values, ValueError):
            raise pixel_values
        states = base.get_image_features(pixel_values.to(args.device), return_dict=True).last_hidden_state
        states = states.contiguous().cpu().view(torch.uint8).flatten(1)  # (num_images, bytes of a picture's states)
        written = [each.numpy().tobytes() for each in states]
        return {"states": written, "checksum": [crc32(each) for each in written]}

    # Named, as rows that were put together in memory have no place on disk beside which theirs would be kept
    folder = Path(folder or Path(datasets.config.HF_DATASETS_CACHE) / "duostream_vision")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{fingerprint}.arrow"
    shape = (base.config.image_seq_length, base.config.image_hidden_size)
    if path.exists() and len(to_read):
        check_stored(path, len(to_read), shape[0] * shape[1] * dtype.itemsize)
    with closing(batches), args.main_process_first(desc="reading pictures"):
        states = to_read.map(
            read,
            batched=True,
            batch_size=args.per_device_eval_batch_size,
            # Of all rows that are written at once Arrow counts the bytes in 32 bits
            writer_batch_size=args.per_device_eval_batch_size,
            remove_columns=list(places),
            features=Features({"states": Value("binary"), "checksum": Value("uint32")}),
            cache_file_name=str(path),
            new_fingerprint=fingerprint,
            desc="reading pictures",
        )
    # The pictures stay, but are never touched
    columns = [name for name in rows.column_names if name != "images"]
    rows = rows.add_column("image_numbers", image_numbers)
    return rows.with_transform(StoredStates(states, shape, dtype), columns=[*columns, "image_numbers"])


def identity_of(image: dict[str, Any] | None) -> Any:
    """By which pictures are told apart: the hash of their bytes, or the path, size and time of their file."""
    if image is None or image["bytes"] is image["path"] is None:
        return None  # reading it says so, and names the row
    if image["bytes"] is not None:
        return sha256(image["bytes"]).hexdigest()
    path = os.path.abspath(image["path"])
    try:
        found = os.stat(path)
    except OSError:
        return path  # as here
    return path, found.st_size, found.st_mtime_ns
