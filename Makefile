# make install: the environment.   make test: environment and all tests.
# make azurite: the server for the tests on object storage, from npm; without it they are skipped.
# make demo:    from nothing to a scored Cyclic UNet and a scored MMCCD; finished steps are not repeated.

PYTHON ?= python3
PY := .venv/bin/python
DONE := experiments/.demo

AZURITE ?= $(wildcard $(CURDIR)/.venv/azurite/node_modules/.bin/azurite-blob)
export AZURITE

.PHONY: install test lint azurite demo
.NOTPARALLEL:

install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

test: install
	$(PY) -m pytest

azurite: install
	npm install --prefix .venv/azurite azurite@3.35.0

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The demo: an empty file in $(DONE) stands for each finished step. An interrupted training goes on where it was saved.

RUN := unet_backward_phantom_t2_flair
UNET_RESULTS := experiments/results/unet_forward_phantom_t2_flair__$(RUN)
MMCCD_RESULTS := experiments/results/diffusion_forward_phantom_t2_flair__$(RUN)__fast

demo: $(DONE)/test_unet $(DONE)/test_mmccd
	@echo
	@$(PY) -m evaluation.tables $(UNET_RESULTS) $(MMCCD_RESULTS)

$(DONE)/cohort: .venv/installed
	$(PY) ./datasets/phantom.py
	@mkdir -p $(DONE) && touch $@

$(DONE)/slices: $(DONE)/cohort
	$(PY) ./datasets/brats_preprocess.py --data_dir ./datasets/phantom_raw --output_dir ./datasets/phantom
	@touch $@

$(DONE)/unet_forward: $(DONE)/slices
	$(PY) modality_cyclic_train.py --dataset phantom
	@touch $@

$(DONE)/unet_backward: $(DONE)/slices
	$(PY) modality_cyclic_train.py --dataset phantom --training_process backward
	@touch $@

$(DONE)/diffusion_forward: $(DONE)/slices
	$(PY) modality_cyclic_train.py --dataset phantom --model_name diffusion
	@touch $@

$(DONE)/test_unet: $(DONE)/unet_forward $(DONE)/unet_backward
	$(PY) modality_cyclic_test.py --dataset phantom
	@touch $@

$(DONE)/test_mmccd: $(DONE)/diffusion_forward $(DONE)/unet_backward
	$(PY) modality_cyclic_test.py --dataset phantom --model_name diffusion --sampling fast
	@touch $@
