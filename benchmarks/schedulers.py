"""What a step of each scheduler of lesson 10 costs, ours and diffusers', on this machine: a table, and JSON.

    python benchmarks/schedulers.py [--steps 25] [--repeats 20] [--shape 1 4 64 64] [--json FILE] [--quick]

Both walk the same way in lockstep: our step, then theirs, with the same answer of the model, so that whatever else the
machine does hits both. Microseconds of a call of `step`, the median over all steps of all repeats; on a GPU the time
until the next call could be made, without waiting for the GPU. Planning (`set_timesteps`) is timed apart.
"""
import argparse
import inspect
import json
import statistics
import time
import warnings
from pathlib import Path

import diffusers
import torch
from machine import machine

from sdcourse import schedulers
from sdcourse.model import default_device

GOAL = .7
CASES = {  # name -> class, options
    'DDPM': ('DDPMScheduler', {}), 'DDIM': ('DDIMScheduler', {}), 'DDIM inverse': ('DDIMInverseScheduler', {}),
    'PNDM': ('PNDMScheduler', dict(skip_prk_steps=True)), 'LMS': ('LMSDiscreteScheduler', {}),
    'Euler': ('EulerDiscreteScheduler', {}), 'Euler ancestral': ('EulerAncestralDiscreteScheduler', {}),
    'Heun': ('HeunDiscreteScheduler', {}), 'KDPM2': ('KDPM2DiscreteScheduler', {}),
    'DPM-Solver++ 2M': ('DPMSolverMultistepScheduler', {}),
    'DPM-Solver++ 3M': ('DPMSolverMultistepScheduler', dict(solver_order=3)),
    'DPM-Solver++ SDE': ('DPMSolverMultistepScheduler', dict(algorithm_type='sde-dpmsolver++')),
    'UniPC': ('UniPCMultistepScheduler', {}), 'LCM': ('LCMScheduler', {}),
    'flow matching': ('FlowMatchEulerDiscreteScheduler', {})}


class Walk:
    "One scheduler on its way"
    def __init__(self, where, name, options, device, steps):
        self.scheduler, self.device, self.times = getattr(where, name)(**options), device, []
        self.steps = min(steps, 50) if name == 'LCMScheduler' else steps
        self.scale = getattr(self.scheduler, 'scale_model_input', lambda x, t: x)
        self.random = 'generator' in inspect.signature(getattr(diffusers, name).step).parameters

    def begin(self, x):
        "Plan anew; the seconds that it took"
        start = time.perf_counter()
        self.scheduler.set_timesteps(self.steps, device=self.device)
        seconds = time.perf_counter() - start
        self.x, self.more, self.timesteps = x, {}, list(self.scheduler.timesteps)
        if self.random: self.more['generator'] = torch.Generator(self.device).manual_seed(0)
        return seconds

    def step(self, i, output):
        "Take a step and note what it cost"
        t = self.timesteps[i]
        self.scale(self.x, t)
        start = time.perf_counter()
        self.x = self.scheduler.step(output, t, self.x, **self.more, return_dict=False)[0]
        self.times.append(time.perf_counter() - start)


def measure(name, options, args):
    "Microseconds of a step and of planning, ours and theirs"
    walks = [Walk(where, name, options, args.device, args.steps) for where in (schedulers, diffusers)]
    output, x, planning = *torch.randn(2, *args.shape, device=args.device), ([], [])
    for repeat in range(args.repeats + 1):
        for walk, seconds in zip(walks, planning): seconds.append(walk.begin(x))
        for i in range(len(walks[0].timesteps)):
            for walk in walks[::-1] if (i + repeat) % 2 else walks: walk.step(i, output)
        if not repeat:                                                       # the first one warms up
            for walk, seconds in zip(walks, planning): walk.times.clear(), seconds.clear()
    step = [1e6*statistics.median(walk.times) for walk in walks]
    plan = [1e6*statistics.median(seconds) for seconds in planning]
    return dict(ours=step[0], diffusers=step[1], ratio=step[0]/step[1], planning=plan[0], planning_diffusers=plan[1])


def parse() -> argparse.Namespace:
    "What was typed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=25, help='steps of a walk (default: 25)')
    parser.add_argument('--repeats', type=int, default=20, help='counted walks (default: 20)')
    parser.add_argument('--shape', type=int, nargs=4, default=[1, 4, 64, 64], metavar='N',
                        help='of the latents (default: 1 4 64 64)')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    if args.quick: args.steps, args.repeats = 4, 1
    for name in ('steps', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    return args


@torch.no_grad()
def main():
    "Measure, print the table, write the JSON."
    args = parse()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)                                                 # a step is too short to be shared out
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    print(f'\n{"µs, latents " + "×".join(map(str, args.shape)):<28}{"step":>8}{"diffusers":>11}{"ratio":>7}'
          f'{"planning":>11}{"diffusers":>11}')
    found = {}
    for label, (name, options) in CASES.items():
        found[label] = f = measure(name, options, args)
        print(f'{label:<28}{f["ours"]:>8.1f}{f["diffusers"]:>11.1f}{f["ratio"]:>7.2f}'
              f'{f["planning"]:>11.0f}{f["planning_diffusers"]:>11.0f}'
              f'{"" if f["ratio"] <= GOAL else "  above the goal of " + str(GOAL)}', flush=True)
    settings = {name: getattr(args, name) for name in ('steps', 'repeats', 'shape')}
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), settings=settings, goal=GOAL,
                                                       found=found), indent=2) + '\n')


if __name__ == '__main__': main()
