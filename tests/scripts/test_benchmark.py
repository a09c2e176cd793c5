"""A benchmark measures both sides and writes its figures down."""

import json

import pytest

from duostream.scripts import benchmark


@pytest.mark.slow
def test_the_overhead_is_a_ratio_of_neighbouring_runs(tmp_path):
    output = tmp_path / "out.json"
    benchmark.main(["overhead", "--preset", "tiny", "--batch_size", "1", "--repeats", "3", "--output", str(output)])
    figures = json.loads(output.read_text())
    assert figures["arguments"]["preset"] == "tiny"
    assert figures["ratio_quartile_1"] <= figures["ratio_median"] <= figures["ratio_quartile_3"]
    assert figures["seconds_ours"] > 0 and figures["seconds_theirs"] > 0


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["beauty"])
    assert "beauty" in capsys.readouterr().err


def test_each_benchmark_explains_its_own_options(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["quality", "--help"])
    assert "--minutes" in capsys.readouterr().out
