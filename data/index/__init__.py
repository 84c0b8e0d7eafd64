"""Data sets as lists of images and boxes: COCO, YOLO, scan, cache."""
