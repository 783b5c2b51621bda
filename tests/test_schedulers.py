"Every scheduler against the reference, combination by combination; properties; corners; saving; pipelines; a GPU's time."
import inspect
import itertools
import json
import math
from collections import Counter
from functools import lru_cache

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcourse import schedulers
from sdcourse.schedulers import SCHEDULERS, Scheduler, make_scheduler

# ---- what is combined

BETAS = dict(beta_schedule=['linear', 'scaled_linear', 'squaredcos_cap_v2'])
KINDS = dict(prediction_type=['epsilon', 'v_prediction', 'sample'])
SPACED = dict(timestep_spacing=['linspace', 'leading', 'trailing'])
LEVELS = dict(levels=[{}, dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True)])
ZERO = dict(rescale_betas_zero_snr=[False, True])
CLIPPED = dict(held=[dict(clip_sample=False), dict(clip_sample=True), dict(clip_sample=False, thresholding=True,
                                                                            sample_max_value=2.)])
CLIP = dict(clip_sample=[False, True])
THRESHOLD = dict(held=[{}, dict(thresholding=True, sample_max_value=2.)])
STEPS = 1, 2, 3, 5, 10, 25, 50, 999

PRODUCT = {  # name -> its options, each with its choices; what is a dict stands for several options at once
    'DDPMScheduler': BETAS | KINDS | SPACED | ZERO | CLIPPED,
    'DDIMScheduler': BETAS | KINDS | SPACED | ZERO | CLIPPED | dict(eta=[0., .5]),
    'DDIMInverseScheduler': BETAS | KINDS | SPACED | ZERO | CLIP,
    'PNDMScheduler': BETAS | KINDS | SPACED | dict(skip_prk_steps=[True, False]),
    'LMSDiscreteScheduler': BETAS | KINDS | SPACED | LEVELS,
    'EulerDiscreteScheduler': BETAS | KINDS | SPACED | LEVELS | ZERO,
    'EulerAncestralDiscreteScheduler': BETAS | KINDS | SPACED | ZERO,
    'HeunDiscreteScheduler': BETAS | KINDS | SPACED | LEVELS | CLIP,
    'KDPM2DiscreteScheduler': BETAS | KINDS | SPACED | LEVELS,
    'DPMSolverMultistepScheduler': BETAS | KINDS | SPACED | LEVELS | ZERO | THRESHOLD | dict(solver=[
        {}, dict(solver_order=3), dict(algorithm_type='sde-dpmsolver++')]),
    'UniPCMultistepScheduler': BETAS | KINDS | SPACED | LEVELS | ZERO | THRESHOLD,
    'LCMScheduler': BETAS | KINDS | ZERO | CLIPPED,
    'FlowMatchEulerDiscreteScheduler': LEVELS | dict(shift=[1., 3.])}


def combinations(name):
    "All option dicts of a scheduler"
    for choice in itertools.product(*PRODUCT[name].values()):
        options = {}
        for key, value in zip(PRODUCT[name], choice): options |= value if isinstance(value, dict) else {key: value}
        yield options


# ---- how they are compared

class Net(torch.nn.Module):
    "A random tiny network that reacts to the noisy picture and to the time"
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(16, 16, generator=g)/4 for _ in range(2))
        self.time = torch.randn(16, generator=g)
    def forward(self, x, t):
        return (torch.tanh(x.view(-1, 16) @ self.a + self.time*(float(t)/500 - 1)) @ self.b).view_as(x)


NET, SHAPE = Net(), (2, 4, 2, 2)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def noised(scheduler, x0, timesteps):
    "`add_noise` under the name that a scheduler has for it"
    noise = torch.randn(SHAPE, generator=seeded(3))
    if not hasattr(scheduler, 'add_noise'): return scheduler.scale_noise(x0, timesteps, noise)
    return scheduler.add_noise(x0, noise, timesteps)


@torch.no_grad()
def walk(scheduler, eta=0., begin=0):
    "The places that the loop visits, 50 at most, and the last; from step `begin` on as image-to-image does it"
    known = inspect.signature(scheduler.step).parameters
    more = {}
    if 'generator' in known: more['generator'] = seeded(1)
    if 'eta' in known: more['eta'] = eta
    timesteps, x = scheduler.timesteps[begin*scheduler.order:], torch.randn(SHAPE, generator=seeded(2))
    x = noised(scheduler, x, timesteps[:1]) if begin else x*getattr(scheduler, 'init_noise_sigma', 1.)
    places, scaled = [x], getattr(scheduler, 'scale_model_input', lambda x, t: x)
    for t in timesteps:
        x = scheduler.step(NET(scaled(x, t), t), t, x, return_dict=False, **more)[0]
        places.append(x)
    return torch.stack([*places[::max(1, len(places)//50)], x])


@lru_cache(maxsize=2)
def built(where, name, options):
    "A scheduler of `where` (our module, or diffusers); the reference's are slow to build"
    return getattr(where, name)(**dict(options))


def planned(where, name, options, n, begin=None):
    "A scheduler with its steps planned anew"
    scheduler = built(where, name, tuple(options.items()))
    scheduler.set_timesteps(n)
    if begin is not None and hasattr(scheduler, 'set_begin_index'): scheduler.set_begin_index(begin*scheduler.order)
    return scheduler


def attempt(f):
    "What `f` returns, or the exception that it raised"
    try: return f()
    except Exception as e: return e


def same_plan(ours, theirs):
    "Timesteps and noise levels equal to the last bit; noise added as exactly"
    assert torch.equal(ours.timesteps.float(), theirs.timesteps.float()), 'timesteps'
    if ours.sigmas is not None: assert torch.equal(ours.sigmas, theirs.sigmas), 'sigmas'
    first = getattr(theirs, 'init_noise_sigma', 1.)
    assert ours.init_noise_sigma == float(first) or first != first, 'init_noise_sigma'
    if not hasattr(theirs, 'add_noise') and not hasattr(theirs, 'scale_noise'): return
    places = [len(theirs.timesteps)//2, -1]
    if (theirs.timesteps[places] == theirs.timesteps[0]).any(): return  # there the reference may take the second of two
    x0 = torch.randn(SHAPE, generator=seeded(4))
    assert torch.equal(*(noised(s, x0, s.timesteps[places]) for s in (ours, theirs))), 'add_noise'


def counts(theirs):
    "Whether the first timestep of a plan stands in it twice"
    return (theirs.timesteps == theirs.timesteps[0]).sum() > 1


def compare(name, options, n, begin=0):
    "Whether both agree: 'agreed'; or 'refused' by both; or what the reference cannot do; raises AssertionError if not"
    options, eta = {k: v for k, v in options.items() if k != 'eta'}, options.get('eta', 0.)
    theirs = attempt(lambda: planned(diffusers, name, options, n, begin or None))
    path = theirs if isinstance(theirs, Exception) else attempt(lambda: walk(theirs, eta, begin))
    if isinstance(path, Exception) and not isinstance(theirs, Exception) and not begin and counts(theirs):
        # it took the second of two equal timesteps for the first step, and ran over the end
        theirs = planned(diffusers, name, options, n, begin)
        path = attempt(lambda: walk(theirs, eta, begin))
    if isinstance(path, Exception):
        with pytest.raises(ValueError): walk(planned(schedulers, name, options, n, begin or None), eta, begin)
        return 'refused by both'
    ours = planned(schedulers, name, options, n, begin or None)
    mine = walk(ours, eta, begin)
    same_plan(planned(schedulers, name, options, n), planned(diffusers, name, options, n))
    if not path.isfinite().all(): return 'reference not finite'
    off = ((mine - path).flatten(1).norm(dim=1)/path.flatten(1).norm(dim=1)).max().item()
    assert off < 1e-5, f'{off:.1e} off'
    return 'agreed'
