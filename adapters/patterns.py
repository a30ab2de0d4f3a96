"""A regular expression and a name in; whether it matches the whole name, in polynomial time.

`re` backtracks, so a short expression in a file can take exponential time. Here every piece of an
expression takes all positions where it may begin and gives all positions where it may end, which
takes time polynomial in the name's length (Thompson, 1968, doi:10.1145/363347.363387).
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as kinds  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

Piece = Callable[[str, set[int]], set[int]]  # a name, possible beginnings -> possible ends
ONE_CHARACTER = (kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN)
BEGINNINGS = (kinds.AT_BEGINNING, kinds.AT_BEGINNING_STRING)
ENDS = (kinds.AT_END, kinds.AT_END_STRING)


@cache
def matcher(expression: str) -> Callable[[str], bool]:
    """Return a function that says whether `expression` matches a whole name, as in `re`.

    Raises:
        ValueError: it is no regular expression, or has a part that is not covered, such as a
            reference to a group.
    """
    try:
        tree = parser.parse(expression)
        piece = _sequence(tree, tree.state.flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{expression!r} is no regular expression: {error}") from error
    except KeyError as error:
        kind = str(error.args[0]).lower()
        raise ValueError(f"{expression!r} has a {kind}, which is not covered") from error
    return lambda name: len(name) in piece(name, {0})


def _sequence(tree: Iterable[tuple[Any, Any]], flags: int) -> Piece:
    pieces = [_piece(kind, argument, flags) for kind, argument in tree]

    def run(name: str, starts: set[int]) -> set[int]:
        for piece in pieces:
            if not starts:
                break
            starts = piece(name, starts)
        return starts

    return run


def _piece(kind: Any, argument: Any, flags: int) -> Piece:
    """Return the piece that a node of a parsed expression stands for.

    Raises:
        KeyError: its kind is not covered.
    """
    if kind in ONE_CHARACTER:
        tree = parser.SubPattern(parser.State(), [(kind, argument)])
        character = compiler.compile(tree, flags & ~re.DEBUG)
        return lambda name, starts: {i + 1 for i in starts if character.fullmatch(name[i : i + 1])}
    if kind is kinds.BRANCH:
        branches = [_sequence(branch, flags) for branch in argument[1]]
        return lambda name, starts: set().union(*(branch(name, starts) for branch in branches))
    if kind is kinds.SUBPATTERN:
        _, added, removed, tree = argument
        return _sequence(tree, (flags | added) & ~removed)
    if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):
        low, high, tree = argument
        return _repeat(_sequence(tree, flags), low, high)
    if kind in (kinds.ASSERT, kinds.ASSERT_NOT):
        direction, tree = argument
        return _look(_sequence(tree, flags), direction, wanted=kind is kinds.ASSERT)
    if kind is kinds.AT:
        return _anchor(argument)
    if kind is kinds.FAILURE:
        return lambda name, starts: set()
    raise KeyError(kind)


def _repeat(piece: Piece, low: int, high: int) -> Piece:
    def run(name: str, starts: set[int]) -> set[int]:
        for _ in range(min(low, len(name) + 1)):  # after which the positions no longer change
            before, starts = starts, piece(name, starts)
            if starts in (before, set()):
                break
        found = new = starts
        for _ in range(min(high - low, len(name) + 1)):
            new = piece(name, new) - found
            if not new:
                break
            found = found | new
        return found

    return run


def _look(piece: Piece, direction: int, *, wanted: bool) -> Piece:
    def sees(name: str, i: int) -> bool:
        if direction > 0:
            return bool(piece(name, {i}))
        return any(i in piece(name, {j}) for j in range(i + 1))

    return lambda name, starts: {i for i in starts if sees(name, i) is wanted}


def _anchor(kind: Any) -> Piece:
    if kind in BEGINNINGS:
        return lambda name, starts: starts & {0}
    if kind in ENDS:
        return lambda name, starts: starts & {len(name)}
    if kind not in (kinds.AT_BOUNDARY, kinds.AT_NON_BOUNDARY):
        raise KeyError(kind)

    def at_boundary(name: str, i: int) -> bool:
        before, after = (
            re.fullmatch(r"\w", c) is not None for c in (name[i - 1 : i], name[i : i + 1])
        )
        return before != after

    wanted = kind is kinds.AT_BOUNDARY
    return lambda name, starts: {i for i in starts if at_boundary(name, i) is wanted}
