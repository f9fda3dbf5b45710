"""The hook that lets llama_cpp be imported before llama_semanticache, as an import sorter puts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "python"
VARIABLES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB", "PYTHONPATH")


def run_python(*words: str, **env: str) -> str:
    """What it prints; nothing else may be said."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env={**kept, **env}, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


@pytest.fixture
def packages(tmp_path):
    """A folder of packages: the hook, a llama_cpp that says which library it would load, and one like ours."""
    for name in ("llama_semanticache.pth", "_llama_semanticache_hook.py"):
        shutil.copy(SOURCES / name, tmp_path)
    for name, code in {
        "llama_cpp": "import os\nprint(os.environ.get('LLAMA_CPP_LIB_PATH', 'its own'))",
        "llama_semanticache": "import os\nos.environ.setdefault('LLAMA_CPP_LIB_PATH', 'ours')",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    return tmp_path


def import_after_start(packages, code, **env):
    """As when Python starts with these packages alone."""
    return run_python("-S", "-c", f"import site, sys\nsite.addsitedir({str(packages)!r})\n{code}", **env)


def test_llama_cpp_without_a_library_finds_ours(packages):
    assert import_after_start(packages, "import llama_cpp") == "ours"
    assert import_after_start(packages, "import llama_semanticache, llama_cpp") == "ours"


@pytest.mark.parametrize("file", ["libllama.so", "libllama.dylib", "llama.dll"])
def test_llama_cpp_with_a_library_stays_as_it_is(file, packages):
    (packages / "llama_cpp" / "lib").mkdir()
    (packages / "llama_cpp" / "lib" / file).touch()
    assert import_after_start(packages, "import llama_cpp") == "its own"
    assert import_after_start(packages, "import llama_semanticache, llama_cpp") == "ours"


def test_the_user_s_own_path_wins(packages):
    code = "import llama_cpp; print('llama_semanticache' in sys.modules)"
    assert import_after_start(packages, code, LLAMA_CPP_LIB_PATH="theirs") == "theirs\nFalse"


def test_what_fails_in_our_package_is_no_error_of_llama_cpp(packages):
    (packages / "llama_semanticache" / "__init__.py").write_text("raise RuntimeError('broken')")
    assert import_after_start(packages, "import llama_cpp") == "its own"
    shutil.rmtree(packages / "llama_cpp")
    code = "try: import llama_cpp\nexcept ModuleNotFoundError as error: print(error.name)"
    assert import_after_start(packages, code) == "llama_cpp"


def test_nothing_is_imported_when_python_starts(packages):
    code = (
        "print(*sorted(name for name in sys.modules if 'llama' in name or name in ('importlib.machinery', 'ctypes')))"
    )
    assert import_after_start(packages, code) == "_llama_semanticache_hook"


def test_the_order_of_imports_in_this_environment(tmp_path):
    """Fails where the package was not installed, or without its hook."""
    code = (
        "from llama_cpp import LlamaGrammar\n"
        "from llama_semanticache import Llama\n"
        "import llama_cpp.llama_cpp\n"
        "print(Llama.__module__, LlamaGrammar.__name__, hasattr(llama_cpp.llama_cpp._lib, 'semcache_version'))"
    )
    (tmp_path / "program.py").write_text(code)
    assert run_python(str(tmp_path / "program.py")) == "llama_semanticache.llama LlamaGrammar True"
