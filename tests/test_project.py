"What keeps the checkout whole: modules in sync with their notebooks, notebooks clean, README, ruff."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run(*command, cwd, ok=True):
    "Run a command of this environment; its output"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # under which nbdev-export does nothing
    env['PATH'] = f"{BIN}{os.pathsep}{env['PATH']}"
    done = subprocess.run([BIN/command[0], *command[1:]], cwd=cwd, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def contents(folder):
    "The bytes of every file, by path"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*'))
            if p.is_file() and not {'__pycache__', '.ipynb_checkpoints', '.ruff_cache', '.git'} & set(p.parts)}


def differences(old, new):
    "Paths whose contents are not the same"
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


@pytest.fixture
def copy(source, tmp_path):
    "A copy of the checkout that a test may change"
    keep = shutil.ignore_patterns('*.xz', '*.safetensors', 'build', '*.egg-info')
    return Path(shutil.copytree(source, tmp_path/'copy', ignore=keep))


def test_exported(copy):
    before = contents(copy)
    for path in (copy/'sdcourse').glob('*.py'):
        if path.name != '__init__.py': path.unlink()  # a module without a notebook would stay away
    run('nbdev-export', cwd=copy)
    assert differences(before, contents(copy)) == [], 'run nbdev-export, and look at what it changed'


def test_export_is_seen(copy):
    run('nbdev-export', cwd=copy)
    before = contents(copy)
    notebook = copy/'nbs'/'00_model.ipynb'
    notebook.write_text(notebook.read_text(encoding='utf-8').replace('def default_device(', 'def best_device('),
                        encoding='utf-8')
    run('nbdev-export', cwd=copy)
    assert 'sdcourse/model.py' in differences(before, contents(copy))


def test_clean(copy):
    before = contents(copy/'nbs')
    run('nbdev-clean', cwd=copy)
    assert differences(before, contents(copy/'nbs')) == [], 'run nbdev-clean'


def test_dirt_is_seen(copy):
    import json
    notebook = copy/'nbs'/'00_model.ipynb'
    cells = json.loads(notebook.read_text(encoding='utf-8'))
    next(c for c in cells['cells'] if c['cell_type'] == 'code')['execution_count'] = 7
    notebook.write_text(json.dumps(cells), encoding='utf-8')
    before = contents(copy/'nbs')
    run('nbdev-clean', cwd=copy)
    assert differences(before, contents(copy/'nbs')) == ['00_model.ipynb']


def test_readme(root):
    run('python', 'tools/readme.py', '--check', cwd=root)


def test_readme_sees(copy):
    (copy/'README.md').write_text('# another')
    assert 'README.md' in run('python', copy/'tools'/'readme.py', '--check', cwd=copy, ok=False)


def test_ruff(root):
    run('ruff', 'check', '--quiet', '--output-format=concise', '.', cwd=root)


def test_ruff_sees(copy):
    (copy/'tools'/'bad.py').write_text('import os\n')
    assert 'F401' in run('ruff', 'check', '--quiet', '.', cwd=copy, ok=False)


def test_one_place(root):
    for name in ('setup.cfg', 'MANIFEST.in', 'requirements.txt', 'nbs/_quarto.yml', 'nbs/nbdev.yml'):
        listed = subprocess.run(['git', 'ls-files', name], cwd=root, capture_output=True, text=True, check=True)
        assert not listed.stdout, f'{name} would be a second place for what settings.ini or _quarto.yml says'
    import tomllib
    project = tomllib.loads((root/'pyproject.toml').read_text())
    assert set(project) == {'build-system', 'project', 'tool'} and set(project['tool']) == {'nbdev'}
    assert set(project['project']) == {'name', 'dynamic'}
    assert 'html-math-method: mathml' in (root/'_quarto.yml').read_text()
