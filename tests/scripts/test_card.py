"""The card says what training and evaluation measured, parses as the Hub's clients parse it, and names no folder."""

import json
import re
import shutil
import time
from dataclasses import fields, replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hub_server import problems_of
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import ExifTags, Image
from tiny_models import small_model
from transformers import TrainerCallback
from transformers.integrations import CodeCarbonCallback
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import duostream
from duostream import DuoStreamConfig, DuoStreamDataCollator, DuoStreamProcessor, train_tokenizer
from duostream.scripts import evaluate
from duostream.scripts.arguments import DataArguments, DuoStreamTrainingArguments
from duostream.scripts.card import (
    HEADS,
    PATHS,
    are_same_weights,
    as_text,
    is_by_hand,
    prompt_of,
    read_evaluation,
    weights_fingerprints,
    without_folders,
    write_card,
    write_run,
)
from duostream.scripts.data import load_mixture, load_rows
from duostream.scripts.push import PushArguments, push
from duostream.scripts.report import pick
from duostream.scripts.trainer import DuoStreamTrainer

STEP_SECONDS = 0.2
SCENES = {"name": "scenes", "kind": "scenes", "config": None, "split": "train", "task": "caption"}
OTHER = {**SCENES, "name": "other", "kind": "local"}
CAPTIONS = ["a red | circle", "a ![dot](http://evil/p.png)", "<b>two</b> squares"]


class Measured(CodeCarbonCallback):
    """Leaves the file that CodeCarbon, which is not installed here, would leave."""

    def __init__(self) -> None:
        self.tracker = None

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
        columns = "timestamp,duration,emissions,energy_consumed,country_name,longitude"
        lines = ["2026-01-01T00:00:00,9,9,9,Norway,10.7522", "2026-01-02T00:00:00,36,0.0125,0.05,Norway,10.7522"]
        (Path(args.output_dir) / "emissions.csv").write_text("\n".join([columns, *lines]) + "\n")


class Slow(TrainerCallback):
    """Steps that take a while."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(STEP_SECONDS)


def train(
    folder: Path, data: DataArguments, callbacks: list | None = None, resume: bool | str = False, **options: Any
) -> Path:
    """Two steps, and what a trained folder has then."""
    rows = load_rows(data, "train")
    tokenizer = train_tokenizer(["Describe the picture. a red circle"] * 4, 300)
    config = DuoStreamConfig.from_preset("tiny", vocab_size=len(tokenizer), vision_config={"image_size": 24})
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 24, "width": 24}),
        tokenizer,
        image_seq_length=config.image_seq_length,
    )
    config.image_token_id = processor.image_token_id
    options = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", **options}
    num_measured = options.get("metric_rows", 0)
    trainer = DuoStreamTrainer(
        model=duostream.DuoStreamForConditionalGeneration(config),
        args=DuoStreamTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, learning_rate=3e-4, **options),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        data_collator=DuoStreamDataCollator(processor),
        processing_class=processor,
        callbacks=callbacks,
        task=data.task,
        metric_rows=load_rows(data, "train", num_measured, is_evaluation=True) if num_measured else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    trainer.save_model()
    write_run(trainer, data)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataArguments:
    """A folder of photographs that tell where they were taken."""
    folder = tmp_path_factory.mktemp("private") / "my photographs"
    (folder / "train").mkdir(parents=True)
    where = Image.Exif()
    where[ExifTags.Base.ImageDescription] = "at Alice's"
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (400, 300), color).save(folder / "train" / f"{i}.jpg", exif=where)
    lines = [json.dumps({"file_name": f"{i}.jpg", "captions": [text]}) for i, text in enumerate(CAPTIONS)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return DataArguments(task="caption", dataset=str(folder), eval_split="train")


@pytest.fixture(scope="module")
def trained(data: DataArguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("machine") / "captioner", data)


@pytest.fixture(scope="module")
def evaluation(data: DataArguments, trained: Path) -> Path:
    folder = trained.parent / "evaluation"
    options = {"checkpoint": trained, "task": "caption", "dataset": data.dataset, "eval_split": "train"}
    options |= {"output_dir": folder, "max_new_tokens": 4}
    evaluate.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    return folder


def test_a_card_is_filled_from_the_run(trained: Path, data: DataArguments, tmp_path: Path) -> None:
    assert write_card(trained, output_dir=tmp_path, repo_id="me/captioner")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["duostream", "vision-language-model"],
    }
    rows = load_rows(data, "train")
    text = card.text
    assert f"| training | 3 | {rows._fingerprint} |" in text and "my photographs" in text
    assert "| learning_rate | `0.0003` |" in text and "| training_steps | `2` |" in text
    log = json.loads((trained / "run.json").read_text())["log_history"]
    (loss,) = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert f"| loss | {loss:.4f} |" in text
    assert "![Loss by step](training_curve.png)" in text and "Its energy was not measured." in text
    assert Image.open(tmp_path / "training_curve.png").width > 300


def test_no_folder_of_the_machine_is_in_what_can_be_pushed(
    trained: Path, evaluation: Path, data: DataArguments, tmp_path: Path
) -> None:
    write_card(trained, [evaluation], tmp_path)
    for file in (tmp_path / "README.md", trained / "run.json"):
        text = file.read_text()
        for folder in (trained.parent, Path(data.dataset).parent, Path.home(), Path.cwd()):
            assert str(folder) not in text, file
    command = "duostream evaluate --checkpoint captioner --task caption --dataset 'my photographs' --eval_split train"
    assert command in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--dataset", "/home/alice/data"], ["--dataset", "data"]),
        (["--image_dir", "~/data"], ["--image_dir", "data"]),
        (["--output-dir", "../alice/data"], ["--output-dir", "data"]),
        (["--dataset=/home/alice/data"], ["--dataset=data"]),
        (["--mixture", "/home/alice/a.yaml", "b.yaml", "~/c.yaml"], ["--mixture", "a.yaml", "b.yaml", "c.yaml"]),
        (["/home/alice/options.yaml", "--task", "vqa"], ["options.yaml", "--task", "vqa"]),
        (["--checkpoint", "runs/mine"], ["--checkpoint", "runs/mine"]),
        (["--prompt", "/no_think {question}"], ["--prompt", "/no_think {question}"]),
        (["--prompt=../.. is how many / and ~?"], ["--prompt=../.. is how many / and ~?"]),
        (["--dataset", "/home/alice/data", "--prompt", "/a/b"], ["--dataset", "data", "--prompt", "/a/b"]),
    ],
)
def test_a_path_from_outside_is_cut_to_its_last_name_and_text_is_not(command: list[str], shown: list[str]) -> None:
    assert without_folders(command) == shown


def test_each_option_of_evaluating_that_names_a_folder_or_a_file_is_known() -> None:
    told = {each.name: each.metadata["help"] for cls in evaluate.OPTIONS for each in fields(cls)}
    places = {
        name for name, text in told.items() if re.search(r"\b(folder|files?)\b|written here", text, re.IGNORECASE)
    }
    assert places == PATHS


def test_rows_that_are_shown_are_spread_over_all() -> None:
    rows = [{"row": row} for row in range(20)]
    for size, number, shown in ((20, 12, 12), (7, 4, 4), (3, 4, 3), (20, 1, 1), (0, 4, 0)):
        picked = [each["row"] for each in pick(rows[:size], number)]
        gaps = {after - before for before, after in zip(picked, [*picked[1:], size], strict=True)} if picked else set()
        assert len(picked) == len(set(picked)) == shown and (not picked or max(gaps) - min(gaps) <= 1), picked


def test_figures_are_those_that_were_measured_and_parse_back(trained: Path, evaluation: Path, tmp_path: Path) -> None:
    write_card(trained, [evaluation], tmp_path, repo_id="me/captioner", license="mit", language=["en"])
    measured = json.loads((evaluation / "metrics.json").read_text())
    header = metadata_load(tmp_path / "README.md")
    assert header is not None and header["license"] == "mit" and header["language"] == ["en"]
    name, results = model_index_to_eval_results(header["model-index"])
    assert name == "captioner" and {result.task_type for result in results} == {"image-to-text"}
    assert {result.dataset_name for result in results} == {"my photographs"}
    figures = {result.metric_type: result.metric_value for result in results}
    assert {"cider_d", "bleu", "chrf", "exact_match", "loss"} <= set(figures)
    assert figures == pytest.approx({name: measured[name] for name in figures}, abs=1e-4)
    assert eval_results_to_model_index(name, results) == header["model-index"]
    assert ModelCard.load(tmp_path / "README.md").data.eval_results == results
    assert not problems_of((tmp_path / "README.md").read_text())


def test_rows_are_shown_with_small_pictures_that_tell_no_place(
    trained: Path, evaluation: Path, tmp_path: Path
) -> None:
    write_card(trained, output_dir=tmp_path)
    assert not list(tmp_path.glob("sample*")), "only the rows of an evaluation that was named are shown"
    write_card(trained, [evaluation], tmp_path)
    text = (tmp_path / "README.md").read_text()
    names = re.findall(r"!\[A picture of row \d\]\(([\w.]+)\)", text)
    assert sorted(names) == sorted(path.name for path in tmp_path.glob("sample*")) and len(set(names)) == 3
    for name in names:
        picture = Image.open(tmp_path / name)
        assert max(picture.size) <= 192 and not picture.getexif() and b"Alice" not in (tmp_path / name).read_bytes()
    for line in (evaluation / "predictions.jsonl").read_text().splitlines():
        result = json.loads(line)
        assert f"| {as_text(result['reference'])} | {as_text(result['prediction'])} |" in text


@pytest.mark.parametrize(
    "text",
    [
        *CAPTIONS,
        "look at http://evil.com/?a=1, www.evil.com, evil.com or me@evil.com",
        "*a* **b** _c_ ~~d~~ # e [x](http://evil.com) [^1] $f$ &lt; &amp;",
        "`a` ``b | c`` \\| \\",
        "` | `",
        "||",
    ],
)
def test_what_rows_say_is_shown_as_it_is_without_links_or_formatting(text: str) -> None:
    markdown = pytest.importorskip("markdown_it", reason="a reader of Markdown is asked").MarkdownIt()
    page = markdown.enable("table").render(
        f"| a | b |\n| --- | --- |\n| {as_text(text)} | {as_text('end')} |\n\n({as_text(text)})"
    )
    shown = [*re.findall("<td>(.*?)</td>", page, flags=re.DOTALL), *re.findall(r"<p>\((.*)\)</p>", page)]
    assert [unescape(re.sub("</?code>", "", each)) for each in shown] == [text, "end", text]
    # Nothing else is left to whatever a reader makes of text
    assert all(set(re.sub("<code>.*?</code>", "", each)) <= {"|"} for each in shown)


def test_long_text_is_cut_and_lines_are_joined() -> None:
    assert as_text("one\n\n# two") == "`one # two`" and as_text("x" * 400).endswith("x …`") and as_text("") == ""


def test_a_card_that_was_changed_is_left_as_it_is(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for _ in range(2):
        assert write_card(trained, output_dir=tmp_path) and not is_by_hand(path)
    path.write_text(path.read_text().replace("# captioner", "# My captioner"))
    changed = path.read_text()
    assert not write_card(trained, output_dir=tmp_path) and path.read_text() == changed


def test_energy_is_that_of_this_run_if_it_was_measured(data: DataArguments, tmp_path: Path) -> None:
    train(tmp_path, data, [Measured()])
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.co2_eq_emissions == {"emissions": 12.5, "source": "CodeCarbon"}
    assert "0.050 kWh and 12.5 g of CO2 equivalents in 36 s" in card.text
    assert not re.search(r"Norway|10\.75", card.content + (tmp_path / "run.json").read_text())
    train(tmp_path, data)
    write_card(tmp_path)
    assert "Its energy was not measured." in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("restores", [False, True])
def test_the_time_of_a_run_that_was_resumed_is_that_of_all_its_parts(
    data: DataArguments, tmp_path: Path, restores: bool
) -> None:
    started = time.monotonic()
    options = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": restores}
    train(tmp_path, data, [Slow()], **options)
    train(tmp_path, data, [Slow(), Measured()], resume=str(tmp_path / "checkpoint-2"), max_steps=3, **options)
    run = json.loads((tmp_path / "run.json").read_text())
    last_part = next(each["train_runtime"] for each in run["log_history"] if "train_runtime" in each)
    assert last_part + STEP_SECONDS < run["time"]["seconds"] < time.monotonic() - started
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert f"; {run['time']['seconds']:.0f} s for training." in card.text
    # Of what was used before, nothing is known
    assert "in 36 s from step 2 on, where training was resumed, estimated by CodeCarbon" in card.text
    assert card.data.co2_eq_emissions["source"] == "CodeCarbon, from step 2 on"


@pytest.mark.slow
def test_a_checkpoint_that_does_not_tell_its_time_is_resumed_and_the_card_says_from_where(
    data: DataArguments, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    state = train(tmp_path, data, **options) / "checkpoint-1" / "trainer_state.json"
    told = json.loads(state.read_text())
    del told["stateful_callbacks"]["TrainingTime"]  # as in those of earlier versions
    state.write_text(json.dumps(told))
    train(tmp_path, data, resume=str(state.parent), **options)
    write_card(tmp_path)
    assert " s for training from step 1 on." in (tmp_path / "README.md").read_text()


def test_figures_of_some_rows_stand_apart_from_those_of_all(data: DataArguments, tmp_path: Path) -> None:
    train(tmp_path, data, metric_rows=3, max_new_tokens=4)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| evaluation | 2 |" in text
    of_all, of_some = text.split("On the evaluation rows, ")[1].split(
        "On the first 3 rows of the evaluation split, with answers of at most 4 tokens, "
    )
    assert "| loss |" in of_all and "| cider_d |" not in of_all
    assert "| cider_d |" in of_some and "| bleu |" in of_some and "| loss |" not in of_some


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"prompt": '{{"q": "{question}"}}'}, '{"q": "{question}"}'),
        ({"prompt": "{{{question!r:.{width}}}}"}, "{{question!r:.{width}}}"),
        ({"prompt_column": "question"}, "{question}"),
        ({}, "Describe the picture."),
    ],
)
def test_what_is_asked_is_the_prompt_before_it_is_filled(options: dict, asked: str) -> None:
    assert prompt_of(DataArguments(**options)) == asked


@pytest.mark.parametrize(
    ("images_last", "prompt", "asked"),
    [(False, '{{"q": "what?"}}', '{"q": "what?"}'), (True, '{{"q": "what?"}}', '{"q": "what?"}'), (False, "", "")],
)
def test_the_block_about_use_asks_as_the_model_was_trained(
    images_last: bool, prompt: str, asked: str, data: DataArguments, tmp_path: Path
) -> None:
    trained_on = replace(data, images_last=images_last, prompt=prompt)
    write_card(train(tmp_path, trained_on))
    parts = load_rows(trained_on, "train")[0]["prompt"][0]["content"]
    (shown,) = re.findall("content = (.*)", (tmp_path / "README.md").read_text())
    assert [(part["type"], part.get("text")) for part in eval(shown, {"picture": None})] == [
        (part["type"], part["text"]) for part in parts
    ]
    assert {"type": "text", "text": asked} in parts


def test_text_that_was_learnt_as_it_is_answered_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "said.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CAPTIONS))
    options = {"task": "masked", "dataset": str(tmp_path / "said.jsonl"), "image_column": ""}
    write_card(train(tmp_path / "writer", DataArguments(**options, eval_split="train")))
    card = (tmp_path / "writer" / "README.md").read_text()
    assert "as text as it is" in card and '"text": "Describe the picture."' in card


def test_drawn_scenes_are_ours_to_license_and_data_sets_of_the_hub_are_named(trained: Path, tmp_path: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    names = ("license", "language", "datasets", "base_model")
    for name, kind, base_models, expected in (
        ("scenes", "scenes", [], {"license": "apache-2.0", "language": ["en"]}),
        ("scenes", "scenes", ["me/text", "me/vision"], {"base_model": ["me/text", "me/vision"]}),
        ("nyu-mll/glue", "hub", [], {"datasets": ["nyu-mll/glue"]}),
    ):
        for file in trained.glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        run |= {"sources": [{**run["sources"][0], "name": name, "kind": kind}], "base_models": base_models}
        (tmp_path / "run.json").write_text(json.dumps(run))
        write_card(tmp_path)
        header = metadata_load(tmp_path / "README.md")
        assert header is not None and {key: header[key] for key in names if key in header} == expected


@pytest.mark.parametrize(
    ("earlier", "before", "is_all"),
    [
        (None, [], False),
        ({}, [], False),
        ({"sources": [], "sources_before": None}, [], False),
        ({"sources": [SCENES], "sources_before": [], "are_sources_all": False}, [SCENES], False),
        ({"sources": [OTHER], "sources_before": [SCENES], "are_sources_all": True}, [SCENES, OTHER], True),
        ({"sources": [SCENES], "sources_before": [], "are_sources_all": True}, [SCENES], True),
    ],
)
def test_what_is_licensed_learnt_from_scenes_alone_from_its_beginning(
    data: DataArguments, trained: Path, tmp_path: Path, earlier: dict | None, before: list, is_all: bool
) -> None:
    """Of weights from elsewhere the license is for others to say. What they had learnt from is told, or unknown."""
    first, after = tmp_path / "first", tmp_path / "after"
    first.mkdir()
    if earlier is not None:
        (first / "run.json").write_text(json.dumps(earlier))
    processor = DuoStreamProcessor.from_pretrained(trained)
    trainer = DuoStreamTrainer(
        model=duostream.DuoStreamForConditionalGeneration.from_pretrained(trained),
        args=DuoStreamTrainingArguments(str(after), use_cpu=True, report_to="none"),
        train_dataset=load_rows(data, "train"),
        data_collator=DuoStreamDataCollator(processor),
        processing_class=processor,
        began_with=str(first),
    )
    trainer.save_model()
    write_run(trainer, replace(data, dataset="scenes"))
    run = json.loads((after / "run.json").read_text())
    assert run["sources_before"] == before and run["are_sources_all"] == is_all
    write_card(after)
    header, text = metadata_load(after / "README.md"), (after / "README.md").read_text()
    assert header is not None and ("license" in header) == (is_all and OTHER not in before)
    assert ("which was not recorded" in text) != is_all
    assert ("not published with the model" in text) == (OTHER in before)
    # Rows that nobody told of may be anything
    write_run(trainer)
    run = json.loads((after / "run.json").read_text())
    assert not run["are_sources_all"] and run["are_sources_before_all"] == is_all
    write_card(after)
    assert ("rows of this run were was not recorded" in (after / "README.md").read_text()) == bool(before)


def test_a_file_of_a_mixture_that_changes_while_training_lasts_changes_no_card(
    data: DataArguments, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"{{task: caption, dataset: {data.dataset}}}")
    mixed = replace(data, mixture=[str(other)])
    assert load_mixture(mixed)
    other.write_text("{task: caption, dataset: somebody/else}")
    train(tmp_path / "run", mixed)
    sources = json.loads((tmp_path / "run" / "run.json").read_text())["sources"]
    assert [source["kind"] for source in sources] == ["local", "local"]


@pytest.mark.parametrize("reads_pictures", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_the_block_about_use_runs_as_it_is_shown(
    head: str,
    reads_pictures: bool,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    processor = DuoStreamProcessor.from_pretrained(trained)
    config = DuoStreamConfig.from_pretrained(trained)
    small_model(
        "tiny",
        getattr(duostream, head),
        **{
            "vocab_size": len(processor.tokenizer),
            "image_token_id": config.image_token_id,
            "vision_config": {"image_size": 24},
        },
    ).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    run = json.loads((trained / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "reads_pictures": reads_pictures}))
    write_card(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), flags=re.DOTALL)
    assert 'checkpoint = "."' in block and "trust_remote_code=True" in block
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert type(namespace["model"]).__name__ == head.replace("PreTraining", "Model").replace("ForModel", "Model")
    assert capsys.readouterr().out.strip()


def test_figures_of_other_weights_are_not_pushed(trained: Path, evaluation: Path, tmp_path: Path) -> None:
    record = json.loads((evaluation / "metrics.json").read_text())
    (tmp_path / "predictions.jsonl").write_bytes((evaluation / "predictions.jsonl").read_bytes())
    measured = record["weights_fingerprints"]
    assert set(measured) == {"model", "lm_head"}
    for name in measured:
        (tmp_path / "metrics.json").write_text(json.dumps({**record, "weights_fingerprints": {**measured, name: "0"}}))
        with pytest.raises(ValueError, match="measured other weights"):
            push(PushArguments(str(trained), "me/captioner", evaluations=[str(tmp_path)]))
    with pytest.raises(ValueError, match="expected an `output_dir` of `duostream evaluate`"):
        push(PushArguments(str(trained), "me/captioner", evaluations=[str(tmp_path / "nothing")]))


def test_models_that_differ_in_a_head_alone_have_other_weights_and_a_head_of_one_alone_does_not_matter() -> None:
    one, other = (small_model("tiny", duostream.DuoStreamForPreTraining, tie_word_embeddings=False) for _ in range(2))
    assert are_same_weights(weights_fingerprints(one), weights_fingerprints(other))
    writer = duostream.DuoStreamForConditionalGeneration(one.config)
    writer.load_state_dict(one.state_dict(), strict=False)
    assert are_same_weights(weights_fingerprints(writer), weights_fingerprints(one))
    assert are_same_weights(weights_fingerprints(one.model), weights_fingerprints(writer))
    for head, weight in (("lm_head", one.lm_head.weight), ("image_text_head", one.image_text_head.logit_bias)):
        before = weights_fingerprints(one)
        weight.data += 1
        changed = weights_fingerprints(one)
        assert [name for name in changed if changed[name] != before[name]] == [head]
        assert not are_same_weights(changed, weights_fingerprints(other))
    assert not are_same_weights(weights_fingerprints(writer), weights_fingerprints(one))
    assert are_same_weights(weights_fingerprints(one.model), weights_fingerprints(writer))


def test_figures_go_into_no_card_of_somebodys_own(trained: Path, evaluation: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("# Mine")
    with pytest.raises(ValueError, match=r"`evaluations` is for a card that is filled: .*mine\.md"):
        push(PushArguments(str(trained), "me/a", card=str(tmp_path / "mine.md"), evaluations=[str(evaluation)]))


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("license: mine", "license"),
        ("pipeline_tag: seeing", "pipeline_tag"),
        ("base_model: /home/alice/llama", "base_model"),
        ("datasets: [my photographs]", "datasets"),
        ("language: english", "language"),
        ("model-index: [{name: a, results: [{task: {type: b}}]}]", "model-index"),
        ("- a list", "mapping"),
    ],
)
def test_what_the_hub_would_refuse_is_a_problem(header: str, problem: str) -> None:
    (found,) = problems_of(f"---\n{header}\n---\n# A card\n")
    assert problem in found


def test_answers_with_any_kind_of_line_break_in_them_are_read(evaluation: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(evaluation, tmp_path / "evaluation"))
    path = copy / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    said = "red\u2028blue\x85green\x0bgray"
    lines = [json.dumps({**row, "prediction": said}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    assert {sample["prediction"] for sample in read_evaluation(copy)["samples"]} == {said}
