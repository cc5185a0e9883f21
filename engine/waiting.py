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

Every operation is O(depth of the tree + log n). Heaps are cleaned lazily, but none ever holds much more than what
waits below it: a level whose turn does not come for weeks must not keep what was taken out of it meanwhile. Knows no
pages and no clock. Batch-wide prefix ordering after BatchLLM (Zheng et al. 2024), longest first after Graham (1969).
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from engine.request import Request
from engine.sequence import Sequence

Policy = Literal["planned", "fcfs"]
Level: TypeAlias = tuple[int, float, int]
RETURNED = -1  # the round of those that come back
SLACK = 8  # entries of a heap that may count no more, beside one for each that does


def rank_of(request: Request) -> tuple[int, float]:
    """Smaller runs first."""
    return request.priority, float("inf") if request.turn is None else request.turn


class _Node:
    """All sequences below share the first `depth` of `keys`. An entry of the heap counts only while its child or
    sequence is still here and the length is its newest."""

    __slots__ = ("arrival", "children", "current", "depth", "heap", "keys", "longest", "parent", "size")

    def __init__(self, keys: list[bytes], depth: int, parent: _Node | None, arrival: int) -> None:
        self.keys = keys
        self.depth = depth
        self.parent = parent
        self.arrival = arrival  # of the first sequence below: the earlier of two equals goes first
        self.children: dict[bytes, _Node] = {}
        self.heap: list[_Entry] = []
        self.longest = -1  # expected tokens of the longest sequence ever put below
        self.size = 0  # sequences below that still wait
        self.current: _Node | None = None  # the child whose turn it is until it is empty


_Entry: TypeAlias = tuple[int, int, int, Sequence | _Node]  # -length, arrival, ticket, what has them


class _LevelQueue:
    """One of the two holds something, or the level is not kept."""

    __slots__ = ("level", "returned", "root")

    def __init__(self, level: Level) -> None:
        self.level = level
        self.returned: OrderedDict[Sequence, None] = OrderedDict()
        self.root = _Node([], 0, None, 0)


class _Place(NamedTuple):
    queue: _LevelQueue
    node: _Node | None  # where it hangs; None: it has come back


class WaitingQueue:
    """`fcfs`: arrival order inside a level, whatever the prompts."""

    def __init__(self, policy: Policy = "planned", *, round_size: int = 1024) -> None:
        self._policy = policy
        self._round_size = round_size
        self._taken = 0  # for the first time
        self._levels: dict[Level, _LevelQueue] = {}
        self._order: list[Level] = []
        self._places: dict[Sequence, _Place] = {}
        self._tickets = itertools.count()  # so that no comparison reaches the last field of an entry

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._places)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._places

    def push(self, sequence: Sequence, keys: list[bytes], expected: int) -> None:
        """`keys`: of the full pages of its prompt; `expected`: tokens that it will probably generate."""
        if self._policy == "fcfs":
            keys, expected = [], 0
        queue = self._level(sequence, self._taken // self._round_size)
        node, arrival = queue.root, next(self._tickets)
        while node.depth < len(keys):
            child = node.children.get(keys[node.depth])
            if child is None:
                child = node.children[keys[node.depth]] = _Node(keys, len(keys), node, arrival)
            elif (common := _common(child.keys, keys, node.depth + 1, child.depth)) < child.depth:
                child = self._split(node, child, common)
            node = child
        self._places[sequence] = _Place(queue, node)
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
        queue = self._level(sequence, RETURNED)
        queue.returned[sequence] = None
        queue.returned.move_to_end(sequence, last=False)
        self._places[sequence] = _Place(queue, None)

    def peek(self) -> Sequence | None:
        """Whose turn it is."""
        if not self._order:
            return None
        queue = self._levels[self._order[0]]
        return next(iter(queue.returned)) if queue.returned else self._first(queue.root)

    def remove(self, sequence: Sequence) -> None:
        """Raises KeyError when it does not wait."""
        queue, node = self._places.pop(sequence)
        if node is None:
            del queue.returned[sequence]
        else:
            self._taken += 1
            self._let_go(node)
        if not queue.root.size and not queue.returned:
            del self._levels[queue.level]
            del self._order[bisect_left(self._order, queue.level)]

    def _level(self, sequence: Sequence, round_number: int) -> _LevelQueue:
        level = (*rank_of(sequence.request), round_number)
        if level not in self._levels:
            self._levels[level] = _LevelQueue(level)
            insort(self._order, level)
        return self._levels[level]

    def _let_go(self, node: _Node) -> None:
        """One sequence less hangs there."""
        node.size -= 1
        while (parent := node.parent) is not None:
            parent.size -= 1
            if node.size == 0:
                del parent.children[node.keys[parent.depth]]
                if parent.current is node:
                    parent.current = None
            self._clean(node)
            node = parent
        self._clean(node)

    def _clean(self, node: _Node) -> None:
        if len(node.heap) > 2 * node.size + SLACK:
            node.heap = [entry for entry in node.heap if self._counts(entry, node)]
            heapq.heapify(node.heap)

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
            item = node.heap[0][-1]
            if not self._counts(node.heap[0], node):
                heapq.heappop(node.heap)
            elif isinstance(item, _Node):
                node.current = item
                node = item
            else:
                return item

    def _counts(self, entry: _Entry, node: _Node) -> bool:
        """Whether an entry of the node's heap is of somebody who is still below it, and the newest."""
        length, _, _, item = entry
        if isinstance(item, _Node):
            return item.size > 0 and item.parent is node and item.longest == -length
        return item in self._places and self._places[item].node is node


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
