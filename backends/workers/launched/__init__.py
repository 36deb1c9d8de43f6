"""Workers that a launcher such as mpiexec or srun starts, and that come to the coordinator."""
