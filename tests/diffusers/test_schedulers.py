"""The schedulers without a pipeline: steps against float64 and the native samplers, configurations, noise, errors."""

import copy
import inspect

import pytest
import torch
from stablevelocity.sampling import SOLVERS, StableVS, standard_normal
from tiny_pipelines import FLOW, STABLE, STOCK

from stablevelocity_kernels.testing import assert_close

CONFIG = {"euler": {"shift": 3.0}, "dpm": {**FLOW, "flow_shift": 3.0}, "unipc": {**FLOW, "flow_shift": 3.0}}
KINDS = sorted(CONFIG)
NATIVE = {"euler": "euler", "dpm": "dpmpp_2m", "unipc": "unipc"}
MU, S = 0.7, 0.5  # the data are N(MU, S^2 I)


def velocity(x, t):
    a, t = 1.0 - t, t
    return -MU + (t - a * S * S) / (a * a * S * S + t * t) * (x - a * MU)


def start(n=4, d=6):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1))


def run(scheduler, steps, x=None, model=velocity, **more):
    """The loop of a pipeline: sigmas from the scheduler, the model in float64."""
    scheduler.set_timesteps(steps)
    x = start() if x is None else x
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        v = model(x.double(), sigma).to(x.dtype)
        x = scheduler.step(v, t, x, return_dict=False, **more)[0]
    return x


# Steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 12, 30])
def test_a_run_is_that_of_the_native_sampler(kind, steps):
    scheduler = STABLE[kind](**CONFIG[kind])
    out = run(scheduler, steps)
    times = scheduler.sigmas.double()
    if kind == "unipc":  # the library's predictor takes 1 - 1e-6 for 1
        assert float(times[0]) == pytest.approx(1.0, abs=1e-5)
    split = torch.tensor(0.85).item()  # as float32, in which the scheduler compares
    native = SOLVERS[NATIVE[kind]](
        lambda x, t: velocity(x, float(t[0])), start().double(), times, stable=StableVS(split)
    )
    assert float((out - native).norm() / native.norm()) < 2e-5  # errors of the library's float32 steps add up


@pytest.mark.parametrize("kind", ["dpm", "unipc"])
@pytest.mark.parametrize("steps", [5, 14, 15, 40])
def test_the_native_multistep_solvers_are_the_library_s(kind, steps):
    stock = STOCK[kind](**CONFIG[kind])
    out = run(stock, steps)
    model, times = lambda x, t: velocity(x, float(t[0])), stock.sigmas.double()
    native = SOLVERS[NATIVE[kind]](model, start().double(), times)
    assert float((out - native).norm() / native.norm()) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0])
def test_a_step_against_float64(kind, dtype, factor):
    scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=factor)
    scheduler.set_timesteps(20)
    x, v = start().to(dtype), start().flip(0).to(dtype)
    low = int((scheduler.sigmas > 0.85).sum())
    for i in (low, 18, 19):
        scheduler._step_index = None
        scheduler.set_begin_index(0)
        scheduler._step_index = i
        scheduler.set_noise_generator(3)
        out = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        t, tau = scheduler.sigmas[i : i + 2].double()
        scheduler.set_noise_generator(3)
        noise = standard_normal(x.float(), scheduler._noise).double() if factor and tau > 0 else 0.0
        beta = factor * tau
        s = (tau**2 - beta**2).sqrt() / t
        x0 = x.double() - t * v.double()
        assert_close(out, s * x.double() + ((1 - tau) - s * (1 - t)) * x0 + beta * noise)
        assert out.dtype == dtype
        assert scheduler.step_index == i + 1


@pytest.mark.parametrize("kind", KINDS)
def test_steps_return_what_the_library_s_return(kind):
    types = []
    for classes in (STOCK, STABLE):
        scheduler = classes[kind](**CONFIG[kind])
        scheduler.set_timesteps(4)
        out = [scheduler.step(start().half(), t, start()) for t in scheduler.timesteps]
        types.append([(type(o), o.prev_sample.dtype) for o in out])
    assert types[0] == types[1]


def test_the_library_s_stochastic_solver_runs_above_the_split():
    config = {**CONFIG["dpm"], "algorithm_type": "sde-dpmsolver++"}
    outs = []
    for scheduler in (STOCK["dpm"](**config), STABLE["dpm"](**config, stable_split=0.0)):
        outs.append(run(scheduler, 8, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(*outs)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_of_one_scheduler_are_the_same(kind):
    scheduler = STABLE[kind](**CONFIG[kind])
    run(scheduler, 30)
    assert torch.equal(run(scheduler, 12), run(STABLE[kind](**CONFIG[kind]), 12))


# Noise


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_goes_on_where_a_seed_starts_again(kind):
    scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=0.3)
    scheduler.set_noise_generator(4)
    assert torch.equal(run(scheduler, 12), run(scheduler, 12))
    scheduler.set_noise_generator(torch.Generator().manual_seed(4))
    assert not torch.equal(run(scheduler, 12), run(scheduler, 12))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [int, lambda seed: torch.Generator().manual_seed(seed)], ids=["seeds", "generators"])
def test_a_sample_does_not_depend_on_its_batch(kind, make):
    scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=0.3)
    scheduler.set_noise_generator([make(seed) for seed in range(4)])
    whole = run(scheduler, 12)
    for i in range(4):
        scheduler.set_noise_generator([make(i)])
        assert torch.equal(run(scheduler, 12, start()[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("kind", ["dpm", "euler"])
def test_a_generator_given_to_step_is_used_unless_one_is_set(kind):
    scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=0.3)
    a, b, c = (run(scheduler, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    scheduler.set_noise_generator(9)
    a, c = (run(scheduler, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(a, c)
    scheduler.set_noise_generator()
    assert not torch.equal(run(scheduler, 12, generator=torch.Generator().manual_seed(1)), a)


# Grids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [0.85, 0.7, 0.5])  # the first is larger as float32, the second smaller
def test_a_step_on_the_split_is_in_the_low_region(kind, split):
    scheduler = STABLE[kind](**({"shift": 1.0} if kind == "euler" else FLOW), stable_split=split)
    if kind == "dpm":
        scheduler.set_timesteps(timesteps=[900, round(1000 * split), 200])
    else:
        scheduler.set_timesteps(sigmas=[0.9, split, 0.2])
    low = []
    for i in range(3):
        scheduler._step_index = i
        low.append(scheduler._low())
    assert low == [False, True, True]


@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_the_sigmas_of_pipelines_are_a_number_of_steps(kind):
    scheduler, default = STABLE[kind](**CONFIG[kind]), torch.linspace(1.0, 0.05, 20).tolist()
    grids = []
    for given in ({"sigmas": default}, {"sigmas": default, "num_inference_steps": 20}):
        scheduler.set_timesteps(**given)
        grids.append(scheduler.sigmas)
        assert int((grids[-1][:-1] <= 0.85).sum()) == 9
    assert torch.equal(*grids)
    if kind == "euler":
        with pytest.raises(ValueError, match="should have the same length"):
            scheduler.set_timesteps(sigmas=default, num_inference_steps=19)


def test_custom_timesteps():
    euler, dpm = STABLE["euler"](shift=1.0), STABLE["dpm"](**CONFIG["dpm"])
    for scheduler in (euler, dpm):
        scheduler.set_timesteps(timesteps=[900, 500, 20])
        assert scheduler.timesteps.tolist() == [900, 500, 20]
        assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.02, 0.0], abs=1e-6)
        assert scheduler.num_inference_steps == 3
    assert "timesteps" not in inspect.signature(STABLE["unipc"].set_timesteps).parameters


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_are_the_library_s(kind):
    for name in ("set_timesteps", "step"):
        assert inspect.signature(getattr(STABLE[kind], name)) == inspect.signature(getattr(STOCK[kind], name))
    ours, stock = (list(inspect.signature(classes[kind].__init__).parameters) for classes in (STABLE, STOCK))
    options = ["stable_split", "stable_low_steps", "stable_noise_factor", "stable_grid"]
    assert ours == stock + options


# Configurations


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_go_both_ways(kind, tmp_path):
    options = {"stable_split": 0.7, "stable_low_steps": 4, "stable_noise_factor": 0.1, "stable_grid": "official"}
    stock = STOCK[kind](**CONFIG[kind])
    ours = STABLE[kind].from_config(stock.config, **options)
    back = STOCK[kind].from_config(ours.config)
    again = STABLE[kind].from_config(back.config)
    for scheduler in (ours, again):
        assert {name: scheduler.config[name] for name in options} == options
    public = {name: value for name, value in stock.config.items() if not name.startswith("_")}
    for scheduler in (ours, back, again):
        assert {name: scheduler.config[name] for name in public} == public
    ours.save_pretrained(tmp_path)
    loaded = STABLE[kind].from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in options} == options
    for scheduler in (loaded, ours):
        scheduler.set_noise_generator(1)
    assert torch.equal(run(loaded, 20), run(ours, 20))
    assert torch.equal(run(STOCK[kind].from_pretrained(tmp_path), 20), run(stock, 20))
    stock.save_pretrained(tmp_path)
    assert torch.equal(run(STABLE[kind].from_pretrained(tmp_path), 20), run(STABLE[kind](**CONFIG[kind]), 20))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=0.2)
    scheduler.set_noise_generator([1, 2, 3, 4])
    assert torch.equal(run(copy.deepcopy(scheduler), 20), run(scheduler, 20))


@pytest.mark.parametrize("kind", ["dpm", "unipc"])
def test_no_low_steps_runs_a_configuration_without_flow_sigmas(kind):
    outs = [run(STOCK[kind](), 6), run(STABLE[kind](stable_low_steps=0), 6)]
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: STABLE["euler"](stable_noise_factor=1.5),
            r"stable_noise_factor: expected a number in \[0, 1\], got 1.5",
        ),
        (lambda: STABLE["euler"](stable_noise_factor=-0.1), r"stable_noise_factor: expected a number in \[0, 1\]"),
        (lambda: STABLE["euler"](stable_split=1.0), r"stable_split: expected a number in \[0, 1\), got 1.0"),
        (lambda: STABLE["euler"](stable_low_steps=-1), "stable_low_steps: expected an integer of at least 0, got -1"),
        (lambda: STABLE["euler"](stable_grid="thin"), "stable_grid: expected 'total' or 'official', got 'thin'"),
        (lambda: STABLE["euler"](invert_sigmas=True), "invert_sigmas: expected False, .* got True"),
        (lambda: STABLE["dpm"](), "use_flow_sigmas: expected True, .*use_flow_sigmas=True.* got False"),
        (lambda: STABLE["unipc"](), "use_flow_sigmas: expected True, .* got False"),
        (lambda: STABLE["unipc"].from_config(STOCK["euler"]().config), "use_flow_sigmas: expected True"),
        (
            lambda: STABLE["unipc"](use_flow_sigmas=True),
            "prediction_type: expected 'flow_prediction', .* got 'epsilon'",
        ),
        (lambda: STABLE["dpm"](**FLOW, final_sigmas_type="sigma_min"), "final_sigmas_type: expected 'zero', .* got"),
        (lambda: STABLE["unipc"](**FLOW, solver_p=STOCK["dpm"]()), "solver_p: expected None"),
        (lambda: run(STABLE["dpm"](**FLOW, use_karras_sigmas=True), 8), "sigmas: expected flow-matching times"),
        (lambda: run(STABLE["euler"](), 12, per_token_timesteps=start()), "per_token_timesteps: expected None"),
    ],
)
def test_errors_name_their_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_generators_give_the_same_samples_on_the_gpu(kind):
    outs = []
    for device in ("cpu", "cuda"):
        scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=0.3)
        scheduler.set_noise_generator([torch.Generator().manual_seed(seed) for seed in range(4)])
        outs.append(run(scheduler, 12, start().to(device)).cpu())
    assert float((outs[1] - outs[0]).norm() / outs[0].norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_low_steps_do_not_wait_for_the_device(kind):
    scheduler = STABLE[kind](**CONFIG[kind], stable_noise_factor=0.3)
    scheduler.set_noise_generator(torch.Generator("cuda").manual_seed(0))
    scheduler.set_timesteps(20, device="cuda")
    x = v = start().cuda()
    scheduler.set_begin_index(0)
    times = list(scheduler.timesteps)
    first = int((scheduler.sigmas > 0.85).sum())
    scheduler._step_index = first
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in times[first:]:
            x = scheduler.step(v, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
