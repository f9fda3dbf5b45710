"""The tile configuration of llama.cpp's AMX product reaches the processor whole, whatever the compiler: seen without
AMX.

The function that loads it is compiled alone, with every `ldtilecfg ADDRESS` replaced by a jump to a check of the 64
bytes there.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import patchctl

FILE = "ggml/src/ggml-cpu/amx/mmq.cpp"

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64 alone")

# What GCC 12's amxtileintrin.h tells the optimizer: a pointer's size is read.
READS_8_BYTES = '#define _tile_loadconfig(p) __asm__ volatile("ldtilecfg\\t%0" : : "m"(*(const void * const *) (p)))\n'

LOSES_56_BYTES = READS_8_BYTES.replace("(p) ", "(p) memset((uint8_t *) (p) + 8, 0, 56); ", 1)

PROGRAM = """
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
{load}
{source}
extern "C" void check_config(const uint8_t * got) {{
    uint8_t want[64] = {{ 1 }}; // palette; bytes per row of each tile from byte 16 on, rows from byte 48 on
    for (int t = 0; t < 8; ++t) {{
        want[16 + 2*t] = t == 2 || t == 3 ? 32 : 64;
        want[48 + t]   = t < 2 ? 8 : 16;
    }}
    _exit(memcmp(got, want, 64) == 0 ? 0 : 1);
}}
// a stack that is not zero where the configuration will lie
__attribute__((noinline)) void soil() {{
    volatile uint8_t x[4096];
    for (int i = 0; i < 4096; ++i) {{
        x[i] = 0xa5;
    }}
}}
int main() {{
    soil();
    ggml_tile_config_init();
    return 2;
}}
"""


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    """AMX source of clean and of stock llama.cpp."""
    source = os.environ.get("LLAMA_SEMANTICACHE_SOURCE")
    root = Path(patchctl.HERE).parent
    clean = patchctl.fetch(root / "build" / "upstream", Path(source) if source else None)
    stock = tmp_path_factory.mktemp("trees") / "stock"
    patchctl.apply(clean, stock, stock=True)
    return {"clean": clean, "stock": stock}


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def loader(tree: Path) -> str:
    """The structure and the function that loads it, as they stand in the tree."""
    text = (tree / FILE).read_text(encoding="utf-8")
    struct = re.search(r"^struct tile_config_t\s*\{.*?^\};", text, re.M | re.S)
    function = re.search(r"^inline void ggml_tile_config_init\(void\) \{.*?^\}", text, re.M | re.S)
    assert struct and function, f"{FILE} no longer has tile_config_t and ggml_tile_config_init"
    return struct[0] + "\n" + function[0]


def config_arrives(tree: Path, load: str, level: str, folder: Path) -> bool:
    """Whether the 64 bytes at the address that reaches `ldtilecfg` are the configuration."""
    (folder / "amx.cpp").write_text(PROGRAM.format(load=load, source=loader(tree)), encoding="utf-8")
    subprocess.run(
        [compiler(), "-std=c++17", level, "-mamx-tile", "-S", "amx.cpp", "-o", "amx.s"], cwd=folder, check=True
    )
    assembly, n = re.subn(
        r"(?m)^\s*ldtilecfg\s+(.+)$",
        lambda m: f"\tleaq {m[1]}, %rdi\n\tandq $-64, %rsp\n\tsubq $4096, %rsp\n\tcall check_config",
        (folder / "amx.s").read_text(encoding="utf-8"),
    )
    assert n >= 1
    (folder / "amx.s").write_text(assembly, encoding="utf-8")
    subprocess.run([compiler(), "amx.s", "-o", "amx"], cwd=folder, check=True)
    status = subprocess.run([folder / "amx"]).returncode
    assert status in (0, 1)
    return status == 0


@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3"])
@pytest.mark.parametrize("load", ["#include <immintrin.h>\n", READS_8_BYTES], ids=["compiler's own", "8 bytes"])
def test_the_whole_configuration_is_stored(load, level, trees, tmp_path):
    assert config_arrives(trees["stock"], load, level, tmp_path)


def test_the_check_sees_bytes_that_are_lost(trees, tmp_path):
    assert not config_arrives(trees["stock"], LOSES_56_BYTES, "-O0", tmp_path)


def test_the_check_sees_the_fault_of_upstream(trees, tmp_path):
    macros = subprocess.run(
        [compiler(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    if "__clang__" in macros:
        pytest.skip("Clang takes an asm operand to read all that it points to")
    assert not config_arrives(trees["clean"], READS_8_BYTES, "-O3", tmp_path)


def test_it_is_loaded_in_one_place(trees):
    sources = [p for p in (trees["stock"] / "ggml" / "src" / "ggml-cpu").rglob("*") if p.suffix in (".c", ".cpp", ".h")]
    assert sum(p.read_text(encoding="utf-8").count("_tile_loadconfig(") for p in sources) == 1
