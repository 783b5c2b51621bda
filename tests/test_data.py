"MNIST against torchvision's reader, files that were tampered with, scenes and their captions, the loaders."
import hashlib
import json
import lzma
import re
import shutil
import struct
import time
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt, grey_dilation, label
from torchvision.datasets import MNIST

from sdcourse import data
from sdcourse.data import (INKS, MNIST_SHA256, RELATIONS, STROKES, Digits, Scene, Scenes, Thing, caption, compose,
                           digit_dataloaders, dilate, mnist, new_scenes, parse_idx, read_idx, scene_dataloaders,
                           thin_out)


@pytest.fixture(scope='module')
def folder(root): return root/'sdcourse'/'mnist'


def idx(table):
    "A table of bytes in IDX format"
    return b'\0\0\x08' + bytes([table.ndim]) + struct.pack(f'>{table.ndim}I', *table.shape) + table.tobytes()


@pytest.mark.parametrize('split,n', [('train', 60_000), ('test', 10_000)])
def test_equals_torchvision(folder, tmp_path, split, n):
    raw = tmp_path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for name in MNIST_SHA256: (raw/name.removesuffix('.xz')).write_bytes(lzma.decompress((folder/name).read_bytes()))
    reference, ours = MNIST(tmp_path, train=split == 'train'), mnist(split)
    assert isinstance(ours, Digits) and ours.images.shape == (n, 1, 28, 28) and ours.labels.dtype == torch.int64
    assert ours.images.dtype == torch.float32 and ours.images.min() == -1 and ours.images.max() == 1
    assert torch.equal(ours.labels, reference.targets)
    assert torch.equal(ours.images[:, 0], reference.data/127.5 - 1)


def test_original_files(folder):
    "The md5 sums under which these files have been known since they were published"
    known = {'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb'}
    for name, md5 in known.items():
        assert hashlib.md5(lzma.decompress((folder/f'{name}.xz').read_bytes())).hexdigest() == md5


def test_size(folder): assert sum(f.stat().st_size for f in folder.glob('*.xz')) < 12_000_000


def test_a_caller_cannot_spoil_it():
    first = mnist('test').images
    first.zero_()
    assert mnist('test').images.min() == -1


@pytest.mark.parametrize('split', ['valid', 'TRAIN', '', None, 3])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="'train' or 'test'") as e: mnist(split)
    assert repr(split) in str(e.value)


@pytest.mark.parametrize('spoil,said', [
    (lambda b: b[:1000], 'sha256'), (lambda b: b[:-1] + bytes([b[-1] ^ 1]), 'sha256'), (lambda b: b'', 'sha256')])
def test_tampered_file(folder, tmp_path, monkeypatch, spoil, said):
    name = 't10k-labels-idx1-ubyte.xz'
    shutil.copytree(folder, tmp_path/'mnist')
    (tmp_path/'mnist'/name).write_bytes(spoil((folder/name).read_bytes()))
    monkeypatch.setattr(data, '__file__', str(tmp_path/'data.py'))
    data._mnist_bytes.cache_clear()
    try:
        with pytest.raises(ValueError, match=said) as e: mnist('test')
        assert name in str(e.value) and MNIST_SHA256[name] in str(e.value)
    finally: data._mnist_bytes.cache_clear()


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='no data file'): read_idx(tmp_path/'none.xz')


def test_damaged_xz(tmp_path):
    whole = lzma.compress(idx(np.zeros((3, 28, 28), np.uint8)))
    for content in whole[:-5], whole[:20], b'', b'no xz at all':
        (tmp_path/'a.xz').write_bytes(content)
        with pytest.raises(ValueError, match='a.xz'): read_idx(tmp_path/'a.xz')


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.randoms())
def test_any_table_survives(shape, rng):
    table = np.frombuffer(rng.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
    read = parse_idx(idx(table))
    assert read.shape == table.shape and (read == table).all()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_give_a_table_or_one_error(content):
    try: table = parse_idx(content, 'these')
    except ValueError as e: assert str(e).startswith('these')
    else: assert content[:3] == b'\0\0\x08' and table.size == len(content) - 4 - 4*content[3]


@pytest.mark.parametrize('change', [b'', b'x'])
def test_wrong_length(change):
    content = idx(np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r'\(2, 3\)'): parse_idx(content + change if change else content[:-1])


@pytest.fixture
def few(monkeypatch):
    "The first 1,000 digits stand for all"
    some = Digits(*(o[:1000] for o in mnist('train')))
    monkeypatch.setattr(data, 'mnist', lambda split='train': some)
    return some


def test_loaders(few):
    dls = digit_dataloaders(bs=64, valid=100, seed=3, device='cpu')
    x, y = dls.one_batch()
    assert x.shape == (64, 1, 28, 28) and y.shape == (64,) and x.dtype == torch.float32
    train = torch.cat([x for x, _ in dls.train])
    valid = torch.cat([x for x, _ in dls.valid])
    assert len(train) == 900//64*64 and len(valid) == 100
    def keys(x): return {o.numpy().tobytes() for o in x}
    assert not keys(train) & keys(valid) and keys(train) | keys(valid) <= keys(few.images)


def test_loaders_repeat(few):
    def epochs(seed):
        dls = digit_dataloaders(bs=64, valid=100, seed=seed, device='cpu')
        return [torch.cat([y for _, y in dls.train]) for _ in range(2)]
    (a, b), (c, d), (e, _) = epochs(0), epochs(0), epochs(1)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)


def test_labels_stay_with_their_pictures(few):
    known = {x.numpy().tobytes(): y.item() for x, y in zip(few.images, few.labels)}
    for x, y in digit_dataloaders(bs=50, valid=100, device='cpu').train:
        assert [known[o.numpy().tobytes()] for o in x] == y.tolist()


@pytest.mark.parametrize('wrong', [dict(valid=0), dict(valid=60_000), dict(valid=-1), dict(bs=0), dict(bs=55_001)])
def test_wrong_loaders(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f'{name} must lie between .* not {value}'): digit_dataloaders(**wrong)


# ---- scenes: the words

FIGURES = {  # the test's own dictionary, so that a wrong word in the lesson shows
    'en': 'zero one two three four five six seven eight nine'.split(),
    'it': 'zero uno due tre quattro cinque sei sette otto nove'.split()}
COLORS = {
    'en': {c: c for c in ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'white')},
    'it': {'rosso': 'red', 'arancione': 'orange', 'giallo': 'yellow', 'verde': 'green', 'blu': 'blue',
           'viola': 'purple', 'rosa': 'pink', 'bianco': 'white'}}
PENS = {'en': {'thin': 'thin', 'bold': 'bold'}, 'it': {'sottile': 'thin', 'spesso': 'bold'}}
PLACES = {'en': {r: r for r in ('above', 'below', 'left of', 'right of')},
          'it': {'sopra': 'above', 'sotto': 'below', 'a sinistra di': 'left of', 'a destra di': 'right of'}}


def pattern(language, i):
    "A regular expression for one thing: adjectives before the digit in English, after it in Italian"
    digit, color, pen = ('|'.join(o) for o in ([*FIGURES[language], r'\d'], COLORS[language], PENS[language]))
    if language == 'en': return rf'(?:(?P<a{i}>an?) )?(?:(?P<s{i}>{pen}) )?(?P<c{i}>{color}) (?P<d{i}>{digit})'
    return rf'(?:(?P<a{i}>uno?) )?(?P<d{i}>{digit}) (?P<c{i}>{color})(?: (?P<s{i}>{pen}))?'


def parse(text):
    "(language, [(digit, color, stroke)], relation, words, articles) of a caption; fails if it is no sentence"
    for language in ('en', 'it'):
        relation = '|'.join(PLACES[language])
        found = re.fullmatch(f'{pattern(language, 0)}(?: (?P<r>{relation}) {pattern(language, 1)})?', text)
        if found: break
    assert found, f'no grammar reads {text!r}'
    things, words, articles = [], [], []
    for i in range(2 if found['r'] else 1):
        article, digit, color, stroke = (found[f'{key}{i}'] for key in 'adcs')
        words.append(not digit.isdigit())
        things.append((FIGURES[language].index(digit) if words[-1] else int(digit), COLORS[language][color],
                       PENS[language].get(stroke)))
        articles.append(article is not None)
        if article and language == 'en': assert article == ('an' if (stroke or color)[0] in 'aeiou' else 'a'), text
        if article and language == 'it': assert article == ('uno' if things[-1][0] == 0 else 'un'), text
    return language, things, PLACES[language].get(found['r']), tuple(words), tuple(articles)


def thing(digit, color, stroke=None): return Thing(digit, color, stroke, 32., 32., 28.)


KINDS = list(product(range(10), INKS, (*STROKES, None)))
BOTH = list(product((True, False), repeat=2))


def test_every_phrase_is_read_back():
    "240 kinds of things, in both languages, as word and figure, with and without article: all different, all right"
    said = {}
    for kind, language, (word, article) in product(KINDS, ('en', 'it'), BOTH):
        text = caption([thing(*kind)], None, language, (word,), (article,))
        assert parse(text) == (language, [kind], None, (word,), (article,)), text
        said[text] = kind
    assert len(said) == 240*2*4


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from(RELATIONS), st.sampled_from(['en', 'it']),
       st.sampled_from(BOTH), st.sampled_from(BOTH))
def test_every_sentence_is_read_back(a, b, relation, language, words, articles):
    text = caption([thing(*a), thing(*b)], relation, language, words, articles)
    assert parse(text) == (language, [a, b], relation, words, articles), text
    assert not re.search(r'\ba [aeiou]|\ban [^aeiou]|  |^ | $', text) or language == 'it'
    assert not re.search(r'\b(rossa|gialla|bianca|spessa|una|arancioni|verdi)\b|\bun zero|\bun 0', text), text
    assert not re.search(r'\b(seven|7) (red|thin|bold)\b', text), text


@pytest.mark.parametrize('text', [
    'a orange 8', 'an red 7', 'seven red', 'a red bold 7', 'un zero rosso', 'un rosso 7', 'uno sette rosso',
    'una 7 rossa', 'a red 7 sopra a blue 3', 'un 7 red', 'red 7 above', ''])
def test_the_parser_refuses(text):
    with pytest.raises(AssertionError): parse(text)


def test_sentences_of_the_lesson():
    a, b = thing(7, 'red', 'bold'), thing(3, 'blue')
    assert caption([a, b], 'above', words=(True, False)) == 'a bold red seven above a blue 3'
    assert caption([a, b], 'above', 'it', (True, False)) == 'un sette rosso spesso sopra un 3 blu'
    assert caption([thing(0, 'orange')], language='it') == 'uno zero arancione'
    assert caption([thing(8, 'orange', 'thin')]) == 'a thin orange eight'
    assert caption([b, a], 'right of', 'it', articles=(False, False)) == 'tre blu a destra di sette rosso spesso'


def test_what_scenes_say_is_true():
    for s in Scenes('test', seed=3).batch(range(400))[1]:
        language, things, relation, *_ = parse(s.caption)
        assert things == [t[:3] for t in s.things] and relation == s.relation, s.caption


def test_captions_vary():
    read = [parse(s.caption) for s in Scenes('train', seed=8).batch(range(600))[1]]
    assert .4 < np.mean([r[0] == 'it' for r in read]) < .6
    assert .4 < np.mean([w for r in read for w in r[3]]) < .6 and .68 < np.mean([a for r in read for a in r[4]]) < .82
    assert .6 < np.mean([r[2] is not None for r in read]) < .74
    strokes = [t[2] for r in read for t in r[1]]
    for stroke, share in (('thin', .25), ('bold', .25), (None, .5)):
        assert abs(strokes.count(stroke)/len(strokes) - share) < .06
    assert {t[0] for r in read for t in r[1]} == set(range(10)) and {t[1] for r in read for t in r[1]} == set(INKS)
    assert {r[2] for r in read} == {*RELATIONS, None}


# ---- scenes: chance

def splitmix(k, mask=2**64 - 1):
    "splitmix64 with Python's whole numbers, which never run over"
    z = k*0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30)*0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27)*0x94D049BB133111EB & mask
    return ((z ^ z >> 31) >> 11)/2**53


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**40), max_size=4), st.integers(1, 24))
def test_chance_is_splitmix64(seed, indices, n):
    u = data._uniform(seed, indices, n)
    assert u.shape == (len(indices), n) and u.dtype == torch.float64
    expected = [[splitmix(i*n + j + 1 + seed*0xD1342543DE82EF95) for j in range(n)] for i in indices]
    assert u.tolist() == expected


def test_splitmix_as_published():
    assert [int(v*2**53) for v in data._uniform(0, [0], 3)[0].tolist()] == [
        z >> 11 for z in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)]


@pytest.fixture(scope='module')
def hundred(): return Scenes('train', 1000, seed=7).batch(range(100))


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=9))
def test_same_scene_in_any_batch(hundred, ids):
    images, scenes = Scenes('train', 10**6, seed=7).batch(ids)         # how many there are plays no part
    assert torch.equal(images, hundred[0][ids])
    assert [s[1:] for s in scenes] == [hundred[1][i][1:] for i in ids]


def test_same_scene_with_any_number_of_threads(hundred):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(Scenes('train', 100, seed=7).batch(range(100))[0], hundred[0])
    finally: torch.set_num_threads(before)


def test_one_by_one(hundred):
    scenes = Scenes('train', 5, seed=7)
    assert len(scenes) == 5 and [s.caption for s in scenes] == [s.caption for s in hundred[1][:5]]
    assert torch.equal(scenes[3].image, hundred[0][3]) and torch.equal(scenes[-2].image, hundred[0][3])
    assert isinstance(scenes[0], Scene) and scenes[np.int64(2)].caption == scenes[torch.tensor(2)].caption
    assert repr(scenes) == "Scenes('train', n=5, seed=7)"
    images, none = scenes.batch([])
    assert images.shape == (0, 3, 64, 64) and none == []


def test_another_seed_or_split_another_scene(hundred):
    for other in Scenes('train', 100, seed=8), Scenes('test', 100, seed=7):
        images, _ = other.batch(range(100))
        assert not (images == hundred[0]).flatten(1).all(1).any()
    assert [s.caption for s in other.batch(range(100))[1]] == [s.caption for s in hundred[1]]  # only the hand differs
    assert len({image.numpy().tobytes() for image in hundred[0]}) == 100


@pytest.mark.parametrize('split,other', [('train', 'test'), ('test', 'train')])
def test_only_its_own_handwriting(monkeypatch, split, other):
    "Blacken one split's digits: its scenes turn black, and the other's stay as they were"
    before, read = Scenes(split).batch(range(40))[0], data._mnist_bytes
    def blackened(which): return (read(which)[0]*(which == split), read(which)[1])
    monkeypatch.setattr(data, '_mnist_bytes', blackened)
    assert torch.equal(Scenes(split).batch(range(40))[0], before)
    assert (Scenes(other).batch(range(40))[0] == -1).all()


def test_first_and_last_digit_of_a_label(monkeypatch):
    "Chance 0 takes the first digit of a label, chance just below 1 the last one"
    labels = mnist('test').labels
    for chance, place in ((0., 0), (1 - 2.**-53, -1)):
        plan = data._plan(0, range(10))
        plan = plan._replace(digit=torch.arange(10)[:, None].expand(10, 2), stroke=torch.full((10, 2), 2),
                             relation=torch.full((10,), -1), chance=torch.full((10, 2, 6), chance, dtype=torch.float64))
        images = data._render('test', plan, [torch.full((10, 2), v) for v in (32., 32., 28.)])
        digits = torch.stack([mnist('test').images[labels == d][place] for d in range(10)])
        ink = torch.tensor(list(INKS.values()))[plan.color[:, 0]][:, :, None, None]/255
        assert torch.allclose(images[..., 18:46, 18:46], (digits + 1)/2*ink*2 - 1, atol=1e-5)


# ---- scenes: the pen and the place

@pytest.fixture(scope='module')
def written(): return (mnist('test').images[:500] + 1)/2


def test_skeletons(written):
    strokes = written > .4
    lines = thin_out(strokes)
    assert lines.dtype == torch.bool and not (lines & ~strokes).any() and torch.equal(thin_out(lines), lines)
    assert lines.flatten(1).any(1).all()
    eight = np.ones((3, 3))
    pieces = [[label(mask[0].numpy(), eight)[1] for mask in masks] for masks in (strokes, lines)]
    assert np.mean(np.equal(*pieces)) > .99
    squares = (F.avg_pool2d(lines.float(), 2, stride=1) == 1).flatten(1).any(1)
    assert squares.float().mean() < .05
    assert not thin_out(strokes[:0]).numel()


def test_thinning_by_hand():
    bar = torch.zeros(1, 1, 7, 12, dtype=torch.bool)
    bar[..., 2:5, 1:11] = True
    line = thin_out(bar)[0, 0]
    assert not line[[0, 1, 2, 4, 5, 6]].any() and line[3].sum() >= 7                # the middle row stays
    one = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    one[..., 2, 1:4] = True
    assert torch.equal(thin_out(one), one) and torch.equal(thin_out(one.mT), one.mT)
    ring = bar.clone()
    ring[..., 3, 2:10] = False
    assert torch.equal(thin_out(ring).any(), torch.tensor(True)) and not thin_out(ring)[..., 3, 3:9].any()


def test_thinning_turned_round(written):
    "The rule is the same for both sides: a picture turned by 180° gives nearly as long a line"
    strokes = written[:200] > .4
    a, b = (thin_out(s).sum((1, 2, 3)).float() for s in (strokes, strokes.flip(-1, -2)))
    assert (a - b).abs().mean() < .05*a.mean()


@pytest.mark.parametrize('radius', [.5, .7, 1, 2, 3.25])
def test_pen_agrees_with_distances(written, radius):
    lines = thin_out(written[:40] > .4)
    distance = np.stack([distance_transform_edt(~line[0].numpy()) for line in lines])[:, None]
    expected = torch.from_numpy((radius + .5 - distance).clip(0, 1))
    assert (dilate(lines.float(), radius) - expected).abs().max() < 1e-6


def test_grey_dilation(written):
    "What scipy's grey dilation does with sums, ours does with products: the same after a logarithm"
    x, r = written[:5].clamp(min=1e-6).double(), 2.
    y, z = np.mgrid[-2:3, -2:3]
    pen = np.clip(r + .5 - np.hypot(y, z), 1e-300, 1)
    for one, ours in zip(x, dilate(x, r)):
        expected = np.exp(grey_dilation(one[0].log().numpy(), structure=np.log(pen), mode='constant', cval=-1e3))
        assert np.abs(ours[0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize('radius', [0, .4, -1, float('nan'), float('inf')])
def test_no_such_pen(radius):
    with pytest.raises(ValueError, match=f'at least 0.5, not {radius}'): dilate(torch.zeros(1, 1, 5, 5), radius)


@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8])
def test_thinning_wants_booleans(dtype):
    with pytest.raises(ValueError, match=f'bool tensor; got {dtype}'): thin_out(torch.zeros(1, 1, 5, 5, dtype=dtype))


def test_bold_is_bolder(written):
    ink = [data._restroke(written, torch.full((len(written),), k)).sum((1, 2, 3)) for k in range(3)]
    assert (ink[1] > 1.5*ink[0]).all() and (ink[1] > ink[2]).float().mean() > .9
    assert torch.equal(data._restroke(written, torch.full((len(written),), 2)), written)
    mixed = torch.arange(len(written)) % 3
    expected = torch.stack(ink)[mixed, torch.arange(len(written))]
    assert torch.equal(data._restroke(written, mixed).sum((1, 2, 3)), expected)


@settings(max_examples=40, deadline=None)
@given(st.floats(5, 60), st.floats(5, 60), st.floats(28, 60), st.integers(0, 499))
def test_stretching_agrees_with_grid_sample(written, x, y, size, i):
    ours = data._resample(*torch.tensor([[y], [size]])) @ written[i] @ data._resample(*torch.tensor([[x], [size]])).mT
    u, v = ((torch.arange(64) + .5 - c)*2/size for c in (x, y))
    grid = torch.stack([u.expand(64, 64), v[:, None].expand(64, 64)], dim=-1)
    assert torch.allclose(ours, F.grid_sample(written[i][None], grid[None], align_corners=False)[0], atol=2e-5)


def ink_of(image): return (image.amax(0) + 1)/2  # every ink has a channel near 1; black has none


def centroid(mask):
    "Centre of mass, (x, y)"
    at, total = torch.arange(64) + .5, mask.sum()
    return (mask.sum(0) @ at/total).item(), (mask.sum(1) @ at/total).item()


def inside(t, grow=1.):
    "The square of a thing and a pixel around it"
    at, reach = torch.arange(64) + .5, t.size/2 + grow
    return ((at - t.y).abs() < reach)[:, None] & ((at - t.x).abs() < reach)


def test_it_is_where_it_says():
    for s in Scenes('test', seed=4).batch(range(300))[1]:
        ink = ink_of(s.image)
        where = torch.stack([inside(t) for t in s.things]).any(0)
        assert ink[where].sum() > .999*ink.sum()
        for t in s.things:
            assert 28 <= t.size <= 56 and .42*t.size <= min(t.x, t.y) and max(t.x, t.y) <= 64 - .42*t.size
        if s.relation is None:
            x, y = centroid(ink)
            assert max(abs(x - s.things[0].x), abs(y - s.things[0].y)) < .12*s.things[0].size


def test_nothing_is_cut_off():
    "Hardly any ink reaches the edge of the picture"
    images, _ = Scenes('train', seed=6).batch(range(500))
    ink = (images.amax(1) + 1)/2
    edge = ink.sum((1, 2)) - ink[:, 1:-1, 1:-1].sum((1, 2))
    assert (edge < .05*ink.sum((1, 2))).float().mean() > .98 and edge.sum() < .005*ink.sum()


def test_relations_hold():
    seen = set()
    for s in Scenes('train', seed=5).batch(range(600))[1]:
        if s.relation is None: continue
        a, b = s.things
        right, down = a.x - b.x, a.y - b.y
        along = {'above': -down, 'below': down, 'left of': -right, 'right of': right}[s.relation]
        across = right if s.relation in ('above', 'below') else down
        assert along > 24 and abs(across) < 20
        seen.add(s.relation)
    assert seen == set(RELATIONS)


@pytest.mark.parametrize('relation', RELATIONS)
def test_relations_can_be_seen(relation):
    "The centres of mass of the red and of the blue pixels, without a look at the truth"
    for s in compose([(7, 'red'), (3, 'blue', 'bold')], relation, n=20, seed=3):
        rgb = (s.image + 1)/2
        red, blue = centroid((rgb[0] - rgb[2]).clamp(min=0)), centroid((rgb[2] - rgb[0]).clamp(min=0))
        right, down = red[0] - blue[0], red[1] - blue[1]
        assert {'above': -down, 'below': down, 'left of': -right, 'right of': right}[relation] > 18


def test_colors():
    inks = torch.tensor(list(INKS.values()))/127.5 - 1
    assert len(INKS) == 8 and (torch.cdist(inks, inks) + 9*torch.eye(8)).min() > .6
    assert torch.cdist(inks, -torch.ones(1, 3)).min() > 1.2                            # well apart from black
    for color, ink in zip(INKS, inks):
        for s in compose([(8, color, 'bold')], n=5):
            exact = ((s.image - ink[:, None, None]).abs().amax(0) < 1e-6).sum()
            assert exact > 40
            shade = (s.image + 1)/2/((ink + 1)/2).clamp(min=1e-3)[:, None, None]       # the same mask in each channel
            for c in range(3):
                if ink[c] > -.9: assert torch.allclose(shade[c], shade[ink.argmax()], atol=1e-4)


def test_range_and_type(hundred):
    images, scenes = hundred
    assert images.dtype == torch.float32 and images.shape == (100, 3, 64, 64)
    assert images.min() == -1 and images.max() <= 1 and not images.isnan().any()
    for image, s in zip(images, scenes):
        assert torch.equal(image, s.image)
        truth = json.loads(json.dumps(s.describe()))
        assert truth['relation'] == s.relation and [Thing(**t) for t in truth['things']] == list(s.things)


# ---- scenes: to order, and in batches

@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=2), st.sampled_from(RELATIONS), st.integers(0, 2**63),
       st.sampled_from(['train', 'test']))
def test_orders_are_filled(kinds, relation, seed, split):
    relation = relation if len(kinds) == 2 else None
    made = compose(kinds, relation, split=split, seed=seed, n=2)
    for s in made:
        assert [t[:3] for t in s.things] == kinds and s.relation == relation
        _, things, place, *_ = parse(s.caption)
        assert things == kinds and place == relation
    assert not torch.equal(made[0].image, made[1].image)
    again = compose(list(made[0].things), relation, split=split, seed=seed)            # things may be ordered again
    assert torch.equal(again[0].image, made[0].image)


def test_orders_leave_the_rest_to_chance():
    made = compose([(7, 'red')], n=80)
    assert len({s.caption for s in made}) == 8                                         # all ways to say it
    assert len({s.image.numpy().tobytes() for s in made}) == 80
    assert torch.equal(compose([(7, 'red')], n=3, seed=1)[2].image, compose([(7, 'red', None)], n=9, seed=1)[2].image)


@pytest.mark.parametrize('wrong,said', [
    (dict(things=[(7, 'crimson')]), "color must be one of red, .*; got 'crimson'"),
    (dict(things=[(7, ['red'])]), r"color must be one of red, .*; got \['red'\]"),
    (dict(things=[(10, 'red')]), 'digit must be one of 0, .*; got 10'),
    (dict(things=[(-1, 'red')]), 'digit must be one of 0, .*; got -1'),
    (dict(things=[('7', 'red')]), "digit must be one of 0, .*; got '7'"),
    (dict(things=[(7., 'red')]), 'digit must be one of 0, .*; got 7.0'),
    (dict(things=[(True, 'red')]), 'digit must be one of 0, .*; got True'),
    (dict(things=[(7, 'red', 'fat')]), "stroke must be one of thin, bold, None; got 'fat'"),
    (dict(things=[(7,)]), r'a thing is \(digit, color\) or .* not \(7,\)'),
    (dict(things=[(7, 'red', None, 'bold')]), 'a thing is .* not'),
    (dict(things=[7, 'red']), 'a thing is .* not 7'),
    (dict(things=[]), 'one or two digits, not 0'),
    (dict(things=[(7, 'red')]*3, relation='above'), 'one or two digits, not 3'),
    (dict(things=[(7, 'red')], relation='above'), "relation of 1 must be None, not 'above'"),
    (dict(things=[(7, 'red')]*2), "relation of 2 must be 'above' or .*, not None"),
    (dict(things=[(7, 'red')]*2, relation='beside'), "relation of 2 must be 'above' or .*, not 'beside'"),
    (dict(things=[(7, 'red')]*2, relation='sopra'), "not 'sopra'"),
    (dict(things=[(7, 'red')], split='valid'), "'train' or 'test', not 'valid'"),
    (dict(things=[(7, 'red')], seed=-1), 'seed must be a whole number .* not -1'),
    (dict(things=[(7, 'red')], n=0), 'n must be a whole number .* not 0')])
def test_orders_that_cannot_be_filled(wrong, said):
    with pytest.raises(ValueError, match=said): compose(**wrong)


@pytest.mark.parametrize('wrong', [dict(n=0), dict(n=-5), dict(n=2.5), dict(n=True), dict(n='9'), dict(n=2**40 + 1),
                                   dict(seed=-1), dict(seed=1.), dict(seed=None), dict(seed=2**63 + 1)])
def test_impossible_numbers_of_scenes(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f'not {value!r}')) as e: Scenes(**wrong)
    assert str(e.value).startswith(f'{name} must be a whole number from')


def test_the_largest_numbers():
    s = Scenes('train', 2**40, seed=2**63)
    assert s[2**40 - 1].image.shape == s[-1].image.shape and s[2**40 - 1].caption == s[-1].caption


@pytest.mark.parametrize('split', ['valid', '', None])
def test_unknown_split_of_scenes(split):
    with pytest.raises(ValueError, match=f"'train' or 'test', not {split!r}"): Scenes(split)


def test_beyond_the_end():
    for i in 5, -6, 10**9:
        with pytest.raises(IndexError, match=f'scene {i} of 5'): Scenes(n=5)[i]
        with pytest.raises(IndexError, match=f'scene {i} of 5'): Scenes(n=5).batch([0, i])
    with pytest.raises(TypeError): Scenes(n=5)[1.5]


@pytest.mark.parametrize('wrong,said', [
    (dict(language='fr'), "language must be 'en' or 'it', not 'fr'"), (dict(words=()), 'for each of 1 digits'),
    (dict(articles=[]), 'for each of 1 digits'), (dict(relation='above'), 'relation of 1 must be None')])
def test_captions_that_cannot_be_said(wrong, said):
    with pytest.raises(ValueError, match=said): caption([thing(1, 'red')], **wrong)


def test_torch_loader():
    scenes = Scenes('test', n=10, seed=2)
    loader = torch.utils.data.DataLoader(scenes, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0),
        collate_fn=lambda batch: (torch.stack([s.image for s in batch]), [s.caption for s in batch]))
    images, captions = zip(*loader)
    images, captions = torch.cat(images), sum(captions, [])
    assert len(loader) == 3 and images.shape == (10, 3, 64, 64)
    assert sorted(captions) == sorted(s.caption for s in scenes) and captions != [s.caption for s in scenes]
    known = {s.image.numpy().tobytes(): s.caption for s in scenes}
    assert [known[image.numpy().tobytes()] for image in images] == captions


def epochs_of(seed):
    "Two epochs of pictures, of captions, and twice the validation pictures"
    dls = scene_dataloaders(bs=8, n=20, valid=10, seed=seed, device='cpu')
    trained = [list(zip(*dls.train)) for _ in range(2)]
    return [torch.cat(x) for x, _ in trained], [sum(map(list, y), []) for _, y in trained], [
        torch.cat([x for x, _ in dls.valid]) for _ in range(2)]


def test_scene_loaders():
    images, captions, valid = epochs_of(3)
    assert images[0].shape == (16, 3, 64, 64) and images[0].dtype == torch.float32 and len(captions[0]) == 16
    assert all(type(text) is str for text in captions[0])
    seen = [{x.numpy().tobytes() for x in epoch} for epoch in images]
    assert len(seen[0] | seen[1]) == 32                                                # no scene twice
    assert torch.equal(*valid) and torch.equal(valid[0], Scenes('train', 10, seed=1).batch(range(10))[0])
    again, other = epochs_of(3), epochs_of(4)
    assert all(map(torch.equal, images, again[0])) and captions == again[1] and torch.equal(valid[0], other[2][0])
    assert captions != other[1] and not torch.equal(images[0], other[0][0])


def test_scene_loaders_make_what_collate_says():
    dls = scene_dataloaders(4, n=8, valid=4, device='cpu',
                            collate=lambda images, scenes: (images, torch.tensor([len(s.things) for s in scenes])))
    images, counts = next(iter(dls.valid))
    expected, scenes = Scenes('train', 4, seed=1).batch(range(4))
    assert torch.equal(images, expected) and counts.tolist() == [len(s.things) for s in scenes]


def test_scene_loaders_have_default_batches():
    dls = scene_dataloaders(device='cpu')
    images, captions = dls.one_batch()
    assert images.shape == (32, 3, 64, 64) and len(captions) == 32 and len(dls.train) == 800 and len(dls.valid) == 32


def test_new_scenes_are_new():
    draw = new_scenes(torch.Generator().manual_seed(0))
    a, b = draw(range(1000)), draw(list(range(1000)))
    assert len({*a, *b}) == 2000 and all(type(i) is int and 0 <= i < 2**40 for i in a)
    assert new_scenes(torch.Generator().manual_seed(0))(range(1000)) == a


@pytest.mark.parametrize('wrong,said', [
    (dict(bs=0), 'bs .* not 0'), (dict(bs=33, n=32), 'between 1 and 32, not 33'),
    (dict(valid=0), 'valid .* not 0'), (dict(valid=100_001), 'valid .* not 100001')])
def test_wrong_scene_loaders(wrong, said):
    with pytest.raises(ValueError, match=said): scene_dataloaders(**wrong)


def test_speed_of_scenes():
    "At least 500 a second of one core's time; what else runs on the machine does not count"
    scenes, before = Scenes('train'), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        scenes.batch(range(64))                                                        # reads the digits
        start = time.process_time()
        scenes.batch(range(512))
        assert 512/(time.process_time() - start) > 500
    finally: torch.set_num_threads(before)
