"""A pruned ranker in a folder: its small weights, its plan, and what its fit has seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_mech.prune.plans.plan import Plan
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.rankers.bi_encoder import BiEncoder
from pyterrier_mech.rankers.cross_encoder import CrossEncoder
from pyterrier_mech.rankers.loading import PRUNED, kept_counts
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.rankers.saving import save_ranker
from pyterrier_mech.saving import META, appearing, damaged, header, is_of, read_meta, write_meta

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
        qids: Queries that chose or trained it.
        name: What tells its weights and settings from others'.
        scores: What the criterion said; it is not saved.
    """

    model: Ranker
    plan: Plan
    history: pd.DataFrame
    qids: list[str]
    name: str
    scores: UnitScores | None = None

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
        with appearing(path, artifact, overwrite=overwrite) as new:
            save_ranker(self.model, new / _RANKER)
            self.plan.save(new / _PLAN)
            summary: dict[str, Any] = {'ranker': type(self.model).__name__, 'settings': settings_of(self.model)}
            summary |= {
                'made_by': made_by,
                'qids': self.qids,
                'name': self.name,
                'history': self.history.to_dict('list'),
            }
            write_meta(new, {**header(artifact), 'summary': summary})

    @classmethod
    def load(cls, path: Path, artifact: type[pt.Artifact]) -> Fitted:
        """Reads such a folder; the weights are loaded when first needed.

        Raises:
            FileNotFoundError: If there is no folder.
            ValueError: If it holds something else, is damaged, or its plan is of another ranker.
        """
        name = artifact.__name__
        if not path.exists():
            raise FileNotFoundError(f'There is no {str(path)!r}: give the folder that {name}.save(path) made.')
        meta = read_meta(path)
        if not is_of(artifact, meta):
            raise ValueError(
                f'{str(path)!r} holds no saved {name}: give the folder that {name}.save(path) made. To prune a model '
                f'give the ranker, e.g. {name}(CrossEncoder(...)).'
            )
        folder = str((path / _RANKER).resolve())
        try:
            summary = meta['summary']
            # No other setting is taken from a file: a tokenizer's name, for one, would be read from anywhere.
            known = {key: summary['settings'][key] for key in _SETTINGS if key in summary['settings']}
            if isinstance(known.get('label'), list):  # JSON has no tuples
                known['label'] = tuple(known['label'])
            model = _RANKERS[summary['ranker']](folder, **known)
            history = pd.DataFrame(summary['history'], columns=list(HISTORY))
            history = history.astype({'step': int, 'loss': float, 'validation': float})
            found = cls(model, Plan.load(path / _PLAN), history, list(map(str, summary['qids'])), str(summary['name']))
        except (AttributeError, KeyError, TypeError) as error:
            raise damaged(path / META, repr(error)) from error
        widths = tuple([len(layer) for layer in kind] for kind in (found.plan.heads, found.plan.neurons))
        counts = kept_counts(folder)
        if counts != widths:
            raise damaged(path / _PLAN, f'it keeps {widths}, and {PRUNED} of the ranker says {counts}')
        return found


_SETTINGS = ('text_field', 'dtype', 'label', 'target')


def settings_of(model: Ranker) -> dict[str, Any]:
    """Returns the settings that the files of a saved ranker do not say."""
    dtype = model.dtype or str(model.map.dtype).removeprefix('torch.')
    score = {name: getattr(model, name) for name in ('label', 'target') if hasattr(model, name)}
    return {'text_field': model.text_field, 'dtype': dtype, **score}
