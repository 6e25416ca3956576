"""The experiment behind docs/sampling.md runs on a small model and can be redrawn; the page shows what it wrote."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stablevelocity import cli

ROOT = Path(__file__).parents[1]
EXPERIMENT = ROOT / "benchmarks" / "experiments" / "sampling.py"

pytestmark = pytest.mark.skipif(not EXPERIMENT.is_file(), reason="needs a source checkout")


def run(*options):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, EXPERIMENT, *options], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_measures_a_run_and_draws_again_from_what_it_wrote(tmp_path):
    for module in ("matplotlib", "accelerate", "sklearn"):
        pytest.importorskip(module)
    sizes = [f"--set=model.{item}" for item in ("patch_size=4", "hidden_size=32", "depth=1", "num_heads=2")]
    train = ["--data=digits", "--steps=40", "--batch-size=16", "--device=cpu", "--set=bank.capacity=16", *sizes]
    assert cli.main(["train", f"--output={tmp_path / 'run'}", *train]) == 0
    page = tmp_path / "page.md"
    page.write_text("BEFORE\n<!-- samplers -->\nOLD\n<!-- /samplers -->\nAFTER\n")
    to = ["--page", page, "--output"]
    small = ["--samples=32", "--epochs=1", "--exact=40", "--splits=0.85", "--solvers", "euler", "unipc"]
    run(tmp_path / "run", *small, "--device=cpu", *to, tmp_path / "first")
    measured = page.read_text()
    assert "OLD" not in measured
    assert (tmp_path / "first" / "sampling.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "first" / "sampling.json").read_text())
    columns = record["models"]["digits"]["runs"]
    rows = [dict(zip(columns, row, strict=False)) for row in zip(*list(columns.values())[:-1], strict=True)]
    euler = {r["low_steps"]: r for r in rows if (r["kind"], r["solver"]) == ("stable", "euler")}
    assert {low: r["nfe"] for low, r in euler.items()} == {low: 5 + low for low in (1, 2, 3, 4, 5, 7, 9, 11, 13, 15)}
    assert euler[15]["distance"] < euler[3]["distance"] < euler[1]["distance"]
    plain = {r["steps"]: r["distance"] for r in rows if (r["kind"], r["solver"]) == ("plain", "euler")}
    assert plain[50] < plain[20] < plain[10]
    run("--redraw", tmp_path / "first" / "sampling.json", *to, tmp_path / "second")
    assert page.read_text() == measured
    again = json.loads((tmp_path / "second" / "sampling.json").read_text())
    assert again["models"] == record["models"]


def test_a_run_with_stablevs_is_the_solver_s_own_up_to_the_split_and_goes_on_from_there():
    """What the experiment relies on, for every solver."""
    import torch
    from stablevelocity.sampling import SOLVERS, StableVS, thin, time_grid

    x, stable = torch.randn(4, 3, dtype=torch.float64), StableVS(0.6, 3, grid="official")

    def velocity(x, t):
        return -x / (0.5 + t[:, None])

    times = thin(time_grid(12), stable.split, stable.low_steps)
    high = int((times > stable.split).sum())
    for solver in ("euler", "heun", "dpmpp_2m", "unipc"):
        whole = SOLVERS[solver](velocity, x, times, stable=stable)
        seen = []
        SOLVERS[solver](velocity, x, time_grid(12), callback=lambda *a, s=seen: s.append(a[3]))
        assert torch.equal(SOLVERS[solver](velocity, seen[high - 1], times[high:], stable=stable), whole), solver


@pytest.mark.skipif(not (ROOT / "docs/figures/sampling.md").is_file(), reason="not measured yet")
def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "sampling.md").read_text()
    for figure in re.findall(r"\]\((figures/\S+\.png)\)", page):
        assert (ROOT / "docs" / figure).is_file(), figure
    between = re.search(r"<!-- samplers -->\n(.*?)\n<!-- /samplers -->", page, re.S)
    assert between[1] == (ROOT / "docs" / "figures" / "sampling.md").read_text().strip()
