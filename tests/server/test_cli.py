"""The command line apart from the server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import neoserve
from neoserve.cli.options import HELP
from neoserve.core.config import EngineConfig
from tests.server.test_lifecycle import neo

FLAGS = ("--device", "reference", "--dtype", "float32", "--max-model-len", "256", "--device-kv-tokens", "256",
         "--host-memory", "8MiB", "--temperature", "0")  # fmt: skip


def test_every_field_of_the_config_is_a_flag() -> None:
    assert HELP.keys() == {field.name for field in dataclasses.fields(EngineConfig)} - {"model"}


def test_version() -> None:
    assert neo("--version").stdout == f"neo {neoserve.__version__}\n"


def test_generate_from_arguments() -> None:
    ended = neo("generate", "--chat", "-p", "Spell cat.", "-p", "Copy Water.", "--max-tokens", "20", *FLAGS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["c-a-t", "Water"]


def test_generate_reads_and_writes_json_lines(tmp_path: Path) -> None:
    tasks = [
        {"prompt": "1, 2, 3, ", "id": "a"},
        {"messages": [{"role": "user", "content": "Spell dog."}], "id": "b"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    ended = neo("generate", "-i", str(source), "-o", str(target), "--max-tokens", "16", *FLAGS)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b"]
    assert lines[1]["text"] == "d-o-g"
    assert lines[1]["finish_reason"] == "stop"


def test_generate_reads_standard_input() -> None:
    ended = neo("generate", "--json", "--max-tokens", "4", *FLAGS, stdin="1, 2, \n\n3, 4, \n")
    assert [json.loads(line)["prompt"] for line in ended.stdout.splitlines()] == ["1, 2, ", "3, 4, "]
    assert neo("generate", *FLAGS).returncode == 2


def test_chat_remembers_nothing_between_runs_and_ends_at_the_end_of_input() -> None:
    ended = neo("chat", "--max-tokens", "32", *FLAGS, stdin="Spell pig.\nCopy Sun.\n")
    assert ended.returncode == 0, ended.stderr
    assert "p-i-g" in ended.stdout
    assert "Sun" in ended.stdout


def test_info_says_what_this_machine_offers() -> None:
    ended = neo("info")
    assert ended.returncode == 0, ended.stderr
    for words in ("instruction sets", "host memory read", "GB/s", "--device", "the embedded checkpoint"):
        assert words in ended.stdout
