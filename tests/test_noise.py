"noise.py: parity with diffusers to the last bit, invariants over random inputs, and every error a user can provoke."
import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcourse.noise import (SCHEDULES, add_noise, check_timesteps, cosine_betas, from_velocity, make_alphas_cumprod,
                            make_betas, predict_eps, predict_x0, rates, rescale_zero_terminal_snr, sample_timesteps,
                            snr, velocity)

LINEAR = make_alphas_cumprod(make_betas())
DEVICES = ['cpu', *(['cuda'] * torch.cuda.is_available()), *(['mps'] * torch.backends.mps.is_available())]


def generator(seed=0): return torch.Generator().manual_seed(seed)


def pair(seed, shape): return torch.randn(2, *shape, generator=generator(seed)).unbind()


def published(name, num_train_timesteps=1000, zero=False):
    "Our betas, our alphas_cumprod and diffusers' scheduler, for one published schedule"
    ref = DDPMScheduler(num_train_timesteps, beta_schedule=name, rescale_betas_zero_snr=zero, clip_sample=False,
                        **SCHEDULES[name])
    betas = make_betas(name, num_train_timesteps, **SCHEDULES[name])  # the ranges said, as the reference wants them
    if zero: betas = rescale_zero_terminal_snr(betas)
    return betas, make_alphas_cumprod(betas), ref


schedules = st.sampled_from(list(SCHEDULES))
fast = settings(max_examples=40, deadline=None)


# parity with diffusers

@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('num_train_timesteps', [2, 7, 100, 1000, 4000])
@pytest.mark.parametrize('zero', [False, True])
def test_schedules_equal_diffusers(name, num_train_timesteps, zero):
    betas, abar, ref = published(name, num_train_timesteps, zero)
    assert betas.dtype == abar.dtype == torch.float32
    assert torch.equal(betas, ref.betas)
    assert torch.equal(abar, ref.alphas_cumprod)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_default_range_is_the_published_one(name):
    assert torch.equal(make_betas(name), make_betas(name, **SCHEDULES[name]))
    for steps in (1, 1000): assert torch.equal(make_betas(name, steps), DDPMScheduler(
        steps, beta_schedule=name, **SCHEDULES[name]).betas)
    if name == 'squaredcos_cap_v2': return
    assert make_betas(name, 5, beta_end=.5)[0] == make_betas(name, 5)[0]  # one end alone
    assert make_betas(name, 5, beta_start=.001)[-1] == make_betas(name, 5)[-1]


@pytest.mark.parametrize('name', ['linear', 'scaled_linear'])
def test_any_range_equals_diffusers(name):
    ref = DDPMScheduler(beta_schedule=name)  # diffusers' own default range, for both
    assert torch.equal(make_betas(name, beta_start=1e-4, beta_end=.02), ref.betas)


@pytest.mark.parametrize('mean, std', [(0., 1.), (.5, 2.), (-1., .3)])
def test_logit_normal_equals_diffusers(mean, std):
    u = compute_density_for_timestep_sampling('logit_normal', 5000, mean, std, generator=generator(8))
    t = sample_timesteps(5000, 1000, 'logit_normal', generator(8), mean=mean, std=std)
    assert ((t - (1000 * u).long()).abs() <= 1).all() and (t == (1000 * u).long()).float().mean() > .999


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('shape', [(5,), (5, 784), (5, 1, 28, 28), (5, 4, 3, 8, 8)])
def test_add_noise_and_velocity_equal_diffusers(name, dtype, shape):
    _, abar, ref = published(name)
    x0, eps = (x.to(dtype) for x in pair(1, shape))
    t = torch.tensor([0, 1, 500, 998, 999])
    xt = add_noise(x0, eps, t, abar)
    assert xt.dtype == dtype
    assert torch.equal(xt, ref.add_noise(x0, eps, t))
    assert torch.equal(velocity(x0, eps, t, abar), ref.get_velocity(x0, eps, t))


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('t', [0, 300, 999])
def test_predict_x0_is_what_the_reference_step_finds(name, t):
    _, abar, ref = published(name)
    xt, eps = pair(2, (2, 4, 8, 8))
    torch.testing.assert_close(predict_x0(xt, eps, t, abar), ref.step(eps, t, xt).pred_original_sample)
    ref = DDPMScheduler.from_config(ref.config, prediction_type='v_prediction')
    torch.testing.assert_close(from_velocity(xt, eps, t, abar)[0], ref.step(eps, t, xt).pred_original_sample)


@pytest.mark.parametrize('name', SCHEDULES)
def test_snr_equals_diffusers(name):
    _, abar, ref = published(name)
    torch.testing.assert_close(snr(abar), compute_snr(ref, torch.arange(1000)), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('device', DEVICES)
def test_devices_give_the_same(device):
    x0, eps = pair(3, (3, 1, 8, 8))
    t = torch.tensor([0, 500, 999])
    here, there = add_noise(x0, eps, t, LINEAR), add_noise(x0.to(device), eps.to(device), t.to(device), LINEAR)
    assert there.device.type == device
    torch.testing.assert_close(there.cpu(), here)
    moved = sample_timesteps(9, generator=generator(), device=device)
    assert moved.device.type == device and torch.equal(moved.cpu(), sample_timesteps(9, generator=generator()))


# by hand

def test_half_precision_rounds_before_the_root():
    "As diffusers does it: predict_x0 undoes what add_noise did, and what is rounded to 0 is said so"
    x0, eps = (x.half() for x in pair(9, (2, 1, 8, 8)))
    cosine = make_alphas_cumprod(make_betas('squaredcos_cap_v2'))
    assert rates(300, cosine, x0)[0].item() == (cosine[300].half()**.5).item()
    assert (predict_x0(add_noise(x0, eps, 300, cosine), eps, 300, cosine) - x0).abs().max() < .01
    with pytest.raises(ValueError, match=r'at t = 999: the rate is 0 when rounded to torch.float16'):
        predict_x0(x0, eps, torch.tensor([5, 999]), cosine)
    with pytest.raises(ValueError, match=r'there is no noise at t = 0: the rate is 0 when rounded to torch.bfloat16'):
        predict_eps(x0.bfloat16(), eps.bfloat16(), 0, cosine)


@pytest.mark.parametrize('device', ['meta', *DEVICES[1:]])
def test_no_device_but_the_cpu_is_asked_for_values(device):
    "A meta tensor has no values: any look at them would raise"
    x, t, abar = torch.empty(2, 1, 4, 4, device=device), torch.tensor([0, 5], device=device), LINEAR.to(device)
    for f in (add_noise, predict_x0, predict_eps, velocity): assert f(x, x, t, abar).shape == x.shape
    assert all(out.device == x.device for out in from_velocity(x, x, t, abar))
    assert check_timesteps(t, 1000, 2).device.type == device
    with pytest.raises(ValueError, match='t holds 3 timesteps'): add_noise(x, x, t[:1].repeat(3), abar)


def test_values_by_hand():
    torch.testing.assert_close(make_alphas_cumprod(torch.tensor([.1, .2])), torch.tensor([.9, .72]))
    torch.testing.assert_close(snr(torch.tensor([.9, .5, .2, 0.])), torch.tensor([9., 1., .25, 0.]))
    torch.testing.assert_close(add_noise(torch.ones(1), -torch.ones(1), 0, torch.tensor([.64])), torch.tensor([.2]))
    torch.testing.assert_close(velocity(torch.ones(1), -torch.ones(1), 0, torch.tensor([.64])), torch.tensor([-1.4]))
    f = [math.cos((u + .008) / 1.008 * math.pi / 2)**2 for u in (0, .5, 1)]
    torch.testing.assert_close(cosine_betas(2), torch.tensor([1 - f[1] / f[0], .999]))


def test_the_chain_agrees_with_the_closed_form():
    "20,000 chains through 50 large steps: mean and variance within 4.5 standard errors at every step"
    n, g, betas = 20_000, generator(5), make_betas('linear', 50, .01, .2)
    x, abar = torch.full((n,), .8), make_alphas_cumprod(betas)
    for beta, left in zip(betas, abar):
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, generator=g)
        assert abs(x.mean() - .8 * left.sqrt()) < 4.5 * ((1 - left) / n).sqrt()
        assert abs(x.var() - (1 - left)) < 4.5 * (1 - left) * (2 / n)**.5


# properties

@fast
@given(schedules, st.integers(2, 1500))
def test_abar_and_snr_fall(name, num_train_timesteps):
    betas, abar, _ = published(name, num_train_timesteps)
    assert ((betas > 0) & (betas < 1)).all()
    assert (abar.diff() < 0).all() and (snr(abar).diff() < 0).all()
    assert abar[0] < 1 and abar[-1] > 0


@fast
@given(st.floats(1e-5, .5), st.floats(0, .49), st.integers(2, 300), st.sampled_from(['linear', 'scaled_linear']))
def test_any_range_of_betas(start, more, num_train_timesteps, name):
    betas = make_betas(name, num_train_timesteps, start, start + more)
    assert len(betas) == num_train_timesteps
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([start, start + more]), rtol=1e-4, atol=1e-7)
    assert (betas.diff() >= -1e-7).all() and (make_alphas_cumprod(betas).diff() <= 0).all()


@fast
@given(schedules, st.integers(2, 1500))
def test_rescaling_ends_in_zero_and_keeps_the_start(name, num_train_timesteps):
    betas, before, _ = published(name, num_train_timesteps)
    copy = betas.clone()
    rescaled = rescale_zero_terminal_snr(betas)
    abar = make_alphas_cumprod(rescaled)
    assert torch.equal(betas, copy)
    assert abar[-1] == 0 and snr(abar)[-1] == 0 and rescaled[-1] == 1
    torch.testing.assert_close(abar[0], before[0])
    assert (abar <= before + 1e-6).all() and (abar.diff() <= 0).all()
    torch.testing.assert_close(make_alphas_cumprod(rescale_zero_terminal_snr(rescaled)), abar, rtol=1e-4, atol=1e-5)


@fast
@given(schedules, st.integers(0, 999), st.integers(0, 2**31))
def test_the_variance_is_preserved(name, t, seed):
    _, abar, _ = published(name)
    x0, eps = pair(seed, (20_000,))
    assert abs(add_noise(x0, eps, t, abar).var() - 1) < .06
    signal, noise = rates(t, abar, x0)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(1))


@fast
@given(schedules, st.lists(st.integers(0, 999), min_size=1, max_size=6), st.integers(0, 2**31),
       st.sampled_from([(), (7,), (1, 8, 8), (4, 2, 3, 5)]))
def test_round_trips(name, ts, seed, shape):
    _, abar, _ = published(name)
    x0, eps = pair(seed, (len(ts), *shape))
    t = torch.tensor(ts)
    xt, v = add_noise(x0, eps, t, abar), velocity(x0, eps, t, abar)
    signal, noise = rates(t, abar, x0)
    assert ((predict_x0(xt, eps, t, abar) - x0).abs() * signal < 2e-6).all()  # rounding, blown up by the division
    assert ((predict_eps(xt, x0, t, abar) - eps).abs() * noise < 2e-6).all()
    for got, wanted in zip(from_velocity(xt, v, t, abar), (x0, eps)):
        torch.testing.assert_close(got, wanted, atol=5e-6, rtol=0)


@fast
@given(st.integers(0, 500), st.integers(1, 5000), st.sampled_from(['uniform', 'logit_normal']), st.integers(0, 2**31))
def test_timesteps_are_in_range_and_repeatable(n, num_train_timesteps, distribution, seed):
    t = sample_timesteps(n, num_train_timesteps, distribution, generator(seed))
    assert t.shape == (n,) and t.dtype == torch.int64
    assert ((t >= 0) & (t < num_train_timesteps)).all()
    assert torch.equal(t, sample_timesteps(n, num_train_timesteps, distribution, generator(seed)))


def test_distributions_of_timesteps():
    uniform = sample_timesteps(100_000, 10, generator=generator()).bincount(minlength=10) / 1e5
    assert (uniform - .1).abs().max() < .005
    t = sample_timesteps(100_000, 1000, 'logit_normal', generator(), mean=.5, std=2.)
    logits = ((t + .5) / 1000).logit()
    assert abs(logits.mean() - .5) < .05 and abs(logits.std() - 2) < .05
    assert sample_timesteps(1000, 1000, 'logit_normal', generator(), mean=50.).max() == 999  # sigmoid rounds to 1


def test_nothing_is_mutated_and_the_global_seed_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x0, eps, t = *pair(4, (2, 1, 4, 4)), torch.tensor([3, 7])
    copies = x0.clone(), eps.clone(), t.clone(), LINEAR.clone()
    for f in (add_noise, predict_x0, predict_eps, velocity, from_velocity): f(x0, eps, t, LINEAR)
    sample_timesteps(5, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(copies, (x0, eps, t, LINEAR)))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_timestep_for_all_in_any_form():
    x0, eps = pair(6, (3, 1, 4, 4))
    wanted = add_noise(x0, eps, torch.tensor([9, 9, 9]), LINEAR)
    for t in (9, torch.tensor(9), torch.tensor([9]), torch.tensor([9, 9, 9], dtype=torch.int32)):
        assert torch.equal(add_noise(x0, eps, t, LINEAR), wanted)


def test_gradients_flow():
    x0, eps = (x.requires_grad_() for x in pair(7, (2, 1, 4, 4)))
    add_noise(x0, eps, 300, LINEAR).sum().backward()
    torch.testing.assert_close(x0.grad, LINEAR[300].sqrt().expand_as(x0))


# errors: each names what was received and what is allowed

X = torch.zeros(2, 1, 4, 4)
BAD = [
    (lambda: make_betas('quadratic'), r"'quadratic'; allowed: linear, scaled_linear, squaredcos_cap_v2"),
    (lambda: make_betas('cosine'), r"'cosine'; allowed: .*squaredcos_cap_v2"),
    (lambda: make_betas('linear', 0), r'num_train_timesteps is 0; allowed: .*at least 1'),
    (lambda: make_betas('squaredcos_cap_v2', -3), r'num_train_timesteps is -3; allowed'),
    (lambda: make_betas('linear', 10.), r'num_train_timesteps is 10.0; allowed: a whole number'),
    (lambda: make_betas('linear', True), r'num_train_timesteps is True; allowed'),
    (lambda: make_betas('linear', 10, .2, .1), r'beta_start is 0.2, beta_end 0.1; allowed'),
    (lambda: make_betas('scaled_linear', 10, 0., .1), r'beta_start is 0.0, beta_end 0.1; allowed: 0 < start <= end'),
    (lambda: make_betas('linear', 10, .1, 1.), r'beta_end 1.0; allowed'),
    (lambda: make_betas('linear', 10, float('nan'), .1), r'beta_start is nan'),
    (lambda: make_betas('squaredcos_cap_v2', 10, max_beta=1.), r'max_beta is 1.0; allowed'),
    (lambda: cosine_betas(0), r'num_train_timesteps is 0; allowed'),
    (lambda: make_alphas_cumprod(torch.tensor([.1, 1.5])), r'betas runs from 0.1 to 1.5; allowed: 0 to 1'),
    (lambda: make_alphas_cumprod(torch.tensor([.1, float('nan')])), r'betas runs from nan .*no NaN'),
    (lambda: make_alphas_cumprod(torch.tensor([1, 0])), r'betas is torch.int64 of shape \(2,\); allowed: a float'),
    (lambda: make_alphas_cumprod([.1, .2]), r'betas is \[0.1, 0.2\]; allowed: a floating point tensor'),
    (lambda: make_alphas_cumprod(torch.tensor([])), r'shape \(0,\); allowed'),
    (lambda: snr(torch.tensor([[.5]])), r'alphas_cumprod is torch.float32 of shape \(1, 1\); allowed'),
    (lambda: snr(torch.tensor([-.5])), r'alphas_cumprod runs from -0.5'),
    (lambda: rescale_zero_terminal_snr(torch.tensor([.1])), r'betas has 1 step; allowed: at least 2'),
    (lambda: rescale_zero_terminal_snr(torch.tensor([.1, 1., .2])), r'betas\[1\] is 1; allowed: above 0 and below 1'),
    (lambda: rescale_zero_terminal_snr(torch.tensor([.1, .2, 0., .2])), r'betas\[2\] is 0; allowed'),
    (lambda: rescale_zero_terminal_snr(torch.tensor([.1, 0.])), r'betas\[1\] is 0; allowed'),
    (lambda: rescale_zero_terminal_snr(torch.full((10,), 1e-9)), r'betas runs from 1e-09 to 1e-09; .*float32'),
    (lambda: rescale_zero_terminal_snr(torch.full((100,), .999)), r'betas runs from 0.999 to 0.999; allowed'),
    (lambda: rescale_zero_terminal_snr(torch.tensor([.1, .1, 1e-9])), r'betas runs from 1e-09 to 0.1; allowed'),
    (lambda: rescale_zero_terminal_snr([.1, .2]), r'betas is \[0.1, 0.2\]; allowed'),
    (lambda: add_noise(X, X, -1, LINEAR), r't runs from -1 to -1; allowed: 0 to 999'),
    (lambda: add_noise(X, X, torch.tensor([0, 1000]), LINEAR), r't runs from 0 to 1000; allowed: 0 to 999'),
    (lambda: add_noise(X, X, torch.tensor([0., 1.]), LINEAR), r't is of type torch.float32; allowed: integers'),
    (lambda: add_noise(X, X, torch.tensor([True, False]), LINEAR), r't is of type torch.bool; allowed: integers'),
    (lambda: add_noise(X, X, torch.tensor([1, 2, 3]), LINEAR), r't holds 3 timesteps; allowed: one, or one for each'),
    (lambda: add_noise(X, X, 'noon', LINEAR), r"t is 'noon'; allowed: an integer, or a tensor of integers"),
    (lambda: add_noise(X, X, [1, 2], LINEAR), r't is \[1, 2\]; allowed: an integer, or a tensor of integers'),
    (lambda: add_noise(X, X, True, LINEAR), r't is of type torch.bool; allowed: integers'),
    (lambda: add_noise(X, [1.], 0, LINEAR), r'eps is of type list; allowed: .* tensor of shape \(b,...\)'),
    (lambda: add_noise('x', X, 0, LINEAR), r'x0 is of type str; allowed: a floating point tensor'),
    (lambda: add_noise(X[0, 0, 0, 0], X[0, 0, 0, 0], 0, LINEAR), r'x0 is torch.float32 of shape \(\); allowed'),
    (lambda: from_velocity(X, 3, 0, LINEAR), r'v is of type int; allowed'),
    (lambda: rates(0, LINEAR, 'x'), r'the batch is of type str; allowed'),
    (lambda: rates(0, [.5], X), r'alphas_cumprod is \[0.5\]; allowed'),
    (lambda: make_betas('linear', '10'), r"num_train_timesteps is '10'; allowed"),
    (lambda: make_betas('linear', 10, '.1', .2), r"beta_start is '.1', beta_end 0.2; allowed"),
    (lambda: make_betas('linear', 10, .1, [.2]), r'beta_end \[0.2\]; allowed'),
    (lambda: cosine_betas(10, '.9'), r"max_beta is '.9'; allowed"),
    (lambda: sample_timesteps(2, 10, 'logit_normal', std='1'), r"std is '1'; allowed"),
    (lambda: sample_timesteps(2, 10, 'logit_normal', mean=[0.]), r'mean is \[0.0\]; allowed'),
    (lambda: sample_timesteps(2, 10, generator=7), r'generator is 7; allowed: a torch.Generator or None'),
    (lambda: add_noise(X, X[:1], 0, LINEAR), r'x0 has shape \(2, 1, 4, 4\) and eps \(1, 1, 4, 4\); allowed: the same'),
    (lambda: add_noise(X.byte(), X, 0, LINEAR), r'x0 is torch.uint8 of shape .* allowed: a floating point tensor'),
    (lambda: add_noise(X, X, 0, LINEAR * 2), r'alphas_cumprod runs from'),
    (lambda: predict_x0(X, X[:, :, 1:], 0, LINEAR), r'xt has shape .* and eps'),
    (lambda: predict_x0(X, X, 1, torch.tensor([.5, 0.])), r'no signal is left at t = 1: .* rounded to torch.float32'),
    (lambda: predict_eps(X, X[0], 0, LINEAR), r'xt has shape .* and x0'),
    (lambda: predict_eps(X, X, 0, torch.tensor([1., .5])), r'there is no noise at t = 0: the rate is 0'),
    (lambda: velocity(X, X[0], 0, LINEAR), r'x0 has shape .* and eps'),
    (lambda: from_velocity(X, X[0], 0, LINEAR), r'xt has shape .* and v'),
    (lambda: check_timesteps(5, 5, 1), r't runs from 5 to 5; allowed: 0 to 4'),
    (lambda: rates(0, LINEAR.long(), X), r'alphas_cumprod is torch.int64'),
    (lambda: sample_timesteps(-1), r'n is -1; allowed: a whole number, at least 0'),
    (lambda: sample_timesteps(2.), r'n is 2.0; allowed'),
    (lambda: sample_timesteps(2, 0), r'num_train_timesteps is 0; allowed'),
    (lambda: sample_timesteps(2, 10, 'normal'), r"distribution is 'normal'; allowed: uniform, logit_normal"),
    (lambda: sample_timesteps(2, 10, 'logit_normal', std=0.), r'std is 0.0; allowed: above 0'),
    (lambda: sample_timesteps(2, 10, 'logit_normal', mean=float('nan')), r'mean is nan; allowed: a finite number'),
    (lambda: make_betas(['linear']), r"schedule is \['linear'\]; allowed: linear"),
]


@pytest.mark.parametrize('call, message', BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_clear_value_error(call, message):
    with pytest.raises(ValueError, match=message) as caught: call()
    assert '\n' not in str(caught.value)
