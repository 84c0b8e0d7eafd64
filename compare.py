"""Compare detectors: python compare.py --cfg yolov5n yolov5n-ghost --data bccd --seeds 0 1 2."""

from featherdet.__main__ import compare as main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
