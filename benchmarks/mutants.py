"""What `make mutants` found: a line a package or file, and the survivors without a reason so far.

mutmut results --all true | python -m benchmarks.mutants [--files]

The reasons are in tests/mutants.md, each above the names of its mutants.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

REASONS = Path(__file__).parents[1] / "tests" / "mutants.md"
LET_THROUGH = ("survived", "no tests")
LINE = re.compile(r"\s*(\S+)\.x(?:ǁ(\w+)ǁ|_)(\w+?)__mutmut_(\d+): (.+)")


def parsed(lines: Iterable[str]) -> list[tuple[str, str, int, str]]:
    """Return module, function, number and status of every mutant."""
    found = [match.groups() for line in lines if (match := LINE.fullmatch(line.rstrip()))]
    return [
        (module, f"{of}.{name}" if of else name, int(number), status)
        for module, of, name, number, status in found
    ]


def package(module: str) -> str:
    """Return the package that a module is counted with."""
    return "/".join(module.split(".")[: 1 if module.startswith("adapters") else 2])


def table(mutants: list[tuple[str, str, int, str]], *, files: bool) -> str:
    """Return a row a package or file: how many mutants, how many of them were caught."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for module, _, _, status in mutants:
        counts[module.replace(".", "/") if files else package(module)][status] += 1
    rows = ["| package | mutants | run | caught | share |", "|---|---|---|---|---|"]
    for name, count in sorted(counts.items()):
        run = count.total() - count["not checked"]
        caught = run - sum(count[status] for status in LET_THROUGH)
        share = f"{caught / run:.1%}" if run else "-"
        rows.append(f"| {name} | {count.total()} | {run} | {caught} | {share} |")
    return "\n".join(rows)


def reasoned(text: str) -> set[tuple[str, str, int]]:
    """Return the mutants that the text names, as in "- `module:function` 1 2 3"."""
    return {
        (module, function, int(number))
        for module, function, numbers in re.findall(r"`([\w.]+):([\w.]+)` ([\d ]+)", text)
        for number in numbers.split()
    }


def survivors(mutants: list[tuple[str, str, int, str]]) -> dict[tuple[str, str], list[int]]:
    """Return the numbers of the survivors of every function."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for module, function, number, status in mutants:
        if status in LET_THROUGH:
            found[module, function].append(number)
    return found


def main() -> None:
    mutants = parsed(sys.stdin)
    print(table(mutants, files="--files" in sys.argv))
    known = reasoned(REASONS.read_text())
    print("\nWithout a reason:")
    for (module, function), numbers in sorted(survivors(mutants).items()):
        if new := [n for n in numbers if (module, function, n) not in known]:
            print(f"- `{module}:{function}` {' '.join(map(str, new))}")


if __name__ == "__main__":
    main()
