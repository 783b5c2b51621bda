"""unet.py: parity with diffusers both ways and on each device, what a U-Net must hold, and every error one can provoke.

The full-size forward pass needs 5 GB and a minute, and is left out. It runs with: pytest -m slow tests/test_unet.py
"""
import json

import pytest
import torch
from diffusers import UNet2DConditionModel as Reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sdcourse.unet import (FIXED, Attention, DownBlock, GEGLU, ResnetBlock2D, Transformer2DModel, UNet2DConditionModel,
                           Upsample2D, timestep_embedding)

PLAIN = dict(in_channels=1, out_channels=1, block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8,
             down_block_types=('DownBlock2D',)*3, mid_block_type='UNetMidBlock2D', up_block_types=('UpBlock2D',)*3)
LEVELS = dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, cross_attention_dim=24)
CONFIGS = {
    'unconditional': PLAIN,
    'classes': {**PLAIN, 'layers_per_block': 2, 'num_class_embeds': 11},
    'cross': {**LEVELS, 'attention_head_dim': 4},
    'linear': {**LEVELS, 'attention_head_dim': (2, 4, 4, 8), 'use_linear_projection': True, 'upcast_attention': True},
}
# the published unet/config.json of Stable Diffusion 1.5 and 2.1, without the arguments that are null there
PUBLISHED = dict(
    _class_name='UNet2DConditionModel', _diffusers_version='0.10.0.dev0', act_fn='silu', center_input_sample=False,
    block_out_channels=[320, 640, 1280, 1280], down_block_types=['CrossAttnDownBlock2D']*3 + ['DownBlock2D'],
    downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2,
    mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32, out_channels=4,
    up_block_types=['UpBlock2D'] + ['CrossAttnUpBlock2D']*3)
SD15 = dict(PUBLISHED, sample_size=64, cross_attention_dim=768, attention_head_dim=8, class_embed_type=None,
            conv_in_kernel=3, mid_block_type='UNetMidBlock2DCrossAttn', upcast_attention=None,
            resnet_time_scale_shift='default', time_embedding_type='positional', use_linear_projection=False)
SD21 = dict(PUBLISHED, sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
            dual_cross_attention=False, num_class_embeds=None, only_cross_attention=False, upcast_attention=True,
            use_linear_projection=True)
every = pytest.mark.parametrize('name', CONFIGS)


def shapes(model): return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def build(kind, config, seed=0):
    "A model with random weights that depend on the seed alone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**config).eval()


def inputs(config, size=(16, 16), device='cpu', seed=1):
    "Positional and named inputs of both models: two pictures, two timesteps, and what this config wants besides"
    g = torch.Generator().manual_seed(seed)
    width, classes = config.get('cross_attention_dim'), config.get('num_class_embeds')
    x = torch.randn(2, config.get('in_channels', 4), *size, generator=g)
    context = torch.randn(2, 7, width, generator=g).to(device) if width else None
    labels = {'class_labels': torch.tensor([0, classes - 1], device=device)} if classes else {}
    return (x.to(device), torch.tensor([3, 700], device=device), context), labels


@torch.no_grad()
def apart(ours, theirs, config, size=(16, 16), device='cpu'):
    "The largest difference of the two answers"
    args, named = inputs(config, size, device)
    found, expected = ours(*args, **named), theirs(*args, **named).sample
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return (found - expected).abs().max().item()


# parity with diffusers

@every
def test_names_and_shapes(name):
    ours, theirs = build(UNet2DConditionModel, CONFIGS[name]), build(Reference, CONFIGS[name])
    assert shapes(ours) == shapes(theirs)
    assert list(ours.state_dict())[:2] == ['conv_in.weight', 'conv_in.bias']


@every
@pytest.mark.parametrize('size', [(16, 16), (28, 28), (13, 21), (9, 8)])
def test_answers(name, size, device):
    theirs = build(Reference, CONFIGS[name])
    ours = UNet2DConditionModel(**CONFIGS[name]).eval()
    ours.load_state_dict(theirs.state_dict())
    assert apart(ours.to(device), theirs.to(device), CONFIGS[name], size, device) <= 1e-5


@every
def test_what_diffusers_saves_we_load(name, tmp_path, device):
    theirs = build(Reference, CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = UNet2DConditionModel.from_pretrained(tmp_path, device=device)
    assert not ours.training and ours.device.type == device
    assert apart(ours, theirs.to(device), CONFIGS[name], device=device) <= 1e-5


@every
def test_what_we_save_diffusers_loads(name, tmp_path, device):
    ours = build(UNet2DConditionModel, CONFIGS[name])
    ours.save_pretrained(tmp_path)
    theirs, report = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for key, value in CONFIGS[name].items():
        kept = theirs.config[key]
        assert (tuple(kept) if isinstance(kept, list) else kept) == value
    assert apart(ours.to(device), theirs.to(device), CONFIGS[name], device=device) <= 1e-5
    theirs.save_pretrained(tmp_path/'again')
    assert shapes(UNet2DConditionModel.from_pretrained(tmp_path/'again')) == shapes(ours)


@pytest.mark.parametrize('config, count', [(SD15, 859_520_964), (SD21, 865_910_724)], ids=['1.5', '2.1'])
def test_stable_diffusion_has_the_same_weights(config, count):
    with torch.device('meta'): ours, theirs = UNet2DConditionModel.from_config(config), Reference.from_config(config)
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == 686
    assert sum(p.numel() for p in ours.parameters()) == count


@pytest.mark.slow
def test_stable_diffusion_in_full_size():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = Reference.from_config(SD15).eval()
    with torch.device('meta'): ours = UNet2DConditionModel.from_config(SD15).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # the same memory
    x, context = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    with torch.no_grad(): found, expected = ours(x, 500, context), theirs(x, 500, context).sample
    assert (found - expected).norm() <= 1e-4*expected.norm()


@st.composite
def configs(draw):
    "Small configurations of every kind"
    n = draw(st.integers(1, 3))
    channels = draw(st.lists(st.sampled_from([8, 12, 16]), min_size=n, max_size=n))
    crossing = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    kinds = ['CrossAttn'*c for c in crossing]
    return dict(
        in_channels=draw(st.integers(1, 4)), out_channels=draw(st.integers(1, 4)), block_out_channels=tuple(channels),
        layers_per_block=draw(st.integers(1, 2)), norm_num_groups=4, norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        down_block_types=tuple(f'{k}DownBlock2D' for k in kinds), freq_shift=draw(st.integers(0, 1)),
        up_block_types=tuple(f'{k}UpBlock2D' for k in kinds[::-1]), flip_sin_to_cos=draw(st.booleans()),
        mid_block_type=draw(st.sampled_from(['UNetMidBlock2DCrossAttn', 'UNetMidBlock2D', None])),
        attention_head_dim=draw(st.one_of(st.sampled_from([1, 2, 4]), st.just((2, 4, 1)[:n]))),
        cross_attention_dim=draw(st.sampled_from([6, 24])), transformer_layers_per_block=draw(st.integers(1, 2)),
        use_linear_projection=draw(st.booleans()), num_class_embeds=draw(st.sampled_from([None, 3])))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.integers(4, 11), st.integers(4, 11))
def test_any_configuration(config, height, width):
    theirs, ours = build(Reference, config), build(UNet2DConditionModel, config, seed=1)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert apart(ours, theirs, config, (height, width)) <= 1e-5


@pytest.mark.parametrize('dim, flip, shift', [(16, True, 0), (320, True, 0), (16, False, 0), (16, False, 1)])
def test_waves(dim, flip, shift, device):
    config = {**PLAIN, 'block_out_channels': (dim,)*3, 'flip_sin_to_cos': flip, 'freq_shift': shift}
    with torch.device('meta'): theirs = Reference(**config).time_proj  # it has no weights
    t = torch.tensor([0, 1, 500, 999], device=device)
    torch.testing.assert_close(timestep_embedding(t, dim, flip, shift), theirs(t), atol=1e-6, rtol=0)
    assert timestep_embedding(t.double(), dim).dtype == torch.float32


# what a U-Net must hold

@every
def test_one_timestep_is_the_same_for_all(name, device):
    model, (args, named) = build(UNet2DConditionModel, CONFIGS[name]).to(device), inputs(CONFIGS[name], device=device)
    x, _, context = args
    with torch.no_grad():
        found = [model(x, t, context, **named) for t in (7, 7., torch.tensor(7), torch.tensor([7, 7], device=device))]
        other = model(x, 8, context, **named)
    for a in found[1:]: torch.testing.assert_close(a, found[0], atol=1e-5, rtol=0)
    assert not torch.allclose(other, found[0], atol=1e-5)


@every
def test_pictures_of_a_batch_do_not_meet(name):
    model, (args, named) = build(UNet2DConditionModel, CONFIGS[name]), inputs(CONFIGS[name])
    with torch.no_grad():
        both = model(*args, **named)
        alone = [model(*(a if a is None else a[i:i+1] for a in args), **{k: v[i:i+1] for k, v in named.items()})
                 for i in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), both, atol=1e-5, rtol=0)


@every
def test_gradients_reach_every_weight(name, device):
    model, (args, named) = build(UNet2DConditionModel, CONFIGS[name]).to(device), inputs(CONFIGS[name], device=device)
    model(*args, **named).square().mean().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key


@every
def test_bfloat16_autocast(name, device):
    model, (args, named) = build(UNet2DConditionModel, CONFIGS[name]).to(device), inputs(CONFIGS[name], device=device)
    with torch.no_grad():
        exact = model(*args, **named)
        with torch.autocast(device, torch.bfloat16): found = model(*args, **named)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert (found.float() - exact).norm() < .05*exact.norm()


@every
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_in_another_type(name, dtype, device):
    if device == 'mps' and dtype == torch.float64: pytest.skip('mps has no float64')
    model, (args, named) = build(UNet2DConditionModel, CONFIGS[name]).to(device), inputs(CONFIGS[name], device=device)
    x, t, context = args
    with torch.no_grad():
        exact = model(*args, **named)
        found = model.to(dtype=dtype)(x.to(dtype), t, context if context is None else context.to(dtype), **named)
    assert found.dtype == dtype and (found.float() - exact).norm() < .1*exact.norm()


def test_nothing_is_changed(device):
    config = CONFIGS['cross']
    model, (args, named) = build(UNet2DConditionModel, config).to(device), inputs(config, device=device)
    copies = [a.clone() for a in args]
    with torch.no_grad(): model(*args, **named)
    assert all(torch.equal(a, b) for a, b in zip(args, copies))


def test_prompt_and_class_matter():
    for name in ('cross', 'classes'):
        model, ((x, t, context), named) = build(UNet2DConditionModel, CONFIGS[name]), inputs(CONFIGS[name])
        other = context if context is None else context + 1
        with torch.no_grad():
            a = model(x, t, context, **named)
            b = model(x, t, other, **{k: v.flip(0) for k, v in named.items()})
        assert not torch.allclose(a, b, atol=1e-4)


def test_the_smallest_pictures():
    model = build(UNet2DConditionModel, CONFIGS['unconditional'])
    for size in ((1, 1), (2, 1), (3, 5)):
        with torch.no_grad(): assert model(torch.zeros(1, 1, *size), 5).shape == (1, 1, *size)
    with torch.no_grad(): assert model(torch.zeros(0, 1, 8, 8), 5).shape == (0, 1, 8, 8)


# parts

def test_attention_does_not_know_places():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention, x, order = Attention(16, heads=4), torch.randn(1, 9, 16), torch.randperm(9)
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]))


def test_a_resnet_without_time_serves_the_vae():
    block = ResnetBlock2D(8, 16, None, groups=4)
    assert block(torch.zeros(1, 8, 5, 5)).shape == (1, 16, 5, 5)
    assert not any('time' in key for key in block.state_dict())


def test_parts_in_numbers():
    gate = GEGLU(1, 1)
    gate.load_state_dict({'proj.weight': torch.tensor([[2.], [1.]]), 'proj.bias': torch.zeros(2)})
    torch.testing.assert_close(gate(torch.ones(1, 1)), 2*nn.functional.gelu(torch.ones(1, 1)))  # value first, then gate
    up = Upsample2D(4)
    assert up(torch.zeros(1, 4, 3, 5)).shape == (1, 4, 6, 10)
    assert up(torch.zeros(1, 4, 3, 5), (5, 9)).shape == (1, 4, 5, 9)
    for linear in (False, True):
        assert Transformer2DModel(8, 2, 6, groups=4, use_linear_projection=linear).proj_in.weight.ndim == 4 - 2*linear


def test_skips_of_a_level():
    block = DownBlock(lambda a, b: ResnetBlock2D(a, b, 8, groups=4), None, 4, 8, 2, None, True)
    x, skips = block(torch.zeros(1, 4, 6, 6), torch.zeros(1, 8))
    assert [tuple(s.shape[1:]) for s in skips] == [(8, 6, 6), (8, 6, 6), (8, 3, 3)] and x is skips[-1]


# bad input

WRONG = {
    'unknown down block': (dict(down_block_types=('DownBlock3D',)*3), 'unknown down block .*CrossAttnDownBlock2D'),
    'an up block going down': (dict(down_block_types=('UpBlock2D',)*3), 'unknown down block'),
    'unknown up block': (dict(up_block_types=('UpBlock2D', 'UpBlock2D', 'up')), "unknown up block 'up'; allowed"),
    'unknown mid block': (dict(mid_block_type='MidBlock'), "unknown mid block 'MidBlock'; allowed"),
    'too few down blocks': (dict(down_block_types=('DownBlock2D',)*2), 'each level needs .* 2 down_block_types'),
    'too many up blocks': (dict(up_block_types=('UpBlock2D',)*4), 'each level needs .* 4 up_block_types'),
    'too few channels': (dict(block_out_channels=(16, 32)), 'each level needs .* 2 block_out_channels'),
    'no level': (dict(block_out_channels=(), down_block_types=(), up_block_types=()), 'each level needs'),
    'channels and groups': (dict(block_out_channels=(16, 20, 48)), 'multiples of norm_num_groups, 8; got 20'),
    'too few heads': (dict(attention_head_dim=(4, 4)), r'attention_head_dim must be one .*3 levels, got \[4, 4\]'),
    'no heads': (dict(attention_head_dim=0, mid_block_type='UNetMidBlock2DCrossAttn'), 'must divide 48, got 0'),
    'no heads below': (dict(attention_head_dim=(0, 4, 4), down_block_types=('CrossAttnDownBlock2D',)*3),
                       'must divide 16, got 0'),
    'heads and channels': (dict(attention_head_dim=7, mid_block_type='UNetMidBlock2DCrossAttn'),
                           'number of heads, must divide 48, got 7'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_configurations(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message): UNet2DConditionModel(**{**PLAIN, **change})
    with pytest.raises(ValueError, match=message): UNet2DConditionModel.from_config({**PLAIN, **change})


def test_labels_and_classes_belong_together():
    (x, t, _), named = inputs(CONFIGS['classes'])
    with pytest.raises(ValueError, match='this model has no classes'):
        build(UNet2DConditionModel, PLAIN)(x, t, **named)
    with pytest.raises(ValueError, match='class_labels is None; this model needs one for each picture, 0 to 10'):
        build(UNet2DConditionModel, CONFIGS['classes'])(x, t)


@pytest.mark.parametrize('label', [-1, 11])
def test_labels_outside_the_range(label):
    (x, t, _), _ = inputs(CONFIGS['classes'])
    with pytest.raises(ValueError, match="class_labels must lie between 0 and"):
        build(UNet2DConditionModel, CONFIGS['classes'])(x, t, class_labels=torch.tensor([0, label]))


@pytest.mark.parametrize('key', FIXED)
def test_arguments_that_we_do_not_have(key):
    base = {**PLAIN, '_class_name': 'UNet2DConditionModel'}
    assert shapes(UNet2DConditionModel.from_config({**base, key: FIXED[key]})) == shapes(UNet2DConditionModel(**PLAIN))
    with pytest.raises(ValueError, match=f"{key}='odd' .allowed: "):
        UNet2DConditionModel.from_config({**base, key: 'odd'})


def test_a_whole_reference_config_is_read():
    theirs = build(Reference, CONFIGS['linear'])
    assert shapes(UNet2DConditionModel.from_config(theirs.config)) == shapes(theirs)
    assert set(theirs.config) - set(FIXED) - set(UNet2DConditionModel.from_config(theirs.config).config) <= {
        k for k in theirs.config if k.startswith('_')}, 'an argument of diffusers that we do not know yet'


@pytest.mark.parametrize('change, message', [
    (dict(odd_argument=1), 'unknown odd_argument'), (dict(_class_name='UNet2DModel'), 'config of a UNet2DModel'),
    (dict(layers_per_block=[1, 2, 3]), 'cannot be built'), (dict(transformer_layers_per_block=[1, 2, 10],
     down_block_types=('CrossAttnDownBlock2D',)*3, attention_head_dim=4), 'cannot be built')])
def test_configs_of_other_models(change, message):
    with pytest.raises(ValueError, match=message): UNet2DConditionModel.from_config({**PLAIN, **change})


@pytest.fixture
def saved(tmp_path):
    "A folder with a model"
    return build(UNet2DConditionModel, PLAIN).save_pretrained(tmp_path)


@pytest.mark.parametrize('keep', [0, 7, 1000, -1])
def test_truncated_weights(saved, keep):
    path = saved/UNet2DConditionModel.weights_name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match='damaged or truncated'): UNet2DConditionModel.from_pretrained(saved)


def test_damaged_weights(saved):
    path = saved/UNet2DConditionModel.weights_name
    path.write_bytes(b'\xff'*16 + path.read_bytes()[16:])
    with pytest.raises(ValueError, match='damaged or truncated'): UNet2DConditionModel.from_pretrained(saved)


@pytest.mark.parametrize('change, message', [
    (dict(block_out_channels=[16, 32, 64]), 'does not fit its config: .* of another shape'),
    (dict(num_class_embeds=11), '1 missing: class_embedding.weight'),
    (dict(layers_per_block=2), 'missing: down_blocks.0.resnets.1'),
    (dict(mid_block_type=None), 'unexpected: mid_block'), (dict(act_fn='gelu'), "act_fn='gelu' .allowed: 'silu'")])
def test_a_config_that_does_not_fit_the_weights(saved, change, message):
    path = saved/'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text(encoding='utf-8')), **change}), encoding='utf-8')
    with pytest.raises(ValueError, match=message): UNet2DConditionModel.from_pretrained(saved)
