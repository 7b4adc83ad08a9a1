"""One answer out of the frames of a job's attempts."""
