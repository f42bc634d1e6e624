"""Wires the packages into jobs; the only place that knows the whole."""
