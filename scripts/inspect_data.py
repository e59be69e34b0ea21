"""Write an HTML page that colours every token of some rows as prompt, supervised or padding."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.inspect_data", "InspectConfig", "inspect_data", __doc__)
