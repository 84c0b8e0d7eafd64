"""Export: a detector as a file of another runtime, and running such files."""
