"""Results as one self-contained HTML file: no network, no scripts, readable on a phone and in the dark."""

from ultramem.runtime.report.demo_page import DemoRun, render_demo
from ultramem.runtime.report.page import write_report
from ultramem.runtime.report.profile_page import render_profile
from ultramem.runtime.report.training_page import render_training
from ultramem.runtime.report.training_run import TrainingRun, read_training_run

__all__ = [
    "DemoRun",
    "TrainingRun",
    "read_training_run",
    "render_demo",
    "render_profile",
    "render_training",
    "write_report",
]
