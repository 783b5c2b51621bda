"""pipeline.py: pictures equal to those of diffusers' pipelines, files both ways, texts, seeds, masks, every error.

The five parts here are tiny and random: what they draw is grain, but it is the same grain in both pipelines.
"""
import json
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdcourse.clip import CLIPTextModel
from sdcourse.images import to_pictures, to_pil
from sdcourse.model import find_pretrained
from sdcourse.pipeline import (Output, StableDiffusionPipeline, Step, draw_noise, parse_weights, rescale_guidance, slerp,
                               token_rows, unknown_words)
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.unet import FIXED, Prediction, Remembered, UNet2DConditionModel
from sdcourse.vae import AutoencoderKL

VAE = dict(block_out_channels=(4, 4, 4, 8), down_block_types=('DownEncoderBlock2D',)*4, sample_size=32,
           up_block_types=('UpDecoderBlock2D',)*4, norm_num_groups=2, scaling_factor=.5)
UNET = dict(sample_size=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), attention_head_dim=2,
            up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act='quick_gelu',
            vocab_size=653, max_position_embeddings=32, eos_token_id=652, bos_token_id=651, pad_token_id=652)
DDIM = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, clip_sample=False, set_alpha_to_one=False,
            steps_offset=1)
PROMPT, NEGATIVE = 'a bold red seven above a blue 3', 'un 4 verde'


def generator(seed=0, device='cpu'): return torch.Generator(device).manual_seed(seed)


def noise(n=1, channels=4, side=4, seed=1): return torch.randn(n, channels, side, side, generator=generator(seed))


def picture(seed=2, size=(32, 32)):
    "A smooth random PIL picture"
    small = torch.rand(1, 3, 4, 4, generator=generator(seed))*2 - 1
    return to_pil(torch.nn.functional.interpolate(small, size=size[::-1], mode='bilinear')[0])


def mask(size=(32, 32)):
    "White on the right"
    image = Image.new('L', size)
    image.paste(255, (size[0]//2, 0, *size))
    return image


def parts(seed=0, **unet):
    "The five parts of diffusers and transformers, tiny and random"
    folder = find_pretrained('scenes/clip')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(vae=diffusers.AutoencoderKL(**VAE).eval(), unet=diffusers.UNet2DConditionModel(**UNET | unet).eval(),
                    text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval(),
                    tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
                    scheduler=diffusers.DDIMScheduler(**DDIM))


def host(kind=diffusers.StableDiffusionPipeline, **changes):
    "Diffusers' pipeline of these parts, silent"
    pipe = kind(**{**parts(), **changes}, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A pipeline that diffusers saved"
    folder = tmp_path_factory.mktemp('pipeline')
    host().save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def saved_pipe(folder): return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture
def pipe(saved_pipe):
    "Ours, all parts ours; a test may replace parts and leave them so"
    return StableDiffusionPipeline(**{name: part for name, part in vars(saved_pipe).items()})


def near(a, b, most=1e-4):
    a, b = (torch.as_tensor(np.asarray(x, dtype=np.float32)) for x in (a, b))
    assert a.shape == b.shape and b.std() > .01, 'nothing to compare'
    apart = (a - b).abs().max().item()
    assert apart <= most, apart


# the same pictures as the reference's

LATENT = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, steps_offset=1)
SCHEDULERS = {
    'ddim': lambda **c: diffusers.DDIMScheduler(**{**DDIM, **c}),
    'ddpm': lambda **c: diffusers.DDPMScheduler(clip_sample=False, **LATENT, **c),
    'pndm': lambda **c: diffusers.PNDMScheduler(skip_prk_steps=True, **LATENT, **c),
    'euler': lambda **c: diffusers.EulerDiscreteScheduler(**LATENT, **c),
    'euler_a': lambda **c: diffusers.EulerAncestralDiscreteScheduler(**LATENT, **c),
    'heun': lambda **c: diffusers.HeunDiscreteScheduler(**LATENT, **c),
    'lms': lambda **c: diffusers.LMSDiscreteScheduler(**LATENT, **c),
    'dpm++': lambda **c: diffusers.DPMSolverMultistepScheduler(**LATENT, **c),
    'unipc': lambda **c: diffusers.UniPCMultistepScheduler(**LATENT, **c),
}


@pytest.mark.parametrize('name', SCHEDULERS)
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_text_to_image(pipe, name, kind):
    pipe.scheduler = SCHEDULERS[name](prediction_type=kind)
    theirs = host(scheduler=SCHEDULERS[name](prediction_type=kind))
    arguments = dict(prompt=PROMPT, negative_prompt=NEGATIVE, num_inference_steps=6, guidance_scale=4., latents=noise())
    found = pipe(**arguments, generator=generator(), output_type='np').images
    near(found, theirs(**arguments, generator=generator(), output_type='np').images)


CALLS = {
    'plain': {},
    'one half': dict(guidance_scale=1.),
    'rescaled': dict(guidance_rescale=.7, guidance_scale=5.),
    'fresh noise': dict(eta=.8),
    'one generator': dict(generator=3, num_images_per_prompt=3),
    'a generator each': dict(generator=[5, 6, 7], num_images_per_prompt=3),
    'several prompts': dict(prompt=[PROMPT, 'a 5'], negative_prompt=[NEGATIVE, ''], num_images_per_prompt=2),
    'empty': dict(prompt=''),
    'size': dict(height=40, width=24),
    'timesteps': dict(timesteps=[900, 500, 333, 20], num_inference_steps=50),
    'latents': dict(output_type='latent'),
    'tensor': dict(output_type='pt'),
}


def calls(arguments):
    "Arguments twice, with new generators each: one for us, one for them"
    def one():
        seeds = arguments.get('generator', 0)
        made = [generator(s) for s in seeds] if isinstance(seeds, list) else generator(seeds)
        return {**dict(prompt=PROMPT, num_inference_steps=5, output_type='np'), **arguments, 'generator': made}
    return one(), one()


@pytest.mark.parametrize('name', CALLS)
def test_arguments(pipe, name):
    ours, its = calls(CALLS[name])
    if name == 'timesteps':
        pipe.scheduler, theirs = (SCHEDULERS['ddpm']() for _ in range(2))
        theirs = host(scheduler=theirs)
    else: theirs = host()
    near(pipe(**ours).images, theirs(**its).images)


@pytest.mark.parametrize('strength', [1., .8, .3])
@pytest.mark.parametrize('name', ['ddim', 'euler', 'heun', 'dpm++', 'pndm', 'euler_a'])
def test_image_to_image(pipe, name, strength):
    pipe.scheduler = SCHEDULERS[name]()
    theirs = host(diffusers.StableDiffusionImg2ImgPipeline, scheduler=SCHEDULERS[name]())
    ours, its = calls(dict(image=picture(), strength=strength, num_inference_steps=7, negative_prompt=NEGATIVE))
    near(pipe(**ours).images, theirs(**its).images)


@pytest.mark.parametrize('name', ['one generator', 'a generator each', 'two pictures', 'a tensor'])
def test_image_to_image_in_batches(pipe, name):
    arguments = {'one generator': dict(generator=3, num_images_per_prompt=3, image=picture()),
                 'a generator each': dict(generator=[5, 6], num_images_per_prompt=2, image=picture()),
                 'two pictures': dict(prompt=[PROMPT, 'a 5'], image=[picture(1), picture(2)]),
                 'a tensor': dict(image=to_pictures(picture()))}[name]
    ours, its = calls(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # theirs: one picture for several prompts
        near(pipe(**ours).images, host(diffusers.StableDiffusionImg2ImgPipeline)(**its).images)


def nine_channels():
    "A U-Net for inpainting, theirs and ours, with the same weights"
    theirs = parts(seed=4, in_channels=9)['unet']
    ours = UNet2DConditionModel.from_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize('strength', [1., .6])
@pytest.mark.parametrize('name', ['ddim', 'euler', 'dpm++'])
@pytest.mark.parametrize('channels', [4, 9])
def test_inpainting(pipe, name, strength, channels):
    pipe.scheduler, changes = SCHEDULERS[name](), dict(scheduler=SCHEDULERS[name]())
    if channels == 9: changes['unet'], pipe.unet = nine_channels()
    theirs = host(diffusers.StableDiffusionInpaintPipeline, **changes)
    ours, its = calls(dict(image=picture(), mask_image=mask(), strength=strength, num_inference_steps=7))
    near(pipe(**ours).images, theirs(**its, height=32, width=32).images)


def test_inpainting_keeps_what_is_black(pipe):
    known = pipe.encode(picture(), generator())
    found = pipe(PROMPT, image=picture(), mask_image=mask(), generator=generator(), output_type='latent',
                 num_inference_steps=4).images
    near(found[..., :2], known[..., :2], 1e-6)
    assert (found[..., 2:] - known[..., 2:]).abs().mean() > .1


# parts

def test_our_parts_in_their_pipeline(pipe):
    "Our U-Net, VAE, text encoder and tokenizer as parts of diffusers' pipelines"
    ours = {name: getattr(pipe, name) for name in ('vae', 'unet', 'text_encoder', 'tokenizer')}
    for kind, more in ((diffusers.StableDiffusionPipeline, {}),
                       (diffusers.StableDiffusionImg2ImgPipeline, dict(image=picture())),
                       (diffusers.StableDiffusionInpaintPipeline, dict(image=picture(), mask_image=mask()))):
        found, expected = calls(dict(more, prompt=[PROMPT, 'a 7']))
        near(host(kind, **ours)(**found).images, host(kind)(**expected).images)


def test_their_parts_in_our_pipeline(pipe):
    expected = pipe(PROMPT, num_inference_steps=4, generator=generator(), output_type='np').images
    for name, part in parts().items():
        mixed = StableDiffusionPipeline(**{**vars(pipe), name: part})
        near(mixed(PROMPT, num_inference_steps=4, generator=generator(), output_type='np').images, expected)


def test_unet_for_hosts(pipe):
    x, words = noise(2), torch.randn(2, 32, 16, generator=generator())
    with torch.no_grad():
        plain = pipe.unet(x, 500, words)
        for return_dict in (True, False):
            found = pipe.unet(x, 500, words, return_dict=return_dict, timestep_cond=None, added_cond_kwargs=None)
            assert isinstance(found, Prediction) and torch.equal(found[0], plain) and found.sample is found[0]
        with pytest.raises(ValueError, match='timestep_cond, .* must be None'): pipe.unet(x, 5, words, timestep_cond=x)
    assert FIXED.items() <= pipe.unet.config.items()


def test_remembered(pipe):
    "Keys and values are computed once, and are the same"
    x, words, counted = noise(2), torch.randn(2, 32, 16, generator=generator()), []
    layers = [m.attn2.to_k for m in pipe.unet.modules() if hasattr(m, 'attn2')]
    handles = [layer.register_forward_hook(lambda *args: counted.append(1)) for layer in layers]
    with torch.no_grad():
        expected, kept = [pipe.unet(x, t, words) for t in (9, 800)], Remembered(words)
        assert len(counted) == 2*len(layers) > 0
        for _ in range(2): assert all(map(torch.equal, expected, [pipe.unet(x, t, kept) for t in (9, 800)]))
    assert len(counted) == 3*len(layers)
    for handle in handles: handle.remove()
