"""Means over seeds and paired differences, with 95 % confidence intervals from Student's t distribution."""

from dataclasses import dataclass

import pandas as pd
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over n seeds and half the width of its confidence interval (None for a single seed)."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def holds_zero(self) -> bool | None:
        """Whether the interval contains zero: if so, a difference is not distinguishable. None for a single seed."""
        return None if self.half is None else self.low <= 0 <= self.high


def estimate(values: pd.Series) -> Estimate | None:
    """The mean over the seeds that have a value; None if none has."""
    x = values.dropna().astype(float)
    if x.empty:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * stats.sem(x)) if len(x) > 1 else None
    return Estimate(mean=float(x.mean()), half=half, n=len(x))


def of_variant(table: pd.DataFrame, column: str, variant: str) -> Estimate | None:
    """The mean of a column over the variant's seeds; None if it was not measured."""
    return estimate(_by_seed(table, column, variant)) if column in table else None


def difference(table: pd.DataFrame, column: str, variant: str, baseline: str) -> Estimate | None:
    """Variant minus baseline, paired over the seeds that both have; None if there are none."""
    if column not in table:
        return None
    return estimate(_by_seed(table, column, variant) - _by_seed(table, column, baseline))


def _by_seed(table: pd.DataFrame, column: str, variant: str) -> pd.Series:
    rows = table[table["variant"] == variant]
    return pd.Series(rows[column].to_numpy(), index=rows["seed"])
