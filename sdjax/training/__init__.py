"""Training: the procedural data set, data sources, objectives, the loop and the held-out measurement of a model."""
