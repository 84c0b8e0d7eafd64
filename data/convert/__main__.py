"""`python -m data.convert`."""

from data.convert.command import main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
