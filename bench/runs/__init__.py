"""Real runs on real data, one module each: `run` trains or measures. Discovered, not listed."""
