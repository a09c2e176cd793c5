"""
Finds the library's own shared tests, which its source distribution carries and its wheel doesn't.

    python tests/conformance/library_tests.py   # fetches that of the installed version
"""

import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers
from PIL import Image

CACHE = Path(__file__).parents[2] / "build" / "conformance"
FOLDER = CACHE / f"transformers-{transformers.__version__}"
PACKAGE = "transformers_tests"


def fetch() -> None:
    """Downloads the source distribution of the installed transformers and unpacks its tests, once."""
    if FOLDER.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        # pip would otherwise fetch what builds the package, which is not to be built
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--disable-pip-version-check"]
        requirement = f"transformers=={transformers.__version__}"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, requirement], check=True
        )
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        # Left out, too; the configuration tester opens it
        (Path(folder) / FOLDER.name / "tests" / "__init__.py").touch()
        # Whole or not at all
        (Path(folder) / FOLDER.name).rename(FOLDER)


def stand_in(name: str, **attributes: object) -> None:
    """A module that the source distribution leaves out."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def install() -> None:
    """
    Makes `transformers_tests` importable, with stand-ins for what the source distribution leaves out.

    Raises:
        FileNotFoundError: They have not been fetched.
    """
    if not FOLDER.exists():
        raise FileNotFoundError(f"{FOLDER} is missing: `make conformance` fetches the tests of the library")
    if PACKAGE in sys.modules:
        return
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER / "tests")]
    sys.modules[PACKAGE] = package
    for name in ("exporters", "generation", "utils"):
        folder = types.ModuleType(f"{PACKAGE}.{name}")
        folder.__path__ = []
        sys.modules[folder.__name__] = folder
    stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    # Values that differ from the defaults, by which the configuration tester looks at common fields
    stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
    picture = CACHE / "picture.png"
    Image.new("RGB", (64, 48), "teal").save(picture)
    # The pictures are on the network; which one it is makes no difference
    stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(picture))


if __name__ == "__main__":
    fetch()
