"""`neo chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from neoserve.cli import sampling
from neoserve.cli.progress import progress_lines
from neoserve.core.config import EngineConfig
from neoserve.core.errors import InvalidRequestError


def chat(
    config: EngineConfig,
    system: Annotated[str | None, typer.Option(help="Message of the system before the conversation.")] = None,
    max_tokens: sampling.MaxTokens = None,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    stop: sampling.Stop = None,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends; Ctrl-C interrupts an answer."""
    from neoserve.engine.local import LocalEngine

    given = sampling.given(temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
    with LocalEngine(config, progress_lines()) as engine:
        params = engine.intake.default_params(max_tokens=max_tokens, **given)
        messages = [{"role": "system", "content": system}] if system else []
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = ""
            try:
                submission = engine.intake.prepare_chat(messages, params)
                for _, delta in engine.run([submission]):
                    answer += delta.text
                    print(delta.text, end="", flush=True)
            except KeyboardInterrupt:
                pass
            except InvalidRequestError as error:
                print(f"neo: {error}")
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
