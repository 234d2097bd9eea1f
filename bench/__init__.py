"""Measurements of pgworker, on a throwaway server, and of another queue beside it in the same run."""
