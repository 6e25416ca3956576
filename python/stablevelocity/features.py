"""Teacher features of images: `svel features`, and a data set that gives them beside the samples.

They lie in the shards of `svel latents`: (samples, flips, T, C), patch tokens row by row, without class or register
tokens, of the same crop of the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data import ArrayData, ImageFolder
from .encoder import Encoder, load_encoder
from .latents import from_function, write_arrays
from .optional import require
from .shards import About, Shards

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def teacher_pixels(images: Tensor, side: int) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] as DINOv2 and its kin take them: (N, 3, side, side), ImageNet mean and deviation.

    The whole image is resized (bicubic, antialiased), so that teacher and latents see the same crop.
    """
    x = (images.float() + 1.0) / 2.0
    x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
    mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def patch_size(teacher: nn.Module) -> int:
    """The side of a teacher's patches, from where torch.hub's, timm's and transformers' models keep it.

    Raises:
        ValueError: when it is in none of these places.
    """
    for owner in (teacher, getattr(teacher, "config", None), getattr(teacher, "patch_embed", None)):
        size = getattr(owner, "patch_size", None)
        if size is not None:
            return size if isinstance(size, int) else int(size[0])
    raise ValueError(f"teacher: expected a `patch_size` of it, its config or its patch_embed; {type(teacher).__name__}")


@torch.no_grad()
def patch_tokens(teacher: nn.Module, images: Tensor, grid: int = 16) -> Tensor:
    """Features (N, grid * grid, C) float32 of images (N, 3, H, W) in [-1, 1], without class and register tokens.

    Args:
        teacher: DINOv2 of torch.hub, a ViT of timm or transformers, or any module with a `patch_size` that takes
            normalised images and gives tokens (N, T, C), the patches last, or a map (N, C, grid, grid). An `Encoder`
            takes the samples as they are, and has a grid of its own.
        grid: patches on a side; the images are resized to grid * patch_size.

    Raises:
        RuntimeError: when the module gives fewer tokens, or something else.
    """
    if isinstance(teacher, Encoder):
        return teacher.tokens(images).float()
    x = teacher_pixels(images, grid * patch_size(teacher))
    out = teacher.forward_features(x) if hasattr(teacher, "forward_features") else teacher(x)
    if isinstance(out, dict) and "x_norm_patchtokens" in out:  # DINOv2 of torch.hub
        out = out["x_norm_patchtokens"]
    out = getattr(out, "last_hidden_state", out)  # transformers
    if isinstance(out, Tensor) and out.dim() == 4:
        out = out.flatten(2).transpose(1, 2)
    if not isinstance(out, Tensor) or out.dim() != 3 or out.shape[1] < grid * grid:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise RuntimeError(f"teacher: expected tokens (N, {grid * grid} or more, C), got {got}")
    return out[:, out.shape[1] - grid * grid :].float()


def load_teacher(name: str) -> nn.Module:
    """A teacher by "torch.hub:dinov2_vitb14", "timm:vit_base_patch14_dinov2.lvd142m", "transformers:<name or folder>",
    "encoder:<folder>" of `svel encoder`, or "module:function" (called without arguments). The first three download what
    is not yet there.

    Raises:
        ValueError: for a name of another form. ModuleNotFoundError: naming the package to install.
    """
    kind, colon, model = name.partition(":")
    if not colon:
        raise ValueError(f"--teacher: expected torch.hub:, timm:, transformers: or encoder: and a name, got {name!r}")
    if kind == "torch.hub":
        teacher = torch.hub.load("facebookresearch/dinov2", model)
    elif kind == "timm":
        teacher = require("timm", "diffusers").create_model(
            model, pretrained=True, num_classes=0, dynamic_img_size=True
        )
    elif kind == "transformers":
        teacher = require("transformers", "diffusers").AutoModel.from_pretrained(model)
    elif kind == "encoder":
        teacher = load_encoder(model)
    else:
        teacher = from_function(name)
    return teacher.eval()


def write_features(
    images: ImageFolder | ArrayData,
    folder: str | Path,
    teacher: nn.Module,
    name: str = "",
    *,
    grid: int = 16,
    **options: Any,
) -> About:
    """Write the patch tokens of every image to shards; see `latents.write_arrays` for the options.

    Raises:
        ValueError: for samples of another shape than an `Encoder` was trained on.
    """
    if isinstance(teacher, Encoder) and teacher.shape != images.shape:
        raise ValueError(f"--teacher: expected samples of {teacher.shape}, which it was trained on, got {images.shape}")
    made = {"teacher": name, "grid": teacher.grid[0] if isinstance(teacher, Encoder) else grid}
    return write_arrays(images, folder, lambda x: patch_tokens(teacher, x, grid), "features", made, **options)


class AlignedData(Dataset):
    """A data set with teacher features beside its batches: (x, y, index, [z (N, T, C), one for each folder]).

    Sample i of the data set must be image i of the folder; for latents with mirror images, those have theirs.

    Args:
        data: `LatentData`, `ImageFolder` or `ArrayData`.
        folders: written by `svel features`.

    Raises:
        ValueError: when a folder holds something else, or features of other images.
    """

    def __init__(self, data: Dataset, folders: Sequence[str | Path]):
        self.data, self.features = data, [Shards(folder) for folder in folders]
        self.n = getattr(data, "n", len(data))
        latents = getattr(data, "shards", None)
        for store in self.features:
            about = store.about
            if about.kind != "features":
                raise ValueError(f"align.features: expected features, got {about.kind} in {store.folder}")
            if about.samples != self.n or (latents is not None and latents.about.files != about.files):
                raise ValueError(
                    f"align.features: expected those of the {self.n} images of the data, got {store.folder}"
                )
            if about.flips * self.n < len(data):
                raise ValueError(f"align.features: {store.folder} lacks mirror images: set data.flip=false")

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> tuple:
        samples, flips = [i % self.n for i in indices], [i // self.n for i in indices]
        return *self.data.__getitems__(indices), [store.rows(samples, flips) for store in self.features]
