"Every scheduler against the reference, combination by combination; properties; corners; saving; pipelines; no waiting."
import copy
import inspect
import itertools
import json
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import fields
from functools import lru_cache

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcourse import schedulers
from sdcourse.schedulers import SCHEDULERS, Scheduler, make_scheduler

OURS = [c for c in vars(schedulers).values() if isinstance(c, type) and hasattr(diffusers, c.__name__) and
        issubclass(c, Scheduler)]
NAMES = [c.__name__ for c in OURS]

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
        theirs = attempt(lambda: way(diffusers, 0))  # it began at the second of two equal timesteps, and ran out
    if isinstance(theirs, Exception):
        with pytest.raises(ValueError): way(schedulers, begin or None)
        return 'refused by both'
    (theirs, path), (_, mine) = theirs, way(schedulers, begin or None)
    same_plan(planned(schedulers, name, options, n), planned(diffusers, name, options, n))
    if not path.isfinite().all(): return 'reference not finite, ours is' if mine.isfinite().all() else 'neither finite'
    if distance(mine, path) < 1e-5: return 'agreed'
    assert name == 'LMSDiscreteScheduler', f'{distance(mine, path):.1e} off'
    theirs = planned(diffusers, name, options, n, begin or None)
    precise = copy.copy(theirs)                       # it integrates numerically, in float32: now in float64
    precise.sigmas = theirs.sigmas.double()
    theirs.get_lms_coefficient = precise.get_lms_coefficient
    try: assert distance(mine, path := walk(theirs, eta, begin)) < 1e-5, f'{distance(mine, path):.1e} off'
    finally: del theirs.get_lms_coefficient
    return 'agreed with integrals in float64'


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


# ---- more of the reference's interface

def draws(name):
    "Whether the reference's step takes a generator"
    return 'generator' in inspect.signature(getattr(diffusers, name).step).parameters


def same_ways(ours, theirs, **more):
    "Both, planned already, walk the same way"
    assert torch.equal(ours.timesteps.float(), theirs.timesteps.float())
    if ours.sigmas is not None: assert torch.equal(ours.sigmas, theirs.sigmas)
    assert distance(walk(ours, **more), walk(theirs, **more)) < 1e-5


@pytest.mark.parametrize('name, plan', [
    ('DDPMScheduler', dict(timesteps=[900, 500, 100, 3])), ('EulerDiscreteScheduler', dict(timesteps=[900, 50, 3])),
    ('HeunDiscreteScheduler', dict(timesteps=[900, 500, 100])),
    ('DPMSolverMultistepScheduler', dict(timesteps=[900, 500, 1])),
    ('LCMScheduler', dict(timesteps=[999, 759, 259])), ('LCMScheduler', dict(timesteps=[999, 759, 259], strength=.7)),
    ('LCMScheduler', dict(num_inference_steps=4, original_inference_steps=100, strength=.5)),
    ('EulerDiscreteScheduler', dict(sigmas=[14.615, 6.475, 1.396, .152, 0.])),
    ('FlowMatchEulerDiscreteScheduler', dict(sigmas=[1., .6, .2]))])
def test_plans_of_ones_own(name, plan):
    ours, theirs = (getattr(where, name)() for where in (schedulers, diffusers))
    for s in ours, theirs: s.set_timesteps(**plan)
    assert ours.num_inference_steps == (theirs.num_inference_steps or len(plan['timesteps']))
    same_ways(ours, theirs)


@pytest.mark.parametrize('name, options', [
    ('DPMSolverMultistepScheduler', dict(solver_order=1)), ('DPMSolverMultistepScheduler', dict(euler_at_final=True)),
    ('DPMSolverMultistepScheduler', dict(solver_order=3, lower_order_final=False)),
    ('DPMSolverMultistepScheduler', dict(solver_order=3, solver_type='heun', final_sigmas_type='sigma_min')),
    ('DPMSolverMultistepScheduler', dict(solver_order=3, algorithm_type='sde-dpmsolver++', solver_type='heun')),
    ('DPMSolverMultistepScheduler', dict(algorithm_type='deis', solver_type='logrho',
                                         final_sigmas_type='sigma_min')),
    ('UniPCMultistepScheduler', dict(solver_order=1)), ('UniPCMultistepScheduler', dict(solver_order=3)),
    ('UniPCMultistepScheduler', dict(solver_order=3, solver_type='midpoint', disable_corrector=[0, 3])),
    ('UniPCMultistepScheduler', dict(solver_type='bh1', final_sigmas_type='sigma_min', lower_order_final=False)),
    ('EulerDiscreteScheduler', dict(final_sigmas_type='sigma_min')), ('DDIMScheduler', dict(set_alpha_to_one=False)),
    ('DDIMInverseScheduler', dict(set_alpha_to_one=False)), ('PNDMScheduler', dict(set_alpha_to_one=True)),
    ('LCMScheduler', dict(timestep_scaling=3., original_inference_steps=20)),
    ('DDPMScheduler', dict(num_train_timesteps=200, timestep_spacing='trailing', clip_sample_range=2.))])
@pytest.mark.parametrize('n', [4, 16])
def test_other_options(name, options, n):
    ours, theirs = (getattr(where, name)(**options) for where in (schedulers, diffusers))
    for s in ours, theirs: s.set_timesteps(n)
    same_ways(ours, theirs)
    assert [plain(ours.config[k]) for k in options] == [plain(theirs.config[k]) for k in options]


@pytest.mark.parametrize('offset', [1, 3])
@pytest.mark.parametrize('name', [n for n in NAMES if n not in ('LCMScheduler', 'FlowMatchEulerDiscreteScheduler')])
def test_offset(name, offset):
    ours, theirs = (getattr(where, name)(steps_offset=offset, timestep_spacing='leading', beta_schedule='scaled_linear')
                    for where in (schedulers, diffusers))
    for s in ours, theirs: s.set_timesteps(20)
    same_ways(ours, theirs)
    if ours.sigmas is None: refuse(lambda: ours.set_timesteps(1000), f'steps_offset {offset}')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_types(name, dtype):
    "Half and double precision: the same type comes out, and near the same numbers"
    found = []
    for where in schedulers, diffusers:
        s, x = getattr(where, name)(**({} if 'Flow' in name else dict(beta_schedule='scaled_linear'))), None
        s.set_timesteps(8)
        x = torch.randn(SHAPE, generator=seeded()).to(dtype)
        more = dict(generator=seeded()) if draws(name) else {}
        for t in s.timesteps: x = s.step((.3*x.roll(1, 0)).to(dtype), t, x, **more).prev_sample
        assert x.dtype == dtype
        found.append(x.double())
    eps = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float64: 1e-5}[dtype]
    assert (found[0] - found[1]).norm() < eps*found[1].norm()


def test_clipped_output():
    ours, theirs = (where.DDIMScheduler(timestep_spacing='trailing') for where in (schedulers, diffusers))
    x, output = torch.randn(2, *SHAPE, generator=seeded())
    for s in ours, theirs: s.set_timesteps(10)
    for eta in 0., 1.:
        more = dict(eta=eta, use_clipped_model_output=True)
        a, b = (s.step(output, 799, x, generator=seeded(), **more) for s in (ours, theirs))
        assert torch.allclose(a.prev_sample, b.prev_sample, atol=1e-6)
        assert torch.allclose(a.pred_original_sample, b.pred_original_sample, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_results(name):
    "A named result, or a tuple; several generators, one for each picture"
    ours, theirs = (getattr(where, name)() for where in (schedulers, diffusers))
    x = torch.randn(SHAPE, generator=seeded())
    for s in ours, theirs: s.set_timesteps(5)
    a, b = (s.step(x, s.timesteps[0], x) for s in (ours, theirs))
    if 'LCM' in name: assert torch.allclose(a.denoised, b.denoised, atol=1e-5)
    elif hasattr(b, 'pred_original_sample'):
        assert torch.allclose(a.pred_original_sample, b.pred_original_sample, atol=1e-5)
    ours.set_timesteps(5)
    plain = ours.step(x, ours.timesteps[0], x, return_dict=False)
    assert isinstance(plain, tuple) and plain[0].shape == x.shape and all(y is not None for y in plain)


@pytest.mark.parametrize('name, options', [
    ('DDPMScheduler', {}), ('EulerAncestralDiscreteScheduler', {}), ('LCMScheduler', {}),
    ('DPMSolverMultistepScheduler', dict(algorithm_type='sde-dpmsolver++'))])
def test_generators(name, options):
    "One for each picture, as the reference has it"
    x, found = torch.randn(SHAPE, generator=seeded()), []
    for where in schedulers, diffusers:
        s = getattr(where, name)(**options)
        for several in [seeded(1), seeded(2)], [seeded(3)]:
            s.set_timesteps(5)
            found.append(s.step(x, s.timesteps[0], x, generator=several).prev_sample)
    assert torch.allclose(found[0], found[2], atol=1e-5) and torch.allclose(found[1], found[3], atol=1e-5)
    refuse(lambda: ready(name, 5, **options).step(x, 999. if 'Euler' in name else 999, x, generator=[seeded()]*3)
           if name != 'DDPMScheduler' else ready(name, 5).step(x, 800, x, generator=[seeded()]*3), '3 generators', '2')


@pytest.mark.parametrize('name', ['DDPMScheduler', 'DDIMScheduler', 'LCMScheduler'])
def test_velocity(name):
    x0, eps, t = *torch.randn(2, *SHAPE, generator=seeded()), torch.tensor([3, 700])
    assert torch.equal(*(getattr(where, name)().get_velocity(x0, eps, t) for where in (schedulers, diffusers)))


# ---- options

@pytest.mark.parametrize('name', NAMES)
def test_defaults(name):
    "The reference's options with its defaults; the others are those that stay where they are"
    ours, theirs = (getattr(where, name)() for where in (schedulers, diffusers))
    fixed = {k: v for c in type(ours).__mro__ for k, v in vars(c).get('fixed', {}).items()}
    mine = {k: v for k, v in ours.config.items() if k[0] != '_'}
    rest = {k: v for k, v in theirs.config.items() if k[0] != '_' and k not in mine}
    assert {k: plain(v) for k, v in theirs.config.items() if k in mine} == mine
    assert rest == {k: fixed[k] for k in rest} and len(ours) == len(theirs) == 1000 and ours.order == theirs.order
    assert [*inspect.signature(type(ours)).parameters][:1] == ['num_train_timesteps']


def plain(value):
    "Lists as tuples"
    return tuple(value) if isinstance(value, list) else value


def same_options(ours, theirs):
    "Ours has the values of the reference"
    own = {f.name: plain(getattr(ours, f.name)) for f in fields(ours)}
    assert own == {name: plain(theirs.config[name]) for name in own}


def published():
    "Configs as they are found in published checkpoints"
    base = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', num_train_timesteps=1000,
                _diffusers_version='0.6.0', trained_betas=None)
    return {'SD 1.5': base | dict(_class_name='PNDMScheduler', skip_prk_steps=True, set_alpha_to_one=False,
                                  steps_offset=1, clip_sample=False),
            'SD 2.1': base | dict(_class_name='DDIMScheduler', prediction_type='v_prediction', clip_sample=False,
                                  set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1),
            'SDXL': base | dict(_class_name='EulerDiscreteScheduler', interpolation_type='linear', steps_offset=1,
                                prediction_type='epsilon', sample_max_value=1., set_alpha_to_one=False,
                                clip_sample=False, skip_prk_steps=True, timestep_spacing='leading',
                                use_karras_sigmas=False),
            'DPM': base | dict(_class_name='DPMSolverMultistepScheduler', lambda_min_clipped=-float('inf'),
                               solver_order=2, algorithm_type='dpmsolver++', solver_type='midpoint',
                               lower_order_final=True, use_karras_sigmas=True, variance_type=None,
                               thresholding=False, steps_offset=1),
            'LCM': base | dict(_class_name='LCMScheduler', original_inference_steps=50, timestep_scaling=10.,
                               clip_sample=False, set_alpha_to_one=True, rescale_betas_zero_snr=False)}


@pytest.mark.parametrize('model', published())
@pytest.mark.parametrize('name', [n for n in NAMES if 'Flow' not in n])
def test_published_configs(model, name, tmp_path):
    "Each class takes the config of each published model as the reference does, from a file too, and the next ones do"
    (tmp_path/'scheduler').mkdir()
    (tmp_path/'scheduler'/'scheduler_config.json').write_text(json.dumps(published()[model]))
    ours = getattr(schedulers, name).from_pretrained(tmp_path, subfolder='scheduler')
    theirs = getattr(diffusers, name).from_pretrained(tmp_path, subfolder='scheduler')
    for other in 'PNDMScheduler', 'EulerDiscreteScheduler', name:
        same_options(ours, theirs)
        same_options(ours, getattr(diffusers, type(ours).__name__).from_config(ours.config))  # the reference takes ours
        same_options(getattr(schedulers, type(ours).__name__).from_config(theirs.config), theirs)  # and ours theirs
        ours, theirs = (getattr(w, other).from_config(s.config) for w, s in ((schedulers, ours), (diffusers, theirs)))
    ours.save_pretrained(tmp_path/'saved')
    saved = json.loads((tmp_path/'saved'/'scheduler_config.json').read_text())
    assert saved['_class_name'] == name and saved['num_train_timesteps'] == 1000 and '_use_default_values' not in saved
    again = [getattr(where, name).from_pretrained(tmp_path/'saved') for where in (schedulers, diffusers)]
    same_options(*again)
    if 'Inverse' not in name:
        for s in again: s.set_timesteps(7)
        same_ways(*again)


def test_config():
    ours = schedulers.DDIMScheduler(500, beta_end=.01)
    assert ours.config.beta_end == ours.config['beta_end'] == .01 and ours.config.num_train_timesteps == 500
    assert set(ours.config['_use_default_values']) == ours.config.keys() - {'num_train_timesteps', 'beta_end',
                                                                             '_use_default_values'}
    with pytest.raises(AttributeError): ours.config.beta_end = 1
    changed = schedulers.DDIMScheduler.from_config(ours.config, beta_end=.02, clip_sample=False)
    assert changed.config.beta_end == .02 and not changed.clip_sample and changed.num_train_timesteps == 500
    assert 'DDIMScheduler' in repr(ours) and '500' in repr(ours) and len(ours) == 500 and ours != changed
    euler = schedulers.EulerDiscreteScheduler.from_config(make_scheduler('pndm', steps_offset=1).config)
    assert euler.config.skip_prk_steps and euler.config.timestep_spacing == 'linspace' and euler.steps_offset == 1


@pytest.mark.parametrize('name', NAMES)
def test_copies(name):
    import pickle
    ours = getattr(schedulers, name)(num_train_timesteps=500)
    ours.set_timesteps(5)
    for other in copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)):
        assert other.config == ours.config and torch.equal(walk(other), walk(copy.deepcopy(ours)))


# ---- wrong input

def refuse(f, *named):
    "A ValueError that names what was received and what is allowed"
    with pytest.raises(ValueError) as e: f()
    assert all(str(word) in str(e.value) for word in named), e.value


X = torch.zeros(SHAPE)


def ready(name='DDIMScheduler', n=4, **options):
    "One of ours with its steps planned"
    ours = getattr(schedulers, name)(**options)
    ours.set_timesteps(n)
    return ours


def after_the_end():
    ours = ready('EulerDiscreteScheduler')
    for _ in range(5): ours.step(X, 999., X)


WRONG = {
    'no steps': (lambda: ready(n=0), '0', '1 to 1000'), 'too many': (lambda: ready(n=1001), '1001', '1 to 1000'),
    'half a step': (lambda: ready(n=2.5), '2.5'), 'True steps': (lambda: ready(n=True), 'True'),
    'no plan': (lambda: ready(n=None), 'num_inference_steps', 'none'),
    'two plans': (lambda: schedulers.DDPMScheduler().set_timesteps(4, timesteps=[3]), 'exactly one'),
    'too early': (lambda: schedulers.DDIMScheduler().step(X, 1, X), 'set_timesteps'),
    'not planned': (lambda: ready().step(X, 3, X), '3', '750, 500, 250, 0'),
    'a tensor that is not planned': (lambda: ready().step(X, torch.tensor(3), X), '3', '750'),
    'two timesteps': (lambda: ready().step(X, torch.tensor([750, 500]), X), '750'),
    'a counter for a timestep': (lambda: ready('EulerDiscreteScheduler').step(X, 0, X), '0', 'floating point'),
    'a whole timestep': (lambda: ready('FlowMatchEulerDiscreteScheduler').step(X, torch.tensor(1000), X), '1000'),
    'after the end': (after_the_end, 'all 4', 'set_timesteps'),
    'spacing': (lambda: ready(timestep_spacing='even'), "'even'", 'leading', 'trailing'),
    'spacing of the inverse': (lambda: ready('DDIMInverseScheduler', timestep_spacing='linspace'), 'linspace', 'lead'),
    'betas': (lambda: ready(beta_schedule='square'), "'square'", 'scaled_linear'),
    'beta range': (lambda: ready(beta_start=.1, beta_end=.01), '0.1', '0.01'),
    'prediction': (lambda: ready(prediction_type='flow'), "'flow'", 'v_prediction'),
    'no such prediction': (lambda: ready('KDPM2DiscreteScheduler', prediction_type='sample'), "'sample'", 'epsilon'),
    'T': (lambda: ready(num_train_timesteps=0), '0'), 'offset': (lambda: ready(steps_offset=-1), '-1'),
    'eta': (lambda: ready().step(X, 750, X, eta=2.), '2.0', '0 to 1'),
    'both spacings': (lambda: ready('EulerDiscreteScheduler', use_karras_sigmas=True, use_exponential_sigmas=True),
                      'both'),
    'last level': (lambda: ready('UniPCMultistepScheduler', final_sigmas_type='one'), "'one'", 'sigma_min'),
    'order': (lambda: ready('UniPCMultistepScheduler', solver_order=4), '4', '1 to 3'),
    'solver': (lambda: ready('UniPCMultistepScheduler', solver_type='rk'), "'rk'", 'bh2'),
    'algorithm': (lambda: ready('DPMSolverMultistepScheduler', algorithm_type='dpmsolver'), "'dpmsolver'", '++'),
    'Runge-Kutta': (lambda: ready('PNDMScheduler', 3), '3', 'skip_prk_steps', '4'),
    'LCM': (lambda: ready('LCMScheduler', 51), '51', '1 to 50'),
    'strength': (lambda: schedulers.LCMScheduler().set_timesteps(4, strength=0.), '0.0', 'above 0'),
    'original steps': (lambda: ready('LCMScheduler', original_inference_steps=0), '0', '1 to 1000'),
    'shift': (lambda: ready('FlowMatchEulerDiscreteScheduler', shift=0.), '0.0', 'above 0'),
    'a rising plan': (lambda: schedulers.DDPMScheduler().set_timesteps(timesteps=[1, 2]), '[1, 2]', 'falls'),
    'an empty plan': (lambda: schedulers.DDPMScheduler().set_timesteps(timesteps=[]), '[]'),
    'a plan of words': (lambda: schedulers.DDPMScheduler().set_timesteps(timesteps='ab'), "'ab'"),
    'a plan too high': (lambda: schedulers.DDPMScheduler().set_timesteps(timesteps=[1000, 3]), '999'),
    'no own plan': (lambda: schedulers.DDIMScheduler().set_timesteps(timesteps=[3]), 'DDIM', 'timesteps'),
    'a plan and Karras': (lambda: make_scheduler('euler', use_karras_sigmas=True).set_timesteps(timesteps=[3]),
                          'timesteps'),
    'one level': (lambda: schedulers.EulerDiscreteScheduler().set_timesteps(sigmas=[1.]), '[1.0]', 'at least two'),
    'levels above 1': (lambda: schedulers.FlowMatchEulerDiscreteScheduler().set_timesteps(sigmas=[2., 1.]), '2.0', '1'),
    'begin': (lambda: ready().set_begin_index(4), '4', '0 to 3'),
    'config': (lambda: schedulers.DDIMScheduler.from_config('x'), 'str'),
    'flow sigmas': (lambda: make_scheduler('unipc', use_flow_sigmas=True), 'use_flow_sigmas=True', 'False'),
    'unknown option': (lambda: schedulers.DDIMScheduler.from_config({}, beta=1), 'beta', 'beta_start'),
    'name': (lambda: make_scheduler('rk45'), "'rk45'", 'dpm++'), 'no name': (lambda: make_scheduler(['ddim']), 'ddim'),
    'no folder': (lambda: schedulers.DDIMScheduler.from_pretrained('/nowhere'), '/nowhere'),
    'timestep of noise': (lambda: ready('EulerDiscreteScheduler').add_noise(X, X, torch.tensor([5.])), '5.0', '999')}


@pytest.mark.parametrize('name', WRONG)
def test_refused(name):
    f, *named = WRONG[name]
    refuse(f, *named)


@pytest.mark.parametrize('name', NAMES)
def test_unknown_options(name):
    with pytest.raises(TypeError, match='unicorn'): getattr(schedulers, name)(unicorn=1)


def test_nothing_is_changed():
    "Neither what the model answered, nor what it was asked about"
    for name in NAMES:
        ours = ready(name, 5)
        x, output = torch.randn(2, *SHAPE, generator=seeded())
        before = x.clone(), output.clone()
        for t in ours.timesteps: ours.step(output, t, x)
        assert torch.equal(x, before[0]) and torch.equal(output, before[1]), name


# ---- where it runs

@pytest.mark.parametrize('name', [*SCHEDULERS])
def test_no_step_looks_at_a_value(name):
    "On the meta device there are no values: what asks for one, or copies it to the host, fails"
    ours = make_scheduler(name)
    ours.set_timesteps(6, device='meta')
    x = torch.empty(SHAPE, device='meta')
    with pytest.raises((NotImplementedError, RuntimeError)): x.sum().item()
    for t in ours.timesteps:
        assert t.device.type == 'meta'
        x = ours.step(ours.scale_model_input(x, t), t, x, generator=seeded()).prev_sample
    assert x.device.type == 'meta'
    if ours.counted:
        ours.set_timesteps(6, device='meta')
        ours.step(x, ours.timesteps[2:][0], x)
        assert ours.step_index in (3, 4), 'a slice of the plan knows its place too'


@pytest.mark.parametrize('name', [*SCHEDULERS])
@torch.no_grad()
def test_devices(name, device):
    ours = make_scheduler(name)
    ours.set_timesteps(6)
    here = walk(ours)
    ours.set_timesteps(6, device=device)
    x = torch.randn(SHAPE, generator=seeded(2)).to(device)*ours.init_noise_sigma
    if device == 'cuda': torch.cuda.set_sync_debug_mode('error')
    try:
        for t in ours.timesteps:
            output = .1*ours.scale_model_input(x, t)
            x = ours.step(output, t, x, generator=torch.Generator(device).manual_seed(1)).prev_sample
    finally:
        if device == 'cuda': torch.cuda.set_sync_debug_mode('default')
    assert x.device.type == device and x.isfinite().all() and here.isfinite().all()


# ---- in the reference's pipeline

@pytest.fixture(scope='module')
def tiny_pipeline():
    "A Stable Diffusion that has learned nothing"
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=16, attention_head_dim=2)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    def make(kind, scheduler):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            pipe = kind(vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
                        feature_extractor=None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return make


EMBEDS = dict(prompt_embeds=torch.randn(1, 8, 16, generator=seeded(5)),
              negative_prompt_embeds=torch.randn(1, 8, 16, generator=seeded(6)), output_type='latent')
IN_PIPELINES = [n for n in NAMES if n not in ('DDIMInverseScheduler', 'FlowMatchEulerDiscreteScheduler')]


@pytest.mark.parametrize('name', IN_PIPELINES)
def test_text_to_image_pipeline(tiny_pipeline, name):
    "In diffusers' pipeline ours draw what theirs draw; its corrections of old configs reach them; and there and back"
    config, found = published()['SD 1.5'] | dict(steps_offset=0, clip_sample=True), []
    for where in schedulers, diffusers:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            pipe = tiny_pipeline(diffusers.StableDiffusionPipeline, getattr(where, name).from_config(config))
        assert pipe.scheduler.config.get('steps_offset', 1) == 1 and not pipe.scheduler.config.get('clip_sample')
        found.append(pipe(num_inference_steps=4, eta=.5, generator=seeded(7), **EMBEDS).images)
        other = schedulers if where is diffusers else diffusers
        pipe.scheduler = getattr(other, name).from_config(pipe.scheduler.config)
        found.append(pipe(num_inference_steps=4, eta=.5, generator=seeded(7), **EMBEDS).images)
    for other in found[1:]: assert (found[0] - other).norm() < 1e-5*found[0].norm()


@pytest.mark.parametrize('name', IN_PIPELINES)
def test_image_to_image_pipeline(tiny_pipeline, name):
    config, found, image = published()['SD 1.5'], [], torch.rand(1, 3, 16, 16, generator=seeded(8))
    for where in schedulers, diffusers:
        pipe = tiny_pipeline(diffusers.StableDiffusionImg2ImgPipeline, getattr(where, name).from_config(config))
        found.append(pipe(image=image, strength=.6, num_inference_steps=10, generator=seeded(7), **EMBEDS).images)
    assert (found[0] - found[1]).norm() < 1e-5*found[0].norm()


def test_plans_of_ones_own_in_a_pipeline(tiny_pipeline):
    found = []
    for where in schedulers, diffusers:
        pipe = tiny_pipeline(diffusers.StableDiffusionPipeline, where.EulerDiscreteScheduler(steps_offset=1))
        found += [pipe(generator=seeded(7), **plan, **EMBEDS).images for plan in (
            dict(timesteps=[999, 700, 300]), dict(sigmas=[14.6, 5., 1., 0.]))]
    for i in 0, 1: assert torch.allclose(found[i], found[i + 2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0], found[1])


# ---- the benchmark

def test_benchmark(root, tmp_path):
    command = [sys.executable, root/'benchmarks'/'schedulers.py', '--quick', '--shape', *'1488', '--device', 'cpu']
    done = subprocess.run([*command, '--json', tmp_path/'b.json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/'b.json').read_text())['found']
    assert len(found) == 15 and all(f['ours'] > 0 and f['ratio'] == f['ours']/f['diffusers'] for f in found.values())
    assert all(label in done.stdout for label in found)
    wrong = subprocess.run([command[0], command[1], '--repeats', '0'], capture_output=True, text=True)
    assert wrong.returncode == 2 and '--repeats' in wrong.stderr and '0' in wrong.stderr
