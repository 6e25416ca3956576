"""Configuration of a training run: typed dataclasses, read from YAML, overridden by `a.b=c`, every mistake named."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


def _at_least(default: Any, low: float) -> Any:
    return field(default=default, metadata={"low": low})


def _between(default: float, low: float, high: float) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


def _split(default: float, high: float = 1.0) -> Any:
    """A time: a number, "auto" for what training measures, or the path of a variance.json, which becomes its number."""
    return field(default=default, metadata={"low": 0.0, "high": high, "split": True})


@dataclass
class DataConfig:
    """What is trained on; see data.py."""

    source: str = (
        "mnist"  # "mnist", "digits", or a path: .npz, .safetensors, what svel latents wrote, or an image folder
    )
    labels: bool = True  # class-conditional where the source has labels
    x_key: str = "x"  # names of the arrays in an .npz or .safetensors file
    y_key: str = "y"
    layout: Literal["auto", "NCHW", "NHWC"] = "auto"  # of 4-d arrays; auto: NHWC for uint8 with 1 or 3 channels last
    scale: float = 1.0  # multiplies floating point arrays (latents); uint8 images always become [-1, 1]
    image_size: int | None = _at_least(None, 1)  # image folders: resized on the short side, then cropped in the middle
    flip: bool = True  # latents: visit the mirror images too, where they were written
    posterior_noise: float = _at_least(1.0, 0.0)  # latents: times the posterior's deviation; 0 for its mean
    workers: int = _at_least(0, 0)  # processes that load data


@dataclass
class ModelConfig:
    """A SiT; see models/sit.py."""

    size: Literal["S", "B", "L", "XL"] | None = None  # sets hidden_size, depth and num_heads
    patch_size: int = _at_least(2, 1)
    hidden_size: int = _at_least(384, 4)
    depth: int = _at_least(12, 1)
    num_heads: int = _at_least(6, 1)
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    checkpointing: bool = False  # recompute blocks in the backward pass to save memory


@dataclass
class ObjectiveConfig:
    """The loss; see objectives.py."""

    name: Literal["stablevm", "cfm", "stf"] = "stablevm"
    interpolant: Literal["linear", "cosine"] = "linear"
    times: Literal["uniform", "lognormal"] = "uniform"
    cfg_prob: float = _between(0.1, 0.0, 1.0)
    t_min: float | str = _split(0.5)  # stablevm: below it, the conditional target; or auto
    source: Literal["bank", "loader"] = "bank"  # stablevm: where the sample in x_t comes from
    precision: Literal["exact", "fast"] = "exact"


@dataclass
class BankConfig:
    """The reference bank of StableVM; see bank.py, host_bank.py and sharded_bank.py."""

    # device: all of it on every device; host: pinned memory, only the classes of two batches on the device;
    # sharded: on every device a part
    storage: Literal["device", "host", "sharded"] = "device"
    capacity: int = _at_least(256, 1)  # references per class
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    null_label: Literal["ring", "all"] = "ring"  # what it stands for: the most recent samples, or all references
    prefill: bool = True  # fill it from the data before the first step; else it fills as training runs


@dataclass
class AlignConfig:
    """VA-REPA, on with align_at; see alignment.py."""

    features: str | None = None  # a folder that svel features wrote; several with commas between them
    coefficient: float = _at_least(0.5, 0.0)  # of the alignment in the loss
    schedule: Literal["hard", "hard_high", "sigmoid", "cosine", "snr"] = "sigmoid"  # weights over time
    split: float | str = _split(0.7)  # or auto, with stablevm
    projector: Literal["mlp", "conv"] = "mlp"  # REPA's or iREPA's
    width: int = _at_least(2048, 1)  # of the mlp
    spatial_norm: bool = False  # iREPA's normalisation of the features


@dataclass
class OptimConfig:
    """AdamW, its schedule, and what keeps it stable."""

    lr: float = _at_least(1e-4, 0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = _at_least(0.0, 0.0)
    warmup: int = _at_least(0, 0)  # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = _between(0.0, 0.0, 1.0)  # cosine: the last learning rate as a share of lr
    clip: float = _at_least(1.0, 0.0)  # largest gradient norm; 0 for no limit
    ema: float = _between(0.9999, 0.0, 1.0)  # decay; reached gradually, as min(ema, (1 + n) / (10 + n))


@dataclass
class SamplingConfig:
    """How samples are drawn; see sampling.py."""

    solver: Literal["euler", "heun", "euler_maruyama", "dpmpp_2m", "unipc"] = "euler"
    steps: int = _at_least(30, 1)
    schedule: Literal["uniform", "shifted", "edm"] = "uniform"  # the time grid; see grids.py
    shift: float = 3.0  # of the shifted grid
    split: float | str = _split(0.85)  # StableVS: steps starting at or below it are the closed form; or auto
    low_steps: int = _at_least(9, 0)  # StableVS: how many they are; 0 turns StableVS off
    noise_factor: float = _between(0.0, 0.0, 1.0)
    grid: Literal["total", "official"] = "total"
    guidance: float = 1.0  # scale of classifier-free guidance; 1 for none
    guidance_low: float = _between(0.0, 0.0, 1.0)
    guidance_high: float = _between(1.0, 0.0, 1.0)


@dataclass
class TrainConfig:
    """One training run."""

    output: str = "runs/train"
    seed: int = 0
    steps: int = _at_least(100_000, 1)
    batch_size: int = _at_least(256, 1)  # of all processes together, in one step of the optimizer
    accumulate: int = _at_least(1, 1)  # parts in which each process takes its share of a batch through the model
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where there is hardware for it
    compile: Literal["no", "model", "step"] = "no"  # torch.compile of the model, or of the draw, the model and the loss
    resume: str | None = None  # "latest", or a checkpoint folder
    overwrite: bool = False  # start afresh in a folder that holds a run
    log_every: int = _at_least(50, 1)
    sample_every: int = _at_least(0, 0)  # steps between sample grids; 0 for none
    save_every: int = _at_least(5_000, 0)  # steps between checkpoints; 0 for the last step alone
    keep: int = _at_least(3, 0)  # how many checkpoints are kept; 0 for all
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    align_at: str | None = None  # the module whose hidden state VA-REPA aligns, such as blocks.7; none for no alignment
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), *, base: TrainConfig | None = None
) -> TrainConfig:
    """A configuration from a YAML file and overrides, each of which is checked against the dataclasses above.

    Args:
        path: YAML file; None for the defaults.
        overrides: "key=value" with dots for sections ("optim.lr=1e-3"); the value is read as YAML. Later ones win.
        base: what the file and the overrides change; the defaults without one.

    Raises:
        ValueError: naming the key, what was expected and what came; for an unknown key, the nearest known ones.
    """
    values = to_dict(base or TrainConfig())
    if path is not None:
        try:
            read = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise ValueError(f"config: cannot read {str(path)!r}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
        _merge(values, read, TrainConfig, "")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set: expected key=value, got {text!r}")
        try:
            nested = yaml.safe_load(value)
        except yaml.YAMLError:
            nested = value
        for name in reversed(key.strip().split(".")):
            nested = {name: nested}
        _merge(values, nested, TrainConfig, "")
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """A checked configuration from nested dictionaries; what they lack keeps its default."""
    return _build(TrainConfig, values, "")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dictionaries of plain YAML values."""
    plain = dataclasses.asdict(config)
    plain["optim"]["betas"] = list(plain["optim"]["betas"])
    return plain


def dump_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `load_config` reads back to the same."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _merge(into: dict[str, Any], values: Any, kind: type, prefix: str) -> None:
    """Overwrite nested values, refusing keys that the dataclass `kind` lacks."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: expected a section of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        _known(name, hints, prefix)
        if dataclasses.is_dataclass(hints[name]):
            _merge(into[name], value, hints[name], f"{prefix}{name}.")
        else:
            into[name] = value


def _known(name: Any, hints: Mapping[str, Any], prefix: str) -> None:
    if name in hints:
        return
    near = difflib.get_close_matches(str(name), hints, n=3)
    elsewhere = [
        f"{section}.{name}"
        for section, hint in typing.get_type_hints(TrainConfig).items()
        if dataclasses.is_dataclass(hint) and name in typing.get_type_hints(hint)
    ]
    meant = [prefix + key for key in near] + elsewhere
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known keys: {', '.join(hints)}"
    raise ValueError(f"{prefix}{name}: unknown configuration key; {hint}")


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: expected a section of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    limits = {f.name: f.metadata for f in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        _known(name, hints, prefix)
        key, hint = prefix + name, hints[name]
        if dataclasses.is_dataclass(hint):
            checked[name] = _build(hint, value, f"{key}.")
            continue
        checked[name] = value = (_convert_split if limits[name].get("split") else _convert)(value, hint, key)
        if value == "auto" and limits[name].get("split"):
            continue
        low, high = limits[name].get("low"), limits[name].get("high")
        if value is not None and low is not None and not low <= value <= (float("inf") if high is None else high):
            expected = f"at least {low}" if high is None else f"a number from {low} to {high}"
            raise ValueError(f"{key}: expected {expected}, got {value!r}")
    return kind(**checked)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`; integers pass for floats, and text such as 1e-4, which YAML leaves a string."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), key)
    if origin is Literal:
        if value is False and "no" in args:  # YAML reads a bare `no` as false
            return "no"
        if value in args and not isinstance(value, bool):
            return value
        raise ValueError(f"{key}: expected one of {', '.join(args)}, got {value!r}")
    if origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_convert(v, arg, key) for v, arg in zip(value, args, strict=True))
        raise ValueError(f"{key}: expected {len(args)} numbers, got {value!r}")
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{key}: expected {_TYPE_NAMES[hint]}, got {value!r}")


def _convert_split(value: Any, hint: Any, key: str) -> float | str:
    if value == "auto" or isinstance(value, bool):
        return value if value == "auto" else _convert(value, float, key)
    from .variance import fixed_split

    return fixed_split(value if not _is_number(value) else float(value), key)


def _is_number(value: Any) -> bool:
    """Also of text such as 1e-1, which YAML leaves a string."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
