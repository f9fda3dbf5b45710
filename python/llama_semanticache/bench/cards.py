"""The cards that NVML sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card's name, and bytes in use by all processes."""

    name: str
    used_bytes: int


def cards() -> list[Card]:
    """All of them; none without NVML."""
    try:
        import pynvml
    except ImportError:  # it comes with the extra "bench"
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [Card(pynvml.nvmlDeviceGetName(h), pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles]
    except pynvml.NVMLError:
        return []


def card_bytes() -> int | None:
    """Bytes in use on all of them; None if there is none."""
    found = cards()
    return sum(card.used_bytes for card in found) if found else None
