"""Settings for all tests: no network, one seed, no progress bars."""

import functools
import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# And trackio, which would keep the tests' runs in the home folder
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    # The workers of xdist wait for the process that hands them the tests: it runs none, so it imports none of these
    if session.config.pluginmanager.has_plugin("dsession"):
        return

    import dill.detect
    import torch
    import transformers
    from hypothesis import settings

    import duostream  # noqa: F401  registers the Auto classes

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(min(2, torch.get_num_threads()))

    # `datasets` disassembles each function that one given to `map` calls, at every `map`: once is enough
    dill.detect.nestedglobals = functools.cache(dill.detect.nestedglobals)

    # The models are the slow part, not the drawing; and a run must find what the last one found.
    settings.register_profile("duostream", deadline=None, derandomize=True, database=None)
    settings.load_profile("duostream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Modules with the most slow tests come first: the last one would keep one worker at work, the others idle
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    # `Trainer` collects garbage whenever it trains, and would look through all that the libraries made each time
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"])


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or with others."""
    import transformers

    transformers.set_seed(0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, empty, and a cache of its own for the data sets."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.chdir(tmp_path_factory.mktemp("workplace"))
        yield Path.cwd()
