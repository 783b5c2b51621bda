"tools/execute.py saves a notebook only when all of it ran; tools/chromium.py says what to do."
import stat

import chromium
import execute
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

OLD = [new_output('stream', text='saved long ago\n')]


def made(tmp_path, *sources):
    "A notebook with these code cells, each with an old output"
    path = tmp_path/'made.ipynb'
    cells = [new_markdown_cell('# Made up')] + [new_code_cell(s, outputs=OLD) for s in sources]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def outputs(path):
    "The text that each code cell printed"
    return [''.join(o.text for o in c.outputs) for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


SLEEPY = 'import time\nprint(4, end="", flush=True)\ntime.sleep(.5)\nprint(2)'
SOURCES = ['a = 20 + 1', SLEEPY, '#| slow\nprint("slow")', '#| eval: false\nprint("never")']


@pytest.mark.parametrize('words, slow', [([], 'saved long ago\n'), (['--slow'], 'slow\n')], ids=['quick', 'slow'])
def test_execute(tmp_path, capsys, words, slow):
    path = made(tmp_path, *SOURCES)
    assert execute.main([str(path), *words]) == 0
    assert outputs(path) == ['', '42\n', slow, 'saved long ago\n']
    assert [len(c.get('outputs', [])) for c in nbformat.read(path, 4).cells] == [0, 0, 1, 1, 1]  # streams are joined
    assert 'made.ipynb' in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ['made.ipynb']


def test_execute_leaves_what_failed(tmp_path, capsys):
    path = made(tmp_path, 'print(1)', '1/0')
    before = path.read_bytes()
    assert execute.main([str(path)]) == 1
    said = capsys.readouterr()
    assert path.read_bytes() == before and 'ZeroDivisionError' in said.err and 'FAILED' in said.out


def test_execute_knows_its_notebooks(capsys):
    with pytest.raises(SystemExit) as e: execute.main(['no.ipynb'])
    assert e.value.code == 2 and 'no.ipynb' in capsys.readouterr().err


def fake(tmp_path, said, code=0):
    "A program that says something about its version"
    path = tmp_path/'chromium'
    path.write_text(f'#!/bin/sh\necho {said}\nexit {code}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_chromium_is_found(tmp_path, monkeypatch, capsys):
    path = fake(tmp_path, 'Chromium 1.2.3')
    monkeypatch.delenv('CHROMIUM', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    chromium.main()
    assert capsys.readouterr().out == path + '\n'


def test_named_chromium(tmp_path, monkeypatch, capsys):
    path = fake(tmp_path, 'Chromium 1.2.3')
    monkeypatch.setenv('CHROMIUM', path)
    chromium.main()
    assert capsys.readouterr().out == path + '\n'
    monkeypatch.setenv('CHROMIUM', '/no/such/program')
    with pytest.raises(SystemExit, match='CHROMIUM=/no/such/program'): chromium.main()


@pytest.mark.parametrize('said, code', [('Chromium', 1), ('"Firefox 3"', 0)])
def test_what_does_not_start(tmp_path, said, code):
    assert not chromium.starts(fake(tmp_path, said, code))


def test_no_chromium(monkeypatch, capsys):
    monkeypatch.delenv('CHROMIUM', raising=False)
    monkeypatch.setattr(chromium, 'find', lambda: None)
    monkeypatch.setattr(chromium, 'install', lambda: None)
    with pytest.raises(SystemExit, match='apt-get install -y chromium'): chromium.main()
    assert not capsys.readouterr().out
