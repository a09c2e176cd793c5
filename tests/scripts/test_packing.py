import json
from pathlib import Path

import pytest
from command_lines import arguments
from PIL import Image

from duostream import DuoStreamDataCollator
from duostream.scripts import finetune, pretrain

pytestmark = pytest.mark.usefixtures("workplace")

SHORT = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def pretrained(workplace):
    pretrain.main(arguments(output_dir="pretrained", max_train_rows=8, vocab_size=400, **{**SHORT, "max_steps": 1}))
    return workplace / "pretrained"


@pytest.fixture(scope="module")
def texts(workplace):
    """Short and long texts, some with a picture."""
    path = workplace / "texts.jsonl"
    Image.effect_noise((90, 70), 60).convert("RGB").save(workplace / "a.jpg")
    lines = [
        {
            "image": str(workplace / "a.jpg") if i % 2 else None,
            "document": "A word . " * (1 + 20 * (i % 3)),
            "summary": "One . " * (1 + i % 4),
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def shapes(monkeypatch):
    """Of `input_ids` of each batch that is made."""
    made, collate = [], DuoStreamDataCollator.__call__

    def look(self, rows):
        batch = collate(self, rows)
        made.append((len(rows), *batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(DuoStreamDataCollator, "__call__", look)
    return made


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def eval_loss(folder):
    return json.loads((Path(folder) / "eval_results.json").read_text())["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_finetuning_on_packed_rows_learns_as_from_rows_apart_and_evaluates_rows_apart(
    pretrained, texts, tmp_path, shapes, streaming
):
    options = {"checkpoint": pretrained, "task": "summarization", "dataset": texts, "eval_split": "train"}
    options |= {"max_eval_rows": 6, "streaming": streaming, "gradient_accumulation_steps": 2, **SHORT}
    by_packing = {}
    for packing in (False, True):
        shapes.clear()
        finetune.main(arguments(**options, packing=packing, output_dir=tmp_path / str(packing)))
        by_packing[packing] = list(shapes)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-4)
    assert eval_loss(tmp_path / "True") == pytest.approx(eval_loss(tmp_path / "False"), abs=1e-4)
    assert all(num_rows == size for num_rows, size, _ in by_packing[False])
    *trained, evaluated = by_packing[True]
    assert evaluated[:2] == (6, 6)
    assert sum(size for _, size, _ in trained) < sum(num_rows for num_rows, _, _ in trained)
    longest = [length for _, _, length in by_packing[False]]
    assert [length for _, _, length in by_packing[True]] == longest


@pytest.mark.slow
def test_pretraining_on_packed_rows_learns_as_from_rows_apart(texts, tmp_path, shapes):
    options = {"task": "summarization", "dataset": texts, "vocab_size": 400, **SHORT}
    for packing in (False, True):
        pretrain.main(arguments(**options, packing=packing, output_dir=tmp_path / str(packing)))
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-4)
    assert any(size < num_rows for num_rows, size, _ in shapes)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (finetune, {"task": "retrieval"}, "`packing` is for tasks that write, not for 'retrieval'"),
        (finetune, {"task": "masked"}, "`packing` is for tasks that write, not for 'masked'"),
        (finetune, {"task": "vqa", "conversations_per_row": 2}, "it goes without `conversations_per_row`"),
        (pretrain, {"task": "vqa", "conversations_per_row": 2}, "it goes without `conversations_per_row`"),
        (pretrain, {"mlm_weight": 0.5}, "`packing` goes with language modelling alone"),
    ],
)
def test_what_cannot_be_packed_is_refused(pretrained, tmp_path, command, options, message):
    start = {"checkpoint": pretrained} if command is finetune else {}
    with pytest.raises(ValueError, match=message):
        command.main(arguments(**start, **options, packing=True, max_train_rows=8, output_dir=tmp_path, **SHORT))
