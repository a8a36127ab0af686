"""`neo bench attention` on small shapes: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from matplotlib import pyplot
from typer.testing import CliRunner

import neoserve.cli.main as cli
from neoserve._native import instruction_sets
from neoserve.cli.attention_measurement import Case, HeadShape, Measurement
from neoserve.cli.attention_report import Report, plot
from neoserve.core.errors import ConfigError

SMALL = ["bench", "attention", "--threads", "1", "--kv-gib", "0.03", "--query-heads", "4", "--kv-heads", "2"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, [*SMALL, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_measures_and_checks_every_instruction_set(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    sets = instruction_sets()
    run("--head-dim", "64", "--dtype", dtype, "--shapes", "3x40,1x700", "--isa", ",".join(sets), "--json", str(path))
    report = json.loads(path.read_text())
    measured = report["measurements"]
    assert [each["case"]["instruction_set"] for each in measured] == [name for name in sets for _ in range(2)]
    limit = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}[dtype]
    for each in measured:
        assert 0 <= each["error"] <= limit
        assert each["ms"] > 0
        assert each["gb_per_s"] > 0
        assert each["read_gb_per_s"] > 0
        assert 0.3 < each["ratio"] * each["read_gb_per_s"] / each["gb_per_s"] < 3, "of the same passes"


def test_draws_and_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    picture = tmp_path / "attention.png"
    output = run("--head-dim", "64", "--shapes", "2x100,64x100000", "--plot", str(picture), "--torch")
    assert "| 2 | 100 |" in output
    assert "| 64 | 100000 |" not in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_holds_what_is_faster_than_streaming(tmp_path: Path) -> None:
    case = Case(HeadShape("4/2/64", 4, 2, 64), "bfloat16", 16, batch=2, length=100, instruction_set="portable")
    fast = Measurement(case, ms=1.0, gb_per_s=150.0, read_gb_per_s=100.0, ratio=1.5, error=0.0, torch_ms=None)
    plot(Report("neo bench attention", 1, 1.0, (fast,)), tmp_path / "attention.png")
    assert pyplot.gca().get_ylim()[1] > fast.gb_per_s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8", "--head-dim", "64"], "--dtype is 'int8'"),
        (["--shapes", "8", "--head-dim", "64"], "--shapes has '8'"),
        (["--batch", "0", "--head-dim", "64"], "--batch is '0'"),
        (["--shapes", "64x100000", "--head-dim", "64"], "no case's KV fits into --kv-gib 0.03"),
        ([], "go together"),
    ],
)
def test_refuses_with_names_and_values(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli.app, [*SMALL, *arguments], catch_exceptions=False)
