# crop2seg: `make map` for a crop map, `make test` for every check; `make` lists the rest.
# Variables: PYTHON (interpreter), VENV (where the environment lies), TORCH_INDEX (another index for torch).
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= data/runs/map
BUNDLE ?= $(or $(CROP2SEG_BUNDLE),$(OUT))
SEED   ?= 0
SHEETS ?= 240
EPOCHS ?= 9

READY := $(VENV)/.ready
DEV   := $(VENV)/.ready-dev
BIN   := $(VENV)/bin

.PHONY: help setup map model app test lab docs bench
help:
	@echo "make map     a crop map of the sample; or [SOURCE=path/to/catalog.json] [MODEL=path/to/run] [OUT=folder] [ARGS=...]"
	@echo "make model   the bundled model anew, from simulation alone: about 20 minutes; stopped, it goes on;"
	@echo "             SEED=1 trains another on the same fields and keeps it in data/runs; [SHEETS=240] [EPOCHS=9]"
	@echo "make app     the map that make map made, in the browser; BUNDLE=folder opens another"
	@echo "make test    every check that CI runs; the last line counts them"
	@echo "make lab     the notebooks in JupyterLab"
	@echo "make docs    the site, in _docs"
	@echo "make bench   speed of the main steps on this machine"
	@echo "make setup   only the environment, in $(VENV); without a GPU, a lighter torch for Linux:"
	@echo "             make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"

setup: $(READY)
	@echo "The environment lies in $(VENV)"

map: $(READY)
	@$(BIN)/crop2seg map $(if $(SOURCE),--source "$(SOURCE)") $(if $(MODEL),--model "$(MODEL)") --out "$(OUT)" $(ARGS)
	@echo "The bundle lies in $(abspath $(OUT)); look at it with: make app$(if $(filter-out data/runs/map,$(OUT)), OUT=$(OUT))"

# Trained on simulated fields only; sheets and run are kept, so the same command goes on where it stopped.
SHEET_FOLDER = data/cache/sheets-$(SHEETS)
MODEL_RUN    = data/runs/default-$(SEED)
model: $(READY)
	@test -d $(SHEET_FOLDER) || $(BIN)/crop2seg dataset --simulated $(SHEETS) --workers 2 --folds 10 --out $(SHEET_FOLDER)
	@$(BIN)/crop2seg train --data $(SHEET_FOLDER) --model tempcnn --fold 1 --epochs $(EPOCHS) --lr .003 --batch-size 8 \
	  --temporal-dropout 0 --physics 1.5 --model-args '{"withhold": [[0, 9], [1, 8], [2, 7], [3, 6], [4, 5]]}' --recipe '{"smoothing": 0.05, "wd": 0.02, "augment": false}' --seed $(SEED) --out $(MODEL_RUN) $(ARGS)
	@$(if $(filter 0,$(SEED)),mkdir -p data/models/default && cp $(MODEL_RUN)/model.safetensors $(MODEL_RUN)/run.json data/models/default/)
	@echo "The model lies in $(abspath $(if $(filter 0,$(SEED)),data/models/default,$(MODEL_RUN)))"

app: $(READY)
	@$(BIN)/crop2seg app "$(BUNDLE)" $(ARGS)

test: $(DEV)
	@$(BIN)/python tools/test.py

lab: $(DEV)
	@$(BIN)/jupyter lab nbs

docs: $(DEV)
	@if command -v quarto > /dev/null; then PATH=$(abspath $(BIN)):$$PATH nbdev_docs && $(BIN)/python tools/readme.py; else $(BIN)/python tools/docs.py; fi

bench: $(READY)
	@$(BIN)/python tools/bench.py $(ARGS)

# The environment: made once, and again only when settings.ini or setup.py changes.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"crop2seg needs Python 3.11 or newer and $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes and about 3 GB the first time"
	@$(if $(TORCH_INDEX),$(BIN)/pip install $(TORCH) --index-url $(TORCH_INDEX))
	@$(BIN)/pip install -e "$(1)"
endef
TORCH = $(filter torch%,$(shell sed -n 's/^requirements *=//p' settings.ini))

$(READY): settings.ini setup.py
	$(call install,.)
	@touch $@

$(DEV): settings.ini setup.py
	$(call install,.[dev])
	@touch $(READY) $@
