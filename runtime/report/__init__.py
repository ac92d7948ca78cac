"""Results as one self-contained HTML file: no network, no scripts, readable on a phone and in the dark."""

from ultramem.runtime.report.demo_page import DemoRun, render_demo
from ultramem.runtime.report.page import write_report
from ultramem.runtime.report.profile_page import render_profile

__all__ = ["DemoRun", "render_demo", "render_profile", "write_report"]
