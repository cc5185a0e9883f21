"""Groups of rows cut into blocks: which group a block belongs to, where only the device knows how long each is.

Group g has the blocks from starts[g] // SIZE + g on, which are enough for any lengths: rows // SIZE + groups in all.
So the host launches by their number, and a block that has no rows leaves. Knows no rows and no groups' meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_of(block, starts, groups, SIZE: tl.constexpr):
    """The last group whose blocks, of SIZE rows each, begin at or before this one; starts [groups]."""
    group, above = tl.full((), 0, tl.int32), groups
    while above - group > 1:
        middle = (group + above) // 2
        if tl.load(starts + middle) // SIZE + middle <= block:
            group = middle
        else:
            above = middle
    return group


@triton.jit
def rows_of(block, starts, groups, SIZE: tl.constexpr):
    """(group, first row, end of the group's rows) of a block, which is left where the first is no row of the group;
    starts [groups + 1]."""
    group = group_of(block, starts, groups, SIZE)
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    return group, start + (block - start // SIZE - group) * SIZE, end
