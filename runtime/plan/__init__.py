"""What a table on many ranks costs: bytes sent, memory, step time and placement, by arithmetic."""

from ultramem.runtime.plan.exchange import PAPER_WIRE, Collective, LookupShape, Volume, Wire, lookup_shape
from ultramem.runtime.plan.placement import Candidate, Choice, choose_placement
from ultramem.runtime.plan.volumes import columns, equal_value_dim, replicate, rows_at_home, rows_at_owner

__all__ = [
    "PAPER_WIRE",
    "Candidate",
    "Choice",
    "Collective",
    "LookupShape",
    "Volume",
    "Wire",
    "choose_placement",
    "columns",
    "equal_value_dim",
    "lookup_shape",
    "replicate",
    "rows_at_home",
    "rows_at_owner",
]
