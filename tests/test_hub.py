"""Pushed by the real client, over HTTP, to a small Hub of the tests' own, and loaded from there."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, Repository, running_hub
from tiny_models import LLAMA, SIGLIP, roughen
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamForConditionalGeneration, DuoStreamProcessor, train_tokenizer
from duostream.scripts import evaluate, push

pytestmark = pytest.mark.slow

TOKEN = "hf_aTokenThatNobodyMaySee"
WHOLE = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "configuration_duostream.py",
    "modeling_duostream.py",
    "heads_duostream.py",
    "processing_duostream.py",
}

PUSH = """
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
import duostream

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
if len(sys.argv) > 3:
    model.lm_head.weight.data.mul_(float(sys.argv[3]))
model.push_to_hub(sys.argv[2])
AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
"""

LOAD = """
import json, sys
name, revision, has_plugin, trust = sys.argv[1:]
if has_plugin == "plugin":
    import duostream
else:
    sys.modules["duostream"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor

options = {"revision": revision, **({"trust_remote_code": True} if trust == "trust" else {})}
model = AutoModelForImageTextToText.from_pretrained(name, **options).eval()
processor = AutoProcessor.from_pretrained(name, **options)
inputs = processor(text="What is it?", return_tensors="pt")
sequence = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
print(json.dumps([sequence, type(model).__module__, float(model.lm_head.weight.mean())]))
"""

TRAIN = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from duostream import DuoStreamDataCollator
from duostream.scripts.arguments import DuoStreamTrainingArguments
from duostream.scripts.trainer import DuoStreamTrainer

processor = AutoProcessor.from_pretrained(sys.argv[1])
row = {
    "images": [Image.new("RGB", (16, 16), "red")],
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "completion": [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
}
arguments = DuoStreamTrainingArguments(
    sys.argv[2], max_steps=2, save_steps=1, push_to_hub=True, hub_model_id=sys.argv[3], report_to="none", use_cpu=True
)
trainer = DuoStreamTrainer(
    model=AutoModelForImageTextToText.from_pretrained(sys.argv[1]),
    args=arguments,
    data_collator=DuoStreamDataCollator(processor),
    train_dataset=[row] * 4,
    processing_class=processor,
)
trainer.train()
trainer.push_to_hub()
"""

CARDS = """
import sys
from huggingface_hub import HfApi, ModelCard
from duostream.scripts import push

options = ["--checkpoint", sys.argv[1], "--repo_id", "me/card"]
for more in (["--evaluations", sys.argv[2]], ["--license", "mit"]):
    push.main([*options, *more])
    ModelCard.load("me/card").validate()
HfApi().upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="me/card")
push.main(options)
push.main([*options, "--evaluations", sys.argv[2]])
"""

ADAPT = """
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from duostream.scripts import push

def base():
    return AutoModelForImageTextToText.from_pretrained("me/base")

folder, ids = sys.argv[1], torch.tensor([[5, 6, 7]])
lora = LoraConfig(
    target_modules=r".*fusion_model.*(q_proj|v_proj)", modules_to_save=["projector"], init_lora_weights=False
)
adapted = get_peft_model(base(), lora).eval()
adapted.save_pretrained(folder)
AutoProcessor.from_pretrained("me/base").save_pretrained(folder)
open(folder + "/optimizer.pt", "w").close()
push.main(["--checkpoint", folder, "--repo_id", "me/adapter"])
loaded = PeftModel.from_pretrained(base(), "me/adapter").eval()
AutoProcessor.from_pretrained("me/adapter")
assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
assert not torch.equal(loaded(input_ids=ids).logits, base().eval()(input_ids=ids).logits)
"""

USE = """
import re, sys
from pathlib import Path
from huggingface_hub import hf_hub_download

sys.modules["duostream"] = None
text = Path(hf_hub_download("me/card", "README.md", revision=sys.argv[1])).read_text()
exec(re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)[0])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Composed of backbones that lie on this machine, with an optimizer's states beside."""
    path = tmp_path_factory.mktemp("pushed")
    tokenizer = train_tokenizer(["What is it? A red circle."] * 4, 300)
    torch.manual_seed(0)
    text = LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer), "num_hidden_layers": 3})
    roughen(LlamaForCausalLM(text)).save_pretrained(path / "text")
    roughen(SiglipVisionModel(SiglipVisionConfig(**SIGLIP))).save_pretrained(path / "vision")
    processor = DuoStreamProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer)
    model = DuoStreamForConditionalGeneration.from_backbones(
        str(path / "text"), str(path / "vision"), num_fusion_layers=1, image_token_id=processor.image_token_id
    )
    processor.image_seq_length = model.config.image_seq_length
    model.save_pretrained(path)
    processor.save_pretrained(path)
    (path / "optimizer.pt").write_bytes(b"states")
    return path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a program whose Hub this is, in a home of its own."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }

    def run(program: str, *args: object) -> subprocess.CompletedProcess:
        what = ["-c", program] if "\n" in program else ["-m", program]
        command = [sys.executable, *what, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, input="")

    return run


def check_clean(hub: Hub, *private: object) -> None:
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            names = {Path(name).name for name in files}
            assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} & names
            for name, data in files.items():
                assert not any(str(each).encode() in data for each in (TOKEN, *private)), name


def test_what_is_pushed_is_whole_and_loads_in_three_ways(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess], checkpoint: Path, tmp_path: Path
) -> None:
    for extra in ([], ["2"]):
        pushed = run(PUSH, checkpoint, "me/model", *extra)
        assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert set(hub.files("me/model")) >= WHOLE
    check_clean(hub, checkpoint, tmp_path)
    mine = run(LOAD, "me/model", "main", "plugin", "no trust")
    assert mine.returncode == 0, mine.stderr[-3000:]
    sequence, module, mean = json.loads(mine.stdout.splitlines()[-1])
    assert module == "duostream.modeling.modeling_duostream"
    trusted = run(LOAD, "me/model", "main", "no plugin", "trust")
    assert trusted.returncode == 0, trusted.stderr[-3000:]
    found = json.loads(trusted.stdout.splitlines()[-1])
    assert found[0] == sequence and found[1].startswith("transformers_modules.me.model.")
    refused = run(LOAD, "me/model", "main", "no plugin", "no trust")
    assert refused.returncode != 0 and "trust_remote_code=True" in refused.stderr
    # A revision that is pinned stays what it was. The first commit made the repository, two are the first push
    first = list(hub.repositories["me/model"].commits)[2]
    pinned = run(LOAD, "me/model", first, "no plugin", "trust")
    assert pinned.returncode == 0, pinned.stderr[-3000:]
    assert json.loads(pinned.stdout.splitlines()[-1])[2] == pytest.approx(mean / 2)


def test_the_trainer_pushes_what_it_trained_and_none_of_its_states(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess], checkpoint: Path, tmp_path: Path
) -> None:
    trained = run(TRAIN, checkpoint, tmp_path / "run", "me/trained")
    assert trained.returncode == 0, trained.stderr[-3000:]
    files = set(hub.files("me/trained"))
    assert files >= WHOLE | {"README.md", "run.json"} and not files & {"training_args.bin", "trainer_state.json"}
    assert b'checkpoint = "me/trained"' in hub.files("me/trained")["README.md"]
    # What was recorded goes with it where it is pushed by itself, too
    pushed = run("duostream.scripts.push", "--checkpoint", tmp_path / "run", "--repo_id", "me/again")
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert hub.files("me/again")["run.json"] == (tmp_path / "run" / "run.json").read_bytes()
    check_clean(hub, checkpoint, tmp_path)
    loaded = run(LOAD, "me/trained", "main", "no plugin", "trust")
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_the_push_command_uploads_shards_in_one_commit_or_nothing(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "card.md").write_text(
        "---\nlicense: apache-2.0\n---\n# Mine\n\n![It](it.png) ![Not](../home/not.png)\n"
    )
    (tmp_path / "it.png").write_bytes(b"a picture that the card shows")
    options = ["--checkpoint", checkpoint, "--repo_id", "me/shards", "--max_shard_size", "50KB"]
    options += ["--card", tmp_path / "card.md", "--revision", "first"]
    hub.refuses_uploads = True
    refused = run("duostream.scripts.push", *options)
    assert refused.returncode != 0 and "403 Forbidden" in refused.stderr
    assert set(hub.files("me/shards")) == {".gitattributes"} == set(hub.files("me/shards", "first"))
    hub.refuses_uploads = False
    pushed = run("duostream.scripts.push", *options)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert pushed.stdout.strip().splitlines()[-1].startswith(f"{hub.address}/me/shards/commit/")
    files = hub.files("me/shards", "first")
    assert set(files) >= (WHOLE - {"model.safetensors"}) | {"README.md", "it.png", "model.safetensors.index.json"}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert len(hub.repositories["me/shards"].commits) == 2
    # Whole again, in place of the shards, which must not stay beside; what is somebody's own stays
    others = {"handler.py": b"", "lora/adapter_model.safetensors": b"", "onnx/config.json": b""}
    # Of the training of other weights
    stale = {"run.json": b"{}"}
    hub.repositories["me/shards"].add("first", others | stale)
    whole = [*options[:4], "--revision", "first", "--json", "true"]
    pushed = run("duostream.scripts.push", *whole)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert set(json.loads(pushed.stdout.splitlines()[-1])) == {"card", "commit"}
    files = hub.files("me/shards", "first")
    assert set(files) >= WHOLE | set(others) | {"README.md"}
    assert not set(files) & {"model.safetensors.index.json", "run.json"}
    assert {name for name in files if name.startswith("model")} == {"model.safetensors", "modeling_duostream.py"}
    check_clean(hub, checkpoint, tmp_path)
    loaded = run(LOAD, "me/shards", "first", "no plugin", "trust")
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_a_card_is_filled_and_a_card_that_was_changed_on_the_hub_stays(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess], checkpoint: Path, tmp_path: Path
) -> None:
    options = {"checkpoint": checkpoint, "output_dir": tmp_path / "figures", "max_eval_rows": 1, "max_new_tokens": 2}
    evaluate.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    pushed = run(CARDS, checkpoint, tmp_path / "figures")
    lines = pushed.stdout.splitlines()
    assert lines[0] == f"The card was filled from {checkpoint}, {tmp_path / 'figures'}", pushed.stderr[-3000:]
    assert lines[-2] == "The card of 'me/card' was written or changed there, and stays as it is: `card` replaces it"
    assert pushed.returncode != 0 and "`evaluations` is for a card that is filled" in pushed.stderr
    measured, licensed, _, last = [
        (number, files) for number, files in hub.repositories["me/card"].commits.items() if "README.md" in files
    ]
    card = measured[1]["README.md"].decode()
    names = re.findall(r"!\[A picture of row \d+\]\((\w+\.png)\)", card)
    assert names and set(names) == {name for name in measured[1] if name.endswith(".png")}
    assert 'checkpoint = "me/card"' in card and "exact_match" in card
    # Those of the card before
    assert not any(name.endswith(".png") for name in licensed[1]) and b"license: mit" in licensed[1]["README.md"]
    assert last[1]["README.md"] == b"# Mine" and set(last[1]) >= WHOLE
    check_clean(hub, checkpoint, tmp_path)
    used = run(USE, measured[0])
    assert used.returncode == 0 and used.stdout.strip(), used.stderr[-3000:]


def test_an_adapter_is_pushed_with_its_processor_and_card_and_loads_onto_its_base_model(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess], checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="it makes the adapter")
    assert run(PUSH, checkpoint, "me/base").returncode == 0
    hub.repositories["me/adapter"] = Repository()
    hub.repositories["me/adapter"].add("main", {"model.safetensors": b"of somebody", "adapter_config.json": b"old"})
    pushed = run(ADAPT, tmp_path / "adapter")
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert f"The card is {tmp_path / 'adapter' / 'README.md'}" in pushed.stdout
    assert "README.md has the heading of PEFT's blank template" in pushed.stderr
    files = hub.files("me/adapter")
    whole = {"config.json", "generation_config.json"}
    processor = {"processor_config.json", "tokenizer.json", "chat_template.jinja", "processing_duostream.py"}
    assert set(files) >= {"adapter_config.json", "adapter_model.safetensors", "README.md"} | processor
    assert not set(files) & whole and files["model.safetensors"] == b"of somebody"
    assert b"base_model: me/base" in files["README.md"]
    check_clean(hub, checkpoint, tmp_path)
    # What would be of no use to others, or is not safe
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    options = ["--checkpoint", str(tmp_path / "adapter"), "--repo_id", "me/nothing"]
    with pytest.raises(ValueError, match=r"`card` is 'typo\.md': there is no such file"):
        push.main([*options, "--card", "typo.md"])
    with pytest.raises(ValueError, match=r"`license` is for a whole model, and .* is an adapter of PEFT: `PeftModel"):
        push.main([*options, "--license", "mit"])
    config["base_model_name_or_path"] = str(checkpoint)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is an adapter of .*, which is no model on the Hub: push that first"):
        push.main(options)
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(ValueError, match=r"an adapter of PEFT without 'adapter_model.safetensors'"):
        push.main(options)


def test_what_is_no_folder_is_not_looked_for_on_the_hub(
    run: Callable[..., subprocess.CompletedProcess], hub: Hub
) -> None:
    refused = run("duostream.scripts.push", "--checkpoint", "somebody/else", "--repo_id", "me/nothing")
    assert refused.returncode != 0 and "`checkpoint` is 'somebody/else'" in refused.stderr and not hub.repositories


def test_a_page_shows_the_model_by_its_whole_name(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess], checkpoint: Path
) -> None:
    options = ["--checkpoint", checkpoint, "--repo_id", "colors", "--space", "page", "--json", "true"]
    pushed = run("duostream.scripts.push", *options)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert set(json.loads(pushed.stdout.splitlines()[-1])) == {"card", "commit", "space"}
    assert set(hub.files("me/colors")) >= WHOLE
    page = hub.files("spaces/me/page")
    assert b"'me/colors'" in page["app.py"] and b"- me/colors" in page["README.md"]
    assert "requirements.txt" in page and "duostream/scripts/demo.py" in page
    with pytest.raises(ValueError, match="`space` shows what is on the main branch: it goes without `revision`"):
        push.main([*map(str, options), "--revision", "first"])


def test_what_is_to_be_private_is_not_pushed_where_all_can_see_it(
    run: Callable[..., subprocess.CompletedProcess], hub: Hub, checkpoint: Path
) -> None:
    hub.repositories["me/public"] = Repository()
    hub.repositories["me/public"].add("main", {})
    options = ["--checkpoint", checkpoint, "--repo_id", "me/public", "--private", "true"]
    refused = run("duostream.scripts.push", *options)
    assert refused.returncode != 0 and "'me/public' is public already" in refused.stderr
    assert not hub.files("me/public")
