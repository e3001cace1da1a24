"""Measures for `pt.Experiment`: the public name of `pyterrier_mech.evaluation.measures`."""

from pyterrier_mech.evaluation.measures import AxiomAgreement, KendallTau, RankChange, ScoreChange

__all__ = ['AxiomAgreement', 'KendallTau', 'RankChange', 'ScoreChange']
