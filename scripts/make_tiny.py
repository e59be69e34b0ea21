"""Makes the embedded models, tokenizers and rows again (minitune/embedded)."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.embedded.make", "TinyConfig", "make_all", "Make the embedded models, tokenizers and rows.")
