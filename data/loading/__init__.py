"""Images and boxes to batches: decoding, augmentation, worker processes."""
