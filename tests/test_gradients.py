"The classifier, its gradient against small differences, what is drawn with it, and a short run of its training."
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcourse import data, gradients
from sdcourse.data import Digits, mnist
from sdcourse.gradients import (
    NOT_A_DIGIT,
    DigitClassifier,
    accuracy,
    blur,
    follow_gradient,
    input_gradient,
    not_digits,
    random_affine,
    random_strokes,
    synthesize,
    train_classifier,
    training_batch,
)
from sdcourse.model import find_pretrained, read_manifest


def generator(device='cpu', seed=0): return torch.Generator(device).manual_seed(seed)


@pytest.fixture(scope='module')
def test_digits(): return mnist('test')


# ---- the shipped classifiers

@pytest.mark.parametrize('name,least', [('classifier', .993), ('noisy_classifier', .985)])
def test_shipped(test_digits, name, least):
    "The manifest's accuracy is that of the file that ships, and what the course promises"
    manifest, folder = read_manifest(find_pretrained(name)), find_pretrained(name)
    model = DigitClassifier.from_pretrained(name)
    found = accuracy(model, *test_digits)
    assert found >= least and abs(found - manifest['test_accuracy']) <= 2e-4, (found, manifest)
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1_000_000
    assert {'seed', 'steps', 'seconds', 'test_accuracy', 'files'} <= manifest.keys()
    others = not_digits(test_digits.images[:2000], generator(seed=5))
    assert accuracy(model, others, torch.full((2000,), NOT_A_DIGIT)) > .95


def test_noise_is_what_tells_them_apart(test_digits):
    x, y = test_digits.images[:2000], test_digits.labels[:2000]
    x = x + torch.randn(x.shape, generator=generator())
    plain, noisy = (accuracy(DigitClassifier.from_pretrained(n), x, y) for n in ('classifier', 'noisy_classifier'))
    assert noisy > .9 > .5 > plain, (noisy, plain)


# ---- what it learns from

def test_parts_of_a_batch(device):
    digits = torch.rand(64, 1, 28, 28, device=device)*2 - 1
    labels = torch.arange(64, device=device) % 10
    x, y = training_batch(digits, labels, 1.5, generator(device))
    assert x.shape == (80, 1, 28, 28) and x.device.type == device and x.isfinite().all()
    assert torch.equal(y[:64], labels) and (y[64:] == NOT_A_DIGIT).all()
    again, _ = training_batch(digits, labels, 1.5, generator(device))
    assert torch.equal(x, again)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 5))
def test_strokes(n, seed, strokes):
    x = random_strokes(n, generator(seed=seed), strokes=strokes)
    assert x.shape == (n, 1, 28, 28) and x.min() >= -1 and x.max() <= 1
    assert (x.amax((1, 2, 3)) > .5).all() and (x.mean((1, 2, 3)) < .5).all()      # something white, mostly black


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**31))
def test_not_digits(n, seed):
    x = not_digits(mnist('test').images[:n], generator(seed=seed))
    assert x.shape == (n, 1, 28, 28) and (not n or (x.min() >= -1 and x.max() <= 1))


def test_shuffled_pixels_are_the_same_pixels(test_digits):
    digits = test_digits.images[:40]
    shuffled = not_digits(digits, generator())[10:20]
    assert torch.equal(shuffled.flatten(1).sort(1).values, digits[10:20].flatten(1).sort(1).values)
    assert not torch.equal(shuffled, digits[10:20])


def test_affine(test_digits):
    x = test_digits.images[:16]
    assert torch.allclose(random_affine(x, generator(), 0, 0, 0), x, atol=1e-5)
    y = random_affine(x, generator())
    assert y.shape == x.shape and y.min() >= -1 - 1e-5 and y.max() <= 1 + 1e-5
    assert accuracy(DigitClassifier.from_pretrained('classifier'), y, test_digits.labels[:16]) > .8


def test_affine_moves_by_the_amount_asked():
    x = torch.full((200, 1, 28, 28), -1.)
    x[..., 12:16, 12:16] = 1
    y = (random_affine(x, generator(), degrees=0, scale=0, shift=.1) + 1)/2
    rows = torch.arange(28.)
    centre = (y.sum(3)*rows).sum((1, 2))/y.sum((1, 2, 3))
    assert 1 < (centre - 13.5).abs().max() <= 1.4 + 1e-3                             # a tenth of half of 28


# ---- the gradient

def test_gradient_is_what_nudging_finds(device):
    torch.manual_seed(0)
    dtype = torch.float32 if device == 'mps' else torch.float64
    model = DigitClassifier(channels=(4, 4, 4, 4)).eval().to(device, dtype)
    x, label = torch.randn(1, 1, 28, 28, generator=generator()).to(device, dtype), torch.tensor([3], device=device)
    found = input_gradient(model, x, label).flatten()
    nudge = 1e-2 if device == 'mps' else 1e-6
    with torch.no_grad():
        def log_p(x): return model(x).log_softmax(1)[:, 3]
        pixels = nudge*torch.eye(784, device=device, dtype=dtype).view(784, 1, 28, 28)
        expected = (log_p(x + pixels) - log_p(x - pixels))/(2*nudge)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > .999
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3*expected.abs().max().item())


def test_gradient_leaves_no_trace():
    model, x = DigitClassifier(), torch.randn(2, 1, 28, 28)
    g = input_gradient(model, x, torch.tensor([1, 2]))
    assert not x.requires_grad and not g.requires_grad and all(p.grad is None for p in model.parameters())


def test_blur_is_a_gaussian():
    x = torch.zeros(1, 1, 11, 11)
    x[..., 5, 5] = 1
    y = blur(x, .7)[0, 0]
    assert abs(y.sum().item() - 1) < 1e-6 and torch.allclose(y, y.T) and torch.allclose(y, y.flip(0))
    assert abs((y[5, 6]/y[5, 5]).log().item() + 1/(2*.49)) < 1e-5


# ---- drawing

def test_the_seed_decides():
    a, b, c = (synthesize([3, 4], steps=4, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (2, 1, 28, 28) and a.dtype == torch.float32 and a.device.type == 'cpu'
    assert torch.equal(a, b) and not torch.equal(a, c) and a.min() >= -1 and a.max() <= 1


def test_global_randomness_is_left_alone():
    before = torch.random.get_rng_state()
    synthesize([1], steps=2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_device_and_dtype(device, dtype):
    x = synthesize([7], steps=3, device=device, dtype=dtype)
    assert x.dtype == torch.float32 and x.isfinite().all()


def test_what_is_drawn_can_be_read():
    "By the plain classifier, which had no part in the drawing"
    labels = torch.arange(10).repeat(2)
    assert accuracy(DigitClassifier.from_pretrained('classifier'), synthesize(labels, seed=0), labels) >= .9


def test_on_step():
    seen = []
    x = synthesize([5], steps=3, on_step=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [0, 1, 2] and torch.equal(seen[-1][1], x)


def test_start_is_not_changed():
    x = torch.zeros(1, 1, 28, 28)
    follow_gradient(DigitClassifier().eval(), x, torch.tensor([1]), generator(), steps=2)
    assert (x == 0).all()


@pytest.mark.parametrize('labels', [[10], [-1], [], [1.5], [[1, 2]], [True, 11], 'seven', '7', 7, None])
def test_unknown_labels(labels):
    with pytest.raises(ValueError, match='whole numbers from 0 to 9') as e: synthesize(labels)
    assert str(labels) in str(e.value)


@pytest.mark.parametrize('steps', [0, -5])
def test_steps(steps):
    with pytest.raises(ValueError, match=f'at least 1, not {steps}'): synthesize([1], steps=steps)


def test_unknown_weights():
    with pytest.raises(ValueError, match='shipped are: .*noisy_classifier'): synthesize([1], weights='mnist')


# ---- training, a short run of it

@pytest.fixture
def few(monkeypatch):
    "The first 1,500 digits stand for all"
    some = {split: Digits(*(o[:1500] for o in mnist(split))) for split in ('train', 'test')}
    for module in data, gradients: monkeypatch.setattr(module, 'mnist', lambda split='train': some[split])
    monkeypatch.setattr(gradients, 'digit_dataloaders', lambda bs, seed, device: data.digit_dataloaders(
        bs, valid=200, seed=seed, device=device))


@pytest.mark.parametrize('noise', [0., 1.])
def test_short_training(few, tmp_path, device, noise):
    manifest = train_classifier(tmp_path/'made', noise, epochs=3, bs=64, device=device, progress=False)
    assert manifest == json.loads((tmp_path/'made'/'manifest.json').read_text())
    assert manifest['steps'] == 3*(1300//64) and manifest['seconds'] > 0
    assert manifest['test_accuracy'] > .5, manifest                    # guessing: .1
    assert ('test_accuracy_at_noise_1' in manifest) == bool(noise)
    model = DigitClassifier.from_pretrained(tmp_path/'made')
    weights = dict(model.named_parameters())
    assert all(p.isfinite().all() for p in weights.values())
    assert synthesize([1], steps=2, weights=tmp_path/'made').shape == (1, 1, 28, 28)


def test_training_repeats(few, tmp_path):
    a, b = (train_classifier(tmp_path/n, epochs=1, bs=256, seed=4, device='cpu', progress=False) for n in 'ab')
    assert a['files'] == b['files']
    c = train_classifier(tmp_path/'c', epochs=1, bs=256, seed=5, device='cpu', progress=False)
    assert c['files'] != a['files']


def test_a_folder_is_no_shipped_name(few, tmp_path, monkeypatch):
    "The manifest speaks of what was trained, also where the folder is named as shipped weights are"
    monkeypatch.chdir(tmp_path)
    a, b = (train_classifier(name, epochs=1, bs=256, device='cpu', progress=False) for name in ('classifier', 'other'))
    assert a['test_accuracy'] == b['test_accuracy']


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_whole_type(dtype):
    found = gradients.check_labels(torch.tensor([3, 9], dtype=dtype))
    assert found.dtype == torch.int64 and found.tolist() == [3, 9]


@pytest.mark.parametrize('labels', [torch.tensor([1.]), torch.tensor([True]), torch.zeros(1, 1), [10], [-1], [], 'a'],
                         ids=str)
def test_no_labels(labels):
    with pytest.raises(ValueError, match='labels must be'): gradients.check_labels(labels)


@pytest.mark.parametrize('wrong,said', [(dict(device='tpu'), "device 'tpu' cannot be used"),
                                        (dict(epochs=0), 'epochs must be at least 1, not 0'),
                                        (dict(noise=-1.), 'noise must not be negative')])
def test_wrong_training(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said): train_classifier(tmp_path/'made', **wrong)
    assert not (tmp_path/'made').exists()


def test_unwritable_folder_is_seen_before_the_training(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(ValueError, match='cannot write .*file'): train_classifier(tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'in the way'


def test_shipped_weights_are_checked(tmp_path):
    shutil.copytree(find_pretrained('classifier'), tmp_path/'c')
    path = tmp_path/'c'/'diffusion_pytorch_model.safetensors'
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='sha256'): DigitClassifier.from_pretrained(tmp_path/'c')
