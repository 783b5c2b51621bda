"labs.py: each lab without a browser. There and back gives the same picture, and what is shown is what is computed."
import io
import threading
from copy import copy

import diffusers
import pytest
import torch
from PIL import Image
from test_widgets import UNET, tiny_pipeline

from sdcourse import labs
from sdcourse.data import Scenes, mnist
from sdcourse.labs import (AttentionLens, CLIPSearch, GradientLab, LatentLab, NoiseLab, PictureLab, SchedulerRace,
                           mean_map, steps_within, watch_words, word_places)
from sdcourse.noise import SCHEDULES
from sdcourse.schedulers import SCHEDULERS
from sdcourse.tokenizer import CLIPTokenizer
from sdcourse.widgets import Settings, draw_steps


@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline()


@pytest.fixture
def closing():
    "Close what is put in; no thread may be left"
    threads, opened = threading.active_count(), []
    yield lambda lab: opened.append(lab) or lab
    for lab in opened: lab.close()
    assert threading.active_count() == threads


def opened(data): return Image.open(io.BytesIO(data)).convert('RGB')


def there_and_back(lab, control, value):
    "Another value draws another picture; the old value the old one, to the last pixel"
    before, old = lab.figure(), control.value
    control.value = value
    changed = lab.figure()
    control.value = old
    assert changed != before == lab.figure(), control
    return changed


def test_noise():
    lab = NoiseLab()
    for t in (0, 999): there_and_back(lab, lab.t, t)
    for schedule in list(SCHEDULES)[1:]: there_and_back(lab, lab.schedule, schedule)
    assert opened(NoiseLab(Scenes('test', 1)[0].image, 10).figure()).width > 500


def test_gradient():
    lab = GradientLab()
    seven = lab.x.clone()
    there_and_back(lab, lab.label, 10)
    dark = lab.board.names.index('0 % bright')
    lab.board.cells[dark].click()
    row, column = 2*(dark//14), 2*(dark % 14)
    assert (lab.x != seven).sum() == 4 and (lab.x[0, row:row + 2, column:column + 2] == 1).all()
    lab.board.cells[dark].click()
    assert (lab.x[0, row:row + 2, column:column + 2] == -1).all()
    def p():
        with torch.no_grad(): return lab.model(lab.x[None]).softmax(1)[0, lab.label.value].item()
    before, names = p(), [*lab.board.names]
    lab.follow.click()
    assert p() > before and lab.board.names != names, 'the board shows what the gradient did'
    lab.clear.click()
    assert (lab.x == -1).all() and {*lab.board.names} == {'0 % bright'}
    assert torch.equal(mnist('test')[0][0], GradientLab().x), 'the data stay as they were'


def test_latent():
    lab = LatentLab()
    there_and_back(lab, lab.values[2], 5.)
    start = lab.z.clone()
    assert torch.equal((start*8).round()/8, start), 'what a browser rounds to a step of the slider stays as it is'
    lab.values[0].value = 3
    lab.row.value, lab.column.value = 0, 7
    assert lab.values[1].value == pytest.approx(start[0, 1, 0, 7].item())
    lab.values[3].value = -2
    changed = (lab.z != start).nonzero().tolist()
    assert changed == [[0, 0, 4, 4], [0, 3, 0, 7]] and lab.z[0, 0, 4, 4] == 3 and lab.z[0, 3, 0, 7] == -2
    lab.reset.click()
    assert torch.equal(lab.z, start) and torch.equal(lab.z, lab.start)


def test_clip():
    images = Scenes('test', 40).batch(range(40))[0]
    lab = CLIPSearch(images, best=5)
    there_and_back(lab, lab.text, 'a green 4')
    there_and_back(lab, lab.text, '')
    for best in (0, 41):
        with pytest.raises(ValueError, match=f'best must lie between 1 and 40, got {best}'):
            CLIPSearch(images, best=best)


def test_labels(pipe, closing):
    "Every control has a label, every picture and button words, and all are standard widgets"
    import ipywidgets as w
    def below(widget):
        yield widget
        for child in getattr(widget, 'children', ()): yield from below(child)
    images = Scenes('test', 8).batch(range(8))[0]
    for lab in (NoiseLab(), GradientLab(), LatentLab(), CLIPSearch(images), closing(SchedulerRace(pipe)),
                closing(AttentionLens(pipe))):
        if lab.runner: assert lab.runner.wait(60)
        found = [*below(lab.view)]
        assert [widget for widget in found if widget.has_trait('value')]
        for widget in found:
            assert widget._view_module in ('@jupyter-widgets/base', '@jupyter-widgets/controls'), widget
            if isinstance(widget, (w.Button, w.Image)): assert widget.tooltip or getattr(widget, 'description', '')
            elif widget.has_trait('value') and not isinstance(widget, (w.HTML, w.Label)): assert widget.description


def test_picture_lab_is_shown(closing):
    lab = closing(NoiseLab())
    bundle = lab._repr_mimebundle_()
    assert {*bundle} == {'text/plain', 'image/png', 'application/vnd.jupyter.widget-view+json'}
    assert isinstance(lab, PictureLab) and len(lab.panels) == 3 and all(panel.tooltip for panel in lab.panels)
    widths = [opened(panel.value).width for panel in lab.panels]
    assert opened(lab.figure()).width == sum(widths) and max(widths) < 300, 'each fits on a phone'


@pytest.mark.parametrize('name', [name for name in SCHEDULERS if name != 'flow'])
def test_steps_within(name):
    "No more evaluations than allowed, and one step more would be too many"
    kind, options = SCHEDULERS[name]
    for evaluations in (1, 2, 7, 20):
        scheduler = kind(**options)
        n = steps_within(scheduler, evaluations)
        assert len(scheduler.timesteps) <= evaluations and n >= 1
        scheduler.set_timesteps(n + 1)
        assert len(scheduler.timesteps) > evaluations
    with pytest.raises(ValueError, match='can do no step with evaluations=0'): steps_within(kind(**options), 0)


def test_race(pipe, closing):
    lab = closing(SchedulerRace(pipe, ('ddim', 'heun', 'pndm')))
    assert lab.runner.wait(60)
    assert [label.value for label in lab.counts.values()] == ['ddim: 8 of 8', 'heun: 7 of 7', 'pndm: 8 of 8']
    pictures = {name: image.value for name, image in lab.images.items()}
    for name, steps in (('ddim', 8), ('heun', 4), ('pndm', 7)):
        *_, last = draw_steps(pipe, Settings(scheduler=name, num_inference_steps=steps))
        assert pictures[name] == labs.png(pipe.decode(last.xt)[0]), name
    for control, value in ((lab.seed, 4), (lab.prompt, 'a green 4'), (lab.evaluations, 5)):
        before, control.value = control.value, value
        assert lab.runner.wait(60) and all(lab.images[name].value != pictures[name] for name in pictures)
        control.value = before
        assert lab.runner.wait(60) and {name: image.value for name, image in lab.images.items()} == pictures
    for seed in range(50): lab.seed.value = seed
    lab.seed.value = 0
    assert lab.runner.wait(60) and {name: image.value for name, image in lab.images.items()} == pictures
    assert opened(lab.figure()).width > 200
    with pytest.raises(ValueError, match="unknown scheduler 'rk45'"): SchedulerRace(pipe, ['rk45'])


def test_race_tells_what_goes_wrong(pipe, closing):
    lab = closing(SchedulerRace(pipe, ['lcm']))
    lab.runner.wait(60)
    lab.settings = Settings(guidance_scale=-1)
    lab.seed.value = 1
    assert lab.runner.wait(60) and 'guidance_scale must be a number from 0 to 1000, got -1' in lab.status.value


def test_words_are_watched(pipe):
    "The shares agree with what the layer itself computes from them"
    with watch_words(pipe.unet) as seen: next(draw_steps(pipe, Settings(num_inference_steps=4)))
    layers = [layer for name, layer in pipe.unet.named_modules() if name.endswith('.attn2')]
    assert len(seen) == len(layers) and not any(layer._forward_hooks for layer in layers)
    for share in seen:
        assert share.shape[1] == 32
        torch.testing.assert_close(share.sum(1), torch.ones(len(share)))
    assert mean_map(seen, 8, 8).shape == (32, 8, 8)


def test_another_thread_is_not_watched(pipe):
    "Two labs may share a U-Net"
    with watch_words(pipe.unet) as seen:
        other = threading.Thread(target=lambda: next(draw_steps(pipe, Settings(num_inference_steps=4))))
        other.start()
        other.join()
        assert not seen
        next(draw_steps(pipe, Settings(num_inference_steps=4)))
    assert seen


def test_shares_are_those_of_the_layer(pipe):
    "With one head, values that are the tokens' numbers and no last layer, the layer answers with its own shares"
    from sdcourse.unet import Attention, Remembered
    layer = Attention(32, 32, heads=1)
    with torch.no_grad():
        layer.to_v.weight.copy_(torch.eye(32))
        layer.to_out[0].weight.copy_(torch.eye(32))
        layer.to_out[0].bias.zero_()
    unet = copy(pipe.unet)
    unet._modules = {'block': torch.nn.ModuleDict({'attn2': layer})}
    x, words = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0)), torch.eye(32)[None]
    with watch_words(unet) as seen, torch.no_grad(): answer = layer(x, Remembered(words))
    torch.testing.assert_close(seen[0], answer[0])


def test_mean_map_of_places():
    "A layer of 4×4 and one of 2×2 places, wide pictures too"
    fine, coarse = torch.zeros(16, 3), torch.zeros(4, 3)
    fine[:, 1], coarse[:, 2] = 1, 1
    maps = mean_map([fine, coarse], 4, 4)
    assert maps.shape == (3, 4, 4) and (maps[1] == .5).all() and (maps[2] == .5).all() and not maps[0].any()
    assert mean_map([torch.ones(8*4, 1), torch.ones(4*2, 1)], 8, 4).shape == (1, 8, 4)
    right = torch.zeros(16, 1)
    right[3::4] = 1
    assert torch.equal(mean_map([right], 4, 4)[0, :, 3], torch.ones(4)) and not mean_map([right], 4, 4)[0, :, 0].any()


def test_word_places(pipe):
    t = pipe.tokenizer
    assert word_places(t, 'a red 7') == [('a', [1]), ('red', [2]), ('7', [3])] and word_places(t, '') == []
    (_, first), (word, dragon) = word_places(t, 'a dragon')
    assert word == 'dragon' and len(dragon) > 1 and dragon == list(range(2, 2 + len(dragon)))
    long = word_places(t, 'a red 7 above '*10)
    assert long[29] == ('red', [30]) and long[30] == ('7', [33]), 'the second row begins with a start token, too'
    new = CLIPTokenizer(t.vocab, t.merges, t.model_max_length)
    new.add_tokens(['<toy>', '<toy>_1'])
    assert word_places(new, 'a <toy> above a 3') == [('a', [1]), ('<toy>', [2]), ('<toy>_1', [3]), ('above', [4]),
                                                     ('a', [5]), ('3', [6])]


def strip(lens, step):
    "The maps of all words at a step, as the browser gets them"
    return opened(lens.tiles.children[step].children[0].value)


def test_lens(pipe, closing):
    lens = closing(AttentionLens(pipe))
    assert lens.runner.wait(60) and ' '.join(word for word, _ in lens.word.options) == \
        'a bold red seven above a (2) blue 3'
    assert lens.maps().shape == (8, 8, 8, 8) and (lens.maps().amax((0, 2, 3)) == 1).all()
    assert len(lens.tiles.children) == 8 and strip(lens, 0).size == (8, 64)
    first = lens.figure()
    for i in (3, 7):
        lens.word.value = i
        assert f'--word: {i}; --last: 7' in lens.style.value
        place = (0, 8*i, 8, 8*i + 8)
        assert strip(lens, 5).crop(place).tobytes() == opened(labs.png(lens.maps()[5, i:i + 1]*2 - 1)).tobytes()
    assert lens.figure() != first
    lens.word.value = 0
    assert lens.figure() == first and opened(first).width > 8*64
    lens.word.value = 2
    chosen = lens.figure()
    lens.seed.value = 9
    assert lens.runner.wait(60) and lens.word.value == 2 and lens.figure() != chosen
    lens.prompt.value = ''
    assert lens.runner.wait(60) and lens.word.options == () and not lens.maps().any() and lens.figure()
    for i in range(30): lens.prompt.value = 'a red 7 above a blue 3 '*(i % 5)
    lens.prompt.value, lens.seed.value, lens.word.value = Settings().prompt, 0, 0
    assert lens.runner.wait(60) and lens.figure() == first and not lens.status.value
    assert not any(layer._forward_hooks for layer in pipe.unet.modules()), 'no hook is left'


def test_every_word_can_be_hovered(pipe, closing):
    "A rule for each, and none for another lens on the page"
    lens, other = closing(AttentionLens(pipe)), closing(AttentionLens(pipe, Settings('a red 7', num_inference_steps=2)))
    assert lens.runner.wait(60) and other.runner.wait(60) and lens.name != other.name
    assert lens.style.value.count(':hover') == 8 and other.style.value.count(':hover') == 3
    assert lens.name in lens.view._dom_classes and other.name not in lens.style.value


def test_lens_over_a_foreign_unet(pipe):
    mine = copy(pipe)
    mine.unet = diffusers.UNet2DConditionModel(**UNET)
    with pytest.raises(ValueError, match='the U-Net must be the one of lesson 05, got diffusers'): AttentionLens(mine)
