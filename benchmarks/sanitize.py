"""Every CUDA kernel once at small sizes, or those of the parts that are named, to run under compute-sanitizer:

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
compute-sanitizer --tool racecheck --print-limit 0 --kernel-name kns=products_kernel python benchmarks/sanitize.py mixed
"""

from __future__ import annotations

import argparse
import os

import torch

import stablevelocity_kernels as svel


def targets(rng: torch.Generator) -> None:
    """Each kernel of the planner: aligned and not, with null and stray labels, counts and a source."""
    for d in (1, 10, 127, 256, 1032, 4096, 8200, 16392):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = torch.randn(5, d, device="cuda", generator=rng)
            refs = torch.randn(3, 19, d, device="cuda", generator=rng).to(dtype)
            t = torch.tensor([0.1, 0.5, 0.9, float("nan"), 0.99], device="cuda")
            labels = torch.tensor([0, -1, 7, 2, 1], device="cuda")
            counts = torch.tensor([19, 0, 3], device="cuda")
            svel.stable_target(x, refs, t, labels, counts, x)
            svel.posterior_mean(x, refs[0], 1 - t, t)
            svel.posterior_part(x, refs[0], 1 - t, t)
            unaligned = torch.empty(refs.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(refs).copy_(refs)
            svel.stable_target(x, unaligned, t, labels, counts, x)
    for n, m, d in ((70, 130, 4160), (80, 70, 3), (80, 70, 10), (80, 70, 16), (80, 70, 30)):
        x, refs = (torch.randn(rows, d, device="cuda", generator=rng) for rows in (n, m))
        sigma = torch.full((n,), 0.5, device="cuda")
        svel.posterior_mean(x, refs.half(), 1 - sigma, sigma, None, torch.tensor([m - 3], device="cuda"), x)


def banks(rng: torch.Generator) -> None:
    """Each form of the bulk kernels: groups in a block, clusters, all over the grid; rows that share a pass."""
    for d in (16, 128, 400, 1000, 1032, 2056, 8192, 40_000, 65_544, 1_048_584):
        for dtype in (torch.float16, torch.bfloat16, torch.float32)[: 1 if d > 1 << 20 else 3]:
            x = torch.randn(7, d, device="cuda", generator=rng)
            refs = torch.randn(3, 9, d, device="cuda", generator=rng).to(dtype)
            refs[1] += 10.0  # far from the origin beside its spread: scored another way
            t = torch.tensor([0.1, 0.5, 0.9, float("nan"), 0.99, 0.3, 0.7], device="cuda")
            labels = torch.tensor([0, 0, 0, 2, 1, 1, -1], device="cuda")
            counts = torch.tensor([9, 5, 0], device="cuda")
            svel.stable_target(x, refs, t, labels, counts, x)
            svel.posterior_mean(x, refs, 1 - t, t, labels, counts)
            svel.stable_target(x[:1], refs[0], t[:1])


def mixed(rng: torch.Generator) -> None:
    """One launch of each form of the bulk kernels in which blocks have several units, some without references."""
    for d, n, dtype in (
        (1032, 800, torch.float16),
        (4096, 300, torch.bfloat16),
        (8200, 130, torch.float16),
        (256, 300, torch.float32),
        (8200, 80, torch.float32),
    ):
        labels, t = torch.arange(n, device="cuda"), torch.full((n,), 0.1, device="cuda")
        x = torch.randn(n, d, device="cuda", generator=rng)
        refs = torch.randn(n, 9, d, device="cuda", generator=rng).to(dtype)
        svel.stable_target(x, refs, t, labels // 2, 9 * (labels % 4 == 0), x)


def pools(rng: torch.Generator) -> None:
    """The pool kernel, in one pass and two."""
    for n, m, d in ((7, 4100, 4096), (33, 6007, 2808)):
        x = torch.randn(n, d, device="cuda", generator=rng)
        refs = torch.randn(m, d, device="cuda", generator=rng).half()
        t = torch.linspace(0.1, 0.99, n, device="cuda")
        t[3] = float("nan")
        svel.stable_target(x, refs, t)
        svel.posterior_part(x, refs, 1 - t, t, None, torch.tensor([m - 70], device="cuda"), precision="fast")


def many(rng: torch.Generator) -> None:
    """Many rows beside a pool, and beside few classes: lists short and long, dense rows, late ones and expected; far
    references."""
    for d, dtype in (
        (520, torch.float16),
        (1032, torch.bfloat16),
        (5000, torch.float16),
        (784, torch.float32),
        (3080, torch.float32),
    ):
        refs = torch.randn(3, 907, d, device="cuda", generator=rng).to(dtype)
        t = torch.tensor([0.05, 0.3, 0.7, 0.9, 0.95, 0.98, 0.999], device="cuda").repeat(11)
        labels = torch.arange(len(t), device="cuda") % 4 - 1
        between = (refs[labels, 0] + refs[labels, 1]).float() / 2  # two references
        noise = t[:, None] * torch.randn(len(t), d, device="cuda", generator=rng)
        x = torch.cat([(1 - t[:, None]) * mean + noise for mean in (between, refs[labels, 2].float())])
        labels, t = labels.repeat(2), t.repeat(2)
        counts = torch.tensor([907, 0, 300], device="cuda")
        for precision in ("exact", "fast"):
            svel.stable_target(x, refs.flatten(0, 1), t, precision=precision)
            svel.stable_target(x, refs, t, labels, counts, precision=precision)
            svel.posterior_mean(x.half(), refs, 1 - t, t, labels, counts, precision=precision)
        if dtype != torch.float16:  # references of other sizes, of which some are outliers among the samples
            refs[:, ::57] *= 1e6
            refs[:, 5::101] *= 1e-6
            svel.stable_target(x, refs.flatten(0, 1), t)
            svel.stable_target(x, refs, t, labels, counts)


def held(rng: torch.Generator) -> None:
    """Small sets: one chunk and several, classes, rows of all of them, rows in doubt, x of another dtype."""
    for d, m, dtype in ((264, 100, torch.float16), (1032, 700, torch.bfloat16), (4096, 40, torch.float16)):
        refs = torch.randn(3, m, d, device="cuda", generator=rng).to(dtype)
        t = torch.tensor([0.05, 0.3, 0.7, 0.95, 0.98, 0.999, float("nan")], device="cuda").repeat(20)
        labels = torch.arange(len(t), device="cuda") % 4 - 1
        mean = (refs[labels, 0] + refs[labels, 1]).float() / 2
        x = (1 - t[:, None]) * mean + t[:, None] * torch.randn(len(t), d, device="cuda", generator=rng)
        counts = torch.tensor([m, 0, m - 30], device="cuda")
        svel.stable_target(x, refs[0], t)
        svel.posterior_mean(x, refs[0], 1 - t, t, precision="fast")
        svel.posterior_mean(x.half(), refs, 1 - t, t, labels, counts)
        svel.stable_target(x, refs, t, labels, counts)


def swept(rng: torch.Generator) -> None:
    """Larger small sets: tiles that are whole and cut, rows in doubt, lse, x of another dtype."""
    for d, m, dtype in ((20_008, 800, torch.float16), (66_000, 265, torch.bfloat16)):
        refs = torch.randn(m, d, device="cuda", generator=rng).to(dtype)
        t = torch.tensor([0.05, 0.3, 0.7, 0.95, 0.98, 0.999, float("nan")], device="cuda").repeat(10)
        mean = (refs[: len(t)] + refs[1 : len(t) + 1]).float() / 2
        x = (1 - t[:, None]) * mean + t[:, None] * torch.randn(len(t), d, device="cuda", generator=rng)
        counts = torch.tensor([m - 30], device="cuda")
        svel.stable_target(x, refs, t)
        svel.posterior_mean(x, refs, 1 - t, t, None, counts, precision="fast")
        svel.posterior_mean(x.half(), refs, 1 - t, t)


def short(rng: torch.Generator) -> None:
    """Short samples beside many rows: references of one part and two, rows in doubt, a source, lse, any alignment."""
    for d, m, dtype in (
        (33, 4001, torch.float32),
        (100, 3000, torch.float16),
        (192, 2000, torch.bfloat16),
        (256, 2500, torch.float32),
    ):
        refs = torch.randn(m, d, device="cuda", generator=rng).to(dtype)
        t = torch.tensor([0.05, 0.3, 0.7, 0.95, 0.98, 0.999, float("nan")], device="cuda").repeat(40)
        mean = (refs[: len(t)] + refs[1 : len(t) + 1]).float() / 2
        x = (1 - t[:, None]) * mean + t[:, None] * torch.randn(len(t), d, device="cuda", generator=rng)
        counts = torch.tensor([m - 30], device="cuda")
        svel.stable_target(x, refs, t)
        svel.stable_target(x, refs, t, None, None, x)
        svel.posterior_mean(x, refs, 1 - t, t, None, counts, precision="fast")
        svel.posterior_part(x.half(), refs, 1 - t, t)


def steps(rng: torch.Generator) -> None:
    for shape in ((3, 8), (2, 2051), (2, 4, 16, 16)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = torch.randn(shape, device="cuda", generator=rng).to(dtype)
            t = torch.full(shape[:1], 0.6, device="cuda")
            svel.stablevs_step(x, x, t, t * 0.5, x, x, guidance_scale=2.0, noise_factor=0.3, path="cosine")
            svel.affine_step(x, x.float(), t[0], t)
            svel.affine_step(x, x, t[0], t)
            svel.affine_step(x, x, t[0], t[1])
            odd = torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(x).copy_(x)
            svel.stablevs_step(odd, x, t[0], t[1] * 0.5, odd, x, guidance_scale=2.0, noise_factor=0.3)


def losses(rng: torch.Generator) -> None:
    """Tokens held in registers, of one to four packs of channels, and the others; features of one dtype and of two."""
    for shape in ((2, 3, 8), (3, 5, 77), (3, 5, 264), (4, 16, 768), (3, 3, 1024), (2, 3, 1032)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            p = torch.randn(shape, device="cuda", generator=rng).to(dtype).requires_grad_()
            for teacher in (torch.randn_like(p), torch.randn_like(p).bfloat16()):
                svel.va_repa_loss(p, teacher, torch.ones(shape[0], device="cuda")).backward()


def pushes(rng: torch.Generator) -> None:
    for d in (3, 64, 2056):
        refs = torch.zeros(4, 6, d, device="cuda", dtype=torch.float16)
        counts, heads = (torch.zeros(4, device="cuda", dtype=torch.int32) for _ in range(2))
        labels = torch.randint(-1, 5, (50,), device="cuda", generator=rng)
        values = torch.randn(50, d, device="cuda", generator=rng)
        svel.bank_push_(refs, counts, heads, values, labels)
        svel.bank_push_(refs, counts, heads, values, labels, all_to_last=True)


def draws(rng: torch.Generator) -> None:
    """Labels of every kind, empty groups, aligned and not; groups beyond one round of the search."""
    for d in (3, 64, 2056):
        for dtype in (torch.float16, torch.float32, torch.float64):
            refs = torch.zeros(600, 2, d, device="cuda", dtype=dtype)
            counts = torch.randint(0, 3, (600,), device="cuda", generator=rng)
            labels = torch.randint(-2, 601, (50,), device="cuda", generator=rng)
            labels[::5] = -1
            rows, u = (torch.rand(50, k, device="cuda", generator=rng) for k in (d, 1))
            x0, _, x_t, t_set = svel.bank_draw(refs, counts, u[:, 0], labels, rows, rows, u[:, 0], t_min=0.5)
            svel.conditional_target_(x_t, x0, rows, u[:, 0], t_set.float())


PARTS = {
    part.__name__: part
    for part in (targets, banks, mixed, pools, many, held, swept, short, steps, losses, pushes, draws)
}
# Of parts that are about one kernel: it serves, also where the planner expects another to be quicker.
KERNELS = {"many": "many_rows", "held": "held", "swept": "swept", "short": "short_rows"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them if none is named")
    names = parser.parse_args().parts or list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    rng = torch.Generator("cuda").manual_seed(0)
    for name in names:
        os.environ["SVEL_KERNEL"] = KERNELS.get(name, "")
        PARTS[name](rng)
        torch.cuda.synchronize()
        print(f"{name}: done")


if __name__ == "__main__":
    main()
