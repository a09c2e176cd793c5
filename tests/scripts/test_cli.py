"""The one command `duostream`, and what it says when something is wrong."""

import subprocess
import sys

import pytest
from PIL import Image

from duostream.scripts import cli, evaluate, generate


def run(*args):
    return subprocess.run([sys.executable, "-m", "duostream.scripts.cli", *args], capture_output=True, text=True)


def test_without_a_command_all_are_listed(capsys):
    cli.main([])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
    assert len(shown.splitlines()) <= 24


def test_the_version_is_told(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("duostream 0.")


def test_a_command_that_is_not_there_ends_with_code_2_and_the_nearest_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fintune"])
    assert ended.value.code == 2
    assert "no command 'fintune': did you mean 'finetune'?" in capsys.readouterr().err


def test_a_users_mistake_ends_with_code_1_and_no_traceback(tmp_path, capsys):
    args = ["push", "--checkpoint", str(tmp_path / "nowhere"), "--repo_id", "me/it"]
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "duostream push: `checkpoint` is" in told and "Traceback" not in told
    with pytest.raises(ValueError, match="`checkpoint` is"):
        cli.main(["--debug", *args])


@pytest.mark.parametrize(
    "command",
    [["demo"], ["serve", "--port", "9"], ["generate", "--checkpoint"], ["evaluate", "--checkpoint"]],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "'nowhere': there is no such folder, and from the Hub it can't be had: "),
        ("no/such/folder", "'no/such/folder': there is no such folder; expected a folder with"),
        ("empty", "'empty', a folder without `config.json`; expected a folder with"),
        ("a file", "'a file', a file; expected a folder with"),
        (
            "adapter",
            "'adapter', an adapter of PEFT without its model: `PeftModel.from_pretrained(model, ",
        ),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_with_what_was_expected(
    command, name, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a file").touch()
    (tmp_path / "adapter/adapter_config.json").touch()
    if command[0] in ("demo", "serve"):
        pytest.importorskip("gradio" if command[0] == "demo" else "fastapi", reason="the command needs it")
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, name])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"duostream {command[0]}: `checkpoint` is {told}" in said and "Repo id" not in said


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((evaluate, name) for name in ("batch_size", "max_eval_rows", "max_new_tokens", "num_beams")),
        *((generate, name) for name in ("max_new_tokens", "num_beams")),
    ],
)
def test_a_number_below_1_is_refused_before_the_model_is_looked_for(command, option, value):
    with pytest.raises(ValueError, match=f"`{option}` is {value}; expected at least 1"):
        command.main(["--checkpoint", "no/such/folder", f"--{option}={value}"])


@pytest.mark.parametrize("name", ["a file", "a file/folder"])
def test_evaluation_into_a_file_is_refused_before_the_model_is_looked_for(name, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match=f"`output_dir` is '.*{name}', but '.*a file' is a file; expected a folder"):
        evaluate.main(["--checkpoint", "no/such/folder", "--output_dir", str(tmp_path / name)])


def test_a_picture_that_is_not_there_is_named_before_the_model_is_read(tmp_path):
    (tmp_path / "config.json").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    with pytest.raises(ValueError, match=r"`image` 'nowhere.jpg': a picture can't be read"):
        generate.main(["--checkpoint", str(tmp_path), "--image", str(tmp_path / "there.png"), "nowhere.jpg"])


def test_a_defect_of_ours_shows_where_it_is(monkeypatch):
    monkeypatch.setattr(generate, "OPTIONS", None)
    with pytest.raises(TypeError):
        cli.main(["generate"])


@pytest.mark.slow
def test_the_exit_codes_are_those_of_the_process(tmp_path):
    failed = run("generate", "--checkpoint", str(tmp_path))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and str(tmp_path) in failed.stderr
    debugged = run("--debug", "generate", "--checkpoint", str(tmp_path))
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr


def test_an_interrupted_command_ends_with_code_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate"])
    assert ended.value.code == 130
    assert "duostream generate was interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completions_hold_the_commands_and_their_options(shell, capsys):
    cli.main(["completion", shell])
    script = capsys.readouterr().out
    assert "finetune" in script and "--conversations_per_row" in script


@pytest.mark.slow
def test_bash_completes_commands_and_options(tmp_path, capsys):
    cli.main(["completion", "bash"])
    script = tmp_path / "completions"
    script.write_text(capsys.readouterr().out)

    def completed(*words):
        line = " ".join(words)
        commands = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            '_shtab_duostream 2>/dev/null; echo "${COMPREPLY[@]}"'
        )
        return subprocess.run(["bash", "-c", commands], capture_output=True, text=True).stdout.split()

    assert completed("duostream", "fin") == ["finetune"]
    assert "--conversations_per_row" in completed("duostream", "finetune", "--conv")


def test_a_shell_without_completions_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["completion", "elvish"])
    assert "takes one of bash" in capsys.readouterr().err
