"""How the cost of lesson 12's U-Net grows with the side of its latents, the batch and the channels: tables, and JSON.

    python benchmarks/growth.py [--repeats 5] [--device NAME] [--json FILE] [--quick]

For each size: milliseconds of a forward pass and of a training step (forward and backward), the most that tensors hold
on the way, and the count of multiplications. Two fits stand below each table. In a power law, cost = a·size^p, p says
how fast a cost grows. And seconds = start + multiplications/rate tells what a call costs before it multiplies at all.
"""
import argparse
import json
from pathlib import Path

import torch
from machine import clock, in_turns, machine, middle
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdcourse.model import default_device
from sdcourse.real_weights import PeakMemory
from sdcourse.text_to_image import UNET
from sdcourse.unet import UNet2DConditionModel

SIZES = {'side': [8, 16, 32, 48, 64], 'batch': [1, 2, 4, 8, 16, 32, 64], 'channels': [24, 48, 96, 144, 192]}
BASE = dict(side=8, batch=4, channels=96)
COSTS = tuple(f'{kind}, {unit}' for unit in ('ms', 'MB', 'multiplications') for kind in ('forward', 'training'))


def make(args, side, batch, channels):
    "Functions that run the U-Net of that size forward, and forward and backward"
    config = dict(UNET, block_out_channels=(channels, channels*5//3), norm_num_groups=8)
    unet = UNet2DConditionModel(**config).to(args.device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, side, side), (batch, 32, 128)
    xt, context = (torch.randn(shape, generator=generator).to(args.device) for shape in shapes)
    t = torch.full((batch,), 500, device=args.device)
    @torch.no_grad()
    def forward(): unet(xt, t, context)
    def training():
        unet(xt, t, context).square().mean().backward()
        for p in unet.parameters(): p.grad = None
    return {'forward': forward, 'training': training}


def milliseconds(f, device) -> float:
    "Of one call"
    start = clock(device)
    f()
    return 1000*(clock(device) - start)


def counted(f) -> tuple[float, int]:
    "MB that tensors hold at most, and multiplications, of one call"
    with PeakMemory() as memory: f()
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH): f()   # which counts sums, too
    return memory.peak/1e6, flops.get_total_flops()//2


def measure(args, name) -> list[dict]:
    "A row for each size"
    rows = []
    for size in args.sizes[name]:
        runs = make(args, **dict(BASE, **{name: size}))
        found = in_turns({f'{kind}, ms': lambda f=f: milliseconds(f, args.device) for kind, f in runs.items()},
                         args.repeats)
        counts = {kind: counted(f) for kind, f in runs.items()}
        rows.append({name: size, **{kind: middle(v) for kind, v in found.items()},
                     **{f'{kind}, MB': mb for kind, (mb, _) in counts.items()},
                     **{f'{kind}, multiplications': n for kind, (_, n) in counts.items()}})
    return rows


def slope(x, y) -> tuple[float, float]:
    "The straight line y = a + b·x that is nearest: a, b"
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    b = ((x - x.mean())*(y - y.mean())).sum()/(x - x.mean()).square().sum()
    return (y.mean() - b*x.mean()).item(), b.item()


def fits(name, rows) -> dict:
    "The exponent of each cost; and start (ms) and rate (multiplications a second) of both kinds of call"
    logs = torch.tensor([[row[key] for key in (name, *COSTS)] for row in rows], dtype=torch.float64).log().T
    found = {cost: dict(exponent=slope(logs[0].tolist(), log.tolist())[1]) for cost, log in zip(COSTS, logs[1:])}
    for kind in ('forward', 'training'):
        start, each = slope([row[f'{kind}, multiplications'] for row in rows], [row[f'{kind}, ms'] for row in rows])
        found[f'{kind}, ms'] |= dict(start=start, rate=1000/each)
    return found


def show(name, rows, found):
    "A table and its fits"
    print(f'\n{"":<10}' + ''.join(f'{cost.split(", ")[0]:>17}' for cost in COSTS))
    print(f'{name:<10}' + ''.join(f'{cost.split(", ")[1]:>17}' for cost in COSTS))
    for row in rows:
        print(f'{row[name]:<10}' + ''.join(f'{row[cost]:>17,.{2*(i < 4)}f}' for i, cost in enumerate(COSTS)))
    print(f'{"exponent":<10}' + ''.join(f'{found[cost]["exponent"]:>17.2f}' for cost in COSTS))
    for kind in ('forward', 'training'):
        print(f'{kind}: {found[f"{kind}, ms"]["start"]:.1f} ms + one for each '
              f'{found[f"{kind}, ms"]["rate"]/1e6:,.0f} thousand multiplications')


def main():
    "Measure, print the tables, write the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=5, help='counted repeats (default: 5)')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    args.sizes = {name: sizes[:3] for name, sizes in SIZES.items()} if args.quick else SIZES
    if args.quick: args.repeats = 1
    if args.repeats < 1: parser.error(f'--repeats must be at least 1, not {args.repeats}')
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    print('otherwise ' + ', '.join(f'{name} {size}' for name, size in BASE.items()))
    found = {}
    for name in args.sizes:
        rows = measure(args, name)
        found[name] = dict(rows=rows, fits=fits(name, rows))
        show(name, rows, found[name]['fits'])
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), base=BASE, repeats=args.repeats,
                                                       growth=found), indent=2) + '\n')


if __name__ == '__main__': main()
