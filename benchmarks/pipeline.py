"""How fast the pipeline of lesson 11 draws, beside diffusers' own with the same weights and latents: a table, and JSON.

    python benchmarks/pipeline.py [--weights scenes] [--steps 25] [--repeats 5] [--json FILE] [--random] [--quick]

Seconds of a call, the median of the repeats, which take turns, after one that is not counted; and of the processors'
time, which other programs on the machine disturb less. With --random the U-Net has the size of the lesson's and random
weights, which take as long as trained ones; VAE and text encoder are the shipped ones.
"""
import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from machine import clock, machine

from sdcourse.clip import CLIPTextModel
from sdcourse.model import default_device, find_pretrained
from sdcourse.pipeline import StableDiffusionPipeline
from sdcourse.schedulers import DDIMScheduler
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.unet import UNet2DConditionModel
from sdcourse.vae import AutoencoderKL

UNET = dict(sample_size=8, block_out_channels=(96, 192), cross_attention_dim=128, attention_head_dim=4,
            norm_num_groups=16, down_block_types=('CrossAttnDownBlock2D',)*2, up_block_types=('CrossAttnUpBlock2D',)*2)
NOISE = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, prediction_type='v_prediction',
             clip_sample=False, timestep_spacing='trailing', steps_offset=1)
PROMPTS = ['a bold red seven above a blue 3', 'un 5 viola a destra di un 9 bianco', 'a thin green 4', 'a yellow zero']


def save_random(folder):
    "A pipeline with a U-Net of random weights"
    torch.manual_seed(0)
    StableDiffusionPipeline(AutoencoderKL.from_pretrained('scenes/vae'), CLIPTextModel.from_pretrained('scenes/clip'),
                            CLIPTokenizer.from_pretrained('scenes/clip'), UNet2DConditionModel(**UNET),
                            DDIMScheduler(**NOISE)).save_pretrained(folder)


def load(args):
    "Name -> pipeline: ours and theirs, from the same folder"
    import diffusers
    with tempfile.TemporaryDirectory() as folder:
        if args.random: save_random(folder)
        where = folder if args.random else find_pretrained(args.weights)
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(where, dtype=torch.float32).to(args.device)
        ours = StableDiffusionPipeline.from_pretrained(where, device=args.device)
    theirs.set_progress_bar_config(disable=True)
    return {'ours': ours, 'diffusers': theirs}


def speed(args) -> tuple[dict, dict]:
    "Name -> seconds and processor seconds of a call, each repeat; batch -> the largest difference of the pictures"
    pipes, found, apart = load(args), {}, {}
    for batch in (1, 16):
        latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(args.device)
        words = dict(prompt=(PROMPTS*4)[:batch], num_inference_steps=args.steps, guidance_scale=4., latents=latents,
                     output_type='np')
        pictures = {}
        for repeat in range(args.repeats + 1):
            turn = list(pipes.items())
            for name, pipe in turn[::-1] if repeat % 2 else turn:            # nobody is always the first
                wall, cpu = clock(args.device), time.process_time()
                pictures[name] = pipe(**words).images
                cpu, wall = time.process_time() - cpu, clock(args.device) - wall
                if repeat: found.setdefault(f'batch {batch}, {name}', []).append((wall, cpu))
        apart[f'batch {batch}'] = float(abs(pictures['ours'] - pictures['diffusers']).max())
    return found, apart


def goals(found, apart) -> dict:
    "What was to be reached, and was it?"
    middle = {name: [statistics.median(times) for times in zip(*runs)] for name, runs in found.items()}
    values = {'batch 1, seconds': (middle['batch 1, ours'][0], 'at most', .8)}
    for batch in (1, 16):
        for i, kind in enumerate(('seconds', 'processor time')):
            ratio = middle[f'batch {batch}, diffusers'][i]/middle[f'batch {batch}, ours'][i]
            values[f'batch {batch}, diffusers / ours, {kind}'] = ratio, 'at least', 1.5
        values[f'batch {batch}, largest difference'] = apart[f'batch {batch}'], 'at most', 1e-3
    return {name: dict(value=value, goal=f'{word} {limit:g}', reached=value <= limit if word == 'at most' else
                       value >= limit) for name, (value, word, limit) in values.items()}


def main():
    "Measure, print the tables, write the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', default='scenes', help='shipped weights, or a folder (default: scenes)')
    parser.add_argument('--random', action='store_true', help='a U-Net of random weights instead')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--steps', type=int, default=25, help='of the denoising (default: 25)')
    parser.add_argument('--repeats', type=int, default=5, help='counted repeats (default: 5)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    if args.quick: args.steps, args.repeats = 2, 1
    for name in ('steps', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    warnings.filterwarnings('ignore', message='.*torch.jit.script')
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    found, apart = speed(args)
    reached = goals(found, apart)
    print(f'\n{f"{args.steps} steps, median of {args.repeats}":<52}{"seconds":>10}{"processors":>12}')
    for name, runs in found.items():
        wall, cpu = map(statistics.median, zip(*runs))
        print(f'{name:<52}{wall:>10.3f}{cpu:>12.3f}')
    print(f'\n{"goal":<52}{"value":>10}{"wanted":>18}')
    for name, goal in reached.items():
        print(f'{name:<52}{goal["value"]:>10.3g}{goal["goal"]:>18}  {"reached" if goal["reached"] else "NOT REACHED"}')
    settings = {name: getattr(args, name) for name in ('weights', 'random', 'steps', 'repeats')}
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), settings=settings, speed=found,
                                                       difference=apart, goals=reached), indent=2) + '\n')


if __name__ == '__main__': main()
