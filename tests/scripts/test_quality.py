"""Both sides are as large, learn from the same rows for the same time, and are measured alike."""

import json
import runpy
import shlex
import time
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV1Config,
    MobileNetV1Model,
    TrainerControl,
    TrainerState,
)
from transformers.models.mobilenet_v1.image_processing_pil_mobilenet_v1 import MobileNetV1ImageProcessorPil

from duostream import train_tokenizer
from duostream.scripts import quality, tasks
from duostream.scripts.arguments import DataArguments, parse

RECIPES = Path(quality.__file__).parent / "recipes" / "quality"

SIZE = {"hidden_size": 64, "num_layers": 2, "num_text_layers": 1, "image_size": 24, "vocab_size": 300, "minutes": 0.02}
SIZE |= {"max_new_tokens": 4, "dataloader_num_workers": 0}
TASKS = {
    "classification": ({"prompt": "{text}", "image_column": ""}, "accuracy", "BertForSequenceClassification"),
    "picture classes": (
        {"task": "classification", "prompt": "", "dataloader_num_workers": 1},
        "accuracy",
        "ViTForImageClassification",
    ),
    "retrieval": ({}, "text_to_image_recall@1", "VisionTextDualEncoderModel"),
    "translation": ({"image_column": ""}, "exact_match", "MarianMTModel"),
    "caption": ({"conversations_per_row": 2}, "exact_match", "VisionEncoderDecoderModel"),
    "vqa": ({"prompt_column": "source", "answer_column": "target"}, "exact_match", "LlavaForConditionalGeneration"),
    "summarization": ({"image_column": ""}, "exact_match", "BartForConditionalGeneration"),
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
                row |= {"captions": [f"picture {i}"] * 2, "source": f"one {i}", "target": f"two {i}"}
                row |= {"document": f"long text {i}", "summary": f"text {i}"}
                lines.append(json.dumps(row) + "\n")
            (folder / split / "metadata.jsonl").write_text("".join(lines))
        yield folder


def compare(options, *args):
    quality.main([*(text for key, value in options.items() for text in (f"--{key}", str(value))), *args])


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_both_sides_are_trained_and_measured(dataset, tmp_path, name):
    options, figure, peer = TASKS[name]
    options = {"task": name, "dataset": dataset, "output": tmp_path / "out.json", **SIZE, **options}
    writes = "exact" in figure
    if writes:
        options |= {"max_steps": 240, "learning_rate": 2e-3, "batch_size": 8, "max_new_tokens": 40}
        options |= {"max_train_rows": 4, "max_eval_rows": 4}
    compare(options)
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["side"] for run in runs] == ["duostream", "peer"]
    assert runs[0]["model"].startswith("DuoStream") and runs[1]["model"] == peer
    for run in runs:
        assert run["steps"] > 0 and 0 < run["trained_parameters"] <= run["parameters"]
        # The same rows again: learnt by heart, and ended where they end
        assert run[figure] > 0.8 if writes else 0 <= run[figure] <= 1, run["side"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    model = MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.25, min_depth=8, image_size=64)).train()
    for _ in range(100):  # batch norms that have seen nothing would let nothing through
        model(pixel_values=torch.randn(4, 3, 64, 64))
    model.save_pretrained(folder)
    MobileNetV1ImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        folder
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caption", "vqa", "retrieval"])
def test_a_pretrained_vision_model_serves_both_sides_and_stays_as_it_is(dataset, tmp_path, vision, name, monkeypatch):
    sides = []
    train_and_measure = quality.train_and_measure
    monkeypatch.setattr(
        quality, "train_and_measure", lambda side, *args: (sides.append(side.model), train_and_measure(side, *args))[1]
    )
    options = {"task": name, "dataset": dataset, "output": tmp_path / "out.json", **SIZE, **TASKS[name][0]}
    compare({**options, "vision": vision})
    expected = MobileNetV1Model.from_pretrained(vision).state_dict()
    assert len(sides) == 2
    for model in sides:
        state = model.state_dict()
        for key, weight in expected.items():
            (found,) = [name for name in state if name.endswith(key) and "decoder" not in name]
            assert torch.equal(state[found], weight)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = train_tokenizer(["Describe the picture. picture 0 1 2 3 4 5 6 7"], 300)
    torch.manual_seed(0)
    stack = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    # Without a token for pictures
    model = LlamaForCausalLM(LlamaConfig(**stack, vocab_size=tokenizer.vocab_size, tie_word_embeddings=True))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_pretrained_language_model_serves_both_sides(dataset, tmp_path, vision, text, monkeypatch):
    layers = LlamaForCausalLM.from_pretrained(text).model.layers
    rates = []
    train_and_measure = quality.train_and_measure

    def see_before_training(side, *args):
        model = side.model.model
        own = [*model.text_model.layers, *model.fusion_model.layers] if side.pretrained[1:] else []
        for found, expected in zip(own or model.language_model.layers, layers, strict=True):
            assert torch.equal(found.mlp.up_proj.weight, expected.mlp.up_proj.weight)
        return train_and_measure(side, *args)

    class Watched(quality.TimedTrainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            rates.append({group["initial_lr"] for group in self.optimizer.param_groups})
            return result

    monkeypatch.setattr(quality, "train_and_measure", see_before_training)
    monkeypatch.setattr(quality, "TimedTrainer", Watched)
    options = {"task": "caption", "dataset": dataset, "output": tmp_path / "out.json", "vision": vision, "text": text}
    options |= {"max_steps": 150, "learning_rate": 2e-3, "text_learning_rate": 1e-3, "batch_size": 8}
    options |= {"max_train_rows": 4, "max_eval_rows": 4, "max_new_tokens": 12, "dataloader_num_workers": 0}
    compare(options, "--sides", "duostream-2", "peer")
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["model"] for run in runs] == ["DuoStreamForConditionalGeneration", "LlavaForConditionalGeneration"]
    # Learnt by heart
    assert all(run["exact_match"] > 0.8 for run in runs), runs
    assert rates == [{2e-3, 1e-3}] * 2


@pytest.mark.slow
def test_the_small_language_model_is_one_that_serves_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    namespace = runpy.run_path(str(RECIPES / "small_language_model.py"))
    for name, column in namespace["COLUMNS"].items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            lines = [json.dumps({column: f"{name} is read, and {i} {split} "}) for i in range(300)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
    namespace["main"](str(tmp_path), str(tmp_path / "model"), max_steps=2)
    args = quality.QualityArguments(text=str(tmp_path / "model"), vision="any", sides=["duostream-4", "peer"])
    args.take_layers(AutoConfig.from_pretrained(tmp_path / "model").num_hidden_layers)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token_id == model.config.eos_token_id and len(tokenizer) == model.config.vocab_size


def test_a_pretrained_language_model_is_asked_for_what_it_goes_with(dataset, text, vision):
    for options, message in (
        ({}, "`text` goes with `vision`"),
        ({"vision": vision}, "`text` needs `num_fusion_layers`"),
        (
            {"vision": vision, "num_fusion_layers": 3},
            "`num_fusion_layers` is 3; expected 1 to 2, as `text` has 3 layers",
        ),
        ({"vision": vision, "num_fusion_layers": 1, "task": "retrieval"}, "`text` is for tasks that write about"),
    ):
        with pytest.raises(ValueError, match=message):
            compare({"task": "caption", "dataset": dataset, "text": text, **options})


@pytest.mark.slow
def test_duostream_may_store_what_that_model_gives(dataset, tmp_path, vision, monkeypatch):
    trained_on = []
    made = quality.TimedTrainer.__init__

    def make(self, *args, train_dataset, **kwargs):
        trained_on.append("image_features" in train_dataset[0])
        made(self, *args, train_dataset=train_dataset, **kwargs)

    monkeypatch.setattr(quality.TimedTrainer, "__init__", make)
    options = {"task": "vqa", "dataset": dataset, "output": tmp_path / "out.json", **SIZE, **TASKS["vqa"][0]}
    compare({**options, "vision": vision, "cache_vision": True, "max_steps": 2, "curve_points": 1})
    ours, theirs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert trained_on == [True, False] and theirs["model"] == "LlavaForConditionalGeneration"
    assert ours["preparing_seconds"] > theirs["preparing_seconds"]
    assert all(run["curve"][0]["seconds"] > run["preparing_seconds"] for run in (ours, theirs))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["quality"]


def test_what_was_spent_before_training_is_of_its_time():
    clock = quality.Clock(seconds=10.0, max_steps=None, spent=9.9)
    clock.on_train_begin()
    time.sleep(0.2)
    assert clock.share >= 1
    with pytest.raises(ValueError, match="took 70 s, which is all of `minutes`"):
        quality.Clock(seconds=60.0, max_steps=None, spent=70.0)


def test_there_is_nothing_to_store_without_a_vision_model_or_for_retrieval(tmp_path):
    options = {"dataset": "unread", "output": tmp_path / "out.json", "cache_vision": True}
    with pytest.raises(ValueError, match="`cache_vision` keeps what a frozen vision model gives: it goes with `vis"):
        compare({**options, "task": "caption"})
    with pytest.raises(ValueError, match="`cache_vision` is not for `task` 'retrieval'"):
        compare({**options, "task": "retrieval", "vision": "unread"})


@pytest.mark.slow
def test_what_the_picture_adds_is_measured_by_the_same_model_without(dataset, tmp_path):
    options = {"task": "vqa", "dataset": dataset, "output": tmp_path / "out.json", **SIZE, **TASKS["vqa"][0]}
    compare(options, "--sides", "duostream", "blind")
    seeing, blind = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert seeing["model"] == blind["model"] and seeing["parameters"] == blind["parameters"]
    assert blind["side"] == "blind"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_in_a_recipe_is_one_that_its_options_belong_to(recipe):
    comments = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    words = shlex.split(" ".join(line.removesuffix("\\") for line in comments[1:]))
    assert words[:4] == ["duostream", "benchmark", "quality", f"scripts/recipes/quality/{recipe.name}"]
    args = words[4:]
    quality_args, data_args = parse(quality.QualityArguments, DataArguments, args=[str(recipe), *args])
    assert data_args.task in tasks.TASKS and quality_args.minutes <= 20


def test_masked_text_is_learnt_without_a_peer(dataset, tmp_path):
    options = {"task": "masked", "answer_column": "target", "dataset": dataset, "output": tmp_path / "out.json"}
    compare({**options, **SIZE, "max_steps": 2}, "--sides", "duostream")
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert run["model"] == "DuoStreamForMaskedLM" and run["num_masked"] > 0


@pytest.mark.parametrize("value", ["x", "[]"])
@pytest.mark.parametrize("name", ["stack", "text_stack", "vision_config", "config_overrides"])
def test_what_is_no_mapping_in_json_is_refused_by_its_name(dataset, tmp_path, name, value):
    options = {"task": "caption", "dataset": dataset, "output": tmp_path / "out.json", **SIZE, name: value}
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}; expected a mapping in JSON".replace("[", r"\[")):
        compare(options, "--sides", "duostream")


def test_a_task_without_a_peer_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="`task` 'chat' has no peer here"):
        options = {"task": "chat", "dataset": dataset, "prompt_column": "source", "answer_column": "target"}
        compare({**options, "output": tmp_path / "out.json", **SIZE})


def test_rows_that_keep_their_pictures_make_nobody_blind(tmp_path):
    with pytest.raises(
        ValueError, match=r"`sides` has 'blind', which .* without pictures: `image_column` would do nothing"
    ):
        few = {"max_train_rows": 2, "max_eval_rows": 2}
        compare({"task": "vqa", "output": tmp_path / "out.json", **few, **SIZE}, "--sides", "blind")


def test_some_layers_are_left_for_the_fusion_stack():
    with pytest.raises(ValueError, match="`num_text_layers` is 4; expected at least 1 and fewer than `num_layers`"):
        quality.QualityArguments(num_text_layers=4)


def test_there_are_no_more_fusion_layers_than_are_left():
    with pytest.raises(ValueError, match="`num_fusion_layers` is 3; expected 1 to 2"):
        quality.QualityArguments(num_layers=4, num_text_layers=2, num_fusion_layers=3)


def test_a_peer_has_at_least_a_layer():
    with pytest.raises(ValueError, match="`peer_num_layers` is 0; expected 1 or more"):
        quality.QualityArguments(peer_num_layers=0)


@pytest.mark.slow
def test_curves_show_the_loss_on_the_way_of_each_depth_beside_llava(dataset, tmp_path):
    options = {"task": "caption", "dataset": dataset, "output": tmp_path / "out.json", **SIZE, "num_layers": 4}
    options |= {"max_steps": 30, "curve_points": 3, "llava": True, "max_new_tokens": 4, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="`llava` reads patches"):
        compare(options)
    options["vision_config"] = json.dumps(
        {"model_type": "siglip_vision_model", "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "vision_use_head": False}
    )
    compare(options, "--sides", "duostream-1", "duostream-3", "peer")
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["model"] for run in runs] == ["DuoStreamForConditionalGeneration"] * 2 + [
        "LlavaForConditionalGeneration"
    ]
    for run in runs:
        assert [point["steps"] for point in run["curve"]] == [10, 20, 30]
        assert run["curve"][0]["loss"] > run["curve"][2]["loss"]
    assert runs[0]["curve"][0]["seconds"] < runs[0]["curve"][1]["seconds"]
    Image.open(tmp_path / "out.png").verify()


def test_the_clock_stands_while_the_loss_is_measured():
    clock = quality.Clock(seconds=1e9, max_steps=None, num_points=10**12)
    control, state = TrainerControl(), TrainerState(global_step=1)
    clock.on_train_begin(None, state, control)
    time.sleep(0.01)
    clock.on_step_end(None, state, control)
    assert control.should_evaluate
    before = time.perf_counter() - clock.started
    time.sleep(0.2)
    clock.on_evaluate(None, state, control, metrics={"eval_loss": 1.0})
    assert clock.elapsed < before + 0.1
    assert clock.curve[0]["loss"] == 1.0


def test_texts_are_no_peer_for_llava(dataset, tmp_path):
    options = {"task": "translation", "dataset": dataset, "image_column": "", "llava": True, **SIZE}
    with pytest.raises(ValueError, match="`llava` is for pictures; `task` 'translation' has none"):
        compare({**options, "output": tmp_path / "out.json"})


def test_a_peer_that_reads_and_writes_by_halves_has_an_even_number_of_layers(dataset, tmp_path):
    options = {"task": "translation", "dataset": dataset, "image_column": "", **SIZE, "peer_num_layers": 3}
    with pytest.raises(ValueError, match="The peer has 3 layers, half of which decode: expected an even number"):
        compare({**options, "output": tmp_path / "out.json"})


def test_unknown_sides_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`sides` has \['theirs'\]; there are 'duostream', 'peer', 'blind', and"):
        compare({"output": tmp_path / "out.json"}, "--sides", "theirs")


@pytest.mark.slow
def test_each_side_may_have_its_own_rate_and_first_weights_and_duostream_its_own_configuration(
    dataset, tmp_path, monkeypatch
):
    sides = []
    train_and_measure = quality.train_and_measure
    monkeypatch.setattr(
        quality, "train_and_measure", lambda side, *args: (sides.append(side.model), train_and_measure(side, *args))[1]
    )
    options = {"task": "translation", "dataset": dataset, "output": tmp_path / "out.json", **SIZE, "max_steps": 2}
    options |= {"learning_rate": 2e-3, "peer_learning_rate": 1e-3, "max_new_tokens": 2, "image_column": ""}
    options |= {"initializer_range": 0.05, "peer_initializer_range": 0.01, "num_layers": 4, "num_fusion_layers": 2}
    options |= {"peer_num_layers": 6}
    options |= {"config_overrides": '{"restart_positions": true}', "text_stack": '{"intermediate_size": 32}'}
    compare(options)
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["learning_rate"] for run in runs] == [2e-3, 1e-3]
    config = sides[0].config
    assert config.restart_positions
    assert (config.text_config.num_hidden_layers, config.fusion_stack_config.num_hidden_layers) == (1, 2)
    assert (sides[1].config.encoder_layers, sides[1].config.decoder_layers) == (3, 3)
    assert (config.fusion_stack_config.initializer_range, sides[1].config.init_std) == (0.05, 0.01)
    assert (config.text_config.intermediate_size, config.fusion_stack_config.intermediate_size) == (32, 256)


@pytest.mark.slow
def test_a_step_has_as_many_answers_however_many_share_a_row(dataset, tmp_path):
    options = {"task": "caption", "dataset": dataset, "output": tmp_path / "out.json", **SIZE, "batch_size": 16}
    options |= {"max_steps": 2, "conversations_per_row": 2, "max_new_tokens": 2}
    compare(options)
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    # All 16 captions in a step of either, of 8 rows or of 16
    assert [(run["steps"], run["epochs"]) for run in runs] == [(2, 2.0), (2, 2.0)]
