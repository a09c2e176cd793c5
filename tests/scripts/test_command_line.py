import dataclasses
import importlib
import json
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch
import yaml
from command_lines import arguments
from datasets import Dataset, List
from PIL import Image
from tiny_models import BERT, LLAMA, save_photographs, small_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    set_seed,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamForConditionalGeneration, DuoStreamProcessor, train_tokenizer
from duostream.scripts import answering, cli, compose, evaluate, finetune, generate, measuring, pretrain, quickstart
from duostream.scripts.arguments import DataArguments
from duostream.scripts.card import source_of
from duostream.scripts.data import load_rows, pack_rows
from duostream.scripts.report import attended_tokens
from duostream.scripts.rows import UNDECODED
from duostream.scripts.scenes import build_scenes, caption_rows, question_rows

pytestmark = pytest.mark.usefixtures("workplace")

SHORT_TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
CHECKPOINT_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


@pytest.fixture(scope="module")
def pretrained(workplace):
    options = {"output_dir": "pretrained", "max_train_rows": 8, "vocab_size": 400, **SHORT_TRAINING, **QUIET}
    pretrain.main(arguments(**options))
    return workplace / "pretrained"


@pytest.fixture(scope="module")
def photographs(workplace):
    return save_photographs(workplace / "photographs")


@pytest.fixture(scope="module")
def finetuned(workplace, pretrained, photographs):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions"}
    finetune.main(arguments(**options, output_dir="finetuned", **SHORT_TRAINING, **QUIET))
    return workplace / "finetuned"


@pytest.fixture(scope="module")
def checkpoint(finetuned):
    """A model and its processor, as loaded."""
    model = AutoModelForImageTextToText.from_pretrained(finetuned).eval()
    return model, AutoProcessor.from_pretrained(finetuned)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def message(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"completion"}))
def test_each_command_explains_itself_on_one_screen(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    module = importlib.import_module(f"duostream.scripts.{name}")
    assert " ".join(module.__doc__.split()) in " ".join(shown.split())
    assert f"    duostream {name} " in shown  # its example
    assert len(shown.splitlines()) <= 50 or name == "serve"  # whose options are the library's


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"completion", "serve", "benchmark"}))
def test_each_command_explains_every_option_on_demand(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help_all"])
    shown = " ".join(capsys.readouterr().out.split())
    for options in importlib.import_module(f"duostream.scripts.{name}").OPTIONS:
        for option in dataclasses.fields(options):
            assert f"--{option.name}" in shown
    assert "(default: " in shown


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"completion"}))
def test_each_command_refuses_an_unknown_option_with_code_2(name, capsys):
    required = {
        "compose": {"text": "a", "vision": "b", "output_dir": "c"},
        "push": {"checkpoint": "a", "repo_id": "b"},
        **{name: {"checkpoint": "a"} for name in ("finetune", "evaluate", "generate", "demo")},
    }
    with pytest.raises(SystemExit) as ended:
        cli.main([name, *arguments(**required.get(name, {}), nonsense=1)])
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_pretraining_writes_a_checkpoint_that_loads(pretrained):
    assert CHECKPOINT_FILES | {"train_results.json", "trainer_state.json"} <= {p.name for p in pretrained.iterdir()}
    model = AutoModelForImageTextToText.from_pretrained(pretrained)
    processor = AutoProcessor.from_pretrained(pretrained)
    assert isinstance(model, DuoStreamForConditionalGeneration)
    assert model.config.text_config.vocab_size == len(processor.tokenizer) <= 400
    assert model.config.image_seq_length == processor.image_seq_length
    assert model.config.image_token_id == processor.image_token_id
    assert read_json(pretrained / "trainer_state.json")["global_step"] == 2


def test_pretraining_takes_its_options_from_a_file(workplace, tmp_path):
    options = {
        "output_dir": str(tmp_path / "run"),
        "max_train_rows": 4,
        "vocab_size": 300,
        "bidirectional_prefix": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**options, **SHORT_TRAINING, **QUIET}))
    pretrain.main([str(tmp_path / "recipe.yaml"), "--max_steps", "1"])
    assert read_json(tmp_path / "run" / "trainer_state.json")["global_step"] == 1
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.bidirectional_prefix
    assert len(processor.tokenizer) == 300


def test_pretraining_with_a_tokenizer_that_is_there_keeps_it(pretrained, tmp_path):
    options = {"tokenizer": pretrained, "output_dir": tmp_path / "run", "max_train_rows": 4, **SHORT_TRAINING, **QUIET}
    pretrain.main(arguments(**options))
    kept = AutoTokenizer.from_pretrained(pretrained)
    assert AutoProcessor.from_pretrained(tmp_path / "run").tokenizer.get_vocab() == kept.get_vocab()


def test_a_pretrained_model_ends_where_its_tokenizer_says_and_nowhere_else(language_model, pretrained, tmp_path):
    options = {"max_train_rows": 4, **SHORT_TRAINING, **QUIET, "output_dir": tmp_path / "run"}
    pretrain.main(arguments(tokenizer=language_model, **options))
    for folder, tokenizer in ((tmp_path / "run", language_model), (pretrained, pretrained)):
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        expected = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
        assert expected != 2
        assert ends in (expected, [expected])


def test_pretraining_evaluates_when_asked_to(tmp_path):
    options = {**SHORT_TRAINING, **QUIET, "output_dir": tmp_path / "run", "max_train_rows": 4, "max_eval_rows": 2}
    pretrain.main(arguments(**options, vocab_size=300, eval_strategy="steps", eval_steps=1))
    entries = read_json(tmp_path / "run" / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in entries if "eval_loss" in entry][:2] == [1, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eval_strategy": "steps", "eval_split": ""}, "`eval_strategy` 'steps' evaluates on `eval_split`, which is"),
        ({"tokenizer_rows": 0}, "`tokenizer_rows` is 0; expected at least 1"),
        ({"config_overrides": "[1]"}, r"`config_overrides` is '\[1\]'; expected a mapping in JSON"),
        ({"config_overrides": '{"itc_weight": 1.0}'}, r"`config_overrides` has \['itc_weight'\], which options of"),
        ({"config_overrides": '{"vocab_size": 300}'}, r"`config_overrides` has \['vocab_size'\], which options of"),
        ({"config_overrides": '{"num_image_update_layer": 0}'}, r"has \['num_image_update_layer'\], which are no"),
        ({"config_overrides": '{"text_config": {"wide": 8}}'}, r"has \['wide'\], .* configuration `text_config`"),
        ({"vision": "there", "config_overrides": '{"vision_config": {}}'}, r"has \['vision_config'\], which options"),
        ({"lm_weight": 0}, "lm_weight, mlm_weight, itc_weight, itm_weight are all 0: there is nothing to learn"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 99},
            r"The rows to train on are \d+, fewer than a batch of 99, which `dataloader_drop_last` leaves out",
        ),
        ({"length_column_name": "size"}, "`length_column_name` is 'size'; the rows' lengths are in 'length'"),
    ],
)
def test_options_that_pretraining_can_do_nothing_with_are_refused(tmp_path, wrong, message):
    options = {"output_dir": tmp_path / "run", "max_train_rows": 2, "vocab_size": 300, **SHORT_TRAINING, **QUIET}
    with pytest.raises(ValueError, match=message):
        pretrain.main(arguments(**{**options, **wrong}))


@pytest.mark.parametrize("command", [pretrain, finetune])
def test_a_folder_with_checkpoints_is_refused_before_anything_is_read(tmp_path, command):
    (tmp_path / "checkpoint-8").mkdir()
    unread = {"dataset": "nowhere", "output_dir": tmp_path, "on_bad_rows": "skip"}
    with pytest.raises(ValueError, match=r"`output_dir` .* has checkpoint-8 of an earlier run"):
        command.main(arguments(**unread, **({"checkpoint": "nowhere"} if command is finetune else {})))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tokenizer_is_trained_on_so_many_texts(monkeypatch, is_stream):
    trained_on = []

    def train(texts, vocab_size):
        trained_on.extend(texts)
        return train_tokenizer(trained_on, vocab_size)

    monkeypatch.setattr(pretrain, "train_tokenizer", train)
    rows = Dataset.from_list(
        [{"messages": [message("user", f"{i} ?"), message("assistant", "Yes .")]} for i in range(5)]
    )
    options = pretrain.PretrainArguments(tokenizer_rows=3, vocab_size=300)
    pretrain.new_model(options, rows.to_iterable_dataset() if is_stream else rows)
    assert trained_on == ["0 ?", "Yes .", "1 ?"]


@pytest.mark.slow
def test_pretraining_goes_on_where_it_was_interrupted(tmp_path):
    options = {**SHORT_TRAINING, **QUIET, "output_dir": tmp_path / "run", "max_train_rows": 8, "vocab_size": 300}
    options |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}
    pretrain.main(arguments(**options))
    first = read_json(tmp_path / "run" / "trainer_state.json")["log_history"]
    pretrain.main([*arguments(**{**options, "max_steps": 3}), "--resume"])
    second = read_json(tmp_path / "run" / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in second if "loss" in entry] == [1, 2, 3]
    assert [entry["loss"] for entry in second[:2]] == [entry["loss"] for entry in first[:2]]


def test_pretraining_starts_from_a_vision_model_that_is_there(vision_model, tmp_path):
    options = {"vision": vision_model, "output_dir": tmp_path / "run", "max_train_rows": 4, "vocab_size": 300}
    pretrain.main(arguments(**options, freeze="vision", **SHORT_TRAINING, **QUIET))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert processor.image_seq_length == model.config.image_seq_length == 4
    given, kept = SiglipVisionModel.from_pretrained(vision_model).state_dict(), model.model.vision_model.state_dict()
    assert kept.keys() <= given.keys()
    assert all(torch.equal(kept[name], given[name]) for name in kept)


@pytest.fixture(scope="module")
def half_vision_model(tmp_path_factory, vision_model):
    """As most are published: in half precision."""
    folder = tmp_path_factory.mktemp("half_vision")
    SiglipVisionModel.from_pretrained(vision_model, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((vision_model / "preprocessor_config.json").read_bytes())
    return folder


def test_pretraining_takes_a_vision_model_in_half_precision(half_vision_model, tmp_path):
    options = {"vision": half_vision_model, "output_dir": tmp_path / "run", "max_train_rows": 4, "vocab_size": 300}
    pretrain.main(arguments(**options, **SHORT_TRAINING, **QUIET))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_pretraining_takes_fields_that_differ_from_the_preset(tmp_path):
    layers = {"num_hidden_layers": 2}
    options = {"output_dir": str(tmp_path / "run"), "max_train_rows": 4, "vocab_size": 300, **SHORT_TRAINING, **QUIET}
    options["config_overrides"] = {"text_config": layers, "vision_config": {"image_size": 32}}
    (tmp_path / "recipe.json").write_text(json.dumps(options))
    pretrain.main([str(tmp_path / "recipe.json")])
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "run").config
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert config.text_config.num_hidden_layers == 2
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert processor.image_seq_length == config.image_seq_length


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_freezing_all_parts_leaves_nothing_to_train_and_is_refused(command, pretrained, photographs, tmp_path):
    options = {"dataset": photographs, "answer_column": "captions", "output_dir": tmp_path / "run"}
    options |= {"freeze": ["text", "vision", "projector", "fusion"], **SHORT_TRAINING, **QUIET}
    options |= {"checkpoint": pretrained} if command == "finetune" else {"vocab_size": 400}
    with pytest.raises(ValueError, match="`freeze` is text vision projector fusion, which leaves no weight to train"):
        {"pretrain": pretrain, "finetune": finetune}[command].main(arguments(**options))


@pytest.fixture(scope="module")
def short(workplace):
    """A checkpoint with 64 positions for text, whose tokenizer knows of no limit."""
    tokenizer = train_tokenizer(["What is it? A dog."] * 4, 300, model_max_length=int(1e30))
    config = small_config(
        text_config={**BERT, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "is_decoder": True},
        fusion_stack_config={**LLAMA, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = DuoStreamProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    for part in (DuoStreamForConditionalGeneration(config), processor):
        part.save_pretrained(workplace / "short")
    return workplace / "short"


def test_a_row_that_has_more_text_than_the_text_model_has_positions_is_named_or_left_out(short, tmp_path):
    rows = [{"messages": [message("user", words), message("assistant", "A dog.")]} for words in ("What?", "is " * 111)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"checkpoint": short, "dataset": path, "eval_split": "", **SHORT_TRAINING, **QUIET}
    with pytest.raises(ValueError, match=r"Row 1 has \d+ tokens of text, more than the 64 "):
        finetune.main(arguments(**options, output_dir=tmp_path / "named"))
    finetune.main(arguments(**options, output_dir=tmp_path / "out", on_bad_rows="skip"))
    assert [each["row"] for each in read_lines(tmp_path / "out" / "bad_rows.jsonl")] == [1]
    # And so whoever takes the checkpoint is told
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 64


def test_frozen_parts_stay_as_they_were(pretrained, photographs, tmp_path):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions"}
    options |= {"freeze": ["text", "vision"], "output_dir": tmp_path / "run"}
    finetune.main(arguments(**options, **SHORT_TRAINING, **QUIET))
    before, after = weights(pretrained), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Running statistics are among what stays
    assert {name.split(".")[1] for name in changed} == {"projector", "fusion_model"}


def test_fields_of_the_configuration_may_change_in_finetuning(pretrained, photographs, tmp_path):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions", "eval_split": ""}
    options |= {"config_overrides": '{"loss_chunk_size": 3}', "output_dir": tmp_path / "run"}
    finetune.main(arguments(**options, **SHORT_TRAINING, **QUIET))
    assert read_json(tmp_path / "run" / "config.json")["loss_chunk_size"] == 3
    for wrong, message in (
        ('{"loss_chunk_size": 0}', "`loss_chunk_size` is 0"),
        ('{"bidirectional_images": "false"}', "`bidirectional_images`"),
        ('{"loss_chunk": 3}', r"has \['loss_chunk'\], which are no fields"),
        ('{"text_config": {"wide": 8}}', r"has \['wide'\], which are no fields of the configuration `text_config`"),
        (
            '{"text_config": {"model_type": "gpt2"}}',
            "makes `text_config` .*'gpt2'.*, but the checkpoint has weights of",
        ),
        ('{"text_config": 5}', "makes `text_config` 5, but the checkpoint has"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.main(arguments(**{**options, "config_overrides": wrong}, **SHORT_TRAINING, **QUIET))


def test_fields_within_a_part_of_the_configuration_may_change_alone(pretrained, photographs, tmp_path):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions", "eval_split": ""}
    options |= {"config_overrides": '{"text_config": {"attention_dropout": 0.5}}', "output_dir": tmp_path / "run"}
    finetune.main(arguments(**options, **SHORT_TRAINING, **QUIET))
    before, after = (read_json(folder / "config.json")["text_config"] for folder in (pretrained, tmp_path / "run"))
    assert {name for name, value in before.items() if after[name] != value} == {"attention_dropout"}
    assert after["attention_dropout"] == 0.5


def test_a_stream_is_not_grouped_by_lengths_which_is_said(pretrained, photographs, tmp_path, caplog):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions", "streaming": True}
    options |= {"train_sampling_strategy": "group_by_length", "output_dir": tmp_path / "run"}
    finetune.main(arguments(**options, **SHORT_TRAINING, **QUIET))
    assert "`group_by_length` needs the lengths of all, and is not done" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classification", "num_beams": 7}, "`num_beams` would do nothing: 'classification' writes nothing"),
        ({"task": "retrieval", "max_new_tokens": 7}, "`max_new_tokens` would do nothing: 'retrieval' writes nothing"),
        ({"max_train_rows": 7}, "`max_train_rows` would do nothing: it is for rows to train on"),
    ],
)
def test_options_that_evaluation_can_do_nothing_with_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(arguments(checkpoint="nowhere", **options))


def test_freezing_what_is_not_there_is_refused(pretrained, photographs, tmp_path):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions"}
    with pytest.raises(ValueError, match="no stream 'eyes' to freeze"):
        finetune.main(arguments(**options, freeze="eyes", output_dir=tmp_path / "run", **SHORT_TRAINING, **QUIET))


def test_finetuning_on_photographs_starts_from_the_checkpoint(pretrained, finetuned):
    assert {"train_results.json", "eval_results.json"} | CHECKPOINT_FILES <= {p.name for p in finetuned.iterdir()}
    before, after = weights(pretrained), weights(finetuned)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Two steps from random weights would be further away
    floats = [name for name in before if before[name].is_floating_point()]
    assert max((before[name] - after[name]).abs().max() for name in floats if "running" not in name) < 1e-2
    saved = [AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() for folder in (pretrained, finetuned)]
    assert saved[0] == saved[1]


def test_finetuning_reads_photographs_as_a_stream(pretrained, photographs, tmp_path):
    options = {"checkpoint": pretrained, "dataset": photographs, "answer_column": "captions", "streaming": True}
    finetune.main(arguments(**options, output_dir=tmp_path / "run", **SHORT_TRAINING, **QUIET))
    assert read_json(tmp_path / "run" / "trainer_state.json")["global_step"] == 2
    assert read_json(tmp_path / "run" / "eval_results.json")["eval_loss"] > 0


def test_finetuning_can_hide_the_pictures(pretrained, photographs, tmp_path):
    """`--blank_images` shows what a model learns without seeing: the same, whatever the pictures."""
    shuffled = tmp_path / "shuffled"
    for split in ("train", "validation"):
        (shuffled / split).mkdir(parents=True)
        for path in (photographs / split).iterdir():
            (shuffled / split / path.name).write_bytes(path.read_bytes())
        for path in (shuffled / split).glob("*.jpg"):
            Image.new("RGB", Image.open(path).size, "red").save(path)
    options = {"checkpoint": pretrained, "answer_column": "captions", "blank_images": True}
    losses = []
    for name, folder in (("a", photographs), ("b", shuffled)):
        finetune.main(arguments(**options, dataset=folder, output_dir=tmp_path / name, **SHORT_TRAINING, **QUIET))
        losses.append(read_json(tmp_path / name / "eval_results.json")["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_exact_match_counts_by_kind_and_by_held_out():
    results = [
        {"prediction": "red", "reference": "red", "kind": "colour", "held_out": False},
        {"prediction": "red", "reference": "blue", "kind": "colour", "held_out": True},
        {"prediction": "Red", "reference": "red", "kind": "colour", "held_out": False},
        {"prediction": "2", "reference": "2", "kind": "count", "held_out": True},
    ]
    assert measuring.exact_match(results) == {
        "exact_match": 0.5,
        "exact_match_colour": pytest.approx(1 / 3),
        "exact_match_count": 1.0,
        "exact_match_held_out": 0.5,
    }
    plain = [{"prediction": "a", "reference": "a"}, {"prediction": "a b", "reference": "a", "kind": None}]
    assert measuring.exact_match(plain) == {"exact_match": 0.5}


@pytest.fixture(scope="module")
def evaluated(workplace, pretrained):
    """Of two held-out scenes."""
    args = arguments(checkpoint=pretrained, max_eval_rows=2, output_dir="evaluated", max_new_tokens=4)
    evaluate.main(args)
    return workplace / "evaluated", args


def test_evaluation_writes_predictions_and_the_figures_that_follow_from_them(evaluated):
    folder, args = evaluated
    metrics, predictions = read_json(folder / "metrics.json"), read_lines(folder / "predictions.jsonl")
    rows = load_rows(DataArguments(), "validation", 2)
    assert metrics["num_rows"] == len(predictions) == len(rows)
    assert metrics["command"] == args
    assert metrics["loss"] > 0 and metrics["seconds"] > 0
    assert [prediction["row"] for prediction in predictions] == list(range(len(rows)))
    assert [prediction["reference"] for prediction in predictions] == [
        row["completion"][0]["content"][0]["text"] for row in rows
    ]
    assert [prediction["prompt"] for prediction in predictions] == [
        row["prompt"][0]["content"][1]["text"] for row in rows
    ]
    expected = measuring.exact_match(predictions)
    assert {name: metrics[name] for name in expected} == expected
    assert {f"exact_match_{row['kind']}" for row in rows} < set(metrics)


@pytest.mark.parametrize("task", ["retrieval", "classification"])
def test_a_head_that_was_never_trained_is_not_evaluated(finetuned, photographs, tmp_path, task):
    options = {"checkpoint": finetuned, "dataset": photographs, "task": task, "prompt": "", "label_column": "captions"}
    with pytest.raises(ValueError, match=r"lacks weights of DuoStreamFor(Image|Seq).*saved as DuoStreamForCond"):
        evaluate.main(arguments(**options, output_dir=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_evaluation_writes_only_where_it_is_told_to(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate.main(arguments(checkpoint=pretrained, max_eval_rows=1, output_dir="here", max_new_tokens=2))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"metrics.json", "predictions.jsonl", "samples"}


def test_evaluation_of_photographs_gives_a_prediction_for_each_against_all_of_its_captions(
    finetuned, photographs, tmp_path
):
    options = {"checkpoint": finetuned, "dataset": photographs, "answer_column": "captions", "max_new_tokens": 4}
    found = []
    for name, more in (("a", {}), ("b", {"streaming": True}), ("c", {"batch_size": 1})):
        evaluate.main(arguments(**options, **more, output_dir=tmp_path / name))
        found.append(read_lines(tmp_path / name / "predictions.jsonl"))
    assert found[0] == found[1] == found[2]
    captions = [[f"Picture {i} of validation .", "A dog runs through the snow ."] for i in range(2)]
    assert [result["references"] for result in found[0]] == captions


def test_evaluation_can_hide_the_pictures(finetuned, photographs, tmp_path):
    turned = tmp_path / "turned" / "validation"
    turned.mkdir(parents=True)
    for path in (photographs / "validation").iterdir():
        if path.suffix == ".jpg":
            Image.new("RGB", Image.open(path).size, "red").save(turned / path.name)
        else:
            (turned / path.name).write_bytes(path.read_bytes())
    losses = {}
    for blank_images in (False, True):
        for folder in (photographs, turned.parent):
            options = {"checkpoint": finetuned, "dataset": folder, "answer_column": "captions", "max_new_tokens": 2}
            evaluate.main(arguments(**options, blank_images=blank_images, output_dir=tmp_path / "out"))
            losses[blank_images, folder] = read_json(tmp_path / "out" / "metrics.json")["loss"]
    assert losses[True, photographs] == losses[True, turned.parent]
    assert losses[False, photographs] != losses[False, turned.parent]


def test_evaluation_takes_messages_of_plain_text(pretrained, tmp_path):
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    (tmp_path / "lines.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    options = {"checkpoint": pretrained, "dataset": tmp_path / "lines.jsonl", "max_new_tokens": 2}
    evaluate.main(arguments(**options, output_dir=tmp_path / "out"))
    (result,) = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert (result["prompt"], result["reference"]) == ("Why?", "So.")


@pytest.mark.parametrize(
    ("name", "learnt", "measured", "told"),
    [
        ("rows.jsonl", "train", "validation", "which is all of this file"),
        ("rows.jsonl", "train[:75%]", "validation", "which is all of this file"),
        ("rows.jsonl", "train[:75%]", "train[75%:]", None),
        ("rows.jsonl", "train[:75%]", "train[:75%]", "measured on 'train[:75%]':"),
        ("rows.jsonl", "train[:75%]", "test[50%:]", "measured on 'test[50%:]':"),
        ("rows.jsonl", "train[20:]", "train[:20]", None),
        ("other.jsonl", "train", "validation", None),
        ("rows", "train", "validation", None),
        ("rows", "train+more", "more", "measured on 'more':"),
        ("rows", "train[:50%]+more[:50%]", "train[50%:] + more[50%:]", None),
        ("rows", "train[:50%]+more[:50%]", "train[50%:]+more[40%:]", "measured on"),
    ],
)
def test_evaluation_tells_of_rows_that_were_learnt(tmp_path, name, learnt, measured, told, caplog):
    (tmp_path / "rows").mkdir()
    for each in ("rows.jsonl", "other.jsonl"):
        (tmp_path / each).write_text("")
    dataset = tmp_path / name.replace("other", "rows")
    source = {**source_of(DataArguments(dataset=str(tmp_path / name)), learnt), "task": "vqa"}
    (tmp_path / "run.json").write_text(json.dumps({"sources": [], "sources_before": [source]}))
    evaluate.warn_of_learnt_rows(str(tmp_path), DataArguments(dataset=str(dataset)), measured)
    assert told in caplog.text if told else not caplog.text


def test_conversations_from_a_file_are_trained_on_and_measured(photographs, tmp_path):
    # As docs/own_data.md shows them: `datasets` leaves out what a part doesn't have
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}
    row = {"images": [str(photographs / "train" / "0.jpg")], "messages": [question, answer]}
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    options = {"task": "chat", "dataset": tmp_path / "rows", "output_dir": tmp_path / "new"}
    pretrain.main(arguments(**options, vocab_size=300, **SHORT_TRAINING, **QUIET))
    options |= {"checkpoint": tmp_path / "new", "max_new_tokens": 2}
    more = {"output_dir": tmp_path / "run", "metric_rows": 2}
    finetune.main(arguments(**options | more, **SHORT_TRAINING, **QUIET))
    evaluate.main(arguments(**options | {"output_dir": tmp_path / "out"}))
    results = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert [(result["prompt"], result["reference"]) for result in results] == [("What?", "That.")] * 2


@pytest.mark.parametrize("num_pictures", [0, 2])
def test_a_row_with_other_than_its_pictures_is_named(checkpoint, num_pictures):
    words = [{"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": [{"type": "image"}, *words]}, {"role": "assistant", "content": words}]
    rows = [{"images": [Image.new("RGB", (8, 8))] * num_pictures, "messages": messages}]
    with pytest.raises(ValueError, match=f"Row 0 has 1 picture markers but {num_pictures} pictures"):
        measuring.generate_answers(*checkpoint, Dataset.from_list(rows))


def test_the_loss_does_not_depend_on_the_batch_size(checkpoint):
    # It is the mean over the answers' tokens, however the rows fall into batches
    model, processor = checkpoint
    answers = ["Yes", "A small red circle in the top left and a large blue square in the bottom right", "No"]
    rows = [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    losses = [measuring.evaluation_loss(model, processor, Dataset.from_list(rows), batch_size=n) for n in (1, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_answers_are_compared_with_the_last_turn_only(checkpoint):
    model, processor = checkpoint
    parts = [[{"type": "text", "text": text}] for text in ("What?", "That.", "Why?", "So.")]
    messages = [
        {"role": role, "content": content} for role, content in zip(["user", "assistant"] * 2, parts, strict=True)
    ]
    rows = Dataset.from_list([{"messages": messages}, {"messages": messages[:2]}])
    results = measuring.generate_answers(model, processor, rows, max_new_tokens=2)
    assert [(result["prompt"], result["reference"]) for result in results] == [("Why?", "So."), ("What?", "That.")]


def greedy(checkpoint, content):
    """What the model says, one token after the other and without a cache."""
    model, processor = checkpoint
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids, pixel_values = inputs["input_ids"], inputs.get("pixel_values")
    start = ids.shape[1]
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixel_values).logits[0, -1]
        logits[processor.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        if ids[0, -1] == processor.tokenizer.eos_token_id:
            break
    return processor.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("num_images", "images_last"), [(0, False), (1, False), (2, False), (1, True)])
def test_generation_prints_what_the_model_says(finetuned, checkpoint, photographs, capsys, num_images, images_last):
    paths = [photographs / "train" / f"{i}.jpg" for i in range(num_images)]
    options = {"checkpoint": finetuned, "prompt": "What is it?", "max_new_tokens": 5, "images_last": images_last}
    generate.main(arguments(**options, **({"image": paths} if paths else {})))
    pictures = [{"type": "image", "image": Image.open(path)} for path in paths]
    words = [{"type": "text", "text": "What is it?"}]
    expected = greedy(checkpoint, words + pictures if images_last else pictures + words)
    assert capsys.readouterr().out == f"{expected}\n"


def test_conversations_of_different_lengths_are_answered_together_as_alone(checkpoint, photographs):
    picture = {"type": "image", "image": Image.open(photographs / "train" / "0.jpg")}
    contents = [
        [picture, {"type": "text", "text": "What is it?"}],
        [{"type": "text", "text": "Is there a small red circle to the left of the large blue square?"}],
        [picture, picture, {"type": "text", "text": "Which?"}],
    ]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    together = answering.answer(*checkpoint, conversations, max_new_tokens=5)
    assert together == [greedy(checkpoint, content) for content in contents]


def test_generation_prints_json_for_programs(finetuned, photographs, capsys):
    path = str(photographs / "train" / "0.jpg")
    generate.main(arguments(checkpoint=finetuned, image=path, max_new_tokens=4))
    text = capsys.readouterr().out.removesuffix("\n")
    generate.main(arguments(checkpoint=finetuned, image=path, max_new_tokens=4, json=True))
    record = json.loads(capsys.readouterr().out)
    assert record == {"prompt": "Describe the picture.", "images": [path], "answer": text}


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}])
def test_generation_takes_other_ways_to_choose_tokens(finetuned, photographs, capsys, options):
    options = {"checkpoint": finetuned, "image": photographs / "train" / "0.jpg", "max_new_tokens": 3, **options}
    generate.main(arguments(**options))
    assert capsys.readouterr().out.endswith("\n")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A random Llama, with a tokenizer that knows nothing of pictures."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["user assistant What is this?"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=specials[:1],
        chat_template=CHATML,
    )
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # rounded up, as is usual
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("text")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """A random SigLIP."""
    config = SiglipVisionConfig(
        image_size=32, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("vision")
    set_seed(0)
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def composed(workplace, language_model, vision_model):
    options = {"text": language_model, "vision": vision_model, "num_fusion_layers": 2, "output_dir": "composed"}
    compose.main(arguments(**options))
    return workplace / "composed"


def test_a_composed_checkpoint_is_its_language_model_on_text_alone(composed, language_model):
    model = AutoModelForImageTextToText.from_pretrained(composed).eval()
    backbone = LlamaForCausalLM.from_pretrained(language_model).eval()
    assert model.config.text_config.num_hidden_layers == 1
    assert model.config.fusion_stack_config.num_hidden_layers == 2
    ids = AutoTokenizer.from_pretrained(language_model)("What is this?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - backbone(input_ids=ids).logits).abs().max() == 0.0


def test_a_composed_checkpoint_keeps_the_backbones_tokenizer_and_pictures(composed, language_model):
    processor = AutoProcessor.from_pretrained(composed)
    config = AutoModelForImageTextToText.from_pretrained(composed).config
    assert isinstance(processor, DuoStreamProcessor)
    assert processor.image_seq_length == config.image_seq_length == 4
    assert processor.image_token_id == config.image_token_id
    assert processor.image_processor.size == {"height": 32, "width": 32}
    plain = AutoTokenizer.from_pretrained(language_model)
    conversation = [{"role": "user", "content": "What is this?"}]
    assert processor.apply_chat_template(conversation, tokenize=True)[0] == plain.apply_chat_template(
        conversation, tokenize=True, return_dict=False
    )


def test_a_composed_checkpoint_answers_and_can_be_finetuned(composed, photographs, tmp_path, capsys):
    generate.main(arguments(checkpoint=composed, image=photographs / "train" / "0.jpg", max_new_tokens=3))
    assert capsys.readouterr().out.endswith("\n")
    options = {"checkpoint": composed, "dataset": photographs, "answer_column": "captions"}
    finetune.main(arguments(**options, output_dir=tmp_path / "run", **SHORT_TRAINING, **QUIET))
    evaluate.main(
        arguments(**options | {"checkpoint": tmp_path / "run"}, output_dir=tmp_path / "out", max_new_tokens=2)
    )
    assert read_json(tmp_path / "out" / "metrics.json")["num_rows"] == 2  # photographs


def test_composing_says_what_it_wrote(language_model, vision_model, tmp_path, capsys):
    options = {"text": language_model, "vision": vision_model, "num_fusion_layers": 1, "output_dir": tmp_path / "out"}
    compose.main(arguments(**options))
    said = "num_text_layers: 2\nnum_fusion_layers: 1\nnum_image_update_layers: 1\nimage_seq_length: 4\n"
    assert said in capsys.readouterr().out
    compose.main(
        arguments(**options, spatial_merge_size=2, json=True, config_overrides='{"num_image_update_layers": 0}')
    )
    made = json.loads(capsys.readouterr().out)
    assert made["num_text_layers"] == 2 and made["num_image_update_layers"] == 0
    assert made["num_fusion_layers"] == 1 and made["num_parameters"] > 0 and made["image_seq_length"] == 1
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_seq_length == 1
    with pytest.raises(ValueError, match="`dtype` is 'bf16'; expected one of torch's"):
        compose.main(arguments(**options, dtype="bf16"))
    for field in ("spatial_merge_size", "image_token_id"):
        with pytest.raises(ValueError, match=rf"`config_overrides` has \['{field}'\], which options of their own"):
            compose.main(arguments(**options, config_overrides=json.dumps({field: 2})))


def test_composing_twice_with_one_seed_gives_the_same_new_weights(language_model, vision_model, composed, tmp_path):
    options = {"text": language_model, "vision": vision_model, "num_fusion_layers": 2}
    compose.main(arguments(**options, output_dir=tmp_path / "same"))
    compose.main(arguments(**options, output_dir=tmp_path / "other", seed=1))
    first, same, other = weights(composed), weights(tmp_path / "same"), weights(tmp_path / "other")
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed and all(name.startswith("model.projector.") for name in changed)


def test_composing_from_scratch_keeps_the_shapes_and_no_weight(language_model, vision_model, composed, tmp_path):
    options = {"text": language_model, "vision": vision_model, "num_fusion_layers": 2, "from_scratch": True}
    compose.main(arguments(**options, output_dir=tmp_path / "new"))
    old, new = weights(composed), weights(tmp_path / "new")
    assert {name: weight.shape for name, weight in old.items()} == {name: weight.shape for name, weight in new.items()}
    # Norms and biases start at one and zero in both
    assert not any(torch.equal(old[name], new[name]) for name in old if old[name].ndim > 1)


def test_composing_for_a_task_that_understands_keeps_an_encoder_that_reads_both_ways(vision_model, tmp_path):
    tokenizer = train_tokenizer(["a red square"], 300)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    PhiConfig(vocab_size=len(tokenizer), **size).save_pretrained(tmp_path / "fusion")
    options = {"text": tmp_path / "text", "vision": vision_model, "fusion_config": tmp_path / "fusion"}
    compose.main(arguments(**options, task="classification", output_dir=tmp_path / "reads"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reads")
    assert not model.config.is_text_causal
    compose.main(arguments(**options, output_dir=tmp_path / "writes"))
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "writes").config.is_text_causal
    with pytest.raises(ValueError, match="`task` is 'see'; there are"):
        compose.main(arguments(**options, task="see", output_dir=tmp_path / "none"))


@pytest.fixture
def other_size(vision_model, tmp_path):
    """A vision model whose image processor makes pictures of another size than its config tells, as DINOv2's does."""
    other = tmp_path / "vision"
    shutil.copytree(vision_model, other)
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(other)
    return other


def test_a_composed_model_reads_pictures_of_the_size_that_the_image_processor_makes(
    language_model, other_size, photographs, tmp_path
):
    compose.main(arguments(text=language_model, vision=other_size, num_fusion_layers=2, output_dir=tmp_path / "out"))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.image_size, config.vision_config.image_size) == (48, 32)
    options = {"task": "caption", "dataset": photographs, "output_dir": tmp_path / "evaluated"}
    evaluate.main(arguments(checkpoint=tmp_path / "out", **options, max_new_tokens=2))
    assert (tmp_path / "evaluated/metrics.json").is_file()


@pytest.fixture
def convolutions(tmp_path):
    """A vision model whose image processor knows sizes by their shorter edge alone, as ConvNeXt's does."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    AutoModel.from_config(config).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessorPil(size={"shortest_edge": 384}).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


@pytest.mark.parametrize("image_size", [64, 400])
def test_convolutions_read_pictures_of_the_size_that_is_asked_for(language_model, convolutions, tmp_path, image_size):
    options = {"text": language_model, "vision": convolutions, "num_fusion_layers": 2, "image_size": image_size}
    compose.main(arguments(**options, output_dir=tmp_path / "out"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = processor.image_processor(Image.new("RGB", (90, 60), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, image_size, image_size)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.get_image_features(pixels).pooler_output.shape[1] == processor.image_seq_length


def test_an_image_processor_that_makes_no_such_pictures_is_refused(language_model, convolutions, tmp_path):
    PoolFormerImageProcessorPil().save_pretrained(convolutions)
    options = {"text": language_model, "vision": convolutions, "num_fusion_layers": 2, "image_size": 96}
    with pytest.raises(ValueError, match=r"`image_size` is 96, but .* makes one of 106 x 159"):
        compose.main(arguments(**options, output_dir=tmp_path / "out"))


def test_a_size_that_is_none_is_refused_by_its_name(language_model, vision_model, tmp_path):
    options = {"text": language_model, "vision": vision_model, "num_fusion_layers": 2, "image_size": 0}
    with pytest.raises(ValueError, match="`image_size` is 0; expected at least 1"):
        compose.main(arguments(**options, output_dir=tmp_path / "out"))


@pytest.mark.parametrize("image_size", [16, 64])
def test_a_composed_model_reads_pictures_of_the_size_that_is_asked_for(
    language_model, vision_model, tmp_path, image_size
):
    options = {"text": language_model, "vision": vision_model, "num_fusion_layers": 2, "image_size": image_size}
    compose.main(arguments(**options, output_dir=tmp_path))
    config, processor = AutoConfig.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (
        config.image_seq_length == processor.image_seq_length == (image_size // config.vision_config.patch_size) ** 2
    )
    picture = Image.new("RGB", (90, 60), "red")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (
        model.get_image_features(**processor.image_processor(picture, return_tensors="pt"))
        .pooler_output.isfinite()
        .all()
    )


def test_pretraining_reads_pictures_of_the_size_that_the_image_processor_makes(other_size, photographs, tmp_path):
    options = {"preset": "tiny", "vision": other_size, "dataset": photographs, "vocab_size": 300}
    pretrain.main(arguments(task="caption", **options, output_dir=tmp_path / "out", **SHORT_TRAINING, **QUIET))
    assert AutoConfig.from_pretrained(tmp_path / "out").image_size == 48


def test_composing_refuses_an_image_processor_whose_pictures_have_several_sizes(language_model, other_size, tmp_path):
    (other_size / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False}
        )
    )
    with pytest.raises(ValueError, match=r"makes 32 x 48 pixels of a picture of 64 x 96; expected squares of all"):
        compose.main(
            arguments(text=language_model, vision=other_size, num_fusion_layers=2, output_dir=tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_text_model_does_not_know_are_told(
    language_model, vision_model, composed, photographs, tmp_path, caplog
):
    for place in (language_model, composed):
        shutil.copytree(place, tmp_path / place.name)
        tokenizer = AutoTokenizer.from_pretrained(place)
        num_embeddings = AutoConfig.from_pretrained(place).get_text_config().vocab_size
        tokenizer.add_tokens([f"more {i}" for i in range(num_embeddings - len(tokenizer) + 3)])
        tokenizer.save_pretrained(tmp_path / place.name)
    told = "The tokenizer has 3 tokens that the text model"
    options = {"vision": vision_model, "num_fusion_layers": 2, "output_dir": tmp_path / "out"}
    for text, is_told in ((language_model, False), (tmp_path / language_model.name, True)):
        caplog.clear()
        compose.main(arguments(text=text, **options))
        assert (told in caplog.text) == is_told
    caplog.clear()
    options = {"checkpoint": tmp_path / composed.name, "dataset": photographs, "task": "caption", **SHORT_TRAINING}
    finetune.main(arguments(**options, **QUIET, output_dir=tmp_path / "run"))
    assert told in caplog.text


def test_composing_takes_the_language_models_precision(language_model, half_vision_model, tmp_path):
    options = {"text": language_model, "vision": half_vision_model, "num_fusion_layers": 2}
    for precision, more in ((torch.float32, {}), (torch.bfloat16, {"dtype": "bfloat16"})):
        compose.main(arguments(**options, **more, output_dir=tmp_path / "out"))
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert {weight.dtype for weight in model.parameters()} == {precision}


@pytest.mark.parametrize("more", [{}, {"num_fusion_layers": 3}])
def test_composing_refuses_a_split_that_cannot_be(language_model, vision_model, tmp_path, more):
    with pytest.raises(ValueError, match="num_fusion_layers"):
        compose.main(arguments(text=language_model, vision=vision_model, output_dir=tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_the_quickstart_ends_on_questions_and_captions_that_do_not_pad_each_other(workplace):
    scenes = build_scenes("train", 6)
    questions, captions = pack_rows(question_rows(scenes), 5), caption_rows(scenes)
    assert len(questions) == 12
    rows = quickstart.questions_and_captions(questions, captions)
    assert rows["length"][:] == [0] * 12 + [1] * 6
    assert all(1 <= len(row["conversations"]) <= 5 for row in rows.take(12))
    said = [row["conversations"][0]["prompt"][0]["content"][-1]["text"] for row in rows.skip(12)]
    assert said == ["Describe the picture."] * 6
    pictures = captions.cast_column("images", List(UNDECODED))["images"]
    assert rows.skip(12)["images"][:] == pictures[:]


def test_a_caption_is_right_if_it_names_what_is_there_and_nothing_else():
    objects = [{"colour": "red", "shape": "circle"}, {"colour": "blue", "shape": "square"}]
    right = "A small red circle in the top left and a large blue square in the center."
    names = quickstart.caption_names_objects
    assert names(right, objects)
    assert names("A large blue square, and a small red circle.", objects)
    assert not names("A small red circle.", objects)
    assert not names(right.replace("red", "green"), objects)
    assert not names(right.replace("red circle", "blue square"), objects)
    assert not names(f"{right} A red circle.", objects)
    assert not names(f"{right} A green cross.", objects)
    assert not names("", objects)


def test_attention_to_a_picture_is_a_share_for_each_of_its_tokens(finetuned, photographs):
    with Image.open(photographs / "train" / "0.jpg") as picture:
        attention = attended_tokens(finetuned, picture, {"prompt": "What is it?"})
    side = int(AutoProcessor.from_pretrained(finetuned).image_seq_length ** 0.5)
    assert attention.shape == (side, side)
    assert attention.min() >= 0
    assert 0 < attention.sum() <= 1 + 1e-5


class Page(HTMLParser):
    """What a page shows: its pictures by the class of the part they are in, and everything it refers to."""

    def __init__(self, text):
        super().__init__()
        self.parts, self.images, self.references, self.tags, self.text = [""], {}, [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.references += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        if tag == "div":
            self.parts.append(attributes.get("class", ""))
        if tag == "img":
            self.images.setdefault(self.parts[-1], []).append(attributes)

    def handle_endtag(self, tag):
        if tag == "div":
            self.parts.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def quick_folder(workplace):
    """What the quickstart writes, with next to no training."""
    numbers = {"train_scenes": 64, "eval_scenes": 8, "pretrain_steps": 2, "question_steps": 2, "finetune_steps": 2}
    quickstart.main(arguments(output_dir="quickstart", **numbers))
    return workplace / "quickstart"


@pytest.mark.slow
def test_the_quickstart_tells_where_no_question_of_a_kind_was_asked(workplace):
    numbers = {"train_scenes": 64, "eval_scenes": 1, "pretrain_steps": 2, "question_steps": 2, "finetune_steps": 2}
    quickstart.main(arguments(output_dir="few", seed=1, **numbers))
    metrics = read_json(workplace / "few" / "metrics.json")
    missing = metrics["held_out_scenes"].keys() - metrics["held_out_combinations"].keys()
    assert missing and "<td>–</td>" in (workplace / "few" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(quick_folder):
    return Page((quick_folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
class TestQuickstart:
    def test_its_metrics_hold_the_figures_times_memory_and_versions(self, quick_folder):
        metrics = read_json(quick_folder / "metrics.json")
        for group in ("held_out_scenes", "blank_picture", "held_out_combinations"):
            figures = metrics[group]
            kinds = {"colour", "shape", "count", "existence", "relation", "place"}
            assert {"exact_match", *(f"exact_match_{kind}" for kind in kinds)} <= set(figures)
            assert all(0 <= figure <= 1 for figure in figures.values())
        assert "exact_match_held_out" in metrics["held_out_combinations"]
        assert 0 <= metrics["captions_with_all_colours_and_shapes"] <= 1
        assert metrics["num_captions"] == 8
        assert "report" in metrics["seconds"] and {"draw scenes", "pretrain", "evaluate"} <= set(metrics["seconds"])
        assert all(seconds >= 0 for seconds in metrics["seconds"].values())
        assert metrics["seconds"]["pretrain"] > 0
        assert 0.1 < metrics["peak_memory_gib"] < 16
        assert {"duostream", "transformers", "torch", "python"} <= set(metrics["versions"])
        assert metrics["versions"]["torch"] == torch.__version__
        assert metrics["arguments"]["train_scenes"] == 64

    def test_its_checkpoint_loads(self, quick_folder):
        model = AutoModelForImageTextToText.from_pretrained(quick_folder / "finetuned")
        assert read_json(quick_folder / "metrics.json")["num_parameters"] == model.num_parameters()

    def test_its_report_needs_nothing_from_outside(self, quick_folder, page):
        assert page.references
        assert all(reference.startswith("data:image/") for reference in page.references)
        assert not {"script", "link", "iframe"} & set(page.tags)
        assert "url(" not in page.text and "@import" not in page.text

    def test_its_report_shows_curves_twelve_pictures_and_two_attention_maps(self, page):
        images = page.images
        assert {name: len(found) for name, found in images.items()} == {"": 2, "pictures": 12, "attention": 2}
        assert len({image["src"] for image in images["pictures"]}) > 1
        for image in [image for found in images.values() for image in found]:
            kind, data = image["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            picture = Image.open(BytesIO(b64decode(data)))
            picture.load()
            assert picture.width > 100
            assert image["alt"]

    def test_its_report_shows_questions_with_true_and_given_answers(self, page):
        assert page.text.count("true: ") == page.text.count("given: ") == 12
        assert page.text.count("?\n") >= 12

    def test_its_report_names_every_kind_of_question_and_every_stage(self, quick_folder, page):
        for name in ("colour", "shape", "count", "existence", "relation", "place"):
            assert name in page.text
        for stage, seconds in read_json(quick_folder / "metrics.json")["seconds"].items():
            # A page can't tell how long it took to write it
            assert stage == "report" or f"{stage}{seconds}" in page.text
