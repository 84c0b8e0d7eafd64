"""Images and boxes: data sets, scan, augmentation, loading."""
