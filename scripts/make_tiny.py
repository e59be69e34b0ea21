"""Makes the embedded models, tokenizers and rows again (minitune/embedded)."""

from minitune.config import run_script
from minitune.tiny import TinyConfig, make_all

if __name__ == "__main__":
    run_script(TinyConfig, make_all, "Make the embedded models, tokenizers and rows.")
