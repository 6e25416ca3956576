"""What the experiments share: their arguments, the machine's name, and where results go."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stablevelocity.generation import cpu_features, resolve_device

DOCS = Path(__file__).parents[2] / "docs"
COLOURS = {"cfm": "#b5542a", "stablevm": "#22577a", "stf": "#6a994e", "without": "#8d6a9f", "bank": "#5fa8d3"}


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every experiment takes."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--output", type=Path, default=DOCS / "figures", help="folder for the .png, .json and .md")
    p.add_argument("--page", type=Path, default=DOCS / "regimes.md", help="page whose tables are replaced")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--seed", type=int, default=0)
    return p


def device_of(args: argparse.Namespace) -> torch.device:
    return resolve_device(args.device)


def idx(path: Path) -> torch.Tensor:
    """The uint8 array of a gzipped IDX file, as MNIST and Fashion-MNIST come in.

    Raises:
        ValueError: for a file of another kind.
    """
    with gzip.open(path) as file:
        content = bytearray(file.read())
    if content[:3] != b"\0\0\x08" or not content[3]:
        raise ValueError(f"{path}: expected an IDX file of bytes, got one that begins with {bytes(content[:4])!r}")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).reshape(shape)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_features().get('cpu_name', 'CPU')}, {threads} thread{'s' * (threads > 1)} of {os.cpu_count()}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def axes_of(figure_axes: Any, title: str, x: str, y: str) -> Any:
    figure_axes.set(title=title, xlabel=x, ylabel=y)
    figure_axes.grid(alpha=0.25)
    figure_axes.spines[["top", "right"]].set_visible(False)
    return figure_axes


def new_figure(columns: int, width: float = 9.6, height: float = 3.9, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), dpi=100, layout="constrained", squeeze=False)


def as_json(record: dict) -> str:
    """Numbers to six digits, a list of them on one line."""
    rounded = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    flat = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(rounded, indent=1))
    return flat + "\n"


def write(name: str, args: argparse.Namespace, record: dict, tables: dict[str, str], figure: Any) -> None:
    """Write <name>.png, <name>.json and <name>.md, and put the tables between their markers in the page.

    A table `key` belongs between the lines <!-- key --> and <!-- /key --> of the page.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("output", "page")}
    record = {"settings": settings, "machine": machine(device_of(args)), "torch": torch.__version__, **record}
    (args.output / f"{name}.json").write_text(as_json(record))
    notes = f"\n\nMeasured on: {record['machine']}; `{name}.py`"
    tables = {key: f"{text}{notes}, {record['seconds']:.0f} s." for key, text in tables.items()}
    (args.output / f"{name}.md").write_text("\n\n".join(tables.values()) + "\n")
    figure.savefig(args.output / f"{name}.png")
    figure.clear()
    if args.page.is_file():
        page = args.page.read_text()
        for key, text in tables.items():
            place = rf"(<!-- {key} -->\n).*?(<!-- /{key} -->)"
            page = re.sub(place, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.S)
        args.page.write_text(page)
    print(f"{args.output / name}.png, .json, .md in {record['seconds']:.0f} s")
