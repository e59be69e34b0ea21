"""The parts of a report of runs or of the study's files: reading, statistics, drawing, the page. jobs/report.py combines them."""
