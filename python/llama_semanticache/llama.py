"""Llama: llama_cpp.Llama whose KV cache is compressed while it runs."""

from __future__ import annotations

import ctypes
import difflib
import functools
import inspect
import logging
import os
import struct
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _cpu, _native, profile
from .config import AUTO, OURS, KVConfig
from .errors import ArgumentError, ContextOverflowError, StateError, UnsupportedModelError
from .memory import estimate, within_budget
from .model_file import ModelFile

_ffi, _lib = _native.load()

import llama_cpp  # noqa: E402  (after _native.load(), which decides which library it gets)
from llama_cpp import _logger, llama_chat_format, llama_speculative  # noqa: E402
from llama_cpp.llama_tokenizer import LlamaTokenizer  # noqa: E402

from ._gate import Closed, Gate, Tokenizer, gated  # noqa: E402
from ._seal import seal, unseal  # noqa: E402

# upstream's table is off by one: warnings count as errors, and errors as nothing to be told
_logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL.update(
    {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
)

_UPSTREAM = inspect.signature(llama_cpp.Llama.__init__)
_GENERATE = inspect.signature(llama_cpp.Llama.generate)


@dataclass(frozen=True)
class KVStats:
    """What the KV cache holds and takes now.

    Rows and tokens are counts, ``*_bytes`` are allocated bytes. A row is one (K, V) of one kv head in one layer.
    """

    kv_compress: str | None
    n_ctx: int  # logical size
    n_tokens: int  # tokens that the cache represents
    n_tokens_stage: int  # of these, tokens in the stage, one by one
    n_head_kv: int = 0  # compressed heads, over all layers
    rows_allocated: int = 0  # for cores, over all compressed layers and heads
    rows_used: int = 0
    rows_merged: int = 0  # merged into another row since the cache was last empty
    rows_dropped: int = 0  # dropped since then
    n_pass: int = 0  # passes since the model was loaded
    pass_s: float = 0.0  # seconds spent in them
    core_bytes: int = 0  # K, V and bias of the cores
    stage_bytes: int = 0  # K and V of the stage
    query_bytes: int = 0  # queries of the tokens since the last pass
    meta_bytes: int = 0  # scores and chunks of the cores, votes on the stage
    work_bytes: int = 0  # what passes work in, on a card
    other_bytes: int = 0  # caches of layers that are not compressed
    full_bytes: int = 0  # an uncompressed f16 cache of all layers
    why_uncompressed: str | None = None  # what kv_compress="auto" found

    @property
    def total_bytes(self) -> int:
        """Bytes allocated for the KV cache of all layers."""
        compressed = self.core_bytes + self.stage_bytes + self.query_bytes + self.meta_bytes + self.work_bytes
        return compressed + self.other_bytes

    @property
    def compression_factor(self) -> float:
        """How many times smaller than the uncompressed f16 cache; 1 without kv_compress."""
        return self.full_bytes / self.total_bytes if self.total_bytes else 1.0


class _ShortDrafts(llama_speculative.LlamaDraftModel):
    """Drafts that fit a batch together with the token that they follow: upstream asks for the logits of all of them at
    once. All attributes are the draft model's.

    Parameters
    ----------
    draft_model : LlamaDraftModel
    n_most : int
        Tokens of a draft, at most.
    """

    def __init__(self, draft_model: llama_speculative.LlamaDraftModel, n_most: int) -> None:
        self.__dict__.update(draft_model=draft_model, n_most=n_most)

    def __getattr__(self, name: str) -> Any:
        if name in ("draft_model", "n_most"):  # while it is copied
            raise AttributeError(name)
        return getattr(self.draft_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.draft_model, name, value)

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        return self.draft_model(input_ids, **kwargs)[: self.n_most]


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama with a compressed KV cache; all of its arguments and methods work as they do there, but
    ``verbose`` is off by default: of llama.cpp's log only errors are shown.

    Parameters
    ----------
    kv_compress : None, "auto" or a name in `config.METHODS`
        None leaves the cache alone. "semanticache" is this package's method, and "auto" is it for models that allow it
        if the cache gets smaller; else the cache is left alone, and a line on stderr and ``kv_stats()`` say why.
        "paper" is the method of the SemantiCache paper's abstract, "streaming" keeps only the first and the newest
        tokens, "keydiff", "knorm", "snapkv", "tova" and "h2o" evict by others' scores: these are for comparison.
    kv_ratio : float, optional
        Rows allocated for older tokens, as a share of ``n_ctx``, mean over heads; 0 < kv_ratio <= 1. By default 0.25,
        and 1 for models of fewer than `config.N_HEAD_KV_FEW` compressed heads: every token keeps its row, in 4.5 bits
        a value.
    kv_stage : int
        Newest tokens that are held one by one until the next pass compresses them. Limits ``n_ubatch``, the tokens
        computed at a time, to ``kv_stage - max(kv_window, kv_sink)``.
    kv_window : int
        Newest tokens of the stage that a pass leaves alone.
    kv_sink : int
        First tokens of the context, never merged or dropped; stored in f16.
    kv_type_k, kv_type_v : "auto", "f16", "q8_0", "q5_0", "q4_0" or "iq4_nl"
        How K and V of the older tokens are stored. "auto" is iq4_nl, or f16 if heads are no multiple of 32 values.
    kv_type_stage : "auto", "f16" or "q8_0"
        How the stage is stored. "auto" is q8_0, or f16 if heads are no multiple of 64 values or without ``flash_attn``.
        With f16, attention is llama.cpp's own, to the bit, until the first tokens are compressed.
    kv_profile : "auto", path or None
        Which head gets how many rows. "auto": the model's profile, measured on first use, and None for the methods of
        others and for models of fewer than `config.N_HEAD_KV_FEW` compressed heads; None: all heads the same, which
        loses far more where there are many.
    kv_params : mapping, optional
        Further fields of ``semcache_params`` (semcache.h) for experiments: n_horizon, n_chunk, merge, distinct, seed;
        calibrate is for `profile.calibrate`.

    kv_budget : number or str, optional
        Bytes of the whole cache, "512MiB" or a number, instead of ``kv_ratio``: as many rows as fit beside the stage,
        the queries and the sliding windows. The recurrent state of a hybrid model comes on top.
    n_ctx : int
        Context size, tokens; at least ``kv_stage``. 0: what the model was trained for.
    n_batch : int
        Tokens of a prompt that are given to llama.cpp at a time.
    n_gpu_layers : int
        Layers that lie on a card, weights and cache; -1: all.
    n_threads, n_threads_batch : int, optional
        CPU threads for one token and for many; upstream's choice is half of the processors and all of them.
    seed : int
        Of the sampler, unless a call names one.
    chat_format : str, optional
        Name of llama_cpp's chat format instead of the model's own template.
    verbose : bool, optional
        Show llama.cpp's log. Measuring a model on first use shows its progress unless this is False.
    **kwargs
        All other arguments of llama_cpp.Llama.

    Raises
    ------
    ArgumentError, UnsupportedModelError, ProfileError, ModelFileError
        Before any cache is allocated; the message says what was expected, what was given and what to do.
    """

    on_progress: Callable[[int, int], None] | None = None
    """Called with the tokens done and their number after each batch of a prompt of more than one."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_compress: str | None = None,
        kv_ratio: float | None = KVConfig.kv_ratio,
        kv_stage: int = KVConfig.kv_stage,
        kv_window: int = KVConfig.kv_window,
        kv_sink: int = KVConfig.kv_sink,
        kv_type_k: str = KVConfig.kv_type_k,
        kv_type_v: str = KVConfig.kv_type_v,
        kv_type_stage: str = KVConfig.kv_type_stage,
        kv_profile: str | os.PathLike[str] | None = KVConfig.kv_profile,
        kv_params: Mapping[str, int] | None = KVConfig.kv_params,
        kv_budget: float | str | None = KVConfig.kv_budget,
        n_ctx: int = _UPSTREAM.parameters["n_ctx"].default,
        n_batch: int = _UPSTREAM.parameters["n_batch"].default,
        n_gpu_layers: int = _UPSTREAM.parameters["n_gpu_layers"].default,
        n_threads: int | None = _UPSTREAM.parameters["n_threads"].default,
        n_threads_batch: int | None = _UPSTREAM.parameters["n_threads_batch"].default,
        seed: int = _UPSTREAM.parameters["seed"].default,
        chat_format: str | None = _UPSTREAM.parameters["chat_format"].default,
        verbose: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self._gate = Gate()
        self._kv = KVConfig(
            kv_compress=kv_compress,
            kv_ratio=kv_ratio,
            kv_stage=kv_stage,
            kv_window=kv_window,
            kv_sink=kv_sink,
            kv_type_k=kv_type_k,
            kv_type_v=kv_type_v,
            kv_type_stage=kv_type_stage,
            kv_profile=kv_profile,
            kv_params=kv_params,
            kv_budget=kv_budget,
        )
        self.kv_compress = kv_compress
        self._why_uncompressed: str | None = None
        _check_names(kwargs)
        self._shows_progress = verbose is None or verbose  # of measuring a model
        kwargs.update(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_gpu_layers=n_gpu_layers,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            seed=seed,
            chat_format=chat_format,
            verbose=bool(verbose),
        )
        for threads in (n_threads, n_threads_batch):
            if isinstance(threads, int):
                _cpu.warn_of_threads(threads, stacklevel=3)
        if kv_compress == AUTO:
            self._load_where_it_pays(model_path, kwargs)
            return
        if kv_compress is not None:
            self._load_compressed(model_path, kwargs)
            return
        if self._kv.changed():
            warnings.warn(
                f"{', '.join(self._kv.changed())}: no use without kv_compress, the KV cache is llama.cpp's own; pass "
                'kv_compress="semanticache" to compress it',
                stacklevel=2,
            )
        self._load(model_path, kwargs)

    def _load(self, model_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
        super().__init__(os.fspath(model_path), **kwargs)
        if type(self.tokenizer_) is LlamaTokenizer:
            self.tokenizer_ = Tokenizer(self)

    def _load_where_it_pays(self, model_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
        self._kv, self.kv_compress = replace(self._kv, kv_compress=OURS), OURS
        self._kv.check()  # the caller's own mistakes stay errors
        why = _why_not(self._kv, ModelFile.of(model_path), kwargs)
        if why is None:
            try:
                self._load_compressed(model_path, dict(kwargs))
                return
            except UnsupportedModelError as error:  # what the file alone does not tell
                why = str(error)
        if hasattr(self, "_stack"):  # of the attempt, whose model would stay until the next one is loaded
            self._stack.close()
        self._kv, self.kv_compress, self._why_uncompressed = KVConfig(), None, why
        print(f"llama-semanticache: the KV cache stays uncompressed: {why}", file=sys.stderr)
        self._load(model_path, kwargs)

    def _load_compressed(self, model_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
        self._kv.check()
        _check_others(self._kv, kwargs)
        # upstream gives sliding-window layers n_ctx cells too unless told otherwise, also by None: they need no more
        # than their window
        if kwargs.get("swa_full") is None:
            kwargs["swa_full"] = False
        # without it values lie across the stage, which is slower to read; the cores' attention is ours in any case
        kwargs.setdefault("flash_attn", True)
        model = ModelFile.of(model_path)
        config = self._within_budget(model, kwargs)
        config = replace(config, kv_ratio=config.ratio(model.shape.n_head_kv))
        file = profile.ensure(model, self._shows_progress, kwargs["n_threads_batch"], config=config)
        with _native.compressed(config, file, model.id if file else ""):
            self._load(model_path, kwargs)
        stats = self._native_stats()
        if config.has_too_few_heads(stats.n_head_kv):
            warnings.warn(
                f"only {stats.n_head_kv} KV heads of this model attend to the whole text, too few to take rows from "
                "one another: expect facts to be lost; leave kv_ratio and kv_budget out, and every "
                "token keeps its row",
                stacklevel=3,
            )
        if self.draft_model is not None:
            self.draft_model = _ShortDrafts(self.draft_model, self.n_batch - 1)
        # upstream sizes these by the argument, while the library rounds n_ctx up to a multiple of 256
        self.input_ids = self.input_ids.__class__((self._n_ctx,), dtype=self.input_ids.dtype)
        if self._logits_all and self.scores.shape[0] < self._n_ctx:
            self.scores = self.scores.__class__((self._n_ctx, self._n_vocab), dtype=self.scores.dtype)

    def _within_budget(self, model: ModelFile, kwargs: dict[str, Any]) -> KVConfig:
        def chosen(name: str) -> Any:
            return kwargs.get(name, _UPSTREAM.parameters[name].default)

        if self._kv.kv_budget is None:
            return self._kv
        shape = model.shape_with(chosen("kv_overrides"))
        if shape.refused:
            return self._kv  # the library says why
        n_ubatch = min(chosen("n_batch"), chosen("n_ubatch"))
        n_ctx = chosen("n_ctx") or shape.n_ctx_train
        config = self._kv
        if config.kv_type_stage == "auto" and not kwargs["flash_attn"]:
            config = replace(config, kv_type_stage="f16")
        options = dict(n_ubatch=n_ubatch, swa_full=kwargs["swa_full"], on_card=_is_on_card(kwargs))
        return within_budget(config, shape, n_ctx, **options)

    def _native_stats(self) -> Any:
        stats = _ffi.new("struct semcache_stats *")
        _native.check(_lib.semcache_get_stats(_native.context(self), stats))
        return stats

    def kv_stats(self) -> KVStats:
        """Contents and size of the KV cache now."""
        kv_bytes = _native.count(_lib.semcache_kv_bytes(_native.context(self)))
        if self.kv_compress is None:
            return KVStats(
                kv_compress=None,
                n_ctx=self._n_ctx,
                n_tokens=self.n_tokens,
                n_tokens_stage=self.n_tokens,
                other_bytes=kv_bytes,
                full_bytes=kv_bytes,
                why_uncompressed=self._why_uncompressed,
            )
        s = self._native_stats()
        other = kv_bytes - s.core_bytes - s.stage_bytes - s.query_bytes - s.meta_bytes - s.work_bytes
        return KVStats(
            kv_compress=self.kv_compress,
            n_ctx=s.n_ctx,
            n_tokens=s.n_tokens,
            n_tokens_stage=s.n_tokens_stage,
            n_head_kv=s.n_head_kv,
            rows_allocated=s.rows_allocated,
            rows_used=s.rows_used,
            rows_merged=s.rows_merged,
            rows_dropped=s.rows_dropped,
            n_pass=s.n_pass,
            pass_s=s.pass_us / 1e6,
            core_bytes=s.core_bytes,
            stage_bytes=s.stage_bytes,
            query_bytes=s.query_bytes,
            meta_bytes=s.meta_bytes,
            work_bytes=s.work_bytes,
            other_bytes=other,
            full_bytes=s.full_bytes + other,
        )

    def kv_rows(self) -> list[tuple[int, int, int, int]]:
        """(layer, kv head, rows allocated, rows used) of every compressed head."""
        if self.kv_compress is None:
            return []
        n = self._native_stats().n_head_kv
        heads = _ffi.new("struct semcache_head_stats[]", n)
        _native.count(_lib.semcache_get_head_stats(_native.context(self), heads, n))
        return [(h.il, h.head, h.rows_allocated, h.rows_used) for h in heads]

    @gated
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens behind the `n_tokens` that are there.

        Raises
        ------
        ContextOverflowError
            They do not fit into n_ctx; nothing was evaluated.
        """
        if self.kv_compress is None:
            return self._eval(tokens)
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextOverflowError(
                f"expected at most {self._n_ctx} tokens (n_ctx), got {self.n_tokens} in the cache and {len(tokens)} "
                "more; shorten the text, call reset() or raise n_ctx"
            )
        _native.clear_error()
        try:
            if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
                missing = self.input_ids[self._cut(self.n_tokens) : self.n_tokens].tolist()
                self.n_tokens -= len(missing)
                super().eval(missing)
            self._eval(tokens)
        except RuntimeError as error:
            raise _native.last_error() or error from error

    def _eval(self, tokens: Sequence[int]) -> None:
        """By the batches that upstream would make of them, to tell between these how far it is."""
        if self.on_progress is None or len(tokens) <= self.n_batch:
            return super().eval(tokens)
        for i in range(0, len(tokens), self.n_batch):
            super().eval(tokens[i : i + self.n_batch])
            self.on_progress(min(i + self.n_batch, len(tokens)), len(tokens))

    sample = gated(llama_cpp.Llama.sample, changes=False)
    embed = gated(llama_cpp.Llama.embed)
    create_completion = gated(llama_cpp.Llama.create_completion)
    create_chat_completion = gated(llama_cpp.Llama.create_chat_completion)

    def tokenizer(self) -> LlamaTokenizer:
        """The model's tokenizer."""
        return Tokenizer(self)

    @gated
    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        if self.kv_compress is not None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)

    def close(self) -> None:
        """Free the model; what is called afterwards raises StateError. Safe on an object whose __init__ has failed.

        Raises
        ------
        StateError
            Another thread is using the model.
        """
        if "_stack" not in self.__dict__ or self._gate.closed:
            return
        with self._gate:
            self._gate.close()
            super().close()
            closed: Any = Closed()
            self._ctx = self._model = self._batch = closed

    @gated
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """Generator of tokens, see llama_cpp.Llama.generate; a prefix that is in the cache already is not read
        again.
        """
        if self.kv_compress is not None and self.n_tokens > 0:
            tokens = list(tokens)
            if _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True):
                self._keep_prefix(tokens)
        yield from super().generate(tokens, *args, **kwargs)

    def _keep_prefix(self, tokens: list[int]) -> None:
        # upstream re-evaluates everything when it cannot cut exactly where the texts part; cut a little earlier instead
        prefix = self.longest_token_prefix(self._input_ids.tolist(), tokens)
        if prefix == len(tokens):
            if self.n_tokens == prefix and not self._requires_eval:
                return
            prefix -= 1  # one token is evaluated anew for its logits
        if 0 < self._floor(prefix) < prefix:
            self.n_tokens = self._cut(prefix)
            self._requires_eval = True

    def _floor(self, n_tokens: int) -> int:
        return _native.count(_lib.semcache_floor(_native.context(self), n_tokens))

    def _cut(self, n_tokens: int) -> int:
        """Cut the cache at the last place up to `n_tokens` where it can be, and return that place."""
        n = self._floor(n_tokens)
        if not self._ctx.kv_cache_seq_rm(-1, n, -1):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)
            n = 0
        return n

    @functools.partial(gated, changes=False)
    def save_state(self) -> llama_cpp.LlamaState:
        """What load_state() of the same model and settings restores.

        Returns
        -------
        llama_cpp.LlamaState
            With ``logits_all`` its `scores` are the logits of all tokens, float32 [n_tokens, n_vocab]; else there are
            none, [0, n_vocab], since nothing reads them and they would take several times the bytes of the cache.

        Raises
        ------
        StateError
            There is too little memory for it.
        """
        _native.clear_error()
        size = llama_cpp.llama_state_get_size(self.ctx)
        data = (ctypes.c_uint8 * size)()
        n_bytes = llama_cpp.llama_state_get_data(self.ctx, data, size)
        if not 0 < n_bytes <= size:
            raise _native.last_error() or StateError(
                f"expected a state of at most {size} bytes, got {n_bytes}; free some memory"
            )
        saved = bytes(memoryview(data)[:n_bytes])
        if self.kv_compress is not None:
            saved = seal(saved, self.input_ids[: self.n_tokens])
        return llama_cpp.LlamaState(
            input_ids=self.input_ids.copy(),
            scores=self._scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=saved,
            llama_state_size=len(saved),
            seed=self._seed,
        )

    @gated
    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Restore what save_state() returned.

        Raises
        ------
        StateError
            The state is of another model, of other kv_* settings, or damaged. If the message does not say otherwise,
            the cache is as it was.
        """
        self._check_state(state)
        saved = bytes(state.llama_state[: state.llama_state_size])
        if self.kv_compress is not None:
            saved = unseal(saved, state.input_ids[: state.n_tokens])
        data = (ctypes.c_uint8 * len(saved)).from_buffer_copy(saved)
        _native.clear_error()
        if llama_cpp.llama_state_set_data(self.ctx, data, len(saved)) != len(saved):
            error = _native.last_error()
            if error is not None and _lib.semcache_last_status() == _lib.SEMCACHE_ERR_STATE:
                raise error  # of other settings: refused before anything was read
            self.reset()
            reason = error or (
                "state: expected one that save_state() of this model and these settings returned, got another"
            )
            raise StateError(f"{reason}; the cache holds 0 tokens now")
        rows = min(state.scores.shape[0], self.scores.shape[0])
        self.scores[:rows, :] = state.scores[:rows]
        self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.n_tokens = state.n_tokens
        self._requires_eval = True
        self._seed = state.seed

    def _check_state(self, state: llama_cpp.LlamaState) -> None:
        """Check what can be said of a state before the library reads it."""
        if state.n_tokens > self._n_ctx:
            raise StateError(
                f"state: expected at most n_ctx = {self._n_ctx} tokens, got {state.n_tokens}; use the n_ctx it was "
                "saved with"
            )
        if not 0 < state.llama_state_size <= len(state.llama_state):
            raise StateError(
                f"state: expected {state.llama_state_size} bytes, more than none, got {len(state.llama_state)}; the "
                "state is damaged, the cache is as it was"
            )
        if state.scores.shape[1] != self._n_vocab:
            raise StateError(
                f"state: expected one of a model of {self._n_vocab} tokens, got one of {state.scores.shape[1]}; load "
                "it into the model it was saved from, the cache is as it was"
            )
        # llama.cpp writes the architecture first, and would tell a wrong one from a damaged state only in its log
        arch = self.metadata["general.architecture"].encode()
        if not bytes(state.llama_state).startswith(struct.pack("<I", len(arch)) + arch):
            raise StateError(
                f"state: expected one of a {arch.decode()} model, got another; load it into the model it was saved "
                "from, the cache is as it was"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), **self._kv.arguments()}
        if isinstance(self.draft_model, _ShortDrafts):
            state["draft_model"] = self.draft_model.draft_model
        return state


# Of earlier llama_cpp, which now ignores them; LangChain still passes the first two.
_FORMER = {"f16_kv", "n_parts", "low_vram", "mul_mat_q", "n_gqa", "rms_norm_eps"}


def _check_names(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that nobody knows: upstream takes any name and ignores it."""
    known = [*_UPSTREAM.parameters, *KVConfig().arguments()]
    unknown = []
    for name in sorted(set(kwargs) - set(known) - _FORMER):
        near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(f"kv_{name}", known, 1)
        unknown.append(f"{name} (did you mean {near[0]}?)" if near else name)
    if unknown:
        raise ArgumentError(
            f"expected arguments of llama_cpp.Llama and {', '.join(KVConfig().arguments())}, got {', '.join(unknown)}; "
            "check the spelling"
        )


def _is_on_card(kwargs: Mapping[str, Any]) -> bool:
    """Whether llama.cpp puts a part of the cache on a card, if there is one."""
    names = ("n_gpu_layers", "offload_kqv")
    return all(kwargs.get(name, _UPSTREAM.parameters[name].default) for name in names)


def _why_not(config: KVConfig, model: ModelFile, kwargs: dict[str, Any]) -> str | None:
    """Why a cache cannot be compressed, or would not get smaller; None: nothing speaks against it."""
    if model.shape.refused:
        return model.shape.refused
    n_ctx = kwargs["n_ctx"] or model.shape.n_ctx_train
    if n_ctx < config.kv_stage:
        return f"n_ctx = {n_ctx} tokens fit the stage of {config.kv_stage}"
    try:
        _check_others(config, kwargs)
    except (ArgumentError, UnsupportedModelError) as error:
        return str(error)
    ours = estimate(model.shape, n_ctx, OURS, **config.arguments())
    ours_bytes = ours.kv_bytes
    if _is_on_card(kwargs) and _native.passes_on_device(config):
        ours_bytes += ours.work_bytes
    stock_bytes = estimate(model.shape, n_ctx, "f16").kv_bytes
    if ours_bytes >= stock_bytes:
        return f"it would take {ours_bytes / 2**20:.1f} MiB, llama.cpp's own takes {stock_bytes / 2**20:.1f}"
    return None


def _check_others(config: KVConfig, kwargs: dict[str, Any]) -> None:
    """Check what upstream's arguments allow with compression, before the model is read."""
    config.check_n_ctx(kwargs["n_ctx"])
    if kwargs.get("embedding"):
        raise UnsupportedModelError(
            "expected text generation, got embedding=True; leave kv_compress out for embeddings"
        )
    image_handlers = (llama_chat_format.Llava15ChatHandler, llama_chat_format.MTMDChatHandler)
    if isinstance(kwargs.get("chat_handler"), image_handlers):
        raise UnsupportedModelError("expected text, got a chat_handler for images; leave kv_compress out for images")
    if kwargs.get("vocab_only"):
        raise ArgumentError("expected a model with weights, got vocab_only=True; leave kv_compress out")
    for name in ("type_k", "type_v"):
        if kwargs.get(name) not in (None, llama_cpp.GGML_TYPE_F16):
            raise ArgumentError(
                f"{name}: expected None or f16 with kv_compress, got ggml type {kwargs[name]}; leave {name} out"
            )
