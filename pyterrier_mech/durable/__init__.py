"""Long runs: finished work is kept in a folder, on one machine or many."""

from pyterrier_mech.durable.distributed import Distributed, FailedUnitsError
from pyterrier_mech.durable.resumable import Resumable, Status

__all__ = ['Distributed', 'FailedUnitsError', 'Resumable', 'Status']
