"""pass@k: the probability that one of k runs of a task succeeds, from n >= k runs of it.

The unbiased estimator of Chen et al. 2021 (https://arxiv.org/abs/2107.03374, equation 1): with c of n runs right,
1 - C(n - c, k) / C(n, k). It is not 1 - (1 - c/n)^k, which is biased downwards. mean@n is the mean over the n runs, the
same as pass@1.

Example::

    pass_at_k(n=10, right=3, k=5)          # 0.917
    ks(8)                                  # (1, 2, 4, 8)
"""

from __future__ import annotations

import math


def pass_at_k(*, n: int, right: int, k: int) -> float:
    """Of one task. Raises `ValueError` unless 0 <= right <= n and 1 <= k <= n."""
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= right <= n and 1 <= k <= n, not right={right}, k={k}, n={n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ks(n: int) -> tuple[int, ...]:
    """The k to report for n runs a task: powers of two below n, and n itself."""
    if n < 1:
        raise ValueError(f"there is no k for {n} runs")
    return (*(2**i for i in range((n - 1).bit_length())), n) if n > 1 else (1,)
