"""The experiments behind docs/regimes.md and docs/training.md run, small, and leave what they promise."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stablevelocity.generation import load_model

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
SMALL = {
    "curves": ["--rows=4", "--samples=300", "--sizes", "50", "200", "--fashion=nowhere"],
    "target": ["--sets=6", "--largest=4"],
    "training": ["--updates=20", "--batch=8", "--references=32", "--test-points=50", "--truth-references=500"],
}
TABLES = {
    "curves": ["splits", "samples"],
    "target": ["variance", "bias", "largest"],
    "training": ["training", "truths"],
}

pytestmark = pytest.mark.skipif(not EXPERIMENTS.is_dir(), reason="needs a source checkout")


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_runs_and_fills_in_its_tables(name, tmp_path):
    pytest.importorskip("matplotlib")
    if name == "curves":
        pytest.importorskip("mlxtend")
        pytest.importorskip("sklearn")
    page = tmp_path / "page.md"
    page.write_text("".join(f"BEFORE\n<!-- {key} -->\nOLD\n<!-- /{key} -->\nAFTER\n" for key in TABLES[name]))
    command = [sys.executable, EXPERIMENTS / f"{name}.py", "--output", tmp_path, "--page", page, "--device=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *SMALL[name]], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["seconds"] > 0
    assert "NaN" not in json.dumps(record)
    text = page.read_text()
    assert "OLD" not in text
    assert text.count("BEFORE") == text.count("AFTER") == len(TABLES[name])
    assert text.count("Measured on: ") == len(TABLES[name])
    assert all(block in text for block in (tmp_path / f"{name}.md").read_text().strip().split("\n\n"))


@pytest.mark.parametrize(
    ("page", "tables"), [("regimes", TABLES), ("training", {"fashion": ["fashion", "fashion_changes"]})]
)
def test_the_page_shows_what_was_measured(page, tables):
    """Each table of a page is the one in docs/figures, and each figure is there."""
    page = (ROOT / "docs" / f"{page}.md").read_text()
    for figure in re.findall(r"\]\((figures/\S+\.png)\)", page):
        assert (ROOT / "docs" / figure).is_file(), figure
    for name, keys in tables.items():
        written = (ROOT / "docs" / "figures" / f"{name}.md").read_text()
        for key in keys:
            between = re.search(rf"<!-- {key} -->\n(.*?)\n<!-- /{key} -->", page, re.S)
            assert between, f"{key}: no place in the page"
            assert between[1] in written, key


def write_idx(path, array):
    """An IDX file of bytes, as Fashion-MNIST has them."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()))


def test_the_study_of_objectives_trains_every_arm_and_keeps_what_it_found(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 10
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (40, 28, 28), dtype=np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (30, 28, 28), dtype=np.uint8))
    page, models = tmp_path / "page.md", tmp_path / "models"
    page.write_text("".join(f"<!-- {key} -->\nOLD\n<!-- /{key} -->\n" for key in ("fashion", "fashion_changes")))
    command = [sys.executable, EXPERIMENTS / "fashion.py", "--data", tmp_path, "--models", models, "--output", tmp_path]
    command += ["--page", page, "--device=cpu"]
    command += ["--width=64", "--depth=3", "--batch=4", "--references=4"]
    command += ["--seeds=2", "--steps=2", "--epochs=1", "--rows=4", "--samples=4", "--sampling-steps=1", "--trial=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]  # a failed arm would leave one and go on
    record = json.loads((tmp_path / "fashion.json").read_text())
    assert {arm: len(of) for arm, of in record["runs"].items()} == dict.fromkeys(record["step_ms"], 2)
    assert len(record["runs"]) == 5
    same = [record["runs"][arm]["0"] for arm in ("stablevm", "repa")]
    assert same[0]["loss"][0] == same[1]["loss"][0]  # the same images, times and noise
    assert "OLD" not in page.read_text()
    assert page.read_text().count("Measured on: ") == 2
    model, config, about = load_model(models / "va_repa", device="cpu")
    assert (about["shape"], about["num_classes"], config.model.depth, len(model.blocks)) == ([1, 28, 28], 10, 3, 3)
