"""Jobs of the chart; each may run any number of times."""
