"scale.py: processes that train together and one that is killed, shares, folders, tar files, memory, errors."
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings

import pytest
import torch
from PIL import Image

from sdcourse.data import Scenes
from sdcourse.images import to_pil

with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
    from fastai.data.load import DataLoader

    from sdcourse.scale import (
        Distributed,
        Example,
        PictureFolder,
        Shards,
        captioned_dataloaders,
        decode,
        join,
        read_shard,
        share,
        write_shards,
    )

SCENES = Scenes('test', 12, seed=3).batch(range(12))[1]


def pairs(scenes=SCENES): return [(to_pil(scene.image), scene.caption) for scene in scenes]


def small(n):
    "n pictures of one colour each, made when asked for"
    for i in range(n): yield Image.new('RGB', (8, 8), (i % 256, i//256 % 256, i//65536)), f'number {i}'


def number(picture):
    "Which one it is"
    r, g, b = ((picture[:, 0, 0] + 1)*127.5).round().int().tolist()
    return r + 256*g + 65536*b


# ---- several processes

LAUNCHED = """
import json, os, signal, sys
from sdcourse import cli, text_to_image as lesson
lesson.UNET = dict(lesson.UNET, block_out_channels=(16, 32), norm_num_groups=8)
real = lesson.draw_scenes
lesson.draw_scenes = lambda pipe, scenes, **words: real(pipe, scenes, 2, bs=200)
from sdcourse import scale
from fastai.callback.core import Callback
def after_step(self):
    if sys.argv[1] == 'kill' and self.epoch == 1 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)
scale.Distributed.after_step = after_step
def writes(event, args):
    if event == 'open' and 'mine' in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR): os._exit(7)
if os.environ['RANK'] == '1': sys.addaudithook(writes)
code = cli.main(sys.argv[2:])
if code: sys.exit(code)
"""


def launch(folder, kill, *words, ok=True):
    "`accelerate launch` of two processes, which train a small U-Net; what was printed"
    (folder/'launched.py').write_text(LAUNCHED)
    command = [sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes',
               '2', '--main_process_port', '0', folder/'launched.py', 'kill' if kill else 'live', 'train', 'scenes',
               *words]
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


def test_killed_and_resumed_together(tmp_path, monkeypatch):
    """One of two processes is killed: the training ends. The same command goes on, in both. Its losses are those of
    one process with the doubled batch, but for chance. The second process would leave with 7 if it wrote anything"""
    words = '-o mine --epochs 3 -n 256 --batch 16 --device cpu --lr 0.003'.split()
    said = launch(tmp_path, True, *words, ok=False)
    assert os.listdir(tmp_path/'mine') == ['checkpoint.pt'] and said.count('mine: the whole text-to-image model') == 1
    before = torch.load(tmp_path/'mine'/'checkpoint.pt')
    assert len(before['rows']) == 1 and before['steps'] == 8, 'one epoch of 256/2/16 steps'
    said = launch(tmp_path, False, *words)
    assert said.count('mine: going on from checkpoint.pt') == said.count('trained in') == 1
    manifest = json.loads((tmp_path/'mine'/'unet'/'manifest.json').read_text())
    assert manifest['losses'][0] == before['rows'][0] and manifest['steps'] == 24 and manifest['processes'] == 2
    assert not [*(tmp_path/'mine').glob('**/*.tmp')] and not (tmp_path/'mine'/'checkpoint.pt').exists()

    from sdcourse import text_to_image as lesson
    monkeypatch.setattr(lesson, 'UNET', dict(lesson.UNET, block_out_channels=(16, 32), norm_num_groups=8))
    real = lesson.draw_scenes
    monkeypatch.setattr(lesson, 'draw_scenes', lambda pipe, scenes, **words: real(pipe, scenes, 2, bs=200))
    alone = lesson.train_scenes(tmp_path/'alone', 3, 256, 32, 3e-3, device='cpu', progress=False)
    assert alone['steps'] == 24 and 'processes' not in alone
    for key in ('train', 'valid'):
        ours, theirs = ([row[key] for row in m['losses']] for m in (alone, manifest))
        assert ours != theirs and max(abs(a - b)/a for a, b in zip(ours, theirs)) < .05, (ours, theirs)
        assert ours[-1] < ours[0] and theirs[-1] < theirs[0]


def loader(n, bs, train=True):
    "Numbers, in batches"
    return DataLoader(range(n), bs=bs, shuffle=train, drop_last=train, create_item=lambda i: i,
                      create_batch=lambda ids: ids)


@pytest.mark.parametrize('size', [1, 2, 3])
@pytest.mark.parametrize('n', [24, 29])
def test_share(n, size):
    "Together, step by step, the processes see what one sees with the larger batch; all have as many steps"
    parts, whole = [share(loader(n, 4), rank, size) for rank in range(size)], loader(n, 4*size)
    for dl in (*parts, whole):
        dl.shuffle_fn = lambda ids: torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).tolist()
    steps, expected = [*zip(*parts, strict=True)], [*whole]
    assert [sorted(sum(step, [])) for step in steps] == [sorted(batch) for batch in expected]
    assert {len(part) for part in parts} == {len(steps)} == {len(whole)}


@pytest.mark.parametrize('n, size', [(1, 2), (10, 3), (12, 3)])
def test_share_in_order(n, size):
    "For validation: everybody something, nothing twice, nothing left out"
    parts = [[*share(loader(n, 4, False), rank, size)] for rank in range(size)]
    assert sorted(i for part in parts for batch in part for i in batch) == [*range(n)]


def test_too_small_a_share():
    with pytest.raises(ValueError, match='batches of 8 for each of 2 processes need more than 12 items'):
        share(loader(12, 8), 1, 2)


def test_alone(monkeypatch):
    "Nobody has launched anything: no group of processes is made"
    assert join('cpu') == (None, torch.device('cpu'))
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert join(torch.device('cpu')) == (None, torch.device('cpu'))


def test_one_is_a_team(monkeypatch):
    "With a single process the callback changes nothing, to the last bit"
    from test_training import losses, make, same, train
    team, alone = make(), make()
    data, model = team.dls, team.model
    assert losses(train(team, 2, cbs=[Distributed('cpu')])) == losses(train(alone, 2)) and same(team.model, alone.model)
    assert team.dls is data and team.model is model and same(team.ema.average, alone.ema.average)


# ---- pictures with captions

def save_folder(folder, layout):
    "Twelve scenes in a folder"
    (folder/'more').mkdir(parents=True)
    for i, (picture, caption) in enumerate(pairs()):
        name = f'more/{i:02}.JPG' if i % 2 else f'{i:02}.png'
        picture.save(folder/name, quality=95)
        if layout == 'beside': (folder/name).with_suffix('.txt').write_text(f' {caption}\n')
    rows = [dict(file_name=f'more/{i:02}.JPG' if i % 2 else f'{i:02}.png', text=s.caption, more=[i])
            for i, s in enumerate(SCENES)]
    if layout == 'listed': (folder/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize('layout', ['beside', 'listed'])
def test_folder(tmp_path, layout):
    folder = PictureFolder(save_folder(tmp_path/'a', layout))
    images, captions = decode(folder, 64)
    assert len(folder) == 12 and sorted(captions) == sorted(scene.caption for scene in SCENES)
    truth = {scene.caption: scene.image for scene in SCENES}
    for image, caption in zip(images, captions): assert (image - truth[caption]).abs().mean() < .05
    assert decode([folder[3]], 16)[0].shape == (1, 3, 16, 16)


def test_grey_and_oblong_pictures():
    stream = io.BytesIO()
    Image.new('L', (40, 20), 255).save(stream, 'PNG')
    images, captions = decode([Example('a', stream.getvalue(), 'white')], 8)
    assert images.shape == (1, 3, 8, 8) and (images == 1).all() and captions == ['white']


def test_folder_batches(tmp_path):
    "All pictures in each epoch, those held out never; what `collate` makes"
    dls = captioned_dataloaders(save_folder(tmp_path/'a', 'beside'), 3, 32, seed=5, device='cpu',
                                collate=lambda images, captions: (images, len(captions), captions))
    epochs = [[caption for _, n, part in dls.train for caption in part] for _ in range(2)]
    (images, n, held), = dls.valid
    assert images.shape == (1, 3, 32, 32) and n == 1 and all(len(epoch) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] and not {*held} & {*epochs[0], *epochs[1]}


def test_shards_are_webdatasets(tmp_path):
    "What we write it reads, and what it writes we read"
    import webdataset
    paths = write_shards(pairs(), tmp_path/'ours', 5)
    assert [path.name for path in paths] == ['00000.tar', '00001.tar', '00002.tar']
    found = [*webdataset.WebDataset([*map(str, paths)], shardshuffle=False)]
    assert [one['txt'].decode() for one in found] == [scene.caption for scene in SCENES]
    with webdataset.TarWriter(str(tmp_path/'theirs.tar')) as sink:
        for i, (picture, caption) in enumerate(pairs()):
            sink.write({'__key__': f'a.b/{i:04}', 'png': picture, 'txt': caption, 'json': {'i': i}})
    ours = [e for path in paths for e in read_shard(path)]
    for one, other, theirs in zip(ours, read_shard(tmp_path/'theirs.tar'), found, strict=True):
        assert one.picture == theirs['png'] and one.caption == other.caption
        assert torch.equal(*(decode([e], 64)[0] for e in (one, other)))


def test_shards_do_not_depend_on_the_clock(tmp_path):
    one, other = (write_shards(small(3), tmp_path/name)[0].read_bytes() for name in 'ab')
    assert one == other


def test_packed_shards(tmp_path):
    "gzip, folders inside, endings in capitals"
    with tarfile.open(tmp_path/'a.tar', 'w:gz') as tar:
        for i, (picture, caption) in enumerate(small(2)):
            picture.save(stream := io.BytesIO(), 'JPEG')
            for name, data in ((f'x/{i}.JPG', stream.getvalue()), (f'x/{i}.txt', caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            folder = tarfile.TarInfo('x')
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    assert [e.caption for e in read_shard(tmp_path/'a.tar')] == ['number 0', 'number 1']


def test_mixing(tmp_path):
    "What is held is mixed, all come once, and the same order gives the same"
    data = Shards(write_shards(small(50), tmp_path/'a', 10), buffer=20)
    assert len(data) == 5 and data.per_shard == 10
    assert [e.caption for e in data.examples([3, 0])] == [f'number {i}' for i in [*range(30, 40), *range(10)]]
    def order(ids): return torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).tolist()
    found, again = ([e.caption for e in data.examples(range(5), order)] for _ in range(2))
    assert found == again and sorted(found) == sorted(f'number {i}' for i in range(50)) and found != sorted(found)
    assert {*found[:20]} == {f'number {i}' for i in range(20)}, 'the first twenty were held together'


def test_shard_batches(tmp_path):
    "Full batches, another order in each epoch; the last file is for validation; shares of two processes are disjoint"
    write_shards(small(50), tmp_path/'a', 10)
    dls = captioned_dataloaders(tmp_path/'a', 8, 8, device='cpu')
    assert len(dls.train) == 5 and len(dls.valid) == 2
    epochs = [[*dls.train] for _ in range(2)]
    seen = [[number(x) for images, _ in epoch for x in images] for epoch in epochs]
    assert all(sorted(epoch) == [*range(40)] for epoch in seen) and seen[0] != seen[1]
    assert [number(x) for images, _ in dls.valid for x in images] == [*range(40, 50)]
    parts = [share(dls.train, rank, 2) for rank in (0, 1)]
    for part in parts: part.shuffle_fn = lambda ids: [*reversed(ids)]
    numbers = [{number(x) for images, _ in part for x in images} for part in parts]
    assert [len(part) for part in parts] == [2, 2] and not numbers[0] & numbers[1]
    assert all(i//10 in (3, 1) for i in numbers[0]) and all(i//10 in (2, 0) for i in numbers[1])


def test_uneven_shards(tmp_path):
    "Who has fewer pictures begins again, and makes as many batches as the others"
    write_shards(small(30), tmp_path/'a', 10)
    write_shards(small(2), tmp_path/'b', 10)[0].rename(tmp_path/'a'/'00001.tar')
    train = captioned_dataloaders(tmp_path/'a', 3, 8, device='cpu').train
    parts = [[*share(train, rank, 2)] for rank in (0, 1)]
    assert [len(part) for part in parts] == [3, 3] and {len(images) for part in parts for images, _ in part} == {3}


def test_trains_on_a_folder(tmp_path, monkeypatch):
    "`train_scenes` with pictures of somebody else's, from files and from tar files"
    from sdcourse import text_to_image as lesson
    monkeypatch.setattr(lesson, 'UNET', dict(lesson.UNET, block_out_channels=(16, 32), norm_num_groups=8))
    real = lesson.draw_scenes
    monkeypatch.setattr(lesson, 'draw_scenes', lambda pipe, scenes, **words: real(pipe, scenes, 2, bs=200))
    save_folder(tmp_path/'folder', 'beside')
    write_shards(pairs()*2, tmp_path/'shards', 8)
    for name, steps in (('folder', 2), ('shards', 4)):
        manifest = lesson.train_scenes(tmp_path/'out'/name, 2, bs=8, device='cpu', progress=False, data=tmp_path/name)
        assert manifest['steps'] == steps and manifest['data'] == name and str(tmp_path) not in json.dumps(manifest)


# ---- memory

READ = """
import sys, psutil
from sdcourse.scale import captioned_dataloaders
folder, n, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'keep'
kept, seen, start = [], 0, None
for images, captions in captioned_dataloaders(folder, 100, 16, device='cpu').train:
    seen += len(images)
    assert images.shape == (100, 3, 16, 16) and len(captions) == 100
    if keep: kept.append(images)
    if start is None and seen >= n/10: start = psutil.Process().memory_info().rss
assert seen == n, seen
print((psutil.Process().memory_info().rss - start)/1e6)
"""


def grown(tmp_path, n, how='read'):
    "Megabytes by which a new process grows from the first tenth of n pictures to the last"
    if not (tmp_path/'many').exists():
        one = write_shards(small(5000), tmp_path/'one', 5000)[0]
        (tmp_path/'many').mkdir()
        for i in range(n//5000 + 1): os.link(one, tmp_path/'many'/f'{i:05}.tar')
    command = [sys.executable, '-W', 'ignore', '-c', READ, tmp_path/'many', str(n), how]
    return float(subprocess.check_output(command, text=True))


def test_memory_is_flat(tmp_path):
    "9,000 pictures are 28 MB as numbers: who keeps them needs as much, who reads them does not"
    assert grown(tmp_path, 10_000) < 10 < 20 < grown(tmp_path, 10_000, 'keep')


@pytest.mark.slow
def test_memory_is_flat_for_long(tmp_path):
    "90,000 pictures are 276 MB as numbers; the memory may grow no more than for fewer"
    assert grown(tmp_path, 100_000) < 10


# ---- what is refused

def tar(path, **members):
    "A tar file of small texts"
    with tarfile.open(path, 'w') as made:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace('_', '.'))
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))


def refused(tmp_path):
    "What fails -> (a call, what is said)"
    bad, png, eps = tmp_path/'bad', io.BytesIO(), io.BytesIO()
    bad.mkdir()
    Image.new('RGB', (8, 8)).save(eps, 'EPS')
    Image.new('RGB', (8, 8)).save(png, 'PNG')
    def file(name, data=b'x'): (bad/name).write_bytes(data)
    def folder(*files):
        for path in bad.iterdir(): path.unlink()
        for one in files: file(*one)
        return PictureFolder(bad)
    def shard(**members):
        tar(bad/'a.tar', **members)
        return [*read_shard(bad/'a.tar')]
    return {
        'no folder': (lambda: PictureFolder(tmp_path/'no'), f'there is no folder {tmp_path/"no"}'),
        'an empty one': (folder, f'{bad} holds no .png, .jpg, .jpeg, .webp and no .tar'),
        'no caption': (lambda: folder(['a.png']), 'a.png has no caption: there is no a.txt beside it'),
        'no picture': (lambda: decode(folder(['a.png'], ['a.txt']), 8), 'a.png is no picture that can be read'),
        'another kind': (lambda: decode(folder(['a.png', eps.getvalue()], ['a.txt']), 8), 'a.png is no picture that'),
        'no UTF-8': (lambda: [*folder(['a.png', b'x'], ['a.txt', b'\xff'])], f'{bad/"a.txt"} is not UTF-8'),
        'half a picture': (lambda: decode(folder(['a.png', png.getvalue()[:45]], ['a.txt']), 8), 'a.png is no'),
        'no JSON': (lambda: folder(['metadata.jsonl', b'{']), f'{bad/"metadata.jsonl"}, line 1: '),
        'no text': (lambda: folder(['metadata.jsonl', b'{"file_name": "a"}']), "'file_name' and 'text' are needed"),
        'listed, not there': (lambda: folder(['metadata.jsonl', b'{"file_name": "a", "text": "b"}'])[0],
                              f'cannot read {bad/"a"}: No such file'),
        'no tar file': (lambda: [file('a.tar'), *read_shard(bad/'a.tar')], f'{bad/"a.tar"} is not a whole tar file'),
        'an empty tar': (shard, f'{bad/"a.tar"} holds no pictures'),
        'half a pair': (lambda: shard(a_png=b'x', b_txt=b'y'), f'{bad/"a.tar"}: a has png; a picture and its .txt are'),
        'no text in it': (lambda: shard(a_png=b'x', a_txt=b'\xff'), f'{bad/"a.tar"} is not a whole tar file'),
        'cut short': (lambda: [shard(a_png=b'x'*9999, a_txt=b'y'), file('a.tar', (bad/'a.tar').read_bytes()[:4000]),
                               *read_shard(bad/'a.tar')], f'{bad/"a.tar"} is not a whole tar file'),
        'nothing to write': (lambda: write_shards([], tmp_path/'w'), 'at least one picture is needed, got none'),
        'shards already': (lambda: [write_shards(small(1), tmp_path/'x') for _ in 'ab'], 'holds 00000.tar already'),
        'none in a file': (lambda: write_shards(small(1), tmp_path/'w', 0), 'per_shard must be a whole number'),
        'one file': (lambda: captioned_dataloaders(write_shards(small(9), tmp_path/'s')[0].parent, 2, 8),
                     'two tar files are needed, the last is for validation'),
        'too large a batch': (lambda: captioned_dataloaders(save_folder(tmp_path/'f', 'beside'), 12),
                              'bs must be at most the number of pictures to train on, not 12'),
        'no batch': (lambda: captioned_dataloaders(tmp_path, 0), 'bs must be a whole number, at least 1, got 0'),
        'no side': (lambda: captioned_dataloaders(tmp_path, 1, 0), 'side must be a whole number, at least 1, got 0'),
        'nothing held': (lambda: Shards(write_shards(small(1), tmp_path/'h'), 0), 'buffer must be a whole number'),
    }


def test_refused(tmp_path):
    for name, (call, said) in refused(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            call()
            pytest.fail(f'{name} was not refused')
        assert said in str(caught.value), f'{name}: {caught.value}'
