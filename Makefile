# make demo   the main job: a small trained DSA model on your text, all layers Full and with 1/2, 1/4, 1/8 of the indexers
# make test   every test, the sanitizer run included
# Both set up what they need in .venv (Python >= 3.10 and a C++ compiler are enough) and rebuild only what changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
# Threads of several OpenMP runtimes that spin for each other can take a small machine hundreds of times longer.
export OMP_WAIT_POLICY ?= PASSIVE
TEST_ARGS ?=

SOURCES := $(shell find csrc include -type f) CMakeLists.txt setup.py pyproject.toml
SANITIZED := build/sanitize/indexcache_ext/libindexcache_ops.so

.PHONY: demo test unit sanitize clean

demo: $(VENV)/.built
	$(BIN)/python -m indexcache_ext demo $(DEMO_ARGS)

test: unit sanitize

unit: $(VENV)/.built
	$(BIN)/python -m pytest $(TEST_ARGS)
	$(BIN)/python -m pytest bench --small --benchmark-disable -q

# The C++ API, then the op tests again on the CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.built $(SANITIZED)
	build/sanitize/indexcache_cpp_test
	INDEXCACHE_LIBRARY=$(SANITIZED) ./tests/sanitized.sh $(BIN)/python -m pytest -q $(SANITIZE_TESTS)
SANITIZE_TESTS ?= tests/test_quantise.py tests/test_indexer.py tests/test_topk.py tests/test_sparse_mla.py tests/test_bad_input.py

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

$(SANITIZED): $(VENV)/.installed $(SOURCES)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DINDEXCACHE_CUDA=OFF -DINDEXCACHE_PYBIND=OFF -DINDEXCACHE_SANITIZE=ON -DINDEXCACHE_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/sanitize

clean:
	rm -rf build $(VENV) python/indexcache_ext/*.so
