"""The four steps of pruning as one estimator: scores, a plan, surgery, recovery."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.anatomy.resizing import check_resizable
from pyterrier_mech.columns import FITTED_ON
from pyterrier_mech.evaluation.runs import refuse_seen
from pyterrier_mech.evaluation.stats import Comparison, compare
from pyterrier_mech.frames import require, strings
from pyterrier_mech.prune.criteria import Criterion, Recovery, check_needs
from pyterrier_mech.prune.criteria.gradient import Fisher
from pyterrier_mech.prune.data import FitData, fit_data
from pyterrier_mech.prune.encoded import Encoded
from pyterrier_mech.prune.plans.latency import corrected, latency_costs
from pyterrier_mech.prune.plans.plan import Plan
from pyterrier_mech.prune.plans.planning import check_budget, check_plan_settings, make_plan
from pyterrier_mech.prune.recovery.rescaling import Rescaling
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.storing import HISTORY, Fitted
from pyterrier_mech.prune.surgery import prune_units
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import Units


class PrunedReranker(pt.Artifact, pt.Estimator):
    """A ranker from which the heads and neurons that matter least are taken, so that it is smaller and faster.

    `fit` scores all units with a criterion, makes a plan under a budget, removes the other units physically, and
    repairs what is left. The result is a ranker, `model_`, that every analysis accepts, and this stage re-ranks with
    it.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Args:
        model: A ranker, which stays as it is; or the folder of a saved `PrunedReranker`, which needs no `fit`.
        criterion: What says how much a unit is worth: `Fisher()` (the default), `Taylor`, `Conductance`, `Patching`,
            `SMA`, `L0`, `Movement`, `Magnitude` or `Random`.
        sparsity: The share of the cost of the encoder's layers that goes, between 0 and 1; by default 0.5.
        budget: What the cost is: 'flops' (that scoring executes), 'parameters', or 'latency' (measured time).
        speedup: For 'latency', instead of a sparsity: how many times as fast the ranker shall be.
        allocation: How it is spread over layers: 'global', 'adaptive' or 'uniform'; see `make_plan`.
        protect: Units that stay whatever their score; e.g. a `Circuit`.
        multiple: Layers keep a multiple of so many neurons, or all or none.
        plan: A plan for this model, instead of criterion and budget.
        recovery: What is done after surgery, in this order: by default `Rescaling()` alone, which needs no labels.
        text_field: Column of the text; by default as the model has it.

    Attributes:
        plan_: The `Plan`: what stays, layer by layer.
        model_: The pruned ranker.
        scores_: The `UnitScores` of the criterion (None with a given plan, or after loading).
        history_: For each recovery that trains, one row a validation: `recovery`, `step`, `loss`, `validation`.
        qids_: Queries that had a say, sorted, as strings: those that `fit` has seen, and those that a protected circuit
            was found on or a given plan was made with. `compare` refuses to judge on them, and the ranked
            frame carries them in its `attrs`, so that `stats.compare` refuses too.

    Raises:
        TypeError: If the model is neither; by `fit`, before any work, if a step is no criterion or recovery.
        ValueError: By `fit`, before any work: if a setting is out of range, the data lacks what a step needs,
            judgements are of other topics, training and validation topics overlap, the model's family cannot be cut,
            or the plan is for another model. If the budget is less than what must stay.
        FileNotFoundError: If the folder is not there.
    """

    ARTIFACT_TYPE = 'pruned_reranker'
    ARTIFACT_FORMAT = 'mech'
    ARTIFACT_PACKAGE_HINT = 'pyterrier-mech'

    plan_: Plan
    model_: Ranker
    scores_: UnitScores | None
    history_: pd.DataFrame
    qids_: list[str]

    def __init__(
        self,
        model: Ranker | str | Path,
        criterion: Criterion | None = None,
        sparsity: float | None = None,
        *,
        budget: str = 'flops',
        speedup: float | None = None,
        allocation: str = 'global',
        protect: Any = (),
        multiple: int = 32,
        plan: Plan | None = None,
        recovery: Recovery | Sequence[Recovery] = (Rescaling(),),
        text_field: str | None = None,
    ):
        """Stores the settings; reads the folder, if it is one."""
        if not isinstance(model, (Ranker, str, Path)):
            raise TypeError(f'{type(model).__name__} is no ranker: give a CrossEncoder or BiEncoder, or a saved folder')
        super().__init__(pt.Artifact.NO_PATH if isinstance(model, Ranker) else model)
        self.model = model
        self.criterion = criterion
        self.sparsity = sparsity
        self.budget = budget
        self.speedup = speedup
        self.allocation = allocation
        self.protect = protect
        self.multiple = multiple
        self.plan = plan
        self.recovery = recovery
        self.text_field = text_field
        if not isinstance(model, Ranker):
            fitted = Fitted.load(Path(model), type(self))
            self.plan_, self.model_, self.scores_ = fitted.plan, fitted.model, None
            self.history_, self.qids_ = fitted.history, fitted.qids

    # -- fitting

    def fit(
        self,
        topics_or_res_tr: pd.DataFrame,
        qrels_tr: pd.DataFrame | None = None,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
    ) -> None:
        """Chooses, removes and repairs.

        Args:
            topics_or_res_tr: Rows to score units and to train on: qid, query, docno, text, as a pipeline before this
                stage gives them. Where `Perturb` stands before, what compares both versions of a text reads both, and
                everything else the original text.
            qrels_tr: Their judgements, where a step needs them.
            topics_or_res_va: Rows of other queries, for early stopping.
            qrels_va: Their judgements.
        """
        model = self._checked_model()
        data = fit_data(topics_or_res_tr, qrels_tr, model, self._text)
        validation = None
        if topics_or_res_va is not None and len(topics_or_res_va):
            validation = fit_data(topics_or_res_va, qrels_va, model, self._text)
        self._check_steps(data, validation)
        plan, scores = self.plan, None
        if plan is None:
            plan, scores = self._choose(model, data)
        student = prune_units(model, plan.heads, plan.neurons)
        student.text_field = self._text
        histories = [pd.DataFrame(columns=list(HISTORY))]
        for recovery in self._recoveries:
            history = recovery.recover(student, model, data.plain, validation and validation.plain)
            if history is not None:
                histories.append(history.assign(recovery=type(recovery).__name__)[list(HISTORY)])
        filled = [history for history in histories if len(history)] or histories
        self.history_ = pd.concat(filled, ignore_index=True)
        self.plan_, self.scores_, self.model_ = plan, scores, student
        self.qids_ = sorted({*self._chosen_on(data), *([] if validation is None else validation.qids)})
        # With the module it goes wherever the ranker goes, also into the saved configuration.
        student.encoder.module.config.fitted_on = self.qids_
        # What lies there, if anything, was fitted before.
        self.path = pt.Artifact.NO_PATH

    @property
    def _criterion(self) -> Criterion:
        return self.criterion if self.criterion is not None else Fisher()

    @property
    def _recoveries(self) -> tuple[Recovery, ...]:
        return tuple(self.recovery) if isinstance(self.recovery, Iterable) else (self.recovery,)

    @property
    def _sparsity(self) -> float | None:
        return 0.5 if self.sparsity is None and self.speedup is None else self.sparsity

    def _checked_model(self) -> Ranker:
        """Returns the ranker to prune, if the settings are for it."""
        if not isinstance(self.model, Ranker):
            raise ValueError(f'{str(self.model)!r} is fitted already: to prune it again, give its model_')
        check_resizable(self.model.encoder.base.config.model_type)
        if self.plan is not None:
            if (self.criterion, self.sparsity, self.speedup) != (None, None, None):
                raise ValueError('a plan takes the place of criterion, sparsity and speedup: leave them out')
            self.plan.check(self.model)
            gone = self.plan.removed & Units.of(self.protect)
            if gone:
                raise ValueError(f'the plan removes {gone.names[0]}, which is protected: leave protect out')
        else:
            check_plan_settings(self.model, self._sparsity, allocation=self.allocation, **self._budget)
        return self.model

    @property
    def _budget(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ('budget', 'speedup', 'protect', 'multiple')}

    def _check_steps(self, data: FitData, validation: FitData | None) -> None:
        """Checks that the data has what every step needs."""
        steps: list[tuple[str, Any]] = [('recover', recovery) for recovery in self._recoveries]
        if self.plan is None:
            steps.insert(0, ('scores', self._criterion))
        for method, step in steps:
            if isinstance(step, type) or not hasattr(step, method):
                raise TypeError(f'{step!r} has no {method}(...): give an object, e.g. Fisher() or Rescaling()')
            check_needs(step, data)
            if hasattr(step, 'check'):
                step.check()
            if 'qrels' in step.needs:
                data.labels()
        both = set() if validation is None else data.qids & validation.qids
        if both:
            raise ValueError(f'{len(both)} queries are in both training and validation, e.g. {min(both)!r}')

    def _choose(self, model: Ranker, data: FitData) -> tuple[Plan, UnitScores]:
        """Scores the units and makes a plan, once it is clear that there is one."""
        costs: dict[str, Any] = {
            'tokens': Encoded.of(model, data.plain.queries, data.plain.texts).mean_length,
            'latency': latency_costs(model, data.plain.frame, text_field='text') if self.budget == 'latency' else None,
        }
        check_budget(model, self._sparsity, **self._budget, **costs)
        scores = self._criterion.scores(model, data)
        settings = {**self._budget, **costs, 'allocation': self.allocation}
        if self.budget == 'latency':
            asked = self.speedup if self.speedup is not None else 1 / (1 - (self._sparsity or 0.0))
            plan = corrected(
                lambda speedup: make_plan(model, scores, **{**settings, 'speedup': speedup}),
                asked,
                model,
                data.plain.frame,
                'text',
            )
        else:
            plan = make_plan(model, scores, self._sparsity, **settings)
        told = {
            'sparsity': self._sparsity,
            'speedup': self.speedup,
            'criterion': repr(self._criterion),
            'qids': sorted(self._chosen_on(data)),
        }
        return replace(plan, settings={**plan.settings, **told}), scores

    def _chosen_on(self, data: FitData) -> set[str]:
        """Returns the queries that had a say in what stays or in its weights, but for validation."""
        # A ranker that was pruned before says on what.
        qids = data.qids | set(_before(self.model))
        for source in (self.protect, self.criterion, getattr(self.criterion, 'circuit', None)):
            qids |= set(map(str, getattr(source, 'qids', ())))
        return qids | set(map(str, self.plan.settings.get('qids', ()) if self.plan is not None else ()))

    # -- ranking and judging

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame with the pruned ranker."""
        require(inp, self, ['query', self._text])
        if not len(inp) and not self.fitted:
            return pt.model.add_ranks(inp.assign(score=np.zeros(0, dtype=np.float32)))
        model = self._fitted()
        scores = model.score(strings(inp, 'query', self), strings(inp, self._text, self))
        res = pt.model.add_ranks(inp.assign(score=scores))
        # A pruned ranker may stand before this one.
        res.attrs[FITTED_ON] = sorted({*res.attrs.get(FITTED_ON, ()), *self.qids_})
        return res

    def compare(self, frame: pd.DataFrame, qrels: pd.DataFrame, measures: Sequence[Any], **settings: Any) -> Comparison:
        """Judges the pruned ranker against the unpruned one on queries that `fit` has not seen.

        Args:
            frame: Rows to re-rank: qid, query, docno, text.
            qrels: Judgements.
            measures: As `pt.Experiment` takes them.
            **settings: As `stats.compare` takes them.

        Raises:
            TypeError: If the unpruned ranker is not there, as after loading.
            ValueError: If `fit` has seen a query of the frame.
        """
        pruned = self._fitted()
        if not isinstance(self.model, Ranker):
            raise TypeError(
                'the unpruned ranker is not saved: compare runs of both with pyterrier_mech.evaluation.stats.compare'
            )
        require(frame, self, ['query', self._text])
        refuse_seen(set(frame['qid'].astype(str)) & set(qrels['qid'].astype(str)), self.qids_, {})
        pairs = strings(frame, 'query', self), strings(frame, self._text, self)
        before, after = (frame[['qid', 'docno']].assign(score=ranker.score(*pairs)) for ranker in (self.model, pruned))
        return compare(before, {'pruned': after}, qrels, measures, fitted_on=self.qids_, **settings)

    @property
    def fitted(self) -> bool:
        """Whether there is a pruned ranker."""
        return hasattr(self, 'model_')

    def _fitted(self) -> Ranker:
        if not self.fitted:
            raise ValueError(f'{self!r} has not been fitted: call fit(res, qrels, …), or load one that was saved')
        return self.model_

    # -- saving

    def save(self, path: str | Path, *, overwrite: bool = False) -> PrunedReranker:
        """Saves plan and small weights; `PrunedReranker(path)` and `pt.Artifact.load(path)` read them back.

        The folder appears when it is complete, or not at all. The unpruned checkpoint is not needed to load it, and
        the subfolder `ranker` alone is a model that `CrossEncoder` or `BiEncoder` loads.

        Args:
            path: The folder to make.
            overwrite: Whether to replace a pruned ranker that was saved there before. Nothing else is ever replaced.

        Returns:
            This object, whose `path` is now the folder.

        Raises:
            FileExistsError: If `path` exists and may not be replaced.
            ValueError: If there is nothing to save yet.
        """
        fitted = Fitted(self._fitted(), self.plan_, self.history_, self.qids_)
        fitted.save(Path(path), type(self), repr(self), overwrite=overwrite)
        self.path = Path(path)
        return self

    # -- how the stage is shown

    @property
    def _text(self) -> str:
        if self.text_field is not None:
            return self.text_field
        return (self.model if isinstance(self.model, Ranker) else self.model_).text_field

    def __repr__(self) -> str:
        """Tells the settings that differ from the defaults."""
        if not isinstance(self.model, Ranker):
            return f'{type(self).__name__}({str(self.model)!r})'
        shown = [repr(self.model)]
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if name != 'model' and value is not parameter.default and value != parameter.default:
                shown.append(f'{name}={value!r}')
        return f'{type(self).__name__}({", ".join(shown)})'

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        return {'label': type(self).__name__, 'help_url': None}


def _before(model: Any) -> list[str]:
    """Returns the queries that a ranker was pruned on before, if it was."""
    return getattr(model.encoder.module.config, 'fitted_on', None) or []
