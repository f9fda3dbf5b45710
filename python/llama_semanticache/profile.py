"""How the rows are given out to the kv heads: measured once per model, kept in the user's cache directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from . import _cpu, _native, _progress, models
from .config import OURS, KVConfig
from .errors import ArgumentError, ProfileError
from .model_file import ModelFile

if TYPE_CHECKING:
    import llama_cpp

N_LEAST = 1024
"""Tokens that a model must have been trained on: what a head is measured on comes behind the window."""

N_TEXT_TOKENS = 2048
_N_BATCH = 256
_DEFAULT = KVConfig(OURS)

HEADER = b"semcache-profile 3\n"
TEXTS = Path(__file__).parent / "texts"  # one file per text, public domain, see its README.md
SHIPPED = Path(__file__).parent / "profiles"


def model_id(model: str | os.PathLike[str]) -> str:
    """Fingerprint of a model, see `ModelFile.id`."""
    return ModelFile.of(model).id


def profile_path(id: str) -> Path:
    """Where the profile of a model is kept."""
    return models.cache_dir() / "profiles" / f"{id}.profile"


def find(model: str | os.PathLike[str]) -> Path | None:
    """The profile of a model that was calibrated here or came with the package, or None."""
    id = model_id(model)
    return next(filter(_is_current, (profile_path(id), SHIPPED / f"{id}.profile")), None)


def _is_current(path: Path) -> bool:
    """Whether there is a profile of the present format; an older one is measured again."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline() == HEADER


def read_texts(paths: Sequence[str | os.PathLike[str]] | None = None) -> list[str]:
    """Calibration texts: those of the package, or the given files."""
    files = sorted(TEXTS.glob("*.txt")) if paths is None else [Path(p) for p in paths]
    if not files:
        raise ArgumentError("calibration texts: expected at least one file, got none; pass some or install again")
    return [models.read_text(file) for file in files]


def calibrate(
    model: str | os.PathLike[str],
    *,
    texts: Sequence[str] | None = None,
    n_ctx: int = N_TEXT_TOKENS,
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    n_threads: int | None = None,
) -> Path:
    """Measure how far each kv head of a model is off with how many rows, and write it to a file.

    Every text is read uncompressed up to `n_ctx` tokens; then a copy of every head is compressed at several budgets.
    See `reference.profile` for the definition.

    Parameters
    ----------
    model : path
    texts : sequence of str, optional
        Texts to calibrate on; by default those of the package (prose, code, dialogue, another language).
    n_ctx : int
        Tokens of each text, at most what the model was trained on; a shorter text counts as it is.
    out : path, optional
        File to write; by default the model's place in the user's cache directory.
    force : bool
        Calibrate again although the model was calibrated here, by whatever texts, or has a profile of the package and
        no other texts are asked for.
    n_threads : int, optional
        As in Llama.

    Returns
    -------
    Path of the profile.

    Raises
    ------
    ModelFileError
        See `ModelFile.read`.
    ArgumentError
        No texts, or `out` is there already.
    ProfileError
        The model's context is too short.
    StateError
        A text has too few tokens (773 at least), or the file could not be written.
    """
    model = ModelFile.of(model)
    usual = texts is None and n_ctx == N_TEXT_TOKENS

    def there() -> Path | None:  # of the package by the usual texts alone
        return find(model) if usual else next(filter(_is_current, [profile_path(model.id)]), None)

    if out is None and not force and (measured := there()):
        return measured
    path = Path(out) if out is not None else profile_path(model.id)
    _make_room(path, replace=force or out is None)
    if out is not None:
        return _measure(model, texts, n_ctx, path, progress, n_threads)
    with _alone(path, progress):
        if not force and (measured := there()):  # by the process that was waited for
            return measured
        return _measure(model, texts, n_ctx, path, progress, n_threads)


@contextmanager
def _alone(path: Path, verbose: bool) -> Iterator[None]:
    """Context that only one process at a time is in: the others wait, rather than measure the same as well."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if verbose:
            print(f"llama-semanticache: waiting for another process that writes {path}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _measure(
    model: ModelFile, texts: Sequence[str] | None, n_ctx: int, path: Path, progress: bool, n_threads: int | None
) -> Path:
    """See `calibrate`."""
    texts = read_texts() if texts is None else list(texts)
    n_ctx_train = model.shape.n_ctx_train or n_ctx
    if n_ctx_train < N_LEAST:
        raise ProfileError(
            f"{model.path}: expected a model of at least {N_LEAST} tokens to measure its heads on, got one "
            f"of {n_ctx_train}; pass kv_profile=None"
        )
    n_ctx = min(n_ctx, n_ctx_train // 256 * 256)
    if n_threads is not None:
        _cpu.warn_of_threads(n_threads)
    llm = _load(model, n_ctx, n_threads)
    _, lib = _native.load()
    try:
        steps = [llm.tokenize(text.encode("utf-8"), special=False)[:n_ctx] for text in texts]
        with _progress.progress("calibrating", sum(map(len, steps)), "tokens", show=progress) as bar:
            for tokens in steps:
                _read_in(llm, tokens, bar.advance)
                _native.check(lib.semcache_calibrate_add(_native.context(llm)))
        _native.check(lib.semcache_calibrate_write(_native.context(llm), os.fsencode(path), model.id.encode()))
    finally:
        llm.close()
    return path


def _make_room(path: Path, replace: bool) -> None:
    """See to it that the file can be written. Raises ArgumentError."""
    if path.is_file() and not replace:
        raise ArgumentError(f"out: expected a new file, got {path}, which is there; pass force=True to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"out: expected a folder to write {path.name} to, got {error}; name another or set {models.CACHE_VARIABLE}"
        ) from error


def _load(model: ModelFile, n_ctx: int, n_threads: int | None) -> llama_cpp.Llama:
    """llama_cpp's own object with a cache that keeps every row of a text and watches what a profile is made of."""
    config = KVConfig(OURS, kv_ratio=1.0, kv_stage=n_ctx, kv_profile=None, kv_params={"calibrate": 1})
    config.check()
    with _native.compressed(config):
        import llama_cpp

        return llama_cpp.Llama(
            os.fspath(model),
            n_ctx=n_ctx,
            n_batch=_N_BATCH,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            flash_attn=True,
            swa_full=False,
            verbose=False,
        )


def _read_in(llm: llama_cpp.Llama, tokens: Sequence[int], advance: Callable[[int], object]) -> None:
    """Read a text into the empty cache; `advance` is told of every batch's tokens."""
    import llama_cpp

    llm.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), False)
    _native.clear_error()
    try:
        for i in range(0, len(tokens), _N_BATCH):
            llm.eval(tokens[i : i + _N_BATCH])
            advance(len(tokens[i : i + _N_BATCH]))
    except RuntimeError as error:
        raise _native.last_error() or error from error


def ensure(
    model: str | os.PathLike[str],
    verbose: bool = True,
    n_threads: int | None = None,
    config: KVConfig = _DEFAULT,
) -> Path | None:
    """The profile that a cache decides by which head gets how many rows; None if all get the same.

    Parameters
    ----------
    model : path
    verbose : bool
        Say so if the model is calibrated first.
    n_threads : int, optional
        As in Llama.
    config : KVConfig
        The cache's settings: those of kv_profile "auto" that call for the model's own profile have it measured on first
        use.

    Raises
    ------
    ProfileError
        The settings name a file that is none.
    ArgumentError, ModelFileError, ProfileError, StateError
        See `calibrate`.
    """
    if config.kv_profile not in ("auto", None):
        path = Path(config.kv_profile).expanduser()
        if not path.is_file():
            raise ProfileError(
                f'kv_profile: expected "auto", None or a file, got {path}, which is none; run `llama-semanticache '
                f"profile MODEL --out {path}`"
            )
        return path
    model = ModelFile.of(model)
    if not config.decides_by_own_profile(model):
        return None
    own = find(model)
    if own is not None:
        return own
    if verbose:
        print(
            f"llama-semanticache: first use of {model.name} with compression: measuring which heads need how many "
            f"rows; kept in {profile_path(model.id)}. Without: kv_profile=None (--kv-profile none), equal shares, "
            "which lose more",
            file=sys.stderr,
        )
    return calibrate(model, progress=verbose, n_threads=n_threads)
