"""clip.py: the encoders and transformers' agree number for number, read each other's files; the loss; every error."""
import json
import random
import tempfile
import zlib

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdcourse import clip as clip_module
from sdcourse import training
from sdcourse.clip import (CLIPModel, CLIPOutput, CLIPTextModel, CLIPVisionModel, EncoderOutput, change_one,
                           contrastive_loss, encode_captions, fits, matching_dataloaders, recall, scene_clip,
                           scene_tokenizer, train_clip, zero_shot)
from sdcourse.data import Scenes, Thing, caption
from sdcourse.model import PRETRAINED, Config, find_pretrained, read_manifest, write_manifest
from sdcourse.tokenizer import CLIPTokenizer, learn_tokenizer

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=24)
TEXT = dict(SIZES, vocab_size=99, max_position_embeddings=16, eos_token_id=98, bos_token_id=97, pad_token_id=98)
VISION = dict(SIZES, hidden_size=40, intermediate_size=48, num_hidden_layers=2, image_size=20, patch_size=6)
BOTH = dict(text_config=TEXT, vision_config=VISION, projection_dim=24, logit_scale_init_value=1.7)
# text_encoder/config.json of Stable Diffusion 1.5 and 2.1, as published
SD15 = dict(
    _name_or_path='openai/clip-vit-large-patch14', architectures=['CLIPTextModel'], attention_dropout=0.0,
    bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act='quick_gelu', hidden_size=768, initializer_factor=1.0,
    initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-05, max_position_embeddings=77,
    model_type='clip_text_model', num_attention_heads=12, num_hidden_layers=12, pad_token_id=1, projection_dim=768,
    torch_dtype='float32', transformers_version='4.22.0.dev0', vocab_size=49408)
SD21 = dict(SD15, hidden_act='gelu', hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
            num_hidden_layers=23, projection_dim=512)


def shapes(model): return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def build(kind, config, seed=0):
    "A model with random weights that depend on the seed alone; transformers' classes want a config object"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind.__module__.startswith('transformers'): return kind(kind.config_class(**config)).eval()
        return kind(**config).eval()


def twin(kind, reference, config):
    "Our model and theirs, with the same weights, no two layers alike"
    theirs = build(reference, config)
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()): p += 0.05*torch.randn(p.shape, generator=torch.manual_seed(i))
    ours = kind(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def rows(n=4, length=9, config=TEXT):
    "Rows of ids that end with the end token and its repetition as padding, and their mask"
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config['vocab_size'] - 2, (n, length), generator=g)
    mask = torch.ones_like(ids)
    for i in range(n):
        ids[i, length - 1 - i:] = config['vocab_size'] - 1
        mask[i, length - i:] = 0
    return ids, mask


def pictures(n=3): return torch.rand(n, 3, 20, 20, generator=torch.Generator().manual_seed(1))*2 - 1


def near(a, b, eps=1e-5): return a.shape == b.shape and a.dtype == b.dtype and (a - b).abs().max() <= eps


# encoders

@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
@pytest.mark.parametrize('eos', [2, 98])
def test_text_model(act, eos, device):
    ours, theirs = twin(CLIPTextModel, transformers.CLIPTextModel, dict(TEXT, hidden_act=act, eos_token_id=eos))
    ours, theirs = ours.to(device), theirs.to(device)
    assert shapes(ours) == shapes(theirs)
    ids, mask = (t.to(device) for t in rows())
    for m in (None, mask, torch.ones_like(mask)):
        with torch.no_grad():
            found = ours(ids, attention_mask=m, output_hidden_states=True, return_dict=True)
            expected = theirs(ids, attention_mask=m, output_hidden_states=True)
        assert isinstance(found, EncoderOutput) and found[0] is found.last_hidden_state
        assert near(found.last_hidden_state, expected.last_hidden_state)
        assert near(found.pooler_output, expected.pooler_output)
        assert len(found[-1]) == len(expected.hidden_states) == 4
        assert all(map(near, found.hidden_states, expected.hidden_states))
    with torch.no_grad(): assert ours(ids).hidden_states is None and near(ours(ids.int())[0], ours(ids)[0], 0)
    assert near(ours.text_model.final_layer_norm(found.hidden_states[-1]), found[0])  # as hosts skip layers


@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
def test_vision_model(act, device):
    ours, theirs = twin(CLIPVisionModel, transformers.CLIPVisionModel, dict(VISION, hidden_act=act))
    ours, theirs, x = ours.to(device), theirs.to(device), pictures().to(device)
    assert shapes(ours) == shapes(theirs)
    with torch.no_grad(): found, expected = ours(x, output_hidden_states=True), theirs(x, output_hidden_states=True)
    assert near(found.last_hidden_state, expected.last_hidden_state) and near(found[1], expected.pooler_output)
    assert len(found[2]) == len(expected.hidden_states) == 3
    assert all(map(near, found.hidden_states, expected.hidden_states))
    with torch.no_grad(): assert near(ours(x.double())[0], found[0], 1e-6)


def test_clip_model(device):
    ours, theirs = twin(CLIPModel, transformers.CLIPModel, BOTH)
    ours, theirs, x = ours.to(device), theirs.to(device), pictures(4).to(device)
    ids, mask = (t.to(device) for t in rows())
    assert shapes(ours) == shapes(theirs)
    with torch.no_grad(): found, expected = ours(ids, x, mask), theirs(ids, x, mask, return_loss=True)
    assert isinstance(found, CLIPOutput)
    for name in CLIPOutput._fields: assert near(getattr(found, name), expected[name]), name
    assert near(contrastive_loss(found.logits_per_image), expected.loss)
    with torch.no_grad():
        assert near(ours.encode_texts(ids, mask), expected.text_embeds)
        assert near(ours.encode_images(x), expected.image_embeds)
        assert ours(ids[:1], x).logits_per_image.shape == (4, 1)


@pytest.mark.parametrize('config, count', [(SD15, 123_060_480), (SD21, 340_387_840)], ids=['1.5', '2.1'])
def test_stable_diffusion_has_the_same_weights(config, count):
    with torch.device('meta'):
        ours = CLIPTextModel.from_config(config)
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == count
    notes = 'architectures', 'model_type', 'dtype'
    assert {k: v for k, v in ours.config.items() if k not in notes}.items() <= config.items()


KINDS = {'text': (CLIPTextModel, transformers.CLIPTextModel, TEXT),
         'vision': (CLIPVisionModel, transformers.CLIPVisionModel, VISION),
         'both': (CLIPModel, transformers.CLIPModel, BOTH)}
every = pytest.mark.parametrize('kind, reference, config', KINDS.values(), ids=KINDS)


def answer(model, device='cpu'):
    "All tensors of an answer"
    ids, x = rows()[0].to(device), pictures().to(device)
    with torch.no_grad():
        if hasattr(model, 'logit_scale'): return list(model(ids, x)[:4])
        return list(model(x if hasattr(model, 'pre_layrnorm') else ids)[:2])


def same_answers(a, b, device='cpu'):
    a, b = answer(a, device), answer(b, device)
    return len(a) == len(b) and all(map(near, a, b))


@every
def test_what_transformers_saves_we_load(kind, reference, config, tmp_path, device):
    theirs = build(reference, config)
    theirs.save_pretrained(tmp_path)
    ours = kind.from_pretrained(tmp_path, device=device)
    assert not ours.training and ours.device.type == device and ours.dtype == torch.float32
    assert same_answers(ours, theirs.to(device), device)
    assert kind.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


@every
@pytest.mark.parametrize('auto', [False, True])
def test_what_we_save_transformers_loads(kind, reference, config, auto, tmp_path):
    ours = build(kind, config)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path/'config.json').read_text())
    assert saved['architectures'] == [kind.__name__] and saved['model_type'] == reference.config_class.model_type
    loader = transformers.AutoModel if auto else reference
    theirs, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is reference and not any(report.values()), report
    assert same_answers(ours, theirs.eval())
    theirs.save_pretrained(tmp_path/'again')
    again = kind.from_pretrained(tmp_path/'again')
    assert same_answers(ours, again) and same_answers(ours, kind.from_pretrained(tmp_path))
    assert again.config.model_type == ours.config.model_type
    if kind is CLIPTextModel: assert again.config == ours.config


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, None])
def test_types(dtype, tmp_path):
    build(CLIPTextModel, TEXT).save_pretrained(tmp_path, dtype=torch.float16)
    model = CLIPTextModel.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == (dtype or torch.float16)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('part', ['text', 'vision'])
def test_old_names(part, tmp_path):
    "The prefix, and the positions' numbers, which transformers once saved"
    kind, reference, config = KINDS[part]
    theirs = build(reference, config)
    theirs.save_pretrained(tmp_path)
    path = tmp_path/'model.safetensors'
    old = {f'{part}_model.{k}': w for k, w in load_file(path).items()}
    save_file({**old, f'{part}_model.embeddings.position_ids': torch.arange(9)[None]}, path, metadata={'format': 'pt'})
    assert same_answers(kind.from_pretrained(tmp_path), theirs)
    ours = build(CLIPModel, BOTH)
    ours.save_pretrained(tmp_path/'both')
    weights = load_file(tmp_path/'both'/'model.safetensors')
    numbers = {f'{p}_model.embeddings.position_ids': torch.arange(9)[None] for p in ('text', 'vision')}
    save_file({**weights, **numbers}, tmp_path/'both'/'model.safetensors', metadata={'format': 'pt'})
    assert same_answers(CLIPModel.from_pretrained(tmp_path/'both'), ours)


@pytest.mark.parametrize('saver', [CLIPModel, transformers.CLIPModel])
def test_an_encoder_out_of_a_whole_clip(saver, tmp_path):
    whole = build(saver, BOTH)
    whole.save_pretrained(tmp_path)
    assert same_answers(CLIPTextModel.from_pretrained(tmp_path), whole.text_model)
    assert same_answers(CLIPVisionModel.from_pretrained(tmp_path), whole.vision_model)


def test_weights_are_born_as_transformers():
    sizes = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    config = dict(text_config=dict(sizes, vocab_size=300), vision_config=dict(sizes, image_size=32, patch_size=4),
                  projection_dim=96)
    ours, theirs = build(CLIPModel, config).state_dict(), build(transformers.CLIPModel, config).state_dict()
    for name, w in theirs.items():
        if w.numel() < 5000: tolerance = 0.3
        else: tolerance = 0.06
        a, b = (x.float().std().item() if x.numel() > 1 else x.item() for x in (ours[name], w))
        assert a == pytest.approx(b, rel=tolerance, abs=1e-6), name
    assert not [k for k, w in ours.items() if k.endswith('bias') and w.any()]


# the loss

def test_loss_by_hand():
    logits = torch.tensor([[2., 0.], [1., 3.]])
    rows = torch.log(1 + torch.exp(torch.tensor([-2., -2.]))).mean()
    columns = torch.log(1 + torch.exp(torch.tensor([-1., -3.]))).mean()
    assert near(contrastive_loss(logits), (rows + columns)/2, 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_same(n, seed):
    g = torch.Generator().manual_seed(seed)
    logits, same = torch.randn(n, n, generator=g)*3, torch.rand(n, n, generator=g) > 0.5
    plain, masked = contrastive_loss(logits), contrastive_loss(logits, same)
    assert masked.isfinite() and 0 <= masked <= plain + 1e-6
    assert near(contrastive_loss(logits, torch.eye(n, dtype=torch.bool)), plain, 1e-6)
    assert near(contrastive_loss(logits.T, same.T), masked, 1e-6)  # neither side goes first
    assert contrastive_loss(logits, torch.ones(n, n, dtype=torch.bool)) == 0  # nothing is wrong


@pytest.mark.parametrize('m, n', [(1, 1), (2, 1), (3, 3), (4, 3), (6, 3), (9, 2)])
def test_more_texts_than_pictures(m, n):
    "Pictures choose among all m texts, only the first n texts look for a picture"
    g = torch.Generator().manual_seed(m)
    logits, same = torch.randn(m, n, generator=g)*3, torch.rand(m, n, generator=g) > 0.5
    out = torch.where(same & ~torch.eye(m, n, dtype=torch.bool), -torch.inf, logits).double()
    texts = [out[i].logsumexp(0) - out[i, i] for i in range(n)]
    pictures = [out[:, i].logsumexp(0) - out[i, i] for i in range(n)]
    assert near(contrastive_loss(logits, same), torch.stack(texts + pictures).mean().float(), 1e-6)
    assert contrastive_loss(logits) >= contrastive_loss(logits[:n]) - 1e-6      # more wrong texts to choose from
    more = torch.cat([logits, torch.full((2, n), -torch.inf)])
    assert near(contrastive_loss(more), contrastive_loss(logits), 1e-6)         # texts that nobody would choose


def test_same_has_gradients():
    logits = torch.randn(4, 4, generator=torch.manual_seed(0)).requires_grad_()
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    contrastive_loss(logits, same).backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 1] == logits.grad[1, 0] == 0
    assert (logits.grad != 0).sum() == 14


# bad input

@pytest.mark.parametrize('ids, message', [
    ([[1, 2]], 'got list'), (torch.zeros(2, 3), r'got torch.float32 \(2, 3\)'), (torch.zeros(3).long(), r'\(3,\)'),
    (torch.zeros(0, 3).long(), r'\(0, 3\)'), (torch.zeros(3, 0).long(), r'\(3, 0\)'),
    (torch.zeros(1, 17).long(), '17 ids for 16 positions'), (torch.tensor([[1, 99]]), 'vocabulary of 99'),
    (torch.tensor([[1, -1]]), '-1 to 1 do not fit')])
def test_bad_ids(ids, message):
    for call in (build(CLIPTextModel, TEXT), build(CLIPModel, BOTH).encode_texts):
        with pytest.raises(ValueError, match=message): call(ids)


@pytest.mark.parametrize('x, message', [
    (torch.zeros(1, 3, 21, 20), r'\(b,3,20,20\), b ≥ 1, got torch.float32 \(1, 3, 21, 20\)'),
    (torch.zeros(1, 1, 20, 20), r'\(1, 1, 20, 20\)'), (torch.zeros(3, 20, 20), r'\(3, 20, 20\)'),
    (torch.zeros(0, 3, 20, 20), r'\(0, 3, 20, 20\)'), (torch.zeros(1, 3, 20, 20).byte(), 'got torch.uint8'),
    ([[0.]], 'got list'), (torch.tensor(0.), r'\(\)')])
def test_bad_pictures(x, message):
    for call in (build(CLIPVisionModel, VISION), build(CLIPModel, BOTH).encode_images):
        with pytest.raises(ValueError, match=message): call(x)


@pytest.mark.parametrize('args, message', [
    ((torch.zeros(2, 3),), r'\(m,n\), texts by pictures, with m ≥ n ≥ 1, got \(2, 3\)'),
    ((torch.zeros(0, 0),), r'got \(0, 0\)'), ((torch.zeros(3, 0),), r'got \(3, 0\)'), ((torch.zeros(3),), r'\(3,\)'),
    ((torch.zeros(2, 2), torch.zeros(2, 2)), 'bool.*got torch.float32'),
    ((torch.zeros(2, 2), torch.zeros(3, 3).bool()), r'\(2, 2\) as the logits, got torch.bool \(3, 3\)'),
    ((torch.zeros(3, 2), torch.zeros(2, 2).bool()), r'\(3, 2\) as the logits, got torch.bool \(2, 2\)'),
    ((torch.zeros(2, 2), [[True]]), 'got list')])
def test_bad_logits(args, message):
    with pytest.raises(ValueError, match=message): contrastive_loss(*args)


@pytest.mark.parametrize('kind, config, message', [
    (CLIPTextModel, dict(TEXT, hidden_act='relu'), 'relu'), (CLIPTextModel, dict(TEXT, num_attention_heads=5), 'got 5'),
    (CLIPTextModel, dict(TEXT, hidden_sise=3), 'unknown hidden_sise'), (CLIPTextModel, 7, 'mapping, got int'),
    (CLIPTextModel, dict(VISION, model_type='clip_vision_model'), "is clip_text_model, got 'clip_vision_model'"),
    (CLIPModel, dict(TEXT, model_type='clip_text_model'), "is clip, got 'clip_text_model'"),
    (CLIPModel, dict(BOTH, text_config=dict(TEXT, layers=3)), 'unknown layers'),
    (CLIPModel, dict(BOTH, vision_config=7), 'mapping')])
def test_bad_configs(kind, config, message):
    with pytest.raises(ValueError, match=message): kind.from_config(config)


def test_weights_that_do_not_fit(tmp_path):
    build(CLIPTextModel, TEXT).save_pretrained(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    (tmp_path/'config.json').write_text(json.dumps(dict(config, vocab_size=100)))
    with pytest.raises(ValueError, match=r'token_embedding.weight \(99, 32\) for \(100, 32\)'):
        CLIPTextModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='clip_vision_model'): CLIPVisionModel.from_pretrained(tmp_path)
    for options in (dict(dtype=torch.int8), dict(device='moon')):
        with pytest.raises(ValueError): CLIPTextModel.from_pretrained(tmp_path, **options)


# ---- scenes: which text is true of which picture, wrong captions, measures

RED7, BLUE3, PLAIN = Thing(7, 'red', 'bold', 0, 0, 0), Thing(3, 'blue', 'thin', 0, 0, 0), Thing(7, 'red', None, 0, 0, 0)


def test_fits():
    texts = [((RED7, BLUE3), 'above'), ((BLUE3, RED7), 'below'), ((PLAIN, BLUE3), 'above'), ((BLUE3, RED7), 'above'),
             ((RED7,), None), ((PLAIN,), None)]
    pictures = [((RED7, BLUE3), 'above'), ((RED7,), None), ((PLAIN,), None)]
    expected = [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]]  # 'bold' is not true of a plain one
    assert torch.equal(fits(texts, pictures), torch.tensor(expected).bool())


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2**20))
def test_changed_captions_are_nearly_right(number, seed):
    "One attribute is another, or that of both things is exchanged; and the text is wrong, unless it is about a stroke"
    truth = Scenes('train', 10_001).batch([number])[1][0][2:]
    things, relation = change_one(*truth, random.Random(seed))
    changes = [[a != b for a, b in zip(old[:3], new[:3])] for old, new in zip(truth[0], things)]
    if sum(map(sum, changes)) == 2:
        k = changes[0].index(True)
        assert relation == truth[1] and changes[0] == changes[1] and k < 2
        assert [thing[k] for thing in things] == [thing[k] for thing in truth[0]][::-1]
    else: assert sum(map(sum, changes)) + (relation != truth[1]) == 1
    if None not in [thing.stroke for thing in things]: assert not fits([(things, relation)], [truth]).any()


def test_all_kinds_of_changes_happen():
    "Each attribute, the relation, and both exchanges; what is equal in both things is never exchanged"
    truth, kinds = ((RED7, BLUE3), 'above'), set()
    for seed in range(300):
        things, relation = change_one(*truth, random.Random(seed))
        changes = [a != b for old, new in zip(truth[0], things) for a, b in zip(old[:3], new[:3])]
        kinds.add((*changes, relation != truth[1]))
    assert len(kinds) == 9 and (True, False, False, True, False, False, False) in kinds
    twins = (RED7, RED7), 'above'
    assert all(change_one(*twins, random.Random(seed)) != twins for seed in range(300))


def test_captions_begin_above_or_left():
    "Mostly; and what is said the other way round is still true"
    truth, chance = ((BLUE3, RED7), 'below'), random.Random(0)
    said = [clip_module._say(*truth, chance) for _ in range(400)]
    parts = [text.replace(' sopra ', ' above ').split(' above ') for text in said]
    upper = [part for part in parts if len(part) == 2]
    assert .6 < len(upper)/400 < .8
    assert all(any(word in first for word in ('7', 'seven', 'sette')) for first, _ in upper)


@pytest.fixture(scope='module')
def tokens(): return scene_tokenizer()


def test_batches(tokens):
    "The same captions each time, right ones first, and as many wrong ones as asked for"
    def first(wrong): return matching_dataloaders(tokens, 8, wrong, n=16, valid=8, device='cpu').valid.one_batch()
    images, ids, same = first(2)
    assert images.shape == (8, 3, 64, 64) and same.shape == (24, 8) and same[:8].diagonal().all() and len(ids) == 24
    assert all(torch.equal(a, b) for a, b in zip((images, ids, same), first(2)))
    assert first(0)[2].shape == (8, 8)
    with pytest.raises(ValueError, match='wrong'): first(-1)


class Oracle:
    "A CLIP that knows what is in a picture, and what a text says of it"
    def __init__(self, scenes, tokenizer, blind=False):
        self.config, self.device = Config({'text_config': Config({'max_position_embeddings': 32})}), torch.device('cpu')
        self.scenes, self.tokenizer, self.blind = scenes, tokenizer, blind
    def vector(self, words):
        "Which words occur where"
        return F.normalize(torch.randn(512, generator=torch.Generator().manual_seed(zlib.crc32(words.encode()))), dim=0)
    def encode_images(self, images):
        if self.blind: return torch.ones(len(images), 512)/512**.5
        first = int(images[0, 0, 0, 0])
        return torch.stack([self.vector(caption(*self.scenes[first + i][2:], 'en')) for i in range(len(images))])
    def encode_texts(self, ids):
        return torch.stack([self.vector(self.tokenizer.decode(row, skip_special_tokens=True)) for row in ids])


def test_measures_of_one_who_knows(tokens):
    "All right for one who knows, chance for one who is blind; recall wants enough to choose from"
    scenes = Scenes('test', 300).batch(range(300))[1]
    scenes = [s._replace(caption=caption(*s[2:], 'en')) for s in scenes]
    numbers = torch.arange(300.)[:, None, None, None].expand(-1, 3, 64, 64)
    seeing, blind = (Oracle(scenes, tokens, blind) for blind in (False, True))
    assert zero_shot(seeing, tokens, numbers, scenes) == dict(digit=1, color=1, stroke=1, relation=1)
    assert recall(seeing, tokens, numbers, scenes) == 1
    found = zero_shot(blind, tokens, numbers, scenes)
    for name, chance in (('digit', .1), ('color', .125), ('stroke', .5), ('relation', .25)):
        assert abs(found[name] - chance) < .12, name
    assert recall(blind, tokens, numbers, scenes) < .05
    for bad in (1, 301):
        with pytest.raises(ValueError, match='among must lie between 2 and 300'):
            recall(seeing, tokens, numbers, scenes, bad)


@pytest.mark.parametrize('bad', ['a red seven', [], 7])
def test_bad_texts(tokens, bad):
    with pytest.raises(ValueError, match='texts must be a list of at least one string'):
        encode_captions(scene_clip(tokens), tokens, bad)


def test_shipped():
    "The shipped CLIP does on fresh test scenes what its manifest says"
    clip, tokenizer = CLIPModel.from_pretrained('scenes/clip'), CLIPTokenizer.from_pretrained('scenes/clip')
    manifest = read_manifest(PRETRAINED/'scenes'/'clip')
    images, scenes = Scenes('test', 200, seed=9).batch(range(200))
    found = zero_shot(clip, tokenizer, images, scenes)
    for name, share in manifest['zero_shot'].items(): assert abs(found[name] - share) < .06, name
    assert recall(clip, tokenizer, images, scenes) > .97
    assert (find_pretrained('scenes/clip', None, ['model.safetensors'])/'model.safetensors').stat().st_size < 4e6


# ---- training

TINY = {'text_config': dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        'vision_config': dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)}


def train(folder, **words):
    return train_clip(folder, **dict(epochs=2, n=64, bs=8, wrong=1, device='cpu', progress=False, **TINY) | words)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Where a training of two epochs was saved, and its manifest"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, 'Scenes', lambda split, n, **words: Scenes(split, min(n, 200), **words))
        folder = tmp_path_factory.mktemp('trained')/'deep'/'clip'
        patch.setattr(clip_module, 'scene_tokenizer', small_tokenizer)
        patch.setattr(clip_module, 'save_clip', quick_save)
        return folder, train(folder)


def small_tokenizer():
    return learn_tokenizer([s.caption for s in Scenes('train', 400).batch(range(400))[1]], 300, model_max_length=48)


def quick_save(clip, tokenizer, output, **facts):
    "Without the measures"
    clip.save_pretrained(output, dtype=torch.float16)
    tokenizer.save_pretrained(output)
    return write_manifest(output, **facts)


def test_manifest(trained):
    folder, manifest = trained
    assert manifest['steps'] == 16 and manifest['epochs'] == 2 and len(manifest['losses']) == 2
    assert all(row['train'] > 0 and row['valid'] > 0 for row in manifest['losses'])
    assert manifest == read_manifest(folder) and not list(folder.glob('checkpoint*'))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad(): vectors = CLIPModel.from_pretrained(folder).encode_texts(tokenizer(['a red 7']).input_ids)
    assert vectors.norm().item() == pytest.approx(1, abs=1e-5)
    transformers.CLIPModel.from_pretrained(folder)


def test_goes_on(trained, tmp_path, monkeypatch):
    "Cut off in the second epoch and started again, a training ends with the same weights, to the last bit"
    from fastai.callback.core import Callback

    class Stop(Exception): pass

    class Fails(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 3: raise Stop('no power')
    for name, value in (('scene_tokenizer', small_tokenizer), ('save_clip', quick_save)):
        monkeypatch.setattr(clip_module, name, value)
    real = training.fit
    with monkeypatch.context() as patch:
        patch.setattr(training, 'fit', lambda *args, cbs, **words: real(*args, cbs=[*cbs, Fails()], **words))
        with pytest.raises(Stop): train(tmp_path)
    assert (tmp_path/training.CHECKPOINT).exists()
    with pytest.raises(ValueError, match='wrong'): train(tmp_path, wrong=2)
    again = train(tmp_path)
    folder, manifest = trained
    assert [(row['train'], row['valid']) for row in again['losses']] == [
        (row['train'], row['valid']) for row in manifest['losses']]
    ours, theirs = (load_file(f/'model.safetensors') for f in (tmp_path, folder))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize('words, message', [
    (dict(wrong=-1), 'wrong'), (dict(seed=1.5), 'seed'), (dict(bs=0), 'bs'), (dict(n=0), 'bs must lie between 1 and 0'),
    (dict(epochs=0), 'epochs'), (dict(device='tpu'), 'tpu'),
    (dict(text_config=dict(num_attention_heads=5)), 'heads')], ids=str)
def test_bad_training(words, message, tmp_path):
    with pytest.raises(ValueError, match=message): train(tmp_path/'new', **words)
    assert not list((tmp_path/'new').glob('*.safetensors'))


def test_learns():
    "A small CLIP learns inks from 3,200 scenes, which an untrained one cannot tell"
    tokenizer = small_tokenizer()
    images, scenes = Scenes('test', 100).batch(range(100))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, value in (('scene_tokenizer', lambda: tokenizer), ('save_clip', quick_save)):
            patch.setattr(clip_module, name, value)
        train(folder, epochs=1, n=3200, bs=32, **{k: {**v, 'hidden_size': 64} for k, v in TINY.items()})
        found = zero_shot(CLIPModel.from_pretrained(folder), tokenizer, images, scenes)
    assert found['color'] > .3
