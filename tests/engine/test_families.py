"""Every family against transformers: logits through a plain loop over the decoder, and what is refused at load."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from neoserve.core.errors import CheckpointError, UnsupportedModelError
from neoserve.kernels.reference import ReferenceOps
from neoserve.models.checkpoint import open_checkpoint, resolve
from neoserve.models.decoder import Decoder
from neoserve.models.families import FAMILIES as TABLE
from neoserve.models.presets import PRESETS
from neoserve.models.weights import allocate, dummy_weights, load_weights, named_parameters
from tests.families import FAMILIES, reference_logits, save_family
from tests.plain_loop import PlainLoop

CPU = torch.device("cpu")
TOKENS = random.Random(1).choices(range(3, 128), k=150)  # beyond every original_max_position_embeddings of the table

Saved = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every family of the table, saved once: directory and the model of transformers."""
    paths = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    return {name: (path, save_family(name, path)) for name, path in paths.items()}


def plain_loop(path: Path, dtype: torch.dtype = torch.float32, block_size: int = 16) -> PlainLoop:
    spec = open_checkpoint(str(path)).spec
    ops = ReferenceOps()
    decoder = Decoder(spec, load_weights(spec, path, dtype, CPU), ops)
    return PlainLoop(decoder, ops, dtype, max_tokens=256, block_size=block_size)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(saved: dict[str, Saved], name: str) -> None:
    path, model = saved[name]
    expected = reference_logits(model, TOKENS)
    assert expected.std() > 0.5, "flat logits would prove nothing"
    logits = plain_loop(path).logits(TOKENS)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-gqa3", "qwen3"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_chunks_and_single_tokens_give_the_same_logits(saved: dict[str, Saved], name: str, block_size: int) -> None:
    path, model = saved[name]
    loop = plain_loop(path, block_size=block_size)
    chunks = [TOKENS[:40], TOKENS[40:41], TOKENS[41:80], *([token] for token in TOKENS[80:100])]
    logits = torch.cat([loop.logits(chunk) for chunk in chunks])
    torch.testing.assert_close(logits, reference_logits(model, TOKENS[:100]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_transformers(saved: dict[str, Saved], name: str) -> None:
    path, model = saved[name]
    prompt = TOKENS[:20]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert plain_loop(path).greedy(prompt, 64) == expected[0, 20:].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "qwen3", "mistral"])
def test_half_precision_is_as_exact_as_transformers(saved: dict[str, Saved], name: str, dtype: torch.dtype) -> None:
    path, model = saved[name]
    exact = reference_logits(model, TOKENS)
    theirs = reference_logits(type(model).from_pretrained(path, dtype=dtype, attn_implementation="eager"), TOKENS)
    ours = plain_loop(path, dtype).logits(TOKENS)
    their_error, our_error = (theirs - exact).square().mean().sqrt(), (ours - exact).square().mean().sqrt()
    assert our_error <= 1.2 * their_error
    assert our_error < 0.05 * exact.std()


def test_the_head_of_some_rows_is_that_of_all(saved: dict[str, Saved]) -> None:
    spec = open_checkpoint(str(saved["llama"][0])).spec
    decoder = Decoder(spec, load_weights(spec, saved["llama"][0], torch.float32, CPU), ReferenceOps())
    x_TE = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    some = decoder.head(x_TE, torch.tensor([4, 1]))
    torch.testing.assert_close(some, decoder.head(x_TE)[[4, 1]])


def test_shards_load_like_a_single_file(saved: dict[str, Saved], tmp_path: Path) -> None:
    path, _ = saved["qwen2"]
    save_family("qwen2", tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(plain_loop(tmp_path).logits(TOKENS), plain_loop(path).logits(TOKENS))


def test_the_spelling_of_transformers_4(saved: dict[str, Saved], tmp_path: Path) -> None:
    path, _ = saved["llama3-rope"]
    new = open_checkpoint(str(path)).spec
    config = json.loads((path / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    old = {**config, "rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters, "torch_dtype": "float32"}
    del old["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert open_checkpoint(str(tmp_path)).spec == new


def test_eos_ids_and_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    generation = {"eos_token_id": [5, 7], "temperature": 0.6, "top_p": 0.9, "top_k": None, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    spec = open_checkpoint(str(tmp_path)).spec
    assert spec.eos_ids == (5, 7)
    assert dict(spec.default_sampling) == {"temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").unlink()
    spec = open_checkpoint(str(tmp_path)).spec
    assert spec.eos_ids == (2,)
    assert spec.default_sampling == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", *TABLE]),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2", *TABLE]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq", "bfloat16"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, ["sliding_window of 64"]),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}, ["window of 8"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "llama3"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, ["'longrope'", "linear"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
        ({"dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "bfloat16"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    save_family("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(str(tmp_path))
    for word in [*named, str(tmp_path)]:
        assert word in str(caught.value)


def test_a_window_longer_than_the_context_is_served(tmp_path: Path) -> None:
    save_family("mistral", tmp_path, sliding_window=256)
    assert open_checkpoint(str(tmp_path)).spec.family == "mistral"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers None"),
        ({"num_key_value_heads": 3}, "4 query heads do not divide over 3 kv heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs factor"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    save_family("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(str(tmp_path))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    spec = open_checkpoint(str(tmp_path)).spec
    file = tmp_path / "model.safetensors"
    whole = load_file(file)

    def message(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(CheckpointError) as caught:
            load_weights(spec, tmp_path, torch.float32, CPU)
        return str(caught.value)

    name = "model.layers.1.self_attn.k_proj.weight"
    assert f"missing {name}; unexpected none" in message({n: t for n, t in whole.items() if n != name})
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    assert f"missing none; unexpected {next(iter(extra))}" in message(whole | extra)
    wrong = message(whole | {name: torch.ones(3, 64)})
    assert f"{name} has shape [3, 64]" in wrong
    assert "[32, 64]" in wrong
    many = message({"lm_head.weight": whole["lm_head.weight"]})
    assert "and 15 more" in many
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(whole | inverse, file)
    load_weights(spec, tmp_path, torch.float32, CPU)
    file.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_weights(spec, tmp_path, torch.float32, CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        load_weights(spec, tmp_path, torch.float32, CPU)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_family("llama", tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_weights(open_checkpoint(str(tmp_path)).spec, tmp_path, torch.float32, CPU)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(CheckpointError, match="is not a directory"):
        resolve(str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"neither a directory nor a hub name .* llama-2-7b"):
        resolve("a/b/c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be reached"):
        resolve("neoserve-tests/absent")


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("llama-2-7b", 6738415616),
        ("llama-3.1-8b", 8030261248),
        ("llama-3.1-70b", 70553706496),
        ("qwen3-8b", 8190735360),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    assert name in PRESETS
    spec = open_checkpoint(name, load_format="dummy").spec
    weights = allocate(spec, torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in named_parameters(spec, weights).values()) == num_parameters


def test_dummy_weights_depend_on_the_seed_alone_and_stay_finite(saved: dict[str, Saved]) -> None:
    spec = open_checkpoint(str(saved["qwen2-tied"][0]), load_format="dummy").spec
    first, again, other = (dummy_weights(spec, torch.float16, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].qkv, again.layers[1].qkv)
    assert not torch.equal(first.layers[1].qkv, other.layers[1].qkv)
    assert first.head_VE is first.embedding_VE
    ops = ReferenceOps()
    logits = PlainLoop(Decoder(spec, first, ops), ops, torch.float16, max_tokens=64, block_size=16).logits(TOKENS[:64])
    assert logits.isfinite().all()
