# Each target sets up its own environment below .venv/, with the versions of constraints.txt.
PYTHON ?= python3
# Threads that wait by spinning cost more than they give on small machines.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test bench lint clean

quickstart: .venv/quickstart/installed
	.venv/quickstart/bin/python examples/quickstart.py $(ARGS)

test: .venv/test/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/test/bin/python -m pytest -n 2 $(ARGS)

bench: .venv/quickstart/installed
	.venv/quickstart/bin/python -m eval.overhead --output results/overhead
	.venv/quickstart/bin/python -m eval.studies.overhead_sweep --output results/overhead

lint: .venv/dev/installed
	.venv/dev/bin/ruff check . && .venv/dev/bin/ruff format --check .

# The oracle of the Gauss-Newton tests. Its torchvision is not used, and one that does not fit torch breaks transformers.
ORACLE = curvlinops-for-pytorch backpack-for-pytorch

.venv/%/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	$(if $(filter test,$*),.venv/$*/bin/python -m pip install --quiet --constraint constraints.txt --no-deps $(ORACLE))
	touch $@

clean:
	rm -rf .venv build *.egg-info
