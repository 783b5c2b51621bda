"""The playground: its JavaScript against Python's numbers (in Node.js), and the page as it is built in a real browser.

`SITE=_docs pytest tests/test_playground.py` looks at a site that is built already; `SCREENSHOTS=folder` keeps pictures.
"""
import base64
import functools
import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from contextlib import chdir

import numpy as np
import pytest
import torch
from PIL import Image

from sdcourse.digits import SCHEDULER as DIGITS
from sdcourse.digits import make_scheduler as first_scheduler
from sdcourse.pipeline import StableDiffusionPipeline, parse_weights, token_rows, unknown_words
from sdcourse.schedulers import make_scheduler

SCENE = dict(mode='scenes', prompt='a bold red seven above a blue 3', negative='', guidance=4, steps=25,
             scheduler='ddim', seed=0, view='x0', strength=.8, image='')
DIGIT = dict(mode='digits', prompt='7', guidance=1.5, steps=25, scheduler='ddim', seed=0, view='x0')


@pytest.fixture(scope='session')
def page(root, tmp_path_factory):
    "The folder of the built page"
    if 'SITE' in os.environ: return (root/os.environ['SITE']/'playground').resolve()
    import playground
    out = tmp_path_factory.mktemp('playground')/'sub'/'path'/'playground'
    playground.build(root/'playground', out)
    return out


@pytest.fixture(scope='session')
def node(root, page):
    "Calls functions of the page's JavaScript: a list of [name, *arguments] gives the list of results"
    if not shutil.which('node'): pytest.fail('no Node.js: these tests need `node`, version 18 or newer')
    def node(*calls):
        done = subprocess.run(['node', root/'tests/playground.mjs', page], input=json.dumps(calls), capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return node


@pytest.fixture(scope='session')
def pipe(): return StableDiffusionPipeline.from_pretrained('scenes')


def close(found, expected, tolerance, before=0.):
    "Whether numbers agree, relative to the largest; and to Python's float32, where larger ones came `before`"
    expected = np.asarray(expected, dtype=np.float64).ravel()
    assert np.abs(np.ravel(found) - expected).max() <= tolerance*max(1, np.abs(expected).max()) + 5e-7*float(before)


def as_image(picture):
    "A picture as the page has it, as an array (h,w,3)"
    return np.array(picture['data'], dtype=np.uint8).reshape(picture['height'], picture['width'], 4)[..., :3]


def test_missing_npm_is_named_in_one_line(root, tmp_path, monkeypatch):
    import playground
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(playground.PlaygroundError, match='needs Node.js 18 or newer with npm; no node and no npm') as e:
        playground.install_runtime(root/'playground', tmp_path/'runtime')
    assert '\n' not in str(e.value)


def test_all_of_the_page_is_kept_for_use_offline(page):
    listed = re.findall(r"'([^']+)'", re.search(r'const PAGE = \[(.*?)\]', (page/'sw.js').read_text(), re.DOTALL)[1])
    assert {*listed} == {'./', *(p.name for p in page.iterdir() if p.is_file() and p.name != 'sw.js')}


# ---- its JavaScript, in Node.js

def test_a_seed_means_the_same_noise(node):
    seeds, counts = [0, 1, 42, 2**31, 2**32 - 1], [256, 16, 784*3, 17, 100, 256]
    for seed, found in zip(seeds, node(*[['randn', seed, *counts] for seed in seeds])):
        generator = torch.Generator().manual_seed(seed)
        for n, x in zip(counts, found): close(x, torch.randn(n, generator=generator), 1e-6)
    few, = node(['randn', 0, 8])
    assert few['error'].startswith('RangeError: randn draws 16 numbers or more') and few['error'].endswith('got 8')


def odd_texts():
    "Texts of any letters, signs, spaces and accents, always the same"
    ranges = [(32, 127), (9, 14), (160, 700), (0x300, 0x340), (0x1c, 0x20), (0x2000, 0x2070), (0x4e00, 0x4e20),
              (0x1f600, 0x1f640), (0x130, 0x132), (0x3a0, 0x3d0), (0x85, 0x86)]
    generator = random.Random(0)
    def letter(): return chr(generator.randrange(*generator.choice(ranges)))
    return [''.join(letter() for _ in range(generator.randrange(1, 30))) for _ in range(300)]


PROMPTS = ['', 'a bold red seven above a blue 3', 'UN SETTE   rosso\tsopra un 3 blu', "it's 12 o'clock, we'll see",
           'a cat', 'perché così', 'perche\u0301 cosi\u0300', '<|endoftext|> a <|STARTOFTEXT|> b',
           'a (bold:1.4) red (seven:.5) 3 (x:2.)',
           '(red:0)', '((red:1.5))', 'seven '*40, 'x²y₃ Ⅷ ½', '７ ٣', 'ß ẞ İ ς Σ', 'a\x85b\x1cc\ufeffd\u200be']


def test_same_tokens(node, pipe):
    texts = PROMPTS + odd_texts()
    found = [node(*[[name, text] for text in texts]) for name in ('rows', 'weights', 'unknown')]
    for text, row, weights, unknown in zip(texts, *found):
        ids, expected = token_rows(pipe.tokenizer, text)
        assert row['ids'] == ids.tolist(), text
        close(row['weights'], expected, 1e-6)
        assert [tuple(o) for o in weights] in (parse_weights(text), [o for o in parse_weights(text) if o[0]]), text
        assert unknown == unknown_words(pipe.tokenizer, text), text


def test_prompts_at_random_are_in_the_grammar(node, pipe):
    prompts, = node(['prompts', 200])
    assert len(set(prompts)) > 150 and not unknown_words(pipe.tokenizer, ' '.join(prompts))
    assert any(' sopra ' in p for p in prompts) and any(' left of ' in p for p in prompts)


def test_it_says_what_a_prompt_lacks(node):
    said = node(*[['remarks', text] for text in ('a cat', 'a red 1 above a due 3', 'red', 'a blue uno', '')])
    assert '“cat”' in said[0][0] and 'c·a·t' in said[0][0] and 'here are 3' in said[1][0] and 'No digit' in said[2][0]
    assert said[3:] == [[], []]


SCHEDULERS = {
    'scenes': {'DDIM': 'ddim', 'EulerAncestral': 'euler_a', 'DPMSolver': 'dpm++'},
    'digits': {'DigitsDDIM': 'ddim', 'DigitsDDPM': 'ddpm', 'EulerAncestral': 'euler_a', 'DPMSolver': 'dpm++'}}
PLANS = [(mode, kind) for mode, kinds in SCHEDULERS.items() for kind in kinds]


def reference(pipe, mode, kind):
    "Python's scheduler of that name"
    name = SCHEDULERS[mode][kind]
    if kind.startswith('Digits'): return first_scheduler(name, **DIGITS)
    return make_scheduler(name, **(pipe.scheduler.config if mode == 'scenes' else DIGITS))


@pytest.mark.parametrize('mode', ['scenes', 'digits'])
def test_same_noise_schedule(node, pipe, mode):
    curve, = node(['curve', mode])
    expected = reference(pipe, mode, 'DDIM' if mode == 'scenes' else 'DigitsDDIM').alphas_cumprod.double().numpy()
    assert np.abs(np.array(curve)/expected - 1).max() < 1e-6


@pytest.mark.parametrize(['mode', 'kind'], PLANS)
def test_same_timesteps(node, pipe, mode, kind):
    scheduler = reference(pipe, mode, kind)
    for n, found in enumerate(node(*[['plan', mode, kind, n] for n in range(1, 51)]), 1):
        scheduler.set_timesteps(n)
        assert found == [float(t) for t in scheduler.timesteps], n


@pytest.mark.parametrize(['mode', 'kind'], PLANS)
def test_same_steps(node, pipe, mode, kind):
    "From the same answers of a model the same pictures, step by step, from noise and from a picture"
    starts = [(n, begin) for n in (1, 2, 3, 7, 16, 30) for begin in {0, n//3}]
    if kind.startswith('Digits'): starts = [(n, 0) for n, begin in starts if begin == 0]
    make = torch.Generator().manual_seed(5)
    cases = [{name: torch.randn(shape, generator=make) for name, shape in
              dict(x0=(4, 14, 14), eps=(4, 14, 14), vs=(n - begin, 4, 14, 14)).items()} for n, begin in starts]
    calls = [['steps', mode, kind, n, {k: v.flatten(-3).tolist() for k, v in case.items()} | dict(begin=begin, seed=9)]
             for (n, begin), case in zip(starts, cases)]
    for (n, begin), case, found in zip(starts, cases, node(*calls)):
        scheduler, generator = reference(pipe, mode, kind), torch.Generator().manual_seed(9)
        scheduler.set_timesteps(n)
        assert abs(found['initNoiseSigma']/float(scheduler.init_noise_sigma) - 1) < 1e-5
        times, x0 = scheduler.timesteps[begin:], case['x0'][None]
        if kind.startswith('Digits'):
            abar = scheduler.alphas_cumprod[times[0]]
            x = abar.sqrt()*x0 + (1 - abar).sqrt()*case['eps']
        else:
            if begin: scheduler.set_begin_index(begin)
            x = scheduler.add_noise(x0, case['eps'][None], times[:1])
        before = 0.
        for t, v, step in zip(times, case['vs'], found['found']):
            close(step['seen'], scheduler.scale_model_input(x, t), 2e-5, before)
            done = scheduler.step(v[None], t, x, generator=generator)
            close(step['x0'], done.pred_original_sample, 2e-5, before)
            before, x = max(before, x.abs().max()), done.prev_sample
            if x.isnan().any():  # far from large to small sigmas, Python's goal² - up² may round to below 0
                assert (mode, kind) == ('digits', 'EulerAncestral') and n == 3 and np.isfinite(step['x']).all()
                break
            close(step['x'], x, 2e-5, before)


def picture_of(image):
    "What a canvas would give of a picture: four bytes a pixel"
    return list(image.convert('RGBA').tobytes())


def drawing():
    "A yellow bar and a blue one"
    image = Image.new('RGB', (64, 64))
    image.paste((255, 230, 40), (28, 6, 36, 30))
    image.paste((40, 80, 255), (26, 36, 40, 60))
    return image


def in_address(image):
    "A picture as the page's address has it"
    image.save(file := io.BytesIO(), format='PNG')
    return base64.urlsafe_b64encode(file.getvalue()).decode().rstrip('=')


def run_python(code, folder):
    "Run lines of Python as a reader would; the picture that they save, as an array (h,w,3)"
    with chdir(folder): exec(compile(code, 'copied', 'exec'), {})
    saved, = folder.glob('*.png')
    return np.asarray(Image.open(saved).convert('RGB')).astype(int)


WISHES = {
    'as it opens': SCENE, 'Euler ancestral': SCENE | dict(scheduler='euler_a', seed=3, steps=12),
    'DPM-Solver++': SCENE | dict(scheduler='dpm++', steps=8, seed=2**32 - 1),
    'negative': SCENE | dict(prompt='un sette "rosso"', negative='blue\\', steps=6, guidance=2.5),
    'without guidance': SCENE | dict(guidance=1, steps=5), 'no prompt': SCENE | dict(guidance=0, steps=5),
    'weights': SCENE | dict(prompt='a (bold:1.6) red seven above a (blue:.4) 3', steps=5),
    'long': SCENE | dict(prompt='a cat and a dog and a bold red seven above a blue 3', negative='x', steps=5),
    'from a picture': SCENE | dict(image=in_address(drawing()), strength=.6, steps=10),
    'picture, Euler ancestral': SCENE | dict(image=in_address(drawing()), strength=.35, steps=20, scheduler='euler_a'),
    'picture, DPM-Solver++': SCENE | dict(image=in_address(drawing()), strength=1, steps=9, scheduler='dpm++'),
    'a digit': DIGIT, 'fresh noise': DIGIT | dict(scheduler='ddpm', prompt='2025', steps=12, seed=4),
    'digits, Euler ancestral': DIGIT | dict(scheduler='euler_a', prompt='30', guidance=3),
    'digits, DPM-Solver++': DIGIT | dict(scheduler='dpm++', prompt='4', steps=10),
    'digits, as learned': DIGIT | dict(guidance=1, steps=7), 'any digit': DIGIT | dict(guidance=0, steps=7)}


@pytest.fixture(scope='session')
def drawn(node):
    "What the page's JavaScript draws and says in Python, for each of `WISHES`"
    def call(wish): return wish | dict(image=picture_of(drawing()) if wish.get('image') else None)
    pictures = node(*[['draw', call(wish)] for wish in WISHES.values()])
    return dict(zip(WISHES, zip(pictures, node(*[['python', wish] for wish in WISHES.values()]))))


@pytest.mark.filterwarnings('ignore:not in the vocabulary')
@pytest.mark.parametrize('name', WISHES)
def test_the_same_in_python_draws_the_same_picture(drawn, tmp_path, name):
    found, code = drawn[name]
    assert 'error' not in found, found
    difference = np.abs(as_image(found['picture']) - run_python(code, tmp_path))
    assert difference.max() <= 2 and difference.mean() < .1, f'{difference.max()}, {difference.mean():.3f} on average'


def test_same_latents_with_guidance(node, pipe):
    "Each step of Python's loop, from latents that are given"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(77))
    wish = SCENE | dict(negative='a blue 3', steps=9)
    found, = node(['draw', wish | dict(latents=latents.flatten().tolist(), image=None)])
    steps = pipe.denoise(wish['prompt'], wish['negative'], num_inference_steps=9, guidance_scale=4., latents=latents)
    for mine, step in zip(found['steps'], steps, strict=True):
        assert (mine['i'], mine['of'], mine['t']) == (step.i, step.of, float(step.t))
        for name, expected in (('x', step.xt), ('x0', step.x0), ('eps', step.eps)): close(mine[name], expected, 1e-4)
    from sdcourse.images import latents_to_rgb, to_pil
    x = step.xt/step.xt.std().clamp(min=1)
    assert np.abs(as_image(found['falseColours']).astype(int) - np.asarray(to_pil(latents_to_rgb(x)[0]))).max() <= 1


def test_too_little_strength_is_named(node):
    found, = node(['draw', SCENE | dict(image=picture_of(drawing()), strength=.05, steps=10)])
    assert found['error'] == 'RangeError: strength 0.05 of 10 steps leaves none; at least 0.1 is needed'


def test_the_address_holds_everything(node):
    for wish in WISHES.values():
        address, = node(['write', wish, 3])
        found, = node(['read', '', address])
        assert found == dict(settings=wish, step=3, complaints=[])
    found, = node(['read', '?prompt=one&steps=4', '#steps=5'])
    assert found['settings']['prompt'] == 'one' and found['settings']['steps'] == 5


@pytest.mark.parametrize(['bad', 'allowed'], [
    ('steps=0', 'a whole number from 1 to 50'), ('steps=2.5', 'a whole number from 1 to 50'),
    ('guidance=x', 'a number from 0 to 12'), ('guidance=', 'a number from 0 to 12'),
    ('scheduler=heun', 'ddim, euler_a, dpm++'), ('seed=-1', 'a whole number from 0 to 4294967295'),
    ('mode=video', 'scenes, digits'), ('image=%3Cb%3E', 'a PNG file in base64url'),
    ('mode=digits&prompt=12345', 'one to four digits')])
def test_a_bad_address_is_named(node, bad, allowed):
    found, = node(['read', '?' + bad, ''])
    complaint, = found['complaints']
    assert allowed in complaint and bad.rpartition('=')[2].replace('%3C', '<').replace('%3E', '>') in complaint


# ---- the page, in a real browser

class Counting(http.server.SimpleHTTPRequestHandler):
    "A file server that prints nothing and remembers what it gave: paths and bytes"
    given = []

    def do_GET(self):
        super().do_GET()
        path = self.translate_path(self.path)
        if os.path.isfile(path): self.given.append((self.path, os.path.getsize(path)))

    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def address(root, page):
    "The page under a path of its own on this machine, as a plain static host would have it"
    if not (page.parent/'favicon.svg').exists(): shutil.copy(root/'nbs/favicon.svg', page.parent)
    handler = functools.partial(Counting, directory=str(page.parent.parent))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/{page.parent.name}/{page.name}/'
    server.shutdown()


@pytest.fixture(scope='module')
def visits(chromium, address):
    "Opens the page in a window of its own; what it logs as an error, and requests to elsewhere, are kept in `faults`"
    contexts, faults = [], []

    def visit(where='', width=1280, scheme='light', before='', **more):
        context = chromium.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme, **more)
        contexts.append(context)
        own = address, 'data:', f'blob:{address[:address.index("/", 8)]}', address.replace('playground/', 'favicon.svg')
        context.on('request', lambda r: None if r.url.startswith(own) else faults.append(f'request: {r.url}'))
        context.on('weberror', lambda e: faults.append(str(e.error)))
        if before: context.add_init_script(before)
        page = context.new_page()
        page.on('console', lambda m: faults.append(m.text) if m.type == 'error' else None)
        page.set_default_timeout(300_000)  # a busy machine
        page.goto(address + where)
        return page

    visit.faults = faults
    yield visit
    for c in contexts: c.close()


@pytest.fixture
def visit(visits):
    "The same; faults fail the test at its end"
    visits.faults.clear()
    yield visits
    assert not visits.faults


def finish(page):
    "Wait for the end of a drawing; the picture, as an array (h,w,3)"
    page.wait_for_selector('.stage[aria-busy="false"] #time:not([hidden])')
    return look(page)


def look(page, canvas='picture'):
    "What a canvas shows"
    width, height, data = page.evaluate('''id => { const c = document.getElementById(id)
        return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]] }''', canvas)
    return as_image(dict(width=width, height=height, data=data)).astype(int)


def until(page, condition):
    "Wait for a condition in JavaScript (Playwright's own way to wait is what the page's security policy forbids)"
    end = time.monotonic() + 60
    while not page.evaluate(condition): assert time.monotonic() < end, condition


def says(page, name, text):
    "Wait until an element says something"
    until(page, f'document.getElementById({name!r}).textContent.includes({text!r})')


def load(page):
    "Load the model and wait for the first picture"
    page.click('#load')
    return finish(page)


def go(page, **wish):
    "Change the address by hand"
    before = page.get_attribute('#stage', 'data-wish')
    page.evaluate('hash => { location.hash = hash }', '&'.join(f'{k}={v}' for k, v in wish.items()))
    until(page, f'document.getElementById("stage").dataset.wish != {before}')
    return finish(page)


@pytest.fixture(scope='module')
def live(visits):
    "A page with its model loaded, for many tests"
    page = visits(permissions=['clipboard-read', 'clipboard-write'], accept_downloads=True)
    load(page)
    return page


def keep(page, name):
    "Keep a picture of the page, if that is wanted"
    if 'SCREENSHOTS' in os.environ: page.screenshot(path=f'{os.environ["SCREENSHOTS"]}/{name}.png', full_page=True)


def difference(a, b):
    "The largest difference of two pictures"
    return np.abs(a - b).max()


def test_loads_nothing_big_before_the_click_and_then_what_it_says(visit):
    Counting.given.clear()
    page = visit()
    page.wait_for_selector('#load')
    until(page, '!!navigator.serviceWorker.controller')
    said = float(re.search(r'([\d.]+) MB', page.inner_text('#load'))[1])
    assert sum(size for _, size in Counting.given) < 1e6 and not any('.gz' in path for path, _ in Counting.given)
    assert look(page).std() > 20, 'noise is shown'
    keep(page, 'before')
    load(page)
    big = {path: size for path, size in Counting.given if '.gz' in path or 'ort.' in path}
    assert abs(sum(big.values())/1e6 - said) < .06, big
    page.check('#from-picture')
    finish(page)
    sizes = dict(Counting.given)
    assert any('vae_encoder' in path for path in sizes) and 10e6 < sum(sizes.values()) <= 24e6, sizes


def test_a_typed_prompt_is_drawn_as_python_draws_it(visit, live, pipe):
    go(live, seed=1)
    live.fill('#prompt', '')
    live.type('#prompt', 'un due verde sopra un 5 rosa')
    found = finish(live)
    expected = pipe('un due verde sopra un 5 rosa', num_inference_steps=25, guidance_scale=4.,
                    generator=torch.Generator().manual_seed(1)).images[0]
    assert difference(found, np.asarray(expected).astype(int)) <= 2
    assert re.fullmatch(r'25 steps in \d+\.\d s, here in your browser.', live.inner_text('#status'))
    assert not live.inner_text('#remarks')


def test_every_control_changes_picture_and_address(visit, live):
    go(live, steps=8)
    def move(act, *said):
        before = look(live)
        act()
        live.wait_for_timeout(250)  # the address follows
        after = finish(live)
        assert difference(before, after) > 10, said
        for part in said: assert part in live.url, live.url
    move(lambda: live.fill('#prompt', 'a pink 5'), 'prompt=a+pink+5')
    move(lambda: live.locator('#suggestions button').nth(1).click(), 'sette')
    move(lambda: live.click('#another'))
    move(lambda: live.fill('#negative', 'thin'), 'negative=thin')
    move(lambda: live.fill('#guidance', '7.5'), 'guidance=7.5')
    move(lambda: live.fill('#steps', '5'), 'steps=5')
    for name in ('euler_a', 'dpm++', 'ddim'): move(lambda name=name: live.select_option('#scheduler', name))
    move(lambda: live.fill('#seed', '12'), 'seed=12')
    move(lambda: live.click('#dice'))
    move(lambda: live.check('#from-picture'), 'image=', 'strength=0.8')
    move(lambda: live.fill('#strength', '0.6'), 'strength=0.6')
    live.click('#inks label[title=yellow]')
    box = live.locator('#board').bounding_box()
    def draw():
        live.mouse.move(box['x'] + 60, box['y'] + 60)
        live.mouse.down()
        live.mouse.move(box['x'] + 160, box['y'] + 60, steps=5)
        live.mouse.move(box['x'] + 90, box['y'] + 190, steps=5)
        live.mouse.up()
    move(draw)
    assert (look(live, 'board') == [255, 230, 40]).all(-1).sum() > 100
    live.click('#pen')
    assert live.get_attribute('#pen', 'aria-pressed') == 'true'
    move(draw)
    move(lambda: live.click('#reuse'))
    move(lambda: live.click('#clear'))
    assert not look(live, 'board').any()
    move(lambda: live.set_input_files('#file', dict(name='x.png', mimeType='image/png', buffer=as_file(drawing()))))
    assert difference(look(live, 'board'), np.asarray(drawing()).astype(int)) == 0
    live.set_input_files('#file', dict(name='notes.txt', mimeType='image/png', buffer=b'no picture'))
    says(live, 'status', 'notes.txt is no picture')
    move(lambda: live.check('#from-noise'))
    assert 'image=' not in live.url


def as_file(image):
    "The bytes of a PNG file"
    image.save(file := io.BytesIO(), format='PNG')
    return file.getvalue()


def test_fifty_changes_in_a_row_end_in_the_last_ones_state(visit, live):
    go(live, steps=10)
    live.evaluate('''async () => { const seed = document.getElementById('seed')
        for (let i = 1; i <= 50; i++) {
          seed.value = i
          seed.dispatchEvent(new Event('input', { bubbles: true }))
          if (i % 5 == 0) await new Promise(resolve => setTimeout(resolve, 30))
        } }''')
    found = finish(live)
    live.wait_for_timeout(300)
    assert 'seed=50' in live.url and live.input_value('#seed') == '50'
    go(live, steps=10, seed=3)
    assert difference(go(live, steps=10, seed=50), found) == 0


def test_timeline_shows_every_step(visit, live):
    go(live, steps=6, seed=2)
    seen = []
    for place in range(1, 7):
        live.fill('#step', str(place))
        assert live.inner_text('#place').startswith(f'step {place} of 6')
        seen.append([look(live, name) for name in ('picture', 'xt', 'x0', 'eps')])
    assert all(difference(a[k], b[k]) for a, b in zip(seen, seen[1:]) for k in range(4)), 'each step looks different'
    live.fill('#step', '2')
    live.wait_for_timeout(250)
    assert 'step=2' in live.url
    signal, noise = map(float, re.findall(r'\d\.\d\d', live.inner_text('#equation')))
    assert abs(signal**2 + noise**2 - 1) < .02
    live.select_option('#view', 'xt')
    noisy = finish(live)
    assert live.inner_text('#place').startswith('step 2') and difference(noisy, seen[1][0]) > 10
    live.fill('#step', '6')
    assert difference(look(live), seen[-1][0]) == 0, 'in the end both are the picture'
    live.fill('#step', '2')
    live.click('#play')
    says(live, 'place', 'step 6')


def test_link_png_and_python(visit, visits, live, tmp_path):
    go(live, steps=7, seed=5, prompt='a thin white zero', negative='bold', strength=.7, image=in_address(drawing()))
    live.fill('#step', '4')
    live.click('#link')
    link, at_four = live.evaluate('navigator.clipboard.readText()'), look(live)
    live.click('#code')
    code = live.evaluate('navigator.clipboard.readText()')
    live.fill('#step', '7')
    with live.expect_download() as download: live.click('#save')
    picture = np.asarray(Image.open(download.value.path()).convert('RGB')).astype(int)
    assert download.value.suggested_filename == 'scene.png' and difference(picture, look(live)) == 0
    assert difference(picture, run_python(code, tmp_path)) <= 2
    other = visits(link[link.rindex('/') + 1:])
    load(other)
    assert difference(look(other), at_four) == 0
    other.fill('#step', '7')
    assert difference(look(other), picture) == 0


def test_offline_after_loading(visit, visits):
    page = visit('?steps=4')
    before = load(page)
    page.context.set_offline(True)
    page.fill('#seed', '9')
    assert difference(finish(page), before) > 10
    page.goto(page.url.partition('#')[0].partition('?')[0] + '?steps=4')
    says(page, 'load', 'Start')
    assert difference(load(page), before) == 0
    assert all('ERR_INTERNET_DISCONNECTED' in fault for fault in visits.faults)  # the tab's icon is not the page's
    visits.faults.clear()


def test_digits(visit):
    from sdcourse.digits import sample
    page = visit('?mode=digits&prompt=27&steps=9')
    found = load(page)
    expected = sample([2, 7], num_inference_steps=9, generator=torch.Generator().manual_seed(0))
    expected = ((torch.cat(list(expected), dim=2)[0] + 1)*127.5).round().numpy()
    assert found.shape == (28, 56, 3) and difference(found[..., 0], expected) <= 2
    assert not page.is_visible('#negative') and not page.is_visible('#from-picture')
    page.fill('#prompt', '12x')
    assert 'allowed: one to four digits' in page.inner_text('#remarks')
    keep(page, 'digits')


def test_unknown_words_and_bad_addresses_are_named(visit):
    page = visit('?steps=999&prompt=a+red+cat')
    says(page, 'remarks', '“cat”')
    assert 'steps "999"; allowed: a whole number from 1 to 50' in page.inner_text('#remarks')
    assert page.input_value('#steps') == '25'
    page = visit('#image=AAAA')
    says(page, 'remarks', 'is no picture')


@pytest.mark.parametrize('name', ['WebAssembly', 'Worker', 'DecompressionStream'])
def test_what_a_browser_lacks_is_named(visit, name):
    page = visit(before=f'delete window.{name}')
    says(page, 'unable', 'This browser has no')
    assert {'Worker': 'workers'}.get(name, name) in page.inner_text('#unable') and not page.is_visible('.bench')


def test_a_load_that_fails_can_be_tried_again(visit, visits, address):
    page = visit('?steps=3')
    page.context.route('**/unet.onnx.gz*', lambda route: route.abort())
    until(page, '!!navigator.serviceWorker.controller')
    page.click('#load')
    says(page, 'status', 'unet.onnx.gz could not be loaded')
    assert page.inner_text('#load') == 'Try again'
    page.context.unroute_all()
    load(page)
    assert all('ERR_FAILED' in fault for fault in visits.faults)
    visits.faults.clear()


def test_by_keyboard_alone(visit, live):
    go(live, steps=4)
    live.evaluate('document.activeElement.blur()')
    live.reload()
    live.keyboard.press('Tab')
    assert live.evaluate('document.activeElement.className') == 'skip'
    live.keyboard.press('Enter')
    reached = []
    for _ in range(40):
        live.keyboard.press('Tab')
        reached.append(live.evaluate('document.activeElement.id || document.activeElement.name'))
        if reached[-1] == 'load': live.keyboard.press('Enter'); finish(live)
        if reached[-1] == 'from-noise': live.keyboard.press('ArrowDown')  # the drawing board
        if reached[-1] == 'board':
            for key in ['Space', *['ArrowRight']*10, *['ArrowDown']*10, 'Space']: live.keyboard.press(key)
    needed = 'another load guidance steps scheduler seed dice negative board ink pen file strength'.split()
    assert {*needed} <= {*reached}, reached
    assert look(live, 'board').any(), 'a line is drawn'


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_is_too_wide(visit, width, scheme):
    page = visit('#' + '&'.join(['steps=12', 'seed=4', 'image=' + in_address(drawing())]), width, scheme)
    load(page)
    page.click('#python summary')
    page.click('details.scenes summary')
    page.fill('#prompt', 'a bold red seven above a cat')
    finish(page)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    colour = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, re.findall(r'\d+', colour)[:3])) < 200) == (scheme == 'dark')
    keep(page, f'{scheme}-{width}')
    page.check('#from-noise')
    page.fill('#prompt', SCENE['prompt'])
    page.click('#python summary')
    page.click('details.scenes summary')
    finish(page)
    keep(page, f'{scheme}-{width}-noise')
