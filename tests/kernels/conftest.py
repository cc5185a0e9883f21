"""Every kernel set, with every dtype and every kind of cache it serves.

Where there is no GPU the triton set runs in triton's interpreter, some hundred times slower than C: `make test` runs
a few of its cases of each test, `make test-triton`, which takes half an hour, all of them. With a GPU it runs there,
and `make test-gpu` is quick.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from kernels import Kernels, kernels_for
from tests.support.hopping import triton_kernels

SLOW = (  # each case runs a kernel many times; what they say, others say of one small case
    "test_frequencies",
    "test_nan_behind_a_query_changes_no_bit",
    "test_what_has_left_the_window_changes_no_bit",
    "test_nothing_outside_of_all_windows_is_read",
    "test_a_window_that_everything_fits_in_is_none",
    "test_attention_with_large_scores_stays_exact",
    "test_a_row_does_not_depend_on_how_many_there_are",
    "test_rows_that_share_equal_a_plain_loop",  # other tests of its file have it too
    "test_no_crowd_and_no_stride_changes_a_filtered_draw",
    "test_rows_of_one_query_need_no_starts",  # as `test_shared_prefixes` has them too
)
ONCE = (  # one case is enough of what takes ten seconds
    "test_what_is_not_finite_fails_its_row_alone",
    "test_nan_meets_the_rows_that_see_it_and_no_others",
    "test_softcap_is_exact_in_any_crowd",
    "test_no_way_to_cut_a_product_changes_a_bit",
    "test_options",
    "test_long_rows",
    "test_a_token_is_the_weighted_sum_of_its_experts",
    "test_the_bits_are_those_of_the_plain_weights_in_every_tile",
    "test_a_mixture_has_the_bits_of_the_plain_weights",
    "test_a_row_does_not_depend_on_its_crowd",
)
DTYPES = [torch.float32, torch.bfloat16]
STORAGES = {"plain": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the triton cases of a test the second and one in the middle are quick, in whatever order they come."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent == Path(__file__).parent and re.search(r"\[.*triton", item.name):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, group in cases.items():
        group.sort(key=lambda item: item.nodeid)
        few = {1 % len(group), (len(group) // 2 + 1) % len(group)}  # the first are the largest
        quick = () if name.endswith(SLOW) else [group[i] for i in sorted(few)]
        quick = quick[: 1 if name.endswith(ONCE) else None]
        for item in group:
            if item not in quick:
                item.add_marker(pytest.mark.interpreted)


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = triton_kernels() if request.param == "triton" else kernels_for("cpu", request.param)
    assert found.name == request.param, "no working C compiler on this machine"
    return found


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, kernels: Kernels) -> torch.dtype | None:
    """What the cache is made of; None: the dtype of the activations."""
    found = STORAGES[request.param]
    if found is not None and found not in kernels.quantised:
        assert kernels.name == "cpu", "the reference set serves every cache"
        pytest.skip(f"the {kernels.name} set has no {request.param} cache")
    return found


@pytest.fixture(params=["plain", "int8"])
def cpu_storage(request: pytest.FixtureRequest) -> torch.dtype | None:
    return STORAGES[request.param]
