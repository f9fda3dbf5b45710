# make demo | test | lint | build | stock | wheel | archs | sanitize | vulkan | macos | aarch64 | clean
#
# Everything lives in .venv and build. CMake options go in CMAKE_ARGS: make build CMAKE_ARGS=-DGGML_CUDA=ON

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
BUILD    := build/native
UPSTREAM := build/upstream
STOCK    := build/stock
VULKAN   := build/vulkan
WHEEL_ARCH ?= $(subst arm64,aarch64,$(shell uname -m))
WHEEL    := build/wheel-$(WHEEL_ARCH)
ZIG       = $(shell $(BIN)/python -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/zig
ARCHS    := $(STOCK)/bin/test-llama-archs
SDIST    := $(UPSTREAM)/llama_cpp_python-$(shell sed -n 's/^llama_cpp_python=//p' patches/UPSTREAM).tar.gz
SOURCES  := $(shell find native python tests/native tests/card tests/metal -type f -not -path '*/__pycache__/*' 2>/dev/null) \
            $(wildcard patches/*.patch patches/series patches/UPSTREAM patches/patchctl.py) \
            CMakeLists.txt pyproject.toml README.md

.PHONY: demo test lint build stock wheel wheel-test archs venv sanitize vulkan macos aarch64 clean FORCE
.DELETE_ON_ERROR:

demo: build
	$(BIN)/python examples/long_document.py

test: build stock
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error
	LLAMA_SEMANTICACHE_STOCK_LIB=$(abspath $(STOCK))/bin LLAMA_SEMANTICACHE_ARCHS=$(abspath $(ARCHS)) \
	    LLAMA_SEMANTICACHE_CARD=$(abspath $(BUILD))/libcard.so LLAMA_SEMANTICACHE_METAL=$(abspath $(BUILD))/libmetal.so \
	    $(BIN)/python -m pytest

# mypy reads the types of the packages that are installed, hence the build.
lint: $(VENV)/.lint $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mdformat --check $$(git ls-files '*.md' ':!docs/models.md' ':!docs/measurements/report.md') # those are generated
	files="$$(git ls-files 'native/*.cpp' 'native/*.h' 'native/*.c' 'tests/native/*.cpp' 'tests/native/*.h' 'tests/card/*.cpp' 'tests/card/*.h' 'tests/metal/*.cpp')" && [ -n "$$files" ] && \
	    $(BIN)/clang-format --dry-run --Werror $$files

build: $(VENV)/.installed

venv: $(VENV)/.tools

$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "expected Python 3.10 or newer, got $$($(PYTHON) --version); name another: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "venv and ensurepip of $(PYTHON) are needed and were not found; on Debian: apt install python3-venv"; exit 1; }
	@command -v git >/dev/null || { echo "git is needed to apply the patches and was not found; install git"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet cmake ninja "scikit-build-core>=0.11" "hatch-fancy-pypi-readme>=24"
	touch $@

# One group of pyproject.toml alone, one quoted requirement a line: the package itself need not be built for it.
$(VENV)/.lint $(VENV)/.wheel: $(VENV)/.%: pyproject.toml $(VENV)/.tools
	$(BIN)/python -m pip install --quiet $$(sed -n '/^$* = \[/,/^\]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml)
	touch $@

# The wheel of llama-cpp-python without its libraries, since ours replace them: llama.cpp is compiled once, not twice.
# --no-cache-dir keeps this wheel out of pip's cache, from where other projects would get it.
$(VENV)/.llama-cpp-python: patches/UPSTREAM $(VENV)/.tools
	$(BIN)/python patches/patchctl.py fetch $(UPSTREAM)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-cache-dir \
	    --config-settings=cmake.define.LLAMA_BUILD=OFF $(SDIST)
	touch $@

# Other CMAKE_ARGS than last time: configured anew, without what CMake remembers of the old ones.
build/cmake-args: FORCE
	@mkdir -p build
	@printf '%s\n' "$$CMAKE_ARGS" | cmp -s - $@ 2>/dev/null || { rm -f $(BUILD)/CMakeCache.txt $(STOCK)/CMakeCache.txt; printf '%s\n' "$$CMAKE_ARGS" > $@; }

$(VENV)/.installed: $(SOURCES) $(VENV)/.llama-cpp-python build/cmake-args
	touch $@.started
	$(BIN)/python -m pip install --no-build-isolation \
	    --config-settings=build-dir=$(BUILD) \
	    --config-settings=cmake.define.LLAMA_SEMANTICACHE_SOURCE=$(abspath $(SDIST)) \
	    --config-settings=cmake.define.LLAMA_SEMANTICACHE_TESTS=ON \
	    ".[test]"
	mv $@.started $@

# The same llama.cpp with its faults fixed and nothing else, to compare with, and its writer of small models.
stock: $(STOCK)/.built

$(STOCK)/.built: patches/UPSTREAM $(VENV)/.tools build/cmake-args
	$(BIN)/python patches/patchctl.py apply --stock "$$($(BIN)/python patches/patchctl.py fetch $(UPSTREAM))" $(STOCK)/llama.cpp
	GIT_CEILING_DIRECTORIES=$(CURDIR)/build $(BIN)/cmake --fresh -S $(STOCK)/llama.cpp -B $(STOCK) \
	    -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
	    -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
	    -DLLAMA_OPENSSL=OFF $(if $(shell command -v ccache),-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) $(CMAKE_ARGS)
	$(BIN)/cmake --build $(STOCK) --target llama test-llama-archs
	touch $@

# The table of architectures in docs/models.md, made anew: a small random model of each, written by llama.cpp's own program.
archs: build stock
	$(BIN)/python tests/python/archs.py --tool $(ARCHS) --tree $(STOCK)/llama.cpp --write docs/models.md

sanitize: $(VENV)/.tools
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DLLAMA_SEMANTICACHE_SANITIZE=ON -DLLAMA_SEMANTICACHE_TESTS=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error

# ggml-vulkan with our shaders, on a Vulkan driver that computes on the CPU: needs libvulkan-dev, glslc, spirv-headers and
# mesa-vulkan-drivers. What a driver has compiled stays in build/vulkan.
vulkan: build
	$(BIN)/cmake -S . -B $(VULKAN) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	    -DGGML_VULKAN=ON -DVulkan_GLSLC_EXECUTABLE=$(abspath tests/vulkan/glslc-few) \
	    "-DCMAKE_CXX_FLAGS=-include $(abspath tests/vulkan/layer-settings.hpp)" -DLLAMA_SEMANTICACHE_SOURCE=$(abspath $(SDIST))
	$(BIN)/cmake --build $(VULKAN) --target ggml-vulkan
	GGML_VK_VISIBLE_DEVICES=0 MESA_SHADER_CACHE_DIR=$(abspath $(VULKAN))/shaders \
	    $(BIN)/python tools/gpu-check --part op --part model --backend $(abspath $(VULKAN))/bin/libggml-vulkan.so:ggml_backend_vk_reg

# A wheel for any Linux of this processor since 2018 and glibc 2.28, with kernels for every instruction set; beside it one of
# llama-cpp-python without libraries, since the index has its source alone. WHEEL_ARCH=aarch64 compiles for that one;
# what auditwheel would look for, too new a glibc or foreign libraries, zig's target leaves no room for.
wheel: $(VENV)/.wheel $(VENV)/.llama-cpp-python
	rm -rf $(WHEEL)/dist dist/llama_semanticache-*_$(WHEEL_ARCH).whl dist/*.tar.gz dist/llama_cpp_python-*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEEL)/dist \
	    --config-settings=build-dir=$(WHEEL) \
	    --config-settings=cmake.define.CMAKE_TOOLCHAIN_FILE=$(abspath tools/zig.cmake) \
	    --config-settings=cmake.define.ZIG=$(ZIG) \
	    --config-settings=cmake.define.ZIG_TARGET=$(WHEEL_ARCH)-linux-gnu.2.28 \
	    --config-settings=cmake.define.LLAMA_SEMANTICACHE_SOURCE=$(abspath $(SDIST)) \
	    --config-settings=cmake.define.GGML_BACKEND_DL=ON --config-settings=cmake.define.GGML_CPU_ALL_VARIANTS=ON \
	    --config-settings=cmake.define.GGML_OPENMP=OFF .
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir --wheel-dir $(WHEEL)/dist \
	    --config-settings=cmake.define.LLAMA_BUILD=OFF $(SDIST)
	$(BIN)/python -m wheel tags --remove --platform-tag any $(WHEEL)/dist/llama_cpp_python-*.whl
	mkdir -p dist && mv $(WHEEL)/dist/llama_cpp_python-*-any.whl dist
ifeq ($(WHEEL_ARCH),$(shell uname -m))
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --plat manylinux_2_28_$(WHEEL_ARCH) --wheel-dir dist $(WHEEL)/dist/llama_semanticache-*.whl
else
	$(BIN)/python -m wheel tags --remove --platform-tag manylinux_2_28_$(WHEEL_ARCH) $(WHEEL)/dist/llama_semanticache-*.whl
	mv $(WHEEL)/dist/llama_semanticache-*.whl dist
endif
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*

# What a user gets: the wheels in an environment of their own, on the best kernels and on those of older processors, and
# beside the oldest versions of other packages that pyproject.toml allows. Of another processor the libraries alone, in an
# emulator: needs qemu-user and, for aarch64, libc6-arm64-cross.
ifeq ($(WHEEL_ARCH),$(shell uname -m))
wheel-test: wheel
	rm -rf $(WHEEL)/venv
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --only-binary=:all: --find-links dist "llama-semanticache[test]"
	$(BIN)/python tests/wheel.py installed $(WHEEL)/venv/bin/python
	rm -rf $(WHEEL)/oldest
	$(PYTHON) -m venv $(WHEEL)/oldest
	$(BIN)/python tests/wheel.py constraints > $(WHEEL)/oldest/constraints.txt
	$(WHEEL)/oldest/bin/python -m pip install --quiet --only-binary=:all: --find-links dist -c $(WHEEL)/oldest/constraints.txt \
	    "llama-semanticache[bench,hub]" gguf hypothesis pytest scipy
	$(BIN)/python tests/wheel.py oldest $(WHEEL)/oldest/bin/python
else
wheel-test: wheel build
	$(BIN)/python tests/wheel.py emulated $(WHEEL_ARCH) $(ZIG)
endif

# The libraries for Apple's processors, without its frameworks: that they compile, from anywhere. Nothing of it can run here.
macos: $(VENV)/.wheel $(VENV)/.llama-cpp-python
	$(BIN)/cmake -S . -B build/macos -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_TOOLCHAIN_FILE=$(abspath tools/zig.cmake) -DZIG=$(ZIG) -DZIG_TARGET=aarch64-macos.13.0 \
	    -DGGML_METAL=OFF -DGGML_ACCELERATE=OFF -DGGML_BLAS=OFF -DGGML_OPENMP=OFF -DGGML_NATIVE=OFF \
	    -DLLAMA_SEMANTICACHE_SOURCE=$(abspath $(SDIST))
	$(BIN)/cmake --build build/macos --target libraries

# The kernels on NEON, in an emulator: needs g++-aarch64-linux-gnu and qemu-user.
aarch64: $(VENV)/.llama-cpp-python
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	    "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
	    -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16 \
	    -DLLAMA_SEMANTICACHE_SOURCE=$(abspath $(SDIST)) -DLLAMA_SEMANTICACHE_TESTS=ON
	$(BIN)/cmake --build build/aarch64
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure --no-tests=error

clean:
	rm -rf build $(VENV)
