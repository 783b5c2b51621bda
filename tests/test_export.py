"""export.py: graphs equal to PyTorch at every size, what they may not contain, files in one move, every error.

The pipeline and the denoiser here are tiny and random; a slow test does the shipped ones, as lesson 12b does.
"""
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, numpy_helper
from test_digits import make_tiny
from torch import nn
from torch.export import Dim

from sdcourse import cli, export
from sdcourse.clip import CLIPTextModel
from sdcourse.digits import ANY, SCHEDULER, denoise, load_digits, make_scheduler
from sdcourse.export import DTYPES, OPSET, export_onnx, load_onnx, quantize, shrink, trace
from sdcourse.model import PRETRAINED, sha256
from sdcourse.pipeline import StableDiffusionPipeline
from sdcourse.schedulers import EulerAncestralDiscreteScheduler
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.unet import UNet2DConditionModel
from sdcourse.vae import AutoencoderKL

VAE = dict(block_out_channels=(4, 8), down_block_types=('DownEncoderBlock2D',)*2, sample_size=16, scaling_factor=.5,
           up_block_types=('UpDecoderBlock2D',)*2, norm_num_groups=2)
UNET = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), attention_head_dim=2,
            up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), use_linear_projection=True)
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=653,
            max_position_embeddings=32, eos_token_id=2)
PROMPTS = ['a bold red seven above a blue 3', 'un 4 verde']


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0): return torch.randn(shape, generator=seeded(seed))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A pipeline that has learned nothing"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            AutoencoderKL(**VAE), CLIPTextModel(**TEXT), CLIPTokenizer.from_pretrained(PRETRAINED/'scenes'/'tokenizer'),
            UNet2DConditionModel(**UNET), EulerAncestralDiscreteScheduler(beta_schedule='scaled_linear'))
    return pipe.save_pretrained(tmp_path_factory.mktemp('weights')/'pipeline')


@pytest.fixture(scope='module')
def pipe(folder): return StableDiffusionPipeline.from_pretrained(folder, device='cpu')


@pytest.fixture(scope='module')
def exported(folder, tmp_path_factory):
    "Its graphs in float32, and what `export_onnx` says of them"
    output = tmp_path_factory.mktemp('graphs')/'deep'/'pipeline'
    return output, export_onnx(folder, output, 'float32')


@pytest.fixture(scope='module')
def graphs(exported): return load_onnx(exported[0])


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "A folder of a denoiser of digits that has learned nothing"
    return make_tiny(tmp_path_factory.mktemp('weights')/'digits')


@pytest.fixture
def traced(digits, monkeypatch):
    "Tracing is slow and shown to be the same each time: what looks at files only gets one graph of the denoiser"
    if not TRACED: TRACED.append(trace(*export._question_of_digits(load_digits(digits, device='cpu'))['unet']))
    monkeypatch.setattr(export, 'trace', lambda *question: TRACED[0])


TRACED = []


class Small(nn.Module):
    "A table, a kernel and two matrices, each large enough to be stored in fewer bits, and a bias that is not"
    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(64, 32), nn.Conv2d(32, 16, 3, padding=1)
        self.matrix, self.linear = nn.Parameter(torch.randn(16, 64)), nn.Linear(64, 32)

    def forward(self, ids):
        x = self.conv(self.table(ids).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.linear((x @ self.matrix)[:, 0, 0])


@pytest.fixture(scope='module')
def small():
    "The module, an input, and its graph"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        part = Small().eval()
    ids = (torch.arange(18, dtype=torch.int32)*7 % 64).view(2, 3, 3)
    return part, ids, trace(part, part, {'ids': (ids, {0: Dim('batch')})}, 'answer')


def answer(model, **inputs):
    "What onnxruntime makes of a graph"
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {k: np.asarray(x) for k, x in inputs.items()})[0])


def contents(folder):
    "The bytes of every file, by path"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# ---- the graphs answer as PyTorch does

@pytest.mark.parametrize('b', [1, 3])
def test_text_encoder(pipe, graphs, b):
    ids = pipe.tokenizer(['a red 7', *PROMPTS][:b], padding='max_length').input_ids
    with torch.no_grad(): expected = pipe.text_encoder(ids)[0]
    assert (graphs.text_encoder(ids)[0] - expected).abs().max() < 1e-5 and expected.std() > .1


@pytest.mark.parametrize('b, h, w, n', [(1, 8, 8, 32), (2, 8, 8, 32), (3, 6, 10, 64), (1, 7, 5, 5)])
def test_unet(pipe, graphs, b, h, w, n):
    x, words = noise(b, 4, h, w), noise(b, n, 16, seed=1)
    with torch.no_grad(): expected = pipe.unet(x, torch.tensor([321.]), words)
    assert (graphs.unet(x, 321, words) - expected).abs().max() < 1e-5 and expected.std() > .1


def test_time_is_an_input(pipe, graphs):
    x, words = noise(2, 4, 8, 8), noise(2, 32, 16, seed=1)
    found = {t: graphs.unet(x, t, words) for t in (0, 1, 500.5, 999)}
    for t, y in found.items():
        with torch.no_grad(): assert (pipe.unet(x, t, words) - y).abs().max() < 2e-5, t
    assert (found[0] - found[1]).abs().max() > 1e-3 and (found[0] - found[999]).abs().max() > 1e-3


@pytest.mark.parametrize('b, h, w', [(1, 8, 8), (3, 4, 10)])
def test_vae(pipe, graphs, b, h, w):
    z, x = noise(b, 4, h, w), noise(b, 3, 2*h, 2*w).clamp(-1, 1)
    with torch.no_grad(): picture, latents = pipe.vae.decode(z).sample, pipe.vae.encode(x).latent_dist
    assert (graphs.vae.decode(z).sample - picture).abs().max() < 1e-5 and picture.std() > .05
    found = graphs.vae.encode(x).latent_dist
    assert (found.mean - latents.mean).abs().max() < 1e-5 and (found.std - latents.std).abs().max() < 1e-5


def test_pictures(pipe, graphs):
    words = dict(num_inference_steps=4, guidance_scale=3., output_type='pt', negative_prompt=['a 5', ''])
    found, expected = (p(PROMPTS, generator=seeded(), **words).images for p in (graphs, pipe))
    assert (found - expected).abs().max() < 1e-4 and expected.std() > .01
    words.update(image=noise(1, 3, 16, 16).clamp(-1, 1), strength=.6)
    found, expected = (p(PROMPTS, generator=seeded(), **words).images for p in (graphs, pipe))
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_digits(digits, traced, tmp_path, dtype):
    facts = export_onnx(digits, tmp_path/'out', dtype)
    assert facts['kind'] == 'digits' and facts['any'] == ANY and facts['fold'] == 2 and facts['latents'] == [4, 14, 14]
    assert {k: facts['scheduler'][k] for k in SCHEDULER} == SCHEDULER
    model, graph = load_digits(digits, device='cpu'), load_onnx(tmp_path/'out')
    x, labels = noise(3, 4, 14, 14), torch.tensor([0, 7, ANY])
    with torch.no_grad(): expected = model(x, 500, None, labels)
    assert (graph(x, 500, None, labels) - expected).norm()/expected.norm() < dict(float32=1e-5, int8=.1)[dtype]
    scheduler, ends = make_scheduler(**SCHEDULER), []
    for denoiser in (graph, model):
        scheduler.set_timesteps(3)
        ends.append([*denoise(denoiser, scheduler, x, torch.tensor([3, 1, 4]))][-1].xt)
    if dtype == 'float32': assert (ends[0] - ends[1]).abs().max() < 1e-4


def test_ports(exported):
    "Names, types and axes are those that other programs rely on"
    def ports(values):
        tensors = {v.name: v.type.tensor_type for v in values}
        return {k: (t.elem_type, [d.dim_param or d.dim_value for d in t.shape.dim]) for k, t in tensors.items()}
    f, i = TensorProto.FLOAT, TensorProto.INT32
    image, large = ['batch', 4, 'height', 'width'], ['batch', 3, '2*height', '2*width']
    expected = {
        'text_encoder': ({'input_ids': (i, ['batch', 32])}, {'last_hidden_state': (f, ['batch', 32, 16])}),
        'unet': ({'sample': (f, image), 'timestep': (f, [1]), 'encoder_hidden_states': (f, ['batch', 'tokens', 16])},
                 {'out_sample': (f, image)}),
        'vae_decoder': ({'latent_sample': (f, image)}, {'sample': (f, large)}),
        'vae_encoder': ({'sample': (f, large)}, {'latent_parameters': None})}
    for name, (inputs, outputs) in expected.items():
        graph = onnx.load(exported[0]/name/'model.onnx').graph
        assert ports(graph.input) == inputs, name
        if name == 'vae_encoder': assert [v.name for v in graph.output] == ['latent_parameters']
        else: assert ports(graph.output) == outputs, name


# ---- what is in the files

def test_files(folder, exported, pipe):
    output, facts = exported
    files = contents(output)
    assert {p for p in files if p.endswith('.onnx')} == {
        f'{name}/model.onnx' for name in ('text_encoder', 'unet', 'vae_decoder', 'vae_encoder')}
    assert json.loads(files.pop('export.json')) == facts
    assert {name: len(data) for name, data in files.items()} == {k: v['bytes'] for k, v in facts['files'].items()}
    assert all(sha256(output/name) == known['sha256'] for name, known in facts['files'].items())
    assert facts['kind'] == 'text-to-image' and facts['dtype'] == 'float32' and facts['latents'] == [4, 8, 8]
    assert facts['factor'] == 2 and facts['scaling_factor'] == .5
    assert facts['scheduler'] == json.loads((folder/'scheduler'/'scheduler_config.json').read_text())
    ids = {f'{kind}_token_id': 652 for kind in ('eos', 'unk', 'pad')}
    assert facts['tokenizer'] == dict(ids, bos_token_id=651, model_max_length=32)
    loaded = CLIPTokenizer.from_pretrained(output/'tokenizer')
    assert loaded.vocab == pipe.tokenizer.vocab and loaded.merges == pipe.tokenizer.merges
    for name in ('unet', 'text_encoder'):
        assert json.loads(files[f'{name}/config.json'])['_class_name'] == type(getattr(pipe, name)).__name__


def test_no_notes(exported):
    "No stack trace, no path, no name of a person's folder; and nothing but operators of one edition"
    for path in exported[0].rglob('*.onnx'):
        data, model = path.read_bytes(), onnx.load(path)
        for text in (b'.py', b'site-packages', b'stack_trace', b'File "', b'nn_module', os.getcwd().encode()):
            assert text not in data, (path, text)
        onnx.checker.check_model(model, full_check=True)
        assert [(o.domain, o.version) for o in model.opset_import] == [('', OPSET)] and not model.functions
        assert not any(w.external_data for w in model.graph.initializer)


def test_notes_are_seen(small):
    "The exporter does write them: the test above would find them"
    data = torch.onnx.export(Small().eval(), (small[1],), verbose=False).model_proto.SerializeToString()
    assert b'.py' in data and b'stack_trace' in data and b'File "' in data


def test_same_bytes(digits, traced, tmp_path, small):
    part, ids, model = small
    again = trace(part, part, {'ids': (ids, {0: Dim('batch')})}, 'answer')
    for dtype in DTYPES: assert shrink(again, dtype).SerializeToString() == shrink(model, dtype).SerializeToString()
    for name in 'ab': export_onnx(digits, tmp_path/name, 'int8')
    assert contents(tmp_path/'a') == contents(tmp_path/'b')


# ---- fewer bits

def test_quantize_by_hand():
    q, scale = quantize(np.array([[1.27, -.5, .004], [0, 0, 0], [-254, 2, 0]], dtype=np.float32), 0)
    assert q.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 1, 0]] and q.dtype == np.int8
    assert scale.shape == (3, 1) and np.allclose(scale.ravel(), [.01, 0, 2]) and scale.dtype == np.float32


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_quantize(data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=4, max_side=5))
    numbers = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-10)
    w = data.draw(arrays(np.float32, shape, elements=numbers))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    kept = w.copy()
    q, scale = quantize(w, axis)
    assert (w == kept).all() and q.shape == w.shape and q.min() >= -127 and q.max() <= 127
    assert [n for i, n in enumerate(scale.shape) if i != axis % len(shape)] == [1]*(len(shape) - 1)
    assert (np.abs(w - scale*q) <= scale*.5001).all(), 'half a step at most'


@pytest.mark.parametrize('dtype, size, most', [('float32', 4, 1e-6), ('float16', 2, 1e-3), ('int8', 1, .02)])
def test_shrink(small, dtype, size, most):
    part, ids, model = small
    before = model.SerializeToString()
    found = shrink(model, dtype)
    assert model.SerializeToString() == before, 'what is given stays as it is'
    y = answer(found, ids=ids)
    with torch.no_grad(): expected = part(ids)
    apart = (y - expected).norm()/expected.norm()
    assert apart < most and (dtype != 'int8' or apart > 1e-4)
    large = {w.name: w for w in found.graph.initializer if len(w.dims) > 1 and np.prod(w.dims) >= 1024}
    kinds = [w.data_type for w in large.values()]
    wanted = dict(float32=[TensorProto.FLOAT]*4, float16=[TensorProto.FLOAT16]*4,
                  int8=[TensorProto.FLOAT16, *[TensorProto.INT8]*3])[dtype]
    assert sorted(kinds) == sorted(wanted), 'a table stays in 16 bits'
    assert all(w.data_type != TensorProto.FLOAT16 for w in found.graph.initializer if w.name not in large)
    weights = sum(p.numel() for p in part.parameters() if p.ndim > 1 and p is not part.table.weight)
    assert len(found.SerializeToString()) < size*weights + 4096*max(size, 2)


def test_channels_are_the_outputs(small):
    "Each channel of a kernel and of a matrix has its own step, whichever way round the matrix lies in the file"
    part, _, model = small
    found = shrink(model, 'int8').graph
    stored = {w.name: numpy_helper.to_array(w) for w in found.initializer}
    weights = {tuple(p.shape): p.detach().numpy() for p in part.parameters()}
    seen = 0
    for node in found.node:
        if node.op_type != 'Mul' or not node.input[0].endswith('.steps'): continue
        q, scale = stored[node.input[0].replace('.steps', '.int8')], stored[node.input[1]]
        out = {(16, 32, 3, 3): 16, (16, 64): 64, (32, 64): 32, (64, 32): 32}[q.shape]
        weight = weights.get(q.shape, weights.get(q.shape[::-1], np.empty(0)).T)
        assert scale.size == out and (np.abs(weight - scale*q) <= scale*.5001).all()
        seen += 1
    assert seen == 3


def test_runtime_undoes_it_once(small, tmp_path):
    "When the session is made, not at each run: no Cast and no Mul is left of the weights"
    _, _, model = small
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path/'optimized.onnx')
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(shrink(model, 'int8').SerializeToString(), options)
    left = onnx.load(tmp_path/'optimized.onnx').graph
    assert not [n for n in left.node if n.op_type == 'Cast' or any('.steps' in name for name in n.input)]
    assert {w.data_type for w in left.initializer if len(w.dims) > 1} <= {TensorProto.FLOAT, TensorProto.INT64}


# ---- what cannot be done

@pytest.mark.parametrize('dtype', ['int4', 'bfloat16', None, torch.float16])
def test_unknown_dtype(digits, small, tmp_path, dtype):
    with pytest.raises(ValueError, match='dtype must be one of float32, float16, int8, got'):
        export_onnx(digits, tmp_path/'out', dtype)
    with pytest.raises(ValueError, match='dtype must be one of'): shrink(small[2], dtype)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('name, words', [('unicorn', 'unknown weights'), ('classifier', 'DigitClassifier'),
                                         ('scenes/unet', 'digits need one with'), ('scenes/vae', 'AutoencoderKL')])
def test_other_weights(tmp_path, name, words):
    with pytest.raises(ValueError, match=words): export_onnx(name, tmp_path/'out')
    assert not os.listdir(tmp_path)


def test_output_is_never_overwritten(digits, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'notes.txt').write_text('my work')
    for place in ('mine', 'mine/notes.txt'):
        with pytest.raises(ValueError, match='cannot write .*allowed are a new folder or an empty one'):
            export_onnx(digits, tmp_path/place)
    with pytest.raises(ValueError, match='is a file'): export_onnx(digits, tmp_path/'mine'/'notes.txt'/'deeper')
    assert contents(tmp_path) == {'mine/notes.txt': b'my work'}


@pytest.mark.parametrize('error, seen', [(OSError(28, 'No space left on device'), ValueError),
                                         (KeyboardInterrupt(), KeyboardInterrupt)])
def test_all_or_nothing(digits, traced, tmp_path, monkeypatch, error, seen):
    "An empty folder stays empty if something goes wrong at the end, and is filled in one move if not"
    def fail(*args): raise error
    (tmp_path/'out').mkdir()
    with monkeypatch.context() as m, pytest.raises(seen, match='No space|^$'):
        m.setattr(export, '_describe', fail)
        export_onnx(digits, tmp_path/'out')
    assert os.listdir(tmp_path) == ['out'] and not os.listdir(tmp_path/'out')
    export_onnx(digits, tmp_path/'out')
    assert os.listdir(tmp_path) == ['out'] and 'export.json' in os.listdir(tmp_path/'out')
    assert (tmp_path/'out').stat().st_mode & 0o777 == 0o777 & ~(os.umask(umask := os.umask(0)) or umask)


def test_wrong_graph_is_seen(small):
    "A graph that answers something else is not written"
    part, ids, model = small
    question = part, part, {'ids': (ids, {})}, 'answer'
    export._check_answer(model.SerializeToString(), 'thing', question, 1e-5)
    (wrong := onnx.ModelProto()).CopyFrom(model)
    bias = next(w for w in wrong.graph.initializer if list(w.dims) == [32])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    with pytest.raises(ValueError, match='the graph of the thing is off by'):
        export._check_answer(wrong.SerializeToString(), 'thing', question, 1e-5)


def test_too_large():
    "More than a file can hold: three billion bytes that nobody has to have"
    weights = SimpleNamespace(graph=SimpleNamespace(initializer=[SimpleNamespace(raw_data=range(3*10**9))]))
    with pytest.raises(ValueError, match='the unet has 3.0 GB, and an ONNX file holds 2.1: .*float16 or int8'):
        export._packed(weights, 'unet')


@pytest.mark.parametrize('missing', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_packages(digits, exported, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(export, 'find_spec', lambda name: None if name == missing else object())
    with pytest.raises(ValueError, match=rf"^{missing} not installed; pip install 'sdcourse\[export\]' brings them"):
        export_onnx(digits, tmp_path/'out')
    if missing == 'onnxruntime':
        with pytest.raises(ValueError, match='onnxruntime not installed'): load_onnx(exported[0])
    assert not os.listdir(tmp_path)


def test_other_folders(exported, tmp_path):
    with pytest.raises(ValueError, match='export.json'): load_onnx(tmp_path)
    with pytest.raises(ValueError, match='export.json'): load_onnx('no/such/folder')
    copy = shutil.copytree(exported[0], tmp_path/'copy')
    graph = copy/'unet'/'model.onnx'
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ValueError, match='unet/model.onnx is missing, or it is not the file'): load_onnx(copy)
    graph.unlink()
    with pytest.raises(ValueError, match='unet/model.onnx is missing'): load_onnx(copy)


# ---- the command line

def test_command(digits, traced, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['export', str(digits), '--to', 'onnx', '--dtype', 'int8', '-o', 'mine']) == 0
    said = capsys.readouterr()
    assert said.out.startswith('mine: 4 files, 0.') and said.out.endswith(' MB\n') and not said.err
    assert json.loads((tmp_path/'mine'/'export.json').read_text())['dtype'] == 'int8'
    assert cli.main(['export', str(digits), '-o', 'mine']) == 2
    assert 'allowed are a new folder or an empty one' in capsys.readouterr().err


@pytest.mark.parametrize('line, words', [
    ('export', 'NAME'), ('export digits --to tflite', "'onnx'"), ('export digits --dtype int4', "'int8'"),
    ('export unicorn', 'unknown weights')])
def test_wrong_command(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    try: code = cli.main(line.split())
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    assert code == 2 and words in said.err and said.err.count('\n') == 1 and not os.listdir(tmp_path)


# ---- the shipped weights

def test_shipped_digits(tmp_path):
    "In half precision nothing is lost: the weights were saved so"
    facts = export_onnx('digits', tmp_path/'out', 'float16')
    graph, model = load_onnx(tmp_path/'out'), load_digits(device='cpu')
    x, labels = noise(4, 4, 14, 14), torch.tensor([3, 1, 4, ANY])
    with torch.no_grad(): expected = model(x, 700, None, labels)
    assert (graph(x, 700, None, labels) - expected).abs().max() < 2e-5
    assert facts['files']['unet/model.onnx']['bytes'] < 6_000_000


@pytest.mark.slow
def test_shipped_scenes(tmp_path):
    "In 8 bits the pictures are those of PyTorch, to the eye; all that a page fetches has less than 11 MB"
    facts = export_onnx('scenes', tmp_path/'out', 'int8')
    assert sum(file['bytes'] for file in facts['files'].values()) < 11_000_000
    words = dict(num_inference_steps=25, guidance_scale=4., output_type='pt')
    pipes = load_onnx(tmp_path/'out'), StableDiffusionPipeline.from_pretrained('scenes', device='cpu')
    found, expected = (p(PROMPTS, generator=[seeded(0), seeded(1)], **words).images for p in pipes)
    assert (found - expected).abs().mean() < .005 and expected.std() > .1
