"""Every family against transformers: logits through a plain loop over the decoder, and what is refused at load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neoserve.core.config import DTYPE_BYTES
from neoserve.core.errors import CheckpointError, UnsupportedModelError
from neoserve.kernels.base import PagedBatch
from neoserve.kernels.reference import ReferenceOps
from neoserve.models.checkpoint import open_checkpoint, resolve
from neoserve.models.decoder import Decoder, split_qkv
from neoserve.models.presets import PRESETS
from neoserve.models.weights import allocate, dummy_weights, load_weights, named_parameters
from tests.families import FAMILIES, reference_logits, save_family
