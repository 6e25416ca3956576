"""Shared by all tests: GPU tests skip without a GPU, random streams are fixed, unwritten outputs show as NaN."""

import os

import pytest
import torch

# Triton decides at its import whether it interprets. Without a GPU the Triton kernels are tested on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_configure(config):
    """Workers of pytest-xdist share the cores: more threads than these only wait for one another."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Make torch.empty (and what is built on it) hold NaN, so that an element nobody wrote is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)
