"""Build the playground: a page that runs the course's models in the reader's browser (`playground/`).

`tools/site.py` puts it into the site; `python tools/playground.py FOLDER` builds it alone. `sdcourse.export` makes
ONNX files of the models, the runtime comes from npm, pinned by the lockfile. Both are costly, so they are kept in
`build/playground`, and made anew when what they are made of has changed.
"""
import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = 'ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'
PARTS = {'scenes': ['unet', 'text_encoder', 'vae_decoder', 'vae_encoder'], 'digits': ['unet']}
LATER = 'vae_encoder'  # not loaded before a visitor starts from a picture


class PlaygroundError(Exception):
    "What is missing, in one line."


def fingerprint(*paths: Path, also='') -> str:
    "A short hash of the contents of files and folders, their names, and `also`."
    found = hashlib.sha256(also.encode())
    for path in sorted(p for o in paths for p in ([o] if o.is_file() else o.rglob('*')) if p.is_file()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def kept(cache: Path, name: str, key: str, make) -> Path:
    "The folder that `make(folder)` fills, made only where none of this key is there; older ones are removed."
    folder = cache/f'{name}-{key}'
    if folder.is_dir(): return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as new:
        make(made := Path(new)/'made')
        for old in cache.glob(f'{name}-*'): shutil.rmtree(old)
        made.rename(folder)
    return folder


def compress(path: Path):
    "Put a compressed file in the place of a file"
    path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    path.unlink()


def install_runtime(source: Path, folder: Path):
    "The two files of onnxruntime-web that the page needs, by npm"
    if missing := [name for name in ('node', 'npm') if not shutil.which(name)]:
        raise PlaygroundError(f'the playground needs Node.js 18 or newer with npm; no {" and no ".join(missing)} here '
                              '(Debian, Ubuntu: apt-get install nodejs npm)')
    folder.mkdir()
    for name in ('package.json', 'package-lock.json'): shutil.copy(source/name, folder)
    command = [shutil.which('npm'), 'ci', '--ignore-scripts', '--no-audit', '--no-fund']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode: raise PlaygroundError(f'npm ci failed: {done.stderr.strip()}')
    for name in RUNTIME: shutil.copy(folder/'node_modules/onnxruntime-web/dist'/name, folder)
    shutil.rmtree(folder/'node_modules')
    compress(folder/RUNTIME[1])


def export_model(mode: str, folder: Path):
    "A model as ONNX files whose weights are as exact as the shipped ones"
    from sdcourse.export import export_onnx
    export_onnx(mode, folder, 'float16')
    for path in folder.glob('*/model.onnx'): compress(path)


def grammar() -> dict:
    "The words of the scenes' captions (lesson 01)."
    from sdcourse import data
    return dict(inks=data.INKS, strokes=data.STROKES, relations=data.RELATIONS, italian=data._ITALIAN_WORDS,
                digits=dict(en=data._ENGLISH, it=data._ITALIAN))


def place(source: Path, target: Path) -> dict:
    "Copy a file; how many bytes it has, and an address that changes with it"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(source, target)
    content = target.read_bytes()
    address = f'{target.parent.name}/{target.name}?v={hashlib.sha256(content).hexdigest()[:8]}'
    return dict(url=address, bytes=len(content))


def describe(mode: str, model: Path, files: dict) -> dict:
    "What the page must know of a model, and how many bytes it loads to begin"
    export = json.loads((model/'export.json').read_text(encoding='utf-8'))
    about = {k: export[k] for k in ('latents', 'factor', 'scaling_factor', 'scheduler') if k in export}
    if mode == 'scenes':
        merges = (model/'tokenizer/merges.txt').read_text(encoding='utf-8').splitlines()[1:]
        about |= dict(vocab=json.loads((model/'tokenizer/vocab.json').read_text(encoding='utf-8')), merges=merges,
                      model_max_length=export['tokenizer']['model_max_length'], grammar=grammar(),
                      width=json.loads((model/'text_encoder/config.json').read_text())['hidden_size'])
    return dict(about, files=files, bytes=sum(f['bytes'] for name, f in files.items() if name != LATER))


def build(
    source: Path, # the folder `playground` with the page's own files
    out: Path, # where the page shall be; it must not be there yet
    cache: Path=ROOT/'build/playground', # for what is costly
):
    "Everything that a static host needs to serve."
    me, code = Path(__file__), (ROOT/'sdcourse').glob('*.py')
    exporter = fingerprint(me, *code, also=' '.join(version(o) for o in ('torch', 'onnx', 'onnxscript')))
    lock = fingerprint(me, source/'package-lock.json')
    runtime = kept(cache, 'runtime', lock, lambda folder: install_runtime(source, folder))
    out.mkdir(parents=True)
    for pattern in ('*.html', '*.css', '*.js'):
        for path in source.glob(pattern): shutil.copy(path, out)
    shutil.copy(runtime/RUNTIME[0], out)
    shared = dict(runtime=dict(url=RUNTIME[0], bytes=(out/RUNTIME[0]).stat().st_size),
                  wasm=place(runtime/f'{RUNTIME[1]}.gz', out/'runtime'/f'{RUNTIME[1]}.gz'))
    about = {}
    for mode, parts in PARTS.items():
        key = fingerprint(ROOT/'sdcourse/pretrained'/mode, also=exporter)
        model = kept(cache, mode, key, lambda folder, mode=mode: export_model(mode, folder))
        files = {part: place(model/part/'model.onnx.gz', out/mode/f'{part}.onnx.gz') for part in parts}
        about[mode] = describe(mode, model, {**shared, **files})
    (out/'model.json').write_text(json.dumps(about, ensure_ascii=False, separators=(',', ':')), encoding='utf-8')


def main(argv=None) -> int:
    "The command line; exit code 1 says what is missing."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('out', type=Path, help='the output folder; it must not be there yet')
    p.add_argument('--source', type=Path, default=ROOT/'playground', help="the page's own files")
    args, start = p.parse_args(argv), time.time()
    if args.out.exists(): p.error(f'{args.out} is there already')
    try: build(args.source, args.out)
    except PlaygroundError as e:
        print(f'The playground was not built: {e}', file=sys.stderr)
        return 1
    size = sum(p.stat().st_size for p in args.out.rglob('*') if p.is_file())
    print(f'{args.out}: {size/1e6:.1f} MB, in {time.time() - start:.0f} s')
    return 0


if __name__ == '__main__': sys.exit(main())
