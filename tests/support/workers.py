"""How `pytest -n` deals the tests out to its workers: whole modules, the longest first, services to one worker only.

Owns that order and nothing else; a run without `-n` never comes here. A module stays whole because its fixtures
are what costs. Tests that start whole services keep deadlines of seconds: on two cores one such test and one test of
a single process leave each other enough, two such tests may not.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

SERVICES = ("tests/story/", "tests/api/test_up.py", "tests/api/test_run_batch.py")
LONGEST = ("services", "tests/engine/test_alone_equals_crowd.py", "tests/engine/test_family_parity.py")


def share_of(nodeid: str) -> str:
    """What is dealt out together: the module, or all services."""
    module = nodeid.partition("::")[0]
    return "services" if module.startswith(SERVICES) else module


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts in place, so that no worker begins with much when the others end; the rest stays in its random order."""
    order = {share: number for number, share in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(share_of(item.nodeid), len(order)))


class ByModule(LoadScopeScheduling):
    """Deals out shares in the order of collection."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        super().__init__(config, log)  # type: ignore[arg-type]
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return share_of(nodeid)
