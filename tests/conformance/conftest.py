"""The library's shared tests, which `make conformance` fetches."""

import pytest

from . import library_tests

# Of the library's tests, declared in a file that the source distribution leaves out
MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)

library_tests.install()


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of the library's own tests")
