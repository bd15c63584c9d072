"""The steps of the flights demo, each through the services' own APIs."""
