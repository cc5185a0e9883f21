"""What a Prometheus server would read from an exposition, by the library's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(text: str) -> Samples:
    """(name, labels) → value. Raises when the text is no exposition, or tells one sample twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, f"{family.name} has no word of explanation"
        assert family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value_of(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels. Raises KeyError when there is none."""
    values = [
        value
        for (found, pairs), value in samples.items()
        if found == name and labels.items() <= dict(pairs).items()
    ]
    if not values:
        raise KeyError(name, labels)
    return sum(values)
