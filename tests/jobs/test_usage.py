"""Usage and prices: sums that equal the results, groups in pages, bills that are exact and never rewritten."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Job, LedgerEntry, Price, Result
from jobs.outcomes import Outcome, record
from jobs.prices import Prices, amount_text
from jobs.settings import Settings
from jobs.states import LedgerKind
from jobs.tenants import OPERATOR, Owner, Tenants
from jobs.usage import GroupBy, UsageGroup, UsageQuery, Usages, _sums
from tests.support.invariants import check_usage

DAY = 86_400
OUTPUTS = [{"index": 0, "text": "out", "finish_reason": "stop", "stop_reason": None}]
BILLED, CANCELLED, WASTED = LedgerKind.BILLED, LedgerKind.CANCELLED, LedgerKind.WASTED


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    Tenants(database).create("other")
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
    return Intake(database, settings)


@pytest.fixture
def usages(database: Database) -> Usages:
    return Usages(database)


def work(database: Database, model: str = "tiny", *, cancel: int = 0) -> None:
    """End all queued jobs of a model: each is first handed back, with tokens that are wasted; then every third fails,
    `cancel` are cancelled, the others complete, job k of them with k + 7 prompt and 10 k + 1 completion tokens."""
    for last in (False, True):
        with database.write() as connection:
            claims = claim(connection, worker_id="w", model=model, limit=1000)
        for one in claims[:cancel] if last else []:
            with database.read() as connection:
                tenant = connection.scalars(select(Job.tenant).where(Job.id == one.job_id)).one()
            Cancels(database).cancel_job(one.job_id, tenant=tenant)
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=one.fence,
                kind=("failed" if k % 3 == 2 else "completed") if last else "released",
                outputs=OUTPUTS,
                error={"code": "numerics", "message": "NaN"},
                prompt_tokens=k + 7,
                completion_tokens=10 * k + 1 if last else 2,
                cached_tokens=k % 4,
            )
            for k, one in enumerate(claims)
        ]
        database.transact(lambda connection, o=outcomes: record(connection, worker_id="w", outcomes=o))


def fill(database: Database, intake: Intake) -> None:
    """Two tenants, three keys, three models, jobs with and without a batch, on three days."""
    for model in ("tiny", "small", "huge"):
        for owner in (OPERATOR, Owner("default", "key_a"), Owner("other", "key_b")):
            bodies = [JobBody(prompt="x", model=model)] * 4
            intake.accept_many(bodies, owner)
            intake.accept_one(bodies[0], owner)
        work(database, model, cancel=2)
    with database.write() as connection:
        ids = connection.scalars(select(LedgerEntry.job_id).distinct().order_by(LedgerEntry.job_id)).all()
        for index, job_id in enumerate(ids):
            moment = 20_000 * DAY + (0.0, DAY - 0.125, DAY, 2.7 * DAY)[index % 4]
            connection.execute(
                update(LedgerEntry).where(LedgerEntry.job_id == job_id).values(created_at=moment)
            )


def rows_of(database: Database, **only: Any) -> list[Any]:
    with database.read() as connection:
        rows = connection.execute(select(*LedgerEntry.__table__.columns)).mappings().all()
    return [row for row in rows if all(row[name] == value for name, value in only.items())]


def numbers(group: UsageGroup) -> dict[str, tuple[int, ...]]:
    return {
        str(kind): (one.attempts, one.prompt, one.cached, one.completion)
        for kind, one in group.tokens.items()
    }


def summed(rows: list[Any]) -> dict[str, tuple[int, ...]]:
    made = {}
    for kind in LedgerKind:
        of_kind = [row for row in rows if row["kind"] == kind]
        made[str(kind)] = (
            len(of_kind),
            *(sum(row[f"{name}_tokens"] for row in of_kind) for name in ("prompt", "cached", "completion")),
        )
    return made


def test_sums_equal_the_results(database: Database, intake: Intake, usages: Usages) -> None:
    fill(database, intake)
    (group,) = usages.page(UsageQuery(tenant=None)).groups
    with database.read() as connection:
        results = connection.execute(select(*Result.__table__.columns)).all()
    billed = group.tokens[BILLED]
    assert billed.attempts == len(results) > 20
    assert billed.prompt == sum(row.prompt_tokens for row in results)
    assert billed.cached == sum(row.cached_tokens for row in results) > 0
    assert billed.completion == sum(row.completion_tokens for row in results)
    assert numbers(group) == summed(rows_of(database))
    assert group.tokens[CANCELLED].attempts == 6
    assert group.tokens[WASTED].attempts > 45
    check_usage(database)


@pytest.mark.parametrize(
    "by", [("day",), ("model", "day"), ("key",), ("batch", "key"), ("tenant", "model", "key", "batch", "day")]
)
def test_groups_in_pages(database: Database, intake: Intake, usages: Usages, by: tuple[str, ...]) -> None:
    fill(database, intake)
    expected: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for row in rows_of(database):
        values = {
            "day": int(row["created_at"] // DAY),
            "tenant": row["tenant"],
            "model": row["model"],
            "key": row["key_id"] or "",
            "batch": row["batch_id"] or "",
        }
        expected[tuple(values[name] for name in by)].append(row)
    query = UsageQuery(tenant=None, group_by=tuple(map(GroupBy, by)), limit=2)
    found: dict[tuple[Any, ...], Any] = {}
    after: str | None = None
    for _ in range(len(expected)):
        page = usages.page(UsageQuery(tenant=None, group_by=query.group_by, limit=2, after=after))
        assert len(page.groups) <= 2
        for group in page.groups:
            assert tuple(group.names.values()) not in found, "a group comes once"
            found[tuple(group.names.values())] = numbers(group)
        if (after := page.next) is None:
            break
    assert after is None
    assert found == {names: summed(rows) for names, rows in expected.items()}
    assert list(found) == sorted(found, key=lambda names: names), "in order"


def test_a_tenant_sees_its_own_and_times_are_half_open(
    database: Database, intake: Intake, usages: Usages
) -> None:
    fill(database, intake)
    (mine,) = usages.page(UsageQuery(tenant="other")).groups
    assert numbers(mine) == summed(rows_of(database, tenant="other"))
    (none,) = usages.page(UsageQuery(tenant="nobody")).groups
    assert numbers(none) == summed([])
    first = 20_000 * DAY
    (day,) = usages.page(UsageQuery(tenant=None, start=first, end=first + DAY)).groups
    rows = [row for row in rows_of(database) if first <= row["created_at"] < first + DAY]
    assert numbers(day) == summed(rows)
    assert {row["created_at"] - first for row in rows} == {0.0, DAY - 0.125}


@pytest.mark.parametrize(
    "after", ["x", "", "W10", "WyJhIl0", "WzFd", "WyJcdWQ4MDAiXQ", "WyJcdTAwMDAiXQ", "é"]
)
def test_a_foreign_cursor_is_refused(usages: Usages, after: str) -> None:
    by = (GroupBy.KEY, GroupBy.DAY) if after == "WyJhIl0" else (GroupBy.KEY,)
    with pytest.raises(BadField, match="after"):
        usages.page(UsageQuery(tenant="default", group_by=by, after=after))


def test_a_question_about_a_day_does_not_read_the_ledger(database: Database, intake: Intake) -> None:
    """The plan, with enough rows that a scan would be worth it if it had to read them all."""
    job_id = intake.accept_one(JobBody(prompt="x"), OPERATOR)
    work(database)
    rows = rows_of(database)
    with database.write() as connection:
        connection.execute(
            LedgerEntry.__table__.insert(),
            [
                {**rows[0], "job_id": job_id, "fence": 100 + i, "created_at": 1e9 + 1000.0 * i}
                for i in range(5000)
            ],
        )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
        query = UsageQuery(tenant="default", group_by=(GroupBy.MODEL,), start=1e9, end=1e9 + DAY)
        for tenants in (["default"], ["default", "other"]):
            statement = str(
                _sums(query, tenants, None).compile(database.engine, compile_kwargs={"literal_binds": True})
            )
            how = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
            plan = "\n".join(
                str(row) for row in connection.exec_driver_sql(how + statement.replace("%", "%%"))
            )
            assert "ix_ledger_tenant_created_at" in plan, plan
            assert "SCAN ledger" not in plan, plan
            assert "Seq Scan on ledger" not in plan, plan


def test_costs_are_exact_and_split_where_a_price_begins(
    database: Database, intake: Intake, usages: Usages
) -> None:
    fill(database, intake)
    prices = Prices(database)
    first = 20_000.0 * DAY
    prices.set("tiny", prompt="0.1", cached_prompt="0.01", completion="0.30", currency="EUR", valid_from=0)
    with database.write() as connection:  # as if it had been set in time
        connection.execute(
            Price.__table__.insert().values(
                model="tiny",
                valid_from=first + DAY,
                currency="EUR",
                prompt="0.000000000001",
                cached_prompt="999999999999.999999999999",
                completion="7",
                created_at=0,
            )
        )
    prices.set("small", prompt="2", completion="0", currency="EUR", valid_from=first + DAY)
    groups = {
        group.names[GroupBy.MODEL]: group
        for group in usages.page(UsageQuery(tenant=None, group_by=(GroupBy.MODEL,))).groups
    }
    expected = Decimal(0)
    for row in rows_of(database, model="tiny", kind="billed"):
        rates = ("0.1", "0.01", "0.30")
        if row["created_at"] >= first + DAY:
            rates = ("0.000000000001", "999999999999.999999999999", "7")
        counts = (row["prompt_tokens"] - row["cached_tokens"], row["cached_tokens"], row["completion_tokens"])
        expected += sum(
            (Decimal(rate) * count for rate, count in zip(rates, counts, strict=True)), Decimal(0)
        )
    assert groups["tiny"].cost is not None
    assert groups["tiny"].cost * 1_000_000 == expected > 0
    assert groups["tiny"].currency == "EUR"
    for model in ("huge", "small"):  # without a price; without one on the first day
        assert (groups[model].cost, groups[model].currency) == (None, None)
    late = UsageQuery(tenant=None, group_by=(GroupBy.MODEL,), start=first + DAY)
    costs = {group.names[GroupBy.MODEL]: group.cost for group in usages.page(late).groups}
    of_small = rows_of(database, model="small", kind="billed")
    prompt = sum(row["prompt_tokens"] for row in of_small if row["created_at"] >= first + DAY)
    assert costs["small"] == Decimal(prompt * 2) / 1_000_000
    (everything,) = usages.page(UsageQuery(tenant=None)).groups
    assert everything.cost is None, "a sum that leaves a model out would be a lie"


def test_what_a_price_cannot_be(database: Database) -> None:
    prices = Prices(database)
    good: dict[str, Any] = {"prompt": "1", "completion": "2", "currency": "EUR"}
    for name, value in (
        ("prompt", "-1"),
        ("prompt", "1e3"),
        ("prompt", "NaN"),
        ("completion", "1."),
        ("completion", "0.1234567890123"),
        ("cached_prompt", ""),
        ("currency", "eur"),
        ("valid_from", float("nan")),
        ("valid_from", -1.0),
    ):
        with pytest.raises(BadField, match={"valid_from": "^from: "}.get(name, name)):
            prices.set("tiny", **{**good, name: value})
    for model in ("", "a\nb", "x" * 256):
        with pytest.raises(BadField, match="model"):
            prices.set(model, **good)
    assert prices.all() == []


def test_history_stays_as_it_is(database: Database) -> None:
    prices = Prices(database)
    first = prices.set("tiny", prompt="1", completion="2", currency="EUR", valid_from=1000.0)
    assert (first.cached_prompt, first.valid_from) == (Decimal(1), 1000.0)
    with pytest.raises(BadField, match="past"):
        prices.set("tiny", prompt="9", completion="9", currency="EUR", valid_from=1000.0)
    with pytest.raises(BadField, match="EUR"):
        prices.set("small", prompt="9", completion="9", currency="USD")
    second = prices.set("tiny", prompt="3", completion="4", currency="EUR")
    prices.set("tiny", prompt="5", completion="6", currency="EUR", valid_from=9e9)
    third = prices.set("tiny", prompt="5.50", completion="6", currency="EUR", valid_from=9e9)
    assert prices.all() == [first, second, third], "one that has not begun may be replaced"
    assert amount_text(third.prompt) == "5.5"
    assert [amount_text(Decimal(one)) for one in ("10", "0", "1E-7", "0.10")] == [
        "10",
        "0",
        "0.0000001",
        "0.1",
    ]


def test_what_is_not_billed_has_no_price_to_miss(database: Database, intake: Intake, usages: Usages) -> None:
    job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    Prices(database).set("priced", prompt="1", completion="1", currency="EUR", valid_from=0.0)
    row = {"job_id": job_id, "tenant": "default", "prompt_tokens": 1_000_000, "completion_tokens": 0}
    with database.write() as connection:
        for fence, kind, model in ((1, WASTED, "unpriced"), (2, BILLED, "priced")):
            entry = row | {"fence": fence, "kind": kind, "model": model, "created_at": 1.0}
            connection.execute(insert(LedgerEntry).values(entry))
    (group,) = usages.page(UsageQuery(tenant="default")).groups
    assert group.cost is not None
    assert amount_text(group.cost) == "1"
