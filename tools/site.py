"""Build the documentation site: nbdev processes the notebooks, quarto or smalldocs renders them, each page is checked.

`_quarto.yml` at the top is the only configuration. Both renderers get the same processed notebooks from `_proc`, in
which every figure already stands as HTML with its alternative text. The pages are then finished (equations become
MathML, nothing is loaded from another host) and checked (links, anchors, images, headings). Any fault ends the build.
"""
import argparse
import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup
from fastcore.nbio import nb_frontmatter, read_nb, write_nb
from math_core import LatexError, LatexToMathML
from PIL import Image

import playground

ROOT = Path(__file__).resolve().parent.parent
CONFIG = '_quarto.yml'
# what smalldocs says of the keys that only quarto reads (`finish_page` and `rename_pages` do their work), and of broken
# links, which `check` finds in every page
EXPECTED = re.compile(r'format\.html\.(html-math-method|respect-user-color-scheme) is ignored$|'
                      r': output-file is not read by smalldocs$|: broken link ')
CDN = re.compile(r'//(cdn\.jsdelivr\.net|cdnjs\.cloudflare\.com|unpkg\.com|polyfill\.io)/')
IMPORT = re.compile(r'''@import\s*(?:url\(\s*)?(["']?)(?:https?:)?//[^"')]*\1\s*\)?[^;]*;''')
PICTURES = 'image/svg+xml', 'image/png', 'image/jpeg', 'image/gif'
WIDGET = 'application/vnd.jupyter.widget-view+json'
PROGRESS = re.compile(r'\d+%\||\d\w+ \[\d\d:\d\d')  # a progress bar in text, with a total or without
LOADED = {'script': 'src', 'link': 'href', 'img': 'src', 'iframe': 'src', 'source': 'src', 'video': 'src',
          'audio': 'src', 'embed': 'src', 'object': 'data'}  # what a browser fetches with the page
math_converter = LatexToMathML(annotation=True, allow_unreliable_rendering=True, fancy_error=False)


class SiteError(Exception):
    "A fault that ends the build, one line for each finding."


# ---- 1. the processed notebooks

def option(cell, name: str, n: int) -> str:
    "A code cell's directive `name` for its picture `n`: a list has one text for each, a single text is for them all."
    value = cell.directives.get(name, '')
    if value[:1] in ('"', "'", '['): value = yaml.safe_load(value)
    if isinstance(value, list): value = value[n] if n < len(value) else ''
    return str(value)


def inline(text: str) -> str:
    "A caption's HTML, with `$…$` marked as mathematics."
    return re.sub(r'\$([^$]+)\$', r'<span class="math inline">\\(\1\\)</span>', html.escape(text, quote=False))


def figure(
    mime: str, # the picture's type
    data: str, # base64, or the text of an SVG
    alt: str, # alternative text; none gives an <img> without alt, which `check` refuses
    caption: str='', # a line below the picture
) -> str: # HTML that holds the picture itself
    "A picture as a figure; small ones are enlarged by a whole factor with crisp pixels."
    kind = 'figure'
    if mime == 'image/svg+xml': data, size = base64.b64encode(data.encode()).decode(), ''
    else:
        w, h = Image.open(io.BytesIO(base64.b64decode(data))).size
        scale = max(1, 224//max(w, h))
        crisp = ' data-pixels="true"' if scale > 1 or mime == 'image/gif' else ''
        if w*scale > 560: kind = 'figure wide'  # it scrolls on a phone, instead of getting tiny
        size = f' width="{w*scale}" height="{h*scale}"{crisp}'
    alt = f' alt="{html.escape(alt)}"' if alt else ''
    caption = f'\n<figcaption>{inline(caption)}</figcaption>' if caption else ''
    src = f'data:{mime};base64,{"".join(data.split())}'
    return f'<figure class="{kind}">\n<img src="{src}"{alt} class="figure-img img-fluid"{size}>{caption}\n</figure>'


def merge_streams(outputs: list) -> list:
    "What was printed in several pieces, in one."
    merged = []
    for out in outputs:
        last = merged[-1] if merged else {}
        if out['output_type'] == 'stream' and last.get('name') == out['name']: last['text'] += out['text']
        else: merged.append(out)
    return merged


def show_output(out: dict, cell, n: int) -> dict | None:
    "One output as both renderers show it: picture `n` of its cell as HTML, no live widget, no stale progress bar."
    if out['output_type'] == 'stream':
        text = re.sub(r'[^\n]*\r(?!\n)', '', out['text'])  # what a terminal would still show
        return {**out, 'text': text} if text.strip() else None
    data = out.get('data', {})
    mime = next((m for m in PICTURES if m in data), None)
    if mime and 'text/html' not in data:
        data = {'text/html': figure(mime, data[mime], option(cell, 'fig-alt', n), option(cell, 'fig-cap', n))}
    elif WIDGET in data and 'text/html' not in data:
        if PROGRESS.search(data.get('text/plain', '')): return None
        data = {'text/html': '<p class="live">An interactive control: run this notebook to use it.</p>'}
    elif 'text/html' in data and not re.sub(r'(?s)<style.*?</style>|<!--.*?-->|\s', '', data['text/html']): return None
    return {**out, **({'data': data} if data else {})}


@cache
def documented(notebook: Path) -> set[str]:
    "The symbols whose signature tables stand in a processed notebook."
    calls = [(re.search(r'(?m)^show_doc\(([\w.]+)', c.source), c) for c in read_nb(notebook).cells]
    return {m[1] for m, c in calls if m and c.get('outputs')}


def api_links(source: str, notebook: Path, proc: Path) -> str:
    "Send nbdev's links to symbols to the page that documents them; a symbol without a page stays plain code."
    source = re.sub(r'(?m)^\[source\]\(/[^)]*\)\{[^}]*\}\n*', '', source)  # no code host is known
    def link(m):
        code, page, symbol = m.groups()
        pages = [proc/f'api/{page}.ipynb', *proc.glob(f'*_{page}.ipynb')]
        found = next((p for p in pages if p.exists() and code.strip('`()') in documented(p)), None)
        return f'[{code}]({os.path.relpath(found, notebook.parent)}#{symbol})' if found else code
    return re.sub(r'\[(`[^`]+`)\]\(/(\w+)\.html#([\w.]+)\)', link, source)


def project_files(source: str, proc: Path) -> str:
    "Copy the project's own files that a page links to, such as ../LICENSE, into the site as plain text."
    def link(m):
        file = proc.parent/m[1]
        if not file.is_file(): return m[0]
        shutil.copy(file, proc/f'{file.stem}.txt')
        return f']({file.stem}.txt)'
    return re.sub(r'\]\(\.\./([\w-]+(?:\.\w+)?)\)', link, source)


def prepare_notebook(path: Path, proc: Path):
    "Rewrite one processed notebook so that quarto and smalldocs show the same."
    nb = read_nb(path)
    nb.metadata.pop('widgets', None)  # quarto would load the widget manager from another host
    heading = next((c for c in nb.cells if c.cell_type == 'markdown' and c.source.startswith('# ')), None)
    if heading and nb_frontmatter(nb).get('title'):  # the page's title says it already
        heading.source = heading.source.partition('\n')[2].lstrip()
    nb.cells = [c for c in nb.cells if 'from nbdev.showdoc import' not in c.source]  # what an API page is made with
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = api_links(cell.source, path, proc)
        if cell.cell_type == 'markdown' and path.parent == proc: cell.source = project_files(cell.source, proc)
        if cell.cell_type != 'code': continue
        shown, n = [], 0
        for out in merge_streams(cell.outputs):
            shown.append(show_output(out, cell, n))
            n += any(m in out.get('data', {}) for m in PICTURES)
            text = (shown[-1] or {}).get('data', {}).get('text/markdown')
            if text: shown[-1]['data']['text/markdown'] = api_links(text, path, proc)
        cell.outputs = [o for o in shown if o]
    write_nb(nb, path)


def prepare(root: Path) -> Path:
    "Process all notebooks with nbdev, from scratch: an API page also changes when only its module did."
    from nbdev.serve import proc_nbs
    os.chdir(root)  # nbdev's workers find pyproject.toml from here
    proc = Path(proc_nbs(str(root/'nbs'), n_workers=2, force=True))
    shutil.copy(root/CONFIG, proc/CONFIG)
    documented.cache_clear()
    for path in sorted(proc.rglob('*.ipynb')): prepare_notebook(path, proc)
    return proc


# ---- 2. the pages

def render(proc: Path, renderer: str) -> Path:
    "Render the processed notebooks; returns the folder of pages."
    out = proc/yaml.safe_load((proc/CONFIG).read_text(encoding='utf-8'))['project']['output-dir']
    shutil.rmtree(out, ignore_errors=True)
    cmd = ['quarto', 'render', str(proc), '--no-execute'] if renderer == 'quarto' else \
        [sys.executable, '-m', 'smalldocs.cli', 'render', str(proc), '--quiet']
    done = subprocess.run(cmd, stderr=subprocess.PIPE, text=True, encoding='utf-8')
    said = [o for o in done.stderr.splitlines() if o.strip() and not EXPECTED.search(o)]
    if done.returncode or (renderer == 'smalldocs' and said): raise SiteError('\n'.join(said) or f'{cmd[0]} failed')
    if renderer == 'smalldocs': rename_pages(proc, out)
    return out


def rename_pages(proc: Path, out: Path):
    "Give smalldocs' pages the names that nbdev asks quarto for (`output-file`): 01_data.html becomes data.html."
    names = {}
    for path in proc.rglob('*.ipynb'):
        new = nb_frontmatter(read_nb(path)).get('output-file')
        if new: names[path.relative_to(proc).with_suffix('.html').as_posix()] = new
    for old, new in names.items(): (out/old).rename((out/old).with_name(new))
    changed = [(o, o.rpartition('/')[2], n) for o, n in names.items() if o.rpartition('/')[2] != n]
    for page in sorted(out.rglob('*.html')):
        soup, here = read_page(page), page.relative_to(out).parent
        for a in soup.find_all(href=True):
            target = os.path.normpath(here/urlsplit(a['href']).path) if not urlsplit(a['href']).scheme else ''
            for old, end, new in changed:
                if target == old: a['href'] = a['href'].replace(end, new, 1)
        page.write_text(str(soup), encoding='utf-8')
    index = out/'search.json'
    entries = json.loads(index.read_text(encoding='utf-8'))
    for e in entries:
        path, _, anchor = e['href'].partition('#')
        path = str(Path(path).with_name(names.get(path, Path(path).name)))
        e['href'] = e['objectID'] = path + ('#'+anchor if anchor else '')
    index.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')


def read_page(path: Path) -> BeautifulSoup:
    "A page, parsed."
    return BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')


def to_mathml(tex: str, display: bool) -> str:
    r"TeX, with or without its `\(…\)` or `\[…\]`, as MathML."
    tex = re.sub(r'^\\[(\[]|\\[)\]]$', '', tex.strip()).strip()
    if r'\tag' in tex and r'\begin{equation}' not in tex: tex = rf'\begin{{equation}}{tex}\end{{equation}}'
    try: return math_converter.convert_with_local_state(tex, displaystyle=display)
    except LatexError as e: raise SiteError(f'cannot convert the formula {tex!r}: {e}') from e


def finish_page(path: Path):
    "Equations to MathML, callouts to <details>, nothing from a content delivery network, a title and a skip link."
    soup = read_page(path)
    for span in soup.select('span.math'):
        if span.find('math'): continue  # quarto has converted it
        mathml = BeautifulSoup(to_mathml(span.get_text(), 'display' in span['class']), 'html.parser')
        span.clear()
        span.append(mathml)
    for span in soup.select('span.math.inline'):  # no line starts with the comma after a formula
        after = span.next_sibling
        mark = re.match(r'[.,;:!?)’”]+', after) if isinstance(after, str) else None
        if mark:
            after.replace_with(after[mark.end():])
            span.wrap(soup.new_tag('span', attrs={'class': 'nobr'})).append(mark[0])
    for name, attr in LOADED.items():
        for tag in soup.find_all(name, {attr: CDN}): tag.decompose()
    for tag in soup.find_all('script', string=re.compile(r"^\s*define\('jquery'")): tag.decompose()  # for require.js
    for box in soup.select('div.callout:has(> .callout-header[data-bs-toggle])'): fold(soup, box)
    for table in soup.select('main table'):
        if not table.find_parent(class_='sd-table'): table.wrap(soup.new_tag('div', attrs={'class': 'sd-table'}))
    bar, home = soup.select_one('.quarto-secondary-nav .d-flex'), soup.select_one('.sidebar-title a')
    if bar and home and not bar.find('a'):  # smalldocs leaves a phone's top bar without the site's name
        title = soup.new_tag('a', href=home['href'], attrs={'class': 'bar-title'})
        title.string = home.get_text()
        bar.append(title)
    if not soup.select_one('a.skip'):
        skip = soup.new_tag('a', href='#quarto-document-content', attrs={'class': 'skip'})
        skip.string = 'Skip to the content'
        soup.body.insert(0, skip)
    path.write_text(str(soup), encoding='utf-8')


def fold(soup: BeautifulSoup, box):
    "Make a collapsible callout a <details>: it opens by mouse, keyboard and search, and needs no script."
    header, body = box.select_one('.callout-header'), box.select_one('.callout-body-container')
    details = soup.new_tag('details', attrs={'class': 'fold'})
    if header.get('aria-expanded') == 'true': details['open'] = ''
    if box.get('id'): details['id'] = box['id']
    summary = soup.new_tag('summary')
    title = box.select_one('.callout-title-container')
    for o in list(title.children): summary.append(o)
    body['class'] = 'fold-body'
    details.extend([summary, body])
    box.replace_with(details)


def finish(out: Path) -> list[str]:
    "Finish all pages and stylesheets in `out`; returns what could not be converted."
    faults = []
    for page in sorted(out.rglob('*.html')):
        try: finish_page(page)
        except SiteError as e: faults.append(f'{page.relative_to(out)}: {e}')
    for css in out.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        if IMPORT.search(text): css.write_text(IMPORT.sub('', text), encoding='utf-8')  # web fonts of another host
    return faults


# ---- 3. the checks

TEX = re.compile(r'\$\$|\\[(\[]|\\[A-Za-z]{2,}')


def check_page(path: Path, soup: BeautifulSoup, ids: dict, out: Path) -> list[str]:
    "What is wrong with one page; `ids` has the anchors of every page."
    faults = []
    titles = len(soup.select('main h1'))
    if titles != 1: faults.append(f'{titles} headings of level 1, expected one')
    for n, img in enumerate(soup.find_all('img'), 1):
        if not img.get('alt', '').strip():
            faults.append(f'image {n} has no alternative text: {img.get("src", "")[:60]}')
    for name, attr in LOADED.items():
        faults += [f'<{name}> loads from another host: {o[attr]}' for o in soup.find_all(name, {attr: True})
                   if urlsplit(o[attr]).netloc]
    for text in soup.find_all(string=TEX):
        if not text.find_parent(['pre', 'code', 'script', 'style', 'annotation', 'textarea']):
            faults.append(f'unconverted TeX: {text.strip()[:80]!r}')
    for tag in soup.find_all(lambda o: o.get('href') or o.get('src')):
        url = tag.get('href') or tag['src']
        parts = urlsplit(url)
        if parts.scheme or parts.netloc: continue
        target = Path(os.path.normpath(path.parent/unquote(parts.path))) if parts.path else path
        if target.is_dir(): target /= 'index.html'
        if not target.is_relative_to(out) or not target.is_file(): faults.append(f'broken link {url}')
        elif parts.fragment and target in ids and unquote(parts.fragment) not in ids[target]:
            faults.append(f'broken link {url} (no such anchor)')
    return [f'{path.relative_to(out)}: {o}' for o in dict.fromkeys(faults)]


def check(out: Path) -> list[str]:
    "What is wrong with the pages and stylesheets in `out`."
    pages = {p: read_page(p) for p in sorted(out.rglob('*.html'))}
    ids = {p: {o.get('id') or o['name'] for o in s.select('[id], a[name]')} for p, s in pages.items()}
    faults = [f for p, s in pages.items() for f in check_page(p, s, ids, out)]
    faults += [f'{c.relative_to(out)}: loads {u}' for c in sorted(out.rglob('*.css'))
               for u in re.findall(r'''url\(\s*["']?((?:https?:)?//[^"')]+)''', c.read_text(encoding='utf-8'))]
    return faults


def build(root: Path, out: Path, renderer: str) -> int:
    "Build the site of the project in `root` into `out`; returns the number of pages. A faulty site replaces nothing."
    made = render(prepare(root), renderer)
    faults = finish(made)
    if (root/'playground').is_dir():
        try: playground.build(root/'playground', made/'playground')
        except playground.PlaygroundError as e: raise SiteError(str(e)) from e
    faults += check(made)
    if faults: raise SiteError('\n'.join(faults))
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(made, out)
    return len(list(out.rglob('*.html')))


def main(argv=None) -> int:
    "The command line; exit code 1 lists what is wrong."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--root', type=Path, default=ROOT, help='the project folder')
    p.add_argument('--out', type=Path, help='the output folder (_docs in the project folder)')
    p.add_argument('--renderer', choices=['quarto', 'smalldocs'], help='quarto where it is installed, else smalldocs',
                   default='quarto' if shutil.which('quarto') else 'smalldocs')
    args = p.parse_args(argv)
    root, start = args.root.resolve(), time.time()
    out = (args.out or root/'_docs').resolve()
    try: n = build(root, out, args.renderer)
    except SiteError as e:
        print(f'The site was not built:\n{e}', file=sys.stderr)
        return 1
    print(f'{n} pages in {out}, by {args.renderer}, in {time.time()-start:.0f} s')
    return 0


if __name__ == '__main__': sys.exit(main())
