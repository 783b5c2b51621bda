"The benchmarks that lesson 17 gathers: a little of each runs, prints its tables and writes the same numbers."
import json
import subprocess
import sys

import pytest

FOUR = {'lesson 12 (bfloat16)', 'diffusers, usual loop', 'lesson 12 in float32', 'diffusers, helped'}


@pytest.fixture
def quick(root, tmp_path):
    "A function that runs a benchmark: what it printed, and what it wrote"
    def run(name, *words):
        command = [sys.executable, root/'benchmarks'/f'{name}.py', '--quick', '--device', 'cpu', *words]
        done = subprocess.run([*command, '--json', tmp_path/'a.json'], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path/'a.json').read_text())
        assert found['machine']['device'] == 'cpu' and all(name in done.stdout for name in found.get('goals', ()))
        return done.stdout, found
    return run


def test_training(quick):
    said, found = quick('training')
    assert {*found['speed']} == FOUR and all(name in said for name in FOUR)
    assert all(len(values) == 1 and values[0] > 0 for values in found['speed'].values())
    assert all(200 < value < 20_000 for values in found['memory'].values() for value in values), 'MiB of a process'


def test_growth(quick):
    said, found = quick('growth')
    for name, exponent in (('side', 2), ('batch', 1), ('channels', 2)):
        rows, fits = (found['growth'][name][key] for key in ('rows', 'fits'))
        assert len(rows) == 3 and name in said and [row[name] for row in rows] == sorted(row[name] for row in rows)
        assert abs(fits['forward, multiplications']['exponent'] - exponent) < .35
        for row in rows:  # backward multiplies twice for each time that forward does, but for the first layer
            assert 2.5 < row['training, multiplications']/row['forward, multiplications'] < 3.01
            assert 0 < row['forward, MB'] < row['training, MB']


def test_limits(quick):
    said, found = quick('limits')
    assert {*found['limits']} == {'float32', 'bfloat16'} and len(found['seconds']) == 10
    assert found['flop']['product, float32'] == 2*128**3
    assert found['flop']['lesson 12, sampling, batch 32'] == 16*found['flop']['lesson 12, sampling, batch 2']
    assert all(name in said and 0 < share < 2 for name, share in found['shares'].items())
    assert max(share for name, share in found['shares'].items() if name.endswith(', float32')) == 1


def test_scenes(quick):
    said, found = quick('scenes')
    assert found['right']['all']['prompts'] == 60 and len(found['goals']) == 5 and found['seconds'][0] > 0
    assert all(0 <= row['all'] <= row['digit'] <= 1 and kind in said for kind, row in found['right'].items())


def test_gradients(root, tmp_path):
    command = [sys.executable, root/'benchmarks'/'gradients.py', '--repeats', '1', '--json', tmp_path/'a.json']
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads((tmp_path/'a.json').read_text())['seconds']
    assert len(found) == 9 and all(name in said and len(took) == 1 and took[0] > 0 for name, took in found.items())
    assert found['784 nudges of a pixel'][0] > 10*found['one backward pass to the pixels'][0]


@pytest.mark.slow
def test_peers(quick):
    said, found = quick('peers')
    assert len(found['rivals']) == 4 and all(name in said for name in found['rivals'])
    for row in found['rivals'].values():
        assert row['steps'] >= 1 and row['seconds'] < 60 and row['weights'] > 10_000
        assert row['fid']['value'] > 5*found['floor']['fid']['value'], 'nobody draws well after two seconds'
    assert found['floor']['label_accuracy']['value'] > .95


@pytest.mark.parametrize('name, words, said', [
    ('training', '--batch 0', '--batch must be'), ('growth', '--repeats 0', '--repeats must be'),
    ('limits', '--repeats 0', '--repeats must be'), ('peers', '--seconds 0', '--seconds must be above 0'),
    ('peers', '--n 100', '--n must lie between')])
def test_wrong(root, name, words, said):
    command = [sys.executable, root/'benchmarks'/f'{name}.py', *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and not done.stdout
