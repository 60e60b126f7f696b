# InfoGAN on anime faces. `make help` lists the targets; every variable can be given on the line:
#   make train-v1 DATA=~/faces ARGS="--max-minutes 60"

PYTHON ?= python3
VENV   ?= .venv
DATA   ?= data/anime
CKPT   ?= checkpoint/v3/last.pt
ARGS   ?=
URL    ?= https://www.kaggle.com/api/v1/datasets/download/soumikrakshit/anime-faces

ifeq ($(OS),Windows_NT)
PY := $(VENV)/Scripts/python
else
PY := $(VENV)/bin/python
endif
READY := $(VENV)/.ready
TESTS := test_infogan.py $(wildcard data/test_*.py)
HALF  := data/test_generate.py

.DEFAULT_GOAL := help
.PHONY: help setup drawn demo data faces train-v1 train-v2 train-v3 generate measure explorer \
	compare test browser test-browser torture bench lint clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## .venv with the packages of requirements.txt, once

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

drawn: $(READY)  ## draw 6,000 faces into data/drawn
	$(PY) data/draw_faces.py data/drawn --n 6000 --size 64 --seed 0

# v1 on drawn faces, small enough for a laptop's CPU; a z of 8 cannot choose the hair in c's place,
# and small batches with larger rates make crisp faces soon
demo: drawn  ## draw faces, train v1 on them for five minutes, show what its codes do
	$(PY) infogan.py --data data/drawn --out checkpoint/demo \
		--image-size 32 --width 32 --batch-size 32 --z-dim 8 --r1 0.1 \
		--lr-g 3e-4 --lr-d 3e-4 --max-minutes 5 $(ARGS)
	$(PY) generate.py --ckpt checkpoint/demo/last.pt
	@echo "look at checkpoint/demo/traversals/cat0.png and overview.png"

# the Kaggle set soumikrakshit/anime-faces, unless pictures are there already
data: $(READY)  ## download the anime faces into data/anime
	$(PY) data/download.py --url $(URL) --out data/anime

# only the default folder is filled by itself; one that DATA names is the user's own
faces: $(READY)
	@if [ "$(DATA)" = data/anime ]; then $(PY) data/download.py --url $(URL) --out data/anime; fi

train-v1: faces  ## 1 categorical and 2 continuous codes, 150 epochs, into checkpoint/v1
	$(PY) infogan.py --data "$(DATA)" --out checkpoint/v1 --n-cat 1 --n-cont 2 --epochs 150 $(ARGS)

train-v2: faces  ## 10 categorical and 2 continuous codes, 230 epochs, into checkpoint/v2
	$(PY) infogan.py --data "$(DATA)" --out checkpoint/v2 --n-cat 10 --n-cont 2 --epochs 230 $(ARGS)

train-v3: faces  ## 10 categorical and 20 continuous codes, 360 epochs, into checkpoint/v3
	$(PY) infogan.py --data "$(DATA)" --out checkpoint/v3 --n-cat 10 --n-cont 20 --epochs 360 $(ARGS)

generate: $(READY)  ## sheets and table of a trained run: make generate CKPT=checkpoint/v1/last.pt
	$(PY) generate.py --ckpt "$(CKPT)" $(ARGS)

measure: $(READY)  ## what each code of CKPT controls, measured anew
	$(PY) data/measure.py "$(CKPT)" $(ARGS)

explorer: $(READY)  ## a web page that moves the codes of CKPT by hand
	$(PY) generate.py --ckpt "$(CKPT)" --explorer $(ARGS)

# what each recipe makes of v3's 30 codes after the same 256,000 pictures; drawn ones unless DATA is given
COMPARED := $(if $(filter data/anime,$(DATA)),data/drawn,$(DATA))
SHORT := --data "$(COMPARED)" --n-cat 10 --n-cont 20 --image-size 32 --width 32 --batch-size 64 \
	--epochs 1000 --max-steps 4000 $(ARGS)

compare: drawn  ## the notebook's recipe beside ours, short: table and picture of both
	$(PY) infogan.py --recipe notebook --out checkpoint/compare/notebook $(SHORT)
	$(PY) infogan.py --out checkpoint/compare/ours $(SHORT)
	$(PY) generate.py --ckpt checkpoint/compare/ours/last.pt \
		--versus checkpoint/compare/notebook/last.pt --data "$(COMPARED)"

# as two processes, for two cores: generate.py's tests are half of the work, and what they say comes
# last. The shell waits for both, so that any signal ends both; 5 is pytest's "-k selects no test"
test: $(READY)  ## the tests: no network, no GPU, under two minutes
	@said=$$(mktemp) || exit; trap 'rm -f $$said' EXIT; \
	trap 'kill $$one $$two; wait' HUP INT TERM; \
	$(PY) -m pytest -q $(filter-out $(HALF),$(TESTS)) $(ARGS) & one=$$!; \
	$(PY) -m pytest -q $(HALF) $(ARGS) >$$said 2>&1 & two=$$!; \
	wait $$one; ended=$$?; wait $$two; ended=$$ended,$$?; cat $$said; \
	case $$ended in 0,0|0,5|5,0) ;; *) exit 1; esac

browser:
	@command -v chromium chromedriver >/dev/null 2>&1 || { apt-get -qq update && \
		apt-get -qq install --no-install-recommends -y chromium chromium-driver >/dev/null; } || \
		echo "no chromium with chromedriver here, and apt-get could not install them"

# skipped, with the reason, where there is no browser and none can be installed
test-browser: $(READY) browser  ## the explorer in headless Chromium, Debian's where there is none
	$(PY) -m pytest -q -rs data/test_generate.py -k explorer $(ARGS)

# kills, garbled files by the ten thousand, memory; under fifteen minutes
torture: $(READY)  ## the long tests of what a run survives
	TORTURE=1 $(PY) -m pytest -q -rP data/test_torture.py $(ARGS)

# start, input path and whole steps as ratios in one run, and where a step's time goes; three minutes
bench: $(READY)  ## speed on this machine, GPU or not
	$(PY) data/bench.py $(ARGS)

lint: $(READY)  ## format and lint by ruff
	$(PY) -m pip install --quiet --disable-pip-version-check "ruff>=0.6"
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

clean:  ## caches (of decoded pictures too) and .venv; never runs, never pictures
	rm -rf $(VENV) __pycache__ .pytest_cache .ruff_cache "$${XDG_CACHE_HOME:-$$HOME/.cache}/infogan"
