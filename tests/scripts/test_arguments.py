import json
import re
from dataclasses import dataclass, field

import pytest
import yaml

from duostream.scripts.arguments import DataArguments, DuoStreamTrainingArguments, parse, parse_file


@dataclass
class Options:
    """One option of each kind."""

    name: str = field(default="a", metadata={"help": "A name."})
    number: int = field(default=1, metadata={"help": "A number."})
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    switch: bool = field(default=False, metadata={"help": "A switch."})
    paths: list[str] = field(default_factory=list, metadata={"help": "Some paths."})
    limit: int | None = field(default=None, metadata={"help": "A limit, or none."})


def write(path, options):
    path.write_text(json.dumps(options) if path.suffix == ".json" else yaml.safe_dump(options), encoding="utf-8")
    return str(path)


@pytest.fixture(params=["options.yaml", "options.yml", "options.json"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_options_are_read_from_the_command_line():
    args = ["--name", "b", "--number", "2", "--rate", "1e-4", "--switch", "--paths", "p", "q", "--limit", "3"]
    assert parse(Options, args=args) == (Options("b", 2, 1e-4, True, ["p", "q"], 3),)


def test_without_options_the_defaults_hold():
    assert parse(Options, args=[]) == (Options(),)


def test_options_are_read_from_the_running_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["duostream pretrain", "--number", "4"])
    assert parse(Options)[0].number == 4


def test_options_are_read_from_a_file(path):
    options = {"name": "b c: d", "number": 2, "rate": 1e-4, "switch": True, "paths": ["p q", "r"], "limit": 3}
    assert parse(Options, args=[write(path, options)]) == (Options(**options),)


def test_what_follows_a_file_on_the_command_line_overrides_it(path):
    options = {"name": "b", "number": 2, "switch": True, "paths": ["p"]}
    args = [write(path, options), "--number", "3", "--paths", "q", "r", "--switch", "false"]
    assert parse(Options, args=args) == (Options(name="b", number=3, switch=False, paths=["q", "r"]),)


@pytest.mark.parametrize("text", ["off", "a # b", "-1", "- a", "-x", "中文 ß", "", "null"])
def test_text_in_a_file_arrives_as_it_is(path, text):
    assert parse(Options, args=[write(path, {"name": text})])[0].name == text


def test_null_in_a_file_is_none(path):
    assert parse(Options, args=[write(path, {"limit": None, "number": 2})]) == (Options(number=2, limit=None),)


def test_an_empty_list_in_a_file_is_empty(path):
    assert parse(Options, args=[write(path, {"paths": []})]) == (Options(),)


def test_options_go_to_the_class_that_has_them(path):
    args = [write(path, {"dataset": "a", "number": 2}), "--prompt", "What?"]
    options, data = parse(Options, DataArguments, args=args)
    assert (options.number, data.dataset, data.prompt) == (2, "a", "What?")


def test_a_mapping_in_a_file_arrives_as_one(path, tmp_path):
    options = {
        "output_dir": str(tmp_path / "run"),
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 3, "decay_type": "linear"},
        "learning_rate": 1e-4,
        "report_to": "none",
    }
    (training_args,) = parse(DuoStreamTrainingArguments, args=[write(path, options)])
    assert training_args.lr_scheduler_kwargs == options["lr_scheduler_kwargs"]
    assert training_args.learning_rate == 1e-4


@pytest.mark.parametrize(("content", "kind"), [([1, 2], "list"), ("a", "str"), (None, "NoneType")])
def test_a_file_that_is_no_mapping_is_refused_with_its_name(path, content, kind):
    with pytest.raises(ValueError, match=f"{path.name} holds a {kind}; expected a mapping"):
        parse(Options, args=[write(path, content)])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        parse(Options, args=[str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nmae", "b"], "--nmae"),
        (["--number", "many"], "invalid int value: 'many'"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_option_ends_the_command_with_code_2_and_is_named(args, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Options, args=args)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--paths", "p", "--paths", "q"], ["--paths=p", "--number", "2", "--paths=q"]])
def test_a_list_that_is_given_twice_is_refused_for_one_of_them_would_be_lost(path, args, capsys):
    for before in ([], [write(path, {"paths": ["r"]})]):
        with pytest.raises(SystemExit) as ended:
            parse(Options, args=[*before, *args])
        assert ended.value.code == 2
        assert "--paths is given twice; give all of its values at once: --paths A B" in capsys.readouterr().err


def test_of_any_other_option_that_is_given_twice_the_last_counts():
    assert parse(Options, args=["--number", "2", "--switch", "true", "--number", "3", "--switch", "false"]) == (
        Options(number=3),
    )


def test_numbers_in_yaml_are_numbers_however_they_are_written_and_words_are_words(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "rate: 1e-5\nswitch: true\npaths: [no, en, 1e5x]\nname: 12e4567\nlimit: 3\n"
        "scheduler: {rate: 2E+3, steps: 3, is_on: false, when: y}\n"
    )

    @dataclass
    class More(Options):
        scheduler: str = field(default="", metadata={"help": "A mapping."})

    (options,) = parse(More, args=[str(path)])
    assert (options.rate, options.switch, options.limit) == (1e-5, True, 3)
    assert (options.paths, options.name) == (["no", "en", "1e5x"], "12e4567")
    assert json.loads(options.scheduler) == {"rate": 2000.0, "steps": 3, "is_on": False, "when": "y"}


@pytest.mark.parametrize("text", ["12:30", "0x1F", "0017", "1_000", "2024-01-01 10:00:00", "1.0"])
def test_text_in_yaml_that_looks_like_a_number_or_a_date_is_as_it_is_written(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(f"name: {text}\npaths: [{text}, b]\n")
    assert parse(Options, args=[str(path)]) == (Options(name=text, paths=[text, "b"]),)


def test_learning_rates_in_yaml_may_be_written_as_on_the_command_line(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("learning_rates: {text: 1e-5, projector: 1e-3}\nreport_to: none\nuse_cpu: yes\n")
    (training_args,) = parse(DuoStreamTrainingArguments, args=[str(path)])
    assert json.loads(training_args.learning_rates) == {"text": 1e-5, "projector": 1e-3} and training_args.use_cpu


def test_a_wrong_option_in_a_file_ends_the_command_with_code_2_and_is_named(path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Options, args=[write(path, {"nmae": "b"})])
    assert ended.value.code == 2
    assert "nmae" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_a_bare_no_in_a_file_is_a_strategy(tmp_path, option):
    path = tmp_path / "options.yaml"
    path.write_text(f"{option}: no\nreport_to: none\nuse_cpu: yes\npacking: no\n")
    (training_args,) = parse(DuoStreamTrainingArguments, args=[str(path)])
    assert getattr(training_args, option) == "no" and training_args.packing is False


def test_the_name_of_an_option_is_never_cut_short(path, capsys):
    for args in ([write(path, {"max_train": 3})], ["--max_train", "3"]):
        with pytest.raises(SystemExit) as ended:
            parse(DataArguments, args=args)
        assert ended.value.code == 2 and "--max_train" in capsys.readouterr().err


def shown_by(option, capsys, *classes):
    with pytest.raises(SystemExit) as ended:
        parse(*classes, args=[option], doc="Does this.\n\nExample:\n\n    duostream this --name b\n")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "\nExample:\n\n    duostream this --name b\n" in shown
    return shown


def test_help_shows_the_description_as_written_and_a_line_for_each_option_of_ours(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    shown = shown_by("--help", capsys, Options, DataArguments, DuoStreamTrainingArguments)
    assert re.search(r"^  --number +\[1\] A number$", shown, flags=re.MULTILINE)
    assert "--learning_rate " in shown and "--fsdp" not in shown
    assert "Needed more rarely: " in shown and "--max_column_chars" in shown
    assert max(map(len, shown.splitlines())) <= 90


def test_all_help_shows_every_option_with_its_default(capsys):
    shown = shown_by("--help_all", capsys, Options, DuoStreamTrainingArguments)
    assert "A number. (default: 1)" in " ".join(shown.split())
    assert "--fsdp" in shown


def test_every_option_of_the_trainer_is_an_option(tmp_path):
    args = ["--output_dir", str(tmp_path), "--gradient_accumulation_steps", "3", "--optim", "adafactor"]
    (training_args,) = parse(DuoStreamTrainingArguments, args=[*args, "--report_to", "none", "--seed", "7"])
    assert training_args.output_dir == str(tmp_path)
    assert (training_args.gradient_accumulation_steps, training_args.seed) == (3, 7)
    assert training_args.optim == "adafactor"
    assert training_args.report_to == []


def test_columns_are_kept_by_default_and_must_be(tmp_path):
    assert DuoStreamTrainingArguments(output_dir=str(tmp_path)).remove_unused_columns is False
    with pytest.raises(ValueError, match="`remove_unused_columns` must be False"):
        parse(DuoStreamTrainingArguments, args=["--output_dir", str(tmp_path), "--remove_unused_columns", "true"])


@pytest.mark.parametrize("name", ["max_length", "max_column_chars", "max_train_rows", "max_eval_rows"])
def test_numbers_of_rows_and_characters_below_one_are_refused(name):
    assert getattr(DataArguments(**{name: 1}), name) == 1
    for number in (0, -3):
        with pytest.raises(ValueError, match=f"`{name}` is {number}; expected at least 1"):
            parse(DataArguments, args=[f"--{name}={number}"])


@pytest.mark.parametrize("value", ["rows.json", "rows.yaml"])
def test_an_option_whose_value_ends_as_a_file_of_options_is_an_option(value, tmp_path):
    data_args, _ = parse(DataArguments, DuoStreamTrainingArguments, args=[f"--dataset={value}", "--output_dir", "out"])
    assert data_args.dataset == value
    (tmp_path / "part.yaml").write_text(f"dataset: {value}\ntask: vqa\n")
    assert parse_file(DataArguments, str(tmp_path / "part.yaml")).dataset == value
