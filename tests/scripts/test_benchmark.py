"""A benchmark measures all sides and writes its figures down. No time is asserted: machines differ, and have moods."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from tiny_models import needs_compiler
from torch import nn

from duostream.scripts import benchmark, padding
from duostream.scripts.comparison import compare, in_turn, peak_bytes
from duostream.scripts.peers import (
    FIRST_TEXT_ID,
    IMAGE_TOKEN_ID,
    PEERS,
    freeze,
    make_inputs,
    make_sides,
    with_features,
)
from duostream.scripts.speed import OverheadArguments, PrefillArguments, compiled_read, lay_out_by_columns, read

TEXT_LEN = 6
TINY = ["--preset", "tiny", "--fusion_layers", "1", "--image_tokens", "4", "--text_len", str(TEXT_LEN)]
TINY += ["--repeats", "2"]


@pytest.fixture
def measure(tmp_path):
    def run(part, *options):
        benchmark.main([part, *options, "--output", str(tmp_path / "out.json")])
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
        record = json.loads((tmp_path / "out.json").read_text())
        assert len((tmp_path / "out.md").read_text().splitlines()) == len(record["rows"]) + 2
        return record["rows"]

    return run


@pytest.fixture(scope="module")
def sides():
    torch.manual_seed(0)
    made = make_sides("tiny", image_tokens=9, fusion_layers=[1, 3], peers=PEERS)
    return {name: model.eval() for name, model in made.items()}


def check_ratios(rows):
    for row in rows:
        assert 0 < row["ratio_quartile_1"] <= row["ratio"] <= row["ratio_quartile_3"]


def test_prefill_is_measured_with_and_without_the_vision_model(measure):
    rows = measure("prefill", *TINY, "--batch_sizes", "1", "2", "--vision", "left out", "counted")
    assert {(row["batch_size"], row["vision"], row["peer"]) for row in rows} == {
        (size, vision, peer) for size in (1, 2) for vision in ("left out", "counted") for peer in PEERS
    }
    check_ratios(rows)


def test_pictures_may_be_read_forwards_only_as_the_peers(measure):
    rows = measure("prefill", *TINY, "--batch_sizes", "1", "--peers", "llava", "--bidirectional_images", "false")
    assert [row["both_ways"] for row in rows] == [False]
    measure("overhead", *TINY, "--batch_sizes", "1", "--bidirectional_images", "false")


def test_image_states_may_be_read_alone(measure):
    only = ("--batch_sizes", "1", "--num_image_update_layers")
    rows = measure("prefill", *TINY, *only, "1", "--peers", "llava")
    assert [row["image_update_layers"] for row in rows] == [1]
    assert make_sides("tiny", 4, [3], [])["3"].config.num_image_update_layers == 2
    assert PrefillArguments(fusion_layers=[3, 2, 1]).fusion_depths == [(3, 2), (2, 1), (1, 1)]
    assert OverheadArguments(fusion_layers=[3]).fusion_depths == [(3, 3)]
    with pytest.raises(ValueError, match="`num_image_update_layers` can't be given"):
        measure("overhead", *TINY, *only, "1")
    with pytest.raises(ValueError, match="`num_image_update_layers` holds 2 numbers; expected one for each"):
        measure("prefill", *TINY, *only, "1", "0")


def test_matrices_that_lie_by_columns_read_the_same_on_all_sides(measure, sides):
    for name, model in sides.items():
        inputs, columns = make_inputs(model, image_tokens=9, batch_size=2, text_len=TEXT_LEN), copy.deepcopy(model)
        lay_out_by_columns(columns)
        weights = [module.weight for module in columns.modules() if type(module) is nn.Linear]
        assert sum(not weight.is_contiguous() for weight in weights) == len(weights) - 1, name
        for layer, plain in zip(read(columns, inputs).layers, read(model, inputs).layers, strict=True):
            torch.testing.assert_close(layer.keys, plain.keys, atol=1e-5, rtol=0)
    rows = measure("prefill", *TINY, "--batch_sizes", "1", "--weight_layout", "columns")
    assert [row["weight_layout"] for row in rows] == ["columns"] * len(PEERS)


@pytest.mark.slow
def test_prompts_that_are_read_into_static_caches_are_measured_beside_others(measure):
    # Not compiled here, which would take a minute: that a forward can be, and reads the same, is seen below
    with torch.compiler.set_stance("force_eager"):
        rows = measure("prefill", *TINY, "--batch_sizes", "2", "--caches", "dynamic", "static")
    cases = [(cache, peer) for cache in ("dynamic", "static") for peer in PEERS]
    assert [(row["cache"], row["peer"]) for row in rows] == cases
    check_ratios(rows)


@pytest.mark.slow  # and so not among those that the lowest versions pass: torch 2.6 compiles no decoder of 5.23
def test_a_compiled_forward_reads_what_a_plain_one_reads(sides):
    inputs = make_inputs(sides["1"], image_tokens=9, batch_size=2, text_len=TEXT_LEN)
    for vision in (inputs, with_features(sides["1"], inputs)):
        torch.compiler.reset()
        got = compiled_read(sides["1"], vision, backend="eager")()
        expected = read(sides["1"], vision)
        for layer, plain in zip(got.layers, expected.layers, strict=True):
            length = plain.keys.shape[2]
            assert int(layer.cumulative_length) == length
            assert torch.allclose(layer.keys[:, :, :length], plain.keys, atol=1e-5)


def test_decoding_is_measured_in_tokens_a_second(measure):
    rows = measure("decode", *TINY, "--batch_sizes", "2", "--new_tokens", "4", "--peers", "llava")
    assert [row["cache"] for row in rows] == ["dynamic"]
    assert rows[0]["tokens_per_second_ours"] > 0 and rows[0]["tokens_per_second_theirs"] > 0
    check_ratios(rows)


def test_image_tokens_are_cached_in_the_fusion_layers_alone(measure):
    rows = measure("memory", *TINY, "--batch_sizes", "2")
    assert {row["peer"] for row in rows} == set(PEERS)
    for row in rows:
        # 4 layers; 4 image tokens and 6 of text; keys and values of 2 heads of 8 floats; 2 rows
        assert row["cache_bytes_theirs"] == 4 * 10 * 2 * 2 * 8 * 4 * 2
        assert row["cache_bytes_ours"] == (1 * 10 + 3 * 6) * 2 * 2 * 8 * 4 * 2
        assert row["ratio"] == pytest.approx(40 / 28)


@pytest.mark.slow
def test_a_training_step_is_measured_with_what_is_frozen(measure):
    rows = measure("training", *TINY, "--batch_sizes", "1", "--frozen", "nothing", "language")
    cases = [("nothing", "off"), ("nothing", "on"), ("language", "off"), ("language", "on")]
    assert [(row["frozen"], row["checkpointing"]) for row in rows] == cases
    assert all(row["peak_bytes_ours"] is None or row["peak_bytes_ours"] >= 0 for row in rows)
    check_ratios(rows)
    chunked = measure("training", *TINY, "--batch_sizes", "1", "--frozen", "nothing", "--loss_chunk_sizes", "0", "2")
    assert [row["loss_chunk_size"] for row in chunked] == [0, 2, 0, 2]


@needs_compiler
@pytest.mark.slow
def test_a_training_step_of_compiled_layers_counts_the_operations_of_one_that_is_not(measure):
    options = [*TINY, "--batch_sizes", "1", "--frozen", "nothing", "vision", "--checkpointing", "off"]
    options += ["--peak_tflops", "0.5", "--peers", "llava", "smolvlm"]
    rows = measure("training", *options)
    compiled = measure("training", *options, "--compile_layers", "true")
    assert [row["compiled"] for row in (*rows, *compiled)] == [False] * len(rows) + [True] * len(rows)
    for row, again in zip(rows, compiled, strict=True):
        for side in ("ours", "theirs"):
            operations = [each[f"tflops_{side}"] * each[f"seconds_{side}"] for each in (row, again)]
            assert operations[0] == pytest.approx(operations[1]) and operations[0] > 0
            assert row[f"peak_share_{side}"] == pytest.approx(row[f"tflops_{side}"] / 0.5)
            tokens = row[f"tokens_per_second_{side}"] * row[f"seconds_{side}"]
            assert tokens == pytest.approx(again[f"tokens_per_second_{side}"] * again[f"seconds_{side}"])
            assert tokens == pytest.approx(row["image_tokens"] + TEXT_LEN)


def test_the_overhead_is_over_the_parts(measure):
    rows = measure("overhead", *TINY, "--batch_sizes", "1")
    assert rows[0]["seconds_parts"] > 0 and rows[0]["seconds_whole"] > 0 and rows[0]["at_most"] == 1.05
    check_ratios(rows)


@pytest.mark.slow
def test_input_is_measured_from_files_parquet_and_streams(measure):
    rows = measure("input", "--image_tokens", "4", "--batch_size", "2", "--steps", "2", "--workers", "0")
    assert [row["peer"] for row in rows[:2]] == ["llava", "smolvlm"]
    kinds = ["JPEG files", "Parquet", "JPEG files, streamed", "Parquet, streamed"]
    assert [row["of"] for row in rows[2:]] == kinds
    assert all(0 <= row["ratio"] <= 1 for row in rows[2:])


@pytest.mark.slow
def test_padding_is_measured_in_batches_of_random_of_grouped_and_of_packed_rows(measure):
    rows = measure("padding", "--rows", "48", "--batch_size", "8", "--repeats", "2", "--vocab_size", "300")
    assert [row["batches"] for row in rows] == ["group_by_length", "packing"]
    assert all(0 <= row["padding"] < row["padding_random"] for row in rows)
    check_ratios(rows)


def test_all_sides_that_can_share_a_language_model_say_the_same_about_text(sides):
    text = torch.randint(FIRST_TEXT_ID, 99, (2, 7))
    with torch.no_grad():
        logits = {name: model(input_ids=text).logits for name, model in sides.items()}
    for name in ("1", "3", "smolvlm"):
        torch.testing.assert_close(logits[name], logits["llava"], rtol=0, atol=0)


def test_every_side_reads_the_picture(sides):
    for name, model in sides.items():
        inputs = make_inputs(model, image_tokens=9, batch_size=2, text_len=6)
        assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 18
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        with torch.no_grad():
            logits = model(**inputs).logits
            torch.testing.assert_close(model(**with_features(model, inputs)).logits, logits)
            assert logits.shape == (2, 15, 99) and logits.isfinite().all()
            assert not torch.equal(model(**other).logits[:, -1], logits[:, -1]), name


@pytest.mark.parametrize(("frozen", "trained"), [("nothing", "all"), ("vision", "language"), ("language", "none")])
def test_the_same_is_frozen_on_all_sides(frozen, trained):
    for name, model in make_sides("tiny", image_tokens=4, fusion_layers=[1], peers=PEERS).items():
        freeze(model, frozen)
        by_part = {"projector": set(), "vision": set(), "language": set()}
        for weight_name, weight in model.named_parameters():
            is_projector = "projector" in weight_name or "connector" in weight_name
            part = "projector" if is_projector else "vision" if "vision" in weight_name else "language"
            by_part[part].add(weight.requires_grad)
        expected = {"projector": {True}, "vision": {trained == "all"}, "language": {trained != "none"}}
        assert by_part == expected, name


def test_sides_run_in_turn_and_the_first_round_warms_up():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert in_turn(runs, repeats=2) == {"a": [3, 6], "b": [4, 5]}
    assert order == ["b", "a", "a", "b", "b", "a"]


def test_a_ratio_says_how_many_times_as_long_theirs_took_in_the_same_round():
    figures = compare({"x": [1.0, 2.0, 4.0], "y": [2.0, 6.0, 16.0]}, "x", "y")
    assert (figures["seconds_ours"], figures["seconds_theirs"]) == (2.0, 6.0)
    assert (figures["ratio_quartile_1"], figures["ratio"], figures["ratio_quartile_3"]) == (2.5, 3.0, 3.5)


PEAK = """
import torch
from duostream.scripts.comparison import peak_bytes

def run():
    for _ in range(3):
        torch.ones(64 * 2**20, dtype=torch.uint8)

print(peak_bytes(run, "cpu") / 2**20)
"""


@pytest.mark.skipif(peak_bytes(lambda: None, "cpu") is None, reason="Linux alone tells")
def test_the_peak_is_what_a_run_holds_at_once():
    # As the benchmark, in a process of its own: what other tests did to a heap decides what it gives back
    measured = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 0.95 * 64 < float(measured.stdout) < 1.5 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "blip"], "blip"),
        (["--image_tokens", "200"], "200"),
        (["--preset", "huge"], "huge"),
        (["--repeats", "1"], "repeats"),
        (["--caches", "static", "quantized"], r"`caches` has \['quantized'\]; there are 'dynamic', 'static'"),
        (["--vision", "counted in"], r"`vision` has \['counted in'\]"),
        (["--weight_layout", "diagonal"], r"`weight_layout` has \['diagonal'\]; there are 'rows', 'columns'"),
        (["--max_image_tokens", "3"], "no case"),
    ],
)
def test_options_out_of_range_are_named(options, message, tmp_path):
    others = dict(zip(TINY[::2], TINY[1::2], strict=True))
    others.pop(options[0], None)
    given = [text for name, value in others.items() for text in (name, value)]
    with pytest.raises(ValueError, match=message):
        benchmark.main(["prefill", *given, *options, "--output", str(tmp_path / "out.json")])


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("decode", ["--new_tokens", "1"], "`new_tokens` is 1; expected 2 or more"),
        ("training", ["--text_len", "1"], "`text_len` is 1; expected 2 or more"),
    ],
)
def test_options_by_which_nothing_could_be_measured_are_named(part, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark.main([part, *options, "--output", str(tmp_path / "out.json")])


def test_padding_is_not_measured_once_alone_which_has_no_quartiles(tmp_path, monkeypatch):
    monkeypatch.setattr(padding, "load_mixture", None)
    with pytest.raises(ValueError, match="`repeats` is 1; expected 2 or more, for quartiles"):
        benchmark.main(["padding", "--repeats", "1", "--output", str(tmp_path / "out.json")])


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["beauty"])
    assert "beauty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "option"), [("quality", "--minutes"), ("decode", "--new_tokens"), ("input", "--steps")]
)
def test_each_benchmark_explains_its_own_options(part, option, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([part, "--help"])
    assert option in capsys.readouterr().out


def test_a_number_of_fusion_layers_is_given_once(tmp_path):
    options = [
        "--fusion_layers",
        "1",
        "1",
        "--num_image_update_layers",
        "0",
        "1",
        "--output",
        str(tmp_path / "o.json"),
    ]
    with pytest.raises(ValueError, match=r"`fusion_layers` are \[1, 1\]; expected each number once"):
        benchmark.main(["prefill", *options])


@pytest.mark.parametrize("is_in_file", [True, False])
def test_all_parts_are_not_written_to_one_file(tmp_path, is_in_file):
    (tmp_path / "options.yaml").write_text(f"output: {tmp_path / 'out.json'}\n")
    given = [str(tmp_path / "options.yaml")] if is_in_file else ["--output", str(tmp_path / "out.json")]
    with pytest.raises(ValueError, match="it takes no `output`"):
        benchmark.main(["speed", *given])


def test_rows_are_not_cut_for_one_side_alone(tmp_path):
    options = ["--task", "translation", "--max_length", "9", "--output", str(tmp_path / "out.json")]
    with pytest.raises(ValueError, match="`max_length` would cut rows of one side alone"):
        benchmark.main(["quality", *options])


@pytest.mark.parametrize("part", ["input", "quality"])
def test_a_mixture_is_not_passed_over(part, tmp_path):
    options = ["--mixture", "other.yaml", "--output", str(tmp_path / "out.json")]
    with pytest.raises(ValueError, match="`mixture` would do nothing"):
        benchmark.main([part, *options])


@pytest.mark.parametrize("part", ["input", "padding"])
@pytest.mark.parametrize("task", ["classification", "retrieval", "masked"])
def test_a_task_that_another_model_does_is_refused(part, task, tmp_path):
    options = ["--task", task, "--dataset", "unread", "--output", str(tmp_path / "out.json")]
    with pytest.raises(
        ValueError, match=rf"`task` is '{task}', but a model that writes is trained: expected one of chat, "
    ):
        benchmark.main([part, *options])


def test_figures_are_not_written_over_by_their_table(tmp_path):
    with pytest.raises(ValueError, match=r"`output` is .*out\.md'; expected a name that ends in \.json"):
        benchmark.main(["memory", "--output", str(tmp_path / "out.md")])
