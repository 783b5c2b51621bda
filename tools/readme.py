"""Write README.md from nbs/index.ipynb, the home page's notebook; with `--check`, only compare the two.

Markdown cells are kept, code cells become fenced blocks, saved outputs follow them, pictures are written to
`nbs/index_files/`. Links lead to the notebooks, which a code host shows; what only quarto reads is dropped.
"""
import argparse
import base64
import re
import sys
from pathlib import Path

import yaml
from fastcore.nbio import nb_frontmatter, read_nb

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- Written by tools/readme.py from nbs/index.ipynb: edit that notebook. -->'
SUFFIXES = {'image/png': 'png', 'image/jpeg': 'jpg', 'image/gif': 'gif', 'image/svg+xml': 'svg'}
HIDDEN = {'hide', 'default_exp', 'export', 'exporti'}
DIVS = re.compile(r'(?m)^ *(:{3,}) *(\{[^}\n]*\}|[\w-]+)? *\n?(?:#+ +(.*)\n)?')
LINK = re.compile(r'(\]\(|<(?:img|a)\b[^>]*?\b(?:src|href)=")(?![a-z][a-z+.-]*:|#|/)([^)"\s]+)')
ATTRS = re.compile(r'(?<=[)\]`])\{[^}\n]*\}|(?m:(?<=\S) +\{[#.][^}\n]*\} *$)')


def plain_markdown(text: str) -> str:
    "Markdown that a code host shows as the site does: no attributes, no divs, links from the top folder."
    parts = re.split(r'(?ms)(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)', text)  # code stays as it is
    for i in range(0, len(parts), 2): parts[i] = LINK.sub(lambda m: m[1] + local(m[2]), DIVS.sub(div, parts[i]))
    for i in range(0, len(parts), 2): parts[i] = ATTRS.sub('', parts[i])
    return ''.join(parts).strip()


def local(path: str) -> str:
    "A link of the notebook, which stands in nbs/, as seen from the top folder."
    if path.startswith('playground/'): return 'playground'  # a page of the site; here is what it is made of
    return path[3:] if path.startswith('../') else f'nbs/{path.removeprefix("./")}'


def div(m: re.Match) -> str:
    "A quarto div: its title, if it has one, becomes a line in bold; the fences go."
    return f'**{m[3]}**\n' if m[3] else ''


def fenced(text: str, lang: str='') -> str:
    "A fenced block."
    fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence}{lang}\n{text.rstrip()}\n{fence}'


def option(value: str) -> str:
    "The text of a directive, which may be quoted."
    return str(yaml.safe_load(value)) if value[:1] in ('"', "'") else value


def show_output(out: dict, cell, pictures: dict) -> str:
    "One saved output; a picture is added to `pictures`, by its path."
    data = out.get('data', {})
    if out['output_type'] == 'stream': data = {'text/plain': re.sub(r'[^\n]*\r(?!\n)', '', out['text'])}
    mime = next((m for m in SUFFIXES if m in data), None)
    if mime:
        alt = option(cell.directives.get('fig-alt', ''))
        if not alt: raise SystemExit('nbs/index.ipynb: a picture has no `#| fig-alt:` directive')
        path = f'nbs/index_files/figure-{len(pictures)+1}.{SUFFIXES[mime]}'
        pictures[path] = data[mime].encode() if mime == 'image/svg+xml' else base64.b64decode(data[mime])
        return f'![{alt}]({path})'
    if 'text/markdown' in data: return plain_markdown(data['text/markdown'])
    return fenced(data['text/plain']) if data.get('text/plain', '').strip() else ''


def readme(notebook: Path) -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its pictures by path."
    nb = read_nb(notebook)
    fm, pictures = nb_frontmatter(nb), {}
    titled = any(c.cell_type == 'markdown' and c.source.startswith('# ') for c in nb.cells)
    parts = [NOTE] if titled else [f'# {fm["title"]}', NOTE]
    for cell in nb.cells:
        opts = cell.directives if cell.cell_type == 'code' else {}
        if cell.cell_type == 'markdown': parts.append(plain_markdown(cell.source))
        if cell.cell_type != 'code' or HIDDEN & opts.keys() or opts.get('include') == 'false': continue
        code = re.sub(r'(?m)^#\|.*\n?', '', cell.source).strip()
        if code and opts.get('echo') != 'false': parts.append(fenced(code, 'python'))
        if opts.get('output') != 'false': parts += [show_output(o, cell, pictures) for o in cell.outputs]
    return '\n\n'.join(filter(None, parts)) + '\n', pictures


def main(argv=None) -> int:
    "The command line; exit code 1 where `--check` finds a difference."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--check', action='store_true', help='write nothing; exit with 1 where a file differs')
    p.add_argument('--root', type=Path, default=ROOT, help='the project folder')
    args = p.parse_args(argv)
    text, files = readme(args.root/'nbs/index.ipynb')
    files = {'README.md': text.encode(), **files}
    old = {o.relative_to(args.root).as_posix() for o in (args.root/'nbs/index_files').glob('figure-*')}
    if args.check:
        wrong = sorted((old - files.keys()) | {n for n, b in files.items()
                                                if not (args.root/n).is_file() or (args.root/n).read_bytes() != b})
        if wrong: print(f'not as in nbs/index.ipynb: {", ".join(wrong)}; run python tools/readme.py', file=sys.stderr)
        return int(bool(wrong))
    for name in old - files.keys(): (args.root/name).unlink()
    for name, content in files.items():
        (args.root/name).parent.mkdir(parents=True, exist_ok=True)
        (args.root/name).write_bytes(content)
    return 0


if __name__ == '__main__': sys.exit(main())
