# Every target sets up what it needs: an environment is made when it is missing or older than its pins, else reused.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,interpreter rank select select_memory greedy gather scatter scatter_norm align route ops memory checks grids \
  work fuzz backends))

CHROMIUM := chromium chromium-browser google-chrome google-chrome-stable

NEWEST := transformers accelerate peft tokenizers safetensors huggingface_hub
NEWEST_TESTS := $(addprefix tests/models/test_,$(addsuffix .py,golden families generate generation_loop invariants packed))

.PHONY: help browser test test-rest test-oldest test-newest test-install test-lmms-eval test-vllm test-matrix test-triton fuzz \
  compile-matrix gpu-report demo bench \
  bench-vllm grounding pretrained pretrained-bench pretrained-connector train scenes docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

test: .venv/ready lint  ## check the style and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

test-rest: .venv/ready  ## run the cases of the tests that make test leaves out for their time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) --cases rest

test-oldest: .venv-oldest/ready  ## run the adapters' tests under the oldest supported transformers
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q $(PARALLEL) tests/models tests/cli

test-newest: .venv/ready  ## run part of the adapters' tests under the newest transformers and its companions, whatever they are
	rm -rf .venv-newest
	$(PYTHON) -m venv --without-pip .venv-newest
	$(call find_packages_of_venv,.venv-newest)
	$(BIN)/python -m pip --python .venv-newest/bin/python install -q --disable-pip-version-check --upgrade \
	  -c requirements/torch.txt $(NEWEST)
	$(BIN)/python -m pip --python .venv-newest/bin/python install -q --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	.venv-newest/bin/python tests/newer_versions.py requirements/dev.txt $(NEWEST)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -rf $(PARALLEL:loadfile=load) $(NEWEST_TESTS)

test-install:  ## install the package as a user does, with nothing pinned but torch, and run the README's example
	rm -rf .venv-install
	$(PYTHON) -m venv .venv-install
	.venv-install/bin/python -m pip install -q --disable-pip-version-check -r requirements/torch.txt
	.venv-install/bin/python -m pip install -q --disable-pip-version-check ".[models]"
	.venv-install/bin/python -I tests/installed_example.py README.md

test-lmms-eval: .venv-lmms-eval/ready  ## run the tests of the model types for lmms-eval
	OMP_NUM_THREADS=1 .venv-lmms-eval/bin/python -m pytest -q tests/test_lmms_eval.py tests/test_boxes.py

test-vllm: .venv-vllm/ready  ## run the tests of routing inside vLLM, on its CPU build
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q $(PARALLEL:loadfile=load) tests/vllm

test-matrix: .venv-oldest/ready .venv-middle/ready .venv-previous/ready .venv/ready  ## call every model in every way under four transformers; rewrites docs/models.md
	@set -e; for environment in .venv-oldest .venv-middle .venv-previous .venv; do \
	  OMP_NUM_THREADS=1 $$environment/bin/python -m pytest -q $(PARALLEL:loadfile=load) \
	    --support-record=bench/results/models --all-types --cases all tests/models; \
	done
	$(BIN)/python -m bench.pages

browser:  ## install Chromium for the tests of the page, where it is missing, with apt and as root
	@for name in $(CHROMIUM); do command -v $$name >/dev/null && exit 0; done; \
	if ! command -v apt-get >/dev/null; then echo "browser: there is no apt; tests that need Chromium are skipped"; \
	elif test "$$(id -u)" = 0; then apt-get update -qq && apt-get install -y -qq chromium; \
	elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo apt-get install -y -qq chromium; \
	else echo "browser: apt needs root; tests that need Chromium are skipped"; fi

fuzz: .venv/ready  ## run 5,000 random cases, kernel against reference, and 5,000 calls of models; SEED=N begins at another seed
	$(BIN)/python -m pytest $(PARALLEL:loadfile=load) tests/test_fuzz.py --fuzz-cases 5000 --fuzz-seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL:loadfile=load) tests/models/test_call_fuzz.py \
	  --fuzz-cases 2500 --fuzz-seed $(SEED)

test-triton: .venv/ready  ## run the kernels' tests in the interpreter of the newest supported Triton
	@set -e; version=$(lastword $(TRITONS)); \
	test -e .triton/$$version/triton || $(BIN)/python -m pip install -q --disable-pip-version-check \
	  --no-deps --target .triton/$$version triton==$$version; \
	echo "triton $$version"; \
	OMP_NUM_THREADS=1 PYTHONPATH=.triton/$$version $(BIN)/python -m pytest -q $(PARALLEL:loadfile=load) $(KERNEL_TESTS)

compile-matrix: .venv/ready  ## compile every kernel with every supported Triton, for GPUs that need not be here
	@set -e; for version in $(TRITONS); do \
	  test -e .triton/$$version/triton || $(BIN)/python -m pip install -q --disable-pip-version-check \
	    --no-deps --target .triton/$$version triton==$$version; \
	  echo "triton $$version"; \
	  PYTHONPATH=.triton/$$version $(BIN)/python -m pytest -q tests/test_compile.py --cases all \
	    --compile-record bench/results/compile; \
	done
	$(BIN)/python -m bench.pages

gpu-report:  ## test and measure the GPU that torch of $(PYTHON) sees; without one a dry run on the CPU
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
	  $(PYTHON) -m bench.gpu_report; \
	else $(MAKE) --no-print-directory .venv/ready && $(BIN)/python -m bench.gpu_report; fi

demo: .venv/ready  ## route a photo through a tiny model; ARGS="--model ... --image ..." for others
	$(BIN)/python -m reroute_kernels demo $(ARGS)

bench: .venv/ready  ## run the benchmarks; rewrites bench/results/<device> and the tables in README.md and docs/
	mkdir -p $$($(BIN)/python -m bench.speed.device)
	$(BIN)/python -m pytest --benchmark -q --benchmark-json=$$($(BIN)/python -m bench.speed.device)/benchmarks.json
	$(BIN)/python -m bench.pages

bench-vllm: .venv-vllm/ready  ## measure routing inside vLLM; rewrites bench/results/cpu/serving.json and docs/performance.md
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m bench.speed.serving
	$(BIN)/python -m bench.pages

scenes: .venv-lmms-eval/ready  ## ask a model about held-out scenes, run by lmms-eval; ARGS="pretrained=...,policy=..."
	.venv-lmms-eval/bin/python -m bench.grounding.lmms_eval_task build/scenes
	HF_DATASETS_OFFLINE=1 .venv-lmms-eval/bin/python -m lmms_eval --model reroute_llava_hf --tasks reroute_scenes \
	  --include_path build/scenes --batch_size 1 --model_args $(or $(ARGS),pretrained=models/tiny_grounding,dtype=float32)

grounding: .venv/ready  ## ask the tiny model about held-out scenes under every policy; rewrites docs/grounding.md
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.grounding.benchmark
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.grounding.additions
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.grounding.waiting
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.grounding.calibration
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.grounding.reducers
	$(BIN)/python -m bench.pages

pretrained: .venv-pretrained/ready  ## install a pretrained decoder and a vision tower, and make build/pretrained of them
	OMP_NUM_THREADS=1 .venv-pretrained/bin/python -m bench.pretrained.convert

pretrained-bench: pretrained  ## route passages of text through that decoder; goes on where it stopped; rewrites docs/pretrained.md
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.pretrained.measure
	$(BIN)/python -m bench.pages

pretrained-connector: pretrained  ## train what connects tower and decoder; goes on where it stopped; ARGS="--minutes 30"
	OMP_NUM_THREADS=1 .venv-pretrained/bin/python -m bench.pretrained.train $(ARGS)

train: .venv/ready  ## train the tiny model anew; goes on where it was interrupted
	$(BIN)/python -m bench.grounding.train

docs: .venv-docs/ready  ## build the pages and the API reference into build/site
	rm -rf build/package && mkdir -p build/package
	cp -r reroute_kernels build/package && cp -r models build/package/reroute_kernels
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict

lint: .venv/ready
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .

format: .venv/ready  ## format the code
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-docs .venv-install .venv-lmms-eval .venv-middle .venv-newest .venv-oldest .venv-pretrained .venv-previous .venv-vllm .triton build *.egg-info .benchmarks

.venv/ready: requirements/dev.txt requirements/constraints.txt pyproject.toml
.venv-middle/ready: requirements/middle.txt requirements/constraints.txt pyproject.toml
.venv-oldest/ready: requirements/oldest.txt requirements/constraints.txt pyproject.toml
.venv-previous/ready: requirements/previous.txt requirements/constraints.txt pyproject.toml
.venv/ready .venv-middle/ready .venv-oldest/ready .venv-previous/ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $<
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# On top of .venv, whose packages they find behind their own: nothing is installed twice.
define find_packages_of_venv
$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
endef
.venv-docs/ready: requirements/docs.txt
.venv-lmms-eval/ready: requirements/lmms_eval.txt
.venv-pretrained/ready: requirements/pretrained.txt
.venv-vllm/ready: requirements/vllm.txt tests/vllm/prepare_environment.py tests/vllm/torchvision_schemas.py
.venv-docs/ready .venv-lmms-eval/ready .venv-pretrained/ready .venv-vllm/ready: .venv/ready
	$(PYTHON) -m venv --clear --without-pip $(@D)
	$(call find_packages_of_venv,$(@D))
	$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check --no-deps \
	  -r $(filter requirements/%,$^)
	$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	if test $(@D) = .venv-vllm; then $(@D)/bin/python tests/vllm/prepare_environment.py; fi
	touch $@
