"""Write a report of run folders, or of the study's files: one HTML file that opens offline, with Markdown and PNG beside it."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.report", "ReportConfig", "report", __doc__)
