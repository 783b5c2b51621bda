"""What lessons 01 and 02 cost on this machine: a table, and the same numbers as JSON.

    python benchmarks/gradients.py [--repeats 5] [--json FILE]

Each row is the median of the repeats, which take turns, after one that is not counted.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from machine import clock, in_turns, machine, middle

from sdcourse.data import digit_dataloaders, mnist
from sdcourse.gradients import DigitClassifier, input_gradient, synthesize, training_batch


def import_seconds(statement: str) -> float:
    "Seconds that a fresh Python needs for an import statement."
    code = f'import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)'
    return float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)


def timed(f) -> float:
    "Seconds of one call."
    start = clock()
    f()
    return clock() - start


def nudges(model, x, label):
    "Lesson 02's first way: one question to the classifier for each pixel."
    with torch.no_grad():
        for pixel in torch.eye(784).view(784, 1, 1, 28, 28): model(x + 0.1*pixel).log_softmax(1)[:, label]


def training_step(model, optimizer, digits, generator):
    "One step of the classifier's training, 256 digits and 64 other pictures."
    x, y = training_batch(digits.images[:256], digits.labels[:256], 1.5, generator)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def rows() -> dict:
    "What is measured: name -> a function that returns seconds."
    model, x = DigitClassifier.from_pretrained('classifier'), torch.zeros(1, 1, 28, 28)
    student = DigitClassifier().train().to(memory_format=torch.channels_last)
    optimizer, generator = torch.optim.AdamW(student.parameters()), torch.Generator().manual_seed(0)
    digits, loaders = mnist('train'), digit_dataloaders(device='cpu')
    return {
        'import torch': lambda: import_seconds('import torch'),
        'import sdcourse.gradients (torch included)': lambda: import_seconds('import sdcourse.gradients'),
        'import sdcourse.pipeline (torch included)': lambda: import_seconds('import sdcourse.pipeline'),
        '784 nudges of a pixel': lambda: timed(lambda: nudges(model, x, 3)),
        'one backward pass to the pixels': lambda: timed(lambda: input_gradient(model, x, torch.tensor([3]))),
        'synthesize 10 digits, 100 steps': lambda: timed(lambda: synthesize(range(10))),
        'synthesize 50 digits, 100 steps': lambda: timed(lambda: synthesize([*range(10)]*5)),
        'an epoch of loading (214 batches of 256)': lambda: timed(lambda: [None for _ in loaders.train]),
        'one training step (256 digits)': lambda: timed(lambda: training_step(student, optimizer, digits, generator)),
    }


def main():
    "Measure, print the table, write the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=5, help='counted repeats (default: 5)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    args = parser.parse_args()
    if args.repeats < 1: parser.error(f'--repeats must be at least 1, not {args.repeats}')
    seconds = in_turns(rows(), args.repeats)
    print(', '.join(f'{k} {v}' for k, v in machine().items()))
    print(f'{"median of " + str(args.repeats):<44}{"seconds":>10}{"min":>10}{"max":>10}')
    for name, took in seconds.items():
        print(f'{name:<44}{middle(took):>10.4f}{min(took):>10.4f}{max(took):>10.4f}')
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(), seconds=seconds), indent=2) + '\n')


if __name__ == '__main__': main()
