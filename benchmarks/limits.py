"""How much of what this machine can do at most the U-Nets of lessons 06 and 12 get: a table, and the same as JSON.

    python benchmarks/limits.py [--batch 128] [--repeats 5] [--device NAME] [--json FILE] [--quick]

FLOP/s are sums and products a second. The limit is measured: one large matrix product, and one large convolution, in
each type; the better of the two counts. Then steps of training and of sampling, whose sums and products torch counts.
All is the median of the repeats, which take turns, after one that is not counted.
"""
import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import clock, goal, in_turns, machine, middle, print_goals
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdcourse import digits, text_to_image
from sdcourse.model import default_device
from sdcourse.unet import Attention, UNet2DConditionModel

TYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def product(args, dtype):
    "A large matrix product"
    a, b = (torch.randn(args.large, args.large, device=args.device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def convolution(args, dtype):
    "A large convolution"
    conv = nn.Conv2d(256, 256, 3, padding=1, device=args.device, dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.randn(args.large//128, 256, 32, 32, device=args.device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: conv(x))


def inputs(args, batch, lesson):
    "Noisy pictures or latents, timesteps, and labels or vectors of prompts"
    t = torch.randint(0, 1000, (batch,), device=args.device)
    if lesson is digits:
        return torch.randn(batch, 4, 14, 14, device=args.device), t, None, torch.arange(batch, device=args.device) % 10
    return torch.randn(batch, 4, 8, 8, device=args.device), t, torch.randn(batch, 32, 128, device=args.device)


def training(args, lesson):
    "A step of training in bfloat16: forward, backward, optimizer"
    unet = UNet2DConditionModel(**lesson.UNET).to(args.device, memory_format=torch.channels_last)
    if lesson is text_to_image and args.device.type == 'cpu':                         # as its trainings do
        for part in unet.modules():
            if isinstance(part, Attention): part.attend = text_to_image._attend
    optimizer, given = torch.optim.AdamW(unet.parameters(), fused=True), inputs(args, args.batch, lesson)
    target = torch.randn_like(given[0])
    def step():
        with torch.autocast(args.device.type, torch.bfloat16): output = unet(*given)
        F.mse_loss(output.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def sampling(args, lesson, batch):
    "A step of sampling: the U-Net, forward"
    unet = UNet2DConditionModel(**lesson.UNET).to(args.device, memory_format=torch.channels_last).eval()
    given = inputs(args, batch, lesson)
    return torch.no_grad()(lambda: unet(*given))


def runs(args) -> dict:
    "Name -> (function, type): the limits first"
    found = {f'{kind.__name__}, {name}': (kind(args, dtype), name)
             for kind in (product, convolution) for name, dtype in TYPES.items()}
    for name, lesson in (('06', digits), ('12', text_to_image)):
        found[f'lesson {name}, training, batch {args.batch}'] = training(args, lesson), 'bfloat16'
        for batch in (2, 32):
            found[f'lesson {name}, sampling, batch {batch}'] = sampling(args, lesson, batch), 'float32'
    return found


def counted(f) -> int:
    "Sums and products of a call"
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH): f()
    return flops.get_total_flops()


def seconds(f, args) -> float:
    "Of a call; short ones are called several times"
    start = clock(args.device)
    for n in itertools.count(1):
        f()
        if (taken := clock(args.device) - start) > args.least: return taken/n


def main():
    "Measure, print the table, write the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=128, help='of the training (default: 128)')
    parser.add_argument('--repeats', type=int, default=5, help='counted repeats (default: 5)')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    args.large, args.least = 2048, .2
    if args.quick: args.large, args.least, args.batch, args.repeats = 128, .01, 4, 1
    for name in ('batch', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    torch.manual_seed(0)
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    made = runs(args)
    counts = {name: counted(f) for name, (f, _) in made.items()}
    found = in_turns({name: lambda f=f: seconds(f, args) for name, (f, _) in made.items()}, args.repeats)
    rates = {name: counts[name]/middle(taken) for name, taken in found.items()}
    limits = {kind: max(rates[f'{name}, {kind}'] for name in ('product', 'convolution')) for kind in TYPES}
    shares = {name: rates[name]/limits[kind] for name, (_, kind) in made.items()}
    print(f'\n{f"median of {args.repeats}":<36}{"ms":>10}{"GFLOP":>10}{"GFLOP/s":>10}{"of the limit":>14}')
    for name, taken in found.items():
        print(f'{name:<36}{1000*middle(taken):>10.2f}{counts[name]/1e9:>10.2f}{rates[name]/1e9:>10.1f}{shares[name]:>14.0%}')
    trainings = [name for name in shares if 'training' in name]
    print_goals(goals := {f'{name}, share of the limit': goal(shares[name], 'at least', .5) for name in trainings})
    settings = dict(batch=args.batch, repeats=args.repeats, large=args.large)
    if args.json: args.json.write_text(json.dumps(dict(
        machine=machine(args.device), settings=settings, seconds=found, flop=counts, rates=rates, limits=limits,
        shares=shares, goals=goals), indent=2) + '\n')


if __name__ == '__main__': main()
