# Everything a checkout needs, from a bare Python to a trained model. `make` alone lists the targets.
# ARGS is handed on to the command that a target runs: make test ARGS="-k router -x".

PYTHON ?= python3
ARGS ?=
# One process a core; the tests of a file stay together, because they share what is expensive to set up.
WORKERS ?= --numprocesses auto --dist loadfile
VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.complete

# One set of versions for every supported Python and platform, so that all users run what was tested.
LOCK := $(RUN) uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

# The pure parts: no subprocess, no model, no trainer. They answer in a minute and a half on two cores.
FAST := tests/rspo_jax/objectives tests/rspo_jax/routing tests/rspo_jax/log_probs tests/rspo_jax/test_statistics.py \
	tests/rspo_jax/rollouts/test_packing.py tests/rspo_jax/rollouts/test_groups.py \
	tests/rspo_jax/rollouts/test_prompts.py tests/experiments/tasks/countdown/test_verifier.py \
	tests/experiments/tasks/mathematics/test_verifier.py tests/test_mutants.py

.DEFAULT_GOAL := help
.PHONY: help setup parity reasoning-gym demo test test-fast test-slow trackers-test mutants lint types docs docs-links lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv from requirements-dev.txt (PYTHON=python3.12 chooses the interpreter)

# torch comes by pip and outside the lock: a lock would bring CUDA to every machine, and pip takes a CPU build where it
# is given one (`pip config set global.find-links`, say).
parity: setup ## add torch to .venv, which the families of models are compared with
	@$(RUN) pip install --quiet --disable-pip-version-check torch==2.13.0

# Outside the lock too: pycosat, which it requires, has no wheel, and setup must not need a C compiler.
reasoning-gym: setup ## add reasoning-gym to .venv, for the task of this name (needs a C compiler)
	@$(RUN) uv pip install --quiet --python $(VENV)/bin/python reasoning-gym==0.1.25

# The packages come into an environment of their own, which sees the packages of .venv.
trackers-test: setup ## test the trackers with their real packages, offline, in .venv-trackers
	@test -x .venv-trackers/bin/python || "$(VENV)/bin/python" -m venv .venv-trackers
	@$(RUN) uv pip install --quiet --python .venv-trackers/bin/python 'wandb>=0.28' 'trackio>=0.40'
	@$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$$(.venv-trackers/bin/python -c \
		'import site; print(site.getsitepackages()[0])')/of_venv.pth"
	.venv-trackers/bin/python -m pytest tests/rspo_jax/records/test_trackers_live.py $(ARGS)

demo: setup ## train a small mixture of experts on Countdown with RSPO
	$(RUN) experiments.train countdown $(ARGS)

test: setup ## run the tests (ARGS="-k router" selects)
	$(RUN) pytest $(WORKERS) $(ARGS)

test-fast: setup ## run the tests of the pure parts, after every change
	$(RUN) pytest $(WORKERS) $(FAST) $(ARGS)

mutants: setup ## plant faults in the pure parts and count those that test-fast notices (ARGS=packing selects)
	$(VENV)/bin/python tests/mutants.py $(ARGS)

# pytest exits with 5 when it finds nothing to run.
test-slow: setup ## run the tests that are marked slow
	@XLA_FLAGS= $(RUN) pytest -m slow $(WORKERS) $(ARGS) || { status=$$?; [ $$status -eq 5 ] || exit $$status; \
		echo "No slow test was selected, so none ran."; }

lint: setup ## check style and formatting with ruff
	$(RUN) ruff check
	$(RUN) ruff format --check

types: setup ## check types with pyright
	$(RUN) pyright --project pyproject.toml $(ARGS)

docs: setup ## build the site, build/docs/index.html; a warning is an error
	$(RUN) sphinx --quiet --fail-on-warning --keep-going --jobs auto -c docs $(ARGS) . build/docs

# The one check that needs the network, so no other target includes it.
docs-links: setup ## ask every web address in the documentation whether it still answers
	$(RUN) sphinx --builder linkcheck --quiet -c docs $(ARGS) . build/links

lock: setup ## write requirements*.txt anew from pyproject.toml (ARGS=--upgrade takes newer versions)
	$(LOCK) $(ARGS) --extra dev --output-file requirements-dev.txt pyproject.toml
	$(LOCK) --constraints requirements-dev.txt --extra train --output-file requirements.txt pyproject.toml

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) .venv-trackers build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last. Without it, or with a newer lock, the environment is made from nothing,
# so an interrupted run leaves no trace. uv comes from the lock too, and installs several times
# faster than pip; the constraints fix what `promise`, which has no wheel, is built with.
$(STAMP): requirements-dev.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "There is no '$(PYTHON)' here; name a Python 3.11 to 3.14, as in: make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
		echo "rspo_jax needs Python 3.11 to 3.14, but $(PYTHON) is $$("$(PYTHON)" -V 2>&1); choose another, as in: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) from requirements-dev.txt (about 1.4 GB)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements-dev.txt > $(VENV)/uv.txt
	@$(RUN) pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@$(RUN) uv pip install --quiet --python $(VENV)/bin/python --require-hashes \
		--build-constraints requirements-dev.txt -r requirements-dev.txt
	@$(RUN) uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@
