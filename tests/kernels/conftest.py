"""The implementations that every op test runs over."""

import pytest
import torch
from kernel_cases import Implementation

import stablevelocity_kernels as svel


def _implementations():
    on_gpu = torch.cuda.is_available()
    yield pytest.param(Implementation("served", "cpu"), id="cpu")
    if svel.backends()["CPU"] != "reference":
        yield pytest.param(Implementation("reference", "cpu"), id="reference")
    triton = Implementation("triton", "cuda" if on_gpu else "cpu")
    yield pytest.param(triton, id="triton", marks=[pytest.mark.gpu] if on_gpu else [])
    yield pytest.param(Implementation("served", "cuda"), id="cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=_implementations())
def implementation(request):
    """Each implementation of the ops in turn: served on CPU, reference, Triton (interpreted on CPU), served on CUDA."""
    if request.param.name == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=[p for p in _implementations() if p.id != "triton"])
def torch_op(request):
    """The same without Triton: for the properties of the registered op, or problems too large to interpret."""
    return request.param
