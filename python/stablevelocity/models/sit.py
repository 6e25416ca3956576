"""SiT, the transformer of Ma et al. 2024 (arXiv 2401.08740): patches, adaLN-Zero blocks, class and time conditioning.

Parameter names and shapes are those of the public SiT and REPA checkpoints, which `load_public_state_dict` takes.
Blocks are `model.blocks[i]` and return hidden states (N, T, D): a forward hook on `blocks.7` sees what REPA aligns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME_CONVENTIONS = ("data_at_0", "noise_at_0")
SIZES = {  # hidden size, depth, heads
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def _expect(ok: bool, arg: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{arg}: expected {expected}, got {got}")


def position_embedding(height: int, width: int, dim: int) -> Tensor:
    """Fixed sine-cosine embedding of a grid of patches, (1, height * width, dim) float32; dim a multiple of 4.

    The first half encodes the column, the second the row; each half is [sin, cos] of position * 10000^(-4k/dim).
    """
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * frequency for axis in (column, row)]  # each (T, dim / 4)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D), shift and scale (N, D)."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (N, heads, T, d). Few tokens on a CPU: plain products, much faster there in bfloat16."""
    if q.device.type == "cpu" and q.shape[2] <= 128:
        return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def projector_mlp(hidden_size: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    """REPA's projector: three linear layers with SiLU between them."""
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D), one token per patch, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (N,) in [0, 1], not scaled -> (N, D): cosines and sines of 128 frequencies from 1 to 1/10000, then an MLP."""

    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.half = frequency_size // 2
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        index = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / self.half * index)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (N,) in [0, num_classes] -> (N, D); the last row is the null label's."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, size = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(n, tokens, size))


class MLP(nn.Module):
    """Two layers with the tanh form of GELU between them."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning c (N, D); the identity at initialisation."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():  # inside the block, so that hooks on it run once
            return checkpoint(self._forward, x, c, use_reentrant=False)
        return self._forward(x, c)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """(N, T, D) -> (N, T, p * p * out_channels); zero at initialisation."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The velocity v(x, t, y) of a flow with t = 0 at the data and t = 1 at the noise.

    Args:
        input_size: height and width of x, or (height, width); multiples of patch_size.
        patch_size, in_channels: side of a patch; channels of x.
        hidden_size, depth, num_heads, mlp_ratio: of the transformer; hidden_size a multiple of 4 and of num_heads.
        num_classes: labels are 0 .. num_classes - 1, and num_classes is the null label (label dropout is the training
            objective's). 0 makes a model without labels.
        learn_sigma: the last layer has twice the channels and the second half is dropped, as in the public SiT
            checkpoints at 256 pixels; REPA's have learn_sigma=False.
        qk_norm: layer norm of queries and keys, REPA's option.
        time_convention: "data_at_0" for REPA's checkpoints and all models trained here. "noise_at_0" for the public SiT
            checkpoints, whose time runs the other way: the network is asked at 1 - t and its output negated, so that
            forward() is the same velocity in either case.
        encoder_depth: features are taken after this many blocks.
        z_dims: one projector to that many channels per teacher (REPA); () for none.
        projector_dim: width of the projectors.
        checkpointing: recompute blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        *,
        learn_sigma: bool = False,
        qk_norm: bool = False,
        time_convention: str = "data_at_0",
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
        checkpointing: bool = False,
    ):
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        divides = patch_size > 0 and height > 0 and width > 0 and height % patch_size == width % patch_size == 0
        _expect(divides, "input_size", f"multiples of patch_size = {patch_size}", input_size)
        _expect(hidden_size % 4 == 0, "hidden_size", "a multiple of 4", hidden_size)
        _expect(hidden_size % num_heads == 0, "num_heads", f"a divisor of hidden_size = {hidden_size}", num_heads)
        _expect(num_classes >= 0, "num_classes", "0 or more", num_classes)
        _expect(time_convention in TIME_CONVENTIONS, "time_convention", f"one of {TIME_CONVENTIONS}", time_convention)
        _expect(not z_dims or 1 <= encoder_depth <= depth, "encoder_depth", f"1 to depth = {depth}", encoder_depth)
        self.input_size, self.patch_size, self.in_channels = (height, width), patch_size, in_channels
        self.grid = (height // patch_size, width // patch_size)
        self.num_classes, self.time_convention, self.encoder_depth = num_classes, time_convention, encoder_depth
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.pos_embed = nn.Parameter(position_embedding(*self.grid, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, checkpointing) for _ in range(depth)
        )
        self.projectors = nn.ModuleList(projector_mlp(hidden_size, projector_dim, z) for z in z_dims)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)  # every block is the identity ...
        nn.init.zeros_(self.final_layer.linear.weight)  # ... and the velocity is zero

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Velocity at x.

        Args:
            x: (N, C, H, W).
            t: (N,) floating point, 0 at the data and 1 at the noise.
            y: (N,) int64 in [0, num_classes], or None for the null label everywhere.
            return_hidden: also return the list of features after `encoder_depth` blocks: one (N, T, z) per projector,
                or the hidden states (N, T, D) alone when there is no projector.

        Returns:
            (N, C, H, W) of x's dtype; with return_hidden, that and the list.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        n = x.shape[0]
        expected = (n, self.in_channels, *self.input_size)
        _expect(tuple(x.shape) == expected, "x", f"shape (N, C, H, W) = {expected}", tuple(x.shape))
        _expect(tuple(t.shape) == (n,), "t", f"shape (N,) = ({n},)", tuple(t.shape))
        flip = self.time_convention == "noise_at_0"
        c = self.t_embedder(1.0 - t if flip else t)  # (N, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(self._labels(y, n, x.device))
        else:
            _expect(y is None, "y", "None because num_classes = 0", "a tensor")
        hidden = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (N, T, D)
        features: list[Tensor] = []
        for i, block in enumerate(self.blocks, start=1):
            hidden = block(hidden, c)
            if return_hidden and i == self.encoder_depth:
                features = [project(hidden) for project in self.projectors] or [hidden]
        velocity = self.unpatchify(self.final_layer(hidden, c))[:, : self.in_channels].to(x.dtype)
        velocity = -velocity if flip else velocity
        return (velocity, features) if return_hidden else velocity

    def _labels(self, y: Tensor | None, n: int, device: torch.device) -> Tensor:
        if y is None:
            return torch.full((n,), self.num_classes, dtype=torch.int64, device=device)
        _expect(y.dtype == torch.int64 and tuple(y.shape) == (n,), "y", f"({n},) int64", f"{tuple(y.shape)} {y.dtype}")
        return y

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, T, p * p * C) -> (N, C, H, W)."""
        (rows, columns), p = self.grid, self.patch_size
        tokens = tokens.reshape(-1, rows, columns, p, p, self.out_channels)
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows * p, columns * p)


def sit(
    name: str,
    input_size: int | tuple[int, int] = 32,
    in_channels: int = 4,
    num_classes: int = 1000,
    **overrides: Any,
) -> SiT:
    """A SiT by size and patch, e.g. sit("S/2"), sit("XL/2", learn_sigma=True, time_convention="noise_at_0").

    Args:
        name: S, B, L or XL, a slash, and the side of a patch; "SiT-" before it is allowed.
        **overrides: any further argument of SiT.

    Raises:
        ValueError: for a name that is not of this form.
    """
    match = re.fullmatch(r"(?:SiT-)?(S|B|L|XL)/([1-9]\d*)", name)
    _expect(match is not None, "name", "one of S, B, L, XL with a patch size, such as 'S/2'", repr(name))
    size, patch = match.groups()
    shape = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes}
    return SiT(**{**SIZES[size], "patch_size": int(patch), **shape, **overrides})


def load_public_state_dict(model: SiT, state_dict: Mapping[str, Any]) -> SiT:
    """Load a checkpoint of the public SiT or REPA code, or of this package, into a model of the same shape.

    Takes the state dict or what holds it under "ema" (preferred), "model" or "state_dict"; drops "module." and
    "_orig_mod." before names; renames REPA's older `decoder_blocks`; leaves out projectors when the model has none.
    A missing pos_embed is no error, since it is a fixed function of the patch grid.

    The model must be built with the checkpoint's own settings: for the public SiT at 256 pixels
    sit("XL/2", learn_sigma=True, time_convention="noise_at_0"), for REPA's sit("XL/2", z_dims=(768,)) or plain.

    Raises:
        ValueError: listing every name that is missing, unexpected or of another shape.
    """
    for wrapper in ("ema", "model", "state_dict"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
    own = model.state_dict()
    given = {_public_name(name, model.encoder_depth): value for name, value in state_dict.items()}
    if not len(model.projectors):
        given = {name: value for name, value in given.items() if not name.startswith("projectors.")}
    given.setdefault("pos_embed", own["pos_embed"])
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in own]
    problems += [
        f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(given[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    _expect(not problems, "state_dict", "the names and shapes of the model", "; ".join(problems))
    model.load_state_dict(given)
    return model


def _public_name(name: str, encoder_depth: int) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    match = re.match(r"decoder_blocks\.(\d+)\.", name)  # counted from the encoder's end
    return f"blocks.{int(match[1]) + encoder_depth}.{name[match.end() :]}" if match else name
