"""From raw MRI volumes to training batches: cohorts, splits, preprocessing, the phantom, dataset and loader."""
