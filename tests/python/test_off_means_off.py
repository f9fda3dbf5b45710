"""kv_compress=None is llama.cpp as it was, and a compressed cache is it too until the first pass."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import built_by_make, continue_with, last_logits, sentences, text_tokens

STOCK_VARIABLE = "LLAMA_SEMANTICACHE_STOCK_LIB"
N_PROMPT, N_DECODE = 512, 32

RUN = """
import ctypes, os, sys
import numpy as np
model, out, package, flash_attn = sys.argv[1:]
text = sys.stdin.buffer.read()
if package == "llama_semanticache":
    from llama_semanticache import Llama
    options = dict(kv_compress=None)
else:
    from llama_cpp import Llama
    options = {}
import llama_cpp
patched = hasattr(llama_cpp.llama_cpp._lib, "semcache_version")
assert patched == (package == "llama_semanticache"), llama_cpp.llama_cpp._lib._name
llm = Llama(model, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=flash_attn == "1", **options)
tokens = llm.tokenize(text)[:512]
assert len(tokens) == 512
rows = []
def note():
    p = ctypes.cast(llm._ctx.get_logits_ith(-1), ctypes.POINTER(ctypes.c_float))
    rows.append(np.ctypeslib.as_array(p, shape=(llm.n_vocab(),)).copy())
llm.eval(tokens)
note()
for _ in range(32):
    llm.eval([int(rows[-1].argmax())])
    note()
np.save(out, np.array(rows))
"""


@pytest.fixture(scope="module")
def stock_lib() -> str:
    return built_by_make(STOCK_VARIABLE, "the folder of an unpatched libllama of this commit")


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_logits_are_those_of_the_unpatched_library_to_the_bit(flash_attn, smollm2, stock_lib, tmp_path):
    text = " ".join(sentences(80)).encode()
    jobs = {}
    for package, env in (("llama_semanticache", {}), ("llama_cpp", {"LLAMA_CPP_LIB_PATH": stock_lib})):
        out = tmp_path / f"{package}.npy"
        command = [sys.executable, "-c", RUN, smollm2, str(out), package, str(int(flash_attn))]
        job = subprocess.Popen(
            command, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        job.stdin.write(text)
        job.stdin.close()
        jobs[out] = job
    logits = []
    for out, job in jobs.items():
        said = job.stdout.read().decode(errors="replace")
        assert job.wait() == 0, said
        logits.append(np.load(out))
    patched, stock = logits
    assert patched.shape == (1 + N_DECODE, 49152)
    assert np.isfinite(patched).all() and patched.std() > 1
    np.testing.assert_array_equal(patched.view(np.uint32), stock.view(np.uint32))


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_before_the_first_pass_logits_are_the_uncompressed_ones_to_the_bit(flash_attn, smollm2, load):
    options = dict(n_ctx=1024, n_batch=448, flash_attn=flash_attn)
    llm = load(
        smollm2, **options, kv_compress="semanticache", kv_stage=512, kv_window=64, kv_profile=None, kv_type_stage="f16"
    )
    full = load(smollm2, **options)
    tokens = text_tokens(llm, 200)
    for some in (llm, full):
        some.eval(tokens[:190])
    assert llm.kv_stats().n_pass == 0
    np.testing.assert_array_equal(last_logits(llm), last_logits(full))
    np.testing.assert_array_equal(continue_with(llm, tokens[190:]), continue_with(full, tokens[190:]))


def test_an_uncompressed_object_has_stock_sizes_and_numbers(smollm2, load):
    llm = load(smollm2, n_ctx=512)
    stats = llm.kv_stats()
    n_layer, n_head_kv, d = 30, 3, 64
    assert stats.total_bytes == stats.full_bytes == n_layer * n_head_kv * d * 2 * 2 * 512
    assert (stats.rows_allocated, stats.rows_used, stats.n_pass, stats.kv_compress) == (0, 0, 0, None)
    assert stats.compression_factor == 1
    assert llm.kv_rows() == []


def test_compression_of_one_object_does_not_leak_into_the_next(tiny, load):
    """semcache_configure_next() holds for one context only, also when building that one failed."""
    path = tiny("llama")
    plain = load(path, n_ctx=512)
    load(path, n_ctx=512, kv_compress="semanticache", kv_stage=96, kv_window=16, kv_profile=None)
    after = load(path, n_ctx=512)
    assert after.kv_stats().total_bytes == plain.kv_stats().total_bytes
    tokens = plain.tokenize(b"The quick brown fox. " * 15)
    for some in (plain, after):
        some.eval(tokens)
    np.testing.assert_array_equal(last_logits(plain), last_logits(after))
