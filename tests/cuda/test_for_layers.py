"""Work on one layer of a tensor, done at the addresses of the others."""

import math
from functools import partial

import pytest
import torch

from neoserve.device.cuda import CudaDevice
from neoserve.kernels.flashinfer_ops import FlashInferOps

from .test_ops import DTYPES, KINDS, fused_rows, make_ops, random_batch

HEADS = (8, 2, 64)
LAYERS = (3, 1, 5, 0, 4, 2, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decode", [False, True])
def test_attention_of_prompts_and_decodes_is_that_of_each_layer(
    device: CudaDevice, kind: type[FlashInferOps], decode: bool
) -> None:
    dtype = DTYPES[-1]
    ops = make_ops(HEADS, dtype, kind=kind)
    batch = random_batch([1, 16, 17, 500, 1023], [1] * 5 if decode else [1, 16, 5, 500, 130], 16, 128)
    kv = torch.randn(6, 128, 2, HEADS[1], 16, HEADS[2], device=device.torch_device).to(dtype)
    expected_kv = kv.clone()
    q, k, v = fused_rows(batch, HEADS, dtype)
    out, expected_out = torch.empty(2, *q.shape, device=device.torch_device, dtype=dtype)
    results = []
    device.synchronise()

    def work() -> None:
        attention, of_each = (ops.plan_attention(batch, decode=decode) for _ in range(2))
        enqueue = device.for_layers(lambda layer: attention.run(q, k, v, layer, out), kv)
        for layer in LAYERS:
            for rows in (q, k, v):
                rows.normal_()
            enqueue(layer)
            torch.full((1 << 22,), math.nan, device=device.torch_device)  # where nothing may lie any more
            of_each.run(q, k, v, expected_kv[layer], expected_out)
            results.append((out.clone(), expected_out.clone()))

    device.submit(work).wait()
    assert all(torch.equal(found, expected) for found, expected in results)
    assert torch.equal(kv, expected_kv)


def test_what_the_work_raises_comes_out_and_later_work_is_done(device: CudaDevice) -> None:
    layers = torch.zeros(4, 1000, device=device.torch_device)
    device.synchronise()
    fails = False

    def work(layer: torch.Tensor) -> None:
        layer.add_(1)
        if fails:
            raise ValueError("no such block")

    enqueue = device.for_layers(work, layers)
    device.submit(lambda: enqueue(0)).wait()
    fails = True
    with pytest.raises(ValueError, match="no such block"):
        device.submit(lambda: enqueue(1)).wait()
    fails = False
    for layer in (1, 2, 3):
        device.submit(partial(enqueue, layer)).wait()
    assert layers[:, -1].tolist() == [1, 1, 1, 1]


def test_work_that_is_not_only_kernels_is_done_too(device: CudaDevice) -> None:
    layers, source = torch.zeros(4, 1000, device=device.torch_device), torch.ones(1000, device=device.torch_device)
    device.synchronise()

    def work(layer: torch.Tensor) -> None:
        layer.copy_(source)

    enqueue = device.for_layers(work, layers)
    for layer in (3, 1, 2):
        device.submit(partial(enqueue, layer)).wait()
    assert layers[:, -1].tolist() == [0, 1, 1, 1]


def test_work_on_something_else_is_done_too(device: CudaDevice) -> None:
    """No argument of its kernels is an address in the layer."""
    layers, other = (torch.zeros(4, 1000, device=device.torch_device) for _ in range(2))
    device.synchronise()

    def work(layer: torch.Tensor) -> None:
        other.add_(1)

    enqueue = device.for_layers(work, layers)
    for layer in range(4):
        device.submit(partial(enqueue, layer)).wait()
    assert (other == 4).all()
