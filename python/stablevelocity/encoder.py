"""A teacher and a judge without downloads: a small convolutional classifier trained on the data set at hand.

    net, accuracy = train_encoder(dataset)
    tokens = net.tokens(images)          # (N, T, C), what VA-REPA aligns with
    features = net.embed(images)         # (N, C), what a Frechet distance is taken on

`svel encoder` trains one and writes it; `svel features --teacher encoder:FOLDER` takes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import ArrayData

ENCODER, WEIGHTS = "encoder.json", "encoder.safetensors"


class Residual(nn.Module):
    """x + two 3x3 convolutions of it, on a map (N, C, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.gelu(self.norm1(x)))
        return x + self.conv2(F.gelu(self.norm2(y)))


class Encoder(nn.Module):
    """A classifier whose features lie on the grid of patches of a SiT with the same patch size.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of patch_size.
        num_classes: at least 1.
        patch_size: side of the patch that one token sees first; two residual blocks then look around it.
        width: channels of the tokens, a multiple of 8.
        depth: residual blocks.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int, *, patch_size: int = 4, width: int = 192, depth: int = 2
    ):
        super().__init__()
        channels, height, wide = shape
        if patch_size < 1 or height % patch_size or wide % patch_size:
            raise ValueError(f"patch_size: expected a divisor of {height} and {wide}, got {patch_size}")
        if num_classes < 1:
            raise ValueError(f"num_classes: expected labels to learn from, at least 1 class, got {num_classes}")
        if width < 8 or width % 8:
            raise ValueError(f"width: expected a multiple of 8, got {width}")
        self.options = {"shape": list(shape), "num_classes": num_classes}
        self.options.update(patch_size=patch_size, width=width, depth=depth)
        self.shape, self.grid = tuple(shape), (height // patch_size, wide // patch_size)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, width, patch_size, stride=patch_size),
        )
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.norm, self.head = nn.GroupNorm(8, width), nn.Linear(width, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Samples (N, C, H, W), images in [-1, 1] -> a map (N, width, H / patch_size, W / patch_size)."""
        return self.norm(self.blocks(self.stem(x)))

    def tokens(self, x: Tensor) -> Tensor:
        """The same as tokens (N, T, width), row by row."""
        return self.forward_features(x).flatten(2).transpose(1, 2)

    def embed(self, x: Tensor) -> Tensor:
        """(N, width): the mean over the tokens, what the last layer classifies."""
        return F.gelu(self.forward_features(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.head(self.embed(x))


def train_encoder(
    dataset: ArrayData,
    *,
    epochs: int = 8,
    batch_size: int = 128,
    lr: float = 1e-3,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
    **options: int,
) -> tuple[Encoder, float]:
    """Train an encoder to tell the classes of a data set held in memory.

    Args:
        dataset: with labels.
        epochs, batch_size, lr: of AdamW with one cycle of the learning rate.
        held_out: share of the samples that are not trained on.
        seed: of the weights, of the split and of the order.
        options: patch_size, width and depth of the `Encoder`.

    Returns:
        The encoder, in evaluation mode on the device, and its accuracy on what was held out.

    Raises:
        ValueError: naming the argument.
    """
    if dataset.y is None:
        raise ValueError("dataset: expected labels to learn from, got none")
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out: expected a number in (0, 1), got {held_out}")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)
    parts = order.split([len(order) - int(held_out * len(order)), int(held_out * len(order))])
    train, test = ([part.to(device) for part in dataset.__getitems__(rows.tolist())[:2]] for rows in parts)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = Encoder(dataset.shape, dataset.num_classes, **options).to(device)
    steps = epochs * -(-len(train[0]) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with tqdm(total=steps, desc="encoder", disable=not progress) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(train[0]), generator=generator).to(device).split(batch_size):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = net(train[0][rows])
                loss = F.cross_entropy(logits.float(), train[1][rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
                bar.update()
    net.eval().requires_grad_(False)
    right = [net(x).argmax(1) == y for x, y in zip(test[0].split(1000), test[1].split(1000), strict=True)]
    return net, float(torch.cat(right).float().mean())


def save_encoder(net: Encoder, folder: str | Path, **about: float | str) -> None:
    """Write an encoder to a folder, with what else is to be known of it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}, folder / WEIGHTS)
    (folder / ENCODER).write_text(json.dumps({**net.options, "about": about}, indent=1) + "\n")


def about_encoder(folder: str | Path) -> dict[str, float | str]:
    """What `save_encoder` was told of an encoder."""
    return json.loads((Path(folder) / ENCODER).read_text())["about"]


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder of a folder, in evaluation mode.

    Raises:
        ValueError: when the folder holds none.
    """
    folder = Path(folder)
    if not (folder / ENCODER).is_file():
        raise ValueError(f"encoder: expected a folder that svel encoder wrote, got {str(folder)!r}")
    options = json.loads((folder / ENCODER).read_text())
    options.pop("about")
    net = Encoder(options.pop("shape"), options.pop("num_classes"), **options)
    net.load_state_dict(load_file(folder / WEIGHTS))
    return net.eval().requires_grad_(False)
