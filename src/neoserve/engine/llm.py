"""Offline use: a model in this process, prompts in, answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from neoserve.core.config import EngineConfig
from neoserve.core.request import SamplingParams
from neoserve.core.stats import EngineInfo, EngineStats
from neoserve.engine.intake import Prompt, Submission
from neoserve.engine.local import LocalEngine
from neoserve.engine.outputs import Delta, RequestOutput
from neoserve.engine.text import ChatMessage


class LLM:
    """A model loaded in this process.

    >>> llm = LLM("Qwen/Qwen3-8B", offload="auto", host_memory_bytes=64 * 2**30)
    >>> outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
    >>> outputs[0].outputs[0].text

    Each call runs to its end in the caller's thread; one call at a time.
    """

    def __init__(
        self, model: str | None = None, *, progress: Callable[[str], None] | None = None, **options: Any
    ) -> None:
        """Load `model`, a directory or a hub name; without it the embedded checkpoint.

        options: fields of `EngineConfig`, e.g. dtype, max_model_len, offload, device_kv_tokens.
        progress: called with each step of loading. Raises `ConfigError` for what cannot run.
        """
        config = EngineConfig(model=model, **options)
        self._engine = LocalEngine(config) if progress is None else LocalEngine(config, progress)

    @property
    def info(self) -> EngineInfo:
        """Facts of the engine: its resolved configuration, device and checkpoint."""
        return self._engine.info

    def default_params(self, **given: object) -> SamplingParams:
        """Sampling parameters as given, the checkpoint's generation_config for the rest, then our defaults."""
        return self._engine.intake.default_params(**given)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete `prompts` (text or token ids, one or many), in the order in which they were given.

        sampling_params: for all prompts or one for each; `None` takes the checkpoint's defaults.
        Raises `InvalidRequestError` before anything runs when a prompt or a parameter cannot be served.
        """
        many = _as_prompts(prompts)
        submissions = list(map(self._engine.intake.prepare, many, self._params_for(len(many), sampling_params)))
        return self._collect(submissions)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of {"role": ..., "content": ...}."""
        many: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prepare = partial(
            self._engine.intake.prepare_chat,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=chat_template_kwargs,
        )
        submissions = list(map(prepare, many, self._params_for(len(many), sampling_params)))
        return self._collect(submissions)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer to one prompt in pieces, as they are made; closing the iterator ends the generation."""
        submission = self._engine.intake.prepare(prompt, sampling_params or self.default_params())
        return (delta for _, delta in self._engine.run([submission]))

    def stream_chat(
        self, messages: Sequence[ChatMessage], sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """The answer to one conversation in pieces."""
        submission = self._engine.intake.prepare_chat(messages, sampling_params or self.default_params())
        return (delta for _, delta in self._engine.run([submission]))

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine."""
        return self._engine.stats()

    def close(self) -> None:
        """End the engine's threads and free its memory."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _params_for(
        self, num_prompts: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.default_params()
        if isinstance(given, SamplingParams):
            return [given] * num_prompts
        if len(given) != num_prompts:
            raise ValueError(f"{len(given)} sampling_params came for {num_prompts} prompts; expected one for each")
        return given

    def _collect(self, submissions: Sequence[Submission]) -> list[RequestOutput]:
        outputs = {output.request_id: output for output in self._engine.outputs(submissions)}
        return [outputs[submission.request_id] for submission in submissions]


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
