"One staircase: a module imports only the modules of earlier lessons, and what infers imports nothing heavy."
import ast
import json
import re
import subprocess
import sys

import pytest
from test_notebooks import signature_lines

HEAVY = {'fastai', 'diffusers', 'transformers', 'matplotlib', 'ipywidgets', 'IPython'}
TRAINING = {'training', 'scale'}  # modules that train, and nothing else: these may import fastai
SIDE_DOORS = {'utils', 'helpers', 'common', 'misc', 'tools'}
MAX_LINES = 400  # parameters, each with its docment on a line of its own, are not counted
LONGER = {'schedulers': 650, 'pipeline': 440, 'finetuning': 410,  # thirteen solvers; three pipelines; three trainings
          'cli': 480}  # every command


def default_exp(notebook):
    "The module that `notebook` (its JSON) exports to, or None"
    sources = (''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code')
    found = [m for s in sources for m in re.findall(r'(?m)^#\| *default_exp +(\S+)', s)]
    assert len(found) <= 1, f'more than one default_exp: {found}'
    return found[0] if found else None


def lessons(folder):
    "Module names in the order of their notebooks, with the notebook each comes from"
    pairs = [(default_exp(json.loads(nb.read_text(encoding='utf-8'))), nb) for nb in sorted(folder.glob('*.ipynb'))]
    return [(module, nb) for module, nb in pairs if module]


def imported(source, name='sdcourse.x'):
    "The first-level modules of sdcourse that a module's source imports, wherever in it; '*' for the package itself"
    package, *_ = name.split('.')
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, [package if node.level else '', node.module]))
            names = [f'{base}.{alias.name}' for alias in node.names] if base == package else [base]
        elif (isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', '')) in
              ('import_module', '__import__') and node.args and isinstance(node.args[0], ast.Constant)):
            names = [str(node.args[0].value)]
        else: continue
        for parts in (n.split('.') for n in names):
            if parts[0] == package: yield parts[1] if len(parts) > 1 else '*'


def faults(modules, package_names=('__version__',)):
    "Every step upwards in `modules`, a mapping of name to source in the order of the lessons"
    order = list(modules)
    for i, (name, source) in enumerate(modules.items()):
        if name in SIDE_DOORS: yield f'{name}: not a lesson, a side door'
        for other in imported(source):
            if other in package_names: continue
            if other not in order: yield f'{name} imports {other}, which no lesson exports'
            elif order.index(other) >= i: yield f'{name} imports {other}, a later lesson'
        lines = sum(bool(line.strip()) and not line.startswith('# %%') for line in source.splitlines())
        lines -= signature_lines(source)
        most = LONGER.get(name, MAX_LINES)
        if lines > most: yield f'{name}: {lines} lines that are not blank, {most} are allowed'


@pytest.fixture(scope='module')
def modules(root):
    "Source of each exported module in the order of the lessons"
    return {m: (root/'sdcourse'/f'{m}.py').read_text(encoding='utf-8') for m, _ in lessons(root/'nbs')}


def test_staircase(modules):
    assert modules
    found = list(faults(modules))
    assert not found, '\n'.join(found)


def test_roof_is_last(modules):
    assert list(modules)[-1] == 'cli'


def test_one_notebook_each(root, modules):
    pairs = lessons(root/'nbs')
    assert len({m for m, _ in pairs}) == len(pairs), 'two notebooks export to the same module'
    files = {p.relative_to(root/'sdcourse').with_suffix('').as_posix() for p in (root/'sdcourse').rglob('*.py')}
    assert files - {'__init__', '_modidx'} == set(modules), 'each module comes from a notebook in nbs/'
    for module, nb in pairs:
        origins = set(re.findall(r'(?m)^# %% \.\./nbs/(\S+\.ipynb)', modules[module]))
        assert origins <= {nb.name}, f'{module} is exported from {sorted(origins)}'


BAD = {
    'a module': ({'a': 'import sdcourse.b', 'b': ''}, 'a imports b, a later lesson'),
    'a name': ({'a': 'from sdcourse import b', 'b': ''}, 'a imports b, a later lesson'),
    'relative': ({'a': 'from .b import x', 'b': ''}, 'a imports b, a later lesson'),
    'relative module': ({'a': 'from . import b', 'b': ''}, 'a imports b, a later lesson'),
    'inside a function': ({'a': 'def f():\n    from sdcourse.b import x', 'b': ''}, 'a imports b, a later lesson'),
    'by a call': ({'a': "importlib.import_module('sdcourse.b')", 'b': ''}, 'a imports b, a later lesson'),
    'circle': ({'a': 'import sdcourse.b', 'b': 'import sdcourse.a'}, 'a imports b, a later lesson'),
    'itself': ({'a': 'import sdcourse.a'}, 'a imports a, a later lesson'),
    'no lesson': ({'a': 'import sdcourse.z'}, 'a imports z, which no lesson exports'),
    'the package': ({'a': 'import sdcourse'}, 'a imports *, which no lesson exports'),
    'side door': ({'utils': ''}, 'utils: not a lesson, a side door'),
    'long': ({'a': 'x = 1\n\n# %% a cell\n'*401}, 'a: 401 lines that are not blank, 400 are allowed'),
    'longer': ({'schedulers': 'x = 1\n'*651}, 'schedulers: 651 lines that are not blank, 650 are allowed'),
}


@pytest.mark.parametrize('name', BAD)
def test_checker_sees(name):
    sources, fault = BAD[name]
    assert list(faults(sources)) == [fault]


def test_checker_accepts():
    good = {'a': 'import torch', 'b': 'import sdcourse.a\nfrom sdcourse import __version__', 'c': 'from .a import x'}
    assert list(faults(good)) == []


REPORT = """
import importlib, json, sys
seen = {}
for name in sys.argv[1].split(','):
    importlib.import_module(name)
    seen[name] = sorted({m.partition('.')[0] for m in sys.modules} & set(sys.argv[2].split(',')))
print(json.dumps(seen))
"""


def heavy_imports(names):
    "Which of the heavy packages are loaded after each of `names` is imported, one after another, in a new process"
    done = subprocess.run([sys.executable, '-c', REPORT, ','.join(names), ','.join(HEAVY)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_inference_is_light(modules):
    light = [m for m in modules if m not in TRAINING]
    found = heavy_imports([f'sdcourse.{m}' for m in light])
    assert found == {f'sdcourse.{m}': [] for m in light}


def test_training_is_what_trains(modules):
    "The exceptions are modules of the course, and import nothing heavy but fastai (which brings matplotlib)"
    assert set(modules) >= TRAINING
    for name in TRAINING:
        found = {a.partition('.')[0] for node in ast.walk(ast.parse(modules[name])) for a in
                 ([node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else
                  [n.name for n in node.names] if isinstance(node, ast.Import) else [])}
        assert found & HEAVY == {'fastai'}, name


def test_heavy_is_seen():
    assert heavy_imports(['json', 'matplotlib']) == {'json': [], 'matplotlib': ['matplotlib']}
