"""README.md and docs: what they say to type works, and what they point to is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "patches/README.md"]
# what `make test` does itself, and what takes longer than a test may: the demo is run by who changes the method
ELSEWHERE = {"make build", "make test", "make demo"}


def commands(text: str) -> list[str]:
    """Lines of its blocks for a shell, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def test_the_readme_is_short():
    assert len(README.split()) <= 1000


def test_every_command_of_the_readme_is_known():
    assert {line for line in commands(README) if not line.split()[0].endswith("llama-semanticache")} == ELSEWHERE


@pytest.mark.parametrize("line", [line for line in commands(README) if line not in ELSEWHERE])
def test_a_command_of_the_readme(line, smollm2):
    words = shlex.split(line)
    command = [sys.executable, "-m", "llama_semanticache", *words[1:]]
    if words[1] == "serve":  # test_server.py talks to it
        command.append("--help")
    if words[1] == "run":
        command += ["--temp", "0", "--max-tokens", "20"]
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if words[1] == "run":
        assert "licen" in done.stdout.lower() and "tokens seen" in done.stderr


def test_the_example_prints_an_answer(smollm2):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *answer, size = done.stdout.strip().splitlines()
    assert len(" ".join(answer)) > 50 and float(size.split()[0]) > 5 and size.endswith("times smaller")
    assert not done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_are_python(page):
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(example, str(page), "exec")


def test_the_programs_of_the_contributing_page_are_targets():
    make = shutil.which("make")
    for line in commands((ROOT / "docs/contributing.md").read_text()):
        if line.startswith("make "):
            done = subprocess.run([make, "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
            assert "No rule to make target" not in done.stderr, line
