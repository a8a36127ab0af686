"""From the name of a model to its files and its spec."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from neoserve.core.errors import CheckpointError
from neoserve.models.families import parse_config
from neoserve.models.presets import PRESETS
from neoserve.models.spec import ModelSpec

CONFIG_PATTERNS = ["*.json", "*.jinja", "*.model", "merges.txt"]
WEIGHT_PATTERNS = ["*.safetensors"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's spec, and the directory of its files; `path` is `None` for a preset, which has none."""

    path: Path | None
    spec: ModelSpec


def open_checkpoint(model: str | None, revision: str | None = None, load_format: str = "auto") -> Checkpoint:
    """The checkpoint that `model` names: `None` (embedded), a directory, a hub name, or, with load format "dummy", a
    preset. Reads configs only; `weights.load_weights` reads the rest. Raises `CheckpointError` and
    `UnsupportedModelError`."""
    dummy = load_format == "dummy"
    if dummy and model in PRESETS and not Path(model).is_dir():
        return Checkpoint(None, parse_config(PRESETS[model], {}, f"preset {model}"))
    path = resolve(model, revision, weights=not dummy)
    config = _read_json(path / "config.json")
    generation_path = path / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    return Checkpoint(path, parse_config(config, generation, model or "the embedded checkpoint"))


def resolve(model: str | None, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of a model's files: the embedded checkpoint's for `None`, `model` itself where it is a directory,
    else a snapshot from the Hugging Face hub or its cache (without the weight files unless `weights`).

    Raises `CheckpointError` when there is none.
    """
    if model is None:
        path = Path(str(importlib.resources.files("neoserve.models"))) / "embedded"
    elif Path(model).expanduser().is_dir():
        path = Path(model).expanduser()
    elif model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model} is not a directory; expected a checkpoint directory or a hub name")
    else:
        path = _download(model, revision, CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else []))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json; expected a checkpoint in Hugging Face format")
    return path


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub name such as organisation/model; with load format dummy these "
            f"presets need no files: {', '.join(PRESETS)}"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(f"{name} is gated on the Hugging Face hub: ask for access, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on the Hugging Face hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is no directory here, and not on the Hugging Face hub (a private model needs HF_TOKEN)"
        ) from error
    except (OSError, ValueError) as error:  # no network, offline mode with nothing cached, a broken transfer
        raise CheckpointError(
            f"{name} is no directory here, and the Hugging Face hub could not be reached ({type(error).__name__}); "
            f"download it where there is a network and give the directory, or check HF_HUB_OFFLINE and HF_ENDPOINT"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content
