"""Triton versions of every op, for GPUs without the compiled library. Imported at an op's first use, not before."""
