"What each notebook owes its reader: front matter, outputs, figures in words, exercises, short cells, docments."
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
PAGES = sorted((ROOT/'nbs'/'api').glob('*.ipynb'))
MODULES = sorted(p for p in (ROOT/'sdcourse').glob('*.py') if not p.name.startswith('_'))
MAX_BYTES, MAX_LINES, MAX_EXPORTED = 1_000_000, 30, 25
MACHINE = re.compile(r'(?<![\w.])/(?:(?:root|home|work|Users|private|opt)/\w|tmp/tmp)\S*')


def joined(text):
    "nbformat's strings may be lists of lines"
    return text if isinstance(text, str) else ''.join(text)


def code_cells(notebook):
    "(place, source, outputs) of each code cell"
    return [(f'cell {i}', joined(c['source']), c.get('outputs', [])) for i, c in enumerate(notebook['cells'])
            if c['cell_type'] == 'code']


def front_matter(notebook):
    "The fields of the raw cell that opens a notebook"
    first = notebook['cells'][0]
    if first['cell_type'] != 'raw': return {}
    return dict(re.findall(r'(?m)^(\w+): *["\']?(.*?)["\']? *$', joined(first['source'])))


def title_faults(notebook):
    "Front matter has a title and a description"
    fields = front_matter(notebook)
    for name in ('title', 'description'):
        if not fields.get(name): yield f'the front matter has no {name}'


def texts(output):
    "All text in an output, without the bytes of pictures"
    yield joined(output.get('text', ''))
    for kind, data in output.get('data', {}).items():
        if kind.startswith('text/'): yield re.sub(r'data:[\w/+.-]+;base64,[\w+/=]*', '', joined(data))


def output_faults(notebook, some=True):
    "Outputs are saved (at least one if `some`), without errors and without this machine's paths"
    cells = code_cells(notebook)
    if some and not any(outputs for *_, outputs in cells): yield 'no outputs are saved: make execute'
    for place, _, outputs in cells:
        for o in outputs:
            if o['output_type'] == 'error': yield f'{place}: saved with {o["ename"]}: {o["evalue"]}'
            for path in MACHINE.findall(' '.join(texts(o))): yield f'{place}: a path of one machine, {path}'


def is_picture(output):
    "Whether an output is shown as a picture"
    return any(kind.startswith('image/') for kind in output.get('data', {}))


def figure_faults(notebook):
    "Figures have alternative text, and alternative text has a figure"
    for place, source, outputs in code_cells(notebook):
        alt = re.search(r'(?m)^#\| *fig-alt: *["\']?(.*?)["\']? *$', source)
        pictures = any(map(is_picture, outputs))
        if pictures and (not alt or len(alt[1]) < 15): yield f'{place}: a figure without a fig-alt that describes it'
        if alt and not pictures: yield f'{place}: a fig-alt and no saved figure'


def signature_lines(source):
    "How many lines the parameters of all functions take, for which nobody shall be short"
    return sum(max(node.body[0].lineno - node.lineno - 1, 0) for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.FunctionDef))


def draft_faults(notebook):
    "No paragraph is still to be written"
    for cell in notebook['cells']:
        found = re.search(r'@@\w.*|\bTODO\b.*|\bTO SEE\b.*', joined(cell['source']))
        if found: yield f'a placeholder: {found[0][:60]}'


def length_faults(notebook):
    "Cells are short, exported ones shorter still (but for their parameters)"
    for place, source, _ in code_cells(notebook):
        lines = [x for x in source.splitlines() if x.strip() and not x.startswith('#|')]
        exported = re.search(r'(?m)^#\| *exports?\b', source)
        count, most = (len(lines) - signature_lines(source), MAX_EXPORTED) if exported else (len(lines), MAX_LINES)
        if count > most: yield f'{place}: {count} lines, {most} are allowed: {lines[0][:60]}'


def exercise_faults(notebook):
    "Three exercises: a cell to fill in, a check with a hint, a solution that is checked too"
    sources = [source for _, source, _ in code_cells(notebook)]
    stubs = sum(bool(re.search(r'(?m)^\w+ *= *\.\.\.', s)) for s in sources)
    if stubs != 3: yield f'{stubs} cells to fill in (name = ...), three exercises are wanted'
    prose = '\n'.join(joined(c['source']) for c in notebook['cells'] if c['cell_type'] == 'markdown')
    for n in (1, 2, 3):
        check = [s for s in sources if re.search(rf'(?m)^def check_{n}\(', s)]
        if len(check) != 1: yield f'{len(check)} definitions of check_{n}, one is wanted'
        elif 'not answered yet' not in check[0]: yield f'check_{n} has no hint for who has not answered yet'
        calls = sum(len(re.findall(rf'(?<!def )\bcheck_{n}\(', s)) for s in sources)
        if calls < 2: yield f'check_{n} is called {calls} times: the reader and the solution call it'
        if f'## Solution {n}' not in prose: yield f'no "## Solution {n}" in a collapsed block'


def signature_end(node, source):
    "The line of the colon that ends a definition's signature, and the lines that carry a comment"
    segment = source.splitlines()[node.lineno - 1:node.end_lineno]
    depth, end, comments, indent = 0, None, set(), re.match(r' *', segment[0])[0]
    text = '\n'.join(x.removeprefix(indent) for x in segment)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0] + node.lineno - 1
        if token.type == tokenize.COMMENT: comments.add(line)
        elif token.string in '([{' and token.type == tokenize.OP: depth += 1
        elif token.string in ')]}' and token.type == tokenize.OP: depth -= 1
        elif token.string == ':' and depth == 0 and end is None: end = line
    return end, comments


def definitions(tree):
    "(qualified name, node, is a method) of what a module exports: functions, classes, their methods"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        yield node.name, node, False
        if isinstance(node, ast.ClassDef):
            for o in node.body:
                if isinstance(o, ast.FunctionDef) and (o.name == '__init__' or not o.name.startswith('_')):
                    yield f'{node.name}.{o.name}', o, True


def docment_faults(source):
    "Each public function and class has a docstring, and each of its parameters a comment that says what it is"
    for name, node, method in definitions(ast.parse(source)):
        if not ast.get_docstring(node) and not name.endswith('.__init__'): yield f'{name} has no docstring'
        if not isinstance(node, ast.FunctionDef): continue
        end, comments = signature_end(node, source)
        a = node.args
        patched = any('patch' in ast.unparse(d) for d in node.decorator_list)
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        lines = [p.lineno for p in parameters]
        for p in parameters[int(method or patched):]:
            if p.end_lineno not in comments or p.end_lineno == end or lines.count(p.lineno) > 1:
                yield f'{name}: {p.arg} has no docment of its own'


def public_names(source):
    "`__all__` of an exported module"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []


def page_faults(source, page):
    "Each public name stands on the module's API page"
    shown = '\n'.join(joined(c['source']) for c in page['cells'])
    for name in public_names(source):
        if not re.search(rf'\b{name}\b', shown): yield f'{name} is not shown'


def read(path):
    "A notebook's JSON"
    return json.loads(path.read_text(encoding='utf-8'))


def is_lesson(notebook):
    "Whether a notebook is a numbered lesson: neither the home page nor the roof"
    return bool(re.match(r'\d\d[a-z]?\b', front_matter(notebook).get('title', '')))


every = pytest.mark.parametrize('path', NOTEBOOKS + PAGES, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
lesson = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
module = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.name)


def assert_none(faults):
    "All faults in one message"
    found = list(faults)
    assert not found, '\n'.join(found)


@every
def test_size(path):
    assert path.stat().st_size < MAX_BYTES


@every
def test_title(path):
    assert_none(title_faults(read(path)))


@every
def test_outputs(path):
    assert_none(output_faults(read(path), some=path not in PAGES))  # nbdev fills the API pages for the site


@every
def test_figures(path):
    assert_none(figure_faults(read(path)))


@every
def test_drafts(path):
    assert_none(draft_faults(read(path)))


@every
def test_lengths(path):
    assert_none(length_faults(read(path)))


@lesson
def test_exercises(path):
    notebook = read(path)
    assert is_lesson(notebook) == (path.name[:2].isdigit() and path.name != '99_cli.ipynb'), 'its title has its number'
    if is_lesson(notebook): assert_none(exercise_faults(notebook))


@module
def test_docments(path):
    assert_none(docment_faults(path.read_text(encoding='utf-8')))


@module
def test_api_page(path):
    if path.stem == 'cli': return  # its own notebook is its page
    page = ROOT/'nbs'/'api'/f'{path.stem}.ipynb'
    assert page.exists(), f'no nbs/api/{path.stem}.ipynb'
    assert_none(page_faults(path.read_text(encoding='utf-8'), read(page)))


# ---- the checks themselves see what is wrong

def cell(source, *outputs, kind='code'):
    "A made-up cell"
    return {'cell_type': kind, 'source': source, **({'outputs': list(outputs)} if kind == 'code' else {})}


def printed(text):
    "A made-up output"
    return {'output_type': 'stream', 'text': text}


PICTURE = {'output_type': 'display_data', 'data': {'image/png': 'aGVsbG8/home/x'}}
ERROR = {'output_type': 'error', 'ename': 'E', 'evalue': 'no'}
GOOD = {'cells': [cell('---\ntitle: "01 · A"\ndescription: "b"\n---', kind='raw'),
                  cell('#| fig-alt: "A seven, white on black"\nx;', PICTURE), cell('print(1)', printed('1 of 3/4'))] +
                 [c for n in '123' for c in (
                     cell(f'a{n} = ...'),
                     cell(f'def check_{n}(a):\n    if a is ...: return print("not answered yet: x")\ncheck_{n}(a{n})'),
                     cell(f'::: x\n## Solution {n}', kind='markdown'), cell(f'check_{n}(1)'))]}
BAD = {
    'no front matter': (title_faults, [cell('x', kind='markdown')], 2),
    'no description': (title_faults, [cell('---\ntitle: "a"\n---', kind='raw')], 1),
    'nothing saved': (output_faults, [cell('1')], 1),
    'an error': (output_faults, [cell('1', ERROR)], 1),
    'a path': (output_faults, [cell('1', printed('in /home/me/x.png'))], 1),
    'a path in HTML': (output_faults, [cell('1', {'output_type': 'x', 'data': {'text/html': ['"/Users/me/"']}})], 1),
    'no fig-alt': (figure_faults, [cell('x', PICTURE)], 1),
    'empty fig-alt': (figure_faults, [cell('#| fig-alt: ""\nx', PICTURE)], 1),
    'fig-alt alone': (figure_faults, [cell('#| fig-alt: "A seven, white on black"\nx')], 1),
    'a long cell': (length_faults, [cell('x = 1\n'*31)], 1),
    'a long exported cell': (length_faults, [cell('#| exports\n' + 'x = 1\n'*26)], 1),
    'a draft': (draft_faults, [cell('@@HERE', kind='markdown')], 1),
    'no exercises': (exercise_faults, [cell('1')], 10),
    'no hint': (exercise_faults, [cell(c['source'].replace('not answered yet', ''), kind=c['cell_type'])
                                  for c in GOOD['cells']], 3),
    'no solution is run': (exercise_faults, [c for c in GOOD['cells'] if c['source'] != 'check_2(1)'], 1),
}
FAULTS = [title_faults, output_faults, figure_faults, draft_faults, length_faults, exercise_faults]


@pytest.mark.parametrize('name', BAD)
def test_checks_see(name):
    check, cells, count = BAD[name]
    assert len(list(check({'cells': cells}))) == count


@pytest.mark.parametrize('check', FAULTS, ids=lambda f: f.__name__)
def test_checks_accept(check):
    assert list(check(GOOD)) == []


def test_docments_are_seen():
    good = 'def f(\n    a,  # one\n    b=(1, 2),  # two\n) -> int:  # three\n    "Doc"\n    return a\n'
    assert list(docment_faults(good)) == []
    assert list(docment_faults(good.replace('# two', ''))) == ['f: b has no docment of its own']
    assert list(docment_faults(good.replace('"Doc"', ''))) == ['f has no docstring']
    assert list(docment_faults('def f(a):  # what it returns\n    "Doc"')) == ['f: a has no docment of its own']
    method = 'class A:\n    "Doc"\n    def go(self, a):\n        "Doc"'
    assert list(docment_faults(method)) == ['A.go: a has no docment of its own']
    assert list(docment_faults('@patch\ndef go(self: A,\n    a,\n):\n    "Doc"')) == ['go: a has no docment of its own']
    assert list(docment_faults('def _f(a): pass')) == []


def test_missing_names_are_seen():
    page = {'cells': [cell('show_doc(one)'), cell('show_doc(twofold)')]}
    assert list(page_faults("__all__ = ['one', 'two']", page)) == ['two is not shown']
