"""Hostile requests: what they are (`cases.py`), and what a server made of them (`drive.py`)."""
