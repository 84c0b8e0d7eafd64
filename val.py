"""Validate a detector: python val.py --weights best.pt --data coco --img 640."""

from featherdet.__main__ import val as main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
