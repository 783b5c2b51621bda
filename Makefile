# `make` draws what a prompt says, `make test` checks everything, `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# not ?=: some shells have a PROMPT of their own
PROMPT = a bold red seven above a blue 3
OUTPUT ?= scene.png

PROJECT := settings.ini setup.py pyproject.toml constraints.txt
BIN := $(VENV)/bin
RUN := $(BIN)/python
# for what starts commands of the environment by their names
WITHIN = PATH="$$(cd $(BIN) && pwd):$$PATH"
# what pip says goes to a log, and its end to the terminal if it fails
PIP_INSTALL = $(RUN) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
PIP_LOG = > $(VENV)/pip.log 2>&1 || { tail -n 20 $(VENV)/pip.log >&2; \
  echo 'The installation failed; all of what pip said is in $(VENV)/pip.log' >&2; exit 1; }
# two notebooks at a time, one thread each: two cores are the machine that this course is written for
WORKERS ?= 2
export TOKENIZERS_PARALLELISM = false
# another environment may be active in the terminal that make was called from
unexport VIRTUAL_ENV

.NOTPARALLEL:
.PHONY: all install dev test check browser notebooks site benchmark lessons execute constraints clean distclean help

all: install
	@$(BIN)/sdcourse generate "$(PROMPT)" -o $(OUTPUT)

help:
	@echo 'make              install into $(VENV) and draw what PROMPT says, $(OUTPUT)'
	@echo 'make test         every check: the quick ones, all notebooks, the site, pytest with a browser'
	@echo 'make check        the quick checks only: exports, clean notebooks, README, staircase, ruff'
	@echo 'make lessons      open the notebooks in JupyterLab'
	@echo 'make site         build the documentation and the playground into _docs/ (needs Node.js and npm)'
	@echo 'make benchmark    how good and how fast the lessons are, beside their peers: benchmarks/*.json, about 75 minutes'
	@echo 'make execute      run every notebook from a fresh kernel and save the outputs'
	@echo '                  (SLOW=1: slow cells too; NB="nbs/01_data.ipynb": only that one)'
	@echo 'make constraints  write the installed versions down in constraints.txt'
	@echo 'make clean        remove what was built; make distclean removes $(VENV) as well'
	@echo 'Variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV), WORKERS=$(WORKERS),'
	@echo '           PROMPT="$(PROMPT)", OUTPUT=$(OUTPUT)'

install: $(VENV)/installed
dev: $(VENV)/installed-dev

$(VENV)/bin/pip:
	@command -v '$(PYTHON)' >/dev/null 2>&1 || { \
	  echo 'sdcourse needs Python 3.11 or newer, and $(PYTHON) was not found: make PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
	  "sdcourse needs Python 3.11 or newer; $(PYTHON) is " + v + ": make PYTHON=/path/to/a/newer/python")'
	@echo 'Creating $(VENV)'
	@'$(PYTHON)' -m venv '$(VENV)' || { rm -rf '$(VENV)'; \
	  echo '$(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

$(VENV)/installed: $(PROJECT) | $(VENV)/bin/pip
	@echo 'Installing sdcourse into $(VENV): some minutes the first time, torch is large (log: $(VENV)/pip.log)'
	@$(PIP_INSTALL) -e . $(PIP_LOG)
	@touch $@

$(VENV)/installed-dev: $(PROJECT) | $(VENV)/bin/pip
	@echo 'Installing sdcourse and its tools into $(VENV): some minutes the first time (log: $(VENV)/pip.log)'
	@$(PIP_INSTALL) -e '.[dev]' $(PIP_LOG)
	@touch $(VENV)/installed $@

check: dev
	@echo '== quick checks: exports, clean notebooks, README, staircase, ruff'
	@$(WITHIN) python -m pytest -q tests/test_project.py tests/test_staircase.py tests/test_notebooks.py

notebooks: dev
	@echo '== notebooks, each from a fresh kernel (slow cells are left out)'
	@$(WITHIN) OMP_NUM_THREADS=1 nbdev-test --n-workers $(WORKERS) --timing

site: dev
	@echo '== site'
	@$(WITHIN) python tools/site.py

browser: dev
	@echo '== browser'
	@$(RUN) tools/chromium.py

test: check browser notebooks site
	@echo '== everything that spans modules'
	@chromium=$$($(RUN) tools/chromium.py) && $(WITHIN) CHROMIUM="$$chromium" python -m pytest

benchmark: dev
	@$(WITHIN) python benchmarks/gradients.py --json benchmarks/gradients.json
	@$(WITHIN) python benchmarks/digits.py --json benchmarks/digits.json
	@$(WITHIN) python benchmarks/vae.py --json benchmarks/vae.json
	@$(WITHIN) python benchmarks/schedulers.py --json benchmarks/schedulers.json
	@$(WITHIN) python benchmarks/pipeline.py --json benchmarks/pipeline.json
	@$(WITHIN) python benchmarks/scenes.py --json benchmarks/scenes.json
	@$(WITHIN) python benchmarks/training.py --json benchmarks/training.json
	@$(WITHIN) python benchmarks/growth.py --json benchmarks/growth.json
	@$(WITHIN) python benchmarks/limits.py --json benchmarks/limits.json
	@$(WITHIN) python benchmarks/peers.py --json benchmarks/peers.json

lessons: dev
	@$(WITHIN) jupyter lab nbs

execute: dev
	@$(WITHIN) python tools/execute.py $(if $(SLOW),--slow) $(NB)

# what is installed at this moment; install newer versions by hand first, and run the tests
constraints:
	@$(RUN) -m pip list --format=freeze --exclude sdcourse --exclude pip > $(VENV)/constraints
	@{ echo '# The versions that the tests passed with, written by `make constraints`'; \
	  sed 's/+.*//' $(VENV)/constraints | LC_ALL=C sort -f; } > constraints.txt
	@touch $(VENV)/installed $(VENV)/installed-dev

clean:
	@rm -rf _docs _proc build dist *.egg-info scene.png scene.gif digits.png digits.gif .pytest_cache .ruff_cache .hypothesis
	@find nbs sdcourse tests tools benchmarks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean
	@rm -rf '$(VENV)'
