"""Networks that lie elsewhere, or in another form, between their calls: the pipeline's latents and right gradients."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative
from tiny_extras import assert_same_gradients, chain_and_pipeline, controlnet, picture, pipelines, unet_like, with_parts
from tolerances import FP32
from torch import Tensor, nn

from doodl_fast.diffusion.decoder import Decoder
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.hooks import device_of
from doodl_fast.diffusion.module_copies import why_not_copied
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

SIZE: dict[str, Any] = {"guidance_scale": 3.0, "height": 64, "width": 64}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipelines(tmp_path_factory.mktemp("pipes"))["sd"]


def own_networks(base: Any) -> Any:
    """The pipeline with networks that may be changed."""
    parts = {"vae": copy.deepcopy(base.vae), "text_encoder": copy.deepcopy(base.text_encoder)}
    return with_parts("StableDiffusionPipeline", base, unet=unet_like(base).requires_grad_(False), **parts)


def fp8(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def bf16(pipe: Any) -> None:
    for network in (pipe.unet, pipe.vae):
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def group_of_leaves(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    for network in (pipe.unet, pipe.vae):
        network.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def group_of_blocks(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.unet.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def sequential(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    for network in (pipe.unet, pipe.vae):
        accelerate.cpu_offload(network, CPU)
    assert pipe.unet.device.type == "meta" and device_of(pipe.unet) == CPU


def whole_models(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def linears(network: nn.Module, make: Callable[[nn.Linear], nn.Module], multiple: int = 1) -> None:
    """Replaces the linear layers whose width is a multiple of a number."""
    for name, module in list(network.named_children()):
        if isinstance(module, nn.Linear):
            if module.in_features % multiple == 0:
                setattr(network, name, make(module).requires_grad_(False))
        else:
            linears(module, make, multiple)


def torchao_int8(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        pipe.unet, quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, _name: isinstance(module, nn.Linear) and module.in_features % 8 == 0,
    )  # fmt: skip


def bitsandbytes_nf4(pipe: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        made.load_state_dict(layer.state_dict(), strict=False)
        return made.to("cpu")  # type: ignore[no-any-return]

    linears(pipe.unet, make)


def gguf_q8(pipe: Any) -> None:
    gguf, _ = pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")

    def make(layer: nn.Linear) -> nn.Module:
        made = utils.GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(layer.weight.detach().numpy(), kind)
        made.weight, made.bias = utils.GGUFParameter(torch.from_numpy(stored), quant_type=kind), layer.bias
        return made  # type: ignore[no-any-return]

    linears(pipe.unet, make, 32)


FORMS = (fp8, bf16, group_of_leaves, group_of_blocks, sequential, whole_models, torchao_int8, bitsandbytes_nf4, gguf_q8)


def through(denoiser: Denoiser, x: Tensor) -> Tensor:
    """The gradient of one evaluation."""
    leaf = x.clone().requires_grad_()
    with denoiser.running():
        return torch.autograd.grad(denoiser(leaf, 500).square().mean(), leaf)[0]


@pytest.mark.parametrize("form", FORMS)
def test_latents_gradients_and_pictures(base: Any, form: Callable[[Any], None]) -> None:
    pipe = own_networks(base)
    form(pipe)
    if form in (fp8, torchao_int8, bitsandbytes_nf4):
        assert relative(chain_and_pipeline(pipe, SIZE)[1], chain_and_pipeline(own_networks(base), SIZE)[1]) > 1e-4
    got, expected = chain_and_pipeline(pipe, SIZE)
    assert relative(got, expected) < FP32
    cond, uncond = base.encode_prompt("a dog", "cpu", 1, True)

    def make(solver: Any) -> Any:
        return lambda memory, leaf: solver.from_pipeline(
            pipe, prompt_embeds=leaf, negative_prompt_embeds=uncond, num_inference_steps=2, memory=memory, **SIZE
        )

    chain = make(DDIM)("checkpoint", cond)
    x = chain.noise(seed=1)
    assert x.device == CPU
    assert_same_gradients(make(DDIM), [cond], ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), [cond], ["reversible"], x)
    blocks = chain.denoiser.for_blocks()
    assert blocks is not None and relative(through(blocks, x), through(chain.denoiser, x)) < FP32
    latents = x.requires_grad_()
    pictures = chain.decode(latents)
    assert torch.autograd.grad(pictures.square().mean(), latents)[0].norm() > 0
    if form is not bf16:
        assert relative(pictures, Decoder(base.vae)(latents)) < FP32


def test_layers_that_are_cast_have_the_gradient_of_their_rounded_weights(base: Any) -> None:
    """Plain autograd cannot differentiate such a network, because the weights are taken away after the call."""
    pipe, plain = own_networks(base), own_networks(base)
    fp8(pipe)
    for (name, stored), weight in zip(pipe.unet.named_parameters(), plain.unet.parameters(), strict=True):
        assert (stored.dtype == torch.float8_e4m3fn) == ("norm" not in name), name
        weight.data = stored.detach().float()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    found = {}
    for key, owner, options in (
        ("expected", plain, {"memory": "naive"}),
        ("naive", pipe, {"memory": "naive"}),
        ("checkpoint", pipe, {"memory": "checkpoint"}),
        ("wide", pipe, {"memory": "checkpoint", "vjp_dtype": torch.float64}),
    ):
        chain = DDIM.from_pipeline(owner, "a dog", num_inference_steps=2, **SIZE, **options)
        x = chain.noise(seed=1).requires_grad_()
        (end,) = chain(x)
        found[key] = (end.detach(), torch.autograd.grad(end.square().mean(), x)[0])
    for key in ("naive", "checkpoint", "wide"):
        for got, want in zip(found[key], found["expected"], strict=True):
            assert relative(got, want) < FP32, key
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name].float(), value.float()) and after[name].dtype == value.dtype
               for name, value in before.items())  # fmt: skip


def test_hooks_are_not_lost_by_copies(base: Any) -> None:
    pipe = own_networks(base)
    assert why_not_copied(pipe.unet) is None
    pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    assert why_not_copied(pipe.unet) == "Conv2d 'conv_in' has hooks of diffusers ('group_offloading')"


def test_a_controlnet_is_cast_too(base: Any) -> None:
    control = controlnet(base.unet)
    control.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe = with_parts("StableDiffusionControlNetPipeline", base, controlnet=control)
    got, expected = chain_and_pipeline(pipe, {"image": picture(), **SIZE})
    assert relative(got, expected) < FP32

    def make(memory: Any, hint: Any) -> Any:
        return DDIM.from_pipeline(pipe, "a dog", num_inference_steps=2, memory=memory, image=hint, **SIZE)

    assert_same_gradients(make, [picture()], ["checkpoint"], make("checkpoint", picture()).noise(seed=1))


def test_where_a_network_computes() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    assert device_of(network) == CPU
    vars(network[0])["_hf_hook"] = SimpleNamespace(hooks=[SimpleNamespace(execution_device="meta")])
    assert device_of(network) == torch.device("meta"), "accelerate's hooks come first"


def test_a_transformer_whose_weights_lie_elsewhere(tmp_path: Any) -> None:
    pipe = tiny_families.stable_diffusion_3(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "max_sequence_length": 8, "guidance_scale": 3.0}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe("a dog", latents=x, output_type="latent", height=16, width=16, **options).images
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, CPU)
    chain = Sampler.from_pipeline(pipe, "a dog", memory="checkpoint", height=16, width=16, **options)
    assert pipe.transformer.device.type == "meta" and chain.noise().device == CPU
    leaf = x.requires_grad_()
    (end,) = chain(leaf)
    assert relative(end, expected) < FP32
    assert torch.autograd.grad(end.square().mean(), leaf)[0].norm() > 0


def test_quantised_weights_are_not_cast(base: Any) -> None:
    pipe = own_networks(base)
    torchao_int8(pipe)
    chain = DDIM.from_pipeline(pipe, "a dog", num_inference_steps=2, vjp_dtype=torch.float64, **SIZE)
    with pytest.raises(ValueError, match=r"^vjp_dtype: .* because its weight '.*' of type Int8Tensor cannot be cast"):
        chain(chain.noise().requires_grad_())[0].sum().backward()


def test_caches_between_calls_are_refused(tmp_path: Any) -> None:
    pipe = tiny_families.stable_diffusion_3(tmp_path)
    diffusers.hooks.apply_first_block_cache(pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.2))
    denoiser = Denoiser(pipe.transformer, torch.zeros(1, 8, 32), pooled_projections=torch.zeros(1, 32))
    with (
        pytest.raises(
            ValueError, match=r"^unet: .* has the hook 'fbc_\w+', by which its output depends on earlier calls"
        ),
        denoiser.running(),
    ):
        pass


@pytest.mark.parametrize("names", [("tiling",), ("slicing",), ("tiling", "slicing")])
def test_a_vae_in_tiles_and_slices(base: Any, names: tuple[str, ...]) -> None:
    """They change the picture a little (tiles) or not (slices); the decoder is differentiated as it is."""
    vae = copy.deepcopy(base.vae)
    for name in names:
        getattr(vae, f"enable_{name}")()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 32
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for decode in (Decoder(vae), lambda z: vae.decode(z / vae.config.scaling_factor).sample):
        z = latents.clone().requires_grad_()
        images = decode(z)
        found.append((images, torch.autograd.grad((images * torch.linspace(0, 1, 64)).sum(), z)[0]))
    for got, want in zip(*found, strict=True):
        assert want.norm() > 0 and relative(got, want) < FP32
    whole = Decoder(base.vae)(latents)
    assert (relative(found[0][0], whole) > 1e-3) == ("tiling" in names)
    leaner = Decoder(vae).leaner()
    assert leaner is not None and relative(leaner(latents), found[0][0]) < FP32
