"""Rankers compared over queries, and what they cost: public names of `pyterrier_mech.evaluation`."""

from pyterrier_mech.evaluation.bootstrap import Interval, bootstrap_by_query
from pyterrier_mech.evaluation.comparison import Comparison, compare, holm
from pyterrier_mech.evaluation.efficiency import efficiency

__all__ = ['Comparison', 'Interval', 'bootstrap_by_query', 'compare', 'efficiency', 'holm']
