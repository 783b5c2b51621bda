"MNIST: the embedded files against torchvision's reader, the loaders, and files that were tampered with."
import hashlib
import lzma
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import MNIST

from sdcourse import data
from sdcourse.data import MNIST_SHA256, Digits, digit_dataloaders, mnist, parse_idx, read_idx


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
