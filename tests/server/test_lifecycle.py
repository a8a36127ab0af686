"""How servers start, drain and die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from neoserve.engine.connection import EngineProcess
from tests.server.running import BOTH_TIERS, RunningServer, neo

LONG = {"prompt": "1, ", "max_tokens": 450, "ignore_eos": True, "temperature": 0}


def test_a_killed_engine_fails_what_is_open_and_turns_health_into_503(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log") as server:
        outcomes: list[object] = []

        def whole() -> None:
            outcomes.append(httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60).status_code)

        def streamed() -> None:
            try:
                for _ in server.openai().completions.create(
                    model="embedded", prompt="1, ", max_tokens=450, stream=True, extra_body={"ignore_eos": True}
                ):
                    pass
                outcomes.append("finished")
            except openai.APIError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=whole), threading.Thread(target=streamed)]
        for thread in threads:
            thread.start()
        while server.metrics()["num_requests_running"] < 2:
            time.sleep(0.01)
        server.engine_process().send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        for thread in threads:
            thread.join(timeout=10)
        assert time.monotonic() - killed_s < 2
        assert 503 in outcomes
        assert any("exit code -9" in str(outcome) for outcome in outcomes)
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "exit code -9" in health.json()["error"]["message"]
        assert httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=10).status_code == 503
        assert httpx.get(f"{server.url}/metrics", timeout=10).status_code == 503
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0


def test_sigterm_lets_open_requests_finish(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log") as server:
        engine = server.engine_process()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            # The whole group gets it, as from a service manager: the engine must go on until the server says so.
            server.process.terminate()
            engine.send_signal(signal.SIGTERM)
            engine.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(timeout=20) == 0
        assert not engine.is_running()


def test_the_engine_ends_with_a_server_that_was_killed(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log") as server:
        engine = server.engine_process()
        server.process.kill()
        server.process.wait()
        assert psutil.wait_procs([engine], timeout=5)[1] == []


def test_ctrl_c_while_loading_ends_both_processes_without_a_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "neoserve.cli.main", "serve", "--port", "0"],
            stdout=stream,
            stderr=stream,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for background jobs
        )
    children: list[psutil.Process] = []
    while not children:
        time.sleep(0.02)
        children = psutil.Process(server.pid).children()
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) != 0
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert "Traceback" not in log.read_text()


def test_a_start_that_is_cancelled_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def cancelled() -> None:
        start = asyncio.ensure_future(EngineProcess.spawn())
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    asyncio.run(cancelled())
    assert list(tmp_path.iterdir()) == []


def test_a_second_server_on_the_same_port_says_so_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = neo("serve", "--port", str(taken.getsockname()[1]))
    assert ended.returncode == 2
    assert "try another --port" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["/no/such/model"], "/no/such/model"),
        (["--block-size", "17"], "expected 16 or 32"),
        (["--host-memory", "lots"], "lots"),
        (["--max-num-seqs", "0"], "expected more than 0"),
        (["--device", "toaster"], "toaster"),
        (["--device", "reference", "--device-kv-tokens", "16", "--offload", "off", "--max-model-len", "512"], "512"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(flags: list[str], pattern: str) -> None:
    ended = neo("serve", "--port", "0", *flags)
    assert ended.returncode == 2
    assert pattern in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_start_that_fails_while_libraries_are_imported_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise RuntimeError('cannot schedule new futures after shutdown')")
    ended = neo(
        "serve", "--port", "0", "/no/such/model", env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    )
    assert ended.returncode == 2
    assert "/no/such/model" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_open_to_the_network_without_a_key_warns(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log", (*BOTH_TIERS, "--host", "0.0.0.0")) as server:
        assert "no --api-key is set" in server.log


def test_a_key_may_come_from_the_environment(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log", env={"NEO_API_KEY": "from-env"}) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert server.openai("from-env").models.list().data
        assert "from-env" not in server.log
