# make test    virtual environment, install, native build, tests     (TESTS=tests/ops for some);
#              then which lines of CUDA C++ they have run, at least 95 % of all
# make demo    the same without the tests' packages, then tunes a prefix in about a minute
# make bench   kernels against the machine's limits, a training step against its peer: some minutes,
#              on a machine that does nothing else; writes bench/results
# make gpu     on a machine with a GPU, with the active python3 and what is installed there: builds for
#              that GPU, judges every op, times a step and a token of ChatGLM2-6B, benches, tests and
#              checks memory accesses; writes gpu.json, gpu.md, gpu.log and profiles.txt to OUT
#              (bench/results)
# make oldest  the Triton kernels with the oldest Triton they serve, in a virtual environment of its
#              own: the tests, then bench/results/triton_resources_3.6
# make lint    ruff, clang-format and mypy; changes nothing
# make sanitize   the ops' C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#
# Needs Python >= 3.10 and a C++ compiler. PYTHON=python3.12 picks another Python for a new .venv.

PYTHON ?= python3
TESTS ?= tests
# Processes of pytest. One file stays in one of them, but for those of tests/ops.
WORKERS ?= 2
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

# Every pip, the one of the isolated build too, installs these versions and no others.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.PHONY: test demo bench gpu oldest lint sanitize

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS)
	$(if $(filter tests,$(TESTS)),$(VENV)/bin/python -m tests.cuda_on_host.coverage)

demo: $(VENV)/.installed
	$(VENV)/bin/python -m glmkern demo

bench: $(VENV)/.installed-test
	$(VENV)/bin/python -m bench.bench_rms_norm
	$(VENV)/bin/python -m bench.bench_bias_dropout
	$(VENV)/bin/python -m bench.bench_rope
	$(VENV)/bin/python -m bench.bench_swiglu
	$(VENV)/bin/python -m bench.bench_prefix_attention
	$(VENV)/bin/python -m bench.bench_quant_linear
	$(VENV)/bin/python -m bench.bench_linear_cross_entropy
	$(VENV)/bin/python -m bench.bench_train
	$(VENV)/bin/python -m bench.bench_generate

# Not in the virtual environment: a machine with a GPU has a torch that fits it.
gpu:
	python3 -m bench.gpu $(if $(OUT),--out $(OUT))

oldest: build/oldest/.installed
	build/oldest/bin/python -m bench.triton_resources
	build/oldest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -k triton \
	  tests/triton_compile tests/ops $(wildcard tests/*/test_*_on_triton.py)

build/oldest/.installed: export PIP_CONSTRAINT := build/oldest/constraints.txt
build/oldest/.installed: constraints.txt $(BUILD_INPUTS)
	test -x build/oldest/bin/python || $(PYTHON) -m venv build/oldest
	sed 's/^triton==.*/triton==3.6.0/' constraints.txt > $(PIP_CONSTRAINT)
	build/oldest/bin/python -m pip install --disable-pip-version-check --quiet torch
	GLMKERN_BUILD=native build/oldest/bin/python -m pip install --disable-pip-version-check \
	  --quiet '.[test]'
	touch $@

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/mypy

sanitize: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.sanitize

# torch comes first: the native libraries are built against the one that is there.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	GLMKERN_BUILD=native $(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.torch $(BUILD_INPUTS)
	GLMKERN_BUILD=native $(PIP) --editable '.[test,eval]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(VENV)/.torch constraints.txt
	$(PIP) ruff mypy clang-format pre-commit
	touch $@
