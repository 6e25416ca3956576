"""Training objectives: what a draw consists of, bias and variance of the target, and what a training step may do."""

import itertools

import pytest
import stablevelocity as sv
import torch

from stablevelocity_kernels.testing import assert_close

SHAPE, CLASSES = (2, 3), 4


def batch(n, rng, dtype=torch.float32):
    return torch.randn(n, *SHAPE, generator=rng).to(dtype), torch.randint(CLASSES, (n,), generator=rng)


def filled_bank(rng, null="ring", **change):
    bank = sv.ReferenceBank(SHAPE, CLASSES, 6, null=null, **{"dtype": torch.float32} | change)
    bank.push(*batch(30, rng))
    return bank


def at_time(t):
    return lambda n, device, generator: torch.full((n,), t, device=device)


class Shifted(sv.Cosine):
    """A user's own path: the cosine under another name, so that it takes the general kernels."""

    name = None

    def coefficients(self, t):
        return sv.Cosine().coefficients(t)


def check_ahead(device, rng):
    """The draws of `sample` in the same order, whatever the model's stream does meanwhile."""
    stream = [[part.to(device) for part in batch(16, rng)] for _ in range(5)]
    objectives = [sv.StableVMObjective(filled_bank(torch.Generator().manual_seed(3)).to(device)) for _ in range(2)]
    torch.manual_seed(5)
    expected = [objectives[0].sample(*given) for given in stream]
    torch.manual_seed(5)
    seen = 0
    for draw, whole in zip(objectives[1].ahead(stream), expected, strict=True):
        for name in ("x_t", "t", "labels", "target", "x0", "noise"):
            assert torch.equal(getattr(draw, name), getattr(whole, name)), name
        seen += 1
    assert seen == len(stream)
    assert list(objectives[1].ahead([])) == []


def test_ahead_gives_the_draws_of_sample(rng):
    check_ahead("cpu", rng)


@pytest.mark.gpu
def test_ahead_gives_the_draws_of_sample_on_cuda(rng):
    check_ahead("cuda", rng)


# --- what a draw consists of


@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
@pytest.mark.parametrize("interpolant", ["linear", "cosine", Shifted()], ids=str)
def test_cfm_sample(interpolant, prediction, rng):
    x0, labels = batch(50, rng)
    path = sv.get_interpolant(interpolant)
    s = sv.CFMObjective(interpolant, prediction=prediction, num_classes=CLASSES).sample(x0, labels, generator=rng)
    assert torch.equal(s.x0, x0)
    assert torch.equal(s.x_t, path.interpolate(x0, s.noise, s.t))
    assert torch.equal(s.target, path.conditional(x0, s.noise, s.t, prediction))
    assert s.t.min() >= 1e-5
    assert s.t.max() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
@pytest.mark.parametrize("source", ["bank", "loader"])
def test_draw_is_float32_whatever_comes_in(source, stored, dtype, rng):
    s = sv.StableVMObjective(filled_bank(rng, dtype=stored), source=source).sample(*batch(8, rng, dtype))
    for value in (s.x_t, s.t, s.target, s.x0, s.noise):
        assert value.dtype == torch.float32
        assert value.isfinite().all()


@pytest.mark.parametrize("null", ["ring", "all"])
@pytest.mark.parametrize("interpolant", ["linear", "cosine", Shifted()], ids=str)
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_bank_mode_target_is_over_the_bank(null, interpolant, prediction, rng):
    bank = filled_bank(rng, null)
    objective = sv.StableVMObjective(
        bank, interpolant, prediction=prediction, t_min=0.3, update_bank=False, cfg_prob=0.5
    )
    s = objective.sample(*batch(64, rng), generator=rng)
    path = sv.get_interpolant(interpolant)
    for i in range(64):
        y = int(s.labels[i])
        group = range(CLASSES) if (y == CLASSES and null == "all") else [y]
        members = torch.cat([bank.refs[g, : bank.counts[g]] for g in group])
        assert (members == s.x0[i]).flatten(1).all(1).any(), "x_t is not made of a member of the set"
        row = slice(i, i + 1)
        if s.t[i] < 0.3:
            expected = path.conditional(s.x0[row], s.noise[row], s.t[row], prediction)
        else:
            expected = path.target(s.x_t[row].double(), members, s.t[row], prediction=prediction)
        assert_close(s.target[row], expected)
    assert (s.t < 0.3).any(), "no row below t_min was drawn"
    assert (s.labels == CLASSES).any(), "no null label was drawn"


@pytest.mark.parametrize("null", ["ring", "all"])
def test_loader_mode_target_holds_the_own_sample(null, rng):
    bank = filled_bank(rng, null)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    x0, labels = batch(32, rng)
    s = sv.StableVMObjective(bank, source="loader", t_min=0.3, cfg_prob=0.5).sample(x0, labels, generator=rng)
    assert torch.equal(s.x0, x0)
    for i in range(32):
        y = int(s.labels[i])
        group = range(CLASSES) if (y == CLASSES and null == "all") else [y]
        members = torch.cat([before["refs"][g, : before["counts"][g]] for g in group] + [x0[i : i + 1]])
        row = slice(i, i + 1)
        if s.t[i] < 0.3:
            assert torch.equal(s.target[row], s.noise[row] - x0[row])
        else:
            assert_close(s.target[row], sv.Linear().target(s.x_t[row].double(), members, s.t[row]))
    expected = sv.ReferenceBank(SHAPE, CLASSES, 6, dtype=torch.float32, null=null)
    expected.load_state_dict(before)
    expected.push(x0, labels)  # under its class, dropped or not
    for name, value in bank.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_attach_is_the_loader_mode(rng):
    bank, twin = filled_bank(rng), sv.ReferenceBank(SHAPE, CLASSES, 6, dtype=torch.float32)
    twin.load_state_dict(bank.state_dict())
    x0, labels = batch(16, rng)
    s = sv.StableVMObjective(bank, source="loader").sample(x0, labels, generator=rng)
    target = sv.StableVMObjective(twin).attach(s.x_t, s.x0, s.noise, s.t, s.labels, class_labels=labels)
    assert torch.equal(target, s.target)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_attach_in_a_half_precision_trainer(rng):
    objective = sv.StableVMObjective(sv.ReferenceBank(SHAPE, capacity=8))
    for _ in range(2):
        x0, noise = torch.randn(4, *SHAPE, generator=rng), torch.randn(4, *SHAPE, generator=rng)
        t = torch.tensor([0.2, 0.6, 0.8, 0.99])
        x_t = sv.Linear().interpolate(x0, noise, t)
        target = objective.attach(x_t.bfloat16(), x0.bfloat16(), noise.bfloat16(), t)
        assert target.dtype == torch.float32
        assert target.isfinite().all()
    assert objective.bank.counts.tolist() == [8]


def test_rows_below_t_min_read_no_references(rng):
    bank = filled_bank(rng)
    bank.refs.fill_(float("nan"))
    objective = sv.StableVMObjective(bank, source="loader", update_bank=False)
    s = objective.sample(*batch(64, rng), generator=rng)
    assert torch.equal(s.target.flatten(1).isnan().all(1), s.t >= 0.5)
    assert torch.equal(s.target[s.t < 0.5], (s.noise - s.x0)[s.t < 0.5])


@pytest.mark.parametrize("source", ["bank", "loader"])
def test_empty_rings_fall_back_to_the_conditional_target(source, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, 6, dtype=torch.float32)
    x0, labels = batch(32, rng)
    bank.push(x0[:1], torch.zeros(1, dtype=torch.int64))
    objective = sv.StableVMObjective(bank, source=source, t_min=0.0, cfg_prob=0.0, update_bank=False)
    s = objective.sample(x0, labels, generator=rng)
    empty = labels != 0
    assert torch.equal(s.x0[empty], x0[empty])
    assert_close(s.target[empty], (s.noise - x0)[empty].double())
    assert s.target.isfinite().all()


def test_bank_mode_uses_the_new_batch_at_once(rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, 64, dtype=torch.float32)
    x0, labels = batch(32, rng)
    s = sv.StableVMObjective(bank, cfg_prob=0.0).sample(x0, labels, generator=rng)
    assert bank.counts[:CLASSES].sum() == 32
    assert (s.x0[:, None] == x0[None]).flatten(2).all(2).any(1).all()


def test_labels_drop_to_the_null_label_at_the_asked_rate(rng):
    x0, labels = torch.zeros(20_000, 1), torch.randint(CLASSES, (20_000,), generator=rng)
    for prob in (0.0, 0.1, 1.0):
        s = sv.CFMObjective(num_classes=CLASSES, cfg_prob=prob).sample(x0, labels, generator=rng)
        dropped = s.labels == CLASSES
        assert torch.equal(s.labels[~dropped], labels[~dropped])
        z = (dropped.float().mean() - prob) / max((prob * (1 - prob) / 20_000) ** 0.5, 1e-9)
        assert abs(z) < 5


def test_a_generator_reproduces_the_draw(rng):
    x0, labels = batch(16, rng)
    bank = filled_bank(rng)
    for objective in (
        sv.CFMObjective(num_classes=CLASSES),
        sv.StableVMObjective(bank, update_bank=False),
        sv.StableVMObjective(bank, source="loader", times="lognormal", update_bank=False),
    ):
        draws = []
        for seed in (7, 7, 8):
            torch.manual_seed(len(draws))  # the default generator must not matter
            draws.append(objective.sample(x0, labels, generator=torch.Generator().manual_seed(seed)))
        for name in ("x_t", "t", "labels", "target", "x0", "noise"):
            first, again, other = (getattr(d, name) for d in draws)
            assert torch.equal(first, again), name
        assert not torch.equal(first, other)


def test_times(rng):
    n = 20_000
    u = sv.uniform_times(n, torch.device("cpu"), rng)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    log_ratio = torch.logit(sv.lognormal_times(mean=-0.4, std=1.5)(n, torch.device("cpu"), rng).double())
    assert abs(log_ratio.mean() + 0.4) < 5 * 1.5 / n**0.5
    assert abs(log_ratio.std() - 1.5) < 5 * 1.5 / (2 * n) ** 0.5
    assert sv.get_time_sampler("uniform") is sv.uniform_times


def test_loss_is_the_mean_squared_error(rng):
    objective = sv.CFMObjective()
    s = objective.sample(torch.randn(4, *SHAPE, generator=rng))
    output = torch.randn(4, *SHAPE, generator=rng).bfloat16().requires_grad_()
    loss = objective.loss(output, s)
    assert loss.dtype == torch.float32
    assert_close(loss, (output.double() - s.target).square().mean())
    loss.backward()
    assert output.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"output: expected shape \(4, 2, 3\), got \(4, 6\)"):
        objective.loss(output.flatten(1), s)


def test_stf_uses_the_batch_as_the_set(rng):
    x0 = torch.randn(12, *SHAPE, generator=rng)
    s = sv.STFObjective("cosine", rows=5).sample(x0, generator=rng)
    assert torch.equal(s.x0, x0[:5])
    assert_close(s.target, sv.Cosine().target(s.x_t.double(), x0, s.t))
    assert sv.STFObjective().sample(x0).target.shape == x0.shape


def test_errors_name_the_argument(rng):
    bank = filled_bank(rng)
    for make, message in (
        (lambda: sv.CFMObjective(prediction="v"), "prediction: expected one of .*, got 'v'"),
        (lambda: sv.CFMObjective(times="normal"), "times: expected one of .*, got 'normal'"),
        (lambda: sv.CFMObjective(cfg_prob=2), r"cfg_prob: expected a number in \[0, 1\], got 2"),
        (lambda: sv.StableVMObjective(bank, source="disk"), "source: expected 'bank' or 'loader', got 'disk'"),
        (lambda: sv.StableVMObjective(bank, t_min=-1), r"t_min: expected a number in \[0, 1\], got -1"),
        (lambda: sv.StableVMObjective(bank, precision="low"), "precision: expected 'exact' or 'fast', got 'low'"),
        (lambda: sv.STFObjective(rows=0), "rows: expected at least 1 or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    x0, labels = batch(4, rng)
    with pytest.raises(ValueError, match="labels: expected None because num_classes = 0"):
        sv.CFMObjective().sample(x0, labels)
    with pytest.raises(ValueError, match=r"labels: expected a .* tensor because num_classes = 4, got None"):
        sv.StableVMObjective(bank).sample(x0)
    with pytest.raises(ValueError, match="labels: expected None because num_classes = 0"):
        sv.STFObjective().sample(x0, labels)


# --- statistics: many independent reference sets at once, as the classes of one bank

Z_LIMIT = 5.0  # two-sided p = 6e-7 for each of the statistics below, 36 here and 18 for STF: 3e-5 in all
Z_POWER = 3.1  # a bias of (Z_LIMIT + Z_POWER) standard errors is found with probability 0.999


@pytest.fixture
def one_thread():
    """Thousands of tiny products: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def population():
    """64 points in the plane, a draw from three Gaussians: the data set, whose marginal velocity is a finite sum."""
    g = torch.Generator().manual_seed(11)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[torch.arange(64) % 3] + 0.5 * torch.randn(64, 2, generator=g)


def residuals(kind, references, t, sets, g, rows=16):
    """target - marginal velocity, conditional - marginal velocity, x_t and the marginal velocity: (sets, rows, 2) each.

    Each set is drawn independently from the population, and `rows` noisy samples share it. kind: "bank" and "loader"
    are StableVM, "without" leaves the source of x_t out of the set, "stf" is the stable target field.
    """
    data = population()
    members = data[torch.randint(len(data), (sets, references), generator=g)]
    if kind == "stf":
        objective = sv.STFObjective(times=at_time(t), rows=rows)
        draws = [objective.sample(one, generator=g) for one in members]
        x_t, x0, noise, target = (torch.cat([getattr(d, k) for d in draws]) for k in ("x_t", "x0", "noise", "target"))
    else:
        bank = sv.ReferenceBank((2,), sets, references, dtype=torch.float32, null="all")
        bank.refs.copy_(members)
        bank.counts.fill_(references)
        labels = torch.arange(sets).repeat_interleave(rows)
        x0 = data[torch.randint(len(data), (sets * rows,), generator=g)]
        objective = sv.StableVMObjective(
            bank,
            times=at_time(t),
            cfg_prob=0.0,
            t_min=0.0,
            source="bank" if kind == "bank" else "loader",
            update_bank=False,
        )
        s = objective.sample(x0, labels, generator=g)
        x_t, x0, noise, target = s.x_t, s.x0, s.noise, s.target
        if kind == "without":
            target = bank.target(x_t, s.t, labels)
    time = torch.full((len(x_t),), t)
    truth = sv.Linear().target(x_t.double(), data, time)
    parts = (target.double() - truth, noise.double() - x0.double() - truth, x_t.double(), truth)
    return [part.reshape(sets, -1, 2) for part in parts]


def projections(residual, x, truth):
    """Estimate and standard error of E[residual . g(x_t)] for six g; the sets are independent, not their rows."""
    first, second = torch.eye(2, dtype=torch.float64)
    radius = x.norm(dim=-1, keepdim=True)
    tests = (first.expand_as(x), second.expand_as(x), x, truth, torch.sin(2 * x), x * radius)
    per_set = torch.stack([(residual * g).sum(-1).mean(1) for g in tests])
    return per_set.mean(1), per_set.std(1) / per_set.shape[1] ** 0.5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("t", [0.4, 0.6, 0.8])
def test_stablevm_is_unbiased_and_the_test_would_tell(t):
    """E[target | x_t] is the marginal velocity: E[(target - u(x_t)) . g(x_t)] = 0 for every g.

    Power: the bias of the same target without the source in the set is found by the same statistic, and even half of
    that bias would be found in both ways of drawing with probability 0.999.
    """
    g = torch.Generator().manual_seed(5)
    residual, _, x, truth = residuals("without", 8, t, 1600, g)
    bias, error = projections(residual, x, truth)
    assert (bias / error).abs().max() > 2 * Z_LIMIT
    strongest = (bias / error).abs().argmax()
    for kind in ("bank", "loader"):
        residual, _, x, truth = residuals(kind, 8, t, 1600, g)
        mean, error = projections(residual, x, truth)
        assert (mean / error).abs().max() < Z_LIMIT, kind
        assert (Z_LIMIT + Z_POWER) * error[strongest] < bias[strongest].abs() / 2, f"{kind}: too few sets to tell"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("t", [0.4, 0.6, 0.8])
def test_stf_bias_measured(t):
    """The paper calls STF biased for the fixed place of its source. Measured: none found, by a test that would find
    half the bias of leaving the source out."""
    g = torch.Generator().manual_seed(6)
    residual, _, x, truth = residuals("without", 8, t, 1600, g)
    bias, error = projections(residual, x, truth)
    strongest = (bias / error).abs().argmax()
    residual, _, x, truth = residuals("stf", 8, t, 1600, g, rows=8)
    mean, error = projections(residual, x, truth)
    assert (mean / error).abs().max() < Z_LIMIT
    assert (Z_LIMIT + Z_POWER) * error[strongest] < bias[strongest].abs() / 2, "too few sets to tell"


@pytest.mark.usefixtures("one_thread")
def test_variance_falls_as_the_number_of_references():
    """At t = 0.9, V_StableVM / V_CFM lies between 1/M and 1/(M - 1) up to its own error and a tenth, from 8 to 64."""
    g = torch.Generator().manual_seed(7)
    for kind in ("bank", "loader"):
        for m in (8, 16, 32, 64):
            residual, conditional, _, _ = residuals(kind, m, 0.9, 800, g)
            per_set = residual.square().sum(-1).mean(1)
            reference = conditional.square().sum(-1).mean()
            size = m + (kind == "loader")  # the source joins the set
            ratio, error = per_set.mean() / reference, per_set.std() / 800**0.5 / reference
            assert 0.9 / size - 4 * error < ratio < 1.1 / (size - 1) + 4 * error, (kind, m)
            assert error < 0.1 / size


# --- what a training step may do


def one_step(objective, model, optimizer, x0, labels, indices=None):
    s = objective.sample(x0, labels, indices=indices)
    loss = objective.loss(model(s.x_t, s.t, s.labels), s)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = torch.nn.Embedding(CLASSES + 1, 6), torch.nn.Linear(6, 6)

    def forward(self, x, t, y):
        return self.body(x.flatten(1) + t[:, None] + self.embed(y)).reshape(x.shape)


SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]  # without a cache the inductor calls the C++ compiler


@pytest.mark.parametrize(
    ("backend", "interpolant", "source", "null"),
    [
        *itertools.product(["eager", "aot_eager"], ["linear", Shifted()], ["bank", "loader"], ["ring", "all"]),
        pytest.param("inductor", "linear", "bank", "ring", marks=SLOW),
        pytest.param("inductor", Shifted(), "loader", "all", marks=SLOW),
    ],
    ids=str,
)
def test_the_draw_compiles_without_a_graph_break(backend, interpolant, source, null, rng):
    torch._dynamo.reset()  # each case counts as a recompilation of the same function otherwise
    banks = [filled_bank(torch.Generator().manual_seed(1), null, track_indices=False) for _ in range(2)]
    eager, compiled = (sv.StableVMObjective(bank, interpolant, source=source) for bank in banks)
    draw = torch.compile(lambda x0, labels: compiled.sample(x0, labels), backend=backend, fullgraph=True)
    for _ in range(2):
        x0, labels = batch(8, rng)
        torch.manual_seed(4)
        one = eager.sample(x0, labels)
        torch.manual_seed(4)
        other = draw(x0, labels)
        if backend != "inductor":  # which has random numbers of its own
            for name in ("x_t", "target", "x0", "noise", "t"):
                assert_close(getattr(other, name), getattr(one, name))
        assert other.target.isfinite().all()
        for name, value in banks[0].state_dict().items():
            assert torch.equal(value, banks[1].state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["bank", "loader"])
@pytest.mark.parametrize("null", ["ring", "all"])
def test_a_step_captures_in_a_cuda_graph(null, source, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, 6, null=null, track_indices=True, device="cuda")
    objective, model = sv.StableVMObjective(bank, source=source), Tiny().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    x0, labels = (part.cuda() for part in batch(8, rng))
    inputs = (x0, labels, torch.arange(8, device="cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one_step(objective, model, optimizer, *inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(objective, model, optimizer, *inputs)  # no wait in eager mode either
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = one_step(objective, model, optimizer, *inputs)
    losses = []
    for _ in range(4):
        x0.copy_(torch.randn(8, *SHAPE))
        graph.replay()
        losses.append(loss.item())
        newest = bank.refs[bank.indices >= 0]
        assert (newest[:, None] == x0.half()[None]).flatten(2).all(2).any(0).all(), "the batch is not in the bank"
    assert len(set(losses)) == 4, "the replays drew the same numbers"
    assert all(abs(value) < 1e3 for value in losses)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("source", ["bank", "loader"])
def test_a_step_compiles_on_the_device_without_a_copy_of_the_bank(source, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, 1 << 20, device="cuda")  # 63 MB
    objective, model = sv.StableVMObjective(bank, source=source), Tiny().cuda()
    address = bank.refs.data_ptr()

    def loss_of(x0, labels):
        s = objective.sample(x0, labels)
        return objective.loss(model(s.x_t, s.t, s.labels), s)

    def peak_of(step):
        x0, labels = (part.cuda() for part in batch(8, rng))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x0, labels).backward()
        return torch.cuda.max_memory_allocated() - before

    eager, compiled = peak_of(loss_of), torch.compile(loss_of, fullgraph=True)
    peaks = [peak_of(compiled) for _ in range(3)]
    assert peaks[-1] < eager + bank.refs.nbytes / 2  # the op's own workspace is in both
    assert bank.refs.data_ptr() == address
    assert bank.counts[:CLASSES].sum() == 32
    assert all(p.grad.isfinite().all() for p in model.parameters())
