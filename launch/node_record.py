"""The nodes that a job has seen, kept for the next one on its folder: a node may be lost while no job looks.

Ray gives a node up some seconds after it died. A job that dies in between cannot tell of it; the one that goes on does.

Example::

    record = NodeRecord(folder)
    record.look(cluster.nodes)        # ["10.0.0.7"]: an earlier job saw it a moment before it ended, and it is gone
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.run_folder import write_json
from rollout.placement_fit import Node

NAME = "nodes.json"
FRESH_S = 60.0
"""What has gone from a cluster while no job looked for longer is no news."""


class NodeRecord:
    """`folder`/nodes.json: key -> name, of the last look. One that cannot be written is passed over."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._earlier = self._read()
        """What an earlier job kept, until the first look."""
        self._kept: dict[str, str] = {}

    def look(self, nodes: Sequence[Node]) -> list[str]:
        """Keeps the nodes that live. At the first look: names of those that an earlier job saw and that are gone."""
        now = {node.key: node.name for node in nodes}
        with suppress(OSError):  # the disk may be full: there is another look
            if now == self._kept:
                os.utime(self._path)
            else:
                write_json(self._path, now)
                self._kept = now
        earlier, self._earlier = self._earlier, {}
        if not earlier.keys() & now.keys():  # none, or of another cluster
            return []
        return [name for key, name in earlier.items() if key not in now]

    def _read(self) -> dict[str, str]:
        try:
            fresh = time.time() - self._path.stat().st_mtime < FRESH_S
            return json.loads(self._path.read_text()) if fresh else {}
        except (OSError, ValueError):
            return {}
