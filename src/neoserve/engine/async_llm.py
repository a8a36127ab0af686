"""An engine for other servers: asynchronous, in a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from neoserve.core.config import EngineConfig
from neoserve.core.request import SamplingParams
from neoserve.core.stats import EngineInfo, EngineStats
from neoserve.engine.intake import Prompt
from neoserve.engine.outputs import RequestOutput
from neoserve.engine.remote import RemoteEngine


class AsyncLLM:
    """A model in a process of its own, for many requests at once from one event loop.

    >>> async with await AsyncLLM.start("Qwen/Qwen3-8B") as llm:
    ...     async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=64)):
    ...         print(output.outputs[0].text)
    """

    def __init__(self, engine: RemoteEngine) -> None:
        """Use `AsyncLLM.start`."""
        self._engine = engine

    @classmethod
    async def start(
        cls, model: str | None = None, *, progress: Callable[[str], None] = lambda _: None, **options: Any
    ) -> AsyncLLM:
        """Load `model` in a new process; arguments and errors are those of `LLM`."""
        return cls(await RemoteEngine.start(EngineConfig(model=model, **options), progress))

    @property
    def info(self) -> EngineInfo:
        """Facts of the engine."""
        return self._engine.info

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Complete `prompt`, yielding the same output, a little longer each time.

        Leaving the loop early ends the generation. Raises `InvalidRequestError`, `QueueFullError`, `EngineDeadError`
        or `HostAttentionError`.
        """
        params = sampling_params or self._engine.intake.default_params()
        submissions = await self._engine.prepare([prompt], params, request_id=request_id)
        with await self._engine.submit(submissions) as stream:
            output = stream.submissions[0].empty_output()
            async for _, delta in stream:
                output.add(delta)
                yield output

    async def stats(self) -> EngineStats:
        """Counters and gauges of the engine."""
        return await self._engine.stats()

    async def close(self) -> None:
        """End the process; what is still being generated fails with `EngineDeadError`."""
        await self._engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
