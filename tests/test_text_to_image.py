"text_to_image.py: what is held out, a short training and what it saves, going on, the judge, the measurements, errors."
import diffusers
import pytest
import torch

from sdcourse import text_to_image as t2i
from sdcourse.clip import CLIPTextModel
from sdcourse.data import INKS, RELATIONS, Scenes, Thing, compose
from sdcourse.model import PRETRAINED, read_manifest, sha256
from sdcourse.pipeline import StableDiffusionPipeline
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.training import CHECKPOINT
from sdcourse.unet import UNet2DConditionModel
from sdcourse.vae import AutoencoderKL

OPPOSITE = {'above': 'below', 'below': 'above', 'left of': 'right of', 'right of': 'left of'}
SMALL = dict(t2i.UNET, block_out_channels=(16, 32), norm_num_groups=8)


@pytest.fixture(scope='module')
def parts():
    "The shipped VAE and tokenizer"
    return AutoencoderKL.from_pretrained('scenes/vae'), CLIPTokenizer.from_pretrained('scenes/clip')


@pytest.fixture
def small(monkeypatch):
    "A small U-Net, and few pictures to measure it with: what is tested is not how well it draws"
    monkeypatch.setattr(t2i, 'UNET', SMALL)
    real = t2i.draw_scenes
    monkeypatch.setattr(t2i, 'draw_scenes', lambda pipe, scenes, **words: real(pipe, scenes, 2, bs=200))
    return dict(n=64, bs=32, device='cpu', progress=False)


# ---- what is held out

def test_held_out_is_a_tenth():
    assert len(t2i.HELD_OUT) == 32 and all(d in range(10) and c in INKS and r in RELATIONS for d, c, r in t2i.HELD_OUT)


def test_held_out_both_ways():
    "A scene may be described from either of its things"
    for digit in range(10):
        for ink in INKS:
            for relation in RELATIONS:
                one, other = Thing(digit, ink, None, 0, 0, 0), Thing(digit, ink, 'bold', 0, 0, 0)
                hidden = (digit, ink, relation) in t2i.HELD_OUT or (digit, ink, OPPOSITE[relation]) in t2i.HELD_OUT
                assert t2i.held_out((one, other), relation) == hidden == t2i.held_out((other, one), OPPOSITE[relation])
                assert not t2i.held_out((one,), None)


def test_batches_never_show_it(parts):
    _, tokenizer = parts
    shown, collate = [], t2i.scene_dataloaders
    def spy(bs, collate=None, **words):
        def seen(images, scenes):
            pictures, ids = collate(images, scenes)
            shown.append((pictures, ids, scenes))
            return pictures, ids
        return spy.real(bs, collate=seen, **words)
    spy.real = collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t2i, 'scene_dataloaders', spy)
        dls = t2i.prompt_dataloaders(tokenizer, bs=64, n=256, valid=32, device='cpu')
        for _ in dls.train: pass
        for _ in dls.valid: pass
    hidden = [t2i.held_out(s.things, s.relation) for *_, scenes in shown for s in scenes]
    assert any(hidden) and sum(len(pictures) for pictures, *_ in shown) == len(hidden) - sum(hidden)
    for pictures, ids, scenes in shown:
        kept = [s for s in scenes if not t2i.held_out(s.things, s.relation)]
        assert torch.equal(ids, tokenizer([s.caption for s in kept], padding='max_length').input_ids)
        assert torch.equal(pictures, torch.stack([s.image for s in kept]))


# ---- the training

def test_latents_there_and_back(parts):
    vae, _ = parts
    images = Scenes('test', 32, seed=2).batch(range(32))[0]
    with torch.no_grad():
        latents = t2i.to_latents(vae, images, torch.Generator().manual_seed(0))
        assert latents.shape == (32, 4, 8, 8) and .8 < latents.std() < 1.2
        assert (t2i.to_images(vae, latents) - images).square().mean() < .01


@pytest.mark.parametrize('train_text', [False, True])
def test_short_training(small, tmp_path, train_text):
    manifest = t2i.train_scenes(tmp_path, epochs=2, train_text=train_text, **small)
    assert manifest['steps'] == 4 and len(manifest['losses']) == 2 and manifest['train_text'] is train_text
    assert set(manifest['right']) == {'digit', 'color', 'stroke', 'relation', 'all'}
    weights = tmp_path/'unet'/'diffusion_pytorch_model.safetensors'
    assert manifest['files'][weights.name] == sha256(weights) and read_manifest(tmp_path/'unet') == manifest
    assert not (tmp_path/CHECKPOINT).exists()
    clip, saved = CLIPTextModel.from_pretrained('scenes/clip'), CLIPTextModel.from_pretrained(tmp_path/'text_encoder')
    same = [torch.equal(a, b) for a, b in zip(clip.parameters(), saved.parameters(), strict=True)]
    assert all(same) if not train_text else sum(same) < len(same)/2
    ours = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    words = dict(prompt='a red 7 above a blue 3', num_inference_steps=3, guidance_scale=4., output_type='pt',
                 latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(ours(**words).images, theirs(**words).images, atol=1e-4)


def test_only_what_should_learn_learns(parts):
    clip = CLIPTextModel.from_pretrained('scenes/clip')
    for train_text in (False, True):
        model = t2i.Prompted(UNet2DConditionModel(**SMALL), clip, train_text)
        assert all(p.requires_grad for p in model.unet.parameters())
        assert {p.requires_grad for p in model.text_encoder.parameters()} == {train_text}


def test_goes_on(small, tmp_path, monkeypatch):
    "Cut short after the first of two epochs, the same call ends where an undisturbed one does"
    whole = t2i.train_scenes(tmp_path/'whole', epochs=2, **small)
    from sdcourse.training import Checkpoint
    real = Checkpoint.after_epoch
    def interrupted(self):
        real(self)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, 'after_epoch', interrupted)
        t2i.train_scenes(tmp_path/'cut', epochs=2, **small)
    assert [p.name for p in (tmp_path/'cut').iterdir()] == [CHECKPOINT]
    again = t2i.train_scenes(tmp_path/'cut', epochs=2, **small)
    assert again['files'] == whole['files'], 'not the same weights'
    assert [row['train'] for row in again['losses']] == [row['train'] for row in whole['losses']]


def test_prompts_are_dropped(parts, small):
    "As many as asked for in training, none in validation"
    _, tokenizer = parts
    empty = tokenizer([''], padding='max_length').input_ids
    for drop in (0., 1.):
        learn = t2i._learner(PRETRAINED/'scenes', tokenizer, 32, 64, drop, False, 0, torch.device('cpu'), torch.float32)
        seen = []
        learn.model.register_forward_pre_hook(lambda model, args, seen=seen: seen.append((model.training, args[2])))
        with learn.no_logging(), learn.no_bar(): learn.fit(1, 1e-4)
        dropped = {training: torch.cat([(ids == empty).all(1) for t, ids in seen if t == training])
                   for training in (True, False)}
        assert dropped[True].float().mean() == drop and not dropped[False].any()


WRONG = {
    'epochs': (dict(epochs=0), 'epochs must be a whole number, at least 1, got 0'),
    'n': (dict(n=-1), 'n must be a whole number, at least 1, got -1'),
    'bs': (dict(bs=1.5), 'bs must be a whole number, at least 8, got 1.5'),
    'seed': (dict(seed=-1), 'seed must be a whole number, at least 0, got -1'),
    'more than there are': (dict(bs=65), 'bs must lie between 1 and 64, not 65'),
    'lr': (dict(lr=0), 'lr must be above 0, not 0'),
    'drop': (dict(drop=1.5), 'drop must lie between 0 and 1, not 1.5'),
    'device': (dict(device='abacus'), 'abacus'),
    'dtype': (dict(dtype=torch.float16), 'dtype must be torch.float32 or torch.bfloat16, got torch.float16'),
    'parts': (dict(parts='no/such/folder'), 'no/such/folder'),
}


@pytest.mark.parametrize('wrong', WRONG)
def test_bad_training(small, tmp_path, wrong):
    words, said = WRONG[wrong]
    with pytest.raises(ValueError, match=said): t2i.train_scenes(tmp_path/'new', **{**small, 'epochs': 1, **words})
    assert not any((tmp_path/'new').rglob('*.*'))


# ---- the judge

@pytest.fixture(scope='module')
def real_scenes(): return Scenes('test', 300, seed=5).batch(range(300))


def test_reader_learns(parts, tmp_path):
    "A shortened training: forty steps are enough to be far from guessing"
    vae, _ = parts
    manifest = t2i.train_reader(tmp_path, vae, epochs=2, n=1280, progress=False)
    assert read_manifest(tmp_path) == manifest and len(manifest['losses']) == 2
    reader = t2i.DigitClassifier.from_pretrained(tmp_path)
    images, scenes = Scenes('test', 200, seed=5).batch(range(200))
    assert t2i.judge(images, scenes, reader)['digit'].float().mean() > .25


@pytest.mark.parametrize('words', [dict(epochs=0), dict(n=1.5), dict(seed=None)], ids=str)
def test_bad_reader(parts, tmp_path, words):
    said = f'{[*words][0]} must be a whole number, at least'
    with pytest.raises(ValueError, match=said): t2i.train_reader(tmp_path, parts[0], **words)
    assert not list(tmp_path.iterdir())


def test_finds_things(real_scenes):
    images, scenes = real_scenes
    pairs = [(a, b) for s, f in zip(scenes, t2i.find_things(images, scenes)) for a, b in zip(s.things, f.things)]
    off = torch.tensor([[a.x - b.x, a.y - b.y] for a, b in pairs]).norm(dim=1)
    assert (off < 3).float().mean() > .95


def test_judge_accepts_what_is_right(real_scenes):
    right = t2i.judge(*real_scenes)
    assert list(right) == ['digit', 'color', 'stroke', 'relation', 'all']
    shares = {name: share.float().mean() for name, share in right.items()}
    assert shares['all'] > .9 and min(shares['color'], shares['stroke'], shares['relation']) > .98, shares
    assert torch.equal(right['all'], right['digit'] & right['color'] & right['stroke'])


def changed(scene, **other): return scene._replace(things=(scene.things[0]._replace(**other), *scene.things[1:]))


def test_judge_refuses_what_is_wrong(real_scenes):
    images, scenes = real_scenes
    def share(name, wrong): return t2i.judge(images, wrong)[name].float().mean()
    inks, things = [*INKS], [s.things[0] for s in scenes]
    assert share('digit', [changed(s, digit=(t.digit + 1) % 10) for s, t in zip(scenes, things)]) < .05
    assert share('color', [changed(s, color=inks[(inks.index(t.color) + 1) % 8]) for s, t in zip(scenes, things)]) < .05
    stroked = [i for i, t in enumerate(things) if t.stroke]
    other = {'thin': 'bold', 'bold': 'thin'}
    wrong = [changed(scenes[i], stroke=other[things[i].stroke]) for i in stroked]
    assert t2i.judge(images[stroked], wrong)['stroke'].float().mean() < .05


def test_judge_of_places():
    "The same two digits in all four places: each is accepted where it is, and nowhere else"
    for real in RELATIONS:
        scenes = compose([(3, 'red'), (8, 'blue')], real, n=20, seed=3)
        images = torch.stack([s.image for s in scenes])
        for asked in RELATIONS:
            found = t2i.judge(images, [s._replace(relation=asked) for s in scenes])['relation'].float().mean()
            assert found == 1 if asked == real else found < .2, (real, asked, found)


def test_judge_of_nothing():
    "Black pictures, and no picture with two things missing, are right"
    scenes = Scenes('test', 20, seed=6).batch(range(20))[1]
    assert not t2i.judge(torch.full((20, 3, 64, 64), -1.), scenes)['all'].any()
    with pytest.raises(ValueError, match='2 pictures, but 3 scenes'): t2i.judge(torch.zeros(2, 3, 64, 64), scenes[:3])


# ---- drawing and measuring

def test_both_languages():
    scenes = Scenes('test', 50, seed=1).batch(range(50))[1]
    english, italian = t2i.in_both_languages(scenes)
    assert [s.things for s in english] == [s.things for s in italian] == [s.things for s in scenes]
    assert not {s.caption for s in english} & {s.caption for s in italian}
    def said(seed): return [[s.caption for s in part] for part in t2i.in_both_languages(scenes, seed)]
    assert said(0) == [[s.caption for s in part] for part in (english, italian)] != said(1)


class Copier:
    "A pipeline that draws what its prompt says, but never anything that is blue"
    def __init__(self, scenes): self.known = {s.caption: s for s in scenes}

    def __call__(self, prompts, generator, **words):
        scenes = [self.known[p] for p in prompts]
        images = torch.stack([s.image for s in scenes])/2 + .5
        for image, s in zip(images, scenes):
            if 'blue' in [t.color for t in s.things]: image.zero_()
        assert len(generator) == len(prompts)
        return type('Output', (), {'images': images})


def test_measures():
    scenes = Scenes('test', 60, seed=12).batch(range(60))[1]
    copier = Copier(sum(t2i.in_both_languages(scenes, 12), []))
    found = t2i.measure_scenes(copier, 60, bs=7)
    assert found['all']['prompts'] == 120 and found['English'] == found['Italian']
    assert found['one digit']['prompts'] + found['two digits']['prompts'] == 120
    assert found['two digits, seen']['prompts'] + found['two digits, never shown']['prompts'] == \
        found['two digits']['prompts']
    blue = sum('blue' in [t.color for t in s.things] for s in scenes)/60
    assert abs(found['all']['color'] - (1 - blue)) < .03 and found['all']['all'] <= found['all']['color']
