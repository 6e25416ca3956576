"""The real pipelines of diffusers around tiny random models, built in code and offline; embeddings are handed in."""

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from stablevelocity.diffusers import (
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchEulerScheduler,
    StableVSUniPCMultistepScheduler,
)

STOCK = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
STABLE = {
    "euler": StableVSFlowMatchEulerScheduler,
    "dpm": StableVSDPMSolverMultistepScheduler,
    "unipc": StableVSUniPCMultistepScheduler,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {**FLOW, "use_dynamic_shifting": True}

# The schedulers as the released models configure them; multistep ones as one would configure them for the model.
CONFIGS = {
    "sd3": {"euler": {"shift": 3.0}, "dpm": {**FLOW, "flow_shift": 3.0}, "unipc": {**FLOW, "flow_shift": 3.0}},
    "flux": {"euler": {"shift": 3.0, "use_dynamic_shifting": True}, "dpm": DYNAMIC, "unipc": DYNAMIC},
    "qwen": {
        "euler": {"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
        "unipc": {**DYNAMIC, "shift_terminal": 0.02},
    },
    "wan": {"euler": {"shift": 3.0}, "dpm": {**FLOW, "flow_shift": 3.0}, "unipc": {**FLOW, "flow_shift": 3.0}},
}
CASES = [(name, kind) for name, kinds in CONFIGS.items() for kind in kinds]
ALL = [*CASES, ("img2img", "euler")]  # with the pipeline that starts from an image, which runs Euler's scheduler alone
# FluxPipeline drops the sigmas it is given where the scheduler makes flow sigmas itself.
TAKE_SIGMAS = [("sd3", "euler"), ("sd3", "unipc"), ("flux", "euler"), ("qwen", "euler"), ("qwen", "unipc")]
NO_TEXT = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])


def embeddings(seed: int, n: int, *shape: int) -> torch.Tensor:
    """(n, *shape), the same in every row."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).expand(n, *shape)


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=1,
        latent_channels=4,
        sample_size=16,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3_parts() -> dict:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    vae = small_vae()
    return {"transformer": transformer, "vae": vae, **NO_TEXT, "text_encoder_3": None, "tokenizer_3": None}


def flux_parts() -> dict:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = small_vae()
    return {"transformer": transformer, "vae": vae, **NO_TEXT}


def qwen_parts() -> dict:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {"transformer": transformer, "vae": vae, "text_encoder": None, "tokenizer": None}


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan_parts() -> dict:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformers = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    return {**transformers, "vae": vae, "text_encoder": None, "tokenizer": None, "boundary_ratio": 0.875}


def sd3_arguments(n: int, guided: bool) -> dict:
    keys = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = ((n, 5, 16), (n, 16)) * 2
    values = (embeddings(i, *shape) for i, shape in enumerate(shapes))
    return {**dict(zip(keys, values, strict=True)), "guidance_scale": 4.0 if guided else 1.0, "height": 16, "width": 16}


def img2img_arguments(n: int, guided: bool) -> dict:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(n, -1, -1, -1)
    return {**sd3_arguments(n, guided), "image": image, "strength": 0.6}


def flux_arguments(n: int, guided: bool) -> dict:
    given = sd3_arguments(n, guided)
    return {**given, "true_cfg_scale": given.pop("guidance_scale")}


def qwen_arguments(n: int, guided: bool) -> dict:
    mask = torch.ones(n, 5, dtype=torch.long)
    return {
        "prompt_embeds": embeddings(0, n, 5, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embeddings(1, n, 5, 16),
        "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 4.0 if guided else 1.0,
        "height": 16,
        "width": 16,
    }


def wan_arguments(n: int, guided: bool) -> dict:
    return {
        "prompt_embeds": embeddings(0, n, 5, 16),
        "negative_prompt_embeds": embeddings(1, n, 5, 16),
        "guidance_scale": 4.0 if guided else 1.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


@dataclass
class Tiny:
    """One pipeline and how it is called."""

    name: str
    pipe: object
    arguments: object

    def stock(self, kind: str = "euler"):
        """The library's scheduler, as this model configures it."""
        return STOCK[kind](**CONFIGS[self.name][kind])

    def stable(self, kind: str = "euler", **options):
        """Our scheduler, swapped in for it as the documentation says."""
        return STABLE[kind].from_config(self.stock(kind).config, **options)

    def __call__(self, scheduler, steps: int | None = 4, *, n: int = 1, guided: bool = False, seed=0, **more):
        """(latents, the times of the model calls) of a run with this scheduler; one generator a sample."""
        self.pipe.scheduler = scheduler
        if isinstance(seed, int):
            seed = list(range(seed, seed + n))
        generators = [torch.Generator().manual_seed(s) for s in seed]
        seen = []

        def callback(pipe, i, t, tensors):
            seen.append(float(t))
            return {}

        more = {"num_inference_steps": steps, **more} if steps is not None else more
        run = {"generator": generators, "output_type": "latent", "callback_on_step_end": callback, **more}
        return self.pipe(**{**self.arguments(n, guided), **run})[0], seen


BUILD = {
    "sd3": (StableDiffusion3Pipeline, sd3_parts, sd3_arguments),
    "flux": (FluxPipeline, flux_parts, flux_arguments),
    "qwen": (QwenImagePipeline, qwen_parts, qwen_arguments),
    "wan": (WanPipeline, wan_parts, wan_arguments),
}


def build(name: str) -> Tiny:
    """The pipeline called sd3, img2img (of sd3), flux, qwen or wan."""
    torch.manual_seed(0)
    model = "sd3" if name == "img2img" else name
    pipeline, parts, arguments = BUILD[model]
    if name == "img2img":
        pipeline, arguments = StableDiffusion3Img2ImgPipeline, img2img_arguments
    kind = "unipc" if name == "wan" else "euler"
    pipe = pipeline(scheduler=STOCK[kind](**CONFIGS[model][kind]), **parts())
    pipe.set_progress_bar_config(disable=True)
    return Tiny(model, pipe, arguments)
