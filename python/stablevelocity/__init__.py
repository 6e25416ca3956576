"""Stable Velocity flow matching: low-variance training targets, alignment and sampling, on the kernels of svel."""

from .alignment import VAREPALoss
from .bank import BankDraw, ReferenceBank
from .interpolants import Cosine, Interpolant, Linear, get_interpolant
from .objectives import CFMObjective, StableVMObjective, STFObjective, TrainingSample
from .times import TimeSampler, get_time_sampler, lognormal_times, uniform_times
from .variance import VarianceCurve, variance_curve

__all__ = [
    "BankDraw",
    "CFMObjective",
    "Cosine",
    "Interpolant",
    "Linear",
    "ReferenceBank",
    "STFObjective",
    "StableVMObjective",
    "TimeSampler",
    "TrainingSample",
    "VAREPALoss",
    "VarianceCurve",
    "get_interpolant",
    "get_time_sampler",
    "lognormal_times",
    "uniform_times",
    "variance_curve",
]
