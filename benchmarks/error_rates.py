"""How often findings are judged wrongly: `uv run python benchmarks/error_rates.py`.

Draws many studies, each from a law of its own, and judges all findings of all documents by seeds
drawn in memory. In `mixed` each finding is planted to be upheld, contradicted or left open. In
`edge` each lies on the border between right and wrong, where verdicts are wrong most often. In
`alone` each finding lies on that border in a study of its own, where no other finding makes the
correction for many tests stricter.

Findings that are judged by p values are one family for each document: the share of documents with
any false verdict is at most 0.05 (Holm). The others have a verdict of their own: the share of those
that are false is at most 0.05, and so is that of each finding alone. Ends with status 1 where a
share is above, by more than chance.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from drawn_study import EDGES, MARGIN, OUTCOMES, Law, all_claims, frameworks_of, plant_all
from scipy import stats

from ptbench.analysis.claims import Claim, Values, judge_claims

NOMINAL = 0.05
RATES = (
    "any false upheld, documents",
    "any false contradicted, documents",
    "false upheld, own verdicts",
    "false contradicted, own verdicts",
)
SEEDS = 5


def truth_of(law: Law, claim: Claim) -> tuple[bool, bool]:
    """Return whether the law makes a finding false, and whether it makes all its tests true."""
    each = [
        law.truth(test, framework, MARGIN)
        for test in claim.tests
        for framework in frameworks_of(test)
    ]
    return any(false for false, _ in each), all(true for _, true in each)


def drawer(law: Law) -> Values:
    """Return what gives the seeds of each row, drawn once."""
    return cache(lambda row, metric: dict(enumerate(law.draw(row, metric, SEEDS))))


class Tally:
    """How many verdicts of one kind of law were false, of how many that could be."""

    def __init__(self) -> None:
        self.rates = {kind: [0, 0] for kind in RATES}
        self.findings: Counter[str] = Counter()

    def add(self, law: Law, claims: Sequence[Claim]) -> None:
        """Judge the findings of one document by seeds drawn from the law, and count."""
        false_in_family = {"upheld": False, "contradicted": False}
        for result in judge_claims(claims, drawer(law), MARGIN):
            is_false, is_true = truth_of(law, result.claim)
            for verdict, could_be in (("upheld", is_false), ("contradicted", is_true)):
                is_wrong = could_be and result.verdict == verdict
                self.findings[f"{result.claim.id} {verdict}"] += is_wrong
                if any(test.has_p for test in result.claim.tests):
                    false_in_family[verdict] |= is_wrong
                else:
                    self._count(f"false {verdict}, own verdicts", is_wrong, could_be)
        for verdict, is_wrong in false_in_family.items():
            self._count(f"any false {verdict}, documents", is_wrong, True)

    def _count(self, rate: str, is_wrong: bool, could_be: bool) -> None:
        self.rates[rate][0] += is_wrong
        self.rates[rate][1] += could_be

    def show(self) -> bool:
        """Print the rates; return whether all are at most nominal, but for chance."""
        good = True
        for name, (count, total) in self.rates.items():
            test = stats.binomtest(count, total, NOMINAL, alternative="greater")
            good &= test.pvalue >= 0.001
            print(f"  {name}: {count} of {total}, {count / total:.3f}")
        often = ", ".join(f"{name} {count}" for name, count in self.findings.most_common(6))
        print(f"  most often: {often}", flush=True)
        return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    documents = [[c for c in claims if c.tests] for claims in all_claims().values() if claims]
    good = True
    for name, outcomes in {"edge": EDGES, "mixed": OUTCOMES}.items():
        tally, begun = Tally(), time.process_time()
        for number in range(arguments.studies):
            law = Law(np.random.default_rng([arguments.seed, number, len(outcomes)]))
            plant_all(law, outcomes)
            for claims in documents:
                tally.add(law, claims)
        seconds = time.process_time() - begun
        print(
            f"{name}: {arguments.studies} studies in {seconds:.0f} s of processor time", flush=True
        )
        good &= tally.show()
    good &= judge_alone([claim for claims in documents for claim in claims], arguments)
    sys.exit(not good)


def judge_alone(claims: Sequence[Claim], arguments: argparse.Namespace) -> bool:
    """Print how often findings are judged wrongly, each alone; return whether none is too often."""
    begun = time.process_time()
    wrong: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    for number in range(arguments.studies // 2):
        random = np.random.default_rng([arguments.seed, number])
        for claim in claims:
            for outcome, verdict in zip(EDGES, ("upheld", "contradicted"), strict=True):
                law = Law(random)
                law.plant(claim, outcome)
                if not truth_of(law, claim)[outcome == "just true"]:
                    continue  # tests that share rows cannot all be planted at once

                [result] = judge_claims([claim], drawer(law), MARGIN)
                drawn[f"{claim.id} {verdict}"] += 1
                wrong[f"{claim.id} {verdict}"] += result.verdict == verdict
    seconds = time.process_time() - begun
    print(f"alone: {sum(drawn.values())} verdicts in {seconds:.0f} s of processor time", flush=True)
    for name in sorted(drawn, key=lambda each: wrong[each] / drawn[each], reverse=True)[:8]:
        print(f"  {name}: {wrong[name]} of {drawn[name]}, {wrong[name] / drawn[name]:.3f}")
    above = [
        name
        for name, total in drawn.items()
        if stats.binomtest(wrong[name], total, NOMINAL, alternative="greater").pvalue
        < 0.001 / len(drawn)
    ]
    print(f"  above the nominal rate: {', '.join(above) or 'none'} of {len(drawn)}")
    return not above


if __name__ == "__main__":
    main()
