"""From records to answers: tables, statistics, verdicts, figures, and the report.

Read in this order: frames (records of a sweep), statistics (intervals), claims and cases (what the paper says, and the
runs that answer it), quantities (metric -> number), verdicts, figures/, findings, report.
"""
