"What every test shares: the checkout's places, two threads at most, no hub."
import os
import sys
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'  # before anything imports huggingface_hub; nothing here may need the network
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/'tools'))  # last: tools/site.py must not hide Python's own
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()


@pytest.fixture(scope='session')
def root():
    "The checkout"
    return ROOT


@pytest.fixture(scope='session')
def source(root, tmp_path_factory):
    "A copy of what git knows or would know of the checkout: builds and exports happen there"
    import shutil
    import subprocess
    copy = tmp_path_factory.mktemp('source')
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (root/name).is_file():
            (copy/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/name, copy/name)
    return copy


def devices():
    "The kinds of device that this machine has"
    import torch
    return ['cpu'] + ['cuda']*torch.cuda.is_available() + ['mps']*torch.backends.mps.is_available()


@pytest.fixture(params=devices())
def device(request):
    "Each device in turn"
    return request.param


@pytest.fixture(scope='session')
def chromium():
    "A real Chromium"
    import chromium as tool
    path = os.environ.get('CHROMIUM') or tool.find()
    if not path: pytest.fail('no Chromium: set CHROMIUM to one (`python tools/chromium.py` finds or installs it)')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
