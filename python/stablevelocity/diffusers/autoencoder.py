"""Autoencoders of diffusers."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL


def load_autoencoder(name: str) -> AutoencoderKL:
    """An AutoencoderKL in float32 by its folder, the folder of a pipeline that holds it as `vae`, or its hub name.

    Raises:
        OSError: from diffusers, when there is none.
    """
    return AutoencoderKL.from_pretrained(name, subfolder="vae" if (Path(name) / "vae").is_dir() else None).eval()
