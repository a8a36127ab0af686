"""`neo generate`: prompts from arguments, a file or standard input; answers as JSON lines or text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from neoserve.cli import sampling
from neoserve.cli.progress import progress_lines
from neoserve.core.config import EngineConfig
from neoserve.core.errors import ConfigError


def generate(
    config: EngineConfig,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            help="File with a prompt on each line, or, as .jsonl, an object with 'prompt' or 'messages'.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines rather than text.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the chat template.")] = False,
    max_tokens: sampling.MaxTokens = None,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    stop: sampling.Stop = None,
) -> None:
    """Complete prompts offline, in this process. Without --prompt and --input, prompts come from standard input."""
    tasks = list(_tasks(prompt, file, chat))
    if not tasks:
        raise ConfigError("there is no prompt; give --prompt, --input or lines on standard input")
    params = sampling.given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
    lines = _run(config, tasks, params)
    if output is not None:
        output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return
    for line in lines:
        print(json.dumps(line, ensure_ascii=False) if as_json else line["text"])


def _tasks(prompts: list[str] | None, file: Path | None, chat: bool) -> Iterator[dict[str, Any]]:
    """Objects with 'prompt' or 'messages', and whatever else their lines held."""
    for text in prompts or ():
        yield _task(text, chat)
    if file is None and prompts:
        return
    if file is not None and not file.is_file():
        raise ConfigError(f"{file} is not a file; expected prompts, one on each line")
    lines = sys.stdin if file is None else file.read_text().splitlines()
    is_jsonl = file is not None and file.suffix == ".jsonl"
    for number, line in enumerate(lines, start=1):
        if not (line := line.rstrip("\n")):
            continue
        yield _parsed(line, number, chat) if is_jsonl else _task(line, chat)


def _task(text: str, chat: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


def _parsed(line: str, number: int, chat: bool) -> dict[str, Any]:
    try:
        task = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {number} of the input is not JSON: {error}") from None
    if not isinstance(task, dict) or not ({"prompt", "messages"} & task.keys()):
        raise ConfigError(f"line {number} of the input has neither 'prompt' nor 'messages'")
    return _task(task["prompt"], chat) | {**task} if "prompt" in task else task


def _run(config: EngineConfig, tasks: list[dict[str, Any]], given: dict[str, object]) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from neoserve.engine.local import LocalEngine

    results: list[dict[str, Any]] = [{}] * len(tasks)
    with (
        LocalEngine(config, progress_lines()) as engine,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        params = engine.intake.default_params(**given)
        submissions = [
            engine.intake.prepare_chat(task["messages"], params, request_id=str(index))
            if "messages" in task
            else engine.intake.prepare(task["prompt"], params, request_id=str(index))
            for index, task in enumerate(tasks)
        ]
        shown = bar.add_task("generating", total=len(tasks))
        for output in engine.outputs(submissions):
            index, choice = int(output.request_id), output.outputs[0]
            results[index] = {
                **tasks[index],
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "num_prompt_tokens": len(output.prompt_token_ids),
                "num_tokens": len(choice.token_ids),
                "num_host_tokens": choice.num_host_tokens,
            }
            bar.advance(shown)
    return results
