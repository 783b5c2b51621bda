"Schedulers against the reference, sampling, wrong arguments, a short training, and the shipped weights."
import json
import math
import subprocess
import sys

import diffusers
import pytest
import torch

from sdcourse import data, digits
from sdcourse.data import Digits, mnist
from sdcourse.digits import (
    ANY,
    SCHEDULER,
    SCHEDULERS,
    UNET,
    denoise,
    fold,
    guided,
    load_digits,
    make_scheduler,
    sample,
    train_digits,
    unfold,
)
from sdcourse.gradients import DigitClassifier, accuracy
from sdcourse.model import find_pretrained, read_manifest, write_manifest
from sdcourse.unet import UNet2DConditionModel

TINY = UNET | dict(block_out_channels=(8, 16, 16))  # the interface of the digits' U-Net, a hundredth of its work


def generator(seed=0, device='cpu'): return torch.Generator(device).manual_seed(seed)


def make_tiny(folder, seed=0):
    "A U-Net for digits that has learned nothing"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**TINY).save_pretrained(folder)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory): return make_tiny(tmp_path_factory.mktemp('weights')/'tiny')


@pytest.fixture
def draw(tiny):
    "`sample` with the tiny U-Net on the CPU, from the same noise"
    def run(labels=(3, 1, 4), steps=4, **words):
        return sample(labels, steps, **dict(generator=generator(), weights=tiny, device='cpu') | words)
    return run


# ---- folding

def test_fold():
    x = torch.arange(2*784.).view(2, 1, 28, 28)
    assert torch.equal(unfold(fold(x)), x)
    assert fold(x)[1, :, 3, 5].tolist() == x[1, 0, 6:8, 10:12].flatten().tolist()
    assert torch.equal(fold(x).flatten(1).sort().values, x.flatten(1)), 'the same numbers: noise stays noise'


# ---- schedulers

@pytest.fixture(scope='module')
def answers():
    "Noisy pictures and what a model might answer"
    return torch.randn(2, 3, 4, 14, 14, generator=generator())


def same(theirs, ours, most=1e-5):
    "Whether both schedulers take the same step"
    for a, b in zip((theirs.prev_sample, theirs.pred_original_sample), ours): assert (a - b).abs().max() <= most


# their DDIM goes down T//n timesteps, ours to the next of the list: the same where n divides T
@pytest.mark.parametrize('n', [1, 2, 8, 25, 50, 1000])
@pytest.mark.parametrize('clip', [True, False], ids=['clipped', 'not clipped'])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_ddim_is_the_references(answers, name, clip, n):
    output, xt = answers
    config = SCHEDULER | dict(clip_sample=clip)
    theirs, ours = diffusers.DDIMScheduler(**config), make_scheduler(name, **config)
    for s in (theirs, ours): s.set_timesteps(n)
    assert theirs.timesteps.tolist() == ours.timesteps and theirs.init_noise_sigma == ours.init_noise_sigma
    for i, t in enumerate(ours.timesteps[::max(1, n//25)]):
        step = theirs.step(output, t, xt, SCHEDULERS[name], use_clipped_model_output=clip, generator=generator(i))
        most = 1e-3 if t == 999 else 1e-5  # there theirs subtracts numbers that are nearly equal
        same(step, ours.step(output, t, xt, generator(i)), most)


@pytest.mark.parametrize('n', [25, 1000])
def test_ddpm_is_the_references(answers, n):
    output, xt = answers
    theirs, ours = diffusers.DDPMScheduler(**SCHEDULER), make_scheduler('ddpm', **SCHEDULER)
    for s in (theirs, ours): s.set_timesteps(n)
    for i, t in enumerate(ours.timesteps[::n//25]):
        same(theirs.step(output, t, xt, generator=generator(i)), ours.step(output, t, xt, generator(i)), 1e-5)


@pytest.mark.parametrize('kind', ['epsilon', 'sample'])
def test_other_answers(answers, kind):
    output, xt = answers
    config = SCHEDULER | dict(prediction_type=kind)
    theirs, ours = diffusers.DDIMScheduler(**config), make_scheduler(**config)
    for s in (theirs, ours): s.set_timesteps(10)
    for t in ours.timesteps: same(theirs.step(output, t, xt, use_clipped_model_output=True), ours.step(output, t, xt))


def test_any_number_of_steps():
    "Where a timestep lies between two, the last bit decides; and for some n the reference has one too many, -1"
    theirs, ours = diffusers.DDIMScheduler(**SCHEDULER), make_scheduler(**SCHEDULER)
    for n in range(1, 1001):
        for s in (theirs, ours): s.set_timesteps(n)
        assert len(ours.timesteps) == n and ours.timesteps[0] == 999 and ours.timesteps[-1] >= 0
        assert all(abs(a - b) <= 1 for a, b in zip(theirs.timesteps.tolist(), ours.timesteps)), n
        assert len(set(ours.timesteps)) == n, 'no timestep twice'


def test_true_answer_leads_to_the_picture():
    "With the right v at each step, one picture comes out, whatever the noise and the number of steps"
    x0, xt = fold(mnist('test').images[:3]), torch.randn(3, 4, 14, 14, generator=generator())
    ours = make_scheduler(**SCHEDULER)
    ours.set_timesteps(5)
    for t in ours.timesteps:
        a = ours.alphas_cumprod[t]
        eps = (xt - a.sqrt()*x0)/(1 - a).sqrt()
        xt = ours.step(a.sqrt()*eps - (1 - a).sqrt()*x0, t, xt).prev_sample
    assert (xt - x0).abs().max() < 1e-4


# ---- sampling

THEIRS = ['DDIM', 'DDPM', 'EulerDiscrete', 'EulerAncestralDiscrete', 'DPMSolverMultistep', 'PNDM']


@pytest.mark.parametrize('name', THEIRS)
def test_any_scheduler(draw, name):
    scheduler = getattr(diffusers, f'{name}Scheduler').from_config(SCHEDULER)
    x = draw(scheduler=scheduler, bs=2)
    assert x.shape == (3, 1, 28, 28) and x.isfinite().all() and x.abs().max() <= 1 and x.std() > 0
    assert torch.equal(x, draw(scheduler=scheduler, bs=2)), 'used again, it starts again'


def test_ddim_draws_the_references_pictures(draw):
    config = SCHEDULER | dict(clip_sample=False)
    theirs, ours = diffusers.DDIMScheduler(**config), make_scheduler(**config)
    assert (draw(scheduler=theirs) - draw(scheduler=ours)).abs().max() < 1e-5


def test_ddpm_draws_the_references_pictures(draw):
    theirs = diffusers.DDPMScheduler(**SCHEDULER)
    assert (draw(scheduler=theirs) - draw(scheduler='ddpm')).abs().max() < 2e-3


@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_same_generator_same_pictures(draw, scheduler):
    a, b, c = (draw(scheduler=scheduler, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_without_a_generator(draw, tiny):
    "Torch's own source of randomness is used, and loading does not disturb it"
    torch.manual_seed(0)
    a = draw(generator=None)
    digits._load.cache_clear()
    torch.manual_seed(0)
    assert torch.equal(a, draw(generator=None))


def test_batches(draw):
    labels = list(range(7))
    assert (draw(labels, bs=2) - draw(labels, bs=100)).abs().max() < 1e-5


def test_number_of_labels(draw):
    assert [len(draw(labels)) for labels in ([0], range(10), torch.tensor([1, 2]))] == [1, 10, 2]
    labels = torch.tensor([9, 9])
    draw(labels)
    assert labels.tolist() == [9, 9]


def test_on_step(draw):
    seen = []
    x = draw(range(5), 3, bs=2, on_step=seen.append)
    assert [s.i for s in seen] == [0, 1, 2]*3 and [len(s.xt) for s in seen] == [2]*6 + [1]*3
    assert [s.t for s in seen] == [999, 666, 332]*3
    assert all(s.xt.shape == s.x0.shape and s.xt.shape[1:] == (1, 28, 28) for s in seen)
    assert torch.equal(torch.cat([s.xt for s in seen if s.i == 2]).clamp(-1, 1), x)


def test_scheduler_that_does_not_say_x0(draw):
    seen = []
    draw(scheduler=diffusers.PNDMScheduler.from_config(SCHEDULER), on_step=seen.append)
    assert seen and all(s.x0 is None for s in seen)


@pytest.mark.parametrize('scale, size', [(1, 3), (1., 3), (1.5, 6), (0, 3), (-1, 6)])
def test_calls_of_the_model(draw, tiny, scale, size):
    sizes, model = [], load_digits(tiny, 'cpu')
    hook = model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    draw(guidance_scale=scale)
    hook.remove()
    assert sizes == [size]*4, 'one call a step; where both answers count, both questions in one batch'


def test_guidance(tiny):
    model, labels, xt = load_digits(tiny, 'cpu'), torch.tensor([2, 7]), torch.randn(2, 4, 14, 14, generator=generator())
    with torch.no_grad():
        given, without = model(xt, 500, None, labels), model(xt, 500, None, torch.full_like(labels, ANY))
        assert (given - without).abs().max() > 1e-3
        for scale in (0, 1, 1.5, 7):
            wanted = (1 - scale)*without + scale*given
            assert (guided(model, xt, 500, labels, scale) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_devices_and_types(draw, tiny, device, dtype):
    x = draw(device=device, dtype=dtype)
    assert x.dtype == torch.float32 and x.device.type == 'cpu' and x.isfinite().all()
    assert load_digits(tiny, device, dtype).dtype == dtype
    assert (x - draw()).abs().mean() < .1, 'noise from the CPU: nearly the same pictures everywhere'


def test_generator_of_the_device(draw, device):
    x = draw(device=device, generator=generator(device=device), scheduler='ddpm')
    assert torch.equal(x, draw(device=device, generator=generator(device=device), scheduler='ddpm'))


@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_nothing_is_copied_to_the_host(scheduler):
    "On the meta device there are no values: what looks at one, or copies it to the host, fails"
    model = UNet2DConditionModel(**TINY).to('meta')
    scheduler = make_scheduler(scheduler, **SCHEDULER)
    scheduler.set_timesteps(5, device='meta')
    xt, labels = torch.empty(2, 4, 14, 14, device='meta'), torch.zeros(2, dtype=torch.long, device='meta')
    with pytest.raises((NotImplementedError, RuntimeError)): xt.sum().item()
    done = list(denoise(model, scheduler, xt, labels, generator=generator()))
    assert len(done) == 5 and {s.xt.device.type for s in done} == {'meta'}


# ---- weights

@pytest.fixture
def loads(monkeypatch):
    "Which weights were read from the disk"
    real, seen = UNet2DConditionModel.from_pretrained, []
    def counting(folder, **words):
        seen.append(folder)
        return real(folder, **words)
    monkeypatch.setattr(UNet2DConditionModel, 'from_pretrained', counting)
    return seen


def test_loaded_once(draw, tmp_path, loads):
    folder = make_tiny(tmp_path/'a')
    first, second = draw(weights=folder), draw(weights=str(folder))
    assert len(loads) <= 2 and torch.equal(first, second)
    loads.clear()
    for _ in range(3): draw(weights=folder)
    assert not loads and load_digits(folder, 'cpu') is load_digits(folder, 'cpu')


def test_new_weights_are_seen(draw, tmp_path, loads):
    folder = make_tiny(tmp_path/'a')
    first = draw(weights=folder)
    make_tiny(folder, seed=1)
    second = draw(weights=folder)
    assert len(loads) == 2 and not torch.equal(first, second)


def test_reference_reads_ours(trained):
    folder, *_ = trained
    theirs, ours = diffusers.UNet2DConditionModel.from_pretrained(folder), load_digits(folder, 'cpu')
    x, t, labels = torch.randn(4, 4, 14, 14, generator=generator()), torch.tensor([0, 9, 500, 999]), torch.arange(4)
    with torch.no_grad(): a, b = theirs.eval()(x, t, None, labels).sample, ours(x, t, None, labels)
    assert (a - b).abs().max() < 1e-5
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder)
    assert {k: scheduler.config[k] for k in SCHEDULER} == SCHEDULER


# ---- what is wrong: (arguments, what the message must name)

WRONG = {
    'no labels': (dict(labels=[]), '0 to 9'),
    'ten': (dict(labels=[3, 10]), '0 to 9'),
    'a negative label': (dict(labels=[-1]), '0 to 9'),
    'half a label': (dict(labels=[1.5]), '0 to 9'),
    'a letter': (dict(labels='a'), '0 to 9'),
    'one label': (dict(labels=3), '0 to 9'),
    'no steps': (dict(steps=0), '1'),
    'negative steps': (dict(steps=-3), '-3'),
    'too many steps': (dict(steps=1001), '1001'),
    'half a step': (dict(steps=2.5), '2.5'),
    'a word for steps': (dict(steps='ten'), 'ten'),
    'None for steps': (dict(steps=None), 'None'),
    'unknown scheduler': (dict(scheduler='euler'), "'euler'.*ddim, ddpm"),
    'None for a scheduler': (dict(scheduler=None), "'ddim' or 'ddpm'"),
    'a number for a scheduler': (dict(scheduler=3), "'ddim' or 'ddpm'"),
    'unknown weights': (dict(weights='unicorn'), "'unicorn'.*classifier"),
    'no such folder': (dict(weights='no/such/folder'), 'no/such/folder'),
    'weights of another model': (dict(weights='classifier'), 'DigitClassifier'),
    'None for guidance': (dict(guidance_scale=None), 'guidance_scale.*None'),
    'a word for guidance': (dict(guidance_scale='much'), 'guidance_scale.*much'),
    'no number': (dict(guidance_scale=math.nan), 'guidance_scale.*nan'),
    'infinity': (dict(guidance_scale=-math.inf), 'guidance_scale.*inf'),
    'a seed for a generator': (dict(generator=0), 'generator.*0'),
    'no batch': (dict(bs=0), 'bs.*0'),
    'a negative batch': (dict(bs=-2), 'bs.*-2'),
    'half a batch': (dict(bs=1.5), 'bs.*1.5'),
    'unknown device': (dict(device='abacus'), 'abacus'),
    'whole numbers': (dict(dtype=torch.int8), 'int8'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong(draw, name):
    words, named = WRONG[name]
    with pytest.raises(ValueError, match=named): draw(**words, on_step=lambda step: pytest.fail('it has begun'))


@pytest.mark.parametrize('steps', [0, -1, 1.5, None, 1001])
def test_wrong_steps_of_another_scheduler(draw, steps):
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    with pytest.raises(ValueError, match=str(steps)): draw(steps=steps, scheduler=scheduler)


def test_other_spacings_are_refused():
    with pytest.raises(ValueError, match="'leading'.*trailing"): make_scheduler(timestep_spacing='leading')


@pytest.mark.parametrize('manifest', [False, True], ids=['without a manifest', 'with a manifest'])
@pytest.mark.parametrize('kept', [slice(100), slice(-8), slice(0)], ids=['a stump', 'cut short', 'empty'])
def test_damaged_weights(draw, tmp_path, manifest, kept):
    folder = make_tiny(tmp_path/'a')
    if manifest: write_manifest(folder)
    file = folder/UNet2DConditionModel.weights_name
    file.write_bytes(file.read_bytes()[kept])
    with pytest.raises(ValueError, match='safetensors.*damaged'): draw(weights=folder)


CONFIGS = {
    'wider': (dict(block_out_channels=[16, 16, 16]), 'of another shape'),
    'deeper': (dict(layers_per_block=2), 'missing'),
    'other classes': (dict(num_class_embeds=10), 'of another shape'),
    'unknown argument': (dict(wings=2), 'wings'),
    'groups': (dict(norm_num_groups=3), 'norm_num_groups'),
    'another class': (dict(_class_name='VQModel'), 'VQModel'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_config_that_does_not_fit(draw, tmp_path, name):
    folder, (change, named) = make_tiny(tmp_path/'a'), CONFIGS[name]
    (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | change))
    with pytest.raises(ValueError, match=named): draw(weights=folder)


@pytest.mark.parametrize('change', [dict(num_class_embeds=None), dict(num_class_embeds=12), dict(in_channels=1),
                                    dict(out_channels=8)], ids=str)
def test_unet_for_something_else(draw, tmp_path, change):
    UNet2DConditionModel(**TINY | change).save_pretrained(tmp_path/'a')
    with pytest.raises(ValueError, match='something else'): draw(weights=tmp_path/'a')


# ---- training

@pytest.fixture(scope='module')
def small():
    "Trainings of a tiny U-Net on 300 digits; the samples that they are judged by are kept"
    few = {split: Digits(*(x[:300] for x in mnist(split))) for split in ('train', 'test')}
    drawn, real = [], digits.sample
    def sampling(labels, **words):
        drawn[:] = real(labels, **words), labels
        return drawn[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'sample', sampling)
        patch.setattr(data, 'mnist', few.get)
        patch.setattr(digits, 'UNET', TINY)
        patch.setattr(digits, 'digit_dataloaders', lambda *a, **k: data.digit_dataloaders(*a, **k, valid=44))
        yield drawn


def fit(folder, **words): return train_digits(folder, **dict(epochs=2, bs=64, device='cpu', progress=False) | words)


@pytest.fixture(scope='module')
def trained(small, tmp_path_factory):
    "Where a training of two epochs was saved, its manifest, and (samples, labels)"
    folder = tmp_path_factory.mktemp('trained')/'deep'/'digits'
    return folder, fit(folder), tuple(small)


def test_manifest(trained):
    folder, manifest, _ = trained
    assert read_manifest(folder) == json.loads(json.dumps(manifest))
    facts = dict(seed=0, epochs=2, steps=8, batch=64, dtype='float32', device='cpu')
    assert {k: manifest[k] for k in facts} == facts and manifest['lr'] > 0
    assert [row['epoch'] for row in manifest['losses']] == [0, 1]
    assert all(0 < row[k] < 10 for row in manifest['losses'] for k in ('train', 'valid'))
    assert manifest['seconds'] == manifest['losses'][-1]['seconds'] > manifest['losses'][0]['seconds'] > 0


def test_files(trained):
    from PIL import Image
    folder, *_ = trained
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'diffusion_pytorch_model.safetensors',
                                                       'manifest.json', 'samples.png', 'scheduler_config.json']
    with Image.open(folder/'samples.png') as sheet: assert sheet.width > 5*28
    assert load_digits(folder, 'cpu').config == UNet2DConditionModel(**TINY).config


def test_label_accuracy(trained):
    folder, manifest, (x, labels) = trained
    assert labels.bincount().tolist() == [100]*10
    assert manifest['label_accuracy'] == accuracy(DigitClassifier.from_pretrained('classifier'), x, labels)
    noise = torch.randn(1000, 4, 14, 14, generator=generator())[:4]
    scheduler = make_scheduler(**SCHEDULER)
    scheduler.set_timesteps(25)
    *_, last = denoise(load_digits(folder, 'cpu'), scheduler, noise, labels[:4])
    assert (last.xt.clamp(-1, 1) - x[:4]).abs().max() < 1e-4, 'what stands in the folder drew them'


def test_goes_on(trained, tmp_path, monkeypatch):
    "Interrupted in the second epoch and started again, a training ends with the same losses and weights"
    folder, manifest, _ = trained
    monkeypatch.setattr(digits, 'accuracy', lambda *a: .5)
    monkeypatch.setattr(digits, 'sample', lambda *a, **k: None)
    real, calls = digits.save_image, []
    def interrupted(*args, **words):
        calls.append(args)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **words)
    monkeypatch.setattr(digits, 'save_image', interrupted)
    with pytest.raises(KeyboardInterrupt): fit(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.pt', 'samples.png']
    again = fit(tmp_path)
    losses = [[row[k] for row in m['losses'] for k in ('train', 'valid')] for m in (manifest, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(calls) == 3, 'one sheet for each epoch that is trained, and one that was interrupted'
    a, b = (load_digits(f, 'cpu').state_dict() for f in (folder, tmp_path))
    assert all((a[k] - b[k]).abs().max() < 1e-3 for k in a) and not (tmp_path/'checkpoint.pt').exists()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_trains_on(small, tmp_path, device, dtype, monkeypatch):
    monkeypatch.setattr(digits, 'accuracy', lambda *a: .5)
    monkeypatch.setattr(digits, 'sample', lambda *a, **k: None)
    manifest = fit(tmp_path, epochs=1, device=device, dtype=dtype)
    assert manifest['device'] == device and manifest['dtype'] == str(dtype).removeprefix('torch.')
    assert math.isfinite(manifest['losses'][0]['valid'])


WRONG_TRAINING = {
    'no epochs': (dict(epochs=0), 'epochs.*0'),
    'half an epoch': (dict(epochs=1.5), 'epochs.*1.5'),
    'no batch': (dict(bs=0), 'bs.*0'),
    'too large a batch': (dict(bs=257), 'bs.*257'),
    'half precision': (dict(dtype=torch.float16), 'float16'),
    'no rate': (dict(lr=0), 'lr.*0'),
    'a negative rate': (dict(lr=-1.), 'lr.*-1'),
    'no number': (dict(lr=math.nan), 'lr.*nan'),
    'a word for a seed': (dict(seed='lucky'), 'lucky'),
    'unknown device': (dict(device='abacus'), 'abacus'),
}


@pytest.mark.parametrize('name', WRONG_TRAINING)
def test_wrong_training(small, tmp_path, name):
    words, named = WRONG_TRAINING[name]
    with pytest.raises(ValueError, match=named): fit(tmp_path, **words)
    assert not list(tmp_path.iterdir())


def test_file_for_a_folder(small, tmp_path):
    (tmp_path/'file').write_text('mine')
    for output in (tmp_path/'file', tmp_path/'file'/'deeper'):
        with pytest.raises(ValueError, match='file'): fit(output)
    assert (tmp_path/'file').read_text() == 'mine'


def test_checkpoint_of_another_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, 'save_digits', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): fit(tmp_path, epochs=1)
    kept = (tmp_path/'checkpoint.pt').read_bytes()
    for other in (dict(seed=1), dict(bs=32), dict(epochs=2), dict(lr=1e-3)):
        with pytest.raises(ValueError, match='another training'): fit(tmp_path, **dict(epochs=1) | other)
    assert (tmp_path/'checkpoint.pt').read_bytes() == kept
    (tmp_path/'checkpoint.pt').write_bytes(kept[:1000])
    with pytest.raises(ValueError, match='damaged'): fit(tmp_path, epochs=1)


# ---- the benchmark

def test_benchmark(root, tiny, tmp_path):
    "It runs, prints its tables and writes the same numbers; what they say after so little means nothing"
    command = [sys.executable, root/'benchmarks'/'digits.py', '--quick', '--weights', tiny, '--device', 'cpu']
    done = subprocess.run([*command, '--json', tmp_path/'a.json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/'a.json').read_text())
    assert found['machine']['torch'] == torch.__version__ and found['settings']['weights'] == str(tiny)
    assert [(q['n'], q['n_real']) for q in found['quality']] == [(200, 10_000)]
    assert all(q[k]['low'] <= q[k]['value'] <= q[k]['high'] for q in found['quality'] for k in ('fid', 'floor'))
    assert len(found['speed']) == 5 and all(len(v) == 1 and v[0] > 0 for v in found['speed'].values())
    assert {name: goal['goal'] for name, goal in found['goals'].items()} == {
        'label accuracy': 'at least 0.98', 'FID / floor': 'at most 3', 'speed of training': 'at least 1.2'}
    assert all(name in done.stdout for name in ('quality', *found['speed'], *found['goals']))


@pytest.mark.parametrize('words, named', [('--n 100', '200 and 10000'), ('--n 20000', '200 and 10000'),
                                          ('--repeats 0', 'at least 1')])
def test_wrong_benchmark(root, words, named):
    command = [sys.executable, root/'benchmarks'/'digits.py', *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr and not done.stdout


# ---- the shipped weights

@pytest.fixture(scope='module')
def shipped_digits():
    "Where the shipped weights are, and their manifest"
    folder = find_pretrained('digits')
    return folder, read_manifest(folder)


def test_shipped_files(shipped_digits):
    folder, manifest = shipped_digits
    assert sum(p.stat().st_size for p in folder.iterdir()) < 6_000_000
    assert not list(folder.glob('*.pt')), 'no checkpoint is shipped'
    config = json.loads((folder/'config.json').read_text())
    assert all(config[k] == (list(v) if isinstance(v, tuple) else v) for k, v in UNET.items())
    facts = 'seed epochs steps batch lr dtype device seconds losses label_accuracy files'.split()
    assert set(facts) <= manifest.keys() and manifest['seconds'] <= 90*60
    losses = [row['valid'] for row in manifest['losses']]
    assert len(losses) == manifest['epochs'] and losses[-1] < 1.001*min(losses)
    assert manifest['label_accuracy'] >= .98


def test_shipped_draws_what_is_asked_for():
    labels = torch.arange(100) % 10
    x = sample(labels, generator=generator(1))
    model = DigitClassifier.from_pretrained('classifier')
    assert accuracy(model, x, labels) >= .95
    for digit in range(10):
        its = x[labels == digit]
        assert accuracy(model, its, labels[labels == digit]) >= .7, digit
        assert its.std(0).mean() > .1, 'ten different ones'
    black, white = ((x < -.9).float().mean(), (x > .9).float().mean())
    assert black > .7 and .03 < white < .2, 'as in real digits: mostly black, some white'


def test_shipped_is_the_references(shipped_digits):
    folder, _ = shipped_digits
    theirs, ours = diffusers.UNet2DConditionModel.from_pretrained(folder), load_digits('digits', 'cpu')
    x, t = torch.randn(4, 4, 14, 14, generator=generator()), torch.tensor([0, 9, 500, 999])
    labels = torch.tensor([0, 4, 9, ANY])
    with torch.no_grad(): a, b = theirs.eval()(x, t, None, labels).sample, ours(x, t, None, labels)
    assert (a - b).abs().max() < 1e-4
    assert diffusers.DDIMScheduler.from_pretrained(folder).config.prediction_type == SCHEDULER['prediction_type']
