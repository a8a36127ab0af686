"""What the user asked for (`EngineConfig`), what the model is (`ModelShape`) and what runs (`ResolvedConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neoserve.core.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
OffloadMode = Literal["auto", "off", "all"]

_MOST_TRANSFER_BLOCKS = 128


def parse_bytes(text: str) -> int:
    """Bytes in "8GiB", "512MiB", "1.5GB" or a plain number; raises `ConfigError` for anything else."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    number, factor = text.strip(), 1
    for unit, size in units.items():
        if number.endswith(unit):
            number, factor = number[: -len(unit)], size
            break
    try:
        value = int(float(number) * factor)
    except ValueError:
        raise ConfigError(f"{text!r} is not an amount of memory; expected something like 8GiB or 512MiB") from None
    if value < 0:
        raise ConfigError(f"{text!r} is negative; expected an amount of memory such as 8GiB")
    return value


@dataclass(frozen=True)
class EngineConfig:
    """What the user asked for. `None` and "auto" mean: NEO chooses. Names are vLLM's where the meaning is.

    model: a checkpoint directory or a hub name; `None` is the embedded checkpoint.
    device: "auto" takes the GPU when there is one, else "reference" (this machine's CPU).
    offload: "off" keeps all KV on the device, "all" decodes everything on the host tier, "auto" decides.
    device_kv_tokens: size of the device pool in tokens. host_memory_bytes: size of the host pool.
    host_threads: worker threads of the host tier. host_deadline_s: how long one hand-off may take.
    target_tpot_ms / target_ttft_ms: latency targets for the scheduler; without them it maximises throughput. The first
        bounds the interval between tokens, the second the time that prompts take which are spread over iterations.
    max_waiting: requests that may wait for admission before new ones are refused.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float", "half"] = "auto"
    seed: int = 0
    device: Literal["auto", "cuda", "reference"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.92
    block_size: int = 16
    enforce_eager: bool = False
    offload: OffloadMode = "auto"
    device_kv_tokens: int | None = None
    host_memory_bytes: int | None = None
    host_threads: int | None = None
    host_deadline_s: float = 30.0
    target_tpot_ms: float | None = None
    target_ttft_ms: float | None = None
    max_waiting: int = 4096

    def __post_init__(self) -> None:
        positive = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "device_kv_tokens", "host_threads",
                    "host_deadline_s", "target_tpot_ms", "target_ttft_ms")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; expected more than 0")
        if self.block_size not in (16, 32):
            raise ConfigError(f"block_size is {self.block_size}; expected 16 or 32")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; expected above 0, at most 1")
        if self.offload not in ("auto", "off", "all"):
            raise ConfigError(f"offload is {self.offload!r}; expected auto, off or all")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that memory, prices and checks need; no tensors."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    max_position: int
    tied_embeddings: bool

    @property
    def pre_parameters(self) -> int:
        """Values of one layer's q k v projection."""
        return self.hidden_size * (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Values of one layer's matrices."""
        post = self.hidden_size * (self.num_query_heads * self.head_dim + 3 * self.ffn_size)
        return self.pre_parameters + post

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def transfer_blocks(staging_blocks: int) -> int:
    """Blocks of the buffer through which a staging area of so many passes to and from the host pool, in pieces."""
    return min(_MOST_TRANSFER_BLOCKS, staging_blocks)


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """What runs: every choice made, every size known.

    device_blocks / host_blocks: blocks of `block_size` tokens in each pool (0 host blocks: no host tier).
    staging_blocks: blocks of the one-layer staging area through which prompts of HOST sequences prefill.
    worker_cpus: the CPUs that the worker pool is pinned to, one thread each; empty without a host tier.
    """

    model_name: str
    shape: ModelShape
    dtype: DType
    device: Literal["cuda", "reference"]
    seed: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    offload: OffloadMode
    device_blocks: int
    host_blocks: int
    staging_blocks: int
    worker_cpus: tuple[int, ...]
    host_deadline_s: float
    target_tpot_ms: float | None
    target_ttft_ms: float | None
    max_waiting: int
    enforce_eager: bool

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
