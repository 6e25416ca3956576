"""The cost model of a bank in parts: its page is up to date, and it says what follows from its terms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "multi_gpu.json"
sys.path.insert(0, str(ROOT / "benchmarks"))

from scaling import BEGIN, END, Cost, Machine, Work, cost, exchanged, fit, floor_exchanged, tables  # noqa: E402


def test_the_page_holds_what_the_script_prints():
    given = ["--fit", str(FIGURES)] if FIGURES.exists() else []
    script = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *given]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == printed, "run benchmarks/scaling.py --update"


def test_bytes():
    assert exchanged(1, 256, 4096) == {"push": 0, "draw": 0, "target": 0}
    assert exchanged(2, 256, 4096)["target"] == 256 * (2 * 4 * 4096 + 32)
    for gpus in (2, 8):
        assert 1 < exchanged(gpus, 26, 4096)["target"] / floor_exchanged(gpus, 26, 4096) < 1.001


def test_what_the_model_says():
    machine = Machine()
    few, many = (cost(machine, Work(p, 1e6, 4096), over_everything=True) for p in (1, 8))
    assert few.communication == 0.0
    assert many.read < few.read
    assert many.arithmetic == pytest.approx(few.arithmetic)  # rows grow as parts shrink
    fixed = cost(machine, Work(8, 1e6, 4096, null_rows=26 // 8), over_everything=True)
    assert fixed.arithmetic < few.arithmetic / 7
    one_host, several = (cost(machine, Work(p, 1e6, 4096), over_everything=False) for p in (8, 64))
    assert one_host.network == 0.0
    assert several.bound == "network"
    assert Cost(1.0, 2.0, 0.5, 0.25, 0.125).total == 2.0 + 0.5 + 0.125


def test_the_fit_gives_back_the_constants_of_a_machine_that_is_the_model():
    true = Machine(read=3e12, pairs=4e12, link=250e9, link_latency=12e-6, exchanges=2, collective_latency=21e-6)
    bank = {"rows": 256, "classes": 1001, "capacity": 256, "d": 4096}
    bytes_read = 210 * 256 * 4096 * 2
    pool = {"rows": 26, "references": 1_280_000, "d": 4096}
    alone = 26 * 1_280_000 * 4096 / true.pairs
    found = {
        "device": "a GPU",
        "world": 2,
        "link": [
            {
                "bytes": 1 << k,
                "all_gather": 21e-6 + (1 << k) / 200e9,
                "all_to_all": 20e-6 + (1 << k) / 200e9,
                "peer_memory": 12e-6 + (1 << k) / 250e9,
            }
            for k in (4, 20, 27)
        ],
        "class_bank": bank
        | {
            "bytes_read_by_one": bytes_read,
            "target_seconds": {"one GPU": true.call + bytes_read / true.read, "2 GPUs": 1e-3},
        },
        "pool": pool | {"seconds": {"one GPU": alone, "2 GPUs": alone / 1.9}},
    }
    fitted = fit(json.loads(json.dumps(found)))
    for name in ("read", "pairs", "link", "link_latency", "exchanges", "collective_latency"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-2), name
    for row in found["link"]:
        del row["peer_memory"]
    by_collectives = fit(found)
    assert by_collectives.exchanges == 3
    assert by_collectives.link_latency == pytest.approx(21e-6, rel=1e-2)
    text = tables(fitted, found)
    assert "| pool | " in text
    assert "a GPU, fitted to 2 of them" in text
