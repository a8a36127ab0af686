"""A tokenizer for tests of text alone, and real servers on the embedded checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neoserve.engine.text import TextCodec
from tests.server.running import RunningServer

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """A byte-level tokenizer without merges: every byte is a token, so every character but ASCII spans several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    path: Path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return TextCodec(str(path))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that leave it as they found it."""
    with RunningServer(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def idle_server(server: RunningServer) -> Iterator[RunningServer]:
    """The server, which must be idle and healthy again after the test: the engine checks its integrity when idle."""
    yield server
    server.wait_until_idle()
    assert httpx.get(f"{server.url}/health").status_code == 200
