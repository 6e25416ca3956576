"""The ops under torch.compile, export, opcheck and meta tensors, on each device."""

import pytest
import torch

import stablevelocity_kernels as svel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def patterns(device):
    """(op, positional arguments, keywords) for several patterns of the arguments of every op."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=rng).to(device, dtype)

    n, half = 3, torch.full((3,), 0.5, device=device)
    labels, counts = torch.tensor([0, 1, -1], device=device), torch.tensor([4, 2], device=device)
    x, shared, groups = randn(n, 2, 5), randn(4, 2, 5, dtype=torch.float16), randn(2, 4, 2, 5)
    yield "posterior_mean", (x, shared, half, half), {}
    yield "posterior_mean", (x, groups, half, half, labels, counts, x), {"precision": "fast"}
    yield "posterior_mean", (x.half(), shared, half, half, None, counts[:1].int()), {}
    yield "posterior_mean", (x.double(), groups, half.double(), half, labels), {}
    yield "posterior_part", (x, shared, half.double(), half), {}
    yield "posterior_part", (x.half(), groups, half, half, labels, counts), {"precision": "fast"}
    yield "posterior_part", (x.double(), groups, half, half.double(), labels), {}
    yield "stable_target", (x, shared, half), {}
    yield "stable_target", (x, groups, half, labels, counts, x), {"path": "cosine", "prediction": "noise"}
    yield "stable_target", (x.bfloat16(), groups, half, labels), {"prediction": "score"}
    yield "affine_step", (x, x, half, half[0]), {}
    yield "affine_step", (x.half(), x, half, half, half, x, x), {"guidance_scale": 2.0}
    yield "stablevs_step", (x, x, half, half[0] * 0.5), {}
    yield "stablevs_step", (x, x, half, half * 0.5, x, x), {"noise_factor": 0.5, "path": "cosine"}
    weight = torch.rand(n, generator=rng).to(device)
    yield "va_repa_loss", (x, x + 1, weight), {}
    yield "va_repa_loss", (x.bfloat16().requires_grad_(), x, weight), {}
    yield "va_repa_loss_backward", (half[0].clone(), x, x + 1, weight), {}
    ints = [torch.zeros(2, dtype=torch.int32, device=device) for _ in range(2)]
    yield "bank_push_", (randn(2, 4, 5, dtype=torch.float16), *ints, randn(n, 5), labels.clamp_min(0)), {}
    three = randn(3, 4, 5, dtype=torch.float16), *(torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
    yield "bank_push_", (*three, randn(n, 5), labels.clamp_min(0)), {"all_to_last": True}
    u = torch.rand(n, generator=rng).to(device, torch.float64)
    yield "bank_draw", (groups, counts, u, labels), {}
    yield "bank_draw", (groups.double(), counts.int(), u.float(), labels, x.half(), x, half), {"t_min": 0.2}
    yield "bank_draw", (groups[:1].half(), counts[:1], u, None, None, x, half.double()), {"path": "cosine"}
    t_set = torch.tensor([0.5, float("nan"), 0.5], device=device)
    yield "conditional_target_", (x.clone(), x, x + 1, half, t_set), {}
    yield "conditional_target_", (x.half(), x, x + 1, half, t_set), {"path": "cosine", "prediction": "score"}
    indices = torch.zeros(2, 4, dtype=torch.int64, device=device)
    yield "bank_push_", (indices, *ints, torch.arange(n, device=device), labels.clamp_min(0)), {}


CASES = [pytest.param(i, id=f"{op}-{i}") for i, (op, _, _) in enumerate(patterns("cpu"))]


def case(index, device):
    op, args, kwargs = list(patterns(device))[index]
    return getattr(torch.ops.svel, op).default, args, kwargs


def copies(args):
    return [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(index, device):
    torch.library.opcheck(*case(index, device))


@pytest.mark.parametrize("index", CASES)
def test_meta_tensors(index):
    """On the meta device an op gives what it gives on the CPU, without the values."""
    op, args, kwargs = case(index, "cpu")
    real = op(*copies(args), **kwargs)
    meta = op(*(a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
    as_tuple = [o if isinstance(o, tuple) else (o,) for o in (real, meta)]
    for r, m in zip(*as_tuple, strict=True):
        if r is not None:
            assert m.device.type == "meta"
            assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_compile_in_one_graph(index, device, backend):
    """Changed arguments (of the ops in place) as well as results are those of the eager op."""
    op, args, kwargs = case(index, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a, **kwargs), fullgraph=True, backend=backend)
    ours, theirs = copies(args), copies(args)
    got, expected = compiled(*ours), op(*theirs, **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_a_training_step_compiles_whole(device, backend):
    """Push, target, loss and gradient; dynamic batch sizes without a second graph for each."""
    torch._dynamo.reset()

    def inputs(n):
        rng = torch.Generator().manual_seed(n)
        tensors = [
            torch.randn(n, 6, generator=rng),
            torch.randn(2, 4, 6, generator=rng),
            torch.rand(n, generator=rng),
            torch.randint(2, (n,), generator=rng),
            torch.tensor([4, 3]),
            torch.randn(n, 3, 8, generator=rng).requires_grad_(),
            torch.randn(n, 3, 8, generator=rng),
            torch.rand(n, generator=rng),
            torch.zeros(2, dtype=torch.int64),
            torch.randn(n, 6, generator=rng),
        ]
        return [v.detach().to(device).requires_grad_(v.requires_grad) for v in tensors]

    def loss_of(x, refs, t, labels, counts, projected, teacher, weight, heads, values):
        svel.bank_push_(refs, counts, heads, values, labels)
        target = svel.stable_target(x, refs, t, labels, counts, x)
        return (projected.mean() - target).square().mean() + svel.va_repa_loss(projected, teacher, weight)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=True)
    for n in (4, 5, 7):
        ours, theirs = inputs(n), inputs(n)
        a, b = compiled(*ours), loss_of(*theirs)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours[5].grad, theirs[5].grad)
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("op", ["stablevs_step", "affine_step"])
def test_a_sampling_step_compiles_whole(op, device, backend):
    """The public functions, which call something shorter outside torch.compile."""
    torch._dynamo.reset()
    rng = torch.Generator().manual_seed(0)
    x, v, u, noise = (torch.randn(3, 8, generator=rng).to(device) for _ in range(4))
    t, tau = (torch.full((3,), value, device=device) for value in (0.7, 0.3))

    def plain(x, v):
        return getattr(svel, op)(x, v, t, tau)

    def noisy(x, v):
        if op == "affine_step":
            return svel.affine_step(x, v, t, tau, t, u, noise, guidance_scale=3.0)
        return svel.stablevs_step(x, v, t, tau, u, noise, guidance_scale=3.0, noise_factor=0.2, path="cosine")

    for call in (plain, noisy):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x, v), call(x, v), rtol=0, atol=0)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, sample, velocity, t, tau):
            return svel.stablevs_step(sample, velocity, t, tau)

    args = torch.randn(3, 4), torch.randn(3, 4), torch.full((3,), 0.7), torch.full((3,), 0.3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Step(), args, dynamic_shapes=[{0: batch}] * 4)
    longer = [torch.cat([a, a]) for a in args]
    torch.testing.assert_close(program.module()(*longer), Step()(*longer))
    assert any("svel.stablevs_step" in str(node.target) for node in program.graph.nodes)


@pytest.mark.gpu
def test_cuda_graph():
    """Every op captures in a CUDA graph, which it could not with a host synchronisation, and replays on new inputs."""
    for index in range(len(CASES)):
        op, args, kwargs = case(index, "cuda")
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        op(*copies(args), **kwargs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        static = copies(args)
        with torch.cuda.graph(graph):
            out = op(*static, **kwargs)
        for s, a in zip(static, args, strict=True):
            if isinstance(s, torch.Tensor):
                s.copy_(a)
        graph.replay()
        changed = copies(args)
        expected = op(*changed, **kwargs)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(static, changed, rtol=0, atol=0, equal_nan=True)
