"""FlashInfer, imported so that every supported GPU takes the same, compiled, norm kernels.

FlashInfer would otherwise take those of its Python DSL where that is installed, which older GPUs cannot run. It reads
the choice once, when it is imported; import it from here.
"""

import os

os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")

import flashinfer
from flashinfer.utils import is_sm90a_supported

__all__ = ["flashinfer", "is_sm90a_supported"]
