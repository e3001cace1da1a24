"""The four steps of pruning as one estimator: scores, a plan, surgery, recovery."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech.draws import digest
from pyterrier_mech.evaluation.comparison import Comparison, compare
from pyterrier_mech.evaluation.runs import as_measures, judgements, refuse_seen
from pyterrier_mech.frames import texts_of
from pyterrier_mech.provenance import as_qids, with_seen
from pyterrier_mech.prune.criteria.gradient import Fisher
from pyterrier_mech.prune.data import FitData, fit_data
from pyterrier_mech.prune.plans.allocation import ALLOCATIONS
from pyterrier_mech.prune.plans.latency import corrected, latency_costs
from pyterrier_mech.prune.plans.plan import Plan, fingerprint
from pyterrier_mech.prune.plans.planning import BUDGETS, check_budget, check_plan_settings, make_plan
from pyterrier_mech.prune.protocol import Criterion, Recovery, check_logits, check_method, check_step
from pyterrier_mech.prune.recovery.rescaling import Rescaling
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.storing import HISTORY, Fitted, settings_of
from pyterrier_mech.prune.surgery import check_prunable, prune_units
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.stage import Stage, choice, units
from pyterrier_mech.units import Units


@dataclass(eq=False, repr=False)
class PrunedReranker(Stage, pt.Artifact, pt.Estimator):
    """A ranker from which the heads and neurons that matter least are taken, so that it is smaller and faster.

    `fit` scores all units with a criterion, makes a plan under a budget, removes the other units physically, and
    repairs what is left. The result is a ranker, `model_`, that every analysis accepts, and this stage re-ranks with
    it. `save` writes a folder, and `PrunedReranker.load(folder)` reads it without the unpruned model.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    A setting other than `text_field` that is changed after `fit` asks for another fit.

    Args:
        model: A ranker, which stays as it is.
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
        qids_: Queries that chose or trained it, sorted, as text: those that `fit` has seen, and those that a
            protected circuit was found on, a given plan was made with, or the model was fitted on before. They go with
            `model_` wherever it goes, and in the `attrs` of what it ranked: `compare` and `stats.compare` refuse to
            judge on them.
        name_: What tells the weights and settings of the pruned ranker from others'.

    Raises:
        TypeError: If the model is not a ranker, or a step is not a criterion, recovery or plan.
        ValueError: By `fit`, before any work: if a setting is out of range, the data lacks what a step needs,
            judgements contradict each other or are of other topics, training and validation topics overlap, units
            cannot be removed from the model, or the plan is for another one. If the budget is less than what must stay.
    """

    ARTIFACT_TYPE: ClassVar[str] = 'pruned_reranker'
    ARTIFACT_FORMAT: ClassVar[str] = 'mech'
    ARTIFACT_PACKAGE_HINT: ClassVar[str] = 'pyterrier-mech'

    model: Any
    criterion: Criterion | None = None
    sparsity: float | None = None
    _: KW_ONLY
    budget: str = choice(BUDGETS)
    speedup: float | None = None
    allocation: str = choice(tuple(ALLOCATIONS), 'global')
    protect: Any = units(default=())
    multiple: int = 32
    plan: Plan | None = None
    recovery: Recovery | Sequence[Recovery] = (Rescaling(),)
    text_field: str | None = None

    plan_: Plan = field(init=False)
    model_: Ranker = field(init=False)
    scores_: UnitScores | None = field(init=False)
    history_: pd.DataFrame = field(init=False)
    qids_: list[str] = field(init=False)
    name_: str = field(init=False)

    def __post_init__(self) -> None:
        """Checks the types of the settings."""
        self._check_types()
        self.path = pt.Artifact.NO_PATH

    @classmethod
    def load(cls, path: str | Path) -> PrunedReranker:  # type: ignore[override]
        """Reads what `save` wrote, as `pt.Artifact.load(path)` does; errors are those of `Fitted.load`."""
        fitted, stage = Fitted.load(Path(path), cls), object.__new__(cls)
        settings = {one.name: one.default for one in stage._fields() if one.name != 'model'}
        stage.__dict__.update(settings, model=None, path=Path(path))
        stage._keep(fitted)
        return stage

    # -- settings

    def check(self) -> None:
        """Checks the settings, as far as that goes without data."""
        self._check_types()
        super().check()

    def _check_types(self) -> None:
        if not isinstance(self.model, Ranker) and not (self.model is None and hasattr(self, 'model_')):
            load = f', or {type(self).__name__}.load(folder) for a saved one'
            raise TypeError(
                'model must be a ranker, such as CrossEncoder(name) or BiEncoder(name)'
                f'{load if isinstance(self.model, (str, Path)) else ""}; got {self.model!r}'
            )
        if self.criterion is not None:
            check_method('criterion', self.criterion, 'scores', 'Fisher() or Random()')
        for step in self._recoveries:
            check_method('recovery', step, 'recover', 'Rescaling() or Distillation()')
        if not isinstance(self.plan, (Plan, type(None))):
            raise TypeError(f'plan must be a Plan, such as Plan.load(file); got {self.plan!r}')
        for name in ('sparsity', 'speedup'):
            if not isinstance(getattr(self, name), (Real, type(None))):
                raise TypeError(f'{name} must be a number; got {name}={getattr(self, name)!r}')

    def key(self) -> tuple[Any, ...]:
        """Returns everything that the result depends on: the settings, and what was fitted with them."""
        return (*super().key(), *((self.plan_, self.name_) if self.fitted else ()))

    def _fitted_with(self) -> tuple[Any, ...]:
        """Returns the settings that a fit depends on."""
        return tuple(self._key(one) for one in self._fields() if one.name != 'text_field')

    def _key(self, one: Field[Any]) -> Any:
        # A ranker's settings may be changed in place.
        return self.model.key() if one.name == 'model' and self.model is not None else super()._key(one)

    @property
    def text(self) -> str:
        """Column of the text."""
        return self.text_field or (self.model_ if self.model is None else self.model).text_field

    @property
    def _criterion(self) -> Criterion:
        return Fisher() if self.criterion is None else self.criterion

    @property
    def _recoveries(self) -> tuple[Recovery, ...]:
        return tuple(self.recovery) if isinstance(self.recovery, Iterable) else (self.recovery,)

    @property
    def _sparsity(self) -> float | None:
        return 0.5 if self.sparsity is None and self.speedup is None else self.sparsity

    @property
    def _budget(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ('budget', 'speedup', 'protect', 'multiple')}

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
                stage gives them. Where `Perturb` stands before, what compares both versions of a row reads both, and
                everything else the original.
            qrels_tr: Their judgements, where a step needs them.
            topics_or_res_va: Rows of other queries, for early stopping.
            qrels_va: Their judgements.
        """
        model = self._checked_model()
        data = fit_data(topics_or_res_tr, qrels_tr, model, self.text)
        validation = None
        if topics_or_res_va is not None and len(topics_or_res_va):
            validation = fit_data(topics_or_res_va, qrels_va, model, self.text)
        self._check_steps(data, validation)
        plan, scores = (self.plan, None) if self.plan is not None else self._choose(model, data)
        student = prune_units(model, plan.heads, plan.neurons)
        student.text_field = self.text
        histories = [pd.DataFrame(columns=list(HISTORY))]
        for recovery in self._recoveries:
            history = recovery.recover(student, model, data.plain, validation and validation.plain)
            if history is not None:
                histories.append(history.assign(recovery=type(recovery).__name__)[list(HISTORY)])
        filled = [history for history in histories if len(history)] or histories
        qids = sorted(self._chosen_on(data) | (set() if validation is None else validation.qids))
        # With the module it goes wherever the ranker goes, also into the saved configuration.
        student.map.module.config.fitted_on = qids
        name = digest(fingerprint(student), settings_of(student)).hex()[:16]
        self._keep(Fitted(student, plan, pd.concat(filled, ignore_index=True), qids, name, scores))
        # What lies there, if anything, was fitted before.
        self.path = pt.Artifact.NO_PATH

    def _keep(self, fitted: Fitted) -> None:
        self.__dict__ |= {f'{name}_': value for name, value in vars(fitted).items()}
        self._fit_key = self._fitted_with()

    def _checked_model(self) -> Ranker:
        """Returns the ranker to prune, if the settings are for it."""
        self.check()
        if self.model is None:
            raise ValueError(f'{self!r} is fitted already: to prune it again, give its model_ to a new one')
        if self.plan is None:
            check_plan_settings(self.model, self._sparsity, allocation=self.allocation, **self._budget)
            return self.model
        check_prunable(self.model)
        if (self.criterion, self.sparsity, self.speedup) != (None, None, None):
            raise ValueError('a plan takes the place of criterion, sparsity and speedup: leave them out')
        if gone := self.plan.check(self.model).removed & Units.of(self.protect):
            raise ValueError(f'the plan removes {gone.names[0]}, which is protected: leave protect out')
        return self.model

    def _check_steps(self, data: FitData, validation: FitData | None) -> None:
        """Checks that data and scores are what every step needs."""
        steps: list[Any] = [*([self._criterion] if self.plan is None else []), *self._recoveries]
        for step in steps:
            check_step(step, data)
            check_logits(step, self.model)
            if 'qrels' in step.needs:
                data.labels()
        if both := set() if validation is None else data.qids & validation.qids:
            raise ValueError(f'{len(both)} queries are in both training and validation, e.g. {min(both)!r}')

    def _choose(self, model: Ranker, data: FitData) -> tuple[Plan, UnitScores]:
        """Scores the units and makes a plan, once it is clear that there is one."""
        plain, by_time = data.plain, self.budget == 'latency'
        lengths = [tower.lengths for tower in plain.inputs(model).towers]
        costs: dict[str, Any] = {
            'tokens': float(np.mean(lengths)),
            'latency': latency_costs(model, plain.frame, text_field='text') if by_time else None,
        }
        check_budget(model, self._sparsity, **self._budget, **costs)
        scores = self._criterion.scores(model, data)
        settings = {**self._budget, **costs, 'allocation': self.allocation}
        if by_time:
            asked = self.speedup if self.speedup is not None else 1 / (1 - (self._sparsity or 0.0))

            def faster(speedup: float) -> Plan:
                return make_plan(model, scores, **{**settings, 'speedup': speedup})

            plan = corrected(faster, asked, model, plain.frame, 'text')
        else:
            plan = make_plan(model, scores, self._sparsity, **settings)
        told = {'sparsity': self._sparsity, 'speedup': self.speedup, 'criterion': repr(self._criterion)}
        return replace(plan, settings={**plan.settings, **told, 'qids': sorted(self._chosen_on(data))}), scores

    def _chosen_on(self, data: FitData) -> set[str]:
        """Returns the queries that choose what stays or train its weights, those of validation left out."""
        qids = data.qids | as_qids(self.model.seen)
        for source in (self.protect, self.criterion, getattr(self.criterion, 'circuit', None)):
            qids |= as_qids(getattr(source, 'qids', ()))
        return qids | as_qids(self.plan.settings.get('qids', ()) if self.plan is not None else ())

    # -- ranking and judging

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame with the pruned ranker."""
        self.check()
        values = texts_of(inp, self, self.text)
        if not len(inp):
            return pt.model.add_ranks(inp.assign(score=np.zeros(0, dtype=np.float32)))
        scores = self._fitted().score(values['query'], values['text'])
        return with_seen(pt.model.add_ranks(inp.assign(score=scores)), self.qids_)

    def compare(self, frame: pd.DataFrame, qrels: pd.DataFrame, measures: Any, **settings: Any) -> Comparison:
        """Judges the pruned ranker against the unpruned one on queries that `fit` has not seen.

        Args:
            frame: Rows to re-rank: qid, query, docno, text.
            qrels: Judgements.
            measures: As `pt.Experiment` takes them.
            **settings: As `stats.compare` takes them.

        Raises:
            TypeError: If the unpruned ranker is not there, as after loading.
            ValueError: Before any work, if `fit` has seen a query of the frame, or a measure is not known.
        """
        pruned = self._fitted()
        if self.model is None:
            raise TypeError('the unpruned ranker is not saved: compare runs of both with stats.compare')
        as_measures(measures)
        values = texts_of(frame, self, self.text)
        refuse_seen(as_qids(frame['qid']) & set(judgements(qrels)['qid']), self.qids_, {})
        before, after = (
            frame[['qid', 'docno']].assign(score=ranker.score(values['query'], values['text']))
            for ranker in (self.model, pruned)
        )
        return compare(before, {'pruned': after}, qrels, measures, fitted_on=self.qids_, **settings)

    @property
    def fitted(self) -> bool:
        """Whether there is a pruned ranker that was made with these settings."""
        return hasattr(self, 'model_') and self._fit_key == self._fitted_with()

    def _fitted(self) -> Ranker:
        if not hasattr(self, 'model_'):
            raise ValueError(f'{self!r} has not been fitted: call fit(res, qrels, …), or load one that was saved')
        if not self.fitted:
            raise ValueError(f'{self!r} was fitted with other settings: call fit again')
        return self.model_

    # -- saving

    def save(self, path: str | Path, *, overwrite: bool = False) -> PrunedReranker:
        """Saves plan and small weights; `PrunedReranker.load(path)` and `pt.Artifact.load(path)` read them back.

        The folder appears when it is complete, or not at all. The unpruned checkpoint is not needed to load it, and
        the subfolder `ranker` alone is a model that `CrossEncoder` or `BiEncoder` loads.

        Args:
            path: The folder to make, from then on the `path` of this object, which is returned.
            overwrite: Whether to replace a pruned ranker that was saved there before. Nothing else is ever replaced.

        Raises:
            FileExistsError: If `path` exists and may not be replaced.
            ValueError: If there is nothing to save yet.
        """
        fitted = Fitted(self._fitted(), self.plan_, self.history_, self.qids_, self.name_, self.scores_)
        fitted.save(Path(path), type(self), repr(self), overwrite=overwrite)
        self.path = Path(path)
        return self

    def __repr__(self) -> str:
        """Returns the call that makes the stage, settings that are not the default included."""
        return super().__repr__() if self.model is not None else f'{type(self).__name__}.load({str(self.path)!r})'
