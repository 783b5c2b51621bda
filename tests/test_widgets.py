"""widgets.py: the thread that heeds the newest wish alone, and the playground without a browser.

The pipeline is tiny and random: what it draws is grain, but each change of a setting changes the grain.
"""
import io
import random
import threading
import time
from contextlib import chdir
from copy import copy
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sdcourse import widgets
from sdcourse.clip import CLIPTextModel
from sdcourse.images import to_pil
from sdcourse.pipeline import StableDiffusionPipeline
from sdcourse.schedulers import SCHEDULERS, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.unet import UNet2DConditionModel
from sdcourse.vae import AutoencoderKL
from sdcourse.widgets import (Board, DenoisePlayground, Runner, Settings, as_python, choose_scheduler, draw_steps,
                              spacings, take_frame)

VAE = dict(block_out_channels=(4, 4, 4, 8), down_block_types=('DownEncoderBlock2D',)*4, sample_size=64,
           up_block_types=('UpDecoderBlock2D',)*4, norm_num_groups=2, scaling_factor=.5)
UNET = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), attention_head_dim=2,
            up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=653,
            max_position_embeddings=32, eos_token_id=652, bos_token_id=651, pad_token_id=652)
NOISE = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, prediction_type='v_prediction',
             clip_sample=False, timestep_spacing='trailing', steps_offset=1)


def tiny_pipeline():
    "Five parts with random weights; the text encoder's are larger than usual, so that words matter"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [AutoencoderKL(**VAE).eval(), CLIPTextModel(**TEXT).eval()], UNet2DConditionModel(**UNET).eval()
    return StableDiffusionPipeline(*parts[0], CLIPTokenizer.from_pretrained('scenes/clip'), parts[1],
                                   DDIMScheduler(**NOISE))


@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline()


@pytest.fixture
def playground(pipe):
    "A playground that has drawn its first picture; it leaves no thread behind"
    threads = threading.active_count()
    playground = DenoisePlayground(pipe, Settings(num_inference_steps=4))
    assert playground.runner.wait(60)
    yield playground
    playground.close()
    assert threading.active_count() == threads


def frames(pipe, settings):
    "What a playground should show, without a playground"
    return [take_frame(pipe, step) for step in draw_steps(pipe, settings)]


def opened(data): return Image.open(io.BytesIO(data)).convert('RGB')


# ---- the thread

class Work:
    "Work that goes on one step at a time, when it is let"
    def __init__(self):
        self.done, self.left, self.may, self.step = [], [], threading.Semaphore(0), threading.Semaphore(0)
        self.failures = []
        self.runner = Runner(self, self.failures.append)
    def __call__(self, wish):
        try:
            for i in range(5):
                self.step.release()                                             # it has begun
                assert self.may.acquire(timeout=60)
                if wish == i: raise ValueError(f'no {wish}')
                self.done.append((wish, i))
                yield
        finally: self.left.append(wish)
    def begun(self): assert self.step.acquire(timeout=60)
    def go(self, steps=1): self.may.release(steps)


@pytest.fixture
def work():
    work = Work()
    yield work
    work.go(100)
    work.runner.close()
    assert not work.runner.thread.is_alive()


def test_newer_wish_ends_the_work_after_its_step(work):
    work.runner.submit('a')
    work.begun()
    work.go()
    work.begun()                                                                # a's second step is under way
    for wish in 'bcd': work.runner.submit(wish)
    work.go()
    work.begun()                                                                # this is d's first
    assert work.done == [('a', 0), ('a', 1)] and work.left == ['a']
    work.go(5)
    assert work.runner.wait(60)
    assert work.done[2:] == [('d', i) for i in range(5)] and work.left == ['a', 'd']


def test_wish_that_comes_in_the_last_step_is_not_lost(work):
    work.go(4)
    work.runner.submit('a')
    for _ in range(5): work.begun()
    work.runner.submit('b')
    work.go(6)
    assert work.runner.wait(60) and work.done == [(wish, i) for wish in 'ab' for i in range(5)]


def test_a_failure_is_told_and_the_thread_lives_on(work):
    work.go(100)
    work.runner.submit(2)
    assert work.runner.wait(60) and [str(e) for e in work.failures] == ['no 2']
    work.runner.submit('a')
    assert work.runner.wait(60) and work.done[-5:] == [('a', i) for i in range(5)]


@pytest.mark.parametrize('wish', [None, 0, '', (), []])
def test_any_wish(work, wish):
    work.go(100)
    work.runner.submit(wish)
    assert work.runner.wait(60) and len(work.done) == (0 if wish == 0 and work.failures else 5)


def test_close_ends_the_work_after_its_step(work):
    work.runner.submit('a')
    work.begun()
    closing = threading.Thread(target=work.runner.close)
    closing.start()
    while not work.runner.closed: time.sleep(.001)
    assert closing.is_alive() and not work.done
    work.go()
    closing.join(60)
    assert not closing.is_alive() and not work.runner.thread.is_alive()
    assert work.done == [('a', 0)] and work.left == ['a']
    assert work.runner.wait(0) and work.runner.close() is None
    with pytest.raises(ValueError, match="closed; 'b' came too late"): work.runner.submit('b')


def test_wait_gives_up(work):
    work.runner.submit('a')
    assert not work.runner.wait(.02)


def test_closed_from_within():
    "Who computes may close, too"
    def work(wish):
        runner.close()
        yield
    runner = Runner(work, print)
    runner.submit(1)
    runner.thread.join(60)
    assert not runner.thread.is_alive()


# ---- settings

@pytest.mark.parametrize('name', [None, *(name for name in SCHEDULERS if name != 'flow')])
def test_every_spacing_does_something_else(pipe, name):
    kind, _ = choose_scheduler(pipe.scheduler, name)
    plans = {}
    for spacing in (None, *spacings(kind)):
        chosen, options = choose_scheduler(pipe.scheduler, name, spacing)
        scheduler = chosen.from_config(pipe.scheduler.config, **options)
        assert chosen is kind and scheduler.config.prediction_type == 'v_prediction'
        scheduler.set_timesteps(7)
        plans[spacing] = tuple(scheduler.timesteps.tolist())
    assert plans[None] == plans['trailing'], 'its own'
    assert name == 'lcm' or len({*plans.values()}) == len(plans) - 1, plans


def test_own_spacing_can_be_undone():
    own = EulerDiscreteScheduler(use_karras_sigmas=True)
    kind, options = choose_scheduler(own, None, 'linspace')
    assert not kind.from_config(own.config, **options).use_karras_sigmas


@pytest.mark.parametrize('name, spacing, message', [
    ('rk45', None, "unknown scheduler 'rk45'; allowed: ddim, "),
    ('ddim', 'karras', "DDIMScheduler has no spacing 'karras'; allowed: linspace, leading, trailing"),
    ('pndm', 'cosine', "PNDMScheduler has no spacing 'cosine'"),
    ('flow', 'linspace', 'FlowMatchEulerDiscreteScheduler has no spacing .*; allowed: none'),
])
def test_wrong_names(pipe, name, spacing, message):
    with pytest.raises(ValueError, match=message): choose_scheduler(pipe.scheduler, name, spacing)


def start_picture():
    image = Image.new('RGB', (64, 64), 'navy')
    image.paste('yellow', (10, 20, 40, 60))
    return image


def half_mask():
    mask = Image.new('L', (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


PYTHON = [
    Settings(num_inference_steps=3), Settings('', 'a red 7', 5, 3, guidance_scale=1.),
    Settings(scheduler='heun', seed=9, num_inference_steps=3),
    Settings('"a" \'7\'\n', num_inference_steps=3, spacing='linspace'),
    Settings(num_inference_steps=3, scheduler='dpm++_sde', spacing='exponential'),
    Settings(num_inference_steps=4, eta=.7, guidance_scale=0.),
    Settings(num_inference_steps=4, image=start_picture(), strength=.6),
    Settings(num_inference_steps=4, image=start_picture(), strength=1., mask_image=half_mask(), scheduler='euler_a'),
]


@pytest.mark.parametrize('settings', PYTHON, ids=range(len(PYTHON)))
@pytest.mark.parametrize('weights', [None, 'weights'])
def test_python_draws_the_same(pipe, settings, weights, tmp_path, monkeypatch):
    "The code that a playground offers, run in an empty folder with the two files, saves the same pixels"
    code, *_, last = as_python(pipe, settings, weights), *frames(pipe, settings)
    loaded = []
    monkeypatch.setattr(StableDiffusionPipeline, 'from_pretrained', lambda name: loaded.append(name) or copy(pipe))
    with chdir(tmp_path):
        if settings.image: settings.image.save('start.png')
        if settings.mask_image: settings.mask_image.save('mask.png')
        exec(code, {} if weights else {'pipe': copy(pipe)})
        assert Image.open('scene.png').tobytes() == opened(last.picture).tobytes()
    assert loaded == [weights]*(weights is not None)


# ---- the playground

def change_something(playground, chance):
    "One random change of one random control"
    c = playground.controls
    name = chance.choice([*c, 'drawing', 'mask', 'timeline'])
    values = dict(prompt=['a red 7', 'a blue 3 above a green 4', 'a cat', ''], negative_prompt=['', 'bold'],
                  seed=range(5), num_inference_steps=range(1, 6), guidance_scale=[0, 1, 2.5, 7.5], eta=[0, .5, 1],
                  start=['noise', 'a drawing'], strength=[.05, .5, .8, 1], repaint=[True, False],
                  scheduler=[value for _, value in c['scheduler'].options],
                  spacing=[value for _, value in c['spacing'].options])
    if name in ('drawing', 'mask'):
        playground.ink.value = chance.choice(playground.ink.options)
        getattr(playground, name).cells[chance.randrange(64)].click()
    elif name == 'timeline': playground.timeline.value = chance.randint(0, playground.timeline.max)
    else: c[name].value = chance.choice(values[name])


@pytest.mark.parametrize('seed', range(3))
def test_200_changes_end_in_the_last(pipe, playground, seed):
    "In whatever moment they come"
    chance = random.Random(seed)
    for _ in range(200):
        change_something(playground, chance)
        time.sleep(chance.choice([0, 0, 0, .001, .02]))
    playground.controls['num_inference_steps'].value = 4
    playground.controls['strength'].value = 1.                                  # less may leave none of few steps
    assert playground.runner.wait(120)
    expected = frames(pipe, playground.settings)
    assert playground.frames == expected
    assert playground.timeline.max == len(expected) - 1
    playground.timeline.value = playground.timeline.max
    assert {name: image.value for name, image in playground.images.items()} == \
        {name: getattr(expected[-1], name) for name in playground.images}
    assert as_python(pipe, playground.settings).split('\n')[-1] in playground.code.value.replace('&#x27;', "'")


def test_a_change_ends_the_run_within_a_step(pipe, monkeypatch):
    begun, may = threading.Semaphore(0), threading.Semaphore(0)
    seen = []
    def slowly(pipe, step, take=widgets.take_frame):
        begun.release()
        assert may.acquire(timeout=60)
        seen.append(step.of)
        return take(pipe, step)
    monkeypatch.setattr(widgets, 'take_frame', slowly)
    playground = DenoisePlayground(pipe, Settings(num_inference_steps=30))
    assert begun.acquire(timeout=60)
    for steps in (20, 10, 5): playground.controls['num_inference_steps'].value = steps
    may.release(6)
    assert playground.runner.wait(60) and seen == [30] + [5]*5 and len(playground.frames) == 5
    playground.close()


def test_same_settings_same_pictures(playground):
    "There and back; and what has no effect starts nothing"
    first, c = playground.frames, playground.controls
    other = dict(prompt='a green 4', negative_prompt='bold', seed=8, num_inference_steps=3, scheduler='euler',
                 spacing='linspace', guidance_scale=9., eta=1., start='a drawing')
    for name, value in other.items():
        before, c[name].value = c[name].value, value
        assert playground.runner.wait(60) and playground.frames != first, name
        c[name].value = before
        assert playground.runner.wait(60) and playground.frames == first, name
    assert playground.frames is not first
    kept = playground.frames
    c['strength'].value = .3
    playground.mask.cells[0].click()
    assert playground.runner.wait(60) and playground.frames is kept


def test_spacing_follows_the_scheduler(playground):
    c = playground.controls
    c['scheduler'].value, c['spacing'].value = 'euler', 'karras'
    assert playground.settings.spacing == 'karras' and c['eta'].disabled
    c['scheduler'].value = 'heun'
    assert playground.settings.spacing == 'karras'
    c['scheduler'].value = 'ddim'
    assert playground.settings.spacing is None and not c['eta'].disabled
    assert [value for _, value in c['spacing'].options] == ['', 'linspace', 'leading', 'trailing']


def test_timeline(playground):
    "It follows; once moved, it stays at that step in the next run; moved to its end, it follows again"
    def shown(): return playground.images['picture'].value
    assert playground.timeline.value == 3 and shown() == playground.frames[3].picture
    playground.timeline.value = 1
    assert shown() == playground.frames[1].picture and playground.caption.value.startswith('step 2 of 4, from t = ')
    playground.controls['seed'].value = 7
    assert playground.runner.wait(60) and shown() == playground.frames[1].picture and playground.timeline.value == 1
    playground.timeline.value = 3
    playground.controls['num_inference_steps'].value = 6
    assert playground.runner.wait(60) and playground.timeline.value == 5 and shown() == playground.frames[5].picture
    playground.timeline.value = 4
    playground.controls['num_inference_steps'].value = 2
    assert playground.runner.wait(60) and playground.timeline.value == 1 and shown() == playground.frames[1].picture
    playground.controls['num_inference_steps'].value = 1
    assert playground.runner.wait(60) and playground.caption.value.startswith('step 1 of 1')
    assert (playground.timeline.value, playground.timeline.max) == (0, 1), 'a slider from 0 to 0 would be broken'
    playground.timeline.value = 1
    assert shown() == playground.frames[0].picture


def test_play(playground, monkeypatch):
    "From the first step to the last; moved by hand, it stops"
    seen, may = [], threading.Semaphore(0)
    def pause(seconds): assert may.acquire(timeout=60)
    monkeypatch.setattr(widgets, 'time', SimpleNamespace(sleep=pause, perf_counter=time.perf_counter))
    playground.timeline.observe(lambda change: seen.append(change.new), 'value')
    playground.play.click()
    may.release(4)
    assert playground.player.wait(60) and seen == [0, 1, 2, 3] and playground.timeline.value == 3
    assert playground.images['picture'].value == playground.frames[3].picture
    playground.play.click()
    may.release(1)
    while seen[4:] != [0, 1]: time.sleep(.001)
    playground.timeline.value = 0
    may.release(4)
    assert playground.player.wait(60) and seen[4:] == [0, 1, 0] and playground.timeline.value == 0
    assert playground.images['picture'].value == playground.frames[0].picture


def test_dice(playground):
    before = playground.frames
    playground.dice.click()
    assert playground.runner.wait(60) and playground.frames != before and playground.settings.seed != 0


def put_file(playground, data, name='photo.png'):
    "As a front-end does it"
    playground.upload.value = ({'name': name, 'type': '', 'size': len(data), 'content': memoryview(data),
                                'last_modified': datetime.now()},)


def test_file_and_mask(pipe, playground):
    "A picture of any size is cut to the model's square; the mask keeps what is not marked"
    photo = start_picture().resize((130, 64))
    file = io.BytesIO()
    photo.save(file, format='JPEG')
    playground.controls['start'].value = 'a file'
    assert playground.runner.wait(60) and playground.settings.image is None
    put_file(playground, file.getvalue())
    assert playground.settings.image.size == (64, 64) and playground.settings.mask_image is None
    playground.controls['repaint'].value = True
    for i in range(32): playground.mask.cells[i].click()                        # the upper half
    assert playground.runner.wait(60)
    mask = playground.settings.mask_image
    assert mask.getpixel((5, 31)) == 255 and mask.getpixel((5, 32)) == 0 and mask.mode == 'L'
    assert playground.frames == frames(pipe, playground.settings) and 'mask.png' in playground.files.value


@pytest.mark.parametrize('data, message', [(b'', 'is no picture'), (b'a red seven', 'is no picture'),
                                           (b'%PDF-1.4', 'is no picture')])
def test_file_that_is_no_picture(playground, data, message):
    kept = playground.frames
    playground.controls['start'].value = 'a file'
    put_file(playground, data, 'x <b>.png')
    assert message in playground.status.value and 'x &lt;b&gt;.png' in playground.status.value
    assert playground.frames is kept


def test_what_cannot_be_drawn_is_told(playground):
    playground.controls['start'].value = 'a drawing'
    playground.controls['strength'].value = .05
    assert playground.runner.wait(60)
    assert 'strength 0.05 of 4 steps leaves none' in playground.status.value
    assert playground.frames == [] and opened(playground.images['picture'].value).size == (1, 1)
    assert not playground.files.value and not playground.caption.value
    playground.controls['strength'].value = .8
    assert playground.runner.wait(60) and len(playground.frames) == 3


def test_words_that_mean_nothing(playground, recwarn):
    playground.controls['prompt'].value = 'a red <dragon>'
    assert playground.runner.wait(60) and playground.status.value.endswith('to the model: dragon</span>')
    assert '&lt;dragon&gt;' in playground.code.value and not recwarn.list


def test_files_to_take_away(pipe, playground):
    import re
    from base64 import b64decode
    found = dict(re.findall(r'download="([\w.]+)" href="data:image/\w+;base64,([^"]+)"', playground.files.value))
    assert {*found} == {'scene.png', 'scene.gif'}
    *_, last = draw_steps(pipe, playground.settings)
    assert opened(b64decode(found['scene.png'])).tobytes() == to_pil(pipe.decode(last.xt)[0]).tobytes()
    film = Image.open(io.BytesIO(b64decode(found['scene.gif'])))
    assert film.format == 'GIF' and film.n_frames == 4


def test_figure_for_those_without_python(playground):
    bundle = playground._repr_mimebundle_()
    assert bundle['application/vnd.jupyter.widget-view+json']['model_id'] == playground.view.model_id
    from base64 import b64decode
    picture = opened(b64decode(bundle['image/png']))
    assert picture.width > 300 and len(picture.getcolors(10**6)) > 50
    playground._fail(ValueError('no'))
    assert opened(playground.figure()).size, 'there is one even where nothing was drawn'


def test_labels(playground):
    "Every control has a label, and what has no text a tooltip"
    import ipywidgets as w
    def below(widget):
        yield widget
        for child in getattr(widget, 'children', ()): yield from below(child)
    found, described = [*below(playground.view)], (w.Text, w.IntSlider, w.FloatSlider, w.Dropdown, w.Checkbox,
                                                   w.FileUpload, w.BoundedIntText)
    assert {playground.controls['prompt'], playground.timeline, playground.upload, playground.dice} <= {*found}
    for widget in found:
        if isinstance(widget, described): assert widget.description, widget
        if isinstance(widget, (w.Button, w.Image)): assert getattr(widget, 'description', '') or widget.tooltip, widget
        assert widget._view_module in ('@jupyter-widgets/base', '@jupyter-widgets/controls'), 'standard widgets only'


def test_begins_as_told(pipe):
    playground = DenoisePlayground(pipe, Settings('a red 7', 'bold', 3, 2, 'euler', 'karras', 2.))
    assert playground.runner.wait(60)
    assert playground.settings == Settings('a red 7', 'bold', 3, 2, 'euler', 'karras', 2.)
    playground.close()
    with pytest.raises(ValueError, match='begins without pictures, got <PIL'):
        DenoisePlayground(pipe, Settings(image=start_picture()))


def test_another_kind_of_noise(pipe):
    "A model of flow matching keeps its scheduler"
    mine = copy(pipe)
    mine.scheduler = FlowMatchEulerDiscreteScheduler()
    playground = DenoisePlayground(mine, Settings(num_inference_steps=3))
    assert playground.runner.wait(60) and len(playground.frames) == 3, playground.status.value
    assert [value for _, value in playground.controls['scheduler'].options] == ['']
    playground.close()


def test_board():
    painted = []
    board = Board(3, {'off': '#000000', 'on': '#ff8000'}, lambda old: 'on' if old == 'off' else 'off',
                  lambda: painted.append(1), 'lamp')
    board.cells[5].click()
    assert board.cells[5].tooltip == 'lamp, row 2, column 3: on' and board.names.count('on') == 1
    assert board.picture(6).getpixel((5, 2)) == (255, 128, 0) and board.picture(6).getpixel((4, 1)) == (0, 0, 0)
    board.cells[5].click()
    assert board.names.count('on') == 0 and painted == [1, 1]


def test_no_thread_outlives_a_program():
    "A program that ends in the middle of a run, without close(), ends at once and without a word"
    import subprocess
    import sys
    code = '''
import time
from test_widgets import tiny_pipeline
from sdcourse.widgets import DenoisePlayground, Settings
playground = DenoisePlayground(tiny_pipeline(), Settings(num_inference_steps=50))
while not playground.frames: time.sleep(.001)
'''
    from pathlib import Path
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
