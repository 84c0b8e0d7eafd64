"""Train a detector: python train.py --cfg yolov5n-ghost --data coco --img 640 --batch 16."""

from featherdet.__main__ import train as main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
