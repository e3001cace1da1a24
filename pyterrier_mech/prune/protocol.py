"""What criteria and recoveries are, what they may ask for, and the checks before they work."""

from __future__ import annotations

from typing import Any, Protocol

import pandas as pd

from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.ranker import Ranker

_NEEDS = {
    'text': 'queries and texts: fit on a result frame with texts, as in (bm25 % 50 >> text >> pruned).fit(topics, '
    'qrels, …)',
    'text_0': 'a second version of each text: put Perturb(...) before the stage, or give perturbation=',
    'qrels': 'judgements: give qrels to fit, or take a criterion that does without',
}


class Criterion(Protocol):
    """A rule that says how much every head and neuron is worth keeping.

    Criteria are small values: equal if their settings are, printed as the call that makes them. One that has a method
    `check()` has its settings checked by it before any work; one that has `qids`, or a `circuit` with such, tells the
    queries that these were found on.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: some of 'text', 'text_0' and 'qrels'."""

    def scores(self, model: Ranker, data: FitData) -> UnitScores:
        """Scores every unit of a ranker, which is left as it is.

        Args:
            model: A ranker.
            data: What may be looked at; None where nothing is needed.

        Raises:
            ValueError: If the data lacks what the criterion needs, before any work.
        """


class Recovery(Protocol):
    """What repairs a pruned ranker, which it may change: `Rescaling`, `Distillation`, `FineTuning`."""

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: some of 'text' and 'qrels'."""

    def recover(
        self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None
    ) -> pd.DataFrame | None:
        """Changes the weights of `student`; returns a history, if there is one."""


def check_step(step: Any, data: FitData | None) -> None:
    """Checks the settings of a criterion or recovery, and that the data has what it needs.

    Raises:
        ValueError: If not; the message names the setting, or what is missing and the way out.
    """
    if hasattr(step, 'check'):
        step.check()
    for need, what in _NEEDS.items():
        if need in step.needs and (data is None or not data.has(need)):
            raise ValueError(f'{type(step).__name__} needs {what}. It is {step!r}.')


def check_logits(step: Any, model: Ranker) -> None:
    """Checks that a step whose loss takes scores for log-odds, as its `logistic` says, gets such.

    Raises:
        ValueError: If the scores are probabilities.
    """
    if getattr(step, 'logistic', False) and getattr(model, 'target', 'logit') == 'probability':
        raise ValueError(
            f'{type(step).__name__} compares scores by a logistic loss, which takes logits; those of this ranker are '
            "probabilities: give it with target='logit'"
        )


def check_method(name: str, step: Any, method: str, examples: str) -> None:
    """Checks that a setting is an object that can do its work.

    Raises:
        TypeError: If not.
    """
    if isinstance(step, type) or not callable(getattr(step, method, None)) or not hasattr(step, 'needs'):
        raise TypeError(f'{name} must be an object with {method}(...), such as {examples}; got {step!r}')


def at_least(least: int, step: Any, *names: str) -> None:
    """Checks that settings, where there are any, are not below a number.

    Raises:
        ValueError: If one is.
    """
    for name in names:
        value = getattr(step, name)
        if value is not None and not value >= least:
            raise ValueError(f'{name} must be {least} or more; got {name}={value!r}')


def above_zero(step: Any, *names: str) -> None:
    """Checks that settings are above 0.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        if not getattr(step, name) > 0:
            raise ValueError(f'{name} must be above 0; got {name}={getattr(step, name)!r}')


def check_share(name: str, value: Any, example: str) -> None:
    """Checks that a setting is a share between 0 and 1.

    Raises:
        ValueError: If not.
    """
    if value is None or not 0 < value < 1:
        raise ValueError(f'{name} must be a share between 0 and 1; got {name}={value!r}. {example}')
