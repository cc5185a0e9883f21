"""What the demo asks for: product texts, summaries, headlines. 24 jobs over HTTP, 4 through Redis."""

from __future__ import annotations

from typing import Any

# What the authors of SmolLM2 recommend for a model this small; warmer, it loses the thread.
TEMPERATURE = 0.2

PRODUCTS = (
    ("desk lamp", "a bamboo desk lamp with warm dimmable light"),
    ("wool socks", "thick merino wool socks for winter hiking"),
    ("coffee grinder", "a quiet hand coffee grinder with steel burrs"),
    ("rain jacket", "a light waterproof jacket that folds into its pocket"),
    ("notebook", "a recycled-paper notebook that lies flat"),
    ("water bottle", "an insulated steel bottle that keeps tea hot for twelve hours"),
    ("bicycle bell", "a brass bicycle bell with a long clear tone"),
    ("cutting board", "a cutting board made of oak with a juice groove"),
)

ARTICLES = (
    "The city library will stay open until midnight from Monday to Friday, starting in March. Visitors had asked for "
    "longer hours for years. The council pays for two more librarians, and a small cafe opens on the ground floor.",
    "Researchers have measured how street trees change the temperature of a town. In streets with old trees the air "
    "was up to four degrees cooler in July. Young trees helped less, because their crowns are still small.",
    "A family bakery in the old harbour has started to sell yesterday's bread at half price before nine in the "
    "morning. It throws away almost nothing now, and the queue reaches around the corner.",
    "The night train to the coast returns after ten years. It leaves at half past nine in the evening and arrives "
    "before breakfast. Beds cost less than a hotel room, and bicycles travel free of charge.",
    "A school has moved its first lesson from eight to nine o'clock. After one year the pupils sleep forty minutes "
    "more on average, fewer of them arrive late, and their marks in mathematics have improved a little.",
    "The museum of clocks has repaired its oldest piece, a tower clock from 1621. It runs again with its first "
    "wheels. Visitors may watch it strike noon every Sunday.",
    "A small company collects old window glass and makes tiles of it. The tiles cost as much as new ones, but "
    "making them needs a third less energy. Two hotels have ordered them for their bathrooms.",
    "Volunteers have counted the swifts above the town again. There were more than in any year since 2010. Nesting "
    "boxes under forty roofs seem to have helped.",
)


def http_jobs() -> list[dict[str, Any]]:
    """8 product texts, 8 summaries, 8 headlines, with names to find them by."""
    jobs = [
        _job(f"product: {name}", f"Write a short product description for {text}.", 100)
        for name, text in PRODUCTS
    ]
    jobs += [
        _job(f"summary: {' '.join(text.split()[:4])}", f"Summarize this text in one sentence:\n\n{text}", 80)
        for text in ARTICLES
    ]
    jobs += [
        _job(
            f"headline: {' '.join(text.split()[:4])}",
            f"Write a short headline for this article:\n\n{text}",
            40,
        )
        for text in ARTICLES
    ]
    return [job | {"seed": i} for i, job in enumerate(jobs)]


def redis_jobs() -> list[dict[str, Any]]:
    """Four more product texts, for a service that reaches only Redis."""
    things = ("a red tea pot", "a garden chair made of ash wood", "a board game about trains", "a lemon soap")
    return [
        _job(f"redis: {thing}", f"Write a friendly product description for {thing}.", 120) for thing in things
    ]


def _job(name: str, request: str, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": request}],
        "temperature": TEMPERATURE,
        "top_p": 0.9,
        "max_tokens": max_tokens,
        "custom_id": name,
    }
