"What the benchmarks share: what they run on, a clock, turns, and the memory of a process."
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CPU = torch.device('cpu')


def machine(device=CPU) -> dict:
    "What the numbers were measured on."
    gpu = {'gpu': torch.cuda.get_device_name(device)} if device.type == 'cuda' else {}
    return dict(cpu=platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                vectors=torch.backends.cpu.get_cpu_capability(), python=platform.python_version(),
                torch=torch.__version__, device=device.type, **gpu)


def clock(device=CPU) -> float:
    "The time when all that was asked of the device is done."
    if device.type != 'cpu': getattr(torch, device.type).synchronize(*[device]*(device.type == 'cuda'))
    return time.perf_counter()


def in_turns(measured: dict, repeats: int) -> dict:
    "Name -> what its function returned at each repeat; they take turns, and before the first one they run uncounted."
    found = {name: [] for name in measured}
    for repeat in range(repeats + 1):
        turn = list(measured.items())
        for name, measure in turn[::-1] if repeat % 2 else turn:                 # nobody is always the first
            value = measure()
            if repeat: found[name].append(value)
    return found


def peak(device=CPU) -> float | None:
    "MiB that this process has needed at most; on a GPU, of the GPU. None where nobody counts them."
    if device.type == 'cuda': return torch.cuda.max_memory_allocated(device)/2**20
    status = Path('/proc/self/status')  # of this process alone: what `resource` tells is inherited from who started it
    if device.type != 'cpu' or not status.exists(): return None
    return int(next(line for line in status.read_text().splitlines() if line.startswith('VmHWM')).split()[1])/1024


def peaks(script: str, names, repeats: int, words=()) -> dict:
    "Name -> peaks in MiB of `script --only NAME …`, each in a process of its own: a peak never goes down again."
    def measure(name):
        done = subprocess.run([sys.executable, script, '--only', name, *map(str, words)], check=True, text=True,
                              stdout=subprocess.PIPE)
        return json.loads(done.stdout.splitlines()[-1])
    found = {name: [measure(name) for _ in range(repeats)] for name in names}
    return {name: values for name, values in found.items() if None not in values}


def goal(value: float, word: str, limit: float) -> dict:
    "Was it reached? `word` is 'at least' or 'at most'."
    return dict(value=value, goal=f'{word} {limit:g}', reached=value >= limit if word == 'at least' else value <= limit)


def print_goals(goals: dict):
    "A table of what was to be reached."
    print(f'\n{"goal":<56}{"value":>10}{"wanted":>16}')
    for name, goal in goals.items():
        print(f'{name:<56}{goal["value"]:>10.3g}{goal["goal"]:>16}  {"reached" if goal["reached"] else "NOT REACHED"}')


def middle(values) -> float:
    "The median."
    return statistics.median(values)
