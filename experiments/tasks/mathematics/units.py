"""Units of measurement: their names, and the factors between units of one kind."""

import re
from fractions import Fraction

_KINDS: dict[str, dict[str, Fraction | int]] = {
    "time s": {"second sec s": 1, "minute min": 60, "hour hr h": 3600, "day": 86400, "week": 604800},
    "length m": {
        "millimeter millimetre mm": Fraction(1, 1000),
        "centimeter centimetre cm": Fraction(1, 100),
        "meter metre m": 1,
        "kilometer kilometre km": 1000,
    },
    "length in": {"inch inches in": 1, "foot feet ft": 12, "yard yd": 36, "mile mi": 63360},
    "mass g": {"milligram mg": Fraction(1, 1000), "gram g": 1, "kilogram kg": 1000},
    "volume l": {"milliliter millilitre ml mL": Fraction(1, 1000), "liter litre L": 1},
    "money": {"cent ¢": Fraction(1, 100), "dollar USD": 1},
    "year": {"month": 1, "year yr": 12},
}
UNITS: dict[str, tuple[str, Fraction]] = {
    plural: (kind, Fraction(factor))
    for kind, units in _KINDS.items()
    for names, factor in units.items()
    for name in names.split()
    for plural in (name, name + "s" if len(name) > 2 else name)
}
"""Name of a unit -> its kind, and its size in units of one size for the kind."""

_NOT_UNITS = re.compile(
    r"\b(?:if|when|where|with|for|such|that|not|n't|never|no|or|and|more|less|least|most|otherwise|than|except|mod|"
    r"base|is|are|was|only|even|odd|other|while|then|but|to|times|plus|minus|over|divided|squared|cubed|factorial|"
    r"modulo|half|root|matrix|matrices|grid|board|table)\b|^of\b|\bof$"
)
_MOST_WORDS = 5
MULTIPLES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1_000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
"""Words that multiply the number before them."""


def unit_of(words: str) -> str | None:
    """Return the one spelling of a unit, such as "kg*m/s^2"; None if the words say more than a unit does."""
    text = re.sub(r"\s+", " ", words.replace(".", " ")).strip()
    if not text or len(text.split()) > _MOST_WORDS or _NOT_UNITS.search(text.lower()):
        return None
    text = re.sub(r"\bsquare (\S+)|\bsq (\S+)", lambda m: f"{m[1] or m[2]}^2", text)
    text = re.sub(r"\bcubic (\S+)", r"\1^3", text)
    text = re.sub(r"\s*(?:/|\bper\b|\ba\b(?=\s))\s*", "/", text)
    return re.sub(r"[A-Za-z]+", lambda m: _one_spelling(m.group()), text).replace(" ", "*")


def _one_spelling(word: str) -> str:
    if word in UNITS or word.lower() in UNITS:
        kind, factor = UNITS.get(word) or UNITS[word.lower()]
        return next(name for name, value in UNITS.items() if value == (kind, factor))
    word = word.lower() if len(word) > 2 else word
    return word.removesuffix("s") if len(word) > 3 else word


def factor_between(unit: str, other: str) -> Fraction | None:
    """Return how many of `other` one of `unit` is; None if they are not of one kind."""
    (name, power), (other_name, other_power) = (_base_and_power(each) for each in (unit, other))
    kind, size = UNITS.get(name, (name, Fraction(1)))
    other_kind, other_size = UNITS.get(other_name, (other_name, Fraction(1)))
    return (size / other_size) ** power if (kind, power) == (other_kind, other_power) else None


def _base_and_power(unit: str) -> tuple[str, int]:
    power = re.fullmatch(r"([A-Za-z]+)\^([1-9])", unit)
    return (power[1], int(power[2])) if power else (unit, 1)
