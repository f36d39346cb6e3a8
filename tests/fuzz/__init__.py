"""Seeded damage to whatever a user or a disk can damage, one file of tests per entry point.

Each input ends with the right meaning, or with one sentence that names the file, sample or setting.
"""
