"""Pictures of what a run saw, and one offline HTML page that compares runs."""

from .html import write_report
from .pictures import Snapshot, heatmap, snapshot_grid, visible_set
from .runs import RunView

__all__ = ["RunView", "Snapshot", "heatmap", "snapshot_grid", "visible_set", "write_report"]
