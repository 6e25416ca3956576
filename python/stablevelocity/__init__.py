"""Stable Velocity flow matching: low-variance training targets, alignment and sampling, on the kernels of svel."""

from .alignment import ConvProjector, HiddenState, VAREPALoss, projector, spatial_norm
from .bank import BankDraw, MixtureDraw, ReferenceBank
from .host_bank import HostReferenceBank
from .interpolants import Cosine, Interpolant, Linear, get_interpolant
from .mixtures import GaussianMixture
from .objectives import CFMObjective, StableVMObjective, STFObjective, TrainingSample
from .online import OnlineVariance
from .sampling import Guidance, StableVS, dpmpp_2m, euler, euler_maruyama, heun, sample, time_grid, unipc
from .sharded_bank import ShardedReferenceBank
from .times import TimeSampler, get_time_sampler, lognormal_times, uniform_times
from .variance import Split, VarianceCurve, load_split, split_point, variance_curve

__all__ = [
    "BankDraw",
    "CFMObjective",
    "ConvProjector",
    "Cosine",
    "GaussianMixture",
    "Guidance",
    "HiddenState",
    "HostReferenceBank",
    "Interpolant",
    "Linear",
    "MixtureDraw",
    "OnlineVariance",
    "ReferenceBank",
    "STFObjective",
    "ShardedReferenceBank",
    "Split",
    "StableVMObjective",
    "StableVS",
    "TimeSampler",
    "TrainingSample",
    "VAREPALoss",
    "VarianceCurve",
    "dpmpp_2m",
    "euler",
    "euler_maruyama",
    "get_interpolant",
    "get_time_sampler",
    "heun",
    "load_split",
    "lognormal_times",
    "projector",
    "sample",
    "spatial_norm",
    "split_point",
    "time_grid",
    "uniform_times",
    "unipc",
    "variance_curve",
]
