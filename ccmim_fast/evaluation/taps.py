"""Which blocks of an encoder a dense predictor looks at."""

Shares = tuple[tuple[int, int], ...]  # numerator and denominator

OUTPUTS: Shares = ((1, 3), (1, 2), (2, 3), (1, 1))  # blocks 3 5 7 11 of 12, 7 11 15 23 of 24; BEiT, CAE
QUARTERS: Shares = ((1, 4), (1, 2), (3, 4), (1, 1))  # blocks 2 5 8 11 of 12; where ViTDet attends globally


def blocks_at(depth: int, shares: Shares) -> tuple[int, ...]:
    """Indices of the last block of each share of an encoder; of a shallow one some come twice."""
    return tuple(-(-depth * part // whole) - 1 for part, whole in shares)
