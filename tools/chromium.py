"Print the path of a Chromium that starts; install one where there is none: `python tools/chromium.py`."
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome']
APPS = ['Chromium.app/Contents/MacOS/Chromium', 'Google Chrome.app/Contents/MacOS/Google Chrome']

HELP = """No Chromium was found, and none could be installed. The browser tests need one:
  Debian, Ubuntu (as root)   apt-get update && apt-get install -y chromium
  Fedora                     dnf install chromium
  macOS                      brew install --cask chromium
  anywhere else              python -m playwright install --with-deps chromium
Or name one that you have: CHROMIUM=/path/to/chromium make test"""


def starts(path):
    "Whether the program at `path` is a Chromium that runs (Ubuntu's `chromium-browser` may be an empty shell)"
    try: done = subprocess.run([path, '--version'], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired): return False
    return done.returncode == 0 and 'chrom' in done.stdout.lower()


def playwrights():
    "Where Playwright keeps its own Chromium, whether it is there or not"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: return p.chromium.executable_path


def candidates():
    "Every place where a Chromium may be, best first"
    yield from filter(None, map(shutil.which, NAMES))
    yield from (str(folder/app) for folder in (Path('/Applications'), Path.home()/'Applications') for app in APPS)
    yield playwrights()


def find():
    "The first Chromium that starts, or None"
    return next((path for path in candidates() if Path(path).is_file() and starts(path)), None)


def install():
    "Try the system's packages, then Playwright's download; what they print goes to stderr"
    def attempt(*command):
        print('+', *command, file=sys.stderr, flush=True)
        return subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode == 0
    root = hasattr(os, 'geteuid') and os.geteuid() == 0
    if root and shutil.which('apt-get'):
        os.environ.setdefault('DEBIAN_FRONTEND', 'noninteractive')
        attempt('apt-get', '-qq', 'update')
        if attempt('apt-get', '-qq', 'install', '-y', 'chromium') and (path := find()): return path
    attempt(sys.executable, '-m', 'playwright', 'install', *['--with-deps']*root, 'chromium')
    return find()


def main():
    "Print the path, or say what to do and exit with 1"
    if named := os.environ.get('CHROMIUM'):
        if not starts(named): sys.exit(f'CHROMIUM={named} is no Chromium that starts')
        return print(named)
    path = find() or install()
    if path is None: sys.exit(HELP)
    print(path)


if __name__ == '__main__': main()
