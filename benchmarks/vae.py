"""How good the VAE of lesson 08 is, and what it costs on this machine: a table, and the same numbers as JSON.

    python benchmarks/vae.py [--n 2000] [--repeats 7] [--json FILE] [--quick]

Quality: n test scenes there and back. Speed: milliseconds of a call, the median of the repeats, which take turns, after
one that is not counted; diffusers has the same weights. Memory: what a large picture needs, above what a small one did.
"""
import argparse
import json
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from machine import clock, machine

from sdcourse.data import INKS, Scenes, scene_dataloaders
from sdcourse.metrics import read_scenes
from sdcourse.model import default_device, find_pretrained
from sdcourse.vae import AutoencoderKL, psnr, ssim, vae_loss

GOALS = {'PSNR': (30, None), 'digits read as before': (.98, None), 'inks right': (.99, None),
         'std of scaled latents': (.9, 1.1), 'decode 1, ms': (None, 15), 'decode 16, ms': (None, 150),
         'decode 1, ours / diffusers': (None, 1), 'decode 16, ours / diffusers': (None, 1),
         'encode 16, ours / diffusers': (None, 1)}  # the last three to two decimals


# ---- memory: each measurement in a process of its own, because what a process needed at most never goes down

MEASURE = """
import sys
import torch
from sdcourse.vae import AutoencoderKL
weights, side, tiles = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'tiles'
def peak():  # of this process alone: what `resource` tells is inherited from whoever started it
    lines = open('/proc/self/status').read().splitlines()
    return int(next(line for line in lines if line.startswith('VmHWM')).split()[1])/1024
vae = AutoencoderKL.from_pretrained(weights)
vae.enable_tiling(tiles)
with torch.no_grad():
    vae.decode(torch.zeros(1, vae.config.latent_channels, 8, 8))
    before = peak()
    vae.decode(torch.zeros(1, vae.config.latent_channels, side//vae.factor, side//vae.factor))
print(peak() - before)
"""


def memory(args) -> dict:
    "MiB that decoding one picture needs on the CPU, at once and in tiles."
    if not Path('/proc/self/status').exists(): return {}  # only Linux counts the memory of a process there
    def measure(how):
        command = [sys.executable, '-c', MEASURE, args.weights, str(args.side), how]
        return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {f'decode {args.side}×{args.side}, {name}': measure(name) for name in ('whole', 'tiles')}


# ---- quality

@torch.no_grad()
def quality(args, device) -> dict:
    "What is lost on the way through the latent."
    vae, scenes = AutoencoderKL.from_pretrained(args.weights, device=device), Scenes('test', args.n)
    generator, found = torch.Generator().manual_seed(0), []
    for ids in torch.arange(args.n).split(100):
        images, chosen = scenes.batch(ids.tolist())
        images = images.to(device)
        dist = vae.encode(images).latent_dist
        back = vae.decode(dist.mode()).sample.clamp(-1, 1)
        (before, _), (after, inks) = read_scenes(images, chosen), read_scenes(back, chosen)
        truth = torch.tensor([[*INKS].index(thing.color) for s in chosen for thing in s.things], device=device)
        latents = dist.sample(generator)*vae.config.scaling_factor
        found.append((psnr(back, images), ssim(back, images), before == after, inks == truth, latents.flatten()))
    *means, latents = (torch.cat(parts).float() for parts in zip(*found))
    names = 'PSNR', 'SSIM', 'digits read as before', 'inks right'
    return {name: m.mean().item() for name, m in zip(names, means)} | {'std of scaled latents': latents.std().item()}


# ---- speed

def training_of_lesson_08(args, device, dtype):
    "A function that trains for some steps as the lesson does, fastai and all, and returns the milliseconds of a step."
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import GradientClip

    from sdcourse.training import Task, make_learner

    class Reconstruction(Task):
        "The picture itself is the right answer"
        def before_batch(self): self.learn.xb, self.learn.yb = (self.x, True, True, self.generator), (self.x,)
    vae = AutoencoderKL.from_pretrained(args.weights)
    dls = scene_dataloaders(args.batch, args.batch*(args.train_steps + 1), valid=1, device=device)
    learn = make_learner(dls, vae, Reconstruction(), vae_loss, dtype=dtype)
    times = []
    def after_batch(self):
        if self.training and self.iter in (0, args.train_steps): times.append(clock(device))
        if self.iter == args.train_steps: raise CancelFitException
    def run():
        times.clear()
        cbs = [GradientClip(1.), Callback(after_batch=after_batch)]
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-4, cbs=cbs)
        return 1000*(times[1] - times[0])/args.train_steps
    return run


def timed(f, calls, device):
    "A function that calls `f` some times and returns the milliseconds of one call."
    @torch.no_grad()
    def run():
        start = clock(device)
        for _ in range(calls): f()
        return 1000*(clock(device) - start)/calls
    return run


def speed(args, device) -> dict:
    "What is measured: name -> its milliseconds, one number for each repeat."
    import diffusers
    folder = find_pretrained(args.weights)
    kinds = {'ours': AutoencoderKL.from_pretrained(folder, device=device),
             'diffusers': diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().to(device)}
    x = Scenes('test', 16).batch(range(16))[0].to(device)
    with torch.no_grad(): z = kinds['ours'].encode(x).latent_dist.mode()
    measured = {}
    for what, calls, call in (('decode 1', 16, lambda vae: vae.decode(z[:1]).sample),
                              ('decode 16', 3, lambda vae: vae.decode(z).sample),
                              ('encode 16', 3, lambda vae: vae.encode(x).latent_dist.mean)):
        for kind, vae in kinds.items():
            measured[f'{what}, {kind}'] = timed(lambda call=call, vae=vae: call(vae), args.calls or calls, device)
    for dtype in (torch.float32, torch.bfloat16):
        name = f'training step, {args.batch} scenes, {str(dtype).removeprefix("torch.")}'
        measured[name] = training_of_lesson_08(args, device, dtype)
    found = {name: [] for name in measured}
    for repeat in range(args.repeats + 1):
        turn = list(measured.items())
        for name, measure in turn[::-1] if repeat % 2 else turn:             # nobody is always the first
            value = measure()
            if repeat: found[name].append(value)
    return found


# ---- goals

def goals(found_quality, found_speed) -> dict:
    "What was to be reached, and was it?"
    ms = {name: statistics.median(values) for name, values in found_speed.items()}
    values = dict(found_quality)
    for name in ('decode 1', 'decode 16', 'encode 16'):
        values[f'{name}, ms'] = ms[f'{name}, ours']
        values[f'{name}, ours / diffusers'] = round(ms[f'{name}, ours']/ms[f'{name}, diffusers'], 2)
    reached = {}
    for name, (low, high) in GOALS.items():
        word = f'at most {high:g}' if low is None else f'at least {low:g}' if high is None else f'{low:g} to {high:g}'
        good = (low is None or values[name] >= low) and (high is None or values[name] <= high)
        reached[name] = dict(value=values[name], goal=word, reached=good)
    return reached


def print_tables(args, found):
    "Four tables."
    print(f'\n{"quality, " + format(args.n, ",") + " test scenes":<52}{"value":>10}')
    for name, value in found['quality'].items(): print(f'{name:<52}{value:>10.4f}')
    print(f'\n{"speed in ms, median of " + str(args.repeats):<52}{"value":>10}{"min":>10}{"max":>10}')
    for name, values in found['speed'].items():
        print(f'{name:<52}{statistics.median(values):>10.2f}{min(values):>10.2f}{max(values):>10.2f}')
    print(f'\n{"memory, MiB":<52}{"value":>10}')
    for name, value in found['memory'].items(): print(f'{name:<52}{value:>10.1f}')
    print(f'\n{"goal":<52}{"value":>10}{"wanted":>16}')
    for name, goal in found['goals'].items():
        print(f'{name:<52}{goal["value"]:>10.3f}{goal["goal"]:>16}  {"reached" if goal["reached"] else "NOT REACHED"}')


def parse() -> argparse.Namespace:
    "What was typed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=2000, help='test scenes to judge quality by (default: 2000)')
    parser.add_argument('--side', type=int, default=1024, help='of the large picture, in pixels (default: 1024)')
    parser.add_argument('--weights', default='scenes/vae', help='shipped weights, or a folder (default: scenes/vae)')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--repeats', type=int, default=7, help='counted repeats (default: 7)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    args.batch, args.train_steps, args.calls = 32, 4, None
    if args.quick: args.n, args.side, args.repeats, args.batch, args.train_steps, args.calls = 20, 256, 1, 2, 1, 1
    for name in ('n', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    if args.side < 64 or args.side % 64: parser.error(f'--side must be a multiple of 64, not {args.side}')
    return args


def main():
    "Measure, print the tables, write the JSON."
    warnings.filterwarnings('ignore', message='.*torch.jit.script')  # fastai's import sets it off
    args = parse()
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    found = dict(memory=memory(args))                      # first: a child's peak starts with what its parent needed
    found |= dict(quality=quality(args, args.device), speed=speed(args, args.device))
    found['goals'] = goals(found['quality'], found['speed'])
    print_tables(args, found)
    settings = {name: getattr(args, name) for name in ('n', 'side', 'weights', 'repeats', 'batch', 'train_steps')}
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), settings=settings, **found),
                                                  indent=2) + '\n')


if __name__ == '__main__': main()
