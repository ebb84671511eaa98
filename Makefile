# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/world_model/tiny/seed1
TIMES := [1.0,0.947,0.857,0.667,0.0]
FIRST := $(RUN)/bench/smoke/truth/val-000007.mp4

.PHONY: demo chain stories test test-slow test-gpu test-multigpu gpu8 lint clean

demo: $(VENV)/.ready
	$(BIN)/vgr-prepare data=doom_tiny
	$(BIN)/vgr-train experiments=world_model/tiny
	$(BIN)/vgr-bench checkpoint=$(RUN) protocol=smoke
	$(BIN)/vgr-sample checkpoint=$(RUN) path=orbit seconds=3 first_frame=$(FIRST) prompt="a grey yard" out=runs/demo/orbit
	@echo "report: $(CURDIR)/$(RUN)/bench/smoke/report.html"

# Base, chunk-causal, ODE, self-forcing at tiny size, each from the last one's file; run again it goes on.
STAGES := chunk_causal ode self_forcing
chain: $(VENV)/.ready
	$(BIN)/vgr-prepare data=doom_tiny
	$(BIN)/vgr-train experiments=world_model/tiny
	$(BIN)/vgr-train experiments=world_model/chunk_causal size=tiny
	$(BIN)/vgr-prepare data=ode out=datasets/ode_tiny train_clips=320 source.teacher=$(RUN) \
	  source.clips=datasets/doom_tiny/train source.times=$(TIMES) source.steps=20 source.batch=16 source.frames=null
	$(BIN)/vgr-train experiments=world_model/ode size=tiny
	$(BIN)/vgr-train experiments=world_model/self_forcing size=tiny
	for run in tiny $(STAGES:%=%_tiny); do $(BIN)/vgr-bench checkpoint=runs/world_model/$$run/seed1 protocol=smoke || exit; done
	$(BIN)/python -m benchmarks.few_steps $(RUN) $(STAGES:%=runs/world_model/%_tiny/seed1) --out runs/chain

# The causal video model on procedural stories at tiny size: the base on single shots, tuned on stories and, to compare, on
# more single shots; what cuts and memory are worth; the four-step students, and whether they beat their teacher at four
# steps. Run again it goes on.
VIDEO := runs/causal_video
TOLD := $(VIDEO)/multi_shot_story_tiny/seed1
stories: $(VENV)/.ready
	$(BIN)/vgr-prepare data=story_tiny
	$(BIN)/vgr-prepare data=story_tiny out=datasets/story_single source.shots=[1,1]
	$(BIN)/vgr-train experiments=causal_video/base size=story_tiny
	$(BIN)/vgr-train experiments=causal_video/multi_shot size=story_tiny
	$(BIN)/vgr-train experiments=causal_video/multi_shot size=story_tiny shards=datasets/story_single
	$(BIN)/python -m benchmarks.shots $(TOLD) --without $(VIDEO)/multi_shot_story_tiny--shards-*/seed1 \
	  --out runs/stories/shots.json --sheet runs/stories/shots.png
	$(BIN)/python -m benchmarks.memory $(TOLD) --out runs/stories/memory.json
	$(BIN)/vgr-prepare data=ode out=datasets/causal_ode_story_tiny train_clips=400 source.teacher=$(TOLD) \
	  source.clips=datasets/story_tiny/train source.times=$(TIMES) source.steps=24 source.batch=16 source.frames=null \
	  source.chunk=3 source.image=false
	$(BIN)/vgr-train experiments=causal_video/ode size=story_tiny
	$(BIN)/vgr-train experiments=causal_video/self_forcing size=story_tiny
	$(BIN)/python -m benchmarks.few_steps $(TOLD) $(VIDEO)/ode_story_tiny/seed1 $(VIDEO)/self_forcing_story_tiny/seed1 \
	  --steps 12 --out runs/stories

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m gpu

# Every layout on a node of eight GPUs against one of them; the column it adds to the table is printed. Not run yet.
gpu8: $(VENV)/.ready
	$(BIN)/python -m benchmarks.layouts --accelerator gpu --ranks 8 --out benchmarks/results/layouts.json

test-multigpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m multigpu

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "vgr needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt -e '.[test]'
	@touch $@
