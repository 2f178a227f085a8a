# Every target sets up what it needs: Python (3.11 to 3.13) and make are enough.
PYTHON ?= python3
PROFILE ?= tiny
WORKERS ?= 2
ARGS ?=
BIN := .venv/bin
PYTHON313 = $(shell for p in python3.13 $$HOME/.pyenv/versions/3.13.*/bin/python; do $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2> /dev/null && echo $$p && break; done)
# The guard makes every connection but a loopback one fail, in tests, notebooks and command lines.
# A worker has one thread; a file belongs to one worker, and the longest begin (tests/conftest.py). A GPU is hidden.
GUARDED := PYTHONPATH="$$PWD/tests/guard" QLORA_PROFILE=tiny TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 CUDA_VISIBLE_DEVICES=
SPREAD := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --nbval-sanitize-with tests/nbval_sanitize.cfg
# What does not depend on the packages' versions runs once, in `make test`.
ONCE := $(addprefix --ignore=tests/test_,contract.py data.py exercises.py fresh_clone.py gpu.py house.py nf4.py readme.py rehearsal.py setup_cell.py study.py)

.PHONY: help finetune test test-colab test-colab-313 test-browser test-export book lint lab refresh setup-cell publish study rehearse-7b pretrain tickets hero lock

finetune: .venv/ready  ## fine-tune on this machine: PROFILE=tiny, auto or a name; ARGS="--seed 1" for more
	$(BIN)/python -m helpers.training --profile $(PROFILE) $(ARGS)
test: lint  ## ruff, all notebooks (nbval), contract and unit tests
	$(GUARDED) $(BIN)/python $(SPREAD) $(NBVAL) notebooks tests $(ARGS)
test-colab: .venv-colab/ready  ## the same on the package versions of Colab
	$(GUARDED) .venv-colab/bin/python $(SPREAD) $(NBVAL) $(ONCE) notebooks tests $(ARGS)
test-colab-313: .venv-colab-313/ready  ## with Colab's torch and Python too: 5 GB of disk
	$(GUARDED) .venv-colab-313/bin/python $(SPREAD) $(NBVAL) $(ONCE) notebooks tests $(ARGS)
# Without the conftest of tests/: .venv-book has no torch
test-browser: book .venv/ready  ## the book and JupyterLab in Chromium; screenshots in build/screenshots
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= .venv-book/bin/python $(SPREAD) --confcutdir=tests/browser tests/browser $(ARGS)
test-export: .venv-export/ready .venv-vllm/ready  ## what was exported, in llama.cpp (built from source) and vLLM; writes data/measured/export.json
	$(GUARDED) .venv-export/bin/python -m pytest -q -s tests/export.py $(ARGS)
lint: .venv/ready  ## ruff alone
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

book: .venv-book/ready  ## the series as a web site, in build/book/html: nothing is executed or fetched
	rm -rf build/book && mkdir -p build/book/source
	cp $(wildcard notebooks/*.ipynb notebooks/*.md) notebooks/book/index.md build/book/source
	PYTHONPATH="$$PWD/tests/guard" .venv-book/bin/python -m sphinx -q -n -W --keep-going -c notebooks/book -d build/book/doctrees build/book/source build/book/html
lab: .venv/ready  ## JupyterLab, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks
refresh: .venv/ready  ## execute the notebooks and store their outputs; ONLY="01 05" for some
	$(GUARDED) $(BIN)/python tests/refresh.py $(ONLY)
setup-cell: .venv/ready  ## write tests/setup_cell.py into every notebook
	$(BIN)/python tests/refresh.py --setup-cell
publish:  ## write your address on GitHub into badges, setup cells and citation: OWNER=account
	$(PYTHON) tests/publish.py "$(OWNER)" $(REPO)
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' Makefile

study: .venv/ready  ## the runs that notebook 07 reads and data/study lacks; two hours
	$(BIN)/python data/study/build.py $(ARGS)
rehearse-7b: .venv/ready  ## Falcon-7b's shapes with random weights on this CPU; writes 20 GB
	$(BIN)/python data/rehearsal/rehearse.py $(ARGS)
pretrain: .venv/ready  ## pretrain data/tiny-falcon from scratch; ARGS="--steps 100" to try
	$(BIN)/python data/tiny-falcon/build.py $(ARGS)
tickets: .venv/ready  ## write data/tickets again
	$(BIN)/python data/tickets/build.py
hero: .venv/ready  ## draw README's first figure from notebook 05's stored scores and the planner
	$(BIN)/python data/hero/build.py
# All but torch and what only some of its builds need
lock: .venv-tools/ready  ## write tests/requirements-lock.txt; ARGS=--upgrade for newer versions
	.venv-tools/bin/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet --output-file tests/requirements-lock.txt $(ARGS)
	awk '/^[^ ]/ {drop = /^(torch==|triton==|nvidia-|cuda-|httpx2-jsfetch)/} !drop' tests/requirements-lock.txt > .venv-tools/lock && cp .venv-tools/lock tests/requirements-lock.txt

.venv/ready: tests/requirements-lock.txt tests/requirements-torch.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} was found, 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement tests/requirements-lock.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements-torch.txt
	$(BIN)/python -m pip check && touch $@
.venv-colab-313/ready: tests/requirements-colab.txt
	@test -n "$(PYTHON313)" || echo "There is no Python 3.13 here: this is $$($(PYTHON) --version) with Colab's torch and packages."
	$(or $(PYTHON313),$(PYTHON)) -m venv .venv-colab-313
	sed 's/^torch==.*/torch==2.11.0/' tests/requirements-colab.txt > .venv-colab-313/requirements.txt
	.venv-colab-313/bin/python -m pip install --quiet --requirement .venv-colab-313/requirements.txt && touch $@
.venv-export/ready: export CMAKE_ARGS = -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF
# Text needs none of these, and PyPI's do not fit a CPU build of torch
.venv-vllm/ready: AFTER = && .venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
.venv-%/ready: tests/requirements-%.txt  # colab, book, export, vllm, tools
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --requirement $< $(AFTER) && touch $@
