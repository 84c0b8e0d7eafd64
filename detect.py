"""Find objects in images, videos, streams: python detect.py --weights best.pt --source images/."""

from featherdet.__main__ import detect as main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
