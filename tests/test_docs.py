"""Runs every code block of the pages, each page from top to bottom as a reader would, and the notebook."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import datasets
import nbformat
import pytest
from hub_server import running_hub
from nbclient import NotebookClient
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import train_tokenizer
from duostream.processing.chat_template_duostream import multimodal_chat_template
from duostream.scripts import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOK = ROOT / "scripts/notebooks/first_hour.ipynb"
OWN_DATA = ROOT / "docs/own_data.md"
# What makes the commands of a page quick, as the last of two equal options counts. All others are only parsed.
TRAINING = "--max_steps 1 --per_device_train_batch_size 2 --save_strategy no --report_to none --disable_tqdm true"
QUICK = {"compose": "", "finetune": f"{TRAINING} --use_cpu true", "evaluate": "--max_new_tokens 4"}


def blocks_of(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language, content, and the paragraph before, of each block."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"(?:((?:[^\n]+\n)+)\n)?```(\w+)\n(.*?)```", text, flags=re.DOTALL):
        yield found[2], found[3], found[1] or ""


def commands_of(block: str) -> Iterator[list[str]]:
    """The subcommands of `duostream` in a block, with their options."""
    for line in block.replace("\\\n", " ").splitlines():
        program, *args = shlex.split(line, comments=True)
        if program == "duostream":
            yield args


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the backbones that the pages name, small and random."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["Describe the picture. A dog runs through snow."], 400)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=9)
    text.num_attention_heads = text.num_key_value_heads = 4
    for part in (LlamaForCausalLM(text), tokenizer):
        part.save_pretrained("HuggingFaceTB/SmolLM2-135M")
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16
    )
    for part in (SiglipVisionModel(vision), SiglipImageProcessorPil(size={"height": 32, "width": 32})):
        part.save_pretrained("google/siglip-base-patch16-224")
    return tmp_path


@pytest.fixture
def others(workplace):
    """Models of other kinds, and a picture."""
    tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 16}
    text = LlamaConfig.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    tokenizer.add_tokens("<image>", special_tokens=True)
    text.vocab_size, text.tie_word_embeddings = len(tokenizer), False
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    template = multimodal_chat_template(None, "<image>")
    llava_processor = LlavaProcessor(image_processor, tokenizer, 16, "default", template, "<image>", 1)
    for part in (LlavaForConditionalGeneration(llava), llava_processor):
        part.save_pretrained("llava-hf/llava-1.5-7b-hf")
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, add_cross_attention=True)
    gpt2.bos_token_id = gpt2.eos_token_id = gpt2.pad_token_id = tokenizer.eos_token_id
    captioner = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**vision)), decoder=GPT2LMHeadModel(gpt2))
    captioner.config.decoder_start_token_id = captioner.config.pad_token_id = tokenizer.eos_token_id
    captioner.generation_config.decoder_start_token_id = tokenizer.eos_token_id
    for part in (captioner, image_processor, tokenizer):
        part.save_pretrained("nlpconnect/vit-gpt2-image-captioning")
    return workplace


def write_files(page: Path) -> None:
    """The files whose content a page shows, and the pictures that they name, but for those that aren't meant to be."""
    for language, content, before in blocks_of(page):
        if language not in ("json", "yaml"):
            continue
        for name in re.findall(r"`([\w/]+\.(?:jsonl|yaml))`", before):
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            for line in content.splitlines() if path.name == "metadata.jsonl" else ():
                picture = path.parent / json.loads(line)["file_name"]
                picture.parent.mkdir(exist_ok=True)
                Image.effect_noise((40, 30), 60).convert("RGB").save(picture)


def run_page(page: Path) -> dict:
    namespace: dict = {"__name__": "__main__"}
    for language, content, _ in blocks_of(page):
        if language == "python":
            exec(compile(content, page.name, "exec"), namespace)
        elif language == "bash":
            for command, *args in commands_of(content):
                if command in QUICK:
                    cli.main(["--debug", command, *args, *shlex.split(QUICK[command])])
    return namespace


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_the_options_they_name(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = [content for language, content, _ in blocks_of(page) if language == "bash"]
    for args in (args for block in blocks for args in commands_of(block)):
        # Parsed by the command itself, which then names what it doesn't know
        with pytest.raises(SystemExit) as ended:
            cli.main([*args, "--nonsense"])
        assert ended.value.code == 2
        assert "unrecognized arguments: --nonsense\n" in capsys.readouterr().err, args


def test_every_page_with_code_is_run_here():
    with_code = {
        page.stem for page in PAGES if any(language in ("python", "bash") for language, *_ in blocks_of(page))
    }
    # Its commands take minutes and real data, and so are only parsed
    with_code.remove("quality")
    assert with_code == {"own_data", "from_other_models", "fusion_depth", "rows_with_photographs", "large_data"}


@pytest.mark.slow
def test_the_page_on_own_data_runs(workplace):
    write_files(OWN_DATA)
    (workplace / "me").mkdir()
    (workplace / "me/pictures").symlink_to(workplace / "pictures")
    namespace = run_page(OWN_DATA)
    assert namespace["trainer"].state.global_step == 2
    assert len(namespace["rows"][0]["conversations"]) == 2
    bad_rows = [json.loads(line) for line in Path("runs/torn/bad_rows.jsonl").read_text().splitlines()]
    assert {row["row"] for row in bad_rows} == {1, 2}


@pytest.mark.slow
def test_the_page_on_other_models_runs(others):
    write_files(OWN_DATA)
    Image.new("RGB", (40, 30), "red").save("picture.jpg")
    namespace = run_page(ROOT / "docs/from_other_models.md")
    assert namespace["moved"].config.text_config.model_type == "gpt2"


@pytest.mark.slow
def test_the_page_on_the_fusion_depth_prints_what_it_shows(workplace, capsys):
    write_files(OWN_DATA)
    page = ROOT / "docs/fusion_depth.md"
    run_page(page)
    printed = capsys.readouterr().out
    (shown,) = [content for language, content, _ in blocks_of(page) if language == "text"]
    assert shown in printed
    # Four image tokens in the fusion layers alone
    assert "2 [9, 9, 5, 5, 5, 5, 5, 5, 5]" in printed


def test_the_page_on_large_data_prints_what_it_shows(capsys):
    page = ROOT / "docs/large_data.md"
    run_page(page)
    (shown,) = [content for language, content, _ in blocks_of(page) if language == "text"]
    assert capsys.readouterr().out == shown


def test_the_page_about_photographs_finds_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, number in (("train", "11"), ("validation", "22")):
        folder = tmp_path / "path/to/flickr8k" / split
        folder.mkdir(parents=True)
        metadata = {"image_id": number, "file_name": f"photographs/{number}_ab.jpg"}
        (folder / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        (tmp_path / "path/to/multi30k").mkdir(exist_ok=True)
        sentences = [{"en": f"a {name}", "de": f"ein {name}", "image": f"{name}.jpg"} for name in ("11", "22", "33")]
        lines = "".join(json.dumps(row) + "\n" for row in sentences)
        (tmp_path / "path/to/multi30k" / f"{split}.jsonl").write_text(lines)
    run_page(ROOT / "docs/rows_with_photographs.md")
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in Path(f"rows/{split}.jsonl").read_text().splitlines()]
        expected = ["train/photographs/11_ab.jpg", "validation/photographs/22_ab.jpg", None]
        assert [row["image"] for row in rows] == expected and [row["en"] for row in rows] == ["a 11", "a 22", "a 33"]


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )


@pytest.mark.slow
def test_the_notebook_runs_and_pushes(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in {"REPO_ID = None": 'REPO_ID = "me/first-hour"', "= 400, 200": "= 32, 5"}.items():
        assert name in notebook.cells[1].source
        notebook.cells[1].source = notebook.cells[1].source.replace(name, value)
    with running_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_ofNobody",
        }
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute(env=environment)
        files = set(hub.files("me/first-hour"))
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_duostream.py"} <= files
    printed, drawn = {}, {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        printed[cell.id] = "".join(output.text for output in outputs if output.get("name") == "stdout")
        drawn[cell.id] = sum("image/png" in output.get("data", {}) for output in outputs)
    assert printed["text-alone"] == "largest difference: 0.0\n"
    assert drawn["look"] == drawn["loss"] == drawn["attention"] == 1
    assert printed["push"].startswith("Pushed: ")
