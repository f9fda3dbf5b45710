"""pytest plugin: upstream's tests see our class as llama_cpp.Llama, and one local model for every download."""

import os

import huggingface_hub
import llama_cpp

import llama_semanticache

# Their contexts have 16 to 64 tokens, so the stage is smaller than the default one.
OPTIONS = dict(kv_compress="semanticache", kv_stage=32, kv_window=8, kv_profile=None)


class CompressedLlama(llama_semanticache.Llama):
    def __init__(self, *args, **kwargs):
        if not kwargs.get("vocab_only"):
            kwargs = {**OPTIONS, **kwargs, "n_threads": 1, "n_threads_batch": 1}  # they ask for all cores, busy or not
        super().__init__(*args, **kwargs)
        if not kwargs.get("vocab_only"):
            assert self.kv_stats().rows_allocated > 0


llama_cpp.Llama = CompressedLlama
huggingface_hub.hf_hub_download = lambda *args, **kwargs: os.environ["UPSTREAM_TEST_MODEL"]
