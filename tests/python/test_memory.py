"""memory.py: sizes from metadata against arithmetic by hand and against what llama.cpp allocates."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest

import tiny_models
from conftest import EXACT, SMALL, last_logits, random_tokens
from llama_semanticache import _native, memory, profile
from llama_semanticache.config import KVConfig, parse_bytes
from llama_semanticache.errors import ArgumentError, ModelFileError, UnsupportedModelError
from llama_semanticache.memory import estimate, largest_n_ctx, memory_report
from llama_semanticache.model_file import ModelFile
from llama_semanticache.shape import LayerShape, ModelShape, shape_of

MIB = 1 << 20

# Llama 3.1 8B in Q4_K_M
LAYERS_8B = tuple(LayerShape(il, "full", 32, 8, 128, 128) for il in range(32))
SHAPE_8B = ModelShape("8b.gguf", "8b", "llama", 131072, 4096, 14336, 128256, 0, 4_920_734_720, LAYERS_8B, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def read_shape(path):
    return ModelFile.read(path).shape


def tiny_shape(folder, arch, **options):
    return read_shape(tiny_models.write_tiny(folder / "m.gguf", arch, **options))


@pytest.fixture
def allocated(capfd):
    """Function that returns the MiB of all KV buffers as llama.cpp logs them."""

    def load(path, n_ctx, cache="f16", swa_full=False):
        import gguf

        from llama_semanticache import Llama

        kind = int(gguf.GGMLQuantizationType[cache.upper()])
        options = {"type_k": kind, "type_v": kind, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1}
        capfd.readouterr()
        Llama(str(path), n_ctx=n_ctx, swa_full=swa_full, verbose=True, **options).close()
        log = capfd.readouterr().err
        sizes = [float(size) for size in re.findall(r"KV buffer size =\s+([0-9.]+) MiB", log)]
        assert sizes, log
        return sum(sizes)

    return load


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("arch", tiny_models.SUPPORTED)
def test_f16_cache_is_what_llama_cpp_allocates(folder, allocated, arch, swa_full):
    path = tiny_models.write_tiny(folder / f"{arch}.gguf", arch, n_embd=256, n_ctx_train=8192)
    for n_ctx in (1000, 4096):
        ours = estimate(read_shape(path), n_ctx, "f16", swa_full=swa_full).kv_bytes / MIB
        assert ours == pytest.approx(allocated(path, n_ctx, swa_full=swa_full), abs=0.011)
        if not read_shape(path).n_swa:
            break


@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_quantized_cache_is_what_llama_cpp_allocates(folder, allocated, cache):
    path = tiny_models.write_tiny(folder / "q.gguf", "qwen3", n_embd=256)
    ours = estimate(read_shape(path), 4096, cache).kv_bytes / MIB
    assert ours == pytest.approx(allocated(path, 4096, cache), abs=0.011)


def test_mla_caches_keys_only(folder, allocated):
    path = tiny_models.write_tiny(folder / "mla.gguf", "deepseek2")
    shape = read_shape(path)
    assert {(layer.n_head_kv, layer.n_embd_head_k, layer.n_embd_head_v) for layer in shape.layers} == {(1, 40, 0)}
    assert estimate(shape, 4096, "f16").kv_bytes / MIB == pytest.approx(allocated(path, 4096), abs=0.011)


@pytest.mark.parametrize(
    ("arch", "method"),
    [(arch, "semanticache") for arch in ("llama", "gemma3", "gemma4", "gemma3n", "qwen2vl")]
    + [("llama", "tova"), ("llama", "keydiff")],
)
def test_compressed_cache_is_what_is_allocated(folder, arch, method):
    from llama_semanticache import Llama

    path = tiny_models.write_tiny(folder / "c.gguf", arch, n_embd=256, n_ctx_train=8192)
    settings = {"kv_compress": method, "kv_ratio": 0.25, "kv_stage": 512, "kv_window": 256}
    llm = Llama(
        str(path),
        n_ctx=8192,
        kv_profile=None,
        swa_full=False,
        n_threads=1,
        verbose=False,
        **settings,
    )
    stats = llm.kv_stats()
    llm.close()
    ours = estimate(read_shape(path), 8192, "semanticache", **settings)
    for name in ("core_bytes", "stage_bytes", "query_bytes", "meta_bytes", "other_bytes"):
        assert getattr(ours, name) == pytest.approx(getattr(stats, name), rel=0.01, abs=64), (
            name
        )  # tensors are padded to 32 bytes
    assert ours.kv_bytes == pytest.approx(stats.total_bytes, rel=0.01)


def test_8b_by_hand():
    f16 = 32 * 2 * 32768 * 8 * 128 * 2
    sizes = {cache: estimate(SHAPE_8B, 32768, cache).kv_bytes for cache in memory.CACHE_TYPES}
    assert sizes["f16"] == f16 == 4 << 30
    assert sizes["q8_0"] == f16 * 34 / 64
    assert sizes["q4_0"] == f16 * 18 / 64
    compressed = estimate(SHAPE_8B, 32768, "semanticache", kv_ratio=0.25, kv_stage=512, kv_window=256, **EXACT)
    rows = 32768 // 4 * 8 * 32
    per_head = 512 * 8 + 2 * (2 * 128 + 4 * 2 * 128) + 8  # votes on the stage; frame, sinks and two counts
    assert compressed.core_bytes + compressed.meta_bytes == rows * (2 * 128 * 2 + 8) + 8 * 32 * per_head
    assert compressed.stage_bytes == 32 * 2 * 512 * 8 * 128 * 2
    assert compressed.query_bytes == 32 * 129 * (32 * 128 // 32) * 22  # q5_0, of every second token
    assert compressed.other_bytes == 0
    assert compressed.compression_factor == f16 / compressed.kv_bytes
    rest = SHAPE_8B.weights_bytes + compressed.overhead_bytes
    assert compressed.total_bytes == compressed.kv_bytes + compressed.work_bytes + rest
    n_query, n_row = 129 * 4, 32768 + 512  # of the largest head that there can be: shares, and K and V three times
    of_one = 4 * n_row * (n_query + 3 * 128)
    assert of_one < compressed.work_bytes < 1.25 * of_one


def test_smaller_caches_fit_more():
    f16, q8, q4 = (largest_n_ctx(SHAPE_8B, 12, cache) for cache in ("f16", "q8_0", "q4_0"))
    assert 0 < f16 < q8 < q4
    assert largest_n_ctx(SHAPE_8B, 12, "semanticache") > 2 * f16
    assert [largest_n_ctx(SHAPE_8B, card, "f16") for card in (4, 24, 1000)] == [
        0,
        pytest.approx(115_000, rel=0.2),
        131072,
    ]


@pytest.mark.parametrize("cache", memory.CACHE_TYPES)
@pytest.mark.parametrize("card", memory.CARDS_GB)
def test_largest_n_ctx_is_the_largest(cache, card):
    n_ctx = largest_n_ctx(SHAPE_8B, card, cache)
    assert n_ctx > 0
    assert estimate(SHAPE_8B, n_ctx, cache).fits(card)
    assert n_ctx == SHAPE_8B.n_ctx_train or not estimate(SHAPE_8B, n_ctx + 256, cache).fits(card)


def test_largest_n_ctx_skips_what_is_too_short_for_the_budget():
    """With kv_ratio 1/64 a context below 2304 tokens has no budget at all, but a longer one fits."""
    with pytest.raises(ArgumentError):
        estimate(SHAPE_8B, 2048, "semanticache", kv_ratio=1 / 64)
    assert largest_n_ctx(SHAPE_8B, 6, "semanticache", kv_ratio=1 / 64) > 2304


def test_sliding_window_layers(folder):
    shape = tiny_shape(folder, "gemma3", n_layer=12, n_swa=64)
    assert [layer.il for layer in shape.of_kind("full")] == [5, 11]
    assert [layer.kind for layer in tiny_shape(folder, "gemma2", n_layer=4).layers] == ["swa", "full"] * 2
    per_cell = 2 * 2 * 2 * 32  # f16, K and V, 2 kv heads of 32 values
    assert estimate(shape, 4096, "f16").kv_bytes == per_cell * (2 * 4096 + 10 * 768)  # 64 + 512 is padded to 768
    compressed = estimate(shape, 4096, "semanticache")
    assert compressed.other_bytes == per_cell * 10 * 256  # 64 + batches of 384 - 256 tokens, padded
    assert compressed.stage_bytes == per_cell * 2 * 384  # f16: llama.cpp rotates heads of 64 values


def test_sliding_window_of_other_architectures_is_ignored(folder):
    shape = tiny_shape(folder, "mistral", metadata={"{arch}.attention.sliding_window": 128})
    assert shape.n_swa == 0 and len(shape.of_kind("full")) == 2


@pytest.mark.parametrize("arch", tiny_models.SUPPORTED)
def test_supported_architectures(folder, arch):
    shape = tiny_shape(folder, arch)
    assert shape.refused is None
    assert (shape.n_ctx_train, shape.n_embd, shape.n_ff, shape.n_vocab) == (
        4096,
        64,
        128,
        len(tiny_models.vocabulary()),
    )


def test_what_is_refused_by_architecture_is_said_by_the_library():
    assert _native.arch_obstacle("llama") is None and _native.arch_obstacle("no such thing") is None
    assert _native.arch_obstacle("bloom") == "ALiBi positions"


@pytest.mark.parametrize("arch", [a for a in tiny_models.REFUSED])
def test_refused_architectures(folder, arch):
    shape = tiny_shape(folder, arch)
    word = tiny_models.REFUSED[arch]
    assert word in shape.refused
    with pytest.raises(ArgumentError, match=word):
        estimate(shape, 2048, "semanticache")
    report = memory_report(shape.path, [2048])
    assert "semanticache" not in report.max_n_ctx
    assert any(word in note for note in report.notes)


@pytest.mark.parametrize(
    ("arch", "metadata", "word"),
    [
        ("gemma3n", {}, None),
        ("gemma4", {}, None),
        ("grok", {}, "a way of its own"),
        ("t5", {}, "encoder"),
        ("llada", {}, "non-causal"),
        ("qwen3", {"attention.causal": False}, "non-causal"),
        ("qwen3", {"attention.indexer.top_k": 64}, "indexer"),
        ("qwen3", {}, None),
        ("qwen3", {"attention.causal": True}, None),
    ],
)
def test_what_the_library_refuses_by_its_metadata(arch, metadata, word, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_block_count(30)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    for key, value in metadata.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"{arch}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused = read_shape(tmp_path / "m.gguf").refused
    assert refused is None if word is None else word in refused


@pytest.mark.parametrize(
    ("arch", "key", "value", "expected"),
    [
        ("llama", "attention.head_count", [4], "a whole number for each of 2 layers"),
        ("llama", "attention.head_count_kv", [2], "a whole number for each of 2 layers"),
        ("llama", "attention.head_count_kv", [], "a whole number for each of 2 layers"),
        ("llama", "attention.head_count_kv", [2.0, 2.0], "a whole number for each of 2 layers"),
        ("llama", "attention.head_count_kv", [2, -2], "a whole number for each of 2 layers"),
        ("llama", "feed_forward_length", [128], "a whole number for each of 2 layers"),
        ("gemma3", "attention.sliding_window_pattern", [1], "a whole number for each of 7 layers"),
        ("gemma3", "attention.sliding_window_pattern", 2.5, "a whole number"),
        ("gemma3", "attention.sliding_window", "wide", "a whole number"),
        ("lfm2", "attention.recurrent_layers", [1, 0], "a whole number for each of"),
        ("llama", "attention.key_length", -1, "a whole number"),
        ("llama", "context_length", 1e6, "a whole number"),
        ("llama", "nextn_predict_layers", "one", "a whole number"),
        ("llama", "embedding_length", 0, "1 to 2147483647"),
        ("llama", "embedding_length", [64], "a whole number"),
        ("llama", "block_count", 0, "1 to 512"),
        ("llama", "block_count", 4_000_000_000, "1 to 512"),
    ],
    ids=str,
)
def test_metadata_that_no_model_has(folder, arch, key, value, expected):
    """A damaged file, however it is damaged, is told as one."""
    good = ModelFile.read(tiny_models.write_tiny(folder / "m.gguf", arch))
    bad = {**good.metadata, f"{arch}.{key}": value}
    with pytest.raises(ModelFileError, match=rf"{expected}.* in the metadata {arch}.{key}, got .*; download") as error:
        shape_of(good.path, bad, good.tensors)
    assert str(value) in str(error.value) and "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    ("value", "kinds"), [(0, "sssssss"), (1, "fffffff"), (3, "ssfssfs"), ([1, 0, 0, 0, 0, 0, 1], "sfffffs")]
)
def test_patterns_of_sliding_windows(folder, value, kinds):
    good = ModelFile.read(tiny_models.write_tiny(folder / "m.gguf", "gemma3"))
    shape = shape_of(good.path, {**good.metadata, "gemma3.attention.sliding_window_pattern": value}, good.tensors)
    assert "".join(layer.kind[0] for layer in shape.layers) == kinds


def test_a_model_that_is_split_over_files(tmp_path, load):
    """Counted and told from others as a whole, and loaded as llama.cpp does."""
    whole = tiny_models.write_tiny(tmp_path / "m.gguf", "llama")
    first = tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_split_tensors=6)
    assert (
        first.name.startswith("m-00001-of-")
        and len(ModelFile.read(first).files) >= 3
        and ModelFile.read(whole).files == (whole,)
    )
    a, b = read_shape(whole), read_shape(first)
    assert (b.weights_bytes, b.n_vocab) == (a.weights_bytes, a.n_vocab) and a.weights_bytes > 0
    tokens = random_tokens(300)
    logits = []
    for path in (whole, first):
        llm = load(path, **SMALL)
        llm.eval(tokens)
        logits.append(last_logits(llm))
    assert np.array_equal(*logits)

    last = ModelFile.read(first).files[-1]
    id = profile.model_id(first)
    data = last.read_bytes()
    last.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert profile.model_id(first) != id
    with pytest.raises(ModelFileError, match="expected the first file .* got .*; name the first"):
        ModelFile.read(last)
    last.unlink()
    with pytest.raises(ModelFileError, match=f"got no {last.name}; fetch"):
        ModelFile.read(first)


def test_weights_are_the_tensors(folder):
    import gguf

    path = tiny_models.write_tiny(folder / "w.gguf", "llama", dtype="f16")
    assert read_shape(path).weights_bytes == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def test_heads_that_cannot_be_quantized_are_left_out(folder):
    path = tiny_models.write_tiny(folder / "h.gguf", "llama")  # heads of 16 values; q8_0 takes 32 at a time
    report = memory_report(path, [1024])
    assert [entry.cache for entry in report.estimates] == ["f16", "semanticache"]
    assert set(report.max_n_ctx) == {"f16", "semanticache"}
    assert any(note.startswith("q8_0") and "32" in note for note in report.notes)


@pytest.mark.parametrize(
    ("n_ctx", "options"),
    [
        (0, {}),
        (4096, {"kv_ratio": 0}),
        (4096, {"kv_ratio": 1.5}),
        (4096, {"kv_ratio": 0.001}),
        (256, {}),
        (4096, {"kv_stage": 0}),
        (4096, {"kv_stage": 260}),
        (4096, {"kv_stage": 128, "kv_window": 124}),
        (32768, {"kv_stage": 8192}),
    ],
)
def test_arguments_are_checked(n_ctx, options):
    with pytest.raises(ArgumentError, match="expected"):
        estimate(SHAPE_8B, n_ctx, "semanticache", **options)
    with pytest.raises(ArgumentError, match="q5"):
        estimate(SHAPE_8B, 4096, "q5_1")


def test_file_without_a_language_model(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="embedding_length|block_count"):
        read_shape(tmp_path / "adapter.gguf")


def test_report_as_json(folder):
    path = tiny_models.write_tiny(folder / "j.gguf", "mistral")
    report = memory_report(path, [1024, 4096], cards_gb=(6, 8))
    loaded = json.loads(json.dumps(report.to_dict()))
    assert [(entry["n_ctx"], entry["cache"]) for entry in loaded["estimates"]] == [
        (n_ctx, cache) for n_ctx in (1024, 4096) for cache in memory.CACHE_TYPES
    ]
    first = loaded["estimates"][0]
    assert first["kv_bytes"] == report.estimates[0].kv_bytes and first["fits_gb"] == [6, 8]
    assert loaded["max_n_ctx"]["f16"] == {"6": 4096, "8": 4096}
    assert loaded["kv_ratio"] == 1.0  # of a model of few heads
    assert memory_report(path, [1024], kv_ratio=0.5).kv_ratio == 0.5


# ---------------------------------------------------------------------------------------------- a budget in bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("64KiB", 65536),
        ("1.5 MiB", 3 << 19),
        (" 2GB ", 2 * 10**9),
        ("0.5GiB", 1 << 29),
        ("7 B", 7),
        (512e6, 512_000_000),
        (np.int64(1 << 30), 1 << 30),
    ],
)
def test_budgets_are_read(value, expected):
    assert parse_bytes(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "MiB",
        "-5MiB",
        0,
        "0MB",
        True,
        1.5e-3,
        "12 iB",
        "1 MiBs",
        "1,5MiB",
        None,
        "1e9",
        float("inf"),
        float("nan"),
        [1],
    ],
)
def test_other_budgets_are_refused(value):
    with pytest.raises(ArgumentError, match="kv_budget: expected a number of bytes.*got.*512MiB"):
        parse_bytes(value)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cache_takes_its_budget_and_no_more(arch, share, folder):
    from llama_semanticache import Llama

    path = tiny_models.write_tiny(folder / f"{arch}.gguf", arch, n_embd=128, n_ctx_train=8192)
    options = dict(n_ctx=8192, kv_compress="semanticache", kv_stage=192, kv_window=64, kv_profile=None, verbose=False)
    sizes = {}
    for ratio in (0.01, 1):
        llm = Llama(str(path), **options, kv_ratio=ratio)
        sizes[ratio] = llm.kv_stats().total_bytes
        llm.close()
    budget = round(sizes[0.01] + share * (sizes[1] - sizes[0.01]))
    llm = Llama(str(path), **options, kv_budget=budget)
    stats = llm.kv_stats()
    llm.close()
    assert 0.98 * budget < stats.total_bytes <= budget


@pytest.mark.parametrize(
    "options",
    [
        dict(swa_full=None),
        dict(n_ctx=0),
        dict(n_ctx=0, kv_overrides={"gemma3.context_length": 32768}),
        dict(kv_overrides={"gemma3.attention.sliding_window": 512}),
        dict(n_batch=64, flash_attn=False),
    ],
    ids=str,
)
def test_a_budget_holds_with_any_arguments_of_upstream(options, folder):
    from llama_semanticache import Llama

    path = tiny_models.write_tiny(folder / "any.gguf", "gemma3", n_embd=128, n_ctx_train=8192)
    known = dict(n_ctx=8192, kv_compress="semanticache", kv_stage=192, kv_window=64, kv_profile=None, verbose=False)
    known |= dict(kv_type_k="f16", kv_type_v="f16")  # else all rows fit
    llm = Llama(str(path), **{**known, **options}, kv_budget="2.5MiB")
    stats = llm.kv_stats()
    llm.close()
    assert 0.98 * 2.5 * 2**20 < stats.total_bytes <= 2.5 * 2**20


@pytest.mark.parametrize("arch", ["mamba", "bloom", "deepseek2"])
def test_a_budget_for_a_model_that_cannot_be_compressed(arch, folder):
    from llama_semanticache import Llama

    path = tiny_models.write_tiny(folder / f"{arch}-budget.gguf", arch)
    with pytest.raises(UnsupportedModelError, match="expected"):
        Llama(str(path), n_ctx=1024, kv_compress="semanticache", kv_profile=None, verbose=False, kv_budget="64MiB")


def test_a_budget_for_more_than_all_rows_keeps_all(folder):
    path = tiny_models.write_tiny(folder / "all.gguf", "llama")
    shape = ModelFile.of(path).shape
    config = KVConfig("semanticache", kv_stage=96, kv_window=12, kv_budget="1GiB")
    assert memory.within_budget(config, shape, 1024).kv_ratio == 1
    assert memory.within_budget(replace(config, kv_budget=None), shape, 1024).kv_ratio is None


def test_a_budget_below_the_least_is_refused_before_anything_is_allocated(folder):
    from llama_semanticache import Llama

    path = tiny_models.write_tiny(folder / "least.gguf", "llama", n_embd=256)
    options = dict(n_ctx=4096, kv_compress="semanticache", kv_stage=192, kv_window=64, kv_profile=None, verbose=False)
    with pytest.raises(
        ArgumentError, match=r"kv_budget: expected at least 1 MiB at n_ctx 4096.*got 0\.1 MiB; raise it"
    ):
        Llama(str(path), **options, kv_budget="100KiB")
    for ratio in (0.5, 0.25):
        with pytest.raises(ArgumentError, match=f"kv_budget: expected no kv_ratio beside it, got {ratio}"):
            Llama(str(path), **options, kv_ratio=ratio, kv_budget="1MiB")
    llm = Llama(str(path), **options, kv_budget="1MiB")
    again = pickle.loads(pickle.dumps(llm))
    assert again.kv_stats().rows_allocated == llm.kv_stats().rows_allocated
    for some in (llm, again):
        some.close()
