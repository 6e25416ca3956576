"""The experiments behind docs/regimes.md run, small, and leave what they promise; the page's tables are theirs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_page_shows_what_was_measured():
    """Each table of docs/regimes.md is the one in docs/figures, and each figure is there."""
    page = (ROOT / "docs" / "regimes.md").read_text()
    for figure in re.findall(r"\]\((figures/\S+\.png)\)", page):
        assert (ROOT / "docs" / figure).is_file(), figure
    for name, keys in TABLES.items():
        written = (ROOT / "docs" / "figures" / f"{name}.md").read_text()
        for key in keys:
            between = re.search(rf"<!-- {key} -->\n(.*?)\n<!-- /{key} -->", page, re.S)
            assert between, f"{key}: no place in the page"
            assert between[1] in written, key
