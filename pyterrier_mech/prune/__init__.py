"""From a ranker to a smaller and faster one: criteria score units, plans choose, surgery removes, recovery repairs."""

from pyterrier_mech.evaluation.efficiency import efficiency
from pyterrier_mech.prune.criteria import L0, SMA, Conductance, Fisher, Magnitude, Movement, Patching, Random, Taylor
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.plans.latency import latency_costs
from pyterrier_mech.prune.plans.plan import Plan
from pyterrier_mech.prune.plans.planning import make_plan
from pyterrier_mech.prune.protocol import Criterion, Recovery
from pyterrier_mech.prune.recovery.distillation import Distillation
from pyterrier_mech.prune.recovery.fine_tuning import FineTuning
from pyterrier_mech.prune.recovery.rescaling import Rescaling
from pyterrier_mech.prune.reranker import PrunedReranker
from pyterrier_mech.prune.scores import UnitScores
from pyterrier_mech.prune.surgery import prune_units, remove_units
from pyterrier_mech.prune.unstructured import mask_weights

__all__ = [
    'L0',
    'SMA',
    'Conductance',
    'Criterion',
    'Distillation',
    'FineTuning',
    'Fisher',
    'FitData',
    'Magnitude',
    'Movement',
    'Patching',
    'Plan',
    'PrunedReranker',
    'Random',
    'Recovery',
    'Rescaling',
    'Taylor',
    'UnitScores',
    'efficiency',
    'latency_costs',
    'make_plan',
    'mask_weights',
    'prune_units',
    'remove_units',
]
