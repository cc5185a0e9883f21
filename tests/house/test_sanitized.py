"""What is read from compute-sanitizer and pytest, whose words these are."""

from __future__ import annotations

from tests.support.sanitized import Found, chose_nothing, faults_in, passed_in

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
ONE = "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n"
RACES = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"
NO_GPU = "========= Error: Target application terminated before first instrumented API call\n"


def test_the_faults_that_a_tool_counts() -> None:
    assert [faults_in(log) for log in (CLEAN, ONE, RACES, NO_GPU, "")] == [0, 1, 3, None, None]


def test_what_pytest_says_last() -> None:
    mixed = "...F\n1 failed, 12 passed, 30 deselected in 4.05s"
    assert (passed_in(mixed), chose_nothing(mixed)) == (12, False)
    assert (passed_in(""), chose_nothing("")) == (0, False)
    for nothing in ("42 deselected in 0.12s", "=== 42 deselected in 0.12s ===", "no tests ran in 0.01s"):
        assert (passed_in(nothing), chose_nothing(nothing)) == (0, True)
    assert not chose_nothing("1 error in 0.50s")


def test_only_what_ran_to_its_end_without_faults_is_clean() -> None:
    def found(status: int, faults: int | None) -> bool:
        return Found("memcheck", "test_x.py", 1, faults, status, "").clean

    assert found(0, 0)
    assert found(5, None)
    assert not found(0, None)
    assert not found(0, 2)
    assert not found(1, 0)
    assert not found(-1, None)
