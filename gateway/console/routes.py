"""The console's routes."""

from gateway.console import assets, comparison, entry, home, jobs, passes, playground, runs, usage

ROUTES = [
    *assets.ROUTES,
    *entry.ROUTES,
    *home.ROUTES,
    *runs.ROUTES,
    *passes.ROUTES,
    *jobs.ROUTES,
    *comparison.ROUTES,
    *playground.ROUTES,
    *usage.ROUTES,
]
