"""Hidden states by name from any model, and the projectors between them and the teachers."""

import pytest
import stablevelocity as sv
import torch
from stablevelocity.alignment import ConvProjector, HiddenState, projector, spatial_norm
from stablevelocity.models import SiT
from torch import nn

from stablevelocity_kernels.testing import assert_close


def small_sit(**options):
    model = SiT(8, 2, 4, hidden_size=16, depth=3, num_heads=2, num_classes=5, encoder_depth=2, **options)
    for parameter in model.parameters():  # not the identity of initialisation
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(n=3):
    return torch.randn(n, 4, 8, 8), torch.linspace(0.1, 0.9, n), torch.arange(n)


def test_the_hook_sees_what_sit_returns():
    model, x = small_sit(), inputs()
    hidden = HiddenState(model, "blocks.1")
    with hidden.watch():
        velocity = model(*x)
    expected_velocity, [expected] = model(*x, return_hidden=True)
    assert torch.equal(hidden.tokens(), expected)
    assert torch.equal(velocity, expected_velocity)


def gradients_through(model, run, at, dim, tokens):
    """The alignment's gradient by the hook: reaches what lies before the module, not what lies after."""
    project, align, hidden = projector("mlp", dim, 7, width=8), sv.VAREPALoss(), HiddenState(model, at)
    with hidden.watch():
        run()
    z = project(hidden.tokens())
    assert z.shape[1:] == (tokens, 7)
    align(z, torch.randn(z.shape), torch.full((z.shape[0],), 0.3)).backward()
    hidden.remove()
    return {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_sit(checkpointing):
    model = small_sit(checkpointing=checkpointing)
    got = gradients_through(model, lambda: model(*inputs()), "blocks.1", 16, 16)
    assert got["blocks.1.mlp.fc2.weight"]
    assert got["blocks.0.attn.qkv.weight"]
    assert not got["blocks.2.mlp.fc2.weight"]


def test_diffusers_dit():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, num_embeds_ada_norm=5
    )
    x, t, y = inputs()

    def run():
        return model(x, timestep=(t * 1000).long(), class_labels=y).sample

    got = gradients_through(model, run, "transformer_blocks.1", 16, 16)
    assert got["transformer_blocks.1.ff.net.2.weight"]
    assert not got["transformer_blocks.2.ff.net.2.weight"]


def small_sd3():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
    )


def run_sd3(model):
    x, t, _ = inputs()
    return model(x, torch.randn(3, 5, 12), torch.randn(3, 6), timestep=t * 1000).sample


@pytest.mark.parametrize("checkpointing", [False, True])
def test_diffusers_sd3_returns_text_and_image_tokens(checkpointing):
    model = small_sd3().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    got = gradients_through(model, lambda: run_sd3(model), "transformer_blocks.1[1]", 16, 16)
    assert got["transformer_blocks.1.ff.net.2.weight"]
    assert not got["transformer_blocks.2.ff.net.2.weight"]
    hidden = HiddenState(model, "transformer_blocks.1")
    with hidden.watch():
        run_sd3(model)
    with pytest.raises(RuntimeError, match=r"a choice of its outputs: \[0\] \(3, 5, 16\), \[1\] \(3, 16, 16\)"):
        hidden.tokens()


def test_recomputed_blocks_leave_nothing_behind():
    model = small_sd3().train()
    model.enable_gradient_checkpointing()
    hidden = HiddenState(model, "transformer_blocks.1[1]")
    with hidden.watch():
        out = run_sd3(model)
    hidden.tokens()
    out.sum().backward()  # calls the block once more
    assert hidden._value is None


def test_feature_maps_become_tokens_row_by_row():
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    hidden = HiddenState(model, "0")
    with hidden.watch():
        image = model(torch.randn(2, 3, 4, 6))
    tokens = hidden.tokens()
    assert tokens.shape == (2, 24, 5)
    assert torch.equal(tokens[:, 7], image[:, :, 1, 1])


@pytest.mark.parametrize("how", ["whole", "model"])
def test_compiles_and_gives_the_same_gradients(how):
    torch._dynamo.reset()
    model, x, align = small_sit(), inputs(), sv.VAREPALoss()
    project, hidden = projector("mlp", 16, 7, width=8), HiddenState(model, "blocks.1")
    teacher = torch.randn(3, 16, 7)
    net = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "model" else model

    def step(net=model):
        with hidden.watch():
            velocity = net(*x)
        return velocity.square().mean() + align(project(hidden.tokens()), teacher, x[1])

    expected = step()
    parameters = [p for p in model.parameters() if p.requires_grad] + list(project.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    loss = torch.compile(step, backend="aot_eager", fullgraph=True)() if how == "whole" else step(net)
    assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_errors_name_what_there_is():
    model = small_sit()
    with pytest.raises(ValueError, match=r"got 'blocks.7'; there are .*blocks.2.*blocks.0"):
        HiddenState(model, "blocks.7")
    with pytest.raises(ValueError, match=r"got 'nowhere'; there are x_embedder, t_embedder"):
        HiddenState(model, "nowhere")
    hidden = HiddenState(model, "blocks.1")
    model(*inputs())  # outside `watch`: not kept
    with pytest.raises(RuntimeError, match=r"'blocks.1' was not called inside `watch`"):
        hidden.tokens()
    for at, message in (("blocks.1[1]", "several outputs, got one"), ("t_embedder", r"\(N, C, H, W\), got \(3, 16\)")):
        hidden = HiddenState(model, at)
        with hidden.watch():
            model(*inputs())
        with pytest.raises(RuntimeError, match=message):
            hidden.tokens()


def test_conv_projector_sees_neighbours_on_the_grid():
    project = ConvProjector(6, 4, grid=(3, 5))
    tokens = torch.randn(2, 15, 6, requires_grad=True)
    out = project(tokens)
    assert out.shape == (2, 15, 4)
    (grad,) = torch.autograd.grad(out[0, 7].sum(), tokens)  # row 1, column 2
    near = {row * 5 + column for row in (0, 1, 2) for column in (1, 2, 3)}
    assert set(grad[0].abs().sum(1).nonzero().flatten().tolist()) == near
    assert projector("conv", 6, 4)(torch.randn(2, 16, 6)).shape == (2, 16, 4)
    with pytest.raises(ValueError, match="grid: expected one of 15 tokens, got 3 x 3"):
        projector("conv", 6, 4)(tokens)
    with pytest.raises(ValueError, match="projector: expected 'mlp' or 'conv', got 'cnn'"):
        projector("cnn", 6, 4)


def test_spatial_norm_matches_its_definition():
    z = torch.randn(2, 9, 5, dtype=torch.float16) + 3
    expected = z.double()
    expected = expected - 0.6 * expected.mean(1, keepdim=True)
    expected = expected / (expected.var(1, keepdim=True).sqrt() + 1e-6)
    torch.testing.assert_close(spatial_norm(z), expected.float(), rtol=1e-5, atol=1e-5)
    assert spatial_norm(torch.ones(1, 4, 2)).isfinite().all()
