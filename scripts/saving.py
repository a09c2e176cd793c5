"""How a checkpoint is saved: written aside, and moved to its place when it is whole."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

# The library uploads nothing whose name begins so
UNFINISHED = "_unfinished"


def sync(folder: Path) -> None:
    """Waits until the files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def publish(written: Path, place: Path) -> None:
    """
    Moves a folder that is written to its place, so that all of it is there or none, whenever the process ends. What
    stood there stays until then, where the file system lets folders change places: on Linux most do, NFS doesn't.
    """
    sync(written)
    if not (place.exists() and _exchange(written, place)):
        if place.exists():
            # A folder that is deleted where it stands is for a while half of one
            place.rename(written.parent / "replaced")
        written.rename(place)
    shutil.rmtree(written.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change places at once, for which Python has no call, and says whether the system did so."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def publish_files(written: Path, folder: Path) -> None:
    """
    Moves the files of a model that is written to a folder that has others. Its weights are taken away first and come
    last: without them nothing can be loaded, so new weights never stand beside an old config.
    """
    sync(written)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for path in sorted(written.iterdir(), key=lambda path: (".safetensors" in path.name, path.suffix == ".json")):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)
    shutil.rmtree(written.parent)
