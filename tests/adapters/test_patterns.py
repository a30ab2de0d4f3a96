"""Patterns match what `re` matches, and none of them takes long."""

import random
import re
import time

import pytest

from adapters.patterns import matcher

PIECES = [
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a.]",
    r"\d",
    r"\w",
    "(a|b)",
    "(?:ab|a)",
    "(a?b)",
    "(a|(?!))",
    "x1",
]
REPEATS = ["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?"]
LOOKS = ["", "", "", "(?=a)", "(?!b)", "^", "$", r"\b", "(?<=a)", r"(?<!\.)"]


def made(draw: random.Random, depth: int = 2) -> str:
    """Return a random expression."""
    text = ""
    for _ in range(draw.randint(1, 4)):
        piece = draw.choice(PIECES)
        if depth and draw.random() < 0.3:
            piece = f"({made(draw, depth - 1)}|{made(draw, depth - 1)})"
        text += draw.choice(LOOKS) + piece + draw.choice(REPEATS)
    return text


@pytest.mark.parametrize("seed", range(40))
def test_a_pattern_matches_what_re_matches(seed: int) -> None:
    draw, hits = random.Random(seed), 0
    for _ in range(20):
        expression = made(draw)
        for _ in range(20):
            name = "".join(draw.choices("ab.x1", k=draw.randint(0, 7)))
            expected = re.fullmatch(expression, name) is not None
            assert matcher(expression)(name) is expected, (expression, name)
            hits += expected
    assert hits > 0


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        (r"(?i)BLOCKS\.\d+", "blocks.12"),
        (r"(?i:B)locks", "blocks"),
        (r"blocks\.(?!0\b)\d+\.attn\.(wq|wv)", "blocks.11.attn.wv"),
        (r".*\.(q|k|v)_proj", "model.layers.3.self_attn.q_proj"),
        ("[a-z_]+[0-9]{1,2}", "layer_12"),
    ],
)
def test_usual_patterns_match(expression: str, name: str) -> None:
    assert matcher(expression)(name)
    assert not matcher(expression)(f"{name}x")


@pytest.mark.parametrize(
    "expression",
    [
        ".*" * 14 + "!",
        "(a|a)+!",
        "(a?){30}a{30}!",
        r"(([a-z0-9]+\.?)+)+!",
        "((((a*)*)*)*)*!",
        "(((a?){99}){99}){99}!",
        "a{0,4000000000}!",
        "(a|aa|aaa)*!",
        "(?=(a*)*b)a*!",
    ],
)
def test_no_pattern_takes_long(expression: str) -> None:
    started = time.process_time()
    assert not matcher(expression)("a" * 60)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a(", r"'a\(' is no regular expression: missing \), unterminated subpattern"),
        ("(" * 5000 + ")" * 5000, "is no regular expression"),
        (r"(a)\1", r"has a groupref, which is not covered"),
        ("(a)?(?(1)b|c)", "has a groupref_exists, which is not covered"),
        ("(?>a)b", "has a atomic_group, which is not covered"),
    ],
)
def test_what_is_not_covered_is_named(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matcher(expression)
