"""finetuning.py: new words and LoRA, whose files diffusers and peft read, and theirs us; what learns; bad input.

The pipeline here is tiny and random: it draws grain, but the same grain with our files and with theirs.
"""
import json
import warnings

import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sdcourse import finetuning, training
from sdcourse.clip import CLIPTextModel
from sdcourse.data import INKS, RELATIONS, compose
from sdcourse.finetuning import (CONCEPTS, EMBEDS, LORA, METHODS, PEFT, TARGETS, LoRALinear, NewTokens, add_lora,
                                 add_token, compose_concepts, draw_concept, finetune, load_finetuned, load_lora,
                                 load_token, lora_layers, read_examples, save_lora, save_token, token_vectors)
from sdcourse.model import find_pretrained, fingerprint, read_manifest
from sdcourse.pipeline import StableDiffusionPipeline, token_rows
from sdcourse.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from sdcourse.text_to_image import cut_things, find_things
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.unet import UNet2DConditionModel
from sdcourse.vae import AutoencoderKL

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')  # diffusers' own

VAE = dict(block_out_channels=(4, 4, 4, 8), down_block_types=('DownEncoderBlock2D',)*4, norm_num_groups=2,
           up_block_types=('UpDecoderBlock2D',)*4, scaling_factor=.5)
UNET = dict(sample_size=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), attention_head_dim=2,
            up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act='quick_gelu',
            vocab_size=653, max_position_embeddings=32, eos_token_id=652, bos_token_id=651, pad_token_id=652)
DDIM = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, clip_sample=False, set_alpha_to_one=False,
            steps_offset=1)
PROMPT, TOKEN = 'a green <spiral> above a red 4', '<spiral>'


def generator(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def pipe():
    "Our pipeline, tiny and random; nobody changes it, and `untouched` looks after that"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusionPipeline(AutoencoderKL(**VAE).eval(), CLIPTextModel(**TEXT).eval(),
                                       CLIPTokenizer.from_pretrained('scenes/clip'),
                                       UNet2DConditionModel(**UNET).eval(), DDIMScheduler(**DDIM))


def state(pipe):
    "All that a pipeline is, in a few words"
    flags = [p.requires_grad for model in (pipe.unet, pipe.text_encoder, pipe.vae) for p in model.parameters()]
    return [fingerprint(m) for m in (pipe.unet, pipe.text_encoder, pipe.vae)], dict(pipe.tokenizer.vocab), flags


@pytest.fixture(autouse=True)
def untouched(pipe):
    before = state(pipe)
    yield
    assert state(pipe) == before, 'the pipeline that was passed has changed'


@pytest.fixture(scope='module')
def folder(pipe, tmp_path_factory): return pipe.save_pretrained(tmp_path_factory.mktemp('pipeline'))


@pytest.fixture
def host(folder):
    "The same pipeline as diffusers loads it"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def draw(pipe, prompt=PROMPT, **words):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'not in the vocabulary')
        words = dict(num_inference_steps=3, guidance_scale=3., output_type='np') | words
        return pipe(prompt, generator=generator(1), **words).images


def near(a, b, most=1e-5):
    a, b = (torch.as_tensor(np.asarray(x, dtype=np.float32)) for x in (a, b))
    assert a.shape == b.shape and b.std() > 1e-3, 'nothing to compare'
    assert (apart := (a - b).abs().max().item()) <= most, apart


def far(a, b): assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-4, 'the same'


def some_vectors(k=1, seed=3): return torch.randn(k, 16, generator=generator(seed))


def shaken(unet, seed=5):
    "Updates that do something: B is zero at first"
    with torch.no_grad():
        for i, layer in enumerate(lora_layers(unet).values()):
            layer.lora_B.weight.copy_(.3*torch.randn(layer.lora_B.weight.shape, generator=generator(seed + i)))
    return unet


def with_unet(pipe, unet): return StableDiffusionPipeline(**{**vars(pipe), 'unet': unet})


# the drawings

@pytest.mark.parametrize('name', CONCEPTS)
def test_drawings(name):
    found = draw_concept(name, 8)
    assert found.shape == (8, 1, 28, 28) and found.dtype == torch.float32
    assert found.min() == -1 and found.amax((1, 2, 3)).min() > .9
    assert torch.equal(found, draw_concept(name, 8)) and torch.equal(found[:3], draw_concept(name, 3))
    assert not torch.equal(found, draw_concept(name, 8, seed=1))
    apart = torch.cdist(found.flatten(1), found.flatten(1)) + 99*torch.eye(8)
    assert apart.min() > 3, 'two drawings are alike'
    assert (found[..., [0, -1]] < 0).all() and (found[..., [0, -1], :] < 0).all(), 'cut off'
    lit = (found > 0).float()
    assert 25 < lit.sum((1, 2, 3)).min() and lit.sum((1, 2, 3)).max() < 300
    assert 13 < lit.any(2).sum(2).float().maximum(lit.any(3).sum(2).float()).mean() < 23  # of MNIST's frame of 20


def test_drawings_differ():
    means = torch.stack([draw_concept(name, 20).mean(0).flatten() for name in CONCEPTS])
    assert (torch.cdist(means, means) + 99*torch.eye(len(CONCEPTS))).min() > 3


@pytest.mark.parametrize('things, relation', [
    ([(7, 'red')], None), ([(7, 'red', 'bold'), (3, 'blue', 'thin')], 'above'), ([(1, 'pink')]*2, 'left of')])
def test_digits_are_composed_as_before(things, relation):
    for ours, its in zip(compose_concepts(things, relation, n=3, seed=5), compose(things, relation, seed=5, n=3)):
        torch.testing.assert_close(ours.image, its.image)
        assert ours.relation == its.relation
        assert [t[:3] for t in ours.things] == [t[:3] for t in its.things]
        assert np.allclose([t[3:] for t in ours.things], [t[3:] for t in its.things])


@pytest.mark.parametrize('name', CONCEPTS)
def test_scenes_of_concepts(name):
    alone, = compose_concepts([(name, 'orange')], seed=2)
    assert alone.caption == f'an orange {name}' and alone.things[0].digit == name
    colours = (alone.image + 1)/2
    x, y = (alone.image.amax(0) > 0).nonzero().float().mean(0).flip(0).tolist()
    assert abs(x - alone.things[0].x) < 6 and abs(y - alone.things[0].y) < 6
    lit = colours.amax(0) > .9
    assert lit.any() and (colours[:, lit].mean(1) - torch.tensor(INKS['orange'])/255).abs().max() < .1
    for relation in RELATIONS:
        scenes = compose_concepts([(name, 'green'), (4, 'red', 'bold')], relation, n=4, seed=7)
        assert {s.caption for s in scenes} == {f'a green {name} {relation} a bold red 4'}
        found = find_things(torch.stack([s.image for s in scenes]), scenes)
        for scene, seen in zip(scenes, found):
            for thing, its in zip(scene.things, seen.things): assert abs(thing.x - its.x) + abs(thing.y - its.y) < 8
        shapes, ink = cut_things(torch.stack([s.image for s in scenes]), scenes)
        assert shapes.shape == (8, 1, 28, 28) and (ink[::2].argmax(1) == 1).all() and (ink[1::2].argmax(1) == 0).all()


def refused(call, *words):
    with pytest.raises(ValueError) as found: call()
    assert all(word in str(found.value) for word in words), found.value


def test_wrong_scenes():
    refused(lambda: draw_concept('<cat>'), 'a concept is one of <spiral>', "'<cat>'")
    refused(lambda: draw_concept('<star>', 0), 'n must be', '0')
    refused(lambda: draw_concept('<star>', seed=-1), 'seed must be', '-1')
    refused(lambda: compose_concepts([('<cat>', 'red')]), 'digit must be one of', '<cat>')
    refused(lambda: compose_concepts([('<star>', 'grey')]), 'color must be one of', 'grey')
    refused(lambda: compose_concepts([('<star>', 'red')], 'above'), 'relation')
    refused(lambda: compose_concepts([('<star>', 'red')]*2), 'relation')
    refused(lambda: compose_concepts([]), 'one or two', '0')
    refused(lambda: compose_concepts(['<star>']), 'a thing is')
    refused(lambda: compose_concepts([('<star>', 'red')], split='valid'), 'split must be')
    refused(lambda: compose_concepts([('<star>', 'red')], n=0), 'n must be')


# pictures of one's own

def save(scenes, folder):
    "Pictures and their captions"
    folder.mkdir(exist_ok=True)
    for i, scene in enumerate(scenes):
        pixels = ((scene.image + 1)*127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder/f'{i}.png')
        (folder/f'{i}.txt').write_text(scene.caption)
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    scenes = [compose_concepts([(TOKEN, ink)], seed=i)[0] for i, ink in enumerate(('red', 'blue', 'white'))]
    return save(scenes, tmp_path_factory.mktemp('pictures'))


def test_examples(pictures):
    found, captions, skipped = read_examples(pictures, TOKEN, 64)
    assert found.shape == (3, 3, 64, 64) and captions == ['a red <spiral>', 'a blue <spiral>', 'a white <spiral>']
    assert not skipped and -1 <= found.min() < found.max() <= 1
    near(found[0], compose_concepts([(TOKEN, 'red')], seed=0)[0].image, 1/127)
    assert read_examples(pictures, TOKEN, 32)[0].shape == (3, 3, 32, 32)


def test_any_pictures(tmp_path):
    "Any size and mode, JPEG and PNG, upright; what is unreadable is named and skipped; captions where there are any"
    red = Image.new('RGB', (90, 40), 'red')
    red.paste('blue', (0, 0, 45, 40))                                     # blue on the left
    turned = Image.Exif()
    turned[0x0112] = 6                                                    # the camera lay on its side
    red.resize((300, 300)).save(tmp_path/'a.JPG', exif=turned)
    red.convert('P').save(tmp_path/'b.png')
    Image.new('RGBA', (5, 300), (0, 255, 0, 255)).save(tmp_path/'c.png')
    Image.new('CMYK', (64, 64)).save(tmp_path/'d.jpeg')
    Image.new('L', (64, 64), 255).save(tmp_path/'e.png')
    (tmp_path/'e.txt').write_text(' a white <spiral>\n')
    Image.new('I;16', (64, 64)).save(tmp_path/'f.png')
    whole = (tmp_path/'b.png').read_bytes()
    (tmp_path/'g.png').write_bytes(whole[:len(whole)//2])
    (tmp_path/'h.jpg').write_text('no picture')
    (tmp_path/'.hidden').write_text('nobody looks here')
    (tmp_path/'folder.png').mkdir()
    message = r'^3 of 8 files skipped: f.png \(a picture of 8 bits .*g.png \(.*h.jpg \('
    with pytest.warns(UserWarning, match=message) as found:
        images, captions, skipped = read_examples(tmp_path, TOKEN, 16)
    assert found[0].filename == __file__ and str(tmp_path) not in str(found[0].message)
    assert [*skipped] == ['f.png', 'g.png', 'h.jpg'] and images.shape == (5, 3, 16, 16)
    assert captions == ['a <spiral>', '<spiral>', 'a <spiral>', '<spiral>', 'a white <spiral>']
    assert images[0, 2, :6].mean() > .9 and images[0, 0, -6:].mean() > .9, 'blue is at the top of the turned one'
    assert images[1, 2, :, :4].mean() > .9 and images[2, 1].mean() > .9 and images[4].mean() > .9


def test_wrong_folders(tmp_path, pictures):
    refused(lambda: read_examples(tmp_path/'nowhere', TOKEN, 16), 'pictures come from a folder', 'nowhere')
    refused(lambda: read_examples(pictures/'0.png', TOKEN, 16), 'pictures come from a folder', '0.png')
    refused(lambda: read_examples(tmp_path, TOKEN, 16), 'must hold a picture', 'none')
    (tmp_path/'a.png').write_text('no')
    refused(lambda: read_examples(tmp_path, TOKEN, 16), 'must hold a picture', 'a.png (cannot identify')
    refused(lambda: read_examples(pictures, '<heart>', 16), '0.txt', 'must speak of <heart>', 'a red <spiral>')


# new words

@pytest.mark.parametrize('k', [1, 3])
def test_a_new_word(pipe, k):
    vectors = some_vectors(k)
    new = add_token(pipe, TOKEN, vectors)
    assert torch.equal(token_vectors(new, TOKEN), vectors)
    names = [TOKEN, '<spiral>_1', '<spiral>_2'][:k]
    assert new.tokenizer.tokenize(' '.join(names)) == names and len(new.tokenizer) == 653 + k
    assert new.text_encoder.config.vocab_size == 653 + k and new.unet is pipe.unet
    for ours, its in zip(new.text_encoder.encoder.parameters(), pipe.text_encoder.encoder.parameters()):
        assert ours.data_ptr() == its.data_ptr(), 'copied'
    for prompt in ('', 'a red 7', 'un 3 blu'): assert torch.equal(new.embed(prompt), pipe.embed(prompt))
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                    # the word is known now
        found = new(PROMPT, num_inference_steps=2, generator=generator(), output_type='np').images
    far(found, draw(pipe))
    assert token_rows(new.tokenizer, TOKEN)[0][0, 1:k + 2].tolist() == [*range(653, 653 + k), 652]
    if k == 1: assert torch.equal(add_token(pipe, TOKEN, vectors[0]).embed(PROMPT), new.embed(PROMPT))
    else: assert not torch.equal(new.embed(TOKEN), add_token(pipe, TOKEN, vectors[:1]).embed(TOKEN))


def test_two_words(pipe):
    two = add_token(add_token(pipe, TOKEN, some_vectors(2)), '<heart>', some_vectors(1, 4))
    assert torch.equal(token_vectors(two, TOKEN), some_vectors(2)) and len(two.tokenizer) == 656
    assert torch.equal(token_vectors(two, '<heart>'), some_vectors(1, 4))


def test_wrong_words(pipe):
    piece = next(second for _, second in pipe.tokenizer.merges if not second.endswith('</w>') and len(second) > 1)
    for token in ('red', '7', 'sette', '<|endoftext|>', 'a', piece):
        refused(lambda token=token: add_token(pipe, token, some_vectors()), 'does not exist yet', repr(token))
    new = add_token(pipe, TOKEN, some_vectors())
    refused(lambda: add_token(new, TOKEN, some_vectors()), 'does not exist yet', TOKEN)
    refused(lambda: add_token(new, '<SPIRAL>', some_vectors()), '<SPIRAL>')
    refused(lambda: add_token(add_token(pipe, '<x>_1', some_vectors()), '<x>', some_vectors(2)), '<x>_1')
    for vectors in (torch.zeros(15), torch.zeros(2, 15), torch.zeros(1, 1, 16), torch.zeros(0, 16)):
        refused(lambda vectors=vectors: add_token(pipe, TOKEN, vectors), 'vectors of 16 finite numbers')
    refused(lambda: add_token(pipe, TOKEN, torch.full((16,), torch.nan)), 'finite')
    refused(lambda: token_vectors(pipe, TOKEN), TOKEN, 'was not added')
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    other = StableDiffusionPipeline(**{**vars(pipe), 'text_encoder': theirs})
    refused(lambda: add_token(other, TOKEN, some_vectors()), "the course's CLIPTextModel")


@pytest.mark.parametrize('k', [1, 2, 4])
def test_word_for_diffusers(pipe, host, tmp_path, k):
    new = add_token(pipe, TOKEN, some_vectors(k))
    assert save_token(new, TOKEN, tmp_path) == tmp_path
    assert {name: tuple(w.shape) for name, w in load_file(tmp_path/EMBEDS).items()} == {TOKEN: (k, 16)}
    host.load_textual_inversion(str(tmp_path))
    near(draw(new), draw(host))
    near(draw(new, 'a red 7'), draw(host, 'a red 7'))


@pytest.mark.parametrize('shape', [(16,), (1, 16), (3, 16)])
def test_word_of_diffusers(pipe, host, tmp_path, shape):
    "As diffusers' example of textual inversion saves it, in half precision too"
    learned = some_vectors(3)[:shape[0] if len(shape) > 1 else 1].reshape(shape)
    save_file({'<cat-toy>': learned}, tmp_path/EMBEDS, metadata={'format': 'pt'})
    host.load_textual_inversion(str(tmp_path))
    for source in (tmp_path, str(tmp_path), tmp_path/EMBEDS):
        near(draw(load_token(pipe, source), 'a <cat-toy> above a 3'), draw(host, 'a <cat-toy> above a 3'))
    save_file({'<cat-toy>': learned.half()}, tmp_path/EMBEDS)
    near(token_vectors(load_token(pipe, tmp_path), '<cat-toy>'), learned.reshape(-1, 16), 5e-3)
    mine = token_vectors(load_token(pipe, tmp_path, '<my>'), '<my>')
    assert torch.equal(mine, learned.half().float().reshape(-1, 16))


def test_whole_pipeline_with_a_word(pipe, tmp_path):
    "Saved as a pipeline, the word stays: for us and for diffusers"
    new = add_token(pipe, TOKEN, some_vectors(2))
    new.save_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    for other in (StableDiffusionPipeline.from_pretrained(tmp_path), theirs): near(draw(other), draw(new))


def test_wrong_files(pipe, tmp_path):
    refused(lambda: load_token(pipe, tmp_path/'nowhere'), 'there is no', 'nowhere')
    (tmp_path/'learned_embeds.bin').write_bytes(b'x')
    refused(lambda: load_token(pipe, tmp_path), EMBEDS, 'learned_embeds.bin refused')
    save_file({'a': torch.zeros(16), 'b': torch.zeros(16)}, tmp_path/EMBEDS)
    refused(lambda: load_token(pipe, tmp_path), 'one token', 'a, b')
    save_file({TOKEN: torch.zeros(768)}, tmp_path/EMBEDS)
    refused(lambda: load_token(pipe, tmp_path), '16 finite numbers', '768')
    (tmp_path/EMBEDS).write_bytes((tmp_path/EMBEDS).read_bytes()[:-9])
    refused(lambda: load_token(pipe, tmp_path), 'damaged')


def test_rows_that_learn():
    old = nn.Embedding(7, 3)
    some = NewTokens(old, 4, 2)
    ids = torch.tensor([[0, 4, 5, 6], [5, 5, 3, 1]])
    assert torch.equal(some(ids), old(ids))
    some.vectors.data += 1
    expected = old(ids).clone()
    expected[(ids == 4) | (ids == 5)] += 1
    assert torch.equal(some(ids), expected)
    some(ids).sum().backward()
    assert some.vectors.grad.tolist() == [[1]*3, [3]*3]


# LoRA

def test_update_by_hand():
    linear = nn.Linear(5, 3)
    layer, x = LoRALinear(linear, 2, scale=.5), torch.randn(4, 5, generator=generator())
    assert torch.equal(layer(x), linear(x)) and not layer.lora_B.weight.any()
    layer.lora_B.weight.data = torch.randn(3, 2, generator=generator(1))
    expected = linear(x) + .5*x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    near(layer(x).detach(), expected.detach(), 5e-6)
    assert torch.linalg.matrix_rank(layer.update) == 2 and layer.update.shape == (3, 5)
    assert {*layer.state_dict()} == {'weight', 'bias', 'lora_A.weight', 'lora_B.weight'}
    layer.scale = 0
    assert torch.equal(layer(x), linear(x))


def test_merged_and_back(pipe):
    unet, words = shaken(add_lora(pipe.unet, 3)), some_vectors(5).expand(2, -1, -1)
    x = torch.randn(2, 4, 4, 4, generator=generator())
    with torch.no_grad():
        expected, names = unet(x, 500, words), [*unet.state_dict()]
        for layer in lora_layers(unet).values(): layer.merge()
        near(unet(x, 500, words), expected, 1e-5)
        assert [*unet.state_dict()] == names
        for layer in lora_layers(unet).values(): layer.unmerge()
        assert torch.equal(unet(x, 500, words), expected), 'to the last bit'
        for layer in lora_layers(unet).values(): layer.scale = 0
        assert torch.equal(unet(x, 500, words), pipe.unet(x, 500, words))
        for layer in lora_layers(unet).values(): layer.merge()            # with the scale as it is now
        assert torch.equal(unet(x, 500, words), pipe.unet(x, 500, words))


def test_where_updates_are(pipe):
    unet = add_lora(pipe.unet, 3)
    names = set(lora_layers(unet))
    expected = {f'{name}.{target}' for name, part in pipe.unet.named_modules() if hasattr(part, 'to_q')
                for target in TARGETS}
    assert names == expected and len(names) == 4*2*4                      # 1 + 1 + 2 blocks of two attentions
    learns = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert learns == {f'{name}.lora_{k}.weight' for name in names for k in 'AB'}
    shared = dict(pipe.unet.named_parameters())
    for name, p in unet.named_parameters():
        if name in shared: assert p.data_ptr() == shared[name].data_ptr() and not p.requires_grad
    assert torch.equal(*(shaken(add_lora(pipe.unet, 3)).state_dict()[f'{min(names)}.lora_A.weight'] for _ in range(2)))
    assert len(lora_layers(add_lora(pipe.unet, 1, ['net.2']))) == 4
    text = add_lora(pipe.text_encoder, 2, ['q_proj', 'v_proj'])
    assert len(lora_layers(text)) == 4


def test_two_updates(pipe):
    "The second comes on top of the first"
    first = shaken(add_lora(pipe.unet, 2))
    second = shaken(add_lora(first, 3), 50)
    for name, layer in lora_layers(second).items():
        expected = first.get_submodule(name).weight + first.get_submodule(name).update
        near(layer.weight, expected.detach(), 5e-6)
        assert layer.lora_A.out_features == 3
    far(draw(with_unet(pipe, second)), draw(with_unet(pipe, first)))


@pytest.mark.parametrize('rank', [0, -1, 1.5, '4', None, True])
def test_wrong_ranks(pipe, rank): refused(lambda: add_lora(pipe.unet, rank), 'rank must be', repr(rank))


def test_no_target(pipe): refused(lambda: add_lora(pipe.unet, 2, ['to_x']), 'no linear layer', 'to_x')


def by_peft(model, rank=4, targets=TARGETS, **config):
    "A copy of a model of theirs with updates of peft's making, which do something"
    config = peft.LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False, **config)
    torch.manual_seed(3)
    model.add_adapter(config)
    return model


def their_lora(host, folder, text=False, metadata=False, **config):
    "What diffusers' training scripts save"
    from diffusers.training_utils import _collate_lora_metadata
    by_peft(host.unet, **config)
    parts = {'unet': host.unet}
    if text:
        targets = ['q_proj', 'k_proj', 'v_proj', 'out_proj']
        parts['text_encoder'] = by_peft(host.text_encoder, 2, targets, lora_alpha=2)
    weights = {f'{part}_lora_layers': diffusers.utils.convert_state_dict_to_diffusers(
        peft.utils.get_peft_model_state_dict(model)) for part, model in parts.items()}
    said = _collate_lora_metadata(parts) if metadata else {}
    type(host).save_lora_weights(folder, **weights, **said)
    return host


@pytest.mark.parametrize('rank', [1, 4])
def test_lora_for_diffusers(pipe, host, tmp_path, rank):
    ours = with_unet(pipe, shaken(add_lora(pipe.unet, rank)))
    for i, layer in enumerate(lora_layers(ours.unet).values()): layer.scale = .5 + .1*i
    assert save_lora(ours, tmp_path) == tmp_path
    host.load_lora_weights(str(tmp_path))
    near(draw(ours), draw(host))
    far(draw(ours), draw(pipe))
    again = load_lora(pipe, tmp_path)
    near(draw(again), draw(ours), 5e-6)
    host.fuse_lora()
    for layer in lora_layers(ours.unet).values(): layer.merge()
    near(draw(ours), draw(host))


@pytest.mark.parametrize('name', ['plain', 'with text', 'alpha', 'patterns', 'rslora'])
def test_lora_of_diffusers(pipe, host, tmp_path, name):
    more = {'plain': dict(lora_alpha=4), 'with text': dict(lora_alpha=4, text=True),
            'alpha': dict(lora_alpha=7, metadata=True),
            'patterns': dict(lora_alpha=4, metadata=True, rank_pattern={'attn2.to_k': 2}, alpha_pattern={'to_v': 9}),
            'rslora': dict(lora_alpha=4, metadata=True, use_rslora=True)}[name]
    theirs = draw(their_lora(host, tmp_path, **more))
    found = load_lora(pipe, tmp_path)
    near(draw(found), theirs)
    far(draw(pipe), theirs)
    assert bool(lora_layers(found.text_encoder)) == (name == 'with text')
    near(draw(load_lora(pipe, tmp_path/LORA)), theirs)
    far(draw(load_lora(pipe, tmp_path, scale=.5)), theirs)
    near(draw(load_lora(pipe, tmp_path, scale=0)), draw(pipe), 5e-6)
    save_lora(found, tmp_path/'again')                                    # and on it goes
    near(draw(load_lora(pipe, tmp_path/'again')), theirs)


def test_lora_for_peft(pipe, host, tmp_path):
    ours = with_unet(pipe, shaken(add_lora(pipe.unet, 3)))
    for i, layer in enumerate(lora_layers(ours.unet).values()): layer.scale = .5 + .1*i
    save_lora(ours, tmp_path, 'peft')
    host.unet = peft.PeftModel.from_pretrained(host.unet, tmp_path)
    near(draw(ours), draw(host))
    near(draw(load_lora(pipe, tmp_path)), draw(ours), 5e-6)


def test_lora_of_different_ranks_for_peft(pipe, host, tmp_path):
    their_lora(host, tmp_path/'a', lora_alpha=4, rank_pattern={'attn2.to_k': 2}, metadata=True)
    ours = load_lora(pipe, tmp_path/'a')
    save_lora(ours, tmp_path/'b', 'peft')
    plain = diffusers.UNet2DConditionModel.from_config(host.unet.config).eval()
    plain.load_state_dict(pipe.unet.state_dict())
    host.unet = peft.PeftModel.from_pretrained(plain, tmp_path/'b')
    near(draw(ours), draw(host))


@pytest.mark.parametrize('config', [dict(lora_alpha=4), dict(lora_alpha=9, use_rslora=True),
                                    dict(lora_alpha=2, rank_pattern={'to_q': 1}, alpha_pattern={'attn2.to_q': 5})])
def test_lora_of_peft(pipe, host, tmp_path, config):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=[*TARGETS, 'ff.net.2'], init_lora_weights=False, **config)
    host.unet = peft.get_peft_model(host.unet, config)
    host.unet.save_pretrained(tmp_path)
    near(draw(load_lora(pipe, tmp_path)), draw(host))
    near(draw(load_lora(pipe, tmp_path/PEFT)), draw(host))


def test_wrong_lora(pipe, host, tmp_path):
    refused(lambda: save_lora(pipe, tmp_path/'a'), 'no LoRA layers')
    ours = with_unet(pipe, add_lora(pipe.unet, 2))
    refused(lambda: save_lora(ours, tmp_path/'a', 'kohya'), "layout must be 'diffusers' or 'peft'", "'kohya'")
    refused(lambda: load_lora(pipe, tmp_path/'nowhere'), 'there is no', 'nowhere')
    refused(lambda: load_lora(pipe, tmp_path), LORA)
    save_lora(ours, tmp_path)
    weights = load_file(tmp_path/LORA)
    first = min(weights)
    name = first.removesuffix('.lora_A.weight')

    def with_weights(change):
        save_file(change, tmp_path/'x.safetensors')
        return lambda: load_lora(pipe, tmp_path/'x.safetensors')
    refused(with_weights({k: w for k, w in weights.items() if k != first}), name, 'does not fit')
    refused(with_weights({first: torch.zeros(2, 5), f'{name}.lora_B.weight': torch.zeros(8, 2)}), '(2, 5)', name)
    refused(with_weights({first.replace('attn1', 'attn9'): weights[first]}), 'attn9', 'does not exist')
    refused(with_weights({k.replace(name, 'unet.conv_in'): w for k, w in weights.items()}), 'Conv2d')
    refused(with_weights({'lora_unet_mid_attn1_to_q.lora_down.weight': torch.zeros(2)}), 'lora_unet_mid', 'not exist')
    refused(with_weights({f'{name}.dora_scale': torch.zeros(2)}), 'no LoRA', 'dora_scale')
    config = peft.LoraConfig(r=4, target_modules=['to_q'], use_dora=True)
    peft.get_peft_model(host.unet, config).save_pretrained(tmp_path/'dora')
    refused(lambda: load_lora(pipe, tmp_path/'dora'), 'no LoRA', 'magnitude')


# trainings

QUICK = dict(steps=2, bs=2, lr=.01, prior=['a red 7', ''], progress=False)


def train(pipe, pictures, output, method='inversion', **more):
    return finetune(pipe, pictures, TOKEN, output, method, **QUICK | more)


@pytest.fixture(scope='module', params=METHODS)
def trained(request, pipe, pictures, tmp_path_factory):
    "Each method in turn: its name, folder and manifest"
    place = tmp_path_factory.mktemp(request.param)
    return request.param, place, train(pipe, pictures, place, request.param)


FILES = {'inversion': [EMBEDS, 'manifest.json'], 'lora': [EMBEDS, 'manifest.json', LORA],
         'dreambooth': [EMBEDS, 'manifest.json', 'unet/config.json', 'unet/diffusion_pytorch_model.safetensors',
                        'unet/manifest.json']}


def test_what_a_training_leaves(trained):
    method, place, manifest = trained
    found = sorted(p.relative_to(place).as_posix() for p in place.rglob('*') if p.is_file())
    assert found == sorted(FILES[method])
    assert manifest == read_manifest(place) and {*manifest['files']} == {name for name in FILES[method]
                                                                        if name in (EMBEDS, LORA)}
    assert manifest['method'] == method and manifest['token'] == TOKEN and manifest['pictures'] == 3
    assert manifest['steps'] == 2 and manifest['batch'] == 2 and manifest['lr'] == .01
    assert len(manifest['losses']) == 2 and manifest['seconds'] > 0 and manifest['skipped'] == {}
    assert all(0 < row['train'] < 100 for row in manifest['losses'])


def test_what_learns(trained, pipe):
    method, place, _ = trained
    new = load_finetuned(pipe, place)
    start = pipe.text_encoder.embeddings.token_embedding.weight.mean(0)
    assert (token_vectors(new, TOKEN) - start).abs().min() > 0
    old = new.text_encoder.state_dict()
    for name, w in pipe.text_encoder.state_dict().items(): assert torch.equal(w, old[name][:len(w)]), name
    assert new.vae is pipe.vae and new.scheduler is pipe.scheduler
    weights = new.unet.state_dict()
    moved = {name for name, w in pipe.unet.state_dict().items() if not torch.equal(w, weights[name])}
    if method == 'inversion': assert new.unet is pipe.unet
    if method == 'lora': assert not moved and all(layer.update.any() for layer in lora_layers(new.unet).values())
    if method == 'dreambooth': assert {*weights} == {*pipe.unet.state_dict()} and len(moved) > .9*len(weights)
    same = np.array_equal(draw(new, 'a red 7'), draw(pipe, 'a red 7'))
    assert same == (method == 'inversion'), 'an old prompt'
    far(draw(new), draw(add_token(pipe, TOKEN, start)))


def test_diffusers_reads_it(trained, pipe, host):
    method, place, _ = trained
    host.load_textual_inversion(str(place))
    if method == 'lora': host.load_lora_weights(str(place))
    if method == 'dreambooth': host.unet = diffusers.UNet2DConditionModel.from_pretrained(place, subfolder='unet')
    near(draw(load_finetuned(pipe, place)), draw(host))


def all_files(place): return {p.relative_to(place): p.read_bytes() for p in place.rglob('*.safetensors')}


def test_the_same_again(trained, pipe, pictures, tmp_path):
    method, place, _ = trained
    torch.manual_seed(77)                                                 # whatever else was drawn before
    train(pipe, pictures, tmp_path/'a', method)
    assert all_files(tmp_path/'a') == all_files(place)
    train(pipe, pictures, tmp_path/'b', method, seed=1, resumable=False)
    assert all_files(tmp_path/'b').keys() == all_files(place).keys() and all_files(tmp_path/'b') != all_files(place)


class Stop(Exception):
    "Somebody pulls the plug"


def stopped(pipe, pictures, place, method, monkeypatch):
    "A training that ends after its first epoch"
    real = training.fit
    from fastai.callback.core import Callback

    def stop(self):
        if self.training and self.epoch == 1: raise Stop('no power')
    def fails(*args, cbs, **more): return real(*args, cbs=[*cbs, Callback(before_batch=stop)], **more)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training, 'fit', fails)
        train(pipe, pictures, place, method)


def test_goes_on(trained, pipe, pictures, tmp_path, monkeypatch):
    method, place, manifest = trained
    stopped(pipe, pictures, tmp_path, method, monkeypatch)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']
    size = (tmp_path/'checkpoint.pt').stat().st_size
    if method == 'inversion': assert size < 20_000, 'what is frozen is not kept'
    refused(lambda: load_finetuned(pipe, tmp_path), 'must hold one of', 'checkpoint.pt')
    kept = (tmp_path/'checkpoint.pt').read_bytes()
    for other in (dict(seed=1), dict(bs=3), dict(steps=4), dict(lr=.5), dict(prior=['a 7']), dict(vectors=2)):
        with pytest.raises(ValueError, match='another training'): train(pipe, pictures, tmp_path, method, **other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        other = with_unet(pipe, UNet2DConditionModel(**UNET).eval())
    with pytest.raises(ValueError, match='another training'): train(other, pictures, tmp_path, method)
    assert (tmp_path/'checkpoint.pt').read_bytes() == kept
    torch.manual_seed(78)
    again = train(pipe, pictures, tmp_path, method)
    assert all_files(tmp_path) == all_files(place) and not (tmp_path/'checkpoint.pt').exists()
    assert [row['train'] for row in again['losses']] == [row['train'] for row in manifest['losses']]


def test_killed_while_saving(pipe, pictures, tmp_path, monkeypatch):
    "The checkpoint stays until all is written"
    def full(*args, **words): raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(finetuning, 'save_token', full)
        train(pipe, pictures, tmp_path, 'lora')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.pt', LORA]
    train(pipe, pictures, tmp_path, 'lora')
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES['lora'])


def test_a_result_is_not_written_over(trained, pipe, pictures):
    method, place, _ = trained
    before = all_files(place)
    refused(lambda: train(pipe, pictures, place, 'lora'), f'{place} holds {EMBEDS}', 'another folder')
    assert all_files(place) == before


def test_damage_is_seen(trained, pipe, tmp_path):
    method, place, _ = trained
    for name in (n for n in FILES[method] if n.endswith('.safetensors')):
        content = (place/name).read_bytes()
        (place/name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(lambda: load_finetuned(pipe, place), 'sha256')
        (place/name).write_bytes(content)
    load_finetuned(pipe, place)


def test_twice(trained, pipe):
    "A second time the word is known; another word comes on top"
    _, place, _ = trained
    refused(lambda: load_finetuned(load_finetuned(pipe, place), place), 'does not exist yet', TOKEN)
    both = load_finetuned(add_token(pipe, '<heart>', some_vectors()), place)
    assert both.tokenizer.tokenize('<heart><spiral>') == ['<heart>', TOKEN]


def test_trained_on(trained, pipe, pictures, tmp_path):
    "What was fine-tuned learns another thing, and keeps the first"
    method, place, _ = trained
    first = load_finetuned(pipe, place)
    heart = save([compose_concepts([('<heart>', 'red')])[0]], tmp_path/'pictures')
    if method == 'lora':
        refused(lambda: finetune(first, heart, '<heart>', tmp_path/'x', 'dreambooth', **QUICK), 'without LoRA')
    finetune(first, heart, '<heart>', tmp_path/'out', 'lora', **QUICK)
    second = load_finetuned(first, tmp_path/'out')
    assert torch.equal(token_vectors(second, TOKEN), token_vectors(first, TOKEN))
    far(draw(second), draw(first))


def test_options(pipe, pictures, tmp_path):
    manifest = train(pipe, pictures, tmp_path/'a', 'lora', vectors=3, rank=2, initial='sette', size=64, prior=())
    new = load_finetuned(pipe, tmp_path/'a')
    assert token_vectors(new, TOKEN).shape == (3, 16) and manifest['prior'] == [] and manifest['rank'] == 2
    assert {layer.lora_A.out_features for layer in lora_layers(new.unet).values()} == {2}
    word = pipe.text_encoder.embeddings.token_embedding.weight[pipe.tokenizer.vocab['sette</w>']]
    assert (token_vectors(new, TOKEN) - word).abs().max() < .05
    half = load_finetuned(pipe, tmp_path/'a', scale=.5)
    assert {layer.scale for layer in lora_layers(half.unet).values()} == {.5}
    counted = train(pipe, pictures, tmp_path/'b', steps=23)
    assert counted['losses'][-1]['epoch'] == 9 and counted['steps'] == 20, 'as many as were taken'
    assert len(finetuning._prior_prompts()) == 600 and finetuning._prior_prompts()[::3] == ['']*200


def test_it_learns_what_the_pictures_show(pipe, pictures, tmp_path):
    "The loss falls"
    rows = train(pipe, pictures, tmp_path, 'dreambooth', steps=60, bs=3, prior=())['losses']
    assert rows[-1]['valid'] < .95*rows[0]['valid']


def test_what_is_to_stay(pipe, pictures, tmp_path):
    "With the old model's answers beside the examples, old prompts change less"
    xt, words = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), pipe.embed(['a red 7', ''])
    def answer(pipe):
        with torch.no_grad(): return pipe.unet(xt, 500, words)
    moved = {}
    for prior in ((), ('a red 7', '')):
        train(pipe, pictures, tmp_path/str(len(prior)), 'dreambooth', steps=120, lr=1e-3, prior=prior)
        new = load_finetuned(pipe, tmp_path/str(len(prior)))
        moved[prior] = (answer(new) - answer(pipe)).norm()
    assert 0 < moved['a red 7', ''] < .8*moved[()], moved


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_schedulers(pipe, pictures, tmp_path, kind):
    "Whatever the model answers, and whichever scheduler draws with it"
    scheduler = DPMSolverMultistepScheduler(prediction_type=kind, beta_schedule='scaled_linear')
    other = StableDiffusionPipeline(**{**vars(pipe), 'scheduler': scheduler})
    losses = train(other, pictures, tmp_path, prior=())['losses']
    assert 0 < losses[-1]['valid'] < 10


@pytest.mark.parametrize('method', METHODS)
def test_bfloat16(folder, pictures, tmp_path, method):
    short = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    train(short, pictures, tmp_path, method, lr=.05)
    new = load_finetuned(short, tmp_path)
    assert new.unet.dtype == new.text_encoder.dtype == torch.bfloat16
    far(draw(new), draw(short))
    whole = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    refused(lambda: train(whole, pictures, tmp_path/'x', method), 'float32 or bfloat16', 'torch.float16')


def test_on_a_device(folder, pictures, tmp_path, device):
    pipe = StableDiffusionPipeline.from_pretrained(folder, device=device)
    for method in METHODS:
        train(pipe, pictures, tmp_path/method, method)
        new = load_finetuned(pipe, tmp_path/method)
        assert {m.device.type for m in (new.unet, new.text_encoder, new.vae)} == {device}
        draw(new)


WRONG = {
    'method': (dict(method='magic'), ('method must be inversion, lora, dreambooth', "'magic'")),
    'no brackets': (dict(token='spiral'), ('one word in angle brackets', "'spiral'")),
    'two words': (dict(token='<my spiral>'), ('one word in angle brackets', "'<my spiral>'")),
    'no word': (dict(token='<>'), ('one word in angle brackets',)),
    'no text': (dict(token=7), ('one word in angle brackets', '7')),
    'special': (dict(token='<|endoftext|>'), ('one word in angle brackets',)),
    'rank': (dict(rank=0), ('rank must be', '0')),
    'vectors': (dict(vectors=0), ('vectors must be', '0')),
    'steps': (dict(steps=0), ('steps must be', '0')),
    'batch': (dict(bs=0), ('batch must be', '0')),
    'seed': (dict(seed=-1), ('seed must be', '-1')),
    'size': (dict(size=-8), ('size must be', '-8')),
    'odd size': (dict(size=36), ('multiples of 8', '36')),
    'lr': (dict(lr=0), ('lr must be above 0', '0')),
    'initial': (dict(initial='spiral'), ('initial must be a word that is one token', "'spiral'")),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_requests(pipe, pictures, tmp_path, name):
    changes, words = WRONG[name]
    changes = dict(pictures=pictures, output=tmp_path/'out', token=TOKEN, **QUICK) | changes
    refused(lambda: finetune(pipe, **changes), *words)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_wrong_places(pipe, pictures, tmp_path):
    refused(lambda: train(pipe, tmp_path/'nowhere', tmp_path/'out'), 'pictures come from a folder')
    refused(lambda: train(pipe, pictures, pictures), 'output must be another folder')
    (tmp_path/'file').write_text('x')
    refused(lambda: train(pipe, pictures, tmp_path/'file'), 'it is a file')
    refused(lambda: finetune(add_token(pipe, TOKEN, some_vectors()), pictures, TOKEN, tmp_path/'out', **QUICK),
            'does not exist yet')
    long = save([compose_concepts([(TOKEN, 'red')])[0]], tmp_path/'long')
    (long/'0.txt').write_text('a red <spiral> ' + '7 '*30)
    refused(lambda: train(pipe, long, tmp_path/'out'), '30 tokens')
    refused(lambda: load_finetuned(pipe, tmp_path/'out'), 'must hold one of', 'nothing')
    refused(lambda: load_finetuned(pipe, tmp_path/'nowhere'), 'must hold one of')


def test_of_another_model(trained, pipe):
    _, place, _ = trained
    with torch.random.fork_rng(devices=[]):
        wide = dict(cross_attention_dim=24)
        other = StableDiffusionPipeline(**{**vars(pipe), 'unet': UNet2DConditionModel(**UNET | wide),
                                           'text_encoder': CLIPTextModel(**TEXT | dict(hidden_size=24))})
    refused(lambda: load_finetuned(other, place))


def test_names_of_the_files():
    "Those that diffusers and peft look for"
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
    from diffusers.loaders.textual_inversion import TEXT_INVERSION_NAME_SAFE
    theirs = TEXT_INVERSION_NAME_SAFE, LORA_WEIGHT_NAME_SAFE, peft.utils.SAFETENSORS_WEIGHTS_NAME
    assert (EMBEDS, LORA, PEFT) == theirs
    assert LORA_ADAPTER_METADATA_KEY == 'lora_adapter_metadata'


# the whole size

@pytest.mark.slow
def test_stable_diffusion_in_full(tmp_path, pictures):
    """The published sizes of Stable Diffusion 1.5 with random weights in bfloat16: one step of each method.

    The U-Net has 860 million weights; dreambooth needs five times their 1.7 GB.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
                down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4,
                scaling_factor=.18215)
            text = CLIPTextModel(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                 vocab_size=49408, eos_token_id=2)
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        finally: torch.set_default_dtype(torch.float32)
    folder = find_pretrained('scenes/clip')                               # its tokens are some of 49,408
    whole = StableDiffusionPipeline(vae, text, CLIPTokenizer.from_pretrained(folder), unet, DDIMScheduler(**DDIM))
    whole.save_pretrained(tmp_path/'sd')
    del whole, vae, text, unet
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path/'sd', dtype=torch.bfloat16)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    before = state(pipe)
    for method in METHODS:
        finetune(pipe, pictures, TOKEN, tmp_path/method, method, steps=1, lr=.05, bs=1, size=128, prior=['a red 7']
                 if method != 'inversion' else (), resumable=False, progress=False)
        assert state(pipe) == before
        new = load_finetuned(pipe, tmp_path/method)
        assert (token_vectors(new, TOKEN) - text_mean(pipe)).abs().max() > 0
        old, weights = pipe.unet.state_dict(), new.unet.state_dict()
        moved = sum(not torch.equal(w, weights[name]) for name, w in old.items())
        assert (moved > .9*len(old)) == (method == 'dreambooth') and (moved == 0) == (method != 'dreambooth')
        if method == 'lora':
            layers = lora_layers(new.unet)
            assert len(layers) == 128 and all(layer.update.any() for layer in layers.values())
        assert pipe.tokenizer.vocab.keys() ^ new.tokenizer.vocab.keys() == {TOKEN}
        for name, w in pipe.text_encoder.state_dict().items():
            differ = (w != new.text_encoder.state_dict()[name]).flatten(1).any(1) if w.ndim > 1 else \
                w != new.text_encoder.state_dict()[name]
            rows = [new.tokenizer.vocab[TOKEN]] if 'token_embedding' in name else []   # one that nobody used
            assert differ.nonzero().flatten().tolist() == rows, name


def text_mean(pipe): return pipe.text_encoder.embeddings.token_embedding.weight.mean(0)


def test_manifest_is_json(trained): json.dumps(trained[2], allow_nan=False)
