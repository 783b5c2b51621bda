"Pictures: conversions there and back, agreement with the references, files that are whole or not there"
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.utils import make_grid as reference_grid

from sdcourse import images as module
from sdcourse.images import (
    COLORS,
    animate,
    atomic_path,
    latents_to_rgb,
    make_grid,
    save_gif,
    save_image,
    show_images,
    show_latents,
    to_pictures,
    to_pil,
    to_tensor,
)

sides, channels, seeds = st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1)


def noise(*shape, seed=0):
    "Normal values, a third of them outside [-1, 1]"
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, c=channels, h=sides, w=sides)
def test_pixels_survive_there_and_back(seed, c, h, w):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)
    image = to_tensor(pixels)
    assert image.shape == (c, h, w) and image.dtype == torch.float32 and image.abs().max() <= 1
    assert (np.asarray(to_pil(image)).reshape(h, w, c) == pixels).all()
    assert to_tensor(to_pil(image)).equal(image)


@given(seed=seeds, c=channels, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_tensors_come_back_clipped_to_half_a_step(seed, c, dtype):
    image = noise(c, 5, 4, seed=seed).to(dtype)
    kept = image.clone()
    back = to_tensor(to_pil(image))
    assert (back - image.float().clamp(-1, 1)).abs().max() <= 0.5/127.5 + 1e-5
    assert image.equal(kept)  # the input isn't changed


def test_every_byte_and_infinity():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.asarray(to_pil(to_tensor(every))) == every).all()
    assert np.asarray(to_pil(torch.tensor([[[-torch.inf, torch.inf, -1e9, 1e9]]]))).tolist() == [[0, 255, 0, 255]]


def test_to_pil_equals_diffusers():
    from diffusers.image_processor import VaeImageProcessor
    batch = noise(4, 3, 16, 16)
    theirs = VaeImageProcessor(vae_scale_factor=1).postprocess(batch, output_type='pil')
    for image, picture in zip(batch, theirs): assert (np.asarray(to_pil(image)) == np.asarray(picture)).all()


@pytest.mark.parametrize('mode, pixel, expected', [
    ('1', 1, [255]), ('P', 0, [0, 0, 0]), ('RGBA', (10, 20, 30, 0), [255, 255, 255]),
    ('RGBA', (10, 20, 30, 255), [10, 20, 30]), ('LA', (9, 255), [9, 9, 9]), ('CMYK', (0, 0, 0, 255), [0, 0, 0])])
def test_other_modes(mode, pixel, expected):
    assert ((to_tensor(Image.new(mode, (2, 1), pixel)) + 1)*127.5).round()[:, 0, 1].tolist() == expected


@pytest.mark.parametrize('bad', [
    np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8), Image.new('I', (2, 2)),
    Image.new('F', (2, 2))])
def test_to_tensor_refuses(bad):
    with pytest.raises(ValueError, match='got'): to_tensor(bad)


@pytest.mark.parametrize('bad', [
    torch.zeros(1, 2, 2, dtype=torch.uint8), torch.full((1, 2, 2), torch.nan), torch.zeros(2, 2), torch.zeros(4, 2, 2),
    torch.zeros(1, 1, 2, 2), torch.zeros(1, 0, 2), np.zeros((1, 2, 2)), None])
def test_to_pil_refuses(bad):
    with pytest.raises(ValueError): to_pil(bad)


@given(seed=seeds, n=st.integers(1, 3), h=sides, w=sides, grey=st.booleans(), pil=st.booleans())
def test_to_pictures_keeps_what_fits(seed, n, h, w, grey, pil):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, h, w, 1 if grey else 3), dtype=np.uint8)
    given = [Image.fromarray(p[..., 0] if grey else p) if pil else p for p in pixels]
    found = to_pictures(given)
    assert found.shape == (n, 3, h, w) and found.dtype == torch.float32
    assert found.equal(torch.stack([to_tensor(p).expand(3, -1, -1) for p in pixels]))
    assert to_pictures(given[0]).equal(found[:1]) and to_pictures(tuple(given)).equal(found)


@pytest.mark.parametrize('mode, pixel, expected', [
    ('L', 51, [51, 51, 51]), ('RGB', (10, 20, 30), [10, 20, 30]), ('1', 1, [255]*3), ('P', 0, [0]*3),
    ('RGBA', (10, 20, 30, 0), [255]*3), ('RGBA', (0, 0, 0, 51), [204]*3), ('LA', (9, 0), [255]*3)])
@pytest.mark.parametrize('size', [None, 5])
def test_to_pictures_of_other_modes(mode, pixel, expected, size):
    found = to_pictures(Image.new(mode, (4, 3), pixel), size)
    assert found.shape == ((1, 3, 3, 4) if size is None else (1, 3, 5, 5))
    for corner in (found[0, :, 0, 0], found[0, :, -1, -1]):
        assert ((corner + 1)*127.5).round().tolist() == expected


def test_to_pictures_cuts_the_middle_out():
    "The sides of a broad picture go, a high one's top and bottom; a small one grows"
    broad = np.zeros((4, 12, 3), np.uint8)
    broad[:, 4:8] = 200
    for pixels in (broad, broad.transpose(1, 0, 2).copy()):
        assert (((to_pictures(pixels, 4) + 1)*127.5).round() == 200).all()
    assert to_pictures([broad, broad.transpose(1, 0, 2).copy()], 8).shape == (2, 3, 8, 8)
    same = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert to_pictures(same, 8).equal(to_pictures(same))


@pytest.mark.parametrize('given, options, words', [
    ([], {}, 'at least one picture is needed, got none'), ((), {'size': 8}, 'got none'),
    (Image.new('I;16', (2, 2)), {}, "8 bits a channel is needed, got mode 'I;16'"),
    (Image.new('I', (2, 2)), {'size': 8}, "got mode 'I'"), (Image.new('F', (2, 2)), {}, "got mode 'F'"),
    (np.zeros((2, 2), np.uint16), {}, 'must be uint8, 0..255, got uint16'),
    (np.zeros((2, 2, 3), np.float32), {}, 'got float32'), (np.zeros((2, 2, 4), np.uint8), {}, r'got \(2, 2, 4\)'),
    ([np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.uint8)], {}, r'one size, got \[\(2, 2\), \(2, 3\)\]; `size`'),
    (np.zeros((2, 2), np.uint8), {'size': 0}, 'size must be a whole number .*1, got 0'),
    (np.zeros((2, 2), np.uint8), {'size': 2.5}, 'got 2.5'), (Image.new('L', (2, 2)), {'size': (8, 8)}, 'size must')])
def test_to_pictures_refuses(given, options, words):
    with pytest.raises(ValueError, match=words): to_pictures(given, **options)


@given(n=st.integers(1, 7), ncols=st.integers(1, 8), pad=st.integers(0, 3), c=channels)
def test_grid_holds_every_picture(n, ncols, pad, c):
    images = noise(n, c, 3, 2)
    grid = make_grid(images, ncols, pad, fill=9.)
    rows = -(-n//ncols)
    assert grid.shape == (c, rows*(3 + pad) + pad, ncols*(2 + pad) + pad)
    assert (grid != 9).sum() == images.numel()
    for i, image in enumerate(images):
        top, left = pad + i//ncols*(3 + pad), pad + i % ncols*(2 + pad)
        assert grid[:, top:top+3, left:left+2].equal(image)


def test_grid_equals_torchvision():
    images = noise(6, 3, 4, 4)
    assert make_grid(images, 3, fill=0.5).equal(reference_grid(images, nrow=3, padding=2, pad_value=0.5))


@pytest.mark.parametrize('images, options', [
    (torch.zeros(1, 2, 2), {}), (torch.zeros(0, 1, 2, 2), {}), (torch.zeros(1, 1, 2, 2), {'ncols': 0}),
    (torch.zeros(1, 1, 2, 2), {'pad': -1}), (torch.zeros(1, 1, 2, 2), {'ncols': 1.5}),
    (torch.zeros(1, 1, 2, 2), {'ncols': True}), (torch.zeros(1, 1, 2, 2), {'pad': '2'}),
    (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), {}), ([torch.zeros(1, 2, 2)], {}), (np.zeros((1, 1, 2, 2)), {})])
def test_grid_refuses(images, options):
    with pytest.raises(ValueError, match='got'): make_grid(images, **options)


def test_whole_numbers_of_any_kind():
    assert make_grid(noise(4, 1, 2, 2), np.int64(2), torch.tensor(1)).shape == (1, 7, 7)


def test_false_colours():
    z = noise(2, 4, 3, 5)
    rgb = latents_to_rgb(z)
    assert rgb.shape == (2, 3, 3, 5) and rgb.abs().max() <= 1
    for channel in range(4):  # each channel changes the picture
        assert not latents_to_rgb(z + 0.1*torch.eye(4)[channel][:, None, None]).equal(rgb)
    with pytest.raises(ValueError, match='got shape'): latents_to_rgb(torch.zeros(1, 3, 2, 2))
    for span in (0, -1., float('nan')):
        for draw in (latents_to_rgb, show_latents):
            with pytest.raises(ValueError, match='span must be above 0'): draw(z, span)


def test_figures():
    import matplotlib.pyplot as plt
    fig = show_images(noise(5, 1, 4, 4), titles='abcde', ncols=3, suptitle='all')
    assert len(fig.axes) == 5 and [ax.get_title() for ax in fig.axes] == list('abcde')
    assert all(len(ax.get_xticks()) == 0 for ax in fig.axes)
    assert len(show_images(noise(3, 4, 4)).axes) == 1
    assert len(show_images([noise(1, 4, 4), noise(3, 2, 6)]).axes) == 2
    assert len(show_latents(noise(2, 4, 3, 3)).axes) == 10
    assert show_images(noise(1, 1, 2, 2), cmap='RdBu_r', vmin=-3, vmax=3).axes[0].images[0].get_clim() == (-3, 3)
    assert show_images(noise(1, 1, 2, 2), suptitle='all')._suptitle.get_text() == 'all'
    plt.close('all')


@pytest.mark.parametrize('bad, words', [
    ({'images': []}, 'an empty list'), ({'images': 3}, 'got int'),
    ({'images': torch.zeros(0, 1, 2, 2)}, '(0, 1, 2, 2)'),
    ({'titles': ['one']}, '2 pictures, got 1 titles'), ({'images': noise(1, 4, 2, 2)}, 'got shape (1, 4, 2, 2)'),
    ({'images': noise(2, 2)}, '(c,h,w) or (n,c,h,w)'), ({'images': [noise(1, 2, 2), noise(2, 2)]}, 'got shape (2, 2)'),
    ({'images': [noise(1, 2, 2), None]}, 'NoneType'), ({'ncols': 0}, 'ncols'), ({'ncols': 2.}, 'ncols'),
    ({'vmin': 1.}, 'vmin < vmax'), ({'size': 0}, 'size > 0')])
def test_show_images_refuses_before_it_opens_a_figure(bad, words):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    with pytest.raises(ValueError, match=re.escape(words)): show_images(**{'images': noise(2, 1, 2, 2), **bad})
    assert plt.get_fignums() == before


def test_colours_can_be_told_apart():
    assert {'x0', 'xt', 'eps', 'other'} <= set(COLORS) and len(set(COLORS.values())) == len(COLORS)


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.jpeg', '.webp', '.PNG'])
def test_save_image(tmp_path, suffix):
    path = save_image(noise(5, 3, 6, 6), tmp_path/f'sheet{suffix}', scale=2)
    with Image.open(path) as picture: assert picture.size == (2*(3*6 + 4*2), 2*(2*6 + 3*2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('suffix', ['.png', '.webp'])
def test_saved_picture_is_exact(tmp_path, suffix):
    image = to_tensor(np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8))
    with Image.open(save_image(image, f'{tmp_path}/a{suffix}')) as picture: assert to_tensor(picture).equal(image)


@pytest.mark.parametrize('suffix', ['.jpg', '.webp', '.gif'])
def test_too_large_for_the_format(tmp_path, suffix):
    image, path = torch.zeros(1, 1, 70_000), tmp_path/f'a{suffix}'
    with pytest.raises(ValueError, match='70000'):
        save_gif([image], path) if suffix == '.gif' else save_image(image, path)
    assert not list(tmp_path.iterdir())


def test_too_large_for_the_memory(tmp_path):
    for scale in (10**9, 10**30):
        with pytest.raises(ValueError, match='too large'): save_image(noise(1, 4, 4), tmp_path/'a.png', scale=scale)


@pytest.mark.parametrize('name', ['a.tiff', 'a', 'a.gif', 'no/folder/a.png', 'folder.png', 'file/a.png'])
def test_save_image_refuses(tmp_path, name):
    (tmp_path/'folder.png').mkdir()
    (tmp_path/'file').write_text('not a folder')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='cannot write'): save_image(noise(1, 4, 4), tmp_path/name)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('scale', [0, -1, 1.5, 2., '2', True, None])
def test_scale(tmp_path, scale):
    with pytest.raises(ValueError, match='scale'): save_image(noise(1, 4, 4), tmp_path/'a.png', scale=scale)


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = save_image(noise(1, 4, 4), tmp_path/'a.png')
    old = path.read_bytes()
    def half(self, file, **kwargs):
        with open(file, 'wb') as f: f.write(b'half')
        raise error
    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(ValueError if isinstance(error, OSError) else KeyboardInterrupt):
        save_image(noise(1, 4, 4, seed=1), path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['a.png']


def test_atomic_path_gives_ordinary_permissions(tmp_path):
    (tmp_path/'plain').write_text('x')
    with atomic_path(tmp_path/'private') as temporary:
        temporary.write_text('y')
        temporary.chmod(0o600)  # as some writers do
    assert (tmp_path/'private').stat().st_mode == (tmp_path/'plain').stat().st_mode


@settings(max_examples=20)
@given(n=st.integers(2, 5), fps=st.integers(1, 50), hold=st.floats(0, 3))
def test_gif(n, fps, hold):
    frames = [to_tensor(np.full((3, 4), 40*i, np.uint8)) for i in range(n)]
    data = animate(frames, fps, hold=hold).data
    with Image.open(io.BytesIO(data)) as film:
        assert film.n_frames == n and film.size == (4, 3) and film.info['loop'] == 0
        for i in range(n):
            film.seek(i)
            assert (np.asarray(film.convert('L')) == 40*i).all()  # greys are exact
            expected = 1000/fps if i < n - 1 else 1000*max(hold, 1/fps)
            assert abs(film.info['duration'] - expected) <= 5.01  # the nearest hundredth of a second


def test_save_gif(tmp_path):
    path = save_gif((noise(4, 3, 5, 5, seed=i) for i in range(3)), tmp_path/'a.gif', fps=5, scale=2)
    with Image.open(path) as film: assert film.n_frames == 3 and film.size == (32, 32)
    assert [p.name for p in tmp_path.iterdir()] == ['a.gif']


@pytest.mark.parametrize('bad', [
    {'fps': 0}, {'fps': 0.9}, {'fps': 51}, {'fps': float('nan')}, {'fps': '5'}, {'fps': None}, {'hold': -1},
    {'hold': 60.1}, {'hold': float('inf')}, {'hold': 'long'}, {'scale': 0}, {'frames': []}, {'path': 'a.png'},
    {'path': 'no/a.gif'}, {'frames': [torch.zeros(1, 2, 2), torch.zeros(3, 2, 2)]},
    {'frames': [torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)]}])
def test_save_gif_refuses(tmp_path, bad):
    options = {'frames': [torch.zeros(1, 2, 2)], **bad, 'path': tmp_path/bad.get('path', 'a.gif')}
    with pytest.raises(ValueError): save_gif(**options)
    assert not list(tmp_path.iterdir())


def test_import_is_light():
    heavy = ['fastai', 'diffusers', 'transformers', 'matplotlib', 'ipywidgets', 'IPython']
    code = f'import sys, {module.__name__}; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
