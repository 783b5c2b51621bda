"""How often the model of lesson 12 draws what its prompt says, and how long a picture takes: a table, and JSON.

    python benchmarks/scenes.py [--weights scenes] [--n 1000] [--steps 25] [--guidance 4] [--json FILE] [--quick]

n test scenes are asked for in English and in Italian, from the same noise, and a classifier reads what was drawn.
Seconds are those of one picture at a time, the median of the repeats, after one that is not counted.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from machine import clock, goal, machine, print_goals

from sdcourse.model import default_device
from sdcourse.pipeline import StableDiffusionPipeline
from sdcourse.text_to_image import measure_scenes

PROMPT = 'a bold red seven above a blue 3'


def seconds(pipe, args) -> list[float]:
    "Of one picture, each repeat"
    taken = []
    for seed in range(args.repeats + 1):
        start = clock(args.device)
        pipe(PROMPT, num_inference_steps=args.steps, guidance_scale=args.guidance,
             generator=torch.Generator().manual_seed(seed))
        taken.append(clock(args.device) - start)
    return taken[1:]


def goals(found, taken) -> dict:
    "What was to be reached, and was it?"
    def gap(better, other): return 100*(found[better]['all'] - found[other]['all'])
    values = {
        'one digit: digit and colour, %': (100*found['one digit']['digit and color'], 'at least', 97),
        'two digits: everything, %': (100*found['two digits']['all'], 'at least', 85),
        'English less Italian, points': (gap('English', 'Italian'), 'at most', 3),
        'seen less never shown, points': (gap('two digits, seen', 'two digits, never shown'), 'at most', 5),
        'seconds for a picture': (statistics.median(taken), 'at most', .8)}
    return {name: goal(*wanted) for name, wanted in values.items()}


def print_tables(args, found, reached):
    "Shares in per cent, each with its standard error in brackets; goals"
    names = [name for name in found['all'] if name != 'prompts']
    print(f'\n{"right, in per cent":<26}{"prompts":>8}' + ''.join(f'{name:>17}' for name in names))
    for kind, row in found.items():
        errors = {name: 100*math.sqrt(row[name]*(1 - row[name])/row['prompts']) for name in names}
        print(f'{kind:<26}{row["prompts"]:>8}' + ''.join(f'{100*row[n]:>11.1f} ({errors[n]:.1f})' for n in names))
    print_goals(reached)


def main():
    "Measure, print the tables, write the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', default='scenes', help='shipped weights, or a folder (default: scenes)')
    parser.add_argument('--n', type=int, default=1000, help='test scenes, each asked for twice (default: 1000)')
    parser.add_argument('--steps', type=int, default=25, help='of the denoising (default: 25)')
    parser.add_argument('--guidance', type=float, default=4., help='guidance scale (default: 4)')
    parser.add_argument('--repeats', type=int, default=7, help='pictures that are timed (default: 7)')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    if args.quick: args.n, args.steps, args.repeats = 30, 4, 1
    for name in ('steps', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    if args.n < 30: parser.error(f'--n must be at least 30, or some kinds of prompts do not occur, not {args.n}')
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    pipe = StableDiffusionPipeline.from_pretrained(args.weights, device=args.device)
    taken = seconds(pipe, args)
    found = measure_scenes(pipe, args.n, num_inference_steps=args.steps, guidance_scale=args.guidance)
    reached = goals(found, taken)
    print_tables(args, found, reached)
    settings = {name: getattr(args, name) for name in ('weights', 'n', 'steps', 'guidance', 'repeats')}
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), settings=settings, right=found,
                                                       seconds=taken, goals=reached), indent=2) + '\n')


if __name__ == '__main__': main()
