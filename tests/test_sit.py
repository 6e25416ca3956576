"""SiT: names and shapes of the public checkpoints, what forward() computes, and what training needs of it."""

import math

import pytest
import torch
from stablevelocity.models import SiT, load_public_state_dict, sit
from torch import nn

from stablevelocity_kernels.testing import TOLERANCE, assert_close, relative_error

TINY = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 64,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


def public_shapes(
    hidden, depth, patch, channels, classes, tokens, *, sigma=False, z_dims=(), projector=2048, qk_norm=0
):
    """Names and shapes in the checkpoints of github.com/willisma/SiT (sigma) and github.com/sihyun-yu/REPA (z_dims)."""
    out = patch * patch * channels * (2 if sigma else 1)
    shapes = {
        "pos_embed": (1, tokens, hidden),
        "x_embedder.proj.weight": (hidden, channels, patch, patch),
        "x_embedder.proj.bias": (hidden,),
        "y_embedder.embedding_table.weight": (classes + 1, hidden),
    }

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("t_embedder.mlp.0", hidden, 256)
    linear("t_embedder.mlp.2", hidden, hidden)
    for i in range(depth):
        linear(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        linear(f"blocks.{i}.attn.proj", hidden, hidden)
        linear(f"blocks.{i}.mlp.fc1", 4 * hidden, hidden)
        linear(f"blocks.{i}.mlp.fc2", hidden, 4 * hidden)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * hidden, hidden)
        for norm in ("q_norm", "k_norm") if qk_norm else ():
            shapes[f"blocks.{i}.attn.{norm}.weight"] = shapes[f"blocks.{i}.attn.{norm}.bias"] = (qk_norm,)
    for i, z in enumerate(z_dims):
        linear(f"projectors.{i}.0", projector, hidden)
        linear(f"projectors.{i}.2", projector, projector)
        linear(f"projectors.{i}.4", z, projector)
    linear("final_layer.linear", out, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def random_state(shapes, rng):
    return {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def shaken(model, scale=0.1):
    """The model with random weights everywhere: at initialisation it answers zero to everything."""
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=scale)
    return model


def inputs(n=4, channels=3, size=(8, 8), classes=10):
    return torch.randn(n, channels, *size), torch.rand(n), torch.randint(0, classes, (n,))


# Names, shapes, counts


@pytest.mark.parametrize(
    ("name", "overrides", "shapes", "count"),
    [
        ("XL/2", {"learn_sigma": True}, public_shapes(1152, 28, 2, 4, 1000, 256, sigma=True), 675_129_632),
        ("SiT-XL/2", {"z_dims": (768,)}, public_shapes(1152, 28, 2, 4, 1000, 256, z_dims=(768,)), None),
        ("XL/4", {"input_size": 64}, public_shapes(1152, 28, 4, 4, 1000, 256), None),
        ("L/2", {"input_size": (16, 32)}, public_shapes(1024, 24, 2, 4, 1000, 128), 457_000_000),
        ("B/2", {}, public_shapes(768, 12, 2, 4, 1000, 256), 130_000_000),
        ("S/8", {}, public_shapes(384, 12, 8, 4, 1000, 16), None),
        ("S/2", {"z_dims": (384, 768), "projector_dim": 512}, public_shapes(
            384, 12, 2, 4, 1000, 256, z_dims=(384, 768), projector=512), None),
        ("B/2", {"qk_norm": True}, public_shapes(768, 12, 2, 4, 1000, 256, qk_norm=64), None),
    ],
)  # fmt: skip
def test_names_and_shapes_are_the_public_ones(name, overrides, shapes, count):
    with torch.device("meta"):
        model = sit(name, **overrides)
    assert shapes_of(model) == shapes
    if count:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0 if count % 1000 else 0.005)


@pytest.mark.parametrize(
    ("public", "overrides"),
    [({"sigma": True}, {"learn_sigma": True}), ({"z_dims": (24, 16)}, {"z_dims": (24, 16), "encoder_depth": 2})],
)
@pytest.mark.parametrize("wrap", ["bare", "ema", "model", "ddp", "compiled"])
def test_public_checkpoints_load(public, overrides, wrap, rng):
    state = random_state(public_shapes(64, 3, 2, 3, 10, 16, **public), rng)
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    given = {
        "bare": state,
        "ema": {"model": other, "ema": state, "opt": {}, "steps": 7},
        "model": {"model": state, "steps": 7},
        "ddp": {"ema": {f"module.{name}": value for name, value in state.items()}},
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
    }[wrap]
    model = SiT(**TINY, **overrides)
    assert load_public_state_dict(model, given) is model
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_projectors_are_left_out_of_a_model_without_them(rng):
    state = random_state(public_shapes(64, 3, 2, 3, 10, 16, z_dims=(24,)), rng)
    model = load_public_state_dict(SiT(**TINY), state)
    assert torch.equal(model.blocks[2].mlp.fc1.bias, state["blocks.2.mlp.fc1.bias"])


def test_decoder_blocks_of_older_repa_checkpoints_follow_the_encoder(rng):
    state = random_state(public_shapes(64, 3, 2, 3, 10, 16), rng)
    older = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in state.items()}
    model = load_public_state_dict(SiT(**TINY, encoder_depth=2), older)
    assert torch.equal(model.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])


def test_a_checkpoint_without_positions_keeps_the_models_own(rng):
    state = random_state(public_shapes(64, 3, 2, 3, 10, 16), rng)
    del state["pos_embed"]
    model = load_public_state_dict(SiT(**TINY), state)
    assert torch.equal(model.pos_embed, SiT(**TINY).pos_embed)


def test_what_does_not_fit_is_listed(rng):
    state = random_state(public_shapes(64, 3, 2, 3, 10, 16, sigma=True), rng)
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.3.mlp.fc1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state_dict: expected the names and shapes of the model") as error:
        load_public_state_dict(SiT(**TINY), state)
    message = str(error.value)
    assert "missing blocks.1.attn.qkv.bias" in message
    assert "unexpected blocks.3.mlp.fc1.bias" in message
    assert "final_layer.linear.weight: expected shape (12, 64), got (24, 64)" in message


# What it computes


def naive_forward(model, x, t, y):
    """The same network in plain sums over the state dict, for square or wide inputs and no options."""
    w, p = {k: v.double() for k, v in model.state_dict().items()}, model.patch_size
    n, channels, height, width = x.shape
    d, heads = w["pos_embed"].shape[-1], model.blocks[0].attn.num_heads

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def normed(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    def gelu(value):
        return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    patches = x.double().reshape(n, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    h = patches.reshape(n, -1, channels * p * p) @ w["x_embedder.proj.weight"].reshape(d, -1).T
    h = h + w["x_embedder.proj.bias"] + w["pos_embed"]
    angle = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(len(model.blocks)):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c).split(d, dim=-1)
        q, k, v = linear(f"blocks.{i}.attn.qkv", normed(h) * (1 + m[1]) + m[0]).split(d, dim=-1)
        attended = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d // heads)).softmax(-1)
            attended.append(weights @ v[..., part])
        h = h + m[2] * linear(f"blocks.{i}.attn.proj", torch.cat(attended, -1))
        h = h + m[5] * linear(f"blocks.{i}.mlp.fc2", gelu(linear(f"blocks.{i}.mlp.fc1", normed(h) * (1 + m[4]) + m[3])))
    m = linear("final_layer.adaLN_modulation.1", c).split(d, dim=-1)
    out = linear("final_layer.linear", normed(h) * (1 + m[1]) + m[0])
    image = torch.zeros(n, out.shape[-1] // (p * p), height, width, dtype=torch.float64)
    for token in range(out.shape[1]):
        row, column = token // (width // p) * p, token % (width // p) * p
        image[:, :, row : row + p, column : column + p] = out[:, token].reshape(n, p, p, -1).permute(0, 3, 1, 2)
    return image[:, :channels]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"input_size": (8, 16), "patch_size": 4, "in_channels": 1},
        {"input_size": (12, 4), "patch_size": 1, "num_heads": 2},
        {"learn_sigma": True},
    ],
)
def test_forward_is_the_formula(shape):
    model = shaken(SiT(**{**TINY, **shape}))
    x, t, y = inputs(channels=model.in_channels, size=model.input_size)
    out = model(x, t, y)
    assert out.shape == x.shape
    assert_close(out, naive_forward(model, x, t, y))


def test_positions_are_sines_and_cosines_of_column_and_row():
    embedding = SiT(**{**TINY, "input_size": (6, 8)}).pos_embed[0]
    for row in range(3):
        for column in range(4):
            for k in range(16):
                angle = [axis / 10000 ** (k / 16) for axis in (column, row)]
                expected = [f(a) for a in angle for f in (math.sin, math.cos)]
                assert embedding[row * 4 + column, k::16].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_new_model_answers_zero_and_its_blocks_change_nothing():
    model, (x, t, y) = SiT(**TINY), inputs()
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    hidden = torch.randn(4, 16, 64)
    assert torch.equal(model.blocks[1](hidden, torch.randn(4, 64)), hidden)


def test_time_that_runs_the_other_way():
    ours = shaken(SiT(**TINY))
    theirs = load_public_state_dict(SiT(**TINY, time_convention="noise_at_0"), ours.state_dict())
    x, t, y = inputs()
    assert_close(theirs(x, t, y), -ours(x, 1.0 - t, y))


def test_labels():
    model, (x, t, _) = shaken(SiT(**TINY)), inputs()
    null = torch.full((4,), 10)
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.equal(model(x, t), model(x, t, torch.zeros_like(null)))
    plain = shaken(SiT(**{**TINY, "num_classes": 0}))
    assert "y_embedder.embedding_table.weight" not in plain.state_dict()
    assert plain(x, t).shape == x.shape


@pytest.mark.parametrize("z_dims", [(), (24, 16)])
def test_hidden_states_and_projections(z_dims):
    model, (x, t, y), seen = shaken(SiT(**TINY, encoder_depth=2, z_dims=z_dims)), inputs(), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    velocity, features = model(x, t, y, return_hidden=True)
    assert torch.equal(velocity, model(x, t, y))
    if z_dims:
        assert [f.shape for f in features] == [(4, 16, 24), (4, 16, 16)]
        assert torch.equal(features[1], model.projectors[1](seen[0]))
    else:
        assert torch.equal(features[0], seen[0])


# Training


def test_gradients_reach_every_parameter_but_the_positions():
    model, (x, t, y) = shaken(SiT(**TINY, encoder_depth=2, z_dims=(24,), qk_norm=True)), inputs()
    velocity, (features,) = model(x, t, y, return_hidden=True)
    (velocity.square().mean() + features.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == ["pos_embed"]


def test_checkpointing_recomputes_gives_the_same_gradients_and_runs_hooks_once():
    models = [shaken(SiT(**TINY)), SiT(**TINY, checkpointing=True)]
    models[1].load_state_dict(models[0].state_dict())
    x, t, y = inputs()
    seen, attended = [], []
    models[1].blocks[1].register_forward_hook(lambda *_: seen.append(1))
    models[1].blocks[1].attn.register_forward_hook(lambda *_: attended.append(1))
    for model in models:
        model(x, t, y).square().mean().backward()
    assert (len(seen), len(attended)) == (1, 2)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if name != "pos_embed":
            assert_close(b.grad, a.grad)


def test_it_learns(rng):
    model, (x, t, y) = SiT(**TINY), inputs(8)
    target = torch.randn(x.shape, generator=rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_bfloat16_autocast_and_weights():
    model, (x, t, y) = shaken(SiT(**TINY, qk_norm=True), 0.05), inputs()
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x, t, y)
    assert cast.dtype == torch.float32
    low = model.bfloat16()(x.bfloat16(), t, y)
    assert low.dtype == torch.bfloat16
    layers = 3 * len(model.blocks)  # roundings of so many products add up
    for out in (cast, low):
        assert relative_error(out, exact) < layers * TOLERANCE[torch.bfloat16, "exact"]


@pytest.mark.parametrize("overrides", [{}, {"time_convention": "noise_at_0", "learn_sigma": True, "qk_norm": True}])
def test_compiles_as_one_graph(overrides):
    model, (x, t, y) = shaken(SiT(**TINY, **overrides)), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, t, y), model(x, t, y)
    assert_close(out, expected)
    grads = [torch.autograd.grad(o.square().mean(), model.blocks[0].attn.qkv.weight)[0] for o in (out, expected)]
    assert_close(*grads)
    assert torch.compile(model, fullgraph=True, backend="aot_eager")(x, t).shape == x.shape


@pytest.mark.gpu
def test_on_the_gpu_compiled_and_in_bfloat16():
    model = shaken(sit("S/2", input_size=16, depth=3, num_classes=10), 0.03).cuda()
    x, t, y = (value.cuda() for value in inputs(channels=4, size=(16, 16)))
    exact = model(x, t, y)
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        out = compiled(x, t, y)
    assert relative_error(out, exact) < 3 * len(model.blocks) * TOLERANCE[torch.bfloat16, "exact"]
    out.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "pos_embed")


# Bad arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sit("M/2"), "name: expected one of S, B, L, XL with a patch size, such as 'S/2', got 'M/2'"),
        (lambda: sit("S/0"), "name: expected one of"),
        (
            lambda: SiT(**{**TINY, "input_size": (8, 9)}),
            r"input_size: expected multiples of patch_size = 2, got \(8, 9\)",
        ),
        (lambda: SiT(**{**TINY, "num_heads": 5}), "num_heads: expected a divisor of hidden_size = 64, got 5"),
        (lambda: SiT(**{**TINY, "hidden_size": 66}), "hidden_size: expected a multiple of 4, got 66"),
        (lambda: SiT(**TINY, time_convention="backwards"), "time_convention: expected one of .*, got backwards"),
        (lambda: SiT(**TINY, z_dims=(8,)), "encoder_depth: expected 1 to depth = 3, got 8"),
        (
            lambda: SiT(**TINY)(torch.zeros(2, 3, 8, 9), torch.zeros(2)),
            r"x: expected shape .* \(2, 3, 8, 8\), got \(2, 3",
        ),
        (lambda: SiT(**TINY)(torch.zeros(2, 3, 8, 8), torch.zeros(())), r"t: expected shape \(N,\) = \(2,\), got \(\)"),
        (
            lambda: SiT(**TINY)(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2)),
            r"y: expected \(2,\) int64, got",
        ),
        (
            lambda: SiT(**{**TINY, "num_classes": 0})(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()),
            "y: expected None because num_classes = 0, got a tensor",
        ),
    ],
)
def test_bad_arguments_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
