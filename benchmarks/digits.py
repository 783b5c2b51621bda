"""How good the digits of lesson 06 are, and what they cost on this machine: a table, and the same numbers as JSON.

    python benchmarks/digits.py [--n 1000 10000] [--repeats 5] [--json FILE] [--quick]

Quality: label accuracy of n samples, and their FID in the classifier's features beside the floor, that of n real test
digits; both against the same 10,000 real training digits. Speed: the median of the repeats, which take turns, after one
that is not counted.
"""
import argparse
import json
import statistics
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import clock, machine

from sdcourse.data import digit_dataloaders
from sdcourse.digits import ANY, SCHEDULER, UNET, fold, make_scheduler, sample
from sdcourse.metrics import evaluate, features, random_digits
from sdcourse.model import default_device
from sdcourse.unet import UNet2DConditionModel

GOALS = {'label accuracy': ('at least', .98), 'FID / floor': ('at most', 3.), 'speed of training': ('at least', 1.2)}


# ---- quality

def quality(args, device) -> list[dict]:
    "Accuracy, FID and floor for each number of samples; fewer samples are the first of more."
    labels = torch.arange(max(args.n)) % 10
    images = sample(labels, args.steps, generator=torch.Generator().manual_seed(args.seed), weights=args.weights,
                    device=device)
    real, rows = features(random_digits('train', max(10_000, *args.n)).images), []
    for n in args.n:
        ours = evaluate(images[:n], labels[:n], real)
        floor = evaluate(*random_digits('test', n), real)
        rows.append(dict(n=n, n_real=len(real), label_accuracy=ours['label_accuracy'], fid=ours['fid'],
                         floor=floor['fid'], floor_accuracy=floor['label_accuracy']))
    return rows


def print_quality(rows):
    "The first table."
    def cells(found): return f'{found["value"]:>10.4f}{found["low"]:>10.4f}{found["high"]:>10.4f}'
    print(f'\n{"quality":<44}{"n":>8}{"value":>10}{"low":>10}{"high":>10}')
    for row in rows:
        for name, key in [('label accuracy', 'label_accuracy'),
                          ('label accuracy of real test digits', 'floor_accuracy'),
                          (f'FID, against {row["n_real"]:,} training digits', 'fid'),
                          ('FID of real test digits, the floor', 'floor')]:
            print(f'{name:<44}{row["n"]:>8}{cells(row[key])}')


# ---- speed

def seconds_to_draw(args, device) -> float:
    "Seconds for 100 digits, weights already loaded."
    start = clock(device)
    sample(list(range(10))*args.rows, args.steps, generator=torch.Generator().manual_seed(0), weights=args.weights,
           device=device)
    return clock(device) - start


def training_of_lesson_06(args, device, dtype):
    "A function that trains for some steps as the lesson does, fastai and all, and returns the pictures a second."
    from fastai.callback.core import Callback, CancelFitException

    from sdcourse.training import diffusion_learner
    model = UNet2DConditionModel(**UNET).to(device, memory_format=torch.channels_last)
    learn = diffusion_learner(digit_dataloaders(args.batch, device=device), model,
                              make_scheduler(**SCHEDULER).alphas_cumprod, SCHEDULER['prediction_type'], dtype=dtype,
                              prepare=fold, null_label=ANY)
    times = []
    def after_batch(self):
        if self.iter in (0, args.train_steps): times.append(clock(device))
        if self.iter == args.train_steps: raise CancelFitException
    def run():
        times.clear()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 2e-3, cbs=Callback(after_batch=after_batch))
        return args.train_steps*args.batch/(times[1] - times[0])
    return run


def usual_training(args, device, helped=False):
    """The same for diffusers' U-Net and scheduler with the same configuration, in the usual loop: float32, AdamW.
    `helped`: with channels_last, bfloat16 and fused AdamW too"""
    import diffusers
    model, scheduler = diffusers.UNet2DConditionModel(**UNET).to(device), diffusers.DDPMScheduler(**SCHEDULER)
    if helped: model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=helped)
    dls = digit_dataloaders(args.batch, device=device)
    def step(images, labels):
        x0 = fold(images)
        eps = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),), device=device)
        labels = labels.masked_fill(torch.rand(len(labels), device=device) < .1, ANY)
        xt, target = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
        with torch.autocast(device.type, torch.bfloat16) if helped else nullcontext():
            output = model(xt, t, encoder_hidden_states=None, class_labels=labels).sample
        F.mse_loss(output.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    def run():
        for i, batch in enumerate(dls.train):
            step(*batch)
            if i == 0: start = clock(device)
            if i == args.train_steps: return args.train_steps*args.batch/(clock(device) - start)
    return run


def speed(args, device) -> dict:
    "What is measured: name -> its numbers, one for each repeat."
    ours, usual = partial(training_of_lesson_06, args, device), partial(usual_training, args, device)
    measured = {
        f'{10*args.rows} digits in {args.steps} steps, seconds': lambda: seconds_to_draw(args, device),
        'training, lesson 06 (bfloat16), images/s': ours(torch.bfloat16),
        'training, diffusers, usual loop, images/s': usual(),
        'training, lesson 06 in float32, images/s': ours(torch.float32),
        'training, diffusers helped, images/s': usual(helped=True),
    }
    found = {name: [] for name in measured}
    for repeat in range(args.repeats + 1):
        for name, measure in measured.items():
            value = measure()
            if repeat: found[name].append(value)
    return found


def print_speed(found, repeats):
    "The second table."
    print(f'\n{"speed, median of " + str(repeats):<44}{"":>8}{"value":>10}{"min":>10}{"max":>10}')
    for name, values in found.items():
        print(f'{name:<52}{statistics.median(values):>10.2f}{min(values):>10.2f}{max(values):>10.2f}')


# ---- goals

def goals(rows, found) -> dict:
    "What was to be reached, and was it? Quality with the first number of samples."
    row, (ours, theirs) = rows[0], [statistics.median(v) for v in list(found.values())[1:3]]
    values = dict(zip(GOALS, (row['label_accuracy']['value'], row['fid']['value']/row['floor']['value'], ours/theirs)))
    return {name: dict(value=values[name], goal=f'{word} {limit:g}',
                       reached=values[name] >= limit if word == 'at least' else values[name] <= limit)
            for name, (word, limit) in GOALS.items()}


def print_goals(reached):
    "The third table."
    print(f'\n{"goal":<44}{"":>8}{"value":>10}{"wanted":>16}')
    for name, goal in reached.items():
        print(f'{name:<52}{goal["value"]:>10.3f}{goal["goal"]:>16}  {"reached" if goal["reached"] else "NOT REACHED"}')


def parse() -> argparse.Namespace:
    "What was typed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, nargs='+', default=[1000], help='numbers of samples, 200 to 10000')
    parser.add_argument('--steps', type=int, default=25, help='steps from noise to picture (default: 25)')
    parser.add_argument('--seed', type=int, default=0, help='of the samples (default: 0)')
    parser.add_argument('--weights', default='digits', help="shipped weights, or a folder (default: digits)")
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--repeats', type=int, default=5, help='counted repeats (default: 5)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    args.batch, args.train_steps, args.rows = 128, 8, 10
    if args.quick: args.n, args.steps, args.repeats, args.batch, args.train_steps, args.rows = [200], 2, 1, 4, 1, 1
    if not all(200 <= n <= 10_000 for n in args.n): parser.error(f'--n must lie between 200 and 10000, not {args.n}')
    if args.repeats < 1: parser.error(f'--repeats must be at least 1, not {args.repeats}')
    return args


def main():
    "Measure, print the tables, write the JSON."
    warnings.filterwarnings('ignore', message='.*torch.jit.script')  # fastai's import sets it off
    args = parse()
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    print_quality(rows := quality(args, args.device))
    print_speed(found := speed(args, args.device), args.repeats)
    print_goals(reached := goals(rows, found))
    settings = dict(steps=args.steps, seed=args.seed, weights=str(args.weights), repeats=args.repeats, batch=args.batch,
                    train_steps=args.train_steps)
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), settings=settings, quality=rows,
                                                       speed=found, goals=reached), indent=2) + '\n')


if __name__ == '__main__': main()
