# Every verb sets itself up: git, make and a Python >= 3.12 with venv are enough.
#
#   PYTHON=...       the interpreter that environments are made from
#   EXTRAS=...       the extras to install, comma-separated, instead of the ones found
#   WORKERS=...      parallel test processes (default: one per core)
#   GPU_WORKERS=...  those of make test-gpu (default: 8: they compile most of the time)
#   PYTEST_ARGS=...  more arguments for pytest
#   BENCH_ARGS=...   arguments for python -m bench, and for its roofline and scaling

PYTHON ?=
EXTRAS ?=
WORKERS ?= auto
GPU_WORKERS ?= 8
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
VENV_OLDEST := .venv-oldest
VENV_AOT := .venv-aot
BIN := $(VENV)/bin

# One stamp per set of extras: another set is installed on top, once.
comma := ,
STAMP := $(VENV)/.stamp-$(if $(EXTRAS),$(subst $(comma),-,$(EXTRAS)),auto)
STAMP_OLDEST := $(VENV_OLDEST)/.stamp
STAMP_AOT := $(VENV_AOT)/.stamp

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# One BLAS thread per test process: xdist already fills the cores. How many threads XLA
# has is tests/conftest.py's to say.
ON_CPU := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu
ON_GPU := XLA_PYTHON_CLIENT_PREALLOCATE=false
ELSEWHERE := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 $(VENV_AOT)/bin/python
AOT_TESTS := $(wildcard tests/test_aot*.py)
NO_DEVICE := not gpu and not tpu and not aot

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-gpu test-tpu test-oldest aot aot-slow aot-baseline \
	roofline scaling lint format bench wheel clean distclean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with what the tests and the benchmarks need
	@echo "$(VENV) is ready"

test: $(STAMP) ## the suite, without an accelerator and without the big sweeps
	$(ON_CPU) $(BIN)/python -m pytest -n $(WORKERS) -m "$(NO_DEVICE) and not slow" $(PYTEST_ARGS)

test-slow: $(STAMP) ## the big sweeps, without an accelerator
	$(ON_CPU) $(BIN)/python -m pytest -n $(WORKERS) -m "$(NO_DEVICE) and slow" $(PYTEST_ARGS)

test-gpu: $(STAMP) ## the tests of the NVIDIA GPU in this machine; fails where there is none
	@$(call require_device,gpu,an NVIDIA GPU)
	$(ON_GPU) $(BIN)/python -m pytest -n $(GPU_WORKERS) -m gpu $(PYTEST_ARGS)

test-tpu: $(STAMP) ## the tests of the TPU in this machine; fails where there is none
	@$(call require_device,tpu,a TPU)
	$(BIN)/python -m pytest -n 0 -m tpu $(PYTEST_ARGS)

# Of the kernels' tests what another jax may break: values, gradients, each variant and
# the lowering. The rest takes ten minutes to say it again.
OTHERS := not rowwise and not channelwise and not mosaic_ and not test_kernels
OF_KERNELS := gpu_rowwise or values_and_gradients or variant or lower or takes_it or one_kernel_each

test-oldest: $(STAMP_OLDEST) ## the suite with the oldest jax and flax of pyproject.toml
	$(ON_CPU) $(VENV_OLDEST)/bin/python -m pytest -n $(WORKERS) -m "$(NO_DEVICE) and not slow" -k "$(OTHERS) or $(OF_KERNELS)" $(PYTEST_ARGS)

# One process: the tests keep their own, one for each compiler.
aot: $(STAMP_AOT) ## compile every kernel for chips that are not here, and check registers, spills and bytes
	$(ELSEWHERE) -m pytest -m "aot and not slow" $(AOT_TESTS) $(PYTEST_ARGS)

aot-slow: $(STAMP_AOT) ## the same for more shapes and chips: for a change of a kernel
	$(ELSEWHERE) -m pytest -m "aot and slow" $(AOT_TESTS) $(PYTEST_ARGS)

aot-baseline: $(STAMP_AOT) ## record what make aot compares with: for a commit that says why
	$(ELSEWHERE) -m pytest -m aot -k test_no_worse_than_recorded --renew-baseline $(AOT_TESTS)

roofline: $(STAMP_AOT) ## predict what bounds every kernel on chips that are not here
	$(ELSEWHERE) -m bench roofline $(BENCH_ARGS)

scaling: $(STAMP_AOT) ## count what crosses 8, 64 and 256 devices that are not here
	$(ELSEWHERE) -m bench scaling $(BENCH_ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy -p fusednorm $(if $(wildcard bench/__init__.py bench/__main__.py),-p bench)

format: $(STAMP) ## let ruff format the code and mend what it safely can
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(STAMP) ## run the benchmarks
	$(BIN)/python -m bench $(BENCH_ARGS)

wheel: $(STAMP) ## build the sdist and the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove builds and caches
	rm -rf build dist src/*.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## clean, and remove the environments
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_AOT)

$(STAMP): pyproject.toml
	@$(call make_venv,$(VENV))
	@extras='$(EXTRAS)'; \
	if [ -z "$$extras" ]; then $(find_extras); fi; \
	echo "installing into $(VENV): fusednorm[$$extras]"; \
	$(call install,$(VENV),-e ".[$$extras]")
	@touch $@

$(STAMP_OLDEST): pyproject.toml
	@$(call make_venv,$(VENV_OLDEST))
	@floors=$$($(VENV_OLDEST)/bin/python -c '$(floors_program)'); \
	echo "installing into $(VENV_OLDEST): fusednorm[test] with $$floors"; \
	$(call install,$(VENV_OLDEST),-e ".[test]" $$floors)
	@touch $@

$(STAMP_AOT): pyproject.toml
	@$(call make_venv,$(VENV_AOT))
	@echo "installing into $(VENV_AOT): fusednorm[aot]"; \
	$(call install,$(VENV_AOT),-e ".[aot]")
	@touch $@

# $(call install,ENVIRONMENT,ARGUMENTS). No build isolation: once all is there, this
# needs no network.
install = $(1)/bin/python -m pip install --quiet "setuptools>=77" wheel && \
	$(1)/bin/python -m pip install --quiet --no-build-isolation $(2)

# jax>=X becomes jax==X
define floors_program
import tomllib; \
print(*(d.replace(">=", "==") \
for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if ">=" in d))
endef

# The accelerator of this machine adds its jax. NVIDIA drivers before 580 cannot run CUDA 13.
define find_extras
	extras=test,bench; \
	if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | cut -d . -f 1); \
		if [ "$${driver:-0}" -ge 580 ]; then extras=$$extras,cuda13; else extras=$$extras,cuda12; fi; \
	elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then \
		extras=$$extras,tpu; \
	fi
endef

# $(call require_device,PLATFORM,IN WORDS)
define require_device
	$(BIN)/python -c 'import jax; print("devices:", jax.devices("$(1)"))' 2>$(VENV)/device.log || { \
		tail -n 1 $(VENV)/device.log >&2; \
		echo "make $@: needs $(2), and jax finds none (above: what it says)." >&2; \
		echo "make test needs none." >&2; \
		exit 1; }
endef

# An interpreter counts only if it runs: a pyenv shim may exist and fail.
define probe
import importlib.util, sys; \
v = sys.version.split()[0]; \
print("ok" if sys.version_info >= (3, 12) and importlib.util.find_spec("ensurepip") \
else "is " + v + (", without venv and ensurepip" if sys.version_info >= (3, 12) else ", too old"))
endef

# $(call make_venv,FOLDER): keeps an environment that works.
define make_venv
	if [ "$$($(1)/bin/python -c '$(probe)' 2>/dev/null)" = ok ]; then exit 0; fi; \
	chosen=; seen=; \
	for candidate in $(if $(PYTHON),$(PYTHON),python3.12 python3.13 python3.14 python3); do \
		if ! command -v "$$candidate" >/dev/null 2>&1; then says="not found"; \
		else says=$$("$$candidate" -c '$(probe)' 2>/dev/null) || says="found, but does not run"; fi; \
		if [ "$$says" = ok ]; then chosen=$$candidate; break; fi; \
		seen="$$seen  $$candidate: $$says\n"; \
	done; \
	if [ -z "$$chosen" ]; then \
		printf "No Python >= 3.12 with venv. Tried:\n$$seen" >&2; \
		echo "Install one (python3.12 and python3.12-venv, or pyenv install 3.12, or" >&2; \
		echo "uv python install 3.12), or name one: make PYTHON=PATH/TO/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	echo "making $(1) with $$chosen"; \
	"$$chosen" -m venv --clear $(1)
endef
