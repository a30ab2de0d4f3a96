"""A share of images in; text with as many digits as it deserves, and its interval, out."""

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


def percent(share: float, n: int | None) -> str:
    """Return a share of n images in percent, with the digits that n images justify.

    Args:
        share: in 0..1.
        n: number of images; None where it is unknown, which gives two digits.
    """
    digits = 2 if n is None or n >= 10_000 else 1 if n >= 100 else 0
    return f"{share:.{digits}%}"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval, in 0..1, of a share of n images (Wilson, 1927)."""
    middle, width = share + Z**2 / (2 * n), share * (1 - share) / n + Z**2 / (4 * n**2)
    low, high = ((middle + side * Z * width**0.5) / (1 + Z**2 / n) for side in (-1, 1))
    return low, high
