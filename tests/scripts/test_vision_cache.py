import json
import multiprocessing
import shutil

import datasets
import pytest
import torch
from command_lines import arguments
from datasets import Dataset, List
from PIL import Image
from tiny_models import NUM_PHOTOGRAPHS, save_photographs
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamDataCollator
from duostream.processing.data_collator_duostream import ImageStates
from duostream.scripts import finetune, pretrain, vision_cache
from duostream.scripts.arguments import DataArguments, DuoStreamTrainingArguments
from duostream.scripts.bad_rows import BadRows
from duostream.scripts.data import load_mixture, load_rows
from duostream.scripts.training import train
from duostream.scripts.vision_cache import with_states

pytestmark = pytest.mark.usefixtures("workplace")

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
FROZEN = {"freeze": ["vision"], "per_device_train_batch_size": 3, "logging_steps": 1, **QUIET}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Where states are kept: nothing is there yet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "datasets" / "duostream_vision"


@pytest.fixture(scope="module")
def photographs(workplace):
    return save_photographs(workplace / "photographs")


@pytest.fixture(scope="module")
def pretrained(workplace):
    options = {"output_dir": "pretrained", "max_train_rows": 8, "vocab_size": 400, "max_steps": 1, **QUIET}
    pretrain.main(arguments(**options))
    return workplace / "pretrained"


@pytest.fixture
def parts(pretrained):
    model, processor = (kind.from_pretrained(pretrained) for kind in (AutoModelForImageTextToText, AutoProcessor))
    model.freeze("vision")
    return model, processor


def training_options(output_dir, **options):
    return DuoStreamTrainingArguments(output_dir=str(output_dir), **{**FROZEN, "max_steps": 4, **options})


def caption_options(photographs, **options):
    return DataArguments(task="caption", dataset=str(photographs), **options)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_losses(folder, other):
    assert losses(other) == pytest.approx(losses(folder), abs=1e-5, rel=0)


class Seen:
    """How many pictures went through the vision stream."""

    def __init__(self, model):
        self.count = 0
        model.base_model.vision_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        self.count += len(kwargs["pixel_values"])


@pytest.mark.slow
@pytest.mark.parametrize("conversations_per_row", [1, 2])
@pytest.mark.parametrize("metric_rows", [0, 2])
def test_from_stored_states_everything_is_learnt_and_measured_as_from_pictures(
    pretrained, photographs, tmp_path, conversations_per_row, metric_rows
):
    options = {
        "checkpoint": pretrained,
        "task": "caption",
        "dataset": photographs,
        "conversations_per_row": conversations_per_row,
        "metric_rows": metric_rows,
        "max_new_tokens": 4,
        "num_train_epochs": 2,
        **FROZEN,
    }
    for cache_vision in (False, True):
        finetune.main(arguments(**options, cache_vision=cache_vision, output_dir=tmp_path / str(cache_vision)))
    plain, cached = tmp_path / "False", tmp_path / "True"
    assert len(losses(plain)) == 2 * -(-2 * NUM_PHOTOGRAPHS["train"] // conversations_per_row // 3)
    assert_same_losses(plain, cached)
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (plain, cached)]
    assert results[0].keys() == results[1].keys() and ("eval_cider_d" in results[0]) == (metric_rows > 0)
    for name in set(results[0]) - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-5), name
    weights = [AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (plain, cached)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)
    assert json.loads((cached / "run.json").read_text())["reads_pictures"]


def test_each_picture_is_read_once_and_by_a_later_run_not_at_all(pretrained, parts, photographs, tmp_path, cache):
    rows = load_mixture(caption_options(photographs))
    seen = Seen(parts[0])
    stored = with_states(rows, *parts, training_options(tmp_path, per_device_eval_batch_size=3))
    assert seen.count == NUM_PHOTOGRAPHS["train"]
    train(*parts, training_options(tmp_path), stored)
    assert seen.count == NUM_PHOTOGRAPHS["train"]
    again = AutoModelForImageTextToText.from_pretrained(pretrained)
    seen = Seen(again)
    same = with_states(load_mixture(caption_options(photographs)), again, parts[1], training_options(tmp_path))
    assert seen.count == 0 and len(list(cache.iterdir())) == 1
    for row, other in zip(stored, same, strict=True):
        assert torch.equal(row["image_features"][0], other["image_features"][0])
        assert row.keys() == other.keys() and "images" not in row


@pytest.mark.parametrize("options", [{}, {"per_device_eval_batch_size": 1, "dataloader_num_workers": 2}], ids=str)
def test_states_are_those_that_the_stream_gives_in_its_own_type(parts, photographs, tmp_path, options):
    rows = load_mixture(caption_options(photographs))
    model, processor = parts[0].to(torch.bfloat16), parts[1]
    stored = with_states(rows, model, processor, training_options(tmp_path, **options))
    assert len(stored) == len(rows) > 0
    expected = DuoStreamDataCollator(processor)(list(rows))["pixel_values"]
    got = DuoStreamDataCollator(processor)(list(stored))
    assert "pixel_values" not in got and got["images_per_row"] == 1
    states = got["mm_encoder_outputs"]["image"].last_hidden_state
    assert states.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(states, model.get_image_features(expected).last_hidden_state)


@pytest.mark.parametrize("how", ["empty", "half", "fewer pictures", "zeroed", "other bytes"])
def test_a_file_of_states_that_is_broken_or_cut_short_is_refused_by_name(parts, photographs, tmp_path, cache, how):
    rows, args = load_mixture(caption_options(photographs)), training_options(tmp_path)
    with_states(rows, *parts, args)
    (path,) = cache.iterdir()
    written = path.read_bytes()
    if how == "fewer pictures":
        Dataset.from_file(str(path)).select([0]).map(lambda row: row, cache_file_name=str(tmp_path / "fewer.arrow"))
        path.write_bytes((tmp_path / "fewer.arrow").read_bytes())
    else:
        middle = len(written) // 2
        other = bytes([written[middle] ^ 1])
        path.write_bytes(
            {
                "empty": b"",
                "half": written[:middle],
                "zeroed": written[:middle] + bytes(400) + written[middle + 400 :],
                "other bytes": written[:middle] + other + written[middle + 1 :],
            }[how]
        )
    with pytest.raises(ValueError, match=rf"{path.name} is broken, cut short or overwritten: .*Delete it"):
        list(with_states(rows, *parts, args))
    path.unlink()
    seen = Seen(parts[0])
    assert len(list(with_states(rows, *parts, args))) == len(rows) and seen.count == NUM_PHOTOGRAPHS["train"]


def test_workers_start_where_pictures_are_read_alone_and_nothing_random_is_drawn(
    parts, photographs, tmp_path, monkeypatch
):
    args = training_options(tmp_path, dataloader_num_workers=1)
    rows = load_mixture(caption_options(photographs))
    before = torch.get_rng_state()
    with_states(rows, *parts, args)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: pytest.fail("a worker was started"))
    with_states(rows, *parts, args)
    with pytest.raises(pytest.fail.Exception, match="a worker was started"):
        with_states(rows.select(range(2)), *parts, args)


def test_a_picture_that_a_worker_cannot_read_names_its_row_and_leaves_no_worker_behind(parts, tmp_path):
    photographs = save_photographs(tmp_path / "photographs")
    (photographs / "train" / "2.jpg").write_bytes(b"<html>")
    rows = load_mixture(caption_options(photographs))
    with pytest.raises(ValueError, match=r"^Row 4: a picture can't be read"):
        with_states(rows, *parts, training_options(tmp_path / "run", dataloader_num_workers=2))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_no_picture_is_opened_once_its_states_are_stored(parts, tmp_path):
    photographs = save_photographs(tmp_path / "photographs")
    args = training_options(tmp_path / "run", num_train_epochs=2, max_steps=-1, dataloader_num_workers=1)
    rows, held_out = (load_rows(caption_options(photographs), split) for split in NUM_PHOTOGRAPHS)
    stored, stored_held_out = (with_states(each, *parts, args) for each in (rows, held_out))
    shutil.rmtree(photographs)
    trainer = train(*parts, args, stored, stored_held_out)
    assert trainer.state.epoch == 2 and "eval_loss" in trainer.state.log_history[-1]
    with pytest.raises(ValueError, match="a picture can't be read"):
        train(*parts, args, rows)


@pytest.mark.parametrize("changed", ["weights", "buffers", "processor", "dtype", "layer", "pictures", "rows", "code"])
def test_what_the_states_depend_on_makes_them_anew(parts, tmp_path, monkeypatch, changed):
    photographs = save_photographs(tmp_path / "photographs")
    model, processor = parts
    args = training_options(tmp_path / "run")
    model.model.vision_model.register_buffer("running_mean", torch.zeros(3))
    with_states(load_mixture(caption_options(photographs)), model, processor, args)
    options = {}
    if changed == "weights":
        next(model.model.vision_model.parameters()).add_(0.1)
    elif changed == "buffers":
        model.model.vision_model.running_mean += 1
    elif changed == "processor":
        size = processor.image_processor.size
        processor.image_processor = SiglipImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.5])
    elif changed == "dtype":
        model.to(torch.bfloat16)
    elif changed == "code":
        monkeypatch.setattr(vision_cache, "SOURCE_DIGEST", "another")
    elif changed == "layer":
        # The same one, counted from the front
        pictures = torch.zeros(1, 3, 48, 48)
        layers = model.get_image_features(pictures, output_hidden_states=True).hidden_states
        model.config.vision_feature_layer = len(layers) - 1
    elif changed == "pictures":
        Image.new("RGB", (30, 30), "red").save(photographs / "train" / "1.jpg")
    else:
        options = {"max_train_rows": 3}
    seen = Seen(model)
    with_states(load_mixture(caption_options(photographs, **options)), model, processor, args)
    assert seen.count == options.get("max_train_rows", NUM_PHOTOGRAPHS["train"])


def test_pictures_of_rows_in_memory_and_of_rows_with_several_or_none_are_stored(parts, tmp_path, cache):
    red, blue = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "Yes ."}]}]

    def ask(number):
        parts = [{"type": "image", "text": None}] * number + [{"type": "text", "text": "Is it ?"}]
        return [{"role": "user", "content": parts}]

    pictures = [[red, blue], [], [blue], None]
    features = datasets.Features({"images": List(datasets.Image())})
    rows = Dataset.from_dict({"images": pictures}, features=features)
    rows = rows.add_column("messages", [ask(len(each or [])) + answer for each in pictures])
    rows = rows.add_column("row", [*range(4)])
    seen = Seen(parts[0])
    stored = with_states(rows, *parts, training_options(tmp_path))
    assert seen.count == 2
    assert [len(row["image_features"]) for row in stored] == [2, 0, 1, 0]
    collate = DuoStreamDataCollator(parts[1])
    expected, got = collate(list(rows)), collate(list(stored))
    assert torch.equal(expected["input_ids"], got["input_ids"]) and "images_per_row" not in got
    model = parts[0].eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**got).loss, model(**expected).loss)
    with_states(rows, *parts, training_options(tmp_path))
    assert seen.count == 2 + 3  # by the model itself


def test_rows_without_pictures_stay_as_they_are(parts, tmp_path, cache):
    rows = Dataset.from_dict({"text": ["One .", "Two ."], "row": [0, 1]})
    assert with_states(rows, *parts, training_options(tmp_path)) is rows
    none = rows.add_column("images", [[], []]).cast_column("images", List(datasets.Image()))
    assert [row["image_features"] for row in with_states(none, *parts, training_options(tmp_path))] == [[], []]
    train(*parts, training_options(tmp_path / "run"), with_states(none, *parts, training_options(tmp_path)))


def test_a_picture_without_bytes_and_path_names_its_row(parts, tmp_path):
    rows = Dataset.from_dict({"text": ["One ."], "images": [[{"bytes": None, "path": None}]], "row": [0]})
    rows = rows.cast_column("images", List(datasets.Image(decode=False)))
    with pytest.raises(ValueError, match="Row 0: a picture can't be read"):
        with_states(rows, *parts, training_options(tmp_path))


def test_a_picture_that_cannot_be_read_names_its_row_or_is_left_out(pretrained, tmp_path, monkeypatch):
    photographs = save_photographs(tmp_path / "photographs")
    (photographs / "train" / "2.jpg").write_bytes(b"<html>")
    options = {"checkpoint": pretrained, "task": "caption", "dataset": photographs, "cache_vision": True}
    options |= {"output_dir": tmp_path / "run", "num_train_epochs": 1, **FROZEN}
    with pytest.raises(ValueError, match="Row 4: a picture can't be read"):
        finetune.main(arguments(**options))
    looked = []
    leave_out = BadRows.leave_out
    monkeypatch.setattr(BadRows, "leave_out", lambda self, *args: looked.append(1) or leave_out(self, *args))
    finetune.main(arguments(**options, on_bad_rows="skip"))
    assert looked == [1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == {2}


@pytest.mark.slow
def test_pretraining_with_a_frozen_vision_stream_reads_stored_states(tmp_path, photographs):
    options = {"task": "caption", "dataset": photographs, "vocab_size": 400, "max_steps": 4, **FROZEN}
    for cache_vision in (False, True):
        pretrain.main(arguments(**options, cache_vision=cache_vision, output_dir=tmp_path / str(cache_vision)))
    assert_same_losses(tmp_path / "False", tmp_path / "True")
    with pytest.raises(ValueError, match="`cache_vision` goes with language modelling alone"):
        pretrain.main(arguments(**options, cache_vision=True, itc_weight=1.0, output_dir=tmp_path / "c"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["text"]}, "`cache_vision` .* goes with `--freeze vision`"),
        ({"streaming": True}, "`cache_vision` .* goes without `streaming`"),
        ({"blank_images": True}, "`cache_vision` .* goes without `blank_images`"),
        ({"task": "retrieval"}, "`cache_vision` is not for `task` 'retrieval'"),
    ],
)
def test_where_nothing_can_be_stored_the_option_is_refused(pretrained, photographs, tmp_path, options, message):
    options = {"checkpoint": pretrained, "dataset": photographs, "task": "caption", **FROZEN, **options}
    with pytest.raises(ValueError, match=message):
        finetune.main(arguments(**options, cache_vision=True, output_dir=tmp_path / "run"))


def test_states_go_to_pinned_memory_as_other_inputs(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: pinned.append(tensor) or tensor.clone())
    states = torch.rand(2, 4, 8)
    batch = pin_memory({"mm_encoder_outputs": {"image": ImageStates(last_hidden_state=states)}})
    assert pinned[0] is states and len(pinned) == 1
    assert torch.equal(batch["mm_encoder_outputs"]["image"].last_hidden_state, states)
