"""Build script: everything static stands in pyproject.toml; compiled extensions join here."""

from setuptools import setup

setup()
