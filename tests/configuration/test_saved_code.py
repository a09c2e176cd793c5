"""A checkpoint brings its code along: it is loaded and saved again by a process that can't import `duostream`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tiny_models import roughen
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamConfig, DuoStreamForPreTraining, DuoStreamModel, DuoStreamProcessor, train_tokenizer
from duostream.configuration.saved_code_duostream import AUTO_MAP

LOAD = """
import json, sys
sys.modules["duostream"] = None  # an import fails
import torch
import transformers
from PIL import Image

folder, trust, again = sys.argv[1], sys.argv[2] == "trust", sys.argv[3]
auto_map = json.load(open(folder + "/config.json"))["auto_map"]
options = {"trust_remote_code": True} if trust else {}
processor = transformers.AutoProcessor.from_pretrained(folder, **options)
heads = {}
for name in auto_map:
    if name.startswith("AutoModel"):
        heads[name] = type(getattr(transformers, name).from_pretrained(folder, **options)).__name__
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
content = [{"type": "image", "image": Image.new("RGB", (30, 30), "red")}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
sequence = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
model.save_pretrained(again)
processor.save_pretrained(again)
assert not any(name.startswith("duostream.") for name in sys.modules)
print(json.dumps({"heads": heads, "sequence": sequence}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(["What is it? A red circle."] * 4, 300)
    config = DuoStreamConfig.from_preset("tiny", vocab_size=len(tokenizer), vision_config={"image_size": 24})
    image_processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    processor = DuoStreamProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    config.image_token_id = processor.image_token_id
    path = tmp_path_factory.mktemp("carried")
    torch.manual_seed(0)
    roughen(DuoStreamForPreTraining(config), scale=0.1).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def load_elsewhere(folder: Path, again: Path, trust: str = "trust") -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_MODULES_CACHE": str(again.with_name(f"{again.name}-modules"))}
    command = [sys.executable, "-c", LOAD, str(folder), trust, str(again)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, input="")


@pytest.mark.slow
def test_every_auto_class_loads_it_writes_the_same_and_is_saved_again(checkpoint: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image", "image": Image.new("RGB", (30, 30), "red")}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    heads = {name: reference.split(".")[1] for name, reference in AUTO_MAP.items() if name.startswith("AutoModel")}
    folder = checkpoint
    # Loaded, saved, and what was saved loaded and saved once more
    for number in range(2):
        finished = load_elsewhere(folder, tmp_path / str(number))
        assert finished.returncode == 0, finished.stderr[-3000:]
        found = json.loads(finished.stdout.splitlines()[-1])
        assert found == {"heads": heads, "sequence": expected}
        folder = tmp_path / str(number)
        code = {path.name: path.read_text() for path in checkpoint.glob("*.py")}
        assert code == {path.name: path.read_text() for path in folder.glob("*.py")}


@pytest.mark.slow
def test_without_trust_it_is_refused_in_the_library_s_words(checkpoint: Path, tmp_path: Path) -> None:
    finished = load_elsewhere(checkpoint, tmp_path / "again", trust="no trust")
    assert finished.returncode != 0
    assert "trust_remote_code=True" in finished.stderr and not (tmp_path / "again").exists()


def test_with_the_plugin_imported_its_own_classes_are_used(checkpoint: Path) -> None:
    for name, reference in AUTO_MAP.items():
        loaded = getattr(transformers, name).from_pretrained(checkpoint)
        assert type(loaded).__name__ == reference.split(".")[1]
        assert type(loaded).__module__.startswith("duostream.")


def test_a_class_that_somebody_registered_for_an_auto_class_stays_named(checkpoint: Path, tmp_path: Path) -> None:
    model = DuoStreamModel.from_pretrained(checkpoint)
    model.config.auto_map = {
        "AutoModel": "me/model--mine.MyModel",
        "AutoConfig": f"me/model--{AUTO_MAP['AutoConfig']}",
    }
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == {**AUTO_MAP, "AutoModel": "me/model--mine.MyModel"}


def test_a_config_that_is_written_elsewhere_writes_nothing_beside_it(tmp_path: Path) -> None:
    DuoStreamConfig.from_preset("tiny").to_json_file(tmp_path / "mine.json")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
