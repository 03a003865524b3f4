"""What the machine has: its NPUs, CANN and driver, the Python packages, and whether they fit each other."""
