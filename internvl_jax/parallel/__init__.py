"""Device meshes, how parameters are partitioned over them, and runs of several processes."""
