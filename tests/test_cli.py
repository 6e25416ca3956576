"""The command line: what works, and that every mistake is one line and exit code 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from stablevelocity import cli
from stablevelocity.config import TrainConfig, dump_yaml, from_dict, load_config, to_dict

SMALL = [
    "--set=model.patch_size=4",
    "--set=model.hidden_size=16",
    "--set=model.depth=1",
    "--set=model.num_heads=2",
    "--set=sampling.steps=3",
    "--set=sampling.low_steps=2",
    "--set=bank.capacity=4",
    "--device=cpu",
    "--mixed-precision=no",
    "--batch-size=8",
]


def svel(*arguments):
    return cli.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments):
    try:
        code = svel(*arguments)
    except SystemExit as exit_:
        code = exit_.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    np.savez(folder / "set.npz", x=rng.integers(0, 256, (12, 8, 8), dtype=np.uint8), y=np.arange(12) % 3)
    assert svel("train", "--data", folder / "set.npz", "--output", folder / "run", "--steps=3", *SMALL) == 0
    return folder / "run"


def test_help_and_module_entry():
    done = subprocess.run([sys.executable, "-m", "stablevelocity", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("demo", "train", "sample", "variance", "bench", "info"):
        assert f"    {command} " in done.stdout


def test_train_writes_the_resolved_configuration(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["steps"] == 3
    assert config["model"]["hidden_size"] == 16


def test_train_resumes_from_the_command_line(trained, tmp_path, capsys):
    config = trained / "config.yaml"
    assert svel("train", "--config", config, "--resume", trained, "--output", tmp_path, "--steps=4") == 0
    assert "4 steps" in capsys.readouterr().out


def test_sample(trained, tmp_path, capsys):
    pytest.importorskip("PIL")
    options = ["--labels=2,0", "--per-class=3", "--guidance=2", "--steps=4", "--solver=heun", "--device=cpu"]
    for name in ("a", "b"):
        assert svel("sample", trained, "--output", tmp_path / name, *options, "--seed=5") == 0
    assert "12 model evaluations each" in capsys.readouterr().out  # two guided Heun steps and two StableVS steps
    a, b = (np.load(tmp_path / name / "samples.npz") for name in ("a", "b"))
    assert a["arr_0"].shape == (6, 8, 8, 1)
    assert a["arr_0"].dtype == np.uint8
    assert a["arr_1"].tolist() == [2, 2, 2, 0, 0, 0]
    assert np.array_equal(a["arr_0"], b["arr_0"])
    assert (tmp_path / "a" / "samples.png").exists()


def variance_of(folder):
    return json.loads((folder / "variance.json").read_text())


def test_variance(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "set.npz", x=rng.standard_normal((60, 9)), y=np.arange(60) % 2)  # of any shape
    options = [tmp_path / "set.npz", "--times=8", "--rows=400", "--device=cpu"]
    more = ["--references=5", "--classes=separate", "--effective"]
    for name in ("a", "b"):
        assert svel("variance", *options, *more, "--output", tmp_path / name) == 0
        assert (tmp_path / name / "variance.png").stat().st_size > 1000
    out = capsys.readouterr()
    assert "split 0." in out.out
    assert "100%" in out.err, "a progress bar"
    found = variance_of(tmp_path / "a")
    assert found == variance_of(tmp_path / "b")
    assert 0 < found["interval"][0] <= found["split"] <= found["interval"][1] < 1
    assert found["curve"]["t"] == pytest.approx([k / 9 for k in range(1, 9)])
    assert sorted(found["by_class"]) == ["0", "1"]
    for part in (found, *found["by_class"].values()):
        assert len(part["curve"]["stablevm"]) == len(part["curve"]["effective"]) == 8
        assert part["dim"] == 9
    assert (found["samples"], found["shape"], found["classes"]) == (60, [9], "separate")

    options += ["--criterion=own_mass", "--level=0.2"]
    assert svel("variance", *options, "--pool=20", "--seed=3", "--output", tmp_path / "c") == 0
    other = variance_of(tmp_path / "c")
    assert (other["criterion"], other["level"], other["pool"]) == ("own_mass", 0.2, 20)
    assert max(other["curve"]["cfm_missing"]) > 0
    assert "by_class" not in other
    assert "stablevm" not in other["curve"]


def test_variance_is_that_of_the_function(tmp_path):
    from stablevelocity import split_point, variance_curve

    x = torch.randn(40, 2, 3)
    np.savez(tmp_path / "set.npz", x=x.numpy())
    options = ["--times=0.2,0.4,0.9", "--rows=32", "--seed=5", "--device=cpu", "--scale=2", "--interpolant=cosine"]
    assert svel("variance", tmp_path / "set.npz", "--output", tmp_path, *options) == 0
    curve = variance_curve(
        2 * x, [0.2, 0.4, 0.9], interpolant="cosine", samples=32, generator=torch.Generator().manual_seed(5)
    )
    assert variance_of(tmp_path)["curve"]["cfm"] == curve.cfm.tolist()
    assert variance_of(tmp_path)["split"] == split_point(curve).split


def test_variance_of_a_bank(trained, tmp_path):
    options = ["--times=0.3,0.9", "--rows=16", "--device=cpu", "--classes=given", "--references=3"]
    assert svel("variance", trained, "--output", tmp_path, *options) == 0
    found = variance_of(tmp_path)
    assert (found["samples"], found["shape"]) == (12, [1, 8, 8])  # three rings of four
    assert found["curve"]["stablevm"][1] < found["curve"]["cfm"][1]


def test_mistakes_in_variance_are_one_line(capsys, tmp_path):
    def said(*arguments):
        return error_of(capsys, "variance", *arguments, "--output", tmp_path, "--device=cpu")

    for name, arrays in (("plain", {"x": np.ones((4, 2))}), ("z", {"z": np.ones(3)}), ("i", {"x": np.arange(4)})):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    plain = tmp_path / "plain.npz"
    assert "--classes: expected ignore, since the data hold no labels, got given" in said(plain, "--classes=given")
    assert "expected an array x" in said(tmp_path / "z.npz")
    assert "expected uint8 or floating point samples x (n, ...), got torch.int64 (4,)" in said(tmp_path / "i.npz")
    assert "data.source: no such file" in said(tmp_path / "none.npz")
    for times in ("1", "0.5,0.4", "0,1", "many"):
        assert f"--times: expected at least two increasing times in (0, 1), or how many, got '{times}'" in said(
            plain, f"--times={times}"
        )


def test_info(capsys):
    assert svel("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert "CPU" in facts["backends"]


def test_info_plan(capsys):
    from stablevelocity_kernels import build_info

    if not build_info()["compiled"]:
        assert "no compiled extension" in error_of(capsys, "info", "--plan", "n=8", "m=4", "d=16")
        return
    plan = ["--plan", "n=256", "m=256", "d=4096", "k=1000", "refs=bfloat16", "source=true", "device=h100"]
    assert svel("info", "--json", *plan) == 0
    assert json.loads(capsys.readouterr().out)["kernel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required: command"),
        (["train", "--set", "optim.learning_rate=1"], "optim.learning_rate: unknown configuration key"),
        (["train", "--set", "lr=1"], "did you mean optim.lr?"),
        (["train", "--set", "optim.lrr=1"], "did you mean optim.lr?"),
        (["train", "--set", "steps"], "--set: expected key=value, got 'steps'"),
        (["train", "--steps", "many"], "steps: expected an integer, got 'many'"),
        (["train", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["train", "--objective", "cfg"], "objective.name: expected one of stablevm, cfm, stf, got 'cfg'"),
        (["train", "--config", "none.yaml"], "config: cannot read 'none.yaml'"),
        (["train", "--data", "none.npz", "--output", "OUT"], "data.source: no such file"),
        (["sample", "OUT", "--output", "OUT"], "checkpoint: expected a run or checkpoint folder"),
        (["info", "--plan", "n=1", "m=2"], "--plan: expected n=, m= and d=, got no d"),
        (["info", "--plan", "q=1"], "--plan: expected key=value with a key of n, m"),
        (["info", "--plan", "n=x"], "--plan: n: expected an integer, got 'x'"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, arguments, message):
    arguments = [str(tmp_path) if argument == "OUT" else argument for argument in arguments]
    assert message in error_of(capsys, *arguments)


def test_mistakes_in_sampling_are_one_line(capsys, trained, tmp_path):
    assert "expected classes from 0 to 2, got 7" in error_of(
        capsys, "sample", trained, "--output", tmp_path, "--labels=7"
    )
    assert "sampling.split: expected" in error_of(capsys, "sample", trained, "--output", tmp_path, "--split=2")
    said = error_of(capsys, "sample", trained, "--output", tmp_path, "--split=auto")
    assert "sampling.split: expected a number or the path of a variance.json, since this run was trained" in said


def test_a_split_goes_from_the_data_into_training_and_sampling(trained, tmp_path):
    assert svel("variance", trained.parent / "set.npz", "--output", tmp_path, "--rows=32", "--device=cpu") == 0
    split = variance_of(tmp_path)["split"]
    assert 0.1 < split < 0.99
    file = tmp_path / "variance.json"
    options = ["--data", trained.parent / "set.npz", "--output", tmp_path / "run", "--steps=2", *SMALL]
    assert svel("train", *options, f"--set=objective.t_min={file}", "--set=sampling.split=auto") == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["objective"]["t_min"] == split
    assert config["sampling"]["split"] == "auto"
    for more in ([], ["--split=auto"], ["--split", file]):
        assert svel("sample", tmp_path / "run", "--output", tmp_path / "s", "--per-class=1", "--device=cpu", *more) == 0


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="steps"):
        svel("train", "--debug", "--steps", "many")


def test_bench_outside_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stablevelocity_kernels.__file__", str(tmp_path / "package" / "__init__.py"))
    assert "expected a source checkout" in error_of(capsys, "bench")


def test_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = error_of(capsys, "train", "--output", tmp_path, *SMALL)
    assert 'accelerate is not installed: pip install "stablevelocity[train]"' in line


def test_configuration_round_trip_and_precedence(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\ncompile: no\noptim: {lr: 1e-3, betas: [0.5, 0.9]}\n")
    config = load_config(file, ["steps=9", "data.image_size=32", "resume=null", "optim.weight_decay=0"])
    assert (config.steps, config.compile, config.optim.lr, config.optim.betas) == (9, "no", 1e-3, (0.5, 0.9))
    assert config.data.image_size == 32
    file.write_text(dump_yaml(config))
    assert load_config(file) == config == from_dict(to_dict(config))
    assert from_dict({}) == TrainConfig()


@pytest.mark.parametrize("name", ["demo", "imagenet_latents"])
def test_packaged_configurations_are_valid(name):
    from importlib.resources import files

    load_config(str(files("stablevelocity") / "configs" / f"{name}.yaml"))
