"""Write an HTML page that colours every token of some rows as prompt, supervised or padding."""

from minitune.config import run_script
from minitune.inspect_data import InspectConfig, inspect_data

if __name__ == "__main__":
    run_script(InspectConfig, inspect_data, __doc__)
