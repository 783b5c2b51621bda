"metrics.py: agreement with scipy and scikit-learn, invariants over random tables, honest intervals, every error."
import json
import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from sdcourse.data import INKS, Scene, Scenes, Thing, compose, mnist
from sdcourse.gradients import DigitClassifier, accuracy
from sdcourse.metrics import (bootstrap, covered, cubic_kernel, cut_out, evaluate, features, frechet_distance, gaussian,
                              gaussian_distance, kernel_distance, precision_recall, radii, random_digits, read_scenes,
                              symmetric_root)

seeds = st.integers(0, 10_000)
fast = settings(max_examples=25, deadline=None)


def cloud(seed, n, d, shift=0., dtype=torch.float64):
    "A table of correlated features, moved by `shift`"
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift).to(dtype)


def column(*values): return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.fixture(scope='module')
def classifier(): return DigitClassifier.from_pretrained('classifier')


@pytest.fixture(scope='module')
def sheet(): return random_digits('test', 200, seed=1)


@pytest.fixture(scope='module')
def real(classifier): return features(random_digits(n=600).images, classifier)


# agreement with scipy and scikit-learn

@fast
@given(seeds, st.integers(2, 12), st.floats(0, 3))
def test_frechet_equals_scipy(seed, d, shift):
    a, b = cloud(seed, 4*d, d), cloud(seed + 1, 5*d, d, shift)
    (mean, cov), (other_mean, other_cov) = ((t.mean(0).numpy(), t.T.cov().numpy()) for t in (a, b))
    root = scipy.linalg.sqrtm(cov @ other_cov).real
    theirs = ((mean - other_mean)**2).sum() + (cov + other_cov - 2*root).trace()
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@fast
@given(seeds, st.integers(1, 8), st.integers(2, 60), st.integers(2, 60))
def test_kernel_equals_sklearn(seed, d, n, m):
    a, b = cloud(seed, n, d), cloud(seed + 1, m, d, .5)
    torch.testing.assert_close(cubic_kernel(a, b), torch.from_numpy(polynomial_kernel(a.numpy(), b.numpy())))
    aa, bb, ab = (polynomial_kernel(x.numpy(), y.numpy()) for x, y in ((a, a), (b, b), (a, b)))
    theirs = (aa.sum() - aa.trace())/(n*(n - 1)) + (bb.sum() - bb.trace())/(m*(m - 1)) - 2*ab.mean()
    assert kernel_distance(a, b) == pytest.approx(theirs, rel=1e-8, abs=1e-8*aa.max())


@fast
@given(seeds, st.integers(1, 5), st.integers(1, 8))
def test_radii_and_balls_equal_sklearn(seed, k, d):
    a, b = cloud(seed, 30, d), cloud(seed + 1, 40, d)
    search = NearestNeighbors(n_neighbors=k + 1).fit(b.numpy())
    reach = search.kneighbors(b.numpy())[0][:, k]
    torch.testing.assert_close(radii(b, k), torch.from_numpy(reach), rtol=1e-6, atol=1e-6)
    inside = [any(math.dist(x, y) <= r for y, r in zip(b.tolist(), reach)) for x in a.tolist()]
    assert covered(a, b, torch.from_numpy(reach)).tolist() == inside


def test_many_rows_are_the_same_in_parts():
    "Tables above 1,000 rows are taken in parts"
    a, b = cloud(1, 2345, 3), cloud(2, 1501, 3)
    whole = cubic_kernel(a, a).sum() - cubic_kernel(a, a).trace()
    other = cubic_kernel(b, b).sum() - cubic_kernel(b, b).trace()
    expected = whole/(2345*2344) + other/(1501*1500) - 2*cubic_kernel(a, b).mean()
    assert kernel_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert radii(a).shape == (2345,) and covered(a, b, radii(b)).shape == (2345,)
    assert torch.equal(covered(a, b, radii(b))[1200:1300], covered(a[1200:1300], b, radii(b)))


# by hand, and invariants

def test_bells_by_hand():
    one = gaussian_distance((torch.zeros(1), torch.eye(1)), (torch.tensor([3.]), 4*torch.eye(1)))
    assert one == pytest.approx(10)
    mean, covariance = gaussian(torch.tensor([[0., 0.], [2., 2.], [4., 1.]]))
    torch.testing.assert_close(mean, mean.new_tensor([2, 1]))
    torch.testing.assert_close(covariance, mean.new_tensor([[4, 1], [1, 1]]))
    assert gaussian(column(1, 3))[1].shape == (1, 1)


@fast
@given(seeds, st.integers(1, 10))
def test_root(seed, d):
    matrix = cloud(seed, 30, d).T.cov().view(d, d)
    root = symmetric_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.T)


def test_kernel_by_hand(): assert kernel_distance(column(1, 2), column(0, 0)) == 26


def test_precision_and_recall_by_hand():
    assert precision_recall(column(2, 3, 30), column(0, 1, 10), 1) == pytest.approx((2/3, 2/3))


@fast
@given(seeds, st.integers(2, 8))
def test_invariants(seed, d):
    a, b = cloud(seed, 40, d), cloud(seed + 1, 50, d, 1.)
    turn = torch.linalg.qr(cloud(seed + 2, d, d))[0]
    for metric in (frechet_distance, kernel_distance):
        value = metric(a, b)
        assert metric(b, a) == pytest.approx(value)                    # symmetric
        assert metric(a @ turn, b @ turn) == pytest.approx(value)      # whatever the axes
        assert metric(a.flip(0), b) == pytest.approx(value)            # and the order
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]
    assert frechet_distance(a, b + 9) > frechet_distance(a, b)
    assert precision_recall(a, b + 1e4) == (0, 0)


def test_frechet_is_biased_and_kernel_is_not():
    small = [(cloud(0, 60_000, 5)[i*60:i*60 + 60]) for i in range(300)]
    reference = cloud(0, 60_000, 5)[40_000:42_000]
    fids = torch.tensor([frechet_distance(t, reference) for t in small])
    kids = torch.tensor([kernel_distance(t, reference) for t in small])
    assert fids.min() > 0 and fids.mean() > 5*frechet_distance(torch.cat(small), reference)
    assert abs(kids.mean()) < 4*kids.std()/300**.5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_tables(dtype):
    "Whatever comes in, it is computed in float64"
    a, b = cloud(1, 60, 3, dtype=dtype), cloud(2, 60, 3, dtype=dtype)
    for metric in (frechet_distance, kernel_distance, precision_recall):
        assert metric(a, b) == metric(a.double(), b.double())


def test_a_forger_is_as_near_as_a_thief(real):
    "Copies of the reference: nothing is better, in any metric"
    copies, others = real[:300], real[300:]
    assert frechet_distance(copies, real) < frechet_distance(others, real[:300])
    assert precision_recall(copies, real[:300]) == (1, 1)
    assert kernel_distance(copies, real[:300]) < 0


# features

def test_features(classifier, sheet):
    table = features(sheet.images, classifier)
    assert table.shape == (200, 96) and table.dtype == torch.float64 and table.device.type == 'cpu'
    with torch.no_grad(): logits = classifier.head(table.float())
    torch.testing.assert_close(logits, classifier(sheet.images).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features(sheet.images[:3]), table[:3], rtol=1e-4, atol=1e-4)  # the shipped one
    assert not table.requires_grad


def test_features_on_each_device(device, sheet):
    model = DigitClassifier.from_pretrained('classifier', device=device)
    table = features(sheet.images, model)
    assert table.device.type == 'cpu'
    torch.testing.assert_close(table, features(sheet.images), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(table, features(sheet.images.to(device), model), rtol=1e-3, atol=1e-3)


def test_features_in_half_precision(sheet):
    model = DigitClassifier.from_pretrained('classifier', dtype=torch.bfloat16)
    table = features(sheet.images, model)
    assert table.dtype == torch.float64 and (table - features(sheet.images)).abs().mean() < .05


def test_random_digits():
    a, b = random_digits('test', 500), random_digits('test', 500)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.labels, random_digits('test', 500, seed=1).labels)
    every, test = random_digits('test', 10_000), mnist('test')
    assert torch.equal(every.labels.bincount(), test.labels.bincount())
    assert not torch.equal(every.labels, test.labels)


# intervals

def test_bootstrap_of_a_mean_is_the_textbook_one():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(torch.mean, x, repeats=2000)
    mean, error = x.mean().item(), 1.96*x.std().item()/20
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=.012)


def test_bootstrap_repeats_limits_and_input():
    x = torch.linspace(0, 1, 50).double()
    kept = x.clone()
    assert bootstrap(torch.mean, x) == bootstrap(torch.mean, x) != bootstrap(torch.mean, x, seed=1)
    assert bootstrap(torch.mean, x, limits=(.49, .5)) == (.49, .5)
    assert bootstrap(torch.mean, torch.ones(9)) == (1, 1)
    together = bootstrap(lambda a, b: (a - b).abs().max(), x, x)       # rows that belong together stay together
    assert together == (0, 0) and torch.equal(x, kept)


@pytest.mark.parametrize('metric', [frechet_distance, kernel_distance, lambda a, b: precision_recall(a, b)[1]],
                         ids=['fid', 'kid', 'recall'])
@pytest.mark.parametrize('shift', [0., .7], ids=['floor', 'apart'])
def test_intervals_hold_what_they_promise(metric, shift):
    "The mean over many sheets lies in about 95 % of the intervals, and never in less than 85 %"
    generator = torch.Generator().manual_seed(0)
    def draw(n): return torch.randn(n, 4, generator=generator, dtype=torch.float64)
    reference = draw(150)
    sheets = [draw(150) + shift for _ in range(60)]
    mean = sum(metric(s, reference) for s in sheets)/60
    found = [bootstrap(lambda t: metric(t, reference), s, repeats=60) for s in sheets]
    assert sum(low <= mean <= high for low, high in found) >= 51
    assert all(low <= metric(s, reference) <= high for s, (low, high) in zip(sheets, found))


# evaluate

def test_evaluate_agrees_with_its_parts(classifier, sheet, real):
    found = evaluate(sheet.images, sheet.labels, real, classifier, repeats=40)
    table = features(sheet.images, classifier)
    precision, recall = precision_recall(table, real[:200])
    expected = dict(label_accuracy=accuracy(classifier, sheet.images, sheet.labels),
                    fid=frechet_distance(table, real), kid=kernel_distance(table, real[:200]),
                    precision=precision, recall=recall)
    assert (found.pop('n'), found.pop('n_real')) == (200, 600)
    assert {name: m['value'] for name, m in found.items()} == pytest.approx(expected)
    for m in found.values(): assert m['low'] <= m['value'] <= m['high']
    for name in ('label_accuracy', 'precision', 'recall'): assert 0 <= found[name]['low'] <= found[name]['high'] <= 1
    assert found['fid']['low'] >= 0


def test_evaluate_is_plain_and_repeats(sheet, real):
    found = evaluate(sheet.images, sheet.labels.tolist(), real, repeats=40)
    assert json.loads(json.dumps(found)) == found
    assert evaluate(sheet.images, sheet.labels, real, repeats=40) == found
    again = evaluate(sheet.images, sheet.labels, real, repeats=40, seed=1)
    assert again['fid']['value'] == found['fid']['value'] and again['fid']['low'] != found['fid']['low']


def test_evaluate_without_a_reference(sheet):
    assert evaluate(sheet.images, sheet.labels, repeats=40)['n_real'] == 10_000


def test_evaluate_tells_bad_from_good(sheet, real):
    good = evaluate(sheet.images, sheet.labels, real, repeats=40)
    noise = torch.randn(sheet.images.shape, generator=torch.Generator().manual_seed(0))
    bad = evaluate((sheet.images + .5*noise).clamp(-1, 1), sheet.labels, real, repeats=40)
    for name in ('label_accuracy', 'precision'): assert bad[name]['high'] < good[name]['low']
    for name in ('fid', 'kid'): assert bad[name]['low'] > good[name]['high']


def test_evaluate_on_each_device(device, sheet, real):
    model = DigitClassifier.from_pretrained('classifier', device=device)
    found = evaluate(sheet.images.to(device), sheet.labels.to(device), real, model, repeats=40)
    there = evaluate(sheet.images, sheet.labels, real, repeats=40)
    assert found['fid']['value'] == pytest.approx(there['fid']['value'], rel=1e-2)
    assert found['label_accuracy']['value'] == pytest.approx(there['label_accuracy']['value'], abs=.011)


# scenes

@pytest.fixture(scope='module')
def scenes(): return Scenes('test', 600, seed=3).batch(range(600))


def truth(scenes):
    "Digits and numbers of inks of all things"
    things = [thing for scene in scenes for thing in scene.things]
    return torch.tensor([t.digit for t in things]), torch.tensor([list(INKS).index(t.color) for t in things])


def placed(*things): return Scene(None, '', tuple(Thing(0, 'red', None, *where) for where in things), None)


def test_cut_out_at_whole_pixels():
    "A thing of 28 pixels, its centre between two of them, is cut out as it is"
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1
    found = cut_out(images, [placed((20, 30, 28.)), placed((14, 14, 28.), (50, 50, 28.))])
    wanted = torch.stack([images[0, :, 16:44, 6:34], images[1, :, :28, :28], images[1, :, 36:, 36:]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_cut_out_by_hand():
    "A square of 56 pixels becomes one of 28: each pixel the mean of four; what lies outside continues the edge"
    images = torch.full((1, 3, 64, 64), -1.)
    images[:, 0, 20:24, 30:36] = 1
    found = cut_out(images, [placed((32, 32, 56.))])
    wanted = torch.full((3, 28, 28), -1.)
    wanted[0, 8:10, 13:16] = 1
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-4)
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    found = cut_out(ramp, [placed((4, 32, 28.))])
    assert (found[..., :10] == -1).all() and (found.diff(dim=-1) >= -1e-6).all()
    torch.testing.assert_close(found[0, :, :, 10:], ramp[0, :, 18:46, :18], rtol=0, atol=1e-4)


def test_scenes_are_read(classifier, scenes):
    images, chosen = scenes
    kept = images.clone()
    (digits, inks), (labels, colors) = read_scenes(images, chosen, classifier), truth(chosen)
    assert digits.shape == inks.shape == labels.shape and digits.dtype == inks.dtype == torch.int64
    assert (digits == labels).float().mean() >= .96 and (inks == colors).float().mean() >= .995
    assert torch.equal(images, kept)


def test_scenes_are_read_one_by_one(scenes):
    images, chosen = scenes
    together, (a, b) = read_scenes(images[:9], chosen[:9]), zip(*(read_scenes(images[i:i+1], [chosen[i]])
                                                                  for i in range(9)))
    assert torch.equal(together[0], torch.cat(a)) and torch.equal(together[1], torch.cat(b))


@pytest.mark.parametrize('color', INKS)
def test_each_ink_is_told_from_the_others(color):
    chosen = compose([(7, color)], n=20)
    images = torch.stack([scene.image for scene in chosen])
    for picture in (images, images*.9 - .1, (images + 1)*.7 - 1):           # darker, it is the same hue
        assert (read_scenes(picture, chosen)[1] == list(INKS).index(color)).float().mean() >= .95


def test_scenes_on_each_device(device, scenes):
    images, chosen = scenes
    there, here = read_scenes(images[:50].to(device), chosen[:50]), read_scenes(images[:50], chosen[:50])
    for a, b in zip(there, here): assert a.device.type == device and (a.cpu() == b).float().mean() >= .98


@pytest.mark.parametrize('grey', [-1., 0., 1., 7.])
def test_blank_scenes(scenes, grey):
    "No picture, no NaN: whatever is read is a digit and an ink"
    chosen = scenes[1][:8]
    images = torch.full((8, 3, 64, 64), grey)
    assert cut_out(images, chosen).isfinite().all()
    digits, inks = read_scenes(images, chosen)
    assert digits.min() >= 0 and digits.max() <= 9 and inks.min() >= 0 and inks.max() < len(INKS)


def test_wrong_pictures_are_read_wrong(classifier, scenes):
    "Pictures of other scenes: a digit in ten is right by chance, hardly more"
    images, chosen = scenes
    digits, inks = read_scenes(images.flip(0), chosen, classifier)
    labels, colors = truth(chosen)
    assert (digits == labels).float().mean() < .25 and (inks == colors).float().mean() < .3


# what is refused

X = torch.zeros(4, 1, 28, 28)


@pytest.mark.parametrize('images, said', [
    (X[:, 0], r'float32 \(4, 28, 28\)'), (X[..., 1:], r'\(4, 1, 28, 27\)'), (X.byte(), 'uint8'), ([X], 'got list'),
    (X[:0], 'got none'), (X/0, '3136 values that are NaN'), (X + math.inf, '3136 values that')])
def test_features_refuse(images, said, classifier):
    with pytest.raises(ValueError, match=said): features(images, classifier)


def test_training_mode_is_refused(sheet):
    model = DigitClassifier.from_pretrained('classifier').train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (lambda: features(sheet.images, model), lambda: evaluate(sheet.images, sheet.labels, model=model)):
        with pytest.raises(ValueError, match='training mode'): call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


GOOD = cloud(0, 20, 3)
spoiled = GOOD.clone()
spoiled[3, 1] = math.nan


@pytest.mark.parametrize('metric', [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize('bad, said', [
    (GOOD[0], r'float64 \(3,\)'), (GOOD.long(), 'int64'), (GOOD.tolist(), 'got list'), (GOOD[:1], 'got 1'),
    (GOOD[:, :2], '2'), (spoiled, 'got 1 values that are NaN'), (GOOD/0, 'NaN or infinite')])
def test_tables_are_refused(metric, bad, said):
    with pytest.raises(ValueError, match=said): metric(bad, GOOD)
    with pytest.raises(ValueError, match=said): metric(GOOD, bad)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match='3 features needs more than 3 pictures, got 3'): gaussian(GOOD[:3])
    with pytest.raises(ValueError, match='more than 3'): frechet_distance(GOOD[:3], GOOD)
    with pytest.raises(ValueError, match='fake needs at least 6 rows, got 5'): precision_recall(GOOD[:5], GOOD, 5)
    with pytest.raises(ValueError, match='real needs at least 4 rows, got 3'): precision_recall(GOOD, GOOD[:3])


@pytest.mark.parametrize('k', [0, -1, 2.5, True, None])
def test_neighbours_are_whole_numbers(k):
    with pytest.raises(ValueError, match='k must be'): precision_recall(GOOD, GOOD, k)


@pytest.mark.parametrize('arguments, said', [
    (dict(n=0), 'n must be a whole number'), (dict(n=60_001), 'at most 60000.*got 60001'),
    (dict(split='test', n=10_001), 'at most 10000'), (dict(split='validation'), 'split'), (dict(n=2.5), 'n must be'),
    (dict(seed='1'), 'seed must be')])
def test_random_digits_refuse(arguments, said):
    with pytest.raises(ValueError, match=said): random_digits(**arguments)


def test_bootstrap_refuses():
    with pytest.raises(ValueError, match=r'many rows.*got \[20, 19\]'): bootstrap(frechet_distance, GOOD, GOOD[1:])
    with pytest.raises(ValueError, match=r'at least 4, got \[3\]'): bootstrap(torch.mean, GOOD[:3])
    with pytest.raises(ValueError, match='at least 4, got'): bootstrap(torch.mean)
    with pytest.raises(ValueError, match='seed must be'): bootstrap(torch.mean, GOOD, seed=None)
    with pytest.raises(ValueError, match='repeats must be'): bootstrap(torch.mean, GOOD, repeats=10)


@pytest.mark.parametrize('change, said', [
    (dict(labels=[1]*199), '200 pictures, got 199 labels'), (dict(labels=[11]*200), 'from 0 to 9'),
    (dict(labels=[]), 'from 0 to 9'), (dict(labels='7'*200), 'from 0 to 9'), (dict(labels=[.5]*200), 'from 0 to 9'),
    (dict(images=torch.zeros(193, 1, 28, 28), labels=[1]*193), 'at least 194 pictures.*got 193'),
    (dict(real=torch.rand(199, 96)), 'as many rows as there are pictures, 200, got 199'),
    (dict(real=torch.rand(300, 95)), 'same features, got 96 and 95'), (dict(k=0), 'k must be'),
    (dict(k=100), 'at least 202 rows, got 200'), (dict(repeats=5), 'repeats must be')])
def test_evaluate_refuses(change, said, sheet, real):
    with pytest.raises(ValueError, match=said):
        evaluate(**(dict(images=sheet.images, labels=sheet.labels, real=real) | change))
