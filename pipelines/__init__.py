"""Apache Beam jobs on top of sdjax: prompt files to image datasets, image datasets to latents."""
