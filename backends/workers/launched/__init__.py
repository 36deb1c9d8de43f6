"""Workers that a launcher such as mpiexec or srun starts, and that connect to the coordinator."""
