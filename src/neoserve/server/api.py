"""The endpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import neoserve
from neoserve.core.errors import EngineDeadError
from neoserve.engine.remote import RemoteEngine
from neoserve.engine.text import TextCodec
from neoserve.server.chat import ChatAnswer
from neoserve.server.completions import CompletionAnswer
from neoserve.server.errors import UnknownModelError
from neoserve.server.generation import respond_in_chunks, respond_whole
from neoserve.server.metrics import ServerMetrics
from neoserve.server.protocol import Body, ChatBody, ChatMessageBody, CompletionBody, DetokenizeBody, TokenizeBody
from neoserve.server.responses import Load, ModelCard, ModelList, Text, Tokens, Version
from neoserve.server.sse import json_response

log = logging.getLogger(__name__)

_MAX_WARNINGS = 1000


class Api:
    """One engine's endpoints. names: under which the model is served, the first one is its own in answers."""

    def __init__(self, engine: RemoteEngine, names: tuple[str, ...]) -> None:
        self._engine = engine
        self._names = names
        self._metrics = ServerMetrics(names[0], engine.info)
        self._created = int(time.time())
        self._warned: set[str] = set()

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        routes: tuple[tuple[list[str], str, Callable[..., Awaitable[Response]]], ...] = (
            (["POST"], "/v1/completions", self.completions),
            (["POST"], "/v1/chat/completions", self.chat_completions),
            (["GET"], "/v1/models", self.models),
            (["GET"], "/v1/models/{name:path}", self.model),
            (["POST"], "/tokenize", self.tokenize),
            (["POST"], "/detokenize", self.detokenize),
            (["GET"], "/health", self.health),
            (["GET", "POST"], "/ping", self.health),
            (["GET"], "/version", self.version),
            (["GET"], "/load", self.load),
            (["GET"], "/metrics", self.metrics),
        )
        for methods, path, endpoint in routes:
            router.add_api_route(path, endpoint, methods=methods, response_model=None)
        return router

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Complete one prompt or many."""
        model = self._check(body)
        params = body.params(self._engine.intake.default_params)
        submissions = await self._engine.prepare(
            body.prompts, params, add_special_tokens=body.add_special_tokens is not False
        )
        stream = await self._engine.submit(submissions)
        recorder = self._metrics.recorder(stream.submissions)
        answer = CompletionAnswer(body, stream.submissions, self._engine.codec, model)
        if body.stream:
            return respond_in_chunks(stream, answer, recorder, include_usage=body.include_usage)
        return await respond_whole(request, stream, answer, recorder)

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        model = self._check(body)
        params = body.params(self._engine.intake.default_params)
        prepare = partial(
            self._engine.intake.prepare_chat,
            add_special_tokens=bool(body.add_special_tokens),
            **body.template_options(),
        )
        submission = await self._engine.in_text_thread(prepare, _conversation(body.messages), params)
        stream = await self._engine.submit([submission])
        recorder = self._metrics.recorder(stream.submissions)
        answer = ChatAnswer(body, submission, model)
        if body.stream:
            return respond_in_chunks(stream, answer, recorder, include_usage=body.include_usage)
        return await respond_whole(request, stream, answer, recorder)

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Token ids of a prompt or a conversation."""
        self._check(body)
        codec = self._engine.required_codec("prompt")
        prompt, adds = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            prompt, adds = await self._render(codec, body), bool(body.add_special_tokens)
        token_ids = await self._engine.in_text_thread(codec.encode, prompt or "", add_special_tokens=adds)
        return json_response(Tokens(list(token_ids), len(token_ids), self._engine.info.config.max_model_len))

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """The text of token ids."""
        self._check(body)
        codec = self._engine.required_codec("tokens")
        self._engine.intake.check_token_ids(body.tokens, "tokens")
        return json_response(Text(await self._engine.in_text_thread(codec.decode, body.tokens)))

    async def models(self) -> Response:
        """The names under which the model is served."""
        return json_response(ModelList(list(map(self._card, self._names))))

    async def model(self, name: str) -> Response:
        """One of them."""
        self._check_name(name)
        return json_response(self._card(name))

    async def health(self) -> Response:
        """200 while the engine lives, 503 afterwards."""
        if self._engine.death is not None:
            raise EngineDeadError(self._engine.death)
        return Response()

    async def version(self) -> Response:
        """The version of NEO."""
        return json_response(Version(neoserve.__version__))

    async def load(self) -> Response:
        """How busy the engine is."""
        stats, config = await self._engine.stats(), self._engine.info.config
        return json_response(
            Load(
                server_load=self._engine.num_open,
                running=stats.num_running,
                waiting=stats.num_waiting,
                device_blocks_used=stats.device_blocks_used,
                device_blocks=config.device_blocks,
                host_blocks_used=stats.host_blocks_used,
                host_blocks=config.host_blocks,
            )
        )

    async def metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self._metrics.render(await self._engine.stats()), media_type=CONTENT_TYPE_LATEST)

    async def _render(self, codec: TextCodec, body: TokenizeBody) -> str:
        render = partial(
            codec.render_chat,
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )
        return await self._engine.in_text_thread(render, _conversation(body.messages or []))

    def _card(self, name: str) -> ModelCard:
        config = self._engine.info.config
        return ModelCard(name, self._created, root=config.model_name, max_model_len=config.max_model_len)

    def _check(self, body: Body) -> str:
        """Check the model's name and warn of unknown fields, once each; returns the name to answer with."""
        for name in body.unknown_fields:
            if name not in self._warned and len(self._warned) < _MAX_WARNINGS:
                self._warned.add(name)
                log.warning("requests have an unknown field %.100r, which is ignored", name)
        return self._check_name(body.model) if body.model else self._names[0]

    def _check_name(self, name: str) -> str:
        if name not in self._names:
            raise UnknownModelError(
                f"the model {name[:200]!r} is not served here; expected {' or '.join(map(repr, self._names))}", "model"
            )
        return name


def _conversation(messages: list[ChatMessageBody]) -> list[dict[str, Any]]:
    return [message.for_template() for message in messages]
