"""Checkpoints are written atomically, read without trust, and opened in one way by every command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccmim_fast.checkpoints.run import OpenedRun, open_run

__all__ = ["OpenedRun", "open_run"]


def __getattr__(name: str) -> Any:
    """Import on first use: listing runs needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ccmim_fast.checkpoints import run

    return getattr(run, name)
