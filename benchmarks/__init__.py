"""Scripts that time this project and a bare loop or a peer in one run."""
