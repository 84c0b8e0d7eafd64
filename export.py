"""Export a detector: python export.py --weights best.pt --include onnx openvino."""

from featherdet.__main__ import export as main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(main)
