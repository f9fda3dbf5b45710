"""Who may use a loaded model: one thread at a time, and nobody after close(). llama.cpp itself would crash."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any, NoReturn, TypeVar, cast

from llama_cpp.llama_tokenizer import LlamaTokenizer

from .errors import StateError

Method = TypeVar("Method", bound=Callable[..., Any])


def _refuse_closed() -> NoReturn:
    raise StateError("expected a model that is loaded, got one after close(); load it again")


class Gate:
    """Context in which a thread uses a model; it may enter again, others are turned away and do not wait.

    Raises
    ------
    StateError
        On entering, if another thread is inside, or the model was closed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # of the thread that is inside
        self.closed = False
        self.n_changes = 0
        """Calls so far, from outside, that may have changed the cache; a step of a generator is one."""

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "expected one thread at a time, got a call while another thread is using the model; wait until that "
                "call has returned, or load the model once for each thread"
            )
        if self.closed:
            self._lock.release()
            _refuse_closed()
        self._depth += 1

    def __exit__(self, *_exception: object) -> None:
        self._depth -= 1
        self._lock.release()

    @property
    def outermost(self) -> bool:
        """Nobody is inside, or nothing but the call that asks."""
        return self._depth <= 1

    def close(self) -> None:
        """Let nobody in any more; to be called inside.

        Raises
        ------
        StateError
            The thread is inside a call of the model, which would go on with what is freed.
        """
        if self._depth > 1:
            raise StateError(
                "expected close() when no call of the model is going on, got it within one, as from a logits "
                "processor; close the model after that call"
            )
        self.closed = True


class Closed:
    """In the place of what close() has freed: raises StateError whatever it is asked for."""

    def __getattr__(self, name: str) -> NoReturn:
        _refuse_closed()


class Tokenizer(LlamaTokenizer):
    """llama_cpp's tokenizer, which outlives its model, but refuses to be used then."""

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self._gate: Gate = llama._gate

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Tokens of a text in UTF-8. Raises StateError after close()."""
        if self._gate.closed:
            _refuse_closed()
        return super().tokenize(text, add_bos, special)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Text of tokens, UTF-8. Raises StateError after close()."""
        if self._gate.closed:
            _refuse_closed()
        return super().detokenize(tokens, prev_tokens, special)


def gated(method: Method, *, changes: bool = True) -> Method:
    """A method of an object with a `_gate`, which is passed for as long as it runs; of a generator, for every step.

    Between two steps the gate is open: a server may advance one generator from changing threads. Calls that change the
    cache end a generator that has begun: its next step raises StateError.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate, result = self._gate, None
        with gate:
            try:
                result = method(self, *args, **kwargs)
            finally:
                if changes and gate.outermost and not inspect.isgenerator(result):
                    gate.n_changes += 1
        return _gated_steps(gate, result) if inspect.isgenerator(result) else result

    return cast(Method, wrapper)


def _gated_steps(gate: Gate, stream: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    sent, n_changes = None, None
    try:
        while True:
            with gate:
                # one that another generator or call is stepping through is within their change
                if gate.outermost and n_changes not in (None, gate.n_changes):
                    raise StateError(
                        "expected the cache as the last step of this stream left it, got another call that changed it "
                        "since; let a stream end before that, or load the model once for each"
                    )
                try:
                    item = stream.send(sent)
                except StopIteration as end:
                    return end.value
                finally:
                    gate.n_changes += gate.outermost
                    n_changes = gate.n_changes
            sent = yield item
    finally:
        stream.close()
