"""One run -> records: the configuration of a run, running it, and sweeps with resume."""
