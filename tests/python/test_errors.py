"""Wrong input: a typed error that says expected, got and what to do, before memory is taken; nothing breaks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import llama_cpp
import llama_cpp.llama_chat_format as llama_chat_format
import numpy as np
import pytest

import tiny_models
from conftest import SMALL, last_logits, random_tokens
from llama_semanticache import (
    ArgumentError,
    ContextOverflowError,
    Llama,
    ModelFileError,
    ProfileError,
    SemanticCacheError,
    StateError,
    UnsupportedModelError,
)

TOKENS = random_tokens(200)


@pytest.fixture
def refused(tiny, load):
    """refused(error, path, **options) -> message; a normal and a compressed object can be made afterwards."""

    def check(error, path, **options):
        with pytest.raises(error) as info:
            Llama(str(path), **{"verbose": False, "n_threads": 1, **options})
        message = str(info.value)
        assert isinstance(info.value, SemanticCacheError)
        assert "expected" in message and "got" in message and ";" in message, message
        plain, compressed = load(tiny("llama"), n_ctx=512, n_batch=80), load(tiny("llama"), n_ctx=512, **_passes())
        assert plain.kv_stats().rows_allocated == 0 < compressed.kv_stats().rows_allocated
        for llm in (plain, compressed):
            llm.eval(TOKENS)
            assert np.isfinite(last_logits(llm)).all()
        return message

    return check


def _passes():
    return {key: value for key, value in SMALL.items() if key != "n_ctx"}


@pytest.mark.parametrize("arch", tiny_models.REFUSED)
def test_unsupported_architectures(arch, tiny, load, refused):
    message = refused(UnsupportedModelError, tiny(arch), **SMALL)
    assert tiny_models.REFUSED[arch] in message
    llm = load(tiny(arch), n_ctx=512)  # without compression it works
    llm.eval(TOKENS[:20])
    assert np.isfinite(last_logits(llm)).all()


@pytest.mark.parametrize(
    "error, options, words",
    [
        (ArgumentError, dict(kv_compress="zip"), ["kv_compress", "semanticache", "zip"]),
        (ArgumentError, dict(kv_ratio=0), ["kv_ratio", "0 < kv_ratio <= 1"]),
        (ArgumentError, dict(kv_ratio=-0.5), ["kv_ratio", "-0.5"]),
        (ArgumentError, dict(kv_ratio=1.5), ["kv_ratio", "1.5"]),
        (ArgumentError, dict(kv_ratio=float("nan")), ["kv_ratio", "nan"]),
        (ArgumentError, dict(kv_ratio="x"), ["kv_ratio", "'x'"]),
        (ArgumentError, dict(kv_ratio=0.01), ["ratio", "n_ctx"]),  # below sinks and one chunk per head
        (ArgumentError, dict(kv_window=0), ["kv_window", "0"]),
        (ArgumentError, dict(kv_window=96), ["kv_stage", "96"]),
        (ArgumentError, dict(kv_sink=-1), ["kv_sink", "-1"]),
        (ArgumentError, dict(kv_stage=16), ["kv_stage", "16"]),
        (
            ArgumentError,
            dict(kv_stage=8192, kv_window=512, n_ctx=16384),
            ["kv_stage", "at most kv_window + 4096", "8192"],
        ),
        (ArgumentError, dict(kv_stage=96.5), ["kv_stage", "96.5"]),
        (ArgumentError, dict(kv_stage="96"), ["kv_stage", "'96'"]),
        (ArgumentError, dict(kv_window="16"), ["kv_window", "'16'"]),
        (ArgumentError, dict(n_ctx=95), ["n_ctx", "kv_stage", "95"]),
        (ArgumentError, dict(vocab_only=True), ["vocab_only"]),
        (ArgumentError, dict(kv_params={"distinct": 101}), ["distinct", "0 to 100", "101"]),
        (ArgumentError, dict(kv_rati=0.5), ["kv_rati (did you mean kv_ratio?);"]),
        (ArgumentError, dict(kv_compress=None, kv_compres="semanticache"), ["kv_compres (did you mean kv_compress?);"]),
        (
            UnsupportedModelError,
            dict(chat_handler=llama_chat_format.MTMDChatHandler.__new__(llama_chat_format.MTMDChatHandler)),
            ["chat_handler"],
        ),
        (ArgumentError, dict(type_k=llama_cpp.GGML_TYPE_Q8_0), ["type_k", "f16"]),
        (ArgumentError, dict(type_v=llama_cpp.GGML_TYPE_Q8_0, flash_attn=True), ["type_v", "f16"]),
        (UnsupportedModelError, dict(embedding=True), ["embedding"]),
        (ProfileError, dict(kv_profile="no/such.profile"), ["profile", "such.profile"]),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else None,
)
def test_arguments(error, options, words, tiny, refused):
    message = refused(error, tiny("llama"), **{**SMALL, **options})
    assert all(word in message for word in words), message


def test_a_stage_larger_than_the_context_of_the_model(tmp_path, refused):
    """n_ctx=0 takes the model's own length, which is known only when the model is read."""
    path = tiny_models.write_tiny(tmp_path / "short.gguf", "llama", n_ctx_train=256)
    assert "n_stage" in refused(ArgumentError, path, **{**SMALL, "n_ctx": 0, "kv_stage": 512})


def test_n_ctx_0_is_the_length_of_the_model(tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "n_ctx": 0})
    assert llm.n_ctx() == llm.kv_stats().n_ctx == 4096
    llm.eval(TOKENS)
    assert llm.kv_stats().n_tokens == len(TOKENS)


def test_missing_model(tmp_path, refused):
    message = refused(ModelFileError, tmp_path / "none.gguf", **SMALL)
    assert "none.gguf" in message


@pytest.mark.parametrize("how", ["empty", "text", "header", "half", "tail", "magic"])
def test_damaged_model(how, tiny, tmp_path, refused):
    data = Path(tiny("llama")).read_bytes()
    bad = {
        "empty": b"",
        "text": b"not a model\n" * 100,
        "header": data[:100],
        "half": data[: len(data) // 2],
        "tail": data[:-100],
        "magic": b"XXXX" + data[4:],
    }
    path = tmp_path / "bad.gguf"
    path.write_bytes(bad[how])
    assert "bad.gguf" in refused(ModelFileError, path, **SMALL)


PROFILE = "semcache-profile 3\nmodel_id {id}\nn_text 1\nparts 0.0078125 0.015625 0.03125 0.0625 0.125 0.25 0.5\n{heads}"
HEAD = "head {il} {head} 0.6 0.5 0.4 0.3 0.2 0.1 0.05\n"


@pytest.mark.parametrize(
    "how", ["other model", "other layers", "empty", "text", "cut", "version", "folder", "not a number"]
)
def test_profile_that_does_not_fit(how, tiny, tmp_path, refused):
    from llama_semanticache import profile

    path = tmp_path / "a.profile"
    id = profile.model_id(tiny("llama"))
    heads = [HEAD.format(il=il, head=head) for il in (0, 1) for head in (0, 1)]
    good = PROFILE.format(id=id, heads="".join(heads))
    bad = {
        "other model": PROFILE.format(id="0" * 64, heads="".join(heads)),
        "other layers": PROFILE.format(id=id, heads="".join(heads) + HEAD.format(il=2, head=0)),
        "empty": "",
        "text": "hello\n",
        "cut": good[:-30],
        "version": good.replace("profile 3", "profile 1"),
        "not a number": good.replace("0.4", "zero", 1),
        "folder": None,
    }[how]
    if bad is None:
        path.mkdir()
    else:
        path.write_text(bad)
    message = refused(ProfileError, tiny("llama"), **{**SMALL, "kv_profile": path})
    assert "a.profile" in message
    if how == "other model":
        assert id in message and "0" * 64 in message


def test_a_profile_that_fits_is_taken(tiny, tmp_path, load):
    from llama_semanticache import profile

    heads = [
        f"head {il} {head} " + " ".join(f"{size * 2.0**-i:g}" for i in range(7)) + "\n"
        for il, head, size in ((0, 0, 16), (0, 1, 1), (1, 0, 4), (1, 1, 1))
    ]
    path = tmp_path / "a.profile"
    path.write_text(PROFILE.format(id=profile.model_id(tiny("llama")), heads="".join(heads)))
    for choice in (path, str(path)):
        llm = load(tiny("llama"), **{**SMALL, "kv_profile": choice})
        rows = [allocated for *_, allocated, _ in llm.kv_rows()]
        assert sum(rows) == 1024
        assert rows[0] > rows[2] > rows[1] and abs(rows[1] - rows[3]) < 20  # by the size of their errors


def test_errors_come_before_memory_is_taken(tiny):
    """A refused context of 64 GiB must not even be tried."""
    with pytest.raises(ArgumentError):
        Llama(tiny("llama"), **{**SMALL, "n_ctx": 1 << 27, "kv_ratio": 2}, verbose=False)
    with pytest.raises(UnsupportedModelError):
        Llama(tiny("bloom"), **{**SMALL, "n_ctx": 1 << 27}, verbose=False)


def test_eval_beyond_n_ctx(tiny, load):
    llm, twin = load(tiny("llama"), **SMALL), load(tiny("llama"), **SMALL)
    tokens = random_tokens(1024)
    for some in (llm, twin):
        some.eval(tokens[:1000])
    was = llm.kv_stats(), llm.kv_rows()
    with pytest.raises(ContextOverflowError, match="expected at most 1024 .* got 1000 .* 25 more"):
        llm.eval(tokens[:25])
    assert (llm.kv_stats(), llm.kv_rows()) == was and llm.n_tokens == 1000
    for some in (llm, twin):
        some.eval(tokens[1000:])
        assert some.n_tokens == 1024
    np.testing.assert_array_equal(last_logits(llm), last_logits(twin))
    with pytest.raises(ContextOverflowError):
        llm.eval([5])


def test_a_prompt_longer_than_n_ctx_is_upstreams_error(tiny, load):
    llm = load(tiny("llama"), **SMALL)
    with pytest.raises(ValueError, match=r"Requested tokens \(1\d\d\d\) exceed context window of 1024"):
        llm.create_completion("a" * 1200, max_tokens=5)
    assert llm.create_completion("a" * 200, max_tokens=5)["usage"]["completion_tokens"] == 5


def test_n_ctx_that_llama_cpp_rounds_up_can_be_used_to_the_end(tiny, load):
    llm = load(tiny("llama"), **{**SMALL, "n_ctx": 600, "kv_ratio": 0.5})
    assert llm.n_ctx() == 768
    llm.eval(random_tokens(768))
    assert llm.n_tokens == llm.kv_stats().n_tokens == 768
    with pytest.raises(ContextOverflowError):
        llm.eval([5])


def run_python(code: str, *args: str, **env: str):
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )


def test_the_stock_library(tiny):
    """llama_cpp that was imported first, or pointed elsewhere, has another library: an error, not a crash."""
    stock = os.environ.get("LLAMA_SEMANTICACHE_STOCK_LIB")
    assert stock, (
        "expected LLAMA_SEMANTICACHE_STOCK_LIB, got nothing; run `make test`, which builds the unpatched library"
    )
    code = (
        "{first}\n"
        "import llama_semanticache\n"
        "try:\n"
        "    llama_semanticache.Llama\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    for first, cause, remedy in (
        ("import llama_cpp", "llama_cpp was imported first", "import llama_semanticache before llama_cpp"),
        ("", "LLAMA_CPP_LIB_PATH points there", "leave it unset"),
    ):
        done = run_python(code.format(first=first), LLAMA_CPP_LIB_PATH=stock)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("LibraryError expected the patched llama.cpp, got the stock library"), done.stdout
        assert cause in done.stdout and remedy in done.stdout


def test_no_library(tmp_path):
    code = (
        "import llama_semanticache\ntry: llama_semanticache.Llama\nexcept ImportError as e: print(type(e).__name__, e)"
    )
    done = run_python(code, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LibraryError expected the patched llama.cpp in") and "install" in done.stdout


FAILED_PASS = """
import resource, sys
import numpy as np
from llama_semanticache import Llama, SemanticCacheError
sys.path.insert(0, sys.argv[2])
from conftest import last_logits, random_tokens, continue_with, check_stats

def make():
    return Llama(sys.argv[1], n_ctx=2048, kv_compress="semanticache", kv_ratio=0.25, kv_stage=1024, kv_window=16,
                 kv_profile=None, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)

def address_space():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()

tokens = random_tokens(1300)
twin, llm = make(), make()
twin.eval(tokens[:960])
llm.eval(tokens[:960])
assert llm.kv_stats().n_pass == 0
before = llm.kv_stats(), llm.kv_rows(), llm.n_tokens
limits = resource.getrlimit(resource.RLIMIT_AS)
# the scratch of this pass is about 10 MiB
resource.setrlimit(resource.RLIMIT_AS, (address_space() + (1 << 20), limits[1]))
try:
    llm.eval(tokens[960:1024])
    error = None
except Exception as e:
    error = e
resource.setrlimit(resource.RLIMIT_AS, limits)
assert isinstance(error, SemanticCacheError), repr(error)
assert "memory" in str(error), str(error)
assert (llm.kv_stats(), llm.kv_rows(), llm.n_tokens) == before
for some in (llm, twin):
    some.eval(tokens[960:])
assert llm.kv_stats().n_pass == twin.kv_stats().n_pass == 1, (llm.kv_stats(), twin.kv_stats())
assert llm.kv_rows() == twin.kv_rows()
np.testing.assert_array_equal(last_logits(llm), last_logits(twin))
check_stats(llm)
print("OK", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_AS, which other systems do not honour")
def test_a_failed_pass_leaves_the_cache_as_it_was(tiny):
    done = run_python(FAILED_PASS, tiny("llama"), os.path.dirname(__file__))
    assert done.returncode == 0, done.stderr
    assert "OK pass: expected memory" in done.stdout, done.stdout


@pytest.mark.parametrize("options", [{"kv_ratio": 0.125}, {"kv_stage": "x", "kv_profile": None}])
def test_arguments_without_kv_compress(options, tiny):
    """Upstream would take them without a word, and allocate a cache that is many times what the user thinks it is."""
    with pytest.warns(UserWarning, match=f"^{', '.join(sorted(options))}: no use without kv_compress"):
        Llama(tiny("llama"), **options, n_ctx=512, verbose=False).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Llama(tiny("llama"), kv_compress=None, kv_ratio=None, n_ctx=512, verbose=False).close()


@pytest.mark.filterwarnings("default:only")
def test_a_model_of_few_heads(tiny, tmp_path):
    """One that keeps facts in three heads has been measured, and loses them."""
    with pytest.warns(
        UserWarning, match="^only 2 KV heads of this model attend to the whole text.*; leave kv_ratio and kv_budget out"
    ):
        Llama(tiny("gemma3"), **SMALL, verbose=False).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ratio in (1, None):
            Llama(tiny("gemma3"), **{**SMALL, "kv_ratio": ratio}, verbose=False).close()
        Llama(str(tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=4)), **SMALL, verbose=False).close()


def test_statistics_after_close(tiny):
    for options in ({"n_ctx": 512}, SMALL):
        llm = Llama(tiny("llama"), **options, verbose=False)
        llm.close()
        with pytest.raises(StateError, match="expected a model that is loaded, got one after close"):
            llm.kv_stats()


def test_a_model_without_a_vocabulary(tmp_path):
    """llama.cpp aborts when it is asked what such a token is; a child shows it."""
    path = tiny_models.write_tiny(tmp_path / "m.gguf", "llama", has_vocabulary=False)
    program = f"""
from llama_semanticache import Llama
llm = Llama({str(path)!r}, n_ctx=1024, kv_compress="semanticache", kv_ratio=0.25, kv_profile=None, kv_stage=96,
            kv_window=12, verbose=False)
llm.eval(list(range(10, 210)))
print("rows:", llm.kv_stats().rows_used)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "rows: " in done.stdout, done.stderr[-2000:]
