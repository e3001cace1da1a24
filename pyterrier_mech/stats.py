"""Uncertainty over queries: the public name of `pyterrier_mech.evaluation.stats`."""

from pyterrier_mech.evaluation.stats import Comparison, Interval, bootstrap_by_query, compare, holm

__all__ = ['Comparison', 'Interval', 'bootstrap_by_query', 'compare', 'holm']
