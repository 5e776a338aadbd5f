"""Statistics of a report: means and paired differences with their intervals, and verdicts."""

import re

import pandas as pd
import pytest
from planted import planted, study
from scipy import stats

from scripts.report import statistics
from scripts.report.collect import collect
from scripts.report.tables import compared, megabytes, spread


def test_a_planted_difference_is_found_and_a_planted_null_is_not(planted_study):
    c = collect([planted_study])
    assert compared(c, "val_perplexity", "full") == "baseline"
    assert re.fullmatch(r"\+0\.4\d+ ± 0\.0\d+", compared(c, "val_perplexity", "narrow"))
    assert compared(c, "val_perplexity", "wide").endswith(", not distinguishable")


def test_a_difference_smaller_than_the_spread_of_seeds_is_found_in_pairs_alone(planted_study):
    c = collect([planted_study])
    one, other = (c.results[c.results.variant == v]["val_loss"] for v in ("narrow", "full"))
    assert stats.ttest_ind(one, other).pvalue > 0.1
    assert statistics.difference(c.results, "val_loss", "narrow", "full").holds_zero is False


def test_the_interval_is_that_of_a_paired_t_test():
    table = pd.DataFrame(
        {"variant": list("aaaabbbb"), "seed": [1, 2, 3, 4, 4, 3, 2, 1], "x": [1.0, 2.5, 3.1, 4.2, 4.0, 3.0, 2.0, 1.0]}
    )
    found = statistics.difference(table, "x", "a", "b")
    expected = stats.ttest_rel([1.0, 2.5, 3.1, 4.2], [1.0, 2.0, 3.0, 4.0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.n == 4


def test_the_interval_of_a_mean_is_students():
    x = [3.0, 3.4, 2.9]
    found = statistics.estimate(pd.Series(x))
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval(0.95)))


def test_only_seeds_that_both_have_are_compared():
    table = pd.DataFrame({"variant": list("aaabb"), "seed": [1, 2, 3, 2, 3], "x": [100.0, 2.0, 3.0, 1.0, 2.0]})
    found = statistics.difference(table, "x", "a", "b")
    assert (found.mean, found.half, found.n) == (1.0, 0.0, 2)
    assert found.holds_zero is False


def test_equal_results_are_not_distinguishable():
    table = pd.DataFrame({"variant": list("aabb"), "seed": [1, 2, 1, 2], "x": [5.0, 6.0, 5.0, 6.0]})
    assert statistics.difference(table, "x", "a", "b").holds_zero is True


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0, pattern="full", window=None), planted(tmp_path, "narrow", 1, 3.5)]
    c = collect([study(tmp_path, cells)])
    assert statistics.of_variant(c.results, "val_loss", "narrow").half is None
    assert compared(c, "val_perplexity", "narrow") == "+13.03, one seed: no interval"


def test_variants_without_a_common_seed_are_not_compared(tmp_path):
    cells = [planted(tmp_path, "full", 1, 3.0, pattern="full", window=None), planted(tmp_path, "narrow", 2, 3.5)]
    assert compared(collect([study(tmp_path, cells)]), "val_perplexity", "narrow") == "no common seed"


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (12.3456, 0.0789, "12.346 ± 0.079"),
        (12.3456, 7.89, "12.3 ± 7.9"),
        (12345.6, 789.0, "12,346 ± 789"),
        (0.5, 1e-9, "0.500000 ± 0.000000"),
        (1234.56, None, "1,234.6"),
        (1.23456, 0.0, "1.235"),
    ],
)
def test_a_mean_is_shown_to_the_digits_that_its_interval_leaves(mean, half, shown):
    assert spread(statistics.Estimate(mean=mean, half=half, n=3)) == shown


def test_what_was_not_measured_is_said_to_be_so():
    assert (spread(None), megabytes(None)) == ("not measured", "not measured")
