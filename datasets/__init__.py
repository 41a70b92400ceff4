"""From raw MRI volumes to training slices: preprocessing, splits, the phantom cohort, the Dataset, its loader."""
