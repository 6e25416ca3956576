"""The command `svel`. Each subcommand imports what it needs when it runs; every error is one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); the exit code: 0, 2 after an error, 130 after an interrupt."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"svel {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"svel {args.command}: error: {message}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(prog="svel", description="Stable Velocity flow matching: train, sample, measure.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    adders = (_add_demo, _add_train, _add_sample, _add_latents, _add_encoder, _add_features, _add_variance)
    for add in (*adders, _add_bench, _add_info):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_demo(commands) -> argparse.ArgumentParser:
    p = commands.add_parser("demo", help="train and sample a small model on real digits, and report, in minutes")
    p.add_argument("--output", default="svel-demo", metavar="DIR", help="folder to write (default: %(default)s)")
    p.add_argument("--steps", type=int, help="training steps (default: as many as suit this machine)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the demo's configuration")
    p.set_defaults(run=_demo)
    return p


def _demo(args: argparse.Namespace) -> None:
    import torch

    from .demo import run_demo

    torch.set_num_threads(min(8, torch.get_num_threads()))  # more only wait for each other on a model this small
    metrics = run_demo(args.output, steps=args.steps, seed=args.seed, device=args.device, overrides=args.set)
    folder = Path(args.output)
    agrees, steps = metrics["samples"]["small_cnn_accuracy_on_samples"], metrics["steps"]
    print(
        f"{folder / 'samples.png'}: after {steps} steps a small CNN agrees with {agrees:.1%} of the labels; "
        f"{metrics['seconds']['total']:.0f} s in all; read {folder / 'report.md'}"
    )
    full = metrics["full_steps"]
    if args.steps is None and steps < full:
        print(f"{steps} of {full} steps fit into the demo's time here; better samples: svel demo --steps {full}")


# Flags of `svel train` that are short for a configuration key.
_TRAIN_FLAGS = {
    "output": "output",
    "data": "data.source",
    "steps": "steps",
    "batch_size": "batch_size",
    "accumulate": "accumulate",
    "lr": "optim.lr",
    "seed": "seed",
    "device": "device",
    "mixed_precision": "mixed_precision",
    "compile": "compile",
    "objective": "objective.name",
    "align_at": "align_at",
    "tracker": "tracker",
    "resume": "resume",
}


def _add_train(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model. For several processes: accelerate launch -m stablevelocity train ...",
    )
    p.add_argument("--config", metavar="YAML", help="a configuration file; the other flags change it")
    for flag, key in _TRAIN_FLAGS.items():
        meta = "DIR" if flag == "output" else "VALUE"
        note = ' ("latest" or a checkpoint folder)' if flag == "resume" else ""
        p.add_argument(f"--{flag.replace('_', '-')}", metavar=meta, help=f"sets {key}{note}")
    p.add_argument("--overwrite", action="store_true", help="start afresh in a folder that holds a run")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="sets any key, e.g. optim.ema=0.999")
    p.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    p.set_defaults(run=_train)
    return p


def _train(args: argparse.Namespace) -> None:
    from .config import dump_yaml, load_config

    given = [(key, getattr(args, flag)) for flag, key in _TRAIN_FLAGS.items()]
    overrides = [f"{key}={value}" for key, value in given if value is not None]
    overrides += ["overwrite=true"] * args.overwrite
    config = load_config(args.config, [*overrides, *args.set])
    if args.print_config:
        print(dump_yaml(config), end="")
        return
    from .train import Trainer

    trainer = Trainer(config)
    result = trainer.fit()
    if trainer.main:
        print(f"{result.steps} steps, checkpoint {result.checkpoint}")


def _add_sample(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "sample",
        help="draw samples from a trained model",
        description="Draw samples. For several processes: accelerate launch -m stablevelocity sample ...",
    )
    p.add_argument("trained", metavar="RUN", help="folder of a run or of one checkpoint")
    p.add_argument("--output", required=True, metavar="DIR", help="folder for samples.png and samples.npz")
    p.add_argument("--labels", help="classes such as 0,3,7 (default: all)")
    p.add_argument("--per-class", type=int, default=8, metavar="N", help="samples of each class (default: %(default)s)")
    p.add_argument("--solver", choices=("euler", "heun", "euler_maruyama", "dpmpp_2m", "unipc"))
    p.add_argument("--steps", type=int)
    p.add_argument("--schedule", choices=("uniform", "shifted", "edm"), help="the time grid")
    p.add_argument("--shift", type=float, help="of the shifted time grid")
    p.add_argument(
        "--split", help="StableVS: time at and below which its steps are taken; a variance.json; or auto, as trained"
    )
    p.add_argument("--low-steps", type=int, help="StableVS: how many there are; 0 turns it off")
    p.add_argument("--noise-factor", type=float, help="StableVS: noise of its steps, 0 to 1")
    p.add_argument("--grid", choices=("total", "official"), help="StableVS: what --steps counts")
    p.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 for none")
    p.add_argument("--guidance-low", type=float, help="guidance from this time ...")
    p.add_argument("--guidance-high", type=float, help="... to this one")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=250, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    p.add_argument("--mixed-precision", choices=("auto", "no", "bf16", "fp16"), default="auto", help="(default: auto)")
    p.add_argument("--weights", choices=("ema", "model"), default="ema", help="(default: %(default)s)")
    p.set_defaults(run=_sample)
    return p


_SAMPLING_FLAGS = (
    "solver", "steps", "schedule", "shift", "split", "low_steps", "noise_factor", "grid",
    "guidance", "guidance_low", "guidance_high",
)  # fmt: skip


def _sample(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from .config import load_config
    from .data import to_uint8
    from .generation import Processes, evaluations, generate, load_model, resolve_precision, save_grid, settle_split

    for flag in ("per_class", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(args, flag)}")
    processes = Processes.launched(args.device)
    model, config, about = load_model(args.trained, device=args.device, ema=args.weights == "ema")
    given = [(flag, getattr(args, flag)) for flag in _SAMPLING_FLAGS]
    config = load_config(None, [f"sampling.{flag}={value}" for flag, value in given if value is not None], base=config)
    config = settle_split(config, about["checkpoint"])
    classes = _labels(args.labels, about["num_classes"])
    labels = None if classes is None else torch.tensor(classes).repeat_interleave(args.per_class)
    n = args.per_class if labels is None else len(labels)
    with tqdm(desc="sample", disable=processes.rank > 0) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        samples = generate(
            model,
            config.sampling,
            about["shape"],
            labels,
            args.per_class,
            interpolant=config.objective.interpolant,
            num_classes=about["num_classes"],
            seed=args.seed,
            batch_size=args.batch_size,
            precision=resolve_precision(args.mixed_precision, next(model.parameters()).device),
            processes=processes,
            callback=advance,
        )
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    image = about["kind"] == "image"
    part = (to_uint8(samples).permute(0, 2, 3, 1) if image else samples).numpy()
    whole = processes.gather(part, n, args.batch_size, folder)
    if whole is None:
        return
    np.savez(folder / "samples.npz", arr_0=whole, **({} if labels is None else {"arr_1": labels.numpy()}))
    first = torch.from_numpy(whole[:256])
    save_grid(
        first.permute(0, 3, 1, 2) / 127.5 - 1.0 if image else first, folder / "samples.png", min(args.per_class, 16)
    )
    layout = "uint8 NHWC" if image else "float32 NCHW"
    calls = evaluations(config.sampling, config.objective.interpolant)
    print(
        f"{n} samples of step {about['step']}, {calls} model evaluations each: "
        f"{folder / 'samples.png'}, {folder / 'samples.npz'} (arr_0 {layout}{', arr_1 labels' * (labels is not None)})"
    )


def _labels(text: str | None, num_classes: int) -> list[int] | None:
    """The classes that --labels names, all of them by default, None for a model without classes."""
    if num_classes == 0:
        if text is not None:
            raise ValueError(f"--labels: expected none, since the model has no classes, got {text!r}")
        return None
    if text is None:
        return list(range(num_classes))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels: expected integers such as 0,3,7, got {text!r}") from None
    for y in classes:
        if not 0 <= y < num_classes:
            raise ValueError(f"--labels: expected classes from 0 to {num_classes - 1}, got {y}")
    return classes


_FOLDER = "folder of images, one sub-folder per class"


def _image_arguments(p: argparse.ArgumentParser, what: str, shard_size: int) -> None:
    """What `latents` and `features` have in common."""
    p.add_argument("images", metavar="IMAGES", help=what)
    p.add_argument("--output", required=True, metavar="DIR", help="folder of shards; continued where it was begun")
    p.add_argument("--size", type=int, default=256, help="side of the images (default: %(default)s)")
    p.add_argument("--no-flip", dest="flip", action="store_false", help="leave the mirror images out")
    p.add_argument("--no-labels", dest="labels", action="store_false", help="sub-folders are not classes")
    p.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="stored (default: %(default)s)")
    p.add_argument("--shard-size", type=int, default=shard_size, help="images in a file (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def _image_options(args: argparse.Namespace, arrays: bool = False) -> tuple:
    """The images, and the options of `write_arrays`, on this process's device of a launch by torchrun.

    With `arrays`, IMAGES may also be what `load_data` holds in memory, of which no mirror images are made.
    """
    import os

    import torch

    from .config import DataConfig
    from .data import ImageFolder, load_data
    from .generation import resolve_device

    for flag in ("size", "shard_size", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(args, flag)}")
    device = resolve_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    names = ("flip", "dtype", "shard_size", "batch_size", "workers")
    options = {name: getattr(args, name) for name in names}
    options.update(device=device, progress=True)
    if Path(args.images).is_dir():
        return ImageFolder(args.images, args.size, args.labels), options
    if not arrays:
        raise ValueError(f"IMAGES: expected a folder, got {args.images!r}")
    return load_data(DataConfig(source=args.images, labels=args.labels)), {**options, "flip": False}


def _add_latents(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "latents",
        help="encode an image folder for training",
        description="Encode an image folder into shards of latents. For several GPUs: torchrun --nproc-per-node 8 -m "
        "stablevelocity latents ...; killed, it goes on where it was.",
    )
    _image_arguments(p, _FOLDER, shard_size=4096)
    p.add_argument("--vae", required=True, help="AutoencoderKL of diffusers by folder or name, or module:function")
    p.set_defaults(run=_latents)
    return p


def _latents(args: argparse.Namespace) -> None:
    from .latents import load_autoencoder, write_latents

    images, options = _image_options(args)
    vae = load_autoencoder(args.vae).to(options["device"])
    about = write_latents(images, args.output, vae, args.vae, **options)
    print(f"{about.samples} images, {about.flips} x {about.shape}, {about.shards} shards in {args.output}")


def _add_variance(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "variance",
        help="measure the variance of the targets on data, and find the split",
        description="Measure the variance of the targets over time on any data, and the time up to which one sample "
        "explains the noisy one: the split.",
    )
    p.add_argument(
        "data",
        metavar="DATA",
        help="an .npz or .safetensors file with x (n, ...) and labels y where there are any (uint8 becomes [-1, 1]); "
        "mnist; digits; a folder of images, or of svel latents; a run or checkpoint folder for its bank",
    )
    p.add_argument("--output", required=True, metavar="DIR", help="folder for variance.json and variance.png")
    p.add_argument("--times", help="such as 0.2,0.5,0.9, or how many, evenly (default: 0.05 to 0.95, 0.97, 0.99)")
    p.add_argument(
        "--rows", type=int, default=1024, metavar="N", help="noisy samples at each time (default: %(default)s)"
    )
    p.add_argument("--references", type=int, metavar="M", help="also StableVM's variance for M references")
    p.add_argument(
        "--pool", type=int, metavar="R", help="take the truth over R samples of a class, not all, with a bound"
    )
    p.add_argument(
        "--classes",
        choices=("ignore", "given", "separate"),
        default="ignore",
        help="given: variances given the class, averaged; separate: each class also by itself (default: %(default)s)",
    )
    p.add_argument("--criterion", choices=("variance", "own_mass"), default="variance", help="(default: %(default)s)")
    p.add_argument("--level", type=float, help="of the criterion (default: 0.05)")
    p.add_argument("--effective", action="store_true", help="also the effective number of references: twice the work")
    p.add_argument("--interpolant", choices=("linear", "cosine"), default="linear", help="(default: %(default)s)")
    p.add_argument("--scale", type=float, default=1.0, help="multiplies floating point data (default: %(default)s)")
    p.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images of a folder")
    p.add_argument("--precision", choices=("exact", "fast"), default="exact", help="(default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    p.set_defaults(run=_variance)
    return p


def _variance(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from .generation import resolve_device
    from .report import plot_split
    from .variance import LEVELS, split_point, variance_curve

    times = _times(args.times)
    x, y = _variance_data(args)
    x = x.to(resolve_device(args.device))
    if args.classes != "ignore" and y is None:
        raise ValueError(f"--classes: expected ignore, since the data hold no labels, got {args.classes}")
    parts = [("all", x, None if args.classes == "ignore" else y)]
    if args.classes == "separate":
        parts += [(str(label), x[(y == label).to(x.device)], None) for label in y.unique().tolist()]
    curves, splits, found = {}, {}, {}
    for name, data, labels in parts:
        with tqdm(desc="variance" if name == "all" else f"class {name}") as bar:

            def advance(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            curve = variance_curve(
                data,
                times,
                interpolant=args.interpolant,
                references=args.references,
                labels=labels,
                samples=args.rows,
                pool=args.pool,
                effective=args.effective,
                precision=args.precision,
                generator=torch.Generator().manual_seed(args.seed),
                callback=advance,
            )
        curves[name] = curve
        splits[name] = {c: split_point(curve, c, level=args.level if c == args.criterion else None) for c in LEVELS}
        found[name] = _variance_record(curve, splits[name], args.criterion)
    settings = {
        key: getattr(args, key) for key in ("rows", "pool", "classes", "interpolant", "scale", "seed", "precision")
    }
    record = {**found.pop("all"), "samples": len(x), "shape": list(x.shape[1:]), **settings}
    if found:
        record["by_class"] = found
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "variance.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_split(curves, {name: of[args.criterion] for name, of in splits.items()}, folder / "variance.png")
    split = splits["all"][args.criterion]
    print(
        f"split {split.split:.3f} [{split.low:.3f}, {split.high:.3f}]: "
        f"{folder / 'variance.png'}, {folder / 'variance.json'}"
    )


def _variance_record(curve, splits: dict, criterion: str) -> dict:
    """What variance.json holds of one curve; variances are sums over the coordinates of a sample."""
    split = splits[criterion]
    names = (
        "t", "cfm", "cfm_error", "cfm_quantiles", "cfm_missing", "stablevm", "stablevm_error", "own_mass",
        "own_mass_error", "own_mass_missing", "entropy", "entropy_error", "effective", "effective_error",
    )  # fmt: skip
    values = {name: getattr(curve, name) for name in names}
    return {
        "split": split.split,
        "interval": [split.low, split.high],
        "confidence": 0.95,
        "criterion": criterion,
        "level": split.level,
        "other_criteria": {
            name: {"split": other.split, "interval": [other.low, other.high], "level": other.level}
            for name, other in splits.items()
            if name != criterion
        },
        "curve": {name: value.tolist() for name, value in values.items() if value is not None},
        "prior": curve.prior,
        "dim": curve.dim,
        "references": curve.references,
    }


def _times(text: str | None) -> list[float]:
    """The times that --times names: a list, or how many."""
    if text is None:
        return [*(i / 20 for i in range(1, 20)), 0.97, 0.99]
    try:
        if text.isdigit():
            times = [(i + 1) / (int(text) + 1) for i in range(int(text))]
        else:
            times = [float(part) for part in text.split(",")]
    except ValueError:
        times = []
    if len(times) < 2 or any(a >= b for a, b in pairwise(times)) or not 0 < times[0] <= times[-1] < 1:
        raise ValueError(f"--times: expected at least two increasing times in (0, 1), or how many, got {text!r}")
    return times


def _variance_data(args: argparse.Namespace):
    """x (n, *S) floating point and y (n,) or None, of whatever DATA names."""
    import numpy as np
    import torch

    from . import checkpoint
    from .config import DataConfig
    from .data import ArrayData, load_data, to_unit
    from .variance import bank_samples

    path = Path(args.data)
    if path.is_dir() and (checkpoint.is_complete(path) or (path / "checkpoints").is_dir()):
        folder = checkpoint.find(path)
        bank = checkpoint.load_bank(folder)
        return bank_samples(bank["refs"], bank["counts"], checkpoint.load(folder)[1]["data"]["num_classes"])
    if path.suffix == ".npz" and path.is_file():  # of any shape
        with np.load(path, allow_pickle=False) as file:
            if "x" not in file:
                raise ValueError(f"data: expected an array x in {str(path)!r}, got {', '.join(file) or 'none'}")
            x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]) if "y" in file else None
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(
                f"data: expected uint8 or floating point samples x (n, ...), got {x.dtype} {tuple(x.shape)}"
            )
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f"data: expected {len(x)} labels y, got {tuple(y.shape)}")
    else:
        data = load_data(DataConfig(source=args.data, image_size=args.image_size))
        if not isinstance(data, ArrayData):
            return data.__getitems__(range(len(data)))[:2]
        x, y = data.x, data.y
    return to_unit(x) if x.dtype == torch.uint8 else x * args.scale, y


def _add_encoder(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "encoder",
        help="train a small classifier whose tokens serve as a teacher, without downloads",
        description="Train a small convolutional classifier on a data set held in memory: svel features --teacher "
        "encoder:DIR takes it, for VA-REPA on the same data.",
    )
    p.add_argument("data", metavar="DATA", help="mnist, digits, or an .npz or .safetensors file with x and labels y")
    p.add_argument("--output", required=True, metavar="DIR", help="folder for encoder.json and encoder.safetensors")
    p.add_argument("--patch-size", type=int, default=4, help="of the SiT to align (default: %(default)s)")
    p.add_argument("--width", type=int, default=192, help="channels of the tokens (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=8, help="(default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    p.set_defaults(run=_encoder)
    return p


def _encoder(args: argparse.Namespace) -> None:
    from .config import DataConfig
    from .data import ArrayData, load_data
    from .encoder import save_encoder, train_encoder
    from .generation import resolve_device

    data = load_data(DataConfig(source=args.data))
    if not isinstance(data, ArrayData):
        raise ValueError(f"DATA: expected mnist, digits or a file of arrays, got {args.data!r}")
    net, accuracy = train_encoder(
        data,
        epochs=args.epochs,
        seed=args.seed,
        device=resolve_device(args.device),
        progress=True,
        patch_size=args.patch_size,
        width=args.width,
    )
    save_encoder(net, args.output, data=args.data, accuracy=accuracy)
    print(f"{accuracy:.1%} of the held-out samples right; {net.grid[0]} x {net.grid[1]} tokens; {args.output}")


def _add_features(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "features",
        help="teacher features of an image folder, for VA-REPA",
        description="Write a teacher's patch tokens beside svel latents. For several GPUs, and when killed: as there.",
    )
    _image_arguments(p, f"{_FOLDER}; or mnist, digits, or a file of arrays", shard_size=1024)
    p.add_argument(
        "--teacher",
        required=True,
        help="torch.hub:dinov2_vitb14, timm:NAME, transformers:NAME or folder, encoder:DIR, or module:function",
    )
    p.add_argument("--grid", type=int, default=16, help="patches on a side, as the model has (default: %(default)s)")
    p.set_defaults(run=_features)
    return p


def _features(args: argparse.Namespace) -> None:
    from .features import load_teacher, write_features

    images, options = _image_options(args, arrays=True)
    teacher = load_teacher(args.teacher).to(options["device"])
    about = write_features(images, args.output, teacher, args.teacher, grid=args.grid, **options)
    print(f"{about.samples} images, {about.flips} x {about.shape}, {about.shards} shards in {args.output}")


def _add_bench(commands) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "bench",
        help="run the benchmarks of a source checkout",
        description="pytest benchmarks, from a source checkout.",
    )
    p.add_argument("--output", metavar="DIR", help="folder for benchmarks.json")
    p.add_argument("pytest", nargs="*", metavar="-- ARGS", help="arguments for pytest, after --")
    p.set_defaults(run=_bench)
    return p


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    import stablevelocity_kernels

    roots = (Path.cwd(), Path(stablevelocity_kernels.__file__).parents[1])
    root = next((path for path in roots if (path / "benchmarks" / "conftest.py").is_file()), None)
    if root is None:
        raise RuntimeError("benchmarks: expected a source checkout with a folder `benchmarks`, as the wheel has none")
    command = [sys.executable, "-m", "pytest", "benchmarks", *args.pytest]
    if args.output:
        folder = Path(args.output).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        command.append(f"--benchmark-json={folder / 'benchmarks.json'}")
    return subprocess.run(command, cwd=root).returncode


_PLAN_KEYS = {"n": int, "m": int, "d": int, "k": int, "source": bool, "aligned": bool, "precision": str, "device": str}


def _add_info(commands) -> argparse.ArgumentParser:
    p = commands.add_parser("info", help="what is installed, and the launch that a problem gets")
    p.add_argument(
        "--plan",
        nargs="+",
        metavar="KEY=VALUE",
        help="n=256 m=256 d=4096 [k=1000] [x=float32] [refs=float16] [precision=exact] [source=true] [device=h100]",
    )
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_info)
    return p


def _info(args: argparse.Namespace) -> None:
    import platform

    import torch

    import stablevelocity_kernels as kernels

    if args.plan:
        facts = kernels.plan(**_plan_arguments(args.plan))
    else:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts = {
            "stablevelocity": kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "gpus": gpus or "none",
            "backends": kernels.backends(),
            "build": kernels.build_info(),
        }
    print(json.dumps(facts, indent=2, default=str) if args.json else "\n".join(_lines(facts)))


def _lines(facts: dict, indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        lines += (
            [f"{indent}{key}", *_lines(value, indent + "  ")]
            if isinstance(value, dict)
            else [f"{indent}{key}  {value}"]
        )
    return lines


def _plan_arguments(pairs: Sequence[str]) -> dict:
    """Arguments of stablevelocity_kernels.plan from n=..., m=..., d=... and so on."""
    import torch

    dtypes = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
    arguments = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in ("x", "refs"):
            if value not in dtypes:
                raise ValueError(f"--plan: {key}: expected one of {', '.join(dtypes)}, got {value!r}")
            arguments[f"{key}_dtype"] = dtypes[value]
        elif key not in _PLAN_KEYS:
            raise ValueError(
                f"--plan: expected key=value with a key of {', '.join([*_PLAN_KEYS, 'x', 'refs'])}, got {pair!r}"
            )
        elif _PLAN_KEYS[key] is bool:
            if value not in ("true", "false"):
                raise ValueError(f"--plan: {key}: expected true or false, got {value!r}")
            arguments[key] = value == "true"
        else:
            try:
                arguments[key] = _PLAN_KEYS[key](value)
            except ValueError:
                raise ValueError(f"--plan: {key}: expected an integer, got {value!r}") from None
    missing = [key for key in ("n", "m", "d") if key not in arguments]
    if missing:
        raise ValueError(f"--plan: expected n=, m= and d=, got no {', '.join(missing)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
