"""A pruned ranker in a folder: its small weights, its plan, and what its fit has seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_mech.prune.plans.plan import Plan
from pyterrier_mech.rankers import BiEncoder, CrossEncoder
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.rankers.saving import save_ranker
from pyterrier_mech.saving import META, appearing, read_meta

HISTORY = ('recovery', 'step', 'loss', 'validation')

_RANKERS: dict[str, type[Ranker]] = {'CrossEncoder': CrossEncoder, 'BiEncoder': BiEncoder}
_RANKER, _PLAN = 'ranker', 'plan.json'


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit leaves behind.

    Attributes:
        model: The pruned ranker.
        plan: What stays of the unpruned one.
        history: One row a validation, with the columns `HISTORY`.
        qids: Queries that had a say.
    """

    model: Ranker
    plan: Plan
    history: pd.DataFrame
    qids: list[str]

    def save(self, path: Path, artifact: type[pt.Artifact], made_by: str, *, overwrite: bool) -> None:
        """Writes a folder, which appears when it is complete, or not at all.

        Args:
            path: The folder to make.
            artifact: The class that reads it.
            made_by: How it was made, for the reader of the metadata.
            overwrite: Whether a folder of the same artifact may be replaced.

        Raises:
            FileExistsError: If `path` exists and may not be replaced.
        """

        def ours(meta: dict[str, Any]) -> bool:
            return _is_of(artifact, meta)

        with appearing(path, overwrite=overwrite, ours=ours, what=artifact.__name__) as new:
            save_ranker(self.model, new / _RANKER)
            self.plan.save(new / _PLAN)
            history = self.history.astype(object).where(self.history.notna(), None)
            summary = {
                'ranker': type(self.model).__name__,
                'settings': _settings(self.model),
                'made_by': made_by,
                'qids': self.qids,
                'history': history.to_dict('list'),
            }
            meta = {**_type_of(artifact), 'package_hint': artifact.ARTIFACT_PACKAGE_HINT, 'summary': summary}  # type: ignore[attr-defined]
            (new / META).write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: Path, artifact: type[pt.Artifact]) -> Fitted:
        """Reads such a folder; the weights are loaded when first needed.

        Raises:
            FileNotFoundError: If there is no folder.
            ValueError: If it holds something else.
        """
        name = artifact.__name__
        if not path.exists():
            raise FileNotFoundError(
                f'There is no {str(path)!r}. Give a ranker to prune, e.g. {name}(CrossEncoder(...)), or the folder '
                f'that {name}.save(path) made.'
            )
        meta = read_meta(path)
        if not _is_of(artifact, meta):
            raise ValueError(
                f'{str(path)!r} holds no saved {name}. To prune a model give the ranker, e.g. '
                f'{name}(CrossEncoder(...)).'
            )
        summary = meta['summary']
        model = _RANKERS[summary['ranker']](str((path / _RANKER).resolve()), **summary['settings'])
        history = pd.DataFrame(summary['history'], columns=list(HISTORY))
        history = history.astype({'step': int, 'loss': float, 'validation': float})
        return cls(model, Plan.load(path / _PLAN), history, summary['qids'])


def _settings(model: Ranker) -> dict[str, Any]:
    """Returns the settings that the files of a saved ranker do not say."""
    own = {'label': model.label} if isinstance(model, CrossEncoder) else {}
    dtype = model.dtype or str(next(model.encoder.module.parameters()).dtype).removeprefix('torch.')
    return {'text_field': model.text_field, 'dtype': dtype, **own}


def _type_of(artifact: type[pt.Artifact]) -> dict[str, str]:
    return {'type': artifact.ARTIFACT_TYPE, 'format': artifact.ARTIFACT_FORMAT}  # type: ignore[attr-defined]


def _is_of(artifact: type[pt.Artifact], meta: dict[str, Any]) -> bool:
    return {key: meta.get(key) for key in ('type', 'format')} == _type_of(artifact)
