"What the benchmarks share: what they run on, and a clock."
import os
import platform
import time

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
    if device.type != 'cpu': getattr(torch, device.type).synchronize()
    return time.perf_counter()
