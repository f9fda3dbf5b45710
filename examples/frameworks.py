"""How LangChain, LlamaIndex and guidance get a compressed KV cache.

    python examples/frameworks.py langchain|llama_index|guidance MODEL.gguf

The first two make a `llama_cpp.Llama` themselves, from whatever has that name when they do, and hand `model_kwargs` on
to it; guidance takes one that is there. A server for clients of the OpenAI API: `llama-semanticache serve MODEL`.
"""

from __future__ import annotations

import sys

import llama_cpp

import llama_semanticache

PROMPT = "The lighthouse keeper said"


def langchain(model_path: str) -> str:
    """An answer by langchain_community's LlamaCpp (ChatLlamaCpp works alike)."""
    llama_cpp.Llama = llama_semanticache.Llama
    from langchain_community.llms import LlamaCpp

    llm = LlamaCpp(
        model_path=model_path,
        n_ctx=1024,
        max_tokens=20,
        verbose=False,
        model_kwargs={"kv_compress": "semanticache", "kv_profile": None},
    )
    answer = llm.invoke(PROMPT)
    print(llm.client.kv_stats())
    return answer


def llama_index(model_path: str) -> str:
    """An answer by llama-index-llms-llama-cpp's LlamaCPP."""
    llama_cpp.Llama = llama_semanticache.Llama
    from llama_index.llms.llama_cpp import LlamaCPP

    llm = LlamaCPP(
        model_path=model_path,
        context_window=1024,
        max_new_tokens=20,
        verbose=False,
        model_kwargs={"kv_compress": "semanticache", "kv_profile": None},
    )
    answer = llm.complete(PROMPT, formatted=True).text
    print(llm._model.kv_stats())
    return answer


def guidance(model_path: str) -> str:
    """An answer by guidance."""
    from guidance import gen
    from guidance.models import LlamaCpp

    llm = llama_semanticache.Llama(model_path, n_ctx=1024, verbose=False, kv_compress="semanticache", kv_profile=None)
    answer = (LlamaCpp(llm, echo=False) + PROMPT + gen("answer", max_tokens=20))["answer"]
    print(llm.kv_stats())
    return answer


if __name__ == "__main__":
    print({f.__name__: f for f in (langchain, llama_index, guidance)}[sys.argv[1]](sys.argv[2]))
