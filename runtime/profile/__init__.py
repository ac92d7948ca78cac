"""Where a model's time goes: latency on each engine, by request, stage and node, against bytes, FLOPs and roofs."""

from ultramem.machine import Machine, measure_machine
from ultramem.runtime.profile.arithmetic import MEMORY_STAGES, STAGES, StageCost, stage_costs
from ultramem.runtime.profile.inductor_kernels import COMPILE_OPTIONS, profiled_compilation
from ultramem.runtime.profile.measure import Engine, WrongLogitsError
from ultramem.runtime.profile.profiler import profile
from ultramem.runtime.profile.request_schema import Request, RowUse
from ultramem.runtime.profile.schema import (
    EngineRecord,
    Latency,
    ModuleRow,
    NodeRow,
    Profile,
    ProfiledModel,
    Settings,
    StageArithmetic,
    StageRow,
    StageTimes,
    check_document,
    to_json,
)
from ultramem.runtime.profile.table import print_profile

__all__ = [
    "COMPILE_OPTIONS",
    "MEMORY_STAGES",
    "STAGES",
    "Engine",
    "EngineRecord",
    "Latency",
    "Machine",
    "ModuleRow",
    "NodeRow",
    "Profile",
    "ProfiledModel",
    "Request",
    "RowUse",
    "Settings",
    "StageArithmetic",
    "StageCost",
    "StageRow",
    "StageTimes",
    "WrongLogitsError",
    "check_document",
    "measure_machine",
    "print_profile",
    "profile",
    "profiled_compilation",
    "stage_costs",
    "to_json",
]
