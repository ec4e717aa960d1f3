"""Where a run's data comes from, and whether its sampler and its trainer part: for clients' runs and for jobs'."""
