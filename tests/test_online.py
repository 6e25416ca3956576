"""The online variance: against variance_curve, what t_min, split and the samplers make of it, and how it is kept."""

import itertools
import json
from pathlib import Path

import pytest
import stablevelocity as sv
import torch
from stablevelocity.config import dump_yaml, load_config

BINS = 16
CENTRES = (torch.arange(BINS) + 0.5) / BINS


def at_centres(n, device, generator):
    """Times in the middle of the bins, so that a bin's mean is the curve at its middle."""
    return CENTRES[torch.randint(BINS, (n,), generator=generator)]


def objective_over(data, references, rng, **options):
    """StableVM over a random subset of the data, which `renew` replaces."""
    bank = sv.ReferenceBank(data.shape[1:], capacity=references, dtype=torch.float32)
    objective = sv.StableVMObjective(bank, update_bank=False, online=True, **{"t_min": 0.0, **options})

    def renew():
        bank.push(data[torch.randperm(len(data), generator=rng)[:references]])

    renew()
    return objective, renew


def test_it_is_what_the_set_saves_against_the_conditional_target(rng):
    """E|target - conditional|^2 = V_CFM - V_StableVM, both from variance_curve; 10 runs, so 5 errors are p = 7e-4 a
    bin. Power: V_CFM itself, which a target without its source would give, is further off in most bins."""
    data, references = torch.randn(300, 3, generator=rng), 12
    runs = []
    for _ in range(10):
        objective, renew = objective_over(data, references, rng, times=at_centres)
        objective.variance = sv.OnlineVariance((3,), bins=BINS, horizon=10**9)
        for _ in range(60):
            renew()
            objective.sample(data[:256], generator=rng)
        runs.append(objective.variance.curve()[1])
    runs = torch.stack(runs).double()
    mean, error = runs.mean(0), runs.std(0) / len(runs) ** 0.5
    curve = sv.variance_curve(data, CENTRES, references=references, samples=12_000, generator=rng)
    expected = (curve.cfm - curve.stablevm) / curve.prior
    spread = torch.hypot(error, torch.hypot(curve.cfm_error, curve.stablevm_error) / curve.prior)
    assert ((mean - expected).abs() < 5 * spread + 1e-6).all()
    assert ((mean - curve.cfm / curve.prior).abs() > 10 * spread).sum() >= BINS // 2


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_a_bank_of_all_data_gives_the_split_of_the_data(interpolant, rng):
    """With the whole set as references V_StableVM is 0, and the two splits are of one curve."""
    data = torch.randn(200, 12, generator=rng)
    objective, _ = objective_over(data, 200, rng, interpolant=interpolant)
    for _ in range(150):
        objective.sample(data, generator=rng)
    curve = sv.variance_curve(
        data, torch.linspace(0.05, 0.99, 48), interpolant=interpolant, samples=4000, generator=rng
    )
    for level in (0.05, 0.2):
        found = sv.split_point(curve, level=level, confidence=0.999)
        assert found.low - 0.01 < float(objective.variance.split(level)) < found.high + 0.01
        assert found.high - found.low < 0.06


def test_the_split_moves_towards_the_noise_with_the_dimension_and_away_from_it_with_more_references(rng):
    def split(dim, references):
        data = torch.randn(1024, dim, generator=rng)
        objective, renew = objective_over(data, references, rng)
        for _ in range(40):
            renew()
            objective.sample(data[:256], generator=rng)
        return float(objective.variance.split())

    by_dim = [split(dim, 64) for dim in (4, 16, 64, 256)]
    assert all(b - a > 0.05 for a, b in itertools.pairwise(by_dim)), by_dim
    by_references = [split(16, m) for m in (8, 64, 512)]
    assert all(a - b > 0.02 for a, b in itertools.pairwise(by_references)), by_references


@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_the_curve_does_not_depend_on_what_is_predicted(prediction, rng):
    data = torch.randn(64, 5, generator=rng)
    t = torch.linspace(0.02, 0.98, 200)
    noise, x0 = torch.randn(200, 5, generator=rng), data[torch.randint(64, (200,), generator=rng)]
    path, curves = sv.Linear(), []
    for kind in ("velocity", prediction):
        target = path.target(path.interpolate(x0, noise, t), data, t, prediction=kind)
        variance = sv.OnlineVariance((5,), prediction=kind, bins=4)
        variance.update(x0, noise, t, target, torch.ones(200, dtype=torch.bool))
        curves.append(variance.curve()[1])
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-6)


def test_mean_and_variance_of_the_data_and_bad_rows(rng):
    """Batches of different sizes far from 0, two rows that are not finite: moments as those of all good rows."""
    batches = [5.0 + 2.0 * torch.randn(n, 3, generator=rng) for n in (30, 7, 20)]
    variance = sv.OnlineVariance((3,), bins=4)
    for x0 in batches:
        bad = torch.cat([x0, x0[:2] * torch.tensor([[float("nan")], [float("inf")]])])
        noise, t = torch.randn(len(bad), 3, generator=rng), torch.full((len(bad),), 0.6)
        target = noise - bad + 1.0
        variance.update(bad, noise, t, target, torch.arange(len(bad)) % 2 == 0)
    x = torch.cat(batches)
    torch.testing.assert_close(variance.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.variance, x.var(0, correction=0).sum(), rtol=1e-5, atol=0)
    measured = sum((n + 1) // 2 for n in (30, 7, 20))
    _, share, rows = variance.curve()
    assert rows.tolist() == pytest.approx([0, 0, measured, 0], rel=0.05)
    torch.testing.assert_close(share[2] * variance.variance, torch.tensor(3.0), rtol=1e-4, atol=0)


def test_old_rows_are_forgotten(rng):
    variance = sv.OnlineVariance((2,), bins=2, horizon=100)
    t, ones = torch.full((50,), 0.75), torch.ones(50, dtype=torch.bool)
    x0, noise = torch.randn(50, 2, generator=rng), torch.randn(50, 2, generator=rng)
    for apart in (0.0, 1.0):
        for _ in range(20):
            variance.update(x0, noise, t, noise - x0 + apart, ones)
    torch.testing.assert_close(variance.curve()[1][1] * variance.variance, torch.tensor(2.0), rtol=1e-4, atol=0)


def test_processes_add_up(rng):
    """Two processes with half of the rows each, of which this one knows that the other has the same."""
    whole, part = sv.OnlineVariance((2,), bins=4), sv.OnlineVariance((2,), bins=4)
    part.reduce = lambda sums: 2 * sums
    for _ in range(3):
        x0, noise, t = torch.randn(6, 2, generator=rng), torch.randn(6, 2, generator=rng), torch.rand(6, generator=rng)
        rows = (x0, noise, t, noise - x0 + 0.3, t > 0.2)
        part.update(*rows)
        whole.update(*(torch.cat([value, value]) for value in rows))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(part.state_dict()[name], value)


# -- t_min, VAREPALoss


@pytest.mark.parametrize("source", ["bank", "loader"])
def test_auto_t_min(source, rng):
    data = torch.randn(600, 24, generator=rng)
    bank = sv.ReferenceBank((24,), capacity=128, dtype=torch.float32)
    bank.push(data[:128])
    objective = sv.StableVMObjective(bank, t_min="auto", source=source)

    def conditional(s):
        return (s.target - (s.noise - s.x0)).flatten(1).norm(dim=1) < 1e-4

    first = objective.sample(data[:256], generator=rng)
    assert not conditional(first)[first.t > 0.7].any()
    assert objective.variance.seen == 256, "until enough is known, every row takes the target over the set"
    for _ in range(60):
        objective.sample(data[torch.randint(600, (256,), generator=rng)], generator=rng)
    t_min = float(objective.variance.split(0.01))
    assert 0.2 < t_min < float(objective.variance.split(0.05)) < 0.9
    before = float(objective.variance.seen)
    s = objective.sample(data[:256], generator=rng)
    chosen = torch.arange(256) % 16 != 0
    skipped = chosen & (s.t < t_min)
    assert torch.equal(s.target[skipped], (s.noise - s.x0)[skipped])
    assert float(objective.variance.seen) - before == 256 - int(skipped.sum())
    curve = objective.variance.curve()
    assert (curve[2] > 0).all(), "every bin stays measured"


def test_a_bank_on_the_host(rng):
    bank = sv.HostReferenceBank((4,), num_classes=3, capacity=16, dtype=torch.float32, device="cpu")
    objective = sv.StableVMObjective(bank, t_min="auto", cfg_prob=0.0)
    x0, labels = torch.randn(64, 4, generator=rng), torch.arange(64) % 3
    for _ in range(40):
        objective.sample(x0, labels, generator=rng)
    assert objective.variance.seen > 2048
    assert 0.0 < float(objective.variance.split(0.01)) < float(objective.variance.split()) < 0.8


def test_a_collapsed_estimate_recovers(rng):
    """With an empty bank the set is the sample alone and nothing seems to vary; once it is full, the split is found."""
    data = torch.randn(600, 8, generator=rng)
    objective = sv.StableVMObjective(
        sv.ReferenceBank((8,), capacity=64, dtype=torch.float32), t_min="auto", source="loader", update_bank=False
    )
    for _ in range(40):
        objective.sample(data[:256], generator=rng)
    assert float(objective.variance.split()) > 0.95
    objective.bank.push(data[:64])
    objective.variance.horizon = 200  # sooner
    for _ in range(120):
        objective.sample(data[:256], generator=rng)
    assert float(objective.variance.split()) < 0.6


@pytest.mark.parametrize("schedule", ["hard", "hard_high", "sigmoid", "cosine", "snr"])
def test_va_repa_takes_the_split_from_the_objective(schedule, rng):
    data = torch.randn(300, 24, generator=rng)
    objective, renew = objective_over(data, 64, rng)
    align = sv.VAREPALoss(schedule=schedule, split="auto", variance=objective.variance)
    t = torch.linspace(0.0, 1.0, 50)
    torch.testing.assert_close(align.weights(t), sv.VAREPALoss(schedule=schedule, split=0.7).weights(t))
    for _ in range(20):
        renew()
        objective.sample(data[:256], generator=rng)
    split = float(objective.variance.split())
    assert abs(split - 0.7) > 0.05
    torch.testing.assert_close(align.weights(t), sv.VAREPALoss(schedule=schedule, split=split).weights(t))


# -- what a training step may do


@pytest.mark.parametrize("source", ["bank", "loader"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_with_auto_compiles_without_a_graph_break(backend, source, rng):
    torch._dynamo.reset()
    data = torch.randn(64, 6, generator=rng)
    found = []
    for compiled in (False, True):
        bank = sv.ReferenceBank((6,), capacity=32, dtype=torch.float32)
        bank.push(data[:32])
        objective = sv.StableVMObjective(bank, t_min="auto", source=source)
        align = sv.VAREPALoss(split="auto", variance=objective.variance)

        def step(x0, objective=objective, align=align):
            s = objective.sample(x0)
            return s, align(s.x_t[:, None], s.x0[:, None], s.t)

        run = torch.compile(step, backend=backend, fullgraph=True) if compiled else step
        torch.manual_seed(4)
        for _ in range(80):  # past the number of rows from which the split counts
            s, loss = run(data)
        found.append((s.target, loss, objective.variance.state_dict()))
    (eager, loss, state), (other, other_loss, other_state) = found
    assert state["seen"] > 2048
    torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=0)
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value, rtol=1e-3, atol=1e-5)
    assert (other - eager).norm() < 1e-3 * eager.norm(), "a row at t_min may take either target"


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["bank", "loader"])
def test_a_step_with_auto_captures_in_a_cuda_graph(source, rng):
    data = torch.randn(512, 24, generator=rng).cuda()
    bank = sv.ReferenceBank((24,), capacity=64, device="cuda")
    objective = sv.StableVMObjective(bank, t_min="auto", source=source)
    align = sv.VAREPALoss(split="auto", variance=objective.variance)
    bank.push(data[:64])
    x0 = data[:256].clone()

    def step():
        s = objective.sample(x0)
        return align(s.x_t[:, None], s.x0[:, None], s.t)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()  # no wait in eager mode either
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seen = float(objective.variance.seen)
    for i in range(60):
        x0.copy_(data[torch.randint(512, (256,), device="cuda")])
        graph.replay()
        if i == 0:
            assert float(objective.variance.seen) == seen + 256, "not enough is known yet to leave rows out"
    assert 0.2 < float(objective.variance.split(0.01)) < float(objective.variance.split()) < 0.9
    assert float(objective.variance.seen) < seen + 60 * 256, "rows below t_min took the target over the set"


# -- splits that svel variance wrote, in objects and configurations


@pytest.fixture
def measured(tmp_path):
    """A folder with a variance.json."""
    record = {"split": 0.62, "interval": [0.6, 0.63], "criterion": "variance", "level": 0.05}
    (tmp_path / "variance.json").write_text(json.dumps(record))
    return tmp_path


def test_a_split_that_was_written(measured, rng):
    split = sv.load_split(measured)
    assert split == sv.load_split(measured / "variance.json") == sv.Split(0.62, 0.6, 0.63, "variance", 0.05)
    for given in (0.62, split, measured, str(measured / "variance.json")):
        assert sv.StableVMObjective(sv.ReferenceBank((2,)), t_min=given).t_min == 0.62
        assert sv.VAREPALoss(split=given).split == 0.62
        assert sv.StableVS(split=given).split == 0.62


@pytest.mark.parametrize("key", ["objective.t_min", "align.split", "sampling.split"])
def test_splits_in_configurations(key, measured):
    def value(config):
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    for given, expected in (("auto", "auto"), (measured, 0.62), ("0.3", 0.3), ("3e-1", 0.3), (1, 1.0)):
        config = load_config(None, [f"{key}={given}"])
        assert value(config) == expected
        again = measured / "again.yaml"
        again.write_text(dump_yaml(config))
        assert value(load_config(again)) == expected
    for given, message in (
        ("1.5", rf"{key}: expected a number from 0.0 to 1.0, got 1.5"),
        ("nowhere.json", rf"{key}: expected a number, a Split, the path of a variance.json, .* got 'nowhere.json'"),
        ("true", rf"{key}: expected a number, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, [f"{key}={given}"])


def test_schedulers_take_a_split_that_was_written(measured):
    diffusers = pytest.importorskip("stablevelocity.diffusers")
    kind = diffusers.StableVSFlowMatchEulerScheduler
    for given in (measured, str(measured / "variance.json"), sv.load_split(measured)):
        scheduler = kind(stable_split=given)
        assert scheduler.config.stable_split == scheduler.stable.split == 0.62
        assert kind.from_config(kind().config, stable_split=given).config.stable_split == 0.62
    kind().save_pretrained(measured / "model" / "scheduler")
    (measured / "model" / "scheduler" / "variance.json").write_text((measured / "variance.json").read_text())
    for name, subfolder in ((measured / "model", "scheduler"), (measured / "model" / "scheduler", None)):
        loaded = kind.from_pretrained(name, subfolder=subfolder, stable_split="auto", stable_low_steps=4)
        assert (loaded.config.stable_split, loaded.config.stable_low_steps) == (0.62, 4)
    loaded.save_pretrained(measured / "saved")
    assert json.loads((measured / "saved" / "scheduler_config.json").read_text())["stable_split"] == 0.62
    assert kind.from_pretrained(measured / "saved").config.stable_split == 0.62
    with pytest.raises(ValueError, match=r"stable_split: expected from_pretrained\(folder\) with 'auto', .*'auto'"):
        kind(stable_split="auto")
    with pytest.raises(ValueError, match=r"stable_split: expected a number, .* got .*saved/variance.json"):
        kind.from_pretrained(measured / "saved", stable_split="auto")


# -- in training runs


def test_a_run_measures_saves_and_samples_with_its_own_split(tmp_path, rng):
    pytest.importorskip("accelerate")
    from stablevelocity import checkpoint
    from stablevelocity.data import ArrayData
    from stablevelocity.generation import load_model, settle_split
    from stablevelocity.train import Trainer

    data = ArrayData(torch.randn(200, 1, 4, 4, generator=rng))
    small = ["steps=60", "batch_size=64", "mixed_precision=no", "device=cpu", "model.hidden_size=16", "model.depth=1"]
    small += ["model.num_heads=2", "bank.capacity=64", "save_every=40", "log_every=20", "sampling.steps=3"]
    auto = ["objective.t_min=auto", "sampling.split=auto", "sampling.low_steps=2"]

    def trainer(name, *more):
        return Trainer(load_config(None, [*small, f"output={tmp_path / name}", *more]), dataset=data, progress=False)

    whole = trainer("a", *auto)
    result = whole.fit()
    split = float(whole.variance.split())
    assert 0.1 < split < 0.9
    assert result.losses[-1]["split"] == pytest.approx(split)
    assert result.losses[0]["split"] == pytest.approx(0.85), "the paper's, before enough is known"
    assert whole.sampling().split == pytest.approx(split)
    assert load_model(tmp_path / "a", device="cpu")[1].sampling.split == pytest.approx(split)
    state = checkpoint.load_module(result.checkpoint, "variance")
    again = trainer("b", *auto, f"resume={result.checkpoint.with_name('step-00000040')}")
    assert again.variance.seen > 2048, "resumed with what it knew"
    resumed = again.fit()
    for name, value in checkpoint.load_module(resumed.checkpoint, "variance").items():
        assert torch.equal(value, state[name]), name
    assert not list(Path(trainer("c").fit().checkpoint).glob("variance*")), "no auto, nothing to keep"
    with pytest.raises(ValueError, match=r"sampling.split: expected a number .* trained without a split of 'auto'"):
        settle_split(load_config(None, auto), tmp_path / "c" / "checkpoints" / "step-00000060")
    with pytest.raises(ValueError, match=r"sampling.split: expected .* with objective.name = cfm"):
        trainer("d", "objective.name=cfm", "sampling.split=auto")


def test_errors_name_the_argument():
    bank = sv.ReferenceBank((2,))
    for make, message in (
        (lambda: sv.OnlineVariance((2,), bins=1), "bins: expected at least 2, got 1"),
        (lambda: sv.OnlineVariance((2,), prediction="v"), "prediction: expected one of"),
        (lambda: sv.VAREPALoss(split="auto"), "variance: expected the OnlineVariance .* 'auto', got NoneType"),
        (lambda: sv.VAREPALoss(variance=sv.OnlineVariance((2,))), "variance: expected None with split = 0.7"),
        (lambda: sv.StableVMObjective(bank, t_min="soon"), "t_min: expected a number, a Split, .* got 'soon'"),
        (lambda: sv.load_split("/nowhere"), "split: expected a variance.json that svel variance wrote, got '/nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
