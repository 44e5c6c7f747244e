"""Whether the time of a key's check tells how much of a wrong key is right.

    python -m benchmarks.key_timing              # about half a minute

Wrong keys of two kinds are checked in turn, in random order: wrong in the first character of the
secret part, and right but for the last. Welch's t of their times says whether they can be told
apart: above 4.5 in absolute value they can (dudect: Reparaz, Balasch, Verbauwhede 2017). A
comparison character by character is measured beside it, to see that the method would find one.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence

from serve_app.gateway.auth import KeyRejected, authenticate
from serve_app.keys import KeyTable, KeyWish, new_key

LEAKS_ABOVE = 4.5
# Interruptions of the process are no property of the key: the slowest part is left out.
KEPT_RATIO = 0.9
KEYS = 1000
SECRET_FROM = len("hr-abcdefgh-")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", type=int, default=200_000, help="of each kind")
    checks: int = parser.parse_args().checks
    made = [new_key(KeyWish("k"), 0.0) for _ in range(KEYS)]
    table = KeyTable([record for _, record in made], 1)
    secrets = [secret for secret, _ in made]

    def ours(key: str) -> None:
        try:
            authenticate([(b"authorization", b"Bearer " + key.encode())], table, 1.0)
        except KeyRejected:
            return
        raise AssertionError("a wrong key was let in")

    def character_by_character(key: str) -> None:
        for own, other in zip(key, secrets[0], strict=True):
            if own != other:
                return

    print(f"{checks} checks of each kind, {KEYS} keys in the table\n")
    print("| check | first wrong, ns | last wrong, ns | Welch's t | |")
    print("|---|---|---|---|---|")
    for name, check in (("authenticate", ours), ("character by character", character_by_character)):
        print(row(name, *times(check, secrets[0], checks)))


def times(check: Callable[[str], None], secret: str, checks: int) -> tuple[list[int], list[int]]:
    """Return how long checks of keys wrong at the first and at the last character took, ns."""
    wrong = [changed(secret, SECRET_FROM), changed(secret, len(secret) - 1)]
    order = [0, 1] * checks
    random.Random(1).shuffle(order)
    found: tuple[list[int], list[int]] = ([], [])
    clock = time.perf_counter_ns
    gc.disable()
    try:
        for kind in order:
            key = wrong[kind]
            begin = clock()
            check(key)
            found[kind].append(clock() - begin)
    finally:
        gc.enable()
    return found


def changed(secret: str, where: int) -> str:
    """Return the key with another character there."""
    return secret[:where] + ("A" if secret[where] != "A" else "B") + secret[where + 1 :]


def row(name: str, first: Sequence[int], last: Sequence[int]) -> str:
    """Return a row of the table."""
    kept = [sorted(each)[: int(KEPT_RATIO * len(each))] for each in (first, last)]
    t = welch(*kept)
    means = " | ".join(f"{statistics.fmean(each):.1f}" for each in kept)
    verdict = "told apart" if abs(t) > LEAKS_ABOVE else "not told apart"
    return f"| {name} | {means} | {t:.1f} | {verdict} |"


def welch(first: Sequence[int], second: Sequence[int]) -> float:
    """Return Welch's t of two samples: the difference of their means over its standard error."""
    errors = [statistics.variance(each) / len(each) for each in (first, second)]
    return (statistics.fmean(first) - statistics.fmean(second)) / sum(errors) ** 0.5


if __name__ == "__main__":
    main()
