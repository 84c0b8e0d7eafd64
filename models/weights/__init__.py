"""Weights from elsewhere: YOLOv5 checkpoints and ImageNet backbones."""
