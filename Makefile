# Every target sets up .venv by itself; nothing but Python (3.11 to 3.13) and make is needed.
PYTHON ?= python3
PROFILE ?= tiny
LAYOUT ?= hub
ARGS ?=
BIN := .venv/bin
COLAB := .venv-colab/bin
COLAB313 := .venv-colab-313/bin
PYTHON313 = $(shell for p in python3.13 $$HOME/.pyenv/versions/3.13.*/bin/python; do if $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null; then echo $$p; break; fi; done)
TORCHAO := .venv-bench/bin
BOOK := .venv-book/bin
TOOLS := .venv-tools/bin
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --nbval-sanitize-with tests/nbval_sanitize.cfg
# What does not depend on the packages' versions runs once, in `make test`.
NOT_ABOUT_VERSIONS := $(addprefix --ignore=tests/test_,bad_calls.py bad_commands.py bad_input.py ci.py contract.py contributing.py data.py fresh_clone.py github_view.py jupyter.py mutations.py pictures.py readme.py resources.py secrets.py supply.py symbols.py)
# The guard makes every connection but a loopback one fail, in tests, notebooks and command lines alike.
GUARDED := PYTHONPATH=$(CURDIR)/tests/guard QLORA_PROFILE=tiny TOKENIZERS_PARALLELISM=false

.PHONY: finetune test test-colab test-colab-313 soak soak-float16 lab refresh setup-cell study mutations bench bench-nf4 pretrain rehearse-7b tickets hero book test-browser lint lock licences audit

finetune: .venv/ready  ## fine-tune on this machine: PROFILE=tiny (default), auto, or a name; ARGS="--seed 1" for more
	$(BIN)/python -m helpers.training --profile $(PROFILE) $(ARGS)

test: lint  ## ruff, all notebooks (nbval), contract and unit tests
	$(GUARDED) $(BIN)/python -m pytest $(NBVAL) notebooks tests

test-colab: .venv-colab/ready  ## the same on the package versions of Colab
	$(GUARDED) $(COLAB)/python -m pytest $(NBVAL) $(NOT_ABOUT_VERSIONS) notebooks tests

test-colab-313: .venv-colab-313/ready  ## the same with Colab's torch and Python too, 2.11.0 and 3.13: 5 GB of disk, so no part of CI
	$(GUARDED) $(COLAB313)/python -m pytest $(NBVAL) $(NOT_ABOUT_VERSIONS) notebooks tests

# Without the conftest of tests/, which needs torch: .venv-book has none
test-browser: book .venv/ready  ## the book and JupyterLab in a real browser (Chromium, else skipped); screenshots in build/screenshots
	$(BOOK)/python -m pytest --confcutdir=tests/browser tests/browser $(ARGS)

book: .venv-book/ready  ## the series as a web site, in build/book/html: nothing is executed, nothing fetched
	rm -rf build/book
	mkdir -p build/book/source
	cp $(wildcard notebooks/*.ipynb notebooks/*.md) notebooks/book/index.md build/book/source
	PYTHONPATH=$(CURDIR)/tests/guard $(BOOK)/python -m sphinx -q -n -W --keep-going -c notebooks/book -d build/book/doctrees build/book/source build/book/html

soak: .venv/ready  ## kill the fine-tune 80 times, execute each notebook 7 times, repeat the quick tests 50 times; about an hour and a half; ARGS="kills --kills 5" for less
	$(GUARDED) $(BIN)/python -m tests.soak $(ARGS)

soak-float16: .venv/ready  ## train in float32, bfloat16 and float16 over five seeds and compare scores; about an hour; ARGS="--seeds 2" for less
	$(BIN)/python -m tests.float16 $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: .venv/ready  ## JupyterLab, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

refresh: .venv/ready  ## execute the notebooks and store their outputs; ONLY="01 05" for some
	$(GUARDED) $(BIN)/python tests/refresh.py $(ONLY)

setup-cell: .venv/ready  ## write tests/setup_cell.py into every notebook
	$(BIN)/python tests/refresh.py --setup-cell

study: .venv/ready  ## the runs of notebook 07 that data/study.csv lacks: all, or EXPERIMENT=few-data; about an hour and a half on two cores
	$(BIN)/python -m helpers.study $(if $(EXPERIMENT),--experiment $(EXPERIMENT)) $(ARGS)

mutations: .venv/ready  ## plant faults one at a time and see the tests catch each; about half an hour; ARGS="rank" for some
	$(BIN)/python -m tests.mutations $(ARGS)

bench: .venv/ready  ## useful tokens a second: length-grouped batches against padding to the maximum
	$(BIN)/python -m tests.bench_batching

bench-nf4: .venv-bench/ready  ## NF4 by hand against bitsandbytes and torchao: time and memory (without torchao if it cannot be had)
	$(TORCHAO)/python -m tests.bench_nf4

tickets: .venv/ready  ## write data/tickets again
	$(BIN)/python data/build_tickets.py

hero: .venv/ready  ## draw README's first figure again, from notebook 05's stored scores and the memory planner
	$(BIN)/python data/build_hero.py

pretrain: .venv/ready  ## pretrain data/tiny-falcon from scratch (fetches two npm packages); ARGS="--steps 100" to try
	$(BIN)/python data/build_tiny_falcon.py $(ARGS)

lock: .venv-tools/ready  ## write tests/requirements-lock.txt after a change of requirements.txt; ARGS="--upgrade" for newer versions
	$(TOOLS)/python -m tests.supply lock $(ARGS)

licences: .venv/ready  ## write tests/LICENCES.md
	$(BIN)/python -m tests.supply licences

audit: .venv-tools/ready  ## ask what is known against the locked versions; writes tests/AUDIT.md, fails if anything is
	$(TOOLS)/python -m tests.supply audit

rehearse-7b: .venv/ready  ## load, tune and reload Falcon-7b's shapes with random weights on this CPU: LAYOUT=hub, shards, bin or all; writes up to 30 GB
	$(BIN)/python -m helpers.rehearsal --layout $(LAYOUT) $(ARGS)

.venv/ready: tests/requirements-lock.txt tests/requirements-torch.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} was found, 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement tests/requirements-lock.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements-torch.txt
	$(BIN)/python -m pip check
	touch $@

.venv-colab/ready: tests/requirements-colab.txt
	$(PYTHON) -m venv .venv-colab
	$(COLAB)/python -m pip install --quiet --requirement tests/requirements-colab.txt
	touch $@

.venv-colab-313/ready: tests/requirements-colab.txt
	@test -n "$(PYTHON313)" || echo "There is no Python 3.13 here: this is $$($(PYTHON) --version) with Colab's torch and packages."
	$(or $(PYTHON313),$(PYTHON)) -m venv .venv-colab-313
	sed 's/^torch==.*/torch==2.11.0/' tests/requirements-colab.txt > .venv-colab-313/requirements.txt
	$(COLAB313)/python -m pip install --quiet --requirement .venv-colab-313/requirements.txt
	touch $@

.venv-tools/ready: tests/requirements-tools.txt
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/python -m pip install --quiet --requirement tests/requirements-tools.txt
	touch $@

# torchao alone, on top of what .venv has
.venv-bench/ready: tests/requirements-bench.txt .venv/ready
	$(BIN)/python -m venv .venv-bench
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(TORCHAO)/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	if $(TORCHAO)/python -m pip install --quiet --no-deps --requirement tests/requirements-bench.txt; then touch $@; fi

.venv-book/ready: tests/requirements-book.txt
	$(PYTHON) -m venv .venv-book
	$(BOOK)/python -m pip install --quiet --requirement tests/requirements-book.txt
	touch $@
