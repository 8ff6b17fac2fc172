"""One module per operator: its rows, its formulations and its targets. Discovered, not listed."""
