"""How fast the pipeline of lesson 11 draws, beside diffusers' own with the same weights and latents: a table, and JSON.

    python benchmarks/pipeline.py [--weights scenes] [--steps 25] [--repeats 5] [--json FILE] [--random] [--quick]

Seconds of a call, the median of the repeats, which take turns, after one that is not counted; and of the processors'
time, which other programs on the machine disturb less. Ours runs once more as the graphs of lesson 12b, and where there
is a C++ compiler, both run once more with U-Nets that torch has compiled; exporting and compiling are not counted. With
--random the U-Net has the size of the lesson's and random weights, which take as long as trained ones; VAE and text
encoder are the shipped ones. Memory: the peak of a process that loads one of the two pipelines and draws with it.
"""
import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from machine import clock, goal, machine, peak, peaks, print_goals

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


NAMES, BATCHES, EXPORTED, COMPILED = ('ours', 'diffusers'), (1, 16), 'ours, exported', ', compiled'


def save_random(folder):
    "A pipeline with a U-Net of random weights"
    torch.manual_seed(0)
    StableDiffusionPipeline(AutoencoderKL.from_pretrained('scenes/vae'), CLIPTextModel.from_pretrained('scenes/clip'),
                            CLIPTokenizer.from_pretrained('scenes/clip'), UNet2DConditionModel(**UNET),
                            DDIMScheduler(**NOISE)).save_pretrained(folder)


def load(args, names):
    "Name -> pipeline: ours and theirs, from the same folder"
    with tempfile.TemporaryDirectory() as folder:
        if args.random: save_random(folder)
        where = folder if args.random else find_pretrained(args.weights)
        kinds = {'ours': lambda: StableDiffusionPipeline.from_pretrained(where, device=args.device),
                 'diffusers': lambda: load_theirs(where).to(args.device),
                 EXPORTED: lambda: load_exported(where, Path(folder)/'graphs')}
        pipes = {name: kinds[name.removesuffix(COMPILED)]() for name in names}
    for name, pipe in pipes.items():
        if name.endswith(COMPILED): pipe.unet.compile(dynamic=False)
    return pipes


def load_exported(where, folder):
    "Ours, run by onnxruntime"
    from sdcourse.export import export_onnx, load_onnx
    export_onnx(where, folder, 'float32')
    return load_onnx(folder)


def load_theirs(where):
    "Diffusers' pipeline"
    import diffusers
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(where, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(args, batch) -> dict:
    "The arguments of a call"
    latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(args.device)
    return dict(prompt=(PROMPTS*4)[:batch], num_inference_steps=args.steps, guidance_scale=4., latents=latents,
                output_type='np')


def speed(args) -> tuple[dict, dict]:
    "Name -> seconds and processor seconds of a call, each repeat; batch -> the largest difference of the pictures"
    names, compilers = [*NAMES], ('c++', 'g++', 'clang++')
    if not args.quick and args.device.type == 'cpu': names += [EXPORTED]
    if not args.quick and any(map(shutil.which, compilers)): names += [name + COMPILED for name in NAMES]
    pipes, found, apart = load(args, names), {}, {}
    for batch in BATCHES:
        words, pictures = call_of(args, batch), {}
        for repeat in range(args.repeats + 1):
            turn = list(pipes.items())
            for name, pipe in turn[::-1] if repeat % 2 else turn:            # nobody is always the first
                wall, cpu = clock(args.device), time.process_time()
                pictures[name] = pipe(**words).images
                cpu, wall = time.process_time() - cpu, clock(args.device) - wall
                if repeat: found.setdefault(f'batch {batch}, {name}', []).append((wall, cpu))
        apart[f'batch {batch}'] = max(float(abs(p - pictures['diffusers']).max()) for p in pictures.values())
    return found, apart


def goals(found, apart, memory) -> dict:
    "What was to be reached, and was it?"
    middle = {name: [statistics.median(times) for times in zip(*runs)] for name, runs in found.items()}
    reached = {'batch 1, seconds': goal(middle['batch 1, ours'][0], 'at most', .8)}
    for batch in BATCHES:
        for i, kind in enumerate(('seconds', 'processor time')):
            for name in ('ours', 'ours' + COMPILED, EXPORTED):
                if (ours := f'batch {batch}, {name}') in middle:
                    ratio = middle[f'batch {batch}, diffusers'][i]/middle[ours][i]
                    reached[f'batch {batch}, diffusers / {name}, {kind}'] = goal(ratio, 'at least', 2)
        reached[f'batch {batch}, largest difference'] = goal(apart[f'batch {batch}'], 'at most', 1e-3)
        if f'batch {batch}, ours' in memory:
            ours, theirs = (statistics.median(memory[f'batch {batch}, {name}']) for name in NAMES)
            reached[f'batch {batch}, memory, ours / diffusers'] = goal(ours/theirs, 'at most', .7)
    return reached


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
    parser.add_argument('--only', choices=[f'batch {batch}, {name}' for batch in BATCHES for name in NAMES],
                        help='draw with that pipeline, once, and print the peak of memory in MiB')
    args = parser.parse_args()
    if args.quick: args.steps, args.repeats = 2, 1
    for name in ('steps', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    warnings.filterwarnings('ignore', message='.*torch.jit.script')
    if args.only:
        batch, name = args.only.removeprefix('batch ').split(', ')
        load(args, [name])[name](**call_of(args, int(batch)))
        return print(json.dumps(peak(args.device)))
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    found, apart = speed(args)
    words = ['--weights', args.weights, '--steps', args.steps, '--device', args.device, *['--random']*args.random]
    plain = [f'batch {batch}, {name}' for batch in BATCHES for name in NAMES]
    memory = peaks(__file__, plain[:2] if args.quick else plain, args.repeats, words)
    what = f'{args.steps} steps, median of {args.repeats}'
    print(f'\n{what:<36}{"seconds":>10}{"processors":>12}{"pictures/s":>12}{"MiB":>8}')
    for name, runs in found.items():
        wall, cpu = map(statistics.median, zip(*runs))
        rate, mib = int(name.split()[1].rstrip(','))/wall, statistics.median(memory.get(name, [0]))
        print(f'{name:<36}{wall:>10.3f}{cpu:>12.3f}{rate:>12.2f}' + f'{mib:>8.0f}'*(mib > 0))
    print_goals(reached := goals(found, apart, memory))
    settings = {name: getattr(args, name) for name in ('weights', 'random', 'steps', 'repeats')}
    if args.json: args.json.write_text(json.dumps(dict(
        machine=machine(args.device), settings=settings, speed=found, difference=apart, memory=memory, goals=reached),
        indent=2) + '\n')


if __name__ == '__main__': main()
