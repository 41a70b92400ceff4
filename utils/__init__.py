"""Metrics, figures, and what the scripts share. Imports no other room."""
