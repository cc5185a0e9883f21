"""Broadcast: what listeners hear of a job, in its place, and a Redis that is away is not waited for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from engine.growth import Growth
from engine.reasoning import format_of
from engine.request import Generated, RequestId
from engine.special_tokens import SpecialTokens
from engine.tokenizer import Tokenizer
from jobs import broadcast as module
from jobs.audience import MAX_ENTRIES, Piece, Said, heard, stream_name
from jobs.broadcast import Broadcast
from tests.support.thinking import THINK, with_marks
from tests.support.tiny_tokenizers import byte_level
from tests.support.waiting import wait_until

JOB = RequestId("job_1", 2)
TEXT = "the fox over the dog and the night"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level().to_str(), template=None, special_tokens=SpecialTokens())


@pytest.fixture
def broadcast(tokenizer: Tokenizer, redis_url: str) -> Iterator[Broadcast]:
    made = Broadcast(redis_url, tokenizer, {JOB: ["dog"]}.get)
    made.start()
    yield made
    made.stop(10)


def said(client: redis.Redis, request_id: RequestId = JOB) -> list[Said]:
    return [heard(entry) for _, entry in client.xrange(stream_name(request_id.job_id))]


def text_of(entries: list[Said], sample: int = 0) -> str:
    """The pieces of one sample's answer put together, each in its place; of its thoughts, if there is none."""
    text = ""
    pieces = [piece for entry in entries for piece in entry.pieces if piece.sample == sample]
    some = any(not piece.is_reasoning for piece in pieces)
    for piece in (piece for piece in pieces if piece.is_reasoning != some):
        assert piece.at <= len(text)
        assert text[piece.at :] in piece.text
        text = text[: piece.at] + piece.text
    return text


def growth(token_ids: list[int], start: int, end: int, request_id: RequestId = JOB) -> Growth:
    made = Generated(token_ids=tuple(token_ids[start:end]))
    return Growth(id=request_id, starts=(start, start), generated=(made, made))


def test_text_and_end(broadcast: Broadcast, tokenizer: Tokenizer, redis_url: str) -> None:
    ids = tokenizer.encode_part(TEXT)
    with redis.Redis.from_url(redis_url) as client:
        for place in range(len(ids)):
            broadcast.put(
                [growth(ids, place, place + 1), growth(ids, place, place + 1, RequestId("gone", 1))]
            )
        broadcast.over(JOB, ended=True)
        wait_until(lambda: said(client) and said(client)[-1].ended, "the end is told")
        assert [entry.ended for entry in said(client)[:-1]] == [False] * (len(said(client)) - 1)
        # What comes behind the end of an attempt is not told of: the rest is in SQL by then.
        heard_before = text_of(said(client))
        assert TEXT.startswith(heard_before)
        assert text_of(said(client), 1) == heard_before
        assert 0 < client.ttl(stream_name(JOB.job_id)) <= module.LIFE_SECONDS
        assert not client.exists(stream_name("gone"))


def test_a_possible_stop_string_is_held_back(
    broadcast: Broadcast, tokenizer: Tokenizer, redis_url: str
) -> None:
    ids = tokenizer.encode_part("the fox and do")
    with redis.Redis.from_url(redis_url) as client:
        broadcast.put([growth(ids, 0, len(ids))])
        wait_until(lambda: text_of(said(client)) == "the fox and ", "all but the held back comes")


def test_another_attempt_says_it_again_in_its_place(tokenizer: Tokenizer, redis_url: str) -> None:
    ids = tokenizer.encode_part(TEXT)
    again = RequestId(JOB.job_id, 3)
    broadcast = Broadcast(redis_url, tokenizer, lambda request_id: ())
    broadcast.start()
    with redis.Redis.from_url(redis_url) as client:
        broadcast.put([growth(ids, 0, 5)])
        wait_until(lambda: said(client), "some of it")
        broadcast.over(JOB, ended=False)
        broadcast.put([growth(ids, 0, 8, again)])
        wait_until(lambda: text_of(said(client)) == tokenizer.decode(ids[:8]), "more of it")
        assert [entry.pieces[0].at for entry in said(client)] == [0, 0]
        assert not any(entry.ended for entry in said(client))
        broadcast.forget()
        broadcast.put([growth(ids, 8, 9, again)])  # somebody else has the job now: this has no beginning
        broadcast.over(RequestId("other", 1), ended=True)
        wait_until(lambda: said(client, RequestId("other", 1)), "later words are told")
        assert len(said(client)) == 2
    broadcast.stop(10)


def test_what_redis_missed_is_told_when_it_is_back(
    tokenizer: Tokenizer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    ids = tokenizer.encode_part(TEXT)
    broadcast = Broadcast(redis_url, tokenizer, lambda request_id: ())
    broadcast.start()
    with redis.Redis.from_url(redis_url) as client:
        client.set(stream_name(JOB.job_id), "in the way", ex=60)  # XADD fails
        broadcast.put([growth(ids, 0, 4)])
        wait_until(lambda: broadcast._quiet_until, "it has failed")
        client.delete(stream_name(JOB.job_id))
        broadcast.put([growth(ids, 4, 6)])
        wait_until(lambda: text_of(said(client)) == tokenizer.decode(ids[:6]), "all of it")
    broadcast.stop(10)


def test_a_dead_redis_holds_nobody_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broadcast = Broadcast(f"unix://{tmp_path}/nobody.sock", tokenizer, lambda request_id: ())
    broadcast.start()
    ids = tokenizer.encode_part(TEXT)
    for place in range(len(ids)):
        broadcast.put([growth(ids, place, place + 1)])
    broadcast.over(JOB, ended=True)
    broadcast.stop(10)
    assert not broadcast.is_alive()


def test_a_stream_has_a_size(broadcast: Broadcast, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(3):
            for _ in range(MAX_ENTRIES):
                broadcast.over(JOB, ended=True)
            broadcast.over(RequestId("last", 1), ended=True)
        wait_until(lambda: client.xlen(stream_name("last")) == 3, "all is told")
        assert client.xlen(stream_name(JOB.job_id)) < 2 * MAX_ENTRIES


def test_what_is_not_ours_says_nothing() -> None:
    for entry in ({}, {b"said": b"{"}, {b"said": b"[]"}, {b"said": b'{"pieces": [[1]]}'}, {b"x": b"y"}):
        assert heard(entry) == Said()
    assert heard({b"said": b'{"pieces": [[1, 2, "x"]]}'}) == Said((Piece(1, 2, "x"),))
    assert heard({b"said": b'{"pieces": [[1, 2, "x", true]]}'}) == Said((Piece(1, 2, "x", True),))


def test_thoughts_are_told_as_such(redis_url: str) -> None:
    marked = with_marks(byte_level(), THINK, special=False)
    tokenizer = Tokenizer(marked.to_str(), template=None, special_tokens=SpecialTokens())
    (close,) = (tokenizer.id_of(THINK[1]) or 0,)
    ids = [*tokenizer.encode_part("\nthe dog\n"), close, *tokenizer.encode_part("\nthe fox")]
    broadcast = Broadcast(redis_url, tokenizer, {JOB: ["dog"]}.get, format_of(tokenizer, "auto"))
    broadcast.start()
    with redis.Redis.from_url(redis_url) as client:
        for place in range(len(ids)):
            broadcast.put([replace(growth(ids, place, place + 1), begins="reasoning")])
        wait_until(lambda: said(client) and text_of(said(client), 1) == "the fox", "all is told")
        thoughts = [piece for entry in said(client) for piece in entry.pieces if piece.is_reasoning]
        assert text_of([Said(tuple(thoughts))], 1) == "the dog"
    broadcast.stop(10)
