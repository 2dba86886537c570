"""The HTML report: one file with all that is to be seen of runs, which needs no network."""

from fishr.reports.page.build import REPORT, analysis_page, write_report

__all__ = ["REPORT", "analysis_page", "write_report"]
