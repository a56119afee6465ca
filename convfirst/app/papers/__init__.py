"""The papers' reports, one module each: the suites to run, and the sections to write from what they found."""

from convfirst.app.papers.findings import Findings

__all__ = ["Findings"]
