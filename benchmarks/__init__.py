"""Scripts that time this project beside a bare loop or a peer, in one run."""
