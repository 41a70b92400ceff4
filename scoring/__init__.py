"""Scoring: find and load trained translators, score slices and scans. Scripts and benchmarks import it."""
