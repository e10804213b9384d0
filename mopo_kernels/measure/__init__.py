"""Measuring: imports the rest of the package, and nothing imports it."""
