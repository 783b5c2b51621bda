"""Run notebooks from fresh kernels and save their outputs: `python tools/execute.py [NOTEBOOK …] [--slow]`.

Cells marked `#| slow` or `#| eval: false` are left out and keep their outputs; `--slow` runs the slow ones.
A notebook is saved, in one move, only if all of its cells ran.
"""
import argparse
import copy
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import nbdev_clean

NBS = Path(__file__).resolve().parent.parent/'nbs'


def skipped(cell, slow):
    "Whether a cell is left out"
    marks = set(re.findall(r'(?m)^#\| *(slow|eval: *false)\b', cell.source)) if cell.cell_type == 'code' else set()
    return bool(marks - ({'slow'} if slow else set()))


def execute(notebook, folder, slow=False, timeout=3600):
    "A copy of `notebook` with new outputs, run by a new kernel in `folder`"
    done = copy.deepcopy(notebook)
    run = copy.deepcopy(notebook)
    keep = [i for i, cell in enumerate(run.cells) if cell.cell_type == 'code' and not skipped(cell, slow)]
    run.cells = [run.cells[i] for i in keep]
    NotebookClient(run, timeout=timeout, kernel_name='python3', record_timing=False, coalesce_streams=True,
                   extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(folder)}}).execute()
    for i, cell in zip(keep, run.cells):
        done.cells[i]['outputs'], done.cells[i]['execution_count'] = cell.outputs, cell.execution_count
    return done


def save(notebook, path):
    "Write `notebook`, cleaned, in one move"
    temporary = path.with_name(f'new-{path.name}')
    try:
        nbformat.write(notebook, temporary)
        nbdev_clean(fname=str(temporary))
        os.replace(temporary, path)
    finally: temporary.unlink(missing_ok=True)


def main(argv=None):
    "Run the notebooks that are named, or all; exit code 1 if one failed"
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('notebooks', nargs='*', type=Path, metavar='NOTEBOOK', help='(default: all in nbs/)')
    parser.add_argument('--slow', action='store_true', help='run the cells marked slow too')
    parser.add_argument('--timeout', type=int, default=3600, help='seconds that a cell may take (default: 3600)')
    args = parser.parse_args(argv)
    paths = args.notebooks or sorted(p for p in NBS.rglob('*.ipynb') if not p.name.startswith(('.', '_')))
    if missing := [str(p) for p in paths if not p.is_file()]: parser.error(f'no such notebook: {", ".join(missing)}')
    failed = []
    for path in paths:
        start = time.perf_counter()
        try: save(execute(nbformat.read(path, 4), path.resolve().parent, args.slow, args.timeout), path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed.append(path.name)
            print(e, file=sys.stderr)
        print(f'{path.name:<24} {time.perf_counter() - start:7.1f} s {"FAILED, left as it was"*(path.name in failed)}',
              flush=True)
    return bool(failed)


if __name__ == '__main__': sys.exit(main())
