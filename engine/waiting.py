"""WaitingQueue: in which order the waiting sequences run, for queues of tens of thousands.

Owns the order and nothing else. Levels come first: lower `priority`, then the lower `turn`, then the earlier round.
Turns should be coarse, since an exact order would tear siblings apart. Inside a level the sequences hang in a radix
tree over their prompts' page keys and are taken depth first: siblings run one after another while their prefix is in
memory, and nobody's prefix is computed, lost and computed again. Which branch comes next, and who inside it, is
decided by expected length, longest first, so that the long answers do not run alone at the end of the night.
Sequences that were running, or waited for a sibling's prefix, come back at the front of their turn.

A round is what arrives while `round_size` sequences are taken. So what is there together is planned together, however
much it is, but nobody is passed for ever where work keeps coming: not a rare prefix by a common one, and not a short
answer by long ones.

Every operation is O(depth of the tree + log n); heaps are cleaned lazily. Knows no pages and no clock. Batch-wide
prefix ordering after BatchLLM (Zheng et al. 2024), longest first after Graham (1969).
"""

from __future__ import annotations

import heapq
import itertools
from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import Literal, TypeAlias

from engine.request import Request
from engine.sequence import Sequence

Policy = Literal["planned", "fcfs"]
Level: TypeAlias = tuple[int, float, int]
RETURNED = -1  # the round of those that come back


def rank_of(request: Request) -> tuple[int, float]:
    """Smaller runs first."""
    return request.priority, float("inf") if request.turn is None else request.turn


class _Node:
    """All sequences below share the first `depth` of `keys`. A heap entry is (-length, arrival, ticket, child or
    sequence); it counts only while the child or sequence is still here and the length is its newest."""

    __slots__ = ("arrival", "children", "current", "depth", "heap", "keys", "longest", "parent", "size")

    def __init__(self, keys: list[bytes], depth: int, parent: _Node | None, arrival: int) -> None:
        self.keys = keys
        self.depth = depth
        self.parent = parent
        self.arrival = arrival  # of the first sequence below: the earlier of two equals goes first
        self.children: dict[bytes, _Node] = {}
        self.heap: list[tuple[int, int, int, Sequence | _Node]] = []
        self.longest = -1  # expected tokens of the longest sequence ever put below
        self.size = 0  # sequences below that still wait
        self.current: _Node | None = None  # the child whose turn it is until it is empty


class _LevelQueue:
    __slots__ = ("returned", "root")

    def __init__(self) -> None:
        self.returned: deque[Sequence] = deque()
        self.root = _Node([], 0, None, 0)


class WaitingQueue:
    """`fcfs`: arrival order inside a level, whatever the prompts."""

    def __init__(self, policy: Policy = "planned", *, round_size: int = 1024) -> None:
        self._policy = policy
        self._round_size = round_size
        self._taken = 0  # for the first time
        self._levels: dict[Level, _LevelQueue] = {}
        self._order: list[Level] = []
        self._nodes: dict[Sequence, _Node | None] = {}  # where each hangs; None: it has come back
        self._tickets = itertools.count()  # so that no comparison reaches the last field of an entry

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._nodes)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._nodes

    def push(self, sequence: Sequence, keys: list[bytes], expected: int) -> None:
        """`keys`: of the full pages of its prompt; `expected`: tokens that it will probably generate."""
        if self._policy == "fcfs":
            keys, expected = [], 0
        level = self._level(sequence, self._taken // self._round_size)
        node, arrival = level.root, next(self._tickets)
        while node.depth < len(keys):
            child = node.children.get(keys[node.depth])
            if child is None:
                child = node.children[keys[node.depth]] = _Node(keys, len(keys), node, arrival)
            elif (common := _common(child.keys, keys, node.depth + 1, child.depth)) < child.depth:
                child = self._split(node, child, common)
            node = child
        self._nodes[sequence] = node
        heapq.heappush(node.heap, (-expected, arrival, arrival, sequence))
        node.size += 1
        while node.parent is not None:
            if expected > node.longest:  # it has no entry above yet, or one that is too low
                node.longest = expected
                self._enter(node.parent, node)
            node = node.parent
            node.size += 1

    def put_back(self, sequence: Sequence) -> None:
        """To the front of its turn."""
        self._level(sequence, RETURNED).returned.appendleft(sequence)
        self._nodes[sequence] = None

    def peek(self) -> Sequence | None:
        """Whose turn it is."""
        while self._order:
            queue = self._levels[self._order[0]]
            while queue.returned:
                if self._nodes.get(queue.returned[0], queue.root) is None:
                    return queue.returned[0]
                queue.returned.popleft()
            if queue.root.size:
                return self._first(queue.root)
            del self._levels[self._order.pop(0)]
        return None

    def remove(self, sequence: Sequence) -> None:
        """Raises KeyError when it does not wait."""
        node = self._nodes.pop(sequence)
        self._taken += node is not None
        while node is not None:
            node.size -= 1
            if node.size == 0 and node.parent is not None:
                del node.parent.children[node.keys[node.parent.depth]]
            node = node.parent

    def _level(self, sequence: Sequence, round_number: int) -> _LevelQueue:
        level = (*rank_of(sequence.request), round_number)
        if level not in self._levels:
            self._levels[level] = _LevelQueue()
            insort(self._order, level)
        return self._levels[level]

    def _split(self, parent: _Node, child: _Node, depth: int) -> _Node:
        """Put a node between the two, where their common keys end."""
        middle = _Node(child.keys, depth, parent, child.arrival)
        middle.size, middle.longest = child.size, child.longest
        middle.children[child.keys[depth]] = child
        parent.children[child.keys[parent.depth]] = middle
        if parent.current is child:
            parent.current, middle.current = middle, child
        child.parent = middle
        self._enter(middle, child)
        self._enter(parent, middle)
        return middle

    def _enter(self, parent: _Node, child: _Node) -> None:
        heapq.heappush(parent.heap, (-child.longest, child.arrival, next(self._tickets), child))

    def _first(self, node: _Node) -> Sequence:
        while True:
            current = node.current
            if current is not None and current.size and current.parent is node:
                node = current
                continue
            length, _, _, item = node.heap[0]
            if isinstance(item, _Node):
                if item.size and item.parent is node and item.longest == -length:
                    node.current = item
                    node = item
                    continue
            elif self._nodes.get(item) is node:
                return item
            heapq.heappop(node.heap)


def _common(a: list[bytes], b: list[bytes], low: int, high: int) -> int:
    """How many keys `a` and `b` share, at least `low`, at most `high`. A key names all before it: bisect."""
    high = min(high, len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle - 1] == b[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
