"""Write a report of run folders, or of the study's files: one HTML file that opens offline, with Markdown and PNG beside it."""

from minitune.config import run_script
from minitune.report import ReportConfig, report

if __name__ == "__main__":
    run_script(ReportConfig, report, __doc__)
