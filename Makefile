# The two commands of a new user: `make demo` and `make test`. Each does all its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Options for `make demo`, such as DEMO="--seconds 5"
DEMO ?=

# The compiler of the engine: the system's, or the one in the package `ziglang`. Where neither is to be had, lastlayer
# is installed without its engine and runs its plain PyTorch code.
ifeq ($(shell command -v c++ || command -v g++ || command -v clang++),)
NO_COMPILER := true
# pip hides the virtual environment from what it builds by PYTHONPATH
export CXX := env -u PYTHONPATH $(abspath $(BIN))/python -m ziglang c++
endif

.PHONY: demo test lint types docs format wheel engine sanitize test-tiles test-arm

.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(if $(NO_COMPILER),-$(BIN)/pip install --quiet ziglang)
	rm -rf src/lastlayer/kernels/engines # what `make engine` built from older sources
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/lastlayer compare $(DEMO)

test: .venv/installed lint types docs
	$(BIN)/pytest --numprocesses auto

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # with --quiet it would not count warnings

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One wheel, for every Python on this kind of machine, into dist/; `.ci/wheel` also installs and tests it.
wheel: .venv/installed
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/twine check --strict dist/*.whl

# While csrc/ is being worked on: builds what has changed, into src/lastlayer/kernels/engines/.
engine:
	cmake -S . -B build/engine
	cmake --build build/engine --parallel
	cmake --install build/engine --prefix src

# The kernels with address and undefined-behaviour checks, and their tests.
KERNEL_TESTS := tests/kernels tests/screening
sanitize: .venv/installed
	cmake -S . -B build/sanitize -DLASTLAYER_SANITIZE=ON
	cmake --build build/sanitize --parallel
	cmake --install build/sanitize --prefix src
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest $(KERNEL_TESTS) --ignore tests/screening/test_memory.py # it would measure the sanitizer
	rm -rf src/lastlayer/kernels/engines

# The code that AMX tiles run, with the tiles in portable C++: on a processor without AMX, the tests of batches.
test-tiles: .venv/installed
	cmake -S . -B build/tiles -DLASTLAYER_PORTABLE_TILES=ON -DLASTLAYER_CHECKS=ON
	cmake --build build/tiles --parallel
	build/tiles/check_portable
	cmake --install build/tiles --prefix src
	LASTLAYER_MAX_CPU_ISA=portable $(BIN)/pytest tests/screening
	rm -rf src/lastlayer/kernels/engines

# The Arm build of the engine, its primitives run by an emulator: needs the compiler g++-aarch64-linux-gnu and qemu-user.
test-arm:
	cmake -S . -B build/arm -DLASTLAYER_CHECKS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/arm --parallel
	for isa in portable neon_dotprod neon_i8mm; do \
	    qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/arm/check_$$isa || exit 1; done
