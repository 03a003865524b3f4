"""This machine: its NPUs, CANN, driver and Python packages, and whether their versions go together."""
