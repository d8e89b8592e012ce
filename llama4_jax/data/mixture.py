"""Which source each row comes from, so that the shares by source are exact at every moment.

After n rows a source of share w has given between n * w - 1 and n * w + 1 of them, both excluded, whatever n, w and the number
of sources; so in any window of n consecutive rows it has given its share to within two. Nothing is drawn at random: the same
weights give the same order. R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): the source with
the earliest deadline among those that are due enough, which keeps the error below 1 - 1 / (2 k - 2) with k sources.
"""

import math
from collections.abc import Sequence
from fractions import Fraction


class Interleave:
    """Endless sequence of source indices. The state is how often each source has come."""

    def __init__(self, weights: Sequence[float]):
        """`weights` are positive; their sum need not be 1. They are taken as the decimals that they print as."""
        weights = [Fraction(repr(float(weight))) for weight in weights]
        shares = [weight / sum(weights) for weight in weights]
        self._denominator = math.lcm(*(share.denominator for share in shares))
        self._numerators = [int(share * self._denominator) for share in shares]
        self.counts = [0] * len(shares)

    def next(self) -> int:
        """The index of the source that gives the next row."""
        rows, one = sum(self.counts) + 1, self._denominator
        scale = max(2 * len(self.counts) - 2, 1)
        chosen, chosen_slack = None, 0
        for i, (share, count) in enumerate(zip(self._numerators, self.counts, strict=True)):
            lag = share * rows - one * count  # times 1 / one: the rows that the source is behind
            if scale * lag < one:
                continue
            slack = (scale - 1) * one - scale * lag  # over `share`: how long the source may still wait
            if chosen is None or slack * self._numerators[chosen] < chosen_slack * share:
                chosen, chosen_slack = i, slack
        self.counts[chosen] += 1
        return chosen
