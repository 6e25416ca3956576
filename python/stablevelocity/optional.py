"""Packages that come with an extra of this distribution, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name.
        extra: the extra of this distribution that installs it.

    Raises:
        ModuleNotFoundError: naming the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{module.split(".")[0]} is not installed: pip install "stablevelocity[{extra}]"', name=error.name
        ) from None
