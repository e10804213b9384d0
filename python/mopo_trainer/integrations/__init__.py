"""MOPO inside trainers of other libraries, one module for each; nothing here is imported unless it is asked for."""
