"""From scores to what a paper prints: metrics, figures, results on disk, tables. Imports no other room but utils."""
