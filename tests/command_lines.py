"""How options stand on the command line."""

from typing import Any


def arguments(**options: Any) -> list[str]:
    """Of each option its name and its value, or its values."""
    args: list[str] = []
    for name, value in options.items():
        args += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return args
