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


def begins_twice(where, name, options):
    "Whether the first timestep of the latest plan stands in it again"
    timesteps = built(where, name, tuple(options.items())).timesteps
    return bool((timesteps[1:] == timesteps[0]).any())


def distance(ours, theirs):
    "The largest relative distance of two ways, over all their places"
    return ((ours - theirs).flatten(1).norm(dim=1)/theirs.flatten(1).norm(dim=1)).max().item()


def compare(name, options, n, begin=0):
    """Whether both agree: 'agreed'; or 'refused by both'; or why the reference is no measure. Raises AssertionError if
    they don't"""
    options, eta = {k: v for k, v in options.items() if k != 'eta'}, options.get('eta', 0.)
    def way(where, begin):
        scheduler = planned(where, name, options, n, begin)
        return scheduler, walk(scheduler, eta, begin or 0)
    theirs = attempt(lambda: way(diffusers, begin or None))
    if isinstance(theirs, Exception) and not begin and 'Multistep' in name and begins_twice(diffusers, name, options):
        theirs = attempt(lambda: way(diffusers, 0))   # it began at the second of two equal timesteps, and ran out of them
    if isinstance(theirs, Exception):
        with pytest.raises(ValueError): way(schedulers, begin or None)
        return 'refused by both'
    (theirs, path), (ours, mine) = theirs, way(schedulers, begin or None)
    same_plan(planned(schedulers, name, options, n), planned(diffusers, name, options, n))
    if not path.isfinite().all(): return 'reference not finite'
    if distance(mine, path) < 1e-5: return 'agreed'
    assert name == 'LMSDiscreteScheduler', f'{distance(mine, path):.1e} off'
    theirs = planned(diffusers, name, options, n, begin or None)
    theirs.sigmas = theirs.sigmas.double()            # its integrals in float64 instead of float32
    assert distance(mine, walk(theirs, eta, begin)) < 1e-5
    return 'agreed with float64 integrals'


RARE = {'DPMSolverMultistepScheduler': 13}  # only each so many combinations walk 999 steps; a prime, so all choices do


def cases(name, some=None):
    "(options, steps, where to begin): all; or `some` combinations with few steps"
    every = list(combinations(name))
    stride = max(1, len(every)//some) if some else 1
    while some and stride > 3 and not (stride % 2 and stride % 3): stride += 1   # so that all choices are among them
    for k, options in enumerate(every):
        for n in (1, 2, 5, 10) if some else STEPS:
            if (some and k % stride) or (n == 999 and k % RARE.get(name, 5)): continue
            for begin in sorted({0, n//2} if n < 999 and name != 'DDIMInverseScheduler' else {0}):
                yield options, n, begin


def count(name, some=None):
    "How many cases agreed; raises AssertionError that names all that did not"
    found, faults = Counter(), []
    for options, n, begin in cases(name, some):
        try: found[compare(name, options, n, begin)] += 1
        except AssertionError as e: faults.append(f'{options}, {n} steps from {begin}: {str(e).splitlines()[0]}')
        except pytest.fail.Exception: faults.append(f'{options}, {n} steps from {begin}: not refused')
    assert not faults, f'{len(faults)} of {found.total() + len(faults)} did not agree:\n' + '\n'.join(faults[:20])
    return found


@pytest.fixture(autouse=True)
def quiet():
    "The reference warns of what the tests do on purpose"
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


@pytest.mark.parametrize('name', PRODUCT)
def test_some_combinations(name):
    found = count(name, 12)
    assert found['agreed'] >= .4*found.total(), found


@pytest.mark.slow
@pytest.mark.parametrize('name', PRODUCT)
def test_all_combinations(name, capsys):
    found = count(name)
    with capsys.disabled():
        print(f'\n{name}: {found.total()} combinations: ' + ', '.join(f'{n} {what}' for what, n in found.items()))
    assert found['agreed']


def test_disagreement_is_seen(monkeypatch):
    "The comparison is no formality: a factor that is off by 1 in 10,000 does not pass"
    right = schedulers._combine
    monkeypatch.setattr(schedulers, '_combine', lambda weights, tensors: 1.0001*right(weights, tensors))
    with pytest.raises(AssertionError, match='off'): compare('UniPCMultistepScheduler', {}, 5)


# ---- properties

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1000), st.sampled_from([*SCHEDULERS]), st.sampled_from(schedulers.SPACINGS))
@torch.no_grad()
def test_any_number_of_steps_ends_finite(n, name, spacing):
    scheduler = make_scheduler(name, timestep_spacing=spacing, beta_schedule='scaled_linear')
    try: scheduler.set_timesteps(n)
    except ValueError as e:
        assert (name, n > 50) == ('lcm', True) or (name == 'pndm' and n < 4) or (spacing == 'leading' and n == 1000), e
        return
    assert len(scheduler.timesteps) >= n and scheduler.timesteps.min() >= 0
    assert walk(scheduler).isfinite().all()


def perfect(scheduler, x0):
    "A model that knows the picture: it answers with the noise that is in what it sees"
    def answer(x, t):
        i = scheduler.step_index or 0
        if isinstance(scheduler, schedulers.FlowMatchEulerDiscreteScheduler): return (x - x0)/scheduler.sigmas[i]
        if scheduler.scales: alpha, sigma = (c/scheduler._seen(i)[1] for c in (1, scheduler._seen(i)[0]))
        else: alpha, sigma = (scheduler._pairs if scheduler.sigmas is not None else scheduler._roots)[i][:2]
        return (x - alpha*x0)/sigma
    return answer


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.sampled_from(['ddim', 'euler', 'euler_a', 'heun', 'dpm2', 'lms', 'dpm++', 'dpm++_3m',
                                            'dpm++_sde', 'unipc', 'flow']), st.integers(0, 99))
@torch.no_grad()
def test_a_perfect_denoiser_is_recovered(n, name, seed):
    "Who knows the picture gets the picture, whatever the number of steps: solvers whose last step leads to no noise"
    scheduler = make_scheduler(name, beta_schedule='scaled_linear', clip_sample=False)
    scheduler.set_timesteps(n)
    x0, x = torch.randn(2, *SHAPE, generator=seeded(seed))
    x, model = x*scheduler.init_noise_sigma, perfect(scheduler, x0)
    for t in scheduler.timesteps: x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    assert (x - x0).abs().max() < 2e-3
