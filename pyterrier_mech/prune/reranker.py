"""The four steps of pruning as one estimator: scores, a plan, surgery, recovery."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_mech._columns import FITTED_ON
from pyterrier_mech._frames import require, strings
from pyterrier_mech.prune.criteria import Criterion, check_needs
from pyterrier_mech.prune.data import FitData, fit_data
from pyterrier_mech.prune.encoded import Encoded
from pyterrier_mech.prune.gradient import Fisher
from pyterrier_mech.prune.latency import latency_costs
from pyterrier_mech.prune.plan import Plan, check_plan_settings, make_plan
from pyterrier_mech.prune.rescaling import Rescaling
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.surgery import prune_units
from pyterrier_mech.rankers import BiEncoder, CrossEncoder
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.rankers.resizing import check_resizable
from pyterrier_mech.rankers.saving import save_ranker
from pyterrier_mech.results._saving import META, appearing, read_meta
from pyterrier_mech.stats import Comparison, compare

_RANKERS = {'CrossEncoder': CrossEncoder, 'BiEncoder': BiEncoder}
_RANKER, _PLAN = 'ranker', 'plan.json'


class Recovery(Protocol):
    """What repairs a pruned ranker, which it may change: `Rescaling`, `Distillation`, `FineTuning`."""

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have: some of 'text' and 'qrels'."""

    def recover(
        self, student: Ranker, teacher: Ranker, data: FitData, validation: FitData | None = None
    ) -> pd.DataFrame | None:
        """Changes the weights of `student`; returns a history, if there is one."""


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
        qids_: Queries that `fit` has seen, sorted, as strings. `compare` refuses to judge on them, and the ranked
            frame carries them in its `attrs`, so that `stats.compare` refuses too.

    Raises:
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
        recovery: Sequence[Recovery] = (Rescaling(),),
        text_field: str | None = None,
    ):
        """Stores the settings; reads the folder, if it is one."""
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
            self._read(Path(model))

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
                stage gives them; with text_0 where `Perturb` stands before.
            qrels_tr: Their judgements, where a step needs them.
            topics_or_res_va: Rows of other queries, for early stopping.
            qrels_va: Their judgements.
        """
        model = self._checked_model()
        data = fit_data(topics_or_res_tr, qrels_tr, model, self._text)
        validation = None
        if topics_or_res_va is not None and len(topics_or_res_va):
            validation = fit_data(topics_or_res_va, qrels_va, model, self._text)
        self._check(model, data, validation)
        plan, scores = self.plan, None
        if plan is None:
            scores = self._criterion.scores(model, data)
            plan = self._make_plan(model, scores, data)
        student = prune_units(model, plan.heads, plan.neurons)
        histories = []
        for recovery in self.recovery:
            history = recovery.recover(student, model, data, validation)
            if history is not None:
                histories.append(history.assign(recovery=type(recovery).__name__))
        self.plan_, self.scores_, self.model_ = plan, scores, student
        columns = ['recovery', 'step', 'loss', 'validation']
        self.history_ = pd.concat([pd.DataFrame(columns=columns), *histories])[columns].reset_index(drop=True)
        self.qids_ = self._seen(data, validation)

    @property
    def _criterion(self) -> Criterion:
        return self.criterion if self.criterion is not None else Fisher()

    @property
    def _sparsity(self) -> float | None:
        return 0.5 if self.sparsity is None and self.speedup is None else self.sparsity

    def _checked_model(self) -> Ranker:
        if not isinstance(self.model, Ranker):
            raise ValueError(f'{str(self.model)!r} is fitted already: to prune it again, give its model_')
        check_resizable(self.model.encoder.base.config.model_type)
        return self.model

    def _check(self, model: Ranker, data: FitData, validation: FitData | None) -> None:
        """Checks all that can be checked before any work."""
        if self.plan is not None:
            self.plan.check(model)
        else:
            check_plan_settings(
                model, self._sparsity, self.budget, self.speedup, self.allocation, self.protect, self.multiple
            )
        steps: list[Any] = [*([] if self.plan is not None else [self._criterion]), *self.recovery]
        for step in steps:
            check_needs(step, data)
            if 'qrels' in step.needs:
                data.labels()
        if validation is not None:
            both = set(data.frame['qid'].astype(str)) & set(validation.frame['qid'].astype(str))
            if both:
                raise ValueError(
                    f'{len(both)} queries are in both training and validation (e.g. {sorted(both)[0]!r}): split them'
                )

    def _make_plan(self, model: Ranker, scores: UnitScores, data: FitData) -> Plan:
        latency = latency_costs(model, data.frame, text_field='text') if self.budget == 'latency' else None
        return make_plan(
            model,
            scores,
            self._sparsity,
            budget=self.budget,
            speedup=self.speedup,
            allocation=self.allocation,
            protect=self.protect,
            multiple=self.multiple,
            tokens=_mean_tokens(model, data),
            latency=latency,
        )

    def _seen(self, data: FitData, validation: FitData | None) -> list[str]:
        """Returns all queries that had a say: also those that a circuit was found on."""
        qids = set(data.frame['qid'].astype(str))
        if validation is not None:
            qids |= set(validation.frame['qid'].astype(str))
        for circuit in (self.protect, getattr(self.criterion, 'circuit', None)):
            qids |= set(map(str, getattr(circuit, 'qids', ())))
        return sorted(qids)

    # -- ranking and judging

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame with the pruned ranker."""
        require(inp, self, ['query', self._text])
        if not len(inp) and not self.fitted:
            return pt.model.add_ranks(inp.assign(score=np.zeros(0, dtype=np.float32)))
        model = self._fitted()
        scores = model.score(strings(inp, 'query', self), strings(inp, self._text, self))
        res = pt.model.add_ranks(inp.assign(score=scores))
        res.attrs[FITTED_ON] = self.qids_
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
            raise TypeError('the unpruned ranker is not saved: compare runs of both with pyterrier_mech.stats.compare')
        plain = frame[['qid', 'query', 'docno']].assign(**{self.model.text_field: frame[self._text]})
        before, after = self.model.transform(plain), pruned.transform(plain)
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
        model = self._fitted()
        path = Path(path)
        with appearing(path, overwrite=overwrite, ours=_is_ours, what=type(self).__name__) as new:
            save_ranker(model, new / _RANKER)
            self.plan_.save(new / _PLAN)
            summary = {
                'ranker': type(model).__name__,
                'settings': _settings(model),
                'made_by': repr(self),
                'qids': self.qids_,
                'history': self.history_.astype(object).where(self.history_.notna(), None).to_dict('list'),
            }
            meta = {
                'type': self.ARTIFACT_TYPE,
                'format': self.ARTIFACT_FORMAT,
                'package_hint': self.ARTIFACT_PACKAGE_HINT,
                'summary': summary,
            }
            (new / META).write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
        self.path = path
        return self

    def _read(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f'There is no {str(path)!r}. Give a ranker to prune, e.g. PrunedReranker(CrossEncoder(...)), or the '
                'folder that PrunedReranker.save(path) made.'
            )
        meta = read_meta(path)
        if not _is_ours(meta):
            raise ValueError(
                f'{str(path)!r} holds no saved PrunedReranker. To prune a model give the ranker, e.g. '
                'PrunedReranker(CrossEncoder(...)).'
            )
        summary = meta['summary']
        self.plan_, self.scores_ = Plan.load(path / _PLAN), None
        self.model_ = _RANKERS[summary['ranker']](str(path / _RANKER), **summary['settings'])
        self.history_, self.qids_ = pd.DataFrame(summary['history']), summary['qids']

    # -- how the stage is shown

    @property
    def _text(self) -> str:
        if self.text_field is not None:
            return self.text_field
        return (self.model if isinstance(self.model, Ranker) else self.model_).text_field

    def __repr__(self) -> str:
        """Tells the settings that differ from the defaults."""
        if not isinstance(self.model, Ranker):
            return f'PrunedReranker({str(self.model)!r})'
        shown = [repr(self.model)]
        if self.plan is not None:
            shown.append(f'plan={self.plan!r}')
        else:
            shown.append(repr(self._criterion))
            how_much = f'speedup={self.speedup!r}' if self.speedup is not None else f'sparsity={self._sparsity!r}'
            shown += [how_much, f'budget={self.budget!r}', f'allocation={self.allocation!r}']
        return f'PrunedReranker({", ".join(shown)}, recovery={tuple(self.recovery)!r})'

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        return {'label': type(self).__name__, 'help_url': None}


def _settings(model: Ranker) -> dict[str, Any]:
    """Returns the settings that the files of a saved ranker do not say."""
    own = {'label': model.label} if isinstance(model, CrossEncoder) else {}
    dtype = model.dtype or str(next(model.encoder.module.parameters()).dtype).removeprefix('torch.')
    return {'text_field': model.text_field, 'dtype': dtype, **own}


def _is_ours(meta: dict[str, Any]) -> bool:
    return (meta.get('type'), meta.get('format')) == (PrunedReranker.ARTIFACT_TYPE, PrunedReranker.ARTIFACT_FORMAT)


def _mean_tokens(model: Ranker, data: FitData) -> float:
    """Returns the mean length of the sequences that the ranker reads."""
    encoded = Encoded.of(model, data.queries, data.texts)
    return float(np.mean([encoded.lengths(tower) for tower in range(len(encoded.towers))]))
