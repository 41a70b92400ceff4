# make install: the environment.   make test: environment and all tests.
# make azurite: the server for the tests on object storage, from npm; without it they are skipped.
# make demo:    from nothing to Cyclic UNet and MMCCD, scored on two inputs; finished steps are not repeated.

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

# FLAIR → T2 → FLAIR, and with the same two UNets T2 → FLAIR → T2.
FORWARD := unet_forward_phantom_t2_flair
BACKWARD := unet_backward_phantom_t2_flair
MMCCD := --dataset phantom --model_name diffusion
T2 := --input t2 --trans flair
T2_UNET := --experiment_name_forward $(BACKWARD) --experiment_name_backward $(FORWARD)
RESULTS := $(addprefix experiments/results/, $(FORWARD)__$(BACKWARD) \
	diffusion_forward_phantom_t2_flair__$(BACKWARD)__fast \
	$(BACKWARD)__$(FORWARD) diffusion_forward_phantom_flair_t2__$(FORWARD)__fast)

# Two commands side by side, each on half of the cores: so small a network gains little from a second thread. What the
# second one says goes to a file, and is shown if it fails.
CORES := $(shell getconf _NPROCESSORS_ONLN)
define both
	@echo '$(2) > $@.log &'
	@export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($(CORES) + 1) / 2 ))}; $(2) > $@.log 2>&1 & second=$$!; \
	echo '$(1)'; $(1); first=$$?; wait $$second || { tail -n 2 $@.log >&2; exit 1; }; exit $$first
	@touch $@
endef

demo: $(DONE)/test_unet $(DONE)/test_mmccd
	@echo
	@$(PY) -m evaluation.tables $(RESULTS)

$(DONE)/cohort: .venv/installed
	$(PY) ./datasets/phantom.py
	@mkdir -p $(DONE) && touch $@

$(DONE)/slices: $(DONE)/cohort
	$(PY) ./datasets/brats_preprocess.py --data_dir ./datasets/phantom_raw --output_dir ./datasets/phantom
	@touch $@

TRAIN := $(PY) modality_cyclic_train.py
TEST := $(PY) modality_cyclic_test.py

$(DONE)/unets: $(DONE)/slices
	$(call both,$(TRAIN) --dataset phantom,$(TRAIN) --dataset phantom --training_process backward)

$(DONE)/diffusions: $(DONE)/slices
	$(call both,$(TRAIN) $(MMCCD),$(TRAIN) $(MMCCD) $(T2))

$(DONE)/test_unet: $(DONE)/unets
	$(call both,$(TEST) --dataset phantom,$(TEST) --dataset phantom $(T2) $(T2_UNET))

$(DONE)/test_mmccd: $(DONE)/unets $(DONE)/diffusions
	$(call both,$(TEST) $(MMCCD) --sampling fast,$(TEST) $(MMCCD) --sampling fast $(T2) --experiment_name_backward $(FORWARD))
