"Training: going on after a real kill, the average, short numbers, no waiting, checkpoints that are refused."
import io
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdcourse.data import mnist
from sdcourse.noise import PREDICTION_TYPES, add_noise, make_alphas_cumprod, make_betas, snr, split_output

with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    from sdcourse.training import (
        CHECKPOINT,
        EMA,
        Autocast,
        Noising,
        PlainDenoiser,
        Task,
        diffusion_learner,
        epoch_generator,
        fit,
        loss_by_timestep,
        make_learner,
    )

ABAR = make_alphas_cumprod(make_betas('squaredcos_cap_v2'))
DIGITS = mnist('test')


def few(device='cpu', n=320, bs=64):
    "Loaders of a few hundred digits"
    def loader(first, last, **kwargs):
        images, labels = DIGITS.images[first:last], DIGITS.labels[first:last]
        return DataLoader(range(last - first), bs=bs, create_item=lambda i: i,
                          create_batch=lambda ids: (images[ids], labels[ids]), **kwargs)
    return DataLoaders(loader(0, n, shuffle=True, drop_last=True), loader(n, n + 128), device=device)


class Labelled(PlainDenoiser):
    "Takes labels, as a U-Net does, and remembers them"
    def __init__(self, channels=4, layers=2, num_train_timesteps=1000):
        super().__init__(channels, layers, num_train_timesteps)
        self.seen = []

    def forward(self, sample, timestep, context=None, labels=None):
        self.seen.append((self.training, labels))
        return super().forward(sample, timestep)


def make(device='cpu', n=320, model=None, **kwargs):
    "A learner with a small network, always the same start"
    torch.manual_seed(0)
    return diffusion_learner(few(device, n), model or PlainDenoiser(8, 3), ABAR, **{'seed': 1, **kwargs})


def train(learn, epochs=3, lr=5e-3, **kwargs): return fit(learn, epochs, lr, progress=False, **kwargs)


def losses(rows): return [(row['epoch'], row['train'], row['valid']) for row in rows]


def same(a, b):
    "Whether two models have the same weights, to the last bit"
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- going on after a kill

def child(folder):
    "A training that waits in the middle of its second epoch, once, for somebody to kill it"
    from pathlib import Path

    def wait(self):
        if self.training and self.epoch == 1 and self.iter == 2 and not (Path(folder)/'waiting').exists():
            (Path(folder)/'waiting').touch()
            time.sleep(600)
    learn = make(prediction_type='v_prediction')
    rows = train(learn, folder=folder, cbs=[Callback(before_batch=wait)])
    torch.save((losses(rows), learn.model.state_dict(), learn.ema.average.state_dict()), Path(folder)/'result')


def start(folder):
    "That training in a process of its own"
    code = 'import sys; sys.path.insert(0, sys.argv[1]); import test_training; test_training.child(sys.argv[2])'
    here = os.path.dirname(os.path.abspath(__file__))
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, here, str(folder)], start_new_session=True,
                            env={**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())})


def test_killed_and_resumed(tmp_path):
    process = start(tmp_path)
    try:
        while not (tmp_path/'waiting').exists():
            assert process.poll() is None, 'it ended by itself'
            time.sleep(.1)
    finally: process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (tmp_path/CHECKPOINT).exists() and not (tmp_path/'result').exists()
    assert start(tmp_path).wait(timeout=300) == 0
    rows, weights, average = torch.load(tmp_path/'result')
    whole = make(prediction_type='v_prediction')
    assert losses(train(whole)) == rows
    assert all(torch.equal(v, weights[k]) for k, v in whole.model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in whole.ema.average.state_dict().items())


class Stop(Exception):
    "Somebody pulls the plug"


def stopped(folder, epoch=1, **kwargs):
    "A training that ends early, with a checkpoint"
    def stop(self):
        if self.training and self.epoch == epoch and self.iter == 2: raise Stop('no power')
    with pytest.raises(Stop): train(make(**kwargs), folder=folder, cbs=[Callback(before_batch=stop)])


@pytest.mark.parametrize('epoch', [1, 2])
def test_resumed_on(device, tmp_path, epoch):
    "On each device, after one epoch and after two; with shorter numbers"
    stopped(tmp_path, epoch, device=device, dtype=torch.bfloat16)
    again, whole = (make(device=device, dtype=torch.bfloat16) for _ in range(2))
    a, b = losses(train(again, folder=tmp_path)), losses(train(whole))
    if device == 'cpu': assert a == b and same(again.model, whole.model) and same(again.ema.average, whole.ema.average)
    else: assert torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-3)
    assert again.ema.steps == whole.ema.steps == 15


def test_finished_training_is_not_repeated(tmp_path):
    learn, again = make(), make()
    rows = train(learn, 1, folder=tmp_path)
    assert train(again, 1, folder=tmp_path) == rows and same(learn.model, again.model)


def test_table_of_a_resumed_training(tmp_path, capsys):
    stopped(tmp_path)
    fit(make(), 3, 5e-3, folder=tmp_path)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in shown if len(line) == 4 and line[0] in '012'] == ['0', '1', '2']


# ---- checkpoints that are refused

def refused(folder, message, learn=None, lr=5e-3, **kwargs):
    "Going on raises one clear error, leaves the learner and the folder as they were"
    learn = learn or make()
    before, files = deepcopy(learn.model), {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=message) as e: train(learn, lr=lr, folder=folder, **kwargs)
    assert str(folder) in str(e.value) and '\n' not in str(e.value)
    assert same(before, learn.model) and {p.name: p.read_bytes() for p in folder.iterdir()} == files


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "The bytes of a checkpoint after one epoch"
    folder = tmp_path_factory.mktemp('saved')
    stopped(folder)
    assert [p.name for p in folder.iterdir()] == [CHECKPOINT]
    return (folder/CHECKPOINT).read_bytes()


def flipped(data):
    "One bit of a weight is wrong"
    weights = torch.load(io.BytesIO(data))['model']
    i = data.index(max(weights.values(), key=torch.numel).numpy().tobytes()) + 100
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1:]


@pytest.mark.parametrize('damage', [lambda data: b'', lambda data: data[:100], lambda data: data[:-200],
                                    lambda data: b'not a checkpoint', flipped])
def test_damaged(saved, tmp_path, damage):
    (tmp_path/CHECKPOINT).write_bytes(damage(saved))
    refused(tmp_path, 'is damaged, remove it')


@pytest.mark.parametrize('content', [[1, 2], {}, {'model': {}}, PlainDenoiser(8, 3).state_dict(), print])
def test_foreign_file(tmp_path, content):
    torch.save(content, tmp_path/CHECKPOINT)
    refused(tmp_path, 'is damaged, remove it')


@pytest.mark.parametrize('other,message', [
    (dict(seed=2), 'seed was 1 and is 2'), (dict(prediction_type='sample'), "prediction_type was 'epsilon'"),
    (dict(distribution='logit_normal'), "is 'logit_normal'"), (dict(ema=.9), 'ema was 0.999 and is 0.9'),
    (dict(n=256), 'steps was 5 and is 4'), (dict(dtype=torch.bfloat16), 'dtype was'),
    (dict(model=PlainDenoiser(4, 3)), 'other weights'), (dict(model=PlainDenoiser(8, 4)), 'other weights')])
def test_another_training(saved, tmp_path, other, message):
    (tmp_path/CHECKPOINT).write_bytes(saved)
    refused(tmp_path, f'belongs to another training, remove it.*{message}', make(**other))


@pytest.mark.parametrize('other,message', [(dict(lr=1e-3), 'lr was 0.005 and is 0.001'), (dict(wd=.1), 'wd was 0.01'),
                                           (dict(epochs=4), 'epochs was 3 and is 4'),
                                           (dict(settings={'batch': 2}), 'batch was None and is 2')])
def test_other_arguments(saved, tmp_path, other, message):
    (tmp_path/CHECKPOINT).write_bytes(saved)
    refused(tmp_path, message, **other)


def test_a_crash_while_writing_leaves_the_last_good_file(saved, tmp_path, monkeypatch):
    (tmp_path/CHECKPOINT).write_bytes(saved)
    def full(state, path):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(ValueError, match='No space left on device'): train(make(), folder=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {CHECKPOINT: saved}


# ---- bad arguments

@pytest.mark.parametrize('epochs', [0, -1, 1.5, '3', None])
def test_epochs(epochs):
    with pytest.raises(ValueError, match='at least 1, not') as e: train(make(), epochs)
    assert repr(epochs) in str(e.value)


@pytest.mark.parametrize('lr', [0, -1e-3, float('nan')])
def test_learning_rate(lr):
    with pytest.raises(ValueError, match='lr must be above 0'): train(make(), lr=lr)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match='there is no folder .*nowhere'): train(make(), folder=tmp_path/'nowhere')


@pytest.mark.parametrize('bad,message', [
    (dict(dtype=torch.float16), 'torch.float32 or torch.bfloat16, got torch.float16'), (dict(dtype='bf16'), 'got bf16'),
    (dict(prediction_type='noise'), "'noise'; allowed: epsilon, sample, v_prediction"),
    (dict(distribution='normal'), "'normal'; allowed: uniform, logit_normal"),
    (dict(drop=1.5), 'between 0 and 1, not 1.5'), (dict(ema=1.), 'below 1, not 1.0'), (dict(ema=-.1), 'not -0.1')])
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message): make(**bad)


# ---- noise, order, labels

def test_random_numbers_depend_on_seed_and_epoch_alone():
    draws = {(s, e): torch.randn(4, generator=epoch_generator(s, e, 'cpu')) for s in (0, 1) for e in (-1, 0, 1)}
    torch.manual_seed(3)
    assert all(torch.equal(draw, torch.randn(4, generator=epoch_generator(*key, 'cpu'))) for key, draw in draws.items())
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 6


def batches(seed, epochs):
    "(epoch, training, labels, xt, t) of each batch of a training"
    seen = []
    learn = make(seed=seed)
    labels = Callback(before_batch=lambda self: seen.append([self.epoch, self.training, self.y.clone()]))
    labels.order = -5                                                        # before Noising takes the labels away
    after = Callback(after_pred=lambda self: seen[-1].extend([self.xb[0].clone(), self.xb[1].clone()]))
    train(learn, epochs, cbs=[labels, after])
    return seen


def test_order_and_validation():
    a, b, c = batches(1, 2), batches(1, 2), batches(2, 2)
    assert all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x[2:], y[2:]))
    first, second = ([x for x in a if x[1] and x[0] == epoch] for epoch in (0, 1))
    assert not any(torch.equal(x[2], y[2]) for x, y in zip(first, second)), 'another order in each epoch'
    assert not any(torch.equal(x[2], y[2]) for x, y in zip(first, [x for x in c if x[1]]))
    for epoch in (first, second): assert sorted(torch.cat([x[2] for x in epoch])) == sorted(DIGITS.labels[:320])
    first, second = ([x for x in a if not x[1] and x[0] == epoch] for epoch in (0, 1))
    assert all(torch.equal(p, q) for x, y in zip(first, second) for p, q in zip(x[2:], y[2:])), 'the same noise'


@pytest.mark.parametrize('drop', [0., .3, 1.])
def test_labels_are_dropped_at_the_rate_asked(device, drop):
    model = Labelled()
    train(make(device, n=1280, model=model, null_label=10, drop=drop), 2)
    learned, checked = (torch.cat([labels for training, labels in model.seen if training == kind]).cpu()
                        for kind in (True, False))
    n = len(learned)
    assert n == 2560 and abs((learned == 10).float().mean().item() - drop) <= 4*(drop*(1 - drop)/n)**.5
    assert (checked < 10).all() and learned.unique().tolist() == ([*range(10)]*(drop < 1) + [10]*(drop > 0))


def test_no_labels_without_a_null_label():
    model = Labelled()
    train(make(model=model), 1)
    assert all(labels is None for _, labels in model.seen)


def test_prepare():
    shapes = []
    class Folded(PlainDenoiser):
        def forward(self, sample, timestep):
            shapes.append(sample.shape)
            return super().forward(sample[:, :1], timestep).expand(sample.shape)
    train(make(model=Folded(4, 2), prepare=lambda x: F.pixel_unshuffle(x, 2)), 1)
    assert set(shapes) == {(64, 4, 14, 14)}


# ---- the answers

class Oracle(nn.Module):
    "Knows the clean pictures, and answers as it was asked to"
    def __init__(self, x0, kind):
        super().__init__()
        self.x0, self.kind = x0, kind

    def forward(self, xt, t):
        abar = ABAR.to(xt.device)
        eps = split_output(self.x0, xt, t, abar, 'sample')[1]
        signal, noise = abar[t]**.5, (1 - abar[t])**.5
        return {'epsilon': eps, 'sample': self.x0, 'v_prediction': signal*eps - noise*self.x0}[self.kind]


@pytest.mark.parametrize('kind', PREDICTION_TYPES)
def test_oracle(device, kind):
    x0, at = DIGITS.images[:16].to(device), torch.tensor([3, 100, 500, 900, 990], device=device)
    g = torch.Generator(device).manual_seed(0)
    found = loss_by_timestep(Oracle(x0, kind), x0, at, ABAR.to(device), g, kind)
    assert found.shape == (5,) and found.max() < 1e-5
    off = loss_by_timestep(Oracle(x0 + .1, 'sample'), x0, at, ABAR.to(device), g, 'sample')
    assert torch.allclose(off.cpu(), .01*snr(ABAR)[at.cpu()], rtol=1e-2)


@pytest.mark.parametrize('kind', PREDICTION_TYPES)
@pytest.mark.parametrize('distribution', ['uniform', 'logit_normal'])
def test_each_target_is_learned(device, kind, distribution):
    "A short version of the lesson's comparisons"
    learn = make(device, prediction_type=kind, distribution=distribution)
    rows = train(learn, 4, 1e-2)
    assert rows[-1]['valid'] < .9*rows[0]['valid']
    g, at = torch.Generator(device).manual_seed(0), torch.tensor([10, 500, 990])
    found = loss_by_timestep(learn.ema.average, DIGITS.images[:16].to(device), at, ABAR.to(device), g, kind)
    assert found.isfinite().all()


def test_target_is_what_the_model_gets(device):
    "The loss of the learner is the mean squared error against the noise that is in xt"
    x0, seen = DIGITS.images[:64], []
    learn = make(device, n=64)
    learn.dls.train.shuffle = False
    train(learn, 1, cbs=[Callback(after_pred=lambda self: seen.append((self.xb, self.yb)) if self.training else None)])
    (xt, t), (eps,) = seen[0]
    torch.testing.assert_close(add_noise(x0, eps.cpu(), t.cpu(), ABAR), xt.cpu())


# ---- the average

def test_average_by_hand(device):
    weights = []
    def look(self): weights.append([p.detach().cpu().double() for p in self.model.parameters()])
    learn = make(device, ema=.5)
    begin = [p.detach().cpu().double() for p in learn.model.parameters()]
    train(learn, 3, cbs=[Callback(after_step=look)])
    for n, now in enumerate(weights, 1):
        d = min(.5, n/(n + 9))
        begin = [d*a + (1 - d)*p for a, p in zip(begin, now)]
    for a, p in zip(learn.ema.average.parameters(), begin):
        assert not a.requires_grad and a.device.type == device
        torch.testing.assert_close(a.cpu().double(), p, rtol=1e-5, atol=1e-6)


def test_average_copies_what_is_counted():
    class Normed(PlainDenoiser):
        def __init__(self, channels=4, layers=2, num_train_timesteps=1000):
            super().__init__(channels, layers, num_train_timesteps)
            self.norm = nn.BatchNorm2d(1)

        def forward(self, sample, timestep): return self.norm(super().forward(sample, timestep))
    learn = make(model=Normed())
    train(learn, 1)
    assert learn.model.norm.num_batches_tracked == learn.ema.average.norm.num_batches_tracked == 5
    assert torch.equal(learn.model.norm.running_var, learn.ema.average.norm.running_var)


# ---- short numbers

def test_bfloat16(device):
    inside, inside_loss = set(), set()
    learn = make(device, dtype=torch.bfloat16)
    learn.model.layers[2].register_forward_hook(lambda layer, args, output: inside.add(output.dtype))
    rows = train(learn, 4, 1e-2, cbs=[Callback(after_loss=lambda self: inside_loss.add(self.loss.dtype))])
    assert inside == {torch.bfloat16} and inside_loss == {torch.float32} and rows[-1]['valid'] < .9*rows[0]['valid']
    for model in (learn.model, learn.ema.average): assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled(device)
    exact = train(make(device), 4, 1e-2)
    assert abs(rows[-1]['valid'] - exact[-1]['valid']) < .05*exact[-1]['valid']


def test_autocast_ends_with_an_error(device):
    class Broken(PlainDenoiser):
        def forward(self, sample, timestep): raise Stop('no power')
    with pytest.raises(Stop): train(make(device, model=Broken(4, 2), dtype=torch.bfloat16))
    assert not torch.is_autocast_enabled(device)


def test_autocast_may_be_left_twice():
    autocast = Autocast()
    autocast.leave()
    autocast.leave()


# ---- no step waits for a copy to the host

class Copies(TorchDispatchMode):
    "Counts numbers that are read out of tensors of a device, as a GPU would have to be waited for"
    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = func is torch.ops.aten._local_scalar_dense.default
        moved = func is torch.ops.aten._to_copy.default and (kwargs or {}).get('device') == torch.device('cpu')
        if (read or moved and self.device != 'cpu') and args[0].device.type == self.device and not self.excused():
            self.count += 1
        return func(*args, **(kwargs or {}))

    def excused(self):
        "Whether it stays on the CPU anyhow: lesson 03's checks, which spare a GPU, and fastai's schedule"
        if self.device != 'cpu': return False
        files = [frame.filename.replace('\\', '/') for frame in traceback.extract_stack()]
        asks = [f for f in files if '/sdcourse/' in f or '/fastai/' in f][-1:]                # the innermost of ours
        return any(f.endswith(('/sdcourse/noise.py', '/fastai/callback/schedule.py')) for f in asks)


@contextmanager
def counted(device):
    "Yields the counter"
    with Copies(device) as copies: yield copies


def copies(device, n, dtype=torch.float32, progress=False, null_label=None, cbs=()):
    "How often one epoch over n digits waits"
    model = Labelled() if null_label else PlainDenoiser(4, 2)
    learn = make(device, n=n, model=model, dtype=dtype, null_label=null_label)
    with counted(device) as found: fit(learn, 1, 1e-3, progress=progress, cbs=cbs)
    return found.count


@pytest.mark.parametrize('dtype,null_label', [(torch.float32, None), (torch.bfloat16, 10)])
def test_no_step_waits(device, dtype, null_label):
    assert copies(device, 640, dtype, null_label=null_label) == copies(device, 1280, dtype, null_label=null_label)


def test_the_bar_asks_at_every_50th_step(device, capsys):
    few, many = (copies(device, 64*steps, progress=True) for steps in (40, 110))
    assert many - few == 2


def test_waiting_is_seen(device):
    ask = Callback(after_loss=lambda self: self.loss.item() if self.training else None)
    assert copies(device, 640, cbs=[ask]) - copies(device, 640) == 10


# ---- the network

def test_plain_denoiser(device):
    torch.manual_seed(0)
    model = PlainDenoiser(8, 4).to(device)
    x = torch.randn(3, 1, 12, 20, device=device, requires_grad=True)
    out = model(x, torch.tensor([1, 500, 999], device=device))
    assert out.shape == x.shape
    torch.testing.assert_close(model(x, 500)[1], out[1])
    assert not torch.allclose(model(x, 1)[1], out[1])
    out[0, 0, 6, 10].backward()
    seen = x.grad[0, 0] != 0
    assert seen.any(0).sum() == seen.any(1).sum() == 2*4 + 1


def test_plain_denoiser_is_saved(tmp_path):
    model = PlainDenoiser(4, 3)
    model.save_pretrained(tmp_path)
    assert same(model, PlainDenoiser.from_pretrained(tmp_path))


def test_callbacks_work_in_any_learner(device):
    from fastai.learner import Learner
    learn = Learner(few(device), PlainDenoiser(4, 2).to(device), loss_func=F.mse_loss, cbs=[Noising(ABAR), EMA()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.ema.steps == 5


# ---- other tasks

class Doubled(Task):
    "From a picture to twice the picture"
    def __init__(self, seed=0, facts=None):
        super().__init__()
        self.seed, self.facts = seed, facts or {}

    def before_batch(self): self.learn.xb, self.learn.yb = (self.x,), (2*self.x,)


class Two(nn.Module):
    "Says two things at once: what it was asked for, and the mean of what it got"
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x): return self.layer(x), x.mean((1, 2, 3))


def two_losses(output, x): return F.mse_loss(output[0], x) + F.mse_loss(output[1], x.mean((1, 2, 3))/2)


def make_task(device='cpu', task=None, **kwargs):
    "A learner of the task above, always the same start"
    torch.manual_seed(0)
    return make_learner(few(device), Two(), task or Doubled(), two_losses, **kwargs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_any_task(device, dtype):
    "Answers of two parts: both come back in float32, whatever the model computes in"
    seen, learn = [], make_task(device, dtype=dtype)
    inside = set()
    learn.model.layer.register_forward_hook(lambda layer, args, output: inside.add(output.dtype))
    look = Callback(after_pred=lambda self: seen.append(self.pred))
    look.order = Autocast.order + 1
    rows = train(learn, 4, 5e-2, cbs=[look])
    assert inside == {dtype} and rows[-1]['valid'] < .8*rows[0]['valid']
    assert all(isinstance(pred, tuple) and {p.dtype for p in pred} == {torch.float32} for pred in seen)
    assert not torch.is_autocast_enabled(device) and learn.ema.steps == 20


def test_facts_reach_the_checkpoint(tmp_path):
    def stop(self):
        if self.epoch == 1: raise Stop('no power')
    facts, stop = dict(weight=.5, kind='doubled'), Callback(before_batch=stop)
    with pytest.raises(Stop): train(make_task(task=Doubled(3, facts), ema=.9), folder=tmp_path, cbs=[stop])
    kept = torch.load(tmp_path/CHECKPOINT, weights_only=True)['settings']
    assert {k: kept[k] for k in facts} == facts and kept['ema'] == .9 and kept['steps'] == 5
    other = make_task(task=Doubled(3, facts | dict(weight=.6)), ema=.9)
    refused(tmp_path, 'another training.*weight was 0.5 and is 0.6$', other)
    assert len(train(make_task(task=Doubled(3, facts), ema=.9), folder=tmp_path)) == 3


def order_of(seed, epochs=2):
    "The first digits of each batch, training then validation, and a random number that the task drew"
    seen, task = [], Doubled(seed)
    def look(self):
        number = torch.rand(1, generator=task.generator, device=task.where).item()
        seen.append((self.epoch, self.training, self.x.flatten(1).sum(1).tolist(), number))
    look = Callback(before_batch=look)
    look.order = -5
    train(make_task(task=task), epochs, cbs=[look])
    return seen


def test_a_task_shuffles_and_draws_by_seed_and_epoch():
    a, b, c = order_of(1), order_of(1), order_of(2)
    assert a == b != c
    first, second = ([x[2:] for x in a if x[1] and x[0] == epoch] for epoch in (0, 1))
    assert first != second and sorted(s for x in first for s in x[0]) == sorted(s for x in second for s in x[0])
    first, second = ([x[2:] for x in a if not x[1] and x[0] == epoch] for epoch in (0, 1))
    assert first == second, 'validation is always the same'


@pytest.mark.parametrize('bad,message', [(dict(dtype=torch.float16), 'got torch.float16'), (dict(ema=1.), 'below 1')])
def test_bad_arguments_of_make_learner(bad, message):
    with pytest.raises(ValueError, match=message): make_task(**bad)
