"""Runs the README's Python blocks one after the other, as a reader would, and the examples of the docstrings."""

import doctest
import re
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.testing_utils import HfDocTestParser

import duostream
from duostream import DuoStreamConfig, DuoStreamForConditionalGeneration, DuoStreamProcessor, train_tokenizer

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an untrained checkpoint where the quickstart would leave its own, and two backbones."""
    tokenizer = train_tokenizer(["How many objects are there? 1 2 3"] * 9, vocab_size=400)
    config = DuoStreamConfig.from_preset("tiny", vocab_size=len(tokenizer))
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 48, "width": 48}), tokenizer, image_seq_length=config.image_seq_length
    )
    for part in (DuoStreamForConditionalGeneration(config), processor):
        part.save_pretrained(tmp_path / "runs/quickstart/finetuned")
    text_config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=9, num_attention_heads=4
    )
    LlamaForCausalLM(text_config).save_pretrained(tmp_path / "HuggingFaceTB/SmolLM2-135M")
    vision_config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16
    )
    AutoModel.from_config(vision_config).save_pretrained(tmp_path / "google/siglip-base-patch16-224")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pushed(monkeypatch):
    """What would go to the Hub, which is out of reach: the names of the files of each repository."""
    files: dict[str, set[str]] = {}

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        files.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return files


def test_every_python_block_of_the_readme_runs_in_order(folder, pushed, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    # One after the other in one namespace: later blocks use what earlier ones define
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["trainer"].state.global_step == 2
    expected = {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "modeling_duostream.py"}
    assert expected <= pushed["me/my-duostream"]


def test_the_examples_in_docstrings_run(folder):
    Image.new("RGB", (48, 48), "red").save(folder / "scene.png")
    finder = doctest.DocTestFinder(parser=HfDocTestParser())
    examples = {
        test.name: test
        for name in duostream.__all__
        # A class that inherits a docstring has the same example as its parent
        for test in finder.find(getattr(duostream, name), name, globs={})
        if test.examples
    }
    assert {"DuoStreamConfig", "DuoStreamForConditionalGeneration.forward"} <= set(examples)
    for test in examples.values():
        results = doctest.DocTestRunner().run(test)
        assert results.attempted and not results.failed, test.name


def test_the_api_page_shows_every_public_name():
    page = (README.parent / "docs/index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: duostream\.(\w+)$", page, flags=re.MULTILINE)) == sorted(duostream.__all__)


def test_the_commands_of_the_readme_are_targets_and_scripts_that_exist():
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), flags=re.MULTILINE))
    scripts = (README.parent / "pyproject.toml").read_text()
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
    for command in set(re.findall(r"duostream-[a-z]+", text)) - {"duostream-generation"}:
        assert f"{command} = " in scripts
