"""Both sides are as large, learn from the same rows for the same time, and are measured alike."""

import json

import datasets
import pytest
from PIL import Image

from duostream.scripts import quality

SIZE = {"hidden_size": 64, "num_layers": 2, "image_size": 24, "vocab_size": 300, "minutes": 0.02}
TASKS = {
    "classification": ({"prompt": "{text}", "image_column": ""}, "accuracy", "BertForSequenceClassification"),
    "picture classes": ({"task": "classification", "prompt": ""}, "accuracy", "ViTForImageClassification"),
    "retrieval": ({}, "text_to_image_recall@1", "VisionTextDualEncoderModel"),
    "translation": ({"image_column": ""}, "bleu", "MarianMTModel"),
    "summarization": ({"image_column": ""}, "rougeL", "BartForConditionalGeneration"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        folder = tmp_path_factory.mktemp("pictures")
        for split in ("train", "validation"):
            (folder / split).mkdir()
            lines = []
            for i in range(8):
                Image.new("RGB", (30, 30), (30 * i, 90, 20)).save(folder / split / f"{i}.jpg")
                row = {"file_name": f"{i}.jpg", "text": f"film {i}", "label": ["bad", "good"][i % 2]}
                row |= {"captions": [f"picture {i}"], "source": f"one {i}", "target": f"two {i}"}
                row |= {"document": f"long text {i}", "summary": f"text {i}"}
                lines.append(json.dumps(row) + "\n")
            (folder / split / "metadata.jsonl").write_text("".join(lines))
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_both_sides_are_trained_and_measured(dataset, tmp_path, name):
    options, figure, peer = TASKS[name]
    options = {"task": name, "dataset": dataset, "output": tmp_path / "out.json", **SIZE, **options}
    quality.main([text for key, value in options.items() for text in (f"--{key}", str(value))])
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["side"] for run in runs] == ["duostream", "peer"]
    assert runs[0]["model"].startswith("DuoStream") and runs[1]["model"] == peer
    for run in runs:
        assert run["steps"] > 0
        assert 0 <= run[figure] <= 100


def test_a_task_without_a_peer_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="`task` 'vqa' has no peer here"):
        options = {"task": "vqa", "dataset": dataset, "prompt_column": "source", "answer_column": "target"}
        options |= {"output": tmp_path / "out.json", **SIZE}
        quality.main([text for key, value in options.items() for text in (f"--{key}", str(value))])
