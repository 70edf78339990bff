"""Demonstrations: by the scripted expert, and by a person's hands."""
