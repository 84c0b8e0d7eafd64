"""What detect.py reads: files, lists, URLs, cameras and streams."""
