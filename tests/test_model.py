"Models: what they record, what they save, what they refuse, and agreement with diffusers both ways"
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from sdcourse import model as module
from sdcourse.images import os as module_os
from sdcourse.model import (Config, Model, default_device, find_pretrained, fingerprint, read_manifest, shipped,
                            write_manifest)

WEIGHTS = Model.weights_name


def build(self, channels, strength):
    "The parts of both classes below"
    self.conv, self.out = nn.Conv2d(1, channels[0], 3, padding=1), nn.Conv2d(channels[0], 1, 1)
    self.norm = nn.BatchNorm2d(channels[0])  # has an integer buffer
    self.register_buffer('unsaved', torch.arange(3.), persistent=False)
    self.strength = strength


def apply(self, x):
    "(b,1,h,w) -> (b,1,h,w)"
    return self.strength*self.out(self.norm(self.conv(x)).relu())


class Tiny(Model):
    "A small network"
    def __init__(self, channels=(4, 8), strength=2., note=None):
        super().__init__()
        build(self, channels, strength)
    forward = apply


class Theirs(ModelMixin, ConfigMixin):
    "The same, on diffusers' base classes"
    @register_to_config
    def __init__(self, channels=(4, 8), strength=2., note=None):
        super().__init__()
        build(self, channels, strength)
    forward = apply


Theirs.__name__ = 'Tiny'


class Tied(Model):
    "Two layers with one weight, and a weight that isn't contiguous"
    def __init__(self, size=3):
        super().__init__()
        self.a, self.b = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.b.weight = self.a.weight
        self.turned = nn.Parameter(torch.randn(size, size + 1).T)
        self.part = nn.Parameter(torch.randn(size, size)[0])


class Plain(Model):
    "Two layers, a parameter that is not trained and a buffer: all of it is saved"
    def __init__(self, size=3):
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, 1, bias=False)
        self.c = nn.Parameter(torch.randn(size), requires_grad=False)
        self.register_buffer('steps', torch.arange(size))
    def forward(self, x): return self.b(self.a(x) + self.c)


@pytest.fixture
def x(): return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    "A folder with a model"
    return Tiny(channels=(6,), strength=0.5).save_pretrained(tmp_path/'saved')


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    "A folder of shipped weights of our own"
    monkeypatch.setattr(module, 'PRETRAINED', tmp_path/'pretrained')
    for name in ('plain', 'group/one', 'group/two'): Tiny().save_pretrained(tmp_path/'pretrained'/name)
    return tmp_path/'pretrained'


# recording

def test_config_records_everything():
    model = Tiny([6], note={'a': [1]})
    assert model.config == {'channels': (6,), 'strength': 2., 'note': {'a': (1,)}}
    assert model.config.channels == (6,) and model.config.note.a == (1,)
    assert Tiny.from_config(model.config).config == model.config
    assert Model().config == {}


def test_config_cannot_change():
    argument = [6]
    model = Tiny(argument)
    argument.append(7)
    assert model.config.channels == (6,)
    with pytest.raises(AttributeError): model.config.strength = 1
    with pytest.raises(AttributeError, match="'strength' cannot be deleted"): del model.config.strength
    with pytest.raises(AttributeError): model.config = {}
    with pytest.raises(TypeError): model.config['strength'] = 1
    with pytest.raises(AttributeError, match='it has channels, strength, note'): model.config.width  # noqa: B018


def test_names_in_a_config():
    with pytest.raises(ValueError, match='must be strings, got 1, None'): Config({1: 'a', 'b': 2, None: 3})
    with pytest.raises(ValueError, match='must be strings'): Tiny(note={0: 'a'})
    assert Config({'items': 3})['items'] == 3 and list(Config({'items': 3}).items()) == [('items', 3)]
    with pytest.raises(AttributeError, match='it has nothing'): Config({}).width  # noqa: B018


def test_the_outermost_constructor_records():
    class Inner(Tiny):
        def __init__(self, strength=3.): super().__init__((1,), strength)
    class Heir(Inner): pass
    assert Inner().config == {'strength': 3.} == Heir().config
    assert Heir(4.).config.strength == 4.


def test_config_is_there_in_the_constructor():
    class Early(Model):
        def __init__(self, width=3):
            super().__init__()
            self.layer = nn.Linear(self.config.width, 1)
    assert Early(5).layer.in_features == 5


def test_nameless_arguments_are_refused():
    with pytest.raises(TypeError, match=r'\* and \*\*'):
        class Vague(Model):
            def __init__(self, **kwargs): super().__init__()


def test_copy_and_pickle():
    config = Tiny((6,)).config
    assert copy.deepcopy(Tiny((6,))).config == config
    assert pickle.loads(pickle.dumps(config)) == config == copy.copy(config)
    assert isinstance(copy.deepcopy(config), Config)


def test_device_and_dtype():
    model = Tiny()
    assert model.device.type == 'cpu' and model.dtype == torch.float32
    assert model.to(torch.float16).dtype == torch.float16 and model.norm.num_batches_tracked.dtype == torch.int64
    assert Tiny().to('meta').device.type == 'meta'
    assert default_device().type in ('cuda', 'mps', 'cpu')
    assert Model().device == torch.get_default_device() and Model().dtype == torch.get_default_dtype()


@pytest.mark.parametrize('bad, words', [
    ({'chanels': (6,)}, ['chanels', 'channels, strength, note']), ({'_class_name': 'Other'}, ['Other', 'Tiny']),
    ({'channels': 'four'}, ['four']), ({'channels': ()}, ['channels'])])
def test_from_config_refuses(bad, words):
    with pytest.raises(ValueError) as e: Tiny.from_config(bad)
    assert all(word in str(e.value) for word in words)


def test_from_config_names_what_is_missing():
    class Needy(Model):
        def __init__(self, width): super().__init__()
    with pytest.raises(ValueError, match='missing width; its arguments') as e: Needy.from_config({})
    assert 'unknown' not in str(e.value)
    with pytest.raises(ValueError, match='unknown height; missing width'): Needy.from_config({'height': 1})


@pytest.mark.parametrize('bad', [None, [], 'config', 3])
def test_from_config_wants_a_mapping(bad):
    with pytest.raises(ValueError, match=f'a mapping, got {type(bad).__name__}'): Tiny.from_config(bad)


def test_from_config_refuses_names_that_are_no_strings():
    with pytest.raises(ValueError, match='must be strings, got 1'): Tiny.from_config({1: 2})


# saving and loading

def test_round_trip(tmp_path, x):
    torch.manual_seed(0)
    model = Tiny((6,), strength=0.5)
    model(x)  # moves the running statistics
    folder = model.eval().save_pretrained(tmp_path/'a'/'b')
    loaded = Tiny.from_pretrained(folder)
    assert loaded.config == model.config and not loaded.training and loaded(x).equal(model(x))
    assert loaded.unsaved.equal(model.unsaved)
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', WEIGHTS]
    assert Tiny.from_pretrained(str(folder)).state_dict().keys() == model.state_dict().keys()
    assert Tiny.from_pretrained(tmp_path/'a', subfolder='b')(x).equal(model(x))


@pytest.mark.parametrize('cls', [Tiny, Plain])
def test_loading_leaves_the_random_numbers_alone(tmp_path, cls):
    folder = cls().save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    cls.from_pretrained(folder)
    assert torch.rand(3).equal(expected)


def test_loading_draws_nothing_and_holds_nothing_twice(tmp_path, monkeypatch):
    "The layers are built without numbers, and the file's tensors take their places"
    model = Plain()
    folder, made = model.save_pretrained(tmp_path), []
    reset = nn.Linear.reset_parameters
    def watched(layer):
        made.append(layer.weight.device.type)
        reset(layer)
    monkeypatch.setattr(nn.Linear, 'reset_parameters', watched)
    loaded = Plain.from_pretrained(folder)
    assert made == ['meta']*2 and not loaded.training
    assert all(loaded.state_dict()[k].equal(w) for k, w in model.state_dict().items())
    assert {k for k, p in loaded.named_parameters() if p.requires_grad} == {'a.weight', 'a.bias', 'b.weight'}
    assert loaded.steps.dtype == torch.int64 and not any(w.is_meta for w in loaded.state_dict().values())
    loaded(torch.ones(1, 3)).sum().backward()
    with torch.no_grad(): loaded.a.weight += 1
    assert Plain.from_pretrained(folder).a.weight.equal(model.a.weight), 'a model that changes leaves its file alone'


class Attribute(Model):
    "A tensor that is a plain attribute"
    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(2, 2), torch.arange(3)


class Looks(Model):
    "A constructor that looks at numbers"
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(n, 1) for n in torch.linspace(1, 3, 3).int().tolist())


@pytest.mark.parametrize('cls', [Tiny, Tied, Attribute, Looks])
def test_what_would_be_lost_is_built_with_numbers(tmp_path, cls):
    "Buffers that are not saved, weights with two names, tensors elsewhere, constructors that compute"
    model = cls()
    loaded = cls.from_pretrained(model.save_pretrained(tmp_path))
    assert cls._without_weights(model.config) is None
    for name in ('unsaved', 'table'):
        if hasattr(model, name): assert getattr(loaded, name).equal(getattr(model, name))
    assert all(loaded.state_dict()[k].equal(w) for k, w in model.state_dict().items())


@pytest.mark.parametrize('name', ['model.fp16.safetensors', 'model.safetensors'])
def test_variant(tmp_path, monkeypatch, name):
    "The file that has the word in its name, and no other"
    monkeypatch.setattr(Plain, 'weights_name', 'model.safetensors')
    model = Plain()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    (tmp_path/'model.safetensors').rename(tmp_path/name)
    if 'fp16' in name:
        assert Plain.from_pretrained(tmp_path, variant='fp16').a.weight.equal(model.a.weight.half().float())
        message = refusal(tmp_path, Plain)
        assert message.startswith(f'no model.safetensors in {tmp_path}; there is model.fp16.safetensors: say variant')
    else: assert 'no model.fp16.safetensors' in refusal(tmp_path, Plain, variant='fp16')
    for variant in ('', 'a/b', '../x', 16): assert repr(variant) in refusal(tmp_path, Plain, variant=variant)


@pytest.mark.parametrize('stored', [torch.float16, torch.bfloat16, torch.float64])
def test_precision(tmp_path, stored):
    model = Tiny()
    folder = model.save_pretrained(tmp_path/'model', dtype=stored)
    file = load_file(folder/WEIGHTS)
    assert file['conv.weight'].dtype == stored and file['norm.num_batches_tracked'].dtype == torch.int64
    assert Tiny.from_pretrained(folder).dtype == torch.float32
    as_stored = Tiny.from_pretrained(folder, dtype=None)
    assert as_stored.dtype == stored and as_stored.conv.weight.equal(model.conv.weight.to(stored))
    assert Tiny.from_pretrained(folder, dtype=torch.float16).dtype == torch.float16
    assert model.dtype == torch.float32  # saving doesn't change it


def test_device(saved): assert Tiny.from_pretrained(saved, device=default_device()).device.type == default_device().type


@pytest.mark.parametrize('device', ['gpu', 'cuda:999', 'mps:7', '', object(), 1.5])
def test_device_that_is_not_here(saved, device):
    message = refusal(saved, device=device)
    assert repr(device) in message and repr(default_device().type) in message


@pytest.mark.parametrize('dtype', [torch.int64, 'float16', 16])
def test_dtype_must_be_floating(tmp_path, saved, dtype):
    with pytest.raises(ValueError, match='floating'): Tiny.from_pretrained(saved, dtype=dtype)
    with pytest.raises(ValueError, match='floating'): Tiny().save_pretrained(tmp_path/'new', dtype=dtype)
    assert not (tmp_path/'new').exists()


def test_tied_and_scattered_weights(tmp_path):
    model = Tied()
    loaded = Tied.from_pretrained(model.save_pretrained(tmp_path/'tied'))
    for name, weight in model.state_dict().items(): assert loaded.state_dict()[name].equal(weight), name
    assert loaded.a.weight is loaded.b.weight
    assert (tmp_path/'tied'/WEIGHTS).stat().st_size < 2000  # a slice doesn't drag its whole storage along


def test_saved_again_over_a_manifest(saved):
    write_manifest(saved, seed=1)
    Tiny((9,)).save_pretrained(saved)
    assert Tiny.from_pretrained(saved).config.channels == (9,)  # the manifest of the former weights is gone
    assert not (saved/'manifest.json').exists()


def test_files_have_ordinary_permissions(saved, tmp_path):
    (tmp_path/'plain').write_text('x')
    assert {p.stat().st_mode for p in saved.iterdir()} == {(tmp_path/'plain').stat().st_mode}


def test_unwritable(tmp_path):
    (tmp_path/'file').write_text('x')
    for folder in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(ValueError, match='cannot write'): Tiny().save_pretrained(folder)
    with pytest.raises(ValueError, match='it is a file, not a folder'): Tiny().save_pretrained(tmp_path/'file')
    with pytest.raises(ValueError, match='JSON'): Tiny(note=object()).save_pretrained(tmp_path/'new')
    with pytest.raises(ValueError, match='JSON'): Tiny(note=float('nan')).save_pretrained(tmp_path/'new')
    assert [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_model(saved, x, monkeypatch, error):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    def half(weights, path, metadata=None):
        Path(path).write_bytes(b'half')
        raise error
    monkeypatch.setattr(module, 'save_file', half)
    with pytest.raises(ValueError if isinstance(error, OSError) else KeyboardInterrupt):
        Tiny((9,)).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_failed_config_is_called_by_its_name(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    def full(self, text, encoding=None): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(ValueError, match=r'cannot write .*config\.json: No space'): Tiny((9,)).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize('manifest', [False, True])
@pytest.mark.parametrize('fails', ['config.json', WEIGHTS, 'manifest.json'])
def test_no_mixture_of_two_models(saved, x, monkeypatch, fails, manifest):
    "Whichever of the last steps fails: the folder holds the new model, or is refused"
    if manifest: write_manifest(saved)
    elif fails == 'manifest.json': return
    new = Tiny((6,), strength=9.)  # the same shapes: new weights would fit the old config
    def failing(act):
        def step(path, *args, **options):
            if Path(args[0] if args else path).name == fails and not (act is unlink and fails != 'manifest.json'):
                raise PermissionError(13, 'in use')
            return act(path, *args, **options)
        return step
    replace, unlink = module_os.replace, Path.unlink
    monkeypatch.setattr(module_os, 'replace', failing(replace))
    monkeypatch.setattr(Path, 'unlink', failing(unlink))
    with pytest.raises(ValueError, match=f'{fails}.*: in use'): new.save_pretrained(saved)
    monkeypatch.undo()
    assert refusal(saved)
    assert not list(saved.glob('*.tmp'))
    new.save_pretrained(saved)  # and saving again repairs it
    assert Tiny.from_pretrained(saved)(x).equal(new.eval()(x))


@pytest.mark.skipif(sys.platform == 'win32', reason='needs limits on the size of files')
def test_full_disk(saved):
    "The operating system itself refuses to write more than 100 kB"
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    code = f'''
import resource, signal
from torch import nn
from sdcourse.model import Model
class Big(Model):
    def __init__(self): super().__init__(); self.layer = nn.Linear(300, 300)
model = Big()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: model.save_pretrained({str(saved)!r})
except ValueError as e: print('ValueError:', e)
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.startswith('ValueError: cannot write'), result.stdout + result.stderr
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# faults

def refusal(folder, cls=Tiny, **options):
    "What a failing load says"
    with pytest.raises(ValueError) as e: cls.from_pretrained(folder, **options)
    return str(e.value)


@pytest.mark.parametrize('keep', [0, 4, 8, 100, -1])
def test_truncated(saved, keep):
    data = (saved/WEIGHTS).read_bytes()
    (saved/WEIGHTS).write_bytes(data[:keep])
    message = refusal(saved)
    assert WEIGHTS in message and 'damaged or truncated' in message


def test_damaged(saved):
    (saved/WEIGHTS).write_bytes(b'\xff'*500)
    assert 'damaged' in refusal(saved)


def test_sha256(saved):
    manifest = write_manifest(saved, seed=3, accuracy=0.99)
    assert manifest == read_manifest(saved) and manifest['seed'] == 3 and set(manifest['files']) == {WEIGHTS}
    Tiny.from_pretrained(saved)
    data = bytearray((saved/WEIGHTS).read_bytes())
    data[-1] ^= 1
    (saved/WEIGHTS).write_bytes(data)
    message = refusal(saved)
    assert 'sha256' in message and manifest['files'][WEIGHTS] in message


def test_manifest_refuses(saved, tmp_path):
    with pytest.raises(ValueError, match='must hold .*, and holds none') as e: write_manifest(tmp_path)
    assert 'fact' not in str(e.value)
    with pytest.raises(ValueError, match="no fact may be called 'files'") as e: write_manifest(saved, files=1)
    assert 'must hold' not in str(e.value)
    with pytest.raises(ValueError, match='JSON'): write_manifest(saved, model=object())
    with pytest.raises(ValueError, match='cannot read'): read_manifest(saved)
    for text in ('{', '[]', '{"seed": 1}', '{"files": {}}'):
        (saved/'manifest.json').write_text(text)
        assert 'manifest' in refusal(saved)


def test_manifest_that_does_not_list_the_file(saved):
    (saved/'manifest.json').write_text('{"files": {"other.safetensors": "00"}}')
    assert refusal(saved).endswith(f'says nothing of {WEIGHTS}; it lists other.safetensors')


@pytest.mark.parametrize('name', [f'{WEIGHTS}.index.json', 'model.safetensors.index.json'])
def test_weights_in_several_files(saved, name):
    (saved/WEIGHTS).rename(saved/'diffusion_pytorch_model-00001-of-00002.safetensors')
    (saved/name).write_text('{}')
    message = refusal(saved)
    assert name in message and 'split into several files' in message


def test_config_that_does_not_fit_the_weights(saved):
    (saved/'config.json').write_text('{"_class_name": "Tiny", "channels": [7]}')
    message = refusal(saved)
    assert 'conv.weight (6, 1, 3, 3) for (7, 1, 3, 3)' in message and '…' in message


def test_missing_and_unexpected_weights(saved):
    weights = load_file(saved/WEIGHTS)
    weights['stranger'] = weights.pop('out.bias')
    save_file(weights, saved/WEIGHTS)
    message = refusal(saved)
    assert '1 missing: out.bias' in message and '1 unexpected: stranger' in message


@pytest.mark.parametrize('text', [
    '{"channels": [6]', '[6]', '{"chanels": [6]}', '{"_class_name": "UNet2DModel"}', '\0', ''])
def test_bad_config(saved, text):
    (saved/'config.json').write_text(text)
    assert refusal(saved)


def test_config_that_is_not_utf8(saved):
    (saved/'config.json').write_bytes(b'\xff\xfe{}')
    assert 'config.json' in refusal(saved)


def test_missing_files(saved):
    (saved/WEIGHTS).unlink()
    assert WEIGHTS in refusal(saved)
    (saved/'config.json').unlink()
    assert 'config.json' in refusal(saved)


def test_wrong_class(saved):
    message = refusal(saved, Tied)
    assert 'Tiny' in message and 'Tied' in message
    assert 'Tiny' in refusal(saved, Model)


@pytest.mark.parametrize('name', ['diffusion_pytorch_model.bin', 'model.ckpt', 'model.pt', 'model.pth'])
def test_pickle_is_refused(saved, name):
    torch.save(Tiny((6,)).state_dict(), saved/name)
    (saved/WEIGHTS).unlink()
    message = refusal(saved)
    assert name in message and 'safetensors' in message


# where weights are

def test_shipped_names(pretrained, monkeypatch, tmp_path):
    assert shipped() == ['group/one', 'group/two', 'plain']
    assert find_pretrained('group/one') == pretrained/'group'/'one' == find_pretrained('group', 'one')
    assert isinstance(Tiny.from_pretrained('plain'), Tiny)
    assert isinstance(Tiny.from_pretrained('group', subfolder='two'), Tiny)
    monkeypatch.chdir(tmp_path)
    Tiny((1,)).save_pretrained('plain')
    assert Tiny.from_pretrained('plain').config.channels == (4, 8)  # shipped names go first
    for own in ('./plain', Path('plain')): assert Tiny.from_pretrained(own).config.channels == (1,)


@pytest.mark.parametrize('name', [
    'nope', '', './nope', '../nope', '/no/such', 'a/b/c', 'group/three', 'here/nope', '~/x', 'a b/c', 'owner/', '/name',
    'owner/name@main', 'https://example.com/x', Path('owner/name'), 'ownér/name', 'owner/name\n', '-x/y', 'a\\b'])
def test_nothing_else_goes_to_the_hub(pretrained, monkeypatch, tmp_path, name):
    import huggingface_hub
    def forbidden(*args, **kwargs): raise AssertionError('the hub was asked')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', forbidden)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'here').mkdir()
    with pytest.raises(ValueError, match='group/one, group/two, plain'): Tiny.from_pretrained(name)


def test_hub(pretrained, saved, monkeypatch, x):
    import huggingface_hub
    calls = []
    def download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(saved.parent)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert Tiny.from_pretrained('owner/name-1.5', subfolder='saved')(x).equal(Tiny.from_pretrained(saved)(x))
    assert calls == [('owner/name-1.5', [
        'saved/config.json', f'saved/{WEIGHTS}', f'saved/{WEIGHTS}.index.json', 'saved/manifest.json'])]
    def offline(name, allow_patterns): raise huggingface_hub.errors.LocalEntryNotFoundError('no network\nat all')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    assert refusal('owner/name') == "cannot get 'owner/name' from the hub: no network"
    class Timeout(Exception): "As HTTP libraries have them, often without a word"
    def late(name, allow_patterns): raise Timeout
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', late)
    assert refusal('owner/name') == "cannot get 'owner/name' from the hub: Timeout"


def test_unknown_subfolder(saved):
    for subfolder in ('unet', 'u'*300, 3): assert repr(subfolder) in refusal(saved, subfolder=subfolder)


@pytest.mark.parametrize('name', ['a'*300, 'a'*5000, './' + 'a'*300, 'a\0b', None, 3])
def test_names_that_no_folder_can_have(name):
    with pytest.raises(ValueError, match='unknown weights'): find_pretrained(name)


def test_a_file_is_no_folder(saved):
    for name in (str(saved/WEIGHTS), saved/WEIGHTS):
        with pytest.raises(ValueError, match='is a file, not a folder'): find_pretrained(name)


def test_what_is_shipped_is_what_its_manifest_says():
    for name in shipped():
        folder = find_pretrained(name)
        for file, expected in read_manifest(folder)['files'].items(): assert module.sha256(folder/file) == expected


# diffusers

def test_diffusers_loads_ours(tmp_path, x):
    ours = Tiny((6,), strength=0.5, note='n').eval()
    theirs = Theirs.from_pretrained(ours.save_pretrained(tmp_path/'ours'))
    assert theirs(x).equal(ours(x)) and theirs.config.note == 'n' and not theirs.training
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_we_load_theirs(tmp_path, x):
    theirs = Theirs((6,), strength=0.5, note='n').eval()
    theirs.save_pretrained(tmp_path/'theirs')
    ours = Tiny.from_pretrained(tmp_path/'theirs')
    assert ours(x).equal(theirs(x)) and ours.config == {'channels': (6,), 'strength': 0.5, 'note': 'n'}
    assert Tiny.from_config(theirs.config).config == ours.config
    ours.save_pretrained(tmp_path/'ours')
    a, b = [json.loads((tmp_path/f/'config.json').read_text()) for f in ('theirs', 'ours')]
    assert a.pop('_diffusers_version') and a == b
    assert (tmp_path/'theirs'/WEIGHTS).read_bytes() == (tmp_path/'ours'/WEIGHTS).read_bytes()
    assert sorted(p.name for p in (tmp_path/'theirs').iterdir()) == sorted(p.name for p in (tmp_path/'ours').iterdir())


def test_half_precision_both_ways(tmp_path, x):
    folder = Tiny((6,)).save_pretrained(tmp_path/'half', dtype=torch.float16)
    theirs = Theirs.from_pretrained(folder, torch_dtype=torch.float32)
    assert theirs(x).equal(Tiny.from_pretrained(folder)(x))
    theirs.to(torch.float16).save_pretrained(tmp_path/'theirs')
    assert Tiny.from_pretrained(tmp_path/'theirs', dtype=None).conv.weight.equal(theirs.conv.weight)


# fingerprints

def test_fingerprint_of_copies(tmp_path, x):
    model = Tiny()
    found = fingerprint(model)
    assert len(found) == 64 and set(found) <= set('0123456789abcdef') and fingerprint(model) == found
    assert fingerprint(copy.deepcopy(model)) == found == fingerprint(copy.deepcopy(model).eval())
    assert fingerprint(Tiny.from_pretrained(model.save_pretrained(tmp_path))) == found
    assert fingerprint(Tied()) and fingerprint(nn.Linear(2, 2).half()) and fingerprint(nn.ReLU())
    turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert fingerprint(turned) == found, 'the same numbers, however they lie in memory'


@pytest.mark.parametrize('name', ['conv.weight', 'out.bias', 'norm.running_var', 'norm.num_batches_tracked'])
def test_one_bit_changes_the_fingerprint(name):
    model = Tiny()
    before = fingerprint(model)
    weight = model.state_dict()[name]
    raw = weight.view(-1).view(torch.uint8)
    raw[0] ^= 1
    assert fingerprint(model) != before
    raw[0] ^= 1
    assert fingerprint(model) == before


def test_names_shapes_and_types_change_the_fingerprint():
    class Other(nn.Module):
        def __init__(self, name, *shape, dtype=torch.float32):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, dtype=dtype)))
    kinds = (Other('a', 4), Other('b', 4), Other('a', 2, 2), Other('a', 4, 1), Other('a', 5),
             Other('a', 2, dtype=torch.float64), Other('a', 8, dtype=torch.float16))
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)


# weights with names of the past

class Renamed(Tiny):
    "Its `out` was called `last` once"
    @classmethod
    def modernize(cls, weights): return {k.replace('last.', 'out.'): v for k, v in weights.items()}


def test_old_names_are_read(tmp_path, x):
    model = Renamed().eval()
    path = model.save_pretrained(tmp_path)/WEIGHTS
    assert Renamed.from_pretrained(tmp_path)(x).equal(model(x)), 'names of today stay'
    save_file({k.replace('out.', 'last.'): v for k, v in load_file(path).items()}, path, metadata={'format': 'pt'})
    assert Renamed.from_pretrained(tmp_path)(x).equal(model(x))
    config = tmp_path/'config.json'
    config.write_text(config.read_text().replace('Renamed', 'Tiny'))
    with pytest.raises(ValueError, match='2 missing: out.weight, out.bias; 2 unexpected: last'):
        Tiny.from_pretrained(tmp_path)
    weights = model.state_dict()
    assert Tiny.modernize(weights) is weights


def test_import_is_light():
    heavy = ['fastai', 'diffusers', 'transformers', 'matplotlib', 'ipywidgets', 'IPython']
    code = f'import sys, {module.__name__}; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
