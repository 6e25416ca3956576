"""The schedulers in the real pipelines: Stable Diffusion 3 and its image-to-image, Flux, Qwen-Image, Wan."""

import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import ALL, CASES, CONFIGS, DYNAMIC, STABLE, STOCK, TAKE_SIGMAS, build

from stablevelocity_kernels.testing import assert_close

SPLIT, LOW = 0.85, 9


def low_region(scheduler):
    """How many steps of the grid that ran start at or below the split."""
    return int((scheduler.sigmas[:-1] <= SPLIT).sum())


@pytest.mark.parametrize(("name", "kind"), ALL)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_thinning_off_is_the_stock_scheduler_bit_for_bit(tiny, name, kind, guided, steps):
    t = tiny(name)
    out, seen = t(t.stable(kind, stable_low_steps=0, stable_noise_factor=0.5), steps, guided=guided, n=2)
    stock, stock_seen = t(t.stock(kind), steps, guided=guided, n=2)
    assert torch.equal(out.nan_to_num(), stock.nan_to_num())  # Qwen-Image's own schedule of one step is 0 / 0
    assert seen == pytest.approx(stock_seen, abs=0.0, nan_ok=True)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 28, 50])
def test_the_number_of_steps_asked_for_runs(tiny, name, kind, steps):
    t = tiny(name)
    scheduler = t.stable(kind)
    out, seen = t(scheduler, steps)
    assert bool(out.isfinite().all())
    assert len(seen) == len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    assert seen == sorted(seen, reverse=True)
    assert low_region(scheduler) == min(LOW, low_region(scheduler))
    assert bool((scheduler.sigmas.diff() < 0).all())
    assert float(scheduler.sigmas[-1]) == 0.0
    if steps >= 28:
        assert low_region(scheduler) == LOW


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_official_grid_is_the_thinned_base_grid(tiny, name, kind):
    t = tiny(name)
    stock = t.stock(kind)
    t(stock, 30)
    scheduler = t.stable(kind, stable_grid="official")
    _, seen = t(scheduler, 30)
    high = int((stock.sigmas[:-1] > SPLIT).sum())
    assert len(seen) == high + LOW < 30
    assert torch.equal(scheduler.sigmas[:high], stock.sigmas[:high])
    assert bool(torch.isin(scheduler.sigmas, stock.sigmas).all())
    assert bool(torch.isin(scheduler.timesteps, stock.timesteps).all())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_grid_that_thinning_leaves_alone_gives_the_stock_samples_up_to_the_split(tiny, name, kind):
    t, states = tiny(name), []
    for scheduler in (t.stock(kind), t.stable(kind)):
        found = []

        def keep(pipe, i, time, tensors, found=found):
            found.append(tensors["latents"])
            return {}

        t(scheduler, 8, guided=True, callback_on_step_end=keep)
        states.append(found)
    high = 8 - low_region(scheduler)
    assert 0 < high < 8
    for stock, stable in zip(states[0][:high], states[1][:high], strict=True):
        assert torch.equal(stock, stable)
    if kind == "euler":  # on the linear path without noise the closed form is Euler's step
        assert_close(states[1][-1], states[0][-1].double())
    else:
        assert not torch.equal(states[1][-1], states[0][-1])


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] == "euler"])
def test_without_noise_it_is_euler_on_the_thinned_grid(tiny, name, kind):
    t, calls = tiny(name), []
    scheduler = t.stable(kind)

    def keep(pipe, i, time, tensors):
        calls.append(tensors["latents"])
        return {}

    t(scheduler, 20, callback_on_step_end=keep)
    stock = t.stock(kind)
    again = []

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None):
        stock.sigmas, stock.timesteps = scheduler.sigmas, scheduler.timesteps
        stock._step_index = stock._begin_index = None

    stock.set_timesteps = set_timesteps
    t(stock, 20, callback_on_step_end=lambda pipe, i, time, tensors: again.append(tensors["latents"]) or {})
    assert len(calls) == len(again) == 20
    assert_close(calls[-1], again[-1].double())


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_guidance_on_and_off(tiny, name, kind):
    t = tiny(name)
    plain, guided = (t(t.stable(kind), 12, guided=guided)[0] for guided in (False, True))
    assert bool(guided.isfinite().all())
    assert float((plain - guided).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize(("name", "kind"), ALL)
@pytest.mark.parametrize("factor", [0.0, 0.2])
def test_noise_is_reproducible_by_seed(tiny, name, kind, factor):
    t = tiny(name)

    def run(noise_seed):
        scheduler = t.stable(kind, stable_noise_factor=factor)
        scheduler.set_noise_generator(noise_seed)
        first, again = t(scheduler, 12)[0], t(scheduler, 12)[0]
        assert torch.equal(first, again)  # a seed starts again with every call
        return first

    assert torch.equal(run(5), run(5))
    assert torch.equal(run(5), run(6)) == (factor == 0.0)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_a_batch_with_a_list_of_generators_is_its_samples_one_by_one(tiny, name, kind):
    t = tiny(name)

    def run(seeds):
        scheduler = t.stable(kind, stable_noise_factor=0.2)
        scheduler.set_noise_generator([torch.Generator().manual_seed(100 + s) for s in seeds])
        return t(scheduler, 12, n=len(seeds), seed=seeds)[0]

    both = run([3, 8])
    assert not torch.equal(both[0], both[1])
    for i, seed in enumerate([3, 8]):
        assert_close(both[i : i + 1], run([seed]).double())


def test_the_number_of_generators_must_be_the_batch(tiny):
    t = tiny("sd3")
    scheduler = t.stable(stable_noise_factor=0.2)
    scheduler.set_noise_generator([1, 2, 3])
    with pytest.raises(ValueError, match="noise: expected 2 generators or seeds, one a sample, got 3"):
        t(scheduler, 12, n=2)


CUSTOM = [1.0, 0.9, 0.7, 0.65, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.1]


@pytest.mark.parametrize(("name", "kind"), TAKE_SIGMAS)
@pytest.mark.parametrize("sigmas", [CUSTOM, [0.8], [1.0, 0.5, 0.1, 0.0]])
def test_custom_sigmas_run_as_they_are(tiny, name, kind, sigmas):
    t = tiny(name)
    stock, scheduler = t.stock(kind), t.stable(kind)
    with np.errstate(divide="ignore"):  # a dynamic shift of the library divides by the 0
        expected, seen = t(stock, len(sigmas), sigmas=np.array(sigmas))  # the library's UniPC takes no lists
        out, ours = t(scheduler, len(sigmas), sigmas=sigmas)
    assert ours == seen
    assert torch.equal(scheduler.sigmas, stock.sigmas)
    assert bool(out.isfinite().all())
    if kind == "euler":
        assert_close(out, expected.double())


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_the_sigmas_that_a_pipeline_makes_itself_are_thinned(tiny, name):
    t = tiny(name)
    default, given = t.stable(), t.stable()
    t(default, 20)
    t(given, 20, sigmas=np.linspace(1.0, 1 / 20, 20))
    assert torch.equal(default.sigmas, given.sigmas)
    assert low_region(default) == LOW


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_custom_sigmas_of_image_to_image_run_from_its_strength_on(tiny, strength):
    t = tiny("img2img")
    expected, seen = t(t.stock(), len(CUSTOM), sigmas=CUSTOM, strength=strength)
    out, ours = t(t.stable(), len(CUSTOM), sigmas=CUSTOM, strength=strength)
    assert ours == seen
    assert len(ours) == math.ceil(len(CUSTOM) * strength)
    assert_close(out, expected.double())


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 30, 50])
@pytest.mark.parametrize("factor", [0.0, 0.2])
def test_image_to_image_starts_and_runs_as_its_strength_asks(tiny, strength, steps, factor):
    t, image = tiny("img2img"), torch.rand(1, 3, 16, 16)
    stock, scheduler = t.stock(), t.stable(stable_noise_factor=factor)
    expected, seen = t(stock, steps, image=image, strength=strength)
    out, ours = t(scheduler, steps, image=image, strength=strength)
    assert len(ours) == len(seen) == math.ceil(round(steps * strength, 6))
    first = steps - len(ours)
    assert torch.equal(scheduler.sigmas[first], stock.sigmas[first])
    assert ours[0] == seen[0]
    assert ours == [float(time) for time in scheduler.timesteps[first:]]
    assert torch.equal(scheduler.timesteps[first:], scheduler.sigmas[first:-1] * 1000)
    assert bool((scheduler.sigmas[first:].diff() < 0).all())
    if float(stock.sigmas[first]) > SPLIT:
        assert int((scheduler.sigmas[first:-1] <= SPLIT).sum()) <= LOW
    elif factor == 0.0:
        assert_close(out, expected.double())
    off, _ = t(t.stable(stable_low_steps=0), steps, image=image, strength=strength)
    assert torch.equal(off, expected)


def test_image_to_image_on_the_official_grid_is_refused(tiny):
    t = tiny("img2img")
    run = {"image": torch.rand(1, 3, 16, 16), "strength": 0.6}
    with pytest.raises(ValueError, match="stable_grid: expected 'total' for image-to-image, got 'official'"):
        t(t.stable(stable_grid="official"), 30, **run)
    assert t(t.stable(stable_grid="official"), 30, **{**run, "strength": 1.0})[0].isfinite().all()


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm"])
def test_wan_switches_transformers_at_its_boundary(tiny, kind):
    t = tiny("wan")
    calls, hooks = [], []
    for which in ("transformer", "transformer_2"):
        model = getattr(t.pipe, which)

        def note(module, args, kwargs, which=which):
            calls.append((which, float(kwargs["timestep"][0])))

        hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))
    try:
        _, seen = t(t.stable(kind), 20)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == [("transformer" if time >= 875 else "transformer_2", time) for time in seen]
    assert {which for which, _ in calls} == {"transformer", "transformer_2"}


def test_images_come_out(tiny):
    for name, size in (("sd3", 16), ("flux", 16), ("qwen", 16), ("wan", 16)):
        t = tiny(name)
        images, _ = t(t.stable("unipc" if name == "wan" else "euler"), 3, output_type="np")
        assert images.shape[-3:] == (size, size, 3), name
        assert np.isfinite(images).all(), name


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_it_is_swapped_in_by_the_configuration_of_the_pipeline_s_own_scheduler(name, kind):
    t = build(name)
    config, same_family = t.pipe.scheduler.config, type(t.pipe.scheduler) is STOCK[kind]
    more = {} if same_family else CONFIGS[name][kind]  # another family has to be told of the flow
    out, _ = t(STABLE[kind].from_config(config, **more), 12)
    assert bool(out.isfinite().all())
    if same_family:
        assert torch.equal(out, t(t.stable(kind), 12)[0])
    off, _ = t(STABLE[kind].from_config(config, **more, stable_low_steps=0), 12)
    assert torch.equal(off, t(STOCK[kind].from_config(config, **more), 12)[0])


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_a_pipeline_is_saved_and_loaded_with_its_scheduler(name, kind, tmp_path):
    t = build(name)
    expected, _ = t(t.stable(kind, stable_split=0.8, stable_low_steps=5), 16)
    t.pipe.save_pretrained(tmp_path)
    no_text = {name: None for name in t.pipe.components if name.startswith(("text", "token"))}
    t.pipe = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, **no_text)
    t.pipe.set_progress_bar_config(disable=True)
    assert type(t.pipe.scheduler) is STABLE[kind]
    assert t.pipe.scheduler.config.stable_low_steps == 5
    assert_close(t(t.pipe.scheduler, 16)[0], expected.double())


def test_where_the_stock_scheduler_cannot_run_ours_gives_its_error(tiny):
    image = {"image": torch.rand(1, 3, 16, 16), "strength": 0.6}
    for kind, t, run in (("dpm", tiny("qwen"), {}), ("dpm", tiny("img2img"), image), ("unipc", tiny("img2img"), image)):
        messages = []
        for classes in (STOCK, STABLE):
            with pytest.raises((ValueError, AttributeError)) as caught:
                t(classes[kind](**DYNAMIC), 10, **run)
            name = f"{classes[kind].__module__}.{classes[kind].__name__}"
            messages.append(str(caught.value).replace(name, "").replace(classes[kind].__name__, ""))
        assert messages[0] == messages[1]
        assert "does not support custom sigmas" in messages[0] or "scale_noise" in messages[0]
