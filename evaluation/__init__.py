"""Evaluation: metrics, scores of error maps, result files, figures and tables. Imports only models and utils."""
