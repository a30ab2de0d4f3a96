"""Numbers in; text with as many digits as they are good for, and how far to believe them, out."""

Z = 1.959964  # of a normal distribution, 95 % lie within so many deviations


def percent(share: float, n: int | None) -> str:
    """Return a share of n images in percent, in steps no finer than a tenth of an image or so.

    Args:
        share: in 0..1.
        n: how many images; None where nobody knows, which gives two digits.
    """
    digits = 2 if n is None or n >= 10_000 else 1 if n >= 100 else 0
    return f"{share:.{digits}%}"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the interval in which a share of n lies with 95 % (Wilson, 1927)."""
    middle, width = share + Z**2 / (2 * n), share * (1 - share) / n + Z**2 / (4 * n**2)
    low, high = ((middle + side * Z * width**0.5) / (1 + Z**2 / n) for side in (-1, 1))
    return low, high
