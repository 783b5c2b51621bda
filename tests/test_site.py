"""The documentation site, built by smalldocs: its pages, what ends a build, and how it behaves in a real browser.

`SITE=_docs pytest tests/test_site.py` looks at a site that is built already.
"""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import yaml
from bs4 import BeautifulSoup


def build(root, project, out):
    "Run tools/site.py on a project"
    command = [sys.executable, root/'tools/site.py', '--root', project, '--out', out, '--renderer', 'smalldocs']
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope='session')
def site(root, source, tmp_path_factory):
    "The folder of the built site"
    if 'SITE' in os.environ: return (root/os.environ['SITE']).resolve()
    out = tmp_path_factory.mktemp('site')/'docs'
    done = build(root, source, out)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, 'the build is not free of warnings'
    return out


@pytest.fixture(scope='session')
def pages(site):
    "Every page that was a notebook, parsed, by its path"
    return {p.relative_to(site).as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
            for p in sorted(site.rglob('*.html')) if p.parent != site/'playground'}


@pytest.fixture(scope='session')
def order(root):
    "The pages that there have to be, in the order of the sidebar, from the notebooks on disk"
    lessons = sorted((root/'nbs').glob('[0-9]*_*.ipynb'))
    names = [p.stem.split('_', 1)[1] for p in lessons]
    assert names.pop() == 'cli'
    modules = [n for n, p in zip(names, lessons) if '#| default_exp' in p.read_text(encoding='utf-8')]
    return ['index.html'] + [f'{o}.html' for o in names] + [f'api/{o}.html' for o in modules] + ['cli.html']


def target(page, href):
    "The page that a relative link leads to"
    return os.path.normpath(os.path.join(os.path.dirname(page), href.split('#')[0]))


# ---- the pages

def test_every_lesson_and_module_has_its_page(pages, order): assert sorted(pages) == sorted(order)


def test_sidebar_has_lessons_and_api_in_order(pages, order):
    for name, soup in pages.items():
        links = [target(name, a['href']) for a in soup.select('#quarto-sidebar .sidebar-menu-container a[href]')]
        assert links == order, name
        active = [target(name, a['href']) for a in soup.select('#quarto-sidebar a.active[href]')]
        assert active == [name]


def test_previous_and_next_follow_the_sidebar(pages, order):
    for i, name in enumerate(order):
        ends = {'previous': order[i-1:i] if i else [], 'next': order[i+1:i+2]}
        for side, expected in ends.items():
            found = [target(name, a['href']) for a in pages[name].select(f'.nav-page-{side} a[href]')]
            assert found == expected, f'{name}, {side}'


def test_nothing_is_loaded_from_another_host(site, pages):
    for name, soup in pages.items():
        for tag in soup.select('script[src], img[src], iframe[src], link[href], source[src], video[src]'):
            url = tag.get('src') or tag['href']
            assert not re.match(r'(https?:)?//', url), f'{name}: {url}'
    for css in site.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        assert not re.search(r'(@import|url\()\s*(url\()?\s*["\']?(https?:)?//', text), css


def test_equations_are_mathml(root, pages):
    displayed = 0
    for path in [*(root/'nbs').glob('*.ipynb'), *(root/'nbs/api').glob('*.ipynb')]:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        formulas = sum(''.join(c['source']).count('$$')//2 for c in cells if c['cell_type'] == 'markdown')
        name = path.relative_to(root/'nbs').with_name(re.sub(r'^\d+[a-z]?_', '', path.stem)+'.html').as_posix()
        assert len(pages[name].select('math[display="block"]')) == formulas, name
        displayed += formulas
    assert displayed
    for name, soup in pages.items():
        for tag in soup(['pre', 'code', 'script', 'style', 'annotation']): tag.replace_with('')
        left = re.findall(r'\$\$.{0,40}|\\[(\[].{0,40}|\\[A-Za-z]{2,}', soup.get_text())
        assert not left, f'{name}: {left}'


def test_every_image_has_alternative_text(pages):
    images = [(name, img) for name, soup in pages.items() for img in soup('img')]
    assert images
    for name, img in images: assert len(img.get('alt', '').strip()) > 3, f'{name}: {str(img)[:80]}'


def test_names_in_lessons_link_to_their_signatures(pages):
    links = pages['images.html'].select('main a[href="api/images.html#make_grid"]')
    assert links and pages['api/images.html'].find(id='make_grid')


# ---- what the builder does with a small project of its own

def cell(kind, source, *outputs):
    "A notebook's cell"
    return {'cell_type': kind, 'id': str(abs(hash(source)))[:8], 'metadata': {}, 'source': source,
            **({'outputs': list(outputs), 'execution_count': None} if kind == 'code' else {})}


def shown(**data):
    "An output of a code cell"
    return {'output_type': 'display_data', 'metadata': {}, 'data': {k.replace('__', '/'): v for k, v in data.items()}}


PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
GIF = 'R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7'
WIDGET = 'application__vnd.jupyter.widget-view+json'
GOOD = [
    cell('raw', '---\ntitle: Second\nskip_showdoc: true\n---'),
    cell('markdown', r'Links: [home](index.ipynb), [here](#part), [licence](../LICENSE). $a_t$, and `$b$`.' '\n\n'
                     r'$$\begin{aligned} x &= \left(\frac{1}{2}\right) \\ &= \mathbb{E}[\lVert\bar{y}\rVert]'
                     r'\end{aligned} \tag{1}$$' '\n\n## Part'),
    cell('code', '#| fig-alt: ["first", "second"]\n#| fig-cap: "It is $z^2$."\nf()',
         shown(image__png=PIXEL), shown(image__gif=GIF)),
    cell('code', 'bar()', shown(text__plain='  0%|  | 0/9', **{WIDGET: {'model_id': 'x'}}),
         shown(text__plain='0step [00:00, ?step/s]', **{WIDGET: {'model_id': 'y'}}),
         {'output_type': 'stream', 'name': 'stdout', 'text': ' 10%|#\r100%|##\ndone'}),
    cell('markdown', '::: {.callout-tip collapse="true"}\n## Solution 1'),
    cell('code', 'answer = 42', shown(text__plain='the saved output')),
    cell('markdown', 'It is so.\n:::'),
]
BAD = [
    cell('raw', '---\ntitle: Bad\n---'),
    cell('markdown', '[a](nowhere.ipynb) [b](02_second.ipynb#nothing) ![c](none.png)'),
    cell('markdown', '# Bad: the title again\n\n# Another\n\n' r'$\nosuchcommand{x}$'),
    cell('code', 'f()', shown(image__png=PIXEL)),
    cell('markdown', '<img src="https://example.org/x.png" alt="elsewhere">'),
]
CONFIG = {'project': {'type': 'website', 'output-dir': '_docs'},
          'website': {'title': 't', 'sidebar': {'contents': ['index.ipynb', '02_second.ipynb']}},
          'format': {'html': {'theme': 'cosmo', 'html-math-method': 'mathml'}}}


def write(folder, **notebooks):
    "Write notebooks into a project"
    for name, cells in notebooks.items():
        kernel = {'language': 'python', 'name': 'python3', 'display_name': 'python3'}
        nb = {'cells': cells, 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}
        (folder/f'nbs/{name}.ipynb').write_text(json.dumps(nb), encoding='utf-8')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project with a home page and one lesson"
    folder = tmp_path_factory.mktemp('project')
    (folder/'nbs').mkdir()
    (folder/'pyproject.toml').write_text('[project]\nname = "small"\n[tool.nbdev]\nlib_path = "small"\n')
    (folder/'_quarto.yml').write_text(yaml.dump(CONFIG))
    (folder/'LICENSE').write_text('Do what you like.')
    write(folder, index=[cell('raw', '---\ntitle: Home\n---'), cell('markdown', '[next](02_second.ipynb#part)')],
          **{'02_second': GOOD})
    return folder


@pytest.fixture(scope='module')
def second(root, project):
    "The lesson's page of the small project"
    done = build(root, project, project/'_docs')
    assert done.returncode == 0 and not done.stderr, done.stderr
    return BeautifulSoup((project/'_docs/second.html').read_text(encoding='utf-8'), 'html.parser')


def test_pictures_get_their_own_text(second):
    first, gif = second('img')
    assert (first['alt'], gif['alt']) == ('first', 'second')
    assert first['src'].startswith('data:image/png') and gif['src'].startswith('data:image/gif')
    assert second.select('figcaption math'), 'mathematics in a caption'


def test_formulas_become_mathml_and_code_is_left_alone(second):
    block, = second.select('math[display="block"]')
    assert 'aligned' in block.annotation.get_text() and '(1)' in block.get_text() and block.mtable
    assert '$b$' in [o.get_text() for o in second('code')]
    assert second.select_one('.nobr > .math').next_sibling == ',', 'the comma stays beside its formula'


def test_no_live_widget_and_no_stale_progress_bar(second):
    text = second.main.get_text()
    assert '0/9' not in text and '10%' not in text and '100%' in text and 'done' in text
    assert 'interactive' not in text, 'a bar is no control'


def test_callout_over_cells_is_one_details(second):
    box, = second.select('details.fold')
    assert box.summary.get_text(strip=True) == 'Solution 1' and not box.has_attr('open')
    for part in ['answer = 42', 'the saved output', 'It is so.']: assert part in box.get_text()


def test_links_lead_to_the_page_names_of_nbdev(project, second):
    home = (project/'_docs/index.html').read_text(encoding='utf-8')
    assert 'href="second.html#part"' in home and '02_second' not in home
    assert second.find('a', href='LICENSE.txt') and (project/'_docs/LICENSE.txt').read_text() == 'Do what you like.'
    found = json.loads((project/'_docs/search.json').read_text(encoding='utf-8'))
    assert {e['href'].split('#')[0] for e in found} == {'index.html', 'second.html'}


def test_same_notebooks_same_bytes(root, project, second, tmp_path):
    assert build(root, project, tmp_path/'again').returncode == 0
    for path in sorted((project/'_docs').rglob('*')):
        again = tmp_path/'again'/path.relative_to(project/'_docs')
        if path.is_file(): assert path.read_bytes() == again.read_bytes(), path


def test_faults_end_the_build_and_are_named(root, project, second, tmp_path):
    shutil.copytree(project, tmp_path/'p')
    write(tmp_path/'p', **{'03_bad': BAD})
    done = build(root, tmp_path/'p', tmp_path/'p/_docs')
    assert done.returncode == 1
    lines = [o for o in done.stderr.splitlines() if o.startswith('bad.html:')]
    for fault in ['broken link nowhere.html', 'second.html#nothing (no such anchor)', 'broken link none.png',
                  'nosuchcommand', '2 headings of level 1', 'image 2 has no alternative text', 'another host: https://example.org/x.png']:
        assert any(fault in line for line in lines), (fault, done.stderr)
    assert (tmp_path/'p/_docs/second.html').exists(), 'the old site stays'
    assert not (tmp_path/'p/_docs/bad.html').exists()


def test_changed_and_removed_notebooks(root, project, second, tmp_path):
    shutil.copytree(project, tmp_path/'p')
    write(tmp_path/'p', index=[cell('raw', '---\ntitle: Home\n---'), cell('markdown', 'A changed page.')])
    os.utime(tmp_path/'p/nbs/index.ipynb', (0, 0))  # older than what was processed before
    (tmp_path/'p/nbs/02_second.ipynb').unlink()
    config = {**CONFIG, 'website': {'title': 't', 'sidebar': {'contents': ['index.ipynb']}}}
    (tmp_path/'p/_quarto.yml').write_text(yaml.dump(config))
    done = build(root, tmp_path/'p', tmp_path/'p/_docs')
    assert done.returncode == 0, done.stderr
    assert 'A changed page.' in (tmp_path/'p/_docs/index.html').read_text(encoding='utf-8')
    assert not (tmp_path/'p/_docs/second.html').exists()


# ---- README.md

def readme(root, *args):
    "Run tools/readme.py"
    return subprocess.run([sys.executable, root/'tools/readme.py', *args], capture_output=True, text=True)


def test_readme_links_and_syntax(root):
    text = re.sub(r'(?ms)^```.*?^```', '', (root/'README.md').read_text(encoding='utf-8'))
    for path in re.findall(r'\]\((?!https?:|#)([^)#\s]+)', text): assert (root/path).exists(), path
    assert not re.search(r'(?m)^:::|^#\||\{\{<|\)\{[.#]', text), 'what only quarto reads'


def test_readme_check_sees_a_difference(root, tmp_path):
    (tmp_path/'nbs').mkdir()
    note = '::: {.callout-note}\n## Take care\n[next](02_second.ipynb#part){.button} `[a](b)`\n:::'
    write(tmp_path, index=[cell('raw', '---\ntitle: Home\n---'), cell('markdown', note), cell('code', '#| hide\ng()'),
                           cell('code', '#| fig-alt: "a pixel"\nf()', shown(image__png=PIXEL))])
    assert readme(root, '--root', tmp_path).returncode == 0
    text = (tmp_path/'README.md').read_text()
    assert '**Take care**' in text and '[next](nbs/02_second.ipynb#part) `[a](b)`' in text and 'g()' not in text
    assert '```python\nf()\n```\n\n![a pixel](nbs/index_files/figure-1.png)' in text and ':::' not in text
    assert readme(root, '--root', tmp_path, '--check').returncode == 0
    (tmp_path/'nbs/index_files/figure-1.png').write_bytes(b'another')
    done = readme(root, '--root', tmp_path, '--check')
    assert done.returncode == 1 and 'figure-1.png' in done.stderr


# ---- in a browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    "A file server that prints nothing"
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def address(site):
    "The site, served on this machine"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture
def open_page(chromium, address):
    "Open a page in a window of its own; what it logs as an error, and requests to elsewhere, fail the test at its end"
    faults, contexts = [], []

    def open_page(name, width=1280, scheme='light'):
        contexts.append(chromium.new_context(viewport={'width': width, 'height': 844}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on('console', lambda m: faults.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: faults.append(str(e)))
        own = address, 'data:'
        page.on('request', lambda r: None if r.url.startswith(own) else faults.append(f'request: {r.url}'))
        page.goto(address + name)
        return page

    yield open_page
    for c in contexts: c.close()
    assert not faults


# what reaches over the window's right edge and is in no box that scrolls: the page's own grid would cut it off
CUT_OFF = '''[...document.querySelectorAll('main *')].filter(o => {
  if (o.getBoundingClientRect().right <= innerWidth + 1) return false
  for (let box = o.parentElement; box.tagName != 'MAIN'; box = box.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return false
  return true
}).map(o => o.outerHTML.slice(0, 100))'''


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_is_too_wide_or_logs_an_error(open_page, address, order, width, scheme):
    page = open_page('index.html', width, scheme)
    for name in order:
        page.goto(address + name)
        wide = page.evaluate('document.documentElement.scrollWidth')
        assert wide <= width, f'{name}: {wide} pixels'
        cut_off = page.evaluate(CUT_OFF)
        assert not cut_off, f'{name}: {cut_off}'
        broken = page.evaluate('[...document.images].filter(o => o.complete && !o.naturalWidth).map(o => o.alt)')
        assert not broken, f'{name}: {broken}'
        colour = page.evaluate('getComputedStyle(document.body).backgroundColor')
        dark = sum(map(int, re.findall(r'\d+', colour)[:3])) < 200
        assert dark == (scheme == 'dark'), f'{name}: {colour} though the reader prefers {scheme}'


def test_search_finds_a_word(open_page):
    page = open_page('index.html')
    page.fill('#quarto-search input', 'backward pass')
    page.wait_for_selector('.search-result')
    page.locator('.search-result', has_text='radients').first.click()
    page.wait_for_url('**/gradients.html*')
    assert page.locator('h1').count() == 1


def test_theme_toggle_switches_and_is_remembered(open_page):
    page = open_page('images.html')
    colour = 'getComputedStyle(document.body).backgroundColor'
    light = page.evaluate(colour)
    page.click('.quarto-color-scheme-toggle')
    page.wait_for_function(f'{colour} != {light!r}')
    page.reload()
    assert page.evaluate(colour) != light


def test_solution_opens_by_mouse_and_keyboard(open_page):
    page = open_page('data.html')
    box = page.locator('details.fold').first
    code = box.locator('pre').first
    assert not code.is_visible()
    box.locator('summary').click()
    code.wait_for(state='visible')
    box.locator('summary').press('Enter')
    code.wait_for(state='hidden')


def test_keyboard_reaches_the_content_first(open_page):
    page = open_page('images.html')
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    page.keyboard.press('Enter')
    assert page.url.endswith('#quarto-document-content')


def test_phone_menu_opens(open_page, order):
    page = open_page('images.html', 390)
    link = page.locator('#quarto-sidebar a[href="model.html"]')
    page.click('.quarto-btn-toggle')
    link.click()
    page.wait_for_url('**/model.html')
