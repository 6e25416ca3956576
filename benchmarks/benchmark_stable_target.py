"""svel::stable_target and svel::posterior_mean: class banks, shared pools, small and large D."""

from __future__ import annotations

import functools
import math

import peers
import pytest
import torch

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE, make_noisy, make_references, photograph_pieces

# (rows, classes, references per class, D): the training step of the published configuration, and a CPU-sized one
CLASS_BANKS = {
    "cuda": {"class_bank": (256, 1001, 256, 4096), "class_bank_large": (8, 16, 64, 131072)},
    "cpu": {"class_bank": (64, 50, 256, 4096), "class_bank_large": (4, 8, 64, 131072), "demo": (128, 11, 256, 784)},
}
# Around the published configuration, and large latents: (rows, classes, references per class, D), and what else differs
SHAPES = {
    "D 1,024": (256, 1001, 256, 1024, {}),
    "D 2,048": (256, 1001, 256, 2048, {}),
    "D 8,192": (256, 501, 256, 8192, {}),
    "D 16,384": (256, 301, 256, 16384, {}),
    "M 64": (256, 1001, 64, 4096, {}),
    "M 1,000": (256, 501, 1000, 4096, {}),
    "M 4,096": (64, 65, 4096, 4096, {}),
    "partly filled": (256, 1001, 256, 4096, {"filled": 0.5}),
    "K 10": (256, 10, 256, 4096, {}),
    "ten classes": (256, 10, 5000, 3072, {}),
    "one class": (256, 1, 5000, 4096, {}),
    "one row": (1, 1001, 256, 4096, {}),
    "16 rows": (16, 1001, 256, 4096, {}),
    "2,048 rows": (2048, 1001, 256, 4096, {}),
    "bfloat16": (256, 1001, 256, 4096, {"dtype": torch.bfloat16}),
    "float32": (256, 501, 256, 4096, {"dtype": torch.float32}),
    "all labels equal": (256, 1001, 256, 4096, {"labels": "equal"}),
    "all different": (256, 1001, 256, 4096, {"labels": "different"}),
    "65,536 (SD3.5)": (8, 16, 256, 65536, {"labels": "different"}),
    "131,072": (8, 16, 64, 131072, {"labels": "different"}),
    "262,144 (Flux)": (4, 8, 64, 262144, {"labels": "different"}),
    "1,048,576": (1, 4, 256, 1 << 20, {"labels": "different"}),
    "2,097,152": (1, 2, 64, 1 << 21, {"labels": "different"}),
}
# (rows, references, D, dtype)
POOLS = {
    "cuda": {
        "pool": (256, 50_000, 3072, torch.float16),
        "pool_bfloat16": (256, 50_000, 3072, torch.bfloat16),
        "pool_many": (4096, 50_000, 4096, torch.float16),
        "pool_guidance": (26, 200_000, 4096, torch.float16),
        "pool_dataset": (26, 1_280_000, 4096, torch.float16),
        "pool_one_row": (1, 50_000, 4096, torch.float16),
        "pool_small": (256, 256, 4096, torch.float16),
        "pool_small_1024": (256, 1024, 4096, torch.float16),
        "pool_small_few_rows": (64, 256, 4096, torch.float16),
        "pool_float32": (256, 50_000, 3072, torch.float32),
        "pool_128": (4096, 50_000, 128, torch.float16),
        "pool_128_float32": (4096, 50_000, 128, torch.float32),
        "pool_latents": (64, 1024, 65_536, torch.float16),
        "pool_latents_long": (64, 512, 262_144, torch.float16),
        "pool_small_d": (10_000, 100_000, 10, torch.float32),
        "pool_tiny": (256, 2_048, 10, torch.float32),
    },
    "cpu": {
        "pool": (256, 8_192, 3072, torch.float16),
        "pool_guidance": (26, 16_384, 4096, torch.float16),
        "pool_one_row": (1, 16_384, 4096, torch.float16),
        "pool_small_d": (2_048, 20_000, 10, torch.float32),
        "pool_128": (1_024, 10_000, 128, torch.float32),
        "pool_tiny": (256, 2_048, 10, torch.float32),
        "one_large": (2, 32, 1 << 20, torch.float16),
    },
}
CHECKED_ROWS = 8  # float64 references of every row would take longer than all the timings


def _cases(table: dict[str, dict[str, tuple]]) -> list[str]:
    return sorted({name for cases in table.values() for name in cases})


def _problem(picked: torch.Tensor, device: torch.device, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    t = 0.5 + 0.5 * torch.rand(picked.shape[0], generator=rng)
    t = t.clamp(max=0.999)
    return make_noisy(picked, t, rng).to(device), t.to(device)


@pytest.mark.parametrize("name", _cases(CLASS_BANKS))
def test_class_bank(measure, device, name):
    if name not in CLASS_BANKS[device.type]:
        pytest.skip(f"{name} is not a {device.type} case")
    n, k, m, d = CLASS_BANKS[device.type][name]
    rng = torch.Generator().manual_seed(0)
    bank = torch.empty(k, m, d, dtype=torch.float16, device=device)
    for group in bank:
        group.copy_(make_references(m, d, "gaussian", rng) if device.type == "cpu" else torch.randn_like(group))
    labels = torch.randint(k, (n,), generator=rng)
    labels[: n // 10] = k - 1  # a tenth of the rows on the null class
    labels = labels.to(device)
    x, t = _problem(bank[labels, torch.randint(m, (n,), generator=rng).to(device)].cpu(), device, rng)

    few = slice(n // 10, n // 10 + min(CHECKED_ROWS, n - n // 10))
    used, index = labels[few].unique(return_inverse=True)
    expected = reference.stable_target(x[few].cpu().double(), bank[used].cpu(), t[few].cpu().double(), index.cpu())

    distinct = labels.unique().numel()
    measure(
        f"{name} {n}×{k}×{m}×{d} float16",
        lambda: svel.stable_target(x, bank, t, labels),
        check=(lambda: svel.stable_target(x, bank, t, labels)[few], expected, TOLERANCE[torch.float32, "exact"]),
        peers={
            "gather + bmm": lambda: peers.target_bmm(x, bank, t, labels),
            "gather + broadcast": lambda: peers.target_broadcast(x, bank, t, labels),
            "loop over labels": lambda: peers.target_per_label(x, bank, t, labels),
        },
        bytes_read=distinct * m * d * 2 + n * d * 4,
        bytes_written=n * d * 4,
        flops=4.0 * n * m * d,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_class_bank_shapes(measure, device, name):
    if device.type != "cuda":
        pytest.skip("the shapes are those of a GPU")
    n, k, m, d, options = SHAPES[name]
    dtype, kind, filled = (
        options.get("dtype", torch.float16),
        options.get("labels", "random"),
        options.get("filled", 1.0),
    )
    rng = torch.Generator().manual_seed(0)
    bank = torch.randn(k, m, d, device=device, dtype=dtype)
    labels = torch.randint(k, (n,), generator=rng)
    if kind == "random":
        labels[: n // 10] = k - 1  # a tenth of the rows on one class
    elif kind == "equal":
        labels[:] = k // 2
    else:
        labels = torch.randperm(k, generator=rng)[:n]
    labels = labels.to(device)
    count = round(filled * m)
    counts = torch.full((k,), count, dtype=torch.int32, device=device)
    picked = bank[labels, torch.randint(count, (n,), generator=rng).to(device)]
    x, t = _problem(picked.cpu(), device, rng)
    few = slice(n // 10, n // 10 + min(2 if d > 65536 else CHECKED_ROWS, n - n // 10))
    used, index = labels[few].unique(return_inverse=True)
    expected = reference.stable_target(x[few].double(), bank[used, :count], t[few].double(), index).cpu()
    measure(
        f"class bank, {name}: {n}×{k}×{m}×{d} {str(dtype).removeprefix('torch.')}",
        lambda: svel.stable_target(x, bank, t, labels, counts),
        check=(
            lambda: svel.stable_target(x, bank, t, labels, counts)[few],
            expected,
            TOLERANCE[torch.float32, "exact"],
        ),
        peers={"gather + bmm": lambda: peers.target_bmm(x, bank[:, :count], t, labels)},
        bytes_read=labels.unique().numel() * count * d * bank.element_size() + n * d * 4,
        bytes_written=n * d * 4,
        flops=4.0 * n * count * d,
    )


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_class_bank_with_null_rows(measure, device, precision):
    """The published step with a null label that stands for all references of all classes, announced."""
    if device.type != "cuda":
        pytest.skip("the shape is that of a GPU")
    n, k, m, d = 256, 1000, 256, 4096
    nulls = n // 10 + 1
    rng = torch.Generator().manual_seed(0)
    bank = torch.randn(k, m, d, device=device, dtype=torch.float16)
    labels = torch.randint(k, (n,), generator=rng).to(device)
    picked = bank[labels, torch.randint(m, (n,), generator=rng).to(device)]
    x, t = _problem(picked.cpu(), device, rng)
    labels[:nulls] = -1
    few = slice(nulls - CHECKED_ROWS // 2, nulls + CHECKED_ROWS // 2)
    options = {"precision": precision, "null_rows": True}
    measure(
        f"class bank, {nulls} rows of the null label over all: {n}×{k}×{m}×{d} float16 {precision}",
        lambda: svel.stable_target(x, bank, t, labels, **options),
        check=(
            lambda: svel.stable_target(x, bank, t, labels, **options)[few],
            reference.stable_target(x[few].double(), bank, t[few].double(), labels[few]).cpu(),
            TOLERANCE[torch.float32, precision],
        ),
        peers={"pool + gather + bmm": lambda: peers.target_with_null(x, bank, t, labels, nulls)},
        bytes_read=k * m * d * 2 + n * d * 4,
        bytes_written=n * d * 4,
        flops=4.0 * (nulls * k + n - nulls) * m * d,
        rate="float16",
    )


# Where few references of a row matter, some do, and all (the worst case)
TIMES = (0.5, 0.7, 0.9, 0.98, 0.999)


def _measure_pool(measure, name, x, pool, t, precision, peer_calls, check_rows=CHECKED_ROWS):
    """`name` as the row is called; the float16 rate is that of either type of 16 bits."""
    (n, d), m = x.shape, len(pool)
    rows = slice(0, min(check_rows, n))
    half = x.is_cuda and pool.dtype != torch.float32
    measure(
        f"{name} {n}×{m}×{d} {str(pool.dtype).removeprefix('torch.')} {precision}",
        lambda: svel.stable_target(x, pool, t, precision=precision),
        check=(
            lambda: svel.stable_target(x, pool, t, precision=precision)[rows],
            reference.stable_target(x[rows].double(), pool, t[rows].double()).cpu(),
            TOLERANCE[torch.float32, precision],
        ),
        peers=peer_calls,
        bytes_read=m * d * pool.element_size() + n * d * 4,
        bytes_written=n * d * 4,
        flops=4.0 * n * m * d,
        rate="float16" if half else "float32",
    )


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", _cases(POOLS))
def test_pool(measure, device, name, precision):
    if name not in POOLS[device.type]:
        pytest.skip(f"{name} is not a {device.type} case")
    if precision == "fast" and device.type == "cpu":
        pytest.skip("fast is exact on the CPU")
    n, m, d, dtype = POOLS[device.type][name]
    rng = torch.Generator().manual_seed(0)
    pool = torch.randn(m, d, device=device, dtype=dtype)
    x, t = _problem(pool[torch.randint(m, (n,), generator=rng).to(device)].cpu(), device, rng)
    options = {
        "two products, float32": lambda: peers.target_matmul(x, pool, t),
        "two products, half": lambda: peers.target_matmul_half(x, pool, t),
        "sdpa": lambda: peers.target_sdpa(x, pool, t),
    }
    if m * d > 1 << 32:  # two float32 copies of the pool would not fit
        del options["two products, float32"]
        options["two products by chunks, float32"] = lambda: peers.target_matmul_chunks(x, pool, t)
    if precision == "exact" or dtype == torch.float32:
        del options["two products, half"]  # its error is about 1e-4
    if d > 128 or dtype != torch.float32:
        del options["sdpa"]
    _measure_pool(measure, name, x, pool, t, precision, options)


@functools.cache  # cutting them takes longer than what is timed
def _photographs(count: int, side: int) -> torch.Tensor:
    return photograph_pieces(count, side, torch.Generator().manual_seed(0)).half()


# (rows, references, D) of each kind of data
ONE_TIME = {
    "pool": ("gaussian", 256, 50_000, 3072),
    "pool_many": ("gaussian", 4096, 50_000, 4096),
    "photographs": ("photographs", 256, 50_000, 3072),
    "photographs_many": ("photographs", 4096, 50_000, 3072),
}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", ONE_TIME)
def test_pool_at_one_time(measure, device, name, time, precision):
    """All rows at one time: how long depends on how many references of a row can matter."""
    if device.type != "cuda":
        pytest.skip("the kernel of these cases is a GPU's")
    data, n, m, d = ONE_TIME[name]
    rng = torch.Generator().manual_seed(0)
    if data == "gaussian":
        pool = torch.randn(m, d, device=device, dtype=torch.float16)
    else:
        pytest.importorskip("sklearn", exc_type=ImportError)
        pool = _photographs(m, math.isqrt(d // 3)).to(device)
    t = torch.full((n,), time)
    x = make_noisy(pool[torch.randint(m, (n,), generator=rng).to(device)].cpu(), t, rng).to(device)
    t = t.to(device)
    options = {"two products, half": lambda: peers.target_matmul_half(x, pool, t)}  # its error is about 1e-4
    _measure_pool(measure, f"{name}, t = {time}:", x, pool, t, precision, options)
