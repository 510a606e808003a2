"""Checkpoints of runs: written atomically, read without trust, opened in one way by every command."""

from .run import OpenedRun, open_run

__all__ = ["OpenedRun", "open_run"]
