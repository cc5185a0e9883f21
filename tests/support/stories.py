"""The jobs that the stories hand in: many, different, and with some repeats to compare."""

from __future__ import annotations

from typing import Any

SUBJECTS = ("a lamp", "the night train", "a bakery", "wool socks", "the old mill", "a quiet keyboard", "rain")


def short_jobs(count: int) -> list[dict[str, Any]]:
    """Prompts and chats, greedy and sampled, one sample and two. Every fifth repeats an earlier prompt and seed."""
    return [_short(i - 5 if i % 5 == 4 and i > 5 else i) | {"custom_id": f"short-{i}"} for i in range(count)]


def _short(i: int) -> dict[str, Any]:
    subject = SUBJECTS[i % len(SUBJECTS)]
    job: dict[str, Any] = {"max_tokens": 8 + i * 7 % 40, "seed": i, "temperature": (0.0, 0.7, 1.0)[i % 3]}
    if i % 2:
        job["prompt"] = f"Write a line about {subject}. " * (1 + i % 4)
    else:
        job["messages"] = [
            {"role": "system", "content": "You write for a shop."},
            {"role": "user", "content": f"Number {i}: {subject}"},
        ]
    if i % 11 == 3:
        job |= {"n": 2, "top_p": 0.9}
    return job


def long_jobs(count: int, num_tokens: int) -> list[dict[str, Any]]:
    """Jobs of exactly `num_tokens` tokens each, so that something can die in the middle of them."""
    return [
        {
            "prompt": f"Tell me about {SUBJECTS[i % len(SUBJECTS)]}.",
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "seed": i % 10,
            "custom_id": f"long-{i}",
        }
        for i in range(count)
    ]
