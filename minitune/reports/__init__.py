"""A report of runs or of the study's files: reading, statistics, drawing, the page. minitune/jobs/report.py puts it together."""
