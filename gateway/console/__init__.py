"""The web console: what a tenant's runs and jobs do, in a browser, without a line of client code."""
