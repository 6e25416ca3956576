"""Fixtures of the pipeline tests, which are left out where diffusers is not installed."""

import functools
import importlib.metadata

import pytest
import torch

try:  # by distribution: this very folder passes for a module called diffusers
    for distribution in ("diffusers", "transformers"):
        importlib.metadata.version(distribution)
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _one_thread():
    """More threads only wait for each other on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """tiny(name): the pipeline of that name, built once."""
    from tiny_pipelines import build

    return functools.cache(build)
