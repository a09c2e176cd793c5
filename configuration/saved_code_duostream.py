"""
The code that a saved checkpoint carries, so that `trust_remote_code=True` loads it where DuoStream isn't installed.
The Hub's loader takes files that lie side by side, and finds what they import of each other by reading their text:
modules that are carried are named `..._duostream` and import each other by `from ... import` at the start of a line.
"""

import re
from pathlib import Path
from typing import Any

# Which class each Auto class makes of a checkpoint, as `config.json` and `processor_config.json` name it
AUTO_MAP = {
    "AutoConfig": "configuration_duostream.DuoStreamConfig",
    "AutoProcessor": "processing_duostream.DuoStreamProcessor",
    "AutoModel": "modeling_duostream.DuoStreamModel",
    "AutoModelForImageTextToText": "modeling_duostream.DuoStreamForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_duostream.DuoStreamForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_duostream.DuoStreamForConditionalGeneration",
    "AutoModelForPreTraining": "heads_duostream.DuoStreamForPreTraining",
    "AutoModelForMaskedLM": "heads_duostream.DuoStreamForMaskedLM",
    "AutoModelForSequenceClassification": "heads_duostream.DuoStreamForSequenceClassification",
    "AutoModelForVisualQuestionAnswering": "heads_duostream.DuoStreamForSequenceClassification",
    "AutoModelForZeroShotImageClassification": "heads_duostream.DuoStreamForImageTextRetrieval",
}

_IMPORT = re.compile(r"^from \.+(?:\w+\.)?(\w+_duostream) import", flags=re.MULTILINE)
_WHOLE = "# The loader copies only the modules that a file names. All are named here: what is saved again is whole."


def is_foreign(reference: Any) -> bool:
    """Whether an `auto_map` names a class that isn't DuoStream's, in this folder or in a repository on the Hub."""
    own = isinstance(reference, str) and reference.split("--")[-1] in AUTO_MAP.values()
    return bool(reference) and not own


def save_code(folder: str | Path) -> None:
    """
    Writes the modules that `AUTO_MAP` names, and what they import of each other, into `folder`: side by side, with
    imports that say so. They come from where this module lies: from the package's folders, or from a checkpoint's.

    Raises:
        OSError: There is no such file, as in a package that was compiled or zipped.
    """
    here = Path(__file__).parent
    places = [here, *(here.parent / room for room in ("modeling", "processing"))]
    entries = sorted({reference.split(".")[0] for reference in AUTO_MAP.values()})
    names, code = list(entries), {}
    for name in names:
        path = next((path for place in places if (path := place / f"{name}.py").exists()), None)
        if path is None:
            raise OSError(f"A checkpoint carries its code, but {name}.py is not in {', '.join(map(str, places))}")
        code[name] = _IMPORT.sub(r"from .\1 import", path.read_text(encoding="utf-8"))
        names += dict.fromkeys(each for each in _IMPORT.findall(code[name]) if each not in names)
    for entry in entries:
        own, _, _ = code[entry].partition(_WHOLE)
        others = "".join(f"from .{name} import *\n" for name in sorted(names) if name != entry)
        code[entry] = f'{own}{_WHOLE}\n"""\n{others}"""\n'
    for name, text in code.items():
        (Path(folder) / f"{name}.py").write_text(text, encoding="utf-8")
