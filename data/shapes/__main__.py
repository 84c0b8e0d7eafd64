"""`python -m data.shapes`."""

from data.shapes.files import main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
