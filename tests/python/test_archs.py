"""Models that people download, as llama.cpp's own program writes them: small, random, with every kind of layer."""

from __future__ import annotations

from pathlib import Path

import pytest

import archs
from conftest import built_by_make

TOOL_VARIABLE = "LLAMA_SEMANTICACHE_ARCHS"

# File names of test-llama-archs. gemma3n and gemma4, which it cannot write, are among tiny_models.
EXACT = (
    "qwen35-dense",
    "qwen35moe-moe",
    "qwen3vl-dense",
    "qwen3next-moe",
    "qwen3moe-moe",
    "gpt-oss-moe",
    "granitehybrid-dense",
    "nemotron_h-dense",
    "lfm2moe-moe",
    "glm4-dense",
    "hunyuan-dense-dense",
    "llama4-moe",
)


@pytest.fixture(scope="module")
def tool() -> Path:
    return Path(built_by_make(TOOL_VARIABLE, "llama.cpp's test-llama-archs"))


@pytest.mark.filterwarnings("ignore:only . KV heads")
@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_lost_when_all_rows_are_kept(name, tool, tmp_path):
    written = {path.stem: path for path in archs.write_models(tool, name.rsplit("-", 1)[0], tmp_path)}
    result = archs.measure(written[name])
    assert result.refused is None
    assert result.kl < 1e-5 and (result.kl_cut or 0) < 1e-5
    assert result.kl_dropped > 50 * result.kl, "the model does not mind a cache that is not whole: it says nothing"
    assert result.factor > 1


def test_a_table_of_positions_that_ends(tool, tmp_path):
    """llama.cpp aborts when a token's position is not in it."""
    (path,) = archs.write_models(tool, "gpt2", tmp_path)
    assert "n_ctx: expected at most the 256 positions that this model has, got 512" in archs.measure(path).refused


def test_a_model_that_fails_is_a_line_of_the_table(tmp_path):
    (tmp_path / "no-dense.gguf").write_bytes(b"GGUF")
    result = archs.measure_apart(tmp_path / "no-dense.gguf")
    assert result.name == "no-dense" and result.refused.startswith("fails: ")
