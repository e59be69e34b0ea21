"""Talk with a model, with the template that its adapter was trained with."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.chat", "ChatConfig", "chat", __doc__)
