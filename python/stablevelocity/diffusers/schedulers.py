"""StableVS for diffusers: its flow-matching schedulers with the closed-form steps of the low-variance region.

    pipe.scheduler = StableVSFlowMatchEulerScheduler.from_config(pipe.scheduler.config)  # SD3.5, Flux, Qwen-Image
    pipe.scheduler = StableVSUniPCMultistepScheduler.from_config(pipe.scheduler.config)  # Wan

Each is a subclass: above `stable_split` the library's own step runs, at and below it `svel::stablevs_step`, on a grid
that `StableVS.times` thins. With `stable_low_steps=0` it is the library's scheduler, bit for bit. A scheduler's sigma
is the time t of the "linear" interpolant: 0 at the data, 1 at the noise.

* `sigmas=` and `timesteps=` are run as they are given, not thinned, except for linspace(1, 1 / n, n), which the
  pipelines of Flux and Qwen-Image hand over themselves when the caller gives none: that is the base grid of n steps.
* Image-to-image starts at the noise level of the library's grid for its strength, and runs as many steps; it takes
  stable_grid="total", since its pipelines count on a grid of `num_inference_steps`.
* No pipeline hands a generator to `step`: `set_noise_generator` sets what a noise factor above 0 draws on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from stablevelocity_kernels import stablevs_step

from ..grids import StableVS, expect, grow, kept_steps
from ..sampling import standard_normal, step_noise
from ..variance import fixed_split

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}


class _StableVS:
    """What the three schedulers share; `base` is the library's scheduler.

    Configuration, beside that of `base`:
        stable_split: a step that starts at sigma <= stable_split is the closed-form step; in [0, 1). Also a `Split`, or
            the path of the variance.json that `svel variance` wrote of the model's training data; the configuration
            keeps the number. "auto", in `from_pretrained(folder)`: of the variance.json beside the configuration.
        stable_low_steps: how many steps the region gets; 0 is the library's scheduler.
        stable_noise_factor: noise of such a step to sigma', as a share of sigma'; in [0, 1], 0 is deterministic.
        stable_grid: "total", `num_inference_steps` steps run; "official", the base grid has that many and is thinned.

    Raises:
        ValueError: naming the argument, for a configuration that has no flow sigmas or that the steps would not follow.
    """

    base: type[SchedulerMixin]
    needs: dict[str, object]  # configuration of `base` that the steps rely on
    output: type[SchedulerOutput] = SchedulerOutput
    dtype: Callable[..., torch.dtype]  # that a step returns, from the model output's and the sample's
    _times: Sequence[float] = ()  # the sigmas, on the host; empty where the library's scheduler runs
    _asked: Tensor | None = None  # the library's sigmas, where a thinned grid runs in their place
    _noise_source = _noise = None

    @property
    def stable(self) -> StableVS:
        """The low-variance region of the configuration."""
        c = self.config
        try:
            return StableVS(c.stable_split, c.stable_low_steps, c.stable_noise_factor, c.stable_grid)
        except ValueError as error:
            raise ValueError(f"stable_{error}") from None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, return_unused_kwargs=False, **kwargs):
        """The library's, with stable_split="auto" read from the variance.json beside the scheduler's configuration."""
        if kwargs.get("stable_split") == "auto":
            kwargs["stable_split"] = Path(pretrained_model_name_or_path) / (subfolder or "") / "variance.json"
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs)

    def set_noise_generator(
        self, generator: int | torch.Generator | Sequence[int | torch.Generator] | None = None
    ) -> None:
        """What the noise of the steps is drawn from; None is the generator given to `step`, or torch's global stream.

        Args:
            generator: a generator on any device, whose stream goes on from call to call of the pipeline; a seed, which
                starts again with every call; or a list of them, one a sample of the batch.
        """
        self._noise_source, self._noise = generator, step_noise(generator)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by image-to-image pipelines with the first step that runs, right after they slice `timesteps` there.

        A thinned grid has another sigma at that index than the library's, so what follows it is thinned anew from the
        library's sigma, in place: the pipeline's slice is a view.
        """
        super().set_begin_index(begin_index)
        if self._asked is None or begin_index <= 0:
            return
        stable, asked = self.stable, self._asked
        steps = len(asked) - 1 - begin_index
        expect(stable.grid == "total", "stable_grid", "'total' for image-to-image", stable.grid)

        def rest(n: int) -> Tensor:
            position = np.linspace(begin_index, len(asked) - 1, n + 1)
            return torch.from_numpy(np.interp(position, np.arange(len(asked)), asked.numpy()))

        above = asked[begin_index] > stable.split
        sigmas = grow(rest, steps, stable.split, stable.low_steps) if above else asked[begin_index:]
        self.sigmas[begin_index:] = sigmas
        self.timesteps[begin_index:] = sigmas[:-1] * self.config.num_train_timesteps
        self._times = self.sigmas.tolist()

    def stretch_shift_to_terminal(self, t: np.ndarray) -> np.ndarray:
        """The library's; a grid of the one time 1 has nothing to stretch, and would become 0 / 0."""
        alone = self.stable.low_steps > 0 and t[-1] == 1.0
        return t if alone else super().stretch_shift_to_terminal(t)

    def _check(self) -> None:
        if not self.stable.low_steps:
            return
        for name, value in self.needs.items():
            reason = f"{value!r}, which StableVS needs (flow matching: from_config(config, use_flow_sigmas=True, "
            reason += "prediction_type='flow_prediction', flow_shift=...); stable_low_steps=0 turns it off)"
            expect(self.config[name] == value, name, reason, self.config[name])

    def _set(self, given: dict) -> None:
        """set_timesteps of `base` with the arguments `given`, thinned unless these hold a grid of the caller's own."""
        self._times, self._asked, self._noise = (), None, step_noise(self._noise_source)
        stable, n = self.stable, given.get("num_inference_steps")
        sigmas, timesteps = given.get("sigmas"), given.get("timesteps")
        if not stable.low_steps:
            self.base.set_timesteps(self, **given)
            return
        if sigmas is not None:
            given["sigmas"] = np.array(sigmas, dtype=np.float64)  # the library's UniPC takes no lists
            n = len(sigmas) if n in (None, len(sigmas)) and _is_default(sigmas) else None

        def base(n: int) -> Tensor:
            more = {} if sigmas is None else {"sigmas": np.linspace(1.0, 1.0 / n, n)}
            self.base.set_timesteps(self, **{**given, "num_inference_steps": n, **more})
            self._asked = self.sigmas.cpu() if self._asked is None else self._asked
            return self.sigmas

        if timesteps is not None and "sigmas" not in inspect.signature(self.base.set_timesteps).parameters:
            # the library's DPM-Solver takes timesteps for its diffusion sigmas only
            self.base.set_timesteps(self, **{**given, "num_inference_steps": len(timesteps), "timesteps": None})
            self.timesteps[:] = torch.as_tensor(timesteps)
            self.sigmas[:-1] = torch.as_tensor(timesteps) / self.config.num_train_timesteps
        elif timesteps is not None or n is None:  # the caller's own grid
            self.base.set_timesteps(self, **given)
        else:
            thinned = stable.times(base, n)
            kept = kept_steps(self.sigmas, stable.split, stable.low_steps)  # of the grid that was thinned
            self.sigmas, self.timesteps, self.num_inference_steps = thinned, self.timesteps[kept], len(kept)
        times = self.sigmas.tolist()
        falling = all(1.0 >= t >= tau >= 0.0 for t, tau in pairwise(times))
        expect(falling, "sigmas", "flow-matching times that fall, in [0, 1]", times)
        self._times = times

    def _low(self) -> bool:
        """Whether the step at step_index is a StableVS step; in float32, in which the sigmas are stored."""
        return self._times[self.step_index] <= float(np.float32(self.config.stable_split))

    def _stable_step(self, v: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The closed-form step of x (N, *S) with velocity v (N, *S), from sigma at step_index to the next; float32."""
        t, tau = self._times[self.step_index : self.step_index + 2]
        self._step_index += 1
        if tau == t:  # a caller's own sigmas may end in 0, and the library appends another
            return x
        factor = self.stable.noise_factor if tau > 0.0 else 0.0
        x = x.to(torch.float32)
        noise = standard_normal(x, generator if self._noise is None else self._noise) if factor else None
        t, tau = (torch.full((), s, dtype=torch.float64, device=x.device) for s in (t, tau))  # fills: no host copy
        return stablevs_step(x, v, t, tau, None, noise, noise_factor=factor)


def _is_default(sigmas: Sequence[float]) -> bool:
    """Whether these are the sigmas that pipelines hand over when their caller gave none."""
    return np.allclose(sigmas, np.linspace(1.0, 1.0 / len(sigmas), len(sigmas)), rtol=0.0, atol=1e-6)


def _init(base: type[SchedulerMixin]) -> Callable[..., None]:
    """__init__ of `base` with our configuration; pipelines and `from_config` read its signature."""
    plain = base.__init__.__wrapped__  # without its registration: ours registers everything
    options = {"stable_split": 0.85, "stable_low_steps": 9, "stable_noise_factor": 0.0, "stable_grid": "total"}

    def __init__(self, *args, **kwargs):
        plain(self, *args, **{name: value for name, value in kwargs.items() if name not in options})
        split = self.config.stable_split
        expect(split != "auto", "stable_split", "from_pretrained(folder) with 'auto', or a number or a path", split)
        if not isinstance(split, float):
            self.register_to_config(stable_split=fixed_split(split, "stable_split"))
        self._check()

    signature = inspect.signature(plain)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=v) for name, v in options.items()]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])
    return register_to_config(__init__)


def _set_timesteps(base: type[SchedulerMixin]) -> Callable[..., None]:
    signature = inspect.signature(base.set_timesteps)

    @functools.wraps(base.set_timesteps)  # pipelines look in its signature for what they may hand over
    def set_timesteps(self, *args, **kwargs):
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        self._set({name: value for name, value in given.items() if name != "self"})

    return set_timesteps


def _step(base: type[SchedulerMixin]) -> Callable[..., SchedulerOutput | tuple]:
    signature = inspect.signature(base.step)

    @functools.wraps(base.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        if not self._times:
            return base.step(self, model_output, timestep, sample, *args, **kwargs)
        per_token = kwargs.get("per_token_timesteps")
        expect(per_token is None, "per_token_timesteps", "None with StableVS", type(per_token).__name__)
        if self.step_index is None:
            self._init_step_index(timestep)
        if not self._low():
            return base.step(self, model_output, timestep, sample, *args, **kwargs)
        given = signature.bind(self, model_output, timestep, sample, *args, **kwargs).arguments
        out = self._stable_step(model_output, sample, given.get("generator"))
        out = out.to(self.dtype(model_output.dtype, sample.dtype))
        return self.output(prev_sample=out) if given.get("return_dict", True) else (out,)

    return step


class StableVSFlowMatchEulerScheduler(_StableVS, FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler with StableVS: see `_StableVS`."""

    base, needs = FlowMatchEulerDiscreteScheduler, {"invert_sigmas": False}
    output, dtype = FlowMatchEulerDiscreteSchedulerOutput, staticmethod(lambda v, x: v)
    __init__, set_timesteps, step = _init(base), _set_timesteps(base), _step(base)


class StableVSDPMSolverMultistepScheduler(_StableVS, DPMSolverMultistepScheduler):
    """DPMSolverMultistepScheduler, of a configuration with flow sigmas, with StableVS: see `_StableVS`."""

    base, needs, dtype = DPMSolverMultistepScheduler, _FLOW, staticmethod(torch.promote_types)
    __init__, set_timesteps, step = _init(base), _set_timesteps(base), _step(base)


class StableVSUniPCMultistepScheduler(_StableVS, UniPCMultistepScheduler):
    """UniPCMultistepScheduler, of a configuration with flow sigmas, with StableVS: see `_StableVS`."""

    base, needs, dtype = UniPCMultistepScheduler, {**_FLOW, "solver_p": None}, staticmethod(lambda v, x: x)
    __init__, set_timesteps, step = _init(base), _set_timesteps(base), _step(base)
