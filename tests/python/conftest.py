"""Models, texts and measures that the tests share."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

import tiny_models
from llama_semanticache import Llama, models

# ggml's threads spin while they wait for each other: on a busy machine two are slower than one, by far for tiny models
N_THREADS = 1
EXACT = dict(kv_type_k="f16", kv_type_v="f16", kv_type_stage="f16")  # nothing that is rounded
# batches of 80 tokens, a pass for each
PASSES = dict(kv_compress="semanticache", kv_ratio=0.25, kv_stage=96, kv_window=12, kv_profile=None, n_batch=80)
SMALL = dict(n_ctx=1024, **PASSES)


def register_backend(library: ctypes.CDLL, function: str) -> None:
    """Puts in a backend that llama.cpp was not linked with, before a model is loaded."""
    reg = getattr(library, function)
    reg.restype = ctypes.c_void_p
    register = llama_cpp.llama_cpp._lib.ggml_backend_register  # of a library that libllama needs
    register.argtypes = [ctypes.c_void_p]
    register(reg())


# ---------------------------------------------------------------------------------------------- models


def built_by_make(variable: str, what: str) -> str:
    """Path that `make test` hands over in an environment variable; without it the test fails."""
    path = os.environ.get(variable)
    if not path or not Path(path).exists():
        pytest.fail(
            f"expected {variable} to name {what}, got {path!r}; run `make test`, which builds it", pytrace=False
        )
    return path


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct, quantized; fetched once into the user's cache."""
    return str(models.fetch("smollm2-135m"))


@pytest.fixture(scope="session")
def smollm2_f32(smollm2, tmp_path_factory) -> str:
    """The same weights in f32: with quantized ones, activations are rounded to 8 bits, which amplifies float noise."""
    path = tmp_path_factory.mktemp("f32") / "smollm2-f32.gguf"
    reader = gguf.GGUFReader(smollm2)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield str(path)
    path.unlink()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(arch) -> path of a random model of that architecture."""
    folder = tmp_path_factory.mktemp("tiny")

    def path_of(arch: str) -> str:
        path = folder / f"{arch}.gguf"
        return str(path if path.is_file() else tiny_models.write_tiny(path, arch))

    return path_of


@pytest.fixture
def load():
    """load(path, **options) -> Llama that is closed after the test."""
    opened = []

    def make(path, **options) -> Llama:
        llm = Llama(str(path), **{"n_threads": N_THREADS, "n_threads_batch": N_THREADS, "verbose": False, **options})
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


# ---------------------------------------------------------------------------------------------- texts

_NAMES = [
    "Ada",
    "Boris",
    "Clara",
    "Daniel",
    "Edith",
    "Frank",
    "Greta",
    "Henry",
    "Irene",
    "Jonas",
    "Karen",
    "Louis",
    "Maria",
    "Nora",
    "Oscar",
    "Paula",
]
_PLACES = [
    "harbour",
    "library",
    "station",
    "garden",
    "market",
    "castle",
    "bridge",
    "museum",
    "kitchen",
    "workshop",
    "forest",
    "village",
    "school",
]
_THINGS = [
    "letter",
    "lamp",
    "wheel",
    "violin",
    "basket",
    "clock",
    "map",
    "engine",
    "blanket",
    "mirror",
    "kettle",
    "compass",
    "ticket",
    "painting",
]
_VERBS = [
    "carried",
    "found",
    "painted",
    "repaired",
    "sold",
    "forgot",
    "described",
    "measured",
    "borrowed",
    "hid",
    "polished",
    "admired",
]
_WORDS = [
    "old",
    "green",
    "broken",
    "heavy",
    "small",
    "golden",
    "curious",
    "silent",
    "foreign",
    "empty",
    "narrow",
    "famous",
    "wooden",
    "strange",
]


def sentences(n: int, seed: int = 0) -> list[str]:
    """English sentences of about 15 tokens, all different in the long run."""
    rng = random.Random(seed)
    pick = rng.choice
    return [
        f"{pick(_NAMES)} {pick(_VERBS)} the {pick(_WORDS)} {pick(_THINGS)} near the {pick(_WORDS)} {pick(_PLACES)}, "
        f"{rng.randrange(2, 99)} days after {pick(_NAMES)} left."
        for _ in range(n)
    ]


def text_tokens(llm: Llama, n: int, seed: int = 0) -> list[int]:
    """Exactly n tokens of text, the first one BOS if the model has it."""
    tokens = llm.tokenize(" ".join(sentences(n // 6 + 4, seed)).encode())
    assert len(tokens) >= n
    return tokens[:n]


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """Tokens for a tiny model: letters and spaces with a delimiter now and then."""
    rng = np.random.default_rng(seed)
    n_vocab = len(tiny_models.vocabulary())
    letters = [i for i in range(n_vocab) if tiny_models.is_printable(i)]
    return [1, *rng.choice(letters, n - 1).tolist()]


# ---------------------------------------------------------------------------------------------- measures


def decode_at_once(llm, tokens, first=0):
    """Decode through the C API, as evaluation tools do, with the logits of every token: status, logits."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, first + i, 1, 0, 1
    status = llama_cpp.llama_decode(llm.ctx, batch)
    logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(tokens), llm.n_vocab())).copy()
    llama_cpp.llama_batch_free(batch)
    return status, logits


def last_logits(llm: Llama) -> np.ndarray:
    """Logits of the last token that was evaluated, [n_vocab]."""
    pointer = llm._ctx.get_logits_ith(-1)
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(llm._n_vocab,)).copy()


def continue_with(llm: Llama, tokens: list[int]) -> np.ndarray:
    """Logits after each of the tokens, evaluated one by one, [len(tokens), n_vocab]."""
    rows = []
    for token in tokens:
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.array(rows)


def count_evals(llm):
    """A list that collects the number of tokens of every decoded batch."""
    counts = []
    decode = llm._ctx.decode

    def counted(batch):
        counts.append(batch.n_tokens())
        return decode(batch)

    llm._ctx.decode = counted
    return counts


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL divergence of logits q from logits p, per row, in nats."""

    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    a, b = log_softmax(p), log_softmax(q)
    return (np.exp(a) * (a - b)).sum(-1)


def check_stats(llm: Llama) -> None:
    """What holds for the numbers of kv_stats() at any time."""
    s, rows = llm.kv_stats(), llm.kv_rows()
    assert s.n_tokens == llm.n_tokens
    assert 0 <= s.n_tokens_stage <= s.n_tokens <= s.n_ctx == llm.n_ctx()
    assert sum(allocated for _, _, allocated, _ in rows) == s.rows_allocated
    assert sum(used for *_, used in rows) == s.rows_used
    assert all(0 <= used <= allocated <= s.n_ctx for _, _, allocated, used in rows)
    # every token outside the stage is a row, went into one, or was dropped; cuts only take rows away
    assert s.rows_used + s.rows_merged + s.rows_dropped >= (s.n_tokens - s.n_tokens_stage) * len(rows)
    others = any(key.endswith(("attention.sliding_window", "shortconv.l_cache")) for key in llm.metadata)
    assert (s.other_bytes > 0) == others, (
        s
    )  # what is in no other field is of layers with sliding windows or recurrent states
