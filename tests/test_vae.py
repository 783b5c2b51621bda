"""vae.py: parity with diffusers both ways, big pictures in parts, measures, a short training, the cache, every error.

Stable Diffusion's VAE in full size (335 MB) decodes a latent of 32×32, one picture of 256×256, which takes half a
minute; it is left out and runs with: pytest -m slow tests/test_vae.py
"""
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as Reference
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from sdcourse import training, vae
from sdcourse.data import INKS, Scenes
from sdcourse.images import to_pictures
from sdcourse.metrics import read_scenes
from sdcourse.model import find_pretrained, read_manifest, sha256
from sdcourse.vae import (VAE, AutoencoderKL, Decoded, DiagonalGaussian, Encoded, PaddedDownsample, PictureAttention,
                          cache_latents, psnr, scale_of, ssim, train_vae, vae_loss)


def levels(*channels, **more):
    "A configuration with so many channels on each level"
    return dict(block_out_channels=channels, down_block_types=('DownEncoderBlock2D',)*len(channels),
                up_block_types=('UpDecoderBlock2D',)*len(channels), **{'norm_num_groups': 2, **more})


CONFIGS = {
    'one level': levels(8),
    'two levels': levels(8, 16, layers_per_block=2, norm_num_groups=4),
    'three levels': levels(12, 8, 24, in_channels=1, out_channels=2, latent_channels=3),
    'four levels': levels(8, 12, 12, 16, sample_size=64),
    'no 1×1': levels(8, 16, use_quant_conv=False, use_post_quant_conv=False, latent_channels=16),
    'one 1×1': levels(8, 8, use_quant_conv=False, norm_num_groups=1),
    'the other 1×1': levels(8, 8, use_post_quant_conv=False),
}
TINY = levels(4, 4, 4, 8, sample_size=64)
# the published vae/config.json of Stable Diffusion 1.5 and 2.1
SD15 = dict(
    _class_name='AutoencoderKL', _diffusers_version='0.6.0', act_fn='silu', block_out_channels=[128, 256, 512, 512],
    down_block_types=['DownEncoderBlock2D']*4, in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32,
    out_channels=3, sample_size=512, up_block_types=['UpDecoderBlock2D']*4)
SD21 = dict(SD15, _diffusers_version='0.10.0.dev0', sample_size=768)
every = pytest.mark.parametrize('name', CONFIGS)


def generator(seed=0, device='cpu'): return torch.Generator(device).manual_seed(seed)


def shapes(model): return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def build(kind, config, seed=0):
    "A model with random weights that depend on the seed alone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**config).eval()


def pair(config, dtype=torch.float32):
    "Ours and theirs with the same weights"
    theirs, ours = build(Reference, config), AutoencoderKL(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype=dtype), theirs.to(dtype=dtype)


def pictures(config=TINY, n=2, size=(32, 48), seed=1):
    return torch.rand(n, config.get('in_channels', 3), *size, generator=generator(seed))*2 - 1


def latents(config=TINY, n=2, size=(4, 6), seed=1):
    return torch.randn(n, config.get('latent_channels', 4), *size, generator=generator(seed))


def near(a, b, most=1e-5):
    "Whether the largest difference is small"
    assert a.shape == b.shape and a.dtype == b.dtype
    apart = (a - b).abs().max().item()
    assert apart <= most


@torch.no_grad()
def alike(ours, theirs, x, z, most=1e-5):
    "Whether both make the same moments of pictures, and the same pictures of latents"
    mine, its = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    near(torch.cat([mine.mean, mine.logvar], 1), its.parameters, most)
    near(ours.decode(z).sample, theirs.decode(z).sample, most)


@pytest.fixture(scope='module')
def tiny(): return build(AutoencoderKL, TINY)


@pytest.fixture(scope='module')
def scenes(): return Scenes('test', 10)


# parity with diffusers

@every
def test_names_and_shapes(name):
    ours, theirs = build(AutoencoderKL, CONFIGS[name]), build(Reference, CONFIGS[name])
    assert shapes(ours) == shapes(theirs)


@every
@pytest.mark.parametrize('size', [(16, 16), (32, 8), (24, 40)])
@torch.no_grad()
def test_answers(name, size, device):
    config = CONFIGS[name]
    ours, theirs = (model.to(device) for model in pair(config))
    x, z = pictures(config, size=size).to(device), latents(config).to(device)
    alike(ours, theirs, x, z)
    mine, its = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    near(mine.std, its.std)
    near(mine.mode(), its.mode())
    near(mine.sample(generator(3)), its.sample(generator(3)))
    near(mine.kl(), its.kl(), 1e-3)


@every
@torch.no_grad()
def test_there_and_back(name):
    "In float64: what is rounded on the way to the latent grows on the way back"
    (ours, theirs), x = pair(CONFIGS[name], torch.float64), pictures(CONFIGS[name]).double()
    near(ours(x).sample, theirs(x).sample, 1e-10)
    near(ours(x, True, generator=generator(5)).sample, theirs(x, True, generator=generator(5)).sample, 1e-10)
    near(ours(x).moments, theirs.encode(x).latent_dist.parameters, 1e-10)


@torch.no_grad()
def test_hosts_call_it_as_they_call_theirs(tiny):
    _, theirs = pair(TINY)
    theirs.load_state_dict(tiny.state_dict())
    x, z = pictures(), latents()
    near(tiny.encode(x, return_dict=False)[0].mode(), theirs.encode(x, return_dict=False)[0].mode())
    near(tiny.decode(z, return_dict=False, generator=None)[0], theirs.decode(z, return_dict=False, generator=None)[0])
    assert isinstance(tiny.encode(x), Encoded) and isinstance(tiny.decode(z), Decoded)
    assert tiny.decode(z).moments is None and tiny.factor == 8


@every
@torch.no_grad()
def test_what_diffusers_saves_we_load(name, tmp_path):
    theirs = build(Reference, {**CONFIGS[name], 'scaling_factor': .7})
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    assert not ours.training and ours.config.scaling_factor == .7
    assert set(theirs.config) - set(ours.config) <= {k for k in theirs.config if k.startswith('_')}
    alike(ours, theirs, pictures(CONFIGS[name]), latents(CONFIGS[name]))


@every
@torch.no_grad()
def test_what_we_save_diffusers_loads(name, tmp_path):
    config = {**CONFIGS[name], 'scaling_factor': .7}
    ours = build(AutoencoderKL, config)
    ours.save_pretrained(tmp_path)
    theirs, report = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for key, value in ours.config.items():
        kept = theirs.config[key]
        assert (tuple(kept) if isinstance(kept, list) else kept) == value, key
    alike(ours, theirs.eval(), pictures(config), latents(config))
    theirs.save_pretrained(tmp_path/'again')
    assert AutoencoderKL.from_pretrained(tmp_path/'again').config == ours.config


OLD = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}


def aged(weights):
    "The names that the published files of Stable Diffusion 1 have"
    for new, old in OLD.items(): weights = {k.replace(f'.{new}.', f'.{old}.'): v for k, v in weights.items()}
    return weights


@torch.no_grad()
def test_old_names_of_the_attention(tmp_path):
    theirs = build(Reference, TINY)
    theirs.save_pretrained(tmp_path)
    path = tmp_path/AutoencoderKL.weights_name
    weights = load_file(path)
    save_file(aged(weights), path, metadata={'format': 'pt'})
    assert sum('.proj_attn.' in k for k in load_file(path)) == 4
    ours, again = AutoencoderKL.from_pretrained(tmp_path), Reference.from_pretrained(tmp_path)
    for other in (again, theirs): alike(ours, other, pictures(), latents())
    ours.save_pretrained(tmp_path/'new')
    assert load_file(tmp_path/'new'/AutoencoderKL.weights_name).keys() == weights.keys()


def test_new_names_stay():
    weights = build(AutoencoderKL, TINY).state_dict()
    for names in (weights, aged(weights)):
        found = AutoencoderKL.modernize(names)
        assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)


@pytest.mark.parametrize('config', [SD15, SD21], ids=['1.5', '2.1'])
def test_stable_diffusion_has_the_same_weights(config):
    with torch.device('meta'): ours, theirs = AutoencoderKL.from_config(config), Reference.from_config(config)
    assert shapes(ours) == shapes(theirs) and len(shapes(ours)) == 248
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert ours.config.scaling_factor == .18215 and ours.factor == 8


@pytest.mark.slow
@torch.no_grad()
def test_stable_diffusion_in_full_size():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = Reference.from_config(SD15).eval()
    with torch.device('meta'): ours = AutoencoderKL.from_config(SD15).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # the same memory
    z = latents(n=1, size=(32, 32))
    found, expected = ours.decode(z).sample, theirs.decode(z).sample
    assert found.shape == (1, 3, 256, 256) and (found - expected).norm() <= 1e-4*expected.norm()


def test_a_whole_reference_config_is_read():
    theirs = build(Reference, TINY)
    assert shapes(AutoencoderKL.from_config(theirs.config)) == shapes(theirs)


# big pictures, and many

@torch.no_grad()
def test_slicing(tiny):
    x, z = pictures(n=3), latents(n=3)
    whole = tiny.encode(x).latent_dist.mean, tiny.decode(z).sample, tiny(x).sample
    model, sizes = build(AutoencoderKL, TINY), []
    model.enable_slicing()
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda part, args: sizes.append(len(args[0])))
    for a, b in zip((model.encode(x).latent_dist.mean, model.decode(z).sample), whole): near(a, b)
    assert sizes == [1]*6
    near(model(x).sample, whole[2], 1e-4)
    model.enable_slicing(False)
    model.decode(z)
    assert sizes[-1] == 3


@pytest.mark.parametrize('config', [TINY, levels(4, 6, sample_size=16), levels(4, sample_size=32)], ids=[4, 2, 1])
@pytest.mark.parametrize('tiles', [(2.5, 2), (1, 2), (3, .5), (1.5, 1.25)], ids=str)
@torch.no_grad()
def test_tiles_are_the_references(config, tiles):
    ours, theirs = pair(config, torch.float64)
    side = [int(config['sample_size']*t) for t in tiles]
    x, z = pictures(config, 2, side).double(), latents(config, 2, [s//ours.factor for s in side]).double()
    for model in (ours, theirs): model.enable_tiling()
    alike(ours, theirs, x, z, 1e-10)
    near(ours(x).sample, theirs(x).sample, 1e-10)


@torch.no_grad()
def test_one_tile_is_the_whole_picture(tiny):
    model = build(AutoencoderKL, TINY)
    model.enable_tiling()
    assert torch.equal(model.decode(latents(size=(8, 8))).sample, tiny.decode(latents(size=(8, 8))).sample)
    z = latents(size=(20, 8))
    tiled = model.decode(z).sample
    model.enable_tiling(False)
    assert torch.equal(model.decode(z).sample, tiny.decode(z).sample) and not torch.equal(tiled, tiny.decode(z).sample)


@torch.no_grad()
def largest(model, call):
    "The numbers in the largest tensor that any layer returns"
    sizes, hooks = [], []
    for layer in model.modules():
        if not [*layer.children()]:
            hooks.append(layer.register_forward_hook(lambda layer, args, output: sizes.append(output.numel())))
    call()
    for hook in hooks: hook.remove()
    return max(sizes)


@pytest.mark.parametrize('side', [128, 256])
def test_tiles_and_slices_need_less_memory(side):
    model, x = build(AutoencoderKL, TINY), pictures(n=2, size=(side, side))
    z = latents(n=2, size=(side//8, side//8))
    for call in (lambda: model.encode(x), lambda: model.decode(z)):
        whole = largest(model, call)
        model.enable_slicing()
        assert largest(model, call) == whole/2
        model.enable_tiling()
        assert largest(model, call) == whole/2*(64/side)**2, 'what a tile needs, however large the picture is'
        model.enable_tiling(False)
        model.enable_slicing(False)


# parts

@pytest.mark.parametrize('config, named', [
    (dict(norm_num_groups=0), 'norm_num_groups must .*got 0'),
    (dict(latent_channels=0), 'latent_channels must .*got 0'),
    (dict(block_out_channels=()), r'block_out_channels must .*not \(\)'),
    (dict(block_out_channels=64), 'block_out_channels must .*not 64'),
    (dict(block_out_channels=(0,)), r'block_out_channels\[0\] must .*got 0'),
    (dict(layers_per_block='two'), "layers_per_block must .*got 'two'")], ids=str)
def test_no_vae(config, named):
    with pytest.raises(ValueError, match=named): AutoencoderKL(**{**TINY, **config})


@pytest.mark.parametrize('side', [8, 24, 48])
def test_tiles_overlap_by_whole_latents(side):
    "A quarter of a tile: of these tiles the pieces would make a picture of another size (in diffusers they do)"
    model = build(AutoencoderKL, {**TINY, 'sample_size': side})
    with pytest.raises(ValueError, match=f'sample_size must be a multiple of 32, not {side}'): model.enable_tiling()
    assert not model.use_tiling


@torch.no_grad()
def test_slices_on_the_way_there_and_back(monkeypatch):
    model, x, seen = build(AutoencoderKL, TINY).double(), pictures(n=3).double(), []
    whole, moments = model(x).sample, model._moments
    model.enable_slicing()
    monkeypatch.setattr(type(model), '_moments', lambda self, x: seen.append(len(x)) or moments(x))
    near(model(x).sample, whole, 1e-10)
    model.disable_slicing()
    near(model(x).sample, whole, 1e-10)
    assert seen == [1, 1, 1, 3]


def test_ssim_in_other_types_and_sizes():
    a, b = pictures(n=2, size=(16, 16)), pictures(n=2, size=(16, 16)).flip(0)
    torch.testing.assert_close(vae.ssim(a.double(), b.double()), vae.ssim(a, b).double(), rtol=1e-4, atol=1e-4)
    for wrong in ((a.half(), b.half()), (a[..., :10], b[..., :10]), (a, b[:1]), (a[0], b[0])):
        with pytest.raises(ValueError, match='float32 or float64.*at least 11, not'): vae.ssim(*wrong)


def test_the_scale_needs_no_gradients():
    model = build(AutoencoderKL, TINY)
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    assert vae.scale_of(model, pictures(n=2)) > 0 and seen == [False]


def test_the_encoder_pads_at_the_far_sides():
    layer = PaddedDownsample(1)
    layer.load_state_dict({'conv.weight': torch.ones(1, 1, 3, 3), 'conv.bias': torch.zeros(1)})
    x = torch.arange(16.).view(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [x[0, 0, :3, :3].sum(), x[0, 0, :3, 2:].sum(), x[0, 0, 2:, :3].sum(),
                                           x[0, 0, 2:, 2:].sum()]


def test_attention_does_not_know_places():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x, order = PictureAttention(8, 2), torch.randn(1, 8, 3, 4), torch.randperm(12)
    mixed = layer(x.flatten(2)[..., order].view_as(x)).flatten(2)
    torch.testing.assert_close(mixed, layer(x).flatten(2)[..., order])


@torch.no_grad()
def test_pictures_of_a_batch_do_not_meet():
    model, x, z = build(AutoencoderKL, TINY).double(), pictures(n=3).double(), latents(n=3).double()
    near(torch.cat([model(x[i:i + 1]).sample for i in range(3)]), model(x).sample, 1e-10)
    near(model.decode(z).sample.flip(0), model.decode(z.flip(0)).sample, 1e-10)


def test_gradients_reach_every_weight():
    model = build(AutoencoderKL, TINY)
    x = pictures()
    vae_loss(model(x, True, True, generator()), x).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        if not key.endswith('to_k.bias'): assert p.grad.abs().sum() > 0, key  # softmax does not see that one


@torch.no_grad()
def test_other_precision(tmp_path):
    model = build(AutoencoderKL, TINY)
    folder = model.save_pretrained(tmp_path/'half', dtype=torch.float16)
    assert {v.dtype for v in load_file(folder/AutoencoderKL.weights_name).values()} == {torch.float16}
    assert AutoencoderKL.from_pretrained(folder).dtype == torch.float32
    x = pictures()
    rounded = AutoencoderKL.from_pretrained(folder)(x).sample
    assert (rounded - model(x).sample).abs().max() < 1e-2
    for dtype in (torch.bfloat16, torch.float64):
        found = AutoencoderKL.from_pretrained(folder, dtype=dtype)(x.to(dtype)).sample
        assert found.dtype == dtype and (found.float() - rounded).norm() < .1*rounded.norm()
    with torch.autocast('cpu', torch.bfloat16): found = model(x).sample
    assert (found.float() - model(x).sample).norm() < .1*rounded.norm()


# the distribution

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.floats(.1, 60))
def test_gaussian(seed, b, z, side, spread):
    moments = torch.randn(b, 2*z, side, 2, generator=generator(seed))*spread
    kept = moments.clone()
    ours, theirs = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    assert torch.equal(ours.mode(), moments[:, :z]) and ours.logvar.min() >= -30 and ours.logvar.max() <= 20
    for name in ('mean', 'logvar', 'std', 'var'): assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.sample(generator(seed)), theirs.sample(generator(seed)))
    exact = kl_divergence(Normal(ours.mean.double(), (ours.logvar.double()/2).exp()), Normal(0, 1)).flatten(1).sum(1)
    assert ours.kl().shape == (b,)
    torch.testing.assert_close(ours.kl().double(), exact, rtol=1e-4, atol=1e-4)
    assert (ours.kl() >= -1e-4).all() and torch.equal(moments, kept)


def test_gaussian_by_hand():
    standard = DiagonalGaussian(torch.zeros(2, 4, 3, 3))
    assert standard.kl().tolist() == [0, 0]
    shifted = DiagonalGaussian(torch.cat([torch.full((1, 1, 1, 1), 2.), torch.full((1, 1, 1, 1), math.log(4))], 1))
    assert shifted.kl().item() == pytest.approx((4 + 4 - 1 - math.log(4))/2)
    many = DiagonalGaussian(torch.cat([torch.full((1, 1, 300, 300), 2.), torch.full((1, 1, 300, 300), math.log(4))], 1))
    z = many.sample(generator())
    assert z.mean().item() == pytest.approx(2, abs=.03) and z.std().item() == pytest.approx(2, abs=.03)


def test_gradient_passes_through_a_sample():
    moments = torch.randn(1, 4, 2, 2, generator=generator()).requires_grad_()
    dist = DiagonalGaussian(moments)
    z = dist.sample(generator(1))
    z.sum().backward()
    assert torch.equal(moments.grad[:, :2], torch.ones(1, 2, 2, 2))
    torch.testing.assert_close(moments.grad[:, 2:], (z - dist.mean).detach()/2)  # d(std·eps)/d logvar


def test_samples_without_a_generator_are_torchs():
    dist = DiagonalGaussian(torch.zeros(1, 2, 2, 2))
    torch.manual_seed(4)
    a = dist.sample()
    torch.manual_seed(4)
    assert torch.equal(a, dist.sample()) and not torch.equal(a, dist.sample())


def test_loss_by_hand():
    x, moments = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 1, 1)
    assert vae_loss((x, moments), x).item() == 0
    assert vae_loss((x + .5, moments), x).item() == pytest.approx(.25)
    moments[:, :4] = 2                                                    # four means of 2: 2 nats each
    assert vae_loss((x, moments), x, 1.).item() == pytest.approx(2)
    assert vae_loss((x, moments), x, .01).item() == pytest.approx(.02)


@torch.no_grad()
def test_scale(scenes):
    model, x = build(AutoencoderKL, TINY), scenes.batch(range(10))[0]
    scale = scale_of(model, x)
    latent = model.encode(x).latent_dist.sample(generator())
    assert (scale*latent).std().item() == pytest.approx(1, abs=1e-5) and type(scale) is float
    assert scale_of(model, x) == scale


# how alike two pictures are

def test_psnr_by_hand():
    a = torch.zeros(3, 1, 4, 4)
    assert psnr(a, a + torch.tensor([.2, .02, 2.])[:, None, None, None]).tolist() == pytest.approx([20, 40, 0])
    assert psnr(torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), .9)).item() == pytest.approx(10*math.log10(400))
    assert psnr(a, a).tolist() == [math.inf]*3


def naive_ssim(a, b):
    "Window by window, as the paper says it"
    offsets = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-(offsets[:, None]**2 + offsets**2)/4.5)
    bell, found = bell/bell.sum(), []
    for c in range(a.shape[0]):
        for i in range(a.shape[1] - 10):
            for j in range(a.shape[2] - 10):
                u, v = (t[c, i:i + 11, j:j + 11].double() + 1 for t in (a, b))  # from 0 to 2
                mu, mv = (bell*u).sum(), (bell*v).sum()
                su, sv, suv = (bell*(u - mu)**2).sum(), (bell*(v - mv)**2).sum(), (bell*(u - mu)*(v - mv)).sum()
                found.append((2*mu*mv + .0004)*(2*suv + .0036)/((mu**2 + mv**2 + .0004)*(su + sv + .0036)))
    return torch.stack(found).mean().item()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([1, 3]), st.integers(11, 15), st.integers(11, 15), st.floats(.01, 1))
def test_measures_equal_naive_ones(seed, c, h, w, noise):
    a = torch.rand(2, c, h, w, generator=generator(seed))*2 - 1
    b = (a + noise*torch.randn(a.shape, generator=generator(seed + 1))).clamp(-1, 1)
    for i in range(2):
        assert ssim(a, b)[i].item() == pytest.approx(naive_ssim(a[i], b[i]), abs=1e-4)
        mse = sum((x - y)**2 for x, y in zip(a[i].flatten().tolist(), b[i].flatten().tolist()))/a[i].numel()
        assert psnr(a, b)[i].item() == pytest.approx(10*math.log10(4/mse), abs=1e-3)
    for measure in (ssim, psnr): torch.testing.assert_close(measure(a, b), measure(b, a), rtol=1e-4, atol=1e-5)
    assert ssim(a, b).abs().max() <= 1.0001 and ssim(a, b).shape == (2,)
    torch.testing.assert_close(ssim(a, a), torch.ones(2), rtol=0, atol=1e-5)


def test_measures_know_worse_from_bad(scenes):
    x = scenes.batch(range(10))[0]
    blurred = F.avg_pool2d(x, 3, 1, 1)
    worse = F.avg_pool2d(x, 7, 1, 3)
    for measure in (ssim, psnr): assert (measure(blurred, x) > measure(worse, x)).all()
    assert ssim(torch.rand(1, 3, 64, 64)*2 - 1, torch.rand(1, 3, 64, 64)*2 - 1).abs() < .1
    assert ssim(-x, x).max() < ssim(worse, x).min()


# training

def fit(folder, **words):
    return train_vae(folder, **dict(epochs=2, n=64, bs=8, device='cpu', progress=False, **TINY) | words)


@pytest.fixture(scope='module')
def quick():
    "Validation with few scenes"
    real = vae.scene_dataloaders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, 'scene_dataloaders', lambda *args, **words: real(*args, valid=64, **words))
        yield


@pytest.fixture(scope='module')
def trained(quick, tmp_path_factory):
    "Where a training of two epochs was saved, and its manifest"
    folder = tmp_path_factory.mktemp('trained')/'deep'/'vae'
    return folder, fit(folder)


def test_manifest(trained):
    folder, manifest = trained
    assert read_manifest(folder) == json.loads(json.dumps(manifest))
    facts = dict(seed=0, epochs=2, steps=16, batch=8, dtype='float32', device='cpu', kl_weight=2e-4, lr=1e-3)
    assert {k: manifest[k] for k in facts} == facts
    assert [row['epoch'] for row in manifest['losses']] == [0, 1]
    assert manifest['losses'][1]['valid'] < manifest['losses'][0]['valid'] < 2, 'it learns'
    assert manifest['seconds'] == manifest['losses'][-1]['seconds'] > manifest['losses'][0]['seconds'] > 0
    assert manifest['files'] == {AutoencoderKL.weights_name: sha256(folder/AutoencoderKL.weights_name)}


@torch.no_grad()
def test_files(trained):
    folder, manifest = trained
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', AutoencoderKL.weights_name, 'manifest.json']
    assert {v.dtype for v in load_file(folder/AutoencoderKL.weights_name).values()} == {torch.float16}
    model = AutoencoderKL.from_pretrained(folder)
    assert {k: v for k, v in model.config.items() if k in TINY} == TINY
    x = Scenes('train', 1000, seed=5).batch(range(200))[0]
    latent = model.encode(x).latent_dist.sample(generator())*model.config.scaling_factor
    assert latent.std().item() == pytest.approx(1, abs=.1)
    test = Scenes('test', 1000).batch(range(1000))[0]
    back = torch.cat([model(part).sample for part in test.split(100)])
    assert psnr(back, test).mean().item() == pytest.approx(manifest['psnr'], abs=.01)


@torch.no_grad()
def test_diffusers_reads_what_was_trained(trained):
    folder, _ = trained
    ours, theirs = AutoencoderKL.from_pretrained(folder), Reference.from_pretrained(folder, torch_dtype=torch.float32)
    near(ours.decode(latents()).sample, theirs.eval().decode(latents()).sample)
    assert ours.config.scaling_factor == theirs.config.scaling_factor


class Stop(Exception):
    "Somebody pulls the plug"


def stopped(folder, monkeypatch, **words):
    "A training that ends in the middle of its second epoch"
    from fastai.callback.core import Callback

    def stop(self):
        if self.training and self.epoch == 1 and self.iter == 3: raise Stop('no power')
    real = training.fit
    def fails(*args, cbs, **more): return real(*args, cbs=[*cbs, Callback(before_batch=stop)], **more)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training, 'fit', fails)
        fit(folder, **words)


def test_goes_on(trained, tmp_path, monkeypatch):
    "Cut off in the second epoch and started again, a training ends with the same weights, to the last bit"
    folder, manifest = trained
    torch.manual_seed(99)                                                 # whatever else was drawn before
    stopped(tmp_path, monkeypatch)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']
    torch.manual_seed(98)
    again = fit(tmp_path)
    assert again['files'] == manifest['files'] and again['psnr'] == manifest['psnr']
    assert [(row['train'], row['valid']) for row in again['losses']] == [
        (row['train'], row['valid']) for row in manifest['losses']]
    assert not (tmp_path/'checkpoint.pt').exists()


def test_checkpoint_of_another_training(quick, tmp_path, monkeypatch):
    stopped(tmp_path, monkeypatch)
    kept = (tmp_path/'checkpoint.pt').read_bytes()
    for other in (dict(seed=1), dict(bs=16), dict(epochs=3), dict(lr=1e-4), dict(kl_weight=1e-3), dict(n=128),
                  dict(dtype=torch.bfloat16), dict(latent_channels=3), dict(scaling_factor=.5)):
        with pytest.raises(ValueError, match='another training'): fit(tmp_path, **other)
    assert (tmp_path/'checkpoint.pt').read_bytes() == kept
    (tmp_path/'checkpoint.pt').write_bytes(kept[:1000])
    with pytest.raises(ValueError, match='damaged'): fit(tmp_path)


def test_seed_decides(quick, monkeypatch, tmp_path):
    "The same seed starts with the same weights, whatever was drawn before"
    seen = []
    def look(learn, *args, **words):
        seen.append([p.detach().clone() for p in learn.model.parameters()])
        raise Stop
    monkeypatch.setattr(training, 'fit', look)
    for seed in (3, 3, 4):
        with pytest.raises(Stop): fit(tmp_path, seed=seed)
    a, b, c = (torch.cat([p.flatten() for p in weights]) for weights in seen)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_trains_on(quick, tmp_path, device, dtype, monkeypatch):
    monkeypatch.setattr(vae, 'save_vae', lambda model, output, **facts: facts | dict(model=model))
    facts = fit(tmp_path, epochs=1, device=device, dtype=dtype)
    assert facts['device'] == device and facts['dtype'] == str(dtype).removeprefix('torch.')
    assert math.isfinite(facts['losses'][0]['valid']) and facts['model'].dtype == torch.float32


def test_file_for_a_folder(tmp_path):
    (tmp_path/'file').write_text('mine')
    for output in (tmp_path/'file', tmp_path/'file'/'deeper'):
        with pytest.raises(ValueError, match='cannot write .*file'): fit(output)
    assert (tmp_path/'file').read_text() == 'mine'


WRONG_TRAINING = {
    'no epochs': (dict(epochs=0), 'epochs.*0'),
    'half an epoch': (dict(epochs=1.5), 'epochs.*1.5'),
    'no batch': (dict(bs=0), 'bs.*0'),
    'too large a batch': (dict(bs=65), 'bs.*65'),
    'half precision': (dict(dtype=torch.float16), 'float16'),
    'no rate': (dict(lr=0), 'lr.*0'),
    'no number': (dict(lr=math.nan), 'lr.*nan'),
    'groups': (dict(norm_num_groups=3), 'norm_num_groups, 3, must divide'),
    'no weight': (dict(kl_weight=math.nan), 'kl_weight.*nan'),
    'a negative weight': (dict(kl_weight=-1e-3), 'kl_weight.*-0.001'),
    'a word for a weight': (dict(kl_weight='a'), "kl_weight.*'a'"),
    'a negative seed': (dict(seed=-1), 'seed.*-1'),
    'a word for a seed': (dict(seed='lucky'), "seed.*'lucky'"),
    'no scenes': (dict(n=0), 'n must.*0'),
    'a word for a device': (dict(device='lucky'), "device 'lucky' cannot be used here"),
}


@pytest.mark.parametrize('name', WRONG_TRAINING)
def test_wrong_training(quick, tmp_path, name):
    words, named = WRONG_TRAINING[name]
    with pytest.raises(ValueError, match=named): fit(tmp_path, **words)
    assert not list(tmp_path.iterdir())


# the cache

@pytest.mark.parametrize('name, bs, named', [('a.safetensors', 0, 'bs must .*got 0'), ('a.pt', 4, "not 'a.pt'")])
def test_no_such_cache(tiny, scenes, tmp_path, name, bs, named):
    with pytest.raises(ValueError, match=named): cache_latents(tiny, scenes, tmp_path/name, bs=bs)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_cache(tiny, scenes, tmp_path, monkeypatch):
    path = tmp_path/'latents.safetensors'
    moments = cache_latents(tiny, scenes, path, bs=4)
    assert moments.shape == (10, 8, 8, 8) and moments.dtype == torch.float16
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    dist, afresh = tiny.encode(scenes.batch(range(10))[0]).latent_dist, DiagonalGaussian(moments.float())
    for name in ('mean', 'logvar'): near(getattr(afresh, name), getattr(dist, name), 2e-3)
    monkeypatch.setattr(AutoencoderKL, 'encode', lambda *args: pytest.fail('it is there already'))
    written = path.read_bytes()
    assert torch.equal(cache_latents(tiny, scenes, path), moments)
    assert torch.equal(cache_latents(build(AutoencoderKL, TINY), Scenes('test', 10), str(path)), moments)
    assert path.read_bytes() == written


def changed(model):
    "One number of the weights is a little larger"
    with torch.no_grad(): model.decoder.conv_out.bias[0] += 1e-6
    return model


OTHERS = {
    'another bit': lambda: changed(build(AutoencoderKL, TINY)),
    'other weights': lambda: build(AutoencoderKL, TINY, seed=1),
    'another type': lambda: build(AutoencoderKL, TINY).double(),
    'other groups': lambda: build(AutoencoderKL, TINY | dict(norm_num_groups=4)),  # weights of equal shapes
}


@pytest.mark.parametrize('name', OTHERS)
def test_cache_of_another_vae(tiny, scenes, tmp_path, name):
    path = tmp_path/'latents.safetensors'
    cache_latents(tiny, scenes, path)
    written = path.read_bytes()
    with pytest.raises(ValueError, match='safetensors was made with another (vae|config), remove it, or name another'):
        cache_latents(OTHERS[name](), scenes, path)
    assert path.read_bytes() == written


@pytest.mark.parametrize('other', [Scenes('test', 11), Scenes('test', 10, seed=1), Scenes('train', 10)], ids=repr)
def test_cache_of_other_scenes(tiny, scenes, tmp_path, other):
    path = tmp_path/'latents.safetensors'
    cache_latents(tiny, scenes, path)
    with pytest.raises(ValueError, match=r"made with another scenes.*Scenes\('test', n=10, seed=0\), and not"):
        cache_latents(tiny, other, path)


@pytest.mark.parametrize('damage', [lambda data: b'', lambda data: data[:-100], lambda data: data[:20],
                                    lambda data: b'no latents at all'])
def test_damaged_cache(tiny, scenes, tmp_path, damage):
    path = tmp_path/'latents.safetensors'
    cache_latents(tiny, scenes, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match='latents.safetensors is no cache of latents, remove it'):
        cache_latents(tiny, scenes, path)


def test_no_cache_at_all(tiny, scenes, tmp_path):
    save_file({'weights': torch.zeros(2)}, tmp_path/'a.safetensors')
    save_file({'moments': torch.zeros(2)}, tmp_path/'b.safetensors')
    for name in ('a', 'b'):
        with pytest.raises(ValueError, match=f'{name}.safetensors .*remove it'):
            cache_latents(tiny, scenes, tmp_path/f'{name}.safetensors')
    with pytest.raises(ValueError, match='must end in .safetensors, not'): cache_latents(tiny, scenes, tmp_path)
    with pytest.raises(ValueError, match='there is no folder .*nowhere'):
        cache_latents(tiny, scenes, tmp_path/'nowhere'/'a.safetensors')


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left on device')], ids=repr)
def test_interrupted_cache(tiny, scenes, tmp_path, monkeypatch, error):
    "While encoding, and while writing: nothing is left behind"
    path = tmp_path/'latents.safetensors'
    def half(tensors, file, **words):
        file.write_bytes(b'half')
        raise error
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, ValueError)):
        patch.setattr(vae, 'save_file', half)
        cache_latents(tiny, scenes, path)
    assert not list(tmp_path.iterdir())
    real, calls = AutoencoderKL.encode, []
    def late(self, x):
        calls.append(x)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(self, x)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AutoencoderKL, 'encode', late)
        cache_latents(tiny, scenes, path, bs=4)
    assert not list(tmp_path.iterdir()) and len(cache_latents(tiny, scenes, path)) == 10


# bad input

X, Z = torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 2, 2)
spoiled_x, spoiled_z, endless_z = X.clone(), Z.clone(), Z.clone()
spoiled_x[0, 1, 2, 3], spoiled_z[0, 1, 1, 1], endless_z[0, :2, 0, 0] = math.nan, math.nan, math.inf
FLOATING = r'pictures must be a floating tensor \(b,3,h,w\) in \[-1, 1\].*'

PICTURES = {
    'width': (X[..., 1:], 'divisible by 8, not 16×15'),
    'height': (X[:, :, :12], 'divisible by 8, not 12×16'),
    'bytes': (X.byte(), f'{FLOATING}`images.to_pictures`.*, not torch.uint8'),
    'whole numbers': (X.long(), f'{FLOATING}, not torch.int64'),
    'a list': ([X], f'{FLOATING}, not list'),
    'a PIL picture': (Image.new('RGB', (16, 16)), f'{FLOATING}, not Image'),
    'an array': (X.numpy(), f'{FLOATING}, not ndarray'),
    'nothing': (None, f'{FLOATING}, not NoneType'),
    'half': (X.half(), r'pictures are torch.float16, the VAE is torch.float32: convert one'),
    'double': (X.double(), r'pictures are torch.float64, the VAE is torch.float32'),
    'grey': (X[:, :1], rf'{FLOATING}, not \(1, 1, 16, 16\)'),
    'RGBA': (torch.zeros(1, 4, 16, 16), rf'{FLOATING}, not \(1, 4, 16, 16\)'),
    'no batch': (X[0], rf'{FLOATING}, not \(3, 16, 16\)'),
    'an empty batch': (X[:0], rf'{FLOATING}, not \(0, 3, 16, 16\)'),
    'no pixels': (X[..., :0], r'not \(1, 3, 16, 0\)'),
    'channels last': (torch.zeros(1, 16, 16, 3), r'not \(1, 16, 16, 3\)'),
    '0 to 255': ((X + 1)*255, r'these reach from 255 to 255'),
    'too dark': (X - 1.1, 'these reach from -1.1 to -1.1'),
    'NaN': (spoiled_x, 'these reach from nan to nan'),
    'infinity': (X + math.inf, 'these reach from inf to inf'),
}


@pytest.mark.parametrize('name', PICTURES)
def test_wrong_pictures(tiny, name):
    x, message = PICTURES[name]
    for call in (tiny.encode, tiny):
        with torch.no_grad(), pytest.raises(ValueError, match=message): call(x)


FLOATING_Z = r'latents must be a floating tensor \(b,4,h,w\)'
LATENTS = {
    'NaN': (spoiled_z, '1 of the 16 numbers of the latents are not finite'),
    'infinity': (endless_z, '2 of the 16 numbers of the latents are not finite'),
    'channels': (Z[:, :3], rf'{FLOATING_Z}, not \(1, 3, 2, 2\)'),
    'a picture': (X, r'not \(1, 3, 16, 16\)'),
    'moments': (Z.repeat(1, 2, 1, 1), r'not \(1, 8, 2, 2\)'),
    'no batch': (Z[0], r'not \(4, 2, 2\)'),
    'an empty batch': (Z[:0], r'not \(0, 4, 2, 2\)'),
    'whole numbers': (Z.int(), f'{FLOATING_Z}, not torch.int32'),
    'a list': ([0.], f'{FLOATING_Z}, not list'),
    'half': (Z.half(), r'latents are torch.float16, the VAE is torch.float32: convert one'),
}


@pytest.mark.parametrize('name', LATENTS)
def test_wrong_latents(tiny, name):
    z, message = LATENTS[name]
    with pytest.raises(ValueError, match=message): tiny.decode(z)


@torch.no_grad()
def test_what_is_just_right(tiny):
    for x in (X + 1, X - 1, X[..., :8, :8], pictures(size=(8, 64))): assert tiny(x).sample.shape == x.shape
    assert tiny.decode(Z[..., :1, :1]).sample.shape == (1, 3, 8, 8)


@pytest.mark.parametrize('mode, pixel', [('RGBA', (10, 20, 30, 0)), ('L', 255), ('P', 1), ('1', 1), ('LA', (9, 0))])
@torch.no_grad()
def test_pictures_of_other_modes(tiny, mode, pixel):
    "Whatever somebody opens, `to_pictures` makes something of it that the VAE takes"
    x = to_pictures(Image.new(mode, (50, 30), pixel), 32)
    assert tiny(x).sample.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match='divisible by 8, not 30×50'): tiny(to_pictures(Image.new(mode, (50, 30))))


@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_sixteen_bits(mode):
    with pytest.raises(ValueError, match='8 bits a channel'): to_pictures(Image.new(mode, (16, 16)))


WRONG = {
    'unknown down block': (dict(down_block_types=('DownBlock2D',)*4), "down_block_types must be .*not .*'DownBlock2D'"),
    'unknown up block': (dict(up_block_types=('Up',)*4), "up_block_types must be .*not .*'Up'"),
    'too few blocks': (dict(down_block_types=('DownEncoderBlock2D',)*3), 'down_block_types must be'),
    'too many blocks': (dict(up_block_types=('UpDecoderBlock2D',)*5), 'up_block_types must be'),
    'groups': (dict(norm_num_groups=3), r'norm_num_groups, 3, must divide all block_out_channels, not \[4, 4, 4, 8\]'),
    'one level and groups': (dict(block_out_channels=(4, 6, 4, 8), norm_num_groups=4), r'must divide .*not \[6\]'),
    'activation': (dict(act_fn='gelu'), "act_fn must be 'silu', not 'gelu'"),
    'no attention': (dict(mid_block_add_attention=False), 'mid_block_add_attention must be True, not False'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_configurations(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message): AutoencoderKL(**TINY | change)
    with pytest.raises(ValueError, match=message): AutoencoderKL.from_config(TINY | change)


@pytest.mark.parametrize('change, message', [
    (dict(odd_argument=1), 'unknown odd_argument'), (dict(_class_name='VQModel'), 'config of a VQModel'),
    (dict(norm_num_groups=0), 'cannot be built'), (dict(layers_per_block='two'), 'cannot be built'),
    (levels(), 'cannot be built'), (dict(block_out_channels=4), 'cannot be built')])
def test_configs_of_other_models(change, message):
    with pytest.raises(ValueError, match=message): AutoencoderKL.from_config(TINY | change)


@pytest.mark.parametrize('change, message', [
    (dict(block_out_channels=[4, 4, 8, 8]), 'of another shape'), (dict(layers_per_block=2), 'missing'),
    (dict(latent_channels=3), 'of another shape'), (dict(use_quant_conv=False), '2 unexpected: quant_conv')])
def test_a_config_that_does_not_fit_the_weights(tiny, tmp_path, change, message):
    path = tiny.save_pretrained(tmp_path)/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f'does not fit its config: .*{message}'):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize('keep', [0, 7, 1000, -1])
def test_truncated_weights(tiny, tmp_path, keep):
    path = tiny.save_pretrained(tmp_path)/AutoencoderKL.weights_name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match='damaged or truncated'): AutoencoderKL.from_pretrained(tmp_path)


# ---- the benchmark

def test_benchmark(root, tmp_path):
    "It runs, prints its tables and writes the same numbers; what they say after so little means nothing"
    build(AutoencoderKL, TINY).save_pretrained(tmp_path/'vae')
    command = [sys.executable, root/'benchmarks'/'vae.py', '--quick', '--weights', tmp_path/'vae', '--device', 'cpu']
    done = subprocess.run([*command, '--json', tmp_path/'a.json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/'a.json').read_text())
    assert found['machine']['torch'] == torch.__version__ and found['settings']['weights'] == str(tmp_path/'vae')
    assert set(found['quality']) == {'PSNR', 'SSIM', 'digits read as before', 'inks right', 'std of scaled latents'}
    assert len(found['speed']) == 8 and all(len(v) == 1 and v[0] > 0 for v in found['speed'].values())
    assert {name: goal['goal'] for name, goal in found['goals'].items()} == {
        'PSNR': 'at least 30', 'digits read as before': 'at least 0.98', 'inks right': 'at least 0.99',
        'std of scaled latents': '0.9 to 1.1', 'decode 1, ms': 'at most 15', 'decode 16, ms': 'at most 150',
        'decode 1, ours / diffusers': 'at most 1', 'decode 16, ours / diffusers': 'at most 1',
        'encode 16, ours / diffusers': 'at most 1'}
    assert all(name in done.stdout for part in ('quality', 'speed', 'memory', 'goals') for name in found[part])


@pytest.mark.parametrize('words, named', [('--n 0', '--n must be'), ('--repeats 0', '--repeats must be')])
def test_wrong_benchmark(root, words, named):
    command = [sys.executable, root/'benchmarks'/'vae.py', *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr and not done.stdout


# ---- the shipped weights

@pytest.fixture(scope='module')
def shipped_vae(): return AutoencoderKL.from_pretrained('scenes/vae')


@pytest.fixture(scope='module')
def sheet(): return Scenes('test', 200, seed=7).batch(range(200))


def test_shipped_files(shipped_vae):
    folder = find_pretrained('scenes/vae')
    manifest, names = read_manifest(folder), sorted(p.name for p in folder.iterdir())
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 4_000_000
    assert names == ['config.json', AutoencoderKL.weights_name, 'manifest.json'], 'no checkpoint is shipped'
    assert all(shipped_vae.config[k] == v for k, v in VAE.items())
    assert 0 < shipped_vae.config.scaling_factor < 10
    facts = 'seed epochs steps batch lr kl_weight dtype device seconds losses psnr files'.split()
    assert set(facts) <= manifest.keys() and manifest['seconds'] <= 90*60 and manifest['psnr'] >= 30
    losses = [row['valid'] for row in manifest['losses']]
    assert len(losses) == manifest['epochs'] and losses[-1] < 1.001*min(losses)
    assert manifest['files'] == {AutoencoderKL.weights_name: sha256(folder/AutoencoderKL.weights_name)}


@torch.no_grad()
def test_shipped_is_the_references(shipped_vae):
    theirs = Reference.from_pretrained(find_pretrained('scenes/vae'), torch_dtype=torch.float32).eval()
    z = latents(n=4, size=(8, 8))/shipped_vae.config.scaling_factor
    near(shipped_vae.decode(z).sample, theirs.decode(z).sample, 1e-4)
    x = Scenes('test', 4).batch(range(4))[0]
    near(shipped_vae.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean, 1e-4)
    assert shipped_vae.config.scaling_factor == theirs.config.scaling_factor


@torch.no_grad()
def test_shipped_latents_have_unit_variance(shipped_vae, sheet):
    dist = shipped_vae.encode(sheet[0]).latent_dist
    for latent in (dist.sample(generator()), dist.mode()):
        assert .9 <= (latent*shipped_vae.config.scaling_factor).std().item() <= 1.1


@torch.no_grad()
def test_shipped_gives_scenes_back(shipped_vae, sheet):
    images, scenes = sheet
    back = torch.cat([shipped_vae(x).sample for x in images.split(50)])
    assert psnr(back, images).mean() >= 29.5 and ssim(back.clamp(-1, 1), images).mean() > .9
    (before, _), (after, inks) = read_scenes(images, scenes), read_scenes(back, scenes)
    truth = torch.tensor([list(INKS).index(thing.color) for scene in scenes for thing in scene.things])
    assert (before == after).float().mean() >= .97 and (inks == truth).float().mean() >= .98


@torch.no_grad()
def test_shipped_in_tiles(shipped_vae, sheet):
    "A sheet of scenes, larger than any picture of the training: nearly the same in tiles"
    images, _ = sheet
    wall = torch.cat([torch.cat([*images[3*i:3*i + 3]], 2) for i in range(3)], 1)[None]
    model = AutoencoderKL.from_pretrained('scenes/vae')
    whole = model(wall).sample
    model.enable_tiling()
    assert psnr(model(wall).sample, whole.clamp(-1, 1)).item() > 25
