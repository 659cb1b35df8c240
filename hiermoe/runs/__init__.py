"""One run -> records: configurations, sweeps, single runs, jobs."""
