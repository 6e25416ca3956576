"""The demo, with a few steps: every file is written and the figures in them are what they claim to be."""

import json

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from stablevelocity import checkpoint
from stablevelocity.data import ArrayData
from stablevelocity.demo import affordable_steps, demo_config, run_demo, train_classifier
from stablevelocity.report import markdown_table, plot_variance
from stablevelocity.variance import variance_curve

TINY = [
    "data.source=digits",
    "model.hidden_size=32",
    "model.depth=1",
    "model.num_heads=2",
    "batch_size=8",
    "log_every=2",
    "mixed_precision=no",
    "sampling.steps=4",
    "sampling.low_steps=2",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    options = {"samples_per_class": 3, "variance_samples": 16, "classifier_epochs": 1, "progress": False}
    return folder, run_demo(folder, steps=4, device="cpu", overrides=[*TINY, "bank.capacity=32"], **options)


def test_demo_writes_every_file(demo):
    folder, _ = demo
    for name in ("samples.png", "variance.png", "loss.png", "metrics.json", "report.md", "config.yaml", "log.jsonl"):
        assert (folder / name).stat().st_size > 100, name
    assert checkpoint.latest(folder / "checkpoints").name == "step-00000004"


def test_demo_sample_grid_has_a_row_for_each_class(demo):
    from PIL import Image

    image = Image.open(demo[0] / "samples.png")
    assert image.width * (10 * 10 - 2) == image.height * (3 * 10 - 2)  # 10 rows of 3, 8 pixels and a gap of 2


def test_demo_metrics(demo):
    folder, metrics = demo
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    variance, samples = metrics["variance"], metrics["samples"]
    assert variance["references"] == 32
    assert all(ratio is None or ratio > 1 for ratio in variance["ratio_cfm_to_stablevm"].values())
    assert variance["ratio_cfm_to_stablevm"]["0.95"] > 10
    assert samples["count"] == 30
    assert samples["model_evaluations_per_sample"] == 8  # four guided steps
    assert 0 <= samples["small_cnn_accuracy_on_samples"] <= 1
    assert metrics["steps"] == 4
    assert metrics["full_steps"] == demo_config().steps
    assert metrics["final_loss"] > 0
    assert {"variance", "training", "sampling", "classifier", "total"} <= metrics["seconds"].keys()


def test_demo_report_shows_its_figures(demo):
    folder, metrics = demo
    report = (folder / "report.md").read_text()
    for text in ("![samples](samples.png)", "![variance](variance.png)", "![loss](loss.png)", "svel demo --steps 4"):
        assert text in report
    assert f"{metrics['final_loss']:.4f}" in report


def test_demo_can_be_repeated_in_the_same_folder_with_the_same_result(demo):
    folder, metrics = demo
    options = {"samples_per_class": 3, "variance_samples": 16, "classifier_epochs": 1, "progress": False}
    again = run_demo(folder, steps=4, device="cpu", overrides=[*TINY, "bank.capacity=32"], **options)
    assert again["final_loss"] == metrics["final_loss"]
    assert again["samples"] == metrics["samples"]


def test_a_slow_cpu_gets_fewer_steps(tmp_path, monkeypatch):
    data = ArrayData(torch.zeros(20, 8, 8, dtype=torch.uint8), torch.arange(20) % 10)
    config = demo_config(tmp_path, [*TINY, "device=cpu", "steps=900", "model.patch_size=4"])
    for seconds, steps in ((0.01, 900), (0.4, 500), (9.0, 300)):
        monkeypatch.setattr("stablevelocity.demo.Trainer.time_steps", lambda self, n, s=seconds: s)
        assert affordable_steps(config, data, budget=200.0) == steps


def test_classifier_learns_and_leaves_the_random_stream_alone():
    pixels = (torch.arange(200) % 2 * 255).to(torch.uint8).view(200, 1, 1).repeat(1, 8, 8)
    state = torch.get_rng_state()
    net, held_out = train_classifier(ArrayData(pixels, torch.arange(200) % 2), 3, 0, torch.device("cpu"), False)
    assert torch.equal(torch.get_rng_state(), state)
    assert held_out == 1.0
    assert net(torch.ones(1, 1, 8, 8)).argmax() == 1


def test_variance_plot_without_references(tmp_path):
    curve = variance_curve(torch.randn(20, 4), [0.3, 0.9], samples=8)
    plot_variance(curve, tmp_path / "v.png")
    assert (tmp_path / "v.png").stat().st_size > 100


def test_markdown_table():
    assert markdown_table([("a", 1)]).splitlines()[-1] == "| a | 1 |"
