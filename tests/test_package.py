"The wheel works in an empty environment outside the checkout."
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

# in the new environment: connections fail, so that whatever asks for the network is seen
NO_NETWORK = """
import socket
def refuse(self, address, *args):
    if self.family != getattr(socket, 'AF_UNIX', None): raise OSError(f'the tests forbid connecting to {address}')
    return connect(self, address, *args)
connect = socket.socket.connect
socket.socket.connect = refuse
"""


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    "The wheel, built from a copy of the checkout with the tools that are installed"
    dist = tmp_path_factory.mktemp('dist')
    done = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '-o', dist, source],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    path, = dist.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def names(wheel):
    "Names of the files in the wheel"
    with zipfile.ZipFile(wheel) as z: return set(z.namelist())


@pytest.fixture(scope='module')
def metadata(wheel, names):
    "The wheel's metadata"
    name, = (n for n in names if n.endswith('.dist-info/METADATA'))
    with zipfile.ZipFile(wheel) as z: return Parser().parsestr(z.read(name).decode())


def settings(root):
    "settings.ini"
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def canonical(requirement):
    "A requirement, however it is spelled"
    from packaging.requirements import Requirement
    r = Requirement(requirement)
    return r.name.lower().replace('_', '-'), str(r.specifier), str(r.marker or '').replace('"', "'")


def test_contents(source, names):
    inside = {n for n in names if '.dist-info/' not in n}
    data = {p.relative_to(source).as_posix() for d in ('mnist', 'pretrained')
            for p in (source/'sdcourse'/d).rglob('*') if p.is_file()}
    modules = {p.relative_to(source).as_posix() for p in (source/'sdcourse').glob('*.py')}
    notebooks = {f'sdcourse/lessons/{p.name}' for p in (source/'nbs').glob('*.ipynb')}
    measured = {f'sdcourse/lessons/benchmarks/{p.name}' for p in (source/'benchmarks').glob('*.json')}
    assert measured and inside == data | modules | notebooks | measured | {'sdcourse/lessons/pipeline.png'}
    assert sum(n.endswith('.xz') for n in inside) == 4
    assert any(n.endswith('.safetensors') for n in inside)


def test_licences(wheel, names):
    texts = {Path(n).name: n for n in names if '/licenses/' in n}
    assert set(texts) == {'LICENSE', 'NOTICE'}
    with zipfile.ZipFile(wheel) as z:
        assert 'Apache License' in z.read(texts['LICENSE']).decode()
        assert 'CC BY-SA 3.0' in z.read(texts['NOTICE']).decode()


def test_metadata(root, metadata):
    cfg = settings(root)
    assert metadata['Name'] == cfg['lib_name'] and metadata['Version'] == cfg['version']
    assert metadata['Summary'] == cfg['description']
    assert metadata['License-Expression'] == cfg['license']
    assert metadata['Requires-Python'] == '>='+cfg['min_python']
    wanted = {canonical(r) for r in cfg['requirements'].split()}
    for extra, lists in {'dev': ('dev', 'play', 'export'), 'play': ('play',), 'export': ('export',)}.items():
        wanted |= {canonical(f'{r}; extra == "{extra}"') for name in lists for r in cfg[f'{name}_requirements'].split()}
    assert {canonical(r) for r in metadata.get_all('Requires-Dist')} == wanted
    assert all('<' not in spec and '==' not in spec for _, spec, _ in wanted), 'lower bounds, no caps'


def test_constraints(root):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    lines = (root/'constraints.txt').read_text().splitlines()
    pins = {canonicalize_name(r.name): r for r in (Requirement(x) for x in lines if not x.startswith('#'))}
    cfg = settings(root)
    listed = ' '.join(cfg[f'{kind}requirements'] for kind in ('', 'dev_', 'play_', 'export_'))
    for wanted in map(Requirement, listed.split()):
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin is not None, f'constraints.txt does not name {wanted.name}: make constraints'
        version = str(pin.specifier).removeprefix('==')
        assert wanted.specifier.contains(version), f'constraints.txt has {pin}, settings.ini asks for {wanted}'


@pytest.fixture(scope='module')
def empty(wheel, tmp_path_factory):
    "A new environment with the wheel; its dependencies are those of this one, but not its editable sdcourse"
    home = tmp_path_factory.mktemp('empty')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', home/'env'], check=True)
    python = home/'env'/'bin'/'python'
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps', '--no-index',
                    '--disable-pip-version-check', wheel], check=True)
    ask = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site = Path(subprocess.check_output([python, '-c', ask], text=True).strip())
    # a path in a .pth file is appended as it is: the .pth files there, the editable install's among them, stay unread
    (site/'dependencies.pth').write_text('\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}))
    (site/'sitecustomize.py').write_text(NO_NETWORK)
    return home


def run(empty, *command, ok=True):
    "Run a command of the empty environment in a folder of its own; its output"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'VIRTUAL_ENV'))}
    env.update(HF_HUB_OFFLINE='1', HF_HOME=str(empty/'hub'), PATH=f"{empty/'env'/'bin'}{os.pathsep}{env['PATH']}")
    (empty/'work').mkdir(exist_ok=True)
    done = subprocess.run([str(empty/'env'/'bin'/command[0]), *command[1:]], cwd=empty/'work', env=env,
                          capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_network_is_refused(empty):
    assert 'forbid' in run(empty, 'python', '-c', 'import socket; socket.create_connection(("127.0.0.1", 9))', ok=False)


def test_imports_come_from_the_wheel(empty):
    place = run(empty, 'python', '-c', 'import sdcourse; print(sdcourse.__file__)').strip()
    assert Path(place).is_relative_to(empty/'env'), place


def test_data(empty):
    code = 'from sdcourse.data import mnist; d = mnist("test"); print(*d.images.shape, int(d.labels[0]))'
    assert run(empty, 'python', '-c', code).split() == ['10000', '1', '28', '28', '7']


def test_info(empty):
    out = run(empty, 'sdcourse', 'info')
    assert 'classifier' in out


def test_synthesize(empty):
    from PIL import Image
    out = run(empty, 'sdcourse', 'synthesize', '7', '-o', 'x.png', '--n', '1', '--steps', '2', '--seed', '0')
    assert 'x.png' in out
    with Image.open(empty/'work'/'x.png') as picture: assert min(picture.size) >= 28


def test_generate(empty):
    from PIL import Image
    out = run(empty, 'sdcourse', 'generate', 'a bold red seven above a blue 3', '-o', 'scene.png', '--steps', '2')
    assert 'scene.png' in out
    with Image.open(empty/'work'/'scene.png') as picture: assert picture.size == (256, 256)


def test_lessons(root, empty):
    out = run(empty, 'sdcourse', 'lessons', 'mine')
    copied = sorted((empty/'work'/'mine').glob('*.ipynb'))
    assert [p.name for p in copied] == sorted(p.name for p in (root/'nbs').glob('*.ipynb')) and 'mine' in out
    assert all(p.read_bytes() == (root/'nbs'/p.name).read_bytes() for p in copied)
    measured = sorted(p.name for p in (empty/'work'/'mine'/'benchmarks').iterdir())
    assert measured == sorted(p.name for p in (root/'benchmarks').glob('*.json')), 'what lesson 17 reads'


def test_shipped_hashes(root):
    manifests = list((root/'sdcourse'/'pretrained').rglob('manifest.json'))
    assert manifests
    for path in manifests:
        for name, digest in json.loads(path.read_text())['files'].items():
            assert hashlib.sha256((path.parent/name).read_bytes()).hexdigest() == digest, f'{path.parent.name}/{name}'
