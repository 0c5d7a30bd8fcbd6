"""How numbers read in the report."""

import math

_MINUS = "−"


def compact(value: float) -> str:
    """About four significant digits, e.g. "0.03125", "12,480", "3.1e−7", "nan"."""
    if not math.isfinite(value):
        return str(value).replace("-", _MINUS)
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}".replace("-", _MINUS)
    if 1e-3 <= abs(value) < 9999.5:  # beyond it, four digits round up to five
        return f"{value:.4g}".replace("-", _MINUS)
    if 9999.5 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace("-", _MINUS)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", _MINUS)


def percent(value: float) -> str:
    """A rate with one decimal, e.g. 0.1534 as "15.3 %"."""
    return f"{value:.1%}".replace("%", "\N{NO-BREAK SPACE}%").replace("-", _MINUS)


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign, e.g. "−2.4"."""
    return f"{100 * difference:+.1f}".replace("-", _MINUS)


def signed(value: float) -> str:
    """Two decimals with the sign, e.g. "+1.25"; "nan" has none."""
    return f"{value:+.2f}".replace("-", _MINUS) if math.isfinite(value) else compact(value)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as far as they matter, e.g. "2 h 05 min", "3 min 20 s", "12 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole // 60 % 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
