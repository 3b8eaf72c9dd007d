"""Everything that measures speed: microbenchmarks, and the parts of the GPU report."""
