"""A chat in one file: its messages and the state of the model's cache.

The file is a zip archive with session.json (format, settings, messages), input_ids.npy and llama_state.bin. Nothing in
it is executed when it is read.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError

if TYPE_CHECKING:
    from ..llama import Llama

FORMAT = "llama-semanticache chat 1"
Messages = list[dict[str, str]]


def save_session(path: Path, llm: Llama, settings: Mapping[str, Any], messages: Messages) -> int:
    """Write a chat; the file appears only when it is complete.

    Parameters
    ----------
    path : Path
        Replaced if it is a chat; another file is left alone.
    llm : Llama
    settings : mapping
        What must be equal when the chat is loaded: model and cache.
    messages : list of dict
        As for create_chat_completion.

    Returns
    -------
    int
        Size of the file, bytes.

    Raises
    ------
    StateError
        The file cannot be written.
    """
    import numpy as np

    if path.exists() and not _is_session(path):
        raise StateError(f"expected the name of a new file or of a saved chat, got {path}, which is something else")
    state = llm.save_state()
    head = {
        "format": FORMAT,
        "settings": dict(settings),
        "n_tokens": int(state.n_tokens),
        "seed": int(state.seed),
        "messages": messages,
    }
    ids = io.BytesIO()
    np.save(ids, np.asarray(state.input_ids[: state.n_tokens], dtype=np.int32), allow_pickle=False)
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            scratch = Path(file.name)
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("session.json", json.dumps(head, ensure_ascii=False, indent=1))
                archive.writestr("input_ids.npy", ids.getvalue())
                archive.writestr("llama_state.bin", state.llama_state)
        os.replace(scratch, path)
    except OSError as error:
        raise StateError(f"expected to write {path}, got: {error}; choose another place") from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    return path.stat().st_size


def load_session(path: Path, llm: Llama, settings: Mapping[str, Any]) -> tuple[Messages, list[str]]:
    """Read a chat into `llm`.

    Returns
    -------
    messages, differences
        What was said, and the settings that are not those of the file, model included. If there are any, the cache of
        the file is of no use here, and that of `llm` is left as it is: the messages have to be read again.

    Raises
    ------
    StateError
        Not a saved chat, or a damaged one; `llm` is then unchanged, or empty if llama.cpp refused the state.
    """
    head, input_ids, llama_state = _read(path)
    saved = head["settings"]
    if different := [f"{n} {saved.get(n)}, here {settings[n]}" for n in settings if saved.get(n) != settings[n]]:
        return head["messages"], different

    import numpy as np
    from llama_cpp import LlamaState

    n_tokens = head["n_tokens"]
    state = LlamaState(
        input_ids=np.zeros(llm.input_ids.shape, dtype=np.intc),
        scores=np.zeros((0, llm.scores.shape[1]), dtype=np.single),  # nothing reads the logits of old tokens
        n_tokens=n_tokens,
        llama_state=llama_state,
        llama_state_size=len(llama_state),
        seed=head["seed"],
    )
    state.input_ids[:n_tokens] = input_ids
    try:
        llm.load_state(state)
    except BaseException as error:  # Ctrl-C too: what is in the cache is unknown
        llm.reset()
        if isinstance(error, StateError) or not isinstance(error, Exception):
            raise
        raise StateError(f"expected a state that llama.cpp takes, got: {error}; the cache is empty now") from error
    return head["messages"], []


def _is_session(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("session.json"))["format"].startswith("llama-semanticache chat ")
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError):
        return False


def _read(path: Path) -> tuple[dict[str, Any], Any, bytes]:
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            head = json.loads(archive.read("session.json"))
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']!r}, not {FORMAT!r}")
            input_ids = np.load(io.BytesIO(archive.read("input_ids.npy")), allow_pickle=False)
            llama_state = archive.read("llama_state.bin")
            if len(input_ids) != head["n_tokens"] or not isinstance(head["messages"], list):
                raise ValueError("its parts do not fit together")
            return head, input_ids, llama_state
    except OSError as error:
        raise StateError(f"expected a readable file, got: {error}; check the path") from error
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise StateError(f"expected a chat written by /save, got {path} ({error}); give another file") from error
