"""Say what this machine reaches, what minitune chooses on it and why, and what is missing."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.doctor", "DoctorConfig", "doctor", __doc__)
